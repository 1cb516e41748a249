"""Options of an image or video processor that a user chooses, such as ``max_pixels``.

The options become settings of a copy of the processor, as if the checkpoint had them. The geometry
rules, which read these settings, and the fingerprint of the processor therefore include them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from xmodal_interp.errors import InputError, first_of, quoted
from xmodal_interp.models.geometry.processor_steps import setting
from xmodal_interp.upstream import processor_defaults

_PARTS = {"images_kwargs": "image", "videos_kwargs": "video"}
_FAILURES = (ValueError, TypeError, AttributeError, LookupError)


def checked_options(options: Any) -> dict[str, Any]:
    """Return options as a dict.

    Raises:
        InputError: They are not a mapping of names to values.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise InputError(
            "processor_options must be a dict of names and values, such as {'max_pixels': 50176}; "
            f"got {quoted(options)}."
        )
    return dict(options)


def with_options(processor: Any, options: Mapping[str, Any]) -> Any:
    """Return a copy of a processor with other settings of its image and video processor.

    Args:
        processor: The processor, which is not changed; for a vision model, its image processor.
        options: Names and values. An option of both parts is set in both; ``{"images_kwargs":
            {...}, "videos_kwargs": {...}}`` sets the options of one.

    Raises:
        InputError: No part has an option of this name, or it does not take the value.
    """
    if not options:
        return processor
    changed = copy.copy(processor)
    for part, chosen in _by_part(processor, options).items():
        if not chosen:
            continue
        inner = _part(processor, part)
        try:
            rebuilt = type(inner).from_dict({**copy.deepcopy(inner.to_dict()), **chosen})
        except _FAILURES as error:
            raise InputError(
                f"{type(inner).__name__} does not take the options {quoted(chosen)}: {error}."
            ) from error
        if inner is processor:
            return rebuilt
        setattr(changed, f"{part}_processor", rebuilt)
        defaults = getattr(processor, f"{part}s_kwargs", None) or {}
        over = {name: value for name, value in chosen.items() if name in defaults}
        if over:  # defaults of the processor override the settings of its parts
            setattr(changed, f"{part}s_kwargs", {**defaults, **over})
        _check_set(changed, part, chosen)
    return changed


def _by_part(processor: Any, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the options of each part: ``image`` and ``video``."""
    found: dict[str, dict[str, Any]] = {"image": {}, "video": {}}
    known = {part: _names(_part(processor, part)) for part in found}
    for name, value in options.items():
        nested = value if name in _PARTS and isinstance(value, Mapping) else {name: value}
        parts = [_PARTS[name]] if nested is value else list(found)
        for inner, chosen in nested.items():
            takers = [part for part in parts if inner in known[part]]
            if not takers:
                _refuse(processor, inner, {each for part in parts for each in known[part]})
            for part in takers:
                found[part][inner] = chosen
    return found


def _part(processor: Any, part: str) -> Any:
    """Return the image or video processor; None if there is none.

    The processor of a vision model is an image processor itself.
    """
    if part == "image" and hasattr(processor, "preprocess"):
        return processor
    return getattr(processor, f"{part}_processor", None)


def _names(part: Any) -> set[str]:
    """Return the names of the options of an image or video processor; none if it is None."""
    kinds = getattr(getattr(part, "valid_kwargs", None), "__annotations__", {})
    own = () if part is None else part.to_dict()
    unset = {"return_tensors", "data_format", "input_data_format", "device"}
    return {*kinds, *own} - unset


def _refuse(processor: Any, name: str, known: set[str]) -> None:
    close = get_close_matches(str(name), known, n=3)
    names = first_of(close or sorted(each for each in known if not each.startswith("_")), 12)
    raise InputError(
        f"The processor {type(processor).__name__} has no option {name!r} for images or videos. "
        f"{'Similar options are' if close else 'Its options are'} {names}."
    )


def _check_set(processor: Any, part: str, chosen: Mapping[str, Any]) -> None:
    """Raise InputError for an option that defaults of the processor class override."""
    for name, value in chosen.items():
        fixed = processor_defaults(processor).get(f"{part}s_kwargs") or {}
        if name in fixed and setting(processor, name, part=part) != value:
            raise InputError(
                f"{type(processor).__name__} of this release of transformers sets {name}="
                f"{fixed[name]!r} itself, so {name}={value!r} has no effect. Leave it out."
            )
