"""Correct recordings pass the checks in half precision and with scores in the hundreds.

Scores of trained models reach 300. Eager attention rounds them to half precision (transformers
5.23.0, ``eager_attention_forward``); ``scaled_dot_product_attention`` sums them in float32. The
recording is exact for the operands, so the eager row of the doctor is computed in float32.
"""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import xmodal_interp as xi
from xmodal_interp.errors import CaptureError
from xmodal_interp.hooks import recorder

EAGER = "probabilities equal those of eager attention"
BACKEND = "probabilities give the backend's output"


def sharp(backend: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """Return a model with scores of several hundreds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation=backend,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
                weight.mul_(50)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_large_scores_pass_and_a_missing_mask_does_not(backend, dtype, monkeypatch) -> None:
    model = sharp(backend, dtype)
    ids = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), xi.record(model) as recording:
        model(ids)
    call = recording.calls[0]
    k = call.k.double().repeat_interleave(2, 1)
    scores = call.q.double() @ k.mT * call.scaling
    assert scores.abs().max() > 200
    expected = scores.masked_fill(~call.visible(), -torch.inf).softmax(-1)
    torch.testing.assert_close(call.probs().double(), expected, atol=2e-4, rtol=0)
    checkup = xi.doctor(model, inputs={"input_ids": ids})
    assert checkup.ok
    row = checkup.table.set_index("check").loc[EAGER]
    assert row["value"] < 1e-3
    right = recorder.as_attention_call
    monkeypatch.setattr(
        recorder,
        "as_attention_call",
        lambda *args: dataclasses.replace(right(*args), causal=False, mask=None),
    )
    with pytest.raises(CaptureError, match="do not give its output"), xi.record(model):
        model(ids)
    checkup = xi.doctor(model, inputs={"input_ids": ids})
    verdicts = checkup.table.set_index("check")["verdict"]
    assert verdicts[BACKEND] == "fail"
