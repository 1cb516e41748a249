"""Describe a sample for the page, as JSON: words, pictures, keys, rows, provenance.

Numbers that depend on queries are not in it; they are in the blocks of :mod:`rows`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from xmodal_interp.escaping import printable
from xmodal_interp.sample import Sample, is_visual
from xmodal_interp.viewer.codes import ERROR
from xmodal_interp.viewer.rows import MEAN, ROLLOUT, ShownRows, predicting
from xmodal_interp.vocabulary import NEXT_COLUMNS, VISUAL_KINDS

LONGEST_SIDE = 1280
"""Pictures with a longer side are embedded at this size, px; coordinates are not changed."""

_PNG_BYTES = 200_000  # larger pictures are embedded as JPEG


def header_of(shown: ShownRows, title: str, source: str) -> dict[str, Any]:
    """Return the description of a sample, of values that JSON has.

    Args:
        shown: The rows of the sample.
        title: Title of the sample on the page.
        source: Python expression that returns the sample.
    """
    sample = shown.sample
    pictures, of_key = _pictures(shown)
    return {
        "name": printable(sample.name, lines=False),
        "title": printable(title, lines=False),
        "source": source,
        "question": printable(sample.question),
        "answer": printable(sample.answer),
        "model": _model_name(sample),
        "tower": shown.tower,
        "kind": shown.kind,
        "image": shown.image,
        "layers": list(shown.layers),
        "heads": list(shown.n_heads),
        "rows": [list(row) for row in shown.rows],
        "rollout": shown.has_rollout,
        "queries": shown.queries.tolist(),
        "groups": list(shown.groups),
        "visual": [i for i, name in enumerate(shown.groups) if _is_visual_group(name)],
        "words": _words(shown),
        "pictures": pictures,
        "keys": _keys(shown, of_key),
        "sinks": {
            str(layer): {str(key): heads for key, heads in keys.items()}
            for layer, keys in shown.sinks.items()
        },
        "provenance": _provenance(sample),
        "mean": MEAN,
        "rollout_rows": [list(row) for row in ROLLOUT],
        "relative_error": ERROR,
    }


def _is_visual_group(name: str) -> bool:
    return name.split()[0] in (*VISUAL_KINDS, "patches")


def _model_name(sample: Sample) -> str:
    """Return the model's name; of a folder only the last part, as the page may be sent away."""
    name = str(sample.provenance.get("model", ""))
    return printable(name.rstrip("/").rpartition("/")[2] if name.startswith("/") else name)


def _provenance(sample: Sample) -> dict[str, str]:
    names = ("model_class", "model_type", "revision", "dtype", "backend", "processor", "created")
    about = {name: sample.provenance.get(name) for name in names}
    about["model"] = _model_name(sample)
    versions = sample.provenance.get("versions")
    if isinstance(versions, dict):
        about["versions"] = ", ".join(f"{name} {number}" for name, number in versions.items())
    return {name: printable(str(value)) for name, value in about.items() if value}


def _words(shown: ShownRows) -> list[dict[str, Any]]:
    """Return words and images in reading order.

    A word has its text, the characters before it, its position, the query rows of the word and of
    the position that predicts it, and its probability if it is of the answer. A run of image tokens
    is one entry with their number.
    """
    if shown.tower == "vision":
        return _tower_words(shown)
    sample = shown.sample
    row_of = {int(position): i for i, position in enumerate(shown.queries)}
    visual = is_visual(sample.kinds)
    words = [i for i in range(len(sample)) if not visual[i] and sample.kinds[i] != "padding"]
    before = predicting(sample, words, shown.queries)
    table = sample.tokens
    starts, ends = (table[name].fillna(-1).to_numpy(dtype=int) for name in ("start", "end"))
    next_token, probability = _next(table)
    out: list[dict[str, Any]] = []
    read = 0
    for i, (token, kind, role) in enumerate(
        zip(table["token"].tolist(), sample.kinds.tolist(), table["role"].tolist(), strict=True)
    ):
        if kind == "padding":
            continue
        gap = sample.text[read : starts[i]] if 0 <= read <= starts[i] else ""
        read = max(read, int(ends[i]))
        if visual[i]:
            number = int(table[kind].iloc[i])
            if out and out[-1].get("visual") == [kind, number]:
                out[-1]["tokens"] += 1
            else:
                out.append({"visual": [kind, number], "tokens": 1, "gap": _gap(gap)})
            continue
        text = sample.text[starts[i] : ends[i]] if kind == "text" and ends[i] > starts[i] else token
        out.append(
            {
                "text": printable(str(text)),
                "gap": _gap(gap),
                "kind": kind,
                "role": None if pd.isna(role) else str(role),
                "position": i,
                "row": row_of.get(i),
                "before": row_of.get(before.get(i, -1)),
                "probability": probability[i - 1] if i else None,
            }
        )
    tail = sample.text[read:].strip()
    end = next_token[-1]
    last = row_of.get(len(sample) - 1)
    if sample.answer and (tail or end) and last is not None:  # the last token was not fed back
        out.append(
            {
                "text": printable(tail or str(end)),
                "gap": " ",
                "kind": "text" if tail else "special",
                "role": "generated",
                "position": len(sample),
                "row": None,
                "before": last,
                "probability": probability[-1],
            }
        )
    return out


def _next(table: pd.DataFrame) -> tuple[list[str | None], list[float | None]]:
    """Return what each position predicts and its probability, None where it is not known."""
    token, probability = NEXT_COLUMNS
    if token not in table:  # no answer, or a store of an earlier release
        return [None] * len(table), [None] * len(table)
    texts = table[token].astype(object).where(table[token].notna(), None).tolist()
    numbers = table[probability].tolist()
    return texts, [None if np.isnan(p) else round(p, 6) for p in numbers]


