"""A rule, held against what it is given: a wrong one is refused in words, not by a traceback."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from xmodal_interp.errors import GeometryError, XmodalError

Grid = TypeVar("Grid")

_MISFITS = (
    *(AttributeError, LookupError, TypeError, ValueError, ArithmeticError),
    *(RuntimeError, StopIteration),
)
"""What a rule runs into that reads settings or inputs which another type has."""


def applied(
    rule: Callable[[Any, Any, Mapping[str, Any], Sequence[Any]], list[Grid]],
    processor: Any,
    config: Any,
    inputs: Mapping[str, Any],
    shown: Sequence[Any],
) -> list[Grid]:
    """What a rule makes of images or videos: as many grids.

    Args:
        rule: A rule of a family.
        processor: The processor.
        config: The model's configuration.
        inputs: What the processor returned.
        shown: The images, or the videos.

    Raises:
        GeometryError: The rule is none for this model and processor: it misses a setting or an
            input, or makes another number of grids.
    """
    name = f"The rule {name_of(rule)} was applied to a {config.model_type!r} model"
    try:
        grids = rule(processor, config, inputs, shown)
    except XmodalError:
        raise
    except _MISFITS as error:
        raise GeometryError(
            "A family's rule must be one for its model and processor. "
            f"{name} with {type(processor).__name__}, and ran into "
            f"{type(error).__name__}: {error}"
        ) from error
    if len(grids) != len(shown):
        raise GeometryError(
            "A family's rule must make a grid of each image or video. "
            f"{name}, and made {len(grids)} of {len(shown)}."
        )
    return grids


def name_of(rule: Any) -> str:
    """A function's own name, or that of the class."""
    return str(getattr(rule, "__name__", type(rule).__name__))
