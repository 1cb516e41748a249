"""Apply a geometry rule; if it does not fit the model or processor, raise a clear error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from xmodal_interp.errors import GeometryError, XmodalError

Grid = TypeVar("Grid")

_MISFITS = (
    *(AttributeError, LookupError, TypeError, ValueError, ArithmeticError),
    *(RuntimeError, StopIteration),
)
"""Errors that a rule may raise if the settings or inputs that it reads are missing."""


def applied(
    rule: Callable[[Any, Any, Mapping[str, Any], Sequence[Any]], list[Grid]],
    processor: Any,
    config: Any,
    inputs: Mapping[str, Any],
    shown: Sequence[Any],
) -> list[Grid]:
    """Return the grids of images or videos, one each.

    Args:
        rule: A rule of a family.
        processor: The processor.
        config: The model's configuration.
        inputs: The outputs of the processor.
        shown: The images, or the videos.

    Raises:
        GeometryError: The rule does not fit this model and processor: a setting or input is
            missing, or the number of grids is wrong.
    """
    name = f"The geometry rule {name_of(rule)}"
    fix = "Pass VLM(model, processor, family=...) a family record with a rule for this model."
    try:
        grids = rule(processor, config, inputs, shown)
    except XmodalError:
        raise
    except _MISFITS as error:
        raise GeometryError(
            f"{name} does not fit a {config.model_type!r} model with {type(processor).__name__} "
            f"({type(error).__name__}: {error}). {fix}"
        ) from error
    if len(grids) != len(shown):
        raise GeometryError(
            f"{name} returned {len(grids)} grids for {len(shown)} images or videos of a "
            f"{config.model_type!r} model. {fix}"
        )
    return grids


def name_of(rule: Any) -> str:
    """Return the name of a function, or of the class of an object."""
    return str(getattr(rule, "__name__", type(rule).__name__))
