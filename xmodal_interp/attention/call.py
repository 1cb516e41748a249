"""One attention call as the model made it, and every exact number that follows from it.

A call keeps the operands: queries, keys, the mask, scaling, soft-cap, sinks. They cost ``O(S d)`` and determine every
probability, which costs ``O(S^2)`` and is computed when asked for, in float32, row chunk by row chunk:

    scores = scaling * q k^T        softcap * tanh(scores / softcap), if there is one        + bias, - infinity where hidden
    probs  = softmax over the keys (and the sinks, whose column is dropped)

Whatever is linear in the probabilities is one more call of the fused kernel with other values (``mass``, ``average``); the
entropy follows from ``V = K`` and the log-sum-exp (``entropy``); a row vector goes through a layer without its matrix
(``propagate``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xmodal_interp.attention import kernels, masks
from xmodal_interp.errors import LayerError, NotRecordedError, PositionError

if TYPE_CHECKING:
    from xmodal_interp.vocabulary import AttentionKind, Tower

Positions = int | slice | Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of one attention layer.

    Attributes:
        tower: Which part of the model the layer belongs to.
        kind: ``"self"`` or ``"cross"``.
        layer: Index of the layer within its tower and kind.
        module: Dotted name of the attention module in the model.
        call: Which call of this layer (an image of several, a decode step).
        q: ``[sample, head, query, d_head]``, post-rotary. None if dense probabilities were kept instead.
        k: ``[sample, kv_head, key, d_head]``, post-rotary.
        v: ``[sample, kv_head, key, d_head]`` if it was asked for.
        mask: ``[sample | 1, head | 1, query, key]`` boolean (True is visible) or additive, or None.
        bias: Position bias added to the scores, ``[sample | 1, head, query, key]``, or None.
        causal: Whether, with no mask, keys behind the query are hidden.
        offset: Key index of query 0: what came before it is the cache.
        scaling: Factor of ``q k^T``.
        softcap: Scores are squashed to ``softcap * tanh(scores / softcap)``.
        sinks: ``[head]`` learned scores that take part in the softmax and are then dropped.
        sliding_window: With no mask: a query sees this many keys, its own included.
        rows: Query positions that are held, ascending; None means all.
        dense: ``[sample, head, query, key]`` probabilities, where they were kept instead of q and k.
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
    sinks: Float[Tensor, " head"] | None = None
    sliding_window: int | None = None
    rows: Int[Tensor, " query"] | None = None
    dense: Float[Tensor, "sample head query key"] | None = None

    @property
    def _queries(self) -> Tensor:
        held = self.dense if self.q is None else self.q
        if held is None:
            raise NotRecordedError(f"A call holds q and k, or dense probabilities; {self.name} holds neither.")
        return held

    @property
    def name(self) -> str:
        """Such as ``"language self-attention, layer 3, call 0"``, for messages."""
        return f"{self.tower} {self.kind}-attention, layer {self.layer}, call {self.call}"

    @property
    def n_samples(self) -> int:
        """Samples in the batch of this call."""
        return self._queries.shape[0]

    @property
    def n_heads(self) -> int:
        """Query heads."""
        return self._queries.shape[1]

    @property
    def n_kv_heads(self) -> int:
        """Key heads; with grouped queries, fewer than query heads. Equal to ``n_heads`` for dense calls."""
        return self.n_heads if self.k is None else self.k.shape[1]

    @property
    def n_queries(self) -> int:
        """Queries that are held."""
        return self._queries.shape[2]

    @property
    def n_keys(self) -> int:
        """Keys."""
        return self._queries.shape[3] if self.k is None else self.k.shape[2]

    @property
    def n_bytes(self) -> int:
        """Memory of the tensors that are held; a mask shared with other calls counts here too."""
        held = (self.q, self.k, self.v, self.mask, self.bias, self.sinks, self.dense)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def select_sample(self, index: int) -> AttentionCall:
        """The call of one sample of the batch; the sample axis stays, with length 1."""

        def one(t: Tensor | None) -> Tensor | None:
            return t if t is None or t.shape[0] == 1 else t[index : index + 1]

        return replace(
            self,
            q=None if self.q is None else self.q[index : index + 1],
            k=one(self.k),
            v=one(self.v),
            mask=one(self.mask),
            bias=one(self.bias),
            dense=None if self.dense is None else self.dense[index : index + 1],
        )

    def select_rows(self, positions: Int[Tensor, " query"]) -> AttentionCall:
        """The same call with these query positions only; the tensors are copies, so the rest can be freed."""
        index = self._row_index(positions)
        return replace(
            self,
            q=None if self.q is None else self.q[:, :, index].clone(),
            mask=None if self.mask is None else self.mask[..., index, :].clone(),
            bias=None if self.bias is None else self.bias[..., index, :].clone(),
            dense=None if self.dense is None else self.dense[:, :, index].clone(),
            rows=self._held_positions()[index],
        )

    def probs(
        self, heads: Positions | None = None, queries: Positions | None = None, keys: Positions | None = None
    ) -> Float[Tensor, "sample head query key"]:
        """Exact probabilities, float32, of chosen heads, queries and keys (all if not given).

        Rows without a single visible key are NaN: there is nothing they could attend to.

        Raises:
            LayerError: A head that does not exist.
            PositionError: A position outside the sequence.
            NotRecordedError: A query row that was not kept.
        """
        head, row = self._head_index(heads), self._row_index(queries)
        key = None if keys is None else resolve(keys, self.n_keys, "key").to(row.device)
        parts = []
        for chunk in row.split(self._chunk(len(head))):
            full = self._probs(head, chunk)
            parts.append(full if key is None else full[..., key])
        return torch.cat(parts, 2) if parts else self._probs(head, row)

    def visible(self, queries: Positions | None = None) -> Bool[Tensor, "sample head query key"]:
        """Which keys each query may attend to; sample and head axes have length 1 where nothing differs."""
        return self._visible(self._row_index(queries))

    def n_visible(self, queries: Positions | None = None) -> Int[Tensor, "sample head query"]:
        """How many keys each query may attend to."""
        row = self._row_index(queries)
        return torch.cat([self._visible(chunk).sum(-1) for chunk in row.split(self._chunk(1))], 2)

    def mass(
        self,
        groups: Float[Tensor, "group key"] | Bool[Tensor, "group key"],
        heads: Positions | None = None,
        queries: Positions | None = None,
    ) -> Float[Tensor, "sample head query group"]:
        """Probability summed over groups of keys, at the cost of one more fused attention per ``d_head`` groups.

        Args:
            groups: ``[group, key]``, True (or a weight) where a key belongs to a group.
            heads: Heads, all if not given.
            queries: Query positions, all that are held if not given.
        """
        values = groups.to(device=self._queries.device, dtype=torch.float32).T
        if values.shape[0] != self.n_keys:
            raise PositionError(
                f"Groups have one column per key. {self.name} has {self.n_keys} keys, the groups have {values.shape[0]} columns."
            )
        return self.average(values, heads, queries)

    def average(
        self,
        values: Float[Tensor, "key value"],
        heads: Positions | None = None,
        queries: Positions | None = None,
    ) -> Float[Tensor, "sample head query value"]:
        """Values averaged with the probabilities as weights (``probs @ values``), without the matrix of probabilities."""
        head, row = self._head_index(heads), self._row_index(queries)
        if self._fusible:
            return torch.cat([self._fused(head, row, part) for part in values.split(self._d_head, 1)], -1)
        parts = [self._probs(head, chunk) @ values for chunk in row.split(self._chunk(len(head)))]
        return torch.cat(parts, 2)

    def null_mass(
        self, groups: Float[Tensor, "group key"] | Bool[Tensor, "group key"], queries: Positions | None = None
    ) -> Float[Tensor, "sample head query group"]:
        """What ``mass`` would be if attention were uniform over the visible keys. Sample and head axes may have length 1."""
        values = groups.to(device=self._queries.device, dtype=torch.float32).T
        row = self._row_index(queries)
        parts = []
        for chunk in row.split(self._chunk(1)):
            seen = self._visible(chunk).float()
            parts.append((seen @ values) / seen.sum(-1, keepdim=True))
        return torch.cat(parts, 2)

    def entropy(
        self, heads: Positions | None = None, queries: Positions | None = None
    ) -> Float[Tensor, "sample head query"]:
        """``-sum p ln p`` of every row, in nats."""
        head, row = self._head_index(heads), self._row_index(queries)
        if self._fusible and self._queries.device.type == "cpu":
            return self._fused_entropy(head, row)
        parts = [torch.special.entr(self._probs(head, chunk)).sum(-1) for chunk in row.split(self._chunk(len(head)))]
        return torch.cat(parts, 2)

    def propagate(
        self, vector: Float[Tensor, "sample query"], heads: Positions | None = None
    ) -> Float[Tensor, "sample key"]:
        """``vector @ mean over heads of probs``: one step of attention rollout for one row, ``O(S^2)`` time, ``O(S)`` memory.

        Rows where ``vector`` is zero are not computed.
        """
        head = self._head_index(heads)
        needed = vector.ne(0).any(0).nonzero()[:, 0]
        out = torch.zeros(vector.shape[0], self.n_keys, device=vector.device)
        for chunk in needed.split(self._chunk(len(head))):
            out += torch.einsum("sq,shqk->sk", vector[:, chunk], self._probs(head, chunk)) / len(head)
        return out

    @property
    def _d_head(self) -> int:
        return self._queries.shape[-1]

    @property
    def _fusible(self) -> bool:
        """The fused kernel knows masks, but no soft-cap, sinks or bias."""
        plain = self.q is not None and self.softcap is None and self.sinks is None and self.bias is None
        return plain and (self.mask is None or self.mask.dtype == torch.bool)

    def _held_positions(self) -> Int[Tensor, " query"]:
        if self.rows is not None:
            return self.rows
        return torch.arange(self.n_queries, device=self._queries.device)

    def _row_index(self, queries: Positions | None) -> Int[Tensor, " query"]:
        """Positions to rows of ``q``."""
        device = self._queries.device
        if queries is None:
            return torch.arange(self.n_queries, device=device)
        if self.rows is None:
            return resolve(queries, self.n_queries, "query").to(device)
        wanted = resolve(queries, int(self.rows.max()) + 1, "query").to(device)
        index = torch.searchsorted(self.rows, wanted).clamp_(max=len(self.rows) - 1)
        missing = wanted[self.rows[index] != wanted]
        if len(missing):
            raise NotRecordedError(
                f"Only rows that were kept can be asked for. {self.name} kept {_brief(self.rows.tolist())}; "
                f"asked for were also {_brief(missing.tolist())}. Capture again with these queries, or with all."
            )
        return index

    def _head_index(self, heads: Positions | None) -> Int[Tensor, " head"]:
        if heads is None:
            return torch.arange(self.n_heads, device=self._queries.device)
        try:
            return resolve(heads, self.n_heads, "head").to(self._queries.device)
        except PositionError as error:
            raise LayerError(f"{error} ({self.name})") from None

    def _visible(self, row: Int[Tensor, " query"]) -> Bool[Tensor, "sample head query key"]:
        positions = self._held_positions()[row] + self.offset
        return masks.visible_rows(
            self.mask, row, positions, self.n_keys, causal=self.causal, sliding_window=self.sliding_window
        )

    def _probs(self, head: Int[Tensor, " head"], row: Int[Tensor, " query"]) -> Float[Tensor, "sample head query key"]:
        if self.dense is not None:
            return self.dense[:, head][:, :, row].float()
        if self.q is None or self.k is None:
            raise NotRecordedError(f"A call holds q and k, or dense probabilities; {self.name} holds neither.")
        additive = masks.additive_rows(self.mask, row)
        if self.bias is not None:
            bias = _heads_of(self.bias, head)[..., row, :].float()
            additive = bias if additive is None else additive + bias
        return kernels.softmax_rows(
            self.q[:, head][:, :, row],
            self.k[:, head // (self.n_heads // self.n_kv_heads)],
            _heads_of(self._visible(row), head),
            scaling=self.scaling,
            additive=None if additive is None else _heads_of(additive, head) if additive.shape[1] != len(head) else additive,
            softcap=self.softcap,
            sinks=None if self.sinks is None else self.sinks[head],
        )

    def _fused(
        self, head: Int[Tensor, " head"], row: Int[Tensor, " query"], values: Float[Tensor, "key value"]
    ) -> Float[Tensor, "sample head query value"]:
        q, k, visible, causal = self._fused_operands(head, row)
        return kernels.fused_average(q, k, values, visible, causal=causal, scaling=self.scaling)

    def _fused_entropy(self, head: Int[Tensor, " head"], row: Int[Tensor, " query"]) -> Float[Tensor, "sample head query"]:
        q, k, visible, causal = self._fused_operands(head, row)
        return kernels.fused_entropy(q, k, visible, causal=causal, scaling=self.scaling)

    def _fused_operands(self, head: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """Operands of the fused kernel: it takes the causal flag where the whole square is asked for, else a mask."""
        if self.q is None or self.k is None:
            raise NotRecordedError(f"A call holds q and k, or dense probabilities; {self.name} holds neither.")
        q = self.q if _all(head, self.n_heads) else self.q[:, head]
        k = self.k[:, head // (self.n_heads // self.n_kv_heads)]
        whole = _all(row, self.n_queries) and self.rows is None
        if self.mask is None and self.sliding_window is None:
            if not self.causal:
                return q if whole else q[:, :, row], k, None, False
            if whole and self.n_queries == self.n_keys and self.offset == 0:
                return q, k, None, True
        return q if whole else q[:, :, row], k, _heads_of(self._visible(row), head), False

    def _chunk(self, n_heads: int) -> int:
        """Rows per chunk, so that a chunk of float32 scores stays around 32 MB."""
        return max(1, kernels.CHUNK_BYTES // (4 * self.n_keys * n_heads * self.n_samples))


def resolve(positions: Positions, length: int, label: str) -> Int[Tensor, " position"]:
    """Positions of any spelling as an index tensor; negative ones count from the end.

    Raises:
        PositionError: A position outside ``[-length, length)``.
    """
    if isinstance(positions, slice):
        return torch.arange(length)[positions]
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        index = positions.nonzero()[:, 0]
    else:
        values: Iterable[int] = [positions] if isinstance(positions, int) else positions
        index = torch.as_tensor(values if isinstance(values, Tensor) else [int(v) for v in values], dtype=torch.long)
    outside = index[(index < -length) | (index >= length)]
    if len(outside):
        raise PositionError(
            f"A {label} must lie between {-length} and {length - 1}; got {_brief(outside.tolist())}."
        )
    return torch.where(index < 0, index + length, index)


def _heads_of(t: Tensor, head: Int[Tensor, " head"]) -> Tensor:
    return t if t.shape[1] == 1 else t[:, head]


def _all(index: Tensor, length: int) -> bool:
    return len(index) == length and bool((index == torch.arange(length, device=index.device)).all())


def _brief(values: Sequence[int]) -> str:
    shown = ", ".join(str(v) for v in values[:6])
    return shown if len(values) <= 6 else f"{shown}, ... ({len(values)} in all)"
