"""A model whose layers are split over processes is refused: a process has only some heads."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import xmodal_interp as xi
from xmodal_interp.errors import UnsupportedModelError


def test_a_part_of_a_split_model_is_refused() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
    ).eval()
    for layer in model.model.layers:  # as from_pretrained(tp_plan="auto") does in one of two
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(layer.self_attn, name)
            weight.weight = torch.nn.Parameter(weight.weight[:16])
        layer.self_attn.o_proj.weight = torch.nn.Parameter(layer.self_attn.o_proj.weight[:, :16])
    ids = torch.arange(6)[None]
    model(ids)
    model._tp_size = 2
    expected = "^The layers of this model are split over 2 processes"
    with pytest.raises(UnsupportedModelError, match=expected), xi.record(model):
        model(ids)
    with (
        pytest.raises(UnsupportedModelError, match=expected),
        xi.intervene(model, xi.ablate_heads({0: [1]})),
    ):
        model(ids)
    with pytest.raises(UnsupportedModelError, match=expected):
        xi.doctor(model, inputs={"input_ids": ids})
