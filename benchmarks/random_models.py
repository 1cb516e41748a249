"""The models and prompts of the benchmarks, all with random weights except the shipped model."""

from __future__ import annotations

import copy
import importlib
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy_statistics as usual
import torch
from PIL import Image

QUESTION = "where is the red circle ? what color is the square ?"
SHORT_QUESTION = "where is the red circle ?"  # for the shipped model
PATCH = 14  # px
PACKAGE = "xmodal_interp"


def package() -> Any:
    """Import the measured package, which only the measuring processes do."""
    return importlib.import_module(PACKAGE)


@cache
def shipped_vlm() -> Any:
    """Load the shipped model, once in a process."""
    return package().load()


@dataclass(frozen=True)
class Shape:
    """Sizes of a random LLaVA, by default those with 142M weights."""

    layers: int = 8
    heads: int = 16
    kv_heads: int = 4
    width: int = 1024
    mlp: int = 4096
    d_head: int = 64
    images: int = 4
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


MANY_HEADS = Shape(layers=16, heads=32, kv_heads=8, width=512, mlp=1024, images=1)
MANY_HEADS_TOKENS = 640


@dataclass(frozen=True)
class Scene:
    """A model and a prompt.

    Attributes:
        shape: Sizes of the model.
        side: Image tokens along a side of each image.
    """

    shape: Shape
    side: int
    images: list[Image.Image] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        px = self.side * PATCH
        noise = (np.random.default_rng(i) for i in range(self.shape.images))
        shown = [Image.fromarray(r.integers(0, 255, (px, px, 3), dtype=np.uint8)) for r in noise]
        object.__setattr__(self, "images", shown)

    @classmethod
    def of(cls, shape: Shape, n_tokens: int) -> Scene:
        """Return the scene whose prompt has about ``n_tokens`` tokens."""
        return cls(shape, max(2, round((n_tokens / shape.images) ** 0.5)))

    @cached_property
    def vlm(self) -> Any:
        """A LLaVA with random weights and the tokenizer of the shipped model."""
        from transformers import (
            CLIPVisionConfig,
            LlamaConfig,
            LlavaConfig,
            LlavaForConditionalGeneration,
        )

        known, shape, px = shipped_vlm(), self.shape, self.side * PATCH
        processor, ids = copy.deepcopy(known.processor), known.model.config
        processor.image_processor.size = {"shortest_edge": px}
        processor.image_processor.crop_size = {"height": px, "width": px}
        processor.patch_size = PATCH
        processor.tokenizer.model_max_length = 10**6
        vision = CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=px,
            patch_size=PATCH,
        )
        text = LlamaConfig(
            vocab_size=ids.text_config.vocab_size,
            hidden_size=shape.width,
            intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.d_head,
            max_position_embeddings=2**16,
            pad_token_id=ids.text_config.pad_token_id,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=ids.image_token_id,
            vision_feature_select_strategy="default",
            vision_feature_layer=-1,
        )
        torch.manual_seed(0)
        with torch.device(shape.device):
            model = LlavaForConditionalGeneration(config)
        return package().VLM(model.to(shape.dtype).eval(), processor)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """The inputs of the model's forward."""
        prepared, _ = self.vlm.prepare([self.images], [QUESTION])
        return {
            name: value.to(
                self.shape.device, self.shape.dtype if value.is_floating_point() else None
            )
            for name, value in prepared.items()
        }

    @property
    def n_tokens(self) -> int:
        """The length of the prompt."""
        return int(self.inputs["input_ids"].shape[1])

    def forward(self, **options: Any) -> Any:
        """Run the model without recording."""
        with torch.no_grad():
            return self.vlm.model(**self.inputs, use_cache=False, logits_to_keep=1, **options)

    def capture(self, towers: tuple[str, ...] = ("language",)) -> Any:
        """Record the attention of some towers."""
        xi = package()
        return xi.capture(self.vlm, self.images, QUESTION, keep=xi.Keep(towers=towers))

    def layout(self) -> usual.Layout:
        """Return what is at each position, for the statistics by numpy."""
        sample = self.capture()
        image = sample.tokens["image"].fillna(-1).to_numpy(dtype=int)
        kind = sample.tokens["kind"].to_numpy(dtype=object)
        return usual.Layout(kind, image, int(sample.text_after_image()[0]))

    def attentions(self) -> list[np.ndarray]:
        """Run the model with eager attention and return the probabilities of every layer."""
        self.vlm.model.set_attn_implementation("eager")
        try:
            output = self.forward(output_attentions=True)
        finally:
            self.vlm.model.set_attn_implementation("sdpa")
        return [a[0].float().cpu().numpy() for a in output.attentions]

    def eager_fits(self) -> bool:
        """Return whether the matrices of all layers, and the work on one of them, fit in memory."""
        of_layer = 4 * self.shape.heads * self.n_tokens**2
        status = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in status if line.startswith("MemAvailable"))
        return of_layer * (self.shape.layers + 4) < 0.8 * free * 2**10


def new_copy(sample: Any) -> Any:
    """Return a sample that shares no tensor or table with this one, and no remembered value."""
    copies: dict[int, torch.Tensor] = {}

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return copies.setdefault(id(tensor), tensor.clone())  # a mask may be shared by calls

    calls = {
        key: replace(call, **{name: copied(tensor) for name, tensor, _ in call.tensors()})
        for key, call in sample.calls.items()
    }
    return replace(sample, calls=calls, tokens=sample.tokens.copy())


PICTURE = 96  # px


def small_sample(index: int = 0) -> Any:
    """Return a sample of the shipped model."""
    xi = package()
    pixels = np.random.default_rng(index).integers(0, 255, (PICTURE, PICTURE, 3), dtype=np.uint8)
    return xi.capture(shipped_vlm(), Image.fromarray(pixels), SHORT_QUESTION, name=f"s{index}")


def learned_query_model() -> Any:
    """Return a BLIP-2 with random weights, whose image tokens are the Q-Former's 32 queries."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    xi, px = package(), 32 * PATCH
    words = copy.deepcopy(shipped_vlm().processor.tokenizer)  # the processor adds a token to it
    images = BlipImageProcessorPil(size={"height": px, "width": px})
    processor = Blip2Processor(images, words, num_query_tokens=32)
    config = Blip2Config(
        vision_config={
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": px,
            "patch_size": PATCH,
        },
        qformer_config={
            "hidden_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
            "encoder_hidden_size": 256,
            "vocab_size": 100,
        },
        text_config={
            "model_type": "opt",
            "hidden_size": 256,
            "ffn_dim": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 256,
            "vocab_size": len(words),
            "max_position_embeddings": 512,
            "pad_token_id": words.pad_token_id,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
        },
        num_query_tokens=32,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    return xi.VLM(Blip2ForConditionalGeneration(config).eval(), processor)
