"""Alignment of text with time: which cross-attention heads follow the sound, when a token starts.

In an encoder-decoder that reads sound, some cross-attention heads attend to the place of the next
word in the recording. Whisper (Radford et al. 2022, arXiv 2212.04356) derives word times from such
heads by dynamic time warping (Sakoe and Chiba 1978); each checkpoint lists its alignment heads.
Both functions take calls recorded in one run of the decoder on the whole text:

    with xi.record(model) as recording:
        model(input_features=features, decoder_input_ids=ids)
    table = xi.time_alignment(recording.calls, rows, n_keys=n_frames)

The attention that *predicts* a token is in the row before it, so ``rows`` are the positions of the
tokens minus one. Keys are frames of the encoder, 0.02 seconds each in Whisper. Whisper pads every
recording to 30 seconds; ``n_keys`` leaves the padding out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from xmodal_interp.analysis.tables import call_table, stacked, stamped
from xmodal_interp.arguments import as_list, checked, one_or_several, real_number, whole_number
from xmodal_interp.attention import AttentionCall, Positions, layer_index, resolve
from xmodal_interp.errors import InputError, quoted
from xmodal_interp.vocabulary import Tower

FRAME_S = 0.02  # seconds of sound per key of Whisper's cross-attention
MEDIAN_FRAMES = 7  # width of Whisper's median filter


@checked
def time_alignment(
    calls: Iterable[Any],
    rows: Positions,
    *,
    n_keys: int | None = None,
    tower: Tower = "language",
    n_permutations: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Return how well the order of the text explains each cross-attention head.

    ``monotone_share`` needs no word times. Divide the recording into consecutive blocks of frames,
    one for each row, in the order of the text (a block may be empty). It is the mean over rows of
    the share of attention in the row's block, for the division with the largest mean. It is 1 if
    each word has its own frames, one after the other, and ``1 / n_rows`` if attention is uniform.
    The null is the same number after shuffling the rows.

    Args:
        calls: Recorded calls of one sample, such as ``recording.calls``, with one call per
            cross-attention layer.
        rows: Query positions in the order of the text: for each token, the row that predicts it.
        n_keys: Number of frames that hold the recording, without padding at the end; all if not
            given. Attention is divided by its sum on these frames.
        tower: The tower whose cross-attention is read.
        n_permutations: Number of shuffled orders, the same for all heads.
        seed: Seed of the shuffles.

    Returns:
        One row per head: ``tower, kind, layer, head``, then ``monotone_share``, ``null`` (mean over
        shuffled orders), ``p_value`` (share of orders, the given one included, whose value is at
        least that of the given one) and ``mass`` (mean attention on the frames, before the
        division).

    Raises:
        InputError: There is no cross-attention of the tower, a layer ran several times, a call has
            several samples, ``rows`` are fewer than two, or ``n_keys`` is not a number of keys.
        PositionError: A row is not a query position.
    """
    whole_number(n_permutations, "n_permutations", 1)
    of_layers = _cross_calls(calls, tower)
    random = np.random.default_rng(seed)
    shuffles: np.ndarray | None = None
    parts = []
    for call in of_layers:
        probs, mass = _attention(call, rows, n_keys)
        n_rows = probs.shape[1]
        if shuffles is None:
            given = np.arange(n_rows)
            shuffles = np.stack(
                [given, *(random.permutation(given) for _ in range(n_permutations))]
            )
        shares = np.stack([_monotone_share(probs[:, order]) for order in shuffles])
        values = {
            "monotone_share": shares[0],
            "null": shares[1:].mean(0),
            "p_value": (shares >= shares[0] - 1e-12).mean(0),
            "mass": mass,
        }
        parts.append(call_table(call, {"head": range(call.n_heads)}, values))
    return stamped(
        stacked(parts),
        analysis="time_alignment",
        parameters={
            **{"rows": rows, "n_keys": n_keys, "tower": tower},
            **{"n_permutations": n_permutations, "seed": seed},
        },
        provenance=[{}],
        n_samples=1,
    )


