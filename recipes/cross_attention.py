r"""Record and draw the cross-attention of a Mllama from text to the image.

By default the recipe builds a tiny Mllama with random weights, whose maps are meaningless. Pass a
checkpoint for meaningful maps:

    python recipes/cross_attention.py
    python recipes/cross_attention.py --model meta-llama/Llama-3.2-11B-Vision-Instruct \
        --image cat.png --prompt "Where is the cat?" --phrase cat
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import xmodal_interp as xi
from xmodal_interp import figures
from xmodal_interp.shapes import sample_scene
from xmodal_interp.shapes.tiny_models import build_processor, untrained


def main(
    model: Annotated[str | None, typer.Option(help="Hub id or folder of a Mllama")] = None,
    image: Annotated[Path | None, typer.Option(help="Image; default: a generated scene")] = None,
    prompt: Annotated[str, typer.Option(help="A question")] = "where is the red circle ?",
    phrase: Annotated[str, typer.Option(help="Query phrase in the question")] = "red circle",
    folder: Annotated[Path, typer.Option(help="Output folder")] = Path("runs/crossattn"),
) -> None:
    """Capture the sample, print its cross-attention layers and write the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    vlm = xi.load(model) if model else xi.VLM(untrained("mllama"), build_processor("mllama"))
    picture = image or sample_scene(np.random.default_rng(7), width=144, height=96).image()
    sample = xi.capture(vlm, picture, prompt)
    typer.echo(repr(sample))
    layers = sample.layers(kind="cross")
    for layer in layers:
        call = sample.call(layer, kind="cross")
        sums = call.probs().sum(-1)
        typer.echo(
            f"cross-attention in layer {layer}: {call.n_heads} heads, {call.n_queries} queries, "
            f"{call.n_keys} image keys; {int(sums.isnan().sum())} rows have no visible key, the "
            f"others sum to 1 within {(sums.nan_to_num(1.0) - 1).abs().max():.1e}"
        )
        probs = sample.probs(layer, queries=phrase, kind="cross").mean((0, 1))
        peak = np.unravel_index(np.nanargmax(sample.grid(probs)), sample.grid(probs).shape)
        typer.echo(f"  {phrase!r} attends most to row {peak[0]}, column {peak[1]}")
    figures.side_by_side(
        {
            f"cross-attention, layer {i}": figures.MatrixSelection(sample, i, kind="cross")
            for i in layers
        },
        path=folder / "cross_attention.png",
    )
    maps = {
        f"layer {i}": sample.grid(sample.probs(i, queries=phrase, kind="cross").mean((0, 1)))
        for i in layers
    }
    figures.map_overlays(sample, maps, f"probability of {phrase!r}", path=folder / "maps.png")
    typer.echo(f"Figures written to {folder}")


if __name__ == "__main__":
    typer.run(main)
