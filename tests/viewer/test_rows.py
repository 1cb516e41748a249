"""Rows of the page: which there are, and how exact their 8-bit codes are."""

import dataclasses

import numpy as np
import pytest
import torch

import xmodal_interp as xi
from tests.helpers import synthetic
from tests.helpers.figure_samples import fake, sample_of
from tests.helpers.real import asked_in_full, real, settled
from tests.helpers.tiny import picture, tiny_vlm
from tests.helpers.viewer_samples import scene_sample
from tests.helpers.vision import registers_vlm
from xmodal_interp.errors import InputError, NotRecordedError
from xmodal_interp.figures.overlay_values import attention_on_image
from xmodal_interp.figures.placement import placed_image
from xmodal_interp.models import VLM
from xmodal_interp.sample import Sample
from xmodal_interp.viewer.codes import ERROR, HIDDEN, decoded, encoded
from xmodal_interp.viewer.rows import MEAN, shown_values


def rows_of(sample: Sample, **options):
    return xi.view(sample, **options).rows[0]


def test_a_row_of_three_values_by_eye() -> None:
    codes, largest, error = encoded(np.array([[0.4, 0.1, np.nan, 0.0]]))
    assert codes.tolist() == [[254, 127, HIDDEN, 0]]
    assert largest.tolist() == [np.float32(0.4)]
    np.testing.assert_allclose(decoded(codes, largest), [[0.4, 0.1, np.nan, 0.0]], atol=1e-7)
    assert error < 1e-7


def test_the_error_of_any_row_is_within_the_stated_one() -> None:
    values = np.random.default_rng(0).random((200, 500)) ** 8
    codes, largest, error = encoded(values)
    off = np.abs(decoded(codes, largest) - values)
    assert (off <= ERROR * values.max(1, keepdims=True)).all()
    assert error == off.max()


def test_decoded_rows_are_the_sample_s_probabilities() -> None:
    sample = scene_sample()
    rows = rows_of(sample)
    found = rows.codes()
    values = decoded(found["codes"], found["largest"])
    assert len(rows.heads) == 32
    for i, (layer, head) in enumerate(rows.rows):
        if layer < 0:
            continue
        heads = None if head == MEAN else [head]
        expected = sample.probs(layer, heads, rows.queries.tolist()).double().mean(0).numpy()
        seen = sample.call(layer).visible(rows.queries.tolist())[0, 0].numpy()
        assert (np.isnan(values[:, i]) == ~seen).all()
        off = np.abs(np.where(seen, values[:, i] - expected, 0.0))
        assert (off <= ERROR * expected.max(1, keepdims=True)).all()
        assert off.max() <= found["error"] + 1e-12


def test_rows_of_rollout_are_those_of_the_analysis() -> None:
    sample = scene_sample()
    rows = rows_of(sample)
    queries = rows.queries.tolist()
    table = xi.attention_rollout(sample, queries, baseline="uniform")
    found = rows.codes()
    values = decoded(found["codes"], found["largest"])[:, -2:]
    for i, expected in enumerate((table["rollout"], np.exp2(table["log2_ratio"]))):
        wanted = expected.to_numpy().reshape(len(queries), len(sample))
        seen = np.isfinite(table["log2_ratio"].to_numpy().reshape(wanted.shape))
        assert (np.isnan(values[:, i]) == ~seen).all()
        largest = np.where(seen, wanted, 0).max(1, keepdims=True)
        assert (np.abs(np.where(seen, values[:, i] - wanted, 0)) <= ERROR * largest).all()


def test_sums_are_the_exact_ones_of_the_calls() -> None:
    sample = scene_sample()
    rows = rows_of(sample)
    sums = rows.sums()
    assert list(rows.groups) == ["image 0", "first", "prompt", "answer"]
    at = rows.queries.tolist()
    for layer in range(4):
        probs = sample.probs(layer, None, at).double().numpy()
        for i, mask in enumerate(rows.groups.values()):
            np.testing.assert_allclose(
                sums["mass"][:, layer, :, i].T, probs[..., mask].sum(-1), atol=1e-6
            )
        entropy = -np.where(probs > 0, probs * np.log(np.maximum(probs, 1e-300)), 0).sum(-1)
        np.testing.assert_allclose(sums["entropy"][:, layer].T, entropy, atol=1e-5)
        assert sums["visible"][:, layer].tolist() == [position + 1 for position in at]
    null = sums["null"][-1, 0]
    visible = at[-1] + 1
    np.testing.assert_allclose(null, [144 / visible, 1 / visible, 8 / visible, 2 / visible], 1e-6)


