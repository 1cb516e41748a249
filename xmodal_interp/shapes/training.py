"""Train the shipped models from scratch, on two CPU cores.

1. Every step draws new scenes from ``(seed, step)``. No scene repeats, and a resumed run uses the
   same scenes as an uninterrupted one.
2. All questions about an image are packed after it (:mod:`xmodal_interp.shapes.packing`). Place
   questions are learned last, so the second half of the steps has more of them.
3. The loss is cross-entropy on the tokens of the answers and their end-of-sequence tokens.
4. Muon (Jordan et al. 2024) optimises hidden matrices; AdamW optimises embeddings, head, norms,
   biases and convolutions. The learning rate warms up, then follows a cosine down to 3%.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from xmodal_interp.shapes.architectures import untrained
from xmodal_interp.shapes.packing import FOCUS, IGNORE, Batch, Packer, packed_attention
from xmodal_interp.shapes.processors import build_processor
from xmodal_interp.shapes.questions import KINDS
from xmodal_interp.shapes.scenes import sample_scene

# width x height; all have 144 tokens, and half of Qwen2-VL's steps are not square
CANVASES = {
    "llava": ((96, 96),),
    "qwen2_vl": ((96, 96), (96, 96), (128, 72), (72, 128)),
}
_EVALUATED = (4, 64)  # number of batches, and of scenes in each
_HELD_OUT = 2**31  # seed of evaluation scenes, larger than every training step


@dataclass(frozen=True)
class Settings:
    """Settings of a training run; they are saved with the checkpoint."""

    family: str
    seed: int = 0
    steps: int = 1700
    batch: int = 32
    muon_lr: float = 0.01
    adamw_lr: float = 3e-3
    weight_decay: float = 0.05
    warmup: int = 150
    focus_from: float = 0.45  # share of the steps after which FOCUS replaces SLOTS
    evaluate_every: int = 250


class Trainer:
    """A training run: model, optimisers and current step, which ``save`` and ``resume`` handle."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.model: PreTrainedModel = untrained(settings.family, settings.seed)
        canvases = CANVASES[settings.family]
        self.packers = [Packer(settings.family, *canvas) for canvas in canvases]
        self.focused = [Packer(settings.family, *canvas, FOCUS) for canvas in canvases]
        self.optimizers = _optimizers(self.model, settings)
        self.step = 0
        self.history: list[dict[str, float]] = []

    def run(self, folder: Path, report: Callable[[int, float], None]) -> None:
        """Train to the last step.

        Args:
            folder: Folder in which the state is saved at every evaluation.
            report: Called with step and loss after every step.
        """
        losses: list[float] = []
        with packed_attention(self.model, len(self.packers[0].prefix)):
            while self.step < self.settings.steps:
                losses.append(self._train_step())
                self.step += 1
                report(self.step, losses[-1])
                due = self.step % self.settings.evaluate_every == 0
                if due or self.step == self.settings.steps:
                    scores = packed_accuracy(self.model, self.packers[0])
                    loss = float(np.mean(losses[-50:]))
                    self.history.append({"step": self.step, "loss": loss, **scores})
                    self.save(folder)

    def _train_step(self) -> float:
        """Train one step, with the model's current attention function; return the loss."""
        settings = self.settings
        early = self.step < settings.focus_from * settings.steps
        packers = self.packers if early else self.focused
        packer = packers[self.step % len(packers)]
        batch = _draw(packer, np.random.default_rng((settings.seed, self.step)), settings.batch)
        warm = min(1.0, (self.step + 1) / settings.warmup)
        scale = warm * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * self.step / settings.steps)))
        self.model.train()
        chosen = batch.labels != IGNORE
        hidden = self.model.model(**batch.inputs, use_cache=False).last_hidden_state
        loss = functional.cross_entropy(self.model.lm_head(hidden[chosen]), batch.labels[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def save(self, folder: Path) -> None:
        """Write the state for ``resume`` to one file, which is replaced atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, folder / "state.tmp")
        (folder / "state.tmp").replace(folder / "state.pt")

    def resume(self, folder: Path) -> bool:
        """Load the state in ``folder``; return False if it does not exist.

        Raises:
            ValueError: The state is of a run with other settings.
        """
        path = folder / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        if state["settings"] != asdict(self.settings):
            raise ValueError(
                f"{path} is of a run with the settings {state['settings']}; got "
                f"{asdict(self.settings)}. Choose another folder, or the same settings."
            )
        self.step, self.history = state["step"], state["history"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return True

    def export(self, folder: Path) -> None:
        """Write the checkpoint: float16 weights, config, processor and ``training.json``."""
        self.model.eval().to(torch.float16).save_pretrained(folder)
        self.model.float()
        build_processor(self.settings.family).save_pretrained(folder)
        record = {
            "settings": asdict(self.settings),
            "torch": torch.__version__,
            "history": self.history,
        }
        (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")


@torch.no_grad()
def packed_accuracy(model: PreTrainedModel, packer: Packer) -> dict[str, float]:
    """Return the share of held-out questions with a fully right answer, by question kind.

    The answers are teacher-forced.
    """
    model.eval()
    right, asked = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    n_batches, size = _EVALUATED
    for i in range(n_batches):
        batch = _draw(packer, np.random.default_rng((_HELD_OUT, i)), size)
        logits = model.lm_head(model.model(**batch.inputs, use_cache=False).last_hidden_state)
        correct = (logits.argmax(-1) == batch.labels) | (batch.labels == IGNORE)
        for slot, start in enumerate(packer.starts):
            kind = packer.slots[slot]
            end = packer.starts[slot + 1] if slot + 1 < len(packer.starts) else None
            present = (batch.labels[:, start:end] != IGNORE).any(1)
            right[kind] += int((correct[:, start:end].all(1) & present).sum())
            asked[kind] += int(present.sum())
    return {kind: right[kind] / asked[kind] for kind in KINDS}


def _draw(packer: Packer, rng: np.random.Generator, size: int) -> Batch:
    height, width = (n * packer.token for n in packer.grid)
    return packer.pack([sample_scene(rng, width=width, height=height) for _ in range(size)], rng)


def _optimizers(model: PreTrainedModel, settings: Settings) -> list[torch.optim.Optimizer]:
    hidden = [
        p
        for name, p in model.named_parameters()
        if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon: dict[str, Any] = {
        "lr": settings.muon_lr,
        "weight_decay": settings.weight_decay,
        "momentum": 0.95,
    }
    optimizers = [
        torch.optim.Muon(hidden, **muon, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=settings.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers
