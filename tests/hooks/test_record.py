"""Recording changes no output, records every layer exactly, and removes its hooks."""

from contextlib import suppress

import pytest
import torch
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import AttentionInterface

from tests.helpers.attention_variants import n_hooks
from tests.helpers.intervened import inputs_of
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.errors import CaptureError, InputError, UnsupportedModelError
from xmodal_interp.hooks import attention_modules, record

FAMILIES = ["llava", "qwen2_vl", "mllama"]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_bit_identical_and_probs_are_those_of_eager(
    family: str, backend: str, batch: int
) -> None:
    model, inputs = tiny_vlm(family).model, inputs_of(tiny_vlm(family), batch)
    try:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            weights = model(**inputs, output_attentions=True, use_cache=False).attentions
        model.set_attn_implementation(backend)
        with torch.no_grad():
            alone = model(**inputs).logits
            with record(model) as recording:
                recorded = model(**inputs).logits
    finally:
        model.set_attn_implementation("sdpa")
    assert torch.equal(alone, recorded)
    language = [call for call in recording.calls if call.tower == "language"]
    assert len(language) == len(weights)
    for call, expected in zip(language, weights, strict=True):
        # rows of padding queries differ between backends
        real = inputs["attention_mask"].bool()[:, None, :, None].expand_as(expected)
        assert (call.probs() - expected)[real].abs().max() < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_vision_towers_are_exact_too(family: str) -> None:
    """The probabilities recorded under both backends are equal."""
    model, inputs = tiny_vlm(family).model, inputs_of(tiny_vlm(family), 2)
    try:
        model.set_attn_implementation("eager")
        with torch.no_grad(), record(model, towers=["vision"], values=True) as eager:
            model(**inputs)
    finally:
        model.set_attn_implementation("sdpa")
    with torch.no_grad(), record(model, towers=["vision"], values=True) as fused:
        model(**inputs)
    assert len(fused.calls) == len(eager.calls) > 0
    for ours, theirs in zip(fused.calls, eager.calls, strict=True):
        torch.testing.assert_close(ours.probs(), theirs.probs(), atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_layer_is_recorded(family: str) -> None:
    model = tiny_vlm(family).model
    with torch.no_grad(), record(model) as recording:
        model(**inputs_of(tiny_vlm(family)))
    recorded = {(call.tower, call.kind, call.layer) for call in recording.calls}
    known = {(i.tower, i.kind, i.layer) for i in attention_modules(model).values()}
    assert recorded == known
    assert len(known) == len(recording.modules)


def test_a_growing_cache_is_kept_once() -> None:
    model = tiny_vlm("llava").model
    with torch.no_grad(), record(model, towers=["language"], layers=[2]) as recording:
        model.generate(
            **inputs_of(tiny_vlm("llava")), max_new_tokens=6, min_new_tokens=6, do_sample=False
        )
    assert len(recording.calls) == 6
    assert len({call.k.untyped_storage().data_ptr() for call in recording.calls}) == 1
    assert [call.n_keys for call in recording.calls] == list(range(154, 160))


def test_a_static_cache_is_copied_before_it_is_overwritten() -> None:
    """Its key tensor has a fixed length and is written in place at every step."""
    model = tiny_vlm("llava").model
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), record(model, towers=["language"]) as dynamic:
        plain = model.generate(**inputs_of(tiny_vlm("llava")), **options)
    with torch.no_grad(), record(model, towers=["language"]) as static:
        fixed = model.generate(
            **inputs_of(tiny_vlm("llava")),
            **options,
            cache_implementation="static",
            disable_compile=True,
        )
    assert torch.equal(plain, fixed)
    for ours, theirs in zip(static.calls, dynamic.calls, strict=True):
        probs, expected = ours.probs(), theirs.probs()
        torch.testing.assert_close(probs[..., : expected.shape[-1]], expected, atol=1e-5, rtol=0)
        assert probs[..., expected.shape[-1] :].sum() == 0


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_everything_is_restored_after_an_exception(failure: type[BaseException]) -> None:
    model = tiny_vlm("llava").model
    before = AttentionInterface.get_interface, AttentionInterface.__getitem__
    hooks = n_hooks(model)  # transformers registers some hooks itself
    with suppress(failure), record(model):
        raise failure
    assert (AttentionInterface.get_interface, AttentionInterface.__getitem__) == before
    assert "__getitem__" not in vars(AttentionInterface)
    assert n_hooks(model) == hooks


def test_an_error_inside_the_model_is_raised_unchanged() -> None:
    model = tiny_vlm("llava").model
    with pytest.raises(ValueError, match="exactly one of input_ids"), record(model):
        model(no_such_input=1)


def test_a_vlm_can_be_recorded_directly() -> None:
    vlm = tiny_vlm("llava")
    inputs, _ = vlm.prepare([[picture()]], [QUESTION])
    with torch.no_grad(), record(vlm, towers=["language"]) as recording:
        vlm.model(**inputs)
    assert len(recording.calls) == 4


