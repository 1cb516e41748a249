"""Recording does not break training with checkpoints.

``torch.utils.checkpoint`` (torch 2.14.1) counts the tensors that autograd saves in a forward and in
its recomputation, and raises ``CheckpointError`` if the numbers differ.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import xmodal_interp as xi


def test_recording_does_not_change_gradients_with_checkpoints_and_padding() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    model.activation_checkpointing_enable()
    ids = torch.arange(1, 13).view(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0

    def gradients() -> list[list[torch.Tensor]]:
        steps = []
        for _ in range(3):
            model.zero_grad()
            model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
            steps.append([weight.grad.clone() for weight in model.parameters()])
        return steps

    alone = gradients()
    with xi.record(model, values=True) as recording:
        recorded = gradients()
    for a, b in zip(alone, recorded, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert len(recording.calls) == 6
    assert not any(t.requires_grad for call in recording.calls for t in (call.q, call.k, call.v))
