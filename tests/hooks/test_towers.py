"""The tower of an encoder is that of what it reads."""

from collections import Counter

from transformers import (
    EncoderDecoderConfig,
    EncoderDecoderModel,
    SpeechEncoderDecoderConfig,
    SpeechEncoderDecoderModel,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
)

from xmodal_interp.hooks import attention_modules

WIDTH = 16


def test_encoders_of_text_are_of_the_language() -> None:
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


def test_other_encoders_are_of_what_they_read() -> None:
    text = {
        "model_type": "bert",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    decoder = {**text, "is_decoder": True, "add_cross_attention": True}
    vit = {**text, "model_type": "vit", "image_size": 8, "patch_size": 4}
    sees = VisionEncoderDecoderModel(VisionEncoderDecoderConfig(encoder=vit, decoder=decoder))
    wav = {
        **text,
        "model_type": "wav2vec2",
        "conv_dim": [8],
        "conv_stride": [2],
        "conv_kernel": [2],
    }
    hears = SpeechEncoderDecoderModel(
        SpeechEncoderDecoderConfig(
            encoder={**wav, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
            decoder=decoder,
        )
    )
    for model, tower in ((sees, "vision"), (hears, "audio")):
        names = Counter((each.tower, each.kind) for each in attention_modules(model).values())
        assert names == {(tower, "self"): 1, ("language", "self"): 1, ("language", "cross"): 1}
