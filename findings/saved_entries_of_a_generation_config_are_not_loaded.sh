#!/usr/bin/env bash
# Entries of a generation config that save_pretrained writes are silently dropped by from_pretrained.
#
# Versions: transformers 5.23.0, torch 2.14.1 (CPU), Python 3.11. Observed on 2026-11-30.
#
# A model that is built from its config has a generation config with the mark `_from_model_config`. Models with
# settings of their own kind, such as Whisper, keep them as further entries of the generation config:
# `alignment_heads` (without which word timestamps are an error) and `lang_to_id`. If such an entry is set as an
# attribute, `save_pretrained` writes it to generation_config.json, together with the mark. When the folder is
# loaded, the mark makes the constructor skip every entry that is not one of its parameters: the entry is in the
# file and not in the loaded model. There is no warning. Entries that are parameters (`max_new_tokens`) are loaded.
# A generation config that was made by `GenerationConfig(...)` has no mark, and all its entries are loaded.
#
# Observed output:
#     config of the model:  in the file [[0, 1]], loaded absent, max_new_tokens 7
#     GenerationConfig():   in the file [[0, 1]], loaded [[0, 1]], max_new_tokens 7
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 transformers==5.23.0
cat > "$folder/show.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

assert (torch.__version__.split("+")[0], transformers.__version__) == ("2.14.1", "5.23.0")
config = WhisperConfig(
    vocab_size=64,
    d_model=16,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    max_source_positions=20,
    max_target_positions=20,
    num_mel_bins=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
    suppress_tokens=None,
    begin_suppress_tokens=None,
)


def reloaded(model, folder):
    model.save_pretrained(folder)
    saved = json.loads((folder / "generation_config.json").read_text())
    loaded = WhisperForConditionalGeneration.from_pretrained(folder).generation_config
    found = getattr(loaded, "alignment_heads", "absent")
    return saved["alignment_heads"], found, loaded.max_new_tokens


model = WhisperForConditionalGeneration(config)
model.generation_config.alignment_heads = [[0, 1]]
model.generation_config.max_new_tokens = 7
of_model = reloaded(model, Path(sys.argv[1]) / "one")
model.generation_config = GenerationConfig(alignment_heads=[[0, 1]], max_new_tokens=7)
made = reloaded(model, Path(sys.argv[1]) / "other")
for name, (saved, found, known) in (("config of the model: ", of_model), ("GenerationConfig():  ", made)):
    print(f"{name} in the file {saved}, loaded {found}, max_new_tokens {known}")
assert of_model == ([[0, 1]], "absent", 7), of_model
assert made == ([[0, 1]], [[0, 1]], 7), made
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder"
