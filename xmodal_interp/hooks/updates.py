"""How large the attention's part of each token's update is, beside the residual stream.

The share of a token is ``|o| / (|o| + |x|)`` (Euclidean norms, float32), with ``x`` the input of
the block, which its residual connection carries past the attention, and ``o`` what the attention
module returns: in the spirit of GlobEnc (Modarressi et al. 2022, arXiv 2205.03286).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from xmodal_interp.attention import AttentionCall
from xmodal_interp.errors import CaptureError
from xmodal_interp.hooks.modules import Identity, block_of
from xmodal_interp.hooks.own_context import own_context


class UpdateShares:
    """Listens to what enters the blocks; says what their attention adds to it."""

    def __init__(self, model: nn.Module, known: dict[nn.Module, Identity]) -> None:
        self.blocks = {module: block_of(model, identity) for module, identity in known.items()}
        self.inputs: dict[nn.Module, Tensor] = {}

    def listen(self, stack: ExitStack) -> None:
        """Put hooks on the blocks, until the stack is closed."""
        enter = stack.enter_context(own_context())(self._enter)
        for block in {block for block in self.blocks.values() if block is not None}:
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)

    def _enter(self, block: nn.Module, args: Any, options: dict[str, Any]) -> None:
        self.inputs[block] = args[0] if args else options["hidden_states"]

    def of(self, module: nn.Module, output: Any, calls: Sequence[AttentionCall]) -> list[Tensor]:
        """The shares ``[sample, query]`` of the calls that one run of an attention module made.

        Raises:
            CaptureError: The module is not inside of a block, or its outputs are not its queries.
        """
        added = (output[0] if isinstance(output, tuple) else output).detach()
        block = self.blocks[module]
        entered = None if block is None else self.inputs[block].detach()
        sizes = [call.n_samples * call.n_queries for call in calls]
        if entered is None or added.shape != entered.shape or added[..., 0].numel() != sum(sizes):
            raise CaptureError(
                "The share of attention in an update is known where a block adds the output of its "
                f"attention to its input, token by token. {calls[0].module} does not; leave out "
                "norms."
            )
        attended, kept = (t.float().norm(dim=-1).flatten() for t in (added, entered))
        parts = (attended / (attended + kept).clamp(min=torch.finfo(torch.float32).tiny)).split(
            sizes
        )
        return [
            part.view(call.n_samples, call.n_queries)
            for part, call in zip(parts, calls, strict=True)
        ]
