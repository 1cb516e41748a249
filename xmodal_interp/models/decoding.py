"""How a model may generate while it is captured: each sample is read once, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xmodal_interp.errors import InputError

GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1}
"""What holds unless told otherwise, whatever the checkpoint's own generation settings are."""

_PLAIN: dict[str, tuple[Any, str]] = {
    "num_beams": (1, "reads several answers at once and drops all but one"),
    "num_return_sequences": (1, "gives several answers to one prompt"),
    "guidance_scale": (1, "reads each step twice, with and without the prompt"),
    "assistant_model": (None, "reads tokens of another model and drops those it rejects"),
    "prompt_lookup_num_tokens": (
        None,
        "reads tokens of the prompt again and drops those it rejects",
    ),
    "assistant_early_exit": (
        None,
        "reads tokens of its own first layers and drops those it rejects",
    ),
    "custom_generate": (None, "may read tokens in any way"),
    "return_dict_in_generate": (False, "returns more than ids"),
}


def check_decoding(model: Any, options: Mapping[str, Any]) -> None:
    """Raise InputError for options of ``generate`` that don't give one answer, read in order.

    Args:
        model: Its ``generation_config`` counts where the options say nothing.
        options: Arguments of ``model.generate``.
    """
    refuse_canvas(model)
    n_cached = _n_cached(options.get("past_key_values"))
    if n_cached:
        raise InputError(
            f"The cache in past_key_values already holds {n_cached} positions, whose rows of "
            "attention this run does not compute. Pass an empty cache or none, or record the calls "
            "with xi.record(model)."
        )
    settings = options.get("generation_config") or model.generation_config
    for name, (plain, what) in _PLAIN.items():
        given = {**GREEDY, **options}.get(name, getattr(settings, name, plain))
        if given is not None and given != plain:
            shown = type(given).__name__ if name == "assistant_model" else repr(given)
            raise InputError(
                "A sample is one answer, read once and in order, so that each row of attention is "
                f"a token of it. {name}={shown} {what}. Generate greedily or by sampling; for "
                "anything else record the calls as they come with xi.record(model)."
            )


def refuse_canvas(model: Any) -> None:
    """Raise InputError for a model of block diffusion, which has no logits for a next token."""
    canvas = getattr(model.config, "canvas_length", None)
    if canvas is not None:
        raise InputError(
            f"{type(model).__name__} writes its answer on a canvas of {canvas} positions that it "
            "reads as a whole again and again, not token by token. Capture the prompt with "
            "max_new_tokens=0, or record the calls as they come with xi.record(model)."
        )


def _n_cached(cache: Any) -> int:
    """How many positions a cache of transformers holds, or a tuple of keys and values by layer."""
    if cache is None:
        return 0
    if isinstance(cache, (tuple, list)):  # as in earlier versions
        return max((int(layer[0].shape[-2]) for layer in cache), default=0)
    if hasattr(cache, "self_attention_cache"):
        parts = (cache.self_attention_cache, cache.cross_attention_cache)
        return max(_n_cached(part) for part in parts)
    layers = (layer for layer in cache.layers if hasattr(layer, "get_seq_length"))
    lengths = (int(layer.get_seq_length()) for layer in layers)
    return next((length for length in lengths if length), 0)


def checked_length(max_new_tokens: Any, generation: Any) -> int:
    """How many tokens to generate, if that is a number, and said in one place.

    Args:
        max_new_tokens: As the user gives it.
        generation: Further arguments of ``generate``, or None.

    Raises:
        InputError: It is no whole number or negative, the arguments are no mapping, or they give
            the number again.
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
            "The number of tokens to generate is an argument of its own, max_new_tokens="
            f"{generation['max_new_tokens']!r}; generation holds the others. Got it in generation."
        )
    return int(max_new_tokens)
