"""Sums over rows and columns by the fused kernel, against float64 probabilities and chunks."""

import pickle
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from weakref import WeakSet

import pytest
import torch

from xmodal_interp.analysis.selection import received
from xmodal_interp.attention import AttentionCall, fused, tiles
from xmodal_interp.attention import call as call_module
from xmodal_interp.attention.assembling import with_mask
from xmodal_interp.hooks.raw_calls import changed

S, D, HEADS, KV_HEADS = 90, 24, 6, 2
ROWS = [3, 4, 5, 20, 21, 22, 23, 60, 61, 62, 63, 64, 65, 66, 88, 89]
TRIANGLE = torch.ones(S, S, dtype=torch.bool).tril()


def _operands(n_samples: int, n_queries: int, n_keys: int, size: float = 1.0):
    generator = torch.Generator().manual_seed(n_queries + n_keys)
    q = torch.randn(n_samples, HEADS, n_queries, D, generator=generator)
    k = torch.randn(n_samples, KV_HEADS, n_keys, D, generator=generator) + 1.5  # a common part
    return q * size, k


def _call(
    n_samples: int = 1, n_queries: int = S, n_keys: int = S, size: float = 1.0, **options: object
) -> AttentionCall:
    kind = "self" if n_queries == n_keys else "cross"
    q, k = _operands(n_samples, n_queries, n_keys, size)
    return AttentionCall("language", kind, 0, "attn", 0, q, k, 0.2, **options)


def _padded(n_padding: int, side: str) -> torch.Tensor:
    mask = TRIANGLE[None, None].repeat(2, 1, 1, 1)
    keys = slice(0, n_padding) if side == "left" else slice(S - n_padding, S)
    mask[1, ..., keys] = False
    return mask


def _kept(call: AttentionCall) -> AttentionCall:
    return call.select_rows(torch.tensor(ROWS))


def _decode_step() -> AttentionCall:
    return replace(_call(1, 5, S, causal=True, offset=S - 5), kind="self")


SLOPE = (-0.1 * torch.arange(S).float()).expand(1, 1, S, S)
SEGMENTS = torch.arange(S) // 17
CALLS = {
    "causal": lambda: _call(causal=True),
    "causal, three samples": lambda: _call(3, causal=True),
    "bidirectional": lambda: _call(2),
    "cross": lambda: _call(1, 40, S),
    "decode steps": _decode_step,
    "window": lambda: _call(causal=True, sliding_window=11),
    "window without causal flag": lambda: _call(sliding_window=11),
    "kept rows": lambda: _kept(_call(causal=True)),
    "kept rows of a window": lambda: _kept(_call(causal=True, sliding_window=11)),
    "scattered rows": lambda: _call(causal=True).select_rows(torch.arange(0, S, 2)),
    "packed images": lambda: _call(segments=SEGMENTS),
    "packed windows": lambda: _call(segments=torch.arange(S) % 7),
    "packed causal": lambda: _call(segments=SEGMENTS, causal=True),
    "left padding": lambda: _call(2, mask=_padded(9, "left")),
    "right padding": lambda: _call(2, mask=_padded(9, "right")),
    "hidden queries": lambda: _call(mask=TRIANGLE.tril(-3)[None, None]),
    "prefix": lambda: _call(mask=(TRIANGLE | (torch.arange(S) < 20))[None, None]),
    "a mask per head": lambda: _call(mask=torch.rand(1, HEADS, S, S) > 0.7),
    "a slope": lambda: _call(mask=SLOPE.masked_fill(~TRIANGLE, -3e38)),
    "hidden by a finite number": lambda: _call(
        mask=torch.zeros(S, S).masked_fill(~TRIANGLE, -1e4)[None, None]
    ),
    "bias": lambda: _call(causal=True, bias=torch.randn(1, HEADS, S, S)),
    "sinks": lambda: _call(causal=True, sinks=torch.linspace(-2, 4, HEADS)),
    "sinks of queries": lambda: _call(2, causal=True, sinks=torch.randn(2, HEADS, S)),
    "sinks and window": lambda: _call(
        causal=True, sliding_window=11, sinks=torch.linspace(-2, 4, HEADS)
    ),
    "soft-cap": lambda: _call(causal=True, softcap=2.0),
    "float16": lambda: _half(torch.float16),
    "bfloat16": lambda: _half(torch.bfloat16),
    "sharp": lambda: _call(causal=True, size=20.0),
    "other order in memory": lambda: _strided(_call(2, 40, S)),
    "hidden keys are not numbers": lambda: _spoilt(_call(2, mask=_padded(9, "left"))),
    "a window after the keys": lambda: replace(
        _call(1, 60, S - 30, causal=True, sliding_window=11), offset=20
    ),
    "one head": lambda: _call(causal=True).take("query", slice(0, 1)),
}


