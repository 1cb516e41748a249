"""Calls that hold statistics instead of queries and keys, against float64 probabilities."""

import dataclasses

import pytest
import torch

from xmodal_interp.analysis.selection import uniform
from xmodal_interp.attention import AXES, AttentionCall, part_of, reordered, with_mask
from xmodal_interp.attention import call as call_module
from xmodal_interp.attention.statistics import HELD, NO_GROUP, Labels, finished, reduced
from xmodal_interp.errors import NotRecordedError

N, HEADS = 9, 4
ALL = ("mass", "entropy", "received")


def call_of(n_samples: int = 1, n: int = N, **changes) -> AttentionCall:
    make = torch.Generator().manual_seed(0)
    fields = {
        "tower": "language",
        "kind": "self",
        "layer": 2,
        "module": "layers.2",
        "call": 0,
        "q": torch.randn(n_samples, HEADS, n, 8, generator=make) * 2,
        "k": torch.randn(n_samples, 2, n, 8, generator=make),
        "v": torch.randn(n_samples, 2, n, 8, generator=make),
        "scaling": 8**-0.5,
        "causal": True,
    }
    return AttentionCall(**(fields | changes))


def labels_of(*groups: list[int], hidden: tuple[int, ...] = ()) -> Labels:
    of_keys = torch.tensor(groups, dtype=torch.int16)
    counted = torch.ones(of_keys.shape, dtype=torch.bool)
    counted[:, list(hidden)] = False
    return Labels(of_keys, 3, counted)


GROUPS = [0, 1, 1, 1, 1, 2, 2, 2, 2]


def mask_of(n_samples: int) -> torch.Tensor:
    """A causal mask that also hides the first two keys of the last sample, which are padding."""
    mask = torch.ones(N, N, dtype=torch.bool).tril().expand(n_samples, 1, N, N).clone()
    mask[-1, :, :, :2] = False
    return mask


@pytest.mark.parametrize("small", [True, False], ids=["dense chunks", "fused"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"causal": False},
        {"sliding_window": 3},
        {"softcap": 1.0},
        {"sinks": torch.linspace(-1, 1, HEADS)},
        {"bias": torch.linspace(-2, 2, N * N).view(1, 1, N, N)},
        {"causal": False, "mask": mask_of(2), "n_samples": 2},
    ],
    ids=["causal", "bidirectional", "window", "soft-cap", "sinks", "bias", "padding"],
)
def test_statistics_equal_sums_of_float64_probabilities(monkeypatch, changes, small) -> None:
    if not small:
        monkeypatch.setattr(call_module, "SMALL_CELLS", 0)
    call = call_of(**changes)
    probs = call.probs(dtype=torch.float64)
    labels = labels_of(*[GROUPS] * call.n_samples, hidden=(1,))
    held = reduced(call, ALL, labels)
    assert held.holds_statistics
    assert all(getattr(held, name) is None for name in ("q", "k", "v", "dense", "bias"))
    sizes = ("n_samples", "n_heads", "n_queries", "n_keys", "name")
    assert all(getattr(held, name) == getattr(call, name) for name in sizes)
    groups = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0, 0], [1] * N])
    close = {"atol": 1e-5, "rtol": 0, "equal_nan": True, "check_dtype": False}
    expected = probs @ groups.double().T
    torch.testing.assert_close(held.mass(groups.bool()), expected, **close)
    some = held.mass(groups.double(), heads=[2, 0], queries=[8, 3])
    assert some.dtype == torch.float64
    torch.testing.assert_close(some, expected[:, [2, 0]][:, :, [8, 3]], **close)
    entropy = torch.special.entr(probs).sum(-1)
    torch.testing.assert_close(held.entropy(), entropy, **close)
    torch.testing.assert_close(held.entropy([1], [4, 2]), entropy[:, [1]][:, :, [4, 2]], **close)
    weights = labels.counted.double()
    columns = (weights[:, None, None] @ probs.nan_to_num())[:, :, 0]
    torch.testing.assert_close(held.received(weights), columns, **close)
    torch.testing.assert_close(held.received(weights, [3]), columns[:, [3]], **close)
    assert torch.equal(held.visible(), call.visible())
    assert torch.equal(held.n_visible(), call.n_visible())
    null = held.null_mass(groups.bool())
    of_call = call.null_mass(groups.bool())
    torch.testing.assert_close(null, of_call, atol=0, rtol=0, equal_nan=True)
    even = uniform(held.select_sample(0)).mass(groups.bool())
    torch.testing.assert_close(even.expand_as(null[:1]), null[:1], **close)


