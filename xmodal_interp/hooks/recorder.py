"""The recorder: forward hooks say which attention layer is running, the tap says what it was given.

1. Before an attention module runs, its hook opens it; what the tap hears belongs to the innermost
   open module.
2. Each call becomes an :class:`AttentionCall`: operands cloned (a static cache overwrites its keys
   in place), the mask as given.
3. After the module has run, its hook closes it; one that made no call ran unseen, and the recording
   says so.

Keys of a growing cache are kept once: when a call's keys begin with the keys of the call before,
the older call becomes a view.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from xmodal_interp.attention import AttentionCall
from xmodal_interp.attention.masks import hidden_below, visible_rows
from xmodal_interp.errors import CaptureError, InputError
from xmodal_interp.hooks.modules import Identity, attention_modules
from xmodal_interp.hooks.rotary import RotaryPositions
from xmodal_interp.hooks.tap import RawCall, tap
from xmodal_interp.hooks.updates import UpdateShares
from xmodal_interp.vocabulary import TOWERS, Tower


@dataclass(eq=False)
class Recording:
    """What was heard.

    Attributes:
        calls: Every call, in the order the model made them; there when the block has ended.
        results: What ``reduce`` returned for each call, if it was given (``calls`` is then empty).
        modules: Every attention module that is listened to.
        unseen: Names of modules that ran without a call that could be heard.
        rotary: What the rotary embedding of the language tower was told of positions.
    """

    modules: tuple[Identity, ...]
    calls: list[AttentionCall] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    rotary: RotaryPositions | None = None


@contextmanager
def record(
    model: nn.Module,
    *,
    towers: Sequence[Tower] = TOWERS,
    layers: Sequence[int] | None = None,
    values: bool = False,
    norms: bool = False,
    reduce: Callable[[AttentionCall], Any] | None = None,
) -> Iterator[Recording]:
    """Record the attention of any transformers model while a ``with`` block runs it.

    Its outputs don't change by a bit.

    Args:
        model: The model; its attention backend stays as it is.
        towers: Which towers to keep.
        layers: Which layers to keep (per tower and kind), all if not given.
        values: Keep V too.
        norms: Keep the share of attention in each token's update (``AttentionCall.update_share``).
        reduce: Called with each call instead of keeping it; what it returns goes to ``results``. It
            must not keep the call: its tensors are the model's own.

    Raises:
        CaptureError: Attention ran that could not be heard, or the model is compiled. Raised at the
            end of the block, unless the block itself failed.
    """
    refuse_compiled(model)
    known = attention_modules(model)
    _check_choice(towers, layers, known.values())
    if norms and reduce is not None:
        raise InputError("norms are known after a call, reduce is called during it: choose one.")
    recorder = _Recorder(known, _Choice(tuple(towers), layers, values, reduce))
    with ExitStack() as stack:
        recorder.recording.rotary = RotaryPositions(model, known)
        recorder.recording.rotary.listen(stack)
        if norms:
            recorder.shares = UpdateShares(model, known)
            recorder.shares.listen(stack)
        for module in known:
            stack.callback(module.register_forward_pre_hook(recorder.open).remove)
            stack.callback(module.register_forward_hook(recorder.close, always_call=True).remove)
        stack.enter_context(tap(recorder))
        stack.callback(recorder.finish)
        yield recorder.recording
    if recorder.recording.unseen:
        raise CaptureError(
            "Every attention layer that runs must be seen. These ran without passing transformers' "
            "attention interface: "
            f"{', '.join(sorted(set(recorder.recording.unseen)))}. Leave out their tower with "
            "towers=, if you don't need it."
        )


@dataclass(frozen=True)
class _Choice:
    towers: tuple[Tower, ...]
    layers: Sequence[int] | None
    values: bool
    reduce: Callable[[AttentionCall], Any] | None

    def wants(self, identity: Identity) -> bool:
        return identity.tower in self.towers and (
            self.layers is None or identity.layer in self.layers
        )


class _Recorder:
    """Hooks and tap listener in one; its state lives as long as one ``with`` block."""

    def __init__(self, known: dict[nn.Module, Identity], choice: _Choice) -> None:
        self.known, self.choice = known, choice
        self.thread = threading.get_ident()  # hooks sit on the model, so they fire for others too
        self.recording = Recording(tuple(known.values()))
        self.running: list[nn.Module] = []
        self.heard: list[int] = []
        self.begun: list[int] = []
        self.counts: dict[nn.Module, int] = {}
        self.kept: list[tuple[AttentionCall, _Cache, int]] = []
        self.caches: dict[nn.Module, _Cache] = {}
        self.masks: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self.shares: UpdateShares | None = None

    def open(self, module: nn.Module, args: Any) -> None:  # noqa: ARG002
        if threading.get_ident() == self.thread:
            self.running.append(module)
            self.heard.append(0)
            self.begun.append(len(self.kept))

    def close(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        if threading.get_ident() != self.thread:
            return
        self.running.pop()
        identity = self.known[module]
        if self.heard.pop() == 0 and output is not None and identity.tower in self.choice.towers:
            self.recording.unseen.append(identity.module)
        start = self.begun.pop()
        new = self.kept[start:]
        if self.shares is not None and new and output is not None:
            shares = self.shares.of(module, output, [call for call, _, _ in new])
            self.kept[start:] = [
                (replace(call, update_share=share), cache, n_keys)
                for (call, cache, n_keys), share in zip(new, shares, strict=True)
            ]

    def before(self, call: RawCall) -> RawCall:
        return call

    def after(self, call: RawCall, output: Tensor) -> Tensor:
        module = (
            call.module if call.module in self.known else self.running[-1] if self.running else None
        )
        if module is None:
            self.recording.unseen.append(
                f"{type(call.module).__name__} (not a module of this model)"
            )
            return output
        if self.heard:
            self.heard[-1] += 1
        identity = self.known[module]
        if self.choice.wants(identity):
            for part in _segments(call):
                self._keep(identity, module, part)
        return output

    def _keep(self, identity: Identity, module: nn.Module, raw: RawCall) -> None:
        number = self.counts.get(module, 0)
        self.counts[module] = number + 1
        call = as_attention_call(raw, identity, number, self._mask(raw))
        if self.choice.reduce is not None:
            self.recording.results.append(self.choice.reduce(call))
            return
        cache = self.caches.get(module)
        if cache is None or not cache.grow(raw):
            cache = self.caches[module] = _Cache(
                _own(raw.key), _own(raw.value) if self.choice.values else None
            )
        self.kept.append(
            (replace(call, q=_own(raw.query), k=None, v=None), cache, raw.key.shape[2])
        )

    def finish(self) -> None:
        """Hand each call its keys, as a view into the cache they are the beginning of."""
        for call, cache, n_keys in self.kept:
            v = None if cache.v is None else cache.v[:, :, :n_keys]
            self.recording.calls.append(replace(call, k=cache.k[:, :, :n_keys], v=v))
        self.kept.clear()

    def _mask(self, raw: RawCall) -> Tensor | None:
        """Layers share one mask tensor: it is read once.

        An additive mask that only hides becomes boolean, a mask of keys gets a row per query.
        """
        if raw.mask is None:
            return None
        key = (id(raw.mask), raw.query.shape[2], raw.options.get("sliding_window"))
        if key not in self.masks:
            whole = _simplify(raw.mask) if raw.mask.ndim > 2 else _rows_of_keys(raw)
            self.masks[key] = (raw.mask, whole)
        return self.masks[key][1]


@dataclass(eq=False)
class _Cache:
    """The keys (and values) of one layer, as far as they are one growing sequence."""

    k: Tensor
    v: Tensor | None

    def grow(self, raw: RawCall) -> bool:
        """Take the longer keys of a later step, if they begin with the ones held."""
        held, new = self.k.shape[2], raw.key.shape[2]
        begins = held + raw.query.shape[2] == new and torch.equal(raw.key[:, :, :held], self.k)
        if begins:
            self.k = _own(raw.key)
            self.v = None if self.v is None else _own(raw.value)
        return begins


def as_attention_call(
    raw: RawCall, identity: Identity, number: int, mask: Tensor | None
) -> AttentionCall:
    """A raw call by its proper names, its tensors as they are."""
    options = raw.options
    sinks = options.get("s_aux") if options.get("s_aux") is not None else options.get("sinks")
    if sinks is None and isinstance(getattr(raw.module, "sinks", None), Tensor):
        sinks = raw.module.sinks
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
        bias=options.get("position_bias"),
        causal=raw.causal and mask is None,
        offset=0 if raw.causal and aligned_left else n_keys - n_queries,
        scaling=raw.scaling,
        softcap=options.get("softcap"),
        sinks=None if sinks is None else sinks.detach(),
        sliding_window=options.get("sliding_window") if raw.causal else None,
    )


def _segments(call: RawCall) -> Iterator[RawCall]:
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


def _rows_of_keys(raw: RawCall) -> Tensor:
    """A mask of keys and what the backend hides by itself, as one mask; queries come last."""
    assert raw.mask is not None
    n_queries, n_keys = raw.query.shape[2], raw.key.shape[2]
    rows = torch.arange(n_queries, device=raw.mask.device)
    window = raw.options.get("sliding_window") if raw.causal else None
    seen = visible_rows(
        None, rows, rows + n_keys - n_queries, n_keys, causal=raw.causal, sliding_window=window
    )
    return seen & raw.mask[:, None, None, -n_keys:].bool()


def _simplify(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return mask != 0
    hidden = mask <= hidden_below(mask.dtype)
    only_hides = bool((hidden | (mask == 0)).all())
    return ~hidden if only_hides else mask.detach()


def _own(t: Tensor) -> Tensor:
    return t.detach().clone(memory_format=torch.contiguous_format)


def refuse_compiled(model: nn.Module) -> None:
    """Raise CaptureError for a model compiled by ``torch.compile``."""
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule) or getattr(
        model, "_compiled_call_impl", None
    ):
        raise CaptureError(
            "A compiled model runs without asking for its attention functions, so nothing could be "
            "heard. "
            "Record the model as it was before torch.compile (model._orig_mod)."
        )


def _check_choice(towers: Sequence[Tower], layers: Sequence[int] | None, known: Any) -> None:
    unknown = [tower for tower in towers if tower not in TOWERS]
    if unknown:
        raise InputError(
            f"towers must be among {', '.join(TOWERS)}; got {', '.join(map(repr, unknown))}."
        )
    if layers is not None:
        there = {identity.layer for identity in known if identity.tower in towers}
        missing = sorted(set(layers) - there)
        if missing:
            raise InputError(
                f"layers must exist in the model. Its {' and '.join(towers)} layers are 0 to "
                f"{max(there, default=-1)}; "
                f"got {', '.join(map(str, missing))}."
            )
