"""The glossary in code: what axes, towers and token kinds are called.

Axes, always in this order and 0-based: ``sample``, ``layer``, ``head`` (a query head), ``kv_head``,
``query``, ``key``, ``d_head``. ``q``, ``k``, ``v`` are what the scores are made of (projected,
normed, rotated); ``scores`` come before the softmax, ``probs`` after it and before dropout.
``visible`` is True where a query may attend to a key. ``lift`` is a probability times the number of
visible keys, so that it is 1 everywhere under uniform attention.
"""

from __future__ import annotations

from typing import Literal

Tower = Literal["vision", "audio", "other", "connector", "language"]
AttentionKind = Literal["self", "cross", "channel"]
"""``self``: queries and keys are the same positions. ``cross``: the keys are other positions, or
the queries are no positions (learned queries of a pooling head). ``channel``: queries and keys are
channels, so that probabilities are not about positions at all."""
TokenKind = Literal["image", "video", "text", "special", "padding"]

TOWERS: tuple[Tower, ...] = ("vision", "audio", "other", "connector", "language")
TOKEN_KINDS: tuple[TokenKind, ...] = ("image", "video", "text", "special", "padding")
ROLES: tuple[str, ...] = ("system", "user", "generated", "template")
VISUAL_KINDS: tuple[TokenKind, ...] = ("image", "video")


class Keyword(str):
    """A name for positions of every sample, as functions have it for a default.

    A plain string of the same letters is a keyword too, unless the sample's text has that word:
    then it could mean either, which is an error.
    """

    __slots__ = ()


LAST = Keyword("last")
"""The last position of the prompt, which predicts the first token of the answer."""
TEXT = Keyword("text")
"""The text of prompt and answer after the last image or video, which can see all of them."""
KEYWORDS: tuple[Keyword, ...] = (LAST, TEXT)

TOKEN_COLUMNS: tuple[str, ...] = (
    *("token", "kind", "role", "image", "row", "col"),
    *("x0", "y0", "x1", "y1", "start", "end"),
    *("view", "tile", "video", "frame"),
)
"""Columns of a token table: text, kind, role (``system``, ``user``, ``generated`` or ``template``),
image, place on the grid, box in pixels of the original image, character span; whether the place is
in the ``image`` (of a video: the frame) or in its ``thumbnail``, and the tile, where there are any;
for videos which, and which of its frames (after temporal merging)."""
