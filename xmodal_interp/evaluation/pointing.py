"""The pointing game: how much of each head's attention on the image is in a labelled box.

For a query row of a head, restricted to the tokens of an image (``m_t``, token boxes ``b_t``), and
a labelled box ``B`` or the union of several, both in pixels of the original image:

* hit: 1 if the peak ``argmax_t m_t`` is in the box (Zhang et al. 2018, arXiv:1608.00507). With the
  criterion ``"centre"`` the centre of the token must be in the box, with ``"overlap"`` the token
  must overlap the box. Tokens are coarse, so ``"centre"`` can miss small objects. If several tokens
  are tied at the peak, the hit is the share of them that is in the box: a flat map has the hit rate
  of a random token. If ``m_t`` is 0 everywhere, hit and energy are 0. If tokens are learned
  queries, image patches are used instead of tokens.
* energy: ``sum_t m_t |b_t & B| / |b_t|`` divided by ``sum_t m_t`` (the energy-based pointing game
  of Wang et al. 2020, arXiv:1910.01279). Tokens at the edge of the box count in part.

The boxes ``b_t`` are clipped to the image. If the processor pads, tokens extend over the edge of
the image; with clipped boxes, a box of the whole image still has an energy of 1. Tokens on padding
alone are left out of the energy, and their mass is ``padding_mass``. If one of them is the peak,
the hit is 0. ``energy_chance`` is the energy of uniform attention: the box's share of the image if
all tokens on it have the same size.

A random token is too weak a baseline: objects are salient, and a head that attends to *any* object
scores far above it. ``any_object`` is therefore the rate of peaks in the box of any object, and
``other_object`` the mean rate of peaks in the box of one of the other objects. For a head that is
independent of which object the question is about, ``hit`` equals ``other_object``.

The score of the best of many heads is biased upwards. :func:`best_head` selects it on one half of
the samples and scores it on the other.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from xmodal_interp import at
from xmodal_interp.analysis.resampling import ValueKind, known_mean_intervals, pictures_of
from xmodal_interp.analysis.selection import Layers, queries_of, selected_calls
from xmodal_interp.analysis.tables import Part, call_table, over_samples, samples_of
from xmodal_interp.arguments import as_list, checked, one_of
from xmodal_interp.at import Selector
from xmodal_interp.boxes.number_formats import Boxes, pixel_boxes, shown
from xmodal_interp.errors import InputError
from xmodal_interp.evaluation.head_selection import HEAD_KEYS
from xmodal_interp.evaluation.token_boxes import (
    Criterion,
    overlap_shares,
    token_boxes,
    tokens_inside,
)
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import AttentionKind

_MEANS = [
    *("hit", "energy", "any_object", "other_object"),
    *("image_mass", "padding_mass", "hit_chance", "energy_chance"),
]
TIED = 1e-6
"""Largest relative difference from the peak that counts as a tie in float32."""


@checked
def pointing_game(  # noqa: PLR0913 - one experiment, every option with a default
    samples: Sample | Iterable[Sample],
    boxes: str | Iterable[Boxes] | pd.DataFrame = "box",
    *,
    other_boxes: str | Iterable[Iterable[Boxes]] = "other_boxes",
    queries: Selector = at.last,
    criterion: Criterion = "overlap",
    layers: Layers = None,
    image: int = 0,
    kind: AttentionKind = "self",
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Return how often each head of the language tower attends to the labelled object.

    Args:
        samples: One sample or many, each with one labelled object.
        boxes: The box of the object that each sample asks about, in px of the original image: one
            per sample, or the name of a label (``sample.labels["box"]``). A list, array, Series or
            table of four columns is matched to the samples by position; an index is ignored. An
            entry may be several boxes, if the phrase has several: a hit is then a peak in any of
            them, and the energy is that in their union. :func:`xmodal_interp.boxes.pixel_boxes`
            lists the forms of an entry, and :func:`xmodal_interp.boxes.read` reads other formats.
        other_boxes: Boxes of the other objects in the image, given in the same ways. Without them,
            ``any_object`` and ``other_object`` are NaN.
        queries: A selector, see :mod:`xmodal_interp.at`. Several query rows are averaged.
        criterion: ``"overlap"`` or ``"centre"``.
        layers: Layers, all if not given.
        image: Index of the image with the boxes.
        kind: ``"self"``, or ``"cross"`` if text attends to the image by cross-attention.
        n_bootstrap: Number of bootstrap resamples for the intervals.
        seed: Seed of the resamples.

    Returns:
        One row per layer and head: ``tower, kind, layer, head``, then means over the samples:
        ``hit`` (0 to 1), ``energy`` (0 to 1), ``any_object``, ``other_object`` (0 to 1),
        ``image_mass`` (probability on the image), ``padding_mass`` (its part on tokens of padding
        alone), ``hit_chance`` (hit rate of a random token), ``energy_chance`` (energy of uniform
        attention); ``hit_low``, ``hit_high``, ``energy_low``, ``energy_high`` (95% intervals over
        samples, in which samples of the same picture are one cluster), ``n`` (samples whose ``hit``
        is not NaN), and ``n_clusters`` (distinct pictures among these). Means leave out samples
        with NaN. Values of a layer in which no query of any sample can attend to the image are NaN,
        and so are intervals with fewer than 2 clusters. ``.attrs["n_pictures"]`` is the number of
        distinct pictures.

    Raises:
        InputError: A sample has no box or no image tokens, a box has no image token in it, no query
            can attend to the image in any layer, or the samples have different kept layers.
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
        value_kind: ValueKind = "rate" if value == "hit" else "mean"
        found = known_mean_intervals(
            values, pictures, n_draws=n_bootstrap, seed=seed, value_kind=value_kind
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
    boxes: str | Iterable[Boxes] | pd.DataFrame = "box",
    *,
    other_boxes: str | Iterable[Iterable[Boxes]] = "other_boxes",
    queries: Selector = at.last,
    criterion: Criterion = "overlap",
    layers: Layers = None,
    image: int = 0,
    kind: AttentionKind = "self",
) -> pd.DataFrame:
    """Return the values of :func:`pointing_game` before averaging; the arguments are the same.

    Returns:
        One row per sample, layer and head: ``sample, tower, kind, layer, head``, then ``hit`` (0 or
        1; between 0 and 1 if several tokens are tied at the peak), ``energy`` (0 to 1),
        ``any_object`` (as ``hit``), ``other_object`` (0 to 1), ``image_mass``, ``padding_mass``,
        ``hit_chance``, ``energy_chance``, ``picture`` (samples with the same images and videos have
        the same number). NaN in a layer in which no query can attend to the image.
    """
    one_of(criterion, "criterion", get_args(Criterion))
    many = samples_of(samples)
    of_samples = zip(
        range(len(many)),
        _of_samples(boxes, "boxes", len(many)),
        _of_samples(other_boxes, "other_boxes", len(many)),
        strict=True,
    )
    pictures: dict[Hashable, int] = {}

    def table_rows(sample: Sample) -> Iterator[Part]:
        number, of_sample, others = next(of_samples)
        box, other = _boxes_of(sample, of_sample, others)
        picture = pictures.setdefault(pictures_of(number, sample), len(pictures))
        for part in _hits(sample, box, other, queries, criterion, layers, image, kind):
            yield part | {"picture": picture}

    parameters = {
        "boxes": boxes if isinstance(boxes, str) else "given",
        "other_boxes": other_boxes if isinstance(other_boxes, str) else "given",
        "queries": queries,
        "criterion": criterion,
        "layers": layers,
        "image": image,
        "kind": kind,
    }
    return over_samples(many, table_rows, "pointing_hits", parameters)


def _boxes_of(sample: Sample, box: Any, others: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the boxes of the object and those of each other object, given as boxes or labels."""
    found = sample.labels.get(box) if isinstance(box, str) else box
    if found is None:
        raise InputError(
            f"Sample {sample.name!r} has no label {box!r}; its labels are "
            f"{', '.join(sample.labels) or 'none'}. Pass boxes=, or leave the sample out."
        )
    others = sample.labels.get(others, ()) if isinstance(others, str) else others
    listed = [] if others is None else as_list(others, "other_boxes of a sample")
    return pixel_boxes(found), [pixel_boxes(other) for other in listed]


