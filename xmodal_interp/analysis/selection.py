"""Select layers, heads, queries and keys, and compute the null model: what all analyses share.

Padding tokens are never visible keys, but they are queries in bidirectional attention, and they
shift the positions after them. Results must not depend on the other samples in the batch, so the
query rows and the places of positions that are returned here leave padding out.

The null model of every statistic is attention that is uniform over the visible keys. It is an
attention call too: if all queries are zero, every visible key of a row has the same probability.
The null of a statistic is that statistic of ``uniform(call)``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, SupportsIndex, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xmodal_interp.analysis.tables import Part, Taken
from xmodal_interp.at import Selector
from xmodal_interp.attention import AttentionCall, Positions, numbers, resolve
from xmodal_interp.attention.masks import hides
from xmodal_interp.attention.statistics import HELD
from xmodal_interp.errors import (
    GeometryError,
    InputError,
    LayerError,
    NotRecordedError,
    PositionError,
)
from xmodal_interp.sample import Sample, is_visual
from xmodal_interp.vocabulary import AttentionKind, Tower

Layers = SupportsIndex | Collection[Any] | np.ndarray | Tensor | None
"""Layers (negative ones count from the last) or a mask of layers; None for all kept layers."""

_T = TypeVar("_T")
_COUNTS = "counts of visible cells"

POSITION_COLUMNS = ("token", "token_kind", "image", "row", "col", "video", "frame")
"""Columns that describe a position in a table; ``video`` and ``frame`` are NA for images."""

CHUNK_BYTES = 8 * 2**20  # of float32 probabilities per chunk; callers use a few times that
D_NULL = 8  # head width of the null's zero q and k; the fused kernel processes 8 values at a time


def selected_calls(
    sample: Sample,
    layers: Layers,
    heads: Positions | None = None,
    *,
    tower: Tower | None = None,
    kind: AttentionKind = "self",
    call: int = 0,
) -> Iterator[tuple[AttentionCall, list[int]]]:
    """Yield the calls of the chosen layers and their chosen heads, in the order given.

    The tower is ``Sample.tower`` if it is not given. One call at a time is read from a store. Each
    layer and each head is used once: in a model with four layers, ``[3, -1]`` selects one layer.
    Heads are non-negative numbers.

    Raises:
        NotRecordedError: No attention of this tower and kind was kept.
        LayerError: A layer or head does not exist, or ``layers`` or ``heads`` is empty.
    """
    tower = tower or sample.tower
    kept = sample.layers(tower, kind)
    if not kept:
        others = sorted({f"{key[0]} {key[1]}" for key in sample.calls})
        raise NotRecordedError(
            f"Sample {sample.name!r} holds no {tower} {kind}-attention; it holds: "
            f"{', '.join(others) or 'nothing'}. Capture that tower, or choose another."
        )
    yielded: dict[int, AttentionCall] = {}
    exists = sample.provenance.get("layers", {}).get(f"{tower}.{kind}") or kept
    for layer in kept if layers is None else numbers(layers, "layer", max(exists) + 1):
        found = sample.call(layer, tower=tower, kind=kind, call=call)
        if found.layer not in yielded:
            _share_counts(found, yielded.values())
            yielded[found.layer] = found
            yield found, _heads_of(found, heads)


def visibility(call: AttentionCall) -> tuple[Any, ...]:
    """Return what determines the visible cells of a call."""
    flags = (call.causal, call.offset, call.sliding_window, call.n_queries, call.n_keys)
    return call.mask, call.segments, call.rows, *flags


def are_same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Return whether two tuples hold the same tensors and equal values; an equal copy differs."""
    return all(
        a is b if isinstance(a, Tensor) or isinstance(b, Tensor) else a == b
        for a, b in zip(first, second, strict=True)
    )


def _share_counts(call: AttentionCall, others: Iterable[AttentionCall]) -> None:
    """Share the results of ``counted_once`` with a call that has the same visible cells."""
    if _COUNTS not in call.memo:
        about = visibility(call)
        same = (each.memo[_COUNTS] for each in others if are_same(about, visibility(each)))
        call.memo[_COUNTS] = next(same, {})


def counted_once(
    call: AttentionCall, name: str, about: tuple[Any, ...], count: Callable[[], _T]
) -> _T:
    """Return a result that depends only on the visible cells, once for layers that share them.

    Args:
        call: A call of ``selected_calls``.
        name: A name of the result.
        about: What else determines the result. The result of the last value is kept.
        count: The function that computes it.
    """
    counts = call.memo.setdefault(_COUNTS, {})
    kept: tuple[tuple[Any, ...], _T] | None = counts.get(name)
    if kept is None or kept[0] != about:
        kept = counts[name] = about, count()
    return kept[1]


