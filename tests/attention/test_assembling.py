"""With any cache, the rows of a generation equal those of one forward over the whole sequence."""

import dataclasses

import pytest
import torch

from tests.helpers.attention_variants import BACKBONES, llava_over
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.attention import AttentionCall, stitch
from xmodal_interp.errors import CaptureError
from xmodal_interp.hooks import record

STEPS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "none": {"use_cache": False},
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cache", list(CACHES))
@pytest.mark.parametrize("backbone", list(BACKBONES))
def test_any_cache_gives_the_rows_of_one_forward(backbone, cache, batch) -> None:
    model = llava_over(backbone, **BACKBONES[backbone])
    questions = [QUESTION, "how many ?"][:batch]
    inputs = tiny_vlm("llava").prepare([[picture(seed=i)] for i in range(batch)], questions)[0]
    with torch.no_grad(), record(model, towers=["language"], values=True) as recording:
        ids = model.generate(**inputs, **STEPS, **CACHES[cache])
    read = {**inputs, "input_ids": ids[:, :-1]}
    n_new = ids.shape[1] - 1 - inputs["attention_mask"].shape[1]
    ones = torch.ones(batch, n_new, dtype=inputs["attention_mask"].dtype)
    read["attention_mask"] = torch.cat([inputs["attention_mask"], ones], 1)
    with torch.no_grad(), record(model, towers=["language"], values=True) as whole:
        model(**read, use_cache=False)
    for layer, expected in enumerate(whole.calls):
        steps = [call for call in recording.calls if call.layer == layer]
        assert len(steps) == STEPS["max_new_tokens"]
        stitched = stitch(steps, ids.shape[1] - 1)
        real = expected.visible().any(-1).expand(batch, 4, -1)
        padded = ~read["attention_mask"].bool()[:, None, :].expand(batch, 4, -1)
        gap = (stitched.probs() - expected.probs()).abs().amax(-1)[real & ~padded]
        assert gap.max() < 2e-5
        assert expected.probs()[real.expand(batch, 4, -1) & ~padded].max() > 0.3
        rows = (real & ~padded)[:, :1, :, None].expand(-1, 1, -1, stitched.n_keys)
        same = stitched.visible().expand_as(rows)[rows] == expected.visible().expand_as(rows)[rows]
        assert same.all()
        of_values = (real & ~padded)[:, :2, :, None].expand_as(expected.v)
        torch.testing.assert_close(
            stitched.v[of_values], expected.v[of_values], atol=1e-4, rtol=1e-4
        )


def test_a_static_cache_is_kept_once() -> None:
    model, inputs = llava_over("llama"), tiny_vlm("llava").prepare([[picture()]], [QUESTION])[0]
    with torch.no_grad(), record(model, towers=["language"]) as recording:
        model.generate(**inputs, **STEPS, **CACHES["static"])
    places = {call.k.untyped_storage().data_ptr() for call in recording.calls if call.layer == 0}
    assert len(places) == 2  # the prompt's own keys, then the static tensor of all steps


def step(q: torch.Tensor, k: torch.Tensor, **options) -> AttentionCall:
    return AttentionCall("language", "self", 0, "layers.0.attn", 0, q, k, 1.0, **options)


def test_bias_sinks_and_additive_masks_are_stitched_with_their_rows() -> None:
    torch.manual_seed(1)
    q, k = torch.randn(1, 2, 4, 3), torch.randn(1, 2, 4, 3)
    bias, sinks, mask = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4), torch.randn(1, 1, 4, 4)
    mask = mask.masked_fill(torch.ones(4, 4).triu(1).bool(), torch.finfo(torch.float32).min)
    whole = step(q, k, bias=bias, sinks=sinks, mask=mask)
    parts = [
        step(
            q[:, :, a:b],
            k[:, :, :b],
            bias=bias[:, :, a:b, :b],
            sinks=sinks[:, :, a:b],
            mask=mask[:, :, a:b, :b],
        )
        for a, b in ((0, 2), (2, 3), (3, 4))
    ]
    torch.testing.assert_close(stitch(parts, 4).probs(), whole.probs())
    torch.testing.assert_close(stitch(parts, 3).probs(), whole.probs()[:, :, :3, :3])


def test_probabilities_are_stitched_too() -> None:
    probs = torch.rand(1, 2, 3, 3).tril()
    parts = [
        dataclasses.replace(step(None, None), dense=probs[:, :, a:b, :b])
        for a, b in ((0, 2), (2, 3))
    ]
    torch.testing.assert_close(stitch(parts, 3).probs(), probs)


def test_keys_that_are_not_a_cache_are_refused() -> None:
    q, k = torch.randn(1, 1, 3, 2), torch.randn(1, 1, 3, 2)
    with pytest.raises(CaptureError) as error:
        stitch([step(q, k, causal=True), step(q[:, :, :1], torch.randn(1, 1, 4, 2))], 4)
    assert str(error.value) == (
        "The keys of language self-attention, layer 0, call 0 (4 keys after 3 positions) are not "
        "keys of previous positions followed by its own. Generate with the default cache."
    )


