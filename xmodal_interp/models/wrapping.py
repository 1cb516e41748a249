"""Wrapped models: weights that accelerate offloads, adapters that PEFT adds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from xmodal_interp.errors import InputError, UnsupportedModelError


def input_device(model: nn.Module) -> torch.device:
    """Return the device on which a model computes, to which its inputs must be moved.

    Offloaded weights are on the meta device between calls; the hook that accelerate puts on each
    module holds the execution device.

    Raises:
        InputError: The weights are on the meta device, and no hook of accelerate moves them.
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
        "The weights of this model are on the meta device, and no hook of accelerate moves them to "
        "another device. Load the model with its weights: xi.load(name)."
    )


def refuse_virtual_tokens(model: Any) -> None:
    """Raise UnsupportedModelError for an adapter that adds virtual tokens (prompt tuning)."""
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"The adapter {name!r} ({config.peft_type.value}) adds {config.num_virtual_tokens} "
                "positions without a token, which cannot be labelled. Record the bare attention "
                "with xi.record(model)."
            )