def _heads_of(call: AttentionCall, heads: Positions | None) -> list[int]:
    """Return the chosen heads as non-negative numbers, without repetitions, in the order given."""
    if heads is None:
        return list(range(call.n_heads))
    try:
        chosen: list[int] = resolve(heads, call.n_heads, "head").tolist()
    except PositionError as error:
        raise LayerError(f"{error} ({call.name})") from None
    if not chosen:
        raise LayerError(
            f"heads is empty for {call.name}. Name at least one head, or leave heads out for all."
        )
    return list(dict.fromkeys(chosen))


def queries_of(sample: Sample, queries: Selector) -> Int[Tensor, " query"]:
    """Return the query positions without repetitions, in the order given.

    See :meth:`Sample.positions`. A mean over queries counts each of them once.

    Raises:
        InputError: ``queries`` is ``"text"`` and no text is after the image.
    """
    return each_once(sample.positions(queries))


def each_once(positions: Int[Tensor, " position"]) -> Int[Tensor, " once"]:
    """Return the positions without repetitions, in the order given."""
    return torch.tensor(list(dict.fromkeys(positions.tolist())), dtype=torch.long)


def image_keys(
    sample: Sample, image: int | None, kind: AttentionKind = "self"
) -> Bool[Tensor, " key"]:
    """Return a mask of the keys that are tokens of the image, or of any image or video if None.

    Raises:
        InputError: There are no such tokens.
    """
    table = (
        sample.cross_keys if kind == "cross" and sample.cross_keys is not None else sample.tokens
    )
    keys = is_visual(table["kind"].to_numpy(dtype=object))
    if image is not None:
        keys &= table["image"].eq(image).fillna(value=False).to_numpy(dtype=bool)
    if not keys.any():
        wanted = "image tokens" if image is None else f"tokens of image {image}"
        raise InputError(
            f"Sample {sample.name!r} has no {wanted}; it has {len(sample.grids)} images, numbered "
            "from 0."
        )
    return torch.tensor(keys)


def position_table(sample: Sample, tower: Tower, image: int, n_positions: int) -> pd.DataFrame:
    """Return a table that describes the positions of the language tower, or of one image.

    In the vision tower, ``image`` counts the images first and then the videos. Tokens of a
    thumbnail have no row and column, because those would collide with the tokens of the image.

    Returns:
        ``token, token_kind, image, row, col, video, frame``, one row per position. In the vision
        tower, ``token`` is the name of the position (``Sample.patch_names``).

    Raises:
        GeometryError: The grid of the image and the tower have different numbers of positions.
    """
    if tower == "language":
        table = sample.tokens[["token", "kind", "image", "video", "frame"]]
        table = table.join(image_places(sample.tokens)).rename(columns={"kind": "token_kind"})
        return table[list(POSITION_COLUMNS)].reset_index(drop=True)
    video = image - len(sample.grids)
    kind, number = ("image", image) if video < 0 else ("video", video)
    grid = sample.grids[image] if video < 0 else sample.video_grids[video]
    axes = ["row", "col"] if video < 0 else ["frame", "row", "col"]
    places = pd.DataFrame(grid.patch_places, columns=axes, dtype="Int64")
    if len(places) != n_positions:
        raise GeometryError(
            f"{kind.capitalize()} {number} of sample {sample.name!r} has a grid of {len(places)} "
            f"places, but the {tower} tower has {n_positions} positions."
        )
    nowhere, names = places["row"] < 0, sample.patch_names(image)
    kinds = np.where(names == "padding", "padding", np.where(nowhere, "special", kind))
    table = places.mask(nowhere).reindex(columns=list(POSITION_COLUMNS))
    table = table.assign(token=names, token_kind=kinds, **{kind: number})
    integers = dict.fromkeys(("image", "row", "col", "video", "frame"), "Int64")
    return table.astype({"token": "string", "token_kind": "string", **integers})


def visual_number(sample: Sample, tower: Tower, image: int) -> int:
    """Return the number of a tower's calls for an image: its index in the vision tower, else 0.

    Raises:
        InputError: The image does not exist.
    """
    n_visuals = len(sample.grids) + len(sample.video_grids)
    if image >= max(n_visuals, 1):
        raise InputError(
            f"There is no image {image}: sample {sample.name!r} has {n_visuals} images and "
            "videos, numbered from 0."
        )
    return image if tower == "vision" else 0


