"""Where the language model puts each token, as its rotary embedding is told.

The index of a token in the sequence is not always its position: in Qwen2-VL (arXiv 2409.12191) the
tokens of an image share their time and have a row and a column, and the text goes on behind the
larger side of the image, not behind its last token. The rotary modules are told, whatever the
family; hooks on them listen.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from xmodal_interp.attention import reread
from xmodal_interp.hooks.modules import Identity
from xmodal_interp.hooks.own_context import own_context

AXES = ("t", "h", "w")
"""Time, row and column; the same number three times where a model has one axis.

Models with more axes (HunYuan-VL has a fourth, and another order) are not listened to."""


class RotaryPositions:
    """What the first rotary module of the language tower was told, call by call."""

    def __init__(self, model: nn.Module, known: Mapping[nn.Module, Identity]) -> None:
        language = [each.module for each in known.values() if each.tower == "language"]
        self.module = next(
            (
                module
                for path, module in model.named_modules()
                if type(module).__name__.endswith("RotaryEmbedding")
                and any(of.startswith(path.rpartition(".")[0]) for of in language)
            ),
            None,
        )
        self.heard: list[Tensor] = []

    def listen(self, stack: ExitStack) -> None:
        """Put a hook on the module, until the stack is closed."""
        if self.module is not None:
            own = stack.enter_context(own_context())
            hook = self.module.register_forward_pre_hook(own(self._enter), with_kwargs=True)
            stack.callback(hook.remove)

    def _enter(self, module: nn.Module, args: Any, options: dict[str, Any]) -> None:  # noqa: ARG002
        told = options.get("position_ids", args[1] if len(args) > 1 else None)
        if not isinstance(told, Tensor) or told.is_floating_point():
            return
        if told.ndim == 2 or (told.ndim == 3 and len(told) in (1, len(AXES))):
            self.heard.append(told.detach().clone() if told.ndim == 3 else told.detach()[None])

    def whole(self) -> Int[Tensor, "axis sample position"] | None:
        """The positions of everything that was read; None if no rotary module told any."""
        if not self.heard:
            return None
        again = reread([each.shape[-1] for each in self.heard])
        joined = self.heard[-1] if again else torch.cat(self.heard, -1)
        return joined.cpu().expand(len(AXES), -1, -1) if joined.shape[0] == 1 else joined.cpu()
