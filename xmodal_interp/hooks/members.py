"""The attention modules of a recorded model: known by name, or discovered while it runs.

A module that is not recognised by name is discovered when it uses transformers' attention interface
or calls torch's kernel. This includes modules that contain another attention module.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property

from torch import nn
from transformers import GenerationMixin

from xmodal_interp.hooks.callers import named_callers
from xmodal_interp.hooks.modules import (
    Identity,
    attention_holders,
    attention_modules,
    block_of,
    identity_of,
    weighs_no_tokens,
)
from xmodal_interp.hooks.tapping import WrappedFunction

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
