"""Check that recorded probabilities are those that the model computed with.

1. A recording holds the arguments of an attention function. Their meaning is defined only for the
   functions of torch and transformers: whether a boolean mask hides keys or is added to the scores,
   and which keys a causal flag hides.
2. The probabilities ``P`` of a few rows are therefore applied to the values, and ``P V`` is
   compared with the function's output ``O``: ``|P V - O| <= limit * P |V|``, element by element.
3. If they differ and the function is not one of torch or transformers, every other interpretation
   ("reading") of the arguments is tried. A reading that gives the output, in these rows and in
   more, replaces the first one.
4. If no reading gives the output, an error is raised: the probabilities are not the model's.

The limit is the error that the model's precision explains. Large scores are rounded more, so they
allow larger errors. This part of the limit is computed from the products that are summed to a
score.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from xmodal_interp.attention import AttentionCall
from xmodal_interp.attention.kernels import full_precision, product_eps
from xmodal_interp.attention.masks import visible_rows
from xmodal_interp.errors import CaptureError, first_of
from xmodal_interp.hooks.raw_calls import RawCall, other_readings

_N_ROWS = 4  # rows that are compared, if the meaning of the arguments is defined
_N_ROWS_UNKNOWN, _N_ROWS_OTHER = 16, 64  # if it is not, and to confirm another reading
_N_FIRST, _EVERY = 3, 8  # check the first 3 calls of a layer, and every 8th decode step after them
_LEAST = 1e-5  # the smallest limit, relative to P|V|, in float32
_GOLDEN = 0.6180339887498949  # multiples of the golden ratio, modulo 1, are spread evenly
_LARGEST_CHANGE = 30.0  # changes of scores are clamped, so their squared exponential fits float32


@dataclass(frozen=True)
class Gap:
    """The largest difference between ``P V`` and the output, relative to ``P |V|``.

    Attributes:
        error: The difference; NaN if one of the two is NaN and the other is not.
        limit: The largest difference that the precision of the model explains.
    """

    error: float
    limit: float

    @property
    def agrees(self) -> bool:
        """Whether the error is within the limit, so that the probabilities are the model's."""
        return self.error <= self.limit


class ProbabilityCheck:
    """Compares calls with the outputs of their functions.

    Attributes:
        differing: For each module with a call that differs: the name of that call and its gap; of
            several calls, the one with the largest gap.
        reading_of: For each group of similar calls: the index of the reading that agreed.
    """

    def __init__(self) -> None:
        self.differing: dict[str, tuple[str, Gap]] = {}
        self.reading_of: dict[Any, int] = {}

    def checked(self, raw: RawCall, call: AttentionCall) -> AttentionCall:
        """Return the call in the reading that gives the output.

        The call is returned unchanged if it cannot be compared, or if no reading gives the output;
        in the second case it is noted in ``differing``.

        Args:
            raw: The arguments, and the output that the function returned.
            call: The call in the most likely reading.
        """
        group = _group(raw, call) if self.reading_of else None
        if not comparable(raw, call) or self._is_skipped(call, group):
            return call
        found = _rows(call, raw)
        if group in self.reading_of:
            other = next(itertools.islice(other_readings(raw, call), self.reading_of[group], None))
            if gap(raw, other, found).agrees:
                return other
        first = gap(raw, call, found)
        if first.agrees:
            return call
        if not _has_defined_meaning(raw):
            more = _spread(call.n_queries, _N_ROWS_OTHER)
            for number, other in enumerate(other_readings(raw, call)):
                if gap(raw, other, found).agrees and gap(raw, other, more).agrees:
                    self.reading_of[_group(raw, call)] = number
                    return other
        before = self.differing.get(call.module)
        if before is None or not before[1].error >= first.error:
            self.differing[call.module] = (call.name, first)
        return call

    def _is_skipped(self, call: AttentionCall, group: Any) -> bool:
        """Return whether the comparison of a decode step is skipped to save time.

        The first steps of each layer are compared, then every eighth one, at different steps in
        different layers. All steps are compared if the most likely reading was wrong.
        """
        step = call.call
        later = call.n_queries == 1 and step >= _N_FIRST and group not in self.reading_of
        return later and call.module not in self.differing and (step + call.layer) % _EVERY != 0

    def refuse(self) -> None:
        """Raise CaptureError if the probabilities of some module are not those of the model."""
        if not self.differing:
            return
        parts = [
            f"{name} differs by {each.error:.2g} (rounding explains {each.limit:.1g})"
            for name, each in self.differing.values()
        ]
        raise CaptureError(
            "Probabilities computed from the arguments of the attention function do not give its "
            f"output: {first_of(parts, 3)}. Load the model with another attn_implementation "
            "('eager' if it is 'sdpa'), or leave these layers out with towers= or layers=."
        )


