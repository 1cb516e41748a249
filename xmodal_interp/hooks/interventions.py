"""Interventions: edit attention heads while a model runs inside a ``with`` block.

1. When the block is entered, each intervention returns the layers and heads that it edits; unknown
   ones are refused.
2. Inside the block, the tap calls the intervention for each attention call. It can change the
   operands (including the mask), or the output, which is the input of the output projection.
3. When the block is exited, an error is raised if a layer of the intervention did not run or one of
   its positions was not reached: an experiment must not be a silent no-op.

No weight, buffer or config is changed. Hooks, the tap and the wrapped ``forward`` of attention
modules (see :mod:`xmodal_interp.hooks.compiled`) are removed when the block is exited, also after
an exception. ``record`` can be inside or outside of ``intervene``: it records the operands that the
backend received.

To add an intervention, write a frozen dataclass with the methods of :class:`Intervention`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from xmodal_interp.attention import AttentionCall
from xmodal_interp.contexts import Block, own_context
from xmodal_interp.errors import CaptureError, LayerError, PositionError
from xmodal_interp.hooks.attention_interface import active_observers, tap
from xmodal_interp.hooks.attention_modules import (
    Identity,
    attention_modules,
    layers_of,
    module_of,
    n_heads_of,
    ranged,
)
from xmodal_interp.hooks.compiled import refuse_compiled, refuse_when_compiled_code_runs
from xmodal_interp.hooks.known_modules import is_running
from xmodal_interp.hooks.positions import RunningBatch, Selection
from xmodal_interp.hooks.probability_check import ProbabilityCheck
from xmodal_interp.hooks.raw_calls import RawCall, as_attention_call, whole_mask
from xmodal_interp.hooks.refusals import refuse_split
from xmodal_interp.hooks.torch_attention import unhooked_modules
from xmodal_interp.models import VLM
from xmodal_interp.models.model_parts import parts_of
from xmodal_interp.vocabulary import AttentionKind, Tower


@dataclass(frozen=True, eq=False)
class Site:
    """What an intervention edits in one call: layer, heads and positions.

    Attributes:
        identity: The layer.
        heads: The heads to edit.
        start: The position of the call's first query in the sequence.
        batch: The samples that the model runs; None in towers whose positions are not those of the
            prompt's tokens.
    """

    identity: Identity
    heads: tuple[int, ...]
    start: int
    batch: RunningBatch | None = None

    def head_mask(self, call: RawCall) -> Bool[Tensor, " head"]:
        """Return a mask that is True at the heads to edit."""
        mask = torch.zeros(call.query.shape[1], dtype=torch.bool, device=call.query.device)
        mask[list(self.heads)] = True
        return mask

    def query_mask(
        self, selection: Selection | None, call: RawCall
    ) -> Bool[Tensor, "sample query"]:
        """Return a mask that is True at the queries to edit; everywhere without a selection.

        It has one row if the mask is the same for all samples.
        """
        n_queries = call.query.shape[2]
        if selection is None:
            return torch.ones(1, n_queries, dtype=torch.bool, device=call.query.device)
        return selection.between(
            self.start, self.start + n_queries, call.query, self.batch, begins=self.begins
        )

    def key_mask(self, selection: Selection, call: RawCall) -> Bool[Tensor, "sample key"]:
        """Return a mask that is True at the keys to edit.

        It has one row if the mask is the same for all samples.
        """
        batch = self.batch if self.identity.kind == "self" else None
        return selection.between(0, call.key.shape[2], call.key, batch, begins=self.begins)

    @property
    def begins(self) -> bool:
        """Whether the call is the first of a sequence, not a decode step."""
        return self.start == 0 and not (self.batch is not None and self.batch.is_decode_step)

    def attention(self, call: RawCall) -> AttentionCall:
        """Return the call as an :class:`AttentionCall`.

        If the call already has an output, mask and causal flag are interpreted so that the
        probabilities give this output.

        Raises:
            CaptureError: No interpretation of its arguments gives its output.
        """
        check = ProbabilityCheck()
        found = as_attention_call(call, self.identity, 0, whole_mask(call))
        found = check.checked(call, found)
        check.refuse()
        return found


@runtime_checkable  # the tests check types at run time
class Intervention(Protocol):
    """The protocol of an intervention, which edits attention calls of one tower and kind."""

    @property
    def tower(self) -> Tower:
        """The tower to edit."""

    @property
    def kind(self) -> AttentionKind:
        """The kind of attention to edit."""

    @property
    def selections(self) -> tuple[Selection, ...]:
        """The positions to edit; all must be reached."""

    def heads_in(self, layers: Mapping[int, int | None]) -> Mapping[int, Sequence[int]]:
        """Return the heads to edit by layer, given the number of heads of each layer or None."""

    def before(self, call: RawCall, site: Site) -> RawCall:
        """Return the call to make; return the same object to leave it unchanged."""

    def after(self, call: RawCall, output: Tensor, site: Site) -> Tensor:
        """Return the output for the model, ``[sample, query, head, d_value]``."""


def intervene(model: VLM | nn.Module, *interventions: Intervention) -> Block[None]:
    """Edit attention heads of a model while it runs inside a ``with`` block.

    If two interventions edit the same output, the first argument is applied last, like the outer
    one of two nested blocks.

    Args:
        model: A VLM or any transformers model.
        *interventions: Results of ``ablate_heads`` and ``knock_out_attention``, for example.

    Raises:
        LayerError: The model does not have a layer or head (raised before the model runs).
        CaptureError: A layer did not run (raised at the end of the block, unless the block itself
            failed), or a call cannot be edited.
        PositionError: A position was not reached (raised at the end of the block).
        UnsupportedModelError: The model has no attention modules, or its layers are split over
            processes.
    """
    return Block(partial(_intervene, model, interventions))


def _intervene(
    model: VLM | nn.Module, interventions: Sequence[Intervention], stack: ExitStack
) -> None:
    bare = module_of(model)
    parts = parts_of(bare)
    refuse_compiled(parts.modules)
    refuse_split(parts.modules.values())
    known = attention_modules(bare)
    batch = RunningBatch(model)
    editors = [_Editor(intervention, known, batch) for intervention in interventions]

    def check_complete(failure: type[BaseException] | None, *_: object) -> None:
        for editor in editors if failure is None else ():
            editor.check_complete()

    stack.push(check_complete)
    unhooked = unhooked_modules(parts.modules.values())
    refuse_when_compiled_code_runs(bare, known, unhooked, stack)
    own = stack.enter_context(own_context())
    for top in {bare, _without_adapter(bare)}:
        hook = top.register_forward_pre_hook(own(batch.read_forward), with_kwargs=True)
        stack.callback(hook.remove)
    for editor in editors:
        enter, leave = own(editor.enter), own(editor.exit)
        for module in editor.heads:
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        tap(editor, stack)


def active_interventions() -> list[Intervention]:
    """Return the interventions of the active ``intervene`` blocks, the outermost first."""
    return [each.intervention for each in active_observers() if isinstance(each, _Editor)]


def _without_adapter(model: nn.Module) -> nn.Module:
    """Return the model inside a PEFT wrapper, or the model itself if it is not wrapped.

    ``generate`` of the wrapper does not run the ``forward`` of the wrapper.
    """
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


class _Editor:
    """Applies one intervention for the duration of one ``with`` block."""

    def __init__(
        self,
        intervention: Intervention,
        known: Mapping[nn.Module, Identity],
        batch: RunningBatch,
    ) -> None:
        self.intervention, self.known = intervention, known
        self.batch = batch if intervention.tower == "language" else None
        modules = layers_of(known, intervention.tower, intervention.kind)
        wanted = intervention.heads_in({n: n_heads_of(module) for n, module in modules.items()})
        self.heads = {modules[layer]: tuple(heads) for layer, heads in wanted.items()}
        self._check_editable()
        self.running: list[nn.Module] = []
        self.ran: set[nn.Module] = set()
        self.length: dict[nn.Module, int] = {}  # number of positions each module has processed
        self.reached = 0
        self.site: Site | None = None

    def _check_editable(self) -> None:
        """Raise CaptureError for modules whose heads are computed inside one torch function."""
        fixed = [self.known[m].layer for m in self.heads if isinstance(m, nn.MultiheadAttention)]
        if fixed:
            raise CaptureError(
                f"{self.intervention.tower} {self.intervention.kind}-attention, layers "
                f"{ranged(fixed)}, is torch.nn.MultiheadAttention, whose heads cannot be edited: "
                "one torch function computes them and the output projection. Leave these layers "
                "out."
            )

    def enter(self, module: nn.Module, args: Any) -> None:  # noqa: ARG002
        if self.batch is not None:
            self.batch.read_generation()
        while self.running and not is_running(self.running[-1]):
            self.running.pop()  # an interrupt ended it, after which torch calls no hook
        self.running.append(module)
        self.ran.add(module)

    def exit(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        if self.running and self.running[-1] is module:  # else a hook raised before ``enter``
            self.running.pop()

    def before(self, call: RawCall) -> RawCall:
        self.site = self._site(call)
        return call if self.site is None else self.intervention.before(call, self.site)

    def after(self, call: RawCall, output: Tensor) -> Tensor:
        return output if self.site is None else self.intervention.after(call, output, self.site)

    def check_complete(self) -> None:
        missed = [self.known[m].layer for m in self.heads if m not in self.length]
        name = f"{self.intervention.tower} {self.intervention.kind}-attention"
        if missed:
            ran_without_interface = any(self.known[m].layer in missed for m in self.ran)
            why = (
                "ran without transformers' attention interface, where heads are edited. Leave them "
                "out"
                if ran_without_interface
                else "did not run. Run the model inside the with block, or leave them out"
            )
            raise CaptureError(
                f"An intervention did not edit all its layers: {name}, layers {ranged(missed)}, "
                f"{why}."
            )
        needed = max((s.n_needed for s in self.intervention.selections), default=0)
        if self.heads and needed > self.reached:
            raise PositionError(
                f"An intervention edits position {needed - 1}, but {name} ran over positions 0 to "
                f"{self.reached - 1}. Choose positions of the sequence."
            )

    def _site(self, call: RawCall) -> Site | None:
        module = call.module
        if module not in self.known and self.running:
            module = self.running[-1]
        if module not in self.heads:
            return None
        identity, heads, n_heads = self.known[module], self.heads[module], call.query.shape[1]
        if max(heads, default=0) >= n_heads:
            raise LayerError(
                f"There is no head {max(heads)}: {identity.module} has heads 0 to {n_heads - 1}."
            )
        if isinstance(call.mask, BlockMask):
            raise CaptureError(
                "Flex attention receives a function instead of a mask, which cannot be edited. "
                "Load the model with attn_implementation='sdpa' to intervene."
            )
        start = self._start(module, call) if self.intervention.selections else 0
        n_keys = call.key.shape[2] if self.intervention.kind == "self" else 0
        self.length[module] = max(start + call.query.shape[2], n_keys)
        self.reached = max(self.reached, self.length[module])
        return Site(identity, heads, start, self.batch)

    def _start(self, module: nn.Module, call: RawCall) -> int:
        """Return the position of the first query, which follows the cached positions."""
        n_queries, n_keys = call.query.shape[2], call.key.shape[2]
        before = self.length.get(module)
        if self.intervention.kind == "cross":  # its keys do not grow; one query is a decode step
            return 0 if n_queries > 1 or before is None else before
        if n_queries == n_keys:
            return 0
        start = n_keys - n_queries
        site = Site(self.known[module], (), 0)
        last_is_seen = bool(site.attention(call).visible([n_queries - 1])[..., -1].any())
        if not last_is_seen or before not in (None, start):
            raise CaptureError(
                f"{self.known[module].module} has {n_keys} keys for {n_queries} queries after "
                f"{before or 0} positions (a static or sliding cache), so the positions of its "
                "queries are unknown. Generate with past_key_values=DynamicCache(), which keeps "
                "every key, or intervene without positions."
            )
        return start
