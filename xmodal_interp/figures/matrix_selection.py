"""Attention matrices and their labels, from a sample or from any recorded call.

A matrix with more positions than a figure has pixels is pooled while it is computed: the cells of
adjacent tokens of one group become one cell, their mean or their largest value. The whole matrix
is never held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, SupportsIndex

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from xmodal_interp.attention import AttentionCall, Positions, resolve
from xmodal_interp.errors import InputError
from xmodal_interp.figures.matrix_axes import AxisLabels, group_labels, labels_of
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import AttentionKind, Tower

MOST_CELLS = 400_000_000
"""Largest number of cells of a drawn matrix; larger ones raise InputError."""

MOST_BINS = 800
"""Largest number of rows and columns that are drawn, up to the number of groups."""

Pool = Literal["mean", "max"]

_CHUNK = 2**22  # largest number of probabilities computed at once


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
    """One attention matrix, averaged over heads; large matrices are pooled.

    Attributes:
        call: The attention call.
        values: Probabilities or lifts; NaN where hidden by the mask.
        rows: Labels of the queries.
        columns: Labels of the keys.
        mass: For each run of queries and of keys: the probability that a query gives to these keys,
            averaged over the queries; NaN if the mask hides the whole block.
        all_visible: Whether the mask hides nothing.
    """

    call: AttentionCall
    values: Float[np.ndarray, "row column"]
    rows: AxisLabels
    columns: AxisLabels
    mass: Float[np.ndarray, "row_run column_run"]
    all_visible: bool


def matrix_of(
    selection: MatrixSelection,
    inches: float,
    show: Literal["probability", "lift"] = "probability",
    pool: Pool = "mean",
) -> Matrix:
    """Return values and labels of a selection; of a batch, the first sample.

    Args:
        selection: The selection.
        inches: Side of the drawn matrix.
        show: ``"probability"``, or ``"lift"``: probability times the number of visible keys.
        pool: How the visible cells of adjacent tokens are pooled.

    Raises:
        InputError: The matrix is too large to draw, its heads have different masks, or the number
            of names is wrong.
    """
    call = selection.found()
    _refuse_too_large(call)
    rows, columns = axis_labels(selection)
    (pooled_rows, first_rows), (pooled_columns, first_columns) = (
        labels.pooled(inches, MOST_BINS) for labels in (rows, columns)
    )
    row_of_bin = np.repeat(np.arange(len(first_rows)), np.diff(first_rows, append=len(rows)))
    run_starts = [[run.start for run in labels.runs()] for labels in (rows, columns)]
    row_of_run = np.repeat(np.arange(len(run_starts[0])), np.diff([*run_starts[0], len(rows)]))
    size = (len(first_rows), len(first_columns))
    totals = np.full(size, -np.inf) if pool == "max" else np.zeros(size)
    counts = np.zeros(size)
    mass = np.zeros((len(run_starts[0]), len(run_starts[1])))
    seen_in_run = np.zeros(mass.shape)
    n_rows = max(1, _CHUNK // (call.n_keys * call.n_heads))
    for start in range(0, call.n_queries, n_rows):
        part = slice(start, start + n_rows)
        positions = call.query_positions[part]
        seen = _visible(selection, call, positions)
        probs = call.probs(selection.head, positions)[0].mean(0).double().cpu().numpy()
        probs = np.where(seen, probs, 0.0)
        np.add.at(mass, row_of_run[part], np.add.reduceat(probs, run_starts[1], axis=1))
        np.add.at(
            seen_in_run, row_of_run[part], np.add.reduceat(seen.astype(int), run_starts[1], axis=1)
        )
        cells = probs * seen.sum(1, keepdims=True) if show == "lift" else probs
        if pool == "max":
            cells = np.where(seen, cells, -np.inf)
            of_rows = np.maximum.reduceat(cells, first_columns, axis=1)
            np.maximum.at(totals, row_of_bin[part], of_rows)
        else:
            np.add.at(totals, row_of_bin[part], np.add.reduceat(cells, first_columns, axis=1))
        of_seen = np.add.reduceat(seen.astype(int), first_columns, axis=1)
        np.add.at(counts, row_of_bin[part], of_seen)
    per_row = np.diff([*run_starts[0], len(rows)])[:, None]
    divisor = np.ones(size) if pool == "max" else np.maximum(counts, 1)
    return Matrix(
        call,
        np.where(counts > 0, totals / divisor, np.nan),
        pooled_rows,
        pooled_columns,
        np.where(seen_in_run > 0, mass / per_row, np.nan),
        bool(seen_in_run.sum() == call.n_queries * call.n_keys),
    )


def pooled_mask(
    selection: MatrixSelection, inches: float
) -> tuple[Float[np.ndarray, "row column"], AxisLabels, AxisLabels]:
    """Return the visible share of each drawn cell, and the labels of rows and columns."""
    seen = visible_cells(selection)
    (rows, first_rows), (columns, first_columns) = (
        labels.pooled(inches, MOST_BINS) for labels in axis_labels(selection)
    )
    if not rows.sizes and not columns.sizes:
        return seen.astype(float), rows, columns
    counts = np.add.reduceat(seen, first_columns, axis=1, dtype=np.int64)
    counts = np.add.reduceat(counts, first_rows, axis=0)
    sizes = np.outer(
        np.diff(first_rows, append=len(seen)), np.diff(first_columns, append=seen.shape[1])
    )
    return counts / sizes, rows, columns


def visible_cells(selection: MatrixSelection) -> Bool[np.ndarray, "query key"]:
    """Return True where the call's mask lets a query attend to a key.

    Raises:
        InputError: The matrix is too large to draw, or the chosen heads have different masks.
        PositionError: The call has no such head.
    """
    call = selection.found()
    _refuse_too_large(call)
    return _visible(selection, call, None)


def _refuse_too_large(call: AttentionCall) -> None:
    if call.n_queries * call.n_keys > MOST_CELLS:
        raise InputError(
            f"{call.name} has {call.n_queries} queries and {call.n_keys} keys, more than the "
            f"{MOST_CELLS:,} cells that can be drawn. Record fewer queries, or draw "
            "token_patch_matrix or an overlay."
        )


def _visible(
    selection: MatrixSelection, call: AttentionCall, positions: Tensor | None
) -> Bool[np.ndarray, "query key"]:
    """Return the mask of some queries, all if not given.

    Raises:
        InputError: The chosen heads have different masks.
        PositionError: The call has no such head.
    """
    seen = call.visible(positions)[0]
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
