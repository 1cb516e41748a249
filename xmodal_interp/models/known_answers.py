"""Items (an image, a question and its known answer), and batches of them without padding.

1. The entries of each item are read and checked (:func:`listed`, :func:`entry`).
2. Each item is prepared separately by :meth:`VLM.prepare`.
3. The tokens of its answer are appended to its prompt (teacher forcing). Masks and token types of
   these positions are those of generated tokens.
4. Items whose inputs have the same shape share a batch (:func:`batches_of`).

The inputs of an item therefore do not depend on the other items of its batch. Without padding there
is no mask and no shift of positions, and the backend can use its fast path.
"""

from __future__ import annotations

import math
import numbers
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from os import PathLike
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from xmodal_interp.arguments import as_list, one_or_several
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.models.chats import Chat, read_chat
from xmodal_interp.models.item_files import CHATS, IMAGES, PROMPT, VIDEOS, rows_of
from xmodal_interp.models.labels import Prompt
from xmodal_interp.models.model_inputs import with_answer
from xmodal_interp.models.token_table import answer_separator
from xmodal_interp.models.vlm import VLM, check_vlm

ItemDict = Mapping[str, Any]
"""A mapping with ``image`` or ``images``, or ``video`` or ``videos`` (or both); ``prompt`` or
``question``, or a chat in ``messages`` or ``conversations``; ``answer``; and optionally ``kind``. A
chat may hold its images and end with the answer. An entry that is None counts as missing."""

Items = Iterable[ItemDict] | pd.DataFrame | str | PathLike[str]
"""An iterable of dicts, a table with one row per item, or a file of items (see ``read_items``)."""


def listed(items: Items) -> list[ItemDict]:
    """Return all items as dicts; empty cells of a table are left out.

    Raises:
        InputError: An item is not a mapping, or a file of items cannot be read.
    """
    is_source = isinstance(items, (pd.DataFrame, str, PathLike))
    found = as_list(rows_of(items) if is_source else items, "items")
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
    present = _names_in(item, names)
    if len(present) != 1:
        between = " and " if present else " or "
        raise InputError(
            f"{title} has {'both' if present else 'no'} "
            f"{between.join(map(repr, present or names))} (its "
            f"entries are {', '.join(map(str, item)) or 'empty'}). Give exactly one that is not "
            "None."
        )
    return item[present[0]]


def visuals_of(item: ItemDict, *, title: str) -> tuple[list[Any], list[Any]]:
    """Return the images and the videos of an item, neither opened nor checked.

    Raises:
        InputError: The item has neither, or has ``image`` and ``images`` (or ``video`` and
            ``videos``) at once.
    """
    videos = one_or_several(entry(item, *VIDEOS, title=title)) if _names_in(item, VIDEOS) else []
    images = (
        []
        if videos and not _names_in(item, IMAGES)
        else one_or_several(entry(item, *IMAGES, title=title))
    )
    return images, videos


@dataclass(frozen=True, eq=False)
class Asked:
    """The prompt, images, videos and answer of an item.

    Attributes:
        prompt: The question, or the chat without its answer.
        images: The images, neither opened nor checked.
        videos: The videos, neither opened nor checked.
        answer: The answer: the entry ``answer`` or the end of the chat; None if there is none.
    """

    prompt: str | Chat
    images: list[Any]
    videos: list[Any]
    answer: Any

    @property
    def question(self) -> str:
        """The question; that of the last message of the user in a chat."""
        return self.prompt.question if isinstance(self.prompt, Chat) else self.prompt


def asked_by(
    item: ItemDict,
    *,
    title: str,
    placeholders: tuple[str | None, str | None] = (None, None),
    requires_prompt: bool = True,
) -> Asked:
    """Return the prompt, the images, the videos and the answer of an item.

    Args:
        item: The item.
        title: Its name in messages.
        placeholders: The model's placeholders of an image and of a video in a text.
        requires_prompt: Whether it must have a prompt or a chat; without one, its prompt is empty.

    Raises:
        InputError: An entry is missing or given twice, or a chat has no known form.
    """
    names = (*PROMPT, *CHATS)
    requires_prompt = requires_prompt or any(item.get(name) for name in names)
    given = entry(item, *names, title=title) if requires_prompt else ""
    chat_name = next((name for name in CHATS if item.get(name) is not None), None)
    if requires_prompt and isinstance(given, str) and chat_name is not None:
        raise InputError(
            f"{title}: {chat_name} must be a list of messages; got the string {quoted(given)}. "
            "Parse it with json.loads if it is JSON, or pass a question as prompt."
        )
    if isinstance(given, str) or not isinstance(given, Iterable):
        images, videos = visuals_of(item, title=title)
        return Asked(given, images, videos, item.get("answer"))
    images, videos = (
        one_or_several(entry(item, *names, title=title)) if _names_in(item, names) else []
        for names in (IMAGES, VIDEOS)
    )
    try:
        chat, images, videos = read_chat(given, images, videos, placeholders=placeholders)
    except InputError as error:
        raise InputError(f"{title}: {error}") from error
    answer = item.get("answer")
    if chat.answer is not None and answer not in (None, chat.answer):
        raise InputError(
            f"{title} has the answer {answer!r}, and its messages end with {chat.answer!r}. Leave "
            "out one of them."
        )
    return Asked(replace(chat, answer=None), images, videos, chat.answer or answer)


def answer_of(
    item: ItemDict, *, title: str, placeholders: tuple[str | None, str | None] = (None, None)
) -> str:
    """Return the answer of an item: its entry ``answer``, or the end of its chat.

    Raises:
        InputError: The item has no answer.
    """
    if item.get("answer") is None and _names_in(item, (*PROMPT, *CHATS)):
        found = asked_by(item, title=title, placeholders=placeholders).answer
        if found is not None:
            return text_of_answer(found, title=title)
    return text_of_answer(entry(item, "answer", title=title), title=title)