def _half(dtype: torch.dtype) -> AttentionCall:
    call = _call(causal=True)
    return replace(call, q=call.q.to(dtype), k=call.k.to(dtype))


def _strided(call: AttentionCall) -> AttentionCall:
    """Return the call with tensors whose last two axes are swapped in memory."""
    q, k = (t.mT.contiguous().mT for t in (call.q, call.k))
    return replace(call, q=q, k=k)


def _spoilt(call: AttentionCall) -> AttentionCall:
    """Return the call with NaN and infinity in the keys, and in a row, that nothing sees."""
    q, k, mask = call.q.clone(), call.k.clone(), call.mask.clone()
    k[1, :, :4], k[1, :, 4:9] = torch.nan, torch.inf
    mask[:, :, 12] = False
    q[:, :, 12] = torch.nan
    return replace(call, q=q, k=k, mask=mask)


def _exact(call: AttentionCall) -> torch.Tensor:
    """Return float64 probabilities from the definition, 0 in rows without a visible key."""
    seen = with_mask(call).mask if call.mask is None else call.visible()
    k = call.k.double().repeat_interleave(HEADS // KV_HEADS, 1)
    scores = call.q.double() @ k.mT * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    hides_by = torch.zeros(1)
    if call.mask is not None and call.mask.dtype != torch.bool:
        hides_by = call.mask.double()
        seen = (hides_by > -1e7) & seen.any(-1, keepdim=True)
    scores = scores + (0 if call.bias is None else call.bias.double()) + hides_by
    scores = scores.masked_fill(~seen, -torch.inf)
    if call.sinks is not None:
        sinks = call.sinks[None, :, None] if call.sinks.ndim == 1 else call.sinks
        column = sinks.double()[..., None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, column], -1).softmax(-1)[..., :-1].nan_to_num()
    return scores.softmax(-1).nan_to_num()


def _close(found: torch.Tensor, exact: torch.Tensor, relative: float = 1e-5) -> None:
    """Compare relative to each value, where it is above 1e-30; NaN counts as 0."""
    torch.testing.assert_close(
        found.double().nan_to_num(), exact.double(), rtol=relative, atol=1e-30
    )


