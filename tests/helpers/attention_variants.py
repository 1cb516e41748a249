"""Models with different attention implementations, and checks for a recording of any of them."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tests.helpers.model_types import tiny
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
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


class Mixer(nn.Module):
    """Attention in a class whose name does not contain "attention", computed in some ``way``."""

    num_attention_heads = 8

    def __init__(self, old: nn.Module, way: str = "kernel", *, parts: bool = True) -> None:
        super().__init__()
        for name, part in old.named_children() if parts else [("o", old)]:
            self.add_module(name, part)
        self.way = way

    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        x = hidden_states.unflatten(-1, (8, -1)).transpose(1, 2)
        if self.way == "kernel":
            mixed = functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        else:
            scores = (x @ x.transpose(-1, -2)).tril()
            ways = {
                "softmax": lambda: scores.softmax(-1),
                "exp": lambda: scores.exp() / scores.exp().sum(-1, keepdim=True),
            }
            mixed = ways[self.way]() @ x
        return mixed.transpose(1, 2).flatten(2), None


class FastAttn(Mixer):
    """The same in a class whose name contains "Attn"."""


def llava_with(mixer) -> tuple[nn.Module, dict]:
    model, inputs = of("llava")
    layer = model.model.language_model.layers[1]
    layer.self_attn = mixer(layer.self_attn)
    return model, inputs


def n_hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def llava_over(text: str, **options) -> LlavaForConditionalGeneration:
    """The tiny LLaVA with another language model: one with windows, soft-caps or sinks."""
    known = tiny_vlm("llava").model.config
    small = {
        "model_type": text,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": known.text_config.vocab_size,
        "pad_token_id": 0,
        **options,
    }
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=known.vision_config.to_dict(),
        text_config=small,
        image_token_id=known.image_token_id,
        image_seq_length=144,
        vision_feature_layer=known.vision_feature_layer,
        vision_feature_select_strategy=known.vision_feature_select_strategy,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_proj.weight" in name:
                weight.mul_(20)
    return model


BACKBONES = {
    "llama": {},
    "mistral": {"sliding_window": 40},
    "gemma2": {"sliding_window": 40, "query_pre_attn_scalar": 8},
    "gpt_oss": {"sliding_window": 40, "num_local_experts": 2, "num_experts_per_tok": 1},
}
