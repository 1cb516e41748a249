import dataclasses
import inspect
import itertools

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import xmodal_interp as xi
from tests.helpers import synthetic
from tests.helpers.figure_samples import bars, fake, sample_of, titles, words
from tests.helpers.tiny import picture, tiny_vlm
from xmodal_interp import figures
from xmodal_interp.capturing.run import Keep
from xmodal_interp.errors import InputError
from xmodal_interp.figures import matrix_selection
from xmodal_interp.figures.mask_figures import measured, visible_shares
from xmodal_interp.figures.matrix_axes import AxisLabels, draw_matrix, labels_of
from xmodal_interp.figures.scales import scale_of


def test_the_matrix_has_every_visible_cell_and_greys_masked_ones() -> None:
    sample = fake()
    figure = figures.attention_matrix(sample, head=1)
    axes = figure.axes[0]
    drawn = axes.images[0].get_array()
    seen = np.tri(11, dtype=bool)
    np.testing.assert_array_equal(~np.ma.getmaskarray(drawn), seen)  # names fit without widening
    probs = sample.probs(-1, 1)[0].numpy()
    low = axes.images[0].norm.vmin
    np.testing.assert_allclose(drawn[seen], np.maximum(probs[seen], low), rtol=1e-5)
    assert "language layer 0, head 1" in words(figure)
    assert "Grey: hidden by the mask." in words(figure)
    grey = axes.images[0].to_rgba(drawn)[0, 5]
    np.testing.assert_allclose(grey[:3], 0.7, atol=0.01)


def test_text_tokens_have_single_labels_and_images_one_label() -> None:
    sample = sample_of("llava")
    figure = figures.attention_matrix(sample)
    axes = figure.axes[0]
    for names in (axes.get_xticklabels(), axes.get_yticklabels()):
        shown = [label.get_text() for label in names]
        assert shown[:3] == ["<bos>", "user:", "image 0\n144 tokens"]
        assert shown[3:9] == ["What", "color", "is", "the", "red", "circle"]
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(above.y0 > below.y1 - 2 for above, below in itertools.pairwise(boxes))
    hidden_in_row = np.ma.getmaskarray(axes.images[0].get_array()).sum(1)
    heights = np.unique(hidden_in_row, return_counts=True)[1]  # number of drawn rows per token
    assert f"drawn {heights.max()} times as wide" in words(figure)
    blocks = [text.get_text() for text in axes.texts]
    mass = sample.probs(-1)[:, 146:155].mean(0)[:, 2:146].sum(1).mean()
    assert f"text \u2192 image 0: {mass:.0%} of attention" in blocks
    assert "hidden" in blocks


def test_many_short_runs_have_no_lines_and_a_legend() -> None:
    groups = ("special", *["image 0"] * 100, *["text", "special"] * 40)
    labels = AxisLabels(tuple("" if name == "image 0" else "word" for name in groups), groups)
    page = Figure((3, 3))
    axes = page.add_axes((0.3, 0.3, 0.6, 0.6))
    values = np.ones((len(groups), len(groups)))
    draw_matrix(axes, values, labels, labels, scale_of("probability", [values]), (1.8, 1.8))
    assert len(axes.lines) == 8  # two for each end of the image, along both axes
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["special", "text"]


def test_zoom_shows_the_block_of_text_and_image() -> None:
    sample = sample_of("qwen2_vl")
    figure = figures.attention_matrix(sample, 1, 2, zoom="text-image", show="lift")
    text, image = sample.text_after_image(), sample.where("image")
    block = next(a for a in figure.axes if a.get_title().startswith("text after the image"))
    visible = sample.call(1).n_visible(torch.from_numpy(text))[0, 0].numpy()
    lift = sample.probs(1, 2, torch.from_numpy(text), torch.from_numpy(image))[0].numpy()
    drawn = block.images[0].get_array()
    np.testing.assert_allclose(2**drawn, np.clip(lift * visible[:, None], 2**-5, 2**5), rtol=1e-4)
    assert block.get_xlabel() == "tokens of image 0, by its rows (9 x 16)"
    assert len(bars(figure)) == 1


def test_the_token_patch_matrix_has_a_column_per_token_in_raster_order() -> None:
    sample = sample_of("qwen2_vl")
    figure = figures.token_patch_matrix(sample, 0, 3, queries="red circle", show="share")
    axes = figure.axes[0]
    drawn = axes.images[0].get_array()
    assert drawn.shape == (2, 144)
    np.testing.assert_allclose(drawn.sum(1), 1, rtol=1e-5)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["red", "circle"]
    separators = [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1]
    assert separators == list(range(16, 144, 16))


def test_only_recorded_queries_are_drawn() -> None:
    text = xi.capture(tiny_vlm("llava"), picture(), "What color?", keep=Keep(queries="text"))
    figure = figures.attention_matrix(text)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[:2] == ["What", "color"]
    assert "image 0\n144 tokens" not in names


def test_named_tokens_are_widened_only_if_they_fit() -> None:
    few = AxisLabels(("a", *[""] * 500, "b"), ("text", *["image 0"] * 500, "text"))
    assert few.widths(5.0).tolist() == [13, *[1] * 500, 13]  # 0.115 inches of 5 each
    many = AxisLabels(("a",) * 100 + ("",) * 500, ("text",) * 100 + ("image 0",) * 500)
    assert many.widths(5.0).max() == 1
    assert [(run.group, run.stop) for run in many.runs()] == [("text", 100), ("image 0", 600)]
    groups = labels_of(fake().tokens).groups
    assert groups == ("special", "text", *["image 0"] * 6, "text", "text", "generated")