@pytest.fixture(params=["fused", "chunks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Force one way of computation, with small groups, tiles and chunks."""
    monkeypatch.setattr(call_module, "SMALL_CELLS", 0)
    monkeypatch.setattr(tiles, "MASK_CELLS", 10 * S)
    monkeypatch.setattr(tiles, "SHORT_RUN", 3)
    monkeypatch.setattr(fused, "GROUP_BYTES", 4 * 4 * S * D)
    monkeypatch.setattr(call_module.kernels, "CHUNK_BYTES", 4 * 7 * S * HEADS)
    used: list[str] = []
    if request.param == "chunks":
        monkeypatch.setattr(fused, "supports", lambda _: False)
        monkeypatch.setattr(AttentionCall, "_is_fusible", False)
    else:
        for name in ("row_pass", "column_pass"):
            monkeypatch.setattr(fused, name, _counted(getattr(fused, name), used))
    yield request.param
    in_chunks = any(name in request.node.name for name in ("soft-cap", "not numbers"))
    assert bool(used) is (request.param == "fused" and not in_chunks)


def _counted(function, used: list[str]):
    def call(*args, **options):
        used.append(function.__name__)
        return function(*args, **options)

    return call


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", CALLS)
def test_every_statistic_equals_its_definition(name: str) -> None:
    torch.manual_seed(0)
    call = CALLS[name]()
    exact = _exact(call)
    n_queries, n_keys = exact.shape[2:]
    groups = torch.rand(30, n_keys) > 0.5  # more than d_head
    # scores of 1e2 are rounded to 1e-5 in float32, whatever the kernel
    tolerance = 1e-4 if name == "sharp" else 1e-5
    mass = exact @ groups.double().T
    _close(call.mass(groups), mass, tolerance)
    _close(call.mass(groups, [4, 1])[:, :, ::3], mass[:, [4, 1], ::3], tolerance)
    finite = exact.clamp(min=1e-300)
    entropy = -(exact * finite.log()).sum(-1)
    torch.testing.assert_close(call.entropy().double().nan_to_num(), entropy, rtol=0, atol=1e-5)
    top = call.top_keys(3, [1])
    expected, keys = exact[:, [1]].topk(3, -1)
    _close(top[0], expected, 2 * tolerance)
    assert (top[1] == keys)[expected > 0].float().mean() > 0.99  # keys differ where values tie
    for dtype in (torch.float32, torch.float64):
        weights = torch.rand(call.n_samples, n_queries, dtype=dtype)
        weights[:, 1::5] = 0.0
        received = (weights[:, None, None].double() @ exact)[:, :, 0]
        found = call.received(weights)
        assert found.dtype == dtype
        _close(found, received, 2 * tolerance)
        _close(call.received(weights, [5, 0]), received[:, [5, 0]], 2 * tolerance)
        _close(call.propagate(weights), received.mean(1), 2 * tolerance)
        _close(call.propagate(weights, [2]), received[:, 2], 2 * tolerance)


@pytest.mark.parametrize("name", ["causal", "kept rows", "decode steps", "left padding", "sinks"])
def test_distances_are_sums_over_placed_keys(name: str) -> None:
    call = CALLS[name]()
    exact = _exact(call)
    places = torch.rand(call.n_keys, 2) * 50
    places[1] = torch.nan
    rows = call.query_positions + call.offset
    apart = torch.cdist(places[rows].double(), places.double()).nan_to_num()
    expected = (exact * apart).sum(-1)
    found = call.distance(places)
    assert found[:, :, rows == 1].isnan().all()
    torch.testing.assert_close(
        found.double().nan_to_num()[:, :, rows != 1],
        expected[:, :, rows != 1],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["causal", "packed images", "sinks", "kept rows"])
def test_many_vectors_of_one_sample_at_once(name: str) -> None:
    call = CALLS[name]()
    exact = _exact(call)[0]
    vectors = torch.rand(45, call.n_queries, dtype=torch.float64)
    _close(call.propagate(vectors), vectors @ exact.mean(0), 2e-5)
    found = call.received(vectors)
    assert found.shape == (45, HEADS, call.n_keys)
    _close(found, (vectors @ exact).transpose(0, 1), 2e-5)


@pytest.mark.usefixtures("way")
def test_vectors_may_be_smaller_than_float32_can_hold() -> None:
    """Shares after 80 layers are below 1e-75; their products keep 6 digits."""
    call = CALLS["causal"]()
    exact = _exact(call)[0].mean(0)
    exponents = torch.linspace(-250, 0, S, dtype=torch.float64)
    vector = (10.0**exponents)[None] * torch.rand(1, S, dtype=torch.float64)
    found = call.propagate(vector)
    expected = vector @ exact
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=0)
    small = vector * 1e-200
    torch.testing.assert_close(
        call.propagate(small)[:, 60:], expected[:, 60:] * 1e-200, rtol=2e-5, atol=0
    )
    for size in (1e-310, 1.5e308):  # close to the ends of float64
        vector = torch.zeros(1, S, dtype=torch.float64)
        vector[0, 40], vector[0, 41] = size, -size / 4
        expected = (vector / size) @ exact
        torch.testing.assert_close(call.propagate(vector) / size, expected, rtol=2e-5, atol=1e-10)


@pytest.mark.parametrize("name", CALLS)
def test_counts_of_visible_cells(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "MASK_CELLS", 10 * S)
    monkeypatch.setattr(tiles, "SHORT_RUN", 3)
    call = CALLS[name]()
    seen = call.visible().double()
    assert torch.equal(call.n_visible(), seen.sum(-1).long())
    weights = torch.rand(1, 1, call.n_queries, dtype=torch.float64)
    expected = (weights[:, :, None] @ seen)[:, :, 0]
    torch.testing.assert_close(call.visible_sums(weights), expected)
    groups = torch.rand(3, call.n_keys) > 0.5
    null = seen @ groups.double().T / seen.sum(-1, keepdim=True)
    torch.testing.assert_close(call.null_mass(groups), null.float(), equal_nan=True)


def test_most_rows_are_computed_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is linear in the length, because no visible cell is in memory."""
    calls = (CALLS["causal"](), CALLS["packed images"](), CALLS["bidirectional"]())
    expected = [_exact(call) for call in calls]
    counts = [call.visible().sum(-1) for call in calls]

    def no_mask(*_: object, **__: object) -> None:
        raise AssertionError("a mask was built")

    monkeypatch.setattr(call_module.masks, "visible_rows", no_mask)
    monkeypatch.setattr(call_module, "SMALL_CELLS", 0)
    for call, exact, count in zip(calls, expected, counts, strict=True):
        rows = torch.arange(5, call.n_queries)
        groups = torch.arange(call.n_keys)[None] > torch.tensor([[3], [20]])
        _close(call.mass(groups, queries=rows), exact[:, :, 5:] @ groups.double().T)
        _close(call.entropy(queries=rows), torch.special.entr(exact[:, :, 5:]).sum(-1))
        ones = torch.ones(call.n_samples, call.n_queries)
        _close(call.received(ones), exact.sum(2), 2e-5)
        assert torch.equal(call.n_visible(rows), count[:, :, 5:])


def test_entropies_that_another_statistic_computed_are_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What keys receive needs the log-sum-exp of all rows, which a pass returns with entropies."""
    monkeypatch.setattr(call_module, "SMALL_CELLS", 0)
    call = _call(causal=True)
    exact = torch.special.entr(_exact(call)).sum(-1)
    call.received(torch.ones(call.n_samples, S))

    def no_pass(*_: object, **__: object) -> None:
        raise AssertionError("the rows were computed again")

    monkeypatch.setattr(call_module.fused, "row_pass", no_pass)
    for _ in range(2):
        found = call.entropy()
        torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=0)
        found.fill_(0.0)  # a result is the caller's
    some = call.entropy([3, 1], [7, -1]).double()
    torch.testing.assert_close(some, exact[:, [3, 1]][:, :, [7, -1]], atol=1e-5, rtol=0)


