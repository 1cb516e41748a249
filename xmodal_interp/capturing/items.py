"""Items of a data set: name, images, videos, prompt and labels."""

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

from xmodal_interp.arguments import user_path
from xmodal_interp.errors import InputError
from xmodal_interp.models import ImageLike, Video, open_image
from xmodal_interp.models.known_answers import IMAGES, PROMPT, VIDEOS, entry, visuals_of
from xmodal_interp.store import check_name, digest_of, json_text

_NAMES = ("name", "id")
_KEYS = (*_NAMES, *IMAGES, *VIDEOS, *PROMPT)


@dataclass(frozen=True, eq=False)
class Item:
    """One item of a data set, after validation.

    Attributes:
        number: Its index in the data set.
        name: Name of its sample.
        images: Its images, not opened yet.
        prompt: The question.
        labels: All other entries, as JSON values.
        videos: Its videos, whose frames are not read yet.
    """

    number: int
    name: str
    images: tuple[ImageLike, ...]
    prompt: str
    labels: dict[str, Any]
    videos: tuple[Video, ...] = ()

    @property
    def title(self) -> str:
        """The item in messages, such as ``"Item 3 ('x')"``."""
        return f"Item {self.number} ({self.name!r})"

    @property
    def digest(self) -> str:
        """Digest of the item's prompt, labels and pictures.

        Files are hashed by content, so moving a file does not change the digest.

        Raises:
            InputError: A file cannot be read.
        """
        pictures, frames = self.picture_digests
        clips = [[video.fps, *each] for video, each in zip(self.videos, frames, strict=True)]
        return digest_of([self.prompt, self.labels, pictures, *([clips] if clips else [])])

    @cached_property
    def picture_digests(self) -> tuple[list[str], list[list[str]]]:
        """SHA-256 of each image, and of each frame of each video.

        Raises:
            InputError: A file cannot be read.
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
        """The paths of its images; None for images in memory."""
        return [_source(image) for image in self.images]

    @property
    def frame_sources(self) -> list[list[str | None]]:
        """The paths of the frames of each video; None for frames in memory."""
        return [[_source(frame) for frame in video.frames] for video in self.videos]


def _content(picture: ImageLike) -> str:
    """Return the SHA-256 of a file, or of the pixels and metadata of a picture in memory."""
    if not isinstance(picture, Image.Image):
        try:
            with user_path(picture).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(
                f"The image {str(picture)!r} cannot be read: {error.strerror or error}."
            ) from error
    properties = (picture.size, picture.mode, picture.getexif().get(ExifTags.Base.Orientation, 1))
    palette = picture.getpalette(None) if picture.mode in ("P", "PA") else None
    about = f"{properties} {palette} {picture.info.get('transparency')}".encode()
    return hashlib.sha256(about + picture.tobytes()).hexdigest()


def _source(picture: ImageLike) -> str | None:
    return None if isinstance(picture, Image.Image) else str(user_path(picture).resolve())


def sample_name(number: int, raw: Any, seen: dict[str, int]) -> str:
    """Return the name of an item: its ``name``, its ``id``, or one made from its index.

    Args:
        number: Its index.
        raw: The item.
        seen: Index of each earlier item by its name; this item is added.

    Raises:
        InputError: The item is not a dict, or its name is invalid or already used.
    """
    if not isinstance(raw, Mapping):
        raise InputError(
            f"Item {number} is a {type(raw).__name__}; it must be a dict with image and prompt."
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
            f"Item {number} ({name!r}) has the same name as item {first}; names must be unique, "
            "ignoring case."
        )
    return name


def item_of(number: int, name: str, raw: Mapping[str, Any], *, asks: bool = True) -> Item:
    """Return an item with validated entries, without opening its images.

    Args:
        number: Its index.
        name: Name of its sample.
        raw: The item.
        asks: Whether it must have a prompt. For a vision model, capture refuses a prompt.

    Raises:
        InputError: An entry is missing or invalid.
    """
    title = f"Item {number} ({name!r})"
    images, videos = visuals_of(raw, title=title)
    prompt = next((raw[key] for key in PROMPT if raw.get(key)), "")
    prompt = entry(raw, *PROMPT, title=title) if asks else prompt
    wrong = [type(i).__name__ for i in images if not isinstance(i, (Image.Image, str, PathLike))]
    if wrong:
        raise InputError(
            f"{title}: an image must be a path or a PIL image; got {', '.join(wrong)}."
        )
    wrong = [type(video).__name__ for video in videos if not isinstance(video, Video)]
    if wrong:
        raise InputError(f"{title}: a video must be an xi.Video; got {', '.join(wrong)}.")
    if asks and (not isinstance(prompt, str) or not prompt.strip()):
        raise InputError(f"{title}: the prompt must be a non-empty string; got {prompt!r}.")
    rest = {k: v for k, v in raw.items() if k not in _KEYS}
    if raw.get("name") is not None and "id" in raw:
        rest["id"] = raw["id"]
    try:
        labels = json.loads(json_text(rest))
    except InputError as error:
        raise InputError(f"{title}: {error}") from error
    return Item(number, name, tuple(images), prompt, labels, tuple(videos))


def opened_media(item: Item) -> tuple[list[Image.Image], list[Video]]:
    """Open the images and videos of an item and read their pixels.

    Raises:
        InputError: A file does not exist or cannot be read.
    """
    try:
        opened = [open_image(image) for image in item.images]
        videos = [video.opened() for video in item.videos]
        frames = [open_image(frame) for video in videos for frame in video.frames]
        for image in (*opened, *frames):
            image.load()
    except InputError as error:
        raise InputError(f"{item.title}: {error}") from error
    except (OSError, SyntaxError) as error:  # raised by Pillow for a truncated file
        raise InputError(f"{item.title} has an image that cannot be read: {error}.") from error
    return opened, videos


def read_items(path: Path) -> list[dict[str, Any]]:
    """Read items from a CSV or JSONL file with the columns ``image`` and ``prompt``.

    Relative image paths are resolved against the folder of the file.

    Raises:
        InputError: The file does not exist, has another extension, cannot be read, lacks a column,
            or has no rows.
    """
    path = user_path(path)
    if not path.exists():
        raise InputError(f"The file of items {str(path)!r} does not exist.")
    if path.suffix not in (".csv", ".jsonl"):
        raise InputError(f"The file of items must be .csv or .jsonl; got {path.name!r}.")
    try:
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_json(path, lines=True)
    except (ValueError, OSError) as error:  # empty, truncated, or not UTF-8
        raise InputError(
            f"{path.name} cannot be read as {path.suffix[1:].upper()} in UTF-8: {error}"
        ) from error
    if not {"image", "prompt"} <= set(table.columns):
        raise InputError(
            f"{path.name} must have the columns image and prompt; it has "
            f"{', '.join(map(str, table.columns))}."
        )
    if table.empty:
        raise InputError(f"{path.name} has no rows; it must have at least one item.")
    records = [{str(k): v for k, v in record.items()} for record in table.to_dict("records")]
    for record in records:
        given = record["image"] if isinstance(record["image"], list) else [record["image"]]
        record["image"] = [str(path.parent / user_path(one)) for one in given]
    return records
