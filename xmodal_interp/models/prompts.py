"""Render a question to the prompt for the processor, with the role of each part of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from xmodal_interp.errors import InputError
from xmodal_interp.models.alignment import shifted
from xmodal_interp.models.chats import Chat

if TYPE_CHECKING:
    from xmodal_interp.models.vlm import VLM


@dataclass(frozen=True)
class RoleSpan:
    """A span of characters of the rendered prompt.

    Attributes:
        role: The role of the message that it is from.
        start: Index of its first character.
        end: Index after its last character.
        turn: Index of the message; None if the prompt is not a chat.
    """

    role: str
    start: int
    end: int
    turn: int | None = None


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as it is passed to the processor.

    Attributes:
        text: The prompt; placeholders are not expanded.
        spans: The span and role of each text and placeholder.
        n_turns: The number of messages; 0 if the prompt is not a chat.
    """

    text: str
    spans: tuple[RoleSpan, ...]
    n_turns: int = 0


def rendered(
    vlm: VLM, question: str | Chat, n_images: int, n_videos: int, *, system: str | None = None
) -> RenderedPrompt:
    """Return the prompt of a question (see :func:`_rendered_question`) or of a chat."""
    if isinstance(question, Chat):
        return _rendered_chat(vlm, question.with_system(system), n_videos)
    return _rendered_question(vlm, question, n_images, n_videos, system)


