"""Which modules of a recorded model are attention: by their names, or as it turns out.

A module that is not named so proves to be attention when it asks transformers' interface or calls
torch's kernel; one that holds another attention module, when it does so itself, beside the other.
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

_FORWARD = ("forward", "_call_impl")  # the functions that run while a module is called


class Members:
    """The attention modules of a model.

    Attributes:
        known: Those that are heard, with their names; it may change while the model runs.
        holders: Modules named attention that hold such a module, with the name that one has.
        heard: Known modules that made a call.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.known = attention_modules(model)
        self.holders = attention_holders(model, self.known)
        self.heard: set[nn.Module] = set()

    def identity(self, module: nn.Module) -> Identity:
        """What a module or a holder is called."""
        return self.known[module] if module in self.known else self.holders[module]

    def listens_to(self, module: nn.Module) -> bool:
        """Whether a module is known to be attention or holds one that is."""
        return module in self.known or module in self.holders

    def silent_among_heard(self, hollow: Collection[nn.Module]) -> list[str]:
        """Of holders in which nothing was heard, those whose tower was heard in other layers.

        Where no layer of a tower and kind was heard, the input did without them all.
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
        """Whose attention a call of the interface is; None if it is another model's.

        Args:
            asking: The module that the call names.
            running: The module or holder that is running, if any is.
        """
        if asking in self.known:
            return asking
        if running in self.known:
            return running  # and the other is a helper of its
        named = asking if asking in self._parts else self._innermost()
        return None if named is None else self.proved(named)

    def calling_kernel(self) -> nn.Module | None:
        """Whose attention a call of torch's kernel is.

        None if the call is one of the interface's, which is heard there; if it is another model's;
        or if what it weighs is no tokens.
        """
        module = self._innermost(outside=WrappedFunction)
        if isinstance(module, nn.TransformerEncoderLayer):  # it runs its attention inside a kernel
            module = module.self_attn
        return None if module is None or weighs_no_tokens(module) else self.proved(module)

    def proved(self, module: nn.Module) -> nn.Module:
        """The module, known from now on.

        It takes the name of what it holds, if that was not heard: then it calls in its stead.
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
        """Whether it is a layer's attention in place of what it holds, and not the whole block."""
        block = block_of(self.model, self.known[inner[0]]) or self.model
        within = module is not block and any(part is module for part in block.modules())
        return within and self.heard.isdisjoint(inner)

    def _innermost(self, outside: type | None = None) -> nn.Module | None:
        """The module of this model whose forward makes a call; None if there is none.

        Another model may run inside a method of this one: an assistant model, or the model of a
        logits processor, inside ``generate``. It is no part of this model, unless it runs inside a
        forward: then it is a part that was not registered.
        """
        found: nn.Module | None = None
        of_another = False
        for caller, function in named_callers():
            if outside is not None and isinstance(caller, outside):
                return None
            if not isinstance(caller, nn.Module):
                continue
            if isinstance(caller, GenerationMixin) and function not in _FORWARD:
                continue  # it generates: a logits processor may compute attention too
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
