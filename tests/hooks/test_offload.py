"""Recording models whose weights accelerate offloads and loads while a module runs."""

import accelerate
import pytest
import torch
from torch import nn

from tests.helpers.attention_variants import STEPS, assert_complete_and_exact, first, of
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.capturing.run import capture
from xmodal_interp.errors import InputError
from xmodal_interp.hooks import record
from xmodal_interp.models import VLM


def dispatched(model: nn.Module, folder) -> None:
    parts = {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu"}
    parts |= {"model.language_model": "disk", "lm_head": "cpu"}
    accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=folder)


OFFLOADS = {
    "cpu": lambda model, _: accelerate.cpu_offload(model, torch.device("cpu")),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, torch.device("cpu")),
    "dispatched": dispatched,
}


@pytest.mark.parametrize("way", OFFLOADS)
def test_offloaded_weights(way, tmp_path) -> None:
    vlm, (model, inputs) = tiny_vlm("llava"), of("llava")
    OFFLOADS[way](model, tmp_path)
    assert any(weight.is_meta for weight in model.parameters())
    with torch.no_grad():
        alone = vlm.model(**inputs).logits
        with record(model) as recording:
            recorded = model(**inputs).logits
    assert torch.equal(alone, recorded)
    assert_complete_and_exact(recording.calls, model)
    sample = capture(VLM(model, vlm.processor), picture(), QUESTION, **STEPS)
    plain = capture(vlm, picture(), QUESTION, **STEPS)
    assert sample.answer == plain.answer
    for key, call in plain.calls.items():
        assert torch.equal(sample.calls[key].probs(), call.probs())


@pytest.mark.parametrize("name", ["blip", "gpt_oss"])
def test_offloaded_weights_of_other_models(name) -> None:
    model, inputs = of(name)
    with torch.no_grad(), record(model) as plain:
        alone = first(model(**inputs))
    accelerate.cpu_offload(model, torch.device("cpu"))
    with torch.no_grad(), record(model) as recording:
        recorded = first(model(**inputs))
    assert torch.equal(alone, recorded)
    for ours, theirs in zip(recording.calls, plain.calls, strict=True):
        torch.testing.assert_close(ours.probs(), theirs.probs(), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("whole", ["SiglipMultiheadAttentionPoolingHead", "MultiheadAttention"])
def test_offloaded_weights_of_torchs_own_attention(whole) -> None:
    model, inputs = of("siglip")
    with torch.no_grad(), record(model) as plain:
        model(**inputs)
    accelerate.cpu_offload(model, torch.device("cpu"), preload_module_classes=[whole])
    with torch.no_grad(), record(model) as recording:
        model(**inputs)
    assert_complete_and_exact(recording.calls, model)
    for ours, theirs in zip(recording.calls, plain.calls, strict=True):
        torch.testing.assert_close(ours.probs(), theirs.probs(), atol=0, rtol=0)


def test_a_model_without_weights_is_refused() -> None:
    model, _ = of("llava")
    vlm = VLM(model.to("meta"), tiny_vlm("llava").processor)
    with pytest.raises(InputError) as error:
        capture(vlm, picture(), QUESTION)
    assert str(error.value) == (
        "The weights of this model are on the meta device, and no hook of accelerate moves them to "
        "another device. Load the model with its weights: xi.load(name)."
    )
