"""Which layers and heads a model has, and the refusal of others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from xmodal_interp.attention import entries_of, number, numbers
from xmodal_interp.errors import LayerError
from xmodal_interp.hooks.modules import Identity, attention_modules
from xmodal_interp.vocabulary import AttentionKind, Tower


def head_counts(model: nn.Module, tower: Tower) -> dict[int, int]:
    """How many query heads each self-attention layer of a tower has, ascending.

    Raises:
        LayerError: There is no such layer, or one that does not say how many heads it has.
    """
    counts = layers_of(attention_modules(model), tower, "self")
    silent = [layer for layer, module in counts.items() if n_heads_of(module) is None]
    if silent:
        raise LayerError(
            "A layer must say how many heads it has (num_heads, or num_attention_heads in its "
            f"config); {tower} self-attention, layers {ranged(silent)}, does not."
        )
    return {layer: n_heads_of(module) or 0 for layer, module in counts.items()}


def checked_heads(
    wanted: Mapping[Any, Any],
    layers: Mapping[int, int | None],
    name: str,
) -> dict[int, tuple[int, ...]]:
    """Layers and heads that exist, each once, negative ones counted from the end.

    Args:
        wanted: Heads by layer: numbers, or a mask with an entry for each head.
        layers: The number of heads of every layer there is, or None where it is unknown.
        name: What to call the layers in a message: ``"language self-attention"``.

    Raises:
        LayerError: A layer or head that does not exist.
    """
    found: dict[int, tuple[int, ...]] = {}
    known = sorted(layers)
    for given, several in wanted.items():
        layer = number(given, "layer")
        index = known[layer] if -len(known) <= layer < 0 else layer
        if index not in layers:
            raise LayerError(f"A layer must exist. {name} has layers {ranged(known)}; got {layer}.")
        count = layers[index]
        several = list(several) if isinstance(several, Iterator) else several
        row = entries_of(several)
        heads = [] if row is not None and not len(row) else numbers(several, "head", count)
        for head in heads:
            if head < 0 if count is None else not -count <= head < count:
                there = "an unknown number of heads" if count is None else f"heads 0 to {count - 1}"
                raise LayerError(
                    f"A head must exist. {name}, layer {index}, has {there}; got {head}."
                )
        positive = [head + (count or 0) if head < 0 else head for head in heads]
        found[index] = tuple(dict.fromkeys((*found.get(index, ()), *positive)))
    return found


def layers_of(
    known: Mapping[nn.Module, Identity], tower: Tower, kind: AttentionKind
) -> dict[int, nn.Module]:
    """The attention modules of a tower by layer, ascending.

    Raises:
        LayerError: There are none.
    """
    found = {i.layer: m for m, i in known.items() if (i.tower, i.kind) == (tower, kind)}
    if not found:
        there = sorted({f"{i.tower} {i.kind}-attention" for i in known.values()})
        raise LayerError(
            f"A layer must exist. The model has {', '.join(there)}; it has no {tower} "
            f"{kind}-attention."
        )
    return dict(sorted(found.items()))


def n_heads_of(module: nn.Module) -> int | None:
    """Query heads of a layer, as modeling code has it: on the module, else in its config."""
    for owner in (module, getattr(module, "config", None)):
        for name in ("num_attention_heads", "num_heads", "n_heads", "heads"):
            count = getattr(owner, name, None)
            if isinstance(count, int):
                return count
    return None


def ranged(values: Iterable[int]) -> str:
    """Such as ``"0 to 3"``, or ``"0, 2, 3"`` where some are missing."""
    ordered = sorted(values)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))
