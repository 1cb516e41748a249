"""Boxes and masks of data sets in COCO's JSON format.

A box of COCO is ``x, y, width, height`` in pixels of the original image. A segmentation is a list
of polygons, or a run-length encoding (RLE) of the pixels, column by column. Masks are made by
pycocotools (``pip install "xmodal-interp[coco]"``), whose rule of which pixels a polygon covers is
that of COCO: the square from 10 to 20 covers 100 pixels, whereas Pillow draws 121.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from xmodal_interp.arguments import table, user_path
from xmodal_interp.boxes.number_formats import CORNERS, Size, read, write
from xmodal_interp.errors import InputError, quoted

_COLUMNS = (
    *("image_id", "file_name", "width", "height"),
    *("annotation_id", "phrase", *CORNERS, "is_crowd", "segmentation"),
)


def read_coco(source: str | PathLike[str] | Mapping[str, Any]) -> pd.DataFrame:
    """Return the annotated objects of a COCO file.

    Args:
        source: Path of the JSON file, or its content.

    Returns:
        One row per annotation, in the order of the file: ``image_id``, ``file_name``, ``width``,
        ``height`` (px), ``annotation_id``, ``phrase`` (name of the category), ``x0, y0, x1, y1``
        (px of the original image), ``is_crowd``, ``segmentation`` (as in the file; None if it has
        none, see :func:`mask`). Boxes without area are kept; analyses refuse them.

    Raises:
        InputError: The file cannot be read, an entry lacks a field, an annotation names an unknown
            image or category, or a box exceeds its image by more than a pixel.
    """
    content = _content(source)
    images = _by_id(content, "images", ("width", "height"))
    categories = _by_id(content, "categories", ("name",))
    rows = []
    for annotation in _entries(content, "annotations", ("id", "image_id", "category_id")):
        name = f"annotation {annotation['id']}"
        image = _of(images, annotation["image_id"], name, "image")
        category = _of(categories, annotation["category_id"], name, "category")
        size = (image["width"], image["height"])
        segmentation = annotation.get("segmentation") or None
        try:
            if annotation.get("bbox"):
                (box,) = read(annotation["bbox"], "xywh px", size=size).tolist()
            elif segmentation is not None:
                box = mask_box(mask(segmentation, size)).tolist()
            else:
                raise InputError("It has neither bbox nor segmentation.")
        except InputError as error:
            raise InputError(f"COCO {name}: {error}") from error
        file_name = image.get("file_name")
        about = (image["id"], file_name, *size, annotation["id"], category["name"])
        crowd = bool(annotation.get("iscrowd", False))
        rows.append((*about, *box, crowd, segmentation))
    made = pd.DataFrame(rows, columns=list(_COLUMNS))
    types: dict[str, Any] = {"file_name": "string", "phrase": "string", "is_crowd": bool}
    return made.astype(types | dict.fromkeys(CORNERS, float))


def write_coco(objects: pd.DataFrame) -> dict[str, Any]:
    """Return the content of a COCO file: the inverse of :func:`read_coco`.

    Categories are numbered from 1 in the order of their first use. ``area`` is that of the box.

    Args:
        objects: A table with the columns of :func:`read_coco`; ``is_crowd`` and ``segmentation``
            may be missing.

    Raises:
        InputError: A column is missing, or a box exceeds its image by more than a pixel.
    """
    table(objects, "objects")
    missing = [name for name in _COLUMNS[:-2] if name not in objects]
    if missing:
        raise InputError(f"objects lacks the columns {', '.join(missing)}.")
    names = list(dict.fromkeys(objects["phrase"].tolist()))
    images: dict[Any, dict[str, Any]] = {}
    annotations = []
    for row in objects.to_dict("records"):
        size = (row["width"], row["height"])
        image = {"id": row["image_id"], "width": row["width"], "height": row["height"]}
        if not pd.isna(row["file_name"]):
            image["file_name"] = row["file_name"]
        images.setdefault(row["image_id"], image)
        (bbox,) = write([[row[name] for name in CORNERS]], "xywh px", size=size).tolist()
        annotation = {
            "id": row["annotation_id"],
            "image_id": row["image_id"],
            "category_id": names.index(row["phrase"]) + 1,
            "bbox": bbox,
            "area": bbox[2] * bbox[3],
            "iscrowd": int(row.get("is_crowd", False)),
        }
        if row.get("segmentation") is not None:
            annotation["segmentation"] = row["segmentation"]
        annotations.append(annotation)
    return {
        "images": list(images.values()),
        "annotations": annotations,
        "categories": [{"id": n, "name": name} for n, name in enumerate(names, 1)],
    }


def mask(segmentation: Any, size: Size) -> Bool[np.ndarray, "row col"]:
    """Return the pixels that a segmentation covers.

    Args:
        segmentation: Polygons ``[[x, y, x, y, ...], ...]`` in px, of which the union is taken, or
            an RLE: a dict of ``size`` (height, width) and ``counts`` (a string, bytes or a list).
        size: Width and height of the original image, px.

    Raises:
        InputError: The segmentation is neither, or its size is another.
        ImportError: pycocotools is not installed.
    """
    tools = _tools()
    width, height = (int(side) for side in size)
    if isinstance(segmentation, Mapping) and {"size", "counts"} <= set(segmentation):
        if list(segmentation["size"]) != [height, width]:
            raise InputError(
                f"The RLE is of height and width {list(segmentation['size'])}, but the image has "
                f"{[height, width]}."
            )
        encoded = dict(segmentation)
        if isinstance(encoded["counts"], list):
            encoded = tools.frPyObjects(encoded, height, width)
    elif (
        isinstance(segmentation, (list, tuple))
        and segmentation
        and all(isinstance(part, (list, tuple)) and len(part) >= 6 for part in segmentation)
        and not any(len(part) % 2 for part in segmentation)
    ):
        polygons = [[float(number) for number in part] for part in segmentation]
        encoded = tools.merge(tools.frPyObjects(polygons, height, width))
    else:
        raise InputError(
            "A segmentation must be a list of polygons, each of three or more points x, y, or a "
            f"dict of size and counts; got {quoted(segmentation)}."
        )
    with warnings.catch_warnings():  # pycocotools 2.0.11 calls NumPy 2 as NumPy 1
        warnings.simplefilter("ignore", DeprecationWarning)
        return np.asarray(tools.decode(encoded), dtype=bool)


def rle(covered: Bool[np.ndarray, "row col"]) -> dict[str, Any]:
    """Return the run-length encoding of a mask as COCO writes it: the inverse of :func:`mask`.

    Raises:
        ImportError: pycocotools is not installed.
    """
    encoded = _tools().encode(np.asfortranarray(covered, dtype=np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}


def mask_box(covered: Bool[np.ndarray, "row col"]) -> Float[np.ndarray, "4"]:
    """Return ``x0, y0, x1, y1`` of the pixels of a mask, px.

    Raises:
        InputError: The mask is empty.
    """
    rows, cols = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
    if not len(rows):
        raise InputError("The mask covers no pixel, so it has no box.")
    return np.array([cols[0], rows[0], cols[-1] + 1, rows[-1] + 1], dtype=float)


def _tools() -> Any:
    try:
        from pycocotools import mask as tools
    except ImportError as error:
        raise ImportError(
            'Masks require pycocotools: pip install "xmodal-interp[coco]".'
        ) from error
    return tools


def _content(source: Any) -> Mapping[str, Any]:
    """Return the content of a COCO file."""
    if isinstance(source, Mapping):
        return source
    path = user_path(source)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InputError(f"The COCO file {str(path)!r} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"A COCO file must hold an object; {str(path)!r} holds a list or a value.")
    return content


def _entries(
    content: Mapping[str, Any], name: str, fields: Sequence[str]
) -> list[Mapping[str, Any]]:
    """Return the entries of a section, each with its required fields."""
    entries = content.get(name)
    if not isinstance(entries, list):
        raise InputError(
            f"A COCO file must have a list {name!r}; got {', '.join(map(str, content))}."
        )
    for entry in entries:
        missing = [field for field in fields if field not in entry]
        if missing:
            raise InputError(f"An entry of {name!r} lacks {', '.join(missing)}: {quoted(entry)}.")
    return entries


def _by_id(content: Mapping[str, Any], name: str, fields: Sequence[str]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for entry in _entries(content, name, ("id", *fields)):
        if entry["id"] in found:
            raise InputError(f"Two entries of {name!r} have the id {entry['id']!r}.")
        found[entry["id"]] = entry
    return found


def _of(entries: Mapping[Any, Any], key: Any, name: str, what: str) -> Any:
    if key not in entries:
        raise InputError(f"COCO {name} is of the {what} {key!r}, which the file does not have.")
    return entries[key]
