"""Selection of layers, heads and positions: repetitions, masks, NumPy and torch integers."""

import inspect
import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import xmodal_interp as xi
from tests.helpers.figure_samples import words
from tests.helpers.synthetic import captured, grid, random_call, sample_of, shipped
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp import at, evaluation, figures
from xmodal_interp.errors import InputError, LayerError, PhraseError, PositionError
from xmodal_interp.hooks.attention_modules import checked_heads
from xmodal_interp.sample import Sample

BOX = [[20, 20, 60, 60]]
BY_LAYER_AND_HEAD: dict[str, Callable[..., pd.DataFrame]] = {
    "allocation": xi.attention_allocation,
    "blocks": xi.block_statistics,
    "distance": xi.attention_distance,
    "entropy": xi.attention_entropy,
    "positional": xi.positional_bias,
    "raster bias": xi.raster_bias,
    "raster map": xi.raster_map,
    "raster profile": xi.raster_profile,
    "ratio": xi.cross_modal_ratio,
    "ratio by head": lambda sample, **asked: xi.cross_modal_ratio(sample, by=("head",), **asked),
    "ratio by layer": lambda sample, **asked: xi.cross_modal_ratio(sample, by=("layer",), **asked),
    "recency": xi.recency_index,
    "sinks": xi.attention_sinks,
    "sink rate": xi.sink_rate,
    "tokens": xi.token_ratio,
}


@pytest.mark.parametrize("name", BY_LAYER_AND_HEAD)
def test_repeated_layers_and_heads_count_once(name: str) -> None:
    ask, sample = BY_LAYER_AND_HEAD[name], captured("llava")
    last = (sample.layers("vision") if name == "distance" else sample.layers())[-1]
    once = ask(sample, layers=[last, 0], heads=[1, 0])
    twice = ask(sample, layers=[last, 0, -1, 0], heads=[1, 0, 1])
    pd.testing.assert_frame_equal(once, twice)


@pytest.mark.parametrize("name", BY_LAYER_AND_HEAD)
def test_numpy_and_torch_integers_are_accepted(name: str) -> None:
    ask, sample = BY_LAYER_AND_HEAD[name], captured("llava")
    plain = ask(sample, layers=1, heads=2)
    for layer, head in (
        (np.int64(1), np.int64(2)),
        (np.array(1), np.array(2)),
        (torch.tensor(1), torch.tensor([2])),
        ([np.int32(1)], [np.int32(2)]),
    ):
        table = ask(sample, layers=layer, heads=head)
        pd.testing.assert_frame_equal(plain, table)
        json.dumps(table.attrs)


OVER_QUERIES = [
    xi.attention_entropy,
    xi.cross_modal_ratio,
    xi.token_ratio,
    xi.recency_index,
    xi.attention_rollout,
    xi.raster_map,
    evaluation.pointing_hits,
]


@pytest.mark.parametrize("analysis", OVER_QUERIES)
def test_repeated_positions_count_once(analysis: Callable[..., pd.DataFrame]) -> None:
    sample = replace(shipped(), labels={"box": [0, 0, 40, 40]})
    last = sample.last
    once = analysis(sample, queries=[last, last - 1])
    twice = analysis(sample, queries=[last, last - 1, last - len(sample), last])
    pd.testing.assert_frame_equal(twice, once)


@pytest.mark.parametrize("name", BY_LAYER_AND_HEAD)
def test_boolean_masks_must_have_the_right_length(name: str) -> None:
    ask, sample = BY_LAYER_AND_HEAD[name], captured("llava")
    n_layers = len(sample.layers("vision") if name == "distance" else sample.layers())
    n_heads = sample.call(0, tower="vision" if name == "distance" else "language").n_heads
    layers, heads = np.arange(n_layers) == 1, np.isin(np.arange(n_heads), [0, 2])
    plain = ask(sample, layers=1, heads=[0, 2])
    table = ask(sample, layers=layers, heads=pd.Series(heads, index=range(5, 5 + n_heads)))
    pd.testing.assert_frame_equal(plain, table)
    json.dumps(table.attrs)
    for wrong in ({"layers": layers[1:]}, {"heads": heads[1:]}, {"layers": True}, {"heads": [0.5]}):
        with pytest.raises(LayerError):
            ask(sample, **wrong)


