"""Rollout of learned-query tokens to image patches, compared with a slow replica."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import xmodal_interp as xi
from tests.helpers.pixel_changes import textured
from tests.helpers.real import real, settled
from tests.helpers.synthetic import random_call
from tests.helpers.tiny import QUESTION, tiny_vlm
from xmodal_interp import figures
from xmodal_interp.errors import GeometryError, InputError, NotRecordedError
from xmodal_interp.evaluation import pointing_hits
from xmodal_interp.figures.placement import placed_image

SIZE = (150, 70)
TYPES = ["blip-2", "instructblip", "idefics2", "aria", "kosmos-2", "kosmos-2.5"]
pytestmark = pytest.mark.filterwarnings(  # raised by the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)


def sample_of(model_type: str, *, splits: bool = False) -> xi.Sample:
    model, processor = real(model_type)[0], settled(model_type)
    if splits:
        processor.image_processor = copy.copy(processor.image_processor)
        processor.image_processor.do_image_splitting = True
    return xi.capture(xi.VLM(model, processor), textured(*SIZE), QUESTION)


def composed(sample: xi.Sample, alpha: float) -> torch.Tensor:
    """The product of full rollout matrices over patches and queries; patches map to themselves."""
    n_patches, n_tokens = len(sample.grids[0].patch_places), sample.grids[0].n_tokens
    layers = sorted(
        (key[2], key[1] == "cross", call)
        for key, call in sample.calls.items()
        if key[0] == "connector"
    )
    n = n_patches + max(call.n_queries for _, _, call in layers)
    product = torch.eye(n, dtype=torch.float64)
    for _, crosses, call in layers:
        matrix = torch.eye(n, dtype=torch.float64)
        rows = n_patches + torch.arange(call.n_queries)
        first = 0 if crosses else n_patches
        matrix[rows] *= 1 - alpha
        matrix[rows, first : first + call.n_keys] += alpha * call.probs()[0].double().mean(0)
        product = matrix @ product
    of_tokens = product[n_patches : n_patches + n_tokens, :n_patches]
    return (of_tokens / of_tokens.sum(1, keepdim=True)).float()


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("model_type", TYPES)
def test_shares_are_those_of_the_slow_replica(model_type: str, alpha: float) -> None:
    sample = sample_of(model_type)
    shares = xi.query_patches(sample, alpha=alpha)
    expected = composed(sample, alpha)
    assert shares.shape == (sample.grids[0].n_tokens, len(sample.grids[0].patch_places))
    assert (shares - expected).abs().max() < 1e-6
    assert (shares.sum(1) - 1).abs().max() < 1e-6
    assert shares.std(0).max() > 1e-3  # tokens have different shares


def test_tiles_of_an_image_are_separate() -> None:
    whole, split = sample_of("idefics2"), sample_of("idefics2", splits=True)
    grid, shares = split.grids[0], xi.query_patches(split)
    assert grid.thumbnail is not None
    assert shares.shape == (5 * 8, len(grid.patch_places))
    n = shares.shape[1] // 5
    for picture in range(5):
        rows, cols = slice(picture * 8, picture * 8 + 8), slice(picture * n, picture * n + n)
        assert (shares[rows, cols].sum(1) - 1).abs().max() < 1e-6
    thumbnail = shares[32:, 4 * n :]
    seen = thumbnail[:, thumbnail.sum(0) > 0]
    alone = xi.query_patches(whole)
    assert torch.allclose(seen, alone[:, alone.sum(0) > 0], atol=1e-5)
    amounts = np.arange(40.0)
    views = {view: xi.on_patches(split, amounts, view=view) for view in ("image", "thumbnail")}
    assert np.nansum(views["image"]) == pytest.approx(amounts[:32].sum(), rel=1e-5)
    assert np.nansum(views["thumbnail"]) == pytest.approx(amounts[32:].sum(), rel=1e-5)


def test_alpha_does_not_change_a_single_cross_attention() -> None:
    sample = sample_of("blip-2")
    only = {key: call for key, call in sample.calls.items() if key[1] == "cross"}
    layers = {"connector.cross": [0]}
    bare = sample.changed(calls=only, provenance={"layers": layers})
    (call,) = only.values()
    probs = call.probs()[0].double().mean(0)
    for alpha in (0.1, 1.0):
        assert torch.allclose(xi.query_patches(bare, alpha=alpha), probs, atol=1e-6)


def test_deep_connectors_are_composed_in_float64() -> None:
    """A cross-attention and 60 self-attention layers after it, in float64 throughout."""
    sample = sample_of("blip-2")
    first = next(call for key, call in sample.calls.items() if key[1] == "cross")
    n = first.n_queries
    others = [
        replace(random_call(n, causal=False), tower="connector", layer=layer)
        for layer in range(1, 61)
    ]
    calls = {(c.tower, c.kind, c.layer, 0): c for c in [first, *others]}
    layers = {"connector.cross": [first.layer], "connector.self": list(range(1, 61))}
    deep = replace(sample, calls=calls, provenance={"layers": layers})
    expected = 0.9 * first.probs(dtype=torch.float64)[0].mean(0)
    for call in others:
        expected = 0.9 * call.probs(dtype=torch.float64)[0].mean(0) @ expected + 0.1 * expected
    expected = expected / expected.sum(1, keepdim=True)
    shares = xi.query_patches(deep, alpha=0.9)
    assert shares.dtype == torch.float64
    torch.testing.assert_close(shares, expected, rtol=1e-9, atol=0)


def test_a_stored_sample_gives_the_same(tmp_path: Path) -> None:
    model, processor = real("instructblip")
    vlm = xi.VLM(model, processor)
    items = [{"image": textured(*SIZE), "prompt": QUESTION, "id": "one"}]
    stored = xi.capture_dataset(vlm, items, tmp_path / "store")[0]
    assert torch.allclose(
        xi.query_patches(stored), xi.query_patches(sample_of("instructblip")), atol=1e-6
    )


def test_refusals() -> None:
    sample = sample_of("blip-2")
    with pytest.raises(InputError, match=r"alpha must be a number from 0 to 1; got 1\.5"):
        xi.query_patches(sample, alpha=1.5)
    with pytest.raises(InputError, match="There is no image 1"):
        xi.query_patches(sample, 1)
    with pytest.raises(GeometryError, match=r"values has shape \(3,\), but image 0 has 8 tokens"):
        xi.on_patches(sample, np.ones(3))
    lacking = {key: c for key, c in sample.calls.items() if key[:3] != ("connector", "self", 1)}
    with pytest.raises(NotRecordedError, match="lacks these connector layers for image 0: self 1"):
        xi.query_patches(sample.changed(calls=lacking))
    with pytest.raises(GeometryError, match=r"tokens with a row and column: use sample\.grid"):
        xi.query_patches(xi.capture(tiny_vlm("llava"), Image.new("RGB", SIZE), QUESTION))


def test_overlays_and_the_pointing_game_use_patches(tmp_path: Path) -> None:
    sample = sample_of("blip-2")
    probs = sample.probs(-1, queries="circle", keys=sample.where("image")).mean((0, 1))
    expected = xi.on_patches(sample, probs)
    place = placed_image(sample)
    assert np.allclose(place.on_grid(place.on_cells(probs.double().numpy())), expected, atol=1e-6)
    lift = place.on_cells(np.full(8, 3.0), mean=True)
    assert np.allclose(lift[~np.isnan(lift)], 3.0)
    assert np.isnan(place.on_cells(np.full(8, np.nan))).all()
    figures.overlay(sample, "circle", path=tmp_path / "overlay.png")
    figures.token_patch_matrix(sample, path=tmp_path / "matrix.png")
    figures.attention_matrix(sample, zoom="text-image", path=tmp_path / "zoom.png")
    assert len(list(tmp_path.iterdir())) == 3

    box = (0.0, 0.0, SIZE[0] / 2, float(SIZE[1]))
    hits = pointing_hits(sample, [box], queries="circle")
    per_head = sample.probs(-1, queries="circle", keys=sample.where("image")).mean(1)
    for head, amounts in enumerate(per_head):
        grid = xi.on_patches(sample, amounts)
        row = hits[(hits["layer"] == sample.layers()[-1]) & (hits["head"] == head)].iloc[0]
        col = np.unravel_index(np.nanargmax(grid), grid.shape)[1]
        assert row["hit"] == float(col < grid.shape[1] / 2)
        left = np.nansum(grid[:, : grid.shape[1] // 2]) / np.nansum(grid)
        assert row["energy"] == pytest.approx(left, rel=1e-4)
