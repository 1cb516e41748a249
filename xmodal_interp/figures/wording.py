"""Texts in figures: names of layers, heads and tokens, and the question."""

from __future__ import annotations

from collections.abc import Sequence

from xmodal_interp.attention import AttentionCall, Positions, resolve
from xmodal_interp.figures.style import readable
from xmodal_interp.sample import Sample


def about(sample: Sample) -> str:
    """Return the question, followed by the answer if there is one."""
    return (
        f'"{sample.question}" \u2192 "{sample.answer}"' if sample.answer else f'"{sample.question}"'
    )


def layer_name(call: AttentionCall) -> str:
    """Return a layer's name: ``"language layer 3"`` or ``"language cross-attention layer 3"``."""
    return f"{call.tower} {'cross-attention ' if call.kind == 'cross' else ''}layer {call.layer}"


def heads_name(call: AttentionCall, heads: Positions | None) -> str:
    """Return a name for the chosen heads, such as ``"head 3"`` or ``"mean of 8 heads"``."""
    if heads is None:
        return f"mean of {call.n_heads} heads" if call.n_heads > 1 else "its only head"
    chosen = resolve(heads, call.n_heads, "head").tolist()
    if len(chosen) == 1:
        return f"head {chosen[0]}"
    few = len(chosen) <= 6
    return f"mean of heads {', '.join(map(str, chosen))}" if few else f"mean of {len(chosen)} heads"


def named(sample: Sample, positions: Sequence[int], longest: int = 24) -> str:
    """Return the text of some tokens, such as ``"red circle"``, or for many tokens their number."""
    table = sample.tokens.iloc[list(positions)]
    together = list(positions) == list(range(positions[0], positions[-1] + 1))
    if together and table["kind"].eq("text").all():
        text = sample.text[int(table["start"].iloc[0]) : int(table["end"].iloc[-1])]
        return f'"{readable(text, longest)}"'
    if len(positions) <= 3:
        return ", ".join(f'"{readable(str(token), longest)}"' for token in table["token"])
    return f"{len(positions)} tokens"


def panel_name(sample: Sample, positions: Sequence[int]) -> str:
    """Return the text of a panel's query; generated tokens are marked ``(answer)``."""
    generated = sample.tokens["role"].iloc[list(positions)].eq("generated").all()
    return named(sample, positions, 18) + (" (answer)" if generated else "")
