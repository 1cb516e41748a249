"""Rows of probabilities for the page: which queries, layers and heads, and their 8-bit codes.

1. Find the keys (image tokens, words, patches) and the query positions that the page can show.
2. For each layer, compute the exact probabilities of these queries, per head and as the mean over
   all heads, and exact sums: probability per group of keys, its null, entropy, visible keys.
3. If image tokens are learned queries, which have no place, add the patches of the vision tower as
   keys: their probability is that of the tokens, distributed with the connector's attention.
4. Encode each row of probabilities in 8 bits (``codes``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from xmodal_interp.analysis.rollout import attention_rollout
from xmodal_interp.analysis.selection import (
    counted_positions,
    each_once,
    rows_of,
)
from xmodal_interp.analysis.sinks import sink_keys
from xmodal_interp.at import Selector
from xmodal_interp.attention import AttentionCall, Positions, resolve
from xmodal_interp.errors import (
    InputError,
    NotRecordedError,
    PositionError,
    XmodalError,
    quoted,
)
from xmodal_interp.sample import Sample
from xmodal_interp.viewer.codes import HIDDEN, encoded
from xmodal_interp.viewer.keys import Spread, key_groups, key_table, learned_queries
from xmodal_interp.vocabulary import VISUAL_KINDS, AttentionKind, Tower

MEAN = -1
"""Head number of the mean over all heads of a layer."""

ROLLOUT = ((-1, -1), (-1, -2))
"""Rows after those of the layers: rollout, and rollout divided by that of uniform attention."""

Heads = str | Positions | None
"""``"all"``, ``"top 64"``, heads of every layer, or None for as many as fit."""

_CELLS = 32 * 2**20  # probabilities that are computed at once


@dataclass(frozen=True, eq=False)
class ShownRows:
    """The attention of one sample that a page shows.

    Attributes:
        sample: The sample.
        tower: ``"language"`` or ``"vision"``.
        kind: ``"self"``, or ``"cross"`` if text attends to the image by cross-attention.
        image: Index of the image in the vision tower.
        layers: The layers, ascending.
        queries: Query positions, ascending.
        keys: One row per key: ``token, kind, image, video, frame, row, col, view, tile, x0, y0, x1,
            y1``. After the keys of the calls come the patches of ``spread``.
        spread: Images whose tokens are learned queries.
        heads: ``(layer, head)`` of each row that is not a mean, in order.
        n_heads: Number of heads of each layer.
        with_rollout: Whether to compute rollout.
    """

    sample: Sample
    tower: Tower
    kind: AttentionKind
    image: int
    layers: tuple[int, ...]
    queries: Int[np.ndarray, " query"]
    keys: pd.DataFrame
    spread: tuple[Spread, ...]
    heads: tuple[tuple[int, int], ...]
    n_heads: tuple[int, ...]
    with_rollout: bool

    def call(self, layer: int) -> AttentionCall:
        """Return the call of a layer."""
        number = self.image if self.tower == "vision" else 0
        return self.sample.call(layer, tower=self.tower, kind=self.kind, call=number)

    @cached_property
    def rows(self) -> list[tuple[int, int]]:
        """Layer and head of each row of a query: means, heads, then rollout."""
        means = [(layer, MEAN) for layer in self.layers]
        rolled = ROLLOUT if self.has_rollout else ()
        return [*means, *self.heads, *rolled]

    @property
    def n_bytes(self) -> int:
        """Size of the codes and sums in bytes, before compression."""
        n_rows = len(self.layers) + len(self.heads) + 2 * self.with_rollout
        sums = len(self.layers) * max(self.n_heads) * (len(self.groups) + 1) * 4
        return len(self.queries) * (n_rows * (len(self.keys) + 4) + sums)

    @property
    def n_keys(self) -> int:
        """Number of keys of the calls."""
        return len(self.keys) - sum(int(each.shares.shape[1]) for each in self.spread)

    @cached_property
    def groups(self) -> dict[str, np.ndarray]:
        """Masks of the groups of keys of the calls; each that is not padding is in one."""
        return key_groups(self.sample, self.tower, self.keys[: self.n_keys])

    @cached_property
    def lift_factors(self) -> Float[np.ndarray, " key"]:
        """Factor of each key in a lift: 1, or for patches of ``spread`` 1 / their shares' sum.

        The lift of a patch is the mean of that of its tokens, weighted by their shares.
        """
        parts = [each.shares.sum(0) for each in self.spread]
        sums = np.concatenate([np.ones(self.n_keys), *parts])
        factors: np.ndarray = np.divide(1.0, sums, out=np.zeros_like(sums), where=sums > 0)
        return factors

    @cached_property
    def has_rollout(self) -> bool:
        """Whether rollout is defined for this sample, and all its layers and rows were kept."""
        return self.with_rollout and self.rollout(self.queries[-1:]) is not None

    def rollout(self, queries: Int[np.ndarray, " query"]) -> dict[str, np.ndarray] | None:
        """Return rollout of queries and its ratio to that of uniform attention, ``[query, key]``.

        None if it is not defined for this sample, or not all layers and query rows were kept. Rows
        of queries that see no key are NaN.
        """
        if self.kind != "self" or self.spread:
            return None
        try:
            table = attention_rollout(
                self.sample,
                queries.tolist(),
                baseline="uniform",
                tower=self.tower,
                image=self.image,
            )
        except (InputError, NotRecordedError):
            return None
        n_keys = len(self.keys)
        at = np.searchsorted(queries, table["query"].to_numpy()[::n_keys])
        ratio = np.exp2(table["log2_ratio"].to_numpy(np.float64).reshape(-1, n_keys))
        share = table["rollout"].to_numpy(np.float64).reshape(-1, n_keys)
        seen = np.isfinite(ratio)
        out = {}
        for name, values in (("rollout", share), ("ratio", ratio)):
            out[name] = np.full((len(queries), n_keys), np.nan)
            out[name][at] = np.where(seen, values, np.nan)
        return out

    @cached_property
    def sinks(self) -> dict[int, dict[int, list[int]]]:
        """Heads in which a key is a sink, by layer and key; see ``attention_sinks``."""
        if self.kind != "self":
            return {}
        found: dict[int, dict[int, list[int]]] = {}
        for layer in self.layers:
            call = self.call(layer)
            counted = counted_positions(self.sample, self.tower, self.image, call.n_keys)
            mask = sink_keys(call, range(call.n_heads), rows_of(call, counted)).cpu()
            for head, key in mask.nonzero().tolist():
                found.setdefault(layer, {}).setdefault(key, []).append(head)
        return found

    def sums(self, queries: Int[np.ndarray, " query"] | None = None) -> dict[str, np.ndarray]:
        """Return exact sums of the rows of some queries, all if not given.

        Returns:
            ``mass [query, layer, head, group]``, ``null [query, layer, group]`` (mass of uniform
            attention), ``entropy [query, layer, head]`` in nats, ``visible [query, layer]`` (number
            of visible keys), all float32; NaN where a layer has fewer heads or a row sees no key.
        """
        rows = self.queries if queries is None else queries
        n, heads = len(rows), max(self.n_heads)
        groups = torch.from_numpy(np.stack(list(self.groups.values()))).float()
        out = {
            "mass": np.full((n, len(self.layers), heads, len(groups)), np.nan, np.float32),
            "null": np.full((n, len(self.layers), len(groups)), np.nan, np.float32),
            "entropy": np.full((n, len(self.layers), heads), np.nan, np.float32),
            "visible": np.zeros((n, len(self.layers)), np.float32),
        }
        at = torch.from_numpy(rows)
        for i, (layer, n_heads) in enumerate(zip(self.layers, self.n_heads, strict=True)):
            call = self.call(layer)
            out["mass"][:, i, :n_heads] = call.mass(groups, None, at)[0].transpose(0, 1).cpu()
            out["entropy"][:, i, :n_heads] = call.entropy(None, at)[0].T.cpu()
            out["null"][:, i] = call.null_mass(groups, at)[0].mean(0).cpu()
            out["visible"][:, i] = call.n_visible(at)[0].float().mean(0).cpu()
        return out

    def codes(self, queries: Int[np.ndarray, " query"] | None = None) -> dict[str, np.ndarray]:
        """Return the encoded rows of some queries, all if not given.

        Returns:
            ``codes [query, row, key]`` uint8, ``largest [query, row]`` float32, and ``error``, the
            largest absolute error of a decoded probability.
        """
        chosen = self.queries if queries is None else queries
        rows = self.rows
        codes = np.full((len(chosen), len(rows), len(self.keys)), HIDDEN, np.uint8)
        largest = np.zeros((len(chosen), len(rows)), np.float32)
        worst = 0.0

        def put(row: int, at: slice | np.ndarray, values: np.ndarray) -> None:
            nonlocal worst
            codes[at, row], largest[at, row], error = encoded(values)
            worst = max(worst, error)

        number = {row: i for i, row in enumerate(rows)}
        for layer, n_heads in zip(self.layers, self.n_heads, strict=True):
            call = self.call(layer)
            step = max(1, _CELLS // (n_heads * len(self.keys)))
            for start in range(0, len(chosen), step):
                part = slice(start, start + step)
                probs = self._spread(self._seen_probs(call, chosen[part]))
                put(number[layer, MEAN], part, mean_over_seen(probs, 0))
                for head in range(n_heads):
                    if (layer, head) in number:
                        put(number[layer, head], part, probs[head])
        rolled = self.rollout(chosen) if self.has_rollout else None
        if rolled is not None:
            so_far = worst
            for row, values in zip(ROLLOUT, rolled.values(), strict=True):
                put(number[row], slice(None), values)
            worst = so_far  # of probabilities: ratios have another range
        return {"codes": codes, "largest": largest, "error": np.array(worst)}

    def _spread(self, values: Float[np.ndarray, "*row key"]) -> Float[np.ndarray, "*row shown"]:
        """Return values with those of the patches after them."""
        if not self.spread:
            return values
        return np.concatenate([values, *(each.on_patches(values) for each in self.spread)], -1)

    def _seen_probs(
        self, call: AttentionCall, queries: np.ndarray
    ) -> Float[np.ndarray, "head query key"]:
        """Return probabilities, NaN for keys that the mask hides."""
        at = torch.from_numpy(queries)
        probs = call.probs(None, at)[0].double().cpu().numpy()
        seen = np.broadcast_to(call.visible(at)[0].cpu().numpy(), probs.shape)
        return np.where(seen, probs, np.nan)


def mean_over_seen(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Return the mean of values that are not NaN; NaN where all are."""
    count = (~np.isnan(values)).sum(axis)
    with np.errstate(invalid="ignore"):
        means: np.ndarray = np.where(count > 0, np.nansum(values, axis) / count, np.nan)
    return means


