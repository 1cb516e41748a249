"""One attention call: exact rows, fused sums, masks, and errors."""

import math
from dataclasses import fields, replace

import pytest
import torch

from xmodal_interp.attention import AXES, AttentionCall, joined_pieces, part_of, reordered
from xmodal_interp.errors import LayerError, NotRecordedError, PositionError

S, D, SCALING = 37, 16, 0.25
LOW_TRIANGLE = torch.tril(torch.ones(S, S, dtype=torch.bool))[None, None]
LEFT_PADDED = LOW_TRIANGLE.repeat(2, 1, 1, 1)
LEFT_PADDED[1, :, :, :7] = False
PREFIX = LOW_TRIANGLE.clone()
PREFIX[..., :9, :9] = True
MASKS = {
    "everything": ({}, torch.ones_like(LOW_TRIANGLE)),
    "causal": ({"causal": True}, LOW_TRIANGLE),
    "window": (
        {"causal": True, "sliding_window": 5},
        LOW_TRIANGLE & ~torch.tril(torch.ones(S, S, dtype=torch.bool), -5),
    ),
    "padding": ({"mask": LEFT_PADDED}, LEFT_PADDED),
    "prefix": ({"mask": PREFIX}, PREFIX),
    "additive": (
        {"mask": torch.zeros(PREFIX.shape).masked_fill(~PREFIX, torch.finfo(torch.float32).min)},
        PREFIX,
    ),
    "additive with a slope": (
        {"mask": (-0.1 * torch.arange(S).float()).expand(PREFIX.shape).masked_fill(~PREFIX, -3e38)},
        PREFIX,
    ),
}


def make(**options: object) -> AttentionCall:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 8, S, D, generator=generator)
    k = torch.randn(2, 4, S, D, generator=generator)
    return AttentionCall("language", "self", 3, "layers.3.attn", 0, q, k, SCALING, **options)


