"""Interventions edit the given layers and positions, can be combined, and are removed."""

import inspect
from contextlib import suppress

import pytest
import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface

from tests.helpers.intervened import (
    FAMILIES,
    HEADS,
    backend,
    inputs_of,
    logits,
    out_projection,
)
from tests.helpers.tiny import tiny_vlm
from xmodal_interp.errors import CaptureError, InputError, LayerError, PositionError
from xmodal_interp.hooks import record
from xmodal_interp.hooks.ablation import ablate_heads
from xmodal_interp.hooks.attention_modules import head_counts
from xmodal_interp.hooks.head_means import HeadMeans
from xmodal_interp.hooks.interventions import intervene
from xmodal_interp.hooks.knockout import knock_out_attention

INTERVENTIONS = {
    "zero": ablate_heads(HEADS),
    "uniform": ablate_heads(HEADS, "uniform"),
    "mean": ablate_heads(
        HEADS,
        "mean",
        means=HeadMeans(
            "language", "self", "all", 1, 1, dict.fromkeys(range(4), torch.ones(8, 16))
        ),
    ),
    "uniform late": ablate_heads(HEADS, "uniform", queries=[150, 156]),
    "zero on": ablate_heads(HEADS, queries=slice(155, None)),
    "cut": knock_out_attention(slice(150, None), slice(2, 100)),
    "cut heads": knock_out_attention([151, 157], slice(40, 90), heads=[2, 3]),
    "cut, not renormalised": knock_out_attention([151, 157], slice(40, 90), renormalise=False),
    "answer from itself": knock_out_attention(158, slice(155, None)),
    "cut cross": knock_out_attention(slice(8, None), slice(0, 90), kind="cross"),
    "uniform cross": ablate_heads({1: [0]}, "uniform", kind="cross", queries=[9, 13]),
}


@pytest.mark.parametrize(
    ("family", "implementation", "name"),
    [
        *(("llava", "sdpa", name) for name in INTERVENTIONS if "cross" not in name),
        *(("llava", "eager", name) for name in ("uniform late", "cut", "cut heads")),
        *(("qwen2_vl", "sdpa", name) for name in ("uniform late", "cut", "cut heads")),
        ("mllama", "sdpa", "cut cross"),
        ("mllama", "sdpa", "uniform cross"),
    ],
)
def test_decoding_with_and_without_a_cache_is_equal(
    family: str, implementation: str, name: str
) -> None:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True}
    with backend(tiny_vlm(family), implementation) as vlm:
        inputs = inputs_of(vlm)
        options["suppress_tokens"] = [vlm.model.config.image_token_id]  # requires another image
        n_prompt = inputs["input_ids"].shape[1]
        with intervene(vlm, INTERVENTIONS[name]):
            output = vlm.model.generate(**inputs, **options, output_logits=True)
        whole = {
            name: torch.cat([value, value[:, -1:].repeat_interleave(5, 1)], 1)
            if value.shape[:2] == inputs["input_ids"].shape
            else value
            for name, value in inputs.items()
        }
        whole["input_ids"] = output.sequences[:, :-1]
        expected = logits(vlm, whole, INTERVENTIONS[name])[0, n_prompt - 1 :]
        assert not torch.allclose(expected, logits(vlm, whole)[0, n_prompt - 1 :], atol=1e-3)
    torch.testing.assert_close(torch.cat(output.logits), expected, atol=2e-4, rtol=1e-4)


def state(model: nn.Module) -> tuple[object, ...]:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    own = sum("forward" in m.__dict__ for m in model.modules())
    interface = (AttentionInterface.get_interface, AttentionInterface.__dict__.get("__getitem__"))
    return hooks, own, interface, model.config._attn_implementation


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_exactly_restored(family: str, error: type[BaseException] | None) -> None:
    vlm = tiny_vlm(family)
    inputs = inputs_of(vlm)
    before, base = state(vlm.model), logits(vlm, inputs)
    weights = {name: weight.clone() for name, weight in vlm.model.state_dict().items()}

    def stop(*_: object) -> None:
        if error is not None:
            raise error

    with (
        suppress(KeyboardInterrupt, RuntimeError),
        out_projection(vlm, 0).register_forward_hook(stop),
    ):
        logits(vlm, inputs, ablate_heads({0: [0]}), knock_out_attention(5, 2))
    assert state(vlm.model) == before
    assert torch.equal(logits(vlm, inputs), base)
    assert all(torch.equal(w, weights[name]) for name, w in vlm.model.state_dict().items())


def test_a_recording_can_be_inside_or_outside() -> None:
    vlm = tiny_vlm("llava")
    inputs = inputs_of(vlm)
    uniform, cut = ablate_heads({1: [2]}, "uniform"), knock_out_attention(152, slice(0, 100))
    alone = logits(vlm, inputs, uniform, cut)
    recordings = []
    with record(vlm.model, towers=["language"]) as outside:
        assert torch.equal(logits(vlm, inputs, uniform, cut), alone)
    recordings.append(outside)
    with (
        torch.no_grad(),
        intervene(vlm, uniform),
        intervene(vlm, cut),
        record(vlm.model, towers=["language"]) as inside,
    ):
        assert torch.equal(vlm.model(**inputs, use_cache=False).logits, alone)
    recordings.append(inside)
    for recording in recordings:
        probs = recording.calls[1].probs()[0]
        assert not probs[:, 152, :100].any()
        torch.testing.assert_close(probs[2, 9, :10], torch.full((10,), 0.1))
        assert (probs[1, 9, :10] - 0.1).abs().max() > 0.01


