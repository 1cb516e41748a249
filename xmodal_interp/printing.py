"""What the command line says: tables on a terminal and in files, refusals in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from xmodal_interp.errors import InputError, XmodalError

out, err = Console(), Console(stderr=True)


class Group(TyperGroup):
    """Refusals in one line, without a traceback: exit code 1. Wrong usage is 2, as ever."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except XmodalError as error:
            err.print(f"[bold red]error:[/] {error}", markup=True, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            err.print("stopped; what was written before is whole")
            raise typer.Exit(130) from None


def show(table: pd.DataFrame, rows: int | None = None) -> None:
    """Print a table.

    Args:
        table: Any table.
        rows: How many rows at most; all if not given.
    """
    shown = Table(box=None, header_style="bold")
    for column, dtype in table.dtypes.items():
        right = pd.api.types.is_numeric_dtype(dtype)
        shown.add_column(str(column), justify="right" if right else "left")
    for row in table.head(len(table) if rows is None else rows).itertuples(index=False):
        shown.add_row(*(_cell(value) for value in row))
    out.print(shown)
    if rows is not None and len(table) > rows:
        out.print(
            f"... {len(table) - rows} more rows; --rows {len(table)} shows all, --path FILE writes "
            "them"
        )


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a table in the format that the file's name says.

    Raises:
        InputError: Another ending than .csv, .parquet, .json.
    """
    writers: dict[str, Callable[[pd.DataFrame], object]] = {
        ".csv": lambda t: t.to_csv(path, index=False),
        ".parquet": lambda t: t.to_parquet(path, index=False),
        ".json": lambda t: t.to_json(path, orient="records", indent=1),
    }
    if path.suffix not in writers:
        raise InputError(f"--path must end in {', '.join(writers)}; got {path.name!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    writers[path.suffix](table)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return escape(str(value))
    return "-" if pd.isna(value) else f"{value:.4g}"
