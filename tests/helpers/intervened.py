"""Run models with interventions, and record the inputs of their output projections."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tests.helpers.tiny import QUESTION, picture
from xmodal_interp.hooks import attention_modules
from xmodal_interp.hooks.attention_modules import Identity
from xmodal_interp.hooks.interventions import Intervention, Site, intervene
from xmodal_interp.hooks.raw_calls import RawCall
from xmodal_interp.models import VLM

FAMILIES = ["llava", "qwen2_vl", "mllama"]
HEADS = {1: [0, 5], 3: [2]}
OUT = {"o_proj", "out_proj", "proj"}  # names of output projections


@contextmanager
def backend(vlm: VLM, name: str) -> Iterator[VLM]:
    try:
        vlm.model.set_attn_implementation(name)
        yield vlm
    finally:
        vlm.model.set_attn_implementation("sdpa")


def inputs_of(vlm: VLM, batch: int = 1) -> dict:
    pictures = [[picture(seed=i)] for i in range(batch)]
    questions = [QUESTION, "how many shapes ?", "is there a blue cross ?"][:batch]
    return vlm.prepare(pictures, questions)[0]


def logits(vlm: VLM, inputs: dict, *interventions: Intervention) -> Tensor:
    with torch.no_grad(), intervene(vlm, *interventions):
        return vlm.model(**inputs, use_cache=False).logits


def out_projection(vlm: VLM, layer: int, tower: str = "language", kind: str = "self") -> nn.Module:
    module = next(
        m
        for m, i in attention_modules(vlm.model).items()
        if (i.tower, i.kind, i.layer) == (tower, kind, layer)
    )
    return next(child for name, child in module.named_children() if name in OUT)


def projected(vlm: VLM, inputs: dict, layer: int, *interventions: Intervention) -> Tensor:
    """Return the input of a layer's output projection, ``[sample, position, head * d_head]``."""
    seen: list[Tensor] = []
    hook = out_projection(vlm, layer).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with hook:
        logits(vlm, inputs, *interventions)
    return seen[0]


def call_of(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa", **options: object) -> RawCall:
    return RawCall(nn.Identity(), q, k, v, None, backend, {"is_causal": True, **options})


SITE = Site(Identity("layers.0.attention", "language", "self", 0), (0,), 0)