def test_masks_of_queries_and_keys() -> None:
    sample = shipped()
    mask = sample.tokens["kind"].eq("image")
    image = sample.where("image").tolist()
    probs = sample.probs(1, queries=[sample.last])
    for given in (mask, mask.to_numpy(), torch.tensor(mask.to_numpy()), mask.tolist()):
        assert sample.positions(given).tolist() == image
        assert torch.equal(sample.probs(1, queries=[sample.last], keys=given), probs[..., image])
    for wrong in (mask[1:], [True], True, [1.0], [0.5], [[0, 1]], [True, 2], {0: 1}):
        with pytest.raises(PositionError):
            sample.positions(wrong)
    assert sample.positions(slice(None, None, -1)).tolist() == list(range(len(sample)))[::-1]


@pytest.mark.parametrize("keyword", ["last", "text"])
def test_a_keyword_that_is_a_word_of_the_question_is_an_error_everywhere(keyword: str) -> None:
    plain = shipped()
    collides = replace(plain, text=f"{plain.text} The {keyword.upper()} one.")
    default = getattr(at, keyword)
    meant = [plain.last] if keyword == "last" else plain.text_after_image().tolist()
    for named in (keyword, [keyword], default):
        assert plain.positions(named).tolist() == meant
    assert collides.positions(default).tolist() == meant
    message = (
        f"{keyword!r} is ambiguous: it is a keyword and a word in the text of sample 'sample-0'. "
        f"Pass xi.at.{keyword} for the keyword, or xi.at.phrase({keyword!r}) for the word."
    )
    for ask in (
        lambda: collides.positions(keyword),
        lambda: collides.positions([keyword]),
        lambda: collides.probs(queries=keyword),
        lambda: xi.cross_modal_ratio(collides, queries=keyword),
        lambda: xi.attention_rollout(collides, keyword),
        lambda: evaluation.pointing_game(collides, BOX, queries=keyword, n_bootstrap=5),
        lambda: figures.overlay(collides, keyword),
    ):
        with pytest.raises(PhraseError) as refusal:
            ask()
        assert str(refusal.value) == message
    for ask in (xi.cross_modal_ratio, xi.attention_rollout, xi.raster_bias, xi.block_statistics):
        pd.testing.assert_frame_equal(ask(collides), ask(plain))  # defaults are keywords
    evaluation.pointing_game(collides, BOX, n_bootstrap=5)


def test_pointing_counts_repeated_layers_once() -> None:
    sample = shipped()
    once = evaluation.pointing_game(sample, BOX, layers=[3], n_bootstrap=5)
    for layers in ([3, -1], np.int64(3), np.array([3, 3])):
        again = evaluation.pointing_game(sample, BOX, layers=layers, n_bootstrap=5)
        pd.testing.assert_frame_equal(once, again)


def test_repeated_heads_are_ablated_once() -> None:
    found = checked_heads({np.int64(3): np.array([0, 5]), -1: [5, -3, 1]}, {3: 8}, "language")
    assert found == {3: (0, 5, 1)}
    assert all(type(head) is int for head in found[3])
    assert xi.ablate_heads({np.int64(3): np.array([0, 5])}).heads_in({3: 8}) == {3: (0, 5)}


def test_positions_and_options_accept_numpy_and_torch_numbers() -> None:
    sample = shipped()
    last = sample.last
    plain = xi.attention_rollout(sample, [last])["rollout"]
    for asked in (np.int64(last), np.array(last), torch.tensor(last)):
        assert xi.attention_rollout(sample, asked)["rollout"].tolist() == plain.tolist()
    n_layers = len(sample.layers())
    for alpha in (np.float32(0.5), np.full(n_layers, 0.5), torch.full((n_layers,), 0.5)):
        table = xi.attention_rollout(sample, alpha=alpha)
        assert table["rollout"].tolist() == pytest.approx(plain.tolist())
        json.dumps(table.attrs)
    dropped = [xi.attention_rollout(sample, sinks=s)["rollout"] for s in (0, np.int64(0), {0})]
    assert dropped[0].tolist() == dropped[1].tolist() == dropped[2].tolist()
    ratio = xi.cross_modal_ratio(sample, queries=np.int64(last))["ratio"]
    assert ratio.tolist() == xi.cross_modal_ratio(sample, queries=last)["ratio"].tolist()
    assert torch.equal(sample.probs(np.int64(1), np.int64(2)), sample.probs(1, 2))
    assert sample.call(np.int64(1)) is sample.call(1)
    assert sample.probs(1, heads=[0, 0]).shape[0] == 2  # like tensor indexing


