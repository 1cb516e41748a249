"""Compiled code is always refused, because recordings of it would silently miss attention."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from xmodal_interp.errors import CaptureError
from xmodal_interp.hooks import ablate_heads, intervene, record

RUNNING = (
    "The model was called from compiled code, where attention cannot be recorded or edited. Call "
    "it as it was before torch.compile; pass disable_compile=True to generate with a static cache."
)
COMPILED = "{} is compiled, and attention in compiled code cannot be recorded or edited. "
BEFORE = "Use the model as it was before {}."
WRAPPED = BEFORE.format("torch.compile (model._orig_mod)")
IN_PLACE = BEFORE.format("model.compile()")
REPLACED = BEFORE.format("its forward was replaced (del model.forward)")
LAYER = "model.layers.1"
IDS = {"input_ids": torch.arange(2, 9)[None]}

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.compile gives many warnings


@pytest.fixture(autouse=True)
def _forget_what_was_compiled():
    yield
    torch._dynamo.reset()


def fresh() -> nn.Module:
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def submodule(model: nn.Module) -> nn.Module:
    model.set_submodule(LAYER, torch.compile(model.get_submodule(LAYER), backend="eager"))
    return model


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def submodule_in_place(model: nn.Module) -> nn.Module:
    model.get_submodule(LAYER).compile(backend="eager")
    return model


def forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def forward_of_submodule(model: nn.Module) -> nn.Module:
    layer = model.get_submodule(LAYER)
    layer.forward = torch.compile(layer.forward, backend="eager")
    return model


@pytest.mark.parametrize(
    ("compiled", "subject", "advice"),
    [
        (whole, "This model", WRAPPED),
        (submodule, f"{LAYER} (OptimizedModule)", WRAPPED),
        (in_place, "This model", IN_PLACE),
        (submodule_in_place, f"{LAYER} (LlamaDecoderLayer)", IN_PLACE),
        (forward, "The forward of this model", REPLACED),
        (forward_of_submodule, f"The forward of {LAYER} (LlamaDecoderLayer)", REPLACED),
    ],
)
def test_a_compiled_model_is_refused_before_the_block(
    compiled: Callable, subject: str, advice: str
) -> None:
    model = compiled(fresh())
    with pytest.raises(CaptureError) as error, record(model):
        pass
    assert str(error.value) == COMPILED.format(subject) + advice


@pytest.mark.parametrize("warm", [True, False])
def test_a_compiled_model_around_a_recorded_one_is_refused_when_it_runs(warm) -> None:
    model = fresh()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        alone = model(**IDS).logits
        if warm:
            compiled(**IDS)
        with pytest.raises(CaptureError) as error, record(model):
            compiled(**IDS)
        assert str(error.value) == RUNNING
        with record(model) as recording:
            assert torch.equal(model(**IDS).logits, alone)
        assert len(recording.calls) == 2
        assert torch.equal(compiled(**IDS).logits, alone)


@pytest.mark.parametrize("warm", [True, False])
def test_the_error_of_a_full_graph_contains_the_reason(warm) -> None:
    """With ``fullgraph=True`` torch raises its own error."""
    model = fresh()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        if warm:
            compiled(**IDS, use_cache=False)
        with pytest.raises(torch._dynamo.exc.Unsupported) as error, record(model):
            compiled(**IDS, use_cache=False)
    assert RUNNING in str(error.value)


@pytest.mark.parametrize("warm", [True, False])
def test_generate_that_compiles_is_refused(warm) -> None:
    """Without the refusal, only the prompt would be recorded, and not the compiled steps."""
    settings = CompileConfig(backend="eager", mode=None)
    settings._compile_all_devices = True  # the default on a GPU
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "cache_implementation": "static"}
    model = fresh()
    if warm:
        model.generate(**IDS, **options, compile_config=settings)
    with pytest.raises(CaptureError) as error, record(model):
        model.generate(**IDS, **options, compile_config=settings)
    assert str(error.value) == RUNNING
    with record(model, towers=["language"], layers=[0]) as recording:
        model.generate(**IDS, **options, disable_compile=True)
    assert [call.n_queries for call in recording.calls] == [7, 1, 1]


def test_an_intervention_is_refused_in_the_same_way() -> None:
    model = fresh()
    compiled = torch.compile(model, backend="eager")
    compiled(**IDS)
    with pytest.raises(CaptureError) as error, intervene(model, ablate_heads({1: [0]})):
        compiled(**IDS)
    assert str(error.value) == RUNNING


def test_the_forwards_of_modules_are_restored() -> None:
    model = fresh()
    layer = model.get_submodule(f"{LAYER}.self_attn")
    own = layer.forward = layer.forward  # accelerate sets this attribute too
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    with record(model), record(model):
        assert layer.forward is not own
    assert layer.forward is own
    assert all(vars(m).keys() == before[path].keys() for path, m in model.named_modules())
