"""Find modules in training mode, and switch them to evaluation mode for a while.

``model.training`` is the flag of the outermost module only. A module that is added later, such as
an adapter of PEFT, starts in training mode with dropout on, although ``model.training`` is False.
Therefore the flag of every module is read.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from functools import partial

from torch import nn

from xmodal_interp.restoring import Block


def modules_in_training(model: nn.Module) -> list[str]:
    """Return the names of the modules in training mode; the model's own is ``"the model"``."""
    return [name or "the model" for name, module in model.named_modules() if module.training]


def evaluation_mode(model: nn.Module, *, warn: bool = True) -> Block[None]:
    """Switch every module to evaluation mode inside a ``with`` block.

    The flag of each module is restored afterwards.

    Args:
        model: The model.
        warn: Whether to issue a UserWarning that names the modules which were in training mode.
    """
    names = modules_in_training(model)
    if names and warn:
        warnings.warn(
            f"{described_training(names)}. They are in evaluation mode for this call; call "
            "model.eval() to keep them there, or record a model in training mode with "
            "xi.record(model).",
            UserWarning,
            stacklevel=2,
        )
    return Block(partial(_switch_off, model))


def _switch_off(model: nn.Module, stack: ExitStack) -> None:
    for module in [module for module in model.modules() if module.training]:
        stack.callback(setattr, module, "training", True)
        module.training = False


def described_training(names: list[str]) -> str:
    """Describe the modules in training mode: their number, and the names of the first three."""
    first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    verb = "module is" if len(names) == 1 else "modules are"
    return f"{len(names)} {verb} in training mode, so any dropout in them is active ({first})"
