"""What the command line says: tables on a terminal and in files, refusals in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from xmodal_interp.errors import InputError, XmodalError
from xmodal_interp.paths import user_path
from xmodal_interp.printable import for_spreadsheets, printable
from xmodal_interp.store import Store, store_around

out, err = Console(), Console(stderr=True)


class Group(TyperGroup):
    """Refusals in one line, without a traceback: exit code 1. Wrong usage is 2, as ever."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except XmodalError as error:
            say("error:", str(error), style="bold red", to=err)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            say("stopped; what was written before is whole", to=err)
            raise typer.Exit(130) from None


def say(*parts: str, style: str = "", to: Console = out) -> None:
    """Print a line as it stands: nothing in it is markup, nor a command to the terminal.

    Args:
        *parts: What to print, with a space between.
        style: Of the first part, if there are several.
        to: The console.
    """
    first, *others = (Text(printable(part)) for part in parts)
    if others:
        first.stylize(style)
    to.print(first, *others, highlight=False, soft_wrap=True)


def show(table: pd.DataFrame) -> None:
    """Print a table; cells that are too wide for the terminal are folded."""
    shown = Table(box=None, header_style="bold")
    for column, dtype in table.dtypes.items():
        right = pd.api.types.is_numeric_dtype(dtype)
        shown.add_column(Text(str(column)), justify="right" if right else "left")
    for row in table.itertuples(index=False):
        shown.add_row(*(Text(_cell(value)) for value in row))
    out.print(shown)


def show_long(table: pd.DataFrame, rows: int) -> None:
    """Print the first rows of a long table of an analysis, so that every cell can be read.

    What all rows have in common is said above it. Columns that don't fit side by side come in
    parts below each other, each behind the columns that say what a row is for: those before the
    first fraction.

    Args:
        table: The table.
        rows: How many rows at most.
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
            f"... {len(table) - rows} more rows; --rows {len(table)} shows all, --path FILE writes "
            "them"
        )


def _side_by_side(table: pd.DataFrame, width: int) -> list[list[str]]:
    """The columns in parts that are at most so wide, if the keys leave room for any other."""
    widths = {
        str(name): 2 + max(cell_len(str(name)), *(cell_len(_cell(value)) for value in table[name]))
        for name in table
    }
    fractions = [pd.api.types.is_float_dtype(dtype) for dtype in table.dtypes]
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


def show_store(store: Store) -> None:
    """Print how large a store is, and the settings that its samples were made with."""
    say(f"{store.path}: {len(store)} samples, {store.n_bytes / 1e6:.1f} MB")
    about = {**store.manifest, **store.manifest["settings"]}
    rows = [(name, _in_words(value)) for name, value in about.items() if name != "settings"]
    show(pd.DataFrame(rows, columns=["setting", "value"]))


def check_output(path: Path, *, force: bool) -> None:
    """Refuse a file that a command must not write to.

    Raises:
        InputError: It is inside a store, is a symbolic link or a folder, or exists and is not to be
            overwritten.
    """
    path = user_path(path)
    around = store_around(path)
    if around is not None:
        raise InputError(
            f"Nothing else is written into a store. {str(path)!r} is inside the store "
            f"{str(around)!r}; choose another --path."
        )
    if path.is_symlink() or path.is_dir():
        what = "a symbolic link" if path.is_symlink() else "a folder"
        raise InputError(f"--path must be a file; {str(path)!r} is {what}.")
    if path.exists() and not force:
        raise InputError(
            f"{str(path)!r} exists. Choose another --path, or pass --force to overwrite it."
        )


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a table in the format that the file's name says.

    Raises:
        InputError: Another ending than .csv, .parquet, .json, or no file can be written there.
    """
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
    if value is pd.NA or (isinstance(value, float) and pd.isna(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value), lines=False)


def _in_words(value: object) -> str:
    """A setting as one reads it: lists with commas, names before what they stand for."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_in_words(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_in_words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)
