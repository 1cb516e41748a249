"""Join the prefill and decode steps of one layer into one call with a row per token.

The position of a step's keys depends on the cache:

* a growing cache holds the keys of all positions so far;
* a static cache has space for all positions from the start, hidden until they are written;
* a sliding cache, growing or static, holds the keys of the last positions only.

The first key of a step is therefore either position 0, or the position that makes its last key the
current one. Its keys are compared with those of the previous steps to find out which; an error is
raised if they match neither. The keys may differ by rounding in models that cache the input of the
key projection (multi-head latent attention), because all keys are computed again in each step. Keys
outside a window are hidden in the joined call, as they were in the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from xmodal_interp.attention.call import AttentionCall
from xmodal_interp.attention.masks import additive_rows
from xmodal_interp.errors import CaptureError


def stitch(calls: Sequence[AttentionCall], n_positions: int) -> AttentionCall:
    """Return prefill and decode steps of one layer as one call with a row per token.

    Args:
        calls: The calls in order.
        n_positions: The number of positions of the sample. Later steps, in which other samples of
            the batch continued, are left out.

    Raises:
        CaptureError: The keys of a step are not a cache of the previous steps, or the keys of the
            prompt changed when it was read again.
    """
    if len(calls) == 1:
        return _without_room(calls[0])
    if reread([call.n_queries for call in calls]):
        return _last_reading(calls, n_positions)
    for call in calls[1:]:
        if call.kind == "self" and call.n_keys == call.n_queries:
            raise CaptureError(
                f"{call.name} ran on a sequence of {call.n_keys} positions after its prompt, so "
                "other code, such as a logits processor, runs parts of the model during "
                "generation. Give that code a copy of the model (copy.deepcopy)."
            )
    steps = _within(calls, n_positions)
    if any(call.kind == "cross" for call in calls):
        return _joined_rows(steps)
    if _plain(steps):
        last = steps[-1]
        n = sum(step.n_queries for step in steps)
        v = None if last.v is None else last.v[:, :, :n]
        k = None if last.k is None else last.k[:, :, :n]
        return replace(steps[0], q=_rows(steps, "q"), k=k, v=v, update_share=_shares(steps))
    return _placed(steps)


def reread(lengths: Sequence[int]) -> bool:
    """Whether every step read the whole sequence again, as generation without a cache does.

    Args:
        lengths: The number of positions that each step read.
    """
    return len(lengths) > 1 and all(a + 1 == b for a, b in pairwise(lengths))


def _within(calls: Sequence[AttentionCall], n_positions: int) -> list[AttentionCall]:
    """Return the steps up to ``n_positions``; the last one may be cut."""
    steps, start = [], 0
    for call in calls:
        stop = min(start + call.n_queries, n_positions)
        if stop <= start:
            break
        whole = stop - start == call.n_queries
        steps.append(call if whole else _cut(call, stop - start))
        start = stop
    return steps


def _cut(call: AttentionCall, n_queries: int) -> AttentionCall:
    chosen = call.select_rows(torch.arange(n_queries, device=call.device))
    return replace(chosen, rows=None)


def _without_room(call: AttentionCall) -> AttentionCall:
    """Return a prompt without the unused space of a static cache after its own keys."""
    n = call.n_queries
    if call.kind == "cross" or call.n_keys <= n or call.k is None or call.rows is not None:
        return call
    if bool(call.visible()[..., n:].any()):
        return call
    return replace(
        call,
        k=call.k[:, :, :n],
        v=None if call.v is None else call.v[:, :, :n],
        mask=None if call.mask is None else call.mask[..., :n],
        bias=None if call.bias is None else call.bias[..., :n],
    )


def _plain(steps: Sequence[AttentionCall]) -> bool:
    """Whether the prompt has only a causal flag, and later steps only add keys to the cache."""
    first = steps[0]
    growing = all(_begins(a, b) for a, b in pairwise(steps))
    alone = all(
        s.q is not None and s.mask is None and s.bias is None and s.sliding_window is None
        for s in steps
    )
    per_query = first.sinks is not None and first.sinks.ndim == 3
    whole = first.causal and first.offset == 0 and first.n_queries == first.n_keys
    return growing and alone and whole and not per_query


def _begins(step: AttentionCall, later: AttentionCall) -> bool:
    """Whether the keys of the next step are those of this step followed by its own."""
    if step.k is None or later.k is None or step.n_keys + later.n_queries != later.n_keys:
        return False
    same_memory = step.k.data_ptr() == later.k.data_ptr()
    return same_memory or torch.equal(step.k, later.k[:, :, : step.n_keys])


def _placed(steps: Sequence[AttentionCall]) -> AttentionCall:
    """Place each step's rows at its own positions; keys that the step did not hold are hidden."""
    first, n = steps[0], sum(step.n_queries for step in steps)
    offsets, k, v = _keys(steps)
    visible = [step.visible() for step in steps]
    n_heads = max(seen.shape[1] for seen in visible)
    n_samples = max(seen.shape[0] for seen in visible)
    mask = torch.zeros(n_samples, n_heads, n, n, dtype=torch.bool, device=first.device)
    biases = [added(step) for step in steps]
    bias = _room([part for part in biases if part is not None], n)
    dense = _room([step.dense for step in steps if step.dense is not None], n)
    start = 0
    for step, seen, part, offset in zip(steps, visible, biases, offsets, strict=True):
        stop = start + step.n_queries
        columns = slice(offset, min(offset + step.n_keys, n))
        width = columns.stop - columns.start
        if step.k is not None and bool(seen[..., stop - offset :].any()):
            raise CaptureError(
                f"{step.name} attends to unused space of a static cache, which holds no tokens: "
                f"{step.n_keys} keys at position {stop - 1}. Register a mask function for the "
                "model's attention backend (AttentionMaskInterface.register), or generate with the "
                "default cache."
            )
        mask[:, :, start:stop, columns] = seen[..., :width]
        if bias is not None and part is not None:
            bias[:, :, start:stop, columns] = part[..., :width]
        if dense is not None and step.dense is not None:
            dense[:, :, start:stop, columns] = step.dense[..., :width]
        start = stop
    return replace(
        first,
        q=_rows(steps, "q"),
        k=k,
        v=v,
        mask=mask,
        bias=bias,
        dense=dense,
        sinks=_sinks(steps),
        update_share=_shares(steps),
        causal=False,
        offset=0,
        sliding_window=None,
    )


