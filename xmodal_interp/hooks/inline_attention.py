"""Attention that a module computes itself, with an inline softmax: observe it and record it.

The result of the softmax, the probabilities, is recorded. Its scores may contain more than
``q k^T`` (a relative position, chunks of keys), so the call has no queries and keys, and a note.

1. :class:`FunctionMode` calls a function after every torch function, while a module runs that may
   compute its attention inline. Modules that use transformers' interface run without it.
2. :func:`inline_call` converts the call of a torch function to an attention call, if it is a
   softmax over the last axis, or a kernel that the module imported by name.
3. :func:`note_mixing` notes that a layer with weights mixes the probabilities of several heads.
   The recorded probabilities are then not those of a head; :func:`refuse_mixture` raises an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from xmodal_interp.attention import AttentionCall
from xmodal_interp.attention.masks import hidden_below
from xmodal_interp.contexts import DeferredSignals
from xmodal_interp.errors import CaptureError
from xmodal_interp.hooks.attention_modules import Identity
from xmodal_interp.hooks.raw_calls import RawCall
from xmodal_interp.hooks.torch_attention import KERNEL, chunked, four_axes, kernel_call
from xmodal_interp.upstream import (
    active_function_modes,
    remove_function_mode,
    restore_popped_mode,
)

SOFTMAX = (functional.softmax, torch.softmax, Tensor.softmax)
_LINEAR_LAYERS = (functional.linear, functional.conv1d, functional.conv2d, functional.conv3d)
OBSERVED: frozenset[Callable[..., Any]] = frozenset((KERNEL, *SOFTMAX, *_LINEAR_LAYERS))
"""The functions that :func:`inline_call` and :func:`note_mixing` read."""
_FAR_BELOW = 1e3  # a score this far below the largest of its row is masked
_NO_SCORE = -1e8  # below this, a row's largest score is masked: Gemma 4 masks with -1e9

DENSE_NOTE = "probabilities as the module computed them; queries and keys were not recorded"
CHUNKED_NOTE = f"{DENSE_NOTE}; keys are numbered within the chunk of each query"


class FunctionMode(TorchFunctionMode):
    """A torch function mode that hooks can enter and exit, by ``begin`` and ``end``.

    Both can be called repeatedly. After an interrupt in torch, ``end`` also makes sure that torch
    does not put the mode back on its stack later, when the traceback is released.

    Args:
        before: Called before each torch function with the function, its arguments by position and
            by name.
        after: Called after it, with its output too.
        only: Functions for which ``before`` and ``after`` are called; None for all.
    """

    def __init__(
        self,
        before: Callable[..., None] | None = None,
        after: Callable[..., None] | None = None,
        only: frozenset[Callable[..., Any]] | None = None,
    ) -> None:
        super().__init__()
        self.before, self.after, self.only = before, after, only
        self._has_begun = False

    def register(self, stack: ExitStack) -> None:
        """Enter the mode until the stack of a block is closed."""
        stack.callback(self.end)
        self.begin()

    def begin(self) -> None:
        """Enter the mode in this thread; do nothing if it is already active."""
        if not self._is_active():
            self._has_begun = True
            self.__enter__()  # type: ignore[no-untyped-call]

    def end(self) -> None:
        """Exit the mode, even if modes that were entered later are still active."""
        if self._is_active():
            is_innermost = active_function_modes()[-1] is self
            # An interrupt while other modes are off the stack would lose them.
            with nullcontext() if is_innermost else DeferredSignals():
                remove_function_mode(self)
        self._has_begun = False

    def _is_active(self) -> bool:
        """Return whether the mode is on torch's stack.

        A mode that has begun is missing there only after an interrupt.
        """
        if self._has_begun and not self._is_on_stack():
            restore_popped_mode(self)
        return self._is_on_stack()

    def _is_on_stack(self) -> bool:
        return any(mode is self for mode in active_function_modes())

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the function unchanged, and call the observers."""
        options = options or {}
        if self.only is not None and function not in self.only:
            return function(*args, **options)
        if self.before is not None:
            self.before(function, args, options)
        output = function(*args, **options)
        if self.after is not None:
            self.after(function, args, options, output)
        return output


