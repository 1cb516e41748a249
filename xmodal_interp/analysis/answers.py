"""Score answers to questions with known answers: generated answers, and teacher-forced ones.

``answer_accuracy`` generates an answer to each question and compares it with the known one.

The other functions append the known answer to the prompt (teacher forcing); position p predicts
token p + 1. For an answer a_1..a_n with log-probabilities
l_t = log p(a_t | image, prompt, a_<t) there are three scores:

==========  =======================================================================
accuracy    1 if every a_t is the most probable token at its position, else 0
log_prob    (1/n) sum_t l_t, in nats per token
margin      logit of a_1 minus the largest other logit at that position
==========  =======================================================================

Accuracy alone has little resolution: answers can stay correct while their probability falls.

These scores equal those of generating the answer only if no position depends on later ones, which
``check_causal`` verifies once.

``removal_scores`` runs each batch once unchanged, then once per removal of heads. The outputs of
blocks before the first edited layer are replayed from memory
(:mod:`xmodal_interp.hooks.block_cache`). For each first edited layer, the first batch verifies that
the replay gives the scores of the whole forward. If the scores differ or the replay raises, whole
forwards are run instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from xmodal_interp.analysis.tables import stamped
from xmodal_interp.capturing.run import Keep, provenance
from xmodal_interp.errors import InputError, UnsupportedModelError
from xmodal_interp.hooks.ablation import AblationMode, ablate_heads
from xmodal_interp.hooks.block_cache import remember_blocks, replay
from xmodal_interp.hooks.head_means import HeadMeans, PositionClass, class_masks, means_over
from xmodal_interp.hooks.interventions import intervene
from xmodal_interp.models import VLM, prompt_ids
from xmodal_interp.models.generation import refuse_canvas
from xmodal_interp.models.known_answers import (
    Batch,
    ItemDict,
    Items,
    answer_of,
    asked_by,
    batches_of,
    listed,
)
from xmodal_interp.models.model_inputs import without_last
from xmodal_interp.text_search import same_answer
from xmodal_interp.vocabulary import Tower

METRICS: tuple[str, ...] = ("accuracy", "log_prob", "margin")

Removal = Mapping[int, Sequence[int]]
"""Heads to remove by layer; empty for the intact model."""


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
    marks = vlm.placeholders
    answers = [
        answer_of(item, title=f"Item {i}", placeholders=marks) for i, item in enumerate(items)
    ]
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
            "prompt": [
                asked_by(item, title=f"Item {i}", placeholders=marks).question
                for i, item in enumerate(items)
            ],
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


def removal_scores(
    vlm: VLM,
    items: Sequence[ItemDict],
    removals: Sequence[Removal],
    *,
    mode: AblationMode,
    tower: Tower,
    batch_size: int,
    progress: bool,
) -> Float[np.ndarray, "removal metric item"]:
    """Return the three scores of every item under every removal, in the order of ``METRICS``.

    Args:
        vlm: Model and processor.
        items: Questions with known answers.
        removals: Heads by layer, both counted from 0; an empty mapping is the intact model.
        mode: How heads are removed; see ``ablate_heads``. Means are taken over the items' prompts.
        tower: Part of the model.
        batch_size: The largest number of questions per forward.
        progress: Whether to show a progress bar.
    """
    batches = batches_of(vlm, items, batch_size=batch_size)
    ablation = _ablation(vlm, batches, mode, tower)
    scores = np.empty((len(removals), len(METRICS), len(items)))
    check_causal(vlm, batches[0])
    reusable: dict[int, bool] = {}
    n_forwards = len(batches) * len(removals)
    with tqdm(total=n_forwards, unit="forward", disable=not progress, leave=False) as bar:
        for batch in batches:
            with remember_blocks(vlm.model) as memory:
                base = answer_scores(vlm, batch)
            for place, removal in enumerate(removals):
                edits = ablation.interventions(removal, batch)
                earlier: dict[nn.Module, Any] = {}
                if removal:
                    first = min(removal)
                    earlier = memory.before(ablation.tower, "self", first)
                    if first not in reusable:
                        reusable[first] = replays(vlm, batch, earlier, base)
                    earlier = earlier if reusable[first] else {}
                with replay(earlier), intervene(vlm, *edits):
                    scores[place][:, batch.index] = answer_scores(vlm, batch) if edits else base
                bar.update()
    return scores


@dataclass(frozen=True, eq=False)
class _Ablation:
    """How heads are removed, for one model and data set."""

    mode: AblationMode
    tower: Tower
    means: tuple[HeadMeans, ...] = ()

    def interventions(self, removal: Removal, batch: Batch) -> list[Any]:
        """Return the interventions that remove heads in one batch.

        Mean ablation of the language tower has one intervention per class of positions (image and
        text); the other modes have one intervention.
        """
        if not removal:
            return []
        if not self.means:
            return [ablate_heads(removal, self.mode, tower=self.tower)]
        if self.tower != "language":
            return [ablate_heads(removal, "mean", tower=self.tower, means=self.means[0])]
        return [
            ablate_heads(
                removal,
                "mean",
                queries=class_masks(batch, means.positions, answers=True),
                means=means,
            )
            for means in self.means
        ]


def _ablation(vlm: VLM, batches: Sequence[Batch], mode: AblationMode, tower: Tower) -> _Ablation:
    """Return the ablation; with mode ``"mean"``, means are computed over the batches' prompts."""
    if mode != "mean":
        return _Ablation(mode, tower)
    by_class = tower == "language" and vlm.family.in_sequence
    classes: tuple[PositionClass, ...] = ("image", "text") if by_class else ("all",)
    means = [means_over(vlm, batches, positions=one, tower=tower) for one in classes]
    return _Ablation(mode, tower, tuple(means))


