"""A call of an attention function as the model made it, and its conversion to ``AttentionCall``.

Every way of recording (see :mod:`xmodal_interp.hooks.recorder`) makes a :class:`RawCall`. The
meaning of its mask and of its causal flag depends on the function:

* The eager functions of transformers add the mask to the scores. A boolean mask adds 1 where it is
  True and hides nothing. Without a mask, every key is visible.
* ``scaled_dot_product_attention`` hides keys where a boolean mask is False. Its causal flag lets
  query ``i`` attend to the keys 0 to ``i``, also where there are more keys than queries.
* Flash kernels take a mask ``[sample, key]``. Their causal flag lets the last query attend to all
  keys, and each earlier query to one key less.

For any other function, the most likely meaning ("reading") is tried first, then the others, until
one gives the function's output (:mod:`xmodal_interp.hooks.probability_check`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask

from xmodal_interp.attention import AttentionCall
from xmodal_interp.attention.masks import as_added, simplified, visible_rows
from xmodal_interp.hooks.attention_modules import Identity

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]
T = TypeVar("T")


def changed(value: T, **changes: Any) -> T:
    """Return a copy of a frozen dataclass with other values of some fields.

    ``dataclasses.replace`` sets each field through ``__init__``. For the many fields of a call, and
    several changes of each call, that is a noticeable part of the time of a small model. Results
    that the object caches are not copied.
    """
    copied = object.__new__(type(value))
    held, given = vars(value), cast("Any", value)
    vars(copied).update({each.name: held[each.name] for each in fields(given)}, **changes)
    return copied


@dataclass(frozen=True, eq=False)
class RawCall:
    """The arguments of one attention call, as the model passed them.

    Attributes:
        module: The attention module.
        query: ``[sample, head, query, d_head]``.
        key: ``[sample, kv_head, key, d_head]``.
        value: ``[sample, kv_head, key, d_value]``.
        mask: The attention mask.
        backend: The name of the backend, such as ``"sdpa"``.
        options: Every further keyword argument.
        eager: The eager function of the modeling code, if it passed one to the interface.
        output: ``[sample, query, head, d_value]``, the output before any observer edited it; None
            before the call.
        note: How the call was recorded, if it did not go through the interface.
        function: The attention function that is called.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any  # a tensor or None; a BlockMask of flex attention until the call is recorded
    backend: str
    options: dict[str, Any]
    eager: AttentionFunction | None = None
    output: Tensor | None = None
    note: str = ""
    function: AttentionFunction | None = None

    @property
    def scaling(self) -> float:
        """Factor of the scores; the default of the backends is ``d_head ** -0.5``."""
        scaling = self.options.get("scaling")
        return float(self.query.shape[-1] ** -0.5 if scaling is None else scaling)

    @property
    def values_by_head(self) -> Float[Tensor, "sample head key d_value"]:
        """``value`` in float32, with one copy per query head."""
        return self.value.float().repeat_interleave(self.query.shape[1] // self.value.shape[1], 1)

    @property
    def causal(self) -> bool:
        """Whether the backend hides later keys by itself.

        Eager functions never do: their mask hides them. A mask ``[sample, key]`` (for flash
        kernels) hides padding only, and the backend hides later keys.
        """
        complete = self.mask is not None and self.mask.ndim > 2
        if complete or self.query.shape[2] == 1 or self.backend == "eager":
            return False
        flag = self.options.get("is_causal")
        return bool(getattr(self.module, "is_causal", True) if flag is None else flag)


def as_attention_call(
    raw: RawCall, identity: Identity, number: int, mask: Tensor | None
) -> AttentionCall:
    """Convert a raw call to an :class:`AttentionCall`; its tensors are not copied.

    Args:
        raw: The call.
        identity: The layer.
        number: The number of the call within its layer.
        mask: The mask with a row per query, from :func:`whole_mask`.
    """
    options = raw.options
    sinks = options.get("s_aux") if options.get("s_aux") is not None else options.get("sinks")
    if sinks is None and isinstance(getattr(raw.module, "sinks", None), Tensor):
        sinks = raw.module.sinks
    # [sample, head, query, 1]: sinks that are computed from the query
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
        sinks=None if sinks is None else sinks.detach().clone(),  # a weight, changed by training
        sliding_window=options.get("sliding_window") if raw.causal else None,
        note=raw.note,
    )


