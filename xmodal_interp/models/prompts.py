"""Render a question to the prompt for the processor, with the role of each part of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from xmodal_interp.errors import InputError
from xmodal_interp.models.alignment import shifted

if TYPE_CHECKING:
    from xmodal_interp.models.vlm import VLM


@dataclass(frozen=True)
class RoleSpan:
    """A span of characters of the rendered prompt, and its role."""

    role: str
    start: int
    end: int


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as it is passed to the processor.

    Attributes:
        text: The prompt; placeholders are not expanded.
        spans: The span and role of each message.
    """

    text: str
    spans: tuple[RoleSpan, ...]


def rendered(
    vlm: VLM, question: str, n_images: int, n_videos: int, *, system: str | None = None
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
    text = _from_template(vlm, messages)
    checked, whose = (question, "The prompt") if placed else (text, "The chat template's prompt")
    _check_videos(checked, video, n_videos, whose)
    marks = (
        RoleSpan("user", *found.span())
        for each in placeholders
        for found in re.finditer(re.escape(each), text)
    )
    return RenderedPrompt(text, (*_message_spans(text, messages), *marks))


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

    Raises:
        InputError: The template fails, for example because it has no system messages.
    """
    generation_prompt = not vlm.family.writes_prompt
    try:
        text = vlm.processor.apply_chat_template(messages, add_generation_prompt=generation_prompt)
    except (TemplateError, TypeError) as error:  # TypeError: it adds a string to the list of parts
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"The chat template of {type(vlm.processor).__name__} fails on messages of the roles "
            f"{roles}: {error}. Leave out messages that it does not take, or write the whole "
            "prompt."
        ) from error
    return str(text)


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


def _message_spans(text: str, messages: Sequence[dict[str, Any]]) -> list[RoleSpan]:
    """Return the spans of the messages' texts in the rendered prompt, one per text part.

    Raises:
        InputError: The rendered prompt does not contain the text of a message.
    """
    spans, cursor = [], 0
    for message in messages:
        for part in message["content"]:
            if part["type"] != "text":
                continue
            written = part["text"].strip()
            start = text.find(written, cursor)
            if start < 0:
                raise InputError(
                    f"The chat template's prompt {text!r} does not contain the message text "
                    f"{part['text']!r}. Use a chat template that keeps message texts unchanged."
                )
            cursor = start + len(written)
            spans.append(RoleSpan(message["role"], start, cursor))
    return spans


def spans_in(text: str, prompt: RenderedPrompt) -> list[RoleSpan]:
    """Return the spans of a prompt in the text that the processor expanded.

    The processor may have added text to the prompt before it expanded placeholders.

    Raises:
        GeometryError: The processor's text does not contain the whole prompt.
    """
    starts = shifted([span.start for span in prompt.spans], prompt.text, text)
    lasts = shifted([span.end - 1 for span in prompt.spans], prompt.text, text)
    return [
        RoleSpan(span.role, start, last + 1)
        for span, start, last in zip(prompt.spans, starts, lasts, strict=True)
    ]
