"""Faithfulness of saliency maps: deletion and insertion curves over image tokens.

Petsiuk et al. 2018 (RISE, arXiv:1806.07421), applied to the image tokens of the language model
instead of pixels. A token is removed by replacing it with the mean image token of the sample. Image
features that some models add inside the language model are replaced by their mean as well.

* deletion: start from the whole image and remove the most salient tokens first. With a faithful map
  the score falls fast, so the area under the curve is small.
* insertion: start without image tokens and restore the most salient tokens first. With a faithful
  map the score rises fast, so the area is large.

The score is the teacher-forced probability of the known answer: the geometric mean over its tokens.
The area under a curve s_0..s_n is the normalised trapezoid sum
(s_0 / 2 + s_1 + ... + s_n / 2) / n. Compare it with a random order (``maps="random"``) and with the
centre prior (``maps="centre"``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from xmodal_interp.analysis.answers import answer_scores, check_causal, origin, replays
from xmodal_interp.analysis.tables import stamped
from xmodal_interp.arguments import as_list, checked, one_of, whole_number
from xmodal_interp.errors import InputError
from xmodal_interp.hooks.block_cache import remember_blocks, replay
from xmodal_interp.hooks.embeddings import check_images_gone, check_in_sequence, mean_embeddings
from xmodal_interp.models import VLM, ImageGrid
from xmodal_interp.models.known_answers import Batch, Items, batches_of, listed

Maps = Iterable[np.ndarray] | Literal["random", "centre"]


@checked
def deletion_curve(
    vlm: VLM,
    items: Items,
    maps: Maps,
    *,
    steps: int = 11,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Score the answer while image tokens are removed, most salient first (Petsiuk et al. 2018).

    Args:
        vlm: Model and processor; image tokens must be in the text sequence.
        items: Dicts with one ``image``, ``prompt``, ``answer``, and optionally ``kind``.
        maps: For each item, one value per image token, in sequence order or as a ``[row, col]``
            grid; or ``"random"``, or ``"centre"`` (tokens nearer to the centre are more salient).
        steps: Number of points of the curve, including no token removed and all removed.
        batch_size: The largest number of items per forward.
        seed: Seed of the random order.
        progress: Whether to show a progress bar.

    Returns:
        One row per item and step: ``item, question_kind, step, share_changed`` (0 to 1),
        ``probability`` (0 to 1), ``accuracy`` (0 or 1). :func:`curve_areas` returns the area under
        each curve.

    Raises:
        InputError: A map does not fit the image tokens, or an item does not have one image.
        UnsupportedModelError: Text attends to the image by cross-attention, or the image still
            influences the output when all its tokens are replaced, or positions depend on later
            ones.
    """
    return _curve(vlm, items, maps, "deletion_curve", steps, batch_size, seed, progress)


