"""The recorder: observe the attention modules of a model while it runs, and record their calls.

1. **Enter.** A forward pre-hook starts a :class:`ModuleRun`; runs are nested like the modules. A
   hook would change the results of torch's own attention modules, so their ``forward`` is wrapped
   instead (:mod:`xmodal_interp.hooks.compiled`).
2. **Observe.** A module makes its attention calls in one of three ways, which have a file each:
   transformers' interface (:mod:`xmodal_interp.hooks.attention_interface`), a function of torch
   (:mod:`xmodal_interp.hooks.torch_attention`), or an inline softmax
   (:mod:`xmodal_interp.hooks.inline_attention`). Which one is not known before a module has run, so
   all three are observed. Calls that bypass the interface are kept only if the same run makes no
   call through it. After one module of a class has used the interface, the others are not
   observed for inline softmaxes, which would cost time.
3. **Exit.** A forward hook ends the run. If neither the module nor an attention module around it
   made a call, its name is added to ``Recording.unseen``, and an error is raised at the end of the
   block.
4. **Keep.** Each call becomes an :class:`AttentionCall`, whose probabilities are compared with the
   output of the attention function (:mod:`xmodal_interp.hooks.probability_check`). The call is
   passed to ``reduce``, or it is kept. Operands that are kept are cloned, because a static cache is
   overwritten in place; the keys of a growing cache are kept once
   (:mod:`xmodal_interp.hooks.key_cache`). If statistics are asked for by name, they are computed
   at once and kept instead of the operands.
5. **Finish.** At the end of the block the calls get their keys, and errors are raised.

An error of the recorder never stops the model's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, SupportsIndex

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from xmodal_interp.arguments import list_if_iterator
from xmodal_interp.attention import AttentionCall
from xmodal_interp.attention.kernels import full_precision
from xmodal_interp.attention.statistics import FIELDS, Labels, reduced
from xmodal_interp.contexts import Block, own_context
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.hooks.attention_interface import tap
from xmodal_interp.hooks.attention_modules import Identity, module_of
from xmodal_interp.hooks.compiled import (
    observe_unhooked,
    refuse_compiled,
    refuse_when_compiled_code_runs,
    replaced_forward,
)
from xmodal_interp.hooks.inline_attention import (
    OBSERVED,
    FunctionMode,
    ObservedCall,
    SoftmaxCall,
    inline_call,
    note_mixing,
    refuse_mixture,
)
from xmodal_interp.hooks.key_cache import KeptCall, KeyCache, own_copy, seen_keys, thin
from xmodal_interp.hooks.known_modules import (
    KnownModules,
    in_continuous_batching,
    is_running,
    named_callers,
)
from xmodal_interp.hooks.position_ids import RotaryPositions
from xmodal_interp.hooks.probability_check import ProbabilityCheck
from xmodal_interp.hooks.raw_calls import (
    RawCall,
    as_attention_call,
    as_computed,
    changed,
    dense_mask,
    segments,
    whole_mask,
)
from xmodal_interp.hooks.recorded_samples import recorded_sample
from xmodal_interp.hooks.refusals import (
    chosen_layers,
    refuse_another_thread,
    refuse_failure,
    refuse_replica,
    refuse_split,
    refuse_unseen,
    refuse_vmap,
)
from xmodal_interp.hooks.torch_attention import (
    SCALED_DOT_PRODUCT,
    is_torch_attention,
    kernel_call,
    multihead_call,
    observe_torch_attention,
    unhooked_modules,
)
from xmodal_interp.hooks.update_norms import UpdateShares
from xmodal_interp.models import VLM, ImageLike
from xmodal_interp.models.model_parts import ModelParts, parts_of
from xmodal_interp.sample import Sample
from xmodal_interp.upstream import is_recomputing
from xmodal_interp.vocabulary import TOWERS, Tower


@dataclass(eq=False)
class Recording:
    """The result of :func:`record`.

    Attributes:
        calls: Every call, in the order in which the model made them; set at the end of the block.
        results: The results of ``reduce``, one per call, if it was a function (``calls`` is then
            empty).
        modules: Every attention module that is recorded.
        without_matrix: Layers that mix tokens without softmax attention: linear attention, state
            spaces, convolutions.
        unseen: Names of modules that ran without a recorded call.
        rotary: Position ids that the rotary embedding of the language tower received; None if it
            has none; set at the end of the block.
    """

    modules: tuple[Identity, ...]
    without_matrix: tuple[Identity, ...] = ()
    calls: list[AttentionCall] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    rotary: Int[Tensor, "axis sample position"] | None = None

    def __repr__(self) -> str:
        """Return a line with the numbers of calls and modules."""
        found = {
            "calls": self.calls,
            "results": self.results,
            "attention modules": self.modules,
            "layers without softmax attention": self.without_matrix,
            "modules without a recorded call": self.unseen,
        }
        shown = [f"{len(of)} {name}" for name, of in found.items() if of or name == "calls"]
        return f"Recording({', '.join(shown)})"

    def sample(
        self,
        image: ImageLike,
        *,
        grid: tuple[int, int],
        before: Sequence[str] = (),
        after: Sequence[str] = (),
        box: tuple[float, float, float, float] | None = None,
        index: int = 0,
        name: str = "sample-0",
    ) -> Sample:
        """Return a sample of the calls of a vision model, such as one of timm or open_clip.

        ``xi.capture`` does this for the vision models of transformers without these arguments.

        Args:
            image: The image that the model read, in any form that ``xi.capture`` takes.
            grid: Number of rows and of columns of the patches, which are row by row.
            before: Names of the positions before the patches, in order, such as ``["class"]``.
            after: Names of the positions after the patches.
            box: The part of the image that the pixels show, ``(x0, y0, x1, y1)`` in pixels of the
                image; the whole image if not given.
            index: Index of the image in the batch.
            name: Name of the sample.

        Raises:
            CaptureError: No call of a vision tower was recorded, or a layer ran several times.
            GeometryError: A self-attention layer has another number of positions.
            InputError: An argument is invalid.
        """
        return recorded_sample(
            self, image, grid=grid, before=before, after=after, box=box, index=index, name=name
        )


@dataclass(frozen=True)
class Statistics:
    """The statistics that are kept instead of queries and keys.

    Attributes:
        names: ``"mass"``, ``"entropy"`` or ``"received"``.
        label: Returns the groups of keys and the counted queries of a call; None for one group and
            all queries. If it is given, decode steps can be joined: some numbers of each key are
            kept until then.
    """

    names: tuple[str, ...]
    label: Callable[[AttentionCall], Labels] | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in FIELDS]
        if unknown or not self.names:
            raise InputError(
                f"Statistics must be among {', '.join(map(repr, FIELDS))}; got "
                f"{', '.join(map(quoted, unknown)) or 'none'}."
            )

    def of(self, call: AttentionCall) -> AttentionCall:
        """Return the call with its statistics."""
        return reduced(call, self.names, None if self.label is None else self.label(call))


@dataclass(frozen=True)
class Settings:
    """The settings of a recording: the arguments of :func:`record`, and three more.

    ``statistics`` are kept instead of q and k. ``inspect`` is called with every observed call,
    whose tensors belong to the model, and with the :class:`AttentionCall` made from it. ``refuse``
    is whether an error is raised if the probabilities of a call do not give its output
    (:mod:`xmodal_interp.hooks.probability_check`).
    """

    towers: Sequence[Tower] = TOWERS
    layers: SupportsIndex | Collection[Any] | np.ndarray | Tensor | None = None
    values: bool = False
    norms: bool = False
    reduce: Callable[[AttentionCall], Any] | None = None
    statistics: Statistics | None = None
    inspect: Callable[[ObservedCall, AttentionCall], None] | None = None
    refuse: bool = True

    def include(self, identity: Identity) -> bool:
        """Return whether a layer is to be recorded."""
        if identity.tower not in self.towers:
            return False
        layers: Any = self.layers  # of chosen_layers
        named = (identity.tower, identity.kind, identity.layer)
        return layers is None or identity.layer in layers or named in layers


def record(
    model: VLM | nn.Module,
    *,
    towers: Iterable[Tower] = TOWERS,
    layers: SupportsIndex | Iterable[Any] | np.ndarray | Tensor | None = None,
    values: bool = False,
    norms: bool = False,
    reduce: Callable[[AttentionCall], Any] | str | Iterable[str] | None = None,
) -> AbstractContextManager[Recording]:
    """Record the attention of any transformers model while it runs inside a ``with`` block.

    The outputs of the model are bit-identical to those without recording. Only forwards in the
    thread (or asyncio task) that enters the block are recorded. If the model runs in another
    thread, enter the block in the function of that thread. Attention of other models that run
    inside the block is not recorded. In a module whose class name does not contain "attention", a
    call of ``scaled_dot_product_attention`` is recorded, but an inline softmax is not;
    :func:`doctor` reports such modules.

    Args:
        model: A VLM or any transformers model, with any attention backend.
        towers: Towers to record.
        layers: Layers to record in each tower and kind, all if not given. Negative numbers count
            from the last layer of each; a boolean mask has an entry for each layer.
        values: Also keep V.
        norms: Keep the share of attention in each token's update (``AttentionCall.update_share``)
            and the norm of each token's hidden state (``AttentionCall.token_norm``).
        reduce: Called with each call, which is then not kept; its result is added to ``results``.
            It must not store the call, because the tensors of the call belong to the model. Or
            ``"entropy"``, ``"received"`` or both in a list: ``calls`` then hold these statistics
            instead of q and k, in memory linear in the length.

    Raises:
        CaptureError: The model is compiled, or is called from compiled code. At the end of the
            block, unless the block itself failed: attention could not be recorded, recorded
            probabilities do not give the output of the attention function, or the model ran only in
            other threads. Errors of the recording or of ``reduce`` do not stop the model's forward;
            they are also raised at the end of the block.
        InputError: ``model`` is not a model, ``reduce`` is neither a function nor a statistic, is
            a function together with ``norms``, or a statistic together with ``values``, or towers
            or layers are not a list or do not exist in the model.
        UnsupportedModelError: The model has no attention modules, or its layers are split over
            processes.
    """
    function = reduce if callable(reduce) else None
    if norms and function is not None:
        raise InputError(
            "Got norms=True and reduce=, but norms are known only after reduce is called. Pass one "
            "of them."
        )
    statistics = None if function is not None or reduce is None else _named(reduce, values=values)
    settings = Settings(
        list_if_iterator(towers), list_if_iterator(layers), values, norms, function, statistics
    )
    return record_with(settings, module_of(model))


def _named(names: Any, *, values: bool) -> Statistics:
    """Return the statistics of ``reduce``, given by name."""
    if values:
        raise InputError(
            "Got values=True and reduce= with statistics, which are kept instead of q, k and v. "
            "Pass one of them."
        )
    listed = (names,) if isinstance(names, str) else names
    if not isinstance(listed, Iterable):
        raise InputError(f"reduce must be a function or names of statistics; got {quoted(names)}.")
    chosen = tuple(listed)
    if "mass" in chosen:
        raise InputError(
            "reduce='mass' requires groups of keys, which a model without processor does not have. "
            "Pass a function, such as lambda call: call.mass(groups), or capture with "
            "Keep(statistics=['mass'])."
        )
    return Statistics(chosen)


def record_with(settings: Settings, model: nn.Module) -> Block[Recording]:
    """Return the ``with`` block of :func:`record` with these settings."""
    return Block(partial(_record, settings, model))


def _record(settings: Settings, model: nn.Module, stack: ExitStack) -> Recording:
    parts = parts_of(model)
    refuse_compiled(parts.modules)
    refuse_split(parts.modules.values())
    known = KnownModules(parts)
    chosen = chosen_layers(settings.towers, settings.layers, known.identities.values())
    recorder = _Recorder(parts, known, replace(settings, layers=chosen))
    stack.push(recorder.refuse)
    unhooked = unhooked_modules(parts.modules.values())
    refuse_when_compiled_code_runs(model, known.identities, unhooked, stack)
    recorder.register(model, unhooked, stack)
    stack.callback(recorder.finish)
    return recorder.recording


@dataclass(eq=False)
class ModuleRun:
    """One run of an attention module.

    Attributes:
        module: The module: a recorded module or a holder of one.
        n_kept_before: The number of calls that the recorder had kept before this run.
        observes_inline: Whether torch functions are observed, for an inline softmax.
        n_recorded: The number of calls that were recorded when they were made; counted for
            recorded modules only.
        depth: The number of functions of the interface that are running.
        bypassed: Calls that bypass the interface. They are recorded at the end of the run if
            ``n_recorded`` is 0.
        without_calls: Names of attention modules without a recorded call in this run, which may be
            the module itself.
        recorded_inside: Whether any call was recorded during the run.
    """

    module: nn.Module
    n_kept_before: int
    observes_inline: bool
    n_recorded: int = 0
    depth: int = 0
    bypassed: list[ObservedCall] = field(default_factory=list)
    without_calls: list[str] = field(default_factory=list)
    recorded_inside: bool = False

    @property
    def made_calls(self) -> bool:
        """Whether the module itself made a call."""
        return bool(self.n_recorded or self.bypassed)


P = ParamSpec("P")
_is_recording: ContextVar[bool] = ContextVar("xmodal_interp_is_recording", default=False)


def _is_nested() -> bool:
    """Return whether two of the functions that ``_recording`` returns are on the call stack."""
    names = (name for caller, name in named_callers() if isinstance(caller, _Recorder))
    return list(names).count("safe") > 1


def _recording(method: Callable[Concatenate[_Recorder, P], None]) -> Callable[..., None]:
    """Store an exception of a recorder method instead of raising it inside the model's forward.

    It is raised at the end of the block. Torch functions that the method calls are not recorded:
    ``reduce`` may call the same functions as the model. An interrupt can leave the context variable
    set, so the call stack decides whether such a method is running.
    """

    @wraps(method)
    def safe(self: _Recorder, *args: P.args, **options: P.kwargs) -> None:
        if self.failure is not None:
            self.mode.end()
        elif not (_is_recording.get() and _is_nested()):
            _is_recording.set(True)
            try:
                method(self, *args, **options)
            except Exception as error:  # noqa: BLE001  any error: the forward continues
                self.failure = error
            finally:
                _is_recording.set(False)

    return safe


class _Recorder:
    """The hooks and observers of one ``with`` block, and their state."""

    def __init__(self, parts: ModelParts, known: KnownModules, settings: Settings) -> None:
        self.known, self.settings = known, settings
        modules = tuple(known.identities.values())
        self.recording = Recording(modules, known.without_matrix)
        named = {**known.identities, **known.holders}
        self.shares = UpdateShares(parts.model, named) if settings.norms else None
        # Modules of one class share an implementation, unless their forward was replaced.
        self.implementation_of = {m: m if replaced_forward(m) else type(m) for m in named}
        self.uses_interface: set[nn.Module | type[nn.Module]] = set()
        self.mode = FunctionMode(after=self.observe_function, only=OBSERVED)
        self.running: list[ModuleRun] = []
        self.n_torch_modules = 0  # number of torch's own attention modules that are running
        self.empty_holders: set[nn.Module] = set()  # ran without a recorded call inside
        self.counts: dict[nn.Module, int] = {}
        self.kept: list[KeptCall] = []
        self.latest: dict[nn.Module, KeptCall] = {}  # only if statistics are kept
        self.caches: dict[nn.Module, KeyCache] = {}
        self.masks: dict[tuple[Any, ...], tuple[Tensor, Tensor | None]] = {}
        self.block_masks: dict[int, tuple[BlockMask, Tensor]] = {}
        self.check = ProbabilityCheck()
        self.positions = RotaryPositions(parts.modules, modules)
        self.ran = self.ran_elsewhere = self.ran_in_batches = False
        self.failure: Exception | None = None  # the first error, raised at the end of the block
        self.reduce_failed = False  # whether ``reduce`` raised it

    def register(self, model: nn.Module, unhooked: set[nn.Module], stack: ExitStack) -> None:
        """Register all hooks and observers until the stack is closed."""
        self.positions.register(stack)
        if self.shares is not None:
            self.shares.register(stack)
        own = stack.enter_context(own_context(elsewhere=self.note_elsewhere))
        enter, leave = own(self.enter), own(self.exit)
        for module in dict.fromkeys((model, *self.known.identities, *self.known.holders)):
            if module not in unhooked:
                stack.callback(module.register_forward_pre_hook(refuse_replica).remove)
                stack.callback(module.register_forward_pre_hook(enter).remove)
                hook = module.register_forward_hook(leave, with_kwargs=True, always_call=True)
                stack.callback(hook.remove)
        observe_unhooked(self.enter, self.exit, stack)
        tap(self, stack)
        observe_torch_attention(self.observe_kernel, stack)

    def note_elsewhere(self) -> None:
        """Note that a module runs in another thread than that of the block."""
        self.ran_elsewhere = True
        self.ran_in_batches |= in_continuous_batching()

    # 1. Enter

    @_recording
    def enter(self, module: nn.Module, args: Any) -> None:  # noqa: ARG002
        """Start a run; called before a module runs."""
        self.ran = True
        self.n_torch_modules += is_torch_attention(module)
        if not is_recomputing() and module in self.known:
            while self.running and not self._is_active(self.running[-1], module):
                self.running.pop()
            if self.shares is not None:
                self.shares.pause()
            may_be_inline = self.implementation_of[module] not in self.uses_interface
            observes = may_be_inline and not is_torch_attention(module)
            self.running.append(ModuleRun(module, len(self.kept), observes))
        self._switch_mode()

    @staticmethod
    def _is_active(run: ModuleRun, inner: nn.Module) -> bool:
        """Return whether a run is still active when an inner module is entered.

        It is not active after an interrupt, because torch then does not call its forward hook.
        """
        parts = run.module.modules()
        inside = inner is not run.module and any(part is inner for part in parts)
        return inside or is_running(run.module)

    def _switch_mode(self) -> None:
        """Observe torch functions if the innermost module may compute its attention inline.

        Functions of the interface run without the mode, because torch.compile, which flex attention
        uses, would trace it. Torch's own modules run without it, because it would change their
        results.
        """
        run = self.running[-1] if self.running else None
        inline = run is not None and run.observes_inline and run.depth == 0
        if inline and self.n_torch_modules == 0 and self.failure is None:
            self.mode.begin()
        else:
            self.mode.end()

    # 2. Observe

    def before(self, call: RawCall) -> RawCall:
        """Note that a function of the interface runs; called by the tap."""
        if self.running:
            self.running[-1].depth += 1
            self.mode.end()
        return call

    def after(self, call: RawCall, output: Tensor) -> Tensor:
        """Record a call of the interface; called by the tap."""
        self.observe_interface(call)
        if self.running:
            self.running[-1].depth -= 1
            self._switch_mode()
        return output

    @_recording
    def observe_interface(self, call: RawCall) -> None:
        """Record a call of transformers' interface."""
        if is_recomputing():
            return
        run = self.running[-1] if self.running else None
        owner = self.known.owner_of_interface_call(call.module, None if run is None else run.module)
        if owner is None:
            return
        if run is not None:
            run.recorded_inside = True
            if run.module in self.known.identities:
                run.n_recorded += 1
                run.observes_inline = False  # its other calls are not kept
                self.uses_interface.add(self.implementation_of[run.module])
        for part in segments(call):
            self._keep(owner, part)

    @_recording
    def observe_kernel(
        self, function: str, args: tuple[Any, ...], options: Mapping[str, Any], output: Any
    ) -> None:
        """Record a call of one of torch's attention functions by any module."""
        run = self.running[-1] if self.running else None
        if is_recomputing() or (run is not None and run.depth):
            return
        is_recorded_module = run is not None and run.module in self.known.identities
        if function == SCALED_DOT_PRODUCT and run is not None:
            if run.observes_inline:  # the mode observes the call too
                return
            if is_recorded_module:
                run.bypassed.append(kernel_call(run.module, args, options, output))
                return
        owner = self.known.owner_of_kernel_call()
        if owner is None:
            return
        if run is not None:
            run.recorded_inside = True
            run.n_recorded += is_recorded_module and function != SCALED_DOT_PRODUCT
        if function == SCALED_DOT_PRODUCT:
            self._keep(owner, kernel_call(owner, args, options, output))
        elif self.settings.include(self.known.identity(owner)):
            self._keep(owner, multihead_call(owner, function, args, options))
        else:
            self.known.called.add(owner)

    @_recording
    def observe_function(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        options: Mapping[str, Any],
        output: Any,
    ) -> None:
        """Note an inline softmax of the innermost module; called for each of ``OBSERVED``."""
        run = self.running[-1]
        call = inline_call(run.module, function, args, options, output)
        if call is not None:
            run.bypassed.append(call)
        else:
            note_mixing(run.bypassed, function, args, options)

    # 3. Exit

    @_recording
    def exit(self, module: nn.Module, args: Any, options: dict[str, Any], output: Any) -> None:
        """End a run; called after a module has run. The output is None if it failed."""
        self.n_torch_modules -= is_torch_attention(module)
        was_entered = bool(self.running) and self.running[-1].module is module
        if was_entered and not is_recomputing():
            run = self.running.pop()
            self.mode.end()
            if output is not None:
                self._end(run, [*args, *options.values()], output)
        self._switch_mode()

    def _end(self, run: ModuleRun, given: Sequence[Any], output: Any) -> None:
        """Keep the calls that bypassed the interface, and note whether calls are missing."""
        identity = self.known.identity(run.module)
        if run.recorded_inside and run.module not in self.known.identities:
            run.bypassed = [each for each in run.bypassed if isinstance(each, RawCall)]
        if run.n_recorded == 0:
            if self.settings.include(identity):
                refuse_mixture(identity.module, run.bypassed)
            for call in run.bypassed:
                self._keep(self.known.add(run.module), call)
        self._note_missing(run, identity)
        if self.shares is not None:
            new = self.kept[run.n_kept_before :] if run.made_calls else ()
            self.shares.resume(run.module, given, output, new)

    def _note_missing(self, run: ModuleRun, identity: Identity) -> None:
        """Note the modules of a run that made no recorded call."""
        included = self.settings.include(identity)
        if run.made_calls:
            run.recorded_inside = True
            run.without_calls.clear()  # inner modules without calls are helpers of this one
        elif run.module in self.known.identities:
            run.without_calls += [identity.module] * included
        elif run.recorded_inside:
            self.uses_interface.add(self.implementation_of[run.module])
        elif included:
            self.empty_holders.add(run.module)
        if self.running:
            self.running[-1].recorded_inside |= run.recorded_inside
            self.running[-1].without_calls += run.without_calls
        else:
            self.recording.unseen += run.without_calls

    # 4. Keep

    @torch.no_grad()  # tensors saved by autograd here would break recomputation of checkpoints
    def _keep(self, module: nn.Module, observed: ObservedCall) -> None:
        identity = self.known.identities[module]
        self.known.called.add(module)
        if not self.settings.include(identity):
            return
        refuse_vmap()
        number = self.counts.get(module, 0)
        self.counts[module] = number + 1
        if isinstance(observed, SoftmaxCall):
            call = observed.as_attention_call(identity, number)
        else:
            observed = as_computed(self._with_dense_mask(observed))
            call = as_attention_call(observed, identity, number, self._mask(observed))
            call = self.check.checked(observed, call)
        if self.settings.inspect is not None:
            self.settings.inspect(observed, call)
        if self.settings.reduce is not None:
            with full_precision():  # the model's autocast must not apply to ``reduce``
                self.recording.results.append(self._reduced(call, self.settings.reduce))
        elif self.settings.statistics is not None:
            with full_precision():
                self._keep_statistics(module, observed, call, self.settings.statistics)
        elif isinstance(observed, SoftmaxCall):
            self.kept.append(KeptCall(call))
        else:
            cache, _ = self._cache(module, observed, call.mask)
            without_keys = changed(call, q=own_copy(observed.query), k=None, v=None)
            self.kept.append(KeptCall(without_keys, cache, observed.key.shape[2]))

    def _cache(
        self, module: nn.Module, observed: RawCall, mask: Tensor | None
    ) -> tuple[KeyCache, bool]:
        """Return a cache with the keys of a call, and whether it is that of the call before."""
        cache = self.caches.get(module)
        if cache is not None and cache.grow(observed, mask):
            return cache, True
        values = observed.value if self.settings.values else None
        self.caches[module] = KeyCache(observed.key, values, seen_keys(mask))
        return self.caches[module], False

    def _keep_statistics(
        self, module: nn.Module, observed: ObservedCall, call: AttentionCall, statistics: Statistics
    ) -> None:
        kept = KeptCall(statistics.of(call))
        if statistics.label is not None and isinstance(observed, RawCall):
            if call.tower == "language":
                kept.cache, grown = self._cache(module, thin(observed), call.mask)
                kept.n_keys = call.n_keys
                if grown and call.n_samples == 1:  # in a batch, samples end at different steps
                    kept.add_received(self.latest[module])
            self.latest[module] = kept
        self.kept.append(kept)

    def _reduced(self, call: AttentionCall, reduce: Callable[[AttentionCall], Any]) -> Any:
        try:
            return reduce(call)
        except Exception:
            self.reduce_failed = True
            raise

    def _with_dense_mask(self, raw: RawCall) -> RawCall:
        """Convert the mask function of flex attention to a tensor, once for all layers."""
        given: Any = raw.mask
        if not isinstance(given, BlockMask):
            return raw
        if id(given) not in self.block_masks:
            self.block_masks[id(given)] = (given, dense_mask(given, raw.query.device))
        mask = self.block_masks[id(given)][1]
        return replace(raw, mask=mask[..., : raw.query.shape[2], : raw.key.shape[2]])

    def _mask(self, raw: RawCall) -> Tensor | None:
        """Return the mask of a call with a row per query; a mask that layers share is made once."""
        if raw.mask is None:
            return None
        key = (id(raw.mask), raw.query.shape[2], raw.backend, raw.options.get("sliding_window"))
        if key not in self.masks:
            self.masks[key] = (raw.mask, whole_mask(raw))
        return self.masks[key][1]

    # 5. Finish

    def finish(self) -> None:
        """Give each call its keys, as views of the cache, and complete the recording."""
        self.mode.end()
        for cache in {id(kept.cache): kept.cache for kept in self.kept}.values():
            if cache is not None:
                cache.trim()
        self.recording.calls += [kept.whole() for kept in self.kept]
        self.kept.clear()
        self.recording.unseen += self.known.missed_among(self.empty_holders)
        self.recording.modules = tuple(self.known.identities.values())
        self.recording.rotary = self.positions.whole()

    def refuse(self, failure: type[BaseException] | None, *_: object) -> None:
        """Raise CaptureError for missed or wrong attention, unless the block itself failed."""
        if failure is not None:
            return
        if self.failure is not None:
            refuse_failure(self.failure, of_reduce=self.reduce_failed)
        refuse_unseen(self.recording.unseen)
        if self.settings.refuse:
            self.check.refuse()
        if self.shares is not None:
            self.shares.check()
        if self.ran_elsewhere and not self.ran:
            refuse_another_thread(in_batches=self.ran_in_batches)
