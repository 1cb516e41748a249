"""A self-contained page: header, blocks of numbers, style and script in one HTML file.

Strings of samples reach the page as JSON only, with ``<``, ``>`` and ``&`` escaped, and the script
puts them into the document as text. The page's content security policy forbids every request.
"""

from __future__ import annotations

import base64
import gzip
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>
{style}
</style>
</head>
<body>
<main id="viewer"></main>
<script type="application/json" id="header">{header}</script>
<script type="application/octet-stream" id="blocks">{blocks}</script>
<script type="module">
{script}
await {start};
</script>
</body>
</html>
"""

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)
_OWN_SERVER = "; connect-src 'self'"


def packed(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, Any], bytes]:
    """Return arrays in one run of bytes, little-endian, and dtype, shape and offset of each."""
    about: dict[str, Any] = {}
    parts: list[bytes] = []
    offset = 0
    for name, array in arrays.items():
        data = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
        about[name] = {
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "offset": offset,
        }
        data += b"\0" * (-len(data) % 8)
        parts.append(data)
        offset += len(data)
    return about, b"".join(parts)


def json_for_html(value: Any) -> str:
    """Return JSON that cannot end the element it is in."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def script() -> str:
    """Return the source of the ES module."""
    return _static("viewer.js")


def style() -> str:
    """Return the style sheet."""
    return _static("viewer.css")


def page(header: Mapping[str, Any], blocks: bytes | None, title: str) -> str:
    """Return the page as a string.

    Args:
        header: Description of the samples, of values that JSON has.
        blocks: The bytes of ``packed``; they are compressed here. None for a page that requests
            samples and rows from the server that it came from.
        title: Title of the page.
    """
    inside = b"" if blocks is None else gzip.compress(blocks, 6, mtime=0)
    return _PAGE.format(
        policy=_POLICY + (_OWN_SERVER if blocks is None else ""),
        title=html.escape(title),
        style=style(),
        header=json_for_html(header),
        blocks=base64.b64encode(inside).decode(),
        script=script().replace("</script", "<\\/script"),
        start="fromServer(document)" if blocks is None else "fromPage(document)",
    )


def _static(name: str) -> str:
    return (files("xmodal_interp.viewer") / "static" / name).read_text("utf-8")
