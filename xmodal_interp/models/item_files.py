"""Read the items of a data set: from a file, a folder, a table or a ``datasets.Dataset``.

The values of an item are those of the file: types are not inferred from the text of a value.

* JSON values keep their types; a JSONL file is parsed line by line.
* CSV cells are strings (``04`` stays ``"04"``); empty cells are missing. A first column without a
  name is the index of a table that pandas wrote. A cell of the columns
  ``images`` that starts with ``[`` is a JSON list of paths; one of the columns ``messages`` or
  ``conversations``, of messages.
* Parquet values keep their types.
* A named index of a table is an entry of each item (see :func:`rows_of_table`).
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd

from xmodal_interp.arguments import one_or_several, user_path
from xmodal_interp.errors import InputError
from xmodal_interp.models.media import Video
from xmodal_interp.models.picture_sources import local_path

Row = dict[str, Any]

NAMES = ("name", "id")
IMAGES, VIDEOS, PROMPT = ("image", "images"), ("video", "videos"), ("prompt", "question")
CHATS = ("messages", "conversations")

_URL = re.compile(r"(?:https?|file)://|data:", re.IGNORECASE)
_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_FILE_NAMES = {"file_name": "image", "file_names": "images"}
"""Entries of the metadata file of a folder of images, and the entries of an item."""
_PICTURE_ENTRIES = ("image", "path", "url", "image_url")
"""Entries of a part of a message that may hold the path of an image."""
_UNNAMED = "__index_level_"
"""Beginning of the column names under which pandas writes an index without a name."""


def read_items(
    path: str | PathLike[str],
    *,
    prompt: str | None = None,
    image_folder: str | PathLike[str] | None = None,
) -> list[Row]:
    """Read items from a file or a folder, for any function that takes items.

    Values keep the types that the file has: JSON values, strings in CSV, the types of a Parquet
    column.

    Args:
        path: One of

            * ``.jsonl``: a JSON object per line; ``.json``: a list of objects;
            * ``.json`` of COCO captions: an item per image, with the label ``captions``;
            * ``.csv`` or ``.tsv``: a header and a row per item, in UTF-8;
            * ``.parquet``: a row per item; images are paths, bytes, or ``{"bytes", "path"}``;
            * a folder of images with ``metadata.jsonl``, ``.csv`` or ``.parquet``, whose entry
              ``file_name`` (or ``file_names``) is the image (or images);
            * a folder written by ``datasets.Dataset.save_to_disk``.
        prompt: The question of all items that have none, such as those of COCO captions.
        image_folder: Where relative paths of images start; by default the folder of the file (paths
            of a saved ``datasets.Dataset`` are left as they are).

    Returns:
        A dict per item. An entry that is None or missing is the same.

    Raises:
        InputError: The file or ``image_folder`` does not exist, the file has another extension,
            cannot be read, or has no items.
    """
    path = user_path(path)
    if not path.exists():
        raise InputError(f"The file of items {str(path)!r} does not exist.")
    start = None if image_folder is None else user_path(image_folder)
    if start is not None and not start.is_dir():
        raise InputError(f"The folder of the images {str(start)!r} does not exist.")
    if path.is_dir():
        rows, own = _read_folder(path)
    else:
        rows, own = _read_file(path), path.parent
    start = start or own
    if start is not None:
        rows = [_in_folder(row, start) for row in rows]
    return rows if prompt is None else [_with_prompt(row, prompt) for row in rows]


def _read_file(path: Path) -> list[Row]:
    if path.suffix.lower() not in _READERS:
        raise InputError(
            f"The file of items must be one of {', '.join(_READERS)}; got {path.name!r}."
        )
    kind = path.suffix[1:].upper()
    try:
        rows = _READERS[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} cannot be read as {kind} in UTF-8: {error}.") from error
    except (ValueError, OSError, csv.Error) as error:  # truncated, or another format
        raise InputError(f"{path.name} cannot be read as {kind}: {error}.") from error
    if not rows:
        raise InputError(f"{path.name} has no rows; it must have at least one item.")
    return rows


def _with_prompt(row: Row, prompt: str) -> Row:
    has_prompt = any(row.get(name) not in (None, "") for name in (*PROMPT, *CHATS))
    return row if has_prompt else {**row, PROMPT[0]: prompt}


def rows_of(items: Any) -> Any:
    """Return the items of a path, a table or a data set, to be read one by one.

    The images of a ``datasets.Dataset`` are not decoded, so that an image that cannot be decoded is
    an error of its item only, and an image file has the same content as under its path. Any other
    iterable is returned unchanged.
    """
    if isinstance(items, (str, PathLike)):
        return read_items(items)
    if isinstance(items, pd.DataFrame):
        return rows_of_table(items)
    if _decoding_columns(items):
        return _Undecoded(items)
    return items


def rows_of_table(table: pd.DataFrame) -> list[Row]:
    """Return the rows of a table as dicts, with the named levels of its index.

    An index without a name is the ``id`` of each row if it has unique values, is not the default
    one (0, 1, 2, ...), and there is no column ``name`` or ``id``. Otherwise its numbers are left
    out, and its strings are the entry ``index``. Missing values are left out.

    Raises:
        InputError: Two columns, or a column and the index, have the same name.
    """
    named = [(str(name), table.iloc[:, i]) for i, name in enumerate(table.columns)]
    levels = [
        (None if level is None else str(level), table.index.get_level_values(i).to_series())
        for i, level in enumerate(table.index.names)
    ]
    default = table.index.name is None and table.index.equals(pd.RangeIndex(len(table)))
    named += [] if default else _named_levels(levels, [name for name, _ in named])
    names = [name for name, _ in named]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"The table has several columns (or a column and an index) named "
            f"{', '.join(map(repr, twice))}. Rename all except one."
        )
    values = [column.astype(object).tolist() for _, column in named]
    return [
        {name: value for name, value in zip(names, row, strict=True) if not _is_missing(value)}
        for row in zip(*values, strict=True)
    ]


def _named_levels(
    levels: Sequence[tuple[str | None, pd.Series]], columns: Sequence[str]
) -> list[tuple[str, pd.Series]]:
    """Return the levels of an index that are entries of the items, with their names."""
    found = [(name, values) for name, values in levels if name is not None]
    taken = {*columns, *(name for name, _ in found)}
    for number, (name, values) in enumerate(levels):
        if name is not None:
            continue
        if len(levels) == 1 and values.is_unique and not taken & {*NAMES}:
            found.append(("id", values))
        elif not pd.api.types.is_numeric_dtype(values):
            found.append(("index" if len(levels) == 1 else f"level_{number}", values))
    return found


def _is_missing(value: Any) -> bool:
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def _read_json_lines(path: Path) -> list[Row]:
    rows = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = _parsed(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is a {type(row).__name__}, not an object")
            rows.append(row)
    return rows


def _read_json(path: Path) -> list[Row]:
    rows = _parsed(path.read_text("utf-8-sig"))
    if isinstance(rows, dict) and {"images", "annotations"} <= rows.keys():
        return _coco_captions(rows["images"], rows["annotations"])
    if not isinstance(rows, list):
        raise ValueError(f"it must be a list of objects, not a {type(rows).__name__}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"entry {number} is a {type(row).__name__}, not an object")
    return rows


def _coco_captions(images: list[Any], annotations: list[Any]) -> list[Row]:
    """Return an item per image of a file in the format of COCO captions.

    Lin et al. 2014 (arXiv 1405.0312); the format is documented at cocodataset.org.
    """
    _check_has(images, "id")
    captions: dict[Any, list[str]] = {each["id"]: [] for each in images}
    if len(captions) != len(images):
        raise ValueError("several entries of images have the same id")
    _check_has(images, "file_name")
    for each in annotations:
        if not _has(each, "caption"):
            raise ValueError(
                f"the annotation {each['id'] if _has(each, 'id') else each} has no caption: only "
                "COCO files of captions are items"
            )
        if "image_id" not in each:
            raise ValueError(f"the annotation {each.get('id')} has no image_id")
        if each["image_id"] not in captions:
            raise ValueError(f"there is no image {each['image_id']}, which has a caption")
        captions[each["image_id"]].append(each["caption"])
    return [
        {"id": each["id"], "image": each["file_name"], "captions": captions[each["id"]]}
        for each in images
    ]


def _has(entry: Any, key: str) -> bool:
    return isinstance(entry, dict) and key in entry


def _check_has(images: Sequence[Any], key: str) -> None:
    for number, image in enumerate(images):
        if not _has(image, key):
            raise ValueError(f"entry {number} of images has no {key}")


def _parsed(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is not JSON, an object has several values of one key, or a number is larger
            than a float can be.
    """
    return json.loads(
        text,
        parse_constant=_refuse_constant,
        parse_float=_finite,
        object_pairs_hook=_without_repeats,
    )


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value; null is a missing one")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits} is larger than a float can be")
    return number


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"an object has several entries {', '.join(map(repr, twice))}")
    return found


