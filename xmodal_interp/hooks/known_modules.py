"""The attention modules of a recorded model: known before it runs, or discovered while it runs.

1. The modules that :func:`layers_in` finds are known before the model runs.
2. A call of transformers' interface contains the module that makes it. A call of a torch function
   does not: its module is found on the Python call stack. Hooks on every module would slow down
   every forward, so the stack is inspected instead, and only for calls whose module is not known.
3. A module that makes such a call and is not known is added. If the known modules inside it made no
   call, it replaces them.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

from torch import nn
from transformers import GenerationMixin

from xmodal_interp.hooks.attention_interface import WrappedFunction
from xmodal_interp.hooks.attention_modules import (
    Identity,
    block_of,
    identity_of,
    layers_in,
    weighs_no_tokens,
)
from xmodal_interp.models.model_parts import ModelParts
from xmodal_interp.upstream import CONTINUOUS_BATCHING, FORWARD_FUNCTIONS


class KnownModules:
    """The attention modules of a model.

    Attributes:
        identities: The modules that are recorded, with their identities; discovered ones are added.
        holders: Attention modules that contain a recorded module, with the identity of that module.
        without_matrix: Layers that mix tokens without softmax attention.
        called: Recorded modules that made a call.
    """

    def __init__(self, parts: ModelParts) -> None:
        self.model = parts.model
        layers = layers_in(parts)
        self.identities = {parts.modules[path]: each for path, each in layers.identities.items()}
        self.holders = {parts.modules[path]: each for path, each in layers.holders.items()}
        self.without_matrix = layers.without_matrix
        self.called: set[nn.Module] = set()

    def __contains__(self, module: nn.Module) -> bool:
        """Return whether a module is a recorded module or a holder of one."""
        return module in self.identities or module in self.holders

    def identity(self, module: nn.Module) -> Identity:
        """Return the identity of a recorded module or a holder."""
        return self.identities[module] if module in self.identities else self.holders[module]

    def owner_of_interface_call(
        self, given: nn.Module, running: nn.Module | None
    ) -> nn.Module | None:
        """Return the module that a call of the interface belongs to; None for another model's call.

        Args:
            given: The module that is an argument of the call.
            running: The recorded module or holder that is running, or None.
        """
        if given in self.identities:
            return given
        if running in self.identities:
            return running  # ``given`` is a helper of the running module
        caller = given if given in self._paths else self._innermost()
        return None if caller is None else self.add(caller)

    def owner_of_kernel_call(self) -> nn.Module | None:
        """Return the module that a call of a torch function belongs to.

        None if the call was made by the interface (it is recorded there), by another model, or by a
        module that does not mix tokens.
        """
        module = self._innermost(outside=WrappedFunction)
        if isinstance(module, nn.TransformerEncoderLayer):  # calls a kernel instead of self_attn
            module = module.self_attn
        return None if module is None or weighs_no_tokens(module) else self.add(module)

    def add(self, module: nn.Module) -> nn.Module:
        """Add a discovered attention module to the recorded ones, and return it.

        If the recorded modules inside it made no call, the outer module replaces them and is
        recorded under the identity of the first one.
        """
        if module in self.identities:
            return module
        inner = [each for each in module.modules() if each in self.identities]
        if inner and self._replaces(module, inner):
            identity = self.identities[inner[0]]
            for each in inner:
                del self.identities[each]
            self.identities[module] = replace(identity, module=self._paths[module])
        else:
            alone = identity_of(self.model, module, self.identities.values())
            if alone is not None:
                self.identities[module] = alone
        return module

    def missed_among(self, empty: Collection[nn.Module]) -> list[str]:
        """Return the names of holders that ran without a recorded call, although they should have.

        A holder is left out if no layer of its tower and kind made a call, because then the input
        did not use that tower.

        Args:
            empty: Holders that ran while no module inside them made a recorded call.
        """
        called = {(self.identities[each].tower, self.identities[each].kind) for each in self.called}
        return [
            identity.module
            for module, identity in self.holders.items()
            if module in empty
            and (identity.tower, identity.kind) in called
            and self.called.isdisjoint(module.modules())
        ]

    def _replaces(self, module: nn.Module, inner: Sequence[nn.Module]) -> bool:
        """Return whether a module replaces those inside it.

        It must be smaller than a block, and the modules inside must have made no call.
        """
        block = block_of(self.model, self.identities[inner[0]]) or self.model
        within = module is not block and any(part is module for part in block.modules())
        return within and self.called.isdisjoint(inner)

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
            if isinstance(caller, GenerationMixin) and function not in FORWARD_FUNCTIONS:
                continue  # in ``generate``, a logits processor may compute attention too
            if caller in self._paths:
                found = found or caller
                if function in FORWARD_FUNCTIONS or not of_another:
                    return found
            else:
                of_another |= function in FORWARD_FUNCTIONS
        return None

    @cached_property
    def _paths(self) -> dict[nn.Module, str]:
        return {module: path for path, module in self.model.named_modules()}


def callers() -> Iterator[object]:
    """Yield the first argument of every running function of this thread, innermost first.

    This is ``self`` in a method, and the module in an attention function of transformers.
    """
    return (caller for caller, _ in named_callers())


def named_callers() -> Iterator[tuple[object, str]]:
    """Yield the same as :func:`callers`, each with the name of the function."""
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_argcount:
            yield frame.f_locals.get(code.co_varnames[0]), code.co_name
        frame = frame.f_back


def is_running(module: nn.Module) -> bool:
    """Return whether a function with this module as first argument is running in this thread."""
    return any(caller is module for caller in callers())


def in_continuous_batching() -> bool:
    """Return whether continuous batching (``generate_batch``) is running in this thread."""
    frame = inspect.currentframe()
    while frame is not None:
        if CONTINUOUS_BATCHING in frame.f_globals.get("__name__", ""):
            return True
        frame = frame.f_back
    return False
