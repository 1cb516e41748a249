"""Items of a data set: name, images, videos, prompt and labels."""

from __future__ import annotations

import json
import numbers
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image

from xmodal_interp.errors import InputError, quoted
from xmodal_interp.models import ImageLike, Video, open_image, size_before
from xmodal_interp.models.chats import Chat
from xmodal_interp.models.item_files import CHATS, IMAGES, NAMES, PROMPT, VIDEOS
from xmodal_interp.models.known_answers import asked_by, text_of_answer
from xmodal_interp.models.media import Composite
from xmodal_interp.models.picture_sources import (
    WANTED,
    content_digest,
    is_picture,
    is_remote,
    local_path,
    resolved,
)
from xmodal_interp.store import check_name, digest_of, json_text
from xmodal_interp.vocabulary import VIDEO_DETAILS

_KEYS = (*NAMES, *IMAGES, *VIDEOS, *PROMPT, *CHATS)


@dataclass(frozen=True, eq=False)
class Item:
    """One item of a data set, after validation.

    Attributes:
        number: Its index in the data set.
        name: Name of its sample.
        images: Its images, not opened yet.
        prompt: The question, or the chat without its answer.
        labels: All other entries, as JSON values.
        videos: Its videos, whose frames are not read yet.
        answer: Its answer as text, if the model is run on it; None if there is none.
    """

    number: int
    name: str
    images: tuple[ImageLike, ...]
    prompt: str | Chat
    labels: dict[str, Any]
    videos: tuple[Video, ...] = ()
    answer: str | None = None

    @property
    def title(self) -> str:
        """The item in messages, such as ``"Item 3 ('x')"``."""
        return f"Item {self.number} ({self.name!r})"

    @property
    def digest(self) -> str:
        """Digest of the item's prompt, labels and pictures.

        Files are hashed by content, so moving a file, or passing its bytes, does not change the
        digest.

        Raises:
            InputError: A file cannot be read.
        """
        pictures, frames = self.picture_digests
        details = [
            {name: value for name in VIDEO_DETAILS if (value := getattr(video, name))}
            for video in self.videos
        ]
        clips = [
            [video.fps, *([others] if others else []), *each]
            for video, others, each in zip(self.videos, details, frames, strict=True)
        ]
        sizes = [size_before(image) for image in self.images]
        more = [*([clips] if clips else []), *([sizes] if any(sizes) else [])]
        return digest_of([self.asked, self.labels, pictures, *more])

    @property
    def asked(self) -> str | list[dict[str, Any]]:
        """The question, or the messages of the chat, as a JSON value."""
        return [*self.prompt.messages] if isinstance(self.prompt, Chat) else self.prompt

    @cached_property
    def picture_digests(self) -> tuple[list[str], list[list[str]]]:
        """SHA-256 of each image, and of each frame of each video.

        Raises:
            InputError: A file cannot be read.
        """
        with _reading(self.title):
            return (
                [content_digest(image) for image in self.pictures],
                [[content_digest(frame) for frame in video.frames] for video in self.videos],
            )

    @cached_property
    def pictures(self) -> tuple[Any, ...]:
        """Its images, those with a URL fetched once.

        Raises:
            InputError: A URL cannot be read.
        """
        return tuple(resolved(image) if is_remote(image) else image for image in self.images)

    @property
    def sources(self) -> list[str | None]:
        """The paths of its images; None for images in memory."""
        return [_source(image) for image in self.images]

    @property
    def frame_sources(self) -> list[list[str | None]]:
        """The paths of the frames of each video; None for frames in memory."""
        return [[_source(frame) for frame in video.frames] for video in self.videos]


def _source(picture: ImageLike) -> str | None:
    path = local_path(picture)
    return None if path is None else str(path.resolve())


