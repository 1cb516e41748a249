"""Take image tokens away from a language model: replace what stands at their positions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from xmodal_interp.errors import CaptureError, UnsupportedModelError
from xmodal_interp.hooks.own_context import own_context
from xmodal_interp.models import VLM


@contextmanager
def mean_embeddings(
    vlm: VLM,
    replaced: Bool[Tensor, "sample position"],
    averaged: Bool[Tensor, "sample position"],
) -> Iterator[None]:
    """Put the mean of some positions' embeddings in the place of others, inside the ``with`` block.

    The language model then reads an image token that says nothing in particular, at its old
    position.

    Args:
        vlm: Model and processor; its images must be among the tokens of the sequence.
        replaced: Where to put the mean.
        averaged: What it is the mean of, sample by sample.

    Raises:
        UnsupportedModelError: Text reaches the image by cross-attention.
        CaptureError: The language model was given other positions, or ran never.
    """
    check_in_sequence(vlm)
    calls = 0

    def replace(module: nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, Any]:  # noqa: ARG001
        nonlocal calls
        calls += 1
        embedded = options.get("inputs_embeds")
        if embedded is None or embedded.shape[:2] != replaced.shape:
            came = "none" if embedded is None else str(list(embedded.shape[:2]))
            raise CaptureError(
                "Embeddings are replaced in one forward over the whole sequence, without a cache. "
                f"Given were positions {list(replaced.shape)}; the language model got embeddings "
                f"of {came}."
            )
        weights = averaged.to(embedded)[..., None]
        mean = (embedded * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        changed = torch.where(replaced.to(embedded.device)[..., None], mean, embedded)
        return args, {**options, "inputs_embeds": changed}

    decoder = vlm.model.get_decoder()
    with own_context() as own, decoder.register_forward_pre_hook(own(replace), with_kwargs=True):
        yield
    if not calls:
        raise CaptureError(
            "Embeddings were to be replaced, but the language model "
            f"({type(decoder).__name__}) did not run inside the with block."
        )


def check_in_sequence(vlm: VLM) -> None:
    """Refuse a model whose image tokens are not among those of the sequence.

    Raises:
        UnsupportedModelError: Text reaches the image by cross-attention.
    """
    if not vlm.family.in_sequence:
        raise UnsupportedModelError(
            "Image tokens can be replaced where they are among the tokens of the sequence. In "
            f"{vlm.family.model_type} text reaches the image by cross-attention; cut that with "
            "knock_out_attention(..., kind='cross')."
        )
