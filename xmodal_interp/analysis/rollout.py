"""Attention rollout: how much of each input position is in a position after many layers.

Abnar & Zuidema 2020 (arXiv 2005.00928):

    F_l = fuse over heads of A_l                      mean, max or min
    F_l = discard(F_l)                                optionally: the lowest entries become 0
    F_l = without_sinks(F_l)                          optionally: their columns become 0, and
                                                      each row is scaled back to its former sum
    B_l = rownorm(alpha_l F_l + (1 - alpha_l) I)      every row over its keys
    R   = B_L ... B_2 B_1

1. Only some rows of ``R`` are wanted: start with their unit vectors and multiply from the top layer
   down, ``r <- r B_l``. That is ``O(L S^2)`` time for a row and no matrix (the whole product is
   ``O(L S^3)``).
2. With ``baseline="uniform"`` the same is done to attention that is uniform over the visible keys.
   It is no formality: in a causal stack position 0 is absorbing, and rollout of uniform attention
   of 24 layers puts 0.97 of position 63 there, and most of the image's share in its top rows,
   whatever the image shows. ``log2_ratio`` is what the model adds to that.

All products are taken in float64, whose smallest number is 1e-308: after 80 layers with an alpha of
0.9 most shares are below 1e-45, the smallest of float32.

A row that sees nothing keeps what it has. With ``discard`` a layer's fused matrix is held whole,
one layer at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence, Set
from typing import Any, SupportsFloat, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from xmodal_interp.analysis.frames import keyed, long_table, over_samples, samples_of, stacked
from xmodal_interp.analysis.nulls import uniform
from xmodal_interp.analysis.padding import first_position, present
from xmodal_interp.analysis.rolling import Fusion, Rule, alpha_of, rolled
from xmodal_interp.analysis.selecting import (
    calls_of,
    each_once,
    position_table,
    queries_of,
    refuse_cross_attention,
)
from xmodal_interp.arguments import checked
from xmodal_interp.attention import AttentionCall, Positions, resolve, whole_slice
from xmodal_interp.errors import InputError, NotRecordedError, quoted
from xmodal_interp.phrases import has_phrase
from xmodal_interp.sample import Sample, Selector
from xmodal_interp.vocabulary import LAST, Tower

Sinks = Positions | Collection[int] | str
"""``"keep"``, ``"drop_first"``, or positions."""

Alphas = SupportsFloat | Sequence[SupportsFloat] | np.ndarray | Tensor | str
"""The share of attention in a layer, of any spelling."""


@checked
def attention_rollout(  # noqa: PLR0913  the choices that published variants differ in
    samples: Sample | Iterable[Sample],
    queries: Selector | None = None,
    *,
    fusion: Fusion = "mean",
    alpha: Alphas = 0.5,
    discard: float = 0.0,
    baseline: str | None = None,
    sinks: Sinks = "keep",
    layers: tuple[int | None, int | None] | None = None,
    tower: Tower = "language",
    image: int = 0,
) -> pd.DataFrame:
    """Share of every input position in some positions after the layers (Abnar & Zuidema 2020).

    Args:
        samples: One sample or many.
        queries: Positions or a phrase; ``"last"`` (of the prompt) if not given. In the vision tower
            positions of its own; the class token if not given.
        fusion: How the heads of a layer become one matrix.
        alpha: Share of attention against the residual stream, 0 to 1; one for all layers, or one
            for each, bottom first; or ``"norm"``: of each token, by the norms of the attention's
            output and of the residual stream (captured with ``Keep(norms=True)``). 0.5 is the
            paper's.
        discard: The lowest share of all ``S x S`` entries of each fused matrix becomes 0, invisible
            ones included (but for padding): of a causal matrix nothing that counts is discarded
            below one half. 0 to below 1.
        baseline: ``"uniform"`` adds the rollout of attention uniform over the visible keys, with
            the same options.
        sinks: ``"keep"``; ``"drop_first"``, which takes attention to the first position away
            wherever a row sees something else; or positions to treat so.
        layers: Start and stop as of a slice, None for open: ``(0, -1)`` leaves the last layer out,
            as LLaVA does in its vision tower. Layers that mix positions without a matrix of
            probabilities (convolution, recurrence, linear attention) cannot be among them: of a
            model that has such layers, choose attention layers that follow each other. Those
            behind the last attention layer are never counted.
        tower: ``"language"`` or ``"vision"``.
        image: In the vision tower: which image; videos are numbered behind the images.

    Returns:
        One row per sample, query and key: ``sample, tower, kind, query, key``, then
        ``query_token``, ``token, token_kind, image, row, col, video, frame`` of the key, and
        ``rollout`` (the keys of a query sum to 1). With a baseline also ``null`` and ``log2_ratio``
        (log2 of rollout over null; minus infinity where nothing arrives, or less than 1e-308, the
        smallest number of float64; NaN where nothing can).
        Queries that see nothing, such as padding, are left out.

    Raises:
        InputError: An option outside its range, an image that is not in the sequence, or a layer
            without a matrix of probabilities.
        NotRecordedError: Layers, rows or norms that were not kept.
    """
    rule = Rule(fusion, alpha_of(alpha), discard)
    if not (baseline is None or (isinstance(baseline, str) and baseline == "uniform")):
        raise InputError(f"baseline is 'uniform' or None; got {quoted(baseline)}.")
    if baseline is not None and discard > 0:
        raise InputError(
            "Uniform attention has no lowest entries to discard: a baseline goes with discard=0. "
            f"Got baseline={baseline!r} and discard={discard}; leave one out."
        )

    def table_of(sample: Sample) -> pd.DataFrame:
        n_visuals = len(sample.grids) + len(sample.video_grids)
        if image >= max(n_visuals, 1):
            raise InputError(
                f"Sample {sample.name!r} has {n_visuals} images and videos, numbered from 0; there "
                f"is no image {image}."
            )
        calls = _calls(sample, layers, tower, image)
        positions = position_table(sample, tower, image, calls[0].n_keys)
        rows = _seeing(calls, positions, _rows(sample, queries, tower, positions))
        drop = _dropped(sample, sinks, tower, len(positions))
        start = functional.one_hot(rows, len(positions)).double()
        counted = _counted(sample, tower, len(positions))
        values = {"rollout": rolled(start, calls, rule, drop, counted)}
        if baseline is not None:
            even = [uniform(call) for call in calls]
            null = values["null"] = rolled(start, even, rule, drop, counted)
            values["log2_ratio"] = (values["rollout"] / null).log2()
        axes = {"query": rows.tolist(), "key": range(len(positions))}
        table = stacked([keyed(long_table(axes, values), tower=tower, kind="self")])
        about = pd.concat([positions] * len(rows), ignore_index=True)
        tokens = positions["token"].iloc[table["query"]].reset_index(drop=True)
        about.insert(0, "query_token", tokens)
        keys = ["tower", "kind", "query", "key"]
        return pd.concat([table[keys], about, table[list(values)]], axis=1)

    parameters = {
        "queries": queries,
        "fusion": fusion,
        "alpha": alpha,
        "discard": discard,
        "baseline": baseline,
        "sinks": sinks,
        "layers": layers,
        "tower": tower,
        "image": image,
    }
    return over_samples(samples, table_of, analysis="attention_rollout", parameters=parameters)


@checked
def rollout_matrix(
    sample: Sample,
    *,
    fusion: Fusion = "mean",
    alpha: Alphas = 0.5,
    discard: float = 0.0,
    sinks: Sinks = "keep",
    layers: tuple[int | None, int | None] | None = None,
    tower: Tower = "language",
    image: int = 0,
) -> Float[Tensor, "query key"]:
    """All rows of the rollout at once, float64, ``S x S``; arguments as in ``attention_rollout``.

    Rows sum to 1; the row of a position that sees nothing is its unit vector.
    """
    (sample,) = samples_of([sample])
    rule = Rule(fusion, alpha_of(alpha), discard)
    calls = _calls(sample, layers, tower, image)
    n_positions = calls[0].n_keys
    drop = _dropped(sample, sinks, tower, n_positions)
    counted = _counted(sample, tower, n_positions)
    return rolled(torch.eye(n_positions, dtype=torch.float64), calls, rule, drop, counted)


def _calls(
    sample: Sample, layers: tuple[int | None, int | None] | None, tower: Tower, image: int
) -> list[AttentionCall]:
    """The chosen layers, bottom first: all between start and stop, with all their rows."""
    if tower == "language":
        refuse_cross_attention(sample, "Rollout")
    elif tower == "connector":
        raise InputError(
            "Rollout goes through self-attention over one sequence; got tower='connector'. Choose "
            "'language' or 'vision'."
        )
    held = sample.layers(tower, "self")
    there = sample.provenance.get("layers", {}).get(f"{tower}.self", [])
    n_layers = max({*held, *there}, default=0) + 1
    given: Any = layers
    if given is not None and np.shape(given) != (2,):
        raise InputError(
            "layers is the start and stop of a slice, such as (0, -1) or (2, None); got "
            f"{layers!r}."
        )
    part = whole_slice(slice(*((None, None) if layers is None else layers)), "layer")
    chosen = range(n_layers)[part]
    if there:
        _refuse_gaps(chosen, there, tower)
    if not chosen:
        raise InputError(
            f"layers is the start and stop of a slice over {n_layers} layers; got {layers}, which "
            "leaves none."
        )
    missing = sorted(set(chosen) - set(held))
    if held and missing:
        raise NotRecordedError(
            f"Rollout multiplies every layer from start to stop. Of {tower} layers {chosen.start} "
            f"to {chosen.stop - 1}, {missing} were not kept (kept were {held}). Capture all "
            "layers, or choose layers=(start, stop) among the kept."
        )
    calls = list(
        calls_of(sample, list(chosen), tower=tower, call=image if tower == "vision" else 0)
    )
    for call in calls:
        if call.n_queries != call.n_keys:
            raise NotRecordedError(
                f"Rollout goes through every position, so every query row is needed. {call.name} "
                f"holds {call.n_queries} rows for {call.n_keys} keys; capture with "
                "Keep(queries='all')."
            )
    return calls


def _refuse_gaps(chosen: range, there: Collection[int], tower: Tower) -> None:
    """Refuse layers that mix positions without a matrix that could be multiplied."""
    gaps = sorted(set(chosen) - set(there))
    if gaps:
        starts = [layer for layer in sorted(there) if layer - 1 not in there]
        stops = [layer + 1 for layer in sorted(there) if layer + 1 not in there]
        runs = ", ".join(f"({a}, {b})" for a, b in zip(starts, stops, strict=True))
        raise InputError(
            "Rollout multiplies the attention of every layer from start to stop. In the "
            f"{tower} tower, {gaps} have none: such layers mix positions by a convolution, a "
            "recurrence or linear attention, and what they do would be missing. Choose layers "
            f"between them: layers= one of {runs}."
        )


def _rows(
    sample: Sample, queries: Selector | None, tower: Tower, positions: pd.DataFrame
) -> Int[Tensor, " query"]:
    """The positions that were asked for."""
    if tower == "language":
        return queries_of(sample, LAST if queries is None else queries)
    if has_phrase(queries):
        raise InputError(
            f"A phrase names text positions; give those of the {tower} tower as numbers. Got "
            f"{queries!r}."
        )
    if queries is not None:
        return each_once(resolve(cast("Positions", queries), len(positions), "position"))
    classes = positions.index[positions["token_kind"] == "special"]
    if len(classes) != 1:
        raise InputError(
            "Without queries, rollout of the vision tower asks the class token; this tower has "
            f"{len(classes)}. Give positions."
        )
    return torch.tensor(classes.to_numpy())


def _seeing(
    calls: Sequence[AttentionCall], positions: pd.DataFrame, rows: Int[Tensor, " query"]
) -> Int[Tensor, " seeing"]:
    """The rows that see something in every layer and are not padding."""
    seeing = torch.tensor(
        positions["token_kind"].iloc[rows.tolist()].ne("padding").to_numpy(dtype=bool)
    )
    for call in calls:
        seeing &= call.n_visible(rows)[0].gt(0).all(0).cpu()
    if not seeing.any():
        raise InputError(
            f"Rollout starts at a position that sees something; {rows.tolist()[:6]} see nothing. "
            "Choose others than padding."
        )
    return rows[seeing]


def _counted(sample: Sample, tower: Tower, n_positions: int) -> Bool[Tensor, " position"]:
    """True on the positions of a tower that are no padding."""
    return present(sample) if tower == "language" else torch.ones(n_positions, dtype=torch.bool)


def _dropped(sample: Sample, sinks: Sinks, tower: Tower, n_positions: int) -> Bool[Tensor, " key"]:
    """True on the positions whose attention is taken away."""
    drop = torch.zeros(n_positions, dtype=torch.bool)
    if isinstance(sinks, str):
        if sinks not in ("keep", "drop_first"):
            raise InputError(f"sinks is 'keep', 'drop_first' or positions; got {sinks!r}.")
        if sinks == "drop_first":
            drop[first_position(sample) if tower == "language" else 0] = True
    else:
        chosen: Any = sorted(sinks) if isinstance(sinks, Set) else sinks
        drop[resolve(chosen, n_positions, "position")] = True
    return drop
