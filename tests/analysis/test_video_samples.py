"""Analyses count video tokens as image tokens, not as text."""

import functools

import numpy as np
import pytest
import torch

import xmodal_interp as xi
from tests.helpers.clips import QUESTION, clip, noise, vlm_of
from xmodal_interp.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@functools.cache
def sample(n_images: int = 0) -> xi.Sample:
    images = [noise(64, 48, i) for i in range(n_images)]
    return xi.capture(
        vlm_of("qwen2_vl"), images, QUESTION, videos=clip(4, 0), max_new_tokens=2, system="see"
    )


def shares(of: xi.Sample, queries: np.ndarray, keys: np.ndarray, layer: int = 0) -> float:
    """Mean over heads and queries of the probability on the keys."""
    probs = of.probs(layer, queries=queries.tolist())
    return float(probs[:, :, torch.from_numpy(keys)].sum(-1).mean())


@pytest.mark.parametrize("n_images", [0, 1])
def test_blocks(n_images: int) -> None:
    of = sample(n_images)
    table = xi.block_statistics(of, layers=0).groupby("block")["mass"].mean()
    other = np.flatnonzero(of.tokens["kind"].isin(["text", "special"]))
    sees = other[other > of.visual.min()]  # earlier tokens do not see the image
    assert len(of.visual) == len(of.where("video")) + len(of.where("image"))
    assert table["T-V"] == pytest.approx(shares(of, sees, of.visual), abs=1e-6)
    assert table["V-V"] == pytest.approx(shares(of, of.visual, of.visual), abs=1e-6)
    assert table["V-T"] == pytest.approx(1 - table["V-V"], abs=1e-6)


@pytest.mark.parametrize("n_images", [0, 1])
def test_ratio_and_summary(n_images: int) -> None:
    of = sample(n_images)
    after = of.text_after_image()
    ratio = xi.cross_modal_ratio(of, layers=0, by=("layer",))["ratio"].iloc[0]
    assert ratio == pytest.approx(shares(of, after, of.visual), abs=1e-6)
    row = xi.cross_modal_summary(of, 0).iloc[0]
    received = of.probs(0, queries=after.tolist()).mean((0, 1))[torch.from_numpy(of.visual)]
    best = int(received.argmax())
    assert row["most_attended_patch"] == best
    place = ["image", "row", "col", "video", "frame"]
    known = of.tokens.iloc[of.visual[best]][place].dropna()
    assert row[place].dropna().to_dict() == known.to_dict()
    assert len(known) == (4 if "video" in known else 3)
    if n_images:
        of_image = xi.cross_modal_ratio(of, image=0, layers=0, by=("layer",))["ratio"].iloc[0]
        assert of_image == pytest.approx(shares(of, after, of.where("image")), abs=1e-6)
        assert of_image < ratio
    else:
        with pytest.raises(InputError, match="has no tokens of image 0; it has 0 images"):
            xi.cross_modal_ratio(of, image=0)


def test_allocation_and_position() -> None:
    of = sample()
    table = xi.attention_allocation(of, layers=0).set_index("segment")
    assert table.loc["image", "n_tokens"].unique() == [len(of.where("video"))]
    bias = xi.positional_bias(of, layers=0, n_bins=4)
    cells = bias[bias["axis"] == "key"].groupby("block")["n_cells"].sum()
    n, heads = len(of.visual), of.call(0).n_heads
    assert cells["image->image"] == heads * n * (n + 1) // 2
    after = sum((of.where("text")[:, None] > of.visual).ravel())
    assert cells["text->image"] == heads * after


def test_places_in_tables() -> None:
    of = sample(1)
    rolled = xi.attention_rollout(of, queries="circle").set_index("key")
    video = rolled.loc[of.where("video", frame=1)]
    grid = of.video_grids[0]
    assert video["frame"].eq(1).all()
    assert video["video"].eq(0).all()
    assert len(video) == grid.rows * grid.cols
    tower = xi.attention_rollout(of, queries=[0], tower="vision", image=1)
    assert tower["token_kind"].eq("video").all()
    places = tower[["frame", "row", "col"]].to_numpy(int)
    np.testing.assert_array_equal(places, grid.patch_places)
    assert tower["image"].isna().all()
    assert xi.attention_rollout(of, queries=[0], tower="vision")["token_kind"].eq("image").all()
