"""Check generation options: a captured sample is generated once, token by token."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig

from xmodal_interp.arguments import string
from xmodal_interp.errors import InputError, quoted

GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1}
"""Defaults of ``generate``; they override the generation settings of the checkpoint.

Options and the ``generation_config`` of a call override them.
"""

_ONE_BY_ONE: dict[str, tuple[Any, str]] = {
    "num_beams": (1, "generates several answers at once and keeps one of them"),
    "num_return_sequences": (1, "generates several answers to one prompt"),
    "guidance_scale": (1, "runs each step twice, with and without the prompt"),
    "assistant_model": (None, "runs tokens proposed by another model and drops those it rejects"),
    "prompt_lookup_num_tokens": (
        None,
        "runs tokens copied from the prompt and drops those it rejects",
    ),
    "assistant_early_exit": (
        None,
        "runs tokens proposed by its own first layers and drops those it rejects",
    ),
    "custom_generate": (None, "may run tokens in any order"),
    "return_dict_in_generate": (False, "returns more than ids"),
}
"""Options of ``generate``: the value that generates token by token, and what other values do."""


def check_decoding(model: Any, options: Mapping[str, Any]) -> None:
    """Raise InputError for options of ``generate`` other than greedy decoding or sampling.

    Args:
        model: The model, whose ``generation_config`` is used for options that are not given.
        options: Arguments of ``model.generate``.
    """
    refuse_canvas(model)
    n_cached = _n_cached(options.get("past_key_values"))
    if n_cached:
        raise InputError(
            f"The cache in past_key_values already holds {n_cached} positions, whose rows of "
            "attention this run does not compute. Pass an empty cache or no cache, or record the "
            "calls with xi.record(model)."
        )
    for name, (required, effect) in _ONE_BY_ONE.items():
        given = _setting(model, options, name)
        if given is not None and given != required:
            shown = type(given).__name__ if name == "assistant_model" else repr(given)
            raise InputError(
                f"{name}={shown} {effect}, so the rows of attention are not those of one answer's "
                "tokens in order. Generate greedily or by sampling, or record the calls with "
                "xi.record(model)."
            )


def _setting(model: Any, options: Mapping[str, Any], name: str) -> Any:
    """Return the value of an option of ``generate``.

    It is the argument; or the value in the ``generation_config`` of the call; or the greedy
    default; or the setting of the checkpoint.
    """
    of_call = getattr(options.get("generation_config"), name, None)
    if name in options or of_call is not None:
        return options.get(name, of_call)
    return GREEDY.get(name, getattr(model.generation_config, name, None))


def arguments_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``generate`` for some options: greedy unless they set another value.

    If the options contain a ``generation_config``, the other options are written into a copy of it,
    because transformers deprecates passing both.
    """
    config = options.get("generation_config")
    if config is None:
        return {**GREEDY, **options}
    missing = {name: v for name, v in GREEDY.items() if getattr(config, name, None) is None}
    others = {name: value for name, value in options.items() if name != "generation_config"}
    merged = copy.deepcopy(config)
    unused = merged.update(**missing | others)  # arguments that are no generation settings
    return {"generation_config": merged, **unused}


