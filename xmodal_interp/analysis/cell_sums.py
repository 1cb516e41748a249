"""Sum the cells of attention matrices by key, by distance and by rotary distance.

A cell is one query ``i`` and one key ``j``. For each kind of query and of key, the sums over the
cells of each key position, of each distance ``i - j`` and of each rotary distance are computed,
with a weight per query. No cell is added to its sum one by one, except for the rotary distance:

1. A few rows of the matrix at a time, one row per query, are given by a function.
2. Key: the weights times these rows is the sum of each column.
3. Distance: each row is written one cell further to the left than the row before, so that each
   distance is one column. The weights times these shifted rows is the sum of each distance.
4. Rotary distance: the cells of each row are counted into bins, and the bins of all rows are then
   summed with the weights.

Queries and keys are numbered by place, the index in the sequence without padding. Consecutive
places differ by a distance of 1, whatever padding is between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xmodal_interp.attention.kernels import full_precision

Cells = Callable[[Int[Tensor, " query"]], Float[Tensor, "head query place"]]
"""Function of some queries, as ascending places, that returns their rows.

The rows have one column per key, for the first places of the sequence; cells of other keys are 0.
The rows have no NaN.
"""


@dataclass(frozen=True)
class Bins:
    """Bins of ``width`` positions, aligned at 0, for distances and positions below ``reach``."""

    width: int
    reach: int

    @property
    def lowest(self) -> int:
        """The number of the first bin; the bin that starts at 0 is number 0."""
        return -((self.reach - 1) // self.width + 1)

    @property
    def n(self) -> int:
        """The number of bins."""
        return -2 * self.lowest

    @property
    def starts(self) -> list[int]:
        """The first distance or position of each bin."""
        return [b * self.width for b in range(self.lowest, -self.lowest)]

    def of(self, places: Int[Tensor, "*axes"]) -> Int[Tensor, "*axes"]:
        """Return the bin index of each distance or position."""
        return torch.div(places, self.width, rounding_mode="floor") - self.lowest


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of a sample: which queries and which keys.

    Attributes:
        pairs: Query kind and key kind of each block.
        kinds: The places of each kind; no place has two kinds.
        rope: Rotary position of each place; None if there is no sum over the rotary distance.
        bins: The bins of all sums.
    """

    pairs: Sequence[tuple[str, str]]
    kinds: dict[str, Bool[Tensor, " place"]]
    rope: Int[Tensor, "place axis"] | None
    bins: Bins

    @property
    def query_kinds(self) -> list[str]:
        """The kinds of the queries, each once."""
        return list(dict.fromkeys(query for query, _ in self.pairs))

    @property
    def key_kinds(self) -> list[str]:
        """The kinds of the keys, each once."""
        return list(dict.fromkeys(key for _, key in self.pairs))

    @property
    def queries(self) -> Bool[Tensor, " place"]:
        """The places that are a query of some block."""
        return torch.stack([self.kinds[kind] for kind in self.query_kinds]).any(0)


class CellSums:
    """Sums of the cells of blocks; its buffers are used again for each layer.

    Args:
        blocks: The queries and keys.
        n_heads: Number of heads.
        n_rows: The largest number of rows at a time.
        dtype: The dtype of the rows.
    """

    def __init__(self, blocks: Blocks, n_heads: int, n_rows: int, dtype: torch.dtype) -> None:
        self.blocks, self._n_heads = blocks, n_heads
        self._of_kinds = torch.stack([blocks.kinds[kind] for kind in blocks.query_kinds])
        self._queries_of = {
            kind: torch.stack([blocks.kinds[q] for q, key in blocks.pairs if key == kind]).any(0)
            for kind in blocks.key_kinds
        }
        self._asked = self._of_kinds.any(0)
        self._n_places = len(self._asked)
        self._n_rows = min(n_rows, self._n_places)
        self._shifted = {
            kind: _Shifted(blocks.kinds[kind], n_heads, self._n_rows, dtype)
            for kind in blocks.key_kinds
        }

    @full_precision()
    def of(
        self, cells: Cells, weights: Float[Tensor, "weight #head place"]
    ) -> Float[Tensor, "weight block head axis bin"]:
        """Return the weighted sum of the cells of each block, per axis and bin, in float64.

        The axes are the distance (query minus key), the key, and the rotary distance if the blocks
        have rotary positions.

        Args:
            cells: The rows.
            weights: The weights of each query.
        """
        blocks, n_places, n_rows = self.blocks, self._n_places, self._n_rows
        # [head, query kind and weight, place]: 0 for queries of other kinds
        by_kind = (self._of_kinds[:, None, None] * weights).flatten(0, 1).transpose(0, 1)
        by_kind = by_kind.expand(self._n_heads, -1, -1)
        shape, double = by_kind.shape[:2], torch.float64
        of_keys = torch.zeros(*shape, n_places, dtype=double)
        # entry e is the distance n_places + n_rows - 1 - e
        of_distances = {
            kind: torch.zeros(*shape, 2 * n_places + n_rows, dtype=double)
            for kind in blocks.key_kinds
        }
        n_of_rotary = (len(weights), len(blocks.pairs), self._n_heads, blocks.bins.n)
        of_rotary = torch.zeros(n_of_rotary, dtype=double)
        for buffer in self._shifted.values():
            buffer.clear()
        for start in range(0, n_places, n_rows):
            window = slice(start, start + n_rows)
            rows = self._asked[window].nonzero()[:, 0]
            if len(rows) == 0:
                continue
            part = cells(start + rows)
            # most chunks have queries of one kind; the weights of the others are 0
            kinds = self._of_kinds[:, window].any(1).nonzero()[:, 0]
            asked = slice(int(kinds[0]) * len(weights), (int(kinds[-1]) + 1) * len(weights))
            these = by_kind[:, asked, window]
            of_rows = these if len(rows) == these.shape[-1] else these[..., rows]
            of_keys[:, asked, : part.shape[-1]] += torch.bmm(of_rows, part)
            for kind, buffer in self._shifted.items():
                if not bool(self._queries_of[kind][window].any()):
                    continue  # none of these rows is in a block with these keys
                first = n_places - start + buffer.first
                columns = buffer.sums(part, rows, these)
                of_distances[kind][:, asked, first : first + columns.shape[-1]] += columns
            if blocks.rope is not None:
                of_rotary += _rotary_sums(part, start + rows, weights, blocks)
        distances = n_places + n_rows - 1 - torch.arange(2 * n_places + n_rows)
        distances = distances.clamp(max=n_places - 1)  # no cell has a larger one
        sums = []
        for number, (query, key) in enumerate(blocks.pairs):
            at, keys = blocks.query_kinds.index(query) * len(weights), blocks.kinds[key]
            of_query = slice(at, at + len(weights))
            axes = [
                _binned(of_distances[key][:, of_query], distances, blocks.bins),
                _binned(of_keys[:, of_query, keys], keys.nonzero()[:, 0], blocks.bins),
            ]
            axes += [] if blocks.rope is None else [of_rotary[:, number].transpose(0, 1)]
            sums.append(torch.stack(axes, 2))  # [head, weight, axis, bin]
        return torch.stack(sums).permute(2, 0, 1, 3, 4)