def test_kept_layers_are_json_for_every_input_type() -> None:
    for layers in ([1, 2], np.array([1, 2]), range(1, 3), [np.int64(1), 2]):
        keep = xi.Keep(layers=layers, towers=("language",))
        assert keep == xi.Keep(layers=(1, 2), towers=("language",))
    sample = xi.capture(
        tiny_vlm("llava"), picture(), QUESTION, keep=xi.Keep(layers=np.array([1, 2])), name="mine"
    )
    assert sample.name == "mine"
    assert sample.layers() == [1, 2]
    assert json.loads(json.dumps(list(sample.provenance["kept"]["layers"]))) == [1, 2]


@pytest.mark.usefixtures("any_type")
def test_figures_accept_numpy_integers() -> None:
    sample = shipped()
    for figure in (
        figures.attention_matrix(sample, np.int64(1), np.int64(2)),
        figures.overlay(sample, [sample.last], np.int64(1), np.int64(2)),
    ):
        assert "language layer 1, head 2" in words(figure)


def hybrid(layers: list[int]) -> Sample:
    calls = [random_call(6, layer=layer) for layer in layers]
    about = {"layers": {"language.self": [1, 2, 5]}}
    return sample_of("b vvvv t", calls, [grid(2, 2)], provenance=about)


SAMPLE = sample_of("b vvvv tt", [random_call(7, layer=layer) for layer in range(2)], [grid(2, 2)])
REFUSALS = {
    "no layers": (
        lambda: xi.cross_modal_ratio(SAMPLE, layers=[]),
        LayerError,
        "At least one layer is needed; got none. Leave layers out for all.",
    ),
    "no heads": (
        lambda: xi.cross_modal_ratio(SAMPLE, heads=[]),
        LayerError,
        "heads is empty for language self-attention, layer 0, call 0. Name at least one head, or "
        "leave heads out for all.",
    ),
    "slice": (
        lambda: xi.cross_modal_ratio(SAMPLE, layers=slice(0, 2)),
        LayerError,
        "layers must be a number or a list of numbers, such as [0, 3] or range(4); got slice(0, 2, "
        "None).",
    ),
    "layer": (
        lambda: SAMPLE.probs("last"),
        LayerError,
        "A layer must be a whole number; got 'last'. Negative numbers count from the last one.",
    ),
    "half a head": (
        lambda: SAMPLE.probs(0, heads=[0.5]),
        LayerError,
        "A head must be a number, a list of numbers, a slice, or a boolean mask; got [0.5]. "
        "(language self-attention, layer 0, call 0)",
    ),
    "words": (
        lambda: SAMPLE.positions(["red", "blue"]),
        PhraseError,
        "'red' is not in the sample's text 'b0 v1 v2 v3 v4 t5 t6'.",
    ),
    "by": (
        lambda: xi.cross_modal_ratio(SAMPLE, by="layer"),
        InputError,
        "by must be a list, such as ['layer']; got 'layer'.",
    ),
    "blocks": (
        lambda: xi.positional_bias(SAMPLE, blocks="text->image"),
        InputError,
        "blocks must be a list, such as ['text->image']; got 'text->image'.",
    ),
    "orders": (
        lambda: xi.pruning_curve(tiny_vlm("llava"), [], "random", orders="random"),
        InputError,
        "orders must be a list, such as ['increasing']; got 'random'.",
    ),
    "keep": (
        lambda: xi.Keep(layers="last"),
        LayerError,
        "layers must be a number or a list of numbers, such as [0, 3] or range(4); got 'last'.",
    ),
    "rollout's layers": (
        lambda: inspect.unwrap(xi.attention_rollout)(SAMPLE, layers=[0, 1, 2]),
        InputError,
        "layers must be a layer, or the start and stop of a slice, such as (0, -1) or (2, None); "
        "got [0, 1, 2].",
    ),
    "hybrid": (
        lambda: xi.attention_rollout(hybrid([1, 2, 5])),
        InputError,
        "Layers [0, 3, 4] of the language tower are not softmax attention (but convolution, "
        "recurrence or linear attention), so rollout through them is not defined. Choose "
        "consecutive attention layers: layers= one of (1, 3), (5, 6).",
    ),
}


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    ask, error, message = REFUSALS[name]
    with pytest.raises(error) as refusal:
        ask()
    assert str(refusal.value) == message


def test_rollout_through_the_attention_layers_of_a_hybrid() -> None:
    table = xi.attention_rollout(hybrid([1, 2, 5]), layers=(1, 3))
    alone = xi.attention_rollout(hybrid([1, 2]), layers=(1, 3))
    assert len(table) == len(alone) == 6
    assert table["rollout"].sum() == pytest.approx(1)
