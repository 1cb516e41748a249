"""Computation of attention rollout; :mod:`xmodal_interp.analysis.rollout` has the formulas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xmodal_interp.analysis.selecting import row_chunks
from xmodal_interp.arguments import one_of, real_number
from xmodal_interp.attention import AttentionCall
from xmodal_interp.errors import InputError, NotRecordedError

Fusion = Literal["mean", "max", "min"]

Alpha = float | tuple[float, ...] | str
"""The weight of attention in a layer: one number, one per layer, or ``"norm"``."""


def alpha_of(given: Any) -> Any:
    """Convert alpha (a number, list, array, tensor or string) to the types of ``Rule``."""
    plain = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(plain, Iterable) and not isinstance(plain, str):
        return tuple(alpha_of(each) for each in plain)
    return float(plain) if isinstance(plain, Real) else plain


@dataclass(frozen=True)
class Rule:
    """How heads are fused, how attention is weighted, and what is discarded.

    The fields are the arguments of ``attention_rollout``.
    """

    fusion: str
    alpha: Alpha
    discard: float

    def __post_init__(self) -> None:
        one_of(self.fusion, "fusion", get_args(Fusion))
        real_number(self.discard, "discard")
        alphas = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)
        if self.alpha != "norm" and not all(
            isinstance(alpha, (int, float)) and 0 <= alpha <= 1 for alpha in alphas
        ):
            raise InputError(f"alpha must be between 0 and 1, or 'norm'; got {self.alpha!r}.")
        if not 0 <= self.discard < 1:
            raise InputError(f"discard must be at least 0 and below 1; got {self.discard}.")

    def alphas(self, calls: Sequence[AttentionCall]) -> list[Float[Tensor, "#query"]]:
        """Return the weight of attention per layer, and per row with ``"norm"``."""
        if self.alpha == "norm":
            return [_norm_share(call) for call in calls]
        given = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,) * len(calls)
        if len(given) != len(calls):
            raise InputError(
                f"alpha has {len(given)} numbers for {len(calls)} layers. Pass one number, or one "
                "per layer."
            )
        return [torch.tensor([alpha], dtype=torch.float64) for alpha in given]


def _norm_share(call: AttentionCall) -> Float[Tensor, " query"]:
    if call.update_share is None:
        raise NotRecordedError(
            f"{call.name} was captured without the norms that alpha='norm' requires. Capture with "
            "Keep(norms=True)."
        )
    return call.update_share[0].double()


def rolled(
    start: Float[Tensor, "row key"],
    calls: Sequence[AttentionCall],
    rule: Rule,
    sinks: Bool[Tensor, " key"],
    counted: Bool[Tensor, " key"],
) -> Float[Tensor, "row key"]:
    """Return ``start @ B_L ... B_1``, computed from the last layer to the first in float64.

    With 80 layers and an alpha of 0.9 a share can be 1e-75, which is 0 in float32.

    Args:
        start: Rows to multiply with the last layer.
        calls: The layers, first to last.
        rule: Options of the rollout.
        sinks: Keys whose attention is removed.
        counted: Positions that are not padding; ``discard`` is a share of the entries between
            these.
    """
    rows = start.double()
    for call, alpha in reversed(list(zip(calls, rule.alphas(calls), strict=True))):
        wide = call.in_float64()
        on_device = [t.to(wide.device) for t in (rows, alpha, sinks, counted)]
        rows = _through(on_device[0], wide, on_device[1], rule, on_device[2], on_device[3])
    return rows.cpu()


def _through(
    rows: Float[Tensor, "row key"],
    call: AttentionCall,
    alpha: Float[Tensor, "#query"],
    rule: Rule,
    sinks: Bool[Tensor, " key"],
    counted: Bool[Tensor, " key"],
) -> Float[Tensor, "row key"]:
    """Multiply rows with ``B`` of one layer, in chunks of the fused matrix.

    Only the rows of the fused matrix that get a nonzero factor are computed. With ``discard`` the
    fused matrix is computed whole.
    """
    out = torch.zeros_like(rows)
    needed = rows.ne(0).any(0).nonzero()[:, 0]
    for index, fused in _fused(call, needed, rule, counted):
        total = fused.sum(-1)
        if sinks.any():
            others = fused.masked_fill(sinks, 0.0)
            kept = others.sum(-1)
            scaled = others * (total / kept)[:, None]
            fused = torch.where(kept[:, None] > 0, scaled, fused)
        attended, residual = _shares(total, alpha.expand(call.n_queries)[index])
        here = rows[:, index]
        out[:, index] += here * residual
        out += (here * attended) @ fused
    return out


def _shares(
    total: Float[Tensor, " query"], alpha: Float[Tensor, "#query"]
) -> tuple[Float[Tensor, " query"], Float[Tensor, " query"]]:
    """Return the factors of ``F`` and ``I`` in each row of ``B``; 0 and 1 if ``F`` is 0."""
    attends = total > 0
    residual = torch.where(attends, 1 - alpha, 1.0)
    norm = alpha * total + residual
    return torch.where(attends, alpha / norm, 0.0), residual / norm


def _fused(
    call: AttentionCall, needed: Int[Tensor, " query"], rule: Rule, counted: Bool[Tensor, " key"]
) -> Iterator[tuple[Int[Tensor, " query"], Float[Tensor, "query key"]]]:
    """Yield the fused matrix chunk by chunk; rows that see no key are 0."""
    if rule.discard == 0:
        for rows in row_chunks(call, needed, 2 * call.n_heads):  # twice the memory for float64
            yield rows, _over_heads(call, rows, rule.fusion)
        return
    every = torch.arange(call.n_queries, device=call.device)
    chunks = row_chunks(call, every, 2 * call.n_heads)
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
    probs = call.probs(queries=rows, dtype=torch.float64)[0].nan_to_num()
    if fusion == "mean":
        return probs.mean(0)
    return probs.amax(0) if fusion == "max" else probs.amin(0)