def test_average_of_values_that_are_equal_in_each_group() -> None:
    call = call_of()
    values = torch.tensor([[0.5, 2.0], [3.0, -1.0], [0.0, 7.0]])[torch.tensor(GROUPS)]
    held = reduced(call, ALL, labels_of(GROUPS))
    torch.testing.assert_close(held.average(values), call.average(values), atol=1e-6, rtol=1e-6)


def test_samples_of_a_batch_may_have_different_groups() -> None:
    call = call_of(2, mask=mask_of(2), causal=False)
    other = [2, 2, 0, 1, 1, 1, 1, 1, 2]
    both = reduced(call, ALL, labels_of(GROUPS, other))
    for index, groups in enumerate((GROUPS, other)):
        alone = reduced(call.select_sample(index), ALL, labels_of(groups))
        for name, found, _ in both.select_sample(index).tensors():
            torch.testing.assert_close(found, getattr(alone, name), equal_nan=True)


def test_only_some_rows_are_computed() -> None:
    call = call_of()
    labels = dataclasses.replace(labels_of(GROUPS), rows=torch.tensor([2, 7]))
    held, whole = reduced(call, ALL, labels), reduced(call, ALL, labels_of(GROUPS))
    other = [0, 1, 3, 4, 5, 6, 8]
    assert held.entropy()[:, :, other].isnan().all()
    assert held.group_mass[:, :, other].isnan().all()
    torch.testing.assert_close(held.entropy(queries=[2, 7]), whole.entropy(queries=[2, 7]))
    torch.testing.assert_close(held.group_mass[:, :, [2, 7]], whole.group_mass[:, :, [2, 7]])


def test_keys_of_one_group_cannot_be_separated() -> None:
    held = reduced(call_of(), ALL, labels_of(GROUPS))
    groups = torch.zeros(2, N)
    groups[0, 0] = 1
    groups[1, [2, 5]] = 1
    with pytest.raises(NotRecordedError) as refusal:
        held.mass(groups)
    assert str(refusal.value) == (
        "language self-attention, layer 2, call 0 holds the mass on groups of keys, not q and k: "
        "it cannot separate the keys 2 from the keys 1, 3, 4 of the same group. Choose unions of "
        "its groups (AttentionCall.groups), or capture with Keep() to keep q and k."
    )


def test_what_keys_receive_from_other_queries_is_unknown() -> None:
    held = reduced(call_of(), ALL, labels_of(GROUPS, hidden=(0, 1)))
    for wrong in (torch.ones(1, N), torch.tensor([[0.0, 0, 2, 1, 1, 1, 1, 1, 1]])):
        with pytest.raises(NotRecordedError) as refusal:
            held.received(wrong)
        assert str(refusal.value) == (
            "language self-attention, layer 2, call 0 holds what keys receive from 7 of its 9 "
            "queries, each with weight 1 (AttentionCall.counted), not q and k; the statistic needs "
            f"{int((wrong != 0).sum())} queries or other weights. Capture with Keep(queries=...) "
            "to count other queries, or with Keep() to keep q and k."
        )
    several = torch.tensor([[0.0, 0, 1, 1, 1, 1, 1, 1, 1]]).expand(3, -1)
    assert held.received(several).shape == (3, HEADS, N)


