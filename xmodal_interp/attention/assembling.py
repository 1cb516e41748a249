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

Join pieces of an image that a tower processed separately, or take one image out of a call.

A vision tower processes an image in tiles or in windows, or several images in one packed row.
``joined`` concatenates pieces into one call, in which a query sees only the keys of its own piece.
``part_of`` takes one image out of a packed row. ``reordered`` undoes a permutation.

Place encoder and decoder attention on one axis: encoder positions, then decoder positions.

* An encoder layer has rows and keys of the encoder.
* Decoder self-attention has rows and keys of the decoder; cross-attention has rows of the decoder
  and keys of the encoder.
* Merged decoder attention (T5Gemma2) has the decoder's keys first, whose number grows, and the
  encoder's keys after them.

Each becomes a call over all positions. Rows of the other stack see no key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Int
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


def pieces_of(call: AttentionCall) -> list[AttentionCall]:
    """Split a call over a batch into one call per sample."""
    return [call.select_sample(i) for i in range(call.n_samples)]


def joined(pieces: Sequence[AttentionCall]) -> AttentionCall:
    """Concatenate pieces of one sample each into one call; positions are numbered through them."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    sizes = torch.tensor([piece.n_queries for piece in pieces])
    masks = [piece.visible() for piece in pieces]
    square = all(piece.n_queries == piece.n_keys for piece in pieces)
    even = square and all(bool(mask.all()) for mask in masks)
    rows = torch.arange(len(pieces)).repeat_interleave(sizes)
    shares = [piece.update_share for piece in pieces if piece.update_share is not None]
    return replace(
        first,
        q=_side_by_side(pieces, "q"),
        k=_side_by_side(pieces, "k"),
        v=_side_by_side(pieces, "v"),
        mask=None if even else _blocks(masks),
        bias=_blocks(added_by_each(pieces)),
        dense=_blocks([piece.dense for piece in pieces if piece.dense is not None]),
        segments=rows.to(first.device) if even else None,
        update_share=torch.cat(shares, 1) if shares else None,
        causal=False,
        offset=0,
        sliding_window=None,
    )


def part_of(call: AttentionCall, start: int, stop: int) -> AttentionCall:
    """Return the call with positions ``start`` to ``stop`` of a self-attention only.

    Raises:
        CaptureError: One of these queries sees a key outside of these positions.
    """
    rows = torch.arange(start, stop, device=call.device)
    seen = call.visible(rows)
    if bool(seen[..., :start].any() | seen[..., stop:].any()):
        raise CaptureError(
            f"In {call.name}, the image at positions {start} to {stop - 1} of a packed row also "
            "attends to other positions, so the images cannot be separated. Capture the samples "
            "one by one, or leave the tower out."
        )
    return reordered(call, rows)


def reordered(call: AttentionCall, index: Int[Tensor, " position"]) -> AttentionCall:
    """Reorder the positions of a self-attention; position ``i`` becomes the old ``index[i]``."""
    index = index.to(call.device)

    def both(t: Tensor | None) -> Tensor | None:
        return t if t is None else t[..., index, :][..., index]

    def one(t: Tensor | None) -> Tensor | None:
        return t if t is None else t[:, :, index]

    return replace(
        call,
        q=one(call.q),
        k=one(call.k),
        v=one(call.v),
        mask=both(call.mask),
        bias=both(call.bias),
        dense=both(call.dense),
        segments=None if call.segments is None else call.segments[index],
        update_share=None if call.update_share is None else call.update_share[:, index],
    )


def _side_by_side(pieces: Sequence[AttentionCall], name: str) -> Tensor | None:
    parts = [t for piece in pieces if (t := getattr(piece, name)) is not None]
    return torch.cat(parts, 2) if parts else None


def _blocks(parts: Sequence[Tensor]) -> Tensor | None:
    """Return a block-diagonal tensor with zeros (or False) elsewhere."""
    if not parts:
        return None
    n_heads = max(part.shape[1] for part in parts)
    n_rows, n_columns = (sum(part.shape[axis] for part in parts) for axis in (2, 3))
    whole = parts[0].new_zeros(1, n_heads, n_rows, n_columns)
    row = column = 0
    for part in parts:
        next_row, next_column = row + part.shape[2], column + part.shape[3]
        whole[:, :, row:next_row, column:next_column] = part
        row, column = next_row, next_column
    return whole


def encoder_layer(
    calls: Sequence[AttentionCall], n_encoder: int, n_positions: int
) -> AttentionCall:
    """Return the calls of an encoder layer as one call over all positions.

    Args:
        calls: A list of one call, because an encoder runs once.
        n_encoder: Number of encoder positions.
        n_positions: Number of encoder and decoder positions.
    """
    own = slice(0, n_encoder)
    return _laid_out(stitch(calls, n_encoder), own, own, n_positions)


def decoder_layer(
    calls: Sequence[AttentionCall], n_encoder: int, n_positions: int, *, merged: bool
) -> AttentionCall:
    """Return the calls of a decoder layer as one call over all positions.

    Args:
        calls: Prefill and decode steps, in order.
        n_encoder: Number of encoder positions.
        n_positions: Number of encoder and decoder positions.
        merged: Whether the keys of a call are the decoder's followed by the encoder's.
    """
    encoder, own = slice(0, n_encoder), slice(n_encoder, n_positions)
    n_own = n_positions - n_encoder
    if calls[0].kind == "cross":
        return _laid_out(stitch(calls, n_own), own, encoder, n_positions)
    if not merged:
        return _laid_out(stitch(calls, n_own), own, own, n_positions)
    alone = [with_keys(call, 0, call.n_keys - n_encoder) for call in calls]
    across = [with_keys(call, call.n_keys - n_encoder, call.n_keys) for call in calls]
    of_itself = stitch(alone, n_own)
    of_encoder = stitch([replace(call, kind="cross") for call in across], n_own)
    return _laid_out(
        _blocks_side_by_side(of_encoder, of_itself), own, slice(0, n_positions), n_positions
    )


def with_keys(call: AttentionCall, start: int, stop: int) -> AttentionCall:
    """Return a call with only some of its keys, and an explicit mask.

    Probabilities are normalised over these keys, so the other keys must be hidden or added again.
    """
    bias = added(call)
    return replace(
        call,
        k=None if call.k is None else call.k[:, :, start:stop],
        v=None if call.v is None else call.v[:, :, start:stop],
        dense=None if call.dense is None else call.dense[..., start:stop],
        bias=None if bias is None else bias[..., start:stop],
        mask=call.visible()[..., start:stop],
        **_NO_FLAGS,
    )


def _blocks_side_by_side(one: AttentionCall, other: AttentionCall) -> AttentionCall:
    """Join two calls with the same rows into one call with the keys of both."""

    def beside(name: str, axis: int) -> Tensor | None:
        parts = [getattr(one, name), getattr(other, name)]
        return None if parts[0] is None or parts[1] is None else torch.cat(parts, axis)

    axes = {"k": 2, "v": 2, "mask": 3, "bias": 3, "dense": 3}
    both: dict[str, Any] = {name: beside(name, axis) for name, axis in axes.items()}
    return replace(other, **both)


def _laid_out(call: AttentionCall, rows: slice, keys: slice, n: int) -> AttentionCall:
    """Expand a call to ``n`` rows and keys; the added rows and keys are hidden."""

    def matrix(part: Tensor | None, of_other_rows: float = 0.0) -> Tensor | None:
        if part is None:
            return None
        whole = part.new_full((*part.shape[:2], n, n), of_other_rows)
        whole[:, :, rows] = 0
        whole[:, :, rows, keys] = part
        return whole

    def along(part: Tensor | None, places: slice, axis: int = 2) -> Tensor | None:
        if part is None:
            return None
        whole = part.new_zeros((*part.shape[:axis], n, *part.shape[axis + 1 :]))
        whole.narrow(axis, places.start, places.stop - places.start).copy_(part)
        return whole

    per_query = call.sinks is not None and call.sinks.ndim == 3
    return replace(
        call,
        q=along(call.q, rows),
        k=along(call.k, keys),
        v=along(call.v, keys),
        mask=matrix(call.visible()),
        bias=matrix(added(call)),
        dense=matrix(call.dense, torch.nan),
        sinks=along(call.sinks, rows) if per_query else call.sinks,
        update_share=along(call.update_share, rows, 1),
        **_NO_FLAGS,
    )


_NO_FLAGS: dict[str, Any] = {
    "causal": False,
    "offset": 0,
    "sliding_window": None,
    "segments": None,
}
