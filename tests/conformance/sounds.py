"""Random audio in the layouts of the models, with its placeholders in the prompt.

There is one function per layout, named in the records. Each row has one sound; the second is
shorter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.conformance.prompts import TYPES, padded, words

Inputs = dict[str, Any]
FRAMES = (40, 26)


def sounds(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Return spectra, ``[sound, frame, frequency]``, with a mask of their frames."""
    given = {"input_features": _frames(model), "input_features_mask": _real(torch.bool)}
    return _placed(model, inputs, given)


def sounds_by_frequency(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Return spectra with the frame axis last, with a mask of their frames."""
    given = {
        "input_features": _frames(model).transpose(1, 2),
        "feature_attention_mask": _real(torch.long),
    }
    return _placed(model, inputs, given)


def sounds_in_samples(model: PreTrainedModel, inputs: Inputs) -> Inputs:
    """Return spectra with the frame axis last, with the lengths of the waveforms in samples."""
    hop = model.config.audio_config.hop_length
    given = {
        "input_features": _frames(model).transpose(1, 2),
        "chunk_sample_lengths": torch.tensor(FRAMES) * hop,
    }
    return _placed(model, inputs, given)


def _frames(model: PreTrainedModel) -> Tensor:
    config = model.config.audio_config
    names = ("num_mel_bins", "input_feat_size", "feature_size", "audio_embed_dim")
    width = next((getattr(config, name) for name in names if hasattr(config, name)), 128)
    return torch.randn(len(FRAMES), max(FRAMES), width)


def _real(kind: torch.dtype) -> Tensor:
    return (torch.arange(max(FRAMES)) < torch.tensor(FRAMES)[:, None]).to(kind)


def _placed(model: PreTrainedModel, inputs: Inputs, given: Inputs) -> Inputs:
    """Append audio placeholders and a word to each row of the inputs."""
    config = model.config
    token = getattr(config, "audio_token_id", None) or config.audio_token_index
    rows, types = [], []
    real = inputs["attention_mask"].bool()
    old_types = {name: inputs[name] for name in TYPES if name in inputs}
    for row, ids in enumerate(inputs["input_ids"]):
        added = [token] * _n_tokens(model, given, row) + words(1)
        rows.append(ids[real[row]].tolist() + added)
        types.append(
            {n: t[row][real[row]].tolist() + [0] * len(added) for n, t in old_types.items()}
        )
    whole = padded(rows)
    for name in old_types:
        whole[name] = padded([each[name] for each in types])["input_ids"]
    return whole | given


@torch.no_grad()
def _n_tokens(model: PreTrainedModel, given: Inputs, number: int) -> int:
    """Return the number of tokens of a sound, from the configuration or from the model."""
    fixed = getattr(model.config, "audio_soft_tokens_per_image", None)
    if fixed is not None:
        return int(fixed)
    ask = getattr(model, "get_audio_features", None) or model.base_model.get_audio_features
    found = ask(**{name: value[number : number + 1] for name, value in given.items()})
    mask = getattr(found, "attention_mask", None)
    if mask is not None:
        return int(mask.sum())
    features = found.last_hidden_state if found.pooler_output is None else found.pooler_output
    return int(features.numel() // features.shape[-1])