def _hits(
    sample: Sample,
    boxes: Float[np.ndarray, "box 4"],
    others: Sequence[Float[np.ndarray, "_ 4"]],
    queries: Selector,
    criterion: Criterion,
    layers: Layers,
    image: int,
    kind: AttentionKind,
) -> list[Part]:
    cells = token_boxes(sample, image, kind)
    if not len(cells.boxes):
        raise InputError(
            f"The tokens of image {image} of sample {sample.name!r} have no boxes to compare with."
        )
    shares = overlap_shares(cells.boxes, boxes)
    inside = tokens_inside(cells.boxes, boxes, criterion)
    if not inside.any():
        low, high = cells.boxes.amin(0).tolist(), cells.boxes.amax(0).tolist()
        what = f"box {shown(boxes[0])}" if len(boxes) == 1 else f"union of {len(boxes)} boxes"
        raise InputError(
            f"The {what} of sample {sample.name!r} contains no image token by the criterion "
            f"{criterion!r}. The image tokens cover {low[:2] + high[2:]}."
        )
    _check_in_image(sample, image, np.concatenate([boxes, *others]))
    elsewhere = [tokens_inside(cells.boxes, other, criterion) for other in others]
    rows = queries_of(sample, queries)
    parts, sees_image = [], False
    for call, heads in selected_calls(sample, layers, kind=kind):
        probs = call.probs(queries=rows, keys=cells.keys)[0].mean(1).cpu()  # [head, token]
        amounts = cells.amounts(probs.double())
        values = _scores(amounts, inside, shares, elsewhere, cells.on_picture)
        if call.visible(rows)[..., cells.keys].any():
            sees_image = True
        else:
            values = dict.fromkeys(values, np.nan)
        parts.append(call_table(call, {"head": heads}, values))
    if not sees_image:
        raise InputError(
            f"Query positions {rows.tolist()} of sample {sample.name!r} cannot attend to image "
            f"{image} in any chosen layer. Choose queries after the image."
        )
    return parts


