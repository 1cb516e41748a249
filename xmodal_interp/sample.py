"""A sample: one prompt with its images, the model's answer, and the attention of every layer.

::

    sample.tokens                           one row per position: token, kind, place in the image
    sample.find("red circle")               positions of a phrase
    sample.find("yes", predicts=True)       the positions that predict it, one before each token
    sample.positions(at.image(1))           positions of any selector, see xmodal_interp.at
    sample.call(layer=3)                    queries, keys and mask of layer 3: an AttentionCall
    sample.probs(layer=3, queries="last")   its probabilities, [head, query, key]
    sample.grid(values)                     one value per image token, as [row, col]

Samples in memory and in a store have the same attributes and methods. The ``calls`` of a stored
sample are a mapping that reads a layer from disk when it is accessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, SupportsIndex, get_args

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from xmodal_interp.arguments import MOST, one_of, string, whole_number
from xmodal_interp.at import Selector, by_name
from xmodal_interp.attention import AttentionCall, Positions, layer_index, number
from xmodal_interp.errors import (
    GeometryError,
    InputError,
    LayerError,
    NotRecordedError,
    PhraseError,
    PositionError,
    StoreError,
    quoted,
)
from xmodal_interp.html_summary import html_summary
from xmodal_interp.models import ImageGrid, Video, VideoGrid
from xmodal_interp.selected_positions import positions_of
from xmodal_interp.text_search import has_word, span_of
from xmodal_interp.vocabulary import (
    ROLES,
    TOKEN_KINDS,
    TOWERS,
    TURN,
    VISUAL_KINDS,
    AttentionKind,
    Tower,
)

CallKey = tuple[Tower, AttentionKind, int, int]
"""Tower, attention kind, layer, and number of the call within the layer."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A prompt, its images and videos, the model's answer, and its attention.

    Attributes:
        name: Name of the sample, unique in a store.
        tokens: One row per position of prompt and answer, with ``TOKEN_COLUMNS``; for a vision
            model, one row per position of its vision tower. The last generated token has no row if
            the model did not run on it. For models with a rotary
            embedding there are also ``rope_t``, ``rope_h`` and ``rope_w``: the time, row and column
            positions that the embedding received (equal if it has one axis).
        text: The rendered prompt and the answer; ``start`` and ``end`` count its characters.
        question: The question, without the chat template.
        answer: The generated text, without special tokens; empty if nothing was generated.
        n_prompt: Number of positions of the prompt.
        grids: The grid of each image.
        images: The images; a stored sample reads them on first access.
        calls: All attention calls, by tower, attention kind, layer and call. Language calls have
            one query row per token of prompt and answer.
        cross_keys: For models whose text cross-attends to images: one row per image key.
        labels: Further values that belong to the sample, such as the true answer or a split.
        provenance: Model, revision, versions, backend, dtype, settings.
        video_grids: The grid of each video.
        videos: The videos; a stored sample reads their frames on first access.
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
    cross_keys: pd.DataFrame | None = field(default_factory=lambda: None)
    labels: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    video_grids: tuple[VideoGrid, ...] = field(default_factory=tuple)
    videos: tuple[Video, ...] = field(default_factory=tuple)
    # by factories, because an attribute of the class would hide one that is made later

    @classmethod
    def with_later(cls, later: Mapping[str, Callable[[], Any]], **now: Any) -> Sample:
        """Return a sample of which some attributes are made when they are first read.

        A table takes longer to build than a small model takes to run, and many samples are written,
        counted or selected without reading their tables.

        Args:
            later: For each attribute that is made later, the function that returns it. It is called
                at most once. If it raises an error, the attribute can be read again.
            **now: All other attributes that have no default.
        """
        sample = object.__new__(cls)
        for each in fields(cls):
            if each.default_factory is not MISSING:
                vars(sample)[each.name] = each.default_factory()
        vars(sample).update({**now, "_later": dict(later)})
        for name in later:
            vars(sample).pop(name, None)
        return sample

    if not TYPE_CHECKING:  # for mypy, every attribute would exist

        def __getattr__(self, name: str) -> Any:
            """Make an attribute of :meth:`with_later`; called for attributes that do not exist."""
            later = vars(self).get("_later", {})
            if name not in later:
                raise AttributeError(
                    f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self
                )
            vars(self)[name] = later[name]()
            later.pop(name, None)
            return vars(self)[name]

    def changed(self, **changes: Any) -> Sample:
        """Return a copy with other values of some attributes.

        Unlike :func:`dataclasses.replace`, this makes no attribute of :meth:`with_later`.
        """
        copied = object.__new__(type(self))
        vars(copied).update({**vars(self), **changes})
        later = vars(self).get("_later", {})
        vars(copied)["_later"] = {name: make for name, make in later.items() if name not in changes}
        return copied

    def __repr__(self) -> str:
        """Return a one-line summary."""
        tokens, layers = self._counts
        asked = f"{self.question!r} -> {self.answer!r}"
        if self.tower == "vision":
            asked = ", ".join(f"{grid.width} x {grid.height} px" for grid in self.grids)
        return f"Sample({self.name!r}: {asked}; {tokens} tokens; layers: {layers})"

    @property
    def _counts(self) -> tuple[str, str]:
        """The numbers of tokens by kind, and of layers by tower and attention kind."""
        counts = self.tokens["kind"].value_counts().items()
        layers = (
            f"{len(self.layers(tower, kind))} {tower} {kind}"
            for tower, kind in sorted({key[:2] for key in self.calls})
        )
        return ", ".join(f"{count} {kind}" for kind, count in counts), ", ".join(layers)

    def _repr_html_(self) -> str:
        """Return a summary for notebooks: images, question, answer, tokens and layers."""
        tokens, layers = self._counts
        try:
            images = tuple(image.convert("RGB") for image in self.images)
        except (InputError, StoreError):  # a stored sample whose image files were moved
            images = ()
        return html_summary(
            f"Sample {self.name}",
            {
                "question": self.question,
                "answer": self.answer,
                "tokens": tokens,
                "videos": ", ".join(f"{len(video.frames)} frames" for video in self.videos),
                "layers": layers,
                "labels": ", ".join(f"{name}: {value}" for name, value in self.labels.items()),
                "model": str(self.provenance.get("model", "")),
            },
            images,
        )

    def __len__(self) -> int:
        """Return the number of positions of prompt and answer."""
        return len(self.tokens)

    @property
    def tower(self) -> Tower:
        """The tower whose positions ``tokens`` describes: ``"vision"`` without a language model."""
        return "vision" if self.provenance.get("tower") == "vision" else "language"

    @property
    def last(self) -> int:
        """The last position of the prompt, which predicts the first token of the answer."""
        return self.n_prompt - 1

    def where(
        self,
        kind: str | None = None,
        *,
        role: str | None = None,
        image: int | None = None,
        video: int | None = None,
        frame: int | None = None,
        turn: int | None = None,
    ) -> Int[np.ndarray, " position"]:
        """Return the positions that match all given values, ascending; may be empty.

        Args:
            kind: A token kind: ``"image"``, ``"video"``, ``"text"``, ``"special"`` or
                ``"padding"``.
            role: ``"system"``, ``"user"``, ``"assistant"`` or ``"tool"`` (a message of a chat),
                ``"generated"`` (the answer) or ``"template"``.
            image: Index of an image.
            video: Index of a video.
            frame: Index of a frame of a video.
            turn: Index of a message of a chat, system message included; the answer follows the
                last message.
        """
        if kind is not None:
            one_of(kind, "kind", TOKEN_KINDS)
        if role is not None:
            one_of(role, "role", ROLES)
        numbers = {"image": image, "video": video, "frame": frame, TURN: turn}
        for name, index in numbers.items():
            if index is not None:
                whole_number(index, name, 0)
        matches = np.ones(len(self.tokens), dtype=bool)
        wanted: dict[str, Any] = {"kind": kind, "role": role, **numbers}
        if turn is not None and TURN not in self.tokens:
            raise InputError(
                f"Sample {self.name!r} is not a chat, so its tokens have no turns. Leave out turn."
            )
        for column, value in wanted.items():
            if column == "kind" and value is not None:
                matches &= self.kinds == value
            elif value is not None:
                matches &= self.tokens[column].eq(value).fillna(value=False).to_numpy(dtype=bool)
        return np.flatnonzero(matches)

    @property
    def kinds(self) -> np.ndarray:
        """The token kind of each position, as an array of strings.

        Comparing these strings is many times faster than comparing the column of ``tokens``.
        """
        return self.tokens["kind"].to_numpy(dtype=object)

    @property
    def visual(self) -> Int[np.ndarray, " position"]:
        """The positions of image and video tokens, ascending; may be empty."""
        return np.flatnonzero(is_visual(self.kinds))

    def text_after_image(self) -> Int[np.ndarray, " position"]:
        """Return the positions of text tokens after the last image or video token.

        They include the answer, but not special or padding tokens. If the sequence has no image
        tokens, because text cross-attends to images, all text tokens are returned.
        """
        text = self.where("text")
        return text[text > int(self.visual.max(initial=-1))]

    def find(
        self, phrase: str, occurrence: int | None = None, *, predicts: bool = False
    ) -> Int[np.ndarray, " position"]:
        """Return the positions of the tokens of a phrase, or those that predict them.

        The phrase matches whole words, ignoring case. In scripts without spaces (Chinese, Thai,
        ...) it matches any characters; a Korean phrase may be followed by particles.

        A token is predicted by the position before it. The last generated token is predicted, but
        it has no position unless it was fed back to the model: after
        ``capture(..., max_new_tokens=1)``, the answer's attention is at
        ``sample.find("yes", predicts=True)``.

        Args:
            phrase: A phrase of the question or the answer.
            occurrence: Index of the match if there are several; negative ones count from the last.
            predicts: Return the positions whose output predicts the tokens, instead of the
                positions of the tokens.

        Raises:
            InputError: ``phrase`` is not a string, or ``occurrence`` is not an integer.
            PhraseError: The phrase does not occur, or occurs several times and ``occurrence`` is
                None; or the model did not run on its last token.
            PositionError: No position predicts a token of the phrase.
        """
        start, end = span_of(phrase, self.text, occurrence, hidden=self._in_placeholder)
        overlaps = (self.tokens["start"] < end) & (self.tokens["end"] > start)
        found = np.flatnonzero(overlaps.to_numpy(dtype=bool, na_value=False))
        if end > self._end_of_rows and not predicts:
            raise PhraseError(
                f"{phrase!r} has no attention row: its last token was generated last and was not "
                "fed back to the model. Pass xi.at.predicts("
                f"{phrase!r}), the rows that predict it, or capture more tokens."
            )
        if end > self._end_of_rows:
            found = np.append(found, len(self))
        if not len(found):
            raise PhraseError(
                f"{phrase!r} is in the text, but its tokens are unknown: the tokens of this sample "
                "could not be aligned with its prompt. Pass positions instead."
            )
        return self.before(found) if predicts else found

    @property
    def _end_of_rows(self) -> int:
        """The number of characters of the text up to the last token that has a row.

        The characters after it belong to a generated token that was not fed back to the model.
        """
        text = self.text.rstrip()
        if not self.answer or not text.endswith(self.answer):
            return len(self.text)
        last = self.tokens["end"].iloc[self.n_prompt :].max()  # NA if the answer has no row
        end = len(text) - len(self.answer)
        end = end if pd.isna(last) else max(end, int(last))
        return end if text[end:].strip() else len(self.text)

    @property
    def has_unread_token(self) -> bool:
        """Whether the last generated token was not fed back to the model, so it has no position."""
        return self._end_of_rows < len(self.text)

    def before(self, found: Int[np.ndarray, " position"]) -> Int[np.ndarray, " position"]:
        """Return the positions that predict the tokens at some positions.

        Raises:
            PositionError: There is no position before one of them, or it attends to the token, as
                in an encoder or a prompt without causal mask.
        """
        call = next((c for key, c in self.calls.items() if key[:2] == ("language", "self")), None)
        kept = set() if call is None else set(call.query_positions.tolist())
        for position in found.tolist():
            before = position - 1
            reason = ""
            if before < 0 or self.kinds[before] == "padding":
                reason = "it is the first position"
            elif position < self.n_prompt and call is not None and before in kept:
                seen = call.visible([before])[..., position]
                reason = "the position before it attends to it" if bool(seen.any()) else ""
            if reason:
                raise PositionError(
                    f"No position predicts the token at position {position} of sample "
                    f"{self.name!r}: {reason}. Leave out predicts=True."
                )
        return found - 1

    def has_word(self, word: str) -> bool:
        """Return whether a word or phrase is in the text outside placeholders, ignoring case."""
        return has_word(word, self.text, self._in_placeholder)

    def _in_placeholder(self, start: int, end: int) -> bool:
        """Return whether a span of characters is inside a placeholder or another special token."""
        inside = (self.tokens["start"] <= start) & (self.tokens["end"] >= end)
        return bool((inside & self.tokens["kind"].isin([*VISUAL_KINDS, "special"])).any())

    def positions(
        self,
        selector: Selector,
        *,
        predicts: bool = False,
        tower: Tower | None = None,
        image: int = 0,
    ) -> Int[Tensor, " position"]:
        """Convert a selector to positions.

        :mod:`xmodal_interp.at` describes all selectors. The positions of a list with another entry
        than numbers are sorted and unique.

        Args:
            selector: Positions, a keyword, a phrase, a typed selector, a list of these, or a
                function of the sample. In the vision tower, a string is a name, such as
                ``"class"``, ``"register"`` (all registers), ``"register 0"`` or ``"patch"``.
            predicts: Return the positions whose output predicts the selected tokens: one before
                each.
            tower: ``"language"`` or ``"vision"``; ``Sample.tower`` if not given.
            image: In the vision tower, index of the image; videos follow the images.

        Raises:
            InputError: The sample has no position that the selector selects, such as ``"text"``
                without text after the image; or ``predicts`` in the vision tower.
            PhraseError: An unknown or ambiguous phrase, a phrase of a token without a row, an
                unknown name, or a keyword that is also a word of this sample's text.
            PositionError: An index outside the sequence, a mask of the wrong length, a function
                that returns no selector, or a token that no position predicts.
        """
        tower = "vision" if (tower or self.tower) == "vision" else "language"
        return positions_of(self, selector, predicts=predicts, tower=tower, image=image)

    def patch_names(self, image: int = 0) -> np.ndarray:
        """Return the name of each vision-tower position of an image, as an array of strings.

        Patches are named ``patch``; other positions have the names of the geometry rule, such as
        ``class`` and ``register 0``, or ``special`` if it names none.

        Args:
            image: Index of the image; videos follow the images.

        Raises:
            GeometryError: The image does not exist.
        """
        grids: tuple[ImageGrid | VideoGrid, ...] = (*self.grids, *self.video_grids)
        _check_exists(image, len(grids), "image")
        names = getattr(grids[image], "patch_names", None)
        if names is None:
            names = np.where(grids[image].patch_places[:, 0] >= 0, "", "special")
        return np.where(names == "", "patch", names).astype(object)

    def layers(self, tower: Tower | None = None, kind: AttentionKind = "self") -> list[int]:
        """Return the layers whose calls were kept, ascending."""
        tower = tower or self.tower
        return sorted({key[2] for key in self.calls if key[0] == tower and key[1] == kind})

    def call(
        self,
        layer: SupportsIndex,
        *,
        tower: Tower | None = None,
        kind: AttentionKind = "self",
        call: SupportsIndex = 0,
    ) -> AttentionCall:
        """Return one attention call.

        Args:
            layer: Layer index; negative ones count from the last layer of the model.
            tower: The tower; ``Sample.tower`` if not given.
            kind: The attention kind: ``"self"``, ``"cross"`` or ``"channel"``.
            call: Index of the call of this layer. In the vision tower, the index of the image;
                videos follow the images.

        Raises:
            LayerError: The layer or call does not exist.
            NotRecordedError: The layer exists, but was not kept.
        """
        tower = self.tower if tower is None else tower
        one_of(tower, "tower", TOWERS)
        one_of(kind, "kind", get_args(AttentionKind))
        kept = self.layers(tower, kind)
        model_layers = self.provenance.get("layers", {}).get(f"{tower}.{kind}") or kept
        index = layer_index(number(layer, "layer"), model_layers)
        key: CallKey = (tower, kind, index, number(call, "call"))
        if key in self.calls:
            return self.calls[key]
        if index in model_layers and index not in kept:
            raise NotRecordedError(
                f"Layer {index} of {tower} {kind}-attention was not kept; kept layers: "
                f"{kept or 'none'}. Capture again with this layer."
            )
        n_calls = len({k[3] for k in self.calls if k[:3] == key[:3]})
        existing = f"layers {model_layers}" if model_layers else "no layers"
        existing += f", with calls 0 to {n_calls - 1}" if n_calls else ""
        raise LayerError(
            f"There is no layer {layer}, call {call}: {tower} {kind}-attention has {existing}."
        )

    def probs(
        self,
        layer: SupportsIndex = -1,
        heads: Positions | None = None,
        queries: Selector | None = None,
        keys: Selector | None = None,
        *,
        tower: Tower | None = None,
        kind: AttentionKind = "self",
        call: SupportsIndex = 0,
    ) -> Float[Tensor, "head query key"]:
        """Return exact attention probabilities in float32; rows without visible keys are NaN.

        Args:
            layer: Layer index; negative ones count from the last.
            heads: Heads; all by default.
            queries: A selector, see :mod:`xmodal_interp.at`; all positions by default.
            keys: Like ``queries``. Keys of cross-attention are image tokens, such as
                ``at.image(1)``; in an encoder-decoder, numbers only.
            tower: The tower; ``Sample.tower`` if not given. In the vision tower, ``queries`` and
                ``keys`` are positions in that tower, or names such as ``"class"``; in other towers
                than these two, numbers only.
            kind: The attention kind: ``"self"``, ``"cross"`` or ``"channel"``.
            call: Index of the call of this layer; in the vision tower, the index of the image.
        """
        tower = self.tower if tower is None else tower
        one_of(tower, "tower", TOWERS)
        one_of(kind, "kind", get_args(AttentionKind))
        places: dict[str, str] = {"queries": tower, "keys": tower}
        if kind == "cross" and self.cross_keys is not None:
            places["keys"] = "cross"
        given: dict[str, Any] = {"queries": queries, "keys": keys}
        for name, place in places.items():
            if not by_name(given[name]):
                continue
            named = place in ("language", "vision", "cross") and kind != "channel"
            if not named or (name == "keys" and kind == "cross" and place != "cross"):
                raise InputError(
                    f"{name} of the {tower} tower's {kind}-attention must be numbers; got "
                    f"{quoted(given[name])}. Its positions have no names."
                )
            image = number(call, "call")
            given[name] = positions_of(self, given[name], tower=place, image=image)
        return self.call(layer, tower=tower, kind=kind, call=call).probs(
            heads, given["queries"], given["keys"]
        )[0]

    def grid(
        self,
        values: Any,
        image: int = 0,
        *,
        view: str = "image",
        video: int | None = None,
        frame: int | None = None,
    ) -> Float[np.ndarray, "*frame row col"]:
        """Arrange one value per token of an image or a video on its grid, NaN without a token.

        Args:
            values: ``[token]`` in sequence order, including class tokens, line breaks and the
                tokens of a thumbnail.
            image: Index of the image; ignored if ``video`` is given.
            view: ``"image"``, or ``"thumbnail"`` for models that read one in addition to tiles.
            video: Index of the video.
            frame: Index of a frame of tokens of the video; all by default.

        Returns:
            ``[row, col]``; ``[frame, row, col]`` for all frames of a video.

        Raises:
            GeometryError: The number of values does not match the tokens, the tokens have no known
                places, or the image, view, video or frame does not exist.
            InputError: The values are not numbers.
        """
        string(view, "view")
        if isinstance(values, Tensor):
            values = values.detach().float().cpu()
        try:
            of_tokens = np.asarray(values, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"values must be numbers, one per token; got {quoted(values)}."
            ) from error
        if video is not None:
            _check_exists(video, len(self.video_grids), "video")
            frames = self.video_grids[video].arranged(of_tokens, view, number=video)
            _check_exists(frame or 0, len(frames), "frame")
            return frames if frame is None else frames[frame]
        _check_exists(image, len(self.grids), "image")
        return self.grids[image].arranged(of_tokens, view, number=image)

    def groups(self) -> dict[str, Bool[np.ndarray, " position"]]:
        """Return the key groups of the language tower as boolean masks.

        Groups are ``image 0``, ..., ``video 0``, ..., ``text``, ``special`` and ``padding``; each
        key is in one group. Empty groups are left out.
        """
        kinds = self.tokens["kind"]
        visual = {
            f"{kind} {i}": (kinds.eq(kind) & self.tokens[kind].eq(i)).to_numpy(bool, na_value=False)
            for kind, grids in (("image", self.grids), ("video", self.video_grids))
            for i in range(len(grids))
            if kinds.eq(kind).any()
        }
        others = {kind: kinds.eq(kind).to_numpy(bool) for kind in ("text", "special", "padding")}
        return visual | {kind: members for kind, members in others.items() if members.any()}


def is_visual(kinds: np.ndarray) -> Bool[np.ndarray, " position"]:
    """Return a mask of the token kinds that are image or video."""
    visual: np.ndarray = np.logical_or.reduce([kinds == kind for kind in VISUAL_KINDS])
    return visual


def _check_exists(index: int, n: int, name: str) -> None:
    whole_number(index, name, -MOST)
    if not 0 <= index < n:
        raise GeometryError(f"There is no {name} {index}: the sample has {n} {name}s.")
