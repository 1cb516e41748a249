"""Which layers, heads, queries and keys an analysis is about, and the refusals they share."""

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
"""Layers, negative ones counted from the last, or a mask of them; None means all that are held."""

POSITION_COLUMNS = ("token", "token_kind", "image", "row", "col", "video", "frame")
"""What tables say of a position beside its number; the last two are of videos only."""

CHUNK_BYTES = 8 * 2**20  # of float32 probabilities at a time; what follows takes a few times that


def calls_of(
    sample: Sample,
    layers: Layers,
    *,
    tower: Tower = "language",
    kind: AttentionKind = "self",
    call: int = 0,
) -> Iterator[AttentionCall]:
    """The chosen layers' calls, one at a time, so that a store reads one layer at a time.

    Each layer comes once, in the order given, however often it was named: ``[3, -1]`` of four
    layers is one.

    Raises:
        NotRecordedError: Nothing of this tower was kept.
        LayerError: There is no such layer, or none was named.
    """
    held = sample.layers(tower, kind)
    if not held:
        kept = sorted({f"{key[0]} {key[1]}" for key in sample.calls})
        raise NotRecordedError(
            f"Only what was kept can be asked for. Sample {sample.name!r} holds no {tower} "
            f"{kind}-attention; it holds: {', '.join(kept) or 'nothing'}."
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
    """The chosen self-attention calls and the image each is about (None in the language tower)."""
    numbers = sorted({key[3] for key in sample.calls if key[:2] == (tower, "self")})
    for number in numbers or [0]:
        for call in calls_of(sample, layers, tower=tower, call=number):
            yield (None if tower == "language" else number), call


def heads_of(call: AttentionCall, heads: Positions | None) -> list[int]:
    """The chosen heads as non-negative numbers, each once, in the order given.

    Raises:
        LayerError: There is no such head, or none was named.
    """
    if heads is None:
        return list(range(call.n_heads))
    try:
        chosen: list[int] = resolve(heads, call.n_heads, "head").tolist()
    except PositionError as error:
        raise LayerError(f"{error} ({call.name})") from None
    if not chosen:
        raise LayerError(
            f"At least one head is needed; got none. Leave heads out for all. ({call.name})"
        )
    return list(dict.fromkeys(chosen))


def queries_of(sample: Sample, queries: Selector) -> Int[Tensor, " query"]:
    """Positions of the queries, each once, in the order given; see :meth:`Sample.positions`.

    A mean over queries counts each of them once.

    Raises:
        InputError: ``"text"`` where no text comes after the image.
    """
    return each_once(sample.positions(queries))


def each_once(positions: Int[Tensor, " position"]) -> Int[Tensor, " once"]:
    """The positions without repetitions, in the order given."""
    return torch.tensor(list(dict.fromkeys(positions.tolist())), dtype=torch.long)


def image_keys(
    sample: Sample, image: int | None, kind: AttentionKind = "self"
) -> Bool[Tensor, " key"]:
    """True on the keys that are tokens of an image, or of any image or video.

    Raises:
        InputError: There is no such token.
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
            f"The question is about an image. Sample {sample.name!r} has no {wanted}; it has "
            f"{len(sample.grids)} images."
        )
    return torch.tensor(keys)


def position_table(sample: Sample, tower: Tower, image: int, n_positions: int) -> pd.DataFrame:
    """What stands at every position; in the vision tower, of one image (videos are behind those).

    Tokens of a thumbnail have no place beside those of the image.

    Returns:
        ``token, token_kind, image, row, col, video, frame``, a row per position.

    Raises:
        GeometryError: The image has not as many places as the tower has positions.
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
            f"The grid of an image has a place for each position of the tower. {kind.capitalize()} "
            f"{number} of sample {sample.name!r} has {len(places)} places, the {tower} tower has "
            f"{n_positions} positions."
        )
    nowhere = places["row"] < 0
    kinds = nowhere.map({True: "special", False: kind}).astype("string")
    table = places.mask(nowhere).reindex(columns=list(POSITION_COLUMNS))
    table = table.assign(token=None, token_kind=kinds, **{kind: number})
    integers = dict.fromkeys(("image", "row", "col", "video", "frame"), "Int64")
    return table.astype({"token": "string", **integers})


def image_places(tokens: pd.DataFrame) -> pd.DataFrame:
    """``row, col`` of each token in the grid of its image.

    Those of a thumbnail are in a grid of their own; here they have no place.
    """
    small = tokens["view"].eq("thumbnail").fillna(value=False).astype(bool)
    return tokens[["row", "col"]].mask(small)


def refuse_text(given: object, name: str, example: str) -> None:
    """Refuse a text where a list of names is wanted: it would be read letter by letter.

    Raises:
        InputError: It is one.
    """
    if isinstance(given, str):
        raise InputError(f"{name} is a list, such as {example}; got {given!r}.")


def refuse_cross_attention(sample: Sample, question: str) -> None:
    """Refuse a question about image and text in one sequence where they are not in one.

    Raises:
        InputError: Text reaches the image by cross-attention.
    """
    if sample.cross_keys is not None:
        layers = ", ".join(str(layer) for layer in sample.layers("language", "cross"))
        raise InputError(
            f"{question} is about image and text tokens in one sequence. In sample {sample.name!r} "
            "the image is outside it: text reaches it by cross-attention (layers "
            f"{layers or 'not kept'}), where every key is an image key."
        )


def row_chunks(call: AttentionCall, queries: Int[Tensor, " query"], n_heads: int) -> list[Tensor]:
    """Queries in chunks whose probabilities take a few MB."""
    return list(queries.split(max(1, CHUNK_BYTES // max(4 * call.n_keys * n_heads, 1))))
