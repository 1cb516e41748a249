"""Names of axes, towers, attention kinds and token kinds.

Axes, always in this order and 0-based: ``sample``, ``layer``, ``head`` (a query head), ``kv_head``,
``query``, ``key``, ``d_head``. ``q``, ``k`` and ``v`` are the operands of the attention kernel
(projected, normed, rotated). ``scores`` are the values before the softmax, ``probs`` those after it
and before dropout. ``visible`` is True where a query may attend to a key. ``lift`` is a probability
times the number of visible keys: 1 everywhere for uniform attention.
"""

from __future__ import annotations

from typing import Literal

Tower = Literal["vision", "audio", "other", "connector", "language"]
AttentionKind = Literal["self", "cross", "channel"]
"""``self``: queries and keys are the same positions. ``cross``: the keys are other positions, or
the queries are learned (a pooling head). ``channel``: queries and keys are channels, not
positions."""
TokenKind = Literal["image", "video", "text", "special", "padding"]

TOWERS: tuple[Tower, ...] = ("vision", "audio", "other", "connector", "language")
TOKEN_KINDS: tuple[TokenKind, ...] = ("image", "video", "text", "special", "padding")
ROLES: tuple[str, ...] = ("system", "user", "assistant", "tool", "generated", "template")
TURN = "turn"
"""Column of the token tables of chats: index of the message, generated tokens last; NA outside
messages."""
VISUAL_KINDS: tuple[TokenKind, ...] = ("image", "video")

SHIPPED: tuple[str, ...] = ("llava", "qwen2_vl")
"""Names of the tiny trained models that are shipped with the package."""

VIDEO_DETAILS: tuple[str, ...] = ("indices", "timestamps", "original_size")
"""Optional fields of a video besides its frames and their rate."""

VIDEO_COLUMNS: tuple[str, ...] = ("source_frame", "time_s")
"""Columns of a token table with videos: for each token, the index of the first frame that it merges
in the video from which the frames were taken, and the time of that frame."""

NEXT_COLUMNS: tuple[str, ...] = ("next_token", "next_probability")
"""Columns of a token table with an answer: the answer token that the model predicts at a position,
and its probability (softmax of the model's logits over the vocabulary, before repetition penalties
and temperature). The last prompt position predicts the first token; the last token and the
end-of-sequence token are predicted but may have no position. Other positions have NA and NaN."""

TOKEN_COLUMNS: tuple[str, ...] = (
    *("token", "kind", "role", "image", "row", "col"),
    *("x0", "y0", "x1", "y1", "start", "end"),
    *("view", "tile", "video", "frame"),
)
"""Columns of a token table:

* ``token``, ``kind``, ``role`` (``system``, ``user``, ``assistant`` or ``tool``; ``generated`` for
  the answer; or ``template``);
* ``image``: index of the image; ``row``, ``col``: place on its grid;
* ``x0``, ``y0``, ``x1``, ``y1``: box in pixels of the original image;
* ``start``, ``end``: span of characters in the sample's text;
* ``view``: whether the place is in the ``image`` (or video frame) or its ``thumbnail``; ``tile``:
  index of the tile, for models that read tiles;
* ``video``, ``frame``: index of the video and of its frame after temporal merging.
"""