def other_readings(raw: RawCall, call: AttentionCall) -> Iterator[AttentionCall]:
    """Yield the call in each other reading of its mask and causal flag, likely ones first.

    A backend may also ignore the soft-cap.
    """
    if call.softcap is not None:
        uncapped = replace(call, softcap=None)
        yield uncapped
        yield from other_readings(raw, uncapped)
    n_queries, n_keys = call.n_queries, call.n_keys
    alignments = [(True, 0), (True, n_keys - n_queries), (False, 0)]
    windows = dict.fromkeys((call.sliding_window, raw.options.get("sliding_window"), None))
    if raw.mask is None:
        for causal, offset in alignments:
            for window in windows if causal else (None,):
                yield replace(call, mask=None, causal=causal, offset=offset, sliding_window=window)
        return
    given = raw.mask.detach()
    meanings: list[Tensor] = []
    if given.ndim == 2:
        keys = given[:, None, None, -n_keys:].bool().expand(-1, -1, n_queries, -1)
        meanings = [keys, torch.ones_like(keys)]
    elif given.is_floating_point():
        meanings = [_row_per_query(given, raw), _row_per_query(torch.zeros_like(given), raw)]
    else:
        whole = _row_per_query(given, raw)
        meanings = [
            whole != 0,
            whole.to(raw.query.dtype),
            whole == 0,
            torch.ones_like(whole, dtype=torch.bool),
        ]
    rows = torch.arange(n_queries, device=given.device)
    for mask in meanings:
        for causal, offset in [(False, 0), *alignments[:2]]:
            for window in windows if causal else (None,):
                seen = visible_rows(
                    None,
                    rows,
                    rows + offset,
                    slice(0, n_keys),
                    causal=causal,
                    sliding_window=window,
                )
                both = (
                    mask & seen
                    if mask.dtype == torch.bool
                    else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
                )
                yield replace(
                    call,
                    mask=both,
                    causal=False,
                    offset=n_keys - n_queries,
                    sliding_window=None,
                )


def as_computed(raw: RawCall) -> RawCall:
    """Return the call with its operands in the precision that the function computed with.

    Under autocast, and in some kernels, float32 queries and keys are rounded to the dtype of the
    output.
    """
    if raw.output is None:
        return raw
    given = (raw.query, raw.key, raw.value)
    dtype = raw.output.dtype
    rounded = (torch.float16, torch.bfloat16)
    if dtype not in rounded or all(t.dtype in rounded for t in given):
        return raw
    autocast = torch.is_autocast_enabled(raw.query.device.type)
    if not autocast and raw.value.dtype == dtype:
        return raw  # the module computes its scores in a higher precision
    query, key, value = (t.to(dtype) for t in given)
    return replace(raw, query=query, key=key, value=value)


def segments(call: RawCall) -> Iterator[RawCall]:
    """Yield one call per segment of a packed variable-length call; yield other calls unchanged."""
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
            output=None if call.output is None else call.output[:, part],
        )


def dense_mask(block_mask: BlockMask, device: torch.device) -> Tensor:
    """Convert a mask of flex attention to ``[sample, head, query, key]``, True where visible."""
    n_samples, n_heads, n_queries, n_keys = block_mask.shape
    return create_mask(
        block_mask.mask_mod, n_samples, n_heads, n_queries, n_keys, device=str(device)
    )


def whole_mask(raw: RawCall) -> Tensor | None:
    """Return the mask of a call with a row per query; boolean if it only hides keys."""
    if raw.mask is None:
        return None
    given = raw.mask.detach()
    if given.ndim == 2:
        return _rows_of_keys(raw, given)
    if raw.backend == "eager":
        given = as_added(given, raw.query.dtype)
    return _row_per_query(simplified(given), raw)


def _row_per_query(mask: Tensor, raw: RawCall) -> Tensor:
    one_row_for_all = mask.ndim == 4 and mask.shape[2] == 1
    return mask.expand(-1, -1, raw.query.shape[2], -1) if one_row_for_all else mask


def _rows_of_keys(raw: RawCall, mask: Tensor) -> Tensor:
    """Combine a mask of keys with the keys that the backend hides by itself.

    The queries are at the last positions of the keys.
    """
    n_queries, n_keys = raw.query.shape[2], raw.key.shape[2]
    rows = torch.arange(n_queries, device=mask.device)
    window = raw.options.get("sliding_window") if raw.causal else None
    seen = visible_rows(
        None,
        rows,
        rows + n_keys - n_queries,
        slice(0, n_keys),
        causal=raw.causal,
        sliding_window=window,
    )
    return seen & mask[:, None, None, -n_keys:].bool()