def rows_in_tower(
    sample: Sample,
    queries: Selector | None,
    tower: Tower,
    image: int,
    default: Selector,
) -> Int[Tensor, " query"]:
    """Return the query positions in a tower, without repetitions, in the order given.

    Args:
        sample: The sample.
        queries: A selector. If not given, ``default`` in the language tower, and
            the class token in the vision tower.
        tower: ``"language"`` or ``"vision"``.
        image: Index of the image in the vision tower.
        default: The queries in the language tower if none are given.

    Raises:
        InputError: No queries are given, and the vision tower does not have exactly one class
            token.
    """
    if tower == "language":
        return queries_of(sample, default if queries is None else queries)
    if queries is not None:
        return each_once(sample.positions(queries, tower=tower, image=image))
    names = sample.patch_names(image)
    classes = np.flatnonzero(np.isin(names, ("class", "special")))
    if len(classes) != 1:
        raise InputError(
            f"The {tower} tower has {len(classes)} class tokens, so there is no default for "
            "queries. Pass positions as queries."
        )
    return torch.from_numpy(classes)


def counted_positions(
    sample: Sample, tower: Tower, image: int, n_positions: int
) -> Bool[Tensor, " position"]:
    """Return a mask of the positions of a tower, or of an image in it, that are not padding."""
    if tower == "language":
        return not_padding(sample)
    names = sample.patch_names(image) if image < len(sample.grids) else np.array([], dtype=object)
    if len(names) != n_positions:  # the positions are not those of the grid
        return torch.ones(n_positions, dtype=torch.bool)
    return torch.from_numpy(names != "padding")


def position_columns(positions: pd.DataFrame | Mapping[str, Any], index: np.ndarray) -> Part:
    """Return the ``POSITION_COLUMNS`` of the positions at an index.

    Args:
        positions: A table with these columns, or a mapping of their names to arrays.
        index: The index of the position of each row.
    """
    arrays = {name: positions[name] for name in POSITION_COLUMNS}
    return {name: Taken(getattr(each, "array", each), index) for name, each in arrays.items()}


def image_places(tokens: pd.DataFrame) -> pd.DataFrame:
    """Return ``row, col`` of each token in the grid of its image.

    Both are NA for tokens of a thumbnail, which have a separate grid.
    """
    small = tokens["view"].eq("thumbnail").fillna(value=False).astype(bool)
    return tokens[["row", "col"]].mask(small)


def not_padding(sample: Sample) -> Bool[Tensor, " position"]:
    """Return a mask of the positions that are not padding."""
    return torch.from_numpy(sample.kinds != "padding")


def first_position(sample: Sample) -> int:
    """Return the first position that is not padding."""
    return int(np.flatnonzero(not_padding(sample))[0])


def sequence_places(sample: Sample) -> Int[Tensor, " position"]:
    """Return the index of each position among those that are not padding, from 0.

    A padding position has the index of the last position before it that is not padding, or -1.
    """
    return not_padding(sample).long().cumsum(0) - 1


def rows_of(call: AttentionCall, counted: Bool[Tensor, " position"]) -> Int[Tensor, " query"]:
    """Return the query positions that a call holds, without padding.

    Args:
        call: The call.
        counted: A mask of the positions that are not padding (``counted_positions``).
    """
    rows = call.query_positions
    return rows[counted.to(rows.device)[rows]]


def refuse_text(given: object, name: str, example: str) -> None:
    """Reject a string where a list of names is expected: iterating over it would give letters.

    Raises:
        InputError: ``given`` is a string.
    """
    if isinstance(given, str):
        raise InputError(f"{name} must be a list, such as {example}; got {given!r}.")


def refuse_cross_attention(sample: Sample, question: str) -> None:
    """Reject a sample whose image tokens are not in the text sequence.

    Args:
        sample: The sample.
        question: Name of the analysis, for the error message.

    Raises:
        InputError: Text attends to the image by cross-attention.
    """
    if sample.cross_keys is not None:
        layers = ", ".join(str(layer) for layer in sample.layers("language", "cross"))
        raise InputError(
            f"{question} requires image and text tokens in one sequence. In sample {sample.name!r} "
            f"text attends to the image by cross-attention (layers {layers or 'not kept'}), where "
            "every key is an image key."
        )