def _room(parts: Sequence[Tensor], n: int) -> Tensor | None:
    """Return zeros for all rows and columns, with as many samples and heads as the largest part."""
    if not parts:
        return None
    shape = [max(part.shape[axis] for part in parts) for axis in (0, 1)]
    return torch.zeros(*shape, n, n, dtype=parts[0].dtype, device=parts[0].device)


def added(step: AttentionCall) -> Tensor | None:
    """Return the sum of the bias and the additive mask of a step; None if it has neither."""
    rows = torch.arange(step.n_queries, device=step.device)
    of_mask = additive_rows(step.mask, rows)
    if of_mask is None or step.bias is None:
        return step.bias if of_mask is None else of_mask
    return step.bias + of_mask


def added_by_each(calls: Sequence[AttentionCall]) -> list[Tensor]:
    """Return ``added`` of every call, with zeros for calls without it; empty if no call has it."""
    parts = [added(call) for call in calls]
    n_samples, n_heads = (
        max((part.shape[axis] for part in parts if part is not None), default=0) for axis in (0, 1)
    )
    return [
        torch.zeros(
            n_samples, n_heads, call.n_queries, call.n_keys, dtype=torch.float32, device=call.device
        )
        if part is None
        else part.float().expand(n_samples, n_heads, -1, -1)
        for call, part in zip(calls, parts, strict=True)
        if n_heads
    ]


