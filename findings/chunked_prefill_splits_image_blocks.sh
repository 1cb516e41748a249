#!/usr/bin/env bash
# Chunked prefill changes the answer of VLMs whose image tokens attend to each other in both directions.
#
# Versions: transformers 5.23.0, torch 2.14.1 (CPU), Python 3.11. Observed on 2026-11-29.
#
# `generate(prefill_chunk_size=n)` is documented as a way to save memory: the prompt is added to the
# cache n tokens at a time. Under a causal mask the logits are those of a single pass. In Gemma 3 and
# PaliGemma the tokens of an image (PaliGemma: of the whole prompt) attend to each other in both
# directions, but the queries of a chunk can only attend to keys that are already in the cache. If a
# chunk ends inside such a block, its tokens do not attend to the rest of the block, and the logits
# differ. There is no error and no warning. With a chunk that holds the whole prompt, the logits are
# exactly those of a call without chunks. A causal model (LLaVA) has the same logits for every chunk size.
#
# Observed output (largest difference of the logits of the first new token):
#                 4 tokens       20 tokens      64 tokens
#     llava       at most 1e-5   at most 1e-5   0
#     gemma3      more than .01  at most 1e-5   0       (17 tokens to the end of the image)
#     paligemma   more than .01  more than .01  0       (29 tokens, all one block)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 transformers==5.23.0 pillow
cat > "$folder/show.py" <<'PYTHON'
import torch
import transformers
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

assert (torch.__version__.split("+")[0], transformers.__version__) == ("2.14.1", "5.23.0")
IMAGE, N_IMAGE, N_TEXT = 90, 16, 12
text = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
vision = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def llava():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(**text),
        image_token_index=IMAGE,
        image_seq_length=N_IMAGE,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def gemma3():
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=Gemma3TextConfig(**text, sliding_window=64),
        mm_tokens_per_image=N_IMAGE,
        image_token_index=IMAGE,
    )
    return Gemma3ForConditionalGeneration(config)


def paligemma():
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**vision, projection_dim=32, vision_use_head=False),
        text_config=GemmaConfig(**text),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    config.text_config.num_image_tokens = N_IMAGE
    return PaliGemmaForConditionalGeneration(config)


largest = {}
for make in (llava, gemma3, paligemma):
    torch.manual_seed(0)
    model = make().eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    ids = torch.tensor([[1, *[IMAGE] * N_IMAGE, *range(2, 2 + N_TEXT)]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.rand(1, 3, 32, 32) * 2 - 1,
    }
    if make is gemma3:
        inputs["token_type_ids"] = (ids == IMAGE).long()
    if make is paligemma:
        inputs["token_type_ids"] = torch.zeros_like(ids)  # as its processor does for a prompt

    def first_logits(**options):
        out = model.generate(
            **inputs,
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        return out.logits[0]

    plain = first_logits()
    largest[make.__name__] = {
        n: float((first_logits(prefill_chunk_size=n) - plain).abs().max()) for n in (4, 20, 64)
    }
    print(make.__name__, largest[make.__name__])

assert largest["llava"][4] <= 1e-5 and largest["llava"][20] <= 1e-5
assert largest["gemma3"][4] > 0.01 and largest["gemma3"][20] <= 1e-5
assert largest["paligemma"][4] > 0.01 and largest["paligemma"][20] > 0.01
assert all(of[64] == 0.0 for of in largest.values())
print("as described")
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
