"""Tiny models of all types can be built, run and generate, and no attention is near uniform."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.conformance.spying import spy
from tests.helpers.families import DUAL_ENCODERS, RECORDS
from tests.helpers.model_types import Tiny, record_of, representatives, tiny, types
from tests.helpers.random_weights import DYNAMICS
from tests.helpers.real import build_model, real

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
SHARP = 0.1  # 0: uniform, 1: a single key


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "built" in metafunc.fixturenames:
        everything = metafunc.config.getoption("all_types")
        names = [*types(), *DUAL_ENCODERS] if everything else [*representatives(), "clip", "vilt"]
        metafunc.parametrize("built", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> tuple[str, Tiny]:
    return request.param, tiny(request.param)


def outputs(tiny_model: Tiny, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        found = tiny_model.model(**inputs)
    return [v for v in found.values() if isinstance(v, Tensor) and v.is_floating_point()]


def test_no_attention_is_near_uniform(built: tuple[str, Tiny]) -> None:
    name, model = built
    with spy(model.model) as observed:
        found = outputs(model, model.inputs)
    assert found
    assert not any(output.isnan().any() for output in found)
    assert observed
    assert [call for call in observed if call.n_keys < 2] == []
    judged = [call for call in observed if call.module not in record_of(name).even]
    assert [call for call in judged if call.sharpness < SHARP] == []


def test_the_image_changes_the_output(built: tuple[str, Tiny]) -> None:
    name, model = built
    seen = {
        k: v for k, v in model.inputs.items() if isinstance(v, Tensor) and v.dtype.is_floating_point
    }
    if not seen:
        assert name in ("evolla", "mistral4")  # a protein, and words only
        seen = {"input_ids": model.inputs["input_ids"]}
    # Images are exchanged between rows; a single row is reversed.
    other = {k: v.roll(1, 0) if len(v) > 1 else v.flip(-1) for k, v in seen.items()}
    before = outputs(model, model.inputs)
    after = outputs(model, model.inputs | other)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_every_attention_reaches_the_output(built: tuple[str, Tiny]) -> None:
    """No gate is closed: negating the output of an attention module changes the model's output."""
    name, model = built
    with spy(model.model) as observed:
        before = outputs(model, model.inputs)
    without_effect = []
    for module in dict.fromkeys(call.module for call in observed):
        handle = model.model.get_submodule(module).register_forward_hook(turned_around)
        try:
            after = outputs(model, model.inputs)
        finally:
            handle.remove()
        if all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            without_effect.append(module)
    idle = record_of(name).idle
    assert [module for module in without_effect if not module.endswith(idle)] == []
    assert bool(without_effect) == bool(idle)


def turned_around(_module: nn.Module, _args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return -0.5 * output
    return tuple(turned_around(_module, _args, part) for part in output[:1]) + output[1:]


def test_three_steps_of_generation(built: tuple[str, Tiny]) -> None:
    _, model = built
    if not model.generate_inputs:
        return
    # Some models delegate generation to a part, others drop the processors: one count suffices.
    steps, forwards = [], []

    def count(_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        steps.append(scores.shape)
        return scores

    handle = model.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        with torch.no_grad():
            processors = LogitsProcessorList([count])
            model.model.generate(**model.generate_inputs, logits_processor=processors)
    finally:
        handle.remove()
    assert 3 in (len(steps), len(forwards))


def test_no_weight_is_trivial(built: tuple[str, Tiny]) -> None:
    _, model = built
    parameters = dict(model.model.named_parameters())
    assert all(weight.dtype == torch.float32 for weight in parameters.values())
    flat = [
        name
        for name, weight in parameters.items()
        if not DYNAMICS.search(name) and weight.numel() >= 8 and weight.std() < 0.005
    ]
    assert flat == []


def test_all_types_are_those_of_transformers() -> None:
    assert types() == list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert set(RECORDS) == set(types())
    assert set(representatives()) < set(types())
    assert len(representatives()) == len(types()) // 3


def test_weights_and_inputs_are_always_the_same() -> None:
    first, again = tiny("llava"), tiny("llava")
    rebuilt = build_model(RECORDS["llava"], real("llava")[1].tokenizer)
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, rebuilt.state_dict()[name])
    for name, value in first.inputs.items():
        assert torch.equal(value, again.inputs[name])
