"""Accuracy of generated answers to questions with known answers."""

from __future__ import annotations

import pandas as pd
import torch

from xmodal_interp.analysis.frames import stamped
from xmodal_interp.analysis.teacher_forcing import origin
from xmodal_interp.errors import InputError
from xmodal_interp.models import VLM, prompt_ids
from xmodal_interp.models.batching import batches_of
from xmodal_interp.models.entries import PROMPT, Items, entry, listed


def answer_accuracy(
    vlm: VLM, items: Items, *, batch_size: int = 32, max_new_tokens: int = 20
) -> pd.DataFrame:
    """Generate an answer to each question with greedy decoding and compare it with the known one.

    An answer is correct if it equals the known one, except for case and white space. The function
    can also be called inside a ``with xi.intervene(...)`` block.

    Args:
        vlm: Model and processor.
        items: Dicts with ``image``, ``prompt``, ``answer``, and optionally ``kind``.
        batch_size: The largest number of questions in a batch. Only prompts of equal length are
            batched together.
        max_new_tokens: The largest number of generated tokens.

    Returns:
        One row per item, in the order given: ``item, question_kind, prompt, answer, predicted,
        correct``. The mean of ``correct`` is the accuracy.

    Raises:
        InputError: There are no items, or an item lacks an image, a prompt or an answer.
    """
    items = listed(items)
    answers = [str(entry(item, "answer", title=f"Item {i}")) for i, item in enumerate(items)]
    blank = [index for index, answer in enumerate(answers) if not answer.strip()]
    if blank:
        raise InputError(
            f"Item {blank[0]} has the empty answer {answers[blank[0]]!r}. Give each item an answer "
            "with at least one character."
        )
    predicted = [""] * len(items)
    for batch in batches_of(vlm, items, batch_size=batch_size, answers=False):
        with torch.no_grad():
            output = vlm.generate(batch.inputs, max_new_tokens=max_new_tokens)
        new = output[:, prompt_ids(batch.inputs).shape[1] :]
        texts = vlm.tokenizer.batch_decode(new, skip_special_tokens=True)
        for index, text in zip(batch.index, texts, strict=True):
            predicted[index] = text.strip()
    table = pd.DataFrame(
        {
            "item": range(len(items)),
            "question_kind": pd.array([item.get("kind") for item in items], dtype="string"),
            "prompt": [entry(item, *PROMPT, title=f"Item {i}") for i, item in enumerate(items)],
            "answer": answers,
            "predicted": predicted,
            "correct": [same_answer(a, p) for a, p in zip(answers, predicted, strict=True)],
        }
    )
    return stamped(
        table,
        analysis="answer_accuracy",
        parameters={"max_new_tokens": max_new_tokens},
        provenance=[origin(vlm)],
        n_samples=len(items),
    )


def same_answer(known: str, given: str) -> bool:
    """Whether two answers are equal, except for case and white space."""
    return _plain(known) == _plain(given)


def _plain(answer: str) -> str:
    return " ".join(answer.casefold().split())