@pytest.mark.parametrize("measure", ["probability", "lift"])
def test_shown_values_of_one_layer_are_those_of_the_overlay(measure: str) -> None:
    for sample in (scene_sample(), fake()):
        image = placed_image(sample)
        at = [len(sample) - 1, len(sample) - 2]
        expected = attention_on_image(sample, image, at, 0, [1, 2]).values(measure)  # type: ignore[arg-type]
        found = shown_values(sample, at, {0: [1, 2]}, measure)[image.keys]
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_shown_values_of_layers_are_means_over_their_heads() -> None:
    sample = scene_sample()
    at = [len(sample) - 1]
    two = sample.probs(0, [1], at).double()[:, 0], sample.probs(2, [3, 4, 5], at).double()[:, 0]
    expected = torch.cat(two).mean(0).numpy()
    found = shown_values(sample, at, {0: [1], 2: [3, 4, 5]})
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_cross_attention_and_masks_that_differ_between_rows() -> None:
    sample = sample_of("mllama")
    rows = rows_of(sample)
    assert rows.kind == "cross"
    assert not rows.has_rollout
    assert not rows.sinks
    found = rows.codes()
    values = decoded(found["codes"], found["largest"])
    expected = sample.probs(rows.layers[0], None, rows.queries.tolist(), kind="cross")
    seen = ~np.isnan(values[:, 0])
    mean = expected.double().mean(0).numpy()
    assert np.abs(np.where(seen, values[:, 0] - mean, 0)).max() <= ERROR * np.nanmax(mean)


def test_a_vision_model_has_rows_of_all_positions() -> None:
    sample = xi.capture(registers_vlm(), picture())
    rows = rows_of(sample)
    assert rows.tower == "vision"
    assert len(rows.queries) == len(rows.keys) == len(sample)
    assert list(rows.groups) == ["class", "register", "patches"]
    boxes = rows.keys.loc[rows.keys["kind"] == "image", ["x0", "y0", "x1", "y1"]]
    np.testing.assert_allclose(
        boxes.to_numpy(), sample.tokens.loc[boxes.index, list(boxes)].to_numpy(), atol=1e-9
    )


def test_the_vision_tower_of_a_language_model() -> None:
    sample = sample_of("llava")
    rows = rows_of(sample, tower="vision")
    assert rows.tower == "vision"
    assert len(rows.keys) == sample.call(0, tower="vision").n_keys


