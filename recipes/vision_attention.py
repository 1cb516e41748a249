r"""Show what a vision model attends to: class token by layer, sinks, rollout and token norms.

Any vision model of transformers with one position per patch, by Hub id or folder:

    python recipes/vision_attention.py
    python recipes/vision_attention.py --model facebook/dinov2-small --image cat.png --out runs/vit

Without ``--model``, a tiny random DINOv2 with registers is used, which shows how the recipe runs
but has learned nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, ViTImageProcessor

import xmodal_interp as xi
from xmodal_interp import figures
from xmodal_interp.shapes import sample_scene


def tiny_model() -> xi.VLM:
    """Return a tiny random DINOv2 with registers, which needs no download."""
    config = Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=96, patch_size=8
    )
    processor = ViTImageProcessor(size={"height": 96, "width": 96})
    return xi.VLM(Dinov2WithRegistersModel(config).eval(), processor)


def main(
    model: Annotated[str | None, typer.Option(help="Hub id or folder of a vision model")] = None,
    image: Annotated[Path | None, typer.Option(help="Image; default: a generated scene")] = None,
    out: Annotated[Path, typer.Option(help="Output folder")] = Path("runs/vision"),
) -> None:
    """Draw the class token's attention, the sinks, rollout with and without layer 0, and norms."""
    vlm = tiny_model() if model is None else xi.load(model)
    picture = image or sample_scene(np.random.default_rng(11), width=128, height=96).image()
    name = "scene" if image is None else image.stem
    sample = xi.capture(vlm, picture, keep=xi.Keep(norms=True), name=name)
    typer.echo(repr(sample))
    out.mkdir(parents=True, exist_ok=True)
    layers = sample.layers()

    figures.layer_overlays(sample, "class", path=out / f"{name}_class_token.png")
    late = layers[-2]  # the last layer of a self-supervised model often spreads its attention
    figures.head_overlays(sample, "class", late, path=out / f"{name}_class_token_heads.png")

    sinks = xi.attention_sinks(sample).query("sink")
    sinks.to_csv(out / f"{name}_sinks.csv", index=False)
    for row in sinks.sort_values("received", ascending=False).head(5).itertuples():
        place = f"row {row.row}, column {row.col}" if row.token == "patch" else f"{row.token} token"
        typer.echo(
            f"layer {row.layer}, head {row.head}: {row.received:.1%} of all attention is on {place}"
        )
    figures.attention_matrix(sample, layers[0], path=out / f"{name}_first_layer.png")

    starts = {"all layers": None, "without layer 0": (layers[0] + 1, None)}
    tables = {title: xi.attention_rollout(sample, layers=of) for title, of in starts.items()}
    maps = {title: table["rollout"].to_numpy() for title, table in tables.items()}
    last = sample.probs(late, queries="class")[:, 0].mean(0).numpy()
    figures.map_overlays(
        sample,
        {**maps, f"class token, layer {late}": last},
        "share or probability",
        title="rollout of the class token, and its attention in one layer",
        path=out / f"{name}_rollout.png",
    )
    peaks = pd.Series({title: _place(table) for title, table in tables.items()})
    typer.echo("rollout is largest at " + "; ".join(f"{at} ({of})" for of, at in peaks.items()))

    norms = xi.token_norms(sample)
    norms.to_csv(out / f"{name}_token_norms.csv", index=False)
    patches = norms[norms["token_kind"].eq("image")]
    largest = patches.groupby("layer")["ratio"].max()
    typer.echo(
        f"largest norm of a patch: {largest.iloc[-1]:.1f} times the median in the last layer, "
        f"{largest.max():.1f} times in layer {largest.idxmax()}"
    )
    shown = {f"layer {layer}": layer for layer in (layers[len(layers) // 2], layers[-1])}
    ratio = norms.set_index("layer")["ratio"]
    figures.map_overlays(
        sample,
        {title: sample.grid(ratio.loc[layer].to_numpy()) for title, layer in shown.items()},
        "norm of the hidden state,\ndivided by the median patch",
        title="token norms after the block of a layer",
        power=1.0,
        path=out / f"{name}_token_norms.png",
    )
    typer.echo(f"Figures and tables written to {out}")


def _place(table: pd.DataFrame) -> str:
    """Return row and column of the patch with the largest rollout."""
    patches = table[table["row"].notna()]
    best = patches.loc[patches["rollout"].idxmax()]
    return f"row {best['row']}, column {best['col']}"


if __name__ == "__main__":
    typer.run(main)
