"""One sample: what stands at each position, and every attention call the model made on it.

A sample in memory and a sample in a store are the same thing to an analysis: the calls come from a
mapping, which for a store reads a layer when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex, cast, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from xmodal_interp.arguments import MOST, one_of, string, whole_number
from xmodal_interp.attention import AttentionCall, Positions, number, resolve
from xmodal_interp.errors import (
    GeometryError,
    InputError,
    LayerError,
    NotRecordedError,
    PhraseError,
    quoted,
)
from xmodal_interp.models import ImageGrid, Video, VideoGrid
from xmodal_interp.phrases import has_phrase, has_word, span_of
from xmodal_interp.vocabulary import (
    KEYWORDS,
    LAST,
    ROLES,
    TEXT,
    TOKEN_KINDS,
    TOWERS,
    VISUAL_KINDS,
    AttentionKind,
    Keyword,
    Tower,
)

CallKey = tuple[Tower, AttentionKind, int, int]
"""Tower, kind, layer, call: what a call is kept under."""

Selector = str | Positions | Sequence[str | int]
"""Positions, a keyword (``"last"``, ``"text"``), a phrase of the text, or a list of these.

``"last"`` is the last position of the prompt, ``"text"`` all text after the last image or video. A
string that is a keyword and also a word of the sample's text is an error; ``sample.last``,
``sample.find("last")`` and ``vocabulary.LAST`` say which one is meant.
"""


@dataclass(frozen=True, eq=False)
class Sample:
    """A prompt, its images and videos, the model's answer, and its attention.

    Attributes:
        name: Name of the sample, unique in a store.
        tokens: One row per position that the model has read, prompt and answer: ``TOKEN_COLUMNS``;
            where the model has a rotary embedding also ``rope_t, rope_h, rope_w``, the positions
            that it was told (time, row, column; all the same where it has one axis).
        text: The rendered prompt and the answer; ``start`` and ``end`` count its characters.
        question: What was asked.
        answer: What the model generated, without special tokens; empty if nothing was generated.
        n_prompt: How many positions the prompt has.
        grids: The grid of each image.
        images: The images; a stored sample reads them when they are first asked for.
        calls: Every call by tower, kind, layer and call. Language calls span prompt and answer: one
            row per token.
        cross_keys: For cross-attention families: one row per image key.
        labels: Whatever the caller wanted kept with the sample (the true answer, a box, a split).
        provenance: Model, revision, versions, backend, dtype, settings.
        video_grids: The grid of each video.
        videos: The videos; a stored sample reads their frames when they are first asked for.
    """

    name: str
    tokens: pd.DataFrame
    text: str
    question: str
    answer: str
    n_prompt: int
    grids: tuple[ImageGrid, ...]
    images: tuple[Image.Image, ...]
    calls: Mapping[CallKey, AttentionCall]
    cross_keys: pd.DataFrame | None = None
    labels: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    video_grids: tuple[VideoGrid, ...] = ()
    videos: tuple[Video, ...] = ()

    def __repr__(self) -> str:
        """A line that tells what is in it."""
        parts = sorted({key[:2] for key in self.calls})
        towers = ", ".join(f"{len(self.layers(t, k))} {t} {k}" for t, k in parts)
        counts = self.tokens["kind"].value_counts().items()
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts)
        asked = f"{self.question!r} -> {self.answer!r}"
        return f"Sample({self.name!r}: {asked}; {kinds} tokens; layers: {towers})"

    def __len__(self) -> int:
        """Positions, prompt and answer."""
        return len(self.tokens)

    @property
    def last(self) -> int:
        """The last position of the prompt, which predicts the first word of the answer."""
        return self.n_prompt - 1

    def where(
        self,
        kind: str | None = None,
        *,
        role: str | None = None,
        image: int | None = None,
        video: int | None = None,
        frame: int | None = None,
    ) -> Int[np.ndarray, " position"]:
        """Positions of a token kind, role, image, video or frame, ascending; may be empty."""
        if kind is not None and not (isinstance(kind, str) and kind in TOKEN_KINDS):
            raise InputError(
                f"A token kind is one of {', '.join(TOKEN_KINDS)}; got {quoted(kind)}."
            )
        if role is not None:
            one_of(role, "role", ROLES)
        for name, which in (("image", image), ("video", video), ("frame", frame)):
            if which is not None:
                whole_number(which, name, 0)
        chosen = np.ones(len(self.tokens), dtype=bool)
        asked = {"kind": kind, "role": role, "image": image, "video": video, "frame": frame}
        for column, value in asked.items():
            if value is not None:
                chosen &= self.tokens[column].eq(value).fillna(value=False).to_numpy(dtype=bool)
        return np.flatnonzero(chosen)

    @property
    def visual(self) -> Int[np.ndarray, " position"]:
        """Positions of image and video tokens, ascending; may be empty."""
        return np.flatnonzero(self.tokens["kind"].isin(VISUAL_KINDS).to_numpy(dtype=bool))

    def text_after_image(self) -> Int[np.ndarray, " position"]:
        """Text positions of prompt and answer after the last image or video, which can see all.

        Special tokens and padding are left out. For cross-attention families, all text.
        """
        text = self.where("text")
        return text[text > int(self.visual.max(initial=-1))]

    def find(self, phrase: str, occurrence: int | None = None) -> Int[np.ndarray, " position"]:
        """Positions whose characters a phrase covers: whole words, upper and lower case alike.

        In scripts without spaces (Chinese, Thai, ...) any characters; Korean particles may follow.

        Args:
            phrase: As it stands in the question or in the answer.
            occurrence: Which one, 0-based, if there are several; negative counts from the last.

        Raises:
            InputError: The phrase is no text, or the occurrence no whole number.
            PhraseError: The phrase does not occur, or occurs several times and ``occurrence`` was
                not given.
        """
        start, end = span_of(phrase, self.text, occurrence, hidden=self._in_placeholder)
        touched = (self.tokens["start"] < end) & (self.tokens["end"] > start)
        if not touched.any():
            raise PhraseError(
                f"{phrase!r} is in the text, but no token is known to stand for it: this sample's "
                "tokens could not be matched with its prompt. Give positions instead."
            )
        return np.flatnonzero(touched.to_numpy(dtype=bool, na_value=False))

    def _in_placeholder(self, start: int, end: int) -> bool:
        """Whether these characters lie inside of a placeholder or another special token."""
        inside = (self.tokens["start"] <= start) & (self.tokens["end"] >= end)
        return bool((inside & self.tokens["kind"].isin([*VISUAL_KINDS, "special"])).any())

    def positions(self, selector: Selector) -> Int[Tensor, " position"]:
        """A keyword, a phrase, an index, a slice, a mask or a list as positions.

        ``"last"`` is the last position of the prompt, ``"text"`` the text after all images and
        videos. Positions of a list with strings are ascending, each once.

        Raises:
            InputError: ``"text"`` where no text comes after the image.
            PhraseError: An unknown or ambiguous phrase, or a keyword that is also a word of this
                sample's text.
            PositionError: An index outside the sequence, or a mask of another length.
        """
        if isinstance(selector, str):
            return torch.from_numpy(self._named(selector))
        if has_phrase(selector):
            return torch.tensor(sorted({int(i) for each in selector for i in self.positions(each)}))
        return resolve(cast("Positions", selector), len(self), "position")

    def _named(self, name: str) -> Int[np.ndarray, " position"]:
        """Positions of a keyword or a phrase."""
        if name not in KEYWORDS:
            return self.find(name)
        if not isinstance(name, Keyword) and has_word(name, self.text, self._in_placeholder):
            meant = {
                LAST: "sample.last (the last position of the prompt)",
                TEXT: "sample.text_after_image() (all text after the image)",
            }
            raise PhraseError(
                f"{name!r} is a keyword, and also a word in the text of sample {self.name!r}: it "
                f"could mean either. Pass {meant[Keyword(name)]} or sample.find({name!r}) (the "
                f"word); for many samples, xmodal_interp.vocabulary.{name.upper()} is the keyword."
            )
        if name == LAST:
            return np.array([self.last])
        after = self.text_after_image()
        if len(after) == 0:
            raise InputError(
                "queries='text' means the text that can see the image: text behind the last image "
                f"token. Sample {self.name!r} has none; choose queries by position, or put the "
                "question behind the image."
            )
        return after

    def layers(self, tower: Tower = "language", kind: AttentionKind = "self") -> list[int]:
        """The layers that are held, ascending."""
        return sorted({key[2] for key in self.calls if key[0] == tower and key[1] == kind})

    def call(
        self,
        layer: SupportsIndex,
        *,
        tower: Tower = "language",
        kind: AttentionKind = "self",
        call: SupportsIndex = 0,
    ) -> AttentionCall:
        """One attention call. In the vision tower, ``call`` is the image; videos come behind.

        Args:
            layer: Layer index; negative ones count from the last layer of the model.
            tower: Part of the model.
            kind: ``"self"``, ``"cross"`` or ``"channel"``.
            call: Which call of the layer.

        Raises:
            LayerError: There is no such layer.
            NotRecordedError: The layer exists, but was not kept.
        """
        one_of(tower, "tower", TOWERS)
        one_of(kind, "kind", get_args(AttentionKind))
        held = self.layers(tower, kind)
        exists = self.provenance.get("layers", {}).get(f"{tower}.{kind}", [])
        known = exists or held
        asked = number(layer, "layer")
        index = known[asked] if -len(known) <= asked < 0 else asked
        key: CallKey = (tower, kind, index, number(call, "call"))
        if key in self.calls:
            return self.calls[key]
        if index in exists:
            raise NotRecordedError(
                f"Only what was kept can be asked for. {tower} {kind}-attention kept layers "
                f"{held or 'none'}, not {index}. Capture again with this layer."
            )
        n_calls = len({k[3] for k in self.calls if k[:3] == key[:3]})
        has = f"layers {known}" if known else "none"
        has += f", with calls 0 to {n_calls - 1}" if n_calls else ""
        got = f"layer {layer}, call {call}"
        raise LayerError(f"A layer must exist. {tower} {kind}-attention has {has}; got {got}.")

    def probs(
        self,
        layer: SupportsIndex = -1,
        heads: Positions | None = None,
        queries: Selector | None = None,
        keys: Selector | None = None,
        *,
        tower: Tower = "language",
        kind: AttentionKind = "self",
        call: SupportsIndex = 0,
    ) -> Float[Tensor, "head query key"]:
        """Exact attention probabilities, float32; rows that see nothing are NaN.

        Args:
            layer: Layer index; negative ones count from the last.
            heads: Heads, all if not given.
            queries: Positions, a phrase or a list of phrases, all if not given.
            keys: The same. The keys of cross-attention are given by position only.
            tower: Part of the model; positions of other towers than the language tower are its own.
            kind: ``"self"``, ``"cross"`` or ``"channel"``.
            call: Which call of the layer; in the vision tower, the image.
        """
        one_of(tower, "tower", TOWERS)
        one_of(kind, "kind", get_args(AttentionKind))
        of_text = tower == "language"
        query: Any = self.positions(queries) if of_text and has_phrase(queries) else queries
        self_keys = of_text and kind == "self"
        key: Any = self.positions(keys) if self_keys and has_phrase(keys) else keys
        if has_phrase(query) or has_phrase(key):
            raise InputError(
                "A phrase names text positions; give vision-tower and cross-attention positions as "
                "numbers."
            )
        return self.call(layer, tower=tower, kind=kind, call=call).probs(heads, query, key)[0]

    def grid(
        self,
        values: Any,
        image: int = 0,
        *,
        view: str = "image",
        video: int | None = None,
        frame: int | None = None,
    ) -> Float[np.ndarray, "*frame row col"]:
        """One value per token of an image or a video as a grid, NaN where there is no token.

        Args:
            values: ``[token]`` in sequence order, class tokens, line breaks and the tokens of a
                thumbnail included.
            image: Which image, where no video is given.
            view: ``"image"``, or the ``"thumbnail"`` that some models read beside tiles.
            video: Which video.
            frame: Which of the video's frames of tokens; all if not given.

        Returns:
            ``[row, col]``; of a video, all frames, ``[frame, row, col]``.

        Raises:
            GeometryError: The number of values is not that of the tokens, they have no known
                places, or there is no such image, view, video or frame.
        """
        string(view, "view")
        bare = values.detach().float().cpu() if isinstance(values, Tensor) else values
        try:
            flat = np.asarray(bare, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"values are numbers, one per token; got {quoted(values)}.") from error
        if video is not None:
            _check_number(video, len(self.video_grids), "video")
            frames = self.video_grids[video].arranged(flat, view, number=video)
            _check_number(frame or 0, len(frames), "frame")
            return frames if frame is None else frames[frame]
        _check_number(image, len(self.grids), "image")
        return self.grids[image].arranged(flat, view, number=image)

    def groups(self) -> dict[str, Bool[np.ndarray, " position"]]:
        """Key groups of the language tower.

        ``image 0``, ..., ``video 0``, ..., ``text``, ``special``, ``padding``; each key in one.
        """
        kinds = self.tokens["kind"]
        groups = {
            f"{kind} {i}": (kinds.eq(kind) & self.tokens[kind].eq(i)).to_numpy(bool, na_value=False)
            for kind, grids in (("image", self.grids), ("video", self.video_grids))
            for i in range(len(grids))
            if kinds.eq(kind).any()
        }
        others = {kind: kinds.eq(kind).to_numpy(bool) for kind in ("text", "special", "padding")}
        return groups | {kind: members for kind, members in others.items() if members.any()}


def _check_number(number: int, n: int, what: str) -> None:
    whole_number(number, what, -MOST)
    if not 0 <= number < n:
        raise GeometryError(f"The sample has {n} {what}s; there is no {what} {number}.")
