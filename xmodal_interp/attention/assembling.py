"""Combine calls of one layer into one call: decode steps, pieces of an image, encoder and decoder.

:func:`placed` puts calls at ranges of rows and keys of a larger call, in which all other pairs of
query and key are hidden. The other functions find these ranges.

**Decode steps** (:func:`stitch`). The prefill and the decode steps become one call with a row per
token. The position of a step's keys depends on the cache:

* a growing cache holds the keys of all positions so far;
* a static cache has space for all positions from the start, hidden until they are written;
* a sliding cache, growing or static, holds the keys of the last positions only.

The keys of a step therefore either begin at position 0 or end at the current position. They are
compared with the keys of the previous steps in both places; an error is raised if they match in
neither. Some models cache the input of the key projection (multi-head latent attention) and compute
all keys again in each step, so keys may differ by rounding. Keys outside a window are hidden in the
combined call, as they were in the step.

**Pieces of an image.** A vision tower processes an image in tiles or in windows, or several images
in one packed row. :func:`joined_pieces` concatenates pieces into one call, in which a query sees
only the keys of its own piece. :func:`part_of` takes one image out of a packed row.
:func:`reordered` undoes a permutation.

**Encoder and decoder** (:func:`encoder_layer`, :func:`decoder_layer`). Each layer becomes a call
over encoder positions followed by decoder positions. All other pairs are hidden:

* An encoder layer has rows and keys of the encoder.
* Decoder self-attention has rows and keys of the decoder; cross-attention has rows of the decoder
  and keys of the encoder.
* Merged decoder attention (T5Gemma2) has rows of the decoder, and the keys of both. The model
  passes the decoder's keys first, whose number grows, and the encoder's keys after them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from xmodal_interp.attention.call import AXES, AttentionCall
from xmodal_interp.attention.masks import additive_rows
from xmodal_interp.attention.statistics import NO_GROUP
from xmodal_interp.errors import CaptureError

_ELSEWHERE = {"groups": NO_GROUP, "group_mass": torch.nan, "row_entropy": torch.nan}
"""Entries of a joined call that belong to none of its calls; 0 in the other tensors."""


def with_mask(call: AttentionCall) -> AttentionCall:
    """Return the call with a boolean mask instead of its causal flag, window and segments.

    An additive mask is split into a boolean mask and a bias, unless the call holds statistics,
    which include the bias.
    """
    added = additive_rows(call.mask, torch.arange(call.n_queries, device=call.device))
    bias = call.bias
    if added is not None and not call.holds_statistics:
        bias = added if bias is None else bias + added
    flags: dict[str, Any] = {"causal": False, "offset": 0, "sliding_window": None, "segments": None}
    return replace(call, mask=call.visible(), bias=bias, **flags)


def placed(
    calls: Sequence[AttentionCall],
    rows: Sequence[slice],
    keys: Sequence[slice],
    n_queries: int,
    n_keys: int,
) -> AttentionCall:
    """Return one call that holds each call at its rows and keys.

    All other entries of the mask are False, and those of the other tensors are 0; rows of ``dense``
    and of statistics that belong to no call are NaN. A key that several calls hold is copied from
    the first of them; what it receives is summed. Fields that are not tensors are those of the
    first call. A tensor that some calls do not hold is left out, except a bias and
    ``key_received``.

    Args:
        calls: Calls with an explicit mask (:func:`with_mask`), or all without mask and flags.
        rows: The rows of each call.
        keys: The keys of each call, ordered by start and by stop.
        n_queries: Number of queries of the result.
        n_keys: Number of keys of the result.
    """
    lengths = {"query": n_queries, "key": n_keys}
    places = [{"query": row, "key": key} for row, key in zip(rows, keys, strict=True)]
    whole: dict[str, Any] = {"rows": None}
    for name, axes in AXES.items():
        held = [getattr(call, name) for call in calls]
        parts = [part for part in zip(held, places, strict=True) if part[0] is not None]
        if parts and parts[0][0].ndim == len(axes) and name != "rows":
            in_all = len(parts) == len(calls) or name in ("bias", "key_received")
            whole[name] = _filled(name, parts, lengths) if in_all else None
    if whole.get("dense") is not None:
        other = torch.ones(n_queries, dtype=torch.bool)
        for row in rows:
            other[row] = False
        whole["dense"][:, :, other] = torch.nan
    return replace(calls[0], **whole)


def _filled(
    name: str,
    parts: Sequence[tuple[Tensor, Mapping[str, slice]]],
    lengths: Mapping[str, int],
) -> Tensor:
    """Return the tensor of this name with each part at its place on the query and key axes."""
    axes = AXES[name]
    tensors = [tensor for tensor, _ in parts]
    sizes = [
        lengths.get(axis, max(tensor.shape[at] for tensor in tensors))
        for at, axis in enumerate(axes)
    ]
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    whole = tensors[0].new_full(sizes, _ELSEWHERE.get(name, 0), dtype=dtype)
    copied = 0  # keys, from the first
    for tensor, place in parts:
        if name == "key_received":
            whole[..., place["key"]] += tensor
            continue
        if "query" not in axes:  # k and v, whose first entries may be in an earlier part
            start, stop = place["key"].start, place["key"].stop
            new, before = max(copied, start), (slice(None),) * axes.index("key")
            tensor = tensor[(*before, slice(new - start, None))]
            place, copied = {"key": slice(new, stop)}, stop
        whole[tuple(place.get(axis, slice(None)) for axis in axes)] = tensor
    return whole


def stitch(calls: Sequence[AttentionCall], n_positions: int) -> AttentionCall:
    """Join the prefill and the decode steps of one layer into one call with a row per token.

    Args:
        calls: The calls in order.
        n_positions: The number of positions of the sample. Later steps, which only other samples
            of the batch need, are left out.

    Raises:
        CaptureError: The keys of a step are not a cache of the previous steps, or the keys of the
            prompt changed when it was read again.
    """
    if len(calls) == 1:
        return _without_unused_keys(calls[0])
    if ran_without_cache([call.n_queries for call in calls]):
        return _last_run(calls, n_positions)
    for call in calls[1:]:
        if call.kind == "self" and call.n_keys == call.n_queries:
            raise CaptureError(
                f"{call.name} ran on a sequence of {call.n_keys} positions after its prompt, so "
                "other code, such as a logits processor, runs parts of the model during "
                "generation. Give that code a copy of the model (copy.deepcopy)."
            )
    steps = _up_to(calls, n_positions)
    if any(call.kind == "cross" for call in calls):
        return _cross_steps(steps)
    if _only_adds_keys(steps):
        n_keys = sum(step.n_queries for step in steps)
        whole = steps[-1].take("key", slice(0, n_keys))
        joined: dict[str, Any] = {name: _concatenated(steps, name) for name in _OF_ROWS}
        joined |= {name: getattr(whole, name) for name in ("k", "v", "groups")}
        return replace(steps[0], **joined, key_received=_summed(steps, n_keys))
    return _cached_steps(steps)


def ran_without_cache(lengths: Sequence[int]) -> bool:
    """Return whether every step read the whole sequence again, as generation without a cache does.

    Args:
        lengths: The number of positions that each step read.
    """
    return len(lengths) > 1 and all(a + 1 == b for a, b in pairwise(lengths))


def _without_unused_keys(call: AttentionCall) -> AttentionCall:
    """Return a prompt without the unused space of a static cache after its own keys."""
    n = call.n_queries
    if call.kind == "cross" or call.n_keys <= n or call.k is None or call.rows is not None:
        return call
    return call if bool(call.visible()[..., n:].any()) else call.take("key", slice(0, n))


def _last_run(calls: Sequence[AttentionCall], n_positions: int) -> AttentionCall:
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


def _up_to(calls: Sequence[AttentionCall], n_positions: int) -> list[AttentionCall]:
    """Return the steps up to ``n_positions``; the last one may be cut."""
    steps, start = [], 0
    for call in calls:
        n = min(call.n_queries, n_positions - start)
        if n <= 0:
            break
        steps.append(call if n == call.n_queries else call.take("query", slice(0, n)))
        start += n
    return steps


def _cross_steps(steps: Sequence[AttentionCall]) -> AttentionCall:
    """Concatenate the rows of cross-attention steps, which all have the same keys."""
    first, n_keys = steps[0], steps[0].n_keys
    rows = _ranges([step.n_queries for step in steps])
    without_keys = [replace(with_mask(step), k=None, v=None) for step in steps]
    keys = [slice(0, n_keys)] * len(steps)
    return replace(placed(without_keys, rows, keys, rows[-1].stop, n_keys), k=first.k, v=first.v)


def _only_adds_keys(steps: Sequence[AttentionCall]) -> bool:
    """Return whether the prompt has only a causal flag, and later steps only add keys."""
    first = steps[0]
    growing = all(_adds_keys(a, b) for a, b in pairwise(steps))
    without_mask = all(
        s.dense is None and s.mask is None and s.bias is None and s.sliding_window is None
        for s in steps
    )
    per_query = first.sinks is not None and first.sinks.ndim == 3
    whole = first.causal and first.offset == 0 and first.n_queries == first.n_keys
    return growing and without_mask and whole and not per_query


def _adds_keys(step: AttentionCall, later: AttentionCall) -> bool:
    """Return whether the keys of the next step are those of this step followed by its own."""
    if step.k is None or later.k is None or step.n_keys + later.n_queries != later.n_keys:
        return False
    same_memory = step.k.data_ptr() == later.k.data_ptr()
    return same_memory or torch.equal(step.k, later.k[:, :, : step.n_keys])


def _cached_steps(steps: Sequence[AttentionCall]) -> AttentionCall:
    """Place each step's rows at its own positions; keys that the step did not hold are hidden."""
    rows = _ranges([step.n_queries for step in steps])
    parts, keys = [], []
    for step, row, offset in zip(steps, rows, _offsets(steps), strict=True):
        part, n_used = with_mask(step), row.stop - offset
        assert part.mask is not None
        if step.k is not None and bool(part.mask[..., n_used:].any()):
            raise CaptureError(
                f"{step.name} attends to unused space of a static cache, which holds no tokens: "
                f"{step.n_keys} keys at position {row.stop - 1}. Register a mask function for the "
                "model's attention backend (AttentionMaskInterface.register), or generate with the "
                "default cache."
            )
        parts.append(part.take("key", slice(0, n_used)))
        keys.append(slice(offset, offset + parts[-1].n_keys))
    return placed(parts, rows, keys, rows[-1].stop, rows[-1].stop)


