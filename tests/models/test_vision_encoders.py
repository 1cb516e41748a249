"""Encoder-decoders of two models: any vision encoder with a rule, and encoders of one's own."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    GPT2Config,
    GPT2LMHeadModel,
    IJepaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)
from transformers.modeling_outputs import BaseModelOutput

import xmodal_interp as xi
from tests.helpers.pixel_changes import vlm_of
from tests.helpers.random_weights import randomize
from tests.helpers.tiny import picture
from tests.helpers.vision import square_processor
from xmodal_interp.errors import GeometryError
from xmodal_interp.models import FAMILIES, VLM
from xmodal_interp.models.geometry import PatchTokens

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
ENCODERS: dict[str, tuple[type[PreTrainedConfig], int]] = {
    "deit": (DeiTConfig, 2),
    "dinov2": (Dinov2Config, 1),
    "registers": (Dinov2WithRegistersConfig, 5),
    "clip": (CLIPVisionConfig, 1),
    "siglip": (SiglipVisionConfig, 0),
    "ijepa": (IJepaConfig, 0),
}
"""Configuration of each encoder, and its number of positions besides patches."""


def decoder() -> GPT2Config:
    vocabulary = len(vlm_of("vision-encoder-decoder").tokenizer)
    return GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=vocabulary, add_cross_attention=True
    )


def vlm_with(model: VisionEncoderDecoderModel, **changes: Any) -> VLM:
    known = vlm_of("vision-encoder-decoder")
    processor = type(known.processor)(square_processor(), known.tokenizer)
    model.generation_config.decoder_start_token_id = 1
    model.generation_config.pad_token_id = 0
    return VLM(model.eval(), processor, replace(FAMILIES["vision-encoder-decoder"], **changes))


@pytest.mark.parametrize("name", ENCODERS)
def test_places_are_those_of_the_encoder(name: str) -> None:
    config, n_special = ENCODERS[name]
    both = VisionEncoderDecoderConfig.from_encoder_decoder_configs(config(**SIZES), decoder())
    model = VisionEncoderDecoderModel(both)
    randomize(model, 0)
    sample = xi.capture(vlm_with(model), picture(64, 48), max_new_tokens=2)
    assert len(sample.cross_keys) == 16 + n_special
    assert sample.call(0, kind="cross").n_keys == 16 + n_special
    assert sample.call(0, tower="vision").n_keys == 16 + n_special
    assert sample.cross_keys["row"].isna().tolist() == [True] * n_special + [False] * 16
    assert (sample.patch_names() == "patch").sum() == 16
    assert sample.cross_keys[["x1", "y1"]].iloc[-1].tolist() == [64, 48]


class OwnConfig(PreTrainedConfig):
    """The configuration of an encoder that transformers does not know."""

    model_type = "own_encoder"
    hidden_size = 32
    patch_size = 4


class OwnEncoder(PreTrainedModel):
    """A class token and 4 x 4 patches, read by the transformer layers of torch."""

    config_class = OwnConfig
    main_input_name = "pixel_values"

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.first = nn.Parameter(torch.zeros(1, 1, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutput:
        """Return the hidden states of class token and patches."""
        patches = self.patches(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(patches), -1, -1), patches], 1)
        return BaseModelOutput(last_hidden_state=self.layers(tokens))

    def get_output_embeddings(self) -> None:
        """An encoder has no output embeddings."""


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Register the configuration, as the author of an encoder does."""
    CONFIG_MAPPING.register(OwnConfig.model_type, OwnConfig)
    yield
    del CONFIG_MAPPING._extra_content[OwnConfig.model_type]


def own_model() -> VisionEncoderDecoderModel:
    model = VisionEncoderDecoderModel(
        encoder=OwnEncoder(OwnConfig()), decoder=GPT2LMHeadModel(decoder())
    )
    randomize(model, 0)
    return model


def test_an_encoder_of_torch_is_a_vision_tower_and_takes_a_rule_of_one_line() -> None:
    vlm = vlm_with(own_model(), geometry=PatchTokens(before={"class": 1}))
    sample = xi.capture(vlm, picture(64, 48), max_new_tokens=2)
    assert sample.layers("vision") == [0, 1]
    assert sample.layers("language", "cross") == [0, 1]
    assert sample.positions("class", tower="vision").tolist() == [0]
    grid = sample.grid(sample.probs(0, kind="cross")[0, 0].numpy())
    assert grid.shape == (4, 4)
    assert np.isfinite(grid).all()
    assert xi.attention_rollout(sample, tower="vision")["rollout"].sum() == pytest.approx(1)


def test_an_absent_or_mis_sized_rule_is_the_message() -> None:
    sample = xi.capture(vlm_with(own_model()), picture(), max_new_tokens=2)
    with pytest.raises(GeometryError) as caught:
        sample.grid(sample.probs(0, kind="cross")[0, 0])
    assert str(caught.value) == (
        "Image 0 has no grid. There is no geometry rule for an encoder of the type 'own_encoder'. "
        "Pass VLM(model, processor, "
        "family=dataclasses.replace(FAMILIES['vision-encoder-decoder'], geometry=...)) with a "
        "rule, such as geometry.PatchTokens(before={'class': 1})."
    )
    with pytest.raises(GeometryError) as caught:
        xi.capture(vlm_with(own_model(), geometry=PatchTokens()), picture(), max_new_tokens=2)
    assert str(caught.value) == (
        "By the family's geometry rule, the images have 16 positions, but language "
        "cross-attention, layer 0, call 0 has 17 keys. Pass VLM(model, processor, family=...) "
        "with a rule for this model, such as geometry.PatchTokens(before={'class': 1})."
    )
