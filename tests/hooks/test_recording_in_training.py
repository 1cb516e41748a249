"""Recording during training changes no gradient, records no call twice and keeps no graph alive."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.attention_variants import FAMILIES, OTHERS, assert_complete_and_exact, first, of
from xmodal_interp.hooks import record


def with_dropout(name: str) -> tuple[nn.Module, dict]:
    model, inputs = of(name)
    for module in model.modules():
        for attribute in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 0.3)
    return model.train(), inputs | ({} if name in ("blip", "siglip") else {"use_cache": False})


def step(model: nn.Module, inputs: dict) -> list[Tensor | None]:
    """Return outputs and gradients of all weights, with the same dropout every time."""
    torch.manual_seed(7)
    output = first(model(**inputs))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    loss = (output.float() * torch.arange(output.shape[-1])).mean()
    return [output.detach(), *torch.autograd.grad(loss, weights, allow_unused=True)]


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("name", FAMILIES + OTHERS)
def test_gradients_are_the_same_and_probabilities_those_before_dropout(name, checkpoints) -> None:
    model, inputs = with_dropout(name)
    with torch.no_grad(), record(model) as once:
        model(**inputs)
    if checkpoints and not model.supports_gradient_checkpointing:
        pytest.skip("the model does not support checkpoints")
    if checkpoints:
        model.activation_checkpointing_enable()
    alone = step(model, inputs)
    with record(model, values=True) as recording:
        recorded = step(model, inputs)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(alone, recorded, strict=True))
    assert sum(gradient is not None for gradient in recorded) > 1
    assert [(c.module, c.call) for c in recording.calls] == [(c.module, c.call) for c in once.calls]
    assert_complete_and_exact(recording.calls, model)
    for call in recording.calls:
        sums = call.probs().sum(-1)
        if call.sinks is None:  # with sinks, rows sum to less than 1
            real = sums[~sums.isnan()]
            torch.testing.assert_close(real, torch.ones_like(real), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES + OTHERS)
def test_recorded_tensors_hold_no_graph_and_no_weights(name) -> None:
    model, inputs = of(name)
    with record(model, values=True) as recording:
        output = first(model(**inputs))
    assert output.requires_grad
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    for call in recording.calls:
        for field in ("q", "k", "v", "mask", "bias", "sinks", "dense"):
            held = getattr(call, field)
            if held is not None:
                assert not held.requires_grad, field
                assert held.untyped_storage().data_ptr() not in weights, field


def test_a_deleted_recording_frees_its_tensors() -> None:
    model, inputs = of("llava")
    with record(model, values=True) as recording:
        output = model(**inputs, use_cache=False).logits
    held = [weakref.ref(t) for call in recording.calls for t in (call.q,) if t is not None]
    graph = weakref.ref(output)
    del output
    gc.collect()
    assert graph() is None  # although the recording still exists
    del recording
    gc.collect()
    assert all(each() is None for each in held)
