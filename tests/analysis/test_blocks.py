"""The four blocks between image and text, and the one-row summary."""

import numpy as np
import pytest
import torch

from tests.helpers.replicas import block, seed_statistics
from tests.helpers.synthetic import dense_call, grid, random_call, sample_of, uniform_call
from xmodal_interp.analysis import block_statistics, cross_modal_summary
from xmodal_interp.errors import InputError, NotRecordedError

BLOCKS = ["V-V", "V-T", "T-V", "T-T"]


def test_worked_example_of_four_positions() -> None:
    matrix = [
        [1.0, 0.0, 0.0, 0.0],
        [0.5, 0.5, 0.0, 0.0],
        [0.3, 0.3, 0.4, 0.0],
        [0.1, 0.1, 0.4, 0.4],
    ]
    table = block_statistics(sample_of("vv tt", [dense_call(matrix)], [grid(1, 2)]))
    assert list(table) == [
        *("sample", "tower", "kind", "layer", "head", "block", "query_kind", "key_kind"),
        *("mass", "mean", "null", "lift", "n_queries", "n_visible_cells", "visible"),
    ]
    assert table["block"].tolist() == BLOCKS
    assert table["mass"].tolist() == pytest.approx([1.0, np.nan, 0.4, 0.6], nan_ok=True)
    assert table["mean"].tolist() == pytest.approx([2 / 3, np.nan, 0.2, 0.4], nan_ok=True)
    assert table["null"].tolist()[2:] == pytest.approx([(2 / 3 + 1 / 2) / 2, (1 / 3 + 1 / 2) / 2])
    assert table["lift"].tolist()[2:] == pytest.approx([(0.9 + 0.4) / 2, (1.2 + 1.6) / 2])
    assert table["n_visible_cells"].tolist() == [3, 0, 4, 3]
    assert table["n_queries"].tolist() == [2, 0, 2, 2]
    assert table["visible"].tolist() == [True, False, True, True]


def test_an_invisible_block_is_not_zero() -> None:
    table = block_statistics(sample_of("vv tt", [random_call(4)], [grid(1, 2)]), heads=0)
    unseen = table[table["block"] == "V-T"].iloc[0]
    assert unseen[["mass", "mean", "null", "lift"]].isna().all()
    assert not unseen["visible"]


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"sliding_window": 5}])
def test_cell_by_cell(options: dict[str, object]) -> None:
    call = random_call(14, **options)
    table = block_statistics(sample_of("b s vvvvvv tttt oo", [call], [grid(2, 3)]))
    positions = {"image": range(2, 8), "text": [0, 1, *range(8, 14)]}
    probs, visible = call.probs()[0].numpy(), call.visible()[0, 0].numpy()
    for row in table[table["visible"]].itertuples():
        slow = block(probs[row.head], visible, positions[row.query_kind], positions[row.key_kind])
        for name, value in slow.items():
            assert getattr(row, name) == pytest.approx(value, rel=1e-5), (row.block, name)


def test_blocks_sum_to_one_per_row_and_uniform_attention_has_lift_one() -> None:
    sample = sample_of("b s vvvvvv tttt", [random_call(12)], [grid(2, 3)])
    table = block_statistics(sample)
    total = (table["mean"] * table["n_visible_cells"]).groupby(table["head"]).sum()
    assert total.tolist() == pytest.approx([12.0] * 4)
    even = block_statistics(sample_of("b s vvvvvv tttt", [uniform_call(12)], [grid(2, 3)]))
    assert even["lift"].to_numpy() == pytest.approx(1.0, abs=1e-6)


def test_number_of_visible_cells_in_a_vit_layout() -> None:
    """196 image and 10 text tokens: T-V has 1,960 of all 42,436 and of the 21,321 visible cells."""
    table = block_statistics(sample_of("v" * 196 + "t" * 10, [uniform_call(206)], [grid(14, 14)]))
    cells = table[table["head"] == 0].set_index("block")["n_visible_cells"]
    assert cells["T-V"] == 1960
    assert cells.sum() == 21321
    assert cells["T-V"] / 206**2 == pytest.approx(0.0462, abs=5e-5)
    assert cells["T-V"] / cells.sum() == pytest.approx(0.0919, abs=5e-5)


def test_summary_equals_plain_block_means_if_every_cell_is_visible() -> None:
    """The image is first, there are no other tokens, and there is no mask."""
    call = random_call(9, causal=False)
    row = cross_modal_summary(sample_of("vvvvvv ttt", [call], [grid(2, 3)])).iloc[0]
    slow = seed_statistics(call.probs()[0].numpy(), 6)
    for name, value in slow.items():
        assert row[name] == pytest.approx(value, rel=1e-5), name
    assert (row["row"], row["col"]) == divmod(slow["most_attended_patch"], 3)


def test_a_flat_map_has_no_most_attended_patch() -> None:
    table = cross_modal_summary(sample_of("vvvvt", [uniform_call(5)], [grid(2, 2)]))
    assert table[["most_attended_patch", "image", "row", "col"]].isna().all(axis=None)
    assert table["most_attended_patch"].dtype == "Int64"


def test_summary_of_a_causal_layer() -> None:
    calls = [random_call(12, layer=layer) for layer in range(2)]
    sample = sample_of("b s vvvvvv tttt", calls, [grid(2, 3)])
    table = cross_modal_summary(sample)
    assert list(table) == [
        *("sample", "tower", "kind", "layer", "tv_mean", "vt_mean", "vv_mean", "tt_mean"),
        *("most_attended_patch", "image", "row", "col", "video", "frame", "cross_modal_ratio"),
    ]
    row = table.iloc[0]
    assert row["layer"] == 1
    probs = calls[1].probs()[0, :, 8:, 2:8]
    assert row["cross_modal_ratio"] == pytest.approx(float(probs.sum(-1).mean()), abs=1e-6)
    assert row["most_attended_patch"] == int(probs.mean((0, 1)).argmax())
    assert row["tv_mean"] < row["cross_modal_ratio"]
    image_first = sample_of("vvvvvv ttt", [random_call(9)], [grid(2, 3)])
    assert np.isnan(cross_modal_summary(image_first).loc[0, "vt_mean"])


def test_refusals() -> None:
    with pytest.raises(InputError) as caught:
        block_statistics(sample_of("tt", [random_call(2)]))
    assert str(caught.value) == (
        "Sample 'fake' has no image tokens among its 2 positions. Block statistics require a "
        "sample with an image or a video."
    )
    cross = sample_of("tt", [random_call(2)], cross_keys=sample_of("t", []).tokens)
    with pytest.raises(InputError) as caught:
        block_statistics(cross)
    assert str(caught.value) == (
        "A statistic of attention blocks requires image and text tokens in one sequence. In sample "
        "'fake' text attends to the image by cross-attention (layers not kept), where every key is "
        "an image key."
    )
    rows = random_call(4).select_rows(torch.tensor([2, 3]))
    with pytest.raises(NotRecordedError) as caught:
        block_statistics(sample_of("vv tt", [rows], [grid(1, 2)]))
    assert str(caught.value) == (
        "language self-attention, layer 0, call 0 does not hold the query rows 0, 1; it holds "
        "2, 3. Capture again with these queries, or with all."
    )
