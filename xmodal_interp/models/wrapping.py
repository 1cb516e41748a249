"""Models in wrappings: weights that accelerate offloads, adapters that PEFT adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from xmodal_interp.errors import InputError, UnsupportedModelError


def input_device(model: nn.Module) -> torch.device:
    """Where a model computes, so where its inputs go.

    Offloaded weights wait on the meta device; accelerate's hook on each module knows where to.

    Raises:
        InputError: The weights are on the meta device, and no hook will bring them.
    """
    first = next(model.parameters()).device
    if first.type != "meta":
        return first
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
    raise InputError(
        "A model needs weights. Those of this model are on the meta device, and no hook of "
        "accelerate says where they are computed with."
    )


def refuse_virtual_tokens(model: Any) -> None:
    """Raise UnsupportedModelError for an adapter whose positions have no token (prompt tuning)."""
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModelError(
                "Every position is labelled with the token that stands there. The adapter "
                f"{name!r} ({config.peft_type.value}) adds {config.num_virtual_tokens} positions "
                "without a token. Record the bare attention with xi.record(model)."
            )