def test_recordings_nest() -> None:
    model, inputs = tiny_vlm("llava").model, inputs_of(tiny_vlm("llava"))
    with torch.no_grad(), record(model) as outer:
        model(**inputs)
        with record(model, towers=["vision"]) as inner:
            model(**inputs)
    assert len(outer.calls) == 14
    assert len(inner.calls) == 3


def test_reduce_keeps_results_instead_of_calls() -> None:
    model, inputs = tiny_vlm("llava").model, inputs_of(tiny_vlm("llava"))
    groups = torch.ones(1, 154)
    with (
        torch.no_grad(),
        record(model, towers=["language"], reduce=lambda c: c.mass(groups)) as recording,
    ):
        model(**inputs)
    assert recording.calls == []
    assert len(recording.results) == 4
    for mass in recording.results:
        torch.testing.assert_close(mass, torch.ones(1, 8, 154, 1))


def test_attention_that_is_not_recorded_is_an_error() -> None:
    """A class is named attention, but computes neither a softmax nor a kernel call."""

    class BareAttention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = (x @ self.projection(x).transpose(-1, -2)).exp()
            return scores / scores.sum(-1, keepdim=True) @ x

    model = torch.nn.Sequential(BareAttention())
    with pytest.raises(CaptureError) as error, record(model):
        model(torch.randn(1, 1, 3, 4))
    assert str(error.value) == (
        "Some attention could not be recorded: these modules ran, but neither used transformers' "
        "attention interface nor called scaled_dot_product_attention or a softmax: 0. Leave out "
        "their tower with towers= if you don't need it."
    )


@pytest.mark.usefixtures("any_type")
def test_refusals() -> None:
    model = tiny_vlm("llava").model
    with pytest.raises(InputError) as error, record(model, towers=["language"], layers=[4]):
        pass
    assert str(error.value) == (
        "Got layers 4, but the model has language layers 0 to 3. Count layers from 0; negative "
        "numbers count from the last."
    )
    with pytest.raises(InputError, match="Got layers -5, but the model has layers 0 to 3"):
        record(model, layers=[-5]).__enter__()
    with pytest.raises(InputError, match="Got layers 0, but the model has no audio layers"):
        record(model, towers=["audio"], layers=[0]).__enter__()
    with pytest.raises(UnsupportedModelError) as none, record(torch.nn.Linear(2, 2)):
        pass
    assert str(none.value) == (
        "Linear has no module with softmax attention: no class is named Attention or calls "
        "scaled_dot_product_attention, and no module named attn calls a softmax. Pass a model that "
        "has one."
    )
    with pytest.raises(InputError) as tower, record(model, towers="language"):
        pass
    assert str(tower.value) == "towers must be a list, such as ['language']; got 'language'."
    with pytest.raises(InputError) as layer, record(model, layers="3"):
        pass
    assert str(layer.value) == "layers must be a number or a list, such as -1 or [0, 3]; got '3'."
    with pytest.raises(InputError) as name, record("llava"):
        pass
    assert str(name.value) == (
        "The model must be a VLM or a torch.nn.Module; got an object of str. Use xi.load(name) or "
        "from_pretrained."
    )
    with pytest.raises(CaptureError) as compiled, record(torch.compile(model, backend="eager")):
        pass
    assert str(compiled.value) == (
        "This model is compiled, and attention in compiled code cannot be recorded or edited. Use "
        "the model as it was before torch.compile (model._orig_mod)."
    )


def keys_only(module, query, key, value, attention_mask, scaling=None, **options):
    """A backend like flash kernels: causal by itself, with a mask of keys or no mask."""
    n_queries, n_keys = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    hidden = torch.ones(n_queries, n_keys).triu(n_keys - n_queries + 1).bool()[None, None]
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        hidden = torch.zeros_like(hidden)
    if attention_mask is not None:
        assert attention_mask.ndim == 2
        hidden = hidden | ~attention_mask.bool()[:, None, None]
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
    probs = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1)
    return (probs @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), probs


def test_a_mask_of_keys_hides_padding_and_later_keys(monkeypatch) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, "keys_only", keys_only)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "keys_only", flash_attention_mask)
    model, inputs = tiny_vlm("llava").model, inputs_of(tiny_vlm("llava"), 2)
    try:
        model.set_attn_implementation({"": "sdpa", "text_config": "keys_only"})
        with torch.no_grad(), record(model, towers=["language"]) as recording:
            model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    finally:
        model.set_attn_implementation("sdpa")
    with torch.no_grad(), record(model, towers=["language"]) as plain:
        model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    assert inputs["attention_mask"].sum(1).unique().numel() == 2  # one of them is padded
    for call, expected in zip(recording.calls, plain.calls, strict=True):
        seen = expected.visible()
        assert torch.equal(call.visible().expand_as(seen), seen)
        torch.testing.assert_close(
            call.probs(), expected.probs(), atol=1e-5, rtol=0, equal_nan=True
        )