def test_visible_shares_are_computed_from_the_mask() -> None:
    sample = fake()
    view = figures.MatrixSelection(sample)
    shares = visible_shares(view)
    assert shares.loc["image 0", "image 0"] == pytest.approx(7 / 12)
    assert shares.loc["image 0", "generated"] == 0
    assert shares.loc["generated", "image 0"] == 1
    assert measured(view) == (
        "visible: 54.5% of all cells\nvisible keys after the query: text: 0%, image 0: 0%"
    )
    block = torch.ones(11, 11, dtype=torch.bool).tril()
    block[2:8, 2:8] = True  # bidirectional attention within the image, as in Gemma 3
    both_ways = fake(call=synthetic.random_call(11, mask=block[None, None]))
    assert measured(figures.MatrixSelection(both_ways)).endswith("text: 0%, image 0: 100%")
    figure = figures.mask_structure(both_ways)
    drawn = figure.axes[0].images[0].get_array()
    np.testing.assert_array_equal(drawn.astype(bool), block.numpy())
    assert {"58.3%", "100%", "0%"} >= {"100%"} <= {t.get_text() for t in figure.axes[1].texts}


def test_masks_side_by_side_have_visible_shares() -> None:
    sample = sample_of("llava")
    figure = figures.mask_comparison(
        {
            "VLM": sample,
            "ViT": figures.MatrixSelection(sample, tower="vision"),
            "cross": sample_of("mllama").call(1, kind="cross"),
        }
    )
    assert titles(figure) == [
        "VLM\nlanguage layer 0",
        "ViT\nvision layer 2",
        "cross\nlanguage cross-attention layer 1",
    ]
    shares = "visible: 100.0% of all cells\nvisible keys after the query: image 0: 100%"
    assert figure.axes[1].get_xlabel() == f"key\n{shares}"


@pytest.mark.parametrize("shared", [True, False])
def test_towers_side_by_side_note_whether_they_share_a_scale(shared: bool) -> None:
    sample, bare = fake(), synthetic.random_call(5, tower="vision", causal=False)
    named = figures.MatrixSelection(
        bare, head=0, query_names=list("abcde"), key_names=list("vwxyz")
    )
    figure = figures.side_by_side({"VLM": sample, "ViT": bare, "one head": named}, shared=shared)
    matrices = [axes for axes in figure.axes if axes.get_title()]
    assert titles(figure)[2] == "one head\nvision layer 0, head 0"
    assert len({id(axes.images[0].norm) for axes in matrices}) == (1 if shared else 3)
    assert len(bars(figure)) == (1 if shared else 3)
    said = "One colour scale for all" if shared else "Each panel has its own colour scale"
    assert said in words(figure)
    assert [label.get_text() for label in matrices[2].get_xticklabels()] == list("vwxyz")


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    for call, message in (
        (
            lambda: inspect.unwrap(figures.attention_matrix)(fake(), zoom="all"),
            "zoom must be 'text-image' or None; got 'all'.",
        ),
        (
            lambda: inspect.unwrap(figures.attention_matrix)(fake(), show="share"),
            "show must be one of probability, lift; got 'share'.",
        ),
        (
            lambda: figures.attention_matrix(sample_of("mllama"), zoom="text-image"),
            "zoom is not available for kind='self': the text of sample 'sample-0' attends to image "
            "tokens by cross-attention. Pass kind='cross'.",
        ),
        (
            lambda: figures.side_by_side({}),
            "sources must be a mapping from titles to samples, calls or selections, such as "
            "{'before': sample}; got an empty one.",
        ),
        (
            lambda: figures.side_by_side(
                {"x": figures.MatrixSelection(synthetic.random_call(3), key_names=["a"])}
            ),
            "key_names must have 3 names, one per key of language self-attention, layer 0, call 0; "
            "got 1.",
        ),
    ):
        with pytest.raises(InputError) as error:
            call()
        assert str(error.value) == message
    causal = torch.ones(11, 11, dtype=torch.bool).tril()
    masks = torch.stack([causal, causal, causal, torch.eye(11, dtype=torch.bool)])[None]
    differing = fake(call=dataclasses.replace(synthetic.random_call(11), mask=masks))
    with pytest.raises(InputError) as heads:
        figures.mask_structure(differing)
    assert str(heads.value) == (
        "The heads of language self-attention, layer 0, call 0 have different masks and cannot be "
        "averaged. Choose one with head=."
    )
    alone = figures.mask_structure(differing, head=3).axes[0].images[0].get_array()
    np.testing.assert_array_equal(alone, np.eye(11))
    monkeypatch.setattr(matrix_selection, "MOST_CELLS", 100)
    with pytest.raises(InputError) as size:
        figures.attention_matrix(fake())
    assert str(size.value) == (
        "language self-attention, layer 0, call 0 has 11 queries and 11 keys, more than the 100 "
        "cells that can be drawn. Record fewer queries, or draw token_patch_matrix or an overlay."
    )
