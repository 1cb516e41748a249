"""The recorder: forward hooks say which attention layer is running, the tap says what it was given.

1. Before an attention module runs, its hook opens it; what the tap hears belongs to the innermost
   open module. Modules that pass by the interface are heard by :mod:`xmodal_interp.hooks.bypass`.
2. Each call becomes an :class:`AttentionCall`: operands cloned (a static cache overwrites its keys
   in place), the mask as given.
3. After the module has run, its hook closes it; one that made no call ran unseen, and the recording
   says so.

Keys of a growing cache are kept once: when a call's keys begin with the keys of the call before,
the older call becomes a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, SupportsIndex

import numpy as np
import torch
from torch import Tensor, nn

from xmodal_interp.attention import AttentionCall
from xmodal_interp.errors import CaptureError, InputError
from xmodal_interp.hooks.bypass import Bypass, DenseCall, Heard, multihead_call
from xmodal_interp.hooks.compiled import refuse_compiled, refuse_when_compiled_code_runs
from xmodal_interp.hooks.key_cache import KeptCall, KeyCache, own_copy, seen_keys
from xmodal_interp.hooks.modules import (
    Identity,
    attention_modules,
    identity_of,
    layers_without_matrix,
    module_of,
)
from xmodal_interp.hooks.own_thread import in_this_thread
from xmodal_interp.hooks.reading import as_attention_call, segments, whole_mask
from xmodal_interp.hooks.recording import Choice, Recording
from xmodal_interp.hooks.refusals import check_choice, refuse_replica
from xmodal_interp.hooks.rotary import RotaryPositions
from xmodal_interp.hooks.tapping import RawCall, tap
from xmodal_interp.hooks.updates import UpdateShares
from xmodal_interp.models import VLM
from xmodal_interp.vocabulary import TOWERS, Tower


@contextmanager
def record(
    model: VLM | nn.Module,
    *,
    towers: Sequence[Tower] = TOWERS,
    layers: Sequence[SupportsIndex] | np.ndarray | None = None,
    values: bool = False,
    norms: bool = False,
    reduce: Callable[[AttentionCall], Any] | None = None,
) -> Iterator[Recording]:
    """Record the attention of any transformers model while a ``with`` block runs it.

    Its outputs don't change by a bit.

    Args:
        model: A VLM or any transformers model; its attention backend stays as it is.
        towers: Which towers to keep.
        layers: Which layers to keep (per tower and kind), all if not given.
        values: Keep V too.
        norms: Keep the share of attention in each token's update (``AttentionCall.update_share``).
        reduce: Called with each call instead of keeping it; what it returns goes to ``results``. It
            must not keep the call: its tensors are the model's own.

    Raises:
        CaptureError: Attention ran that could not be heard (raised at the end of the block, unless
            the block itself failed), or the model is compiled, or called from compiled code.
        InputError: No model, ``norms`` together with ``reduce``, or towers or layers that are no
            list or that the model does not have.
        UnsupportedModelError: The model has no attention modules.
    """
    if norms and reduce is not None:
        raise InputError("norms are known after a call, reduce is called during it: choose one.")
    with listening(module_of(model), Choice(towers, layers, values, norms, reduce)) as recording:
        yield recording


@contextmanager
def listening(model: nn.Module, choice: Choice) -> Iterator[Recording]:
    """:func:`record` with all of its choices in one object."""
    refuse_compiled(model)
    known = attention_modules(model)
    check_choice(choice.towers, choice.layers, known.values())
    recorder = _Recorder(model, known, choice)
    with ExitStack() as stack:
        refuse_when_compiled_code_runs(model, known, stack)
        recorder.recording.rotary = RotaryPositions(model, known)
        recorder.recording.rotary.listen(stack)
        if choice.norms:
            recorder.shares = UpdateShares(model, known)
            recorder.shares.listen(stack)
        enter, leave = in_this_thread(recorder.open), in_this_thread(recorder.close)
        for module in known:
            stack.callback(module.register_forward_pre_hook(refuse_replica).remove)
            stack.callback(module.register_forward_pre_hook(enter).remove)
            hook = module.register_forward_hook(leave, with_kwargs=True, always_call=True)
            stack.callback(hook.remove)
        stack.enter_context(tap(recorder))
        stack.callback(recorder.finish)
        yield recorder.recording
    if recorder.recording.unseen:
        raise CaptureError(
            "Every attention layer that runs must be seen. These ran, and neither asked "
            "transformers' attention interface nor called a softmax: "
            f"{', '.join(sorted(set(recorder.recording.unseen)))}. Leave out their tower with "
            "towers=, if you don't need it."
        )


class _Recorder:
    """Hooks and tap listener in one; its state lives as long as one ``with`` block."""

    def __init__(self, model: nn.Module, known: dict[nn.Module, Identity], choice: Choice) -> None:
        self.model, self.known, self.choice = model, known, choice
        self.recording = Recording(tuple(known.values()), layers_without_matrix(model))
        self.running: list[_Run] = []
        self.asking: set[type[nn.Module]] = set()  # classes that ask the interface
        self.counts: dict[nn.Module, int] = {}
        self.kept: list[KeptCall] = []
        self.caches: dict[nn.Module, KeyCache] = {}
        self.masks: dict[tuple[Any, ...], tuple[Tensor, Tensor | None]] = {}
        self.shares: UpdateShares | None = None

    def open(self, module: nn.Module, args: Any) -> None:  # noqa: ARG002
        if _recomputing():
            return
        run = _Run(module, len(self.kept))
        self.running.append(run)
        if type(module) not in self.asking and not isinstance(module, nn.MultiheadAttention):
            run.bypass = Bypass(lambda: module if run.inside == 0 else None, run.aside.append)
            run.bypass.begin()

    def close(self, module: nn.Module, args: Any, options: dict[str, Any], output: Any) -> None:
        opened = bool(self.running) and self.running[-1].module is module
        if _recomputing() or not opened:  # closed though it was refused, so never opened
            return
        run = self.running.pop()
        if run.bypass is not None:
            run.bypass.end()
        if output is None:  # it failed
            return
        wanted = self.choice.wants(self.known[module])
        if wanted and isinstance(module, nn.MultiheadAttention) and run.n_heard == 0:
            run.aside.append(multihead_call(module, args, options))
        if run.n_heard == 0:
            for heard in run.aside:
                self._keep(module, heard)
            if wanted and not run.aside:
                self.recording.unseen.append(self.known[module].module)
        new = self.kept[run.start :]
        if self.shares is not None and new:
            shares = self.shares.of(module, output, [kept.call for kept in new])
            for kept, share in zip(new, shares, strict=True):
                kept.call = replace(kept.call, update_share=share)

    def before(self, call: RawCall) -> RawCall:
        if self.running:
            self.running[-1].inside += 1
        return call

    def after(self, call: RawCall, output: Tensor) -> Tensor:
        if _recomputing():
            return output
        run = self.running[-1] if self.running else None
        if run is not None:
            run.n_heard += 1
            self.asking.add(type(run.module))
        module = call.module if run is None or call.module in self.known else run.module
        if module not in self.known:
            self._take_in(module)
        if module in self.known:
            for part in segments(call):
                whole = part is call
                self._keep(module, replace(part, output=output.detach() if whole else None))
        if run is not None:
            run.inside -= 1
        return output

    def _take_in(self, module: nn.Module) -> None:
        """A module that asked for attention, though its class is not named so."""
        identity = identity_of(self.model, module, self.known.values())
        if identity is None:
            self.recording.unseen.append(f"{type(module).__name__} (not a module of this model)")
        else:
            self.known[module] = identity
            self.recording.modules = tuple(self.known.values())

    def _keep(self, module: nn.Module, heard: Heard) -> None:
        identity = self.known[module]
        if not self.choice.wants(identity):
            return
        number = self.counts.get(module, 0)
        self.counts[module] = number + 1
        call = (
            _dense_call(heard, identity, number)
            if isinstance(heard, DenseCall)
            else as_attention_call(heard, identity, number, self._mask(heard))
        )
        if self.choice.inspect is not None:
            self.choice.inspect(heard, call)
        if self.choice.reduce is not None:
            device = (heard.probs if isinstance(heard, DenseCall) else heard.query).device.type
            with torch.autocast(device, enabled=False):  # the model's own, not of what is read off
                self.recording.results.append(self.choice.reduce(call))
        elif isinstance(heard, DenseCall):
            self.kept.append(KeptCall(call))
        else:
            cache = self.caches.get(module)
            mask = self._mask(heard)
            if cache is None or not cache.grow(heard, mask):
                values = own_copy(heard.value) if self.choice.values else None
                cache = KeyCache(own_copy(heard.key), values, seen_keys(mask))
                self.caches[module] = cache
            without_keys = replace(call, q=own_copy(heard.query), k=None, v=None)
            self.kept.append(KeptCall(without_keys, cache, heard.key.shape[2]))

    def finish(self) -> None:
        """Hand each call its keys, as a view into the cache they are the beginning of."""
        self.recording.calls += [kept.whole() for kept in self.kept]
        self.kept.clear()

    def _mask(self, raw: RawCall) -> Tensor | None:
        """Layers share one mask tensor: it is read once."""
        if raw.mask is None:
            return None
        key = (id(raw.mask), raw.query.shape[2], raw.options.get("sliding_window"))
        if key not in self.masks:
            self.masks[key] = (raw.mask, whole_mask(raw))
        return self.masks[key][1]


@dataclass(eq=False)
class _Run:
    """One attention module at work.

    Attributes:
        module: The module.
        start: How many calls had been kept before.
        n_heard: Calls through the interface.
        inside: Whether the interface's function is running.
        aside: What was heard beside the interface; it counts if the interface was never asked.
        bypass: The listener to torch functions, if there is one.
    """

    module: nn.Module
    start: int
    n_heard: int = 0
    inside: int = 0
    aside: list[Heard] = field(default_factory=list)
    bypass: Bypass | None = None


def _dense_call(heard: DenseCall, identity: Identity, number: int) -> AttentionCall:
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


def _recomputing() -> bool:
    return torch._C._current_graph_task_id() != -1
