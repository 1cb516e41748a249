"""How well a model answers while heads are removed: three scores per question, teacher-forced.

The known answer stands behind the prompt; position p predicts token p + 1. For an answer a_1..a_n
with log-probabilities l_t = log p(a_t | image, prompt, a_<t):

==========  =======================================================================
accuracy    1 if every a_t is the most probable token at its place, else 0
log_prob    (1/n) sum_t l_t, in nats per token
margin      logit of a_1 minus the largest other logit there
==========  =======================================================================

Accuracy alone has little resolution: a model may keep answering right while its confidence falls.

This is the probability of the answer in generation only if no position depends on later ones;
``check_causal`` compares once.

A batch is run once as it is, then once per removal. Whatever ran before the first edited layer is
replayed from memory (:mod:`xmodal_interp.hooks.replaying`), after a check for each first layer, on
the first batch, that this gives the scores of the whole forward; where it does not, or raises,
whole forwards are run.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from xmodal_interp.capturing import Keep, provenance
from xmodal_interp.errors import UnsupportedModelError
from xmodal_interp.hooks.ablation import AblationMode, ablate_heads
from xmodal_interp.hooks.calibration import HeadMeans, PositionClass, class_masks, means_over
from xmodal_interp.hooks.interventions import intervene
from xmodal_interp.hooks.replaying import remember_blocks, replay
from xmodal_interp.models import VLM, prompt_ids
from xmodal_interp.models.batching import Batch
from xmodal_interp.models.decoding import refuse_canvas
from xmodal_interp.models.sequences import without_last
from xmodal_interp.vocabulary import Tower

METRICS: tuple[str, ...] = ("accuracy", "log_prob", "margin")

Removal = Mapping[int, Sequence[int]]
"""Heads by layer; empty for the model as it is."""


@dataclass(frozen=True, eq=False)
class Ablation:
    """What removing a head means, for one model and data set."""

    mode: AblationMode
    tower: Tower
    means: tuple[HeadMeans, ...] = ()

    def interventions(self, removal: Removal, batch: Batch) -> list[Any]:
        """Means are taken, and put back, by class of position; the other modes have one class."""
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


def ablation_of(vlm: VLM, batches: Sequence[Batch], mode: AblationMode, tower: Tower) -> Ablation:
    """The ablation with its means, which are taken on the prompts of the batches."""
    if mode != "mean":
        return Ablation(mode, tower)
    by_class = tower == "language" and vlm.family.in_sequence
    classes: tuple[PositionClass, ...] = ("image", "text") if by_class else ("all",)
    means = [means_over(vlm, batches, positions=one, tower=tower) for one in classes]
    return Ablation(mode, tower, tuple(means))


def removal_scores(
    vlm: VLM,
    batches: Sequence[Batch],
    removals: Sequence[Removal],
    ablation: Ablation,
    *,
    progress: bool,
) -> Float[np.ndarray, "removal metric item"]:
    """The three scores of every item under every removal, in the order of ``METRICS``.

    Args:
        vlm: Model and processor.
        batches: Prompts with answers behind them.
        removals: Heads by layer, both counted from 0; an empty one gives the model as it is.
        ablation: What removing means.
        progress: Whether to show a bar.
    """
    scores = np.empty((len(removals), len(METRICS), sum(len(batch.index) for batch in batches)))
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


@torch.no_grad()
def answer_scores(vlm: VLM, batch: Batch) -> Float[np.ndarray, "metric item"]:
    """The three scores of each item of a batch, by one forward."""
    longest = max(len(ids) for ids in batch.answers)
    logits = _last_logits(vlm, batch.inputs, longest + 1)
    gold = prompt_ids(batch.inputs)[:, -longest:]
    lengths = torch.tensor([len(ids) for ids in batch.answers], device=gold.device)
    return _scores(logits[:, -longest - 1 : -1].float(), gold, lengths).cpu().double().numpy()


@torch.no_grad()
def check_causal(vlm: VLM, batch: Batch) -> None:
    """Refuse a model whose positions depend on later ones.

    Two forwards, with and without the last token of the batch: the logits of that token's
    prediction must be the same in both, to 1e-4 of the largest in float32 and to 8 units in the
    last place in lower precision.

    Raises:
        UnsupportedModelError: They are not.
    """
    refuse_canvas(vlm.model)
    whole = _last_logits(vlm, batch.inputs, 2)[:, -2]
    cut = _last_logits(vlm, without_last(batch.inputs), 1)[:, -1]
    change = float((whole - cut).abs().max())
    limit = max(1e-4, 8 * torch.finfo(whole.dtype).eps) * float(cut.abs().max())
    if not change <= limit:
        raise UnsupportedModelError(
            "The score of a known answer is defined where no position depends on later ones. In "
            f"this {type(vlm.model).__name__} the logits that predict the last answer token change "
            f"by {change:.2g} when that token is appended; use xi.answer_accuracy, which generates "
            "the answers."
        )


def _last_logits(
    vlm: VLM, inputs: Mapping[str, Any], n: int
) -> Float[Tensor, "item position vocabulary"]:
    """The logits of one forward, of the last ``n`` positions if the model can leave out others."""
    takes = inspect.signature(vlm.model.forward).parameters
    options = {"logits_to_keep": n} if "logits_to_keep" in takes else {}
    logits: Tensor = vlm.run(dict(inputs), **options).logits
    return logits


def _scores(
    logits: Float[Tensor, "item answer vocabulary"],
    gold: Int[Tensor, "item answer"],
    lengths: Int[Tensor, " item"],
) -> Float[Tensor, "metric item"]:
    """Answers stand at the right end of their rows; ``lengths`` says how many tokens each has."""
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
    """Whether a forward with the outputs of earlier blocks gives what the whole one gave.

    It does not where a block acts by more than what it returns: the layers of Gemma 3n that share
    keys and values write them into a dictionary of the forward.

    Args:
        vlm: Model and processor.
        batch: Prompts with answers behind them.
        earlier: What the blocks before a layer returned.
        base: The scores of the whole forward.
    """
    if not earlier:
        return False
    try:
        with replay(dict(earlier)):
            again = answer_scores(vlm, batch)
    except Exception:  # noqa: BLE001 - any error of the model's code: without replay it does not occur
        return False
    return np.allclose(again, base, rtol=1e-4, atol=1e-5)


def origin(vlm: VLM) -> dict[str, Any]:
    """Which model under which versions gave the numbers; JSON-ready."""
    about = provenance(vlm, {}, 0, Keep())
    of_captures = ("layers", "max_new_tokens", "kept", "created")
    return {name: value for name, value in about.items() if name not in of_captures}
