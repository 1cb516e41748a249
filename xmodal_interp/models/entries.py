"""Read the entries of an item: an image, a question about it, its known answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from xmodal_interp.errors import InputError
from xmodal_interp.ordered import in_order, is_several

ItemDict = Mapping[str, Any]
"""A mapping with ``image`` or ``images``, or ``video`` or ``videos`` (or both); ``prompt`` or
``question``; ``answer``; and optionally ``kind``. An entry that is None counts as missing."""

Items = Iterable[ItemDict] | pd.DataFrame
"""An iterable of dicts, or a table with one row per item."""

IMAGES, VIDEOS, PROMPT = ("image", "images"), ("video", "videos"), ("prompt", "question")


def listed(items: Items) -> list[ItemDict]:
    """Return all items as dicts; empty cells of a table are left out.

    Raises:
        InputError: An item is not a mapping.
    """
    if isinstance(items, pd.DataFrame):
        return [
            {str(name): value for name, value in row.dropna().items()}
            for _, row in items.iterrows()
        ]
    found = in_order(items, "items")
    for index, item in enumerate(found):
        if not isinstance(item, Mapping):
            raise InputError(
                f"Item {index} is a {type(item).__name__}. "
                "Give a dict with image, prompt and answer."
            )
    return found


def entry(item: ItemDict, *names: str, title: str) -> Any:
    """Return the entry that has one of these names; ``title`` names the item in messages.

    Raises:
        InputError: The item has no such entry, or several.
    """
    there = _names_in(item, names)
    if len(there) != 1:
        between = " and " if there else " or "
        raise InputError(
            f"{title} has {'both' if there else 'no'} {between.join(map(repr, names))} (its "
            f"entries are {', '.join(map(str, item)) or 'empty'}). Give exactly one that is not "
            "None."
        )
    return item[there[0]]


def visuals_of(item: ItemDict, *, title: str) -> tuple[list[Any], list[Any]]:
    """Return the images and the videos of an item, neither opened nor checked.

    Raises:
        InputError: The item has neither, or has ``image`` and ``images`` (or ``video`` and
            ``videos``) at once.
    """
    videos = _several(entry(item, *VIDEOS, title=title)) if _names_in(item, VIDEOS) else []
    images = (
        []
        if videos and not _names_in(item, IMAGES)
        else _several(entry(item, *IMAGES, title=title))
    )
    return images, videos


def _names_in(item: ItemDict, names: Iterable[str]) -> list[str]:
    return [name for name in names if item.get(name) is not None]


def _several(given: Any) -> list[Any]:
    return list(given) if is_several(given) else [given]
