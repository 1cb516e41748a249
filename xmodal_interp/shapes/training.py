"""Train the shipped models from scratch, on two CPU cores.

1. Every step draws new scenes from ``(seed, step)``. No scene repeats, and a resumed run uses the
   same scenes as an uninterrupted one.
2. Many questions about an image are packed after it into one sequence (:class:`Packer`). Place
   questions are learned last, so the second half of the steps has more of them.
3. The loss is cross-entropy on the tokens of the answers and their end-of-sequence tokens.
4. Muon (Jordan et al. 2024) optimises hidden matrices; AdamW optimises embeddings, head, norms,
   biases and convolutions. The learning rate warms up, then follows a cosine down to 3%.

Most tokens of a prompt are image tokens (144 of 153). A batch therefore packs a fixed set of
questions after one image: ``[<bos> user: IMAGE | question answer | question answer | ...]``. With a
block mask, each question attends only to the image and to itself, and its positions restart after
the image. The packed logits are therefore equal to those of separate prompts.

``packed_attention`` computes attention with this mask in two parts, which takes a third less time
on a CPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from xmodal_interp.shapes.scenes import KINDS, Question, Scene, ask, sample_scene
from xmodal_interp.shapes.tiny_models import (
    IMAGE_TOKEN,
    MERGE,
    PATCH,
    VISION_END,
    VISION_START,
    build_processor,
    untrained,
    vocabulary,
)
from xmodal_interp.upstream import attention_backend, unregister_attention

SLOTS: tuple[str, ...] = (
    *("color", "color", "shape", "shape", "place", "place", "place"),
    *("count", "existence", "existence", "description"),
)
FOCUS: tuple[str, ...] = (
    *("color", "shape", *("place",) * 8),
    *("count", "existence", "description"),
)
# number of words, including "assistant:" in prompts
_PROMPT = {"color": 7, "shape": 6, "place": 7, "count": 5, "existence": 7, "description": 5}
_ANSWER = {"color": 1, "shape": 1, "place": 2, "count": 1, "existence": 1, "description": 15}
IGNORE = -100  # label of positions without a loss


@dataclass(frozen=True)
class PackedBatch:
    """One training batch: inputs of a model's forward, and labels.

    Labels are ``[batch, position]``, already shifted.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    kinds: np.ndarray  # [position], question kind at each position, "" in the prefix


class Packer:
    """Pack scenes of one size for one model family.

    The layout is the same for all scenes, so it is computed once.
    """

    def __init__(
        self, family: str, width: int, height: int, slots: tuple[str, ...] = SLOTS
    ) -> None:
        self.family, self.slots = family, slots
        self.ids = vocabulary(family)
        self.token = PATCH[family] * (MERGE if family == "qwen2_vl" else 1)  # px
        self.grid = (height // self.token, width // self.token)
        self.starts: list[int] = []
        self._lay_out()

    def _lay_out(self) -> None:
        rows, cols = self.grid
        image = [self.ids[IMAGE_TOKEN[self.family]]] * (rows * cols)
        if self.family == "qwen2_vl":
            image = [self.ids[VISION_START], *image, self.ids[VISION_END]]
        self.prefix = [self.ids["<bos>"], self.ids["user:"], *image]
        lengths = [_PROMPT[kind] + _ANSWER[kind] for kind in self.slots]
        self.starts = [len(self.prefix) + sum(lengths[:i]) for i in range(len(self.slots))]
        segment = np.repeat(np.arange(len(self.slots) + 1), [len(self.prefix), *lengths])
        self.kinds = np.array(["", *self.slots])[segment]
        i = np.arange(len(segment))
        visible = (i[None] <= i[:, None]) & (
            (segment[None] == 0) | (segment[None] == segment[:, None])
        )
        self.mask = torch.zeros(1, 1, *visible.shape, dtype=torch.float32).masked_fill_(
            ~torch.from_numpy(visible), torch.finfo(torch.float32).min
        )
        self.positions = self._positions(lengths)

    def _positions(self, lengths: list[int]) -> Tensor:
        """Return ``[position]`` for LLaVA, ``[3, position]`` (time, row, column) for Qwen2-VL."""
        if self.family == "llava":
            parts = [
                np.arange(len(self.prefix)),
                *(len(self.prefix) + np.arange(n) for n in lengths),
            ]
            return torch.from_numpy(np.concatenate(parts))
        rows, cols = self.grid
        row, col = np.divmod(np.arange(rows * cols), cols)
        end = 3 + max(rows, cols)  # M-RoPE continues text after the larger side of the image
        image = np.stack([np.full(rows * cols, 3), 3 + row, 3 + col])
        text = [np.arange(3), np.array([end]), *(end + 1 + np.arange(n) for n in lengths)]
        before, *after = (np.tile(part, (3, 1)) for part in text)
        return torch.from_numpy(np.concatenate([before, image, *after], 1))

    def pack(self, scenes: list[Scene], rng: np.random.Generator) -> PackedBatch:
        """Return a batch that has, for every scene, one question per slot."""
        ids = np.full((len(scenes), self.mask.shape[-1]), self.ids["<pad>"])
        labels = np.full_like(ids, IGNORE)
        ids[:, : len(self.prefix)] = self.prefix
        for b, scene in enumerate(scenes):
            for kind, start in zip(self.slots, self.starts, strict=True):
                if (question := ask(scene, kind, rng)) is not None:
                    self._write(question, ids[b, start:], labels[b, start:])
        n = len(scenes)
        positions = (
            self.positions.expand(n, -1)
            if self.family == "llava"
            else self.positions[:, None].expand(3, n, -1)
        )
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": self.mask.expand(n, -1, -1, -1),
            "position_ids": positions,
            **self._pixels(np.stack([scene.render() for scene in scenes])),
        }
        return PackedBatch(inputs, torch.from_numpy(labels), self.kinds)

    def _write(self, question: Question, ids: np.ndarray, labels: np.ndarray) -> None:
        prompt = [*(self.ids[word] for word in question.text.split()), self.ids["assistant:"]]
        answer = [self.ids[word] for word in question.answer.split()]
        ids[: len(prompt) + len(answer)] = prompt + answer
        labels[len(prompt) - 1 : len(prompt) + len(answer)] = [*answer, self.ids["<eos>"]]

    def _pixels(self, images: np.ndarray) -> dict[str, Tensor]:
        """Convert ``uint8 [batch, height, width, 3]`` to the processor's output, in one batch."""
        pixels = (
            torch.from_numpy(images).permute(0, 3, 1, 2).float().mul_(1 / 255).sub_(0.5).div_(0.5)
        )
        if self.family == "llava":
            return {"pixel_values": pixels}
        n, channels, (rows, cols), p = len(images), pixels.shape[1], self.grid, PATCH[self.family]
        blocks = pixels.reshape(n, channels, rows, MERGE, p, cols, MERGE, p).permute(
            0, 2, 5, 3, 6, 1, 4, 7
        )
        # Qwen2-VL represents an image as a video of two equal frames
        frames = blocks.unsqueeze(6).expand(*blocks.shape[:6], 2, p, p)
        grid = torch.tensor([[1, rows * MERGE, cols * MERGE]]).expand(n, 3)
        return {"pixel_values": frames.reshape(-1, channels * 2 * p * p), "image_grid_thw": grid}


