"""The tower of a module follows from the modality of its input."""

from collections import Counter

import pytest
import timm
import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    SpeechEncoderDecoderConfig,
    SpeechEncoderDecoderModel,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)

from tests.helpers.families import DUAL_ENCODERS
from tests.helpers.tiny_configs import tiny_config
from xmodal_interp.hooks import attention_modules

WIDTH = 16


def test_text_encoders_are_in_the_language_tower() -> None:
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "vocab_size": 9}
    bert = {"model_type": "bert", **sizes, **heads}
    decoder = {**bert, "is_decoder": True, "add_cross_attention": True}
    pair = EncoderDecoderConfig(encoder=bert, decoder=decoder)
    module = {**sizes, **heads, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    t5gemma = T5GemmaConfig(encoder=module, decoder=module, vocab_size=9)
    for model in (EncoderDecoderModel(pair), T5GemmaForConditionalGeneration(t5gemma)):
        names = Counter((each.tower, each.kind) for each in attention_modules(model).values())
        assert names == {("language", "self"): 4, ("language", "cross"): 2}


def test_image_and_audio_encoders_are_in_their_towers() -> None:
    text = {
        "model_type": "bert",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    decoder = {**text, "is_decoder": True, "add_cross_attention": True}
    vit = {**text, "model_type": "vit", "image_size": 8, "patch_size": 4}
    vision = VisionEncoderDecoderModel(VisionEncoderDecoderConfig(encoder=vit, decoder=decoder))
    wav = {
        **text,
        "model_type": "wav2vec2",
        "conv_dim": [8],
        "conv_stride": [2],
        "conv_kernel": [2],
    }
    speech = SpeechEncoderDecoderModel(
        SpeechEncoderDecoderConfig(
            encoder={**wav, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
            decoder=decoder,
        )
    )
    for model, tower in ((vision, "vision"), (speech, "audio")):
        names = Counter((each.tower, each.kind) for each in attention_modules(model).values())
        assert names == {(tower, "self"): 1, ("language", "self"): 1, ("language", "cross"): 1}


TOWERS_OF: dict[tuple[str, str], dict[str, str]] = {
    ("whisper", "WhisperForConditionalGeneration"): {
        "model.encoder": "audio",
        "model.decoder": "language",
    },
    ("speech_to_text", "Speech2TextModel"): {"encoder": "audio", "decoder": "language"},
    ("moonshine", "MoonshineModel"): {"encoder": "audio", "decoder": "language"},
    ("pop2piano", "Pop2PianoForConditionalGeneration"): {"encoder": "audio", "decoder": "language"},
    ("speecht5", "SpeechT5ForSpeechToText"): {
        "speecht5.encoder": "audio",
        "speecht5.decoder": "language",
    },
    ("speecht5", "SpeechT5ForTextToSpeech"): {
        "speecht5.encoder": "language",
        "speecht5.decoder": "audio",
    },
    ("granite_speech", "GraniteSpeechForConditionalGeneration"): {
        "model.encoder": "audio",
        "model.projector": "connector",
        "model.language_model": "language",
    },
    ("clipseg", "CLIPSegForImageSegmentation"): {
        "clip.text_model": "language",
        "clip.vision_model": "vision",
        "decoder": "vision",
    },
    ("lxmert", "LxmertForPreTraining"): {
        "lxmert.encoder.layer.": "language",
        "lxmert.encoder.r_layers": "vision",
        "lxmert.encoder.x_layers.0.lang_self_att": "language",
        "lxmert.encoder.x_layers.0.visn_self_att": "vision",
    },
    ("visual_bert", "VisualBertForPreTraining"): {"visual_bert": "language"},
    ("xclip", "XCLIPModel"): {"mit": "vision", "prompts_generator": "language"},
    ("grounding-dino", "GroundingDinoModel"): {
        "backbone": "vision",
        "text_backbone": "language",
        "encoder.layers.0.text_enhancer_layer": "language",
        "decoder": "vision",
    },
    ("qwen2_5_vl_vision", "Qwen2_5_VisionTransformerPretrainedModel"): {"blocks": "vision"},
    ("gemma4_vision", "Gemma4VisionModel"): {"encoder": "vision"},
    ("hubert", "HubertModel"): {"encoder": "audio"},
    ("vjepa2", "VJEPA2Model"): {"encoder": "vision", "predictor": "vision"},
    ("rt_detr", "RTDetrModel"): {"encoder": "vision", "decoder": "vision"},
    ("t5", "T5ForConditionalGeneration"): {"encoder": "language", "decoder": "language"},
    ("llama", "LlamaForCausalLM"): {"model": "language"},
}
RECORDS_OF = {"grounding-dino": DUAL_ENCODERS["grounding_dino"].config}


@pytest.mark.parametrize(("model_type", "kind"), TOWERS_OF, ids=lambda value: value)
def test_towers_of_models_with_several_modalities(model_type: str, kind: str) -> None:
    config = tiny_config(CONFIG_MAPPING[model_type], RECORDS_OF.get(model_type))
    with torch.device("meta"):
        model = getattr(transformers, kind)._from_config(config)
    identities = attention_modules(model).values()
    for path, tower in TOWERS_OF[model_type, kind].items():
        inside = [each for each in identities if each.module.startswith(path)]
        assert inside
        assert {each.tower for each in inside} == {tower}, path
    numbered = Counter((each.tower, each.kind, each.layer) for each in identities)
    assert set(numbered.values()) == {1}
    firsts = {(each.tower, each.kind): each.layer for each in reversed(list(identities))}
    assert firsts[next(iter(TOWERS_OF[model_type, kind].values())), "self"] == 0


def test_towers_of_models_of_other_libraries_follow_their_first_layer() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    assert {each.tower for each in attention_modules(vit).values()} == {"vision"}
    text = nn.Sequential(nn.Embedding(4, 8), nn.MultiheadAttention(8, 2))
    assert {each.tower for each in attention_modules(text).values()} == {"language"}