def _keys(steps: Sequence[AttentionCall]) -> tuple[list[int], Tensor | None, Tensor | None]:
    """Return the position of each step's first key, and the keys and values of all positions."""
    first = steps[0]
    if first.k is None:
        return [0] * len(steps), None, None
    if bool(first.visible()[..., first.n_queries :].any()):
        raise CaptureError(
            f"The first call of {first.name} attends to {first.n_keys} keys with "
            f"{first.n_queries} queries: the others are keys of earlier positions, or unused space "
            "of a static cache. Generate with an empty default cache."
        )
    keys, values = [first.k[:, :, : first.n_queries]], []
    if first.v is not None:
        values.append(first.v[:, :, : first.n_queries])
    offsets, start = [0], first.n_queries
    for step in steps[1:]:
        assert step.k is not None
        offset = _offset(step, keys, start)
        new = slice(start - offset, start - offset + step.n_queries)
        keys.append(step.k[:, :, new])
        if step.v is not None:
            values.append(step.v[:, :, new])
        offsets.append(offset)
        start += step.n_queries
    return offsets, torch.cat(keys, 2), torch.cat(values, 2) if values else None


def _offset(step: AttentionCall, keys: list[Tensor], start: int) -> int:
    """Return the position of a step's first key, found by comparing its keys with known ones."""
    assert step.k is not None
    known = torch.cat(keys, 2) if len(keys) > 1 else keys[0]
    keys[:] = [known]
    seen = step.visible().any(2).any(1).any(0)  # by any query, head and sample
    offsets = [
        offset
        for offset in dict.fromkeys((0, start + step.n_queries - step.n_keys))
        if offset >= 0 and start + step.n_queries - offset <= step.n_keys
    ]
    for same in (torch.equal, _equal_up_to_rounding):
        for offset in offsets:
            earlier = seen[: start - offset].nonzero()[:, 0]
            if same(step.k[:, :, earlier], known[:, :, earlier + offset]):
                return offset
    raise CaptureError(
        f"The keys of {step.name} ({step.n_keys} keys after {start} positions) are not keys of "
        "previous positions followed by its own. Generate with the default cache."
    )


def _equal_up_to_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ only as products computed with different numbers of rows do.

    In half precision such a product is rounded once. A quantised cache changes keys by more.
    """
    eps = torch.finfo(one.dtype).eps
    limit = (16 if eps <= torch.finfo(torch.float32).eps else 2) * eps
    change, size = (one - other).abs(), other.abs()
    return not change.numel() or bool(change.max() <= limit * size.max())


def _last_reading(calls: Sequence[AttentionCall], n_positions: int) -> AttentionCall:
    """Return the call that reads exactly ``n_positions``; later calls belong to other samples."""
    first, last = calls[0], calls[min(n_positions - calls[0].n_queries, len(calls) - 1)]
    held = [call.k for call in (first, last) if call.k is not None]
    if held:
        seen = first.visible([first.n_queries - 1])[:, :, 0].any(1).expand(first.n_samples, -1)
        before, after = (k[:, :, : first.n_keys].transpose(1, 2)[seen].float() for k in held)
        if not torch.allclose(after, before, rtol=1e-2, atol=1e-3):
            raise CaptureError(
                f"The keys of {first.name} changed when the prompt was read again for the next "
                "token without a cache; some models receive their image in the first step only. "
                "Generate with the cache."
            )
    return replace(last, call=first.call)


def _joined_rows(calls: Sequence[AttentionCall]) -> AttentionCall:
    """Concatenate the rows of cross-attention calls, whose keys are the same in every step."""
    masks = [call.visible().expand(-1, -1, call.n_queries, -1) for call in calls]
    dense = None if calls[0].dense is None else _rows(calls, "dense")
    biases = added_by_each(calls)
    whole = replace(
        calls[0],
        q=_rows(calls, "q"),
        mask=torch.cat(masks, 2),
        dense=dense,
        bias=torch.cat(biases, 2) if biases else None,
        sinks=_sinks(calls),
        update_share=_shares(calls),
    )
    return replace(whole, causal=False, offset=0)


def _rows(calls: Sequence[AttentionCall], name: str) -> Tensor | None:
    parts = [t for call in calls if (t := getattr(call, name)) is not None]
    return torch.cat(parts, 2) if parts else None


def _sinks(calls: Sequence[AttentionCall]) -> Tensor | None:
    first = calls[0].sinks
    return first if first is None or first.ndim == 1 else _rows(calls, "sinks")


def _shares(calls: Sequence[AttentionCall]) -> Tensor | None:
    parts = [call.update_share for call in calls if call.update_share is not None]
    return torch.cat(parts, 1) if parts else None
