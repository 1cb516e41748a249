"""The keys of a page: what is at each of them, and where in a picture.

Image tokens that are learned queries have no place. The attention to them is distributed over the
patches of the vision tower with the connector's attention, and these patches follow the keys.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from xmodal_interp.analysis.connector_rollout import are_queries, query_patches
from xmodal_interp.analysis.selection import first_position, position_table
from xmodal_interp.errors import GeometryError, NotRecordedError, PositionError
from xmodal_interp.sample import Sample
from xmodal_interp.vocabulary import VISUAL_KINDS, AttentionKind, Tower


@dataclass(frozen=True, eq=False)
class Spread:
    """The attention to an image whose tokens are learned queries, distributed over its patches.

    Attributes:
        keys: The keys of the image's tokens.
        shares: ``[key, patch]``, the share of each patch in each token.
    """

    keys: Int[np.ndarray, " key"]
    shares: Float[np.ndarray, "key patch"]

    def on_patches(self, values: Float[np.ndarray, "*row key"]) -> Float[np.ndarray, "*row patch"]:
        """Return values of patches; NaN where all keys of a patch are NaN."""
        mine = values[..., self.keys]
        known = ~np.isnan(mine)
        amounts = np.where(known, mine, 0.0) @ self.shares
        patches: np.ndarray = np.where(known.astype(float) @ self.shares > 0, amounts, np.nan)
        return patches


_KEY_COLUMNS = ("token", "kind", "image", "video", "frame", "row", "col", "view", "tile")
_BOX = ("x0", "y0", "x1", "y1")


def key_table(
    sample: Sample, tower: Tower, kind: AttentionKind, image: int, n_keys: int
) -> pd.DataFrame:
    """Return one row per key, with its place in an image and its box in pixels.

    Raises:
        PositionError: The number of keys is not that of the tokens.
    """
    table: pd.DataFrame
    if tower == "vision":
        table = position_table(sample, tower, image, n_keys).rename(columns={"token_kind": "kind"})
        boxes = pd.DataFrame(_patch_boxes(sample, image), columns=list(_BOX))
        table = table.assign(view="image", tile=None).join(boxes)
    else:
        crossed = kind == "cross" and sample.cross_keys is not None
        table = sample.cross_keys if crossed and sample.cross_keys is not None else sample.tokens
    if len(table) != n_keys:
        raise PositionError(
            f"Sample {sample.name!r} describes {len(table)} keys, but its {tower} attention has "
            f"{n_keys}."
        )
    return table.reindex(columns=[*_KEY_COLUMNS, *_BOX]).reset_index(drop=True)


def learned_queries(
    sample: Sample, keys: pd.DataFrame
) -> tuple[tuple[Spread, ...], list[pd.DataFrame]]:
    """Return the images whose tokens are learned queries, and a table of the patches of each.

    Images whose connector was not recorded are left out: their tokens have no place.
    """
    found: list[Spread] = []
    tables: list[pd.DataFrame] = []
    for i, grid in enumerate(sample.grids):
        if not are_queries(grid):
            continue
        try:
            shares = query_patches(sample, i).double().numpy()
        except (GeometryError, NotRecordedError):
            continue
        boxes = _patch_boxes(sample, i)
        placed = np.isfinite(boxes).all(1)
        mine = keys["image"].eq(i).fillna(value=False).to_numpy(dtype=bool)
        found.append(Spread(np.flatnonzero(mine), np.nan_to_num(shares[:, placed])))
        places = pd.DataFrame(grid.patch_places[placed], columns=["row", "col"])
        table = places.assign(token="patch", kind="image", image=i, view="image")
        table[list(_BOX)] = boxes[placed]
        tables.append(table.reindex(columns=list(keys)).astype(keys.dtypes.to_dict()))
    return tuple(found), tables


def _patch_boxes(sample: Sample, image: int) -> Float[np.ndarray, "patch 4"]:
    """Return the pixel box of each vision-tower position; NaN for positions without a patch."""
    video = image - len(sample.grids)
    grid: Any = sample.grids[image] if video < 0 else sample.video_grids[video]
    given = getattr(grid, "patch_boxes", None)
    if given is not None:
        return np.asarray(given, dtype=float)
    rows, cols = grid.patch_places[:, -2:].T.astype(float)
    boxes = grid.boxes[~np.isnan(grid.boxes).any(1)]
    if not len(boxes):
        return np.full((len(rows), 4), np.nan)
    (left, top), (right, bottom) = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    width, height = (right - left) / grid.patch_cols, (bottom - top) / grid.patch_rows
    x, y = left + cols * width, top + rows * height
    out = np.column_stack([x, y, x + width, y + height])
    out[rows < 0] = np.nan
    return out


def key_groups(sample: Sample, tower: Tower, keys: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return masks of disjoint groups of keys, without padding and without empty groups.

    In the language tower: ``image 0``, ``video 0``, ..., ``first`` (the first position, often a
    sink), ``special``, ``prompt`` and ``answer``. In the vision tower: ``patches`` and the names of
    the other positions.
    """
    kinds = keys["kind"].to_numpy(dtype=object)
    groups: dict[str, np.ndarray] = {}
    if tower == "vision":
        names = [re.sub(r" \d+$", "", str(name)) for name in keys["token"]]
        for name in dict.fromkeys(names):
            mask = np.array([each == name for each in names]) & (kinds != "padding")
            groups["patches" if name == "patch" else name] = mask
        return {name: mask for name, mask in groups.items() if mask.any()}
    for kind in VISUAL_KINDS:
        number = keys[kind].fillna(-1).to_numpy(dtype=int)
        for i in sorted(set(number[kinds == kind].tolist()) - {-1}):
            groups[f"{kind} {i}"] = (kinds == kind) & (number == i)
    if len(keys) == len(sample):
        first = np.arange(len(keys)) == first_position(sample)
        first &= ~np.isin(kinds, VISUAL_KINDS)
        answer = np.arange(len(keys)) >= sample.n_prompt
        groups |= {
            "first": first,
            "special": (kinds == "special") & ~first,
            "prompt": (kinds == "text") & ~answer & ~first,
            "answer": (kinds == "text") & answer & ~first,
        }
    return {name: mask for name, mask in groups.items() if mask.any()}
