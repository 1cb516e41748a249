"""Settings of a processor that older checkpoints lack and the model determines.

The processors of LLaVA write one placeholder per image token, and compute their number from
``patch_size``, ``vision_feature_select_strategy`` and ``num_additional_image_tokens``. Checkpoints
saved before these settings existed have none of them; the model has all three.
"""

from __future__ import annotations

import copy
from typing import Any

_ADDITIONAL = "num_additional_image_tokens"
_EXTRA_TOKENS = {"class_embedding": 1, "cls_token": 1, "register_tokens": None}
"""Parameters of tokens that a tower adds to the patches, and how many; None for one per row."""


def completed(processor: Any, model: Any) -> Any:
    """Return the processor with its missing settings taken from the model; it is not changed.

    A setting is missing if the processor has it with the value None. Settings that the model's
    config does not have either stay None (see :func:`unset`).
    """
    names = unset(processor)
    if not names:
        return processor
    config = model.config
    known = {
        "patch_size": getattr(getattr(config, "vision_config", None), "patch_size", None),
        # a model without this setting (VipLlava) leaves the class token out
        "vision_feature_select_strategy": getattr(
            config, "vision_feature_select_strategy", "default"
        ),
    }
    found = {name: known[name] for name in names if known[name] is not None}
    if "patch_size" in found and getattr(processor, _ADDITIONAL, None) == 0:
        found[_ADDITIONAL] = _n_extra_tokens(model)
    filled = copy.copy(processor)
    for name, value in found.items():
        setattr(filled, name, value)
    return filled


def unset(processor: Any) -> list[str]:
    """Return the settings of a processor that have no value."""
    names = ("patch_size", "vision_feature_select_strategy")
    return [name for name in names if getattr(processor, name, 0) is None]


def _n_extra_tokens(model: Any) -> int:
    """Return the number of class and register tokens that the vision tower adds to the patches."""
    total = 0
    for path, weight in model.named_parameters():
        name = path.rpartition(".")[2]
        if name in _EXTRA_TOKENS and "vision" in path:
            total += _EXTRA_TOKENS[name] or weight.shape[-2]
    return total
