"""Measure the errors of recomputed probabilities while the model runs.

* Output error: the probabilities applied to the values give ``O' = P V``, and the backend returned
  ``O``. The error is ``max |O' - O| / max |V|``.
* Eager error: the modeling code's eager function, called with the same operands in float32, returns
  probabilities ``P'``. The error is ``max |P' - P|``.

Each error has a limit: the error that the precision of the computation explains. The limit grows
with the size of the scores, because scores are rounded. If the matrix of probabilities is too
large, only some rows are compared.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from xmodal_interp.attention import AttentionCall
from xmodal_interp.attention.kernels import full_precision, product_eps
from xmodal_interp.hooks.attention_modules import Identity
from xmodal_interp.hooks.inline_attention import ObservedCall
from xmodal_interp.hooks.probability_check import Gap, comparable, moved_probs, rounding, weighted
from xmodal_interp.hooks.raw_calls import RawCall

LAYER_COLUMNS = (
    *("tower", "kind", "layer", "module"),
    *("calls", "output_error", "eager_error", "note"),
)
_BYTES = 64 * 2**20  # the largest size of recomputed float32 probabilities
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def tolerance(dtype: torch.dtype) -> float:
    """Return the largest error of a probability that a model's precision explains."""
    return _TOLERANCES.get(dtype, _TOLERANCES[torch.bfloat16])


class Exactness:
    """Compares every call with the output of its backend, with bounded memory."""

    def __init__(self) -> None:
        self.n_calls = 0
        self.calls: dict[str, int] = defaultdict(int)
        self.notes: dict[str, str] = {}
        self.gaps: dict[str, dict[str, list[Gap]]] = defaultdict(lambda: defaultdict(list))

    @property
    def output_gaps(self) -> list[Gap]:
        """Output errors with their limits, one per call whose output could be compared."""
        return [gap for of in self.gaps.values() for gap in of["output"]]

    @property
    def eager_gaps(self) -> list[Gap]:
        """Eager errors with their limits, one per call with an eager function."""
        return [gap for of in self.gaps.values() for gap in of["eager"]]

    @property
    def output_errors(self) -> list[float]:
        """Output errors, one per call whose output could be compared."""
        return [gap.error for gap in self.output_gaps]

    @property
    def eager_errors(self) -> list[float]:
        """Eager errors, one per call with an eager function."""
        return [gap.error for gap in self.eager_gaps]

    def inspect(self, observed: ObservedCall, call: AttentionCall) -> None:
        """Measure the errors of one call; called by the recorder for every call."""
        self.n_calls += 1
        self.calls[call.module] += 1
        self.notes[call.module] = call.note
        if not isinstance(observed, RawCall) or call.n_queries == 0 or call.n_keys == 0:
            return  # the recorded probabilities are the module's own, or the call is empty
        rows = _rows(call)
        gaps = self.gaps[call.module]
        eps = max(product_eps(t.dtype) for t in (observed.query, observed.output) if t is not None)
        with full_precision():
            probs = call.probs(queries=rows)
            has_key = call.visible(rows).any(-1).expand(probs.shape[:-1])
            if observed.output is not None and comparable(observed, call):
                gaps["output"].append(_output_gap(observed, call, rows, probs, has_key, eps))
            try:
                expected = _eager_probs(observed, call, rows)
            except (RuntimeError, TypeError) as error:  # raised by the modeling code
                self.notes[call.module] = f"eager attention fails: {error}"
                return
            if expected is not None:
                gaps["eager"].append(_eager_gap(call, rows, probs, expected.float(), has_key))

    def by_layer(self, modules: Sequence[Identity]) -> pd.DataFrame:
        """Return the largest errors of each layer; NaN if nothing could be compared."""
        records: list[dict[str, Any]] = []
        for each in modules:
            gaps = self.gaps.get(each.module, {})
            worst = {
                name: max((gap.error for gap in gaps.get(name, [])), default=float("nan"))
                for name in ("output", "eager")
            }
            records.append(
                {
                    "tower": each.tower,
                    "kind": each.kind,
                    "layer": each.layer,
                    "module": each.module,
                    "calls": self.calls.get(each.module, 0),
                    "output_error": worst["output"],
                    "eager_error": worst["eager"],
                    "note": self.notes.get(each.module, "did not run"),
                }
            )
        return pd.DataFrame(records, columns=list(LAYER_COLUMNS))


