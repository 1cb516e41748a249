"""Recorded probabilities give the model's output, with any meaning of a backend's arguments.

Behaviour of other libraries that is measured here (torch 2.14.1, transformers 5.23.0):

* ``eager_attention_forward`` in ``transformers.models.*`` adds ``attention_mask`` to the scores: a
  boolean mask adds 1 where it is True and hides nothing.
* ``sdpa_attention_forward`` in ``transformers.integrations.sdpa_attention`` crops the keys to the
  number of queries if it gets no mask: with a static cache, query ``i`` of a prompt sees keys 0 to
  ``i``. A registered function that calls it behaves the same under its own name.
"""

import contextlib
import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import xmodal_interp as xi
from tests.helpers.attention_variants import first, of
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.errors import CaptureError, InputError
from xmodal_interp.hooks import Identity, probability_check, recorder
from xmodal_interp.hooks.raw_calls import RawCall, as_attention_call, whole_mask


def llama(backend: str = "sdpa", **options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=backend,
        **options,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj.weight" in name:
                weight.mul_(12)
    return model


IDS = torch.arange(1, 21).view(2, 10)


@contextlib.contextmanager
def registered(name: str, function, mask=sdpa_mask):
    """Register a custom backend for the time of a ``with`` block."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask)
    try:
        yield name
    finally:
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


def truth(q, k, mask=None, *, hides=True, scaling=None) -> torch.Tensor:
    """Compute the softmax from its definition, in float64."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if hides else scores + mask
    return scores.softmax(-1)


class Own(nn.Module):
    """An attention module without position embeddings, which accepts any mask."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = LlamaConfig(attn_implementation="eager")
            self.project = nn.Linear(8, 24)
            self.is_causal = False

        def forward(self, x, mask):
            parts = self.project(x).view(*x.shape[:2], 2, 12).transpose(1, 2).chunk(3, -1)
            q, k, v = (3 * part for part in parts)
            attend = AttentionInterface().get_interface(self.config._attn_implementation, eager)
            return attend(self, q, k, v, mask, scaling=0.5)[0].flatten(2)

    def __init__(self, backend: str = "eager") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = self.Attention()
        self.attention.config._attn_implementation = backend

    def forward(self, x, mask=None):
        return self.attention(x, mask)


def eager(module, query, key, value, mask, scaling, dropout=0.0, **_):  # noqa: ARG001
    """The eager function of transformers' modeling code."""
    weights = query @ key.mT * scaling
    if mask is not None:
        weights = weights + mask
    weights = weights.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


eager.__module__ = "transformers.models.own"
X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
MASK = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
MASK[1, ..., :2] = False


def test_a_soft_cap_that_the_backend_ignores_is_not_applied() -> None:
    def uncapped(module, query, key, value, mask, softcap, **options):
        assert softcap == 2.0
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma2Config(**sizes, **counts, attn_logit_softcapping=2.0, query_pre_attn_scalar=1)
    with registered("uncapped", uncapped) as name:
        config._attn_implementation = name
        model = Gemma2ForCausalLM(config).eval()
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data.mul_(100)
        with torch.no_grad(), xi.record(model) as recording:
            model(IDS)
    for call in recording.calls:
        assert call.softcap is None
        visible = torch.ones(10, 10, dtype=torch.bool).tril()
        expected = truth(call.q, call.k, visible, scaling=call.scaling)
        torch.testing.assert_close(call.probs().double(), expected, atol=1e-5, rtol=0)


def test_a_boolean_mask_under_eager_attention_adds_one() -> None:
    model = Own()
    with torch.no_grad(), xi.record(model) as recording:
        model(X, MASK)
    (call,) = recording.calls
    expected = truth(call.q, call.k, MASK, hides=False, scaling=0.5)
    torch.testing.assert_close(call.probs().double(), expected, atol=1e-5, rtol=0)
    assert call.visible().all()
    hidden = truth(call.q, call.k, MASK, scaling=0.5)
    assert (hidden.nan_to_num() - expected).abs().max() > 0.3


@pytest.mark.parametrize("mask", [MASK.long(), torch.ones(2, 1, 1, 6, dtype=torch.bool)])
def test_integer_masks_and_all_true_masks_under_eager_attention(mask) -> None:
    model = Own()
    with torch.no_grad(), xi.record(model) as recording:
        model(X, mask)
    (call,) = recording.calls
    expected = truth(call.q, call.k, mask, hides=False, scaling=0.5)
    torch.testing.assert_close(call.probs().double(), expected, atol=1e-5, rtol=0)
    assert call.visible().all()


def test_the_same_mask_hides_under_sdpa() -> None:
    model = Own("sdpa")
    with torch.no_grad(), xi.record(model) as recording:
        model(X, MASK)
    (call,) = recording.calls
    expected = truth(call.q, call.k, MASK, scaling=0.5)
    seen = ~expected.isnan()
    torch.testing.assert_close(call.probs().double()[seen], expected[seen], atol=1e-5, rtol=0)


def test_a_users_mask_under_eager_attention_of_a_real_model() -> None:
    model = llama("eager")
    mask = torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()
    with torch.no_grad(), xi.record(model) as recording:
        attentions = model(IDS, attention_mask=mask, output_attentions=True).attentions
    for call, theirs in zip(recording.calls, attentions, strict=True):
        torch.testing.assert_close(call.probs(), theirs, atol=1e-5, rtol=0)
    checkup = xi.doctor(model, inputs={"input_ids": IDS, "attention_mask": mask})
    assert checkup.ok


def test_edges_are_cut_if_a_boolean_mask_is_added() -> None:
    model = llama("eager")
    mask = torch.ones(2, 1, 10, 10, dtype=torch.bool).tril()
    cut = xi.knock_out_attention([9], [2], layers=[0])
    with torch.no_grad(), xi.intervene(model, cut), xi.record(model) as recording:
        attentions = model(IDS, attention_mask=mask, output_attentions=True).attentions
    assert attentions[0][:, :, 9, 2].max() == 0
    torch.testing.assert_close(recording.calls[0].probs(), attentions[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("low", [-1e9, -1e4, -100.0, float("-inf")])
@pytest.mark.parametrize("bias", [False, True])
def test_keys_that_a_low_number_hides_are_not_visible(low, bias) -> None:
    """eomt uses -1e9, evolla -1e4, shifted windows (Swin) -100 plus a position bias."""
    added = torch.zeros(2, 1, 6, 6).masked_fill(~MASK, low)
    if bias:
        added = added + torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(2))
    model = Own()
    with torch.no_grad(), xi.record(model) as recording:
        model(X, added)
    (call,) = recording.calls
    assert torch.equal(call.visible(), MASK.expand(call.visible().shape))
    seeing = MASK.any(-1).expand(2, 2, 6)
    expected = truth(call.q, call.k, added, hides=False, scaling=0.5)
    torch.testing.assert_close(
        call.probs().double()[seeing], expected[seeing], atol=1e-6, rtol=1e-4
    )
    assert call.probs()[~seeing].isnan().all()
    counts = MASK.sum(-1)
    null = call.null_mass(torch.eye(6))
    assert torch.equal(
        null[..., 0].nan_to_num(), (MASK[..., 0] / counts).nan_to_num().expand_as(null[..., 0])
    )


def test_a_very_low_position_bias_hides_nothing() -> None:
    distance = (torch.arange(300)[:, None] - torch.arange(300)).abs()
    bias = (-0.9 * distance)[None, None].float()  # ALiBi
    model = Own()
    with torch.no_grad(), xi.record(model) as recording:
        model(torch.randn(1, 300, 8), bias)
    (call,) = recording.calls
    assert call.visible().all()


def delegating(module, query, key, value, attention_mask, **options):
    """The example of a custom backend in transformers' documentation."""
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def test_a_backend_that_delegates_to_sdpa_with_a_static_cache() -> None:
    with registered("delegating", delegating):
        samples = [
            xi.capture(
                vlm_with(backend),
                picture(),
                QUESTION,
                max_new_tokens=3,
                generation={"cache_implementation": "static"},
            )
            for backend in ("sdpa", "delegating")
        ]
    for layer in range(2):
        torch.testing.assert_close(*(s.probs(layer) for s in samples), atol=1e-5, rtol=0)


def vlm_with(backend: str) -> xi.VLM:
    vlm = tiny_vlm("llava")
    model = copy.deepcopy(vlm.model)
    model.set_attn_implementation(backend)
    return xi.VLM(model, vlm.processor)


def aligned_right(module, query, key, value, attention_mask, scaling=None, **_):  # noqa: ARG001
    """Causal attention in which the last query sees all keys, as in flash kernels."""
    n, m = query.shape[2], key.shape[2]
    seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    out = functional.scaled_dot_product_attention(
        query, key, value, seen, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


def not_causal(module, query, key, value, attention_mask, scaling=None, **_):  # noqa: ARG001
    out = functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None


def hides_true(module, query, key, value, attention_mask, scaling=None, **_):  # noqa: ARG001
    """A backend whose boolean mask is True at hidden keys, as in ``torch.nn``."""
    out = functional.scaled_dot_product_attention(query, key, value, ~attention_mask, scale=scaling)
    return out.transpose(1, 2), None


class CachedAttention(nn.Module):
    """Attention of six queries after four cached keys, without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(1, 1)
        self.is_causal, self.num_key_value_groups = True, 2
        draw = torch.Generator().manual_seed(3)
        self.operands = [
            torch.randn(2, heads, n, 8, generator=draw) for heads, n in ((4, 6), (2, 10), (2, 10))
        ]

    def forward(self):
        attend = AttentionInterface().get_interface("own", eager)
        return attend(self, *self.operands, None)[0]


@pytest.mark.parametrize(
    ("function", "seen"),
    [
        (aligned_right, torch.ones(6, 10, dtype=torch.bool).tril(4)),
        (not_causal, torch.ones(6, 10, dtype=torch.bool)),
        (delegating, torch.ones(6, 10, dtype=torch.bool).tril()),
    ],
)
def test_the_meaning_of_causal_is_found_from_the_output(function, seen) -> None:
    model = nn.ModuleList([CachedAttention()])
    with registered("own", function), torch.no_grad(), xi.record(model) as recording:
        model[0]()
    (call,) = recording.calls
    expected = truth(call.q, call.k, seen)
    torch.testing.assert_close(call.probs().double(), expected, atol=1e-5, rtol=0)


def test_the_convention_of_a_mask_is_found_from_the_output() -> None:
    with registered("hides_true", hides_true):
        model = Own("hides_true")
        with torch.no_grad(), xi.record(model) as recording:
            model(X, ~MASK)
    (call,) = recording.calls
    expected = truth(call.q, call.k, MASK, scaling=0.5)
    seen = ~expected.isnan()
    torch.testing.assert_close(call.probs().double()[seen], expected[seen], atol=1e-5, rtol=0)


def sharper(module, query, key, value, attention_mask, scaling=None, **options):
    """A backend that scales the queries, which its arguments do not show."""
    return sdpa_attention_forward(
        module, 1.1 * query, key, value, attention_mask, scaling=scaling, **options
    )


def test_an_output_that_no_reading_explains_is_refused() -> None:
    with registered("sharper", sharper):
        model = llama("sharper")
        plain = model(IDS).logits
        expected = (
            r"^Probabilities computed from the arguments of the attention function do not give its "
            r"output: language self-attention, layer 0, call 0 differs by 0\.\d+ \(rounding "
            r"explains 1e-05\), language self-attention, layer 1, call 0 differs by .*\. Load the "
            r"model with another attn_implementation \('eager' if it is 'sdpa'\), or leave these "
            r"layers out with towers= or layers=\.$"
        )
        with pytest.raises(CaptureError, match=expected), xi.record(model):
            recorded = model(IDS).logits
        assert torch.equal(plain, recorded)
        checkup = xi.doctor(model, inputs={"input_ids": IDS})
    failed = checkup.table.loc[checkup.table["verdict"] == "fail", "check"].tolist()
    assert "probabilities give the backend's output" in failed


def test_the_doctor_checks_the_given_backends_and_caches() -> None:
    with registered("sharper", sharper), registered("delegating", delegating):
        vlm = vlm_with("delegating")
        backends = ["eager", "sdpa", "sharper"]
        checkup = xi.doctor(vlm, picture(), QUESTION, backends=backends, caches=["static"])
    verdicts = checkup.table.set_index("check")["verdict"]
    found = [verdicts[f"probabilities give the output of backend {n!r}"] for n in backends]
    assert found == ["pass", "pass", "fail"]
    assert verdicts["probabilities give the output with cache 'static'"] == "pass"
    assert vlm.model.config._attn_implementation == "delegating"
    assert vlm.model.config.text_config._attn_implementation == "delegating"


def test_backends_and_caches_that_are_refused() -> None:
    model = llama()
    with pytest.raises(InputError, match="'nonsense' is not an attention implementation"):
        xi.doctor(model, inputs={"input_ids": IDS}, backends=["nonsense"])
    with pytest.raises(InputError, match="Got caches 'static' for a LlamaForCausalLM, which is"):
        xi.doctor(model, inputs={"input_ids": IDS}, caches=["static"])
    with pytest.raises(InputError, match=r"backends must be a list, such as \['eager'\]"):
        xi.doctor(model, inputs={"input_ids": IDS}, backends="eager")


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_wrong_conversion_of_a_call_is_refused(name, monkeypatch) -> None:
    right = recorder.as_attention_call
    model, inputs = of(name)
    for change in ({"scaling": 0.4}, {"causal": False}):

        def wrong(*args, change=change):
            return dataclasses.replace(right(*args), **change)

        monkeypatch.setattr(recorder, "as_attention_call", wrong)
        with (
            torch.no_grad(),
            pytest.raises(CaptureError, match="do not give its output"),
            xi.record(model, towers=["language"]),
        ):
            first(model(**inputs))


def random_call(causal: bool, mask: torch.Tensor | None, n_kv_heads: int = 2):
    """Return a raw call with the output of the kernel, and its AttentionCall."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 8), *torch.randn(2, 2, n_kv_heads, 9, 8)
    whole = functional.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, enable_gqa=True)
    module = nn.Identity()
    raw = RawCall(
        module, q, k, v, mask, "sdpa", {"is_causal": causal}, output=whole.transpose(1, 2)
    )
    identity = Identity("layer", "language", "self", 0)
    return raw, as_attention_call(raw, identity, 0, whole_mask(raw))


VISIBLE = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril(2)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("causal", "mask"), [(True, None), (False, None), (False, VISIBLE)])
def test_a_plain_call_is_compared_as_any_other(causal, mask, n_kv_heads) -> None:
    raw, call = random_call(causal, mask, n_kv_heads)
    row = torch.tensor([0, 3, 8])
    assert probability_check._is_plain(raw, call)
    assert probability_check._plain_error(raw, call, row) < 2e-6
    factor = 1 + torch.rand(raw.output.shape)
    raw = dataclasses.replace(raw, output=raw.output * factor)
    error = probability_check._plain_error(raw, call, row)
    assert error > 0.1
    worst = probability_check.gap(raw, call, [0, 3, 8])  # relative to the limit of each entry
    assert not worst.agrees
    assert worst.error <= error * (1 + 1e-4)


@pytest.mark.parametrize(
    "change", [{"scaling": 0.3}, {"causal": False}, {"q": 1.01}, {"offset": 1}, {"k": 0.9}]
)
def test_a_plain_call_with_another_field_differs(change) -> None:
    raw, call = random_call(causal=True, mask=None)
    scaled = {n: getattr(call, n) * f if n in "qk" else f for n, f in change.items()}
    other = dataclasses.replace(call, **scaled)
    assert probability_check.gap(raw, call, range(9)).agrees
    assert not probability_check.gap(raw, other, range(9)).agrees


def test_rows_without_a_key_are_left_to_the_general_comparison() -> None:
    mask = VISIBLE.clone()
    mask[:, :, 3] = False
    raw, call = random_call(causal=False, mask=mask)
    assert math.isnan(probability_check._plain_error(raw, call, torch.tensor([0, 3])))
    assert probability_check.gap(raw, call, [0, 3]).agrees
    extra = {"softcap": 5.0, "bias": torch.zeros(1, 4, 9, 9), "sinks": torch.zeros(4)}
    for name, value in {
        **extra,
        "sliding_window": 3,
        "segments": torch.zeros(9, dtype=torch.long),
    }.items():
        assert not probability_check._is_plain(raw, dataclasses.replace(call, **{name: value}))
    half = dataclasses.replace(raw, output=raw.output.half())
    assert not probability_check._is_plain(half, call)
