"""Render a question to the prompt for the processor, with the role of each part of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xmodal_interp.errors import InputError
from xmodal_interp.models.alignment import shifted


@dataclass(frozen=True)
class Span:
    """A span of characters of the rendered prompt, and its role."""

    role: str
    start: int
    end: int


@dataclass(frozen=True)
class Rendered:
    """A prompt as it is passed to the processor.

    Attributes:
        text: The prompt; placeholders are not expanded.
        spans: The span and role of each message.
    """

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, eq=False)
class Writer:
    """Renders the prompts of a model.

    Attributes:
        processor: The processor, whose chat template is used.
        image: The placeholder of an image; None if images have no placeholder.
        video: The placeholder of a video; None if videos have no placeholder.
        in_front: Whether the processor itself puts the images before the prompt. Without a chat
            template, the question then is the whole prompt.
        answer: Whether the chat template adds the generation prompt.
    """

    processor: Any
    image: str | None
    video: str | None = None
    in_front: bool = False
    answer: bool = True

    def prompt(
        self, question: str, n_images: int, n_videos: int = 0, *, system: str | None = None
    ) -> Rendered:
        """Return the prompt of a question about some images and videos.

        Args:
            question: A question that contains a placeholder is used as the whole prompt. Any other
                is put into the chat template, after its images and then its videos.
            n_images: The number of images.
            n_videos: The number of videos.
            system: A system message, for the chat template.

        Raises:
            InputError: The question is empty or not a string, the processor has no chat template,
                or the prompt does not have one placeholder per video.
        """
        if not isinstance(question, str):
            raise InputError(f"A prompt must be a string; got {question!r}.")
        if not question.strip():
            raise InputError("The prompt is empty or only white space.")
        templated = getattr(self.processor, "chat_template", None) is not None
        known = [each for each in (self.image, self.video) if each is not None]
        if any(each in question for each in known) or (self.in_front and not templated):
            _check_videos(question, self.video, n_videos, "The prompt")
            return Rendered(question, (Span("user", 0, len(question)),))
        if not templated:
            where = "" if self.image is None else f", with {self.image} where each image goes"
            if n_videos:
                where += f", with {self.video} where each video goes"
            raise InputError(
                f"{type(self.processor).__name__} has no chat template to render the question "
                f"{question!r}. Write the whole prompt{where}."
            )
        parts = ["image"] * n_images + ["video"] * n_videos
        content = [*({"type": part} for part in parts), {"type": "text", "text": question}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        text = self.processor.apply_chat_template(messages, add_generation_prompt=self.answer)
        _check_videos(text, self.video, n_videos, "The chat template's prompt")
        marks = (span for each in known for span in _placeholder_spans(text, each))
        return Rendered(text, (*message_spans(text, messages), *marks))


def _check_videos(text: str, placeholder: str | None, n_videos: int, whose: str) -> None:
    found = 0 if placeholder is None else text.count(placeholder)
    if found != n_videos:
        raise InputError(
            f"{whose} has {found} video placeholders for {n_videos} videos: {text!r}. Put "
            f"{placeholder or 'a placeholder'} where each video goes."
        )


def closed_up(prompt: str, mark: str) -> str:
    """Return the prompt without spaces around its image marks and at its ends."""
    return re.sub(rf" *{re.escape(mark)} *", mark, prompt).strip(" ")


def interleaved(prompt: str, mark: str, images: Sequence[Any]) -> list[Any]:
    """Return texts and images in the order of the prompt; without marks, the images come first.

    Raises:
        InputError: The prompt has another number of marks than images.
    """
    texts = prompt.split(mark) if mark in prompt else [""] * len(images) + [prompt]
    if len(texts) != len(images) + 1:
        raise InputError(
            f"The prompt {prompt!r} contains {mark} {len(texts) - 1} times for {len(images)} "
            "images. Write it once for each image, or leave it out."
        )
    parts = [part for pair in zip(texts, images, strict=False) for part in pair]
    return [part for part in (*parts, texts[-1]) if part != ""]


def spans_in(text: str, prompt: Rendered) -> list[Span]:
    """Return the spans of a prompt in the text that the processor laid out, before expansion.

    Raises:
        GeometryError: The processor's text does not contain the whole prompt.
    """
    starts = shifted([span.start for span in prompt.spans], prompt.text, text)
    lasts = shifted([span.end - 1 for span in prompt.spans], prompt.text, text)
    return [
        Span(span.role, start, last + 1)
        for span, start, last in zip(prompt.spans, starts, lasts, strict=True)
    ]


def message_spans(text: str, messages: Sequence[dict[str, Any]]) -> list[Span]:
    """Return the spans of the messages' texts in the rendered prompt, one per text part.

    Raises:
        InputError: The rendered prompt does not contain the text of a message.
    """
    spans, cursor = [], 0
    for message in messages:
        content = message["content"]
        parts = (
            [content]
            if isinstance(content, str)
            else [p["text"] for p in content if p["type"] == "text"]
        )
        for part in parts:
            start = text.find(part.strip(), cursor)
            if start < 0:
                raise InputError(
                    f"The chat template's prompt {text!r} does not contain the message text "
                    f"{part!r}. Use a chat template that keeps message texts unchanged."
                )
            cursor = start + len(part.strip())
            spans.append(Span(message["role"], start, cursor))
    return spans


def _placeholder_spans(text: str, placeholder: str) -> list[Span]:
    spans: list[Span] = []
    start = text.find(placeholder)
    while start >= 0:
        spans.append(Span("user", start, start + len(placeholder)))
        start = text.find(placeholder, start + len(placeholder))
    return spans
