"""Attention matrices to draw, from a sample or from any recorded call, and their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool, Float

from xmodal_interp.attention import AttentionCall, Positions, resolve
from xmodal_interp.errors import InputError
from xmodal_interp.figures.labelling import Labels, labels_of, plain_labels
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import AttentionKind, Tower

MOST_CELLS = 40_000_000
"""Larger matrices are refused: a figure has no room for them."""

_CHUNK = 2**24  # probabilities that are computed at once


@dataclass(frozen=True, eq=False)
class View:
    """One attention matrix.

    Attributes:
        source: A sample, or a call of any tower of any model.
        layer: For a sample: layer index; negative ones count from the last.
        head: A head, or several to average; the mean of all if not given.
        tower: For a sample: which part of the model.
        kind: For a sample: ``"self"`` or ``"cross"``.
        call: For a sample: which call of the layer; in the vision tower, the image.
        query_names: For a call: what stands at each query.
        key_names: For a call: what stands at each key.
    """

    source: Sample | AttentionCall
    layer: SupportsIndex = -1
    head: Positions | None = None
    tower: Tower = "language"
    kind: AttentionKind = "self"
    call: int = 0
    query_names: Sequence[str] | None = None
    key_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.source, (Sample, AttentionCall)):
            raise InputError(
                "A matrix is that of one sample, such as store[0], or of one attention call; got a "
                f"{type(self.source).__name__}."
            )

    def found(self) -> AttentionCall:
        """The call."""
        if isinstance(self.source, AttentionCall):
            return self.source
        return self.source.call(self.layer, tower=self.tower, kind=self.kind, call=self.call)


def views_of(
    sources: Mapping[str, Sample | AttentionCall | View], layer: int = -1
) -> dict[str, View]:
    """What to draw side by side, by title; ``layer`` is for those that are no views yet.

    Raises:
        InputError: No mapping, an empty one, or something in it that has no matrix.
    """
    if not isinstance(sources, Mapping) or not sources:
        raise InputError(
            "A comparison needs at least one sample or call, by title, such as {'before': sample}; "
            f"got {'none' if isinstance(sources, Mapping) else f'a {type(sources).__name__}'}."
        )
    return {
        title: source if isinstance(source, View) else View(source, layer)
        for title, source in sources.items()
    }


@dataclass(frozen=True, eq=False)
class Matrix:
    """What a view shows.

    Attributes:
        call: Where it comes from.
        probs: Mean probabilities; NaN where hidden.
        visible: What the mask lets each query see.
        n_visible: How many keys each query sees.
        rows: What stands at the queries.
        columns: What stands at the keys.
    """

    call: AttentionCall
    probs: Float[np.ndarray, "query key"]
    visible: Bool[np.ndarray, "query key"]
    n_visible: Float[np.ndarray, " query"]
    rows: Labels
    columns: Labels

    @property
    def lift(self) -> Float[np.ndarray, "query key"]:
        """Probability times the number of visible keys."""
        return np.asarray(self.probs * self.n_visible[:, None])


def matrix_of(view: View) -> Matrix:
    """Probabilities and labels of a view, the first sample of its batch.

    Raises:
        InputError: The matrix is too large to be drawn, or names do not fit it.
    """
    call = view.found()
    seen = visible_cells(view)
    n_rows = max(1, _CHUNK // (call.n_keys * call.n_heads))
    parts = [call.probs(view.head, rows)[0].mean(0) for rows in call.query_positions.split(n_rows)]
    probs = torch.cat(parts).double().cpu().numpy()
    rows, columns = axis_labels(view)
    return Matrix(
        call, np.where(seen, probs, np.nan), seen, seen.sum(1).astype(float), rows, columns
    )


def visible_cells(view: View) -> Bool[np.ndarray, "query key"]:
    """What the mask lets each query see, read from the call.

    Raises:
        InputError: The matrix is too large, or the chosen heads see different keys.
        PositionError: A head that there is not.
    """
    call = view.found()
    if call.n_queries * call.n_keys > MOST_CELLS:
        raise InputError(
            f"A matrix to be drawn has at most {MOST_CELLS:,} cells. {call.name} has "
            f"{call.n_queries} queries and {call.n_keys} keys; keep fewer queries, or draw "
            "token_patch_matrix or an overlay."
        )
    seen = call.visible()[0]
    if view.head is not None:
        heads = resolve(view.head, call.n_heads, "head").to(seen.device)
        seen = seen if seen.shape[0] == 1 else seen[heads]
    if bool((seen != seen[:1]).any()):
        raise InputError(
            f"Heads that see different keys are drawn one at a time. Those of {call.name} do; "
            "choose one with head=."
        )
    return np.asarray(seen[0].cpu().numpy(), dtype=bool)


def axis_labels(view: View) -> tuple[Labels, Labels]:
    """What stands at the queries and at the keys.

    Raises:
        InputError: There is not one name per query, or per key.
    """
    call = view.found()
    held = call.query_positions.cpu().numpy()
    sample = view.source if isinstance(view.source, Sample) else None
    if sample is not None and view.tower == "language":
        text = labels_of(sample.tokens)
        crossed = view.kind == "cross" and sample.cross_keys is not None
        keys = labels_of(sample.cross_keys) if crossed else text  # type: ignore[arg-type]
        return text.take(held), keys
    if sample is not None and view.tower == "vision" and view.call < len(sample.grids):
        outside = sample.grids[view.call].patch_places[:, 0] < 0
        if len(outside) == call.n_keys == call.n_queries:
            names = tuple("class" if out else "" for out in outside)
            both = Labels(names, tuple("class" if out else f"image {view.call}" for out in outside))
            return both, both
    for what, given, n in (
        ("query", view.query_names, call.n_queries),
        ("key", view.key_names, call.n_keys),
    ):
        if given is not None and len(given) != n:
            raise InputError(
                f"There is one name per {what}. {call.name} has {n}; got {len(given)} names."
            )
    group = "text" if call.tower == "language" else "image"
    other = group if call.kind == "self" else "keys"
    return (
        plain_labels(call.n_queries, group, view.query_names),
        plain_labels(call.n_keys, other, view.key_names),
    )
