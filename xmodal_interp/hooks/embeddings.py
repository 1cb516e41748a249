"""Remove image tokens from the input of a language model by replacing their embeddings.

Some models (Qwen3-VL's DeepStack and its copies, Granite 4 Vision) add further image features to
the hidden states inside the language model. These features are arguments of the language model: a
mask of positions, and tensors with one row for each True of the mask. They are replaced in the same
way as the embeddings. :func:`check_images_gone` refuses a model that still depends on the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from xmodal_interp.contexts import own_context
from xmodal_interp.errors import CaptureError, UnsupportedModelError
from xmodal_interp.models import VLM


@contextmanager
def mean_embeddings(
    vlm: VLM,
    replaced: Bool[Tensor, "sample position"],
    averaged: Bool[Tensor, "sample position"],
) -> Iterator[None]:
    """Replace embeddings by the mean embedding of other positions, inside the ``with`` block.

    Image features that are added inside the language model are replaced by their mean too;
    positions without such a feature count as 0 in this mean.

    Args:
        vlm: Model and processor; images must be tokens of the sequence.
        replaced: The positions to replace.
        averaged: The positions to average, in each sample.

    Raises:
        UnsupportedModelError: Text attends to the image by cross-attention.
        CaptureError: The language model received different positions, or never ran.
    """
    check_in_sequence(vlm)
    calls = 0

    def replace(module: nn.Module, args: Any, options: dict[str, Any]) -> tuple[Any, Any]:  # noqa: ARG001
        nonlocal calls
        calls += 1
        embedded = options.get("inputs_embeds")
        if embedded is None or embedded.shape[:2] != replaced.shape:
            shape = None if embedded is None else list(embedded.shape[:2])
            got = "no embeddings" if shape is None else f"embeddings of shape {shape}"
            raise CaptureError(
                f"Embeddings of shape {list(replaced.shape)} were to be replaced, but the language "
                f"model received {got}. Run one forward over the whole sequence, without a cache."
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
            f"({type(decoder).__name__}) did not run inside the with block. Run the model there."
        )


def _with_mean(
    values: Float[Tensor, "sample position d"],
    replaced: Bool[Tensor, "sample position"],
    averaged: Bool[Tensor, "sample position"],
) -> Float[Tensor, "sample position d"]:
    """Return the values, with the mean of the averaged positions at the replaced ones."""
    weights = averaged.to(values)[..., None]
    mean = (values * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
    return torch.where(replaced.to(values.device)[..., None], mean, values)


def _injected(
    options: Mapping[str, Any],
    replaced: Bool[Tensor, "sample position"],
    averaged: Bool[Tensor, "sample position"],
) -> dict[str, Any]:
    """Return the arguments that hold image features, with the mean at the replaced positions.

    Such an argument is a tensor, or a list or mapping of tensors, with one row for each True of a
    mask that is another argument.
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
    """Refuse a model that still depends on an image whose tokens are all replaced.

    The model runs twice with all image tokens replaced by the mean of the other tokens, the second
    time with all pixel values halved. The logits of the two runs must be equal.

    Args:
        vlm: Model and processor.
        inputs: Arguments of the model.
        image: Which positions are image tokens.

    Raises:
        UnsupportedModelError: The logits differ.
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
            f"The language model of {vlm.family.model_type} also receives the image by inputs "
            "other than the embeddings and features of image tokens: with all of these replaced, "
            f"other pixels change the logits by up to {change:.1g}. Use knock_out_attention "
            "instead."
        )


def check_in_sequence(vlm: VLM) -> None:
    """Refuse a model whose sequence does not hold image tokens.

    Raises:
        UnsupportedModelError: Text attends to the image by cross-attention.
    """
    if not vlm.family.in_sequence:
        raise UnsupportedModelError(
            f"{vlm.family.model_type} has no image tokens to replace: text attends to the image by "
            "cross-attention. Use knock_out_attention(..., kind='cross') instead."
        )
