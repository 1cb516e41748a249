"""Attention matrices and their labels, from a sample or from any recorded call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float

from xmodal_interp.attention import AttentionCall, Positions, resolve
from xmodal_interp.errors import InputError
from xmodal_interp.figures.matrix_axes import AxisLabels, group_labels, labels_of
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import AttentionKind, Tower

MOST_CELLS = 40_000_000
"""Largest number of cells of a drawn matrix; larger ones raise InputError."""

_CHUNK = 2**24  # largest number of probabilities computed at once


@dataclass(frozen=True, eq=False)
class MatrixSelection:
    """Selection of one attention matrix.

    Attributes:
        source: A sample, or a recorded call of any model.
        layer: For a sample: layer index; negative ones count from the last.
        head: A head, or several to average; all heads are averaged if not given.
        tower: For a sample: ``"vision"``, ``"connector"`` or ``"language"``; ``Sample.tower`` if
            not given.
        kind: For a sample: ``"self"`` or ``"cross"``.
        call: For a sample: index of the layer's call; in the vision tower, of the image.
        query_names: For a call: one name per query.
        key_names: For a call: one name per key.
    """

    source: Sample | AttentionCall
    layer: SupportsIndex = -1
    head: Positions | None = None
    tower: Tower | None = None
    kind: AttentionKind = "self"
    call: int = 0
    query_names: Sequence[str] | None = None
    key_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.source, (Sample, AttentionCall)):
            raise InputError(
                "source must be one Sample, such as store[0], or one AttentionCall; got a "
                f"{type(self.source).__name__}."
            )
        if self.tower is None:
            tower = self.source.tower
            object.__setattr__(self, "tower", tower)

    def found(self) -> AttentionCall:
        """Return the attention call."""
        if isinstance(self.source, AttentionCall):
            return self.source
        return self.source.call(self.layer, tower=self.tower, kind=self.kind, call=self.call)


def selections_of(
    sources: Mapping[str, Sample | AttentionCall | MatrixSelection], layer: int = -1
) -> dict[str, MatrixSelection]:
    """Return the selection of each source, by title.

    Args:
        sources: Samples, calls or selections by title.
        layer: Layer of the samples; selections keep their own.

    Raises:
        InputError: ``sources`` is not a mapping, is empty, or holds another type of object.
    """
    if not isinstance(sources, Mapping) or not sources:
        raise InputError(
            "sources must be a mapping from titles to samples, calls or selections, such as "
            "{'before': sample}; got "
            f"{'an empty one' if isinstance(sources, Mapping) else f'a {type(sources).__name__}'}."
        )
    return {
        title: source if isinstance(source, MatrixSelection) else MatrixSelection(source, layer)
        for title, source in sources.items()
    }


@dataclass(frozen=True, eq=False)
class Matrix:
    """One attention matrix, averaged over heads.

    Attributes:
        call: The attention call.
        probs: Mean probabilities; NaN where hidden by the mask.
        visible: True where a query may attend to a key.
        n_visible: Number of visible keys of each query.
        rows: Labels of the queries.
        columns: Labels of the keys.
    """

    call: AttentionCall
    probs: Float[np.ndarray, "query key"]
    visible: Bool[np.ndarray, "query key"]
    n_visible: Float[np.ndarray, " query"]
    rows: AxisLabels
    columns: AxisLabels

    @property
    def lift(self) -> Float[np.ndarray, "query key"]:
        """Probability times the number of visible keys."""
        return np.asarray(self.probs * self.n_visible[:, None])


def matrix_of(selection: MatrixSelection) -> Matrix:
    """Return probabilities and labels of a selection; of a batch, the first sample.

    Raises:
        InputError: The matrix is too large to draw, its heads have different masks, or the number
            of names is wrong.
    """
    call = selection.found()
    seen = visible_cells(selection)
    n_rows = max(1, _CHUNK // (call.n_keys * call.n_heads))
    parts = [
        call.probs(selection.head, rows)[0].mean(0) for rows in call.query_positions.split(n_rows)
    ]
    probs = torch.cat(parts).double().cpu().numpy()
    rows, columns = axis_labels(selection)
    return Matrix(
        call, np.where(seen, probs, np.nan), seen, seen.sum(1).astype(float), rows, columns
    )


def visible_cells(selection: MatrixSelection) -> Bool[np.ndarray, "query key"]:
    """Return True where the call's mask lets a query attend to a key.

    Raises:
        InputError: The matrix is too large to draw, or the chosen heads have different masks.
        PositionError: The call has no such head.
    """
    call = selection.found()
    if call.n_queries * call.n_keys > MOST_CELLS:
        raise InputError(
            f"{call.name} has {call.n_queries} queries and {call.n_keys} keys, more than the "
            f"{MOST_CELLS:,} cells that can be drawn. Record fewer queries, or draw "
            "token_patch_matrix or an overlay."
        )
    seen = call.visible()[0]
    if selection.head is not None:
        heads = resolve(selection.head, call.n_heads, "head").to(seen.device)
        seen = seen if seen.shape[0] == 1 else seen[heads]
    if bool((seen != seen[:1]).any()):
        raise InputError(
            f"The heads of {call.name} have different masks and cannot be averaged. Choose one "
            "with head=."
        )
    return np.asarray(seen[0].cpu().numpy(), dtype=bool)


def axis_labels(selection: MatrixSelection) -> tuple[AxisLabels, AxisLabels]:
    """Return the labels of the queries and of the keys.

    Raises:
        InputError: The number of names differs from the number of queries or keys.
    """
    call = selection.found()
    queries = call.query_positions.cpu().numpy()
    sample = selection.source if isinstance(selection.source, Sample) else None
    if sample is not None and selection.tower == "language":
        text = labels_of(sample.tokens)
        crossed = selection.kind == "cross" and sample.cross_keys is not None
        keys = labels_of(sample.cross_keys) if crossed else text  # type: ignore[arg-type]
        return text.take(queries), keys
    if sample is not None and selection.tower == "vision" and selection.call < len(sample.grids):
        names = sample.patch_names(selection.call).tolist()
        if len(names) == call.n_keys == call.n_queries:
            names = ["class" if name == "special" else name for name in names]
            image = f"image {selection.call}"
            groups = (image if each == "patch" else each.split(" ")[0] for each in names)
            named = ("" if each in ("patch", "padding") else each for each in names)
            both = AxisLabels(tuple(named), tuple(groups))
            return both, both
    for what, given, n in (
        ("query", selection.query_names, call.n_queries),
        ("key", selection.key_names, call.n_keys),
    ):
        if given is not None and len(given) != n:
            raise InputError(
                f"{what}_names must have {n} names, one per {what} of {call.name}; got "
                f"{len(given)}."
            )
    group = "text" if call.tower == "language" else "image"
    other = group if call.kind == "self" else "keys"
    return (
        group_labels(call.n_queries, group, selection.query_names),
        group_labels(call.n_keys, other, selection.key_names),
    )
