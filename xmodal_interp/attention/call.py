"""One attention call of a model, and exact statistics of its probabilities.

A call holds the operands: queries, keys, mask, scaling, soft-cap and sinks. They need ``O(S d)``
memory and determine all probabilities, which need ``O(S^2)`` memory. Probabilities are computed on
demand, in float32, in chunks of rows:

    scores = scaling * q k^T, squashed by the soft-cap, plus the bias, minus infinity where hidden
    probs  = softmax of the scores over the keys (and the sinks, whose column is dropped)

Statistics that are linear in the probabilities are one call of the fused kernel with other values
(``mass``, ``average``). The entropy is computed from ``V = K`` and the log-sum-exp (``entropy``). A
row vector is multiplied by the probabilities without holding the matrix (``propagate``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xmodal_interp.attention import operands
from xmodal_interp.attention.indexing import Positions, index_of_kept, resolve
from xmodal_interp.errors import LayerError, PositionError

if TYPE_CHECKING:
    from xmodal_interp.vocabulary import AttentionKind, Tower


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
        v: ``[sample, kv_head, key, d_head]``, if values were recorded.
        mask: ``[sample | 1, head | 1, query, key]`` boolean (True is visible) or additive, or None.
        bias: Position bias added to the scores, ``[sample | 1, head, query, key]``, or None.
        causal: Without a mask: whether keys after the query are hidden.
        offset: Key index of query 0, which is the number of cached keys before it.
        scaling: Factor of ``q k^T``.
        softcap: Scores are squashed to ``softcap * tanh(scores / softcap)``.
        sinks: ``[head]`` learned scores that take part in the softmax and are then dropped; or
            ``[sample, head, query]`` if they are computed from the query.
        sliding_window: Without a mask: the number of keys that a query sees, its own included.
        rows: Query positions that are held, ascending; None means all.
        dense: ``[sample, head, query, key]`` probabilities, if they were kept instead of q and k.
        update_share: ``[sample, query]``, 0 to 1, if norms were recorded: the norm of the
            attention's output divided by the sum of this norm and the norm of the residual stream
            to which it is added.
        segments: ``[key]``, without a mask: the piece of the image (tile, window) that contains
            each position; a query sees the keys of its own piece.
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
    segments: Int[Tensor, " key"] | None = None
    note: str = ""

    @property
    def _queries(self) -> Tensor:
        held = self.dense if self.q is None else self.q
        if held is None:
            raise operands.holds_neither(self)
        return held

    @property
    def name(self) -> str:
        """Name for messages, such as ``"language self-attention, layer 3, call 0"``."""
        return f"{self.tower} {self.kind}-attention, layer {self.layer}, call {self.call}"

    @property
    def device(self) -> torch.device:
        """Device of the queries, and of everything that is computed from them."""
        return self._queries.device

    @property
    def n_samples(self) -> int:
        """Number of samples in the batch of this call."""
        return self._queries.shape[0]

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return self._queries.shape[1]

    @property
    def n_kv_heads(self) -> int:
        """Number of key heads; equal to the number of query heads for dense calls."""
        return self.n_heads if self.k is None else self.k.shape[1]

    @property
    def n_queries(self) -> int:
        """Number of queries that are held."""
        return self._queries.shape[2]

    @property
    def n_keys(self) -> int:
        """Number of keys."""
        return self._queries.shape[3] if self.k is None else self.k.shape[2]

    @property
    def n_bytes(self) -> int:
        """Memory of all tensors, in bytes, including a mask that is shared with other calls."""
        operands_held = (self.q, self.k, self.v, self.mask, self.bias, self.sinks, self.segments)
        held = (*operands_held, self.dense, self.rows, self.update_share)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def to(self, device: torch.device | str) -> AttentionCall:
        """Return the call with all its tensors on another device."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def in_float64(self) -> AttentionCall:
        """Return the call on a device that supports float64; Apple's GPUs (mps) do not."""
        return self.to("cpu") if self.device.type == "mps" else self

    def select_sample(self, index: int) -> AttentionCall:
        """Return the call of one sample of the batch; the sample axis is kept, with length 1."""

        def one(t: Tensor | None) -> Tensor | None:
            return t if t is None or t.shape[0] == 1 else t[index : index + 1]

        return replace(
            self,
            q=None if self.q is None else self.q[index : index + 1],
            k=one(self.k),
            v=one(self.v),
            mask=one(self.mask),
            bias=one(self.bias),
            sinks=self.sinks if self.sinks is None or self.sinks.ndim == 1 else one(self.sinks),
            dense=None if self.dense is None else self.dense[index : index + 1],
            update_share=one(self.update_share),
        )

    def select_rows(self, positions: Int[Tensor, " query"]) -> AttentionCall:
        """Return the call with these query positions only.

        The tensors are copies, so the original call can be freed.
        """
        index = self._row_index(positions)
        per_query = self.sinks is not None and self.sinks.ndim == 3
        return replace(
            self,
            q=None if self.q is None else self.q[:, :, index].clone(),
            mask=None if self.mask is None else self.mask[..., index, :].clone(),
            bias=None if self.bias is None else self.bias[..., index, :].clone(),
            sinks=self.sinks[:, :, index] if per_query and self.sinks is not None else self.sinks,
            dense=None if self.dense is None else self.dense[:, :, index].clone(),
            update_share=None if self.update_share is None else self.update_share[:, index],
            rows=self.query_positions[index],
        )

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
            NotRecordedError: A query row was not kept.
        """
        head, row = self._head_index(heads), self._row_index(queries)
        key = None if keys is None else resolve(keys, self.n_keys, "key").to(row.device)
        parts = []
        for chunk in row.split(operands.chunk(self, len(head))):
            full = operands.exact_rows(self, head, chunk, dtype)
            parts.append(full if key is None else full[..., key])
        return torch.cat(parts, 2) if parts else operands.exact_rows(self, head, row, dtype)

    def visible(self, queries: Positions | None = None) -> Bool[Tensor, "sample head query key"]:
        """Return which keys each query can attend to.

        The sample and head axes have length 1 if all samples or heads are the same.
        """
        return operands.visible(self, self._row_index(queries))

    def n_visible(self, queries: Positions | None = None) -> Int[Tensor, "sample head query"]:
        """Return the number of keys that each query can attend to."""
        parts = self._row_index(queries).split(operands.chunk(self, 1))
        return torch.cat([operands.visible(self, part).sum(-1) for part in parts], 2)

    def mass(
        self,
        groups: Float[Tensor, "group key"] | Bool[Tensor, "group key"],
        heads: Positions | None = None,
        queries: Positions | None = None,
    ) -> Float[Tensor, "sample head query group"]:
        """Return the probability summed over groups of keys, without holding the matrix.

        The cost is one fused attention call per ``d_head`` groups.

        Args:
            groups: ``[group, key]``, True (or a weight) if a key belongs to a group.
            heads: Heads, all if not given.
            queries: Query positions, all that are held if not given.

        Raises:
            PositionError: The number of columns of ``groups`` is not the number of keys.
        """
        values = groups.to(device=self.device, dtype=torch.float32).T
        if values.shape[0] != self.n_keys:
            raise PositionError(
                f"The groups have {values.shape[0]} columns, but {self.name} has {self.n_keys} "
                "keys. Give one column per key."
            )
        return self.average(values, heads, queries)

    def average(
        self,
        values: Float[Tensor, "key value"],
        heads: Positions | None = None,
        queries: Positions | None = None,
    ) -> Float[Tensor, "sample head query value"]:
        """Return ``probs @ values`` without holding the matrix of probabilities."""
        return operands.average(self, self._head_index(heads), self._row_index(queries), values)

    def null_mass(
        self,
        groups: Float[Tensor, "group key"] | Bool[Tensor, "group key"],
        queries: Positions | None = None,
    ) -> Float[Tensor, "sample head query group"]:
        """Return ``mass`` for uniform attention over the visible keys.

        The sample and head axes may have length 1.
        """
        values = groups.to(device=self.device, dtype=torch.float32).T
        return operands.null_average(self, self._row_index(queries), values)

    def entropy(
        self, heads: Positions | None = None, queries: Positions | None = None
    ) -> Float[Tensor, "sample head query"]:
        """Return the entropy ``-sum p ln p`` of every row, in nats, float32.

        The absolute error is at most 1e-5 for scores of any size. Rows without a visible key are
        NaN.
        """
        return operands.entropy(self, self._head_index(heads), self._row_index(queries))

    def propagate(
        self, vector: Float[Tensor, "sample query"], heads: Positions | None = None
    ) -> Float[Tensor, "sample key"]:
        """Return ``vector @ probs``, with ``probs`` averaged over heads.

        This is one step of attention rollout for one row, in ``O(S^2)`` time and ``O(S)`` memory.
        For a call of one sample, several vectors can be given at once. Rows where ``vector`` is
        zero are not computed. The probabilities are computed in the dtype of ``vector``, float32 or
        float64.
        """
        head = self._head_index(heads)
        return operands.weighted_rows(self, head, vector, "sq,shqk->sk") / len(head)

    def received(
        self, vector: Float[Tensor, "sample query"], heads: Positions | None = None
    ) -> Float[Tensor, "sample head key"]:
        """Return ``vector @ probs`` of every head.

        With a vector of ones, this is the attention that each key receives from all queries. Rows
        where ``vector`` is zero are not computed. The probabilities are computed in the dtype of
        ``vector``, float32 or float64.
        """
        return operands.weighted_rows(self, self._head_index(heads), vector, "sq,shqk->shk")

    @property
    def query_positions(self) -> Int[Tensor, " query"]:
        """Position of each query that is held."""
        if self.rows is not None:
            return self.rows
        return torch.arange(self.n_queries, device=self.device)

    def _row_index(self, queries: Positions | None) -> Int[Tensor, " query"]:
        """Convert positions to rows of ``q``."""
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
