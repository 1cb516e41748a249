"""The analyses and figures of the command line by name, and the options of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from xmodal_interp import analysis, figures
from xmodal_interp.errors import InputError

Offer = Mapping[str, Callable[..., Any]]
"""Functions by their names on the command line."""

ANALYSES: Offer = {
    function.__name__.replace("_", "-"): function
    for function in (
        analysis.cross_modal_ratio,
        analysis.token_ratio,
        analysis.block_statistics,
        analysis.cross_modal_summary,
        analysis.attention_allocation,
        analysis.attention_rollout,
        analysis.positional_bias,
        analysis.recency_index,
        analysis.attention_sinks,
        analysis.sink_rate,
        analysis.raster_bias,
        analysis.raster_profile,
        analysis.attention_entropy,
        analysis.attention_distance,
    )
}
FIGURES: Offer = {
    function.__name__.replace("_", "-"): function
    for function in (
        figures.overlay,
        figures.overlays,
        figures.head_overlays,
        figures.layer_overlays,
        figures.token_head_grid,
        figures.attention_matrix,
        figures.token_patch_matrix,
        figures.mask_structure,
    )
}


def options_of(
    function: Callable[..., Any], name: str, given: Mapping[str, object]
) -> dict[str, Any]:
    """Return the options that were passed, after a check against the function's parameters.

    Args:
        function: An analysis or a figure; its first parameter is the store or the sample.
        name: Its name on the command line.
        given: The value of each option; None if the option was not passed.

    Raises:
        InputError: The function does not take an option, or a required option is missing.
    """
    _, *others = inspect.signature(function).parameters.values()
    options = {option: value for option, value in given.items() if value is not None}
    for option in options:
        if option not in {parameter.name for parameter in others}:
            raise InputError(f"{name} does not take --{option}.")
    for parameter in others:
        needed = (
            parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
        )
        if needed and parameter.name not in options:
            raise InputError(f"{name} requires --{parameter.name}.")
    return options


def described(offer: Offer, options: tuple[str, ...]) -> str:
    """Return a Markdown list: each name, the summary of its function, and its options."""
    lines = []
    for name, function in offer.items():
        doc = (inspect.getdoc(function) or "").splitlines()[0]
        parameters = inspect.signature(function).parameters
        taken = " ".join(f"`--{option}`" for option in options if option in parameters)
        lines.append(f"* `{name}`: {doc}{' ' if taken else ''}{taken}")
    return "\n".join(lines)
