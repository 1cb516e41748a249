"""Analyses with ``tower="vision"``: equal to numbers from the tower's probabilities."""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

import xmodal_interp as xi
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from tests.helpers.vision import registers_vlm, vision_vlm
from xmodal_interp.errors import InputError
from xmodal_interp.sample import Sample


@cache
def of_vision_model() -> Sample:
    return xi.capture(registers_vlm(), picture())


@cache
def of_vlm() -> Sample:
    return xi.capture(tiny_vlm("llava"), [picture(), picture(seed=1)], f"<image><image>{QUESTION}")


def cases() -> Iterator[tuple[Sample, int, dict[str, Any]]]:
    yield of_vision_model(), 0, {}
    yield of_vlm(), 1, {"tower": "vision", "image": 1}


def probs(sample: Sample, layer: int, image: int) -> np.ndarray:
    return sample.probs(layer, tower="vision", call=image).double().numpy()


@pytest.mark.parametrize("case", [0, 1])
def test_sinks_are_the_keys_with_the_largest_column_means(case: int) -> None:
    sample, image, options = list(cases())[case]
    table = xi.attention_sinks(sample, threshold=0.2, layers=[1], **options)
    received = probs(sample, 1, image).mean(1)  # [head, key]
    for row in table.itertuples():
        assert row.received == pytest.approx(received[row.head, row.key], abs=1e-6)
        assert row.null == pytest.approx(1 / received.shape[1])
        assert row.token == sample.patch_names(image)[row.key]
    assert set(table["key"]) == {0, *np.flatnonzero((received > 0.2).any(0)).tolist()}
    rate = xi.sink_rate(sample, threshold=0.2, layers=[1], **options)
    assert rate["tower"].tolist() == ["vision"]
    assert rate["any"].item() == pytest.approx((received > 0.2).any(1).mean())
    assert rate["first"].item() == pytest.approx((received[:, 0] > 0.2).mean())


@pytest.mark.parametrize("case", [0, 1])
def test_blocks_of_patches_and_special_tokens(case: int) -> None:
    sample, image, options = list(cases())[case]
    table = xi.block_statistics(sample, layers=[2], heads=[1], **options).set_index("block")
    assert table.index.tolist() == ["V-V", "V-S", "S-V", "S-S"]
    patches = sample.patch_names(image) == "patch"
    matrix = probs(sample, 2, image)[1]
    for block, rows, keys in (
        ("V-V", patches, patches),
        ("V-S", patches, ~patches),
        ("S-V", ~patches, patches),
        ("S-S", ~patches, ~patches),
    ):
        mass = matrix[np.ix_(rows, keys)].sum(1).mean()
        assert table.loc[block, "mass"] == pytest.approx(mass, abs=1e-6)


@pytest.mark.parametrize("case", [0, 1])
def test_raster_maps_of_the_class_token(case: int) -> None:
    sample, image, options = list(cases())[case]
    table = xi.raster_map(sample, layers=[0], heads=[2], **options)
    patches = sample.patch_names(image) == "patch"
    row = probs(sample, 0, image)[2, 0, patches]
    assert table["tower"].eq("vision").all()
    np.testing.assert_allclose(table["lift"], row / row.mean(), rtol=1e-4)
    grid = sample.grids[image]
    places = grid.patch_places[patches]
    assert table[["row", "col"]].to_numpy().tolist() == places.tolist()
    profile = xi.raster_profile(sample, layers=[0], heads=[2], **options)
    top = profile[profile["axis"].eq("row") & profile["index"].eq(0)]["share"].item()
    assert top == pytest.approx(row[places[:, 0] == 0].sum() / row.sum(), rel=1e-4)
    assert len(xi.raster_bias(sample, layers=[0], heads=[2], **options)) == 1


def test_entropy_of_named_queries() -> None:
    sample = of_vision_model()
    table = xi.attention_entropy(sample, queries="register", layers=[1])
    rows = probs(sample, 1, 0)[:, 1:3]
    expected = -(rows * np.log(rows)).sum(-1).mean(1)
    np.testing.assert_allclose(table["entropy"], expected, atol=1e-5)
    assert table["n_queries"].eq(2).all()


def test_rollout_of_a_tower_with_registers_starts_at_the_class_token() -> None:
    table = xi.attention_rollout(of_vision_model())
    assert table["query"].eq(0).all()
    assert table["query_token"].eq("class").all()
    whole = xi.rollout_matrix(of_vision_model())[0].numpy()
    np.testing.assert_allclose(table["rollout"], whole, atol=1e-9)
    registers = xi.attention_rollout(of_vision_model(), "register")
    assert registers["query"].unique().tolist() == [1, 2]


def test_padding_patches_are_left_out() -> None:
    sample = xi.capture(vision_vlm("siglip2"), picture(96, 40))
    n_padding = int((sample.patch_names() == "padding").sum())
    assert n_padding > 0
    table = xi.attention_entropy(sample)
    assert table["n_queries"].eq(len(sample) - n_padding).all()
    assert not xi.attention_sinks(sample)["token_kind"].eq("padding").any()


def test_without_a_class_token_queries_must_be_given() -> None:
    sample = xi.capture(vision_vlm("siglip"), picture())
    with pytest.raises(InputError) as caught:
        xi.raster_map(sample)
    assert str(caught.value) == (
        "The vision tower has 0 class tokens, so there is no default for queries. Pass positions "
        "as queries."
    )
    assert len(xi.raster_map(sample, queries="patch", layers=[0], heads=[0])) == 16
    blocks = xi.block_statistics(sample, layers=[0], heads=[0]).set_index("block")
    assert blocks["visible"].tolist() == [True, False, False, False]


ANALYSES: list[Callable[..., Any]] = [
    *(xi.attention_sinks, xi.sink_rate, xi.block_statistics, xi.raster_map, xi.raster_bias),
    *(xi.attention_rollout, xi.rollout_matrix, xi.attention_entropy, xi.attention_distance),
    *(xi.cross_modal_ratio, xi.token_ratio, xi.attention_allocation, xi.positional_bias),
    *(xi.recency_index, xi.cross_modal_summary, xi.token_norms, xi.raster_profile),
    *(xi.figures.overlay, xi.figures.attention_matrix, xi.figures.layer_overlays),
    *(xi.figures.head_overlays, xi.figures.mask_structure, xi.figures.token_patch_matrix),
]


@pytest.mark.parametrize("analysis", ANALYSES, ids=lambda analysis: analysis.__name__)
def test_a_recording_or_its_calls_are_answered_with_the_way_to_a_sample(
    analysis: Callable[..., Any],
) -> None:
    vlm = registers_vlm()
    inputs, _ = vlm.prepare([[picture()]], [""])
    with xi.record(vlm.model) as recording:
        vlm.model(**inputs)
    for given in (recording, recording.calls, recording.calls[0]):
        with pytest.raises(InputError) as caught:
            analysis(given)
        assert str(caught.value).endswith(
            "Make a sample with xi.capture(vlm, image, prompt), or of a vision model with "
            "recording.sample(image, grid=(rows, columns))."
        )