def _read_csv(path: Path) -> list[Row]:
    """Read a CSV file whose cells are strings; rows must be as long as the header."""
    before = csv.field_size_limit(sys.maxsize)  # a cell may hold an image as a data URI
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(
                file, strict=True, delimiter="\t" if path.suffix.lower() == ".tsv" else ","
            )
            lines = [(reader.line_num, line) for line in reader if line]
    finally:
        csv.field_size_limit(before)
    if not lines:
        return []
    (_, header), *rows = lines
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise ValueError(f"the header has several columns {', '.join(map(repr, twice))}")
    spaced = [name for name in header if name != name.strip()]
    if spaced:
        raise ValueError(
            f"the header has names with spaces around them, {', '.join(map(repr, spaced))}; remove "
            "the spaces after separators"
        )
    for number, line in rows:
        if len(line) != len(header):
            raise ValueError(
                f"line {number} has {len(line)} cells, and the header has {len(header)}"
            )
    if "" in header[1:] and any(line[header.index("", 1)] for _, line in rows):
        raise ValueError(f"column {header.index('', 1) + 1} of the header has no name")
    found = [
        {name: _cell(name, cell) for name, cell in zip(header, line, strict=True) if name and cell}
        for _, line in rows
    ]
    if not header[0] and rows:
        _add_index(found, [line[0] for _, line in rows], header[1:])
    return found


