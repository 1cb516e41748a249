"""Which characters of the prompt each position stands for, whatever the processor put in between.

A processor replaces each image placeholder by the tokens of the image, with markers, row breaks or
text of its own among them.

1. Processors that report their replacements (spans of the placeholders, and the text put in their
   place): the expanded text is written out and tokenized with offsets; its ids must be those that
   the processor returned, but for a space in front that some take off. Offsets are taken back to
   the unexpanded text: a token of an expansion has the span of its placeholder.
2. The others: the prompt is tokenized as it stands, and behind each placeholder the image and
   special tokens that the processor put in are skipped. Prompts that hold every image token
   already (their chat template writes them) are taken as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from xmodal_interp.errors import GeometryError

IMAGE, VIDEO = "image", "video"


@dataclass(frozen=True)
class Position:
    """A token of the prompt as the model reads it.

    Attributes:
        start: First character of the unexpanded text that it stands for.
        end: One past the last; ``start == end`` for tokens that stand for no character.
        written: Its characters in the expanded text, None where they are not known.
        expansion: Which of the prompt's expansions it is of, None for the prompt's own text.
    """

    start: int
    end: int
    written: str | None
    expansion: int | None


@dataclass(frozen=True)
class Alignment:
    """The positions of a prompt, padding not included.

    Attributes:
        text: The prompt before its placeholders were expanded.
        positions: One per token.
        expansions: ``"image"``, ``"video"`` or another modality, for each expansion in order.
    """

    text: str
    positions: tuple[Position, ...]
    expansions: tuple[str, ...]


def unaligned(ids: Sequence[int], text: str) -> Alignment:
    """Positions of which nothing is known but their ids."""
    return Alignment(text, (Position(-1, -1, None, None),) * len(ids), ())


def reported_alignment(
    ids: Sequence[int],
    texts: Iterable[str],
    tokenizer: Any,
    replacements: Sequence[Mapping[str, Any]],
) -> Alignment:
    """Positions from the replacements that the processor reports.

    Args:
        ids: What the processor returned, without padding.
        texts: What it may have expanded: the prompt, then the prompt as it lays it out (some put
            placeholders or special tokens in front).
        tokenizer: A fast tokenizer.
        replacements: ``type``, ``span``, ``new_span``, ``text``, ``replacement`` of each.

    Raises:
        GeometryError: None of the texts gives these ids.
    """
    lengths, tried = [], []
    for text in texts:
        tried.append(text)
        expanded = _expanded(text, replacements)
        if expanded is None:
            continue
        for special in (False, True):
            own = tokenizer(expanded, return_offsets_mapping=True, add_special_tokens=special)
            extra = _extra_in_front(own["input_ids"], ids, tokenizer)
            if extra is not None:
                spans = own["offset_mapping"][extra:]
                positions = tuple(_position(expanded, a, b, replacements) for a, b in spans)
                return Alignment(text, positions, tuple(each["type"] for each in replacements))
            lengths.append(len(own["input_ids"]))
    if not lengths:
        told = (f"{each['text']!r} at {each['span'][0]}" for each in replacements)
        raise GeometryError(
            "A processor must replace the placeholders of the prompt that it is given. It reports "
            f"to have replaced {', '.join(told)}; the prompt does not have these there: "
            f"{tried[0]!r}."
        )
    raise GeometryError(
        "The replacements that a processor reports must lead to the ids that it returns. It "
        f"reports {len(replacements)}, returned {len(ids)} ids, and its text with the replacements "
        f"has {' or '.join(map(str, sorted(set(lengths))))} tokens, not the same ones."
    )


def _extra_in_front(own: Sequence[int], ids: Sequence[int], tokenizer: Any) -> int | None:
    """How many more tokens there are than the processor returned; None if they are others.

    Some processors take off the space that a tokenizer puts in front of every text.
    """
    extra = len(own) - len(ids)
    if not 0 <= extra <= 1 or list(own[extra:]) != list(ids):
        return None
    return None if tokenizer.decode(list(own[:extra])).strip() else extra


def _expanded(text: str, replacements: Sequence[Mapping[str, Any]]) -> str | None:
    """The text with its replacements; None if they were not made in this text."""
    pieces, last = [], 0
    for each in replacements:
        start, end = each["span"]
        if text[start:end] != each["text"]:
            return None
        pieces += [text[last:start], each["replacement"]]
        last = end
    return "".join([*pieces, text[last:]])


def _position(
    expanded: str, start: int, end: int, replacements: Sequence[Mapping[str, Any]]
) -> Position:
    first, expansion = _unexpanded(start, replacements)
    if end <= start:
        return Position(first, first, None, None)
    last, ended_in = _unexpanded(end - 1, replacements)
    if expansion is not None:
        first = replacements[expansion]["span"][0]
    last = last + 1 if ended_in is None else replacements[ended_in]["span"][1]
    return Position(first, last, expanded[start:end], expansion)


def _unexpanded(index: int, replacements: Sequence[Mapping[str, Any]]) -> tuple[int, int | None]:
    """The character of the unexpanded text, and the expansion that holds it."""
    shift = 0
    for number, each in enumerate(replacements):
        start, end = each["new_span"]
        if index < start:
            break
        if index < end:
            return each["span"][0], number
        shift = each["span"][1] - end
    return index + shift, None


def counted_alignment(
    ids: Sequence[int],
    texts: Iterable[str],
    tokenizer: Any,
    image_id: int | None,
    counts: Sequence[int | None],
    markers: set[int] | None = None,
) -> Alignment:
    """Positions for processors that report no replacements.

    Args:
        ids: What the processor returned, without padding.
        texts: What it may have tokenized.
        tokenizer: A fast tokenizer.
        image_id: Id of the placeholder and of the image's tokens; None where images are not in the
            sequence.
        counts: How many image tokens each image has, None where no rule says so.
        markers: Ids of the tokens that a processor may put around and among them; the special ones
            if not given.

    Raises:
        GeometryError: The ids are not the prompt's own tokens with each placeholder expanded.
    """
    special = special_ids(tokenizer) if markers is None else markers
    for text in texts:
        for adding in (False, True):
            own = tokenizer(text, return_offsets_mapping=True, add_special_tokens=adding)
            pairs = list(zip(own["input_ids"], own["offset_mapping"], strict=True))
            if counts and image_id is not None and image_id not in own["input_ids"]:
                pairs = [(image_id, (0, 0))] * len(counts) + pairs
            positions = _matched(list(ids), pairs, image_id, special, counts)
            if positions is not None:
                n = 1 + max((p.expansion for p in positions if p.expansion is not None), default=-1)
                return Alignment(text, tuple(positions), (IMAGE,) * n)
    raise GeometryError(
        "The processor must expand each image placeholder to the tokens of its image, with special "
        f"tokens at most between them. {len(counts)} images were to have "
        f"{', '.join('some' if n is None else str(n) for n in counts) or 'no'} tokens; the "
        f"processor returned {len(ids)} positions, {sum(token == image_id for token in ids)} of "
        "them image tokens."
    )


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of all special tokens of a tokenizer.

    ``all_special_ids`` holds only the tokens that have a name (``bos_token``, ...). The others,
    such as the headers of a chat template and the markers of images, are known by the ``special``
    flag of ``added_tokens_decoder``; decoding with ``skip_special_tokens`` leaves both out.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(token for token, each in added.items() if each.special)}


def _matched(
    ids: list[int],
    own: Sequence[tuple[int, tuple[int, int]]],
    image_id: int | None,
    special: set[int],
    counts: Sequence[int | None],
) -> list[Position] | None:
    """The prompt's own tokens found in the ids, expansions skipped; None if they do not fit."""
    written_out = _written_out(own, image_id, counts)
    if written_out is not None:
        return written_out if ids == [token for token, _ in own] else None
    positions: list[Position] = []
    n_expansions = 0
    for number, (token, (start, end)) in enumerate(own):
        at = len(positions)
        if token != image_id or n_expansions >= len(counts):
            if at >= len(ids) or ids[at] != token:
                return None
            positions.append(Position(start, end, None, None))
            continue
        following = own[number + 1][0] if number + 1 < len(own) else None
        length = _expansion_length(ids[at:], image_id, special, counts[n_expansions], following)
        if length is None:
            return None
        positions += [Position(start, end, None, n_expansions)] * length
        n_expansions += 1
    return positions if len(positions) == len(ids) else None


