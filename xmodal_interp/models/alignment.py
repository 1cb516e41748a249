"""Align each position with its characters in the prompt.

A processor expands each image placeholder to the tokens of the image, and may insert markers, row
breaks and text among them.

1. Some processors report their replacements (the span of each placeholder and its replacement). The
   expanded text is then rebuilt and tokenized with offsets. Its ids must equal those that the
   processor returned, except for a leading space that some processors remove. Offsets are mapped
   back to the unexpanded text: each token of an expansion has the span of its placeholder.
2. For other processors, the unexpanded prompt is tokenized and compared with the returned ids.
   After each placeholder, the inserted image and special tokens are skipped. Prompts whose chat
   template already writes every image token are compared unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from xmodal_interp.errors import GeometryError

IMAGE, VIDEO = "image", "video"


@dataclass(frozen=True)
class TokenSpan:
    """The characters of the token at one position.

    Attributes:
        start: Index of its first character in the unexpanded text.
        end: Index after its last character; equal to ``start`` for tokens without characters.
        written: Its characters in the expanded text; None if not known.
        expansion: The number of the expansion that it belongs to; None for text of the prompt.
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
        tokens: One per position.
        expansions: ``"image"``, ``"video"`` or another modality, for each expansion in order.
    """

    text: str
    tokens: tuple[TokenSpan, ...]
    expansions: tuple[str, ...]


UNALIGNED = TokenSpan(-1, -1, None, None)
"""The span of padding, and of tokens that cannot be matched with the prompt."""


def unaligned(ids: Sequence[int], text: str) -> Alignment:
    """Return an alignment without characters, for ids that cannot be matched with the prompt."""
    return Alignment(text, (UNALIGNED,) * len(ids), ())


def reported_alignment(
    ids: Sequence[int],
    texts: Iterable[str],
    tokenizer: Any,
    replacements: Sequence[Mapping[str, Any]],
) -> Alignment:
    """Align positions by the replacements that the processor reports.

    Args:
        ids: The ids that the processor returned, without padding.
        texts: Candidates for the text that was expanded: the prompt, and the prompt with
            placeholders or special tokens put before it.
        tokenizer: A fast tokenizer.
        replacements: ``type``, ``span``, ``new_span``, ``text``, ``replacement`` of each.

    Raises:
        GeometryError: No candidate text leads to these ids.
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
                positions = tuple(_token_spans(expanded, spans, replacements))
                return Alignment(text, positions, tuple(each["type"] for each in replacements))
            lengths.append(len(own["input_ids"]))
    if not lengths:
        replaced = (f"{each['text']!r} at {each['span'][0]}" for each in replacements)
        raise GeometryError(
            f"The processor reports that it replaced {', '.join(replaced)}, but the prompt "
            f"{tried[0]!r} has no such text there. Check that processor and prompt belong together."
        )
    raise GeometryError(
        f"The processor returned {len(ids)} ids, which are not the "
        f"{' or '.join(map(str, sorted(set(lengths))))} ids of the prompt with the "
        f"{len(replacements)} replacements that it reports. Check that processor and tokenizer "
        "belong together."
    )


def _extra_in_front(own: Sequence[int], ids: Sequence[int], tokenizer: Any) -> int | None:
    """Return the number of leading tokens that the processor removed; None if the ids differ.

    Some processors remove the space that a tokenizer puts before every text.
    """
    extra = len(own) - len(ids)
    if not 0 <= extra <= 1 or list(own[extra:]) != list(ids):
        return None
    return None if tokenizer.decode(list(own[:extra])).strip() else extra


