"""The recorder: forward hooks track which attention module runs, and the tap records its calls.

1. A forward pre-hook notes that an attention module is entered. Calls that the tap observes belong
   to the innermost entered module. Modules that bypass the interface are recorded by
   :mod:`xmodal_interp.hooks.bypass`; attention modules whose class name does not contain
   "attention" are recorded when they call torch's kernel.
2. Each call becomes an :class:`AttentionCall`. Its operands are cloned, because a static cache
   overwrites its keys in place.
3. A forward hook notes that the module is exited. If it made no recorded call, its name is added to
   ``Recording.unseen``, and an error is raised at the end of the block.

Keys of a growing cache are kept once: if a call's keys begin with the keys of the previous call,
the previous call becomes a view.

The settings and the result of a recording.

One run of an attention module, from its forward pre-hook to its forward hook.

The attention modules of a recorded model: known by name, or discovered while it runs.

A module that is not recognised by name is discovered when it uses transformers' attention interface
or calls torch's kernel. This includes modules that contain another attention module.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, wraps
from typing import Any, Concatenate, ParamSpec

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import GenerationMixin

from xmodal_interp.arguments import list_if_iterator
from xmodal_interp.attention import AttentionCall
from xmodal_interp.attention.kernels import full_precision
from xmodal_interp.contexts import Block, own_context
from xmodal_interp.errors import InputError
from xmodal_interp.hooks.agreement import Agreement
from xmodal_interp.hooks.attention_modules import (
    Identity,
    attention_holders,
    attention_modules,
    block_of,
    identity_of,
    in_continuous_batching,
    is_running,
    layers_without_matrix,
    module_of,
    named_callers,
    weighs_no_tokens,
)
from xmodal_interp.hooks.bypass import Bypass, DenseCall, Heard, kernel_call
from xmodal_interp.hooks.compiled import (
    QuietCalls,
    quiet_calls,
    refuse_compiled,
    refuse_when_compiled_code_runs,
    replaced_forward,
)
from xmodal_interp.hooks.interface_calls import (
    as_attention_call,
    as_computed,
    as_dense_call,
    dense_mask,
    segments,
    whole_mask,
)
from xmodal_interp.hooks.key_cache import KeptCall, KeyCache, own_copy, seen_keys
from xmodal_interp.hooks.position_ids import RotaryPositions
from xmodal_interp.hooks.refusals import (
    ReduceError,
    chosen_layers,
    refuse_another_thread,
    refuse_failure,
    refuse_mixture,
    refuse_replica,
    refuse_split,
    refuse_unseen,
    refuse_vmap,
)
from xmodal_interp.hooks.tap import RawCall, WrappedFunction, tap
from xmodal_interp.hooks.torch_attention import (
    SCALED_DOT_PRODUCT,
    is_torchs,
    kernel_calls,
    multihead_call,
    quiet_modules,
)
from xmodal_interp.hooks.update_norms import UpdateShares
from xmodal_interp.models import VLM
from xmodal_interp.vocabulary import TOWERS, Tower


@dataclass(eq=False)
class Recording:
    """The result of :func:`record`.

    Attributes:
        calls: Every call, in the order in which the model made them; set at the end of the block.
        results: The results of ``reduce``, one per call, if it was given (``calls`` is then empty).
        modules: Every attention module that is recorded.
        without_matrix: Layers that mix tokens without softmax attention: linear attention, state
            spaces, convolutions.
        unseen: Names of modules that ran without a recorded call.
        rotary: Position ids that the rotary embedding of the language tower received.
        agreement: The comparison of recorded probabilities with the model's outputs.
    """

    modules: tuple[Identity, ...]
    without_matrix: tuple[Identity, ...] = ()
    calls: list[AttentionCall] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    rotary: RotaryPositions | None = None
    agreement: Agreement = field(default_factory=Agreement)


@dataclass(frozen=True)
class Choice:
    """The settings of a recording: the arguments of :func:`record`, and two more.

    ``inspect`` is called with every raw call, whose tensors belong to the model, and with the
    :class:`AttentionCall` made from it. ``refuse`` is whether an error is raised if the
    probabilities of a call do not give its output (see :mod:`xmodal_interp.hooks.agreement`).
    """

    towers: Sequence[Tower] = TOWERS
    layers: Collection[Any] | np.ndarray | Tensor | None = None
    values: bool = False
    norms: bool = False
    reduce: Callable[[AttentionCall], Any] | None = None
    inspect: Callable[[Heard, AttentionCall], None] | None = None
    refuse: bool = True

    def wants(self, identity: Identity) -> bool:
        """Whether a layer is to be recorded."""
        return identity.tower in self.towers and (
            self.layers is None or identity.layer in self.layers
        )


@dataclass(eq=False)
class Run:
    """One run of an attention module.

    Attributes:
        module: The module: a known attention module or a holder of one.
        start: The number of calls that were kept before this run.
        n_heard: The number of recorded calls through the interface.
        inside: The number of functions of the interface that are running, 0 if none.
        aside: Bypassed calls, recorded outside the interface; they are kept only if the run made no
            call through the interface.
        silent: Names of attention modules in this run (itself included) without a recorded call.
        heard_inside: Whether any call was recorded during the run.
        bypass: The function mode that observes torch functions, or None.
    """

    module: nn.Module
    start: int
    n_heard: int = 0
    inside: int = 0
    aside: list[Heard] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    heard_inside: bool = False
    bypass: Bypass | None = None


_FORWARD = ("forward", "_call_impl")  # functions that run during a call of a module


class Members:
    """The attention modules of a model.

    Attributes:
        known: The modules that are recorded, with their identities; discovered ones are added.
        holders: Modules named attention that contain a known module, with its identity.
        heard: Known modules that made a recorded call.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.known = attention_modules(model)
        self.holders = attention_holders(model, self.known)
        self.heard: set[nn.Module] = set()

    def identity(self, module: nn.Module) -> Identity:
        """Return the identity of a known module or a holder."""
        return self.known[module] if module in self.known else self.holders[module]

    def listens_to(self, module: nn.Module) -> bool:
        """Whether a module is a known attention module or a holder of one."""
        return module in self.known or module in self.holders

    def silent_among_heard(self, hollow: Collection[nn.Module]) -> list[str]:
        """Return the names of holders that ran without a recorded call, although they should have.

        A holder is left out if no layer of its tower and kind was recorded: then the input did not
        use that tower.

        Args:
            hollow: Holders that ran while no module inside them made a recorded call.
        """
        heard = {(self.known[each].tower, self.known[each].kind) for each in self.heard}
        return [
            identity.module
            for module, identity in self.holders.items()
            if module in hollow
            and (identity.tower, identity.kind) in heard
            and self.heard.isdisjoint(module.modules())
        ]

    def owner(self, asking: nn.Module, running: nn.Module | None) -> nn.Module | None:
        """Return the module that a call of the interface belongs to; None for another model's call.

        Args:
            asking: The module that is an argument of the call.
            running: The known module or holder that is running, or None.
        """
        if asking in self.known:
            return asking
        if running in self.known:
            return running  # ``asking`` is a helper of the running module
        named = asking if asking in self._parts else self._innermost()
        return None if named is None else self.proved(named)

    def calling_kernel(self) -> nn.Module | None:
        """Return the module that a call of torch's kernel belongs to.

        None if the call was made by the interface (it is recorded there), by another model, or by a
        module that does not mix tokens.
        """
        module = self._innermost(outside=WrappedFunction)
        if isinstance(module, nn.TransformerEncoderLayer):  # calls a kernel instead of self_attn
            module = module.self_attn
        return None if module is None or weighs_no_tokens(module) else self.proved(module)

    def proved(self, module: nn.Module) -> nn.Module:
        """Add a discovered attention module to the known ones, and return it.

        If the known modules inside it made no call, the outer module replaces them and is recorded
        under the identity of the first one.
        """
        if module in self.known:
            return module
        inner = [each for each in module.modules() if each in self.known]
        if inner and self._stands_in(module, inner):
            identity = self.known[inner[0]]
            for each in inner:
                del self.known[each]
            self.known[module] = replace(identity, module=self._parts[module])
        else:
            alone = identity_of(self.model, module, self.known.values())
            if alone is not None:
                self.known[module] = alone
        return module

    def _stands_in(self, module: nn.Module, inner: Sequence[nn.Module]) -> bool:
        """Whether a module replaces the known modules inside it: smaller than a block, no calls."""
        block = block_of(self.model, self.known[inner[0]]) or self.model
        within = module is not block and any(part is module for part in block.modules())
        return within and self.heard.isdisjoint(inner)

    def _innermost(self, outside: type | None = None) -> nn.Module | None:
        """Return the innermost module of this model whose forward is running, or None.

        Another model may run inside a method of this model, such as an assistant model or a logits
        processor inside ``generate``; its calls are not this model's. A module that runs inside a
        forward of this model belongs to it even if it is not registered as a submodule.
        """
        found: nn.Module | None = None
        of_another = False
        for caller, function in named_callers():
            if outside is not None and isinstance(caller, outside):
                return None
            if not isinstance(caller, nn.Module):
                continue
            if isinstance(caller, GenerationMixin) and function not in _FORWARD:
                continue  # in ``generate``, a logits processor may compute attention too
            if caller in self._parts:
                found = found or caller
                if function in _FORWARD or not of_another:
                    return found
            else:
                of_another |= function in _FORWARD
        return None

    @cached_property
    def _parts(self) -> dict[nn.Module, str]:
        return {module: path for path, module in self.model.named_modules()}