def test_queries_that_see_no_key_may_have_any_weight() -> None:
    call = call_of(2, mask=mask_of(2), causal=False)
    labels = labels_of(GROUPS, GROUPS)
    labels.counted[1, :2] = False  # padding, which sees no key
    held = reduced(call, ["received"], labels)
    found, expected = (each.received(torch.ones(2, N)) for each in (held, call))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("names", "read", "message"),
    [
        (ALL, lambda c: c.probs(), "the statistics mass, entropy and received, not q and k. C"),
        (ALL, lambda c: c.propagate(torch.ones(1, N)), "mass, entropy and received, not q and k"),
        (ALL, lambda c: c.propagate(torch.zeros(1, N)), "mass, entropy and received, not q and k"),
        (ALL, lambda c: c.distance(torch.zeros(N, 2)), "not q and k. Capture with Keep() to keep"),
        (ALL, lambda c: c.top_keys(2), "mass, entropy and received, not q and k. Capture with K"),
        (["mass"], lambda c: c.entropy(), "the statistic mass, not entropy. Add 'entropy' to Keep"),
        (
            ["mass", "received"],
            lambda c: c.entropy(),
            "language self-attention, layer 2, call 0 holds the statistics mass and received, not "
            "entropy. Add 'entropy' to Keep(statistics=...), or capture with Keep() to keep q and "
            "k.",
        ),
        (
            ["entropy"],
            lambda c: c.received(torch.ones(1, N)),
            "the statistic entropy, not received. Add 'received' to Keep(statistics=...), or",
        ),
        (
            ["entropy"],
            lambda c: c.mass(torch.ones(1, N)),
            "the statistic entropy, not mass. Add 'mass' to Keep(statistics=...), or capture with",
        ),
    ],
)
def test_errors_name_what_is_held_and_what_is_missing(names, read, message) -> None:
    with pytest.raises(NotRecordedError) as refusal:
        read(reduced(call_of(), names, labels_of(GROUPS)))
    assert message in str(refusal.value)


def test_the_mass_of_a_single_group_is_held_only_if_it_says_something() -> None:
    assert reduced(call_of(), ALL).group_mass is None
    assert reduced(call_of(), ["mass"]).group_mass is not None
    sinks = call_of(sinks=torch.ones(HEADS))
    every = torch.ones(1, N)
    torch.testing.assert_close(reduced(sinks, ALL).mass(every), sinks.mass(every))


def test_received_is_left_out_when_a_counted_query_is() -> None:
    held = reduced(call_of(), ALL, labels_of(GROUPS, hidden=(0, 1)))
    kept = held.select_rows(torch.arange(2, N))
    torch.testing.assert_close(kept.received(torch.ones(1, N - 2)), held.key_received)
    fewer = held.select_rows(torch.arange(3, N))
    assert fewer.key_received is None
    assert not fewer.counted.any()
    torch.testing.assert_close(fewer.entropy(queries=[5]), held.entropy(queries=[5]))


def test_a_part_of_a_packed_row_and_another_order() -> None:
    """Images in one row, which don't see each other: what a part receives is from the part only."""
    segments = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1])
    call = call_of(causal=False, segments=segments)
    held = reduced(call, ["entropy", "received"])
    part, of_call = part_of(held, 3, N), part_of(call, 3, N)
    every = torch.ones(1, 6)
    torch.testing.assert_close(part.entropy(), of_call.entropy())
    torch.testing.assert_close(part.received(every), of_call.received(every))
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    other, of_other = reordered(with_mask(part), order), reordered(with_mask(of_call), order)
    torch.testing.assert_close(other.entropy(), of_other.entropy())
    torch.testing.assert_close(other.received(every), of_other.received(every))


def test_empty_groups_are_left_out() -> None:
    groups = [4, NO_GROUP, 2, 2, 2, 4, 4, 4, 4]
    labels = dataclasses.replace(labels_of(groups), n_groups=6)
    call = call_of(mask=torch.ones(1, 1, N, N, dtype=torch.bool).tril(), causal=False)
    call.mask[..., 1] = False
    held = finished(reduced(call, ALL, labels))
    assert held.groups.tolist() == [[1, NO_GROUP, 0, 0, 0, 1, 1, 1, 1]]
    assert held.group_mass.shape[-1] == 2
    wanted = torch.tensor([groups]) == 4
    torch.testing.assert_close(held.mass(wanted), call.mass(wanted))


def test_memory_is_linear_in_the_length() -> None:
    sizes = []
    for n in (100, 200):
        labels = Labels(torch.zeros(1, n, dtype=torch.int16), 3, torch.ones(1, n, dtype=torch.bool))
        sizes.append(reduced(call_of(n=n), ALL, labels).n_bytes)
    per_position = HEADS * 4 * (3 + 1 + 1) + 2 + 1
    assert sizes == [100 * per_position, 200 * per_position]


def test_every_statistic_has_axes_and_is_optional() -> None:
    assert set(HELD) <= set(AXES)
    defaults = {field.name: field.default for field in dataclasses.fields(AttentionCall)}
    assert all(defaults[name] is None for name in HELD)
