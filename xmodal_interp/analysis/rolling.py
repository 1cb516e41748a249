"""The numbers of attention rollout: rows pushed down through layers. Formulas: ``rollout``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xmodal_interp.analysis.selecting import row_chunks
from xmodal_interp.attention import AttentionCall
from xmodal_interp.errors import InputError, NotRecordedError

Fusion = Literal["mean", "max", "min"]

Alpha = float | tuple[float, ...] | str
"""The share of attention in a layer: one number, one per layer, or ``"norm"``."""


def alpha_of(given: Any) -> Any:
    """An alpha of any spelling (numbers, a list, an array, a tensor) as ``Rule`` takes it."""
    plain = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(plain, Iterable) and not isinstance(plain, str):
        return tuple(alpha_of(each) for each in plain)
    return float(plain) if isinstance(plain, Real) else plain


@dataclass(frozen=True)
class Rule:
    """How the heads of a layer become one matrix, and how much of it is attention.

    Fields are the arguments of ``attention_rollout``.
    """

    fusion: str
    alpha: Alpha
    discard: float

    def __post_init__(self) -> None:
        if self.fusion not in get_args(Fusion):
            raise InputError(
                f"fusion is one of {', '.join(get_args(Fusion))}; got {self.fusion!r}."
            )
        alphas = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)
        if self.alpha != "norm" and not all(
            isinstance(alpha, (int, float)) and 0 <= alpha <= 1 for alpha in alphas
        ):
            raise InputError(
                f"alpha is the share of attention, 0 to 1, or 'norm'; got {self.alpha!r}."
            )
        if not 0 <= self.discard < 1:
            raise InputError(
                f"discard is the share of entries to drop, 0 to below 1; got {self.discard}."
            )

    def alphas(self, calls: Sequence[AttentionCall]) -> list[Float[Tensor, "#query"]]:
        """The share of attention in each layer, and in each row of it where rows differ."""
        if self.alpha == "norm":
            return [_norm_share(call) for call in calls]
        given = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,) * len(calls)
        if len(given) != len(calls):
            raise InputError(
                f"alpha is one number, or one per layer. There are {len(calls)} layers and "
                f"{len(given)} numbers."
            )
        return [torch.tensor([alpha], dtype=torch.float32) for alpha in given]


def _norm_share(call: AttentionCall) -> Float[Tensor, " query"]:
    if call.update_share is None:
        raise NotRecordedError(
            "alpha='norm' needs the share of attention in each token's update. "
            f"{call.name} was captured without; capture with Keep(norms=True)."
        )
    return call.update_share[0]


def rolled(
    start: Float[Tensor, "row key"],
    calls: Sequence[AttentionCall],
    rule: Rule,
    sinks: Bool[Tensor, " key"],
    counted: Bool[Tensor, " key"],
) -> Float[Tensor, "row key"]:
    """``start @ B_L ... B_1``, from the top layer down.

    Args:
        start: Rows of the highest layer.
        calls: The layers, bottom first.
        rule: How the heads of a layer become one matrix, and how much of it is attention.
        sinks: Keys whose attention is taken away.
        counted: Positions that are no padding: what is discarded is a share of the entries between
            these.
    """
    rows = start.to(calls[-1].device)
    for call, alpha in reversed(list(zip(calls, rule.alphas(calls), strict=True))):
        sinks, alpha = sinks.to(call.device), alpha.to(call.device)
        if rule.fusion == "mean" and rule.discard == 0:
            rows = _through_mean(rows.to(sinks.device), call, alpha, sinks)
        else:
            rows = _through_fused(rows.to(sinks.device), call, alpha, rule, sinks, counted)
    return rows.cpu()


def _through_mean(
    rows: Float[Tensor, "row key"],
    call: AttentionCall,
    alpha: Float[Tensor, "#query"],
    sinks: Bool[Tensor, " key"],
) -> Float[Tensor, "row key"]:
    """One layer with the mean over heads, whose matrix is never made.

    Its row sums come from ``mass``, its product from ``propagate``.
    """
    groups = torch.stack([torch.ones_like(sinks), ~sinks])
    total, kept = call.mass(groups)[0].mean(0).nan_to_num().T
    attended, residual = _shares(total, alpha)
    out, weights = rows * residual, rows * attended
    if not sinks.any():
        return out + call.propagate(weights)
    rescued = kept > 0
    scaled = weights * torch.where(rescued, total / kept, 0.0)
    out += call.propagate(scaled).masked_fill(sinks, 0.0)
    return out + call.propagate(weights.masked_fill(rescued, 0.0))


def _through_fused(
    rows: Float[Tensor, "row key"],
    call: AttentionCall,
    alpha: Float[Tensor, "#query"],
    rule: Rule,
    sinks: Bool[Tensor, " key"],
    counted: Bool[Tensor, " key"],
) -> Float[Tensor, "row key"]:
    """One layer with its fused matrix, in chunks of rows, or whole where entries are discarded."""
    out = torch.zeros_like(rows)
    for index, fused in _fused(call, rule, counted):
        total = fused.sum(-1)
        if sinks.any():
            others = fused.masked_fill(sinks, 0.0)
            kept = others.sum(-1)
            scaled = others * (total / kept)[:, None]
            fused = torch.where(kept[:, None] > 0, scaled, fused)
        attended, residual = _shares(total, alpha.expand(call.n_queries)[index])
        out += (rows[:, index] * attended) @ fused
        out[:, index] += rows[:, index] * residual
    return out


def _shares(
    total: Float[Tensor, " query"], alpha: Float[Tensor, "#query"]
) -> tuple[Float[Tensor, " query"], Float[Tensor, " query"]]:
    """Factors of ``F`` and ``I`` in each row of ``B``; where nothing is attended, all is ``I``."""
    attends = total > 0
    residual = torch.where(attends, 1 - alpha, 1.0)
    norm = alpha * total + residual
    return torch.where(attends, alpha / norm, 0.0), residual / norm


def _fused(
    call: AttentionCall, rule: Rule, counted: Bool[Tensor, " key"]
) -> Iterator[tuple[Int[Tensor, " query"], Float[Tensor, "query key"]]]:
    """The fused matrix chunk by chunk; rows that see nothing are 0."""
    every = torch.arange(call.n_queries, device=call.device)
    chunks = row_chunks(call, every, call.n_heads)
    if rule.discard == 0:
        for rows in chunks:
            yield rows, _over_heads(call, rows, rule.fusion)
        return
    whole = torch.cat([_over_heads(call, rows, rule.fusion) for rows in chunks])
    counted = counted.to(whole.device)
    ranked = whole.masked_fill(~(counted[:, None] & counted), torch.inf)
    n_discarded = int(rule.discard * int(counted.sum()) ** 2)
    lowest = ranked.flatten().argsort(stable=True)[:n_discarded]
    whole.view(-1)[lowest] = 0.0
    yield every, whole


def _over_heads(
    call: AttentionCall, rows: Int[Tensor, " query"], fusion: str
) -> Float[Tensor, "query key"]:
    probs = call.probs(queries=rows)[0].nan_to_num()
    if fusion == "mean":
        return probs.mean(0)
    return probs.amax(0) if fusion == "max" else probs.amin(0)
