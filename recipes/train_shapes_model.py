"""Train one of the two shipped models from scratch. Training can be interrupted at any time.

The same command resumes from the last evaluation:

    python recipes/train_shapes_model.py llava runs/llava --export checkpoints/llava
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from tqdm import tqdm

from xmodal_interp.shapes.training import Settings, Trainer


def main(
    family: Annotated[str, typer.Argument(help="llava or qwen2_vl")],
    folder: Annotated[Path, typer.Argument(help="Folder for the state of the run")],
    export: Annotated[Path, typer.Option(help="Folder for the finished checkpoint")],
    steps: Annotated[int, typer.Option(help="Training steps of 32 images")] = Settings(
        "llava"
    ).steps,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the scenes")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's")] = None,
) -> None:
    """Train, then write the checkpoint."""
    if threads is not None:
        torch.set_num_threads(threads)
    trainer = Trainer(Settings(family, seed=seed, steps=steps))
    if trainer.resume(folder):
        typer.echo(f"Resuming from step {trainer.step} in {folder}.")
    with tqdm(total=steps, initial=trainer.step, unit="step", mininterval=5) as bar:

        def report(step: int, loss: float) -> None:
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if trainer.history and step % trainer.settings.evaluate_every == 1:
                bar.write(
                    "  ".join(f"{name} {value:.3f}" for name, value in trainer.history[-1].items())
                )

        trainer.run(folder, report)
    trainer.export(export)
    typer.echo("  ".join(f"{name} {value:.3f}" for name, value in trainer.history[-1].items()))
    typer.echo(f"Written to {export}.")


if __name__ == "__main__":
    typer.run(main)
