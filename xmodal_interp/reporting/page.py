"""One self-contained HTML page of sections with sentences, pictures and tables.

Everything is in the file: pictures as data URIs, the style, and a script that sorts tables, writes
them as CSV and changes between dark and light. A content security policy in the page forbids every
request and every other script. Text is escaped, so that prompts, answers and names are displayed
and never interpreted.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from os import PathLike
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup
from PIL import Image

from xmodal_interp.arguments import user_path
from xmodal_interp.errors import InputError, counted
from xmodal_interp.escaping import printable
from xmodal_interp.figures.style import Figure
from xmodal_interp.store import store_around

MOST_ROWS = 600
"""Largest number of rows of a table on a page."""

_CSS_INCH, _DPI = 96, 130
_LOSSLESS_PX = 200  # larger photographs are embedded as JPEG


@dataclass(frozen=True)
class Shown:
    """A picture on the page.

    Attributes:
        uri: The picture as a data URI.
        caption: Text below it.
        width: Width on the page, CSS pixels; less if the page is narrower.
    """

    uri: str
    caption: str
    width: int


@dataclass(frozen=True)
class Table:
    """A table on the page.

    Attributes:
        name: Heading, and name of the CSV file.
        frame: The table.
        caption: Text below the heading.
        of: Number of rows of the whole table, if ``frame`` is a part of it.
    """

    name: str
    frame: pd.DataFrame
    caption: str = ""
    of: int | None = None

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return [str(name) for name in self.frame.columns]

    @property
    def size(self) -> str:
        """The number of rows, in words."""
        n = len(self.frame)
        rows = counted(n, "row")
        return rows if self.of is None else f"{rows} of {self.of}"

    @property
    def file(self) -> str:
        """The name of the CSV file."""
        kept = "".join(letter if letter.isalnum() else "-" for letter in self.name.lower())
        return f"{'-'.join(part for part in kept.split('-') if part) or 'table'}.csv"

    @property
    def rows(self) -> list[list[Cell]]:
        """The cells of each row."""
        return [[Cell(value) for value in row] for row in self.frame.itertuples(index=False)]

    @property
    def right(self) -> list[bool]:
        """Whether each column holds numbers."""
        return [dtype.kind in "iuf" for dtype in self.frame.dtypes]


@dataclass(frozen=True)
class Cell:
    """A cell: its text, and the full precision of a number for sorting and for CSV."""

    value: Any

    @cached_property
    def text(self) -> str:
        """The text on the page."""
        if isinstance(self.value, (float, np.floating)):
            return "\u2013" if np.isnan(self.value) else number(float(self.value))
        if self.value is None or self.value is pd.NA:
            return "\u2013"
        return str(self.value)

    @cached_property
    def exact(self) -> str | None:
        """The number in full precision; empty for a missing value, None for text."""
        if self.text == "\u2013":
            return ""
        if isinstance(self.value, (bool, np.bool_)):
            return None
        if isinstance(self.value, (int, float, np.integer, np.floating)):
            return repr(self.value.item() if isinstance(self.value, np.generic) else self.value)
        return None


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        title: Heading, also in the contents.
        about: What is measured.
        sentences: Sentences with numbers.
        pictures: Pictures, with captions.
        tables: Tables; the first ones are open.
        notes: Small print: samples that were left out, pictures that could not be drawn.
        code: The Python call that returns the table, or commands to run; may be empty.
        anchor: The address of the section within the page.
        group: Heading of a group of sections in the contents; empty for a top-level section.
        cards: Cards of samples.
        strip: Stretches of a sequence, drawn as a strip.
        n_open: Number of tables that are open.
    """

    title: str
    anchor: str
    about: str = ""
    sentences: Sequence[str] = ()
    pictures: Sequence[Shown] = ()
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    code: str = ""
    group: str = ""
    cards: Sequence[Card] = ()
    strip: Sequence[Stretch] = ()
    n_open: int = 1


@dataclass(frozen=True)
class Card:
    """A sample with its picture.

    Attributes:
        name: Name of the sample.
        question: The question.
        answer: The answer; empty if there is none.
        lines: Further facts.
        pictures: The pictures.
    """

    name: str
    question: str
    answer: str
    lines: Sequence[str] = ()
    pictures: Sequence[Shown] = ()


@dataclass(frozen=True)
class Stretch:
    """A stretch of a sequence: label, number of positions, token kind, and further text."""

    label: str
    length: int
    kind: str
    title: str