@contextmanager
def packed_attention(model: PreTrainedModel, prefix: int) -> Iterator[None]:
    """Use a faster attention function for packed batches inside the ``with`` block.

    For training only: inside the block, the model must be given packed batches only. After the
    block, the model's attention implementation is restored and the function is unregistered from
    transformers.

    Args:
        model: The model; only its language model is changed.
        prefix: Number of tokens before the first question.
    """
    before = {
        "": attention_backend(model.config),
        "text_config": attention_backend(model.config.text_config),
    }
    name = f"packed_{id(model)}"
    AttentionInterface.register(name, partial(_packed_attention, prefix=prefix))
    try:
        model.set_attn_implementation({**before, "text_config": name})
        yield
    finally:
        model.set_attn_implementation(before)
        unregister_attention(AttentionInterface, name)


def _packed_attention(
    module: nn.Module,  # noqa: ARG001 - the interface passes it
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    prefix: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention for the prefix, and masked attention for the questions."""
    head = scaled_dot_product_attention(
        query[:, :, :prefix],
        key[:, :, :prefix],
        value[:, :, :prefix],
        is_causal=True,
        scale=scaling,
        enable_gqa=True,
    )
    questions = scaled_dot_product_attention(
        query[:, :, prefix:],
        key,
        value,
        attn_mask=attention_mask[:, :, prefix:],
        scale=scaling,
        enable_gqa=True,
    )
    return torch.cat([head, questions], 2).transpose(1, 2).contiguous(), None


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
    """A training run: model, optimisers and step. ``save`` writes it, ``resume`` continues it."""

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
                f"{path} was written by a run with the settings {state['settings']}; got "
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
    """Return the share of held-out questions answered fully correctly, by question kind.

    The answers are teacher-forced.
    """
    model.eval()
    n_right, n_asked = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0)
    n_batches, size = _EVALUATED
    for i in range(n_batches):
        batch = _draw(packer, np.random.default_rng((_HELD_OUT, i)), size)
        logits = model.lm_head(model.model(**batch.inputs, use_cache=False).last_hidden_state)
        correct = (logits.argmax(-1) == batch.labels) | (batch.labels == IGNORE)
        for slot, start in enumerate(packer.starts):
            kind = packer.slots[slot]
            end = packer.starts[slot + 1] if slot + 1 < len(packer.starts) else None
            present = (batch.labels[:, start:end] != IGNORE).any(1)
            n_right[kind] += int((correct[:, start:end].all(1) & present).sum())
            n_asked[kind] += int(present.sum())
    return {kind: n_right[kind] / n_asked[kind] for kind in KINDS}


def _draw(packer: Packer, rng: np.random.Generator, size: int) -> PackedBatch:
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
