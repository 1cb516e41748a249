"""Attention of the model is recorded for any class name; attention of other models is not."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CvtConfig,
    CvtModel,
    LogitsProcessor,
    LogitsProcessorList,
)

from tests.helpers.attention_variants import (
    FastAttn,
    Mixer,
    assert_complete_and_exact,
    first,
    llava_with,
    of,
)
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.capturing.run import capture
from xmodal_interp.errors import CaptureError
from xmodal_interp.hooks import attention_modules, record
from xmodal_interp.hooks.inline_attention import DENSE_NOTE
from xmodal_interp.hooks.torch_attention import KERNEL_NOTE
from xmodal_interp.sample import Sample

WIDTH = 16


def other_model() -> tuple[nn.Module, dict]:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return CLIPVisionModel(config).eval(), {"pixel_values": torch.randn(1, 3, 8, 8)}


def calls_of(recording) -> list:
    return [(call.tower, call.layer, call.module) for call in recording.calls]


def test_attention_outside_the_recorded_part_is_left_out() -> None:
    model, inputs = of("llava")
    with torch.no_grad(), record(model.model.language_model) as recording:
        model(**inputs)
    assert [call.layer for call in recording.calls] == [0, 1, 2, 3]
    assert {call.tower for call in recording.calls} == {"language"}
    assert recording.unseen == []


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_another_model_in_the_block_is_left_out(backend) -> None:
    (model, inputs), (other, pixels) = of("llava"), other_model()
    other.set_attn_implementation(backend)
    with torch.no_grad(), record(model) as recording:
        model(**inputs)
        other(**pixels)
    assert_complete_and_exact(recording.calls, model)
    assert len(recording.calls) == 7


def test_two_recordings_hold_the_calls_of_their_own_model() -> None:
    (model, inputs), (other, pixels) = of("llava"), other_model()
    with torch.no_grad(), record(model) as one, record(other) as two:
        other(**pixels)
        model(**inputs)
    assert_complete_and_exact(one.calls, model)
    assert_complete_and_exact(two.calls, other)


def test_a_shared_part_is_recorded_when_another_model_runs_it() -> None:
    (model, inputs), (other, _) = of("llava"), of("llava")
    other.model.language_model = model.model.language_model
    with torch.no_grad(), record(model) as recording:
        other(**inputs)
    assert [(call.tower, call.layer) for call in recording.calls] == [
        ("language", layer) for layer in range(4)
    ]


@pytest.mark.parametrize("kind", [Mixer, FastAttn])
@pytest.mark.parametrize("parts", [True, False], ids=["parts", "whole"])
def test_a_kernel_called_by_any_class_is_recorded(kind, parts) -> None:
    model, inputs = llava_with(lambda old: kind(old, parts=parts))
    with torch.no_grad():
        alone = first(model(**inputs))
        with record(model, towers=["language"]) as recording:
            assert torch.equal(first(model(**inputs)), alone)
    path = "model.language_model.layers"
    assert calls_of(recording) == [("language", i, f"{path}.{i}.self_attn") for i in range(4)]
    mixed = recording.calls[1]
    assert mixed.note == KERNEL_NOTE
    scores = (mixed.q @ mixed.k.transpose(-1, -2) * mixed.scaling).masked_fill(
        torch.ones(mixed.n_keys, mixed.n_keys).triu(1).bool(), -torch.inf
    )
    torch.testing.assert_close(mixed.probs(), scores.softmax(-1))
    names = [each.module for each in recording.modules if each.tower == "language"]
    assert sorted(names) == [f"{path}.{i}.self_attn" for i in range(4)]


@pytest.mark.parametrize("kind", [Mixer, FastAttn])
@pytest.mark.parametrize("parts", [True, False], ids=["parts", "whole"])
def test_a_softmax_of_any_class_with_heads_is_recorded(kind, parts) -> None:
    model, inputs = llava_with(lambda old: kind(old, "softmax", parts=parts))
    with torch.no_grad(), record(model, towers=["language"]) as recording:
        model(**inputs)
    assert [call.layer for call in recording.calls] == [0, 1, 2, 3]
    assert recording.calls[1].note == DENSE_NOTE


def test_a_wrapper_of_attention_that_is_not_recorded_is_an_error() -> None:
    model, inputs = llava_with(lambda old: FastAttn(old, "exp", parts=False))
    unseen = pytest.raises(CaptureError, match=r"layers\.1\.self_attn\. Leave out")
    with unseen, torch.no_grad(), record(model):
        model(**inputs)


def test_attention_whose_base_class_has_another_name() -> None:
    class MHA(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.scaled_dot_product_attention(self.projection(x), x, x)

    class Attention(MHA):
        pass

    with torch.no_grad(), record(nn.Sequential(Attention(), MHA())) as recording:
        nn.Sequential(Attention(), MHA())(torch.randn(1, 2, 3, 4))  # another model
    assert recording.calls == []
    model = nn.Sequential(Attention(), MHA())
    with torch.no_grad(), record(model) as recording:
        model(torch.randn(1, 2, 3, 4))
    assert calls_of(recording) == [("language", 0, "0"), ("language", 1, "1")]


def test_an_unregistered_module_is_recorded_as_the_module_that_runs_it() -> None:
    class Hiding(nn.Module):
        def __init__(self, old: nn.Module) -> None:
            super().__init__()
            self.hidden = [old]

        def forward(self, *args: object, **options: object) -> object:
            return self.hidden[0](*args, **options)

    model, inputs = llava_with(Hiding)
    with torch.no_grad(), record(model, towers=["language"]) as recording:
        model(**inputs)
    assert [call.layer for call in recording.calls] == [0, 1, 2, 3]


def test_the_kernel_is_restored() -> None:
    before = functional.scaled_dot_product_attention
    model, inputs = of("llava")
    with torch.no_grad(), record(model), record(model):
        model(**inputs)
        assert functional.scaled_dot_product_attention is not before
    assert functional.scaled_dot_product_attention is before
    with record(model):
        functional.scaled_dot_product_attention = later = lambda *_: None
    try:
        assert functional.scaled_dot_product_attention is later  # replaced by other code
    finally:
        functional.scaled_dot_product_attention = before


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_with_a_replaced_forward_is_recorded(layer) -> None:
    model, inputs = of("llava")
    attention = model.model.language_model.layers[layer].self_attn

    def forward(hidden_states, **_) -> tuple[torch.Tensor, None]:
        x = hidden_states.unflatten(-1, (8, -1)).transpose(1, 2)
        probs = torch.softmax(x @ x.transpose(-1, -2), -1)
        return (probs @ x).transpose(1, 2).flatten(2), None

    attention.forward = forward
    with torch.no_grad(), record(model, towers=["language"]) as recording:
        model(**inputs)
    assert [call.layer for call in recording.calls] == [0, 1, 2, 3]
    assert [call.note == DENSE_NOTE for call in recording.calls] == [i == layer for i in range(4)]


def test_projections_named_attention_are_not_recorded() -> None:
    config = CvtConfig(
        embed_dim=[8, 8, 8], num_heads=[1, 2, 2], depth=[1, 2, 3], drop_path_rate=[0.0, 0.0, 0.0]
    )
    model = CvtModel(config).eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        alone = first(model(pixels))
        with record(model) as recording:
            assert torch.equal(first(model(pixels)), alone)
    assert [(call.tower, call.kind, call.layer) for call in recording.calls] == [
        ("vision", "self", layer) for layer in range(6)
    ]
    assert recording.calls[3].module == "encoder.stages.2.layers.0.attention.attention"


def test_kernel_calls_that_do_not_mix_tokens_are_left_out() -> None:
    """Some models mix states of earlier layers by attention."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.scaled_dot_product_attention(self.projection(x), x, x)

    class AttentionResidual(Attention):
        pass

    model = nn.Sequential(Attention(), AttentionResidual())
    with torch.no_grad(), record(model) as recording:
        model(torch.randn(1, 2, 3, 4))
    assert calls_of(recording) == [("language", 0, "0")]


