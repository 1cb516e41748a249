r"""Draw the attention of a phrase on the image in a Qwen2-VL, layer by layer and head by head.

Uses the shipped model (requires torchvision) on a generated scene, or any Qwen2-VL on your image:

    python recipes/qwen2_vl_visualizer.py
    python recipes/qwen2_vl_visualizer.py --model Qwen/Qwen2-VL-7B-Instruct --image cat.png \
        --prompt "Where is the red cat on the image?" --phrase "red cat" --save-path cat.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import xmodal_interp as xi
from xmodal_interp import figures
from xmodal_interp.shapes import sample_scene


def main(
    model: Annotated[str, typer.Option(help="Hub id, folder, or qwen2_vl")] = "qwen2_vl",
    image: Annotated[Path | None, typer.Option(help="Image; default: a generated scene")] = None,
    prompt: Annotated[str | None, typer.Option(help="A question about the image")] = None,
    phrase: Annotated[str | None, typer.Option(help="Query phrase in the question")] = None,
    layers: Annotated[list[int], typer.Option(help="Layers to show")] = [-4, -3, -2, -1],  # noqa: B006
    save_path: Annotated[Path, typer.Option(help="Figure of the layers")] = Path(
        "runs/qwen/layers.png"
    ),
) -> None:
    """Draw the layers, the heads of the last given layer, and the token x image matrix."""
    if (prompt is None) != (phrase is None) or (image is not None and prompt is None):
        raise typer.BadParameter(
            "--image requires --prompt; --prompt and --phrase require each other."
        )
    save_path.parent.mkdir(parents=True, exist_ok=True)
    scene = sample_scene(np.random.default_rng(11), width=128, height=72)
    name = scene.things[0].name
    sample = xi.capture(
        xi.load(model),
        image or scene.image(),
        prompt or f"where is the {name} ?",
        max_new_tokens=16,
    )
    typer.echo(repr(sample))
    phrase = phrase or name
    grid = sample.grids[0]
    typer.echo(f"{grid.rows} x {grid.cols} image tokens on {grid.width} x {grid.height} px")
    figures.layer_overlays(sample, phrase, layers, path=save_path)
    figures.head_overlays(
        sample, phrase, layers[-1], path=save_path.with_stem(f"{save_path.stem}_heads")
    )
    figures.token_patch_matrix(
        sample, layers[-1], path=save_path.with_stem(f"{save_path.stem}_token_patch")
    )
    xi.token_ratio(sample).to_csv(save_path.with_suffix(".csv"), index=False)
    typer.echo(f"Figures written to {save_path.parent}")


if __name__ == "__main__":
    typer.run(main)
