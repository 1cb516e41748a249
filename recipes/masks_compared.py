r"""What may attend to what: a language model, a vision transformer, a VLM, as they really run.

It is often said that a LLaVA-like model lets image tokens see each other both ways. It does not:
its language model is causal throughout, image included. Here each mask is measured on a running
model.

    python recipes/masks_compared.py
    python recipes/masks_compared.py --model llava-hf/llava-1.5-7b-hf --image cat.png \
        --prompt "A cat?"
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer
from transformers import LlamaForCausalLM

import xmodal_interp as xi
from xmodal_interp import figures
from xmodal_interp.shapes import sample_scene


def main(
    model: Annotated[str, typer.Option(help="Hub id, folder, llava or qwen2_vl")] = "llava",
    image: Annotated[Path | None, typer.Option(help="An image; a generated scene if none")] = None,
    prompt: Annotated[str, typer.Option(help="A question about it")] = "how many shapes ?",
    folder: Annotated[Path, typer.Option(help="Where the pictures go")] = Path("runs/masks"),
) -> None:
    """Measure, print and draw."""
    folder.mkdir(parents=True, exist_ok=True)
    vlm = xi.load(model)
    picture = sample_scene(np.random.default_rng(7)).image() if image is None else image
    sample = xi.capture(vlm, picture, prompt)

    text_only = LlamaForCausalLM(xi.load("llava").model.config.text_config).eval()
    with torch.no_grad(), xi.record(text_only) as recording:
        text_only(input_ids=torch.arange(5, 29)[None])
    llm = recording.calls[0]
    vit = sample.call(0, tower="vision")
    views = {
        "LLM: text only": figures.View(llm),
        "ViT: patches only": figures.View(vit),
        f"VLM: {vlm.family.model_type}": figures.View(sample, layer=0),
    }
    rows = [
        {"model": "LLM", "block": "text-text", **above_diagonal(llm.visible()[0, 0])},
        {"model": "ViT", "block": "patch-patch", **above_diagonal(vit.visible()[0, 0])},
    ]
    visible = sample.call(0).visible()[0, 0]
    images, text = sample.where("image"), sample.text_after_image()
    for name, positions in {"image-image": images, "text-text": text}.items():
        block = visible[positions][:, positions]
        rows.append({"model": vlm.family.model_type, "block": name, **above_diagonal(block)})
    table = pd.DataFrame(rows)
    table.to_csv(folder / "masks.csv", index=False)
    typer.echo(table.to_string(index=False))
    between = visible[images][:, images]
    typer.echo(
        f"Image tokens see {above_diagonal(between)['visible_above_diagonal']:.0%} of the image "
        "tokens "
        "behind them: 0% is causal, 100% is the block that is often drawn."
    )
    figures.mask_comparison(views, path=folder / "masks.png")
    figures.side_by_side(views, path=folder / "attention.png")
    typer.echo(f"Pictures in {folder}")


def above_diagonal(visible: torch.Tensor) -> dict[str, float]:
    """Share of visible cells above and below the diagonal of a square block."""
    above = torch.ones_like(visible).triu(1)
    below = torch.ones_like(visible).tril(-1)
    return {
        "visible_above_diagonal": float(visible[above].float().mean()),
        "visible_below_diagonal": float(visible[below].float().mean()),
    }


if __name__ == "__main__":
    typer.run(main)
