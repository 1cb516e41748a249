"""Does a head look at the thing it is asked about? The pointing game, and the share in the box.

For a query row of a head, restricted to the tokens of an image (``m_t``, token boxes ``b_t``), and
a labelled box ``B``, both in pixels of the original image:

* hit: the peak ``argmax_t m_t`` lies in the box (Zhang et al. 2018, arXiv:1608.00507): the centre
  of its token box does (``"centre"``), or its token box overlaps it (``"overlap"``). Tokens are
  coarse, so ``"centre"`` misses small things that a head does look at. Where tokens are learned
  queries, the patches that are in them stand for tokens. Where several tokens are the peak, its hit
  is the share of these that lie in the box: a flat map has the hit of a random token.
  A map that is 0 everywhere points nowhere: its hit is 0, its energy too.
* energy: ``sum_t m_t |b_t & B| / |b_t|`` over ``sum_t m_t`` (the energy-based pointing game of Wang
  et al. 2020, arXiv:1910.01279), tokens on the rim of the box counted in part.

Boxes ``b_t`` are the parts of the tokens that are on the picture: where the processor pads, tokens
hang over its edge, and the box of the whole picture has an energy of 1 all the same. Tokens on
padding alone are left out of the energy; what they get is ``padding_mass``. They can be the peak,
which is then a miss. Uniform attention has ``energy_chance``: the box's share of the picture, if
all tokens are of one size there.

A random token is not the null to beat: things stand out from the background, and a head that looks
at *some* thing scores far above it. Hence ``any_object``, how often the peak is in any thing's box,
and ``other_object``, how often it is in one particular other thing's: a head that does not know
which thing is meant has ``hit`` equal to ``other_object``.

The best of many heads looks better than it is: :func:`best_head` chooses it on one half of the
samples and scores it on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from xmodal_interp.analysis.frames import (
    keyed,
    long_table,
    over_samples,
    samples_of,
    stacked,
)
from xmodal_interp.analysis.resampling import Series, known_mean_intervals, shown
from xmodal_interp.analysis.selecting import Layers, calls_of, queries_of
from xmodal_interp.arguments import checked, one_of
from xmodal_interp.errors import InputError
from xmodal_interp.evaluation.boxes import (
    Box,
    Criterion,
    overlap_shares,
    placed_cells,
    tokens_inside,
)
from xmodal_interp.evaluation.choosing import HEAD_KEYS
from xmodal_interp.ordered import in_order
from xmodal_interp.sample import Sample, Selector
from xmodal_interp.vocabulary import LAST, AttentionKind

Queries = Selector | np.ndarray | Callable[[Sample], Selector | np.ndarray]
_MEANS = [
    *("hit", "energy", "any_object", "other_object"),
    *("image_mass", "padding_mass", "hit_chance", "energy_chance"),
]
TIED = 1e-6
"""Probabilities this close, relative to the peak, are equal: float32 tells no more apart."""


@checked
def pointing_game(  # noqa: PLR0913 - one experiment, every option with a default
    samples: Sample | Iterable[Sample],
    boxes: str | Iterable[Box] | pd.DataFrame = "box",
    *,
    other_boxes: str | Iterable[Iterable[Box]] = "other_boxes",
    queries: Queries = LAST,
    criterion: Criterion = "overlap",
    layers: Layers = None,
    image: int = 0,
    kind: AttentionKind = "self",
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """How often each head of the language tower looks at the labelled thing.

    Args:
        samples: One sample or many; one labelled thing each.
        boxes: The box of the thing that each sample asks about: one per sample, or the name of the
            label that holds it (``sample.labels["box"]``). A list, array, Series or table of four
            columns is read by position, whatever its index.
        other_boxes: Boxes of the other things in the picture, given in the same ways. Without them,
            ``any_object`` and ``other_object`` are NaN.
        queries: Whose attention: ``"last"`` (of the prompt), ``"text"``, positions, a phrase, or a
            function that gives one of these for a sample. Several rows are averaged.
        criterion: ``"overlap"`` or ``"centre"``.
        layers: Layers, all if not given.
        image: Which image the boxes are on.
        kind: ``"self"``, or ``"cross"`` where text reaches the image by cross-attention.
        n_bootstrap: Resamples of the intervals.
        seed: Seed of the resamples.

    Returns:
        One row per layer and head: ``tower, kind, layer, head``, then means over the samples:
        ``hit`` (0 to 1), ``energy`` (0 to 1), ``any_object``, ``other_object`` (0 to 1),
        ``image_mass`` (probability on the image), ``padding_mass`` (the part of it on tokens of
        padding alone), ``hit_chance`` (of a random token), ``energy_chance`` (of uniform
        attention); ``hit_low``, ``hit_high``, ``energy_low``, ``energy_high`` (95% intervals over
        samples; those that show the same pictures are one cluster), ``n``, and ``n_clusters``
        (different pictures among these). All are means over the samples that have a number, ``n``
        of them for ``hit``; NaN in a layer in which no query of any sample can see the image, and
        intervals also with fewer than 2 clusters. ``.attrs["n_pictures"]`` is how many different
        pictures there were.

    Raises:
        InputError: A sample without a box, a box outside the image's tokens, no image tokens,
            queries that cannot see the image in any layer, or samples of which other layers were
            kept.
    """
    hits = pointing_hits(
        samples,
        boxes,
        other_boxes=other_boxes,
        queries=queries,
        criterion=criterion,
        layers=layers,
        image=image,
        kind=kind,
    )
    _refuse_other_layers(hits)
    grouped = hits.groupby(HEAD_KEYS, sort=True)
    table = grouped[_MEANS].mean().reset_index()
    table["n"] = grouped["hit"].count().to_numpy()
    pictures = next(of_head["picture"].to_numpy() for _, of_head in grouped)
    for place, value in enumerate(("hit", "energy")):
        values = np.stack([of_head[value].to_numpy(float) for _, of_head in grouped])
        series: Series = "rate" if value == "hit" else "mean"
        found = known_mean_intervals(
            values, pictures, n_draws=n_bootstrap, seed=seed, series=series
        )
        table.insert(len(HEAD_KEYS) + len(_MEANS) + 2 * place, f"{value}_low", found.low)
        table.insert(len(HEAD_KEYS) + len(_MEANS) + 2 * place + 1, f"{value}_high", found.high)
        table["n_clusters"] = found.n_clusters
    table.attrs = {
        **hits.attrs,
        "analysis": "pointing_game",
        "parameters": {**hits.attrs["parameters"], "n_bootstrap": n_bootstrap, "seed": seed},
        "n_pictures": len(np.unique(pictures)),
    }
    return table


@checked
def pointing_hits(
    samples: Sample | Iterable[Sample],
    boxes: str | Iterable[Box] | pd.DataFrame = "box",
    *,
    other_boxes: str | Iterable[Iterable[Box]] = "other_boxes",
    queries: Queries = LAST,
    criterion: Criterion = "overlap",
    layers: Layers = None,
    image: int = 0,
    kind: AttentionKind = "self",
) -> pd.DataFrame:
    """:func:`pointing_game` before averaging: one row per sample, layer and head.

    Returns:
        ``sample, tower, kind, layer, head``, then ``hit`` (0 or 1; between where several tokens are
        the peak), ``energy`` (0 to 1), ``any_object`` (as ``hit``), ``other_object`` (0 to 1),
        ``image_mass``, ``padding_mass``, ``hit_chance``, ``energy_chance``, ``picture`` (samples
        that show the same images and videos have the same number). NaN in a layer in which no query
        can see the image.
    """
    one_of(criterion, "criterion", get_args(Criterion))
    many = samples_of(samples)
    asked_about = _of_samples(boxes, "boxes", len(many))
    of_others = _of_samples(other_boxes, "other_boxes", len(many))
    numbers = iter(range(len(many)))
    pictures: dict[Hashable, int] = {}

    def table_of(sample: Sample) -> pd.DataFrame:
        number = next(numbers)
        box = sample.labels.get(boxes) if isinstance(boxes, str) else asked_about[number]
        if box is None:
            raise InputError(
                f"Every sample needs the box of the thing it asks about. Sample {sample.name!r} "
                f"has no label {boxes!r}; its labels are {', '.join(sample.labels) or 'none'}. "
                "Pass boxes, or leave the sample out."
            )
        others = (
            sample.labels.get(other_boxes, ())
            if isinstance(other_boxes, str)
            else of_others[number]
        )
        others = [] if others is None else in_order(others, "other_boxes of a sample")
        cells = placed_cells(sample, image, kind)
        tokens = _with_boxes(cells.boxes, sample, image)
        shares = overlap_shares(tokens, box)
        inside = tokens_inside(tokens, box, criterion)
        if not inside.any():
            (x0, y0, _, _), (_, _, x1, y1) = tokens.amin(0).tolist(), tokens.amax(0).tolist()
            given = in_order(box, "A box")
            raise InputError(
                f"A box must hold at least one image token, by the criterion {criterion!r}. Sample "
                f"{sample.name!r}: the box is {given}, the tokens cover {[x0, y0, x1, y1]}."
            )
        elsewhere = [tokens_inside(tokens, other, criterion) for other in others]
        asked = queries(sample) if callable(queries) else queries
        rows = queries_of(sample, asked.tolist() if isinstance(asked, np.ndarray) else asked)
        tables = []
        blind = True
        for call in calls_of(sample, layers, kind=kind):
            probs = call.probs(queries=rows, keys=cells.keys)[0].mean(1).cpu()  # [head, token]
            values = _scores(
                cells.amounts(probs.double()), inside, shares, elsewhere, cells.on_picture
            )
            if call.visible(rows)[..., cells.keys].any():
                blind = False
            else:
                values = dict.fromkeys(values, np.nan)
            table = long_table({"head": range(len(probs))}, values)
            tables.append(keyed(table, tower="language", kind=kind, layer=call.layer))
        if blind:
            raise InputError(
                f"Queries must see the image. In sample {sample.name!r}, positions "
                f"{rows.tolist()} see no token of image {image} in any layer asked for; choose "
                "text behind the image."
            )
        whole = stacked(tables)
        whole["picture"] = pictures.setdefault(_shown(sample, number), len(pictures))
        return whole

    parameters = {
        "boxes": boxes if isinstance(boxes, str) else "given",
        "other_boxes": other_boxes if isinstance(other_boxes, str) else "given",
        "queries": "a function" if callable(queries) else queries,
        "criterion": criterion,
        "layers": layers,
        "image": image,
        "kind": kind,
    }
    return over_samples(many, table_of, analysis="pointing_hits", parameters=parameters)


def _of_samples(given: Any, name: str, n: int) -> Any:
    """The name of a label, or one entry per sample."""
    if isinstance(given, str):
        return given
    entries = in_order(given, name)
    if len(entries) != n:
        raise InputError(
            f"{name} must have one entry per sample; got {len(entries)} for {n} samples."
        )
    return entries


def _with_boxes(boxes: Tensor, sample: Sample, image: int) -> Tensor:
    if not len(boxes):
        raise InputError(
            f"A box is compared with the boxes of image tokens. Those of image {image} of sample "
            f"{sample.name!r} have none."
        )
    return boxes


def _shown(sample: Sample, number: int) -> Hashable:
    """What tells whether two samples show the same; if that is not known, each its own."""
    frames = [frame for video in sample.videos for frame in video.frames]
    n_visuals = len(sample.grids) + len(sample.video_grids)
    if not n_visuals or len(sample.images) + len(sample.videos) != n_visuals:
        return number
    files = sample.provenance.get("images") or []
    files = files if len(files) == len(sample.images) else [None] * len(sample.images)
    images = [file or image for file, image in zip(files, sample.images, strict=True)]
    return shown([*images, *frames])


def _refuse_other_layers(hits: pd.DataFrame) -> None:
    """Refuse samples of which other layers or heads were kept than of the first."""
    known: tuple[str, list[tuple[int, int]]] | None = None
    for name, of_sample in hits.groupby("sample", sort=False):
        there = list(zip(of_sample["layer"].tolist(), of_sample["head"].tolist(), strict=True))
        known = known or (str(name), there)
        if there != known[1]:
            layers = [sorted({layer for layer, _ in each}) for each in (known[1], there)]
            raise InputError(
                "Samples are averaged over the same layers and heads. The layers of sample "
                f"{known[0]!r} are {layers[0]}, those of {str(name)!r} are {layers[1]}; choose "
                "layers= that all have."
            )


def _scores(
    probs: Float[Tensor, "head token"],
    inside: Bool[Tensor, " token"],
    shares: Float[Tensor, " token"],
    elsewhere: Sequence[Bool[Tensor, " token"]],
    on_picture: Bool[Tensor, " token"],
) -> dict[str, Tensor | float]:
    mass, on_padding = probs.sum(1), probs[:, ~on_picture].sum(1)
    peaks = (probs >= probs.amax(1, keepdim=True) * (1 - TIED)) & (mass > 0)[:, None]

    def pointed_at(tokens: Bool[Tensor, " token"]) -> Float[Tensor, " head"]:
        """The share of each head's peaks that are among these tokens."""
        return (peaks & tokens).sum(1).double() / peaks.sum(1).clamp(min=1)

    unknown = torch.full((len(probs),), torch.nan, dtype=torch.float64)
    any_thing = torch.stack([inside, *elsewhere]).any(0)
    others = [pointed_at(tokens) for tokens in elsewhere]
    tiny = torch.finfo(probs.dtype).tiny
    return {
        "hit": pointed_at(inside),
        "energy": (probs @ shares) / (mass - on_padding).clamp(min=tiny),
        "any_object": pointed_at(any_thing) if others else unknown,
        "other_object": torch.stack(others).mean(0) if others else unknown,
        "image_mass": mass,
        "padding_mass": on_padding,
        "hit_chance": float(inside.double().mean()),
        "energy_chance": float(shares[on_picture].mean()),
    }
