"""Look up the layers and heads of a model, and refuse those that do not exist."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from xmodal_interp.attention import entries_of, number, numbers
from xmodal_interp.errors import LayerError
from xmodal_interp.hooks.modules import Identity, attention_modules
from xmodal_interp.vocabulary import AttentionKind, Tower


def head_counts(model: nn.Module, tower: Tower) -> dict[int, int]:
    """Return the number of query heads of each self-attention layer of a tower, by layer.

    Raises:
        LayerError: There is no such layer, or the number of heads of a layer is unknown.
    """
    counts = layers_of(attention_modules(model), tower, "self")
    silent = [layer for layer, module in counts.items() if n_heads_of(module) is None]
    if silent:
        raise LayerError(
            f"The number of heads of {tower} self-attention, layers {ranged(silent)}, is unknown. "
            "Set num_heads on these modules, or num_attention_heads in their config."
        )
    return {layer: n_heads_of(module) or 0 for layer, module in counts.items()}


def checked_heads(
    wanted: Mapping[Any, Any],
    layers: Mapping[int, int | None],
    name: str,
) -> dict[int, tuple[int, ...]]:
    """Return existing heads by layer, without duplicates and with negative numbers resolved.

    Args:
        wanted: Heads by layer: numbers (negative ones count from the end), or a mask with an entry
            for each head.
        layers: The number of heads of every existing layer; None if unknown.
        name: The name of the layers for a message, such as ``"language self-attention"``.

    Raises:
        LayerError: A layer or head does not exist.
    """
    found: dict[int, tuple[int, ...]] = {}
    known = sorted(layers)
    for given, several in wanted.items():
        layer = number(given, "layer")
        index = known[layer] if -len(known) <= layer < 0 else layer
        if index not in layers:
            raise LayerError(f"There is no layer {layer}: {name} has layers {ranged(known)}.")
        count = layers[index]
        several = list(several) if isinstance(several, Iterator) else several
        row = entries_of(several)
        heads = [] if row is not None and not len(row) else numbers(several, "head", count)
        for head in heads:
            if head < 0 if count is None else not -count <= head < count:
                there = "an unknown number of heads" if count is None else f"heads 0 to {count - 1}"
                raise LayerError(f"There is no head {head}: {name}, layer {index}, has {there}.")
        positive = [head + (count or 0) if head < 0 else head for head in heads]
        found[index] = tuple(dict.fromkeys((*found.get(index, ()), *positive)))
    return found


def layers_of(
    known: Mapping[nn.Module, Identity], tower: Tower, kind: AttentionKind
) -> dict[int, nn.Module]:
    """Return the attention modules of a tower and kind, by layer.

    Raises:
        LayerError: The model has none.
    """
    found = {i.layer: m for m, i in known.items() if (i.tower, i.kind) == (tower, kind)}
    if not found:
        there = sorted({f"{i.tower} {i.kind}-attention" for i in known.values()})
        raise LayerError(
            f"The model has no {tower} {kind}-attention. It has {', '.join(there)}; pass one of "
            "these as tower= and kind=."
        )
    return dict(sorted(found.items()))


def n_heads_of(module: nn.Module) -> int | None:
    """Return the number of query heads of a layer, from its module or config; None if unknown."""
    for owner in (module, getattr(module, "config", None)):
        for name in ("num_attention_heads", "num_heads", "n_heads", "heads"):
            count = getattr(owner, name, None)
            if isinstance(count, int):
                return count
    return None


def ranged(values: Iterable[int]) -> str:
    """Return numbers as a string: ``"0 to 3"``, or ``"0, 2, 3"`` if some are missing."""
    ordered = sorted(values)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))