def text_of_answer(answer: Any, *, title: str) -> str:
    """Return an answer as the text that the model is run on; a number as it is written.

    Raises:
        InputError: It is neither a string nor a finite number.
    """
    is_number = isinstance(answer, (numbers.Real, Decimal)) and math.isfinite(answer)
    if not isinstance(answer, str) and (not is_number or isinstance(answer, (bool, np.bool_))):
        raise InputError(
            f"{title}: an answer must be a string or a number; got {quoted(answer)}. Choose one "
            "string to run the model on."
        )
    return str(answer)


def _names_in(item: ItemDict, names: Iterable[str]) -> list[str]:
    return [name for name in names if item.get(name) is not None]


@dataclass(frozen=True, eq=False)
class Batch:
    """Items whose inputs have the same shape.

    Attributes:
        inputs: Arguments of the model. ``input_ids`` are ``[item, position]``. If the decoder has a
            separate prompt, the answers are appended to its ``decoder_input_ids``.
        index: The indices of the items.
        prompts: The labelled positions of each prompt, answer not included.
        answers: Token ids of each answer; empty if the batch has prompts only.
    """

    inputs: dict[str, Any]
    index: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    answers: tuple[tuple[int, ...], ...]

    @property
    def n_ids(self) -> int:
        """Number of positions of the ``input_ids``.

        Raises:
            InputError: The prompts have more positions than ids: the model puts image features
                before the ids, or has an encoder and a decoder.
        """
        n = int(self.inputs["input_ids"].shape[1])
        longest = max(len(prompt.columns["token"]) for prompt in self.prompts)
        if longest > n:
            raise InputError(
                f"Positions of this batch cannot be chosen: its prompts have {longest} positions "
                f"but {n} ids, because the model puts features before the ids or has an encoder. "
                "Ablate to zero or to uniform attention, which requires no positions."
            )
        return n


def batches_of(vlm: VLM, items: Items, *, batch_size: int, answers: bool = True) -> list[Batch]:
    """Prepare items for the model.

    Args:
        vlm: Model and processor.
        items: Dicts with ``image`` or ``video`` (or lists of them), ``prompt`` and ``answer``.
        batch_size: The largest number of items per batch.
        answers: Whether to append the answers to the prompts (teacher forcing).

    Raises:
        InputError: There are no items, an item is not a dict or lacks an image or video, a prompt
            or an answer, or an answer changes the tokens of its prompt.
    """
    check_vlm(vlm)
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {batch_size}.")
    shapes: dict[Any, list[Batch]] = defaultdict(list)
    for index, item in enumerate(listed(items)):
        title = f"Item {index}"
        asked = asked_by(item, title=title, placeholders=vlm.placeholders)
        answer = answer_of(item, title=title, placeholders=vlm.placeholders) if answers else ""
        inputs, (prompt,) = vlm.prepare([asked.images], [asked.prompt], videos=[asked.videos])
        ids = answer_ids(vlm, prompt.text, answer) if answers else ()
        if answers:
            inputs = with_answer(vlm.model, inputs, [ids], [last_text(prompt)])
        shapes[_shape(inputs)].append(Batch(inputs, (index,), (prompt,), (ids,)))
    if not shapes:
        raise InputError("There are no items. Give at least one.")
    return [
        _joined(alike[start : start + batch_size])
        for alike in shapes.values()
        for start in range(0, len(alike), batch_size)
    ]


def answer_ids(vlm: VLM, text: str, answer: str) -> tuple[int, ...]:
    """Return the token ids of an answer after a rendered prompt, without end-of-sequence token.

    Raises:
        InputError: The answer is empty or contains a placeholder of an image or video, or the
            prompt is tokenized differently with it.
    """
    mark = next((each for each in vlm.placeholders if each is not None and each in answer), None)
    if mark is not None:
        raise InputError(
            f"The answer {quoted(answer)} contains {mark}, the model's placeholder of an image or "
            "video. Leave it out of the answer."
        )
    separator = answer_separator(text)
    before = vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = vlm.tokenizer(text + separator + answer, add_special_tokens=False)["input_ids"]
    continues = list(whole[: len(before)]) == list(before) and len(whole) > len(before)
    if not answer.strip() or not continues:
        raise InputError(
            f"The answer {answer!r} is empty, or changes the tokens of the prompt {text!r}. Give "
            "an answer that starts a new token."
        )
    return tuple(whole[len(before) :])


def last_text(prompt: Prompt) -> int:
    """Return the last text position of a prompt, or its last position if it has no text."""
    kinds = prompt.columns["kind"]
    return max((i for i, kind in enumerate(kinds) if kind == "text"), default=len(kinds) - 1)


def _shape(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the shape of each input except its first axis, along which batches are joined."""
    return tuple(
        (name, tuple(value.shape[1:]) if isinstance(value, Tensor) else None)
        for name, value in inputs.items()
    )


def _joined(items: Sequence[Batch]) -> Batch:
    """Return one batch of several batches of one item each, whose inputs have the same shape."""
    inputs: dict[str, Any] = {}
    for name, value in items[0].inputs.items():
        values = [item.inputs[name] for item in items]
        if isinstance(value, Tensor):
            inputs[name] = torch.cat(values)
        elif isinstance(value, list):
            inputs[name] = [each for of_item in values for each in of_item]
        else:
            raise InputError(
                "The processor must return tensors or lists with one entry per sample; it returned "
                f"{type(value).__name__} for {name!r}."
            )
    index, prompts, answers = (
        tuple(each for item in items for each in getattr(item, name))
        for name in ("index", "prompts", "answers")
    )
    return Batch(inputs, index, prompts, answers)