def _written_out(
    own: Sequence[tuple[int, tuple[int, int]]], image_id: int | None, counts: Sequence[int | None]
) -> list[Position] | None:
    """The prompt's own tokens, if it holds as many image tokens as all images have; else None."""
    images = [number for number, n in enumerate(counts) for _ in range(n or 0)]
    n_own = sum(token == image_id for token, _ in own)
    if n_own != len(images) or n_own == len(counts):
        return None
    number = iter(images)
    return [
        Position(start, end, None, next(number) if token == image_id else None)
        for token, (start, end) in own
    ]


def _expansion_length(
    ids: Sequence[int], image_id: int, special: set[int], count: int | None, following: int | None
) -> int | None:
    """How many of the next ids are of one expansion: its image tokens and the special ones."""
    n_images = 0
    for length, token in enumerate(ids):
        enough = n_images == count if count is not None else n_images > 0
        if token == image_id and n_images != count:
            n_images += 1
        elif token == image_id or token not in special or (enough and token == following):
            return length if enough else None
    return len(ids) if (n_images == count if count is not None else n_images > 0) else None


def shifted(index: Sequence[int], before: str, after: str) -> list[int]:
    """Where characters of a text are, after the processor has put something in between.

    Args:
        index: Positions in ``before``.
        before: The rendered prompt.
        after: The prompt as the processor laid it out.

    Raises:
        GeometryError: Some of the text is gone.
    """
    if before == after:
        return list(index)
    blocks = SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()
    if sum(block.size for block in blocks) != len(before):
        raise GeometryError(
            "A processor may add to a prompt, but must keep its text. The prompt was "
            f"{before!r}; the processor read {after!r}."
        )
    return [next(b.b + i - b.a for b in blocks if b.a <= i < b.a + b.size) for i in index]