def gap(raw: RawCall, call: AttentionCall, rows: Sequence[int]) -> Gap:
    """Compare the call's probabilities, applied to the values, with the output in some rows."""
    assert raw.output is not None
    row = torch.tensor(list(rows), device=call.device)
    if _is_plain(raw, call):
        error = _plain_error(raw, call, row)
        if error <= _LEAST:  # the limit is at least this large
            return Gap(error, _LEAST)
    float32_eps = torch.finfo(torch.float32).eps  # probabilities are recomputed in float32
    eps = max(product_eps(raw.query.dtype), product_eps(raw.output.dtype), float32_eps)
    limit = max(_LEAST, 2 * eps)
    with torch.no_grad(), full_precision():
        values = raw.value.detach().float()
        probs = call.probs(queries=row)
        has_key = call.visible(row).any(-1)[..., None]
        ours = weighted(probs, values)
        scale = weighted(probs, values.abs())
        scale = scale + 1e-6 * scale.nan_to_num().amax().clamp(min=1e-30)
        difference = (ours - raw.output[:, row].transpose(1, 2).float()).abs()
        error = float(torch.where(has_key, difference / scale, 0.0).amax())
        if error <= limit:
            return Gap(error, limit)
        if not all(bool(t.isfinite().all()) for t in (raw.query, raw.key, raw.value)):
            return Gap(0.0, limit)  # the model's own operands are NaN or infinite
        moved = moved_probs(call, row, probs, eps)
        noise = 4 * rounding(moved, values, ours).amax(-1, keepdim=True)
        limits = limit + noise / scale
        excess = torch.where(has_key, difference / scale / limits, 0.0).flatten()
        worst = int(excess.nan_to_num(math.inf).argmax())
        error = float((difference / scale).flatten()[worst])
        return Gap(error, float(limits.expand(difference.shape).flatten()[worst]))


def _is_plain(raw: RawCall, call: AttentionCall) -> bool:
    """Whether a call is in float32, and only a causal flag or a boolean mask hides its keys."""
    terms = (call.bias, call.softcap, call.sinks, call.segments, call.sliding_window)
    only_hides = call.mask is None or call.mask.dtype == torch.bool
    tensors = (call.q, call.k, raw.value, raw.output)
    in_float32 = all(t is not None and t.dtype == torch.float32 for t in tensors)
    return only_hides and in_float32 and all(term is None for term in terms)


