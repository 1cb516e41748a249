"""One attention call of a model, and exact statistics of its probabilities.

A call holds the operands: queries, keys, mask, scaling, soft-cap and sinks. They need ``O(S d)``
memory and determine all probabilities, which need ``O(S^2)`` memory. Probabilities are computed on
demand, in float32, in chunks of rows:

    scores = scaling * q k^T, squashed by the soft-cap, plus the bias, minus infinity where hidden
    probs  = softmax of the scores over the keys (and the sinks, whose column is dropped)

Statistics are sums over the keys of a row (``mass``, ``average``, ``entropy``) or over the queries
of a column (``received``, ``propagate``). They are computed by the fused kernel with other operands
(:mod:`~xmodal_interp.attention.fused`), in memory linear in the length. Chunks of rows of
probabilities are used instead where the kernel cannot be (soft-cap, dense probabilities, and sums
over queries on other devices than the CPU) and for calls that fit into one small chunk, where this
is faster.

A call can hold some of these statistics instead of queries and keys
(:mod:`~xmodal_interp.attention.statistics`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xmodal_interp.attention import fused, kernels, masks, statistics, tiles
from xmodal_interp.attention.indexing import Positions, index_of_kept, resolve
from xmodal_interp.attention.kernels import full_precision
from xmodal_interp.errors import LayerError, NotRecordedError, PositionError
from xmodal_interp.vocabulary import AttentionKind, Tower

SMALL_CELLS = 2**18
"""Probabilities of at most this number of cells are computed at once; 1 MiB in float32."""

AXES = {
    "q": ("sample", "head", "query", "d_head"),
    "k": ("sample", "kv_head", "key", "d_head"),
    "v": ("sample", "kv_head", "key", "d_value"),
    "sinks": ("sample", "head", "query"),  # or only ("head",)
    "rows": ("query",),
    "dense": ("sample", "head", "query", "key"),
    "update_share": ("sample", "query"),
    "token_norm": ("sample", "query"),
    "segments": ("key",),
    "mask": ("sample", "head", "query", "key"),
    "bias": ("sample", "head", "query", "key"),
    "group_mass": ("sample", "head", "query", "group"),
    "row_entropy": ("sample", "head", "query"),
    "key_received": ("sample", "head", "key"),
    "groups": ("sample", "key"),
    "counted": ("sample", "query"),
}
"""The axes of each tensor of an :class:`AttentionCall`.

