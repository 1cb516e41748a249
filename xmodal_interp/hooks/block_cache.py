"""Replay the outputs of the blocks before an edited layer, which then do not run again.

A block is the module of a layer stack that contains an attention module (``layers.3`` for
``layers.3.self_attn``). ``remember_blocks`` keeps the output of each block in one forward. Inside
``replay``, forwards on the same inputs use these outputs for every block that ran before a given
layer; the rest of the model runs normally.

The result is bit-identical to the whole forward if blocks affect the rest of the model only by
their outputs. Some models share keys between layers through the cache or a dictionary. For these
the result differs or the forward raises, so compare the two results once, as
:mod:`xmodal_interp.analysis.answers` does.

The memory is one hidden state per block: ``n_blocks * samples * positions * d_model`` numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from xmodal_interp.contexts import Block, own_context
from xmodal_interp.hooks.attention_modules import attention_modules, block_of
from xmodal_interp.vocabulary import AttentionKind, Tower


@dataclass(eq=False)
class BlockOutputs:
    """The outputs of the blocks of a model in one forward.

    Attributes:
        blocks: The block of each layer.
        outputs: The last output of each block, in the order in which blocks first ran.
        repeated: Blocks that ran several times; they cannot be replayed.
    """

    blocks: dict[tuple[Tower, AttentionKind, int], nn.Module]
    outputs: dict[nn.Module, Any] = field(default_factory=dict)
    repeated: set[nn.Module] = field(default_factory=set)

    def before(self, tower: Tower, kind: AttentionKind, layer: int) -> dict[nn.Module, Any]:
        """Return the outputs of the blocks that ran before the block of this layer.

        Empty if that block did not run, or ran several times.
        """
        block = self.blocks.get((tower, kind, layer))
        if block is None or block not in self.outputs or block in self.repeated:
            return {}
        order = list(self.outputs)
        kept_out = self.repeated | set(block.modules())
        return {b: self.outputs[b] for b in order[: order.index(block)] if b not in kept_out}


def remember_blocks(model: nn.Module) -> Block[BlockOutputs]:
    """Keep the output of every block in the one forward inside the ``with`` block."""
    return Block(partial(_remember_blocks, model))


def _remember_blocks(model: nn.Module, stack: ExitStack) -> BlockOutputs:
    blocks = {}
    for identity in attention_modules(model).values():
        block = block_of(model, identity)
        if block is not None:
            blocks[identity.tower, identity.kind, identity.layer] = block
    memory = BlockOutputs(blocks)

    def keep(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
        if module in memory.outputs:
            memory.repeated.add(module)
        memory.outputs[module] = output

    own = stack.enter_context(own_context())
    for block in dict.fromkeys(blocks.values()):
        stack.callback(block.register_forward_hook(own(keep)).remove)
    return memory


def replay(outputs: dict[nn.Module, Any]) -> Block[None]:
    """Return a context manager in which modules return the given outputs instead of running."""
    return Block(partial(_replay, outputs))


def _replay(outputs: dict[nn.Module, Any], stack: ExitStack) -> None:
    for module, output in outputs.items():
        own = module.__dict__.get("forward")  # set by accelerate on dispatched models
        stack.callback(_restore, module, own)
        module.forward = _returning(output)


def _returning(output: Any) -> Callable[..., Any]:
    """Return a forward that returns a given output."""
    return lambda *_args, **_options: output


def _restore(module: nn.Module, own: Any) -> None:
    if own is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = own