def _check_in_image(sample: Sample, image: int, boxes: Float[np.ndarray, "box 4"]) -> None:
    """Raise InputError if a box exceeds the image by more than half a side: it has other units."""
    size = (sample.grids[image].width, sample.grids[image].height)
    half = np.divide(size, 2)
    beyond = (boxes[:, :2] < -half) | (boxes[:, 2:] > size + half)
    if beyond.any():
        raise InputError(
            f"The box {shown(boxes[beyond.any(1)][0])} of sample {sample.name!r} exceeds its image "
            f"of {size[0]} x {size[1]} px by more than half a side. Read numbers of other "
            "units with xi.boxes.read(numbers, format, size=(width, height))."
        )


def _of_samples(given: Any, name: str, n: int) -> list[Any]:
    """Return one entry per sample; a string is the same label for all samples."""
    entries = [given] * n if isinstance(given, str) else as_list(given, name)
    if len(entries) != n:
        raise InputError(
            f"{name} must have one entry per sample; got {len(entries)} for {n} samples."
        )
    return entries


def _refuse_other_layers(hits: pd.DataFrame) -> None:
    """Raise InputError if a sample has other layers or heads than the first sample."""
    known: tuple[str, list[tuple[int, int]]] | None = None
    for name, of_sample in hits.groupby("sample", sort=False):
        pairs = list(zip(of_sample["layer"].tolist(), of_sample["head"].tolist(), strict=True))
        known = known or (str(name), pairs)
        if pairs != known[1]:
            layers = [sorted({layer for layer, _ in each}) for each in (known[1], pairs)]
            raise InputError(
                f"Sample {known[0]!r} has the layers {layers[0]}, but {str(name)!r} has "
                f"{layers[1]}. Choose layers= that all samples have."
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
        """Return the share of each head's peaks that are among these tokens."""
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