def _add_index(rows: list[Row], index: Sequence[str], columns: Sequence[str]) -> None:
    """Add the first column of a CSV file, if it has no name: pandas writes an index there.

    It becomes the entry that the index of a table becomes (see :func:`rows_of_table`).
    """
    if list(index) == [str(number) for number in range(len(index))]:
        return
    for name, values in _named_levels([(None, pd.Series(index, dtype=object))], columns):
        for row, value in zip(rows, values.tolist(), strict=True):
            row[name] = value


def _cell(name: str, cell: str) -> Any:
    if name not in (IMAGES[1], *CHATS) or not cell.lstrip().startswith("["):
        return cell
    return _parsed(cell)


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    columns = [name for name in table.column_names if not name.startswith(_UNNAMED)]
    unnamed = [name for name in table.column_names if name.startswith(_UNNAMED)]
    levels = [(None, table[name].to_pandas()) for name in unnamed]
    rows: list[Row] = table.select(columns).to_pylist()
    for name, values in _named_levels(levels, columns):
        for row, value in zip(rows, values.tolist(), strict=True):
            row[name] = value
    return rows


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_folder(path: Path) -> tuple[list[Row], Path | None]:
    """Read a saved ``datasets.Dataset``, or the metadata file of a folder of images.

    Returns:
        The rows, and the folder where their paths start.

    Raises:
        InputError: The folder is neither, or ``datasets`` is not installed.
    """
    if (path / "state.json").is_file():
        try:
            from datasets import load_from_disk
        except ImportError as error:
            raise InputError(
                f"Reading {str(path)!r}, a saved data set, requires the package datasets. Install "
                "it with pip install datasets."
            ) from error
        return list(rows_of(load_from_disk(str(path)))), None
    found = [path / name for name in _METADATA if (path / name).is_file()]
    if len(found) != 1:
        raise InputError(
            f"The folder of items {str(path)!r} must contain exactly one of "
            f"{', '.join(_METADATA)}, or be written by datasets.Dataset.save_to_disk; it contains "
            f"{', '.join(each.name for each in found) or 'none of them'}."
        )
    return [_with_images(row) for row in _read_file(found[0])], path


def _with_images(row: Row) -> Row:
    """Return a row of a metadata file with its file names as images."""
    if any(row.get(name) is not None for name in IMAGES):
        return row
    return {_FILE_NAMES.get(name, name): value for name, value in row.items()}


def _in_folder(row: Row, folder: Path) -> Row:
    """Return an item of a file in a folder: with the paths of its images, and its videos."""
    changed = dict(row)
    for name in IMAGES:
        if changed.get(name) is not None:
            changed[name] = [_located(one, folder) for one in one_or_several(changed[name])]
    for name in VIDEOS:
        if changed.get(name) is not None:
            changed[name] = [_video(one, folder) for one in one_or_several(changed[name])]
    for name in (*PROMPT, *CHATS):
        if isinstance(changed.get(name), list):
            changed[name] = [_message(one, folder) for one in changed[name]]
    return changed


