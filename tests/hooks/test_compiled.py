"""Compiled code is refused wherever it is met: it would be heard in part, without a word."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from xmodal_interp.errors import CaptureError
from xmodal_interp.hooks import ablate_heads, intervene, record

RULE = "Compiled code runs without asking for its attention functions, so nothing could be heard. "
RUNNING = (
    f"{RULE}The model was called from compiled code. Call it as it was before torch.compile; "
    "generate compiles by itself for a static cache, unless it is told disable_compile=True."
)
LAYER = "model.layers.1"
IDS = {"input_ids": torch.arange(2, 9)[None]}

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.compile itself


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
    ("compiled", "words"),
    [
        (whole, "This model is compiled. Record the model as it was before torch.compile "
         "(model._orig_mod)."),
        (submodule, f"{LAYER} (OptimizedModule) is compiled. Record the model as it was before "
         "torch.compile (model._orig_mod)."),
        (in_place, "This model is compiled. Record the model as it was before model.compile()."),
        (submodule_in_place, f"{LAYER} (LlamaDecoderLayer) is compiled. Record the model as it was "
         "before model.compile()."),
        (forward, "The forward of this model is compiled. Record the model as it was before its "
         "forward was replaced (del model.forward)."),
        (forward_of_submodule, f"The forward of {LAYER} (LlamaDecoderLayer) is compiled. Record "
         "the model as it was before its forward was replaced (del model.forward)."),
    ],
)  # fmt: skip
def test_what_is_compiled_is_refused_before_the_block(compiled: Callable, words: str) -> None:
    model = compiled(fresh())
    with pytest.raises(CaptureError) as error, record(model):
        pass
    assert str(error.value) == RULE + words


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
def test_a_graph_that_must_be_whole_says_so_too(warm) -> None:
    """torch raises an error of its own there; the reason stands in it."""
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
    """Its steps were not heard, while the prompt was."""
    settings = CompileConfig(backend="eager", mode=None)
    settings._compile_all_devices = True  # as it is on a GPU
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


def test_the_model_is_left_as_it_was() -> None:
    model = fresh()
    layer = model.get_submodule(f"{LAYER}.self_attn")
    own = layer.forward = layer.forward  # as accelerate puts one there
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    with record(model), record(model):
        assert layer.forward is not own
    assert layer.forward is own
    assert all(vars(m).keys() == before[path].keys() for path, m in model.named_modules())
