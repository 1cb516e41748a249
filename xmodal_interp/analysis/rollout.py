"""Attention rollout: the share of each input position in a position after many layers.

Abnar & Zuidema 2020 (arXiv 2005.00928):

    F_l = fuse over heads of A_l                      mean, max or min
    F_l = discard(F_l)                                optional: set the lowest entries to 0
    F_l = without_sinks(F_l)                          optional: set the columns of sinks to 0
                                                      and rescale each row to its former sum
    B_l = rownorm(alpha_l F_l + (1 - alpha_l) I)      normalise each row
    R   = B_L ... B_2 B_1

1. For some rows of ``R``, start with their unit vectors and multiply from the last layer to the
   first, ``r <- r B_l``. A row takes ``O(L S^2)`` time and no matrix is stored; the full product
   takes ``O(L S^3)``.
2. ``baseline="uniform"`` also computes the rollout of attention that is uniform over the visible
   keys. In a causal stack, position 0 attends only to itself and collects most of the rollout:
   after 24 layers of uniform attention, 0.97 of position 63 is at position 0, and most of the share
   of an image is in its top rows. ``log2_ratio`` compares the model with this baseline.

Shares are float64, whose smallest normal number is 1e-308: after 80 layers with an alpha of 0.9,
most are below 1e-45, the smallest number of float32. Probabilities are float64 too, except those of
long sequences with the mean over heads and up to 256 rows, which the fused kernel computes in
float32.

The row of a position that sees no key stays as it is. With ``discard``, the whole fused matrix of
one layer at a time is in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, SupportsFloat, SupportsIndex, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from xmodal_interp import at
from xmodal_interp.analysis.selection import (
    counted_positions,
    first_position,
    position_columns,
    position_table,
    refuse_cross_attention,
    row_chunks,
    rows_in_tower,
    selected_calls,
    uniform,
    visual_number,
)
from xmodal_interp.analysis.tables import Part, long_table, over_samples, samples_of
from xmodal_interp.arguments import checked, one_of, real_number
from xmodal_interp.at import Selector
from xmodal_interp.attention import AttentionCall, layer_index, number, whole_slice
from xmodal_interp.errors import InputError, LayerError, NotRecordedError, PhraseError, quoted
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import Tower

Fusion = Literal["mean", "max", "min"]

Alphas = SupportsFloat | Sequence[SupportsFloat] | np.ndarray | Tensor | str
"""The weight of attention: a number, one number per layer in any sequence type, or ``"norm"``."""

Sinks = Selector
"""``"keep"``, ``"drop_first"``, or a selector of positions."""

MANY_ROWS = 256
"""More rows than this are multiplied with the mean matrix of the heads instead of with each."""

LayerRange = SupportsIndex | tuple[int | None, int | None]
"""One layer, or start and stop of a slice over layers."""


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
    layers: LayerRange | None = None,
    tower: Tower | None = None,
    image: int = 0,
    workers: int = 1,
) -> pd.DataFrame:
    """Return the share of each input position in the query positions after the layers.

    See Abnar & Zuidema 2020.

    Args:
        samples: One sample or many.
        queries: A selector, see :mod:`xmodal_interp.at`; ``at.last`` if not given. For the vision
            tower, positions of that tower or a name such as ``"register"``; the class token if not
            given.
        fusion: How the heads of a layer are combined into one matrix: ``"mean"``, ``"max"`` or
            ``"min"``.
        alpha: Weight of attention, 0 to 1; the residual stream has 1 - alpha. One number for all
            layers, one per layer (first layer first), or ``"norm"``: computed for each token from
            the norms of the attention output and the residual stream (requires
            ``Keep(norms=True)``). The paper uses 0.5.
        discard: Share of the ``S x S`` entries of each fused matrix that is set to 0, lowest
            entries first; at least 0 and below 1. Invisible entries count, except those of
            padding: below 0.5, only invisible entries of a causal matrix are discarded.
        baseline: ``"uniform"`` adds the rollout of attention that is uniform over the visible keys,
            with the same options.
        sinks: ``"keep"``; ``"drop_first"`` removes attention to the first position from all rows
            that see other keys; the positions of a selector are removed in the same way.
        layers: Start and stop of a slice over layers, None for open: ``(0, -1)`` leaves out the
            last layer, as LLaVA does in its vision tower; or one layer, such as ``-1``. Layers
            without softmax attention (convolution, recurrence, linear attention) cannot be in the
            slice: in such a model, choose consecutive attention layers. Layers after the last
            attention layer are ignored.
        tower: ``"language"`` or ``"vision"``; ``Sample.tower`` if not given.
        image: Index of the image in the vision tower; videos are numbered after the images.
        workers: Number of processes that read the samples; results do not depend on it.

    Returns:
        One row per sample, query and key: ``sample, tower, kind, query, key``, then
        ``query_token``, ``token, token_kind, image, row, col, video, frame`` of the key, and
        ``rollout`` (sums to 1 over the keys of a query). With a baseline also ``null`` and
        ``log2_ratio`` (log2 of rollout / null; minus infinity if rollout is 0 or underflows
        float64, which ends at 1e-308; NaN if null is 0 too). Queries that see no key, such as
        padding, are left out.

    Raises:
        InputError: An option is outside its range, text attends to the image by cross-attention, or
            a layer is not softmax attention.
        NotRecordedError: Layers, query rows or norms were not kept.
    """
    options = RolloutOptions(fusion, _plain_alpha(alpha), discard)
    if not (baseline is None or (isinstance(baseline, str) and baseline == "uniform")):
        raise InputError(f"baseline must be 'uniform' or None; got {quoted(baseline)}.")
    if baseline is not None and discard > 0:
        raise InputError(
            f"baseline={baseline!r} requires discard=0, because uniform attention has no lowest "
            f"entries to discard; got discard={discard}. Leave one of them out."
        )

    def table_rows(sample: Sample) -> Iterator[Part]:
        of = tower or sample.tower
        visual_number(sample, of, image)
        calls = _calls(sample, layers, of, image)
        positions = position_table(sample, of, image, calls[0].n_keys)
        rows = _seeing(calls, positions, rows_in_tower(sample, queries, of, image, at.last))
        removed = _removed_keys(sample, sinks, of, image, len(positions))
        counted = counted_positions(sample, of, image, len(positions))
        start = functional.one_hot(rows, len(positions)).double()
        values = {"rollout": rolled(start, calls, options, removed, counted)}
        if baseline is not None:
            even = [uniform(call) for call in calls]
            null = values["null"] = rolled(start, even, options, removed, counted)
            values["log2_ratio"] = (values["rollout"] / null).log2()
        axes = {"query": rows.tolist(), "key": range(len(positions))}
        index = long_table(axes, {})
        about = {"query_token": positions["token"].array.take(index["query"])}
        about |= position_columns(positions, index["key"])
        yield {"tower": of, "kind": "self"} | index | about | long_table(axes, values)

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
    return over_samples(samples, table_rows, "attention_rollout", parameters, workers)


@checked
def rollout_matrix(
    sample: Sample,
    *,
    fusion: Fusion = "mean",
    alpha: Alphas = 0.5,
    discard: float = 0.0,
    sinks: Sinks = "keep",
    layers: LayerRange | None = None,
    tower: Tower | None = None,
    image: int = 0,
) -> Float[Tensor, "query key"]:
    """Return all rows of the rollout, float64, ``S x S``; arguments as in ``attention_rollout``.

    Rows sum to 1. The row of a position that sees no key is its unit vector.
    """
    (sample,) = samples_of([sample])
    options = RolloutOptions(fusion, _plain_alpha(alpha), discard)
    of = tower or sample.tower
    calls = _calls(sample, layers, of, image)
    n_positions = calls[0].n_keys
    removed = _removed_keys(sample, sinks, of, image, n_positions)
    counted = counted_positions(sample, of, image, n_positions)
    start = torch.eye(n_positions, dtype=torch.float64)
    return rolled(start, calls, options, removed, counted)


@dataclass(frozen=True)
class RolloutOptions:
    """How heads are fused, how attention is weighted, and what is discarded.

    The fields are the arguments of ``attention_rollout``.
    """

    fusion: str
    alpha: float | tuple[float, ...] | str
    discard: float

    def __post_init__(self) -> None:
        one_of(self.fusion, "fusion", get_args(Fusion))
        real_number(self.discard, "discard")
        alphas = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)
        if self.alpha != "norm" and not all(
            isinstance(alpha, (int, float)) and 0 <= alpha <= 1 for alpha in alphas
        ):
            raise InputError(f"alpha must be between 0 and 1, or 'norm'; got {self.alpha!r}.")
        if not 0 <= self.discard < 1:
            raise InputError(f"discard must be at least 0 and below 1; got {self.discard}.")

    def alphas(self, calls: Sequence[AttentionCall]) -> list[Float[Tensor, "#query"]]:
        """Return the weight of attention per layer, and per row with ``"norm"``."""
        if self.alpha == "norm":
            return [_norm_share(call) for call in calls]
        given = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,) * len(calls)
        if len(given) != len(calls):
            raise InputError(
                f"alpha has {len(given)} numbers for {len(calls)} layers. Pass one number, or one "
                "per layer."
            )
        return [torch.tensor([alpha], dtype=torch.float64) for alpha in given]


def _plain_alpha(given: Any) -> Any:
    """Convert alpha (a number, list, array, tensor or string) to Python numbers."""
    listed = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(listed, Iterable) and not isinstance(listed, str):
        return tuple(_plain_alpha(each) for each in listed)
    return float(listed) if isinstance(listed, Real) else listed


def _norm_share(call: AttentionCall) -> Float[Tensor, " query"]:
    if call.update_share is None:
        raise NotRecordedError(
            f"{call.name} was captured without the norms that alpha='norm' requires. Capture with "
            "Keep(norms=True)."
        )
    return call.update_share[0].double()


def rolled(
    start: Float[Tensor, "row key"],
    calls: Sequence[AttentionCall],
    options: RolloutOptions,
    sinks: Bool[Tensor, " key"],
    counted: Bool[Tensor, " key"],
) -> Float[Tensor, "row key"]:
    """Return ``start @ B_L ... B_1``, computed from the last layer to the first in float64.

    With 80 layers and an alpha of 0.9 a share can be 1e-75, which is 0 in float32.

    Args:
        start: Rows to multiply with the last layer.
        calls: The layers, first to last.
        options: Options of the rollout.
        sinks: Keys whose attention is removed.
        counted: Positions that are not padding; ``discard`` is a share of the entries between
            these.
    """
    rows = start.double()
    for call, alpha in reversed(list(zip(calls, options.alphas(calls), strict=True))):
        wide = call.on_float64_device()
        on_device = [t.to(wide.device) for t in (rows, alpha, sinks, counted)]
        rows = _through(on_device[0], wide, on_device[1], options, on_device[2], on_device[3])
    return rows.cpu()


def _through(
    rows: Float[Tensor, "row key"],
    call: AttentionCall,
    alpha: Float[Tensor, "#query"],
    options: RolloutOptions,
    sinks: Bool[Tensor, " key"],
    counted: Bool[Tensor, " key"],
) -> Float[Tensor, "row key"]:
    """Multiply rows with ``B`` of one layer.

    Only the rows of the fused matrix that get a nonzero factor are computed. The mean over heads is
    not computed at all, unless there are many rows: the rows are multiplied with the probabilities
    of each head. With ``discard`` the fused matrix is computed whole.
    """
    if options.fusion == "mean" and options.discard == 0 and len(rows) <= MANY_ROWS:
        return _through_mean(rows, call, alpha, sinks)
    out = torch.zeros_like(rows)
    needed = rows.ne(0).any(0).nonzero()[:, 0]
    for index, fused in _fused(call, needed, options, counted):
        total = fused.sum(-1)
        if sinks.any():
            others = fused.masked_fill(sinks, 0.0)
            kept = others.sum(-1)
            scaled = others * (total / kept)[:, None]
            fused = torch.where(kept[:, None] > 0, scaled, fused)
        attended, residual = _shares(total, alpha.expand(call.n_queries)[index])
        here = rows[:, index]
        out[:, index] += here * residual
        out += (here * attended) @ fused
    return out


def _through_mean(
    rows: Float[Tensor, "row key"],
    call: AttentionCall,
    alpha: Float[Tensor, "#query"],
    sinks: Bool[Tensor, " key"],
) -> Float[Tensor, "row key"]:
    """Multiply rows with ``B`` of one layer, whose heads are averaged."""
    total = _row_mass(call, torch.ones_like(sinks))
    attended, residual = _shares(total, alpha.expand(call.n_queries))
    weighted = rows * attended
    if not sinks.any():
        return rows * residual + call.propagate(weighted)
    kept = _row_mass(call, ~sinks)
    sees_others = kept > 0
    scaled = weighted * torch.where(sees_others, total / kept, 0.0)
    out = call.propagate(scaled).masked_fill(sinks, 0.0)
    return rows * residual + out + call.propagate(weighted.masked_fill(sees_others, 0.0))


def _row_mass(call: AttentionCall, keys: Bool[Tensor, " key"]) -> Float[Tensor, " query"]:
    """Return the probability of some keys in each row, averaged over heads; 0 if none is visible.

    For all keys this is 1, unless some of it is on learned sinks.
    """
    if keys.all() and call.sinks is None and call.dense is None:
        return call.n_visible()[0].gt(0).double().mean(0)
    return call.mass(keys[None].double())[0, ..., 0].nan_to_num().mean(0)


def _shares(
    total: Float[Tensor, " query"], alpha: Float[Tensor, "#query"]
) -> tuple[Float[Tensor, " query"], Float[Tensor, " query"]]:
    """Return the factors of ``F`` and ``I`` in each row of ``B``; 0 and 1 if ``F`` is 0."""
    attends = total > 0
    residual = torch.where(attends, 1 - alpha, 1.0)
    norm = alpha * total + residual
    return torch.where(attends, alpha / norm, 0.0), residual / norm


def _fused(
    call: AttentionCall,
    needed: Int[Tensor, " query"],
    options: RolloutOptions,
    counted: Bool[Tensor, " key"],
) -> Iterator[tuple[Int[Tensor, " query"], Float[Tensor, "query key"]]]:
    """Yield the fused matrix chunk by chunk; rows that see no key are 0."""
    if options.discard == 0:
        for rows in row_chunks(call, needed, 2 * call.n_heads):  # twice the memory for float64
            yield rows, _over_heads(call, rows, options.fusion)
        return
    every = torch.arange(call.n_queries, device=call.device)
    chunks = row_chunks(call, every, 2 * call.n_heads)
    whole = torch.cat([_over_heads(call, rows, options.fusion) for rows in chunks])
    counted = counted.to(whole.device)
    ranked = whole.masked_fill(~(counted[:, None] & counted), torch.inf)
    n_discarded = int(options.discard * int(counted.sum()) ** 2)
    lowest = ranked.flatten().argsort(stable=True)[:n_discarded]
    whole.view(-1)[lowest] = 0.0
    yield every, whole


def _over_heads(
    call: AttentionCall, rows: Int[Tensor, " query"], fusion: str
) -> Float[Tensor, "query key"]:
    probs = call.probs(queries=rows, dtype=torch.float64)[0].nan_to_num()
    if fusion == "mean":
        return probs.mean(0)
    return probs.amax(0) if fusion == "max" else probs.amin(0)


def _calls(
    sample: Sample, layers: LayerRange | None, tower: Tower, image: int
) -> list[AttentionCall]:
    """Return the calls of all layers between start and stop, first to last."""
    if tower == "language":
        refuse_cross_attention(sample, "Rollout")
    elif tower == "connector":
        raise InputError(
            "attention_rollout is not defined for tower='connector'. Choose 'language' or 'vision'."
        )
    kept = sample.layers(tower, "self")
    exists = sample.provenance.get("layers", {}).get(f"{tower}.self", [])
    n_layers = max({*kept, *exists}, default=0) + 1
    chosen = _chosen(layers, n_layers, exists or kept)
    if exists:
        _refuse_gaps(chosen, exists, tower)
    if not chosen:
        raise InputError(
            f"layers={layers} selects none of the {n_layers} layers. Pass the start and stop of a "
            "slice with at least one layer."
        )
    missing = sorted(set(chosen) - set(kept))
    if kept and missing:
        raise NotRecordedError(
            f"Rollout requires all {tower} layers from {chosen.start} to {chosen.stop - 1}, but "
            f"{missing} were not kept (kept: {kept}). Capture all layers, or choose "
            "layers=(start, stop) within the kept ones."
        )
    number = image if tower == "vision" else 0
    calls = [call for call, _ in selected_calls(sample, list(chosen), tower=tower, call=number)]
    for call in calls:
        if call.n_queries != call.n_keys:
            raise NotRecordedError(
                f"Rollout requires every query row, but {call.name} holds {call.n_queries} rows "
                f"for {call.n_keys} keys. Capture with Keep(queries='all')."
            )
    return calls


def _chosen(layers: Any, n_layers: int, exists: Sequence[int]) -> range:
    """Return the numbers of the chosen layers, given as one layer or as start and stop."""
    if isinstance(layers, SupportsIndex) and np.ndim(layers) == 0:  # type: ignore[arg-type]
        layer = layer_index(number(layers, "layer"), sorted(exists))
        if not 0 <= layer < n_layers:
            raise LayerError(f"There is no layer {layers}: layers are 0 to {n_layers - 1}.")
        return range(layer, layer + 1)
    if layers is not None and np.shape(layers) != (2,):
        raise InputError(
            "layers must be a layer, or the start and stop of a slice, such as (0, -1) or "
            f"(2, None); got {layers!r}."
        )
    ends = slice(*((None, None) if layers is None else layers))
    return range(n_layers)[whole_slice(ends, "layer")]


def _refuse_gaps(chosen: range, exists: Collection[int], tower: Tower) -> None:
    """Raise InputError if a chosen layer is not softmax attention."""
    gaps = sorted(set(chosen) - set(exists))
    if gaps:
        starts = [layer for layer in sorted(exists) if layer - 1 not in exists]
        stops = [layer + 1 for layer in sorted(exists) if layer + 1 not in exists]
        runs = ", ".join(f"({a}, {b})" for a, b in zip(starts, stops, strict=True))
        raise InputError(
            f"Layers {gaps} of the {tower} tower are not softmax attention (but convolution, "
            "recurrence or linear attention), so rollout through them is not defined. Choose "
            f"consecutive attention layers: layers= one of {runs}."
        )


def _seeing(
    calls: Sequence[AttentionCall], positions: pd.DataFrame, rows: Int[Tensor, " query"]
) -> Int[Tensor, " seeing"]:
    """Return the rows that see a key in every layer and are not padding."""
    seeing = torch.tensor(
        positions["token_kind"].iloc[rows.tolist()].ne("padding").to_numpy(dtype=bool)
    )
    for call in calls:
        seeing &= call.n_visible(rows)[0].gt(0).all(0).cpu()
    if not seeing.any():
        raise InputError(
            f"The query positions {rows.tolist()[:6]} are padding or see no key. Choose other "
            "queries."
        )
    return rows[seeing]


def _removed_keys(
    sample: Sample, sinks: Sinks, tower: Tower, image: int, n_positions: int
) -> Bool[Tensor, " key"]:
    """Return a mask of the keys whose attention is removed."""
    removed = torch.zeros(n_positions, dtype=torch.bool)
    if isinstance(sinks, str) and sinks in ("keep", "drop_first"):
        if sinks == "drop_first":
            removed[first_position(sample) if tower == "language" else 0] = True
    else:
        chosen: Any = sorted(sinks) if isinstance(sinks, Set) else sinks
        try:
            removed[sample.positions(chosen, tower=tower, image=image)] = True
        except PhraseError as error:
            raise PhraseError(
                f"sinks must be 'keep', 'drop_first' or a selector; got {sinks!r}. {error}"
            ) from None
    return removed