def _message(given: Any, folder: Path) -> Any:
    """Return a message of a chat with the paths of the images in its parts."""
    if not isinstance(given, Mapping) or not isinstance(given.get("content"), list):
        return given
    parts = [
        {
            key: _frames(value, folder)
            if key == "video"
            else (_located_part(value, folder) if key in _PICTURE_ENTRIES else value)
            for key, value in part.items()
        }
        if isinstance(part, Mapping)
        else part
        for part in given["content"]
    ]
    return {**given, "content": parts}


def _located_part(given: Any, folder: Path) -> Any:
    """Return a picture of a part; ``image_url`` may hold it as ``{"url": ...}``."""
    if isinstance(given, Mapping) and given.get("url") is not None:
        return {**given, "url": _located(given["url"], folder)}
    return _located(given, folder)


def _frames(given: Any, folder: Path) -> Any:
    """Return the paths of the frames of a video; any other value is returned as is."""
    return [_located(one, folder) for one in given] if isinstance(given, list) else given


def _video(given: Any, folder: Path) -> Any:
    """Return the video of ``{"frames": [...], "fps": ...}``; any other value is returned as is."""
    if not isinstance(given, Mapping) or not {"frames"} <= given.keys() <= {"frames", "fps"}:
        return given
    frames = [_located(frame, folder) for frame in one_or_several(given["frames"])]
    return Video(frames, given.get("fps"))


def _located(given: Any, folder: Path) -> Any:
    """Return an image with its path below the folder, if it is a relative path."""
    if isinstance(given, Mapping) and given.get("bytes") is None and given.get("path") is not None:
        return _located(given["path"], folder)
    if not isinstance(given, str) or _URL.match(given):
        return given
    try:
        return str(folder / user_path(given))
    except InputError:  # not a path; opening it is an error that names the item
        return given


class _Undecoded:
    """A ``datasets.Dataset`` whose images are ``{"bytes", "path"}`` dicts."""

    def __init__(self, data: Any) -> None:
        self.data = data
        self.columns = _decoding_columns(data)
        self.undecoded = data
        for name, feature in self.columns.items():
            self.undecoded = self.undecoded.cast_column(name, feature)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Row:
        row: Row = self.undecoded[index]
        images = [one for name in self.columns for one in one_or_several(row[name])]
        remote = any(
            one is not None and one["bytes"] is None and not (local_path(one) or Path()).is_file()
            for one in images
        )
        return self.data[index] if remote else row  # only datasets can open paths in archives

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))


def _decoding_columns(data: Any) -> dict[str, Any]:
    """Return the image columns that a ``datasets.Dataset`` decodes, with features that do not.

    Data sets in another format (``with_format``, ``set_transform``) have none.
    """
    features: Any = getattr(data, "features", None)
    is_dataset = isinstance(features, Mapping) and hasattr(data, "cast_column")
    form = getattr(data, "format", None)  # an IterableDataset has none
    if not is_dataset or form is None or form["type"] is not None:
        return {}
    found = {name: _without_decoding(features[name]) for name in IMAGES if name in features}
    return {name: feature for name, feature in found.items() if feature is not None}


def _without_decoding(feature: Any) -> Any:
    """Return an image feature, or a list of it, that does not decode; None for other features.

    A feature with a mode converts the images to it, and is left out.
    """
    if isinstance(feature, list) and len(feature) == 1:
        inside = _without_decoding(feature[0])
        return None if inside is None else [inside]
    if not dataclasses.is_dataclass(feature) or isinstance(feature, type):
        return None
    if type(feature).__name__ == "Image":
        decodes = getattr(feature, "decode", False) and getattr(feature, "mode", None) is None
        return dataclasses.replace(feature, decode=False) if decodes else None
    inside = _without_decoding(getattr(feature, "feature", None))
    return None if inside is None else dataclasses.replace(feature, feature=inside)


def each_of(items: Iterable[Any]) -> Iterator[Callable[[], Any]]:
    """Yield a function for each item that returns it.

    Items of a sequence are read when their function is called. One that cannot be read therefore
    raises an error there and does not end the iteration.
    """
    rows: Any = items
    by_number = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    if not by_number or isinstance(rows, (pd.Series, Mapping)):
        yield from (partial(_same, item) for item in rows)
        return
    yield from (partial(rows.__getitem__, index) for index in range(len(rows)))


def _same(item: Any) -> Any:
    return item
