"""From a question to the prompt that the processor gets, and whose each stretch of it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xmodal_interp.errors import InputError
from xmodal_interp.models.alignment import shifted


@dataclass(frozen=True)
class Span:
    """A stretch of the rendered prompt, in characters, and whose it is."""

    role: str
    start: int
    end: int


@dataclass(frozen=True)
class Rendered:
    """A prompt as the processor gets it.

    Attributes:
        text: Its characters, placeholders not expanded.
        spans: Whose text is where.
    """

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True, eq=False)
class Writer:
    """How the prompts of a model are written.

    Attributes:
        processor: Its chat template is used.
        image: What a prompt has where an image goes; None where it has nothing there.
        video: What a prompt has where a video goes, likewise.
        in_front: Whether the processor puts the images in front by itself: without a chat template,
            the question is the prompt.
        answer: Whether a prompt ends with what opens the answer.
    """

    processor: Any
    image: str | None
    video: str | None = None
    in_front: bool = False
    answer: bool = True

    def prompt(
        self, question: str, n_images: int, n_videos: int = 0, *, system: str | None = None
    ) -> Rendered:
        """The prompt of a question about some images and videos.

        Args:
            question: One that holds a placeholder is the whole prompt; any other is put into the
                chat template behind its images, and these before its videos.
            n_images: How many images there are.
            n_videos: How many videos there are.
            system: A system message, for the chat template.

        Raises:
            InputError: An empty question or one that is no text, a processor without a chat
                template, or a prompt that has not one placeholder per video.
        """
        if not isinstance(question, str):
            raise InputError(f"A prompt must be one text; got {question!r}.")
        if not question.strip():
            raise InputError("A prompt must not be empty; got only white space.")
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
                f"{type(self.processor).__name__} has no chat template, so a bare question cannot "
                f"be rendered. Write the whole prompt{where}; got {question!r}."
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
            f"A prompt must have {placeholder or 'a placeholder'} where each video goes. {whose} "
            f"has {found} of them for {n_videos} videos: {text!r}."
        )


def closed_up(prompt: str, mark: str) -> str:
    """The prompt without spaces around the marks of its images, nor at its ends."""
    return re.sub(rf" *{re.escape(mark)} *", mark, prompt).strip(" ")


def interleaved(prompt: str, mark: str, images: Sequence[Any]) -> list[Any]:
    """Texts and images in the order of the prompt; where it marks none, the images come first.

    Raises:
        InputError: It does not mark as many images as there are.
    """
    texts = prompt.split(mark) if mark in prompt else [""] * len(images) + [prompt]
    if len(texts) != len(images) + 1:
        raise InputError(
            f"A prompt must have {mark} once for each image, or not at all. There are "
            f"{len(images)} images; the prompt is {prompt!r}."
        )
    parts = [part for pair in zip(texts, images, strict=False) for part in pair]
    return [part for part in (*parts, texts[-1]) if part != ""]


def spans_in(text: str, prompt: Rendered) -> list[Span]:
    """The spans of a prompt in the text that the processor made of it before expanding.

    Raises:
        GeometryError: Some of the prompt is gone.
    """
    starts = shifted([span.start for span in prompt.spans], prompt.text, text)
    lasts = shifted([span.end - 1 for span in prompt.spans], prompt.text, text)
    return [
        Span(span.role, start, last + 1)
        for span, start, last in zip(prompt.spans, starts, lasts, strict=True)
    ]


def message_spans(text: str, messages: Sequence[dict[str, Any]]) -> list[Span]:
    """Where the texts of the messages stand in the rendered prompt.

    A message reaches from its first part to its last.
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
                    f"A chat template must render every message text as it is. The text {part!r} "
                    "is not in the rendered "
                    f"prompt {text!r}."
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
