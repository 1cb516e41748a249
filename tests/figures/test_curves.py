from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from tests.helpers import synthetic
from tests.helpers.figure_samples import bars, fake, panels, sample_of, titles, words
from xmodal_interp import analysis, figures
from xmodal_interp.errors import InputError

HEADS = pd.DataFrame(
    {"layer": [0, 0, 1, 1], "head": [0, 1, 0, 1], "drop": [0.1, -0.2, np.nan, 0.4]}
)


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Return the points of each line, by label."""
    return {str(line.get_label()): [tuple(p) for p in line.get_xydata()] for line in axes.lines}


def test_a_head_grid_has_the_value_of_each_head() -> None:
    figure = figures.head_grid(HEADS, "drop", label="drop of accuracy")
    axes = figure.axes[0]
    drawn = axes.images[0].get_array()
    np.testing.assert_array_equal(drawn.filled(9), [[0.1, -0.2], [9, 0.4]])
    written = {(t.get_position(), t.get_text()) for t in axes.texts}
    assert written == {((0, 0), "0.10"), ((1, 0), "-0.20"), ((1, 1), "0.40")}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("head", "layer")
    assert bars(figure)[0].get_ylabel() == "drop of accuracy"
    assert (axes.images[0].norm.vmin, axes.images[0].norm.vmax) == (-0.4, 0.4)
    assert "Grey: no value." in words(figure)


def test_amounts_start_at_zero_and_ratios_diverge_at_one() -> None:
    table = HEADS.assign(drop=[1.0, 2, 3, 4])
    amount = figures.head_grid(table, "drop").axes[0].images[0]
    assert (amount.norm.vmin, amount.norm.vmax) == (0, 4)
    ratio = figures.head_grid(table, "drop", meaning="ratio").axes[0].images[0]
    np.testing.assert_allclose(ratio.get_array(), np.log2([[1, 2], [3, 4]]))
    assert (ratio.norm.vmin, ratio.norm.vmax) == (-2, 2)
    close = figures.head_grid(HEADS.assign(drop=[3.0, 3, 3, 4]), "drop").axes[0].images[0]
    assert (close.norm.vmin, close.norm.vmax) == (3, 4)


def test_layer_curves_have_a_dashed_null_model() -> None:
    table = analysis.cross_modal_ratio(sample_of("llava"), by=("layer",))
    figure = figures.layer_curves(table, "ratio", null="null")
    drawn = lines(figure.axes[0])
    assert drawn["ratio"] == list(zip(table["layer"], table["ratio"], strict=True))
    assert [y for _, y in drawn["null model"]] == pytest.approx(table["null"].tolist())
    (null,) = [line for line in figure.axes[0].lines if line.get_label() == "null model"]
    assert null.get_linestyle() == "--"
    assert figure.axes[0].get_legend() is not None


def test_layer_curves_have_a_line_and_an_interval_per_entry() -> None:
    table = HEADS.assign(drop=[1.0, 2, 3, 4], low=[0.5, 1, 2, 3], high=[2.0, 3, 4, 5], even=1.0)
    figure = figures.layer_curves(table, "drop", by="head", null=1.0, interval=("low", "high"))
    axes = figure.axes[0]
    drawn = lines(axes)
    assert drawn["0"] == [(0, 1), (1, 3)]
    assert drawn["1"] == [(0, 2), (1, 4)]
    bands = [c for c in axes.collections if isinstance(c, PolyCollection)]
    assert [band.get_datalim(axes.transData).bounds[1::2] for band in bands] == [(0.5, 3.5), (1, 4)]
    legend = axes.get_legend()
    assert legend is not None
    assert legend.get_title().get_text() == "head"
    assert [text.get_text() for text in legend.get_texts()] == ["0", "1", "null model"]


def test_random_orders_are_drawn_as_mean_and_band() -> None:
    rows = [("increasing", 0, 0.0, 0.9), ("increasing", 0, 1.0, 0.3)]
    rows += [
        ("random", d, s, a) for d, a in ((0, 0.2), (1, 0.4)) for s, a in ((0.0, 0.9), (1.0, a))
    ]
    table = pd.DataFrame(rows, columns=["order", "draw", "share_removed", "accuracy"])
    axes = figures.pruning_curve_plot(table).axes[0]
    drawn = lines(axes)
    assert drawn["increasing"] == [(0, 0.9), (1, 0.3)]
    assert drawn["random, mean and range of 2"] == [(0, 0.9), (1, pytest.approx(0.3))]
    (band,) = axes.collections
    assert band.get_datalim(axes.transData).bounds == pytest.approx((0, 0.2, 1, 0.7))
    assert drawn["nothing removed"][0][1] == 0.9
    assert axes.get_xlabel() == "share of heads removed"


@pytest.mark.parametrize("value", ["lift", "raw"])
def test_positional_profiles_are_weighted_means(value: str) -> None:
    table = analysis.positional_bias(sample_of("llava"), n_bins=8, layers=[0, 1], heads=[0, 5])
    figure = figures.positional_profiles(table, value)
    assert titles(figure) == [
        f"{block} \u2192 {block2}"
        for block, block2 in (("text", "text"), ("text", "image"), ("image", "image"))
        for _ in range(2)
    ]
    rows = table[(table.block == "text->image") & (table.axis == "key") & (table.layer == 1)]
    rows = rows[rows.start == rows.start.iloc[0]]
    expected = np.average(rows[value], weights=rows["n_cells"])
    first = lines(figure.axes[3])["1"][0]
    assert first == pytest.approx(((rows.start.iloc[0] + rows.stop.iloc[0] - 1) / 2, expected))
    null = lines(figure.axes[3])["null model"]
    assert null[0][1] == pytest.approx(1.0 if value == "lift" else rows["null"].mean(), rel=0.02)
    gaps = np.isnan(np.array(lines(figure.axes[0])["1"])[:, 1])
    assert gaps.any()  # no line between the text before the image and the text after it


def test_raster_profiles_have_rows_downwards() -> None:
    samples = [sample_of("llava")]
    table = analysis.raster_profile(samples, control=samples, layers=[0, 3])
    figure = figures.raster_profiles(table)
    down, across = figure.axes
    rows = table[(table.axis == "row") & (table.layer == 0)].groupby("index")["share"].mean()
    assert lines(down)["0"] == [pytest.approx((s, i)) for i, s in rows.items()]
    assert down.get_ylim()[0] > down.get_ylim()[1]
    assert across.get_xlabel() == "column of the image"
    assert [line.get_linestyle() for line in down.lines].count(":") == table.layer.nunique()


def test_rollout_is_drawn_on_the_image() -> None:
    sample = sample_of("qwen2_vl")
    table = analysis.attention_rollout(sample, "red circle", baseline="uniform")
    figure = figures.rollout_overlay(table, sample, power=1)
    assert len(panels(figure)) == 2
    of_first = table[table["query"] == table["query"].min()]
    expected = sample.grid(of_first[of_first["token_kind"] == "image"]["rollout"].to_numpy())
    np.testing.assert_allclose(panels(figure)[0].images[1].get_array(), expected)
    ratio = panels(figures.rollout_overlay(table, sample, "log2_ratio"))[0].images[1]
    log2 = of_first[of_first["token_kind"] == "image"]["log2_ratio"].to_numpy()
    np.testing.assert_allclose(ratio.get_array().ravel(), np.clip(log2, -5, 5), atol=1e-5)
    vision = analysis.attention_rollout(sample_of("llava"), tower="vision")
    seen = figures.rollout_overlay(vision, sample_of("llava"))
    assert titles(seen) == ["image", '"class" (0)']
    with pytest.raises(InputError) as other:
        figures.rollout_overlay(table, fake())
    assert str(other.value) == (
        f"The table has {len(table)} rows, but none for tokens of image 0 of sample 'fake'. Pass a "
        "table that attention_rollout returned for this sample."
    )


def test_rollout_overlay_requires_one_of_several_samples_with_a_name() -> None:
    sample = sample_of("llava")
    table = analysis.attention_rollout([sample, sample])
    with pytest.raises(InputError) as several:
        figures.rollout_overlay(table, sample)
    assert str(several.value) == (
        "The table has several samples named 'sample-0': 'sample-0', 'sample-0 (2)'. Choose one "
        "with table[table['sample'] == 'sample-0'], or give each sample a unique name."
    )
    second = figures.rollout_overlay(table[table["sample"] == "sample-0 (2)"], sample)
    alone = figures.rollout_overlay(analysis.attention_rollout(sample), sample)
    shown = [panels(figure)[0].images[1].get_array() for figure in (second, alone)]
    np.testing.assert_array_equal(*shown)


def test_figures_are_written_to_files(tmp_path: Path) -> None:
    figures.head_grid(HEADS, "drop", path=tmp_path / "grid.svg")
    figures.layer_curves(HEADS[HEADS["head"] == 0], "drop", path=tmp_path / "curve.pdf")
    assert (tmp_path / "grid.svg").read_text().startswith("<?xml")
    assert (tmp_path / "curve.pdf").read_bytes()[:4] == b"%PDF"


def test_errors() -> None:
    with pytest.raises(InputError) as column:
        figures.head_grid(HEADS, "score")
    assert str(column.value) == (
        "A grid of heads requires the columns layer, head, score; missing: score. The table has "
        "layer, head, drop."
    )
    twice = pd.concat([HEADS.assign(sample="a"), HEADS.assign(sample="b", drop=0.3)])
    with pytest.raises(InputError) as several:
        figures.head_grid(twice, "drop")
    assert str(several.value) == (
        "A grid of heads requires one row per layer and head; layer 0, head 0 has 2. Select rows "
        "by sample, or average them: table.groupby(['layer', 'head'], as_index=False)['drop']"
        ".mean()."
    )
    with pytest.raises(InputError) as curve:
        figures.layer_curves(HEADS, "drop")
    assert str(curve.value).startswith(
        "A curve by layer requires one row per layer; layer 0 has 2. Select rows by head, or "
    )
    with pytest.raises(InputError) as empty:
        figures.head_grid(HEADS.head(0), "drop")
    assert str(empty.value) == "The table is empty. A grid of heads requires at least one row."
    with pytest.raises(InputError) as text:
        figures.layer_curves(HEADS.query("head == 0").assign(drop="T-V"), "drop")
    dtype = pd.Series(["T-V"]).dtype  # str in pandas 3, object before
    assert str(text.value) == (
        f"A curve by layer requires a numeric column 'drop'; got dtype {dtype}."
    )
    with pytest.raises(InputError) as nothing:
        figures.head_grid(HEADS.assign(drop=np.nan), "drop")
    assert str(nothing.value) == "The column 'drop' has only NaN. Choose a column with numbers."
    no_image = synthetic.sample_of("btto", [synthetic.random_call(4)])
    with pytest.raises(InputError, match="Sample 'fake' has no image to draw on"):
        figures.token_patch_matrix(no_image)


def test_lifts_diverge_at_one() -> None:
    table = HEADS.assign(lift=[0.9, 1.0, 1.1, 0.95])
    drawn = figures.head_grid(table, "lift")
    image = drawn.axes[0].images[0]
    assert image.norm.vmin == -image.norm.vmax
    assert bars(drawn)[0].get_ylabel() == "lift: times uniform\n(log scale)"
