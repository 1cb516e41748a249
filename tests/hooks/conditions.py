"""Models with different attention implementations, and checks for a recording of any of them."""

import copy

import torch
from torch import Tensor, nn
from transformers import GptOssConfig, GptOssForCausalLM

from tests.conformance.building import tiny
from tests.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.attention import AttentionCall
from xmodal_interp.hooks import attention_modules

FAMILIES = ["llava", "qwen2_vl", "mllama"]
OTHERS = ["blip", "siglip", "pix2struct", "gpt_oss"]  # softmax, kernel, position bias, sinks
STEPS = {"max_new_tokens": 3, "generation": {"min_new_tokens": 3}}


def of(name: str) -> tuple[nn.Module, dict]:
    """Return a new model and its inputs."""
    if name in FAMILIES:
        vlm = tiny_vlm(name)
        return copy.deepcopy(vlm.model), vlm.prepare([[picture()]], [QUESTION])[0]
    if name == "gpt_oss":
        config = GptOssConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=4,
        )
        return GptOssForCausalLM(config).eval(), {"input_ids": torch.arange(2, 14)[None]}
    made = tiny(name)
    return made.model, made.inputs


def cast(inputs: dict, dtype: torch.dtype) -> dict:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def first(output) -> Tensor:
    """Return the first floating-point tensor of a model's output that is not its loss."""
    tensors = (t for t in output.to_tuple() if isinstance(t, Tensor) and t.is_floating_point())
    return next(t for t in tensors if t.ndim > 1)


def eager_probs(call: AttentionCall) -> Tensor:
    """Return eager attention in float32, without the package's kernels."""
    q, k = call.q.float(), call.k.float().repeat_interleave(call.n_heads // call.n_kv_heads, 1)
    scores = call.scaling * q @ k.transpose(-1, -2)
    if call.bias is not None:
        scores = scores + call.bias.float()
    if call.mask is not None and call.mask.dtype != torch.bool:
        scores = scores + call.mask.float()
    scores = scores.masked_fill(~call.visible(), -torch.inf)
    if call.sinks is None:
        return scores.softmax(-1)
    sinks = call.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]


def assert_complete_and_exact(calls: list[AttentionCall], model: nn.Module) -> None:
    assert {call.module for call in calls} == {i.module for i in attention_modules(model).values()}
    for call in calls:
        if call.q is None:  # the module's own probabilities
            continue
        expected = eager_probs(call)
        torch.testing.assert_close(call.probs(), expected, atol=1e-5, rtol=0, equal_nan=True)
