"""The calls of the language tower, position by position: a row and a key for each token.

Decode steps are stitched to the prefill. Where an encoder reads the prompt and a decoder writes the
answer, the layers of both are laid out over the positions of both.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from xmodal_interp.attention import (
    AttentionCall,
    decoder_layer,
    encoder_layer,
    stitch,
    with_keys,
)
from xmodal_interp.hooks.modules import Identity


@dataclass(frozen=True)
class Stacks:
    """Which layers of the language tower are whose.

    Attributes:
        encoder: Paths of the attention modules that are in an encoder.
        merged: Whether the decoder attends to itself and to the encoder at once.
    """

    encoder: frozenset[str]
    merged: bool


def stacks_of(model: Any, identities: Collection[Identity]) -> Stacks:
    """The stacks of a model with these attention modules."""
    language = [each for each in identities if each.tower == "language"]
    if not model.config.is_encoder_decoder:
        return Stacks(frozenset(), merged=False)
    within = set(model.get_encoder().modules())
    encoder = {each.module for each in language if model.get_submodule(each.module) in within}
    return Stacks(frozenset(encoder), merged=all(each.kind == "self" for each in language))


def call_by_position(
    stream: Sequence[AttentionCall], n_positions: int, n_encoder: int, stacks: Stacks
) -> AttentionCall:
    """One layer's calls as one, over all positions of a sample.

    Args:
        stream: The layer's calls for this sample, in order.
        n_positions: How many positions it has.
        n_encoder: How many of them an encoder reads, before those of the decoder.
        stacks: Which layers are whose.
    """
    if n_encoder == 0:
        return stitch(stream, n_positions)
    if stream[0].module in stacks.encoder:
        return encoder_layer(stream, n_encoder, n_positions)
    return decoder_layer(stream, n_encoder, n_positions, merged=stacks.merged)


def without_padding_keys(call: AttentionCall, n_keys: int | None) -> AttentionCall:
    """A cross-attention without the keys after those of a sample's images, if no row can see them.

    Args:
        call: A call of one sample.
        n_keys: How many keys its images have, if text reaches them by cross-attention.
    """
    if call.kind != "cross" or n_keys is None or call.n_keys <= n_keys:
        return call
    if bool(call.visible()[..., n_keys:].any()):
        return call
    return with_keys(call, 0, n_keys)