Sort = nn.Module | type[nn.Module]
P = ParamSpec("P")


def record(
    model: VLM | nn.Module,
    *,
    towers: Iterable[Tower] = TOWERS,
    layers: Iterable[Any] | np.ndarray | Tensor | None = None,
    values: bool = False,
    norms: bool = False,
    reduce: Callable[[AttentionCall], Any] | None = None,
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
        layers: Layers to record (per tower and kind), all if not given.
        values: Also keep V.
        norms: Keep the share of attention in each token's update (``AttentionCall.update_share``).
        reduce: Called with each call, which is then not kept; its result is added to ``results``.
            It must not store the call, because the tensors of the call belong to the model.

    Raises:
        CaptureError: The model is compiled, or is called from compiled code. At the end of the
            block, unless the block itself failed: attention could not be recorded, recorded
            probabilities do not give the output of the model, or the model ran only in other
            threads. Errors of the recording or of ``reduce`` do not stop the model's forward; they
            are also raised at the end of the block.
        InputError: ``model`` is not a model, ``norms`` and ``reduce`` were both given, or towers or
            layers are not a list or do not exist in the model.
        UnsupportedModelError: The model has no attention modules.
    """
    if norms and reduce is not None:
        raise InputError(
            "Got norms=True and reduce=, but norms are known only after reduce is called. Pass one "
            "of them."
        )
    choice = Choice(list_if_iterator(towers), list_if_iterator(layers), values, norms, reduce)
    return listening(module_of(model), choice)


def listening(model: nn.Module, choice: Choice) -> Block[Recording]:
    """Return :func:`record` for arguments that are held by one object."""
    return Block(partial(_listening, model, choice))


def _listening(model: nn.Module, choice: Choice, stack: ExitStack) -> Recording:
    refuse_compiled(model)
    refuse_split(model)
    members = Members(model)
    named = {**members.known, **members.holders}
    chosen = chosen_layers(choice.towers, choice.layers, members.known.values())
    choice = replace(choice, layers=chosen)
    recorder = _Recorder(model, members, choice)
    stack.push(recorder.check)
    refuse_when_compiled_code_runs(model, members.known, stack)
    recorder.recording.rotary = RotaryPositions(model, members.known)
    recorder.recording.rotary.listen(stack)
    if choice.norms:
        recorder.shares = UpdateShares(model, named)
        recorder.shares.listen(stack)
    own = stack.enter_context(own_context(elsewhere=recorder.note_elsewhere))
    enter, leave, quiet = own(recorder.open), own(recorder.close), set(quiet_modules(model))
    for module in dict.fromkeys((model, *named)):
        if module in quiet:  # a hook would change its results
            continue
        stack.callback(module.register_forward_pre_hook(refuse_replica).remove)
        stack.callback(module.register_forward_pre_hook(enter).remove)
        hook = module.register_forward_hook(leave, with_kwargs=True, always_call=True)
        stack.callback(hook.remove)
    stack.enter_context(quiet_calls(QuietCalls(recorder.open_quiet, recorder.close_quiet)))
    stack.enter_context(tap(recorder))
    stack.enter_context(kernel_calls(recorder.hear_kernel))
    stack.callback(recorder.finish)
    return recorder.recording


def _recording(method: Callable[Concatenate[_Recorder, P], None]) -> Callable[..., None]:
    """Store an exception of a recorder method instead of raising it inside the model's forward.

    It is raised at the end of the block.
    """

    @wraps(method)
    def safe(self: _Recorder, *args: P.args, **options: P.kwargs) -> None:
        if self.failure is not None:
            self.end_bypasses()
            return
        try:
            method(self, *args, **options)
        except Exception as error:  # noqa: BLE001  any error: the forward continues
            self.fail(error)

    return safe


class _Recorder:
    """The hooks and the tap's observer of one ``with`` block, and their state."""

    def __init__(self, model: nn.Module, members: Members, choice: Choice) -> None:
        self.members, self.choice = members, choice
        self.recording = Recording(tuple(members.known.values()), layers_without_matrix(model))
        self.running: list[Run] = []
        self.ran = self.ran_elsewhere = self.ran_in_batches = False
        self.sorts = {module: _sort(module) for module in (*members.known, *members.holders)}
        self.settled: set[Sort] = set()  # modules known to use the interface: no mode is needed
        self.hollow: set[nn.Module] = set()  # holders that ran without a recorded call inside
        self.counts: dict[nn.Module, int] = {}
        self.bypasses: set[Bypass] = set()  # active function modes
        self.kept: list[KeptCall] = []
        self.caches: dict[nn.Module, KeyCache] = {}
        self.masks: dict[tuple[Any, ...], tuple[Tensor, Tensor | None]] = {}
        self.block_masks: dict[int, tuple[BlockMask, Tensor]] = {}
        self.shares: UpdateShares | None = None
        self.n_torchs = 0  # number of nested running modules of torch's own
        self.failure: Exception | None = None  # the first error, raised at the end of the block

    def fail(self, error: Exception) -> None:
        """Stop recording; the error is raised at the end of the block."""
        self.failure = self.failure or error

    def end_bypasses(self) -> None:
        """Exit every function mode."""
        for bypass in self.bypasses:
            bypass.end()
        self.bypasses.clear()

    def note_elsewhere(self) -> None:
        self.ran_elsewhere = True
        self.ran_in_batches |= in_continuous_batching()

    @_recording
    def open(self, module: nn.Module, args: Any) -> None:  # noqa: ARG002
        self.ran = True
        if _recomputing() or not self.members.listens_to(module):
            return
        while self.running and not self._goes_on(self.running[-1], module):
            self._end_bypass(self.running.pop())
        run = Run(module, len(self.kept))
        self.running.append(run)
        if self.shares is not None:
            self.shares.pause()
        if self.sorts[module] not in self.settled and not is_torchs(module):
            at_work = partial(self._module_at_work, run)
            run.bypass = Bypass(at_work, run.aside.append, self.fail)
            self.bypasses.add(run.bypass)
            run.bypass.begin()

    def open_quiet(self, module: nn.Module, args: Any) -> None:
        """Note that a module without hooks is entered; torch's own modules run without a mode."""
        self.n_torchs += is_torchs(module)
        if self.n_torchs == 1 and is_torchs(module):
            for run in self.running:
                if run.bypass is not None:
                    run.bypass.end()
        self.open(module, args)

    def close_quiet(
        self, module: nn.Module, args: Any, options: dict[str, Any], output: Any
    ) -> None:
        """Note that a module without hooks is exited."""
        self.close(module, args, options, output)
        self.n_torchs -= is_torchs(module)
        if self.n_torchs == 0 and is_torchs(module):
            for run in self.running:
                if run.bypass is not None:
                    run.bypass.begin()

    @_recording
    def close(
        self,
        module: nn.Module,
        args: Any,
        options: dict[str, Any],
        output: Any,
    ) -> None:
        opened = bool(self.running) and self.running[-1].module is module
        if _recomputing() or not opened:  # not opened if the module was refused
            return
        run = self.running.pop()
        self._end_bypass(run)
        if output is None:  # the forward failed
            return
        wanted = self.choice.wants(self.members.identity(module))
        if run.heard_inside and module not in self.members.known:
            run.aside[:] = [each for each in run.aside if isinstance(each, RawCall)]
        if run.n_heard == 0:
            if wanted:
                refuse_mixture(self.members.identity(module).module, run.aside)
            for heard in run.aside:
                self._keep(self.members.proved(module), heard)
        self._judge(run, wanted=wanted)
        if self.shares is not None:
            of_itself = bool(run.n_heard or run.aside)
            new = self.kept[run.start :] if of_itself else ()
            self.shares.go_on(module, [*args, *options.values()], output, new)

    def _judge(self, run: Run, *, wanted: bool) -> None:
        """Note whether a module that has run, or a module inside it, made a recorded call."""
        module = run.module
        if run.n_heard or run.aside:
            run.heard_inside = True
            run.silent.clear()  # inner modules without calls are helpers of this one
        elif module in self.members.known:
            run.silent += [self.members.known[module].module] * wanted
        elif run.heard_inside:
            self.settled.add(self.sorts[module])
        elif wanted:
            self.hollow.add(module)
        if self.running:
            self.running[-1].heard_inside |= run.heard_inside
            self.running[-1].silent += run.silent
        else:
            self.recording.unseen += run.silent

    def before(self, call: RawCall) -> RawCall:
        if self.running:
            self.running[-1].inside += 1
        return call

    def after(self, call: RawCall, output: Tensor) -> Tensor:
        self._after(call)
        return output

    @_recording
    def _after(self, call: RawCall) -> None:
        if _recomputing():
            return
        run = self.running[-1] if self.running else None
        owner = self.members.owner(call.module, None if run is None else run.module)
        if run is not None and owner is not None:
            if run.module in self.members.known:
                run.n_heard += 1
                self.settled.add(self.sorts[run.module])
            run.heard_inside = True
        if owner is not None:
            for part in segments(call):
                self._keep(owner, part)
        if run is not None:
            run.inside -= 1

    @_recording
    def hear_kernel(
        self, function: str, args: tuple[Any, ...], options: Mapping[str, Any], output: Any
    ) -> None:
        """Record a call of one of torch's attention functions by any module."""
        run = self.running[-1] if self.running else None
        if _recomputing() or (run is not None and run.inside):
            return
        if function != SCALED_DOT_PRODUCT:
            self._hear_multihead(run, function, args, options)
            return
        if run is not None and run.bypass is not None:
            return
        if run is not None and run.module in self.members.known:
            run.aside.append(kernel_call(run.module, args, options, output))
            return
        owner = self.members.calling_kernel()
        if owner is not None:
            self._keep(owner, kernel_call(owner, args, options, output))
            if run is not None:
                run.heard_inside = True

    def _hear_multihead(
        self, run: Run | None, function: str, args: tuple[Any, ...], options: Mapping[str, Any]
    ) -> None:
        owner = self.members.calling_kernel()
        if owner is None:
            return
        if run is not None:
            run.heard_inside = True
            run.n_heard += run.module in self.members.known
        if self.choice.wants(self.members.identity(owner)):
            self._keep(owner, multihead_call(owner, function, args, options))
        else:
            self.members.heard.add(owner)

    @staticmethod
    def _goes_on(run: Run, inner: nn.Module) -> bool:
        """Whether a run is still active when an inner module is entered.

        It is not if it was ended by an interrupt, after which torch calls no forward hook.
        """
        parts = run.module.modules()
        inside = inner is not run.module and any(part is inner for part in parts)
        return inside or is_running(run.module)

    def _end_bypass(self, run: Run) -> None:
        if run.bypass is not None:
            run.bypass.end()
            self.bypasses.discard(run.bypass)

    def _module_at_work(self, run: Run) -> nn.Module | None:
        """Return the run's module; None while an inner run or the interface's function runs."""
        if self.failure is not None or not self.running:
            return None
        return run.module if self.running[-1] is run and run.inside == 0 else None

    @torch.no_grad()  # tensors saved by autograd here would break recomputation of checkpoints
    def _keep(self, module: nn.Module, heard: Heard) -> None:
        identity = self.members.known[module]
        self.members.heard.add(module)
        if not self.choice.wants(identity):
            return
        refuse_vmap()
        number = self.counts.get(module, 0)
        self.counts[module] = number + 1
        if isinstance(heard, DenseCall):
            call = as_dense_call(heard, identity, number)
        else:
            heard = as_computed(self._with_dense_mask(heard))
            call = as_attention_call(heard, identity, number, self._mask(heard))
            call = self.recording.agreement.checked(heard, call)
        if self.choice.inspect is not None:
            self.choice.inspect(heard, call)
        if self.choice.reduce is not None:
            with full_precision():  # the model's autocast must not apply to ``reduce``
                self.recording.results.append(self._reduced(call, self.choice.reduce))
        elif isinstance(heard, DenseCall):
            self.kept.append(KeptCall(call))
        else:
            cache = self.caches.get(module)
            if cache is None or not cache.grow(heard, call.mask):
                values = own_copy(heard.value) if self.choice.values else None
                cache = KeyCache(own_copy(heard.key), values, seen_keys(call.mask))
                self.caches[module] = cache
            without_keys = replace(call, q=own_copy(heard.query), k=None, v=None)
            self.kept.append(KeptCall(without_keys, cache, heard.key.shape[2]))

    @staticmethod
    def _reduced(call: AttentionCall, reduce: Callable[[AttentionCall], Any]) -> Any:
        try:
            return reduce(call)
        except Exception as error:
            raise ReduceError from error

    def finish(self) -> None:
        """Give each call its keys, as views of the cache, and complete the recording."""
        self.end_bypasses()
        self.recording.calls += [kept.whole() for kept in self.kept]
        self.kept.clear()
        self.recording.unseen += self.members.silent_among_heard(self.hollow)
        self.recording.modules = tuple(self.members.known.values())

    def check(self, failure: type[BaseException] | None, *_: object) -> None:
        """Raise CaptureError for missed or wrong attention, unless the block itself failed."""
        if failure is None and self.failure is not None:
            refuse_failure(self.failure)
        if failure is None:
            refuse_unseen(self.recording.unseen)
            if self.choice.refuse:
                self.recording.agreement.refuse()
            if self.shares is not None:
                self.shares.check()
            if self.ran_elsewhere and not self.ran:
                refuse_another_thread(in_batches=self.ran_in_batches)

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
        """Return the whole mask of a call; a tensor that layers share is converted once."""
        if raw.mask is None:
            return None
        key = (id(raw.mask), raw.query.shape[2], raw.backend, raw.options.get("sliding_window"))
        if key not in self.masks:
            self.masks[key] = (raw.mask, whole_mask(raw))
        return self.masks[key][1]


def _sort(module: nn.Module) -> Sort:
    """Return the class of a module, or the module itself if its forward was replaced.

    Modules with the same result compute their attention in the same way.
    """
    return module if replaced_forward(module) else type(module)


def _recomputing() -> bool:
    return torch._C._current_graph_task_id() != -1