@checked
def token_times(
    calls: Iterable[Any],
    rows: Positions,
    heads: Iterable[Sequence[int]],
    *,
    n_keys: int | None = None,
    tower: Tower = "language",
    seconds_per_key: float = FRAME_S,
    median_width: int = MEDIAN_FRAMES,
) -> Float[np.ndarray, " row"]:
    """Return the time at which each token starts, by dynamic time warping as in Whisper.

    The attention of each head is standardised over the rows of each frame, smoothed over frames by
    a median filter, and averaged over the heads. The path through rows and frames with the largest
    sum, whose steps go to the next row, the next frame or both, gives each row its first frame.

    Args:
        calls: Recorded calls of one sample, as for :func:`time_alignment`.
        rows: Query positions in the order of the text. With the rows that predict tokens, times are
            starts of tokens. With the rows of the tokens themselves, they are starts of the tokens
            that follow, hence ends of tokens: the ``token_timestamps`` of transformers.
        heads: ``(layer, head)`` of the heads to average; negative numbers count from the last.
        n_keys: Number of frames that hold the recording; all if not given.
        tower: The tower whose cross-attention is read.
        seconds_per_key: Duration of one key, in seconds.
        median_width: Odd width of the median filter, in frames; 1 for no filter.

    Returns:
        Seconds from the start of the recording, one per row, ascending.

    Raises:
        InputError: As for :func:`time_alignment`; a head is not in the recording, no head is given,
            or the width of the filter is even.
        PositionError: A row is not a query position.
    """
    real_number(seconds_per_key, "seconds_per_key", 0)
    if whole_number(median_width, "median_width", 1) % 2 == 0:
        raise InputError(f"median_width must be odd; got {median_width}.")
    by_layer = {call.layer: call for call in _cross_calls(calls, tower)}
    chosen = _known_heads(heads, by_layer)
    of_heads = []
    for layer, head in chosen:
        attention = _of_rows(by_layer[layer], rows, n_keys)[head]
        of_heads.append(_median_filtered(_standardised(attention), median_width))
    scores = torch.stack(of_heads).mean(0).double().numpy()
    return first_columns(scores) * float(seconds_per_key)


def first_columns(scores: Float[np.ndarray, "row column"]) -> Int[np.ndarray, " row"]:
    """Return the first column of each row on the monotone path with the largest sum of scores.

    The path leads from the first row and column to the last. Its steps go to the next row, the next
    column or both. Of equal predecessors the one in the previous column of the same row is chosen,
    as in Whisper.
    """
    n_rows, n_columns = scores.shape
    best = np.full((n_rows + 1, n_columns + 1), -np.inf, dtype=np.float32)
    best[0, 0] = 0
    step = np.full((n_rows + 1, n_columns + 1), 2, dtype=np.int8)
    for diagonal in range(2, n_rows + n_columns + 1):
        row = np.arange(max(1, diagonal - n_columns), min(n_rows, diagonal - 1) + 1)
        column = diagonal - row
        both, down, along = best[row - 1, column - 1], best[row - 1, column], best[row, column - 1]
        is_both, is_down = (both > down) & (both > along), (down > both) & (down > along)
        step[row, column] = np.select([is_both, is_down], [0, 1], 2)
        before = np.where(is_both, both, np.where(is_down, down, along))
        best[row, column] = scores[row - 1, column - 1] + before
    step[0, :], step[:, 0] = 2, 1
    first = np.zeros(n_rows, dtype=np.int64)
    row_at, column_at = n_rows, n_columns
    while row_at > 0:
        first[row_at - 1] = column_at - 1
        taken = step[row_at, column_at]
        row_at -= int(taken != 2)
        column_at -= int(taken != 1)
    return first


def _cross_calls(calls: Iterable[Any], tower: Tower) -> list[AttentionCall]:
    """Return the cross-attention calls of a tower, one per layer, in the order of layers."""
    given = as_list(calls, "calls")
    if not all(isinstance(call, AttentionCall) for call in given):
        raise InputError(
            f"calls must be recorded attention calls, such as recording.calls; got {quoted(calls)}."
        )
    found = sorted(
        (call for call in given if (call.tower, call.kind) == (tower, "cross")),
        key=lambda call: call.layer,
    )
    if not found:
        raise InputError(
            f"The calls hold no cross-attention of tower {tower!r}. Record an encoder-decoder, or "
            "name another tower."
        )
    layers = [call.layer for call in found]
    several = [layer for layer in layers if layers.count(layer) > 1]
    if several:
        raise InputError(
            f"Cross-attention of layer {several[0]} ran {layers.count(several[0])} times. Run the "
            "decoder once on the whole text, with decoder_input_ids."
        )
    if found[0].n_samples > 1:
        raise InputError(
            f"The calls hold {found[0].n_samples} samples. Choose one: "
            "[call.select_sample(0) for call in recording.calls]."
        )
    return found


