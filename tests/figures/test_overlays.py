import dataclasses
import inspect
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch

import xmodal_interp as xi
from tests.helpers import synthetic
from tests.helpers.figure_samples import bars, fake, panels, sample_of, titles, words
from tests.helpers.real import real, settled
from tests.helpers.tiny import QUESTION, picture
from xmodal_interp import figures
from xmodal_interp.errors import GeometryError, InputError, LayerError
from xmodal_interp.figures.placement import placed_image
from xmodal_interp.figures.scales import check_show, color_scale
from xmodal_interp.figures.style import panel_name
from xmodal_interp.sample import Sample


def test_an_overlay_has_titles_a_note_and_a_colour_bar() -> None:
    sample = sample_of("llava")
    figure = figures.overlay(sample, "red circle", layer=1, head=2)
    assert titles(figure) == ["image", '"red circle"']
    assert f'"{sample.question}" \u2192 "{sample.answer}"' in words(figure)
    assert "language layer 1, head 2" in words(figure)
    assert "One cell per image token (nearest); hatched: no image token there." in words(figure)
    (bar,) = bars(figure)
    assert bar.get_ylabel() == "attention probability"
    (root,) = bars(figures.overlay(sample, "red circle", power=0.5))
    assert root.get_ylabel() == "attention probability\n(square-root scale)"
    smooth = figures.overlay(sample, "red circle", smooth=True)
    assert "Interpolated between image tokens (bilinear)" in words(smooth)
    assert panels(smooth)[0].images[1].get_interpolation() == "bilinear"


def test_an_overlay_draws_the_probabilities_of_the_sample() -> None:
    sample = sample_of("qwen2_vl")
    drawn = panels(figures.overlay(sample, "red circle", 1, 2))[0].images[1].get_array()
    probs = sample.probs(1, 2, "red circle", sample.where("image"))[0].mean(0)
    np.testing.assert_allclose(drawn, sample.grid(probs), rtol=1e-4)


@pytest.mark.parametrize("show", ["probability", "share", "lift"])
def test_all_panels_have_one_scale_and_one_bar(show: str) -> None:
    sample = fake()
    for figure, n in (
        (figures.overlays(sample, [8, 9], show=show), 2),
        (figures.head_overlays(sample, [8, 9], heads=[0, 2], show=show), 3),
        (figures.layer_overlays(sample, 9, [0, 0], show=show), 2),
        (figures.token_head_grid(sample, [8, 9], show=show), 10),
    ):
        norms = {id(axes.images[1].norm) for axes in panels(figure)}
        assert (len(panels(figure)), len(norms), len(bars(figure))) == (n, 1, 1)
        if show != "lift":
            largest = max(float(axes.images[1].get_array().max()) for axes in panels(figure))
            assert panels(figure)[0].images[1].norm.vmax == pytest.approx(largest)


def test_overlay_grids_have_a_panel_per_pair_of_facets() -> None:
    sample = sample_of("qwen2_vl")
    image = sample.where("image")
    figure = figures.overlay_grid(sample, "red", None, [1, 3], rows="layer", columns="head")
    drawn = [axes.images[1].get_array() for axes in panels(figure)]
    assert titles(figure) == ["head 1", "head 3", "mean"]
    assert [axes.get_ylabel() for axes in panels(figure)[::3]] == [f"layer {i}" for i in range(4)]
    assert '"red", layer by layer, head by head' in words(figure)
    for layer in range(4):
        probs = sample.probs(layer, [1, 3], "red", image)[:, 0]
        for cells, expected in zip(drawn[3 * layer :], (*probs, probs.mean(0)), strict=False):
            np.testing.assert_allclose(cells, sample.grid(expected), rtol=1e-4)
    alone = figures.overlay_grid(sample, ["red", "circle"], [0], 3, rows="query", columns=None)
    assert [axes.get_ylabel() for axes in panels(alone)] == ['"red"', '"circle"']
    for facets, message in (
        (
            {"rows": "head", "columns": "head"},
            "rows and columns must be two of query, layer, head, sample, or None; got 'head' and "
            "'head'.",
        ),
        ({"layers": [0, 1]}, "Without the facet 'layer', layers must be one layer; got [0, 1]."),
    ):
        with pytest.raises(InputError) as error:
            figures.overlay_grid(sample, "red", **facets)
        assert str(error.value) == message


