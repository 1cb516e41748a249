"""Head ablation: what a head contributes, replaced by nothing, by a uniform look, or by its mean.

=========  ====================================================================================
zero       The head's output, its slice of what the output projection is given, becomes 0. The
           same as zeroing its probabilities (Michel et al. 2019, arXiv:1905.10650, eq. 2 with
           xi_h = 0).
uniform    The head's probabilities become uniform over the *visible* keys: its output is the
           running mean of V. Done by setting its queries to zero, so that every visible key
           scores the same: the backend applies its own mask, cache and head groups, at no cost.
           Where zero scores are not all there is (sinks, position biases), the mean of V is
           computed.
mean       The head's output becomes its mean over a data set (:func:`mean_head_outputs`).
=========  ====================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from xmodal_interp.arguments import one_of
from xmodal_interp.attention.masks import additive_rows
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.hooks.calibration import HeadMeans
from xmodal_interp.hooks.heads import checked_heads
from xmodal_interp.hooks.interventions import Site
from xmodal_interp.hooks.selection import Chosen, Selection
from xmodal_interp.hooks.tapping import RawCall
from xmodal_interp.vocabulary import AttentionKind, Tower

AblationMode = Literal["zero", "uniform", "mean"]
ABLATION_MODES: tuple[AblationMode, ...] = ("zero", "uniform", "mean")


@dataclass(frozen=True, eq=False)
class HeadAblation:
    """See :func:`ablate_heads`."""

    heads: Mapping[Any, Iterable[Any]]
    mode: AblationMode
    tower: Tower
    kind: AttentionKind
    queries: Selection | None
    means: HeadMeans | None

    @property
    def selections(self) -> tuple[Selection, ...]:
        """The queries, if some were chosen."""
        return () if self.queries is None else (self.queries,)

    def heads_in(self, layers: Mapping[int, int | None]) -> Mapping[int, Sequence[int]]:
        """The heads asked for, if they exist."""
        found = checked_heads(self.heads, layers, f"{self.tower} {self.kind}-attention")
        if self.means is not None:
            missing = sorted(set(found) - set(self.means.means))
            if missing:
                raise InputError(
                    f"Means must cover the ablated layers. They were taken of layers "
                    f"{', '.join(map(str, sorted(self.means.means)))}; missing: "
                    f"{', '.join(map(str, missing))}."
                )
        return found

    def before(self, call: RawCall, site: Site) -> RawCall:
        """Uniform: zero the queries, so that all visible keys score alike."""
        if self.mode != "uniform" or not _only_scores(call, site):
            return call
        edited = self._edited(call, site)  # [sample, query, head, 1]
        if not edited.any():
            return call
        return replace(call, query=call.query.masked_fill(edited.transpose(1, 2), 0))

    def after(self, call: RawCall, output: Tensor, site: Site) -> Tensor:
        """Zero and mean: replace the output; uniform: only where the scores are not all."""
        if self.mode == "uniform" and _only_scores(call, site):
            return output
        edited = self._edited(call, site)
        if not edited.any():
            return output
        if self.mode == "zero":
            return output.masked_fill(edited, 0)
        if self.means is not None:
            other = self.means.means[site.identity.layer][None, None]
        else:
            other = _uniform_average(call, site).transpose(1, 2)
        return torch.where(edited, other.to(output), output)

    def _edited(self, call: RawCall, site: Site) -> Bool[Tensor, "sample query head 1"]:
        rows = site.query_mask(self.queries, call)
        return rows[:, :, None, None] & site.head_mask(call)[:, None]


def ablate_heads(
    heads: Mapping[Any, Iterable[Any]],
    mode: AblationMode = "zero",
    *,
    tower: Tower = "language",
    kind: AttentionKind = "self",
    queries: Chosen | None = None,
    means: HeadMeans | None = None,
) -> HeadAblation:
    """Take away what attention heads contribute; for ``intervene``.

    A recording shows the uniform probabilities of ``mode="uniform"``; the other modes leave
    probabilities as they are and replace the output.

    Args:
        heads: Query heads by layer, 0-based; negative ones count from the end; a boolean mask has
            an entry for each head.
        mode: ``"zero"``, ``"uniform"`` or ``"mean"``; see the module.
        tower: Part of the model.
        kind: Kind of attention.
        queries: The positions where the head is ablated, in the ways of
            :func:`knock_out_attention`; everywhere if not given.
        means: For ``mode="mean"``: what :func:`mean_head_outputs` returned.

    Raises:
        InputError: Heads not by layer, an unknown mode, means without their mode or of another
            tower, or the reverse.
        PositionError: A negative position.
    """
    one_of(mode, "mode", ABLATION_MODES)
    if (mode == "mean") != (means is not None):
        raise InputError(
            f"mode='mean' needs means=mean_head_outputs(vlm, items), and no other mode does; got "
            f"mode={mode!r} with {'no ' if means is None else ''}means."
        )
    if means is not None and (means.tower, means.kind) != (tower, kind):
        raise InputError(
            f"Means must be of the heads that are ablated: {tower} {kind}-attention; got means of "
            f"{means.tower} {means.kind}-attention."
        )
    by_layer = isinstance(heads, Mapping)
    if not by_layer or not all(_is_list(each) for each in heads.values()):
        raise InputError(f"heads are listed by layer, such as {{3: [0, 5]}}; got {quoted(heads)}.")
    selection = None if queries is None else Selection(queries)
    return HeadAblation(dict(heads), mode, tower, kind, selection, means)


def _is_list(given: Any) -> bool:
    return isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping))


def _only_scores(call: RawCall, site: Site) -> bool:
    """Whether zero scores make probabilities uniform: no sinks, no bias, a mask that only hides."""
    attention = site.attention(call)
    if attention.sinks is not None or attention.bias is not None:
        return False
    every = torch.arange(call.query.shape[2], device=call.query.device)
    return additive_rows(attention.mask, every) is None


def _uniform_average(call: RawCall, site: Site) -> Float[Tensor, "sample head query d_value"]:
    """Mean of V over the visible keys of each query; 0 where there are none."""
    visible = site.attention(call).visible().float()
    probs = visible / visible.sum(-1, keepdim=True).clamp(min=1)
    return probs @ call.values_by_head