def _rendered_question(
    vlm: VLM, question: str, n_images: int, n_videos: int, system: str | None
) -> RenderedPrompt:
    """Return the prompt of a question about some images and videos.

    The question is put into the chat template, after its images and then its videos. Images and
    videos are not added to a question that contains a placeholder: they stay where it has them.

    A question is the whole prompt if it contains a placeholder and there is no chat template, or it
    also contains what the chat template writes around a message (it was rendered before). If there
    is no chat template and the processor itself inserts images before the prompt, every question is
    the whole prompt.

    Args:
        vlm: Model, processor and family record.
        question: The question; it may be empty if the decoder starts from its start token alone.
        n_images: The number of images.
        n_videos: The number of videos.
        system: A system message, for the chat template.

    Raises:
        InputError: The question is empty, the model takes no text, the processor has no chat
            template or its template fails, there is a system message but the question is the whole
            prompt, or the prompt does not have one placeholder per video.
    """
    family, processor = vlm.family, vlm.processor
    if vlm.model.config.is_encoder_decoder and not (family.in_sequence or question):
        _refuse_system(system, f"{family.model_type} starts from its start token, without a prompt")
        return RenderedPrompt("", ())
    if not family.reads_text:
        raise InputError(
            f"A {family.model_type} model takes no prompt; got {question!r}. "
            "Pass an empty prompt, ''."
        )
    if family.image_mark is not None:  # spaces around image marks and at the ends are dropped
        mark = family.image_mark
        question = re.sub(rf" *{re.escape(mark)} *", lambda _: mark, question).strip(" ")
    if not question.strip():
        raise InputError("The prompt is empty or only white space. Pass a question.")
    templated = getattr(processor, "chat_template", None) is not None
    image, video = vlm.placeholder, vlm.video_placeholder
    placeholders = [each for each in (image, video) if each is not None]
    placed = any(each in question for each in placeholders)
    _warn_of_other_marks(vlm, question, placeholders)
    if not templated and (placed or family.in_front):
        _refuse_system(system, f"{type(processor).__name__} has no chat template to put it in")
        return _whole(question, video, n_videos)
    if placed and _is_rendered(vlm, question):
        _refuse_system(system, f"the prompt {question!r} is already rendered")
        return _whole(question, video, n_videos)
    if not templated:
        where = "" if image is None else f", with {image} where each image goes"
        if n_videos:
            where += f", with {video} where each video goes"
        raise InputError(
            f"{type(processor).__name__} has no chat template to render the question "
            f"{question!r}. Write the whole prompt{where}."
        )
    parts = [] if placed else ["image"] * n_images + ["video"] * n_videos
    content = [*({"type": part} for part in parts), {"type": "text", "text": question}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return _templated(vlm, messages, n_videos, question if placed else None)


def _warn_of_other_marks(vlm: VLM, question: str, placeholders: Sequence[str]) -> None:
    """Warn of ``<image>`` or ``<video>`` in a question, if it is plain text for the model."""
    special = {*placeholders, *vlm.tokenizer.all_special_tokens, vlm.family.image_mark}
    for mark in ("<image>", "<video>"):
        if mark in question and mark not in special:
            place = f"write {' or '.join(placeholders)}" if placeholders else "leave it out"
            warnings.warn(
                f"The prompt contains {mark!r}, which is plain text for this model. If it is the "
                f"place of a picture, {place}, or pass messages.",
                stacklevel=2,
            )


def _rendered_chat(vlm: VLM, chat: Chat, n_videos: int) -> RenderedPrompt:
    """Return the prompt of a chat.

    Raises:
        InputError: The model or its processor takes no chat.
    """
    writes = vlm.family.writes_prompt or not vlm.family.reads_text
    if writes or getattr(vlm.processor, "chat_template", None) is None:
        raise InputError(
            f"{type(vlm.processor).__name__} has no chat template to render messages. Pass the "
            "prompt as a string."
        )
    prompt = _templated(vlm, chat.messages, n_videos)
    _check_calls(vlm, chat.messages, prompt.text)
    return replace(prompt, n_turns=len(chat.messages))


def _check_calls(vlm: VLM, messages: Sequence[dict[str, Any]], text: str) -> None:
    """Raise InputError if the chat template does not write the tool calls of a message."""
    for turn, message in enumerate(messages):
        if not message.get("tool_calls"):
            continue
        without = {name: each for name, each in message.items() if name != "tool_calls"}
        if _from_template(vlm, [*messages[:turn], without, *messages[turn + 1 :]]) == text:
            raise InputError(
                f"The chat template of {type(vlm.processor).__name__} does not write the "
                f"tool_calls of message {turn}. Write them into its content, or use a chat "
                "template with tools."
            )


def _templated(
    vlm: VLM, messages: Sequence[dict[str, Any]], n_videos: int, placed: str | None = None
) -> RenderedPrompt:
    """Return the messages as the chat template writes them, with the role of each text and image.

    Args:
        vlm: Model, processor and family record.
        messages: The messages.
        n_videos: The number of videos.
        placed: The user's question, if it has the placeholders.

    Raises:
        InputError: The template fails, changes the text of a message, or does not write one
            placeholder for each video.
    """
    text = _from_template(vlm, messages)
    checked = (text, "The chat template's prompt") if placed is None else (placed, "The prompt")
    _check_videos(checked[0], vlm.video_placeholder, n_videos, checked[1])
    spans = _message_spans(vlm, text, messages)
    for modality, placeholder in (("image", vlm.placeholder), ("video", vlm.video_placeholder)):
        if placeholder is not None:
            spans += _picture_spans(text, spans, messages, modality, placeholder)
    return RenderedPrompt(text, tuple(spans))


def _picture_spans(
    text: str,
    spans: Sequence[RoleSpan],
    messages: Sequence[dict[str, Any]],
    modality: str,
    placeholder: str,
) -> list[RoleSpan]:
    """Return the spans of placeholders outside the texts, with the roles of their messages.

    Templates write one placeholder for each part, or the same number for each. If one writes
    another number, the role is ``user`` and the turn is not known.
    """
    owners: list[tuple[str, int | None]] = [
        (message["role"], turn)
        for turn, message in enumerate(messages)
        for part in message["content"]
        if part["type"] == modality
    ]
    found = [
        each.span()
        for each in re.finditer(re.escape(placeholder), text)
        if not any(span.start <= each.start() < span.end for span in spans)
    ]
    n_each, rest = divmod(len(found), max(len(owners), 1))
    if rest or not owners:
        owners = [("user", None)] * len(found)
    else:
        owners = [owner for owner in owners for _ in range(n_each)]
    return [RoleSpan(role, *span, turn) for (role, turn), span in zip(owners, found, strict=True)]


def _whole(question: str, video: str | None, n_videos: int) -> RenderedPrompt:
    """Return a question as the whole prompt."""
    _check_videos(question, video, n_videos, "The prompt")
    return RenderedPrompt(question, (RoleSpan("user", 0, len(question)),))


def _refuse_system(system: str | None, reason: str) -> None:
    """Raise InputError if there is a system message, which the prompt cannot contain."""
    if system is not None:
        raise InputError(
            f"The system message {system!r} cannot be added: {reason}. Write it into the prompt, "
            "and leave out system."
        )


def _from_template(vlm: VLM, messages: Sequence[dict[str, Any]]) -> str:
    """Return the messages as the chat template writes them.

    Some templates take the content of messages without images only as a string: they fail on a list
    of parts, or write the list itself. They are given strings.

    Raises:
        InputError: The template fails, for example because it has no system messages.
    """
    generation_prompt = not vlm.family.writes_prompt

    def written(given: Sequence[dict[str, Any]]) -> str:
        return str(
            vlm.processor.apply_chat_template(given, add_generation_prompt=generation_prompt)
        )

    plain = [_with_string(message) for message in messages]
    try:
        try:
            text = written(messages)
        except (TemplateError, TypeError):  # TypeError: it adds a string to the list of parts
            if plain == list(messages):
                raise
            return written(plain)
        lists = [str(message["content"]) for message in messages if message["content"]]
        return written(plain) if any(each in text for each in lists) else text
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"The chat template of {type(vlm.processor).__name__} fails on messages of the roles "
            f"{roles}: {error}. Leave out messages that it does not take, or write the whole "
            "prompt."
        ) from error