@contextmanager
def _reading(title: str) -> Iterator[None]:
    """Raise InputError with the title of an item for any error when its pictures are read.

    Pillow has no common class of its errors: a truncated file, too many pixels, a closed image and
    a broken chunk each raise another one.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{title}: {error}") from error
    except Exception as error:
        message = (str(error) or type(error).__name__).rstrip(".")
        raise InputError(f"{title} has an image that cannot be read: {message}.") from error


def sample_name(number: int, raw: Any, seen: dict[str, int]) -> str:
    """Return the name of an item: its ``name``, its ``id``, or one made from its index.

    Args:
        number: Its index.
        raw: The item.
        seen: Index of each earlier item by its name; this item is added.

    Raises:
        InputError: The item is not a dict, or its name is invalid, rounded or already used.
    """
    if not isinstance(raw, Mapping):
        raise InputError(
            f"Item {number} is a {type(raw).__name__}; it must be a dict with image and prompt."
        )
    given = [raw[key] for key in NAMES if raw.get(key) is not None]
    if given and (isinstance(given[0], bool) or not isinstance(given[0], (str, numbers.Integral))):
        raise InputError(
            f"Item {number}: a name or id must be a string or an integer; got {quoted(given[0])}. "
            "Pandas rounds the numbers of a column with missing ones: read it with dtype=str."
        )
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


def item_of(
    number: int,
    name: str,
    raw: Mapping[str, Any],
    placeholders: tuple[str | None, str | None] = (None, None),
    *,
    requires_prompt: bool = True,
    reads_answer: bool = False,
) -> Item:
    """Return an item with validated entries, without opening its images.

    Args:
        number: Its index.
        name: Name of its sample.
        raw: The item.
        placeholders: The model's placeholders of an image and of a video in a text.
        requires_prompt: Whether it must have a prompt; a vision model takes none.
        reads_answer: Whether the model is run on its answer, which must be text then.

    Raises:
        InputError: An entry is missing or invalid.
    """
    title = f"Item {number} ({name!r})"
    asked = asked_by(raw, title=title, placeholders=placeholders, requires_prompt=requires_prompt)
    prompt, images, videos = asked.prompt, asked.images, asked.videos
    wrong = [type(image).__name__ for image in images if not is_picture(image)]
    if wrong:
        raise InputError(f"{title}: {WANTED}; got {', '.join(wrong)}.")
    wrong = [type(video).__name__ for video in videos if not isinstance(video, Video)]
    if wrong:
        raise InputError(f"{title}: a video must be an xi.Video; got {', '.join(wrong)}.")
    is_prompt = isinstance(prompt, Chat) or (isinstance(prompt, str) and prompt.strip())
    if requires_prompt and not is_prompt:
        raise InputError(f"{title}: the prompt must be a non-empty string; got {prompt!r}.")
    rest = {k: v for k, v in raw.items() if k not in _KEYS and v is not None}
    if raw.get("name") is not None and raw.get("id") is not None:
        rest["id"] = raw["id"]
    answer = None
    if asked.answer is not None:  # the end of a chat; a label keeps its own value
        rest.setdefault("answer", asked.answer)
        answer = text_of_answer(asked.answer, title=title) if reads_answer else None
    try:
        labels = json.loads(json_text(rest))
        json_text(prompt.messages if isinstance(prompt, Chat) else prompt)
    except InputError as error:
        raise InputError(f"{title}: {error}") from error
    return Item(number, name, tuple(images), prompt, labels, tuple(videos), answer)


def opened_media(
    item: Item, composite: Composite | None = None
) -> tuple[list[Image.Image], list[Video]]:
    """Open the images and videos of an item and read their pixels.

    Args:
        item: The item.
        composite: Puts transparent images on the background of the model's processor.

    Raises:
        InputError: A file does not exist or cannot be read.
    """
    with _reading(item.title):
        opened = [open_image(image, composite) for image in item.pictures]
        videos = [video.opened() for video in item.videos]
        frames = [open_image(frame) for video in videos for frame in video.frames]
        for image in (*opened, *frames):
            image.load()
    return opened, videos
