"""Chats: messages of several turns, as transformers, datasets and LLaVA write them.

Both forms are read, also as tables and ``datasets`` return them (arrays, entries that are None):

* ``{"role": "user", "content": "..."}``, with a string or a list of parts: ``{"type": "text",
  "text": "..."}``, ``{"type": "image", "image": picture}`` (or ``url``, ``path``, ``base64``,
  ``image_url``), ``{"type": "video", "video": frames}``.
* ``{"from": "human", "value": "..."}`` of LLaVA, with the speakers ``human``, ``gpt`` and others.

In a string, ``<image>`` and ``<video>`` mark where an image or a video is; a line break on either
side belongs to the mark. A part without a picture, a mark, or the model's placeholder in a text
takes the next of the images that are passed separately. If the messages have none of these, the
images are put at the start of the first message of the user.

A last message of the assistant is the answer of the chat and not part of its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from xmodal_interp.arguments import as_list, is_several, string
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.models.media import ImageLike, Video
from xmodal_interp.models.pixel_arrays import is_array

Messages = Iterable[Mapping[str, Any]] | Mapping[str, Sequence[Any]]
"""Messages in one of these forms, as a list of dicts or a dict of lists."""

MESSAGE_ROLES = ("system", "user", "assistant", "tool")
_SPEAKERS = {
    **{role: role for role in MESSAGE_ROLES},
    **{"human": "user", "gpt": "assistant", "observation": "tool"},
}
"""The role of each speaker in the ``from`` entries of a conversation."""

_MARKS = re.compile(r"\n?<(image|video)>\n?")
_PICTURE_KEYS = {
    "image": ("image", "url", "path", "base64", "image_url"),
    "video": ("video",),
}
_ALSO = {"image": (), "video": ("fps",)}


@dataclass(frozen=True, eq=False)
class Chat:
    """The messages of a chat, without its pictures.

    Attributes:
        messages: The messages in the form of chat templates: ``role``, ``content`` (a list of
            parts ``{"type": "text", "text": ...}``, ``{"type": "image"}`` and ``{"type":
            "video"}``), and further entries such as ``tool_calls``.
        answer: The text of the last message, if it is the assistant's; it is not in ``messages``.
    """

    messages: tuple[dict[str, Any], ...]
    answer: str | None = None

    @property
    def question(self) -> str:
        """The text of the last message of the user; empty if there is none."""
        of_user = [each for each in self.messages if each["role"] == "user"]
        return "\n".join(texts_of(of_user[-1])).strip() if of_user else ""

    def with_system(self, system: str | None) -> Chat:
        """Return the chat with a system message at its start.

        Raises:
            InputError: The chat has a system message.
        """
        if system is None:
            return self
        if any(each["role"] == "system" for each in self.messages):
            raise InputError(
                f"The messages contain a system message, and system={quoted(system)} was passed "
                "too. Leave out one of them."
            )
        return replace(self, messages=(_message("system", [_text(system)]), *self.messages))


@dataclass(eq=False)
class _Pictures:
    """The pictures of a chat: those in its parts, and the next of those that are passed separately.

    Attributes:
        separate: The pictures that are passed separately.
        placeholder: The model's placeholder of such a picture in a text, if it has one.
        found: The pictures of the parts that were read so far, in order.
        n_taken: The number of separate pictures among them.
    """

    separate: list[Any]
    placeholder: str | None
    found: list[Any] = field(default_factory=list)
    n_taken: int = 0

    def take(self, n: int = 1) -> None:
        """Add the next separate pictures; :func:`read_chat` reports too few."""
        self.found += self.separate[self.n_taken : self.n_taken + n]
        self.n_taken += n


def texts_of(message: Mapping[str, Any]) -> list[str]:
    """Return the texts of a message."""
    return [part["text"] for part in message["content"] if part["type"] == "text"]


def read_chat(
    given: Any,
    images: Sequence[ImageLike] = (),
    videos: Sequence[Video] = (),
    *,
    placeholders: tuple[str | None, str | None] = (None, None),
) -> tuple[Chat, list[ImageLike], list[Video]]:
    """Read messages, and return the chat and its images and videos in order.

    Args:
        given: The messages, or a :class:`Chat` whose images are passed separately.
        images: Images that are passed separately.
        videos: Videos that are passed separately.
        placeholders: The model's placeholders of an image and of a video in a text.

    Raises:
        InputError: There are no messages, a message or a part has no known form, or the numbers of
            places and of pictures differ.
    """
    if isinstance(given, Chat):
        return given, list(images), list(videos)
    pictures = {
        "image": _Pictures([*images], placeholders[0]),
        "video": _Pictures([*videos], placeholders[1]),
    }
    messages = [_read_message(each, pictures) for each in _listed(given)]
    for modality, of in pictures.items():
        if not of.n_taken and not of.found and of.separate:
            _put_first(messages, modality, len(of.separate))
            of.take(len(of.separate))
        if of.n_taken != len(of.separate):
            raise InputError(
                f"The messages have {of.n_taken} places for {modality}s that are passed separately "
                f"({{'type': '{modality}'}} or <{modality}>), but {len(of.separate)} were passed. "
                f"Pass one {modality} for each place."
            )
    answer = None
    if messages[-1]["role"] == "assistant":
        last = messages.pop()
        answer = "\n".join(texts_of(last)).strip()
        if not (answer and messages) or len(texts_of(last)) < len(last["content"]):
            raise InputError(
                "The last message is the assistant's, which is the given answer; it must be text "
                f"and follow another message; got {quoted(last)}. Leave it out to generate one."
            )
    return Chat(tuple(messages), answer), pictures["image"].found, pictures["video"].found


def _listed(given: Any) -> list[Any]:
    """Return messages as a list of dicts without None; also from a dict of columns."""
    if isinstance(given, Mapping):
        columns = {name: as_list(values, name) for name, values in given.items()}
        if len({len(values) for values in columns.values()}) != 1:
            raise InputError(
                f"Messages must be a list of dicts with role and content; got {quoted(given)}."
            )
        rows = zip(*columns.values(), strict=True)
        given = [dict(zip(columns, row, strict=True)) for row in rows]
    listed = as_list(given, "Messages") if isinstance(given, Iterable) else []
    if not listed or not all(isinstance(each, Mapping) for each in listed):
        raise InputError(
            "A prompt must be a string or a list of messages, which are dicts with role and "
            f"content; got {quoted(given)}."
        )
    return [{name: value for name, value in each.items() if value is not None} for each in listed]


def _read_message(given: Mapping[str, Any], pictures: Mapping[str, _Pictures]) -> dict[str, Any]:
    if "from" in given and "role" not in given:
        role, content, others = given["from"], given.get("value"), {}
    else:
        role, content = given.get("role"), given.get("content")
        others = {name: each for name, each in given.items() if name not in ("role", "content")}
    known = _SPEAKERS if "role" not in given else MESSAGE_ROLES
    if role not in known:
        raise InputError(
            f"A message must have one of the roles {', '.join(known)}; got {quoted(role)} in "
            f"{quoted(dict(given))}."
        )
    if content is None and not others.get("tool_calls"):
        raise InputError(f"A message must have a content; got {quoted(dict(given))}.")
    if content is None:
        parts = []
    elif isinstance(content, str):
        parts = list(_split(content, pictures))
    else:
        parts = [_read_part(part, pictures) for part in as_list(content, "The content")]
    return {**others, **_message(_SPEAKERS[role], parts)}


def _message(role: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"role": role, "content": parts}


def _text(text: str, pictures: Mapping[str, _Pictures] | None = None) -> dict[str, Any]:
    string(text, "The text of a message")
    for of in (pictures or {}).values():
        if of.placeholder is not None:
            of.take(text.count(of.placeholder))
    return {"type": "text", "text": text}


def _split(text: str, pictures: Mapping[str, _Pictures]) -> Iterable[dict[str, Any]]:
    """Yield the parts of a string, in which ``<image>`` and ``<video>`` are marks."""
    pieces = _MARKS.split(text)
    for number, piece in enumerate(pieces):
        if number % 2:
            pictures[piece].take()
            yield {"type": piece}
        elif piece or len(pieces) == 1:
            yield _text(piece, pictures)


def _read_part(given: Any, pictures: Mapping[str, _Pictures]) -> dict[str, Any]:
    if isinstance(given, str):
        return _text(given, pictures)
    if not isinstance(given, Mapping):
        raise InputError(
            "A part of a message must be a string or a dict with type, such as {'type': 'text', "
            f"'text': '...'}}; got {quoted(given)}."
        )
    part = {name: value for name, value in given.items() if value is not None}
    kind = part.pop("type", None)
    if kind is None:
        kind = next((name for name in ("text", "image", "video") if name in part), None)
    kind = "image" if kind == "image_url" else kind
    if kind == "text" and isinstance(part.get("text"), str):
        return _text(part["text"], pictures)
    if kind not in _PICTURE_KEYS:
        raise InputError(
            "A part of a message must be a text, an image or a video; got the type "
            f"{quoted(kind)} with the entries {', '.join(part) or 'none'}."
        )
    named = [name for name in _PICTURE_KEYS[kind] if name in part]
    unread = [name for name in part if name not in (*named, *_ALSO[kind])]
    if len(named) > 1 or unread:
        raise InputError(
            f"A part of the type {kind} has the entries {', '.join(part)}, of which "
            f"{', '.join(unread or named[1:])} would not be read. Leave them out; "
            "processor_options sets the resolution."
        )
    if not named:
        pictures[kind].take()
    else:
        read = _image_in if kind == "image" else _video_in
        pictures[kind].found.append(read(part, named[0]))
    return {"type": kind}


def _image_in(part: Mapping[str, Any], name: str) -> Any:
    image = part[name]
    if name == "image_url" and isinstance(image, Mapping):
        if image.get("detail") not in (None, "auto"):
            raise InputError(
                f"The detail {quoted(image['detail'])} of an image_url would not be read. Leave it "
                "out; processor_options sets the resolution."
            )
        image = image.get("url")
    return f"data:image;base64,{image}" if name == "base64" else image


def _video_in(part: Mapping[str, Any], name: str) -> Video:
    video = part[name]
    if isinstance(video, Video):
        return video
    frames = list(video) if is_several(video) and not is_array(video) else video
    return Video(frames, part.get("fps"))


def _put_first(messages: list[dict[str, Any]], modality: str, n: int) -> None:
    """Put images or videos at the start of the first message of the user, images first.

    Raises:
        InputError: There is no message of the user.
    """
    message = next((each for each in messages if each["role"] == "user"), None)
    if message is None:
        raise InputError(
            f"The messages have no place for the {n} {modality}s that are passed separately: none "
            f"is the user's. Put {{'type': '{modality}'}} where each goes."
        )
    at = sum(part["type"] == "image" for part in message["content"])
    message["content"][at:at] = [{"type": modality}] * n