class Windows(nn.Module):
    """Attends within windows by operands with five axes, as timm's hiera does.

    Its class name does not contain "attention". Neighbouring positions are in different windows.
    """

    n_windows, num_heads = 3, 2

    def __init__(self, *, heads_first: bool = True, stride: int = 1) -> None:
        super().__init__()
        self.qkv, self.heads_first, self.stride = nn.Linear(8, 24), heads_first, stride

    def operands(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(x).reshape(len(x), -1, self.n_windows, 3, self.num_heads, 4)
        order = (3, 0, 4, 2, 1, 5) if self.heads_first else (3, 0, 2, 4, 1, 5)
        return qkv.permute(order)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.operands(x)
        if self.stride > 1:
            q = q.unflatten(-2, (self.stride, -1)).amax(-3)
        options = {"is_causal": True} if mask is None and not self.heads_first else {}
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("given", ["nothing", "boolean", "additive"])
@pytest.mark.parametrize("heads_first", [True, False])
def test_blocks_of_operands_with_five_axes_do_not_see_each_other(
    given, heads_first, stride
) -> None:
    model = nn.Sequential(Windows(heads_first=heads_first, stride=stride)).eval()
    x = torch.randn(2, 12, 8)
    scores = torch.randn(4 // stride, 4)
    mask = {"nothing": None, "boolean": (scores > -1) | (torch.arange(4) == 0), "additive": scores}
    with torch.no_grad():
        alone = model[0](x, mask[given])
        with record(model, values=True) as recording:
            assert torch.equal(model[0](x, mask[given]), alone)
    (call,) = recording.calls
    assert (call.n_samples, call.n_heads, call.n_queries, call.n_keys) == (2, 2, 12 // stride, 12)
    window = torch.arange(12) % 3  # of each position of the input
    probs = call.probs()
    own = window[: 12 // stride, None] == window
    torch.testing.assert_close((probs * own).sum(-1), torch.ones(probs.shape[:-1]))
    assert not probs[..., ~own].any()
    if heads_first:  # [sample, head, window, position, d_head]
        mixed = (probs @ call.v).unflatten(2, (-1, 3)).transpose(2, 3)
    else:
        mixed = (probs @ call.v).unflatten(2, (-1, 3)).permute(0, 3, 1, 2, 4)
    torch.testing.assert_close(mixed, alone, atol=1e-5, rtol=0)


def test_the_assistant_model_of_a_generation_is_left_out() -> None:
    """transformers 5.23 runs an assistant model, and logits processors, inside ``generate``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model, inputs = of("llava")
    vocab = model.config.text_config.vocab_size
    sizes = {"vocab_size": vocab, "hidden_size": WIDTH, "intermediate_size": WIDTH}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    helper = LlamaForCausalLM(config).eval()

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        helper(input_ids=ids)
        mixer(torch.randn(1, 2, 8))
        return scores

    mixer = Mixer(nn.Linear(8, 8), parts=False)
    steps = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        for options in ({"assistant_model": helper}, {"logits_processor": [processor]}):
            alone = model.generate(**inputs, **steps, **options)
            with record(model, towers=["language"]) as recording:
                assert torch.equal(model.generate(**inputs, **steps, **options), alone)
            path = "model.language_model.layers"
            assert {each[1:] for each in calls_of(recording)} == {
                (i, f"{path}.{i}.self_attn") for i in range(4)
            }
            assert len(recording.modules) == len(attention_modules(model))


class Runs(LogitsProcessor):
    """Calls a function after each step of a generation, without changing the scores."""

    def __init__(self, run: Callable[[torch.Tensor], object]) -> None:
        self.run = run

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.run(input_ids)
        return scores


def captured_with(run: Callable[[torch.Tensor], object]) -> Sample:
    options = {"logits_processor": LogitsProcessorList([Runs(run)])}
    return capture(tiny_vlm("llava"), picture(), QUESTION, max_new_tokens=3, generation=options)


def test_kernel_calls_of_a_logits_processor_are_left_out() -> None:
    """The processor is a plain function: the model in ``generate`` is the only running module."""
    given = torch.randn(1, 2, 4, 8)
    sample = captured_with(lambda _: functional.scaled_dot_product_attention(given, given, given))
    alone = capture(tiny_vlm("llava"), picture(), QUESTION, max_new_tokens=3)
    assert set(sample.calls) == set(alone.calls)
    for key, call in alone.calls.items():
        assert torch.equal(sample.calls[key].probs(), call.probs())


def test_parts_of_the_model_run_by_a_logits_processor_are_refused() -> None:
    vlm = tiny_vlm("llava")
    inputs, _ = vlm.prepare([[picture(seed=1)]], [QUESTION])
    with pytest.raises(CaptureError, match="ran on a sequence of 3 positions after its prompt"):
        captured_with(lambda ids: vlm.model.get_decoder()(input_ids=ids[:, :3]))
    with pytest.raises(CaptureError, match="ran again during generation with a cache"):
        captured_with(lambda _: vlm.model.model.vision_tower(inputs["pixel_values"]))
