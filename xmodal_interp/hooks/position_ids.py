"""Record the position ids that the rotary embedding of the language model receives.

The position id of a token is not always its index in the sequence. In Qwen2-VL (arXiv 2409.12191)
the tokens of an image share one time and differ in row and column. The ids of the text after the
image continue from the longer side of its grid, not from its number of tokens. In every family the
rotary module receives these ids, so a hook on it records them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from xmodal_interp.attention import ran_without_cache
from xmodal_interp.contexts import own_context
from xmodal_interp.hooks.attention_modules import Identity

AXES = ("t", "h", "w")
"""Time, row and column; for a model with one axis, the same number three times.

Position ids with more axes are not recorded (HunYuan-VL has four, in another order)."""


class RotaryPositions:
    """The position ids that the first rotary module of the language tower received, by call."""

    def __init__(self, modules: Mapping[str, nn.Module], known: Iterable[Identity]) -> None:
        language = [each.module for each in known if each.tower == "language"]
        self.module = next(
            (
                module
                for path, module in modules.items()
                if type(module).__name__.endswith("RotaryEmbedding")
                and any(of.startswith(path.rpartition(".")[0]) for of in language)
            ),
            None,
        )
        self.received: list[Tensor] = []

    def register(self, stack: ExitStack) -> None:
        """Register a hook on the module until the stack is closed."""
        if self.module is not None:
            own = stack.enter_context(own_context())
            hook = self.module.register_forward_pre_hook(own(self._enter), with_kwargs=True)
            stack.callback(hook.remove)

    def _enter(self, module: nn.Module, args: Any, options: dict[str, Any]) -> None:  # noqa: ARG002
        given = options.get("position_ids", args[1] if len(args) > 1 else None)
        if not isinstance(given, Tensor) or given.is_floating_point():
            return
        if given.ndim == 2 or (given.ndim == 3 and len(given) in (1, len(AXES))):
            ids = given.detach().clone()
            self.received.append(ids if ids.ndim == 3 else ids[None])

    def whole(self) -> Int[Tensor, "axis sample position"] | None:
        """Return the position ids of the whole sequence.

        None if none were recorded, or if the runs had different numbers of axes or samples.
        """
        if not self.received:
            return None
        again = ran_without_cache([each.shape[-1] for each in self.received])
        parts = self.received[-1:] if again else self.received
        if len({part.shape[:2] for part in parts}) > 1:
            return None
        joined = torch.cat(parts, -1)
        return joined.cpu().expand(len(AXES), -1, -1) if joined.shape[0] == 1 else joined.cpu()