def test_selections_of_layers_queries_and_heads() -> None:
    sample = scene_sample()
    word = int(sample.find("square")[0])
    rows = rows_of(sample, layers=[-1, 0], queries="square", heads="top 3")
    assert rows.layers == (0, 3)
    assert rows.queries.tolist() == [word - 1, word, len(sample) - 1]
    share = rows.sums()["mass"][..., 0].mean(0)
    best = sorted(np.argsort(-share, axis=None)[:3].tolist())
    assert rows.heads == tuple(((0, 3)[i // 8], i % 8) for i in best)
    assert rows_of(sample, heads=[2]).heads == ((0, 2), (1, 2), (2, 2), (3, 2))
    assert rows_of(sample, heads="all").heads == rows_of(sample).heads
    without = rows_of(sample, rollout=False)
    assert without.rows[-1] == (3, 7)


def test_heads_that_fit_are_the_strongest(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = scene_sample()
    whole = rows_of(sample, heads="all")
    one = len(whole.queries) * len(whole.keys)
    monkeypatch.setattr("xmodal_interp.viewer.views.MOST_BYTES", whole.n_bytes - 20 * one)
    few = rows_of(sample)
    assert 0 < len(few.heads) < 32
    assert few.n_bytes <= whole.n_bytes - 20 * one
    assert few.heads == rows_of(sample, heads=f"top {len(few.heads)}").heads


def test_only_the_rows_that_were_kept() -> None:
    sample = xi.capture(
        tiny_vlm("llava"), picture(), "a b", max_new_tokens=2, keep=xi.Keep(queries="text")
    )
    rows = rows_of(sample)
    held = sample.call(0).query_positions.tolist()
    assert set(rows.queries.tolist()) <= set(held)
    assert not rows.has_rollout


def test_video_frames_have_pictures_and_keys() -> None:
    from tests.helpers.clips import clip, vlm_of

    sample = xi.capture(vlm_of("qwen2_vl"), [], "what ?", videos=clip(4, 0), max_new_tokens=2)
    header = xi.view(sample).header["samples"][0]
    grid = sample.video_grids[0]
    assert [each["of"] for each in header["pictures"]] == [
        ["video", 0, frame] for frame in range(grid.frames)
    ]
    of_key = np.array(header["keys"]["picture"])
    frames = sample.tokens["frame"].fillna(-1).to_numpy(int)
    assert (of_key == frames).all()
    assert all(each["src"] for each in header["pictures"])


def test_thumbnails_are_pictures_of_their_own() -> None:
    model, _ = real("llava_next")
    vlm = VLM(model, settled("llava_next"))
    sample = xi.capture(vlm, picture(120, 60), asked_in_full(vlm, "what ?", 1), max_new_tokens=0)
    header = xi.view(sample, rollout=False).header["samples"][0]
    titles = [each["title"] for each in header["pictures"]]
    assert titles == ["image, tiles", "image, thumbnail"] or titles == ["image"]
    small = sample.tokens["view"].eq("thumbnail").fillna(value=False).to_numpy(bool)
    boxed = sample.tokens["x0"].notna().to_numpy()
    picture_of = np.array(header["keys"]["picture"])
    assert (picture_of[small & boxed] == titles.index("image, thumbnail")).all()


def test_learned_queries_are_distributed_over_patches() -> None:
    vlm = VLM(real("blip-2")[0], settled("blip-2"))
    sample = xi.capture(vlm, picture(160, 90), asked_in_full(vlm, "is it ?", 1), max_new_tokens=2)
    rows = rows_of(sample)
    image = placed_image(sample)
    assert rows.n_keys == len(sample)
    n_patches = len(rows.keys) - rows.n_keys
    assert n_patches == (sample.grids[0].patch_places[:, 0] >= 0).sum()
    at = [len(sample) - 1, len(sample) - 2]
    found = rows.codes(np.array(sorted(at)))
    values = decoded(found["codes"], found["largest"])
    read = attention_on_image(sample, image, at, 0)
    cells = sample.grids[0].patch_places[:, 0] >= 0
    mean = values[:, rows.rows.index((0, MEAN))].mean(0)
    expected = read.values("probability")[cells]
    bound = ERROR * found["largest"][:, rows.rows.index((0, MEAN))].mean()
    assert np.abs(mean[rows.n_keys :] - expected).max() <= bound
    visible = rows.sums(np.array(sorted(at)))["visible"][:, 0]
    lifts = (values[:, rows.rows.index((0, MEAN))] * visible[:, None]).mean(0) * rows.lift_factors
    wanted = read.values("lift")[cells]
    bound *= visible.max() * rows.lift_factors[rows.n_keys :]
    assert (np.abs(lifts[rows.n_keys :] - wanted) <= bound).all()
    without = {key: call for key, call in sample.calls.items() if key[0] != "connector"}
    assert not rows_of(sample.changed(calls=without)).spread


def test_refusals() -> None:
    sample = scene_sample()
    with pytest.raises(InputError) as error:
        xi.view(sample, heads="best 3")
    assert str(error.value) == (
        "heads must be 'all', 'top N' such as 'top 64', or numbers of heads; got 'best 3'."
    )
    with pytest.raises(InputError) as error:
        xi.view(sample, tower="connector")
    assert str(error.value) == (
        "The viewer shows the towers 'language' and 'vision'; got tower='connector'."
    )
    with pytest.raises(NotRecordedError) as missing:
        xi.view(dataclasses.replace(sample, calls={}))
    assert str(missing.value) == (
        "Sample 'scene-3' holds no language self-attention to show. Capture it with this tower, or "
        "choose another."
    )
    with pytest.raises(InputError) as error:
        shown_values(sample, [150], {}, "probability")
    assert str(error.value) == (
        "heads is empty. Pass the heads of at least one layer, such as {3: [0]}."
    )
    with pytest.raises(InputError) as error:
        shown_values(sample, [150], {0: None}, "share")
    assert str(error.value) == "measure must be 'probability' or 'lift'; got 'share'."


def test_statistics_have_no_rows() -> None:
    keep = xi.Keep(statistics=("mass",))
    sample = xi.capture(tiny_vlm("llava"), picture(), "a b", max_new_tokens=0, keep=keep)
    with pytest.raises(NotRecordedError) as error:
        xi.view(sample)
    assert str(error.value) == (
        f"Sample {sample.name!r} holds statistics of attention, not its rows. Capture it without "
        "Keep(statistics=...) to view it."
    )


def test_masks_that_differ_between_heads() -> None:
    mask = torch.ones(1, 4, 11, 11, dtype=torch.bool).tril()
    mask[0, 1, :, 3] = False
    mask[0, 2, 9, :2] = False
    call = synthetic.random_call(11, mask=mask)
    sample = fake(call=call)
    found = rows_of(sample, rollout=False)
    codes = found.codes(np.array([9]))
    values = decoded(codes["codes"], codes["largest"])[0]
    seen = mask[0, :, 9].numpy()
    probs = np.where(seen, call.probs(None, [9])[0, :, 0].double().numpy(), np.nan)
    assert np.isnan(values[:, 10]).all()  # after the query
    expected = np.concatenate([np.nanmean(probs[:, :10], 0)[None], probs[:, :10]])
    np.testing.assert_allclose(values[:, :10], expected, atol=ERROR)
    exact = shown_values(sample, [9], {0: [1, 2]})
    assert np.isnan(exact[[3, 10]]).tolist() == [False, True]
    np.testing.assert_allclose(exact[4:10], np.nanmean(probs[1:3, 4:10], 0), rtol=1e-6)
    assert exact[3] == pytest.approx(probs[2, 3])  # hidden from head 1