def _of_rows(
    call: AttentionCall, rows: Positions, n_keys: int | None
) -> Float[Tensor, "head row key"]:
    """Return probabilities of the rows, on the first ``n_keys`` keys."""
    index = resolve(rows, call.n_queries, "query")
    if len(index) < 2:
        raise InputError(f"rows must hold at least two query positions; got {len(index)}.")
    kept = call.n_keys if n_keys is None else whole_number(n_keys, "n_keys", 1, call.n_keys)
    return call.probs(queries=index)[0, :, :, :kept].cpu()


def _attention(
    call: AttentionCall, rows: Positions, n_keys: int | None
) -> tuple[Float[np.ndarray, "head row key"], Float[np.ndarray, " head"]]:
    """Return attention divided by its sum over the kept keys, and the mean of this sum."""
    probs = _of_rows(call, rows, n_keys).double().numpy()
    mass = probs.sum(-1)
    return probs / mass[..., None], mass.mean(-1)


def _monotone_share(probs: Float[np.ndarray, "head row key"]) -> Float[np.ndarray, " head"]:
    """Return the largest mean share in consecutive blocks of keys, one per row, in order."""
    n_heads, n_rows, n_keys = probs.shape
    sums = np.concatenate([np.zeros((n_heads, n_rows, 1)), probs.cumsum(-1)], -1)
    best = np.zeros((n_heads, n_keys + 1))  # for each end of the blocks so far
    for row in range(n_rows):
        best = np.maximum.accumulate(best - sums[:, row], -1) + sums[:, row]
    share: np.ndarray = best[:, -1] / n_rows
    return share


def _is_whole(entry: Any) -> bool:
    return hasattr(entry, "__index__") and not isinstance(entry, (bool, np.bool_))


def _known_heads(heads: Iterable[Any], by_layer: dict[int, AttentionCall]) -> list[tuple[int, int]]:
    """Return the heads as pairs of integers."""
    found = []
    for each in one_or_several(heads):
        pair = as_list(each, "A head")
        whole = len(pair) == 2 and all(_is_whole(entry) for entry in pair)
        layer = layer_index(int(pair[0]), list(by_layer)) if whole else None
        n_heads = by_layer[layer].n_heads if layer in by_layer else 0
        if layer is None or not -n_heads <= int(pair[1]) < n_heads:
            layers = ", ".join(map(str, by_layer))
            raise InputError(
                f"heads must be pairs of layer and head, with layers {layers} and heads 0 to "
                f"{min(call.n_heads for call in by_layer.values()) - 1}; got {quoted(each)}."
            )
        found.append((layer, int(pair[1]) % n_heads))
    if not found:
        raise InputError("heads must hold at least one pair of layer and head; got none.")
    return found


def _standardised(attention: Float[Tensor, "row key"]) -> Float[Tensor, "row key"]:
    """Return attention with mean 0 and variance 1 over the rows of each frame.

    A frame that all rows attend to equally, such as a masked one, has no part in the alignment: its
    values are 0.
    """
    centred, spread = attention - attention.mean(0), attention.std(0, correction=0)
    same = (attention == attention[:1]).all(0)
    return torch.where(same, torch.zeros(()), centred / spread.masked_fill(same, 1))


def _median_filtered(values: Float[Tensor, "row key"], width: int) -> Float[Tensor, "row key"]:
    """Return medians of ``width`` neighbouring keys, mirrored at the ends."""
    half = width // 2
    if values.shape[-1] <= half:
        return values
    padded = torch.nn.functional.pad(values[None], (half, half), mode="reflect")[0]
    return padded.unfold(-1, width, 1).sort().values[..., half]
