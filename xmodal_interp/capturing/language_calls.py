"""Join the language calls of a layer into one call with one query and one key per token.

Decode steps are appended to the prefill. In encoder-decoder models, the joined call of each layer
covers the positions of both stacks: first the encoder's, then the decoder's.
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
    with_mask,
)
from xmodal_interp.hooks.attention_modules import Identity


@dataclass(frozen=True)
class Stacks:
    """The encoder and decoder of a language tower.

    Attributes:
        encoder: Paths of the attention modules in the encoder; empty for decoder-only models.
        merged: Whether each decoder layer attends to decoder and encoder positions in one call.
    """

    encoder: frozenset[str]
    merged: bool


def stacks_of(model: Any, identities: Collection[Identity]) -> Stacks:
    """Return the stacks of a model with these attention modules."""
    language = [each for each in identities if each.tower == "language"]
    if not model.config.is_encoder_decoder:
        return Stacks(frozenset(), merged=False)
    within = set(model.get_encoder().modules())
    encoder = {each.module for each in language if model.get_submodule(each.module) in within}
    return Stacks(frozenset(encoder), merged=all(each.kind == "self" for each in language))


def over_positions(
    calls: Sequence[AttentionCall], n_positions: int, n_encoder: int, stacks: Stacks
) -> AttentionCall:
    """Join the calls of one layer into one call over all positions of a sample.

    Args:
        calls: The layer's calls for this sample, in order.
        n_positions: Number of positions of the sample.
        n_encoder: The number of these, from the first, that an encoder reads; 0 without an encoder.
        stacks: The encoder and decoder of the model.
    """
    if n_encoder == 0:
        return stitch(calls, n_positions)
    if calls[0].module in stacks.encoder:
        return encoder_layer(calls, n_encoder, n_positions)
    return decoder_layer(calls, n_encoder, n_positions, merged=stacks.merged)


def without_padding_keys(call: AttentionCall, n_keys: int | None) -> AttentionCall:
    """Remove the padding keys after the image keys of a cross-attention call.

    The call is returned unchanged if it is not cross-attention, or if a query sees one of these
    keys.

    Args:
        call: A call of one sample.
        n_keys: Number of keys of the sample's images; None if text does not cross-attend to images.
    """
    if call.kind != "cross" or n_keys is None or call.n_keys <= n_keys:
        return call
    if bool(call.visible()[..., n_keys:].any()):
        return call
    return with_mask(call).take("key", slice(0, n_keys))
