"""How much of a text token's attention goes to the image, and how much that is.

1. ``ratio_q = sum of A_qj over image keys j``: the raw mass, of each layer, head and query ``q``.
2. ``null_q = |I visible to q| / v_q``: what the ratio would be if ``q`` attended evenly to its
   ``v_q`` visible keys.
3. ``lift_q = ratio_q / null_q``, query by query, and only then averaged: 1 means no preference for
   the image.
4. The same without the sinks: keys that collect attention whatever the query are taken out of the
   image and out of the total.

Only queries that see the image count: text before the image cannot look at it in a causal model,
and averaging over it would measure where the image stands. The direction is always text to image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from xmodal_interp.analysis.frames import keyed, long_table, over_samples, stacked
from xmodal_interp.analysis.nulls import null_mass
from xmodal_interp.analysis.padding import first_position, rows_of
from xmodal_interp.analysis.selecting import (
    Layers,
    calls_of,
    heads_of,
    image_keys,
    queries_of,
    refuse_cross_attention,
    refuse_text,
)
from xmodal_interp.analysis.sinks import MIN_QUERIES, THRESHOLD, sink_keys
from xmodal_interp.arguments import checked
from xmodal_interp.attention import AttentionCall, Positions
from xmodal_interp.errors import InputError
from xmodal_interp.sample import Sample, Selector
from xmodal_interp.vocabulary import TEXT, VISUAL_KINDS, AttentionKind

DIRECTION = "text->image"
BY = ("layer", "head")


@dataclass(frozen=True)
class _Question:
    """What is asked of every sample; the fields are the arguments of the public functions."""

    queries: Selector
    layers: Layers
    heads: Positions | None
    image: int | None
    kind: AttentionKind
    sink_threshold: float


@checked
def cross_modal_ratio(
    samples: Sample | Iterable[Sample],
    *,
    queries: Selector = TEXT,
    layers: Layers = None,
    heads: Positions | None = None,
    image: int | None = None,
    kind: AttentionKind = "self",
    sink_threshold: float = THRESHOLD,
    by: Sequence[str] = BY,
) -> pd.DataFrame:
    """The share of attention that text gives to the image, beside that of uniform attention.

    Args:
        samples: One sample or many.
        queries: ``"text"`` (text behind the last image, prompt and answer), ``"last"`` (the last
            position of the prompt), or positions or a phrase.
        layers: Layers, all if not given.
        heads: Heads, all if not given.
        image: Which image; all images and videos together if not given.
        kind: ``"self"``; or ``"cross"`` for families where text reaches the images by
            cross-attention: there every key is an image key, so that the share of one of several
            images is asked for.
        sink_threshold: The sink-free columns leave out the first position and every key that
            receives more than this share of the attention of the queries that see it
            (``attention_sinks``). They are judged over the query rows that were kept: with
            ``Keep(queries="text")`` over the text behind the image only, so that the sinks may be
            others than of the whole sample.
        by: What a row is for: ``("layer", "head")``, ``("layer",)``, ``("head",)`` or ``()``; the
            rest is averaged over.

    Returns:
        One row per sample and ``by``: ``sample, tower, kind, direction, layer, head``, then
        ``ratio`` (probability mass, 0 to 1), ``null``, ``lift`` (ratio / null of each query, then
        averaged), ``sink_free_ratio``, ``sink_free_lift``, ``n_queries`` (those that see the
        image), ``n_image_tokens``, ``n_sinks`` (keys left out; an average where averaged). NaN
        where no query sees the image; the sink-free columns and ``n_sinks`` also where only some
        rows were kept and these are fewer than 8, too few to tell a sink.

    Raises:
        InputError: No image, no text behind it, queries that are image tokens, or a family that has
            to be asked otherwise.
    """
    refuse_text(by, "by", "['layer']")
    if not set(by) <= set(BY):
        raise InputError(f"by names what a row is for, out of {', '.join(BY)}; got {tuple(by)!r}.")

    question = _Question(queries, layers, heads, image, kind, sink_threshold)

    def table_of(sample: Sample) -> pd.DataFrame:
        table = _tokens(sample, question)
        keys = ["tower", "kind", "direction", *(name for name in BY if name in by)]
        grouped = table.groupby(keys, sort=False)
        values = ["ratio", "null", "lift", "sink_free_ratio", "sink_free_lift"]
        seeing = table[table["ratio"].notna()].groupby(keys, sort=False)
        counts = {
            "n_queries": seeing["query"].nunique(),
            "n_image_tokens": grouped["n_image_tokens"].first(),
            "n_sinks": grouped["n_sinks"].mean(),
        }
        means = seeing[values].mean().reindex(grouped.size().index)
        out = means.assign(**counts).fillna({"n_queries": 0}).astype({"n_queries": "int64"})
        if not out["n_queries"].any():
            raise InputError(
                f"A query must see the image to be counted. None of the queries {queries!r} of "
                f"sample {sample.name!r} does, in any layer asked for; choose text behind the "
                "image."
            )
        return out.reset_index()

    parameters = {**asdict(question), "by": by}
    return over_samples(samples, table_of, analysis="cross_modal_ratio", parameters=parameters)


@checked
def token_ratio(
    samples: Sample | Iterable[Sample],
    *,
    queries: Selector = TEXT,
    layers: Layers = None,
    heads: Positions | None = None,
    image: int | None = None,
    kind: AttentionKind = "self",
    sink_threshold: float = THRESHOLD,
) -> pd.DataFrame:
    """``cross_modal_ratio`` of every single query token; arguments as there.

    Returns:
        One row per sample, layer, head and query: ``sample, tower, kind, direction, layer, head,
        query, token``, then ``ratio``, ``null``, ``lift``, ``sink_free_ratio``, ``sink_free_lift``,
        ``n_image_tokens``, ``n_sinks``. A query that does not see the image has NaN for a ratio,
        not 0.
    """
    question = _Question(queries, layers, heads, image, kind, sink_threshold)
    return over_samples(
        samples,
        lambda sample: _tokens(sample, question),
        analysis="token_ratio",
        parameters=asdict(question),
    )


def _tokens(sample: Sample, question: _Question) -> pd.DataFrame:
    kind = question.kind
    _check_kind(sample, question.image, kind)
    keys = image_keys(sample, question.image, kind)
    query = queries_of(sample, question.queries)
    _refuse_image_queries(sample, query)
    tokens = sample.tokens["token"].to_numpy(dtype=object)[query.numpy()]
    always = first_position(sample) if kind == "self" else None
    tables = []
    for call in calls_of(sample, question.layers, kind=kind):
        chosen = heads_of(call, question.heads)
        rows = rows_of(sample, call)
        sinks = sink_keys(call, chosen, rows, threshold=question.sink_threshold, always=always)
        n_sinks = sinks.sum(1, keepdim=True)
        ratio, null, lift = _shares(call, chosen, query, keys, torch.zeros_like(sinks))
        free_ratio, _, free_lift = _shares(call, chosen, query, keys, sinks)
        if call.rows is not None and len(rows) < MIN_QUERIES:
            free_ratio, free_lift, n_sinks = (
                torch.full_like(values, torch.nan, dtype=torch.float32)
                for values in (free_ratio, free_lift, n_sinks)
            )
        values = {
            "ratio": ratio,
            "null": null,
            "lift": lift,
            "sink_free_ratio": free_ratio,
            "sink_free_lift": free_lift,
            "n_image_tokens": keys.sum(),
            "n_sinks": n_sinks,
        }
        axes = {"head": chosen, "query": query.tolist()}
        table = long_table(axes, {"token": tokens[None], **values})
        about = {"tower": "language", "kind": kind, "direction": DIRECTION, "layer": call.layer}
        tables.append(keyed(table, **about))
    return stacked(tables)


def _shares(
    call: AttentionCall,
    heads: Sequence[int],
    queries: Int[Tensor, " query"],
    keys: Bool[Tensor, " key"],
    dropped: Bool[Tensor, "head key"],
) -> tuple[Float[Tensor, "head query"], Float[Tensor, "head query"], Float[Tensor, "head query"]]:
    """Mass on ``keys``, its null and its lift, with each head's dropped keys taken out.

    The rest is renormalised. With nothing dropped, nothing is renormalised: learned sinks keep
    their share. NaN where no key is visible.
    """
    ratio, null = torch.empty(2, len(heads), len(queries), dtype=torch.float32)
    for pattern in dropped.unique(dim=0):  # heads mostly share their sinks
        same = (dropped == pattern).all(1).nonzero()[:, 0]
        groups = torch.stack([keys & ~pattern, ~pattern]).float()
        these = [heads[i] for i in same]
        mass = call.mass(groups, these, queries)[0].cpu()
        even = null_mass(call, groups, these, queries).cpu()
        null[same] = even[..., 0] / even[..., 1]
        ratio[same] = mass[..., 0] / mass[..., 1] if pattern.any() else mass[..., 0]
    ratio = ratio.where(null > 0, torch.nan)
    return ratio, null, ratio / null


def _check_kind(sample: Sample, image: int | None, kind: AttentionKind) -> None:
    if kind == "self":
        refuse_cross_attention(sample, "The ratio of self-attention")
    elif image is None or len(sample.grids) < 2:
        raise InputError(
            "Every key of a cross-attention is an image key, so that the ratio is 1 whatever the "
            f"model does. Sample {sample.name!r} has {len(sample.grids)} images, image={image!r}; "
            "ask for one of several images."
        )


def _refuse_image_queries(sample: Sample, queries: Int[Tensor, " query"]) -> None:
    kinds = sample.tokens["kind"].iloc[queries.tolist()]
    images = kinds.index[kinds.isin(VISUAL_KINDS)].tolist()
    if images:
        raise InputError(
            f"The ratio is {DIRECTION}: queries are text. Positions {images[:6]} of sample "
            f"{sample.name!r} are image tokens; for these ask block_statistics."
        )