def uniform(call: AttentionCall) -> AttentionCall:
    """Return the call with uniform attention over the same visible keys.

    The result has one head, unless the mask differs between heads.
    """
    mask = call.mask
    if mask is not None and mask.dtype != torch.bool:
        mask = ~hides(mask)
    n_heads = 1 if mask is None else mask.shape[1]
    device = call.device
    nothing: dict[str, Any] = dict.fromkeys(HELD)
    return replace(
        call,
        q=torch.zeros(1, n_heads, call.n_queries, D_NULL, dtype=torch.float32, device=device),
        k=torch.zeros(1, n_heads, call.n_keys, D_NULL, dtype=torch.float32, device=device),
        v=None,
        mask=mask,
        bias=None,
        softcap=None,
        sinks=None,
        dense=None,
        **nothing,
    )


def n_visible(
    call: AttentionCall, queries: Int[Tensor, " query"], heads: Sequence[int]
) -> Float[Tensor, "head query"]:
    """Return how many keys each query of each head sees."""
    return per_head(call.n_visible(queries)[0].float(), heads)


def mass_and_null(
    call: AttentionCall,
    groups: Float[Tensor, "group key"] | Bool[Tensor, "group key"],
    heads: Sequence[int],
    queries: Int[Tensor, " query"],
) -> tuple[Float[Tensor, "head query group"], Float[Tensor, "head query group"]]:
    """Return the mass on each group of keys, and that of uniform attention."""
    about = (queries.tolist(), groups.dtype, groups.shape, groups.cpu().numpy().tobytes())
    null = counted_once(call, "null_mass", about, lambda: call.null_mass(groups, queries)[0].cpu())
    return call.mass(groups, heads, queries)[0].cpu(), per_head(null, heads)


def per_head(values: Float[Tensor, "#head *rest"], heads: Sequence[int]) -> Tensor:
    """Return the values of the heads; values with a head axis of length 1 hold for all heads."""
    if values.shape[0] == 1:
        return values.expand(len(heads), *values.shape[1:])
    return values[list(heads)]


def mean_where(
    values: Float[Tensor, "head query *rest"], counted: Bool[Tensor, "head query *rest"]
) -> Float[Tensor, "head *rest"]:
    """Return the mean over the counted queries; NaN if there are none."""
    return values.where(counted, 0.0).sum(1) / counted.sum(1)


def received(
    call: AttentionCall, queries: Int[Tensor, " query"], heads: Sequence[int]
) -> Float[Tensor, "head key"]:
    """Return the probability that each key receives, summed over the queries.

    A query that sees no key gives none. The result for the last queries and heads is kept with the
    call, because several analyses need it.
    """
    chosen = (queries.tolist(), list(heads))
    kept: tuple[Any, Tensor] | None = call.memo.get("received")  # read once: threads may replace it
    if kept is None or kept[0] != chosen:
        values = call.received(query_weights(call, queries), list(heads))[0]
        kept = call.memo["received"] = chosen, values
    return kept[1]


def query_weights(
    call: AttentionCall, queries: Int[Tensor, " query"]
) -> Float[Tensor, "1 call_query"]:
    """Return a vector over the queries of a call with 1 at the given positions, else 0."""
    weights = torch.zeros(1, call.n_queries, dtype=torch.float32, device=call.device)
    weights[0, call.row_index(queries)] = 1.0
    return weights


def row_chunks(call: AttentionCall, queries: Int[Tensor, " query"], n_heads: int) -> list[Tensor]:
    """Split queries into chunks whose probabilities take a few MB."""
    return list(queries.split(max(1, CHUNK_BYTES // max(4 * call.n_keys * n_heads, 1))))


def cells_of(
    call: AttentionCall,
    heads: Sequence[int],
    rows: Int[Tensor, " query"],
    keys: Int[Tensor, " key"],
) -> tuple[
    Float[Tensor, "head query key"], Float[Tensor, "#head query key"], Float[Tensor, "head query 1"]
]:
    """Return probabilities, whether each cell is visible, and how many keys each query sees.

    A query that sees no key has probabilities 0 and a count of 1.
    """
    counts = n_visible(call, rows, heads).cpu().double()[..., None]
    seen = call.visible(rows)[0][..., keys].cpu().double()
    seen = seen if seen.shape[0] == 1 else seen[list(heads)]
    probs = call.probs(list(heads), rows, keys)[0].cpu().double()
    return probs.where(counts > 0, 0.0), seen, counts.clamp(min=1)
