r"""Analyse the attention from text to image: blocks, maps, heads, before and after training.

Uses the shipped LLaVA on a generated scene, or any model on your image:

    python recipes/cross_modal_attention.py
    python recipes/cross_modal_attention.py --model llava-hf/llava-1.5-7b-hf --image cat.png \
        --prompt "What color is the cat?" --phrase cat
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import xmodal_interp as xi
from xmodal_interp import figures
from xmodal_interp.shapes import sample_scene
from xmodal_interp.shapes.tiny_models import untrained
from xmodal_interp.vocabulary import SHIPPED


def main(
    model: Annotated[str, typer.Option(help="Hub id, folder, llava or qwen2_vl")] = "llava",
    image: Annotated[Path | None, typer.Option(help="Image; default: a generated scene")] = None,
    prompt: Annotated[str | None, typer.Option(help="A question about the image")] = None,
    phrase: Annotated[str | None, typer.Option(help="Query phrase in the question")] = None,
    layer: Annotated[int, typer.Option(help="Layer; negative counts from the last")] = -1,
    folder: Annotated[Path, typer.Option(help="Output folder")] = Path("runs/cross"),
) -> None:
    """Write all tables and figures."""
    folder.mkdir(parents=True, exist_ok=True)
    vlm = xi.load(model)
    scene = sample_scene(np.random.default_rng(7))
    if (prompt is None) != (phrase is None) or (image is not None and prompt is None):
        raise typer.BadParameter(
            "--image requires --prompt; --prompt and --phrase require each other."
        )
    picture = scene.image() if image is None else image
    prompt = prompt or f"What color is the {scene.things[0].shape}?"
    phrase = phrase or scene.things[0].shape
    sample = xi.capture(vlm, picture, prompt, max_new_tokens=8)
    typer.echo(repr(sample))

    tables = {
        "blocks": xi.block_statistics(sample),
        "summary": xi.cross_modal_summary(sample, layer),
        "ratio": xi.cross_modal_ratio(sample),
        "rollout": xi.attention_rollout(sample, phrase, baseline="uniform"),
        "positions": xi.positional_bias(sample),
        "raster": xi.raster_profile(sample),
    }
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    typer.echo(tables["summary"].T.to_string(header=False))

    figures.attention_matrix(sample, layer, path=folder / "matrix.png")
    figures.attention_matrix(sample, layer, zoom="text-image", path=folder / "matrix_zoom.png")
    figures.mask_structure(sample, layer, path=folder / "mask.png")
    figures.token_patch_matrix(sample, layer, path=folder / "token_patch.png")
    figures.overlays(sample, layer=layer, path=folder / "tokens.png")
    figures.head_overlays(sample, phrase, layer, path=folder / "heads.png")
    figures.token_head_grid(sample, layer=layer, path=folder / "token_head.png")
    figures.layer_overlays(sample, phrase, path=folder / "layers.png")
    figures.rollout_overlay(tables["rollout"], sample, path=folder / "rollout.png")
    figures.head_grid(tables["ratio"], "lift", path=folder / "ratio_heads.png")
    if model in SHIPPED:
        before = xi.capture(xi.VLM(untrained(model), vlm.processor), picture, prompt)
        figures.before_after(before, sample, phrase, layer, path=folder / "before_after.png")
    typer.echo(f"{len(list(folder.iterdir()))} files written to {folder}")


if __name__ == "__main__":
    typer.run(main)