def test_two_interventions_equal_nested_ones() -> None:
    vlm = tiny_vlm("llava")
    inputs = inputs_of(vlm)
    one, two = ablate_heads({0: [1], 2: [3]}), ablate_heads({2: [3], 3: [0]}, "uniform")
    with torch.no_grad(), intervene(vlm, one), intervene(vlm, two):
        nested = vlm.model(**inputs, use_cache=False).logits
    assert torch.equal(logits(vlm, inputs, one, two), nested)


def test_head_counts() -> None:
    assert head_counts(tiny_vlm("llava").model, "language") == dict.fromkeys(range(4), 8)
    assert head_counts(tiny_vlm("llava").model, "vision") == dict.fromkeys(range(3), 4)


REFUSALS = {
    "layer": (
        lambda: ablate_heads({4: [0]}),
        LayerError,
        "There is no layer 4: language self-attention has layers 0 to 3.",
    ),
    "head": (
        lambda: ablate_heads({-1: [8]}),
        LayerError,
        "There is no head 8: language self-attention, layer 3, has heads 0 to 7.",
    ),
    "cut layer": (
        lambda: knock_out_attention(5, 2, layers=[7]),
        LayerError,
        "There is no layer 7: language self-attention has layers 0 to 3.",
    ),
    "kind": (
        lambda: ablate_heads({0: [0]}, kind="cross"),
        LayerError,
        "The model has no language cross-attention. It has language self-attention, vision "
        "self-attention; pass one of these as tower= and kind=.",
    ),
    "mode": (
        lambda: inspect.unwrap(ablate_heads)({0: [0]}, "median"),
        InputError,
        "mode must be one of zero, uniform, mean; got 'median'.",
    ),
    "pairs": (
        lambda: inspect.unwrap(ablate_heads)([(1, 6)]),
        InputError,
        "heads must map layers to lists of heads, such as {3: [0, 5]}; got [(1, 6)].",
    ),
    "one head": (
        lambda: inspect.unwrap(ablate_heads)({1: 6}),
        InputError,
        "heads must map layers to lists of heads, such as {3: [0, 5]}; got {1: 6}.",
    ),
    "means": (
        lambda: ablate_heads({0: [0]}, "mean"),
        InputError,
        "Got mode='mean' with no means. Pass means=mean_head_outputs(vlm, items) for mode='mean', "
        "and only for that mode.",
    ),
    "means of layers": (
        lambda: ablate_heads(
            {0: [0], 1: [0]},
            "mean",
            means=HeadMeans("language", "self", "all", 1, 1, {0: torch.ones(8, 16)}),
        ),
        InputError,
        "The means hold layers 0; missing: 1. Ablate only layers that the means hold.",
    ),
    "negative": (
        lambda: knock_out_attention(-1, 2),
        PositionError,
        "Got the negative position -1, but positions of an intervention count from the start of "
        "the sequence, because its end moves during generation. Use xi.at.last for the "
        "last position of a prompt.",
    ),
    "after the end": (
        lambda: ablate_heads({0: [0]}, queries=[5, 500]),
        PositionError,
        "An intervention edits position 500, but language self-attention ran over positions 0 to "
        "153. Choose positions of the sequence.",
    ),
    "samples": (
        lambda: ablate_heads({0: [0]}, queries=torch.ones(2, 3, dtype=torch.bool)),
        InputError,
        "Got positions with 2 rows for a batch of 1 samples. Give one row per sample.",
    ),
    "nothing": (
        lambda: knock_out_attention(5, 2, heads=[]),
        InputError,
        "heads is empty; got []. Leave heads out for all.",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    make, error, message = REFUSALS[name]
    vlm = tiny_vlm("llava")
    with pytest.raises(error) as refusal:
        logits(vlm, inputs_of(vlm), make())
    assert str(refusal.value) == message


def test_a_layer_that_never_ran_is_an_error() -> None:
    vlm = tiny_vlm("llava")
    with pytest.raises(CaptureError) as refusal, intervene(vlm, ablate_heads({0: [0], 2: [1]})):
        pass
    assert str(refusal.value) == (
        "An intervention did not edit all its layers: language self-attention, layers 0, 2, did "
        "not run. Run the model inside the with block, or leave them out."
    )


def test_positions_are_refused_with_a_static_cache() -> None:
    vlm = tiny_vlm("llava")
    inputs = inputs_of(vlm)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "cache_implementation": "static"}
    with intervene(vlm, ablate_heads({0: [0]}, "uniform")):
        vlm.generate(inputs, **options)
    message = (
        r"\(a static or sliding cache\), so the positions of its queries are unknown\. Generate"
    )
    first = ablate_heads({0: [0]}, queries=[5])
    with pytest.raises(CaptureError, match=message), intervene(vlm, first):
        vlm.generate(inputs, **options)