@dataclass(frozen=True)
class Page:
    """A page: title, introduction and sections."""

    title: str
    about: Sequence[str]
    sections: Sequence[Section]


def number(value: float) -> str:
    """Return a number for reading: four significant digits, without exponents where possible."""
    if value == 0 or not np.isfinite(value):
        return f"{value:g}"
    if 1e-4 <= abs(value) < 1e5:
        digits = max(0, 3 - int(np.floor(np.log10(abs(value)))))
        return f"{value:.{min(digits, 6)}f}"
    return f"{value:.3e}"


def shown_figure(figure: Figure, caption: str) -> Shown:
    """Return a figure as a PNG inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return Shown(_uri(buffer.getvalue(), "png"), caption, round(figure.get_figwidth() * _CSS_INCH))


def shown_file(path: Path, caption: str) -> Shown:
    """Return a PNG file as a picture inside the page, at the width at which it was drawn."""
    with Image.open(path) as image:
        inches = image.width / image.info["dpi"][0]
    return Shown(_uri(path.read_bytes(), "png"), caption, round(inches * _CSS_INCH))


def shown_image(image: Image.Image, caption: str, side: int = 320) -> Shown:
    """Return an image as a picture inside the page, at most ``side`` pixels wide and high."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    lossless = max(small.size) <= _LOSSLESS_PX
    buffer = io.BytesIO()
    if lossless:
        small.save(buffer, format="png", optimize=True)
    else:
        small.save(buffer, format="jpeg", quality=85)
    return Shown(_uri(buffer.getvalue(), "png" if lossless else "jpeg"), caption, small.width)


def limited(name: str, frame: pd.DataFrame, caption: str = "", *, by: str | None = None) -> Table:
    """Return a table of at most ``MOST_ROWS`` rows: those with the largest ``|by|``, in order."""
    if len(frame) <= MOST_ROWS:
        return Table(name, frame.reset_index(drop=True), caption)
    kept = frame.head(MOST_ROWS)
    if by is not None:
        largest = frame[by].abs().fillna(-1.0).sort_values(ascending=False, kind="stable").index
        kept = frame.loc[largest[:MOST_ROWS].sort_values()]
    chosen = f"with the largest |{by}|" if by else "first"
    some = (
        f"The {MOST_ROWS} rows {chosen} of {len(frame)}."
        if by
        else (f"The first {MOST_ROWS} rows of {len(frame)}.")
    )
    return Table(name, kept.reset_index(drop=True), f"{caption} {some}".strip(), len(frame))


def checked_path(path: str | PathLike[str], *, force: bool) -> Path:
    """Return the path of a page that may be written.

    Raises:
        InputError: It does not end in .html or .htm, is inside a store, is a folder or a symbolic
            link, or exists and ``force`` is False.
    """
    target = user_path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"path must end in .html; got {str(path)!r}.")
    around = store_around(target)
    if around is not None:
        raise InputError(
            f"{str(target)!r} is inside the store {str(around)!r}, where only samples are written. "
            "Choose another path."
        )
    if target.is_symlink() or target.is_dir():
        what = "a symbolic link" if target.is_symlink() else "a folder"
        raise InputError(f"path must be a file; {str(target)!r} is {what}.")
    if target.exists() and not force:
        raise InputError(
            f"{str(target)!r} exists. Choose another path, or pass force=True to overwrite it."
        )
    return target


def write_page(page: Page, path: Path) -> None:
    """Write a page; the file is complete or not there.

    Raises:
        InputError: The file cannot be written.
    """
    text = rendered(page)
    written: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile("wb", dir=path.parent, suffix=".part", delete=False) as file:
            written = Path(file.name)
            file.write(text.encode("utf-8"))
        mask = os.umask(0)
        os.umask(mask)
        written.chmod(0o666 & ~mask)  # temporary files can be read by their owner only
        written.replace(path)
    except OSError as error:
        if written is not None:
            written.unlink(missing_ok=True)
        raise InputError(f"Cannot write the page to {str(path)!r}: {error}.") from error


def rendered(page: Page) -> str:
    """Return the HTML of a page."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    script = _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
    return environment.get_template("page.html.jinja").render(
        page=page, style=_resource("page.css"), script=script, script_digest=digest
    )


def _resource(name: str) -> str:
    return (files("xmodal_interp.reporting") / name).read_text("utf-8")


def _uri(data: bytes, kind: str) -> str:
    return Markup(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")