@checked
def insertion_curve(
    vlm: VLM,
    items: Items,
    maps: Maps,
    *,
    steps: int = 11,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Score the answer while image tokens are restored, most salient first (Petsiuk et al. 2018).

    Arguments and result are those of :func:`deletion_curve`; ``share_changed`` is the share of
    restored tokens.
    """
    return _curve(vlm, items, maps, "insertion_curve", steps, batch_size, seed, progress)


@checked
def curve_areas(curve: pd.DataFrame, value: str = "probability") -> pd.DataFrame:
    """Return the area under each item's curve: ``item, question_kind, area`` (0 to 1).

    To compare two maps, pass their areas to ``bootstrap_interval(..., paired=...)``.

    Raises:
        InputError: The table lacks a column of a curve.
    """
    missing = [name for name in ("item", "step", value) if name not in curve.columns]
    if missing:
        raise InputError(
            f"curve lacks the columns {', '.join(missing)}. Pass the result of deletion_curve or "
            "insertion_curve."
        )
    rows = [
        {
            "item": item,
            "question_kind": of_item["question_kind"].iloc[0],
            "area": area(of_item.sort_values("step")[value].to_numpy(dtype=float)),
        }
        for item, of_item in curve.groupby("item", sort=True)
    ]
    table = pd.DataFrame(rows).astype({"question_kind": "string"})
    table.attrs = dict(curve.attrs)
    return table


def area(scores: Float[np.ndarray, " step"]) -> float:
    """Return the normalised trapezoid sum: 1 for a constant 1, 0.5 for a line from 1 to 0."""
    return float((scores.sum() - (scores[0] + scores[-1]) / 2) / (len(scores) - 1))


def _curve(
    vlm: VLM,
    items: Items,
    maps: Maps,
    analysis: str,
    steps: int,
    batch_size: int,
    seed: int,
    progress: bool,  # noqa: FBT001
) -> pd.DataFrame:
    whole_number(steps, "steps", 2)
    check_in_sequence(vlm)
    items = listed(items)
    if isinstance(maps, str):
        one_of(maps, "maps", ("random", "centre"))
    maps = maps if isinstance(maps, str) else as_list(maps, "maps")
    if not isinstance(maps, str) and len(maps) != len(items):
        raise InputError(f"Pass one map per item; got {len(maps)} for {len(items)} items.")
    shares = np.linspace(0, 1, steps)
    scores = np.empty((len(items), steps, 2))
    batches = batches_of(vlm, items, batch_size=batch_size)
    check_causal(vlm, batches[0])
    with tqdm(total=len(batches) * steps, unit="forward", disable=not progress, leave=False) as bar:
        for number, batch in enumerate(batches):
            image, order = _orders(batch, maps, seed)
            if number == 0:
                check_images_gone(vlm, batch.inputs, image)
            with remember_blocks(vlm.model) as memory:
                base = answer_scores(vlm, batch)
            vision = memory.before("language", "self", 0)  # the edit is after the vision tower
            if number == 0:
                reusable = replays(vlm, batch, vision, base)
            vision = vision if reusable else {}
            for step, share in enumerate(shares):
                first = _first(image, order, share)
                replaced = first if analysis == "deletion_curve" else image & ~first
                with replay(vision), mean_embeddings(vlm, replaced, image):
                    accuracy, log_prob, _ = answer_scores(vlm, batch)
                scores[list(batch.index), step] = np.stack([np.exp(log_prob), accuracy], 1)
                bar.update()
    table = pd.DataFrame(
        {
            "item": np.repeat(np.arange(len(items)), steps),
            "question_kind": pd.array([item.get("kind") for item in items], dtype="string").repeat(
                steps
            ),
            "step": np.tile(np.arange(steps), len(items)),
            "share_changed": np.tile(shares, len(items)),
            "probability": scores[..., 0].reshape(-1),
            "accuracy": scores[..., 1].reshape(-1),
        }
    )
    return stamped(
        table,
        analysis=analysis,
        parameters={
            "maps": maps if isinstance(maps, str) else "given",
            "steps": steps,
            "seed": seed,
        },
        provenance=[origin(vlm)],
        n_samples=len(items),
    )


def _orders(
    batch: Batch, maps: Maps, seed: int
) -> tuple[Bool[Tensor, "item position"], list[np.ndarray]]:
    """Return a mask of the image tokens, and their order for each item, most salient first."""
    image = torch.zeros(len(batch.index), batch.n_ids, dtype=torch.bool)
    orders = []
    for row, index, prompt in zip(image, batch.index, batch.prompts, strict=True):
        if len(prompt.grids) != 1:
            raise InputError(
                f"Item {index} has {len(prompt.grids)} images. Pass items with one image."
            )
        positions = np.flatnonzero(prompt.tokens["kind"].eq("image").to_numpy(dtype=bool))
        row[torch.from_numpy(positions)] = True
        values = _values(prompt.grids[0], maps, index, seed)
        orders.append(positions[np.argsort(-values, kind="stable")])
    return image, orders


def _values(grid: ImageGrid, maps: Maps, index: int, seed: int) -> Float[np.ndarray, " token"]:
    if isinstance(maps, str):
        if maps == "random":
            return np.random.default_rng((seed, index)).random(grid.n_tokens)
        _all_placed(grid, index, "'centre'")
        middle = np.array([(grid.rows - 1) / 2, (grid.cols - 1) / 2])
        offsets = (grid.places - middle) / np.array([grid.rows, grid.cols])
        distances: np.ndarray = np.hypot(offsets[:, 0], offsets[:, 1])
        return -distances
    of_items: Any = maps
    given = np.asarray(of_items[index], dtype=float)
    on_grid = given.shape == (grid.rows, grid.cols)
    if on_grid:
        _all_placed(grid, index, "a map of rows and columns")
    values = given[grid.places[:, 0], grid.places[:, 1]] if on_grid else given
    if values.shape != (grid.n_tokens,) or np.isnan(values).any():
        raise InputError(
            f"The map of item {index} has shape {given.shape} with {int(np.isnan(given).sum())} "
            f"NaN, but the image has {grid.n_tokens} tokens ({grid.rows} x {grid.cols}). Pass one "
            "number per image token, as a sequence or as a grid."
        )
    return values


def _all_placed(grid: ImageGrid, index: int, what: str) -> None:
    stray = int((grid.places[:, 0] < 0).sum())
    if stray:
        raise InputError(
            f"Tokens cannot be ranked by {what}: {stray} of {grid.n_tokens} image tokens of item "
            f"{index} have no row and column. Pass a map with one value per token."
        )


def _first(
    image: Bool[Tensor, "item position"], orders: Sequence[np.ndarray], share: float
) -> Bool[Tensor, "item position"]:
    """Return a mask of the most salient share of each item's tokens."""
    first = torch.zeros_like(image)
    for row, order in zip(first, orders, strict=True):
        row[torch.from_numpy(order[: round(share * len(order))])] = True
    return first
