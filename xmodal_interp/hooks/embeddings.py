"""Take image tokens away from a language model: replace the embeddings at their positions.

Some models (Qwen3-VL's DeepStack and its copies, Granite 4 Vision) add further image features to
the hidden states inside the language model. It gets them as arguments: a mask of positions, and
tensors with one row for each True of the mask. They are replaced in the same way as the embeddings.
A model that passes the image on in yet another way is refused by :func:`check_images_gone`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
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

    The language model then reads the mean image token at the old positions. Image features that are
    added inside the language model are replaced by their mean too; positions without such a feature
    count as 0 in it.

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
        changed = _with_mean(embedded, replaced, averaged)
        injected = _injected(options, replaced, averaged)
        return args, {**options, **injected, "inputs_embeds": changed}

    decoder = vlm.model.get_decoder()
    with own_context() as own, decoder.register_forward_pre_hook(own(replace), with_kwargs=True):
        yield
    if not calls:
        raise CaptureError(
            "Embeddings were to be replaced, but the language model "
            f"({type(decoder).__name__}) did not run inside the with block."
        )


def _with_mean(
    values: Float[Tensor, "sample position d"],
    replaced: Bool[Tensor, "sample position"],
    averaged: Bool[Tensor, "sample position"],
) -> Float[Tensor, "sample position d"]:
    """The values with the mean of some positions at others, sample by sample."""
    weights = averaged.to(values)[..., None]
    mean = (values * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    return torch.where(replaced.to(values.device)[..., None], mean, values)


def _injected(
    options: Mapping[str, Any],
    replaced: Bool[Tensor, "sample position"],
    averaged: Bool[Tensor, "sample position"],
) -> dict[str, Any]:
    """The arguments that hold features of some positions, with the mean at the replaced ones.

    They are tensors, or lists or mappings of tensors, whose rows are the positions of a mask among
    the arguments.
    """
    masks = [
        value.flatten(2).any(-1) if value.ndim > 2 else value
        for value in options.values()
        if isinstance(value, Tensor)
        and value.dtype == torch.bool
        and value.shape[:2] == replaced.shape
        and value.shape[2:].numel() == 1
    ]

    def edited(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: edited(each) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [edited(each) for each in value]
        if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
            return value
        for mask in masks:
            if int(mask.sum()) == len(value):
                at = mask.to(value.device)
                whole = value.new_zeros(*mask.shape, value.shape[-1])
                whole[at] = value
                return _with_mean(whole, replaced, averaged)[at]
        return value

    kept = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values")
    holders = (Tensor, Mapping, list, tuple)
    return {
        name: edited(value)
        for name, value in options.items()
        if masks and name not in kept and isinstance(value, holders)
    }


@torch.no_grad()
def check_images_gone(
    vlm: VLM, inputs: Mapping[str, Any], image: Bool[Tensor, "sample position"]
) -> None:
    """Refuse a model that still sees an image whose tokens are all replaced.

    Two forwards with all image tokens replaced by the mean of the others, the second with pixels of
    half the size of the first: the logits must be the same.

    Args:
        vlm: Model and processor.
        inputs: Arguments of the model.
        image: Which positions are image tokens.

    Raises:
        UnsupportedModelError: They differ.
    """
    halved = {
        name: value / 2
        if isinstance(value, Tensor) and value.is_floating_point() and "mask" not in name
        else value
        for name, value in inputs.items()
    }
    with mean_embeddings(vlm, image, ~image):
        one, other = (vlm.run(each).logits.float() for each in (dict(inputs), halved))
    change = (one - other).abs().max()
    if not change <= 1e-3 * one.abs().max():
        raise UnsupportedModelError(
            "Image tokens are taken away by replacing their embeddings and the features that the "
            f"language model is given for their positions. In {vlm.family.model_type} the image "
            "arrives in another way: with all its tokens replaced, other pixels change the logits "
            f"by up to {change:.1g}. Cut its attention with knock_out_attention instead."
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