@pytest.mark.usefixtures("way")
def test_no_graph_is_kept() -> None:
    """A graph would hold the operands and, in chunks, all probabilities."""
    call = CALLS["sinks"]()
    call = replace(call, q=call.q.requires_grad_(), k=call.k.requires_grad_())
    results = [
        call.mass(torch.ones(2, S)),
        call.entropy(),
        call.received(torch.ones(1, S)),
        call.propagate(torch.ones(1, S, dtype=torch.float64)),
        call.distance(torch.rand(S, 2)),
        *call.top_keys(2),
        *call.memo.values(),
    ]
    assert not any(result.requires_grad for result in results)


CHANGES = {
    "replace": lambda call: replace(call, q=-call.q),
    "changed": lambda call: changed(call, q=-call.q),
    "kept rows": _kept,
    "fewer samples": lambda call: call.select_sample(1),
    "first rows": lambda call: call.take("query", slice(0, 30)),
    "device": lambda call: call.to("cpu"),
    "deepcopy": deepcopy,
    "pickle": lambda call: pickle.loads(pickle.dumps(call)),
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_call_has_its_own_results(name: str) -> None:
    """Results of one call that are kept for other statistics are not used for another call."""
    original = _call(2, causal=True)
    first = original.received(torch.ones(2, S)), original.entropy()
    call = CHANGES[name](original)
    exact = _exact(call)
    _close(call.received(torch.ones(call.n_samples, call.n_queries)), exact.sum(2), 2e-5)
    torch.testing.assert_close(original.received(torch.ones(2, S)), first[0], rtol=0, atol=0)
    torch.testing.assert_close(original.entropy(), first[1], rtol=0, atol=0)


def test_threads_may_share_a_call() -> None:
    """The kept attention that keys receive may be replaced by another thread at any time."""
    call, rows = _call(causal=True), torch.arange(S)
    other = (rows.tolist(), [0]), received(call, rows, [0])

    class Replaced(dict):
        def __setitem__(self, name: str, value: object) -> None:
            super().__setitem__(name, other if name == "received" else value)

    vars(call)["memo"] = Replaced()
    _close(received(call, rows, [1]), _exact(call)[0, [1]].sum(1), 2e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["kept rows", "left padding", "bias", "sinks of queries"])
def test_the_default_device_is_not_used(name: str) -> None:
    """The calls of a model on a GPU may be on the CPU."""
    call = CALLS[name]()
    groups, weights = torch.ones(2, S), torch.ones(call.n_samples, call.n_queries).double()
    last, ones = [int(call.query_positions[-1])], torch.ones(1, 1, call.n_queries)
    with torch.device("meta"):
        results = [
            call.mass(groups, [1], last),
            call.entropy(),
            call.received(weights),
            call.received(weights.float(), [1]),
            call.n_visible(),
            call.visible_sums(ones),
            call.null_mass(groups),
        ]
    assert {result.device.type for result in results} == {"cpu"}


@pytest.mark.usefixtures("way")
def test_scores_beyond_float32_have_an_entropy() -> None:
    call = _call(causal=True)
    call = replace(call, q=call.q * 1e25, k=call.k * 1e15, scaling=1e-40)
    exact = _exact(call)
    entropy = torch.special.entr(exact).sum(-1)
    torch.testing.assert_close(call.entropy().double(), entropy, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["window", "left padding", "a slope"])
def test_one_part_of_the_mask_is_held_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held: WeakSet[torch.Tensor] = WeakSet()
    most = 0
    strips = tiles.strips

    def counted(*args, **options):
        nonlocal most
        for strip in strips(*args, **options):
            held.update(tile.seen for tile in strip.tiles)
            most = max(most, len(held))
            yield strip

    for module in (tiles, fused):
        monkeypatch.setattr(module, "strips", counted)
    call = CALLS[name]()
    call.n_visible()
    call.visible_sums(torch.ones(1, 1, S))
    call.null_mass(torch.ones(2, S))
    call.mass(torch.ones(2, S))
    call.received(torch.ones(call.n_samples, S))
    assert 1 <= most <= 2


@pytest.mark.parametrize("order", ["all", "scattered", "reversed"])
@pytest.mark.parametrize("name", CALLS)
def test_parts_of_a_mask_are_small(name: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "MASK_CELLS", 10 * S)
    call = CALLS[name]()
    row = torch.arange(call.n_queries)
    row = {"all": row, "scattered": row[::7], "reversed": row.flip(0)}[order]
    n_masks = max(t.shape[0] * t.shape[1] for t in (call.visible(), call.bias) if t is not None)
    for strip in tiles.strips(call, row):
        for tile in strip.tiles:
            if tile.seen is not None:
                assert tile.seen.numel() <= max(10 * S, n_masks * call.n_keys)