def _rows(call: AttentionCall) -> list[int]:
    """Return all rows, or as many as fit into memory, evenly spaced."""
    n_fit = max(1, _BYTES // (4 * call.n_samples * call.n_heads * call.n_keys))
    step = -(-call.n_queries // n_fit)
    return list(range(0, call.n_queries, step))


def _output_gap(
    raw: RawCall,
    call: AttentionCall,
    rows: list[int],
    probs: Tensor,
    has_key: Tensor,
    eps: float,
) -> Gap:
    """Return the output error of rows with a visible key; NaN if a probability there is NaN."""
    assert raw.output is not None
    values = raw.value.detach().float()
    largest = float(values.abs().max())
    theirs = raw.output[:, rows].float().transpose(1, 2)
    ours = weighted(probs, values)
    gaps = (ours - theirs).abs()[has_key] / largest
    limit = tolerance(torch.promote_types(raw.query.dtype, raw.output.dtype))
    limit = max(limit, 2 * eps)

    def explained() -> Tensor:
        row = torch.tensor(rows, device=call.device)
        return rounding(moved_probs(call, row, probs, eps), values, ours)[has_key] / largest

    return _judged(gaps, limit, explained)


def _eager_gap(
    call: AttentionCall, rows: list[int], probs: Tensor, expected: Tensor, has_key: Tensor
) -> Gap:
    """Return the eager error; both probabilities are computed in float32."""
    dtype = torch.float32
    gaps = (expected - probs).abs()[has_key]

    def explained() -> Tensor:
        row = torch.tensor(rows, device=call.device)
        return _rounding_of_probs(call, row, probs, torch.finfo(dtype).eps)[has_key]

    return _judged(gaps, tolerance(dtype), explained)


def _judged(gaps: Tensor, limit: float, explained: Callable[[], Tensor]) -> Gap:
    """Return, of the errors ``[row, value]``, the one with the largest ratio to its limit.

    If an error exceeds the limit, the limit of each row is increased by the error that rounding of
    its scores explains.
    """
    if not gaps.numel():
        return Gap(0.0, limit)
    error = float(gaps.max())
    if error <= limit:
        return Gap(error, limit)
    limits = limit + 4 * explained().amax(-1, keepdim=True)
    worst = int((gaps / limits).nan_to_num(math.inf).flatten().argmax())
    return Gap(float(gaps.flatten()[worst]), float(limits.expand_as(gaps).flatten()[worst]))


def _rounding_of_probs(call: AttentionCall, row: Tensor, probs: Tensor, eps: float) -> Tensor:
    """Return the standard deviation of probabilities due to rounded scores.

    :func:`rounding` does the same for the output ``P V``.
    """
    moved = moved_probs(call, row, probs, eps).square()
    others = moved.sum(-1, keepdim=True) - moved
    return ((1 - probs).square() * moved + probs.square() * others).clamp(min=0).sqrt()


def _eager_probs(raw: RawCall, call: AttentionCall, rows: list[int]) -> Tensor | None:
    """Return the probabilities of the modeling code's eager function on the same operands.

    The operands are cast to float32. For the backend "eager" the function is given the mask of the
    call; for another backend, a mask that hides the same keys as the backend. None without an eager
    function, or if not all rows are compared.
    """
    if raw.eager is None or len(rows) < call.n_queries:
        return None
    mask = raw.mask
    if raw.backend != "eager":
        visible = call.visible()
        mask = torch.zeros(visible.shape, dtype=torch.float32, device=visible.device)
        if raw.mask is not None and raw.mask.is_floating_point() and raw.mask.ndim == 4:
            mask = raw.mask.float()
        hidden = torch.full_like(mask[:1, :1, :1, :1], torch.finfo(torch.float32).min)
        mask = torch.where(visible | (mask < 0), mask, hidden)
    elif mask is not None and mask.is_floating_point():
        mask = mask.float()
    operands = (t.float() for t in (raw.query, raw.key, raw.value))
    _, probs = raw.eager(raw.module, *operands, mask, **{**raw.options, "dropout": 0.0})
    return probs
