import numpy as np
import pytest
import torch

from tests.helpers import synthetic
from tests.helpers.figure_samples import fake, sample_of
from tests.helpers.real import asked_in_full, real, settled
from tests.helpers.tiny import picture
from xmodal_interp.capturing.run import capture
from xmodal_interp.errors import InputError, PhraseError
from xmodal_interp.figures.overlay_values import attention_on_image, query_groups, query_positions
from xmodal_interp.figures.placement import placed_image
from xmodal_interp.figures.style import named, panel_name
from xmodal_interp.models import VLM
from xmodal_interp.sample import Sample


def slow_values(sample: Sample, show: str, queries: list[int], heads: list[int]) -> np.ndarray:
    """Compute cell by cell the mean over heads and queries that can attend to the token."""
    call = sample.call(-1)
    probs, seen = call.probs()[0].double(), call.visible()[0, 0]
    out = []
    for key in sample.where("image"):
        cells = [
            float(probs[h, q, key]) * (int(seen[q].sum()) if show == "lift" else 1)
            for h in heads
            for q in queries
            if seen[q, key]
        ]
        out.append(np.mean(cells) if cells else np.nan)
    values = np.array(out)
    return values / np.nansum(values) if show == "share" else values


@pytest.mark.parametrize("show", ["probability", "share", "lift"])
def test_values_are_means_over_visible_cells(show: str) -> None:
    """Query 4 is an image token with three visible image tokens; query 9 is after the image."""
    sample, place = fake(), placed_image(fake())
    for queries in ([4], [4, 9]):
        read = attention_on_image(sample, place, queries, -1, [1, 3])
        expected = slow_values(sample, show, queries, [1, 3])
        np.testing.assert_allclose(read.values(show), expected, rtol=1e-5)  # type: ignore[arg-type]
    assert np.isnan(attention_on_image(sample, place, [4], -1).values("probability")).sum() == 3


def test_uniform_attention_has_lift_one_and_equal_shares() -> None:
    sample = fake(spread=0.0)
    read = attention_on_image(sample, placed_image(sample), sample.text_after_image().tolist(), 0)
    np.testing.assert_allclose(read.values("lift"), 1.0, rtol=1e-5)
    np.testing.assert_allclose(read.values("share"), 1 / 6, rtol=1e-5)


def test_shares_exclude_left_out_tokens() -> None:
    sample = fake()
    read = attention_on_image(sample, placed_image(sample), [9], 0)
    left_out = np.array([True, False, False, False, False, False])
    values = read.values("share", left_out=left_out)
    assert np.isnan(values[0])
    assert np.nansum(values) == pytest.approx(1.0)
    np.testing.assert_allclose(
        values[1:], read.values("probability")[1:] / read.values("probability")[1:].sum()
    )


def test_cross_attention_uses_the_image_keys() -> None:
    sample = sample_of("mllama")
    place = placed_image(sample)
    assert place.kind == "cross"
    read = attention_on_image(sample, place, "red circle", -1, 2)
    call = sample.call(-1, kind="cross")
    expected = call.probs(2, sample.positions("red circle"))[0, 0].mean(0)
    np.testing.assert_allclose(read.values("probability"), expected[place.keys], rtol=1e-5)


def test_a_list_has_a_panel_per_entry_and_a_phrase_a_panel_per_token() -> None:
    sample = sample_of("llava")
    place = placed_image(sample)
    red, circle = sample.find("red circle").tolist()
    assert query_groups(sample, place, "red circle") == [[red], [circle]]
    assert query_groups(sample, place, ["red circle", circle]) == [[red, circle], [circle]]
    assert query_groups(sample, place, None) == [[i] for i in sample.text_after_image()]
    assert named(sample, [red, circle]) == '"red circle"'
    assert named(sample, [0, circle]) == '"<bos>", "circle"'
    assert panel_name(sample, [len(sample) - 1]).endswith('" (answer)')


def test_errors() -> None:
    sample = sample_of("llava")
    place = placed_image(sample)
    with pytest.raises(InputError) as blind:
        query_positions(sample, place, "user:")
    assert str(blind.value) == (
        "\"user:\" of sample 'sample-0' cannot attend to any of the 144 tokens of image 0. Choose "
        "a later position."
    )
    with pytest.raises(InputError) as empty:
        query_positions(sample, place, [])
    assert str(empty.value) == "The selection of queries is empty. Pass at least one position."
    with pytest.raises(PhraseError, match="'green dog' is not in"):
        query_positions(sample, place, "green dog")


def test_a_query_without_visible_keys_is_nan() -> None:
    mask = torch.ones(11, 11, dtype=torch.bool).tril()
    mask[9] = False
    sample = fake(call=synthetic.random_call(11, mask=mask[None, None]))
    read = attention_on_image(sample, placed_image(sample), [8, 9], 0)
    assert np.isnan(read.values("probability", queries=[1])).all()
    np.testing.assert_allclose(read.values("lift"), read.values("lift", queries=[0]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_query_may_attend_to_the_image_in_a_later_layer_only() -> None:
    """In T5Gemma 2, layer 0 has a window, layer 1 has none, and layers 2 and 3 are the decoder."""
    vlm = VLM(real("t5gemma2")[0], settled("t5gemma2"))
    question = asked_in_full(vlm, "where is the red circle?", 1)
    sample = capture(vlm, picture(90, 90), question, max_new_tokens=1)
    place = placed_image(sample)
    (circle,) = query_positions(sample, place, "circle")
    (last,) = query_positions(sample, place, "last")
    assert [bool(sample.call(i).visible([circle])[..., place.keys].any()) for i in range(4)] == [
        *(False, True, False, False)
    ]
    assert query_positions(sample, place, "circle", 1) == [circle]
    assert query_positions(sample, place, "last", 2) == [last]
    for query, layer in (("circle", 0), ("circle", 2), ("last", 0), ("last", 1)):
        with pytest.raises(InputError, match="cannot attend to any of the 16 tokens of image 0"):
            query_positions(sample, place, query, layer)
