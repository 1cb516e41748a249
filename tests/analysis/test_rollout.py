"""Attention rollout: worked examples, the papers' formulas, and known values of the null."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers.replicas import rollout_of_a_variant, rollout_of_abnar_and_zuidema
from tests.helpers.synthetic import captured, dense_call, grid, random_call, sample_of, uniform_call
from xmodal_interp.analysis import attention_rollout, rollout_matrix
from xmodal_interp.analysis.rollout import RolloutOptions
from xmodal_interp.errors import InputError, NotRecordedError, PhraseError
from xmodal_interp.sample import Sample

SEQUENCE = "b vvvv ttt"


def stack(n_layers: int, **more: object) -> Sample:
    calls = [random_call(8, layer=layer, **more) for layer in range(n_layers)]
    return sample_of(SEQUENCE, calls, [grid(2, 2)])


def matrices(sample: Sample) -> np.ndarray:
    return np.stack([c.probs()[0].double().numpy() for c in sample.calls.values()])


def null_stack(n_positions: int, n_layers: int) -> Sample:
    calls = [uniform_call(n_positions, layer=layer, n_heads=1) for layer in range(n_layers)]
    return sample_of("b" + "t" * (n_positions - 1), calls)


def test_worked_example_of_two_layers() -> None:
    first = dense_call([[1.0, 0.0], [0.5, 0.5]], layer=0)
    second = dense_call([[1.0, 0.0], [1.0, 0.0]], layer=1)
    table = attention_rollout(sample_of("bt", [first, second]), [1])
    # B_1 = [[1, 0], [.25, .75]], B_2 = [[1, 0], [.5, .5]]
    assert table["rollout"].tolist() == pytest.approx([0.625, 0.375])
    assert list(table) == [
        *("sample", "tower", "kind", "query", "key", "query_token"),
        *("token", "token_kind", "image", "row", "col", "video", "frame", "rollout"),
    ]
    assert table[["query_token", "token", "token_kind"]].to_numpy().tolist() == [
        ["t1", "b0", "special"],
        ["t1", "t1", "text"],
    ]


def test_is_the_product_of_abnar_and_zuidema() -> None:
    sample = stack(6, n_heads=4)
    theirs = rollout_of_abnar_and_zuidema(matrices(sample))
    np.testing.assert_allclose(rollout_matrix(sample).numpy(), theirs, atol=1e-6)
    rows = attention_rollout(sample, [3, 7])["rollout"].to_numpy().reshape(2, 8)
    np.testing.assert_allclose(rows, theirs[[3, 7]], atol=1e-6)


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("discard", [0.0, 0.7])
@pytest.mark.parametrize("sinks", [[], [0], [1, 4]])
def test_every_option_against_the_slow_product(
    fusion: str, discard: float, sinks: list[int]
) -> None:
    sample = stack(3, n_heads=4)
    alphas = (0.5, 0.9, 0.2)
    slow = rollout_of_a_variant(
        matrices(sample), alphas, fusion=fusion, discard=discard, sinks=sinks
    )
    options = {"fusion": fusion, "discard": discard, "sinks": sinks, "alpha": alphas}
    np.testing.assert_allclose(rollout_matrix(sample, **options).numpy(), slow, atol=1e-5)
    row = attention_rollout(sample, "t6", **options)["rollout"]
    np.testing.assert_allclose(row, slow[6], atol=1e-5)


@pytest.mark.parametrize(
    ("n_positions", "shares"),
    [
        (16, {1: 0.0312, 2: 0.0841, 6: 0.4049, 12: 0.7957, 24: 0.9884, 32: 0.9987}),
        (64, {1: 0.0078, 2: 0.0263, 6: 0.2169, 12: 0.6254, 24: 0.9666, 32: 0.9954}),
        (640, {1: 0.0008, 2: 0.0035, 6: 0.0623}),
    ],
)
def test_uniform_causal_attention_collapses_on_the_first_position(
    n_positions: int, shares: dict[int, float]
) -> None:
    sample = null_stack(n_positions, max(shares))
    for n_layers, share in shares.items():
        table = attention_rollout(sample, layers=(0, n_layers))
        assert table["rollout"].iloc[0] == pytest.approx(share, abs=6e-5)


def test_rollout_of_uniform_attention_prefers_the_top_of_the_image() -> None:
    calls = [uniform_call(640, layer=layer, n_heads=1) for layer in range(8)]
    sample = sample_of("b" * 35 + "v" * 576 + "t" * 29, calls, [grid(24, 24)])
    for n_layers, on_image, in_top_row in ((1, 0.45, 0.042), (2, 0.65, 0.067), (8, 0.37, 0.250)):
        table = attention_rollout(sample, layers=(0, n_layers))
        image = table[table["token_kind"] == "image"]
        top = image[image["row"] == 0]
        assert image["rollout"].sum() == pytest.approx(on_image, abs=6e-3)
        assert top["rollout"].sum() / image["rollout"].sum() == pytest.approx(in_top_row, abs=6e-4)


def test_one_layer_is_half_attention_half_identity() -> None:
    sample = stack(1)
    closed = 0.3 * matrices(sample).mean((0, 1)) + 0.7 * np.eye(8)
    np.testing.assert_allclose(rollout_matrix(sample, alpha=0.3).numpy(), closed, atol=1e-6)


def test_identity_attention_has_identity_rollout() -> None:
    calls = [dense_call(torch.eye(4), layer=layer) for layer in range(3)]
    whole = rollout_matrix(sample_of("bttt", calls))
    torch.testing.assert_close(whole, torch.eye(4).double())


@pytest.mark.parametrize(
    "options", [{}, {"fusion": "max"}, {"fusion": "min", "discard": 0.8}, {"sinks": "drop_first"}]
)
def test_rows_are_shares(options: dict[str, object]) -> None:
    matrix = rollout_matrix(stack(4), **options)
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(8).double())
    assert torch.equal(matrix, matrix.tril())  # causal layers stay causal


def test_order_of_positions_does_not_matter_without_a_mask() -> None:
    sample = stack(3, causal=False)
    order = torch.randperm(8)
    shuffled = [
        dense_call(c.probs()[0][:, order][:, :, order], layer=c.layer, causal=False)
        for c in sample.calls.values()
    ]
    moved = rollout_matrix(sample_of("b" + "t" * 7, shuffled))
    expected = rollout_matrix(sample)[order][:, order]
    torch.testing.assert_close(moved, expected, atol=1e-6, rtol=1e-5)


def test_sinks_are_dropped_from_rows_that_see_other_keys() -> None:
    sink = [[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.8, 0.1, 0.1]]
    sample = sample_of("btt", [dense_call(sink)])
    matrix = rollout_matrix(sample, sinks="drop_first")
    expected = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.25, 0.75]]
    np.testing.assert_allclose(matrix, expected, rtol=1e-6)
    np.testing.assert_allclose(rollout_matrix(sample, sinks={0}), expected, rtol=1e-6)


def test_baseline_is_the_rollout_of_uniform_attention() -> None:
    table = attention_rollout(stack(4), baseline="uniform", sinks="drop_first")
    calls = [uniform_call(8, layer=layer) for layer in range(4)]
    null = attention_rollout(sample_of(SEQUENCE, calls, [grid(2, 2)]), sinks="drop_first")
    np.testing.assert_allclose(table["null"], null["rollout"], atol=1e-7)
    expected = np.log2(table["rollout"][1:] / table["null"][1:])
    np.testing.assert_allclose(table["log2_ratio"][1:], expected, rtol=1e-5)
    same = attention_rollout(null_stack(8, 4), baseline="uniform")
    np.testing.assert_allclose(same["log2_ratio"], 0.0, atol=1e-6)


def test_padding_is_left_out_and_does_not_change_other_rows() -> None:
    mask = torch.ones(1, 1, 10, 10, dtype=torch.bool).tril()
    mask[..., :2] = False
    calls = [random_call(10, layer=layer, causal=False, mask=mask) for layer in range(3)]
    padded = sample_of("pp b vvvv ttt", calls, [grid(2, 2)])
    table = attention_rollout(padded, slice(None), baseline="uniform")
    assert table["query"].unique().tolist() == list(range(2, 10))
    assert table["rollout"].notna().all()
    assert table.loc[table["key"] < 2, "rollout"].eq(0).all()
    assert table.loc[table["key"] < 2, "log2_ratio"].isna().all()
    bare = [dense_call(c.probs()[0, :, 2:, 2:], layer=c.layer) for c in padded.calls.values()]
    own = rollout_matrix(sample_of(SEQUENCE, bare, [grid(2, 2)]))
    torch.testing.assert_close(rollout_matrix(padded)[2:, 2:], own, atol=1e-6, rtol=1e-5)
    of_padding = rollout_matrix(padded, fusion="max")[:2]
    torch.testing.assert_close(of_padding, torch.eye(10)[:2].double())


def test_learned_sinks_leave_rows_that_sum_to_one() -> None:
    calls = [random_call(8, layer=layer, sinks=torch.ones(4)) for layer in range(2)]
    matrix = rollout_matrix(sample_of(SEQUENCE, calls, [grid(2, 2)]))
    torch.testing.assert_close(matrix.sum(1), torch.ones(8).double())


def test_vision_tower_starts_at_the_class_token() -> None:
    calls = [random_call(5, layer=layer, tower="vision", causal=False) for layer in range(2)]
    sample = sample_of("b vvvv t", calls, [grid(2, 2, class_token=True)])
    table = attention_rollout(sample, tower="vision")
    assert table["query"].unique().tolist() == [0]
    assert table["token_kind"].tolist() == ["special", *["image"] * 4]
    assert table["row"].tolist()[1:] == [0, 0, 1, 1]
    assert table["rollout"].sum() == pytest.approx(1.0)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_of_a_model(family: str) -> None:
    sample = captured(family)
    table = attention_rollout(sample, "red circle", baseline="uniform", sinks="drop_first")
    assert table.groupby("query")["rollout"].sum().tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    theirs = rollout_of_abnar_and_zuidema(
        np.stack([sample.probs(layer).numpy() for layer in sample.layers()])
    )
    plain = attention_rollout(sample)
    np.testing.assert_allclose(plain["rollout"], theirs[sample.last], atol=1e-5)
    json.dumps(table.attrs)
    assert table.attrs["analysis"] == "attention_rollout"
    assert table.attrs["provenance"]["model_type"] == family
    eyes = attention_rollout(sample, [0], tower="vision", layers=(0, -1))
    assert eyes["rollout"].sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("fusion", ["mean", "max"])
def test_alpha_of_each_token_from_norms(fusion: str) -> None:
    calls = [
        replace(random_call(8, layer=layer, n_heads=4), update_share=torch.rand(1, 8))
        for layer in range(3)
    ]
    sample = sample_of(SEQUENCE, calls, [grid(2, 2)])
    slow = np.eye(8)
    for call in calls:
        share = call.update_share[0, :, None].double().numpy()
        probs = call.probs()[0].double().numpy()
        fused = probs.mean(0) if fusion == "mean" else probs.max(0)
        layer = share * fused + (1 - share) * np.eye(8)
        slow = layer / layer.sum(1, keepdims=True) @ slow
    rows = rollout_matrix(sample, alpha="norm", fusion=fusion)
    np.testing.assert_allclose(rows.numpy(), slow, atol=1e-5)


DEEP = {
    "paper": {},
    "mostly attention": {"alpha": 0.9},
    "without sinks": {"alpha": 0.9, "sinks": [0]},
    "maximum": {"alpha": 0.9, "fusion": "max"},
    "by layer": {"alpha": [0.95] * 60},
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_stacks_keep_the_digits_of_small_shares(name: str) -> None:
    """In float32, 136 of 144 image tokens are 0 after 80 layers and log2_ratio is -inf."""
    options = DEEP[name]
    layout = "b" + "v" * 16 + "tt"
    calls = [random_call(19, layer=layer, n_heads=2, spread=4) for layer in range(60)]
    sample = sample_of(layout, calls, [grid(4, 4)])
    probs = np.stack([call.probs(dtype=torch.float64)[0].numpy() for call in calls])
    alphas = np.broadcast_to(options.get("alpha", 0.5), 60)
    more = {"fusion": options.get("fusion", "mean"), "sinks": options.get("sinks", [])}
    slow = rollout_of_a_variant(probs, alphas, **more)
    table = attention_rollout(sample, [18], baseline="uniform", **options)
    np.testing.assert_allclose(table["rollout"], slow[18], rtol=1e-9)
    np.testing.assert_allclose(rollout_matrix(sample, **options).numpy(), slow, rtol=1e-9)
    even = np.stack([np.tril(np.ones((19, 19))) / np.arange(1, 20)[:, None]] * 2)
    null = rollout_of_a_variant(np.stack([even] * 60), alphas, **more)
    np.testing.assert_allclose(table["null"], null[18], rtol=1e-6)
    with np.errstate(invalid="ignore"):  # 0 / 0 at dropped sinks
        expected = np.log2(slow[18] / null[18])
    np.testing.assert_allclose(table["log2_ratio"], expected, atol=1e-5)
    if name != "paper":
        assert table["rollout"].min() < 1e-45  # the smallest number of float32


def test_large_scores_and_norms_do_not_end_in_zeros() -> None:
    """Scores 150 apart: e^-150 is 0 in float32."""
    q = torch.zeros(1, 1, 4, 8)
    q[..., 0] = 1.0
    k = torch.zeros(1, 1, 4, 8)
    k[0, 0, :, 0] = torch.tensor([150.0, 0.0, 0.0, 150.0])
    shares = torch.full((1, 4), 0.99)
    calls = [
        replace(random_call(4, layer=n), q=q, k=k, scaling=1.0, update_share=shares)
        for n in range(2)
    ]
    sample = sample_of("bttt", calls)
    probs = np.stack([call.probs(dtype=torch.float64)[0].numpy() for call in calls])
    slow = rollout_of_a_variant(probs, [float(shares[0, 0])] * 2)
    table = attention_rollout(sample, [3], alpha="norm", baseline="uniform")
    np.testing.assert_allclose(table["rollout"], slow[3], rtol=1e-9)
    assert 0 < table["rollout"][1] < 1e-60
    assert np.isfinite(table["log2_ratio"]).all()


def refusal(error: type[Exception], sample: Sample, *args: object, **options: object) -> str:
    with pytest.raises(error) as caught:
        attention_rollout(sample, *args, **options)
    return str(caught.value)


def test_refusals() -> None:
    sample = stack(3)
    assert refusal(InputError, sample, alpha=1.5) == (
        "alpha must be between 0 and 1, or 'norm'; got 1.5."
    )
    assert refusal(InputError, sample, alpha="norms") == (
        "alpha must be between 0 and 1, or 'norm'; got 'norms'."
    )
    assert refusal(NotRecordedError, sample, alpha="norm") == (
        "language self-attention, layer 0, call 0 was captured without the norms that alpha='norm' "
        "requires. Capture with Keep(norms=True)."
    )
    assert refusal(InputError, sample, alpha=[0.5, 0.5]) == (
        "alpha has 2 numbers for 3 layers. Pass one number, or one per layer."
    )
    assert refusal(InputError, sample, discard=1.0) == (
        "discard must be at least 0 and below 1; got 1.0."
    )
    assert refusal(InputError, sample, baseline="flat") == (
        "baseline must be 'uniform' or None; got 'flat'."
    )
    assert refusal(InputError, sample, baseline="uniform", discard=0.5) == (
        "baseline='uniform' requires discard=0, because uniform attention has no lowest entries to "
        "discard; got discard=0.5. Leave one of them out."
    )
    assert refusal(PhraseError, sample, sinks="drop") == (
        "sinks must be 'keep', 'drop_first' or a selector; got 'drop'. 'drop' is not in the "
        "sample's text 'b0 v1 v2 v3 v4 t5 t6 t7'."
    )
    assert refusal(InputError, sample, layers=(2, 1)) == (
        "layers=(2, 1) selects none of the 3 layers. Pass the start and stop of a slice with at "
        "least one layer."
    )
    assert refusal(InputError, sample, tower="connector") == (
        "attention_rollout is not defined for tower='connector'. Choose 'language' or 'vision'."
    )
    with pytest.raises(InputError) as caught:
        RolloutOptions("median", 0.5, 0.0)
    assert str(caught.value) == "fusion must be one of mean, max, min; got 'median'."


def test_refuses_layers_and_rows_that_were_not_kept() -> None:
    calls = [random_call(8, layer=layer) for layer in (0, 2)]
    sample = sample_of(SEQUENCE, calls, [grid(2, 2)])
    assert refusal(NotRecordedError, sample) == (
        "Rollout requires all language layers from 0 to 2, but [1] were not kept (kept: [0, 2]). "
        "Capture all layers, or choose layers=(start, stop) within the kept ones."
    )
    rows = [random_call(8).select_rows(torch.tensor([5, 6, 7]))]
    sample = sample_of(SEQUENCE, rows, [grid(2, 2)])
    assert refusal(NotRecordedError, sample) == (
        "Rollout requires every query row, but language self-attention, layer 0, call 0 holds 3 "
        "rows for 8 keys. Capture with Keep(queries='all')."
    )


def test_refuses_padding_and_phrases_in_the_vision_tower() -> None:
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    mask[..., 0] = False
    padded = sample_of("pbt", [random_call(3, causal=False, mask=mask)])
    assert refusal(InputError, padded, [0]) == (
        "The query positions [0] are padding or see no key. Choose other queries."
    )
    eyes = random_call(4, tower="vision", causal=False)
    sample = sample_of("b vvvv t", [eyes], [grid(2, 2)])
    assert refusal(PhraseError, sample, "red", tower="vision") == (
        "No position of the vision tower of sample 'fake' is named 'red'; the names are patch. "
        "Pass one of them, or positions as numbers."
    )
    assert refusal(InputError, sample, tower="vision") == (
        "The vision tower has 0 class tokens, so there is no default for queries. Pass positions "
        "as queries."
    )


def test_refuses_cross_attention() -> None:
    cross = random_call(3, kind="cross", causal=False)
    sample = sample_of("btt", [random_call(3), cross], cross_keys=stack(1).tokens)
    assert refusal(InputError, sample) == (
        "Rollout requires image and text tokens in one sequence. In sample 'fake' text attends to "
        "the image by cross-attention (layers 0), where every key is an image key."
    )
