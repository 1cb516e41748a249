"""Attention by distance and position, as raw values and relative to the null."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.helpers.replicas import profile
from tests.helpers.synthetic import captured, dense_call, grid, random_call, sample_of, uniform_call
from xmodal_interp.analysis import positional, positional_bias, recency_index
from xmodal_interp.attention import AttentionCall
from xmodal_interp.errors import InputError

TEXT = ("text->text",)


def test_worked_example_of_three_positions() -> None:
    matrix = [[1.0, 0.0, 0.0], [0.4, 0.6, 0.0], [0.1, 0.3, 0.6]]
    table = positional_bias(sample_of("ttt", [dense_call(matrix)]), blocks=TEXT)
    assert list(table) == [
        *("sample", "tower", "kind", "layer", "head", "block", "axis", "start", "stop"),
        *("raw", "null", "lift", "n_cells"),
    ]
    near = table[table["axis"] == "distance"]
    assert near[["start", "stop", "n_cells"]].to_numpy().tolist() == [
        [0, 1, 3],
        [1, 2, 2],
        [2, 3, 1],
    ]
    assert near["raw"].tolist() == pytest.approx([2.2 / 3, 0.35, 0.1])
    assert near["lift"].tolist() == pytest.approx([(1 + 1.2 + 1.8) / 3, (0.8 + 0.9) / 2, 0.3])
    key = table[table["axis"] == "key"]
    assert key["raw"].tolist() == pytest.approx([0.5, 0.45, 0.6])
    assert key["null"].tolist() == pytest.approx([(1 + 1 / 2 + 1 / 3) / 3, 5 / 12, 1 / 3])


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"sliding_window": 7}])
@pytest.mark.parametrize("n_bins", [4, 40])
def test_cell_by_cell(options: dict[str, object], n_bins: int) -> None:
    call = random_call(14, **options)
    sample = sample_of("b s vvvvvv tttttt", [call], [grid(2, 3)])
    table = positional_bias(sample, n_bins=n_bins)
    probs, visible = call.probs()[0].numpy(), call.visible()[0, 0].numpy()
    of_kind = {"text": [1, *range(8, 14)], "image": list(range(2, 8))}
    width = -(-14 // n_bins)
    for (head, block, axis), part in table.groupby(["head", "block", "axis"]):
        queries, keys = (of_kind[kind] for kind in block.split("->"))
        slow = profile(probs[head], visible, queries, keys, axis, width)
        assert part["start"].tolist() == sorted(slow)
        for row in part.itertuples():
            fast = (row.raw, row.null, row.lift, row.n_cells)
            assert fast == pytest.approx(slow[row.start], rel=1e-5)


HIDDEN = torch.rand(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.3
LAYOUTS = {
    "image first": "b s vvvvvv tttttt oo",
    "kinds that alternate": "tvtvtbvtvtvttvtt",
    "padding before": "ppp vvvvvv tttttto",
    "padding in between": "b tt vv p vvvv pp ttoo",
}


@pytest.mark.parametrize("n_rows", [1, 3, 16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 1.0},
        {"sliding_window": 5},
        {"causal": False},
        {"causal": False, "mask": ~HIDDEN},
        {"causal": False, "mask": ~HIDDEN[:, :1].tril()},
        {"sinks": torch.tensor([0.0, 1.0, 2.0, 3.0])},
    ],
    ids=["causal", "softcap", "window", "bidirectional", "mask per head", "mask", "sinks"],
)
def test_every_way_equals_a_float64_replica(
    options: dict[str, Any], layout: str, n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers differ in their mask; padding keys are hidden, as in any batch."""
    monkeypatch.setattr(positional, "_n_rows", lambda *_: n_rows)
    letters = layout.replace(" ", "")
    counted = np.array([letter != "p" for letter in letters])
    calls = [
        random_call(16, layer=0),
        random_call(16, layer=1, **options),
        random_call(16, layer=2, **options),
        random_call(16, layer=3),
    ]
    if not counted.all():  # a mask that hides padding, shared by two layers
        calls = [without_padding(call, counted) for call in calls]
    sample = sample_of(layout, calls, [grid(1, letters.count("v"))])
    table = positional_bias(sample, n_bins=5, heads=[3, 1])
    width = -(-int(counted.sum()) // 5)
    of_kind = {
        kind: np.flatnonzero([letter in of for letter in np.array(list(letters))[counted]]).tolist()
        for kind, of in {"text": "sto", "image": "v"}.items()
    }
    groups = table.groupby(["layer", "head", "block", "axis"])
    assert len(groups) == 4 * 2 * 3 * 2
    for (layer, head, block, axis), part in groups:
        call = calls[layer]
        probs = call.probs(dtype=torch.float64)[0, head].nan_to_num().numpy()
        visible = call.visible()[0].expand(4, -1, -1)[head].numpy()
        queries, keys = (of_kind[kind] for kind in block.split("->"))
        among = np.ix_(counted, counted)
        slow = profile(probs[among], visible[among], queries, keys, axis, width)
        assert part["start"].tolist() == sorted(slow)
        found = part[["raw", "null", "lift", "n_cells"]].to_numpy()
        np.testing.assert_allclose(found, [slow[i] for i in sorted(slow)], rtol=1e-5, atol=1e-12)


def without_padding(call: AttentionCall, counted: np.ndarray) -> AttentionCall:
    """The call with a mask that hides padding too."""
    mask = call.visible() & torch.from_numpy(counted)
    return replace(call, mask=mask, causal=False, sliding_window=None)


@pytest.mark.parametrize("n_rows", [7, 500])
def test_rotary_distance_does_not_depend_on_the_chunks_of_rows(
    n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = captured("qwen2_vl")
    whole = positional_bias(sample)
    monkeypatch.setattr(positional, "_n_rows", lambda *_: n_rows)
    pd.testing.assert_frame_equal(positional_bias(sample), whole, rtol=1e-6)


def test_a_block_that_is_named_twice_counts_once() -> None:
    sample = sample_of("ttt", [random_call(3)])
    twice = positional_bias(sample, blocks=[*TEXT, *TEXT])
    pd.testing.assert_frame_equal(twice, positional_bias(sample, blocks=TEXT))


def test_uniform_attention_has_lift_one_in_every_bin() -> None:
    sample = sample_of("b" + "t" * 63, [uniform_call(64)])
    table = positional_bias(sample, blocks=TEXT, n_bins=64)
    assert table["lift"].to_numpy() == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(table["raw"], table["null"], atol=1e-7)


def test_the_column_mean_of_a_causal_matrix_measures_the_mask() -> None:
    """Under uniform attention over 64 positions it falls from 0.0741 to 0.0002."""
    naive = uniform_call(64).probs()[0, 0].mean(0)
    assert naive[[0, 32, 63]].tolist() == pytest.approx([0.0741, 0.0107, 0.0002], abs=5e-5)
    table = positional_bias(sample_of("t" * 64, [uniform_call(64)]), blocks=TEXT, n_bins=64)
    keys = table[(table["axis"] == "key") & (table["head"] == 0)].set_index("start")
    assert keys.loc[[0, 32, 63], "lift"].tolist() == pytest.approx([1.0] * 3, abs=1e-6)


def test_all_samples_get_the_same_bins() -> None:
    samples = [sample_of("t" * n, [random_call(n)], name=str(n)) for n in (6, 20)]
    table = positional_bias(samples, blocks=TEXT, n_bins=5)
    assert (table["stop"] - table["start"]).unique().tolist() == [4]
    assert table.groupby("sample")["start"].nunique().to_dict() == {"6": 2, "20": 5}


def test_recency_of_a_previous_token_head() -> None:
    shifted = torch.zeros(9, 9)
    shifted[torch.arange(1, 9), torch.arange(8)] = 1.0
    shifted[0, 0] = 1.0
    sample = sample_of(
        "t" * 9,
        [
            dense_call(
                torch.stack([shifted, torch.ones(9, 9).tril() / torch.arange(1, 10)[:, None]])
            )
        ],
    )
    table = recency_index(sample, window=2)
    assert list(table) == [
        *("sample", "tower", "kind", "layer", "head", "window"),
        *("mass", "null", "lift", "n_queries"),
    ]
    assert table["mass"][0] == pytest.approx(1.0)
    assert table["lift"].tolist() == pytest.approx([np.mean([v / 2 for v in range(3, 10)]), 1.0])
    assert table["n_queries"].tolist() == [7, 7]


def test_recency_row_by_row() -> None:
    call = random_call(12, sliding_window=9)
    sample = sample_of("b s vvvvvv tttt", [call], [grid(2, 3)])
    table = recency_index(sample, window=3, queries="text")
    for head, lift in enumerate(table["lift"]):
        rows = call.probs()[0, head, 8:].numpy()
        lifts = [rows[q - 8, q - 2 : q + 1].sum() / (3 / min(q + 1, 9)) for q in range(8, 12)]
        assert lift == pytest.approx(np.mean(lifts), rel=1e-5)


def test_recency_leaves_out_padding() -> None:
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    mask[..., :2] = False
    sample = sample_of("pptttt", [random_call(6, causal=False, mask=mask)])
    table = recency_index(sample, window=1, queries=slice(None))
    assert table["n_queries"].unique().tolist() == [3]
    assert table["lift"].notna().all()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_of_a_model(family: str) -> None:
    table = positional_bias(captured(family), layers=-1)
    assert set(table["block"]) == {"text->text", "text->image", "image->image"}
    assert table["raw"].between(0, 1).all()
    assert table["lift"].notna().all()


def test_refusals() -> None:
    sample = sample_of("ttt", [random_call(3)])
    with pytest.raises(InputError) as caught:
        positional_bias(sample, blocks=("text->image", "image->text"))
    assert str(caught.value) == (
        "blocks must be among text->text, text->image, image->image; got image->text."
    )
    with pytest.raises(InputError) as caught:
        positional_bias(sample)
    assert str(caught.value) == (
        "Sample 'fake' has no image tokens; it has 0 images, numbered from 0."
    )
    with pytest.raises(InputError) as caught:
        positional_bias(sample, blocks=TEXT, n_bins=0)
    assert str(caught.value) == "n_bins must be at least 1; got 0."
    with pytest.raises(InputError) as caught:
        recency_index(sample, window=0)
    assert str(caught.value) == "window must be at least 1, the query itself; got 0."
    with pytest.raises(InputError) as caught:
        positional_bias([], blocks=TEXT)
    assert str(caught.value) == "positional_bias requires at least one sample; got none."
    cross = sample_of("ttt", [random_call(3)], cross_keys=sample_of("t", []).tokens)
    assert len(positional_bias(cross, blocks=TEXT))
    with pytest.raises(InputError) as caught:
        positional_bias(cross)
    assert str(caught.value) == (
        "A profile of text->image or image->image requires image and text tokens in one sequence. "
        "In sample 'fake' text attends to the image by cross-attention (layers not kept), where "
        "every key is an image key."
    )


def test_rotary_distance_where_the_tokens_of_an_image_share_their_time() -> None:
    sample = captured("qwen2_vl")
    table = positional_bias(sample, layers=[1], heads=[2], n_bins=16)
    rotary = sample.tokens[["rope_t", "rope_h", "rope_w"]].to_numpy(dtype=int)
    call = sample.call(1)
    probs, visible = call.probs([2])[0, 0].numpy(), call.visible()[0, 0].numpy()
    width = -(-len(sample) // 16)
    kinds = sample.tokens["kind"].to_numpy()
    for block, part in table[table["axis"] == "rope_distance"].groupby("block"):
        queries, keys = (np.flatnonzero(kinds == kind) for kind in block.split("->"))
        cells: dict[int, list[float]] = {}
        for i in queries:
            for j in keys:
                if visible[i, j]:
                    start = abs(rotary[i] - rotary[j]).max() // width * width
                    cells.setdefault(start, []).append(probs[i, j] * visible[i].sum())
        assert part["start"].tolist() == sorted(cells)
        assert part["n_cells"].tolist() == [len(cells[start]) for start in sorted(cells)]
        means = [np.mean(cells[start]) for start in sorted(cells)]
        assert part["lift"].to_numpy() == pytest.approx(means, rel=1e-4)
    furthest = table.groupby("axis")["start"].max()
    assert furthest["rope_distance"] < furthest["distance"]


def test_rotary_distance_beyond_the_length_of_the_sequence() -> None:
    """Time positions of a video rise faster than the positions of its tokens."""
    sample = sample_of("tvvt", [uniform_call(4)], [grid(1, 2)])
    rope = {"rope_t": [0, 1, 21, 22], "rope_h": [0, 1, 1, 22], "rope_w": [0, 1, 1, 22]}
    tokens = sample.tokens.assign(**rope).astype(dict.fromkeys(rope, "Int64"))
    table = positional_bias(replace(sample, tokens=tokens), heads=0)
    far = table[table["axis"] == "rope_distance"].groupby("block")["start"].agg(list).to_dict()
    assert far == {"text->text": [0, 22], "text->image": [21], "image->image": [0, 20]}
    assert table["stop"].sub(table["start"]).eq(1).all()


def test_no_rotary_profile_for_one_dimensional_positions() -> None:
    assert set(positional_bias(captured("llava"), layers=[0])["axis"]) == {"distance", "key"}