The sample and head axes of ``mask`` and ``bias`` have length 1 if all samples or heads share them.
"""


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of one attention layer.

    Attributes:
        tower: The part of the model that contains the layer.
        kind: ``"self"``, ``"cross"`` or ``"channel"``.
        layer: Index of the layer within its tower and kind.
        module: Dotted name of the attention module in the model.
        call: Number of the call within this layer (one of several images, a decode step).
        q: ``[sample, head, query, d_head]``, post-rotary. None if dense probabilities were kept
            instead.
        k: ``[sample, kv_head, key, d_head]``, post-rotary. None if dense probabilities were kept
            instead.
        v: ``[sample, kv_head, key, d_value]``, if values were recorded.
        mask: ``[sample | 1, head | 1, query, key]`` boolean (True is visible) or additive, or None.
        bias: Position bias added to the scores, ``[sample | 1, head, query, key]``, or None.
        causal: Without a mask: whether keys after the query are hidden.
        offset: Key index of query 0, which is the number of cached keys before it.
        scaling: Factor of ``q k^T``.
        softcap: Scores are squashed to ``softcap * tanh(scores / softcap)``.
        sinks: ``[head]``, learned scores of one extra key without a value, which takes part in the
            softmax only; or ``[sample, head, query]`` if they are computed from the query.
        sliding_window: Without a mask: the number of keys that a query sees, including its own.
        rows: Positions of the queries that the call holds, ascending; None if it holds all.
        dense: ``[sample, head, query, key]`` probabilities, if they were kept instead of q and k.
        update_share: ``[sample, query]``, 0 to 1, if norms were recorded: the norm of the
            attention's output divided by the sum of this norm and the norm of the residual stream
            to which it is added.
        token_norm: ``[sample, query]``, if norms were recorded: the Euclidean norm of each token's
            hidden state after the block of this layer.
        segments: ``[key]``, without a mask: the piece of the image (tile, window) that contains
            each position; a query sees the keys of its own piece.
        group_mass: ``[sample, head, query, group]`` probability summed over groups of keys, if it
            was kept instead of q and k.
        row_entropy: ``[sample, head, query]`` entropy in nats, if it was kept instead of q and k.
        key_received: ``[sample, head, key]`` probability summed over the queries in ``counted``,
            if it was kept instead of q and k.
        groups: ``[sample, key]``, the group of each key in ``group_mass``, -1 for keys that no
            query sees; 0 for all keys without ``group_mass``. None if the call holds no statistics.
        counted: ``[sample, query]`` boolean, the queries that ``key_received`` counts. None if the
            call holds no statistics.
        note: Remark for unusual calls; empty otherwise.
    """

    tower: Tower
    kind: AttentionKind
    layer: int
    module: str
    call: int
    q: Float[Tensor, "sample head query d_head"] | None
    k: Float[Tensor, "sample kv_head key d_head"] | None
    scaling: float
    v: Float[Tensor, "sample kv_head key d_value"] | None = None
    mask: Tensor | None = None
    bias: Tensor | None = None
    causal: bool = False
    offset: int = 0
    softcap: float | None = None
    sinks: Float[Tensor, " head"] | Float[Tensor, "sample head query"] | None = None
    sliding_window: int | None = None
    rows: Int[Tensor, " query"] | None = None
    dense: Float[Tensor, "sample head query key"] | None = None
    update_share: Float[Tensor, "sample query"] | None = None
    token_norm: Float[Tensor, "sample query"] | None = None
    segments: Int[Tensor, " key"] | None = None
    group_mass: Float[Tensor, "sample head query group"] | None = None
    row_entropy: Float[Tensor, "sample head query"] | None = None
    key_received: Float[Tensor, "sample head key"] | None = None
    groups: Int[Tensor, "sample key"] | None = None
    counted: Bool[Tensor, "sample query"] | None = None
    note: str = ""

    def __repr__(self) -> str:
        """Return a line with the call's name, sizes and the tensors that it holds."""
        held = ", ".join(name for name, _, _ in self.tensors()) or "no tensors"
        if self.q is None and self.dense is None and not self.holds_statistics:
            return f"AttentionCall({self.name}: {held})"
        sizes = f"{self.n_heads} heads, {self.n_queries} queries, {self.n_keys} keys"
        several = f"{self.n_samples} samples, " if self.n_samples > 1 else ""
        return f"AttentionCall({self.name}: {several}{sizes}; {held})"

    @cached_property
    def memo(self) -> dict[str, Any]:
        """Small results that several statistics use, at most a few numbers per head and position.

        A call that is made of this one, for example by ``select_rows``, starts without results.
        """
        return {}

    @property
    def name(self) -> str:
        """Name for messages, such as ``"language self-attention, layer 3, call 0"``."""
        return f"{self.tower} {self.kind}-attention, layer {self.layer}, call {self.call}"

    @property
    def holds_statistics(self) -> bool:
        """Whether the call holds statistics instead of q and k or dense probabilities."""
        return self.q is None and self.dense is None and self.groups is not None

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self._groups_or_q.device

    @property
    def n_samples(self) -> int:
        """Number of samples in the batch of this call."""
        return self._groups_or_q.shape[0]

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        if self.holds_statistics:
            fields = (self.group_mass, self.row_entropy, self.key_received)
            return next(t.shape[1] for t in fields if t is not None)
        return self._q_or_dense.shape[1]

    @property
    def n_kv_heads(self) -> int:
        """Number of key heads; equal to the number of query heads for calls without q and k."""
        return self.n_heads if self.k is None or self.q is None else self.k.shape[1]

    @property
    def n_queries(self) -> int:
        """Number of queries that the call holds."""
        if self.holds_statistics and self.counted is not None:
            return self.counted.shape[1]
        return self._q_or_dense.shape[2]

    @property
    def n_keys(self) -> int:
        """Number of keys."""
        if self.holds_statistics:
            return self._groups_or_q.shape[1]
        return self._q_or_dense.shape[3] if self.k is None else self.k.shape[2]

    @property
    def query_positions(self) -> Int[Tensor, " query"]:
        """Position of each query that the call holds."""
        if self.rows is not None:
            return self.rows
        return torch.arange(self.n_queries, device=self.device)

    @property
    def n_bytes(self) -> int:
        """Memory of all tensors, in bytes, including a mask that is shared with other calls."""
        return sum(t.numel() * t.element_size() for _, t, _ in self.tensors())

    def tensors(self) -> Iterator[tuple[str, Tensor, tuple[str, ...]]]:
        """Yield name, tensor and axes of every tensor that the call holds."""
        for name, axes in AXES.items():
            tensor = getattr(self, name)
            if tensor is not None:
                yield name, tensor, axes if tensor.ndim == len(axes) else ("head",)

    def to(self, device: torch.device | str) -> AttentionCall:
        """Return the call with all its tensors on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor, _ in self.tensors()}
        return replace(self, **moved)

    def on_float64_device(self) -> AttentionCall:
        """Return the call on a device that supports float64; Apple's GPUs (mps) do not."""
        return self.to("cpu") if self.device.type == "mps" else self

    def take(self, axis: str, index: slice | Int[Tensor, " entry"]) -> AttentionCall:
        """Return the call with some entries of an axis, in all tensors that have this axis.

        The causal flag, the offset and the sliding window are not changed, so they are correct only
        if the first queries or keys are selected. To select others, replace them by a mask first
        (:func:`~xmodal_interp.attention.with_mask`). ``key_received`` is left out if a query that
        it counts is not selected.

        Args:
            axis: ``"sample"``, ``"query"`` or ``"key"``.
            index: A slice, which gives views, or indices, which give copies.
        """
        length = {"sample": self.n_samples, "query": self.n_queries, "key": self.n_keys}[axis]
        taken: dict[str, Any] = {}
        for name, tensor, axes in self.tensors():
            if axis in axes:
                at = axes.index(axis)
                is_shared = tensor.shape[at] == 1 != length
                taken[name] = tensor if is_shared else tensor[(slice(None),) * at + (index,)]
        if axis == "query" and self.key_received is not None:
            assert self.counted is not None
            if int(taken["counted"].sum()) != int(self.counted.sum()):
                taken |= {"key_received": None, "counted": torch.zeros_like(taken["counted"])}
        return replace(self, **taken)

    def select_sample(self, index: int) -> AttentionCall:
        """Return the call of one sample of the batch; the sample axis is kept, with length 1."""
        return self.take("sample", slice(index, index + 1))

    def select_rows(self, positions: Int[Tensor, " query"]) -> AttentionCall:
        """Return the call with these query positions only.

        The tensors with a query axis are copies, so those of the original call can be freed.
        """
        index = self.row_index(positions)
        return replace(self.take("query", index), rows=self.query_positions[index])

    def probs(
        self,
        heads: Positions | None = None,
        queries: Positions | None = None,
        keys: Positions | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "sample head query key"]:
        """Return exact probabilities of some heads, queries and keys (all if not given).

        Rows without a visible key are NaN.

        Args:
            heads: Heads.
            queries: Query positions.
            keys: Key positions.
            dtype: Precision of the computation, float32 or float64. Probabilities below 1e-45 are 0
                in float32.

        Raises:
            LayerError: A head does not exist.
            PositionError: A position is outside the sequence.
            NotRecordedError: A query row was not kept, or the call holds statistics only.
        """
        head, row = self._head_index(heads), self.row_index(queries)
        key = None if keys is None else resolve(keys, self.n_keys, "key").to(row.device)
        parts = []
        for part in row.split(self._chunk(len(head))):
            full = self._exact_rows(head, part, dtype)
            parts.append(full if key is None else full[..., key])
        return torch.cat(parts, 2)

    def visible(self, queries: Positions | None = None) -> Bool[Tensor, "sample head query key"]:
        """Return which keys each query can attend to.

        The sample and head axes have length 1 if all samples or heads are the same.
        """
        return self.visible_rows(self.row_index(queries))

    def n_visible(self, queries: Positions | None = None) -> Int[Tensor, "sample head query"]:
        """Return the number of keys that each query can attend to.

        The sample and head axes have length 1 if all samples or heads are the same.
        """
        row = self.row_index(queries)
        ones = torch.ones(self.n_keys, 1, dtype=torch.float64, device=self.device)
        return tiles.row_sums(self, row, ones)[..., 0].long()

    def visible_sums(
        self, weights: Float[Tensor, "#sample #head query"], queries: Positions | None = None
    ) -> Float[Tensor, "#sample #head key"]:
        """Return the sum of the weights of the queries that see each key, float64.

        With weights of 1 this is the number of queries that see the key. With weights of
        1 / ``n_visible`` it is what the key receives under attention uniform over the visible keys.
        """
        row = self.row_index(queries)
        return tiles.key_sums(self, row, weights[..., None])[..., 0, :]

    def mass(
        self,
        groups: Float[Tensor, "group key"] | Bool[Tensor, "group key"],
        heads: Positions | None = None,
        queries: Positions | None = None,
    ) -> Float[Tensor, "sample head query group"]:
        """Return the probability summed over groups of keys, without holding the matrix.

        The cost is one fused attention call per ``d_head`` groups.

        Args:
            groups: ``[group, key]``, True (or a weight) if a key belongs to a group. The result is
                float64 if the groups are, as in ``average``.
            heads: Heads, all if not given.
            queries: Query positions, all that the call holds if not given.

        Raises:
            PositionError: The number of columns of ``groups`` is not the number of keys.
        """
        dtype = torch.float64 if groups.dtype == torch.float64 else torch.float32
        values = groups.to(device=self.device, dtype=dtype).T
        if values.shape[0] != self.n_keys:
            raise PositionError(
                f"The groups have {values.shape[0]} columns, but {self.name} has {self.n_keys} "
                "keys. Give one column per key."
            )
        return self.average(values, heads, queries)

    @torch.no_grad()
    def average(
        self,
        values: Float[Tensor, "key value"],
        heads: Positions | None = None,
        queries: Positions | None = None,
    ) -> Float[Tensor, "sample head query value"]:
        """Return ``probs @ values`` without holding the matrix of probabilities.

        The result has the dtype of ``values``, float32 or float64. Calls whose probabilities fit
        into one small chunk are computed in that dtype, all others in float32.

        Raises:
            NotRecordedError: The call holds statistics that do not determine the result.
        """
        head, row = self._head_index(heads), self.row_index(queries)
        if self.holds_statistics:
            return statistics.average(self, values.to(self.device), head, row)
        if self.n_keys == 0:
            shape = (self.n_samples, len(head), len(row), values.shape[1])
            return torch.full(shape, torch.nan, dtype=values.dtype, device=row.device)
        with full_precision():
            if self._is_small(head, row) or not (fused.supports(self) or self._is_fusible):
                parts = row.split(self._chunk(len(head)))
                dtype = values.dtype
                rows = [self._exact_rows(head, part, dtype) @ values for part in parts]
                return torch.cat(rows, 2)
            assert self.q is not None
            columns = values.float().split(self.q.shape[-1], 1)
            if fused.supports(self):
                found = [self._row_pass(head, row, part)[0] for part in columns]
            else:
                found = [self._fused_average(head, row, part) for part in columns]
            return torch.cat(found, -1).to(values.dtype)

    def null_mass(
        self,
        groups: Float[Tensor, "group key"] | Bool[Tensor, "group key"],
        queries: Positions | None = None,
    ) -> Float[Tensor, "sample head query group"]:
        """Return ``mass`` for uniform attention over the visible keys.

        The sample and head axes may have length 1.
        """
        row = self.row_index(queries)
        values = groups.to(device=self.device, dtype=torch.float64).T
        sums = tiles.row_sums(self, row, torch.cat([values, torch.ones_like(values[:, :1])], 1))
        return (sums[..., :-1] / sums[..., -1:]).float()

    @torch.no_grad()
    def entropy(
        self, heads: Positions | None = None, queries: Positions | None = None
    ) -> Float[Tensor, "sample head query"]:
        """Return the entropy ``-sum p ln p`` of every row, in nats, float32.

        The absolute error is at most 1e-5 for scores of any size. Rows without a visible key are
        NaN.

        Raises:
            NotRecordedError: The call holds statistics without the entropy.
        """
        head, row = self._head_index(heads), self.row_index(queries)
        if self.holds_statistics:
            if self.row_entropy is None:
                raise statistics.missing(self, "entropy")
            return self.row_entropy[:, head][:, :, row]
        with full_precision():
            no_bias = self.bias is None and (self.mask is None or self.mask.dtype == torch.bool)
            if fused.supports(self) and no_bias and not self._is_small(head, row):
                entropy, size = self._fused_entropy(head, row)
                if not size <= kernels.EXACT_TO:  # also if float32 gives NaN
                    entropy = fused.row_pass(self, head, row, None, torch.float64)[0]
                # rounding can give a negative entropy for one key
                return entropy.float().clamp(min=0.0)
            call = self.on_float64_device()
            head, row = head.to(call.device), row.to(call.device)
            parts = row.split(self._chunk(len(head)))
            return torch.cat([call._entropy_rows(head, part) for part in parts], 2)

    @torch.no_grad()
    def distance(
        self,
        places: Float[Tensor, "key axis"],
        heads: Positions | None = None,
        queries: Positions | None = None,
    ) -> Float[Tensor, "sample head query"]:
        """Return ``sum_j probs_ij |p_i - p_j|``, the mean distance from each query to its keys.

        Keys without a place do not count, so that a mean over the others is this sum divided by
        their ``mass``. The Euclidean distance is not a product of few values per query and per key,
        so the probabilities are computed, in chunks of rows.

        Args:
            places: Coordinates of the keys in any unit; NaN for a key without a place.
            heads: Heads, all if not given.
            queries: Query positions of self-attention, all that the call holds if not given. The
                distance of a query without a place is NaN.
        """
        head, row = self._head_index(heads), self.row_index(queries)
        places = places.to(device=self.device, dtype=torch.float32)
        placed = ~places.isnan().any(-1)
        parts = []
        for part in row.split(self._chunk(len(head))):
            start = places[self.query_positions[part] + self.offset]
            apart = torch.linalg.vector_norm(start[:, None] - places.nan_to_num(), dim=-1) * placed
            probs = self._exact_rows(head, part).transpose(1, 2)
            with full_precision():
                parts.append((probs @ apart[..., None])[..., 0].transpose(1, 2))
        return torch.cat(parts, 2)

    @torch.no_grad()
    def top_keys(
        self, k: int, heads: Positions | None = None, queries: Positions | None = None
    ) -> tuple[Float[Tensor, "sample head query k"], Int[Tensor, "sample head query k"]]:
        """Return the ``k`` largest probabilities of every row, and their keys, largest first.

        If a query sees fewer than ``k`` keys, the others have a probability of 0.

        Raises:
            PositionError: ``k`` is not between 1 and the number of keys.
        """
        if not 1 <= k <= self.n_keys:
            raise PositionError(
                f"k must be between 1 and the number of keys, {self.n_keys}; got {k}."
            )
        head, row = self._head_index(heads), self.row_index(queries)
        found = [
            self._exact_rows(head, part).topk(k, -1) for part in row.split(self._chunk(len(head)))
        ]
        return torch.cat([f.values for f in found], 2), torch.cat([f.indices for f in found], 2)

    def propagate(
        self, vector: Float[Tensor, "sample query"], heads: Positions | None = None
    ) -> Float[Tensor, "sample key"]:
        """Return ``vector @ probs``, with ``probs`` averaged over heads.

        This is one step of attention rollout for one row, in ``O(S^2)`` time and ``O(S)`` memory.
        For a call of one sample, several vectors can be given at once. Rows where ``vector`` is
        zero are not computed. The result has the dtype of ``vector``, float32 or float64; the
        probabilities are computed as in ``average``.
        """
        head = self._head_index(heads)
        return self._column_sums(head, vector, over_heads=True) / len(head)

    def received(
        self, vector: Float[Tensor, "sample query"], heads: Positions | None = None
    ) -> Float[Tensor, "sample head key"]:
        """Return ``vector @ probs`` of every head.

        With a vector of ones, this is the attention that each key receives from all queries. Rows
        where ``vector`` is zero are not computed. The result has the dtype of ``vector``, float32
        or float64.

        Raises:
            NotRecordedError: The call holds statistics that do not determine the result.
        """
        head = self._head_index(heads)
        if self.holds_statistics:
            return statistics.received(self, head, vector)
        return self._column_sums(head, vector, over_heads=False)

    def row_index(self, queries: Positions | None) -> Int[Tensor, " query"]:
        """Return the indices of query positions among those that the call holds, all if None."""
        if queries is None:
            return torch.arange(self.n_queries, device=self.device)
        if self.rows is None:
            return resolve(queries, self.n_queries, "query").to(self.device)
        n_positions = self.n_keys if self.kind == "self" else 0
        return index_of_kept(queries, self.rows, n_positions, self.name).to(self.device)

    def _head_index(self, heads: Positions | None) -> Int[Tensor, " head"]:
        if heads is None:
            return torch.arange(self.n_heads, device=self.device)
        try:
            return resolve(heads, self.n_heads, "head").to(self.device)
        except PositionError as error:
            raise LayerError(f"{error} ({self.name})") from None

    @property
    def _q_or_dense(self) -> Tensor:
        held = self.dense if self.q is None else self.q
        if held is None:
            raise self._holds_neither()
        return held

    @property
    def _groups_or_q(self) -> Tensor:
        groups = self.groups if self.holds_statistics else None
        return self._q_or_dense if groups is None else groups

    def _q_and_k(self) -> tuple[Tensor, Tensor]:
        if self.q is None or self.k is None:
            raise self._holds_neither()
        return self.q, self.k

    def _holds_neither(self) -> NotRecordedError:
        if self.holds_statistics:
            return statistics.missing(self, "q and k")
        return NotRecordedError(
            f"{self.name} holds neither q and k nor dense probabilities. Record the call again."
        )

    def _chunk(self, n_heads: int) -> int:
        """Return the number of rows per chunk, for chunks of at most 32 MiB of float32 scores."""
        return max(1, kernels.CHUNK_BYTES // max(4 * self.n_keys * n_heads * self.n_samples, 1))

    def visible_rows(
        self, row: Int[Tensor, " query"], keys: slice | None = None
    ) -> Bool[Tensor, "sample head query key"]:
        """Return ``visible`` for queries at an index into those that the call holds."""
        return masks.visible_rows(
            self.mask,
            row,
            self.query_positions[row] + self.offset,
            slice(0, self.n_keys) if keys is None else keys,
            causal=self.causal,
            sliding_window=self.sliding_window,
            segments=self.segments,
        )

    def _exact_rows(
        self,
        head: Int[Tensor, " head"],
        row: Int[Tensor, " query"],
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "sample head query key"]:
        """Return the probabilities of some heads and rows, computed in ``dtype``."""
        if self.dense is not None:
            return self.dense[:, head][:, :, row].to(dtype)
        with full_precision():
            return kernels.softmax_rows(self._scores(head, row, dtype), self.sinks_of(head, row))

    def _entropy_rows(
        self, head: Int[Tensor, " head"], row: Int[Tensor, " query"]
    ) -> Float[Tensor, "sample head query"]:
        """Return the entropy of some heads and rows, from float64 scores."""
        if self.dense is not None:
            probs = self.dense[:, head][:, :, row].double()
            entropy: Tensor = torch.special.entr(probs).sum(-1).float()
            return entropy
        return kernels.entropy_rows(
            self._scores(head, row, torch.float64), self.sinks_of(head, row)
        )

    def _scores(
        self, head: Int[Tensor, " head"], row: Int[Tensor, " query"], dtype: torch.dtype
    ) -> Float[Tensor, "sample head query key"]:
        """Return the scores of some heads and rows, minus infinity where hidden."""
        q, k = self._q_and_k()
        additive = masks.additive_rows(self.mask, row)
        if additive is not None:
            additive = _of_heads(additive, head)
        seen = masks.scored_rows(_of_heads(self.visible_rows(row), head), additive)
        if self.bias is not None:
            bias = _of_heads(self.bias[..., row, :], head).float()
            additive = bias if additive is None else additive + bias
        if _is_all(head, self.n_heads):
            q = q[:, :, row]
        else:
            q, k = q[:, head][:, :, row], k[:, self.kv_head_of(head)]
        return kernels.score_rows(
            q,
            k,
            seen,
            scaling=self.scaling,
            additive=additive,
            softcap=self.softcap,
            dtype=dtype,
        )

    def _row_pass(
        self,
        head: Int[Tensor, " head"],
        row: Int[Tensor, " query"],
        values: Float[Tensor, "key value"] | None,
    ) -> tuple[Tensor, Tensor, float]:
        """Return :func:`fused.row_pass`, and keep what is small if all rows were computed."""
        found = fused.row_pass(self, head, row, values)
        if _is_all(head, self.n_heads) and _is_all(row, self.n_queries):
            self.memo["logsumexp"] = found[1]
            if values is None:
                self.memo["size"] = torch.tensor(found[2])
                self.memo["entropy"] = found[0]
        return found

    def _fused_entropy(
        self, head: Int[Tensor, " head"], row: Int[Tensor, " query"]
    ) -> tuple[Float[Tensor, "sample head query"], float]:
        """Return the entropy and the size of its terms (:func:`fused.row_pass`)."""
        if "entropy" not in self.memo:
            entropy, _, size = self._row_pass(head, row, None)
            return entropy, size
        known: Tensor = self.memo["entropy"]
        return known[:, head][:, :, row], float(self.memo["size"])

    def _logsumexp(
        self, head: Int[Tensor, " head"], row: Int[Tensor, " query"]
    ) -> Float[Tensor, "sample head query"]:
        """Return the log-sum-exp of some rows as :func:`fused.row_pass` defines it."""
        if "logsumexp" not in self.memo:
            every = torch.arange(self.n_queries, device=self.device)
            if not _is_all(head, self.n_heads) or 2 * len(row) < self.n_queries:
                return self._row_pass(head, row, None)[1]
            self._row_pass(head, every, None)
        known: Tensor = self.memo["logsumexp"]
        return known[:, head][:, :, row]

    @torch.no_grad()
    def _column_sums(
        self,
        head: Int[Tensor, " head"],
        vector: Float[Tensor, "sample query"],
        *,
        over_heads: bool,
    ) -> Float[Tensor, "sample *head key"]:
        """Return ``vector @ probs`` of each head or summed over heads, without rows of weight 0."""
        row = vector.ne(0).any(0).nonzero()[:, 0].to(self.device)
        several = vector.shape[0] != self.n_samples  # vectors for one sample
        if several and self.n_samples != 1:
            raise PositionError(
                f"Several vectors require a call of one sample; got {vector.shape[0]} vectors and "
                f"{self.n_samples} samples."
            )
        weights = vector.to(self.device)[:, row, None]
        weights = weights.transpose(0, 2) if several else weights
        with full_precision():
            if self._is_small(head, row) or not fused.supports(self):
                out = self._chunked_column_sums(head, row, weights, over_heads=over_heads)
            else:
                terms = self._logsumexp(head, row)
                out = fused.column_pass(self, head, row, weights, terms, over_heads=over_heads)
        return out.movedim(-2, 0)[:, 0] if several else out[..., 0, :]

    def _chunked_column_sums(
        self,
        head: Int[Tensor, " head"],
        row: Int[Tensor, " query"],
        weights: Float[Tensor, "sample query vector"],
        *,
        over_heads: bool,
    ) -> Tensor:
        """Return the same as :func:`fused.column_pass`, from chunks of rows of probabilities."""
        heads_axis = () if over_heads else (len(head),)
        out = weights.new_zeros(self.n_samples, *heads_axis, weights.shape[2], self.n_keys)
        place = 0
        for part in row.split(self._chunk(len(head))):
            here = weights[:, place : place + len(part)].mT[:, None]
            place += len(part)
            probs = self._exact_rows(head, part, weights.dtype)
            if self.mask is not None or self.sliding_window is not None:  # rows that see no key
                seeing = _of_heads(self.visible_rows(part).any(-1, keepdim=True), head)
                probs = probs.masked_fill(~seeing, 0.0)
            out += here[:, 0] @ probs.sum(1) if over_heads else here @ probs
        return out

    def _is_small(self, head: Int[Tensor, " head"], row: Int[Tensor, " query"]) -> bool:
        """Return whether the probabilities take so little memory that computing them is fastest."""
        return self.n_samples * len(head) * len(row) * self.n_keys <= SMALL_CELLS

    def _fused_average(
        self,
        head: Int[Tensor, " head"],
        row: Int[Tensor, " query"],
        values: Float[Tensor, "key value"],
    ) -> Float[Tensor, "sample head query value"]:
        """Return ``probs @ values`` by torch's public function, on any device."""
        q, k = self._q_and_k()
        if not _is_all(head, self.n_heads):
            q, k = q[:, head], k[:, self.kv_head_of(head)]
        out = values.new_empty(self.n_samples, len(head), len(row), values.shape[1])
        for strip in tiles.strips(self, row, several=False):
            (tile,) = strip.tiles
            out[:, :, strip.at] = kernels.fused_average(
                q[:, :, tile.rows],
                k[:, :, tile.keys],
                values[tile.keys],
                None if tile.seen is None else _of_heads(tile.seen, head),
                causal=tile.causal,
                scaling=self.scaling,
            )
        return out

    @property
    def _is_fusible(self) -> bool:
        """Whether torch's public function computes the call: no soft-cap, sinks, bias, ...."""
        has_extras = any(extra is not None for extra in (self.softcap, self.sinks, self.bias))
        only_hides = self.mask is None or self.mask.dtype == torch.bool
        return self.q is not None and only_hides and not has_extras and fused.is_finite(self)

    def kv_head_of(self, head: Int[Tensor, " head"]) -> Int[Tensor, " head"]:
        """Return the key head of each query head."""
        return head // max(self.n_heads // max(self.n_kv_heads, 1), 1)

    def sinks_of(
        self, head: Int[Tensor, " head"], row: Int[Tensor, " query"]
    ) -> Float[Tensor, "sample head #query"] | None:
        """Return the sinks of some heads and rows; an axis has length 1 if all entries agree."""
        if self.sinks is None:
            return None
        if self.sinks.ndim == 1:
            return self.sinks[head][None, :, None]
        return self.sinks[:, head][:, :, row]


def _of_heads(t: Tensor, head: Int[Tensor, " head"]) -> Tensor:
    """Select heads, unless the tensor is the same for all heads."""
    return t if t.shape[1] == 1 or _is_all(head, t.shape[1]) else t[:, head]


def _is_all(index: Tensor, length: int) -> bool:
    return len(index) == length and bool((index == torch.arange(length, device=index.device)).all())
