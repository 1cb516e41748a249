"""Output of the command line: tables on the terminal and in files, errors in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

import xmodal_interp as xi
from xmodal_interp.errors import InputError, XmodalError, counted
from xmodal_interp.escaping import for_spreadsheets, printable

if TYPE_CHECKING:
    import pandas as pd

out, err = Console(), Console(stderr=True)


_MOST_ANSWERS = 20  # samples whose answer is printed


class Group(TyperGroup):
    """Prints errors of this package in one line, without a traceback, and exits with code 1.

    Wrong usage exits with code 2, as in any command of typer.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run a command; turn errors of this package and Ctrl-C into exit codes."""
        try:
            return super().invoke(ctx)
        except XmodalError as error:
            say("error:", str(error), style="bold red", to=err)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            say("stopped; files that were already written are complete", to=err)
            raise typer.Exit(130) from None


def say(*parts: str, style: str = "", to: Console = out) -> None:
    """Print a line literally: markup and control characters are escaped.

    Args:
        *parts: Strings to print, separated by spaces.
        style: Style of the first part, if there are several.
        to: The console.
    """
    first, *others = (Text(printable(part)) for part in parts)
    if others:
        first.stylize(style)
    to.print(first, *others, highlight=False, soft_wrap=True)


def show(table: pd.DataFrame) -> None:
    """Print a table; cells wider than the terminal are wrapped."""
    shown = Table(box=None, header_style="bold")
    for column, dtype in table.dtypes.items():
        right = dtype.kind in "biufc"
        shown.add_column(Text(str(column)), justify="right" if right else "left")
    for row in table.itertuples(index=False):
        shown.add_row(*(Text(_cell(value)) for value in row))
    out.print(shown)


def show_long(table: pd.DataFrame, rows: int) -> None:
    """Print the first rows of a long table without truncating cells.

    Columns with one value in all rows are printed once, above the table. If the other columns are
    wider than the terminal, the table is printed in several parts. Each part repeats the key
    columns: those before the first float column.

    Args:
        table: The table.
        rows: Largest number of rows to print.
    """
    same = [name for name in table if len(table[name].unique()) == 1]
    for name in same:
        if not (table[name].isna() | table[name].eq("")).all():
            say(f"{name}: {_cell(table[name].iloc[0])}")
    differing = table.drop(columns=same).head(rows)
    for part in _side_by_side(differing, out.width) if differing.columns.size else ():
        show(differing[part])
    if len(table) > rows:
        say(
            f"... {len(table) - rows} more rows; --rows {len(table)} prints all, --path FILE "
            "writes them to a file"
        )


def _side_by_side(table: pd.DataFrame, width: int) -> list[list[str]]:
    """Split columns into parts of at most ``width`` characters, each with the key columns.

    A part has at least one other column, even if it is wider.
    """
    widths = {
        str(name): 2 + max(cell_len(str(name)), *(cell_len(_cell(value)) for value in table[name]))
        for name in table
    }
    fractions = [dtype.kind == "f" for dtype in table.dtypes]
    n_keys = fractions.index(True) if any(fractions) else 0
    names = list(widths)
    keys, values = names[:n_keys], names[n_keys:]
    parts, left = [[*keys]], width - sum(widths[name] for name in keys)
    room = left
    for name in values:
        if widths[name] > room and len(parts[-1]) > len(keys):
            parts.append([*keys])
            room = left
        parts[-1].append(name)
        room -= widths[name]
    return parts


def show_store(store: xi.Store) -> None:
    """Print the size of a store and the settings of its samples."""
    import pandas as pd

    say(f"{store.path}: {counted(len(store), 'sample')}, {store.n_bytes / 1e6:.1f} MB")
    about = {**store.manifest, **store.manifest["settings"]}
    rows = [(name, _formatted(value)) for name, value in about.items() if name != "settings"]
    show(pd.DataFrame(rows, columns=["setting", "value"]))


def show_answers(store: xi.Store, names: Sequence[str]) -> None:
    """Print the question and the answer of some samples, and how many items failed."""
    for name in names[:_MOST_ANSWERS]:
        sample = store[name]
        say(f"{name}: {sample.question!r} -> {sample.answer!r}")
    if len(names) > _MOST_ANSWERS:
        say(f"... {counted(len(names) - _MOST_ANSWERS, 'more sample')}")
    failures = store.failures
    if len(failures):
        first = failures["message"].iloc[0]
        say(f"{counted(len(failures), 'item')} could not be captured; the first: {first}", to=err)


def show_or_write(table: pd.DataFrame, path: Path | None, rows: int) -> None:
    """Print the first rows of a table, or write all of it to a file."""
    if path is None:
        show_long(table, rows)
        return
    write(table, path)
    say(f"{counted(len(table), 'row')} written to {path}")


def check_model_name(name: str, path: Path) -> None:
    """Check that a name which is no store can be a model, before it is looked up on the Hub.

    Raises:
        InputError: It is a file, a folder without a model, or a path that does not exist.
    """
    if path.is_dir():
        problem = "neither a store (it has no manifest.json) nor a model (it has no config.json)"
        if any((path / file).exists() for file in ("config.json", "adapter_config.json")):
            return
    elif path.exists():
        problem = "a file"
    elif name.count("/") > 1 or name[0] in "./~" or _has_stores(name, path):
        problem = "not an existing folder"
    else:
        return
    raise InputError(
        f"{name!r} is {problem}. Pass the folder of a store or a model, a Hub id, or a shipped "
        "model."
    )


def _has_stores(name: str, path: Path) -> bool:
    """Return whether a name is a path in a folder with stores, and therefore not a Hub id."""
    return "/" in name and any(path.parent.glob("*/manifest.json"))


def check_output(path: Path, *, force: bool, option: str = "--path") -> None:
    """Check that a command may write to a file.

    Args:
        path: The file.
        force: Whether it may be overwritten.
        option: The option that names it, for messages.

    Raises:
        InputError: The file is inside a store, is a symbolic link or a folder, or exists and
            ``force`` is False.
    """
    from xmodal_interp.arguments import user_path

    path = user_path(path)
    around = xi.store.store_around(path)
    if around is not None:
        raise InputError(
            f"{str(path)!r} is inside the store {str(around)!r}, where only samples are written. "
            f"Choose another {option}."
        )
    if path.is_symlink() or path.is_dir():
        what = "a symbolic link" if path.is_symlink() else "a folder"
        raise InputError(f"{option} must be a file; {str(path)!r} is {what}.")
    if path.exists() and not force:
        raise InputError(
            f"{str(path)!r} exists. Choose another {option}, or pass --force to overwrite it."
        )


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a table in the format given by the file's extension.

    Raises:
        InputError: The extension is not .csv, .parquet or .json, or the file cannot be written.
    """
    from xmodal_interp.arguments import user_path

    writers: dict[str, Callable[[pd.DataFrame], object]] = {
        ".csv": lambda t: for_spreadsheets(t).to_csv(path, index=False),
        ".parquet": lambda t: t.to_parquet(path, index=False),
        ".json": lambda t: t.to_json(path, orient="records", indent=1),
    }
    if path.suffix not in writers:
        raise InputError(f"--path must end in {', '.join(writers)}; got {path.name!r}.")
    path = user_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writers[path.suffix](table)
    except OSError as error:
        raise InputError(f"A table could not be written to {str(path)!r}: {error}.") from error


def _cell(value: object) -> str:
    import numpy as np
    import pandas as pd

    if isinstance(value, (float, np.floating)):
        return "-" if np.isnan(value) else f"{value:.4g}"
    return "-" if value is pd.NA else printable(str(value), lines=False)


def _formatted(value: object) -> str:
    """Format a setting: lists are separated by commas, the entries of a mapping as name value."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_formatted(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_formatted, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)
