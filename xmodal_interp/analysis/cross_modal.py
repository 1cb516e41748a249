"""Share of each text token's attention that goes to the image, and its ratio to the uniform null.

1. ``ratio_q = sum of A_qj over image keys j``: probability mass, per layer, head and query ``q``.
2. ``null_q = |I visible to q| / v_q``: the ratio if attention were uniform over the ``v_q`` keys
   that ``q`` sees.
3. ``lift_q = ratio_q / null_q``, computed for each query and then averaged. It is 1 if the head has
   no preference for the image.
4. ``sink_free_ratio`` and ``sink_free_lift``: the same values without attention sinks, keys that
   receive a large share of attention from most queries. Sinks are excluded from the image keys and
   from the total.

Only queries that see the image are counted. In a causal model, text before the image cannot attend
to it, and including it would make the average depend on the position of the image. The direction is
always text to image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xmodal_interp import at
from xmodal_interp.analysis.selection import (
    Layers,
    first_position,
    image_keys,
    mass_and_null,
    not_padding,
    queries_of,
    refuse_cross_attention,
    refuse_text,
    rows_of,
    selected_calls,
)
from xmodal_interp.analysis.sinks import MIN_QUERIES, THRESHOLD, sink_keys
from xmodal_interp.analysis.tables import Part, Taken, long_table, over_samples
from xmodal_interp.arguments import checked
from xmodal_interp.at import Selector
from xmodal_interp.attention import AttentionCall, Positions
from xmodal_interp.errors import InputError, NotRecordedError
from xmodal_interp.sample import Sample, is_visual
from xmodal_interp.vocabulary import AttentionKind

DIRECTION = "text->image"
BY = ("layer", "head")
MEANS = ("ratio", "null", "lift", "sink_free_ratio", "sink_free_lift")


@checked
def cross_modal_ratio(  # noqa: PLR0913  every option has a default
    samples: Sample | Iterable[Sample],
    *,
    queries: Selector = at.text,
    layers: Layers = None,
    heads: Positions | None = None,
    image: int | None = None,
    kind: AttentionKind = "self",
    sink_threshold: float | None = THRESHOLD,
    by: Sequence[str] = BY,
    workers: int = 1,
) -> pd.DataFrame:
    """Return the share of text attention on the image, with its null under uniform attention.

    Args:
        samples: One sample or many.
        queries: A selector, see :mod:`xmodal_interp.at`: by default ``at.text``, text after the
            last image in prompt and answer.
        layers: Layers, all if not given.
        heads: Heads, all if not given.
        image: Index of the image; all images and videos together if not given.
        kind: ``"self"``, or ``"cross"`` for models in which text attends to the images by
            cross-attention. Every key of a cross-attention is an image key, so ``image`` must then
            name one of several images.
        sink_threshold: A key that receives more than this mean share of attention from the queries
            that see it is a sink (see ``attention_sinks``). The sink-free columns exclude sinks and
            the first position. Only kept query rows count: with ``Keep(queries="text")`` these are
            the text rows after the image, and the sinks can differ from those of a full capture.
            With None, no sinks are searched for and the sink-free columns and ``n_sinks`` are left
            out, which is faster. A sample with statistics instead of q and k requires None if a
            sink is neither the first position nor a group of ``AttentionCall.groups`` by itself.
        by: The axes that stay: ``("layer", "head")``, ``("layer",)``, ``("head",)`` or ``()``. The
            table is averaged over the other axes.
        workers: Number of processes that read the samples; results do not depend on it.

    Returns:
        One row per sample and ``by``: ``sample, tower, kind, direction, layer, head``, then
        ``ratio`` (probability mass, 0 to 1), ``null``, ``lift`` (mean over queries of
        ratio / null), ``sink_free_ratio``, ``sink_free_lift``, ``n_queries`` (queries that see the
        image), ``n_image_tokens``, ``n_sinks`` (number of excluded keys, averaged like the other
        columns). NaN where no query sees the image. The sink-free columns and ``n_sinks`` are also
        NaN if only some query rows were kept and these are fewer than 8, too few to detect a sink.

    Raises:
        InputError: The sample has no image or no text after it, a query is an image token, or
            ``kind`` does not fit the model.
        NotRecordedError: The sample holds statistics that do not determine the result.
    """
    refuse_text(by, "by", "['layer']")
    if not set(by) <= set(BY):
        raise InputError(f"by must contain only {' and '.join(map(repr, BY))}; got {tuple(by)!r}.")
    parameters: dict[str, Any] = {
        "queries": queries,
        "layers": layers,
        "heads": heads,
        "image": image,
        "kind": kind,
        "sink_threshold": sink_threshold,
    }

    def table_rows(sample: Sample) -> Iterator[Part]:
        found = _means(list(_of_layers(sample, **parameters)), [name for name in BY if name in by])
        if not found["n_queries"].any():
            raise InputError(
                f"None of the queries {queries!r} of sample {sample.name!r} sees the "
                "image in any chosen layer. Choose queries after the image."
            )
        yield {"tower": "language", "kind": kind, "direction": DIRECTION} | found

    return over_samples(samples, table_rows, "cross_modal_ratio", parameters | {"by": by}, workers)


@checked
def token_ratio(
    samples: Sample | Iterable[Sample],
    *,
    queries: Selector = at.text,
    layers: Layers = None,
    heads: Positions | None = None,
    image: int | None = None,
    kind: AttentionKind = "self",
    sink_threshold: float | None = THRESHOLD,
    workers: int = 1,
) -> pd.DataFrame:
    """Return ``cross_modal_ratio`` of each query token; the arguments are the same.

    Returns:
        One row per sample, layer, head and query: ``sample, tower, kind, direction, layer, head,
        query, token``, then ``ratio``, ``null``, ``lift``, ``sink_free_ratio``, ``sink_free_lift``,
        ``n_image_tokens``, ``n_sinks``. The ratio of a query that does not see the image is NaN,
        not 0.
    """
    parameters: dict[str, Any] = {
        "queries": queries,
        "layers": layers,
        "heads": heads,
        "image": image,
        "kind": kind,
        "sink_threshold": sink_threshold,
    }

    def table_rows(sample: Sample) -> Iterator[Part]:
        tokens = pd.Series(sample.tokens["token"].to_numpy(dtype=object)).array
        for each in _of_layers(sample, **parameters):
            axes = {"layer": [each.layer], "head": each.heads, "query": each.queries}
            index: Part = {"tower": "language", "kind": kind, "direction": DIRECTION}
            index |= long_table(axes, {})
            index["token"] = Taken(tokens, index["query"])
            yield index | long_table(axes, each.values)

    return over_samples(samples, table_rows, "token_ratio", parameters, workers)


@dataclass(frozen=True, eq=False)
class _OfLayer:
    """The ratios of one layer.

    Attributes:
        layer: The layer.
        heads: The chosen heads.
        queries: The query positions.
        values: ``[head, query]``, or broadcastable to it, by name of the column.
    """

    layer: int
    heads: list[int]
    queries: list[int]
    values: dict[str, np.ndarray]


def _of_layers(
    sample: Sample,
    queries: Selector,
    layers: Layers,
    heads: Positions | None,
    image: int | None,
    kind: AttentionKind,
    sink_threshold: float | None,
) -> Iterator[_OfLayer]:
    """Yield the ratios of each layer of a sample."""
    _check_kind(sample, image, kind)
    keys = image_keys(sample, image, kind)
    query = queries_of(sample, queries)
    _refuse_image_queries(sample, query)
    always = first_position(sample) if kind == "self" else None
    counted = not_padding(sample)
    for call, chosen in selected_calls(sample, layers, heads, kind=kind):
        try:
            values = _values(call, chosen, query, keys, counted, sink_threshold, always)
        except NotRecordedError as error:
            if sink_threshold is None or call.group_mass is None:
                raise
            raise NotRecordedError(
                f"{error} Or pass sink_threshold=None to leave out the columns without sinks."
            ) from None
        arrays = {name: value.numpy() for name, value in values.items()}
        yield _OfLayer(call.layer, chosen, query.tolist(), arrays)


def _values(
    call: AttentionCall,
    heads: Sequence[int],
    queries: Int[Tensor, " query"],
    keys: Bool[Tensor, " key"],
    counted: Bool[Tensor, " position"],
    sink_threshold: float | None,
    always: int | None,
) -> dict[str, Tensor]:
    """Return the columns of one layer, ``[head, query]`` or broadcastable to it."""
    dropped = torch.zeros(1, len(heads), call.n_keys, dtype=torch.bool, device="cpu")
    rows, counts = rows_of(call, counted), {"n_image_tokens": keys.sum()}
    if sink_threshold is not None:
        sinks = sink_keys(call, heads, rows, threshold=sink_threshold, always=always)
        dropped = torch.cat([dropped, sinks[None]])
        counts["n_sinks"] = sinks.sum(1, keepdim=True)
    ratios, nulls, lifts = _shares(call, heads, queries, keys, dropped)
    values = {"ratio": ratios[0], "null": nulls[0], "lift": lifts[0]}
    if sink_threshold is not None:
        values |= {"sink_free_ratio": ratios[1], "sink_free_lift": lifts[1]}
    values |= counts
    if call.rows is not None and len(rows) < MIN_QUERIES:
        for name in {"sink_free_ratio", "sink_free_lift", "n_sinks"} & values.keys():
            values[name] = torch.full_like(values[name], torch.nan, dtype=torch.float32)
    return values


def _means(layers: Sequence[_OfLayer], by: Sequence[str]) -> Part:
    """Return the means over all axes except ``by``, over the queries that see the image.

    Groups are in the order of their first layer and head.
    """
    pairs = [{"layer": each.layer, "head": head} for each in layers for head in each.heads]
    groups = [tuple(pair[name] for name in by) for pair in pairs]
    first = list(dict.fromkeys(groups))
    member = np.array([[group == each for each in first] for group in groups], dtype=float)
    names = [name for name in MEANS if name in layers[0].values]
    values = np.stack([np.concatenate([each.values[name] for each in layers]) for name in names])
    seeing = ~np.isnan(values[0])
    known = seeing & ~np.isnan(values)
    means = _group_means(values.sum(2, where=known, dtype=float), known.sum(2), member)
    part: Part = {
        **{name: np.array([group[i] for group in first]) for i, name in enumerate(by)},
        **dict(zip(names, means, strict=True)),
        "n_queries": (seeing.T @ member > 0).sum(0),
        "n_image_tokens": int(layers[0].values["n_image_tokens"]),
    }
    if "n_sinks" in layers[0].values:
        n_sinks = np.concatenate([each.values["n_sinks"][:, 0] for each in layers])
        found = ~np.isnan(n_sinks)
        part["n_sinks"] = _group_means(np.where(found, n_sinks, 0), found, member)
    return part


def _group_means(
    sums: Float[np.ndarray, "*value row"] | Int[np.ndarray, "*value row"],
    counts: Int[np.ndarray, "*value row"] | Bool[np.ndarray, "*value row"],
    member: Float[np.ndarray, "row group"],
) -> Float[np.ndarray, "*value group"]:
    """Return the mean of each group of rows; NaN if it has no values.

    Args:
        sums: The sum of the values of each row.
        counts: Their number.
        member: 1 if a row belongs to a group, else 0.
    """
    n = counts @ member
    means: np.ndarray = np.divide(sums @ member, n, out=np.full(n.shape, np.nan), where=n > 0)
    return means


def _shares(
    call: AttentionCall,
    heads: Sequence[int],
    queries: Int[Tensor, " query"],
    keys: Bool[Tensor, " key"],
    dropped: Bool[Tensor, "variant head key"],
) -> tuple[
    Float[Tensor, "variant head query"],
    Float[Tensor, "variant head query"],
    Float[Tensor, "variant head query"],
]:
    """Return the mass on ``keys``, its null and its lift, without the dropped keys of each head.

    Where keys are dropped, the other probabilities are renormalised. Otherwise they are not: the
    share of learned sinks stays outside the ratio. NaN where no key is visible.
    """
    number: dict[bytes, int] = {}  # of each pattern of dropped keys, few; faster than torch.unique
    rows = dropped.flatten(0, 1).numpy()
    of_head = [number.setdefault(row.tobytes(), len(number)) for row in rows]
    patterns = dropped.flatten(0, 1)[[of_head.index(each) for each in range(len(number))]]
    groups = torch.cat([keys & ~patterns, ~patterns]).float()
    index = torch.tensor(of_head).view(dropped.shape[:2])
    head = torch.arange(len(heads))
    mass, even = (
        values.unflatten(-1, (2, len(patterns)))[head, :, :, index].unbind(-1)
        for values in mass_and_null(call, groups, heads, queries)
    )
    null = even[0] / even[1]
    ratio = torch.where(dropped.any(2)[..., None], mass[0] / mass[1], mass[0])
    ratio = ratio.where(null > 0, torch.nan)
    return ratio, null, ratio / null


def _check_kind(sample: Sample, image: int | None, kind: AttentionKind) -> None:
    if kind == "self":
        refuse_cross_attention(sample, "The ratio of self-attention")
    elif image is None or len(sample.grids) < 2:
        raise InputError(
            f"With kind='cross' and image={image!r} the ratio of sample {sample.name!r} "
            f"({len(sample.grids)} images) is always 1, because every key of a cross-attention is "
            "an image key. Pass image= for a sample with several images."
        )


def _refuse_image_queries(sample: Sample, queries: Int[Tensor, " query"]) -> None:
    positions = queries.numpy()
    images = positions[is_visual(sample.kinds[positions])].tolist()
    if images:
        raise InputError(
            f"Positions {images[:6]} of sample {sample.name!r} are image tokens, but queries must "
            f"be text (the direction is {DIRECTION}). Use block_statistics for image queries."
        )