def shown_rows(
    sample: Sample,
    *,
    tower: Tower | None,
    image: int,
    layers: Positions | None,
    queries: Selector | None,
    heads: Heads,
    rollout: bool,
    most_bytes: float,
) -> ShownRows:
    """Return the rows of a sample that a page shows; see ``view`` for the arguments.

    Args:
        sample: The sample.
        tower: The tower; ``Sample.tower`` if None.
        image: Index of the image in the vision tower.
        layers: Layers; all kept ones if None.
        queries: Query positions; all words if None.
        heads: Which heads have rows.
        rollout: Whether to compute rollout.
        most_bytes: Size of the codes to which heads are limited if ``heads`` is None.

    Raises:
        InputError: ``heads`` or ``queries`` selects nothing, or ``heads`` is not a selection.
        NotRecordedError: The sample holds no attention that can be shown.
    """
    of = tower or sample.tower
    if of not in ("language", "vision"):
        raise InputError(
            f"The viewer shows the towers 'language' and 'vision'; got tower={quoted(of)}."
        )
    crossed = of == "language" and sample.cross_keys is not None
    kind: AttentionKind = "cross" if crossed else "self"
    kept = sample.layers(of, kind)
    if not kept:
        raise NotRecordedError(
            f"Sample {sample.name!r} holds no {of} {kind}-attention to show. Capture it with this "
            "tower, or choose another."
        )
    if layers is not None:
        exists = sample.provenance.get("layers", {}).get(f"{of}.{kind}") or kept
        chosen = resolve(layers, max(exists) + 1, "layer").tolist()
        kept = sorted(dict.fromkeys(chosen))
    number = image if of == "vision" else 0
    calls = [sample.call(layer, tower=of, kind=kind, call=number) for layer in kept]
    if calls[0].holds_statistics:
        raise NotRecordedError(
            f"Sample {sample.name!r} holds statistics of attention, not its rows. Capture it "
            "without Keep(statistics=...) to view it."
        )
    keys = key_table(sample, of, kind, image, calls[0].n_keys)
    spread, patches = learned_queries(sample, keys) if of == "language" else ((), [])
    shown = ShownRows(
        sample,
        of,
        kind,
        image,
        tuple(kept),
        _query_positions(sample, of, image, queries, calls[0], most_bytes),
        pd.concat([keys, *patches], ignore_index=True) if patches else keys,
        spread,
        (),
        tuple(call.n_heads for call in calls),
        rollout and kind == "self" and not spread,
    )
    return replace(shown, heads=_chosen_heads(shown, heads, most_bytes))


