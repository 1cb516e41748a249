r"""Compare the attention masks of a language model, a vision transformer and a VLM.

LLaVA-like models are often drawn with bidirectional attention between image tokens. Their language
model is causal throughout, including image tokens. This recipe measures each mask on a running
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
    image: Annotated[Path | None, typer.Option(help="Image; default: a generated scene")] = None,
    prompt: Annotated[str, typer.Option(help="A question about the image")] = "how many shapes ?",
    folder: Annotated[Path, typer.Option(help="Output folder")] = Path("runs/masks"),
) -> None:
    """Measure the masks, print the table and write the figures."""
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
        "LLM: text only": figures.MatrixSelection(llm),
        "ViT: patches only": figures.MatrixSelection(vit),
        f"VLM: {vlm.family.model_type}": figures.MatrixSelection(sample, layer=0),
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
        f"Image tokens attend to {above_diagonal(between)['visible_above_diagonal']:.0%} of the "
        "image tokens after them: 0% is causal, 100% is bidirectional."
    )
    figures.mask_comparison(views, path=folder / "masks.png")
    figures.side_by_side(views, path=folder / "attention.png")
    typer.echo(f"Figures written to {folder}")


def above_diagonal(visible: torch.Tensor) -> dict[str, float]:
    """Return the share of visible cells above and below the diagonal of a square block."""
    above = torch.ones_like(visible).triu(1)
    below = torch.ones_like(visible).tril(-1)
    return {
        "visible_above_diagonal": float(visible[above].float().mean()),
        "visible_below_diagonal": float(visible[below].float().mean()),
    }


if __name__ == "__main__":
    typer.run(main)
