"""Summaries of objects in notebooks: a table of a few rows, and small pictures."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO

from PIL import Image

from xmodal_interp.escaping import printable

_HEIGHT = 120  # of a picture, px
_MOST = 6  # pictures that are shown


def html_summary(title: str, rows: Mapping[str, str], images: Sequence[Image.Image] = ()) -> str:
    """Return HTML with a title, a table of names and values, and pictures.

    All strings are escaped. The colours are those of the notebook.

    Args:
        title: The title.
        rows: Values by name; rows with an empty value are left out.
        images: Pictures; the first six are shown, scaled to a height of 120 px.
    """
    cells = "".join(
        f'<tr><th style="text-align:left">{_escaped(name)}</th>'
        f'<td style="text-align:left">{_escaped(value)}</td></tr>'
        for name, value in rows.items()
        if value
    )
    pictures = "".join(
        f'<img src="{_data_uri(image)}" alt="image {number}" height="{_HEIGHT}" '
        'style="display:inline-block;margin:0 8px 8px 0">'
        for number, image in enumerate(images[:_MOST])
    )
    more = f"<div>and {len(images) - _MOST} more images</div>" if len(images) > _MOST else ""
    inside = f"<div>{pictures}</div>{more}<table>{cells}</table>"
    return f"<div><strong>{_escaped(title)}</strong>{inside}</div>"


def _escaped(text: str) -> str:
    return escape(printable(text, lines=False))


def _data_uri(image: Image.Image) -> str:
    small = image.convert("RGB")
    if small.height > 2 * _HEIGHT:  # twice the drawn size, for screens of high resolution
        small = small.resize((max(1, small.width * 2 * _HEIGHT // small.height), 2 * _HEIGHT))
    buffer = BytesIO()
    small.save(buffer, "png")
    return f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"
