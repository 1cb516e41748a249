"""From what the tap hears to calls by their proper names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from xmodal_interp.attention import AttentionCall
from xmodal_interp.attention.masks import simplified, visible_rows
from xmodal_interp.hooks.bypass import DenseCall
from xmodal_interp.hooks.modules import Identity
from xmodal_interp.hooks.tapping import RawCall


def as_attention_call(
    raw: RawCall, identity: Identity, number: int, mask: Tensor | None
) -> AttentionCall:
    """A raw call by its proper names, its tensors as they are."""
    options = raw.options
    sinks = options.get("s_aux") if options.get("s_aux") is not None else options.get("sinks")
    if sinks is None and isinstance(getattr(raw.module, "sinks", None), Tensor):
        sinks = raw.module.sinks
    # [sample, head, query, 1]: they follow from the query
    if sinks is not None and sinks.ndim == 4:
        sinks = sinks[..., 0]
    bias = options.get("position_bias")
    n_queries, n_keys = raw.query.shape[2], raw.key.shape[2]
    aligned_left = raw.backend == "sdpa" or n_queries == n_keys
    return AttentionCall(
        tower=identity.tower,
        kind=identity.kind,
        layer=identity.layer,
        module=identity.module,
        call=number,
        q=raw.query.detach(),
        k=raw.key.detach(),
        v=raw.value.detach(),
        mask=mask,
        bias=None if bias is None else bias.detach(),
        causal=raw.causal and mask is None,
        offset=0 if raw.causal and aligned_left else n_keys - n_queries,
        scaling=raw.scaling,
        softcap=options.get("softcap"),
        sinks=None if sinks is None else sinks.detach().clone(),  # a weight: training changes it
        sliding_window=options.get("sliding_window") if raw.causal else None,
        note=raw.note,
    )


def as_dense_call(heard: DenseCall, identity: Identity, number: int) -> AttentionCall:
    """Probabilities of a module's own by their proper names."""
    return AttentionCall(
        tower=identity.tower,
        kind=identity.kind,
        layer=identity.layer,
        module=identity.module,
        call=number,
        q=None,
        k=None,
        scaling=1.0,
        mask=heard.visible,
        dense=heard.probs,
        note=heard.note,
    )


def segments(call: RawCall) -> Iterator[RawCall]:
    """Packed calls of variable-length kernels, one per segment; any other call as it is."""
    bounds = call.options.get("cu_seq_lens_q")
    if bounds is None or "flash" not in call.backend:
        yield call
        return
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        part = slice(start, end)
        yield replace(
            call,
            query=call.query[:, :, part],
            key=call.key[:, :, part],
            value=call.value[:, :, part],
        )


def whole_mask(raw: RawCall) -> Tensor | None:
    """The mask of a call with a row per query; boolean, if it only hides."""
    if raw.mask is None:
        return None
    given = raw.mask.detach()
    if given.ndim == 2:
        return _rows_of_keys(raw, given)
    mask = simplified(given)
    one_row_for_all = mask.ndim == 4 and mask.shape[2] == 1
    return mask.expand(-1, -1, raw.query.shape[2], -1) if one_row_for_all else mask


def _rows_of_keys(raw: RawCall, mask: Tensor) -> Tensor:
    """A mask of keys and what the backend hides by itself, as one mask; queries come last."""
    n_queries, n_keys = raw.query.shape[2], raw.key.shape[2]
    rows = torch.arange(n_queries, device=mask.device)
    window = raw.options.get("sliding_window") if raw.causal else None
    seen = visible_rows(
        None, rows, rows + n_keys - n_queries, n_keys, causal=raw.causal, sliding_window=window
    )
    return seen & mask[:, None, None, -n_keys:].bool()