def _gap(gap: str) -> str:
    """Return the characters between two tokens without control characters."""
    return printable(gap)[-40:]


def _tower_words(shown: ShownRows) -> list[dict[str, Any]]:
    """Return the vision-tower positions without a patch, then the image as one entry."""
    row_of = {int(position): i for i, position in enumerate(shown.queries)}
    names = shown.keys["token"].tolist()
    kinds = shown.keys["kind"].tolist()
    video = shown.image - len(shown.sample.grids)
    visual = ["image", shown.image] if video < 0 else ["video", video]
    special = [
        {
            "text": printable(str(name)),
            "gap": " ",
            "kind": "special",
            "role": None,
            "position": i,
            "row": row_of.get(i),
            "before": None,
        }
        for i, (name, kind) in enumerate(zip(names, kinds, strict=True))
        if kind == "special"
    ]
    n_patches = sum(kind in VISUAL_KINDS for kind in kinds)
    return [*special, {"visual": visual, "tokens": n_patches, "gap": " "}]


def _keys(shown: ShownRows, of_key: np.ndarray) -> dict[str, Any]:
    """Return the columns of the keys; -1 for a key without picture, row or column."""
    keys = shown.keys
    boxes = keys[["x0", "y0", "x1", "y1"]].to_numpy(dtype=float)
    placed = np.isfinite(boxes).all(1)
    picture = np.where(placed, of_key, -1)
    group = np.full(len(keys), -1)
    for i, mask in enumerate(shown.groups.values()):
        group[: shown.n_keys][mask] = i
    tiles = keys["tile"].fillna(-1).to_numpy(dtype=int)
    return {
        "token": [printable(str(token), lines=False)[:40] for token in keys["token"]],
        "group": group.tolist(),
        "picture": picture.tolist(),
        "row": keys["row"].fillna(-1).to_numpy(dtype=int).tolist(),
        "col": keys["col"].fillna(-1).to_numpy(dtype=int).tolist(),
        "tile": tiles.tolist() if (tiles >= 0).any() else None,
        "lift": np.round(shown.lift_factors, 6).tolist() if shown.spread else None,
        "box": [
            np.round(box, 3).tolist() if ok else None for box, ok in zip(boxes, placed, strict=True)
        ],
    }


def _pictures(shown: ShownRows) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Return the pictures (images, thumbnails, frames) and the picture of each key, -1 for none."""
    sample, keys = shown.sample, shown.keys
    of_key = np.full(len(keys), -1)
    pictures: list[dict[str, Any]] = []
    placed = keys["x0"].notna().to_numpy(dtype=bool)
    small = keys["view"].eq("thumbnail").fillna(value=False).to_numpy(dtype=bool)
    number = keys["image"].fillna(-1).to_numpy(dtype=int)
    several = len(sample.grids) > 1
    for i, grid in enumerate(sample.grids):
        if shown.tower == "vision" and i != shown.image:
            continue
        image = sample.images[i] if len(sample.images) == len(sample.grids) else None
        src = None
        for view, mask in (("image", ~small), ("thumbnail", small)):
            mine = (number == i) & mask & placed
            if not mine.any() and (view == "thumbnail" or small[number == i].any()):
                continue
            src = src or picture_data(image)
            name = f"image {i}" if several else "image"
            tiled = view == "image" and (number[small] == i).any()
            title = (
                f"{name}, thumbnail" if view == "thumbnail" else f"{name}, tiles" if tiled else name
            )
            of_key[mine] = len(pictures)
            reason = "" if grid.rows or view != "image" or mine.any() else (grid.reason or "")
            pictures.append(
                _picture(title, ["image", i, view], grid.width, grid.height, src, reason)
            )
    of_video = keys["video"].fillna(-1).to_numpy(dtype=int)
    frame = keys["frame"].fillna(-1).to_numpy(dtype=int)
    for i, clip in enumerate(sample.video_grids):
        if shown.tower == "vision" and i != shown.image - len(sample.grids):
            continue
        frames = sample.videos[i].frames if len(sample.videos) == len(sample.video_grids) else ()
        which = sorted(set(frame[of_video == i].tolist()) - {-1})
        n = max(which, default=0) + 1
        for f in which:
            mine = (of_video == i) & (frame == f)
            of_key[mine] = len(pictures)
            chosen = frames[min(f * len(frames) // n, len(frames) - 1)] if len(frames) else None
            title = f"frame {f}" if len(sample.video_grids) == 1 else f"video {i}, frame {f}"
            if f < len(clip.times) and np.isfinite(clip.times[f]):
                title += f", {clip.times[f]:.3g} s"
            src = picture_data(chosen if isinstance(chosen, Image.Image) else None)
            pictures.append(_picture(title, ["video", i, f], clip.width, clip.height, src, ""))
    return pictures, of_key


def _picture(
    title: str, of: Sequence[Any], width: int, height: int, src: str | None, reason: str
) -> dict[str, Any]:
    return {
        "title": title,
        "of": list(of),
        "width": width,
        "height": height,
        "src": src,
        "reason": reason,
    }


def picture_data(image: Image.Image | None) -> str | None:
    """Return a picture as a data URI: PNG if it is small, otherwise JPEG; None for None."""
    if image is None:
        return None
    image.load()
    shown = image.convert("RGB")
    shown.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    for kind, options in (("png", {}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        shown.save(buffer, kind, **options)
        if kind == "jpeg" or buffer.tell() <= _PNG_BYTES:
            break
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