@dataclass(eq=False)
class SoftmaxCall:
    """Probabilities that a module computed by an inline softmax.

    Attributes:
        probs: The probabilities. Rows without a visible key are NaN.
        visible: True where a query may attend to a key; None if it is True everywhere.
        note: The note of the recorded call.
        output: The result of the softmax; kept so that its memory is not reused.
        is_mixed: Whether a layer with weights mixed the probabilities before the product with the
            values.
    """

    probs: Float[Tensor, "sample head query key"]
    visible: Bool[Tensor, "sample head query key"] | None
    note: str
    output: Tensor
    is_mixed: bool = False

    def as_attention_call(self, identity: Identity, number: int) -> AttentionCall:
        """Return the probabilities as the call of a layer with this number."""
        return AttentionCall(
            tower=identity.tower,
            kind=identity.kind,
            layer=identity.layer,
            module=identity.module,
            call=number,
            q=None,
            k=None,
            scaling=1.0,
            mask=self.visible,
            dense=self.probs,
            note=self.note,
        )


ObservedCall = RawCall | SoftmaxCall


def inline_call(
    module: nn.Module,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    options: Mapping[str, Any],
    output: Any,
) -> ObservedCall | None:
    """Convert the call of a torch function in a module to an attention call; None for others."""
    if function is KERNEL:
        return kernel_call(module, args, options, output)
    if function in SOFTMAX and isinstance(output, Tensor) and along_last(output, args, options):
        return _softmax_call(module, args[0] if args else options["input"], output)
    return None


def note_mixing(
    calls: Iterable[ObservedCall],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    options: Mapping[str, Any],
) -> None:
    """Mark the softmax whose result is the input of a layer with weights."""
    dense = [each for each in calls if isinstance(each, SoftmaxCall)]
    if not dense or function not in _LINEAR_LAYERS:
        return
    given = (args[0] if args else options["input"]).untyped_storage().data_ptr()
    for call in dense:
        call.is_mixed |= call.output.untyped_storage().data_ptr() == given


def refuse_mixture(name: str, calls: Iterable[ObservedCall]) -> None:
    """Raise CaptureError for a module that combines softmaxes before the product with the values.

    ConViT adds two softmaxes, differential attention subtracts two, and talking heads (CaiT,
    EfficientFormerV2) are mixed by a layer with weights.
    """
    dense = [each for each in calls if isinstance(each, SoftmaxCall)]
    if any(each.is_mixed for each in dense):
        raise CaptureError(
            f"{name} mixes the results of its softmax by a learned layer before the product with "
            "the values (talking heads), so no head has these probabilities. Leave out its tower "
            "or layer with towers= or layers=."
        )
    shapes = Counter(tuple(each.probs.shape) for each in dense)
    n_alike = max(shapes.values(), default=0)
    if n_alike > 1:
        raise CaptureError(
            f"{name} computes {n_alike} softmaxes over the same tokens in one run, and how it "
            "combines them is unknown. Leave out its tower or layer with towers= or layers=."
        )


def along_last(output: Tensor, args: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
    """Return whether a softmax is over the last axis of a tensor with at least three axes."""
    dim = options.get("dim", args[1] if len(args) > 1 else None)
    return output.ndim > 2 and dim in (-1, output.ndim - 1)


def _softmax_call(module: nn.Module, scores: Tensor, output: Tensor) -> SoftmaxCall:
    """Return the result of a softmax as a call; very low scores are those of hidden keys."""
    given = scores.detach()
    lowest = hidden_below(given.dtype) if given.is_floating_point() else -torch.inf
    best = given.amax(-1, keepdim=True)
    hidden = (given <= lowest) | (given < best - _FAR_BELOW) | (best < _NO_SCORE)
    visible = None if not hidden.any() else ~hidden
    probs = output.detach().float()
    if visible is not None:
        probs = probs.masked_fill(~visible.any(-1, keepdim=True), torch.nan)
    note = CHUNKED_NOTE if chunked(output, module).ndim == 5 else DENSE_NOTE
    return SoftmaxCall(
        four_axes(probs, module).clone(),
        None if visible is None else four_axes(visible, module),
        note,
        output.detach(),
    )
