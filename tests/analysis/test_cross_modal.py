"""The cross-modal ratio: worked examples, slow replicas and refusals."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

import xmodal_interp as xi
from tests.helpers.replicas import ratio_of_a_query
from tests.helpers.synthetic import (
    captured,
    dense_call,
    grid,
    random_call,
    sample_of,
    shipped,
    uniform_call,
)
from xmodal_interp.analysis import cross_modal_ratio, token_ratio
from xmodal_interp.attention import AttentionCall
from xmodal_interp.errors import InputError, LayerError, NotRecordedError
from xmodal_interp.sample import Sample

VALUES = ["ratio", "null", "lift", "sink_free_ratio", "sink_free_lift"]


def worked_example() -> Sample:
    """BOS, two image tokens, two words."""
    matrix = [
        [1.0, 0.0, 0.0, 0.0, 0.0],
        [0.5, 0.5, 0.0, 0.0, 0.0],
        [0.4, 0.3, 0.3, 0.0, 0.0],
        [0.5, 0.1, 0.3, 0.1, 0.0],
        [0.2, 0.2, 0.2, 0.2, 0.2],
    ]
    return sample_of("b vv tt", [dense_call(matrix)], [grid(1, 2)])


def test_worked_example_of_five_positions() -> None:
    tokens = token_ratio(worked_example())
    assert list(tokens) == [
        *("sample", "tower", "kind", "direction", "layer", "head", "query", "token"),
        *(*VALUES, "n_image_tokens", "n_sinks"),
    ]
    assert tokens["query"].tolist() == [3, 4]
    assert tokens["token"].tolist() == ["t3", "t4"]
    assert tokens["direction"].unique().tolist() == ["text->image"]
    assert tokens["ratio"].tolist() == pytest.approx([0.4, 0.4])
    assert tokens["null"].tolist() == pytest.approx([2 / 4, 2 / 5])
    assert tokens["lift"].tolist() == pytest.approx([0.8, 1.0])
    assert tokens["sink_free_ratio"].tolist() == pytest.approx([0.4 / 0.5, 0.4 / 0.8])
    assert tokens["sink_free_lift"].tolist() == pytest.approx([0.8 / (2 / 3), 0.5 / (2 / 4)])
    row = cross_modal_ratio(worked_example()).iloc[0]
    assert row[VALUES].tolist() == pytest.approx([0.4, 0.45, 0.9, 0.65, 1.1])
    assert row[["n_queries", "n_image_tokens", "n_sinks"]].tolist() == [2, 2, 1]


def test_cell_by_cell() -> None:
    calls = [random_call(12, layer=layer) for layer in range(2)]
    sample = sample_of("b s vvvvvv tttt", calls, [grid(2, 3)])
    table = token_ratio(sample, sink_threshold=1.0)
    for row in table.itertuples():
        probs = calls[row.layer].probs()[0, row.head, row.query].numpy()
        visible, image = np.arange(12) <= row.query, range(2, 8)
        expected = ratio_of_a_query(probs, visible, image)
        assert (row.ratio, row.null, row.lift) == pytest.approx(expected, abs=1e-6)
        free, _, free_lift = ratio_of_a_query(probs, visible, image, sinks=[0])
        assert (row.sink_free_ratio, row.sink_free_lift) == pytest.approx((free, free_lift), 1e-5)
    means = table.groupby(["layer", "head"])[VALUES].mean()
    np.testing.assert_allclose(cross_modal_ratio(sample, sink_threshold=1.0)[VALUES], means)


def test_sinks_are_detected_and_excluded_per_head() -> None:
    n = 24
    quiet = torch.full((n, n), 1.0).tril()
    loud = quiet.clone()
    loud[:, 5] += 20.0 * (torch.arange(n) >= 5)
    matrix = torch.stack([quiet, loud])
    sample = sample_of(
        "b" + "v" * 16 + "t" * 7, [dense_call(matrix / matrix.sum(-1, keepdim=True))], [grid(4, 4)]
    )
    table = cross_modal_ratio(sample)
    assert table["n_sinks"].tolist() == [1, 2]
    assert table["lift"][1] > 1.1
    assert table["sink_free_lift"].tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_uniform_attention_has_lift_one() -> None:
    mask = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    mask[..., 3] = False
    for options in ({}, {"causal": False}, {"sliding_window": 6}, {"mask": mask}):
        sample = sample_of("b s vvvvvv tttt", [uniform_call(12, **options)], [grid(2, 3)])
        table = token_ratio(sample)
        assert table["lift"].dropna().to_numpy() == pytest.approx(1.0, abs=1e-6)
        assert table["sink_free_lift"].dropna().to_numpy() == pytest.approx(1.0, abs=1e-6)
        assert table["ratio"].dropna().between(0, 1).all()


def test_null_of_a_llava_layout() -> None:
    """35 text, 576 image, 20 text: 0.927 over text that sees the image (0.337 over all text)."""
    sample = sample_of("b" + "s" * 34 + "v" * 576 + "t" * 20, [uniform_call(631)], [grid(24, 24)])
    assert cross_modal_ratio(sample)["null"].tolist() == pytest.approx([0.927] * 2, abs=5e-4)
    every = cross_modal_ratio(sample, queries=[*range(35), *range(611, 631)])
    assert every["null"].tolist() == pytest.approx([0.927] * 2, abs=5e-4)
    assert every["n_queries"].tolist() == [20, 20]


def test_worked_example_with_explicit_scores() -> None:
    """Two image and two text tokens; scores are already divided by sqrt(d_k)."""
    scores = torch.tensor(
        [[1.2, 0.8, 0.3, 0.1], [0.7, 1.5, 0.2, 0.4], [0.9, 1.8, 2.1, 0.5], [0.3, 0.4, 0.8, 1.9]]
    )

    def asked(*, causal: bool, scaling: float) -> tuple[list[float], float]:
        call = xi.AttentionCall(
            tower="language",
            kind="self",
            layer=0,
            module="",
            call=0,
            q=scores[None, None],
            k=torch.eye(4)[None, None],
            scaling=scaling,
            causal=causal,
        )
        table = token_ratio(sample_of("vv tt", [call], [grid(1, 2)]), queries=[2])
        return call.probs()[0, 0, 2].tolist(), table["ratio"].iloc[0]

    row, ratio = asked(causal=False, scaling=1.0)
    assert row == pytest.approx([0.1342, 0.3301, 0.4457, 0.0900], abs=5e-5)
    assert ratio == pytest.approx(0.464, abs=5e-4)
    row, ratio = asked(causal=False, scaling=0.5)  # divided by sqrt(4) a second time
    assert row == pytest.approx([0.1920, 0.3011, 0.3498, 0.1572], abs=5e-5)
    assert ratio == pytest.approx(0.493, abs=5e-4)
    row, ratio = asked(causal=True, scaling=1.0)
    assert row[3] == 0.0
    assert ratio == pytest.approx(0.510, abs=5e-4)
    assert asked(causal=True, scaling=0.5)[1] == pytest.approx(0.585, abs=5e-4)


def test_text_before_the_image_is_nan_not_zero() -> None:
    sample = sample_of("ss vv tt", [random_call(6)], [grid(1, 2)])
    tokens = token_ratio(sample, queries=[0, 4])
    early = tokens[tokens["query"] == 0]
    assert early["ratio"].isna().all()
    assert early["lift"].isna().all()
    assert cross_modal_ratio(sample, queries=[0, 4])["n_queries"].unique().tolist() == [1]


def test_a_layer_whose_window_does_not_reach_the_image_is_nan() -> None:
    calls = [random_call(8), random_call(8, layer=1, sliding_window=2)]
    sample = sample_of("vv tttttt", calls, [grid(1, 2)])
    table = cross_modal_ratio(sample, queries=[6, 7], by=("layer",))
    assert table["n_queries"].tolist() == [2, 0]
    assert table["ratio"].notna().tolist() == [True, False]


def test_table_is_averaged_over_axes_that_are_not_in_by() -> None:
    calls = [random_call(9, layer=layer) for layer in range(3)]
    sample = sample_of("b vvvv tttt", calls, [grid(2, 2)])
    full = cross_modal_ratio(sample)
    for by in (("layer",), ("head",)):
        table = cross_modal_ratio(sample, by=by)
        expected = full.groupby(list(by))["ratio"].mean()
        assert table.set_index(list(by))["ratio"].to_numpy() == pytest.approx(expected.to_numpy())
    assert cross_modal_ratio(sample, by=())["ratio"].tolist() == pytest.approx(
        [full["ratio"].mean()]
    )


def test_sink_columns_are_nan_with_too_few_rows() -> None:
    call = random_call(24)
    for n_kept, known in ((7, False), (8, True)):
        rows = call.select_rows(torch.arange(24 - n_kept, 24))
        sample = sample_of("b" + "v" * 12 + "t" * 11, [rows], [grid(3, 4)])
        table = cross_modal_ratio(sample, queries=[22, 23])
        columns = ["sink_free_ratio", "sink_free_lift", "n_sinks"]
        assert table[columns].notna().all(axis=None) == known
        assert table[columns].isna().all(axis=None) != known
        assert table["ratio"].notna().all()


def test_one_image_of_several_and_the_last_position() -> None:
    sample = sample_of("b vv s vv tt", [random_call(8)], [grid(1, 2), grid(2, 1)])
    both = cross_modal_ratio(sample, queries="last")
    apart = [cross_modal_ratio(sample, queries=[-1], image=i) for i in (0, 1)]
    total = apart[0]["ratio"] + apart[1]["ratio"]
    assert both["ratio"].tolist() == pytest.approx(total.tolist())
    assert apart[1]["n_image_tokens"].unique().tolist() == [2]


def test_many_samples_and_their_provenance() -> None:
    samples = [
        sample_of("b vv tt", [random_call(5)], [grid(1, 2)], name=name, provenance=about)
        for name, about in (("a", {"model": "x"}), ("b", {"model": "y"}), ("c", {"model": "x"}))
    ]
    table = cross_modal_ratio(samples, layers=-1, heads=[0, -1])
    assert table["sample"].tolist() == ["a", "a", "b", "b", "c", "c"]
    assert table["head"].tolist() == [0, 3] * 3
    assert json.loads(json.dumps(table.attrs)) == table.attrs
    assert table.attrs["n_samples"] == 3
    assert table.attrs["provenance"] == [{"model": "x"}, {"model": "y"}]
    assert table.attrs["parameters"] == {
        "queries": "at.text",
        "layers": -1,
        "heads": [0, -1],
        "image": None,
        "kind": "self",
        "sink_threshold": 0.3,
        "by": ["layer", "head"],
    }


def two_images_by_cross_attention() -> Sample:
    keys = pd.DataFrame({"kind": ["image"] * 6, "image": [0, 0, 0, 0, 1, 1]})
    cross = random_call(3, kind="cross", causal=False)
    cross = xi.AttentionCall(**{**vars(cross), "k": torch.randn(1, 2, 6, 8)})
    return sample_of("btt", [random_call(3), cross], [grid(2, 2), grid(1, 2)], cross_keys=keys)


def test_cross_attention_shares_among_images() -> None:
    sample = two_images_by_cross_attention()
    shares = [cross_modal_ratio(sample, kind="cross", image=i) for i in (0, 1)]
    assert (shares[0]["ratio"] + shares[1]["ratio"]).tolist() == pytest.approx([1.0] * 4)
    assert shares[0]["null"].tolist() == pytest.approx([4 / 6] * 4)
    assert shares[0]["n_sinks"].tolist() == [0] * 4


def refusal(error: type[Exception], sample: object, **options: object) -> str:
    with pytest.raises(error) as caught:
        cross_modal_ratio(sample, **options)
    return str(caught.value)


def test_refusals_with_cross_attention() -> None:
    sample = two_images_by_cross_attention()
    assert refusal(InputError, sample) == (
        "The ratio of self-attention requires image and text tokens in one sequence. In sample "
        "'fake' text attends to the image by cross-attention (layers 0), where every key is an "
        "image key."
    )
    assert refusal(InputError, sample, kind="cross") == (
        "With kind='cross' and image=None the ratio of sample 'fake' (2 images) is always 1, "
        "because every key of a cross-attention is an image key. Pass image= for a sample with "
        "several images."
    )
    two = sample_of("b vv vv t", [random_call(6)], [grid(1, 2), grid(1, 2)])
    assert refusal(NotRecordedError, two, kind="cross", image=0) == (
        "Sample 'fake' holds no language cross-attention; it holds: language self. Capture that "
        "tower, or choose another."
    )


def test_refusals() -> None:
    assert refusal(InputError, worked_example(), by=("token",)) == (
        "by must contain only 'layer' and 'head'; got ('token',)."
    )
    assert refusal(InputError, worked_example(), queries=[2, 3]) == (
        "Positions [2] of sample 'fake' are image tokens, but queries must be text (the direction "
        "is text->image). Use block_statistics for image queries."
    )
    assert refusal(InputError, worked_example(), image=3) == (
        "Sample 'fake' has no tokens of image 3; it has 1 images, numbered from 0."
    )
    assert refusal(InputError, worked_example(), sink_threshold=0.0) == (
        "threshold must be above 0 and at most 1; got 0.0."
    )
    assert refusal(LayerError, worked_example(), heads=[4]) == (
        "A head must lie between -1 and 0; got 4. (language self-attention, layer 0, call 0)"
    )
    assert refusal(InputError, []) == "cross_modal_ratio requires at least one sample; got none."
    late = sample_of("tt vv", [random_call(4)], [grid(1, 2)])
    assert refusal(InputError, late) == (
        "at.text selects text after the last image token; sample 'fake' has no such text. "
        "Choose other positions, or put the question after the image."
    )
    assert refusal(InputError, late, queries=[0, 1]) == (
        "None of the queries [0, 1] of sample 'fake' sees the image in any chosen layer. Choose "
        "queries after the image."
    )
    blind = sample_of("tt", [random_call(2, layer=1)])
    assert refusal(InputError, blind) == (
        "Sample 'fake' has no image tokens; it has 0 images, numbered from 0."
    )


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_of_a_model(family: str) -> None:
    sample = captured(family)
    table = cross_modal_ratio(sample)
    image = torch.from_numpy(sample.where("image"))
    text = torch.from_numpy(sample.text_after_image())
    for layer in sample.layers():
        slow = sample.probs(layer, queries=text, keys=image).sum(-1).mean(-1)
        assert table.loc[table["layer"] == layer, "ratio"].tolist() == pytest.approx(
            slow.tolist(), abs=1e-5
        )
    words = token_ratio(sample, queries="red circle", layers=-1)
    assert words["token"].unique().tolist() == ["red", "circle"]


def test_of_the_shipped_model() -> None:
    sample = shipped()
    table = cross_modal_ratio(sample)
    assert len(table) == len(sample.layers()) * sample.call(0).n_heads
    assert table["ratio"].between(0, 1).all()
    assert table["sink_free_ratio"].between(0, 1).all()
    assert table["lift"].gt(0).all()


@pytest.mark.parametrize("analysis", [cross_modal_ratio, token_ratio])
def test_without_a_threshold_no_sinks_are_searched_for(analysis, monkeypatch) -> None:
    sample = shipped()
    whole = analysis(sample)
    monkeypatch.setattr(AttentionCall, "received", None)
    table = analysis(sample, sink_threshold=None)
    left_out = ["sink_free_ratio", "sink_free_lift", "n_sinks"]
    pd.testing.assert_frame_equal(table, whole.drop(columns=left_out))
    assert table.attrs["parameters"]["sink_threshold"] is None
