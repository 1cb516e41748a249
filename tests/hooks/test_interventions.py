"""Interventions do what they say, at the positions they say, and leave nothing behind."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import AttentionInterface

from tests.replicas import knocked_out, uniform_output
from tests.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.errors import CaptureError, InputError, LayerError, PositionError
from xmodal_interp.hooks import attention_modules, record
from xmodal_interp.hooks.ablation import ablate_heads
from xmodal_interp.hooks.calibration import HeadMeans, mean_head_outputs
from xmodal_interp.hooks.heads import head_counts
from xmodal_interp.hooks.interventions import Intervention, Site, intervene
from xmodal_interp.hooks.knockout import knock_out_attention
from xmodal_interp.hooks.modules import Identity
from xmodal_interp.hooks.tap import RawCall
from xmodal_interp.models import VLM

FAMILIES = ["llava", "qwen2_vl", "mllama"]
HEADS = {1: [0, 5], 3: [2]}
OUT = {"o_proj", "out_proj", "proj"}  # what output projections are called


@contextmanager
def backend(vlm: VLM, name: str) -> Iterator[VLM]:
    try:
        vlm.model.set_attn_implementation(name)
        yield vlm
    finally:
        vlm.model.set_attn_implementation("sdpa")


def inputs_of(vlm: VLM, batch: int = 1) -> dict:
    pictures = [[picture(seed=i)] for i in range(batch)]
    questions = [QUESTION, "how many shapes ?", "is there a blue cross ?"][:batch]
    return vlm.prepare(pictures, questions)[0]


def logits(vlm: VLM, inputs: dict, *interventions: Intervention) -> Tensor:
    with torch.no_grad(), intervene(vlm, *interventions):
        return vlm.model(**inputs, use_cache=False).logits


def out_projection(vlm: VLM, layer: int, tower: str = "language", kind: str = "self") -> nn.Module:
    module = next(
        m
        for m, i in attention_modules(vlm.model).items()
        if (i.tower, i.kind, i.layer) == (tower, kind, layer)
    )
    return next(child for name, child in module.named_children() if name in OUT)


def projected(vlm: VLM, inputs: dict, layer: int, *interventions: Intervention) -> Tensor:
    """What the output projection of a layer is given: ``[sample, position, head * d_head]``."""
    seen: list[Tensor] = []
    hook = out_projection(vlm, layer).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    with hook:
        logits(vlm, inputs, *interventions)
    return seen[0]


def call_of(q: Tensor, k: Tensor, v: Tensor, backend: str = "sdpa", **options: object) -> RawCall:
    return RawCall(nn.Identity(), q, k, v, None, backend, {"is_causal": True, **options})


SITE = Site(Identity("layers.0.attention", "language", "self", 0), (0,), 0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_is_zeroing_the_slice_that_the_output_projection_is_given(
    family: str, implementation: str
) -> None:
    heads = HEADS if family != "mllama" else {0: [0, 3]}
    with backend(tiny_vlm(family), implementation) as vlm:
        inputs = inputs_of(vlm)
        d_head = (
            vlm.model.config.get_text_config().hidden_size
            // head_counts(vlm.model, "language")[min(heads)]
        )

        def zeroing(of_layer: list[int]) -> object:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                zeroed = args[0].clone()
                for head in of_layer:
                    zeroed[..., head * d_head : (head + 1) * d_head] = 0
                return (zeroed,)

            return hook

        with ExitStack() as stack, torch.no_grad():
            for layer, of_layer in heads.items():
                out = out_projection(vlm, layer)
                stack.enter_context(out.register_forward_pre_hook(zeroing(of_layer)))
            expected = vlm.model(**inputs, use_cache=False).logits
        assert torch.equal(logits(vlm, inputs, ablate_heads(heads)), expected)
        assert not torch.equal(logits(vlm, inputs), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_uniform_is_the_mean_of_the_visible_values(
    family: str, batch: int, implementation: str
) -> None:
    with backend(tiny_vlm(family), implementation) as vlm:
        inputs = inputs_of(vlm, batch)
        uniform = ablate_heads({2: [0, 3, 7]}, "uniform")
        with record(vlm.model, towers=["language"], layers=[2], values=True) as recording:
            given = projected(vlm, inputs, 2, uniform).unflatten(-1, (8, -1)).transpose(1, 2)
    (call,) = recording.calls
    attended = inputs["attention_mask"].bool().numpy()
    n = attended.shape[1]
    for i in range(batch):
        visible = np.tri(n, dtype=bool) & attended[i]
        real = np.flatnonzero(attended[i])  # a padded query sees nothing
        expected = uniform_output(call.v[i].numpy(), visible[real], 8)
        np.testing.assert_allclose(given[i, [0, 3, 7]][:, real], expected[[0, 3, 7]], atol=2e-6)
        assert (given[i, 1][real] - torch.from_numpy(expected[1])).abs().max() > 0.01


def test_uniform_by_eye() -> None:
    """Values 1, 3, 5 and a causal mask: 1, (1 + 3) / 2, (1 + 3 + 5) / 3."""
    v = torch.tensor([1.0, 3.0, 5.0])[None, None, :, None]
    q, k = torch.randn(2, 1, 1, 3, 4)
    call = ablate_heads({0: [0]}, "uniform").before(call_of(q, k, v), SITE)
    output = functional.scaled_dot_product_attention(call.query, call.key, v, is_causal=True)
    torch.testing.assert_close(output.flatten(), torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize(
    "option", [{"s_aux": torch.ones(1)}, {"position_bias": torch.randn(1, 1, 3, 3)}]
)
def test_uniform_is_computed_where_zero_scores_are_not_all(option: dict[str, Tensor]) -> None:
    v = torch.tensor([1.0, 3.0, 5.0])[None, None, :, None]
    q, k = torch.randn(2, 1, 1, 3, 4)
    call, uniform = call_of(q, k, v, **option), ablate_heads({0: [0]}, "uniform")
    assert uniform.before(call, SITE) is call
    output = uniform.after(call, torch.randn(1, 3, 1, 1), SITE)
    torch.testing.assert_close(output.flatten(), torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_uniform_never_looks_ahead(family: str) -> None:
    vlm = tiny_vlm(family)
    inputs = inputs_of(vlm)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, -1] = vlm.tokenizer.convert_tokens_to_ids("red")
    uniform = ablate_heads({layer: range(8) for layer in range(4)}, "uniform")
    one, two = logits(vlm, inputs, uniform)[0], logits(vlm, other, uniform)[0]
    assert torch.equal(one[:-1], two[:-1])
    assert not torch.equal(one[-1], two[-1])


@pytest.mark.parametrize("mode", ["zero", "uniform"])
def test_ablation_in_the_vision_tower(mode: str) -> None:
    vlm = tiny_vlm("qwen2_vl")
    inputs = inputs_of(vlm, 2)
    changed = logits(vlm, inputs, ablate_heads({0: [1]}, mode, tower="vision"))
    assert not torch.allclose(changed, logits(vlm, inputs), atol=1e-3)


@pytest.mark.parametrize("mode", ["zero", "uniform"])
def test_queries_choose_where_a_head_is_ablated(mode: str) -> None:
    """Positions before the first chosen one are bit-identical; those per sample hold for it."""
    vlm = tiny_vlm("llava")
    inputs = inputs_of(vlm, 3)
    base = logits(vlm, inputs)
    late = logits(vlm, inputs, ablate_heads({1: [0]}, mode, queries=slice(150, None)))
    assert torch.equal(base[:, :150], late[:, :150])
    assert not torch.equal(base[:, 150:], late[:, 150:])
    per_sample = torch.zeros(3, 150, dtype=torch.bool)
    per_sample[1] = True
    one = logits(vlm, inputs, ablate_heads({1: [0]}, mode, queries=per_sample))
    assert torch.equal(base[[0, 2]], one[[0, 2]])
    assert not torch.equal(base[1], one[1])


def test_means_are_those_of_a_loop_and_take_the_heads_place() -> None:
    vlm = tiny_vlm("llava")
    items = [
        {"image": picture(seed=i), "prompt": prompt}
        for i, prompt in enumerate([QUESTION, "how many shapes ?", QUESTION])
    ]
    means = mean_head_outputs(vlm, items, positions="text", batch_size=2)
    assert (means.n_samples, means.positions) == (3, "text")
    collected = []
    for item in items:
        inputs, (prompt,) = vlm.prepare([[item["image"]]], [item["prompt"]])
        text = prompt.tokens["kind"].ne("image").to_numpy(dtype=bool)
        collected.append(projected(vlm, inputs, 2)[0][text])
    expected = torch.cat(collected)
    assert means.n_positions == len(expected)
    torch.testing.assert_close(means.means[2].flatten(), expected.mean(0), atol=1e-6, rtol=1e-5)
    inputs = inputs_of(vlm)
    given = projected(vlm, inputs, 2, ablate_heads({2: [3]}, "mean", queries=[5], means=means))
    at_5 = given[0, 5].unflatten(-1, (8, -1))
    assert torch.equal(at_5[3], means.means[2][3])
    untouched = projected(vlm, inputs, 2)
    assert torch.equal(at_5[[0, 7]], untouched[0, 5].unflatten(-1, (8, -1))[[0, 7]])
    assert torch.equal(given[0, 6:], untouched[0, 6:])


def test_knock_out_by_eye() -> None:
    """Equal scores; query 2 no longer reads key 0: from thirds to halves, or thirds with a hole."""
    v = torch.eye(3)[None, None]
    call = call_of(torch.zeros(1, 1, 3, 3), torch.randn(1, 1, 3, 3), v)
    cut = knock_out_attention(2, 0).before(call, SITE)
    rows = functional.scaled_dot_product_attention(cut.query, cut.key, v, attn_mask=cut.mask)
    expected = [[1, 0, 0], [1 / 2, 1 / 2, 0], [0, 1 / 2, 1 / 2]]
    torch.testing.assert_close(rows[0, 0], torch.tensor(expected))
    whole = functional.scaled_dot_product_attention(call.query, call.key, v, is_causal=True)
    holed = knock_out_attention(2, 0, renormalise=False).after(call, whole.transpose(1, 2), SITE)
    expected[2] = [0, 1 / 3, 1 / 3]
    torch.testing.assert_close(holed[0, :, 0], torch.tensor(expected))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("heads", [None, [1, 6]])
def test_knock_out_is_the_replica(
    heads: list[int] | None, renormalise: bool, implementation: str
) -> None:
    queries, keys = [149, 150, 152], [3, 7, 149, 151]
    cut = knock_out_attention(queries, keys, layers=[0], heads=heads, renormalise=renormalise)
    with backend(tiny_vlm("llava"), implementation) as vlm:
        inputs = inputs_of(vlm)
        with record(vlm.model, towers=["language"], layers=[0], values=True) as recording:
            logits(vlm, inputs)
        given = projected(vlm, inputs, 0, cut)[0].unflatten(-1, (8, -1)).transpose(0, 1)
    (call,) = recording.calls
    probs = call.probs()[0].numpy()
    chosen = range(8) if heads is None else heads
    edited = knocked_out(probs, queries, keys, renormalise=renormalise)
    probs[list(chosen)] = edited[list(chosen)]
    expected = probs @ call.v[0].repeat_interleave(2, 0).numpy()
    np.testing.assert_allclose(given, expected, atol=2e-6)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_cut_edges_are_exactly_zero_and_the_image_no_longer_matters(
    family: str, implementation: str
) -> None:
    with backend(tiny_vlm(family), implementation) as vlm:
        inputs, prompts = vlm.prepare([[picture(seed=1)]], [QUESTION])
        kinds = prompts[0].tokens["kind"]
        image = torch.from_numpy(kinds.eq("image").to_numpy(dtype=bool))
        behind = torch.arange(len(image)) > image.nonzero().max()
        cut = knock_out_attention(behind, image)
        with record(vlm.model, towers=["language"]) as recording:
            blind = logits(vlm, inputs, cut)
        for call in recording.calls:
            probs = call.probs()[0]
            assert not probs[:, behind][..., image].any()
            assert (probs.sum(-1) - 1).abs().max() < 1e-5
        other = vlm.prepare([[picture(seed=2)]], [QUESTION])[0]
        assert torch.equal(logits(vlm, other, cut)[0, behind], blind[0, behind])
        assert not torch.equal(logits(vlm, other)[0, behind], logits(vlm, inputs)[0, behind])


def test_cross_attention_can_be_cut_but_not_emptied() -> None:
    vlm = tiny_vlm("mllama")
    inputs = inputs_of(vlm)
    last = inputs["input_ids"].shape[1] - 1
    base = logits(vlm, inputs)
    some = logits(vlm, inputs, knock_out_attention(last, slice(0, 4), kind="cross"))
    assert torch.equal(base[0, :-1], some[0, :-1])
    assert not torch.equal(base[0, -1], some[0, -1])
    every = knock_out_attention(last, slice(0, None), kind="cross", renormalise=False)
    logits(vlm, inputs, every)
    with pytest.raises(InputError) as refusal:
        logits(vlm, inputs, knock_out_attention(last, slice(0, None), kind="cross"))
    path = next(i.module for i in attention_modules(vlm.model).values() if i.kind == "cross")
    assert str(refusal.value) == (
        "A query must keep at least one key, because a softmax over nothing is not defined. In "
        f"{path}, query {last} would lose all. Leave it some keys, or pass renormalise=False."
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("renormalise", [True, False])
def test_cutting_nothing_is_bit_identical(renormalise: bool, implementation: str) -> None:
    with backend(tiny_vlm("llava"), implementation) as vlm:
        inputs = inputs_of(vlm)
        base = logits(vlm, inputs)
        nothing = knock_out_attention([], slice(0, 9), renormalise=renormalise)
        itself = knock_out_attention(7, 7, renormalise=renormalise)
        none = ablate_heads({0: [1]}, "uniform", queries=[])
        assert torch.equal(logits(vlm, inputs, nothing, itself, none), base)


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
}


@pytest.mark.parametrize(
    ("family", "implementation", "name"),
    [
        *(("llava", "sdpa", name) for name in INTERVENTIONS),
        *(("llava", "eager", name) for name in ("uniform late", "cut", "cut heads")),
        *(("qwen2_vl", "sdpa", name) for name in ("uniform late", "cut", "cut heads")),
    ],
)
def test_decoding_with_a_cache_is_decoding_without(
    family: str, implementation: str, name: str
) -> None:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True}
    with backend(tiny_vlm(family), implementation) as vlm:
        inputs = inputs_of(vlm)
        n_prompt = inputs["input_ids"].shape[1]
        with intervene(vlm, INTERVENTIONS[name]):
            output = vlm.model.generate(**inputs, **options, output_logits=True)
        whole = {
            name: functional.pad(value, (0, 5), mode="replicate")
            if value.shape == inputs["input_ids"].shape
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


def test_recording_goes_inside_or_outside() -> None:
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


def test_two_interventions_are_one_inside_the_other() -> None:
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
        "A layer must exist. language self-attention has layers 0 to 3; got 4.",
    ),
    "head": (
        lambda: ablate_heads({-1: [8]}),
        LayerError,
        "A head must exist. language self-attention, layer 3, has heads 0 to 7; got 8.",
    ),
    "cut layer": (
        lambda: knock_out_attention(5, 2, layers=[7]),
        LayerError,
        "A layer must exist. language self-attention has layers 0 to 3; got 7.",
    ),
    "kind": (
        lambda: ablate_heads({0: [0]}, kind="cross"),
        LayerError,
        "A layer must exist. The model has language self-attention, vision self-attention; it has "
        "no language cross-attention.",
    ),
    "mode": (
        lambda: inspect.unwrap(ablate_heads)({0: [0]}, "median"),
        InputError,
        "mode must be one of zero, uniform, mean; got 'median'.",
    ),
    "means": (
        lambda: ablate_heads({0: [0]}, "mean"),
        InputError,
        "mode='mean' needs means=mean_head_outputs(vlm, items), and no other mode does; got "
        "mode='mean' with no means.",
    ),
    "means of layers": (
        lambda: ablate_heads(
            {0: [0], 1: [0]},
            "mean",
            means=HeadMeans("language", "self", "all", 1, 1, {0: torch.ones(8, 16)}),
        ),
        InputError,
        "Means must cover the ablated layers. They were taken of layers 0; missing: 1.",
    ),
    "negative": (
        lambda: knock_out_attention(-1, 2),
        PositionError,
        "Positions of an intervention count from the start of the sequence, because its end moves "
        "while the model generates; got -1. The last position of a prompt is sample.last.",
    ),
    "behind the end": (
        lambda: ablate_heads({0: [0]}, queries=[5, 500]),
        PositionError,
        "An intervention must reach every position it names. It names position 500; language "
        "self-attention ran over positions 0 to 153.",
    ),
    "samples": (
        lambda: ablate_heads({0: [0]}, queries=torch.ones(2, 3, dtype=torch.bool)),
        InputError,
        "Positions given per sample have one row for each sample of the batch. Got 2 rows for a "
        "batch of 1.",
    ),
    "nothing": (
        lambda: knock_out_attention(5, 2, heads=[]),
        InputError,
        "heads must name at least one, or be None for all; got [].",
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
        "An intervention must meet every layer it names. language self-attention, layers 0, 2, did "
        "not run; run the model inside the with block, or leave them out."
    )


def test_a_static_cache_does_not_tell_positions() -> None:
    vlm = tiny_vlm("llava")
    inputs = inputs_of(vlm)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "cache_implementation": "static"}
    with intervene(vlm, ablate_heads({0: [0]}, "uniform")):
        vlm.generate(inputs, **options)
    message = (
        r"\(a static or sliding cache\)\. Generate with the default cache, or intervene without"
    )
    first = ablate_heads({0: [0]}, queries=[5])
    with pytest.raises(CaptureError, match=message), intervene(vlm, first):
        vlm.generate(inputs, **options)


def test_a_backend_without_a_mask_cannot_renormalise() -> None:
    q = k = v = torch.randn(1, 1, 3, 4)
    call = call_of(q, k, v, backend="flash_attention_2")
    with pytest.raises(CaptureError) as refusal:
        knock_out_attention(2, 0).before(call, SITE)
    assert str(refusal.value) == (
        "Cutting edges needs a backend that takes a mask with a row per query: eager or sdpa. The "
        "model runs 'flash_attention_2'; load it with attn_implementation='sdpa', or pass "
        "renormalise=False."
    )