def _offsets(steps: Sequence[AttentionCall]) -> list[int]:
    """Return the position of each step's first key."""
    first = steps[0]
    if first.k is None:
        return [0] * len(steps)
    if bool(first.visible()[..., first.n_queries :].any()):
        raise CaptureError(
            f"The first call of {first.name} attends to {first.n_keys} keys with "
            f"{first.n_queries} queries: the others are keys of earlier positions, or unused space "
            "of a static cache. Generate with an empty default cache."
        )
    start = first.n_queries
    known = first.k.new_empty(
        *first.k.shape[:2], _ranges(s.n_queries for s in steps)[-1].stop, first.k.shape[3]
    )
    known[:, :, :start] = first.k[:, :, :start]
    compared = torch.zeros(known.shape[2], dtype=torch.bool, device=known.device)
    offsets, before = [0], first.k
    for step in steps[1:]:
        assert step.k is not None
        stop = start + step.n_queries
        if offsets[-1] or not _is_same_cache(step.k, before):
            compared[:] = False
        seen = step.visible().any(2).any(1).any(0)  # by any query, head and sample
        offset = _offset(step, known[:, :, :start], seen, compared[:start])
        known[:, :, start:stop] = step.k[:, :, start - offset : stop - offset]
        if offset == 0:
            compared[:start] |= seen[:start]
            compared[start:stop] = True
        offsets.append(offset)
        before, start = step.k, stop
    return offsets


