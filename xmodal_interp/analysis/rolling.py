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
from xmodal_interp.arguments import one_of, real_number
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
        one_of(self.fusion, "fusion", get_args(Fusion))
        real_number(self.discard, "discard")
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
        return [torch.tensor([alpha], dtype=torch.float64) for alpha in given]


def _norm_share(call: AttentionCall) -> Float[Tensor, " query"]:
    if call.update_share is None:
        raise NotRecordedError(
            "alpha='norm' needs the share of attention in each token's update. "
            f"{call.name} was captured without; capture with Keep(norms=True)."
        )
    return call.update_share[0].double()


def rolled(
    start: Float[Tensor, "row key"],
    calls: Sequence[AttentionCall],
    rule: Rule,
    sinks: Bool[Tensor, " key"],
    counted: Bool[Tensor, " key"],
) -> Float[Tensor, "row key"]:
    """``start @ B_L ... B_1``, from the top layer down, in float64.

    With 80 layers and an alpha of 0.9 a share may be 1e-75, which is 0 in float32.

    Args:
        start: Rows of the highest layer.
        calls: The layers, bottom first.
        rule: How the heads of a layer become one matrix, and how much of it is attention.
        sinks: Keys whose attention is taken away.
        counted: Positions that are no padding: what is discarded is a share of the entries between
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
    """One layer with its fused matrix, in chunks of rows, or whole where entries are discarded.

    Of the matrix only the rows that something is on are computed.
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
    """Factors of ``F`` and ``I`` in each row of ``B``; where nothing is attended, all is ``I``."""
    attends = total > 0
    residual = torch.where(attends, 1 - alpha, 1.0)
    norm = alpha * total + residual
    return torch.where(attends, alpha / norm, 0.0), residual / norm


def _fused(
    call: AttentionCall, needed: Int[Tensor, " query"], rule: Rule, counted: Bool[Tensor, " key"]
) -> Iterator[tuple[Int[Tensor, " query"], Float[Tensor, "query key"]]]:
    """The fused matrix chunk by chunk; rows that see nothing are 0."""
    if rule.discard == 0:
        for rows in row_chunks(call, needed, 2 * call.n_heads):  # float64 takes twice the memory
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