def described(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of ``generate`` as JSON values; objects without one by the name of their type.

    Args:
        options: The options; a ``generation_config`` is described by what differs from the default.
    """
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name == "generation_config":
            changed = value.to_diff_dict().items()
            value = {name: each for name, each in changed if name != "transformers_version"}
        try:
            found[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError):
            found[name] = type(value).__name__
    return found


def end_ids_of(model: Any, options: Mapping[str, Any]) -> set[int]:
    """Return the ids that end an answer that is generated with these options."""
    ends = _setting(model, options, "eos_token_id")
    ends = ends.flatten().tolist() if hasattr(ends, "flatten") else ends
    return set(ends) if isinstance(ends, (list, tuple, set)) else {ends} - {None}


def ends_by_text(model: Any, options: Mapping[str, Any]) -> bool:
    """Return whether an answer may end without an end-of-sequence token.

    In a batch, an answer that ended before the others is padded. Without an end-of-sequence token,
    padding tokens cannot be distinguished from generated ones.
    """
    names = ("stop_strings", "stopping_criteria")
    return any(_setting(model, options, name) for name in names)


def check_answers(
    model: Any, answers: Sequence[Any], max_new_tokens: int, *, language: bool = True
) -> None:
    """Raise InputError for given answers that are no strings, or that are generated too.

    Args:
        model: The model.
        answers: The given answer of each sample; None for samples without one.
        max_new_tokens: The number of tokens to generate.
        language: Whether the model has a language model, which reads answers.
    """
    given = [answer for answer in answers if answer is not None]
    if not given:
        return
    for answer in given:
        string(answer, "A given answer")
    if not language:
        raise InputError(
            f"A {model.config.model_type} model has no language model; got the answer "
            f"{given[0]!r}. Leave the answer out."
        )
    if max_new_tokens:
        raise InputError(
            f"The answer {given[0]!r} is given, so none is generated, but max_new_tokens is "
            f"{max_new_tokens}. Pass max_new_tokens=0, or leave out the answer (in a chat, the "
            "assistant's last message)."
        )
    refuse_canvas(model)


def refuse_canvas(model: Any) -> None:
    """Raise InputError for a block diffusion model, which does not generate token by token."""
    canvas = getattr(model.config, "canvas_length", None)
    if canvas is not None:
        raise InputError(
            f"{type(model).__name__} generates by block diffusion, {canvas} positions at a time, "
            "not token by token. Capture the prompt with max_new_tokens=0, or record the calls "
            "with xi.record(model)."
        )


def _n_cached(cache: Any) -> int:
    """Return the number of positions in a Cache, or in a tuple of keys and values by layer."""
    if cache is None:
        return 0
    if isinstance(cache, (tuple, list)):  # the cache format of earlier versions of transformers
        return max((int(layer[0].shape[-2]) for layer in cache), default=0)
    if hasattr(cache, "self_attention_cache"):
        parts = (cache.self_attention_cache, cache.cross_attention_cache)
        return max(_n_cached(part) for part in parts)
    layers = (layer for layer in cache.layers if hasattr(layer, "get_seq_length"))
    lengths = (int(layer.get_seq_length()) for layer in layers)
    return next((length for length in lengths if length), 0)


def checked_length(max_new_tokens: Any, generation: Any) -> int:
    """Return the number of tokens to generate, checked.

    Args:
        max_new_tokens: The number as the user gave it.
        generation: Further arguments of ``generate``, or None.

    Raises:
        InputError: The number is negative or not a whole number, or 0 although ``generation`` is
            given; or ``generation`` is not a mapping, contains ``max_new_tokens``
            too, or has an invalid ``generation_config``.
    """
    whole = hasattr(max_new_tokens, "__index__") and not isinstance(max_new_tokens, bool)
    if not whole or int(max_new_tokens) < 0:
        raise InputError(
            f"max_new_tokens must be a whole number, 0 or more; got {max_new_tokens!r}."
        )
    if generation is not None and not isinstance(generation, Mapping):
        raise InputError(
            "generation must be a mapping of arguments of model.generate to their values; got "
            f"{generation!r}."
        )
    if generation is not None and "max_new_tokens" in generation:
        raise InputError(
            "generation contains max_new_tokens. Pass it as a separate argument: max_new_tokens="
            f"{generation['max_new_tokens']!r}."
        )
    config = None if generation is None else generation.get("generation_config")
    if not isinstance(config, GenerationConfig | None):
        raise InputError(
            "generation_config must be a transformers.GenerationConfig; got an object of "
            f"{type(config).__name__}."
        )
    length = getattr(config, "max_new_tokens", None)
    if length is not None and length != max_new_tokens:
        raise InputError(
            f"The generation_config has max_new_tokens={length!r}, but the argument max_new_tokens "
            f"is {max_new_tokens!r}. Pass the same number as the argument."
        )
    if generation and not int(max_new_tokens):
        raise InputError(
            f"generation={quoted(dict(generation))} has no effect, because max_new_tokens is 0. "
            "Pass the number of tokens to generate, or leave generation out."
        )
    return int(max_new_tokens)
