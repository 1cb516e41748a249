"""Head ablation: replace a head's output by zero, by uniform attention, or by its mean.

=========  ====================================================================================
zero       The head's output (its slice of the input of the output projection) becomes 0. This
           equals zeroing its probabilities (Michel et al. 2019, arXiv:1905.10650, eq. 2 with
           xi_h = 0).
uniform    The head's probabilities become uniform over the *visible* keys: its output is the
           running mean of V. The head's queries are set to zero, so every visible key gets the
           same score. The backend runs as usual, at no extra cost.
           In layers with sinks or position biases, zero queries do not make the scores equal;
           there the mean of V is computed.
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
from xmodal_interp.at import Selector
from xmodal_interp.attention.masks import additive_rows
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.hooks.attention_modules import checked_heads
from xmodal_interp.hooks.head_means import HeadMeans
from xmodal_interp.hooks.interventions import Site
from xmodal_interp.hooks.positions import Selection
from xmodal_interp.hooks.raw_calls import RawCall
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
        """The selected queries; empty if the heads are ablated at all positions."""
        return () if self.queries is None else (self.queries,)

    def heads_in(self, layers: Mapping[int, int | None]) -> Mapping[int, Sequence[int]]:
        """Return the heads to ablate by layer, after checking that they exist."""
        found = checked_heads(self.heads, layers, f"{self.tower} {self.kind}-attention")
        if self.means is not None:
            missing = sorted(set(found) - set(self.means.means))
            if missing:
                raise InputError(
                    f"The means hold layers {', '.join(map(str, sorted(self.means.means)))}; "
                    f"missing: {', '.join(map(str, missing))}. Ablate only layers that the means "
                    "hold."
                )
        return found

    def before(self, call: RawCall, site: Site) -> RawCall:
        """For mode "uniform": set the queries to zero, so that all visible keys get one score."""
        if self.mode != "uniform" or not _only_scores(call, site):
            return call
        edited = self._edited(call, site)  # [sample, query, head, 1]
        if not edited.any():
            return call
        return replace(call, query=call.query.masked_fill(edited.transpose(1, 2), 0))

    def after(self, call: RawCall, output: Tensor, site: Site) -> Tensor:
        """For modes "zero" and "mean": replace the output.

        For mode "uniform": replace it in layers with sinks or position biases.
        """
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
    queries: Selector | None = None,
    means: HeadMeans | None = None,
) -> HeadAblation:
    """Ablate attention heads; return an argument of ``intervene``.

    With ``mode="uniform"``, recorded probabilities are uniform too. The other modes replace the
    output and leave the probabilities unchanged.

    Args:
        heads: Query heads by layer, 0-based; negative ones count from the end; a boolean mask has
            an entry for each head.
        mode: ``"zero"``, ``"uniform"`` or ``"mean"``; see the module docstring.
        tower: Part of the model.
        kind: Kind of attention.
        queries: The positions where the heads are ablated, in any form that
            :func:`knock_out_attention` accepts; all positions if not given.
        means: For ``mode="mean"``: the result of :func:`mean_head_outputs`.

    Raises:
        InputError: ``heads`` does not list heads by layer; the mode is unknown; ``means`` is
            missing for mode "mean" or given for another mode; or the means are of another tower or
            kind.
        PositionError: A position is negative.
    """
    one_of(mode, "mode", ABLATION_MODES)
    if (mode == "mean") != (means is not None):
        raise InputError(
            f"Got mode={mode!r} with {'no ' if means is None else ''}means. Pass "
            "means=mean_head_outputs(vlm, items) for mode='mean', and only for that mode."
        )
    if means is not None and (means.tower, means.kind) != (tower, kind):
        raise InputError(
            f"The ablated heads are {tower} {kind}-attention, but the means are of {means.tower} "
            f"{means.kind}-attention. Pass the same tower= and kind= to mean_head_outputs."
        )
    by_layer = isinstance(heads, Mapping)
    if not by_layer or not all(_is_list(each) for each in heads.values()):
        raise InputError(
            f"heads must map layers to lists of heads, such as {{3: [0, 5]}}; got {quoted(heads)}."
        )
    selection = None if queries is None else Selection(queries)
    return HeadAblation(dict(heads), mode, tower, kind, selection, means)


def _is_list(given: Any) -> bool:
    return isinstance(given, Iterable) and not isinstance(given, (str, bytes, Mapping))


def _only_scores(call: RawCall, site: Site) -> bool:
    """Return whether zero queries give uniform probabilities.

    They do if the call has no sinks and no bias, and its mask only hides keys.
    """
    attention = site.attention(call)
    if attention.sinks is not None or attention.bias is not None:
        return False
    every = torch.arange(call.query.shape[2], device=call.query.device)
    return additive_rows(attention.mask, every) is None


def _uniform_average(call: RawCall, site: Site) -> Float[Tensor, "sample head query d_value"]:
    """Mean of V over the visible keys of each query; 0 for a query without visible keys."""
    visible = site.attention(call).visible().float()
    probs = visible / visible.sum(-1, keepdim=True).clamp(min=1)
    return probs @ call.values_by_head