@pytest.mark.parametrize(
    ("dtype", "rounding", "too_much"),
    [(torch.float64, 1e-15, 1e-10), (torch.float32, 3e-7, 1e-5), (torch.bfloat16, 4e-3, 0.05)],
    ids=str,
)
def test_keys_that_are_computed_again_differ_by_rounding(dtype, rounding, too_much) -> None:
    """A model that caches latents computes all keys again in each step."""
    q, k = torch.randn(1, 2, 4, 8, dtype=dtype), torch.randn(1, 2, 4, 8, dtype=dtype)
    first = step(q[:, :, :3], k[:, :, :3], causal=True)
    whole = stitch([first, step(q[:, :, 3:], k * (1 + rounding))], 4)
    torch.testing.assert_close(whole.k[:, :, :3], k[:, :, :3], rtol=0, atol=0)
    with pytest.raises(CaptureError, match="are not keys of previous positions"):
        stitch([first, step(q[:, :, 3:], k * (1 + too_much))], 4)


def test_rows_of_cross_attention_after_a_samples_end_are_left_out() -> None:
    """In later steps, only other samples of the batch continue."""
    q, k = torch.randn(1, 2, 5, 3), torch.randn(1, 2, 7, 3)
    parts = [
        dataclasses.replace(step(q[:, :, a:b], k), kind="cross")
        for a, b in ((0, 2), (2, 3), (3, 4), (4, 5))
    ]
    whole = dataclasses.replace(step(q, k), kind="cross").probs()
    for n in (2, 3, 5):
        torch.testing.assert_close(stitch(parts, n).probs(), whole[:, :, :n])


def test_visible_unused_space_of_a_static_cache_is_refused() -> None:
    """A backend without a mask function attends to it; its keys are zeros, their scores 0."""
    q, k = torch.randn(1, 1, 4, 2), torch.zeros(1, 1, 6, 2)
    k[:, :, :4] = torch.randn(1, 1, 4, 2)
    first = step(q[:, :, :3], torch.cat([k[:, :, :3], torch.zeros(1, 1, 3, 2)], 2), causal=True)
    later = step(q[:, :, 3:], k)
    with pytest.raises(CaptureError) as error:
        stitch([first, later], 4)
    assert str(error.value) == (
        "language self-attention, layer 0, call 0 attends to unused space of a static cache, "
        "which holds no tokens: 6 keys at position 3. Register a mask function for the model's "
        "attention backend (AttentionMaskInterface.register), or generate with the default cache."
    )
    hidden = dataclasses.replace(
        later, mask=torch.tensor([1, 1, 1, 1, 0, 0]).bool()[None, None, None]
    )
    assert stitch([first, hidden], 4).n_keys == 4


def generated_calls(cache: str, n_steps: int = 12) -> list[AttentionCall]:
    """Return the calls of one layer for a prompt after padding, whose steps have a mask."""
    inputs = tiny_vlm("llava").prepare([[picture()]] * 2, [QUESTION, "how many shapes ?"])[0]
    model = tiny_vlm("llava").model
    steps = {**STEPS, "max_new_tokens": n_steps, "min_new_tokens": n_steps}
    with torch.no_grad(), record(model, towers=["language"], layers=[0]) as recording:
        model.generate(**inputs, **steps, **CACHES[cache])
    return recording.calls


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_keys_of_one_cache_are_compared_once(cache, monkeypatch) -> None:
    """All keys were compared again at each step, which took quadratic time."""
    calls = generated_calls(cache)
    assert all(call.mask is not None for call in calls)
    n_compared: list[int] = []
    original = torch.equal
    monkeypatch.setattr(
        torch, "equal", lambda a, b: n_compared.append(a.shape[2]) or original(a, b)
    )
    n_positions = calls[0].n_queries + len(calls) - 1
    whole = stitch(calls, n_positions)
    assert sum(n_compared) <= 2 * n_positions
    n_compared.clear()
    apart = [dataclasses.replace(call, k=call.k.clone()) for call in calls]
    other = stitch(apart, n_positions)
    assert sum(n_compared) > 5 * n_positions
    for name in ("q", "k", "mask"):
        assert original(getattr(whole, name), getattr(other, name))


@pytest.mark.parametrize("place", [0, 40])
def test_keys_that_change_later_are_refused_at_any_step(place) -> None:
    calls = generated_calls("static")
    first = dataclasses.replace(calls[0], k=calls[0].k.clone())
    calls[-1].k[:, :, place] += 1  # in the memory that the steps share
    with pytest.raises(CaptureError, match="are not keys of previous positions followed by its"):
        stitch([first, *calls[1:]], calls[0].n_queries + len(calls) - 1)
