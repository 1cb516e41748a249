"""Head ablation by zero, by uniform attention or by the mean, at all or at some positions."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.intervened import (
    FAMILIES,
    HEADS,
    SITE,
    backend,
    call_of,
    inputs_of,
    logits,
    out_projection,
    projected,
)
from tests.helpers.replicas import uniform_output
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.hooks import record
from xmodal_interp.hooks.ablation import ablate_heads
from xmodal_interp.hooks.attention_modules import head_counts
from xmodal_interp.hooks.head_means import mean_head_outputs
from xmodal_interp.sample import Sample


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_equals_zeroing_the_slice_of_the_output_projections_input(
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
        real = np.flatnonzero(attended[i])  # a padding query sees no key
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
def test_uniform_is_computed_for_layers_with_sinks_or_a_bias(option: dict[str, Tensor]) -> None:
    v = torch.tensor([1.0, 3.0, 5.0])[None, None, :, None]
    q, k = torch.randn(2, 1, 1, 3, 4)
    call, uniform = call_of(q, k, v, **option), ablate_heads({0: [0]}, "uniform")
    assert uniform.before(call, SITE) is call
    output = uniform.after(call, torch.randn(1, 3, 1, 1), SITE)
    torch.testing.assert_close(output.flatten(), torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_uniform_attention_is_causal(family: str) -> None:
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
def test_heads_are_ablated_only_at_the_given_queries(mode: str) -> None:
    """Positions before the first query, and samples without queries, are bit-identical."""
    vlm = tiny_vlm("llava")
    inputs = inputs_of(vlm, 3)
    base = logits(vlm, inputs)

    def after_150(sample: Sample) -> list[int]:
        return [*range(150, len(sample))]

    late = logits(vlm, inputs, ablate_heads({1: [0]}, mode, queries=after_150))
    assert torch.equal(base[:, :150], late[:, :150])
    assert not torch.equal(base[:, 150:], late[:, 150:])
    per_sample = torch.zeros(base.shape[:2], dtype=torch.bool)
    per_sample[1, :150] = True
    one = logits(vlm, inputs, ablate_heads({1: [0]}, mode, queries=per_sample))
    assert torch.equal(base[[0, 2]], one[[0, 2]])
    assert not torch.equal(base[1], one[1])


def test_means_equal_those_of_a_loop_and_replace_the_heads_outputs() -> None:
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
