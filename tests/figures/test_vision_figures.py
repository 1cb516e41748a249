"""Figures of the vision tower: what is drawn, its names, and the scale with an attention sink."""

from dataclasses import replace

import numpy as np
import pytest

import xmodal_interp as xi
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from tests.helpers.vision import registers_vlm
from xmodal_interp import figures
from xmodal_interp.errors import InputError
from xmodal_interp.figures.overlay_values import attention_on_image, query_positions
from xmodal_interp.figures.placement import placed_image
from xmodal_interp.figures.scales import color_scale
from xmodal_interp.figures.style import about
from xmodal_interp.sample import Sample


def vision_sample() -> Sample:
    return xi.capture(registers_vlm(), picture(), name="photo")


def texts(picture_: figures.Picture) -> list[str]:
    titles = [axes.get_title() for axes in picture_.axes]
    return [picture_.get_suptitle(), *(title for title in titles if title)]


def test_an_overlay_draws_the_row_of_the_class_token() -> None:
    for sample, options in (
        (vision_sample(), {}),
        (xi.capture(tiny_vlm("llava"), picture(), QUESTION), {"tower": "vision"}),
    ):
        placed = placed_image(sample, 0, options.get("tower"))
        read = attention_on_image(sample, placed, query_positions(sample, placed, None), 1)
        drawn = read.values("probability")
        expected = sample.probs(1, tower="vision", queries="class")[:, 0].mean(0)
        np.testing.assert_allclose(drawn, expected, atol=1e-6)
        shown = texts(figures.overlay(sample, layer=1, **options))
        assert shown[0].endswith("vision layer 1, mean of 4 heads")
        assert shown[1:] == ["image", "class token"]


def test_titles_name_the_positions() -> None:
    sample = vision_sample()
    panels = texts(figures.overlays(sample, ["class", "register 1", 3], layer=-1))
    assert panels[1:] == ["image", "class token", "register 1", "patch in row 0, column 0"]
    heads = texts(figures.head_overlays(sample, "register", layer=0))
    assert heads[0] == "photo\nregister 0, register 1, vision layer 0, head by head"
    assert texts(figures.layer_overlays(sample))[2:] == ["layer 0", "layer 1", "layer 2"]


def test_a_matrix_of_the_vision_tower() -> None:
    sample = vision_sample()
    shown = figures.attention_matrix(sample, 0)
    assert texts(shown)[0] == "photo\nvision layer 0, mean of 4 heads"
    ticks = [label.get_text() for label in shown.axes[0].get_yticklabels()]
    assert ticks == ["class", "register 0", "register 1", "image 0\n16 tokens"]
    of_vlm = xi.capture(tiny_vlm("llava"), picture(), QUESTION)
    assert "vision layer 0" in texts(figures.attention_matrix(of_vlm, 0, tower="vision"))[0]
    with pytest.raises(InputError) as caught:
        figures.attention_matrix(sample, zoom="text-image")
    assert str(caught.value) == (
        "zoom shows text against image tokens, which the vision tower does not have. Leave zoom "
        "out."
    )
    with pytest.raises(InputError) as caught:
        figures.overlay(of_vlm, tower="connector")
    assert str(caught.value) == (
        "Attention of tower 'connector' cannot be drawn on the image. Choose tower='language' or "
        "tower='vision'."
    )


def test_a_sample_without_a_question_is_titled_by_its_name() -> None:
    sample = vision_sample()
    assert about(sample) == "photo"
    assert about(replace(sample, answer="cat")) == 'photo \u2192 "cat"'


def test_one_sink_does_not_darken_the_rest_of_a_map() -> None:
    values = np.full(256, 0.002)
    values[:64] = 0.004
    values[41] = 0.6
    scale = color_scale("amount", [values], "rollout", power=0.5, clip=True)
    assert scale.norm.vmax == pytest.approx(0.004)
    assert scale.extend == "max"
    assert scale.label == (
        "rollout\nclipped at the 99th percentile; largest: 0.6\n(square-root scale)"
    )
    given = color_scale("amount", [values], "rollout", vmax=0.5, clip=True)
    assert given.norm.vmax == 0.5
    even = color_scale("amount", [values[:41]], "rollout", clip=True)
    assert even.norm.vmax == pytest.approx(0.004)
    assert even.extend == "neither"
    sample = vision_sample()
    map_ = np.full(19, 0.002)
    map_[7] = 0.6
    shown = figures.map_overlays(sample, {"sink": map_}, "rollout")
    labels = [axes.get_ylabel() for axes in shown.axes]
    assert any("99th percentile" in label.replace("\n", " ") for label in labels)
