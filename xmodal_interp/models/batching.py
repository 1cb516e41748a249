"""Questions with known answers as model inputs, in batches without padding.

1. Each item is prepared once, alone, by :meth:`VLM.prepare`.
2. Its answer's tokens are put behind its prompt; the other inputs of those positions are those that
   generated tokens get (attended, text).
3. Items whose inputs have the same shape share a batch.

So an item gets the same inputs in any company: no padding, hence no mask, no shifted positions, and
the backend's fast path.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xmodal_interp.errors import InputError
from xmodal_interp.models.entries import PROMPT, Items, entry, listed, visuals_of
from xmodal_interp.models.labelling import Prompt
from xmodal_interp.models.sequences import with_answer
from xmodal_interp.models.tokens import separator_behind
from xmodal_interp.models.vlm import VLM, check_vlm


@dataclass(frozen=True, eq=False)
class Batch:
    """Items of one shape.

    Attributes:
        inputs: Arguments of the model; ``input_ids`` are ``[item, position]``; where a decoder
            has a prompt of its own, the answers are behind its ``decoder_input_ids``.
        index: Which items these are.
        prompts: The labelled positions of each prompt, answer not included.
        answers: Token ids of each answer; empty where only prompts were asked for.
    """

    inputs: dict[str, Any]
    index: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    answers: tuple[tuple[int, ...], ...]

    @property
    def n_ids(self) -> int:
        """Positions of the ``input_ids``.

        Raises:
            InputError: They are not the positions of the prompts: the model puts image features
                in front of the ids, or a decoder has positions behind those of an encoder.
        """
        n = int(self.inputs["input_ids"].shape[1])
        longest = max(len(prompt.columns["token"]) for prompt in self.prompts)
        if longest > n:
            raise InputError(
                "Choosing positions of a batch needs a position for each id. Here prompts have "
                f"{longest} positions for {n} ids: the model puts features in front of the ids, "
                "or reads the prompt with an encoder. Ablation by zero or by uniform attention "
                "asks for no positions."
            )
        return n


def batches_of(vlm: VLM, items: Items, *, batch_size: int, answers: bool = True) -> list[Batch]:
    """Prepare items for the model.

    Args:
        vlm: Model and processor.
        items: Dicts with ``image`` or ``video`` (or lists of them), ``prompt`` and ``answer``.
        batch_size: The largest number of items per batch.
        answers: Whether to put the answers behind the prompts (teacher forcing).

    Raises:
        InputError: No items, one that is no dict or has no image or video, prompt or answer, or an
            answer that does not tokenize behind its prompt.
    """
    check_vlm(vlm)
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1; got {batch_size}.")
    shapes: dict[Any, list[tuple[int, dict[str, Any], Prompt, tuple[int, ...]]]] = defaultdict(list)
    for index, item in enumerate(listed(items)):
        title = f"Item {index}"
        images, videos = visuals_of(item, title=title)
        question = entry(item, *PROMPT, title=title)
        answer = str(entry(item, "answer", title=title)) if answers else ""
        inputs, (prompt,) = vlm.prepare([images], [question], videos=[videos])
        ids = answer_ids(vlm, prompt.text, answer) if answers else ()
        if answers:
            inputs = with_answer(vlm.model, inputs, ids, _last_text(prompt))
        shapes[_shape(inputs)].append((index, inputs, prompt, ids))
    if not shapes:
        raise InputError("At least one item is needed; got none.")
    return [
        _joined(alike[start : start + batch_size])
        for alike in shapes.values()
        for start in range(0, len(alike), batch_size)
    ]


def answer_ids(vlm: VLM, text: str, answer: str) -> tuple[int, ...]:
    """Token ids of an answer as it would follow a rendered prompt, end-of-sequence not included.

    Raises:
        InputError: The answer is empty, or changes how the prompt before it is tokenized.
    """
    separator = separator_behind(text)
    before = vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = vlm.tokenizer(text + separator + answer, add_special_tokens=False)["input_ids"]
    kept = list(whole[: len(before)]) == list(before) and len(whole) > len(before)
    if not answer.strip() or not kept:
        raise InputError(
            "An answer must be text that tokenizes behind its prompt without changing it. Got the "
            f"answer {answer!r} behind {text!r}."
        )
    return tuple(whole[len(before) :])


def _last_text(prompt: Prompt) -> int:
    """The last text position of a prompt; its last position if it has no text."""
    kinds = prompt.columns["kind"]
    return max((i for i, kind in enumerate(kinds) if kind == "text"), default=len(kinds) - 1)


def _shape(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """All but the first axis: what must agree for tensors to be joined along it."""
    return tuple(
        (name, tuple(value.shape[1:]) if isinstance(value, Tensor) else None)
        for name, value in inputs.items()
    )


def _joined(
    parts: Sequence[tuple[int, dict[str, Any], Prompt, tuple[int, ...]]],
) -> Batch:
    index, inputs, prompts, ids = zip(*parts, strict=True)
    joined: dict[str, Any] = {}
    for name, value in inputs[0].items():
        values = [of[name] for of in inputs]
        if isinstance(value, Tensor):
            joined[name] = torch.cat(values)
        elif isinstance(value, list):
            joined[name] = [one for of in values for one in of]
        else:
            raise InputError(
                f"A processor must return tensors or lists, one entry per sample; it returned "
                f"{type(value).__name__} for {name!r}."
            )
    return Batch(joined, index, prompts, ids)