def _expanded(text: str, replacements: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the text with the replacements, or None if they do not fit this text."""
    pieces, last = [], 0
    for each in replacements:
        start, end = each["span"]
        if text[start:end] != each["text"]:
            return None
        pieces += [text[last:start], each["replacement"]]
        last = end
    return "".join([*pieces, text[last:]])


def _token_spans(
    expanded: str, spans: Sequence[tuple[int, int]], replacements: Sequence[Mapping[str, Any]]
) -> Iterator[TokenSpan]:
    """Yield the span of each token; equal neighbours, such as image tokens, share one object."""
    number, before = 0, UNALIGNED
    for start, end in spans:
        while number < len(replacements) and replacements[number]["new_span"][1] <= start:
            number += 1
        if number < len(replacements):
            first, last = replacements[number]["new_span"]
            if first <= start < end <= last:
                written = expanded[start:end]
                if before.expansion != number or before.written != written:
                    unexpanded = replacements[number]["span"]
                    before = TokenSpan(unexpanded[0], unexpanded[1], written, number)
                yield before
                continue
        yield _token_span(expanded, start, end, replacements)


def _token_span(
    expanded: str, start: int, end: int, replacements: Sequence[Mapping[str, Any]]
) -> TokenSpan:
    first, expansion = _unexpanded(start, replacements)
    if end <= start:
        return TokenSpan(first, first, None, None)
    last, ended_in = _unexpanded(end - 1, replacements)
    if expansion is not None:
        first = replacements[expansion]["span"][0]
    last = last + 1 if ended_in is None else replacements[ended_in]["span"][1]
    return TokenSpan(first, last, expanded[start:end], expansion)


def _unexpanded(index: int, replacements: Sequence[Mapping[str, Any]]) -> tuple[int, int | None]:
    """Return the index in the unexpanded text, and the number of the expansion that contains it."""
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
    """Align positions for processors that report no replacements.

    Args:
        ids: The ids that the processor returned, without padding.
        texts: Candidates for the text that was tokenized.
        tokenizer: A fast tokenizer.
        image_id: Id of the placeholder and of image tokens; None if images are not in the sequence.
        counts: The number of image tokens of each image; None if no rule gives it.
        markers: Ids of tokens that the processor may insert around and among image tokens; by
            default the special tokens.

    Raises:
        GeometryError: The ids are not those of the prompt with each placeholder expanded.
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
        f"The {len(ids)} ids that the processor returned are not the prompt with its placeholders "
        f"expanded: {sum(token == image_id for token in ids)} of them are image tokens, where "
        f"{len(counts)} images should have "
        f"{', '.join('some' if n is None else str(n) for n in counts) or 'no'} tokens. "
        "Check that processor, family record and model belong together."
    )


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids of all special tokens of a tokenizer.

    ``all_special_ids`` holds only tokens with a name (``bos_token``, ...). Others, such as headers
    of a chat template and image markers, have the ``special`` flag in ``added_tokens_decoder``.
    Decoding with ``skip_special_tokens`` drops both.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(token for token, each in added.items() if each.special)}


def _matched(
    ids: list[int],
    own: Sequence[tuple[int, tuple[int, int]]],
    image_id: int | None,
    special: set[int],
    counts: Sequence[int | None],
) -> list[TokenSpan] | None:
    """Match the tokens of the prompt with the ids, skipping expansions; None if they differ."""
    written_out = _written_out(own, image_id, counts)
    if written_out is not None:
        return written_out if ids == [token for token, _ in own] else None
    positions: list[TokenSpan] = []
    n_expansions = 0
    for number, (token, (start, end)) in enumerate(own):
        at = len(positions)
        if token != image_id or n_expansions >= len(counts):
            if at >= len(ids) or ids[at] != token:
                return None
            positions.append(TokenSpan(start, end, None, None))
            continue
        following = own[number + 1][0] if number + 1 < len(own) else None
        length = _expansion_length(ids[at:], image_id, special, counts[n_expansions], following)
        if length is None:
            return None
        positions += [TokenSpan(start, end, None, n_expansions)] * length
        n_expansions += 1
    return positions if len(positions) == len(ids) else None


def _written_out(
    own: Sequence[tuple[int, tuple[int, int]]], image_id: int | None, counts: Sequence[int | None]
) -> list[TokenSpan] | None:
    """Return positions for a prompt that already contains every image token; None for others."""
    images = [number for number, n in enumerate(counts) for _ in range(n or 0)]
    n_own = sum(token == image_id for token, _ in own)
    if n_own != len(images) or n_own == len(counts):
        return None
    number = iter(images)
    return [
        TokenSpan(start, end, None, next(number) if token == image_id else None)
        for token, (start, end) in own
    ]


def _expansion_length(
    ids: Sequence[int], image_id: int, special: set[int], count: int | None, following: int | None
) -> int | None:
    """Return the number of next ids in one expansion: its image tokens and special tokens."""
    n_images = 0
    for length, token in enumerate(ids):
        enough = n_images == count if count is not None else n_images > 0
        if token == image_id and n_images != count:
            n_images += 1
        elif token == image_id or token not in special or (enough and token == following):
            return length if enough else None
    return len(ids) if (n_images == count if count is not None else n_images > 0) else None


def shifted(index: Sequence[int], before: str, after: str) -> list[int]:
    """Return the indices of characters after the processor has inserted text.

    Args:
        index: Indices in ``before``.
        before: The rendered prompt.
        after: The prompt as the processor laid it out.

    Raises:
        GeometryError: ``after`` does not contain all of ``before``.
    """
    if before == after:
        return list(index)
    blocks = SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks()
    if sum(block.size for block in blocks) != len(before):
        raise GeometryError(
            f"The processor changed the prompt {before!r} to {after!r}. Use a processor that only "
            "adds text."
        )
    return [next(b.b + i - b.a for b in blocks if b.a <= i < b.a + b.size) for i in index]