@torch.no_grad()
def answer_scores(vlm: VLM, batch: Batch) -> Float[np.ndarray, "metric item"]:
    """Return the three scores of each item of a batch, computed in one forward."""
    longest = max(len(ids) for ids in batch.answers)
    logits = _last_logits(vlm, batch.inputs, longest + 1)
    gold = prompt_ids(batch.inputs)[:, -longest:]
    lengths = torch.tensor([len(ids) for ids in batch.answers], device=gold.device)
    return _scores(logits[:, -longest - 1 : -1].float(), gold, lengths).cpu().double().numpy()


@torch.no_grad()
def check_causal(vlm: VLM, batch: Batch) -> None:
    """Reject a model whose positions depend on later ones.

    Compare two forwards, with and without the last token of the batch. The logits that predict that
    token must agree to 1e-4 of the largest logit in float32, and to 8 units in the last place in
    lower precision.

    Raises:
        UnsupportedModelError: The logits differ.
    """
    refuse_canvas(vlm.model)
    whole = _last_logits(vlm, batch.inputs, 2)[:, -2]
    cut = _last_logits(vlm, without_last(batch.inputs), 1)[:, -1]
    change = float((whole - cut).abs().max())
    limit = max(1e-4, 8 * torch.finfo(whole.dtype).eps) * float(cut.abs().max())
    if not change <= limit:
        raise UnsupportedModelError(
            f"Positions of this {type(vlm.model).__name__} depend on later ones: the logits that "
            f"predict the last answer token change by {change:.2g} when that token is appended, so "
            "known answers cannot be scored. Use xi.answer_accuracy, which generates the answers."
        )


def _last_logits(
    vlm: VLM, inputs: Mapping[str, Any], n: int
) -> Float[Tensor, "item position vocabulary"]:
    """Return the logits of one forward, limited to the last ``n`` positions if supported."""
    takes = inspect.signature(vlm.model.forward).parameters
    options = {"logits_to_keep": n} if "logits_to_keep" in takes else {}
    logits: Tensor = vlm.run(dict(inputs), **options).logits
    return logits


def _scores(
    logits: Float[Tensor, "item answer vocabulary"],
    gold: Int[Tensor, "item answer"],
    lengths: Int[Tensor, " item"],
) -> Float[Tensor, "metric item"]:
    """Return the scores; answers are right-aligned in their rows and have ``lengths`` tokens."""
    longest = gold.shape[1]
    counted = torch.arange(longest, device=gold.device) >= longest - lengths[:, None]
    right = (logits.argmax(-1) == gold) | ~counted
    chosen = logits.log_softmax(-1).gather(-1, gold[..., None])[..., 0]
    log_prob = chosen.masked_fill(~counted, 0).sum(1) / lengths
    item = torch.arange(len(gold), device=gold.device)
    first, word = logits[item, longest - lengths], gold[item, longest - lengths][:, None]
    best_other = first.scatter(1, word, -torch.inf).amax(1)
    return torch.stack([right.all(1).float(), log_prob, first.gather(1, word)[:, 0] - best_other])


def replays(
    vlm: VLM,
    batch: Batch,
    earlier: Mapping[nn.Module, Any],
    base: Float[np.ndarray, "metric item"],
) -> bool:
    """Return whether a forward with replayed outputs of earlier blocks gives the same scores.

    It does not if a block has side effects: the layers of Gemma 3n that share keys and values, for
    example, write them into a dictionary of the forward.

    Args:
        vlm: Model and processor.
        batch: Prompts followed by answers.
        earlier: Outputs of the blocks before a layer.
        base: The scores of the whole forward.
    """
    if not earlier:
        return False
    try:
        with replay(dict(earlier)):
            again = answer_scores(vlm, batch)
    except Exception:  # noqa: BLE001 - the model's code may raise anything during a replay
        return False
    return np.allclose(again, base, rtol=1e-4, atol=1e-5)


def origin(vlm: VLM) -> dict[str, Any]:
    """Return the provenance of the scores (model and versions), as JSON types."""
    about = provenance(vlm, {}, 0, Keep())
    of_captures = ("layers", "max_new_tokens", "kept", "created")
    return {name: value for name, value in about.items() if name not in of_captures}
