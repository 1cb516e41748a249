"""Mean outputs of attention heads over a data set, for mean ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from xmodal_interp.at import Selector
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.hooks.interventions import Site, intervene
from xmodal_interp.hooks.positions import Selection, sample_of_prompt
from xmodal_interp.hooks.raw_calls import RawCall
from xmodal_interp.models import VLM
from xmodal_interp.models.known_answers import Batch, Items, batches_of
from xmodal_interp.vocabulary import VISUAL_KINDS, AttentionKind, Tower

PositionClass = Literal["all", "image", "text"]
POSITION_CLASSES: tuple[PositionClass, ...] = ("all", "image", "text")


@dataclass(frozen=True, eq=False)
class HeadMeans:
    """Mean outputs of heads.

    Attributes:
        tower: Part of the model.
        kind: Kind of attention.
        positions: The class of positions that were averaged, or their selector.
        n_samples: Number of samples.
        n_positions: Number of positions that were averaged.
        means: ``[head, d_value]`` for each layer, float32.
    """

    tower: Tower
    kind: AttentionKind
    positions: PositionClass | Selector
    n_samples: int
    n_positions: int
    means: Mapping[int, Float[Tensor, "head d_value"]]


def mean_head_outputs(
    vlm: VLM,
    items: Items,
    *,
    positions: PositionClass | Selector = "text",
    tower: Tower = "language",
    kind: AttentionKind = "self",
    batch_size: int = 32,
) -> HeadMeans:
    """Return the mean output of every head over prompts, for ``ablate_heads(mode="mean")``.

    Every position has the same weight, so long prompts contribute more than short ones.

    Args:
        vlm: Model and processor.
        items: Dicts with ``image`` and ``prompt``.
        positions: ``"image"``, ``"text"`` (every position except image, video and padding tokens)
            or ``"all"``; or another selector of :mod:`xmodal_interp.at`, resolved in each prompt.
            For other towers than the language tower, only ``"all"`` is allowed.
        tower: Part of the model.
        kind: Kind of attention.
        batch_size: The largest number of prompts per forward.

    Raises:
        InputError: There are no items, or the class of positions is unknown.
    """
    if tower != "language" and not (isinstance(positions, str) and positions == "all"):
        raise InputError(f"positions of the {tower} tower must be 'all'; got {quoted(positions)}.")
    batches = batches_of(vlm, items, batch_size=batch_size, answers=False)
    return means_over(vlm, batches, positions=positions, tower=tower, kind=kind)


def means_over(
    vlm: VLM,
    batches: Sequence[Batch],
    *,
    positions: PositionClass | Selector,
    tower: Tower,
    kind: AttentionKind = "self",
) -> HeadMeans:
    """Return the means over prepared batches; answers after the prompts are not averaged."""
    collector = _MeanCollector(tower, kind)
    with torch.no_grad(), intervene(vlm, collector):
        for batch in batches:
            collector.chosen = class_masks(batch, positions) if tower == "language" else None
            vlm.run(batch.inputs)
    if not min(collector.counts.values()):
        raise InputError(
            f"{len(batches)} batches of prompts hold no {positions} position to average. Pass "
            "items with such positions, or another positions=."
        )
    means = {n: total / collector.counts[n] for n, total in collector.totals.items()}
    n_samples = sum(len(batch.index) for batch in batches)
    return HeadMeans(tower, kind, positions, n_samples, max(collector.counts.values()), means)


def class_masks(
    batch: Batch, positions: PositionClass | Selector, *, answers: bool = False
) -> Bool[Tensor, "sample position"]:
    """Return which positions of a batch belong to a class, or are selected in each prompt.

    Args:
        batch: Prompts, with or without answers after them.
        positions: The class, or a selector.
        answers: Whether the positions of answers belong to the class "text".
    """
    named = isinstance(positions, str) and positions in POSITION_CLASSES
    filled = answers and named and positions != "image"
    masks = torch.full((len(batch.index), batch.n_ids), filled)
    for number, (mask, prompt) in enumerate(zip(masks, batch.prompts, strict=True)):
        if not named:
            mask[sample_of_prompt(prompt, number).positions(positions)] = True
            continue
        image = prompt.tokens["kind"].isin(VISUAL_KINDS).to_numpy(dtype=bool)
        padding = prompt.tokens["kind"].eq("padding").to_numpy(dtype=bool)
        of_class = {"image": image, "text": ~image & ~padding, "all": ~padding}[str(positions)]
        mask[: len(of_class)] = torch.tensor(of_class)
    return masks


class _MeanCollector:
    """An intervention that changes nothing and sums the outputs of every head."""

    selections: tuple[Selection, ...] = ()

    def __init__(self, tower: Tower, kind: AttentionKind) -> None:
        self.tower, self.kind = tower, kind
        self.totals: dict[int, Float[Tensor, "head d_value"]] = {}
        self.counts: dict[int, int] = {}
        self.chosen: Bool[Tensor, "sample position"] | None = None

    def heads_in(self, layers: Mapping[int, int | None]) -> Mapping[int, Sequence[int]]:
        return dict.fromkeys(layers, ())

    def before(self, call: RawCall, site: Site) -> RawCall:  # noqa: ARG002
        return call

    def after(self, call: RawCall, output: Tensor, site: Site) -> Tensor:  # noqa: ARG002
        layer = site.identity.layer
        seen = output.float().flatten(0, 1)
        if self.chosen is not None:
            seen = seen[self.chosen.flatten().to(output.device)]
        self.totals[layer] = self.totals.get(layer, 0) + seen.sum(0)
        self.counts[layer] = self.counts.get(layer, 0) + len(seen)
        return output