def _chosen_heads(shown: ShownRows, heads: Heads, most_bytes: float) -> tuple[tuple[int, int], ...]:
    """Return layer and head of each head that has rows."""
    every = [
        (layer, head)
        for layer, n_heads in zip(shown.layers, shown.n_heads, strict=True)
        for head in range(n_heads)
    ]
    if heads is None:
        one = len(shown.queries) * len(shown.keys)
        fit = int((most_bytes - shown.n_bytes) // max(one, 1))
        return tuple(every) if fit >= len(every) else _strongest(shown, max(fit, 0))
    if not isinstance(heads, str):
        chosen = resolve(heads, max(shown.n_heads), "head").tolist()
        return tuple(each for each in every if each[1] in chosen)
    if heads == "all":
        return tuple(every)
    match = re.fullmatch(r"top (\d+)", heads)
    if match is None:
        raise InputError(
            f"heads must be 'all', 'top N' such as 'top 64', or numbers of heads; got {heads!r}."
        )
    return _strongest(shown, int(match[1]))


def _strongest(shown: ShownRows, n: int) -> tuple[tuple[int, int], ...]:
    """Return the heads with the largest mean probability on images and videos, in layer order."""
    if n == 0:
        return ()
    sums = shown.sums()["mass"]
    visual = [i for i, name in enumerate(shown.groups) if name.split()[0] in _VISUAL_GROUPS]
    share = np.nan_to_num(mean_over_seen(sums[..., visual].sum(-1), 0), nan=-1.0)
    order = np.argsort(-share, axis=None, kind="stable")[:n]
    found = sorted(divmod(int(i), share.shape[1]) for i in order)
    return tuple((shown.layers[i], head) for i, head in found if head < shown.n_heads[i])


_VISUAL_GROUPS = (*VISUAL_KINDS, "patches")


def _query_positions(
    sample: Sample,
    tower: Tower,
    image: int,
    queries: Selector | None,
    call: AttentionCall,
    most_bytes: float,
) -> Int[np.ndarray, " query"]:
    """Return the query positions of a page, ascending; those that predict the words included."""
    held = call.query_positions.cpu().numpy()
    if tower == "vision":
        chosen = _tower_positions(sample, image, queries, call, most_bytes)
    elif queries is None:
        chosen = np.flatnonzero(~np.isin(sample.kinds, (*VISUAL_KINDS, "padding")))
    else:
        chosen = each_once(sample.positions(queries)).numpy()
    found = set(chosen.tolist()) & set(held.tolist())
    if queries is not None and not found:
        raise InputError(
            f"queries={quoted(queries)} selects no query row that sample {sample.name!r} holds. "
            "Choose other queries, or capture with Keep(queries='all')."
        )
    if tower == "language":
        found |= set(predicting(sample, sorted(found), held).values())
        if sample.answer and len(sample) - 1 in held:
            found.add(len(sample) - 1)
    if not found:
        raise InputError(f"Sample {sample.name!r} holds no query rows of words to show.")
    return np.array(sorted(found), dtype=np.int64)


def _tower_positions(
    sample: Sample, image: int, queries: Selector | None, call: AttentionCall, most_bytes: float
) -> np.ndarray:
    """Return query positions of the vision tower: all if they fit, else those without a patch."""
    if queries is not None:
        return each_once(sample.positions(queries, tower="vision", image=image)).numpy()
    counted = counted_positions(sample, "vision", image, call.n_keys).numpy()
    n_layers = len(sample.layers("vision", "self"))
    if counted.sum() * call.n_keys * n_layers * (call.n_heads + 1) <= most_bytes:
        return np.flatnonzero(counted)
    names = sample.patch_names(image)
    special = np.flatnonzero(counted & (names != "patch"))
    step = max(1, call.n_keys // 64)
    return special if len(special) else np.flatnonzero(counted)[::step]


def predicting(
    sample: Sample, positions: list[int], held: Int[np.ndarray, " query"]
) -> dict[int, int]:
    """Return the position that predicts each token; tokens that no held row predicts are absent."""
    known, out = set(held.tolist()), {}
    for position in positions:
        try:
            before = int(sample.positions([position], predicts=True)[0])
        except (PositionError, XmodalError):
            continue
        if before in known:
            out[position] = before
    return out


def shown_values(
    sample: Sample,
    queries: Selector,
    heads: Mapping[int, Positions | None],
    measure: str = "probability",
    *,
    tower: Tower | None = None,
    image: int = 0,
) -> Float[np.ndarray, " key"]:
    """Return the exact values that the viewer draws for a selection of heads in several layers.

    Args:
        sample: The sample.
        queries: A phrase or positions; the values are means over them.
        heads: The heads of each layer; None for all heads of a layer.
        measure: ``"probability"``, or ``"lift"``: probability times the number of visible keys.
        tower: ``"language"`` or ``"vision"``; ``Sample.tower`` if not given.
        image: Index of the image in the vision tower.

    Returns:
        One value per key, float64: the mean over the queries and heads that may attend to the key;
        NaN for a key that is hidden from all of them. ``sample.grid`` takes the values of the
        tokens of an image, such as ``values[sample.where("image", image=0)]``.

    Raises:
        InputError: ``heads`` is empty, or ``measure`` is another.
    """
    if measure not in ("probability", "lift"):
        raise InputError(f"measure must be 'probability' or 'lift'; got {quoted(measure)}.")
    if not heads:
        raise InputError("heads is empty. Pass the heads of at least one layer, such as {3: [0]}.")
    of = tower or sample.tower
    kind: AttentionKind = "cross" if of == "language" and sample.cross_keys is not None else "self"
    number = image if of == "vision" else 0
    rows = each_once(sample.positions(queries, tower=of, image=image))
    total: Any = 0.0
    count: Any = 0
    for layer, chosen in heads.items():
        call = sample.call(layer, tower=of, kind=kind, call=number)
        probs = call.probs(chosen, rows)[0].double().cpu().numpy()
        seen = _of_heads(call.visible(rows)[0].cpu().numpy(), call, chosen)
        if measure == "lift":
            probs = (
                probs * _of_heads(call.n_visible(rows)[0].cpu().numpy(), call, chosen)[..., None]
            )
        seen = np.broadcast_to(seen, probs.shape)
        total = total + np.where(seen, probs, 0.0).sum((0, 1))
        count = count + seen.sum((0, 1))
    means: np.ndarray = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return means


def _of_heads(per_head: np.ndarray, call: AttentionCall, heads: Positions | None) -> np.ndarray:
    """Return the entries of some heads; a head axis of length 1 is kept."""
    if len(per_head) == 1 or heads is None:
        return per_head
    chosen: np.ndarray = per_head[resolve(heads, call.n_heads, "head").numpy()]
    return chosen
