"""The state of a loaded model that its results depend on.

* :class:`CheckpointReport`: how its weights differ from the checkpoint. transformers initialises
  weights that the checkpoint lacks at random, prints a report and continues. Results of such a
  model are meaningless, so the report is kept.
* :func:`input_device`: the device of its inputs, also if accelerate offloads its weights.
* :func:`refuse_virtual_tokens`: adapters of PEFT whose positions cannot be labelled.
* :func:`evaluation_mode`: evaluation mode of every module. ``model.training`` is the flag of the
  outermost module only. A module that is added later, such as an adapter of PEFT, starts in
  training mode with dropout on, although ``model.training`` is False.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import nn

from xmodal_interp.contexts import Block
from xmodal_interp.errors import InputError, UnsupportedModelError, first_of
from xmodal_interp.upstream import module_tree, offload_hooks


@dataclass(frozen=True)
class CheckpointReport:
    """The differences between a checkpoint and the model loaded from it; empty if there are none.

    Attributes:
        missing: Weights of the model that the checkpoint lacks; they are random.
        mismatched: Weights that have another shape in the checkpoint; they are random.
        unexpected: Weights of the checkpoint that the model does not use.
    """

    missing: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    @classmethod
    def of(cls, loading_info: Any) -> CheckpointReport:
        """Return the report of ``from_pretrained(..., output_loading_info=True)``.

        Raises:
            InputError: ``loading_info`` is neither a mapping nor a report.
        """
        if isinstance(loading_info, cls):
            return loading_info
        if not isinstance(loading_info, Mapping):
            raise InputError(
                f"loading must be a mapping; got a {type(loading_info).__name__}. Pass the second "
                "result of from_pretrained(name, output_loading_info=True)."
            )
        return cls(*(_names(loading_info.get(f"{f.name}_keys", ())) for f in fields(cls)))

    def __bool__(self) -> bool:
        """Return whether there is a difference."""
        return bool(self.missing or self.mismatched or self.unexpected)

    @property
    def n_random(self) -> int:
        """Number of random weights."""
        return len(self.missing) + len(self.mismatched)

    @property
    def differences(self) -> dict[str, list[str]]:
        """Names of the weights by kind of difference, without empty kinds; JSON-serialisable."""
        return {f.name: list(names) for f in fields(self) if (names := getattr(self, f.name))}

    def __str__(self) -> str:
        """Each kind of difference that occurs, with the first weight names."""
        about = {
            "missing": "not in the checkpoint, so random",
            "mismatched": "of another shape in the checkpoint, so random",
            "unexpected": "in the checkpoint, but not in the model",
        }
        return "; ".join(
            f"{about[kind]}: {first_of(names)}" for kind, names in self.differences.items()
        )


def _names(keys: Iterable[Any]) -> tuple[str, ...]:
    """Return sorted names; mismatched keys are tuples of name and two shapes."""
    return tuple(sorted(key if isinstance(key, str) else str(key[0]) for key in keys))


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
        for each in offload_hooks(module):
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


def modules_in_training(model: nn.Module) -> list[str]:
    """Return the names of the modules in training mode; the model's own is ``"the model"``."""
    if not any(module.training for module in module_tree(model)[0]):
        return []
    return [name or "the model" for name, module in model.named_modules() if module.training]


def evaluation_mode(model: nn.Module, *, warn: bool = True) -> AbstractContextManager[None]:
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
    return Block(partial(_all_in_evaluation, model)) if names else nullcontext()


def _all_in_evaluation(model: nn.Module, stack: ExitStack) -> None:
    for module in [module for module in model.modules() if module.training]:
        stack.callback(setattr, module, "training", True)
        module.training = False


def described_training(names: list[str]) -> str:
    """Describe the modules in training mode: their number, and the names of the first three."""
    first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    verb = "module is" if len(names) == 1 else "modules are"
    return f"{len(names)} {verb} in training mode, so any dropout in them is active ({first})"