def _plain_error(raw: RawCall, call: AttentionCall, row: Int[Tensor, " query"]) -> float:
    """Return the error of some rows of a plain call; NaN if one of them sees no key.

    Most calls are plain and agree. The general case broadcasts and selects heads; in a small model,
    that takes longer than the model's attention. The precision of products is that of the caller:
    if it is lowered, the error is larger, and the general case decides.
    """
    q, k, v, output = call.q, call.k, raw.value.detach(), raw.output
    assert q is not None
    assert k is not None
    assert output is not None
    n_samples, n_heads, _, d_head = q.shape
    n_rows, n_kv_heads = len(row), k.shape[1]
    grouped = (n_samples, n_kv_heads, n_heads // n_kv_heads * n_rows)
    scores = q.index_select(2, row).view(*grouped, d_head) @ k.transpose(2, 3)
    scores.mul_(call.scaling)
    if call.mask is not None or call.causal:
        seen = visible_rows(
            call.mask, row, row + call.offset, slice(0, k.shape[2]), causal=call.causal
        )
        scores.view(n_samples, n_heads, n_rows, -1).masked_fill_(~seen, -math.inf)
    probs = scores.softmax(-1)
    theirs = output.index_select(1, row).transpose(1, 2).reshape(*grouped, -1)
    return float((probs @ v).sub_(theirs).abs_().div_(probs @ v.abs()).amax())


def moved_probs(
    call: AttentionCall, row: Tensor, probs: Float[Tensor, "sample head query key"], eps: float
) -> Float[Tensor, "sample head query key"]:
    """Return how much each probability changes when only its own score is rounded.

    A score is a sum of products ``q_i k_i``. Rounding changes it by about
    ``w = eps * scaling * sum_i |q_i k_i|``, and its probability ``p`` by ``p (e^w - 1)``, but at
    most by 1.
    """
    part = call.select_rows(call.query_positions[row])
    assert part.q is not None
    assert call.k is not None
    n_groups = call.n_heads // call.n_kv_heads
    q, k = part.q.float().abs(), call.k.float().abs().repeat_interleave(n_groups, 1)
    change = eps * abs(call.scaling) * (q @ k.transpose(-1, -2))
    return (probs * change.clamp(max=_LARGEST_CHANGE).expm1()).clamp(max=1)


def rounding(
    moved: Float[Tensor, "sample head query key"],
    values: Float[Tensor, "sample kv_head key d_value"],
    output: Float[Tensor, "sample head query d_value"],
) -> Float[Tensor, "sample head query d_value"]:
    """Return the standard deviation of ``O = P V`` when probabilities change independently.

    Because the probabilities of a row are divided by their sum, ``dO = sum_k dp_k (V_k - O)``.

    Args:
        moved: How much each probability changes, from :func:`moved_probs`.
        values: ``V``.
        output: ``O``.
    """
    weights = moved.square()
    variance = (
        weighted(weights, values.square())
        - 2 * output * weighted(weights, values)
        + output.square() * weights.sum(-1, keepdim=True)
    )
    return variance.clamp(min=0).sqrt()


def weighted(
    probs: Float[Tensor, "sample head query key"],
    values: Float[Tensor, "sample kv_head key d_value"],
) -> Float[Tensor, "sample head query d_value"]:
    """Return ``P V`` without copying values for the query heads that share them."""
    n_groups, n_queries = probs.shape[1] // values.shape[1], probs.shape[2]
    grouped = probs.unflatten(1, (-1, n_groups)).flatten(2, 3)
    output: Tensor = (grouped @ values).unflatten(2, (n_groups, n_queries)).flatten(1, 2)
    return output


def comparable(raw: RawCall, call: AttentionCall) -> bool:
    """Return whether the output can be compared with ``P V``.

    It must cover all queries and be computed without dropout.
    """
    if raw.output is None or raw.output.ndim != 4 or call.q is None or call.rows is not None:
        return False
    expected = (call.n_queries, call.n_heads, raw.value.shape[-1])
    fits = tuple(raw.output.shape[1:]) == expected and call.n_queries and call.n_keys
    return bool(fits) and not raw.options.get("dropout")


def _group(raw: RawCall, call: AttentionCall) -> Any:
    """Return the key of a group of calls whose arguments have the same meaning."""
    mask = None if raw.mask is None else (raw.mask.dtype, raw.mask.ndim)
    one = call.n_queries == 1
    return raw.function, type(raw.module), mask, one, call.n_queries == call.n_keys


def _has_defined_meaning(raw: RawCall) -> bool:
    """Return whether the function is one of torch or transformers, which define their masks."""
    module = getattr(raw.function, "__module__", None) or ""
    return raw.function is None or module.startswith("transformers.")


def _rows(call: AttentionCall, raw: RawCall) -> list[int]:
    """Return the first row, the last row, and rows between them that vary by layer and call."""
    n_rows, n = _N_ROWS if _has_defined_meaning(raw) else _N_ROWS_UNKNOWN, call.n_queries
    if n <= n_rows:
        return list(range(n))
    first = (call.layer * 7 + call.call) * 5 + 1
    steps = (number * _GOLDEN % 1.0 for number in range(first, first + n_rows - 2))
    return sorted({0, n - 1, *(int(step * n) for step in steps)})


def _spread(n: int, n_most: int) -> list[int]:
    return list(range(0, n, -(-n // n_most)))
