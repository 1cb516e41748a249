"""Where an image that a user passes is read from: a path, a URL, the bytes of a file, an array.

Nothing is fetched from the network except an ``http://`` or ``https://`` URL that the user passed
as an image.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Mapping
from http.client import HTTPException
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote_to_bytes, urlsplit
from urllib.request import Request, url2pathname, urlopen

from PIL import ExifTags, Image

from xmodal_interp.arguments import user_path
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.models.pixel_arrays import as_numpy, is_array

WANTED = (
    "An image must be a path, a URL, a PIL image, an array, the bytes of a file or a dict with "
    "bytes or path"
)
_TIMEOUT = 30  # seconds without an answer
_MAX_PATH, _MAX_NAME = 4096, 255  # characters of a path, and of each name in it
_REMOTE = ("http://", "https://")


def is_picture(value: Any) -> bool:
    """Return whether a value is an image or refers to one."""
    known = (Image.Image, str, PathLike, bytes, bytearray, memoryview)
    in_file = isinstance(value, Mapping) and {"bytes", "path"} & {*value}
    return isinstance(value, known) or is_array(value) or hasattr(value, "read") or bool(in_file)


def is_remote(value: Any) -> bool:
    """Return whether a value is an ``http://`` or ``https://`` URL."""
    return isinstance(value, str) and value[:8].lower().startswith(_REMOTE)


def resolved(picture: Any) -> Any:
    """Return an image as a path, the bytes of a file, a PIL image or an array.

    Args:
        picture: One of these, or a ``file://``, ``data:``, ``http://`` or ``https://`` URL, a file
            that is open for reading in binary mode, or a dict with ``bytes`` or ``path`` (as
            ``datasets`` stores images; ``bytes`` has priority).

    Raises:
        InputError: It is none of these, a URL cannot be read, or a dict has neither.
    """
    if isinstance(picture, Mapping):
        inside = picture.get("bytes")
        inside = picture.get("path") if inside is None else inside
        if inside is None:
            raise InputError(
                "The dict of an image must have the entry bytes or path; got the entries "
                f"{', '.join(map(str, picture)) or 'none'}, without a value in these."
            )
        return resolved(inside)
    if not is_picture(picture):
        raise InputError(f"{WANTED}; got an object of {type(picture).__name__}.")
    if isinstance(picture, (bytearray, memoryview)):
        return bytes(picture)
    if hasattr(picture, "read") and not isinstance(picture, (str, PathLike)):
        return _bytes_in(picture)
    return _of_string(picture) if isinstance(picture, str) else picture


def _of_string(text: str) -> bytes | Path | str:
    """Return the bytes or the path that a URL refers to; any other string is a path."""
    if is_remote(text):
        return _fetched(text)
    scheme = text[:7].lower()
    if scheme.startswith("data:"):
        return _inline(text)
    if scheme != "file://":
        if len(text) > _MAX_PATH or any(len(part) > _MAX_NAME for part in text.split("/")):
            raise InputError(
                f"{quoted(text)} is too long for a path ({len(text)} characters). If it is an "
                "image in base64, write data:image/png;base64, before it."
            )
        return text
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise InputError(
            f"{quoted(text)} is a file on the host {parts.netloc!r}. Write a local path as "
            "file:///folder/name."
        )
    return Path(url2pathname(parts.path))


def local_path(picture: Any) -> Path | None:
    """Return the path of an image that is read from a local file; None for other images."""
    if isinstance(picture, Mapping) and picture.get("bytes") is None:
        return local_path(picture.get("path"))
    if isinstance(picture, str) and picture[:7].lower() == "file://":
        picture = resolved(picture)
    inline = isinstance(picture, str) and picture[:5].lower() == "data:"
    if not isinstance(picture, (str, PathLike)) or inline or is_remote(picture):
        return None
    return user_path(picture)


def content_digest(picture: Any) -> str:
    """Return the SHA-256 of a file's bytes, or of the pixels and metadata of a picture in memory.

    Raises:
        InputError: The picture cannot be read.
    """
    source = resolved(picture)
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    if is_array(source):
        values = as_numpy(source)
        about = f"{values.dtype} {values.shape} ".encode()
        return hashlib.sha256(about + values.tobytes()).hexdigest()
    if isinstance(source, Image.Image):
        orientation = source.getexif().get(ExifTags.Base.Orientation, 1)
        properties = (source.size, source.mode, orientation)
        palette = source.getpalette(None) if source.mode in ("P", "PA") else None
        of_image = f"{properties} {palette} {source.info.get('transparency')}".encode()
        return hashlib.sha256(of_image + source.tobytes()).hexdigest()
    try:
        with user_path(source).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"The image {str(source)!r} cannot be read: {error.strerror or error}."
        ) from error


def named(picture: Any) -> str:
    """Return what a message calls an image."""
    path = local_path(picture)
    if path is not None:
        return f"the image file {str(path)!r}"
    if is_remote(picture):
        return f"the image at {quoted(picture)}"
    return f"an image given as {type(picture).__name__}"


def _bytes_in(file: Any) -> bytes:
    """Return all bytes of an open file, whose position is restored."""
    start = None
    try:
        if getattr(file, "seekable", bool)():
            start = file.tell()
            file.seek(0)
        content = file.read()
    except (OSError, ValueError) as error:  # ValueError: the file is closed
        raise InputError(f"The file of an image cannot be read: {error}.") from error
    if start is not None:
        file.seek(start)
    if not isinstance(content, bytes):
        raise InputError(
            f"The file of an image must be opened in binary mode; reading it gave a "
            f"{type(content).__name__}."
        )
    return content


def _fetched(url: str) -> bytes:
    try:
        with urlopen(Request(url, headers={"User-Agent": "xmodal_interp"}), timeout=_TIMEOUT) as it:
            content: bytes = it.read()
    except (URLError, HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        code = getattr(error, "code", None)
        if isinstance(error, HTTPError):
            error.close()  # it is also the open response
        raise InputError(
            f"The image at {quoted(url)} could not be fetched: "
            f"{reason if code is None else f'{code} {reason}'}."
        ) from error
    return content


def _inline(uri: str) -> bytes:
    """Return the bytes in a ``data:`` URI."""
    about, comma, content = uri.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        if about.lower().endswith(";base64"):
            digits = b"".join(unquote_to_bytes(content).split())
            return base64.b64decode(digits, validate=True)
    except (ValueError, binascii.Error) as error:
        raise InputError(
            f"The data URI {quoted(uri)} cannot be decoded: {error}. Write it as "
            "data:image/png;base64,..."
        ) from error
    return unquote_to_bytes(content)
