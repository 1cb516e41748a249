from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

import xmodal_interp as xi
from xmodal_interp.analysis.time_alignment import first_columns
from xmodal_interp.attention import AttentionCall
from xmodal_interp.errors import InputError


def cross(probs: Any, layer: int = 0) -> AttentionCall:
    """Return a cross-attention call with these probabilities, ``[head, row, key]``."""
    dense = torch.as_tensor(np.asarray(probs), dtype=torch.float32)[None]
    return AttentionCall(
        *("language", "cross", layer, "decoder", 0), q=None, k=None, scaling=1.0, dense=dense
    )


def slow_share(probs: np.ndarray) -> float:
    """Return the largest mean share over all divisions into consecutive blocks."""
    n_rows, n_keys = probs.shape

    def best(row: int, start: int) -> float:
        if row == n_rows - 1:
            return float(probs[row, start:].sum())
        ends = range(start, n_keys + 1)
        return max(float(probs[row, start:end].sum()) + best(row + 1, end) for end in ends)

    return best(0, 0) / n_rows


def slow_path(scores: np.ndarray) -> tuple[float, list[int]]:
    """Return the largest sum over all monotone paths, and the first column of each row."""
    n_rows, n_columns = scores.shape

    def best(row: int, column: int) -> tuple[float, list[tuple[int, int]]]:
        before = [
            best(r, c)
            for r, c in ((row - 1, column - 1), (row - 1, column), (row, column - 1))
            if r >= 0 and c >= 0
        ]
        total, path = max(before, key=lambda each: each[0]) if before else (0.0, [])
        return total + scores[row, column], [*path, (row, column)]

    total, path = best(n_rows - 1, n_columns - 1)
    return total, [min(c for r, c in path if r == row) for row in range(n_rows)]


def test_a_diagonal_head_has_share_one_and_a_uniform_head_one_in_n_rows() -> None:
    diagonal = np.kron(np.eye(5), np.full((1, 4), 0.25))
    uniform = np.full((5, 20), 1 / 20)
    backward = diagonal[::-1]
    table = xi.time_alignment([cross([diagonal, uniform, backward])], range(5))
    assert table["monotone_share"].tolist() == pytest.approx([1, 0.2, 0.2], abs=1e-6)
    # 1 of 120 orders is the given one
    assert table["p_value"].iloc[0] < 0.05
    assert table["p_value"].iloc[1:].tolist() == [1, 1]
    assert table["null"].iloc[1] == pytest.approx(0.2, abs=1e-6)
    assert table["mass"].tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    assert table[["tower", "kind", "layer", "head"]].to_numpy().tolist() == [
        ["language", "cross", 0, head] for head in range(3)
    ]
    assert table.attrs["analysis"] == "time_alignment"


@pytest.mark.parametrize("seed", range(3))
def test_the_share_is_the_best_over_all_divisions(seed: int) -> None:
    probs = np.random.default_rng(seed).dirichlet(np.full(9, 0.3), size=(2, 4))
    table = xi.time_alignment([cross(probs)], [0, 1, 2, 3], n_permutations=3, seed=seed)
    expected = [slow_share(head) for head in probs]
    assert table["monotone_share"].tolist() == pytest.approx(expected, abs=1e-6)


def test_padding_at_the_end_and_other_rows_are_left_out() -> None:
    probs = np.random.default_rng(0).dirichlet(np.full(10, 0.3), size=(1, 6))
    table = xi.time_alignment([cross(probs)], range(1, 5), n_keys=7)
    kept = probs[0, 1:5, :7]
    mass = kept.sum(-1)
    assert table["mass"].item() == pytest.approx(mass.mean(), abs=1e-6)
    expected = slow_share(kept / mass[:, None])
    assert table["monotone_share"].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (2, 2), (4, 6), (6, 4)])
def test_the_path_has_the_largest_sum(shape: tuple[int, int]) -> None:
    scores = np.random.default_rng(sum(shape)).normal(size=shape)
    assert first_columns(scores).tolist() == slow_path(scores)[1]


@cache
def whisper() -> tuple[Any, torch.Tensor]:
    """Return a tiny random Whisper with published heads, and the features of noise."""
    torch.manual_seed(0)
    sizes = {
        f"{part}_{of}": n
        for part in ("encoder", "decoder")
        for of, n in {"layers": 2, "attention_heads": 4, "ffn_dim": 32}.items()
    }
    config = WhisperConfig(
        **sizes,
        vocab_size=60,
        d_model=32,
        max_source_positions=150,
        num_mel_bins=8,
        pad_token_id=50,
        bos_token_id=50,
        eos_token_id=50,
        decoder_start_token_id=51,
        init_std=0.5,
    )
    model = WhisperForConditionalGeneration(config).eval()
    settings = model.generation_config
    settings.alignment_heads = [[0, 1], [1, 0], [1, 3]]
    settings.no_timestamps_token_id = 52
    settings.is_multilingual = False
    settings.return_timestamps = False
    settings.suppress_tokens = [50, 51, 52]
    settings.begin_suppress_tokens = None
    return model, torch.randn(1, 8, 300)