class _Shifted:
    """A buffer in which the rows of some keys are shifted, so that each distance is one column.

    Row ``r`` of the buffer has key ``first + c`` in column ``c + n_rows - 1 - r``. The other
    columns are 0.

    Args:
        keys: The keys; cells of other keys are 0.
        n_heads: Number of heads.
        n_rows: Number of rows.
        dtype: The dtype of the rows.
    """

    def __init__(
        self, keys: Bool[Tensor, " place"], n_heads: int, n_rows: int, dtype: torch.dtype
    ) -> None:
        places = keys.nonzero()[:, 0].tolist() or [0]
        self.first, self.stop = places[0], places[-1] + 1
        self._keys = keys[self.first : self.stop].to(dtype)
        self._all = bool(keys[self.first : self.stop].all())
        self._n_rows, width = n_rows, self.stop - self.first
        length = width + n_rows - 1
        self._whole = torch.zeros(n_heads, n_rows, length, dtype=dtype)
        strides = (n_rows * length, length - 1, 1)
        self._rows = self._whole.as_strided((n_heads, n_rows, width), strides, n_rows - 1)

    def clear(self) -> None:
        """Set all columns to 0, before the rows of another matrix."""
        self._whole.zero_()

    def sums(
        self,
        part: Float[Tensor, "head query place"],
        rows: Int[Tensor, " query"],
        weights: Float[Tensor, "head weight row"],
    ) -> Float[Tensor, "head weight column"]:
        """Return the weighted sum of each column.

        Args:
            part: The rows, with at least as many places as on the previous call.
            rows: Their numbers in the buffer. Other rows hold cells of previous calls, and must
                have weight 0.
            weights: The weights of the first rows of the buffer.
        """
        n = min(part.shape[-1], self.stop) - self.first
        if n <= 0:
            return weights.new_zeros(*weights.shape[:2], 0)
        cells = part[..., self.first : self.first + n]
        if len(rows) == int(rows[-1]) + 1 - int(rows[0]):
            target = self._rows[:, int(rows[0]) : int(rows[-1]) + 1, :n]
            if self._all:
                target.copy_(cells)
            else:
                torch.mul(cells, self._keys[:n], out=target)
        else:
            self._rows[:, rows, :n] = cells * self._keys[:n]
        columns = self._whole[:, : weights.shape[-1], : n + self._n_rows - 1]
        return torch.bmm(weights, columns)


def _rotary_sums(
    part: Float[Tensor, "head query key"],
    queries: Int[Tensor, " query"],
    weights: Float[Tensor, "weight #head place"],
    blocks: Blocks,
) -> Float[Tensor, "weight block head bin"]:
    """Return the sums of the rows of some queries per bin of the rotary distance."""
    assert blocks.rope is not None
    n_keys, n_bins, n_blocks = part.shape[-1], blocks.bins.n, len(blocks.pairs)
    distance = (blocks.rope[queries][:, None] - blocks.rope[:n_keys]).abs().amax(-1)
    block = torch.full(distance.shape, n_blocks)
    for number, (query, key) in enumerate(blocks.pairs):
        of_block = blocks.kinds[query][queries][:, None] & blocks.kinds[key][:n_keys]
        block.masked_fill_(of_block, number)
    row = torch.arange(len(queries))[:, None]
    entry = (row * (n_blocks + 1) + block) * n_bins + blocks.bins.of(distance)
    entries, n = entry.flatten().numpy(), len(queries) * (n_blocks + 1) * n_bins
    counted = [np.bincount(entries, each.flatten().numpy(), minlength=n) for each in part]
    by_row = torch.from_numpy(np.stack(counted)).view(len(part), len(queries), -1)
    of_queries = weights[..., queries].double().transpose(0, 1).expand(len(part), -1, -1)
    sums: Tensor = torch.bmm(of_queries, by_row).unflatten(-1, (n_blocks + 1, n_bins))
    return sums[:, :, :n_blocks].permute(1, 2, 0, 3)


def _binned(
    values: Float[Tensor, "*axes place"], places: Int[Tensor, " place"], bins: Bins
) -> Float[Tensor, "*axes bin"]:
    """Return the sum of the values in each bin."""
    empty = values.new_zeros(*values.shape[:-1], bins.n)
    return empty.index_add_(-1, bins.of(places), values)
