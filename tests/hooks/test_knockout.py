"""Knock-out sets the given edges, and no others, exactly to zero."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.helpers.intervened import SITE, backend, call_of, inputs_of, logits, projected
from tests.helpers.replicas import knocked_out
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.errors import CaptureError, InputError
from xmodal_interp.hooks import attention_modules, record
from xmodal_interp.hooks.ablation import ablate_heads
from xmodal_interp.hooks.knockout import knock_out_attention


def test_knock_out_by_eye() -> None:
    """With equal scores, cutting query 2 from key 0 changes 1/3, 1/3, 1/3 to 0, 1/2, 1/2.

    Without renormalisation it gives 0, 1/3, 1/3.
    """
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
def test_knock_out_equals_the_replica(
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
        after = torch.arange(len(image)) > image.nonzero().max()
        cut = knock_out_attention(after, image)
        with record(vlm.model, towers=["language"]) as recording:
            blind = logits(vlm, inputs, cut)
        for call in recording.calls:
            probs = call.probs()[0]
            assert not probs[:, after][..., image].any()
            assert (probs.sum(-1) - 1).abs().max() < 1e-5
        other = vlm.prepare([[picture(seed=2)]], [QUESTION])[0]
        assert torch.equal(logits(vlm, other, cut)[0, after], blind[0, after])
        assert not torch.equal(logits(vlm, other)[0, after], logits(vlm, inputs)[0, after])


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
        f"Query {last} of {path} would lose all its keys, and a softmax over no keys is undefined. "
        "Leave it at least one key, or pass renormalise=False."
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


def test_a_backend_without_a_mask_cannot_renormalise() -> None:
    q = k = v = torch.randn(1, 1, 3, 4)
    call = call_of(q, k, v, backend="flash_attention_2")
    with pytest.raises(CaptureError) as refusal:
        knock_out_attention(2, 0).before(call, SITE)
    assert str(refusal.value) == (
        "The backend 'flash_attention_2' does not take a mask with a row per query, which "
        "blocking attention requires (eager and sdpa do). Load the model with "
        "attn_implementation='sdpa', or pass renormalise=False."
    )
