"""One item of a data set: its name, its images and videos, what is asked, and what else it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import ExifTags, Image

from xmodal_interp.errors import InputError
from xmodal_interp.models import ImageLike, Video, open_image
from xmodal_interp.models.entries import IMAGES, PROMPT, VIDEOS, entry, visuals_of
from xmodal_interp.paths import user_path
from xmodal_interp.store import check_name, digest_of, json_text

_NAMES = ("name", "id")
_KEYS = (*_NAMES, *IMAGES, *VIDEOS, *PROMPT)


@dataclass(frozen=True, eq=False)
class Item:
    """One item by its proper names.

    Attributes:
        number: Its place in the data set.
        name: Name of its sample.
        images: Its images, not opened yet.
        prompt: What to ask.
        labels: All its other entries, as JSON has them.
        videos: Its videos, their frames not read yet.
    """

    number: int
    name: str
    images: tuple[ImageLike, ...]
    prompt: str
    labels: dict[str, Any]
    videos: tuple[Video, ...] = ()

    @property
    def title(self) -> str:
        """Such as ``"Item 3 ('x')"``, for messages."""
        return f"Item {self.number} ({self.name!r})"

    @property
    def digest(self) -> str:
        """Changes with the item's prompt, labels and pictures.

        Files are identified by their content, because they may be moved.

        Raises:
            InputError: A file that cannot be read.
        """
        pictures, frames = self.picture_digests
        clips = [[video.fps, *each] for video, each in zip(self.videos, frames, strict=True)]
        return digest_of([self.prompt, self.labels, pictures, *([clips] if clips else [])])

    @cached_property
    def picture_digests(self) -> tuple[list[str], list[list[str]]]:
        """SHA-256 of each image, and of the frames of each video.

        Raises:
            InputError: A file that cannot be read.
        """
        try:
            return (
                [_content(image) for image in self.images],
                [[_content(frame) for frame in video.frames] for video in self.videos],
            )
        except InputError as error:
            raise InputError(f"{self.title}: {error}") from error

    @property
    def sources(self) -> list[str | None]:
        """Where its images are, if they are files."""
        return [_source(image) for image in self.images]

    @property
    def frame_sources(self) -> list[list[str | None]]:
        """Where the frames of each of its videos are, if they are files."""
        return [[_source(frame) for frame in video.frames] for video in self.videos]


def _content(picture: ImageLike) -> str:
    """SHA-256 of a file's bytes, or of a picture in memory and what changes its looks."""
    if not isinstance(picture, Image.Image):
        try:
            with user_path(picture).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(
                f"An image must be a file that can be read; {str(picture)!r} cannot: "
                f"{error.strerror or error}."
            ) from error
    looks = (picture.size, picture.mode, picture.getexif().get(ExifTags.Base.Orientation, 1))
    palette = picture.getpalette(None) if picture.mode in ("P", "PA") else None
    about = f"{looks} {palette} {picture.info.get('transparency')}".encode()
    return hashlib.sha256(about + picture.tobytes()).hexdigest()


def _source(picture: ImageLike) -> str | None:
    return None if isinstance(picture, Image.Image) else str(user_path(picture).resolve())


def name_of(number: int, raw: Any, seen: dict[str, int]) -> str:
    """What an item is called: its ``name``, its ``id``, or its place in the order.

    Args:
        number: Its place.
        raw: The item.
        seen: The items before it by their names, which it is added to.

    Raises:
        InputError: An item that is no dict, or a name that is taken or cannot be one.
    """
    if not isinstance(raw, Mapping):
        raise InputError(
            f"An item is a dict with image and prompt. Item {number} is a {type(raw).__name__}."
        )
    given = [raw[key] for key in _NAMES if raw.get(key) is not None]
    name = str(given[0]) if given else f"item-{number:06d}"
    try:
        check_name(name)
    except InputError as error:
        raise InputError(f"Item {number}: {error}") from error
    first = seen.setdefault(name.casefold(), number)
    if first != number:
        raise InputError(
            "Items must have different names, also where case is ignored. "
            f"Item {number} ({name!r}) has the name of item {first}."
        )
    return name


def checked(number: int, name: str, raw: Mapping[str, Any]) -> Item:
    """An item, its prompt and labels checked; its images are not opened yet.

    Raises:
        InputError: An entry that is missing or cannot be used.
    """
    title = f"Item {number} ({name!r})"
    images, videos = visuals_of(raw, title=title)
    prompt = entry(raw, *PROMPT, title=title)
    wrong = [type(i).__name__ for i in images if not isinstance(i, (Image.Image, str, PathLike))]
    if wrong:
        raise InputError(f"An image is a path or a PIL image. {title} has a {', a '.join(wrong)}.")
    wrong = [type(video).__name__ for video in videos if not isinstance(video, Video)]
    if wrong:
        raise InputError(f"A video is a Video of frames. {title} has a {', a '.join(wrong)}.")
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"A prompt is a text that is not empty. {title} has {prompt!r}.")
    rest = {k: v for k, v in raw.items() if k not in _KEYS}
    if raw.get("name") is not None and "id" in raw:
        rest["id"] = raw["id"]
    try:
        labels = json.loads(json_text(rest))
    except InputError as error:
        raise InputError(f"{title}: {error}") from error
    return Item(number, name, tuple(images), prompt, labels, tuple(videos))


def opened_images(item: Item) -> tuple[list[Image.Image], list[Video]]:
    """The images of an item, and its videos, read.

    Raises:
        InputError: One that is not there, or cannot be read.
    """
    try:
        opened = [open_image(image) for image in item.images]
        videos = [video.opened() for video in item.videos]
        frames = [open_image(frame) for video in videos for frame in video.frames]
        for image in (*opened, *frames):
            image.load()
    except InputError as error:
        raise InputError(f"{item.title}: {error}") from error
    except (OSError, SyntaxError) as error:  # a PIL image that was opened, and is cut off
        raise InputError(f"{item.title} has an image that cannot be read: {error}.") from error
    return opened, videos


def read_items(path: Path) -> list[dict[str, Any]]:
    """Items of a CSV or JSONL file with columns ``image`` and ``prompt``, images relative to it.

    Raises:
        InputError: No such file, another ending, what cannot be read, a column that is missing, or
            no rows.
    """
    path = user_path(path)
    if not path.exists():
        raise InputError(f"Items come from a file that exists; there is no {str(path)!r}.")
    if path.suffix not in (".csv", ".jsonl"):
        raise InputError(f"Items come from a .csv or .jsonl file; got {path.name!r}.")
    try:
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_json(path, lines=True)
    except (ValueError, OSError) as error:  # empty, cut off, or in other letters than UTF-8
        raise InputError(
            f"Items must be readable as {path.suffix[1:].upper()} in UTF-8; {path.name} is not: "
            f"{error}"
        ) from error
    if not {"image", "prompt"} <= set(table.columns):
        raise InputError(
            f"Items must have the columns image and prompt; {path.name} has "
            f"{', '.join(map(str, table.columns))}."
        )
    if table.empty:
        raise InputError(f"At least one item is needed; {path.name} has none.")
    records = [{str(k): v for k, v in record.items()} for record in table.to_dict("records")]
    for record in records:
        given = record["image"] if isinstance(record["image"], list) else [record["image"]]
        record["image"] = [str(path.parent / user_path(one)) for one in given]
    return records
