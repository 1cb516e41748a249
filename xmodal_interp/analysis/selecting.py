"""Select the layers, heads, queries and keys of an analysis, and raise the errors they share."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, SupportsIndex

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from xmodal_interp.attention import AttentionCall, Positions, numbers, resolve
from xmodal_interp.errors import (
    GeometryError,
    InputError,
    LayerError,
    NotRecordedError,
    PositionError,
)
from xmodal_interp.sample import Sample, Selector
from xmodal_interp.vocabulary import VISUAL_KINDS, AttentionKind, Tower

Layers = SupportsIndex | Collection[Any] | np.ndarray | Tensor | None
"""Layers (negative ones count from the last) or a mask of layers; None for all kept layers."""

POSITION_COLUMNS = ("token", "token_kind", "image", "row", "col", "video", "frame")
"""Columns that describe a position in a table; ``video`` and ``frame`` are NA for images."""

CHUNK_BYTES = 8 * 2**20  # of float32 probabilities per chunk; callers use a few times that


def calls_of(
    sample: Sample,
    layers: Layers,
    *,
    tower: Tower = "language",
    kind: AttentionKind = "self",
    call: int = 0,
) -> Iterator[AttentionCall]:
    """Yield the calls of the chosen layers one at a time, so that a store reads one at a time.

    Each layer is yielded once, in the order given, without repetitions: of four layers, ``[3, -1]``
    is one layer.

    Raises:
        NotRecordedError: No attention of this tower and kind was kept.
        LayerError: A layer does not exist, or ``layers`` is empty.
    """
    held = sample.layers(tower, kind)
    if not held:
        kept = sorted({f"{key[0]} {key[1]}" for key in sample.calls})
        raise NotRecordedError(
            f"Sample {sample.name!r} holds no {tower} {kind}-attention; it holds: "
            f"{', '.join(kept) or 'nothing'}. Capture that tower, or choose another."
        )
    come: set[int] = set()
    exists = sample.provenance.get("layers", {}).get(f"{tower}.{kind}") or held
    for layer in held if layers is None else numbers(layers, "layer", max(exists) + 1):
        found = sample.call(layer, tower=tower, kind=kind, call=call)
        if found.layer not in come:
            come.add(found.layer)
            yield found


def image_calls(
    sample: Sample, layers: Layers, tower: Tower
) -> Iterator[tuple[int | None, AttentionCall]]:
    """Yield the chosen self-attention calls with the index of their image.

    The index is None in the language tower.
    """
    numbers = sorted({key[3] for key in sample.calls if key[:2] == (tower, "self")})
    for number in numbers or [0]:
        for call in calls_of(sample, layers, tower=tower, call=number):
            yield (None if tower == "language" else number), call


def heads_of(call: AttentionCall, heads: Positions | None) -> list[int]:
    """Return the chosen heads as non-negative numbers, without repetitions, in the order given.

    Raises:
        LayerError: A head does not exist, or ``heads`` is empty.
    """
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
    chosen = table["kind"].isin(VISUAL_KINDS)
    if image is not None:
        chosen &= table["image"].eq(image)
    keys = chosen.fillna(value=False).to_numpy(dtype=bool)
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
        ``token, token_kind, image, row, col, video, frame``, one row per position.

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
    nowhere = places["row"] < 0
    kinds = nowhere.map({True: "special", False: kind}).astype("string")
    table = places.mask(nowhere).reindex(columns=list(POSITION_COLUMNS))
    table = table.assign(token=None, token_kind=kinds, **{kind: number})
    integers = dict.fromkeys(("image", "row", "col", "video", "frame"), "Int64")
    return table.astype({"token": "string", **integers})


def image_places(tokens: pd.DataFrame) -> pd.DataFrame:
    """Return ``row, col`` of each token in the grid of its image.

    Both are NA for tokens of a thumbnail, which have a separate grid.
    """
    small = tokens["view"].eq("thumbnail").fillna(value=False).astype(bool)
    return tokens[["row", "col"]].mask(small)


def refuse_text(given: object, name: str, example: str) -> None:
    """Reject a string where a list of names is expected: it would be iterated by letters.

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
        InputError: Text reaches the image by cross-attention.
    """
    if sample.cross_keys is not None:
        layers = ", ".join(str(layer) for layer in sample.layers("language", "cross"))
        raise InputError(
            f"{question} requires image and text tokens in one sequence. In sample {sample.name!r} "
            f"text reaches the image by cross-attention (layers {layers or 'not kept'}), where "
            "every key is an image key."
        )


def row_chunks(call: AttentionCall, queries: Int[Tensor, " query"], n_heads: int) -> list[Tensor]:
    """Split queries into chunks whose probabilities take a few MB."""
    return list(queries.split(max(1, CHUNK_BYTES // max(4 * call.n_keys * n_heads, 1))))