def test_grids_over_samples_draw_each_map_on_the_image_of_its_sample() -> None:
    samples = {"one": sample_of("llava"), "two": sample_of("qwen2_vl")}
    figure = figures.overlay_grid(samples, "red", None, rows="layer", columns="sample")
    alone = [axes for axes in figure.axes if len(axes.images) == 1 and axes not in bars(figure)]
    assert [axes.get_title() for axes in alone] == ["one", "two"]
    assert [axes.images[0].get_size() for axes in alone] == [(96, 160), (72, 128)]
    assert [axes.get_ylabel() for axes in panels(figure)[::2]] == [f"layer {i}" for i in range(4)]
    for i, axes in enumerate(panels(figure)):
        sample = list(samples.values())[i % 2]
        probs = sample.probs(i // 2, None, "red", sample.where("image"))[:, 0].mean(0)
        np.testing.assert_allclose(axes.images[1].get_array(), sample.grid(probs), rtol=1e-4)
        assert axes.images[0].get_size() == samples["two" if i % 2 else "one"].images[0].size[::-1]
    assert len({id(axes.images[1].norm) for axes in panels(figure)}) == len(bars(figure)) == 1
    assert "2 samples" in words(figure)
    assert "hatched: no image token there" in words(figure)  # of LLaVA's crop


def test_grids_over_samples_have_the_image_in_front_of_each_row() -> None:
    samples = {"one": fake(), "two": fake(rows=3, cols=2)}
    figure = figures.overlay_grid(samples, 9, [0], [0, 2], rows="sample", columns="head")
    assert titles(figure) == ["image", "head 0", "head 2", "mean"]
    first = [axes for axes in figure.axes if axes.get_ylabel() in samples]
    assert [axes.images[0].get_size() for axes in first] == [(20, 30), (30, 20)]
    assert [axes.images[1].get_array().shape for axes in panels(figure)] == [(2, 3)] * 3 + [
        (3, 2)
    ] * 3
    tokens = figures.overlay_grid(samples, [8, 9], [0], rows="sample", columns="query")
    for i, axes in enumerate(panels(tokens)):
        sample = list(samples.values())[i // 2]
        probs = sample.probs(0, None, [8 + i % 2], sample.where("image"))[:, 0].mean(0)
        np.testing.assert_allclose(axes.images[1].get_array(), sample.grid(probs), rtol=1e-4)


def test_grids_over_samples_refuse_one_sample_and_different_entries() -> None:
    one = sample_of("llava")
    with pytest.raises(InputError) as single:
        figures.overlay_grid(one, "red", columns="sample")
    assert str(single.value).startswith(
        "With the facet 'sample', sample must be a mapping from titles to samples, such as "
        "{'before': sample}; got Sample("
    )
    with pytest.raises(InputError) as empty:
        figures.overlay_grid({}, "red", columns="sample")
    assert str(empty.value).endswith("got {}.")
    with pytest.raises(InputError) as many:
        figures.overlay_grid({"a": one}, "red")
    assert str(many.value) == "sample must be one Sample, such as store[0]; got a dict."
    other = fake()
    names = [panel_name(each, [len(each) - 2]) for each in (one, other)]
    for facet, options, message in (
        (
            "layer",
            {"queries": slice(8, 10), "layers": None},
            "layer: 'a' has layer 0, layer 1, layer 2, layer 3; 'b' has layer 0. Choose layers=",
        ),
        (
            "head",
            {"queries": 9, "layers": [0], "heads": [-1]},
            "head: 'a' has head 7; 'b' has head 3. Choose heads=",
        ),
        (
            "query",
            {"queries": [-2], "layers": [0]},
            f"query: 'a' has {names[0]}; 'b' has {names[1]}. Choose queries=",
        ),
    ):
        with pytest.raises(InputError) as error:
            figures.overlay_grid({"a": one, "b": other}, rows=facet, columns="sample", **options)
        assert str(error.value) == (
            f"All samples must have the same panels by {message} that give the same panels."
        )


def test_the_title_of_a_grid_over_samples_names_what_differs() -> None:
    samples = {"a": sample_of("llava"), "b": fake()}
    figure = figures.overlay_grid(samples, [-1], rows="sample", columns=None)
    said = words(figure).replace("\n", " ")
    assert "2 samples" in said
    assert "language layer 3 / language layer 0, mean of 8 heads / mean of 4 heads" in said


def test_masked_tokens_are_transparent_not_zero() -> None:
    figure = figures.overlays(fake(), [1, 4, 9])
    hidden, some, none = (axes.images[1] for axes in panels(figure))
    assert [np.ma.count_masked(drawn.get_array()) for drawn in (hidden, some, none)] == [6, 3, 0]
    assert "hidden by the mask" in [text.get_text() for text in panels(figure)[0].texts]
    alpha = some.to_rgba(some.get_array())[..., 3]
    assert (alpha[np.ma.getmaskarray(some.get_array())] == 0).all()


def test_neutral_lifts_are_transparent_and_lifts_below_one_are_blue() -> None:
    lift = panels(figures.overlay(fake(), 9, show="lift"))[0].images[1]
    red, _, blue, alpha = lift.cmap(lift.norm([-2.0, 0.0, 2.0])).T
    assert blue[0] > red[0]
    assert red[2] > blue[2]
    assert alpha[1] < 0.05 < alpha[0]
    assert lift.norm.vmin == -lift.norm.vmax


def test_true_boxes_are_drawn_in_pixels_and_named_once() -> None:
    sample = sample_of("qwen2_vl")
    figure = figures.overlays(sample, ["red", "circle"], boxes={"circle": (10, 20, 40, 60)})
    image, *maps = [axes for axes in figure.axes if axes.images and not hasattr(axes, "_colorbar")]
    for axes in (image, *maps):
        outline = [patch for patch in axes.patches if not patch.get_fill()]
        assert [patch.get_bbox().extents.tolist() for patch in outline] == [[10, 20, 40, 60]]
    assert [text.get_text() for text in image.texts] == ["circle"]
    assert all(not axes.texts for axes in maps)


def test_boxes_in_every_form_are_drawn() -> None:
    sample, two = sample_of("qwen2_vl"), [[10, 20, 40, 60], [50, 5, 70, 30]]
    keys = ("xmin", "ymin", "xmax", "ymax")
    forms = [two, np.array(two), [dict(zip(keys, box, strict=True)) for box in two], {"a": two}]
    for form in forms:
        first = panels(figures.overlay(sample, "red", boxes=form))[0]
        outline = [patch for patch in first.patches if not patch.get_fill()]
        assert [patch.get_bbox().extents.tolist() for patch in outline] == two
    with pytest.raises(InputError) as refusal:
        figures.overlay(sample, "red", boxes=[(0.1, 0.2, 0.5, 0.75)])
    assert str(refusal.value) == (
        "The box [0.1, 0.2, 0.5, 0.75] lies within 1.5 units of 'px', as fractions of an image do. "
        "Read fractions with xi.boxes.read(box, 'xyxy 0..1', size=(width, height))."
    )


def sunk() -> Sample:
    """Return a sample whose third image token receives most attention of all later queries."""
    matrix = torch.ones(18, 18).tril()
    matrix[:, 4] *= 60
    matrix /= matrix.sum(1, keepdim=True)
    call = synthetic.dense_call(matrix)
    return fake("bs" + "v" * 6 + "t" * 10, call=call)


def test_sinks_are_left_out_of_colours_and_scale() -> None:
    sample = sunk()
    plain = panels(figures.overlay(sample, 10))[0].images[1]
    figure = figures.overlay(sample, 10, hide="sinks")
    hidden = panels(figure)[0].images[1]
    assert np.argwhere(np.ma.getmaskarray(hidden.get_array())).tolist() == [[0, 2]]
    assert hidden.norm.vmax < plain.get_array().max() / 10
    assert "\u00d7: 1 left out." in words(figure)
    (cross,) = panels(figure)[0].lines
    assert np.ravel(cross.get_xydata()).tolist() == [25.0, 5.0]
    explicit = panels(figures.overlay(sample, 10, hide=[4]))[0].images[1]
    np.testing.assert_array_equal(explicit.get_array(), hidden.get_array())
    assert "nothing to leave out" in words(figures.overlay(fake(spread=0.0), 9, hide="sinks"))


def test_cross_attention_is_drawn_on_the_image() -> None:
    figure = figures.overlay(sample_of("mllama"), "red circle")
    assert "language cross-attention layer 3, mean of 8 heads" in words(figure)


def test_before_and_after_share_a_scale_and_the_change_has_its_own() -> None:
    before, after = fake(spread=0.5), fake(spread=3.0)
    figure = figures.before_after(before, after, 9, boxes=[(0, 0, 10, 10)])
    first, second, change = (axes.images[1] for axes in panels(figure))
    assert titles(figure) == ["image", 'before: "so"', 'after: "so"', "after - before"]
    assert first.norm is second.norm
    assert change.norm is not first.norm
    np.testing.assert_allclose(change.get_array(), second.get_array() - first.get_array())
    assert change.norm.vmin == -change.norm.vmax
    assert len(bars(figure)) == 2
    ratio = panels(figures.before_after(before, after, 9, show="lift"))[2].images[1]
    expected = np.log2(second.get_array() / first.get_array())
    np.testing.assert_allclose(ratio.get_array(), np.clip(expected, -5, 5), atol=1e-5)
    with pytest.raises(GeometryError) as other:
        figures.before_after(fake(), sample_of("llava"), [8, 150])
    assert str(other.value) == (
        "The samples differ in their image tokens: before has 2 x 3 tokens on 30 x 20 px, after "
        "has 12 x 12 on 160 x 96 px. Pass samples of the same image, made with the same processor "
        "settings."
    )


def test_maps_of_tokens_and_of_patches() -> None:
    sample = sample_of("qwen2_vl")
    grid = placed_image(sample).grid
    tokens = np.arange(len(grid.places), dtype=float)
    figure = figures.map_overlays(
        sample, {"flat": tokens, "grid": sample.grid(tokens)}, "relevance", power=1
    )
    flat, square = (axes.images[1].get_array() for axes in panels(figure))
    np.testing.assert_array_equal(flat, square)
    assert bars(figure)[0].get_ylabel() == "relevance"
    patches = np.arange(len(grid.patch_places), dtype=float)
    finer = panels(figures.map_overlays(sample, {"p": patches}, "x", meaning="difference"))
    assert finer[0].images[1].get_array().shape == (grid.patch_rows, grid.patch_cols)
    with pytest.raises(GeometryError) as shape:
        figures.map_overlays(sample, {"p": np.zeros(7)}, "x")
    assert str(shape.value) == (
        "A map of shape (7,) fits no grid of image 0. The image has 144 tokens (9 x 16) and 576 "
        "vision positions (18 x 32)."
    )
    with pytest.raises(InputError) as meaning:
        inspect.unwrap(color_scale)("sum", [tokens], "x")
    assert str(meaning.value) == "meaning must be one of amount, difference, ratio; got 'sum'."


def test_patch_overlays_use_the_patch_at_the_point() -> None:
    sample = sample_of("llava")
    figure = figures.patch_overlays(sample, [(33.0, 1.0)], layer=0)
    (axes,) = panels(figure)
    (outline,) = [patch for patch in axes.patches if not patch.get_fill()]
    assert outline.get_bbox().extents.tolist() == pytest.approx([32, 0, 40, 8])
    probs = sample.probs(0, None, [1], tower="vision")[:, 0].mean(0)  # 0 is the class token
    np.testing.assert_allclose(axes.images[1].get_array(), sample.grid(probs), rtol=1e-4)
    with pytest.raises(GeometryError) as outside:
        figures.patch_overlays(sample, [(5, 5)])
    assert str(outside.value) == (
        "No patch of image 0 covers the point (5, 5). Patches cover x 32 to 128 and y 0 to 96 px."
    )


def test_figures_are_displayed_and_saved_without_changing_settings(tmp_path: Path) -> None:
    settings = dict(mpl.rcParams)
    path = tmp_path / "new" / "overlay.png"
    figure = figures.overlay(fake(), 9, path=path)
    assert path.read_bytes()[:4] == figure._repr_png_()[:4] == b"\x89PNG"
    figure.savefig(tmp_path / "overlay.pdf")
    assert dict(mpl.rcParams) == settings


def test_special_characters_of_tokens_are_drawn_literally() -> None:
    sample = fake()
    strange = sample.tokens.assign(token=["$x$"] * 8 + ["a$b$", "\n", "\u0120so"])
    strange["kind"] = strange["kind"].mask(strange.index >= 8, "special")
    odd = dataclasses.replace(sample, tokens=strange, question="$5 or $6?")
    figure = figures.overlays(odd, [8, 9, 10])
    assert titles(figure)[1:] == [r'"a\$b\$"', '"\u21b5"', '"so" (answer)']
    figure.draw_without_rendering()


def test_errors() -> None:
    sample = fake()
    for bad, message in (
        ({"vmax": 0}, "vmax must be above 0 for a probability; got 0."),
        ({"show": "lift", "vmax": 1}, "vmax must be above 1 for a lift; got 1."),
        ({"power": 2}, "power must be between 0 (a log scale) and 1 (linear); got 2."),
        (
            {"hide": [1, 3]},
            "hide holds positions that are not tokens of image 0: 1. Its tokens are among the "
            "positions 2 to 7.",
        ),
    ):
        with pytest.raises(InputError) as error:
            figures.overlay(sample, 9, **bad)
        assert str(error.value) == message
    with pytest.raises(LayerError) as layer:
        figures.overlay(sample, 9, layer=7)
    assert str(layer.value) == (
        "There is no layer 7, call 0: language self-attention has layers [0]."
    )
    with pytest.raises(LayerError) as head:
        figures.overlay(sample, 9, head=9)
    assert str(head.value) == (
        "A head must lie between -4 and 3; got 9. (language self-attention, layer 0, call 0)"
    )
    with pytest.raises(InputError) as layers:
        figures.layer_overlays(sample, 9, [])
    assert str(layers.value) == (
        "layers must be a layer or a list of at least one, such as -1 or [0, -1]; got []."
    )
    with pytest.raises(InputError) as show:
        check_show("weight")
    assert str(show.value) == "show must be one of probability, share, lift; got 'weight'."
    look = figures.OverlayOptions()
    object.__setattr__(look, "hide", "outliers")
    with pytest.raises(InputError) as hide:
        look.left_out(placed_image(sample), sample.call(0))
    assert str(hide.value) == "hide must be 'sinks' or positions; got 'outliers'."
    with pytest.raises(InputError) as nowhere:
        figures.map_overlays(sample, {"flat": np.ones(6)}, "x", hide="sinks")
    assert str(nowhere.value) == "hide must be positions; got 'sinks'."


def test_the_note_states_attention_that_is_not_drawn() -> None:
    """LLaVA-NeXT's thumbnail tokens have no cells; a narrow image has no other tokens."""
    vlm = xi.VLM(real("llava_next")[0], settled("llava_next"))
    sample = xi.capture(vlm, picture(96, 96), QUESTION)
    position = int(sample.find("red")[0])
    keys, places = sample.where("image"), sample.grids[0].places
    probs = sample.probs(0, queries=[position], keys=keys).mean((0, 1)).numpy()
    part, total = probs[places[:, 0] < 0].sum(), probs.sum()
    amounts = f"which receive {part:.3g} of the {total:.3g} that the image receives."
    said = words(figures.overlay(sample, "red", 0)).replace("\n", " ")
    assert f"not drawn: tokens of the thumbnail, or without a place, {amounts}" in said
    table = xi.attention_rollout(sample, [position])
    total = table.loc[table["image"].eq(0), "rollout"].sum()
    drawn = table.loc[table["image"].eq(0) & table["row"].notna(), "rollout"].sum()
    said = words(figures.rollout_overlay(table, sample)).replace("\n", " ")
    assert f"which receive {total - drawn:.3g} of the {total:.3g} that" in said
    narrow = xi.capture(vlm, picture(96, 96).resize((400, 3)), QUESTION)
    assert not (narrow.grids[0].places[:, 0] >= 0).any()
    assert "One cell per thumbnail token" in words(figures.overlay(narrow, "red", 0))