@pytest.mark.parametrize("n_frames", [300, 120])
def test_rows_of_tokens_give_the_token_timestamps_of_transformers(n_frames: int) -> None:
    model, features = whisper()
    mask = (torch.arange(300) < n_frames).long()[None]
    with torch.no_grad():
        found = model.generate(
            features,
            attention_mask=mask,
            return_token_timestamps=True,
            return_dict_in_generate=True,
            max_new_tokens=12,
        )
        ids, times = found["sequences"], found["token_timestamps"][0]
        with xi.record(model) as recording:
            model(input_features=features, decoder_input_ids=ids)
    n = ids.shape[1]
    heads = model.generation_config.alignment_heads
    ours = xi.token_times(recording.calls, range(2, n - 1), heads, n_keys=n_frames // 2)
    assert len(set(ours.tolist())) > 5
    assert ours.tolist() == pytest.approx(times[2 : n - 1].tolist(), abs=1e-6)


def test_invalid_arguments_are_refused() -> None:
    two = np.full((1, 3, 6), 1 / 6)
    calls = [cross(two), cross(two, 1)]
    own = AttentionCall(
        *("language", "self", 0, "decoder", 0),
        q=None,
        k=None,
        scaling=1.0,
        dense=torch.full((1, 1, 3, 3), 1 / 3),
    )
    pairs = "heads must be pairs of layer and head, with layers 0, 1 and heads 0 to 0; got"
    for given, options, message in (
        (
            [own],
            {},
            "The calls hold no cross-attention of tower 'language'. Record an encoder-decoder, or "
            "name another tower.",
        ),
        (
            [cross(two)] * 2,
            {},
            "Cross-attention of layer 0 ran 2 times. Run the decoder once on the whole text, with "
            "decoder_input_ids.",
        ),
        (calls, {"rows": [1]}, "rows must hold at least two query positions; got 1."),
        (calls, {"n_keys": 7}, "n_keys must be an integer from 1 to 6; got 7."),
        ([1], {}, "calls must be recorded attention calls, such as recording.calls; got [1]."),
    ):
        for function, heads in ((xi.time_alignment, {}), (xi.token_times, {"heads": [(0, 0)]})):
            with pytest.raises(InputError) as refused:
                function(given, **{"rows": range(3), **heads, **options})
            assert str(refused.value) == message
    for options, message in (
        ({"heads": [(2, 0)]}, f"{pairs} (2, 0)."),
        ({"heads": [(0, 1)]}, f"{pairs} (0, 1)."),
        ({"heads": []}, "heads must hold at least one pair of layer and head; got none."),
        ({"heads": [(0, 0)], "median_width": 4}, "median_width must be odd; got 4."),
    ):
        with pytest.raises(InputError) as refused:
            xi.token_times(calls, range(3), **options)
        assert str(refused.value) == message
    several = AttentionCall(
        *("language", "cross", 0, "decoder", 0),
        q=None,
        k=None,
        scaling=1.0,
        dense=torch.full((2, 1, 3, 3), 1 / 3),
    )
    with pytest.raises(InputError) as refused:
        xi.time_alignment([several], range(3))
    assert str(refused.value) == (
        "The calls hold 2 samples. Choose one: [call.select_sample(0) for call in recording.calls]."
    )


@pytest.mark.parametrize("width", [1, 7])
@pytest.mark.parametrize("n_masked", [3, 12])
def test_frames_that_no_row_attends_to_do_not_move_the_times(n_masked: int, width: int) -> None:
    """Their attention has no variance; 0 / 0 would end the path there."""
    words = np.kron(np.eye(5), np.full((1, 8), 1 / 8)) + 0.002
    words /= words.sum(-1, keepdims=True)
    masked = np.zeros((5, n_masked))
    options = {"seconds_per_key": 1.0, "median_width": width}
    before = xi.token_times([cross([words])], range(5), [(0, 0)], **options)
    assert before.tolist() == [0, 8, 16, 24, 32]
    call = cross([np.concatenate([words[:, :20], masked, words[:, 20:]], 1)])
    times = xi.token_times([call], range(5), [(0, 0)], **options)
    assert times.tolist() == [0, 8, 16, 24 + n_masked, 32 + n_masked]


def test_negative_layers_and_heads_count_from_the_last() -> None:
    random = np.random.default_rng(0)
    calls = [cross(random.dirichlet(np.ones(9), (2, 4)), layer) for layer in range(3)]
    assert np.array_equal(
        xi.token_times(calls, range(4), [(-1, -2), (-3, 1)]),
        xi.token_times(calls, range(4), [(2, 0), (0, 1)]),
    )
    for heads in ([(-4, 0)], [(0, 2)], [(0, -3)], [(True, 0)]):
        with pytest.raises(InputError) as refusal:
            xi.token_times(calls, range(4), heads)
        assert str(refusal.value) == (
            f"heads must be pairs of layer and head, with layers 0, 1, 2 and heads 0 to 1; got "
            f"{heads[0]!r}."
        )