def slow_probs(call: AttentionCall, visible: torch.Tensor) -> torch.Tensor:
    """Compute probabilities from the definition in float64, with one key head per query head."""
    k = call.k.repeat_interleave(2, 1).double()
    scores = call.q.double() @ k.transpose(-1, -2) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.mask is not None and call.mask.dtype != torch.bool:
        scores = scores + call.mask.double()
    if call.bias is not None:
        scores = scores + call.bias.double()
    scores = scores.masked_fill(~visible, -math.inf)
    if call.sinks is not None:
        column = call.sinks.double()[None, :, None, None].expand(2, 8, S, 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    return scores.softmax(-1)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(
        ours.double(), theirs.expand_as(ours), atol=tolerance, rtol=0, equal_nan=True
    )


@pytest.mark.parametrize("name", MASKS)
def test_rows_and_sums_equal_the_definition(name: str) -> None:
    options, visible = MASKS[name]
    call = make(**options)
    expected = slow_probs(call, visible)
    groups = torch.rand(20, S, generator=torch.Generator().manual_seed(2)) > 0.5  # more than d_head
    close(call.probs(), expected)
    close(call.probs([0, 5], [3, -1], slice(4, 9)), expected[:, [0, 5]][:, :, [3, -1], 4:9])
    close(call.mass(groups), expected @ groups.double().T)
    close(call.mass(groups, [6], [2, -1]), (expected @ groups.double().T)[:, [6]][:, :, [2, -1]])
    close(call.entropy(), torch.special.entr(expected).sum(-1), 5e-6)
    assert torch.equal(call.visible().expand(2, 1, -1, -1), visible.expand(2, 1, -1, -1))
    assert torch.equal(call.n_visible().expand(2, 1, -1), visible.sum(-1).expand(2, 1, -1))


@pytest.mark.parametrize("extra", ["softcap", "sinks", "bias"])
def test_extra_terms_of_the_scores_are_exact_too(extra: str) -> None:
    value = {"softcap": 3.0, "sinks": torch.linspace(-1, 2, 8), "bias": torch.randn(1, 8, S, S)}[
        extra
    ]
    call = make(causal=True, **{extra: value})
    expected = slow_probs(call, LOW_TRIANGLE)
    groups = torch.eye(S, dtype=torch.bool)[:5]
    close(call.probs(), expected)
    close(call.mass(groups), expected[..., :5])
    close(call.entropy(), torch.special.entr(expected).sum(-1), 5e-6)


EMPTY = {  # queries, keys, heads, key heads
    "no rows": (0, 5, 4, 2),
    "no keys": (5, 0, 4, 2),
    "no heads": (5, 5, 0, 0),
    "nothing at all": (0, 0, 0, 0),
    "everything": (5, 5, 4, 2),
}
KERNELS = {
    "fused": {},
    "fused, causal": {"causal": True},
    "fused, masked": {"mask": "boolean"},
    "in rows": {"softcap": 3.0},
    "in rows, masked": {"mask": "additive"},
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", EMPTY)
def test_every_kernel_takes_zero_rows_heads_and_keys(size: str, kernel: str) -> None:
    """With zero rows, keys or heads, ``_scaled_dot_product_flash_attention_for_cpu`` of torch
    2.14.1 divides by zero and ends the process with SIGFPE, which no ``except`` can catch.
    """
    n_queries, n_keys, n_heads, n_kv_heads = EMPTY[size]
    options = dict(KERNELS[kernel])
    if "mask" in options:
        boolean = torch.ones(1, 1, n_queries, n_keys, dtype=torch.bool)
        options["mask"] = boolean if options["mask"] == "boolean" else boolean.float()
    q, k = torch.randn(2, n_heads, n_queries, D), torch.randn(2, n_kv_heads, n_keys, D)
    call = AttentionCall("language", "self", 0, "attn", 0, q, k, SCALING, **options)
    for heads in (None, [], torch.tensor([])):
        for rows in (None, [], slice(3, 3)):
            chosen = {"heads": heads, "queries": rows}
            shape = (2, n_heads if heads is None else 0, n_queries if rows is None else 0)
            probs, entropy = call.probs(**chosen), call.entropy(**chosen)
            mass = call.mass(torch.ones(3, n_keys), **chosen)
            assert [probs.shape, mass.shape] == [(*shape, n_keys), (*shape, 3)]
            assert entropy.shape == shape
            assert call.mass(torch.ones(0, n_keys), **chosen).shape == (*shape, 0)
            for values in (entropy, mass):  # NaN without keys
                assert values.isnan().all() if n_keys == 0 else not values.isnan().any()
            assert call.null_mass(torch.ones(3, n_keys), rows).shape[2:] == (shape[2], 3)
            assert call.n_visible(rows).shape[2] == shape[2]
        assert call.received(torch.ones(2, n_queries), heads).shape == (2, shape[1], n_keys)
        assert call.propagate(torch.ones(2, n_queries), heads).shape == (2, n_keys)


@pytest.mark.parametrize("logit", [30.0, 480.0, 44_000.0])
@pytest.mark.parametrize("name", ["causal", "padding", "softcap", "sinks", "bias", "slope"])
def test_entropy_is_exact_for_logits_of_any_size(name: str, logit: float) -> None:
    """``logsumexp - mean score`` loses digits: in float32 the error was 1e-4 at logits of 480."""
    options = {
        "causal": {"causal": True},
        "padding": {"mask": LEFT_PADDED},
        "softcap": {"causal": True, "softcap": 2 * logit},
        "sinks": {"causal": True, "sinks": torch.linspace(0, logit, 8)},
        "bias": {"causal": True, "bias": torch.randn(1, 8, S, S)},
        "slope": {"mask": MASKS["additive with a slope"][0]["mask"]},
    }[name]
    call = make(**options)
    largest = (call.q @ call.k.repeat_interleave(2, 1).transpose(-1, -2)).abs().max() * SCALING
    assert call.q is not None
    call = replace(call, q=call.q * (logit / largest))
    visible = {"padding": LEFT_PADDED, "slope": PREFIX}.get(name, LOW_TRIANGLE)
    expected = torch.special.entr(slow_probs(call, visible)).sum(-1)
    close(call.entropy(), expected, 1e-5)
    close(call.entropy([3], [9, 30]), expected[:, [3]][:, :, [9, 30]], 1e-5)


def test_a_case_to_check_by_eye() -> None:
    """Scores ln 1 and ln 3 give probabilities 1/4 and 3/4; the first row sees itself only."""
    q = torch.tensor([[[[1.0], [1.0]]]])
    k = torch.tensor([[[[0.0], [math.log(3)]]]])
    call = AttentionCall("language", "self", 0, "attn", 0, q, k, 1.0, causal=True)
    torch.testing.assert_close(call.probs()[0, 0], torch.tensor([[1.0, 0.0], [0.25, 0.75]]))
    torch.testing.assert_close(
        call.entropy()[0, 0], torch.tensor([0.0, 2 * math.log(2) - 0.75 * math.log(3)])
    )


def test_propagate_is_the_vector_times_the_mean_probabilities() -> None:
    call = make(causal=True)
    vector = torch.rand(2, S)
    close(
        call.propagate(vector),
        torch.einsum("sq,shqk->sk", vector.double(), call.probs().double()) / 8,
        1e-5,
    )


def test_received_is_the_weighted_sum_of_a_column() -> None:
    call = make(causal=True)
    weights = torch.rand(2, S)
    expected = (weights[:, None, :, None] * call.probs()).sum(2)[:, [3, 0]]
    torch.testing.assert_close(call.received(weights, [3, 0]), expected, atol=1e-5, rtol=0)


def test_selected_rows_are_unchanged() -> None:
    call = make(mask=LEFT_PADDED)
    part = call.select_rows(torch.tensor([9, 20, S - 1]))
    groups = torch.rand(3, S)
    assert torch.equal(part.probs(queries=[20, S - 1]), call.probs(queries=[20, S - 1]))
    torch.testing.assert_close(part.mass(groups), call.mass(groups, queries=[9, 20, S - 1]))
    assert part.q is not None
    assert part.q.shape[2] == 3


def test_the_null_model_is_uniform_over_visible_keys() -> None:
    call = make(causal=True)
    groups = torch.zeros(1, S)
    groups[0, :4] = 1
    expected = torch.tensor([min(i + 1, 4) / (i + 1) for i in range(S)])
    torch.testing.assert_close(call.null_mass(groups)[0, 0, :, 0], expected)


def test_half_precision_is_accumulated_in_float32() -> None:
    call = make(causal=True)
    half = AttentionCall(
        "language", "self", 0, "attn", 0, call.q.bfloat16(), call.k.bfloat16(), SCALING, causal=True
    )
    assert half.probs().dtype == torch.float32
    assert (half.probs().nan_to_num().sum(-1) - 1).abs().max() < 1e-6


def test_refusals() -> None:
    call = make(causal=True)
    with pytest.raises(LayerError) as error:
        call.probs(heads=[8])
    assert str(error.value) == (
        "A head must lie between -8 and 7; got 8. (language self-attention, layer 3, call 0)"
    )
    with pytest.raises(PositionError) as position:
        call.probs(queries=[S])
    assert str(position.value) == f"A query must lie between -{S} and {S - 1}; got {S}."
    with pytest.raises(NotRecordedError) as missing:
        call.select_rows(torch.tensor([3, 9])).probs(queries=[3, 4])
    assert str(missing.value) == (
        "language self-attention, layer 3, call 0 does not hold the query rows 4; it holds 3, 9. "
        "Capture again with these queries, or with all."
    )


def test_the_message_names_rows_that_were_not_kept() -> None:
    part = make(causal=True).select_rows(torch.tensor([3, 5]))
    for queries in ([-1], [6], [4]):
        with pytest.raises(NotRecordedError, match=r"the query rows \d+; it holds 3, 5\."):
            part.probs(queries=queries)
    with pytest.raises(PositionError, match=f"must lie between -{S} and {S - 1}; got {S}"):
        part.probs(queries=[S])
    none = part.select_rows(torch.tensor([], dtype=torch.long))
    with pytest.raises(NotRecordedError, match="does not hold the query rows 3;"):
        none.probs(queries=[3])


def test_the_table_of_axes_has_every_tensor() -> None:
    tensors = {each.name: str(each.type) for each in fields(AttentionCall) if "Tensor" in each.type}
    assert tensors.keys() == AXES.keys()
    for name, annotation in tensors.items():
        assert " ".join(AXES[name]) in annotation or annotation == "Tensor | None"


def test_sinks_of_queries_follow_their_queries() -> None:
    sinks = torch.randn(2, 8, S, generator=torch.Generator().manual_seed(3))
    call = make(mask=LEFT_PADDED, sinks=sinks)
    order = torch.randperm(S, generator=torch.Generator().manual_seed(4))
    expected = call.probs()[:, :, order][..., order]
    torch.testing.assert_close(reordered(call, order).probs(), expected, equal_nan=True)
    pieces = [call.select_sample(0), call.select_sample(1)]
    whole = joined_pieces(pieces)
    for number, piece in enumerate(pieces):
        part = part_of(whole, number * S, (number + 1) * S)
        torch.testing.assert_close(part.probs(), piece.probs(), equal_nan=True)