def _with_string(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message of one text with the text as its content; others as they are."""
    content = message["content"]
    if len(content) != 1 or content[0]["type"] != "text":
        return message
    return {**message, "content": content[0]["text"]}


_PROBE = "xmodal probe"


def _is_rendered(vlm: VLM, question: str) -> bool:
    """Return whether a question contains what the chat template writes around messages.

    That is the text after a user's message (such as ``" ASSISTANT:"``), or a special token that the
    template writes. A prompt rendered before by ``apply_chat_template`` contains at least one.
    """
    content = [{"type": "text", "text": _PROBE}]
    before, found, after = _from_template(vlm, [{"role": "user", "content": content}]).partition(
        _PROBE
    )
    if not found:
        return False
    written = [each for each in vlm.tokenizer.all_special_tokens if each in before + after]
    return any(each and each in question for each in (after.strip(), *written))


def _check_videos(text: str, placeholder: str | None, n_videos: int, whose: str) -> None:
    found = 0 if placeholder is None else text.count(placeholder)
    if found != n_videos:
        raise InputError(
            f"{whose} has {found} video placeholders for {n_videos} videos: {text!r}. Put "
            f"{placeholder or 'a placeholder'} where each video goes."
        )


def _message_spans(vlm: VLM, text: str, messages: Sequence[dict[str, Any]]) -> list[RoleSpan]:
    """Return the spans of the messages' texts in the rendered prompt, one per text part.

    A text that occurs once in the prompt is there. If one occurs again, for example in the name of
    a role, the template is rendered with numbers instead of the texts, which shows where each is.

    Raises:
        InputError: The rendered prompt does not contain the text of a message.
    """
    parts = [
        (message["role"], turn, part["text"])
        for turn, message in enumerate(messages)
        for part in message["content"]
        if part["type"] == "text"
    ]
    places = [text.count(given.strip()) for _, _, given in parts if given.strip()]
    if any(n != 1 for n in places):
        exact = _numbered_spans(vlm, text, messages, parts)
        if exact is not None:
            return exact
    spans, cursor = [], 0
    for role, turn, given in parts:
        written = given.strip()
        if not written:
            continue
        start = text.find(written, 0 if text.count(written) == 1 else cursor)
        if start < 0:
            raise InputError(
                f"The chat template's prompt {text!r} does not contain the message text "
                f"{given!r}. Use a chat template that keeps message texts unchanged."
            )
        cursor = start + len(written)
        spans.append(RoleSpan(role, start, cursor, turn))
    return spans


_NUMBER = re.compile("\ue000([0-9]+)\ue001")  # private characters, which templates do not write


def _numbered_spans(
    vlm: VLM,
    text: str,
    messages: Sequence[dict[str, Any]],
    parts: Sequence[tuple[str, int, str]],
) -> list[RoleSpan] | None:
    """Return the spans of the texts by the places of numbers that are rendered instead.

    Args:
        vlm: Model, processor and family record.
        text: The rendered prompt.
        messages: The messages.
        parts: Role, turn and text of each text part.

    Returns:
        The spans; None if the template leaves out a text, or writes other text around numbers than
        around the texts.
    """
    numbers = iter(range(len(parts)))
    numbered = [
        {
            **message,
            "content": [
                {"type": "text", "text": f"\ue000{next(numbers)}\ue001"}
                if part["type"] == "text"
                else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]
    first, *pieces = _NUMBER.split(_from_template(vlm, numbered))
    if not text.startswith(first) or {int(each) for each in pieces[::2]} != {*range(len(parts))}:
        return None
    spans, cursor = [], len(first)
    for number, following in zip(pieces[::2], pieces[1::2], strict=True):
        role, turn, given = parts[int(number)]
        forms = (given, given.strip(), given.lstrip(), given.rstrip())
        written = next((each for each in forms if text.startswith(each + following, cursor)), None)
        if written is None:
            return None
        start = cursor + len(written) - len(written.lstrip())
        spans.append(RoleSpan(role, start, start + len(written.strip()), turn))
        cursor += len(written + following)
    return [span for span in spans if span.end > span.start] if cursor == len(text) else None


def spans_in(text: str, prompt: RenderedPrompt) -> list[RoleSpan]:
    """Return the spans of a prompt in the text that the processor expanded.

    The processor may have added text to the prompt before it expanded placeholders.

    Raises:
        GeometryError: The processor's text does not contain the whole prompt.
    """
    starts = shifted([span.start for span in prompt.spans], prompt.text, text)
    lasts = shifted([span.end - 1 for span in prompt.spans], prompt.text, text)
    return [
        RoleSpan(span.role, start, last + 1, span.turn)
        for span, start, last in zip(prompt.spans, starts, lasts, strict=True)
    ]