def _is_same_cache(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of keys are views of the same memory, from its first key."""
    return one.data_ptr() == other.data_ptr() and one.stride() == other.stride()


def _offset(step: AttentionCall, known: Tensor, seen: Tensor, compared: Tensor) -> int:
    """Return the position of a step's first key, found by comparing its keys with known ones.

    Args:
        step: The step.
        known: ``[sample, kv_head, position, d_head]``, the keys of the positions before it.
        seen: ``[key]``, True for keys that a query of the step sees; only these are compared.
        compared: ``[position]``, True for keys that were compared in an earlier step of the same
            cache, whose first key is at position 0. They are not compared again, which would take
            quadratic time.
    """
    assert step.k is not None
    start = known.shape[2]
    offsets = [
        offset
        for offset in dict.fromkeys((0, start + step.n_queries - step.n_keys))
        if offset >= 0 and start + step.n_queries - offset <= step.n_keys
    ]
    for same in (torch.equal, _equal_up_to_rounding):
        for offset in offsets:
            wanted = seen[: start - offset]
            earlier = (wanted if offset else wanted & ~compared).nonzero()[:, 0]
            if same(step.k[:, :, earlier], known[:, :, earlier + offset]):
                return offset
    raise CaptureError(
        f"The keys of {step.name} ({step.n_keys} keys after {start} positions) are not keys of "
        "previous positions followed by its own. Generate with the default cache."
    )


def _equal_up_to_rounding(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors differ by no more than the rounding of one matrix product.

    The rounding of a product depends on its number of rows. A quantised cache changes keys by more.
    """
    eps = torch.finfo(one.dtype).eps
    limit = (16 if eps <= torch.finfo(torch.float32).eps else 2) * eps
    change, size = (one - other).abs(), other.abs()
    return not change.numel() or bool(change.max() <= limit * size.max())


_OF_ROWS = ("q", "update_share", "token_norm", "group_mass", "row_entropy", "counted")
"""Tensors of a causal call with a row per query."""


def _concatenated(steps: Sequence[AttentionCall], name: str) -> Tensor | None:
    """Return the tensor of all steps, along the query axis; None if a step does not hold it."""
    tensors = [getattr(step, name) for step in steps]
    if any(tensor is None for tensor in tensors):
        return None
    return torch.cat(tensors, AXES[name].index("query"))


def _summed(steps: Sequence[AttentionCall], n_keys: int) -> Tensor | None:
    """Return what each key receives in all steps; None if no step holds it."""
    held = [step.key_received for step in steps if step.key_received is not None]
    if not held:
        return None
    total = held[0].new_zeros(*held[0].shape[:2], n_keys)
    for of_step in held:
        total[..., : of_step.shape[2]] += of_step
    return total


def _ranges(lengths: Iterable[int]) -> list[slice]:
    """Return consecutive ranges of these lengths, from 0."""
    return [slice(start, stop) for start, stop in pairwise(accumulate(lengths, initial=0))]


def pieces_of(call: AttentionCall) -> list[AttentionCall]:
    """Split a call over a batch into one call per sample."""
    return [call.select_sample(i) for i in range(call.n_samples)]


def joined_pieces(pieces: Sequence[AttentionCall]) -> AttentionCall:
    """Concatenate pieces of one sample each into one call with consecutive positions."""
    first = pieces[0]
    if len(pieces) == 1:
        return first
    n_queries = [piece.n_queries for piece in pieces]
    rows, keys = _ranges(n_queries), _ranges(piece.n_keys for piece in pieces)
    parts, segments = [with_mask(piece) for piece in pieces], None
    if rows == keys and all(part.mask is not None and bool(part.mask.all()) for part in parts):
        parts = [replace(part, mask=None) for part in parts]  # segments need less memory
        segments = torch.arange(len(pieces)).repeat_interleave(torch.tensor(n_queries))
        segments = segments.to(first.device)
    return replace(placed(parts, rows, keys, rows[-1].stop, keys[-1].stop), segments=segments)


def part_of(call: AttentionCall, start: int, stop: int) -> AttentionCall:
    """Return positions ``start`` to ``stop`` (exclusive) of a self-attention call.

    Raises:
        CaptureError: A query at these positions sees a key at another position.
    """
    rows = torch.arange(start, stop, device=call.device)
    seen = call.visible(rows)
    if bool(seen[..., :start].any() | seen[..., stop:].any()):
        raise CaptureError(
            f"In {call.name}, the image at positions {start} to {stop - 1} of a packed row also "
            "attends to other positions, so the images cannot be separated. Capture the samples "
            "one by one, or leave the tower out."
        )
    part = reordered(call, rows)
    if call.key_received is None or call.counted is None:
        return part
    # the other queries, which are counted too, give these keys nothing
    of_keys, of_rows = call.key_received[..., start:stop], call.counted[:, start:stop]
    return replace(part, key_received=of_keys, counted=of_rows)


def reordered(call: AttentionCall, index: Int[Tensor, " position"]) -> AttentionCall:
    """Return a self-attention call whose position ``i`` is the old position ``index[i]``."""
    index = index.to(call.device)
    return call.take("query", index).take("key", index)


def encoder_layer(
    calls: Sequence[AttentionCall], n_encoder: int, n_positions: int
) -> AttentionCall:
    """Return the calls of an encoder layer as one call over all positions.

    Args:
        calls: A list of one call, because an encoder runs once.
        n_encoder: Number of encoder positions.
        n_positions: Number of encoder and decoder positions.
    """
    encoder = slice(0, n_encoder)
    whole = with_mask(stitch(calls, n_encoder))
    return placed([whole], [encoder], [encoder], n_positions, n_positions)


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
    encoder, decoder = slice(0, n_encoder), slice(n_encoder, n_positions)
    n_decoder = n_positions - n_encoder
    if not merged:
        keys = encoder if calls[0].kind == "cross" else decoder
        whole = with_mask(stitch(calls, n_decoder))
        return placed([whole], [decoder], [keys], n_positions, n_positions)
    masked = [with_mask(call) for call in calls]
    of_encoder = [call.take("key", slice(call.n_keys - n_encoder, None)) for call in masked]
    of_decoder = [call.take("key", slice(0, call.n_keys - n_encoder)) for call in masked]
    parts = [
        stitch([replace(call, kind="cross") for call in of_encoder], n_decoder),
        stitch(of_decoder, n_decoder),
    ]
    both = placed(parts, [decoder, decoder], [encoder, decoder], n_positions, n_positions)
    return replace(both, kind=calls[0].kind)
