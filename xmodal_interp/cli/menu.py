"""The analyses and figures of the command line by name, and the options of each.

The functions are imported when a command runs or its help is printed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from typer.core import TyperCommand

import xmodal_interp as xi
from xmodal_interp.errors import InputError

ANALYSES: tuple[str, ...] = (
    "cross-modal-ratio",
    "token-ratio",
    "block-statistics",
    "cross-modal-summary",
    "attention-allocation",
    "attention-rollout",
    "positional-bias",
    "recency-index",
    "attention-sinks",
    "sink-rate",
    "raster-bias",
    "raster-profile",
    "attention-entropy",
    "attention-distance",
    "token-norms",
)
FIGURES: tuple[str, ...] = (
    "overlay",
    "overlays",
    "head-overlays",
    "layer-overlays",
    "answer-overlays",
    "video-overlays",
    "token-head-grid",
    "attention-matrix",
    "token-patch-matrix",
    "mask-structure",
)


def options_of(
    package: str, name: str, given: Mapping[str, object]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return a function and the options that were passed, after a check against its parameters.

    Args:
        package: ``"analysis"`` or ``"figures"``.
        name: Name of the function on the command line. Its first parameter is the store or the
            sample.
        given: The value of each option; None if the option was not passed.

    Raises:
        InputError: The function does not take an option, or a required option is missing.
    """
    function = _function(package, name)
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
    return function, options


def listing(
    title: str, package: str, names: tuple[str, ...], options: tuple[str, ...]
) -> type[TyperCommand]:
    """Return a class of commands whose help ends with a list of functions and their options."""

    class Listing(TyperCommand):
        """Adds the list when the help is printed, because it imports the functions."""

        def format_help(self, ctx: Any, formatter: Any) -> None:
            """Print the help and the list."""
            lines = [f"{title}:", ""]
            for name in names:
                function = _function(package, name)
                doc = (inspect.getdoc(function) or "").splitlines()[0]
                parameters = inspect.signature(function).parameters
                taken = " ".join(f"`--{option}`" for option in options if option in parameters)
                lines.append(f"* `{name}`: {doc}{' ' if taken else ''}{taken}")
            self.epilog = "\n".join(lines)
            super().format_help(ctx, formatter)

    return Listing


def _function(package: str, name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(getattr(xi, package), name.replace("-", "_"))
    return function
