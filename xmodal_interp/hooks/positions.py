"""The positions that an intervention edits, in a sequence that may still grow.

1. A :class:`Selection` holds positions as the user gives them. Numbers count from the start of the
   sequence, including padding. They stay the same while the model generates with a cache: position
   160 is edited in the decode step that runs it. In a batch with different amounts of padding
   before the tokens, one number is a different token in each sample. Such a batch requires
   selectors, such as a phrase, which are resolved in each sample.
2. A :class:`RunningBatch` holds the samples that the model runs at the moment. A hook reads the
   arguments of the model. The token ids are compared with those of the last batch that
   :meth:`VLM.prepare` labelled; the attention mask gives the number of padding tokens before each
   sample. A decode step belongs to the previous batch. Some models (BLIP-2, Kosmos-2) generate
   with an inner model only; for these, the inputs of :meth:`VLM.generate` are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional

from xmodal_interp import at
from xmodal_interp.at import UNION, Selector, TypedSelector, by_name, is_union
from xmodal_interp.attention import entries_of, whole_slice
from xmodal_interp.errors import CaptureError, InputError, PositionError, quoted
from xmodal_interp.models import VLM, Prompt
from xmodal_interp.sample import Sample


class Selection:
    """Positions that are resolved later, when the samples and the sequence length are known.

    Args:
        positions: A selector, see :mod:`xmodal_interp.at`. Numbers, a slice (without a stop, it
            includes generated tokens) or a boolean mask ``[position]`` are the same positions in
            all samples of a batch. Other selectors are resolved in the prompt of each sample;
            ``at.answer`` selects all positions after the prompt. For a batch, also a list of lists,
            with the selectors of each sample, or a boolean mask ``[sample, position]``. A mask must
            cover at least the prompt; positions after its end are not selected.

    Raises:
        PositionError: A position is negative (the end of the sequence moves during generation), or
            the argument is not a position.
    """

    def __init__(self, positions: Selector) -> None:
        self.slice: slice | None = None
        self.numbers: Int[Tensor, " position"] | None = None
        self.mask: Bool[Tensor, "sample position"] | None = None  # one row, or one per sample
        self.selector: Any = None  # resolved in each sample
        self.selectors: list[Any] | None = None  # one for each sample
        self.with_answer = False  # whether positions after the prompt are selected
        if by_name(positions):
            self.selector, self.with_answer = _without_answer(positions)
        elif isinstance(positions, slice):
            self.slice = whole_slice(positions, "position")
            parts = (self.slice.start, self.slice.stop, self.slice.step)
            _refuse_negative([part for part in parts if part is not None])
        elif _is_nested(positions):
            self.mask = _mask_of(positions)
            self.selectors = None if self.mask is not None else list(cast("Any", positions))
        else:
            row = entries_of(positions)
            if row is None:
                raise PositionError(
                    "Positions of an intervention must be a number, a list of numbers, a slice, a "
                    "boolean mask, a phrase, a selector of xi.at, or a function of a sample; got "
                    f"{quoted(positions)}."
                )
            if row.dtype == bool:
                self.mask = torch.from_numpy(row)[None]
            else:
                _refuse_negative(row.tolist())
                self.numbers = torch.from_numpy(row)

    @property
    def n_needed(self) -> int:
        """The length that the sequence must reach, so that no number is beyond its end.

        Only the start of a slice counts; 0 for selectors.
        """
        if self.slice is not None:
            return 0 if self.slice.start is None else int(self.slice.start) + 1
        if self.numbers is not None:
            return max(self.numbers.tolist(), default=-1) + 1
        return 0 if self.mask is None else self.mask.shape[1]

    def between(
        self, start: int, stop: int, like: Tensor, batch: RunningBatch | None, *, begins: bool
    ) -> Bool[Tensor, "sample position"]:
        """Return a mask that is True at the selected positions from ``start`` to ``stop``.

        Args:
            start: The first position.
            stop: The position after the last one.
            like: A tensor ``[sample, ...]`` of the call, which gives the batch size and the device.
            batch: The samples that are run; None if the positions are not those of the prompt's
                tokens (towers other than the language tower, keys of cross-attention).
            begins: Whether the call reads a whole prompt, from position 0.

        Returns:
            One row if the mask is the same for all samples, else one row per sample.

        Raises:
            CaptureError: The positions are selectors, but the samples are unknown.
            InputError: The number of rows is not the number of samples, or positions are numbers
                although a sample has padding before other tokens.
            PositionError: A mask is shorter than the prompt.
        """
        if self.selector is not None or self.selectors is not None:
            mask = self._resolved(like.shape[0], batch, n_positions=stop if begins else None)
        elif self.mask is not None:
            mask = self.mask
            _check_rows(len(mask), like.shape[0])
            if len(mask) == 1:
                _refuse_padding(like.shape[0], batch)
            if begins and mask.shape[1] < stop:
                raise PositionError(
                    f"A mask must have one entry per position, {stop} in all; got "
                    f"{mask.shape[1]} entries."
                )
        else:
            whole = torch.arange(stop)
            numbers = whole[self.slice] if self.numbers is None else self.numbers
            if len(numbers) not in (0, stop):
                _refuse_padding(like.shape[0], batch)
            mask = torch.zeros(1, stop, dtype=torch.bool)
            mask[:, numbers[numbers < stop]] = True
        held = mask[:, start:stop].to(like.device)
        return functional.pad(held, (0, stop - start - held.shape[1]), value=self.with_answer)

    def _resolved(
        self, n_samples: int, batch: RunningBatch | None, n_positions: int | None
    ) -> Bool[Tensor, "sample position"]:
        """Return the selectors as a mask, which is computed once per batch.

        Args:
            n_samples: The batch size.
            batch: The samples.
            n_positions: The number of positions that the model reads if it reads a prompt, or None.
        """
        if batch is None:
            raise InputError(
                f"Got the selector {quoted(self.selector or self.selectors)} for positions that "
                "are not tokens of the prompt. Give keys of cross-attention and positions of other "
                "towers as numbers."
            )
        if self in batch.masks:
            return batch.masks[self]
        each = [self.selector] * n_samples if self.selectors is None else self.selectors
        _check_rows(len(each), n_samples, exact=True)
        found = [_positions_in(batch, number, one) for number, one in enumerate(each)]
        longest = max((len(sample) for sample in batch.samples or ()), default=0)
        if n_positions is not None and n_positions < longest:
            raise CaptureError(
                f"A selector, such as a phrase, refers to the {longest} tokens of the sample, but "
                f"this layer has only the {n_positions} positions of its encoder or decoder. Give "
                "positions as numbers."
            )
        width = max(max(of, default=-1) for of in found) + 1
        mask = torch.zeros(n_samples, longest if self.with_answer else width, dtype=torch.bool)
        for row, of in zip(mask, found, strict=True):
            row[of] = True
        batch.masks[self] = mask
        return mask


def _positions_in(batch: RunningBatch, number: int, selector: Any) -> list[int]:
    """Return the selected positions of one sample of a batch, including its padding."""
    named = by_name(selector)
    if batch.samples is not None and number < len(batch.samples):
        sample = batch.samples[number]
        if not named:
            _refuse_padding(2, batch, only=number)
        found: list[int] = sample.positions(selector).tolist()
        return found
    if named:
        raise CaptureError(
            "The model ran inputs that the VLM did not prepare, so phrases, keywords and functions "
            "cannot be resolved. Use xi.intervene(vlm, ...) around xi.capture, xi.capture_batch, "
            "or a run of the inputs that vlm.prepare returned last."
        )
    _refuse_padding(2, batch, only=number)
    row = entries_of(selector)
    if row is None:
        raise PositionError(
            "Positions of a sample must be a number, a list of numbers, or a boolean mask; got "
            f"{quoted(selector)}."
        )
    if row.dtype == bool:
        row = np.flatnonzero(row)
    _refuse_negative(row.tolist())
    return row.tolist()


def _without_answer(selector: Any) -> tuple[Any, bool]:
    """Return a selector without ``at.answer``, and whether it selects the answer.

    The rows that predict the answer are the last position of the prompt and those of the answer.
    """
    if isinstance(selector, TypedSelector) and selector.rule == UNION:
        selector = list(selector.arguments)
    if isinstance(selector, TypedSelector):
        if selector == at.answer:
            return at.positions([]), True
        if selector == at.predicts(at.answer):
            return at.last, True
    if not is_union(selector):
        return selector, False
    parts = [_without_answer(each) for each in selector]
    return [rest for rest, _ in parts], any(answer for _, answer in parts)


def _is_nested(positions: Any) -> bool:
    """Return whether positions are given per sample: an array with two axes, or a list of lists."""
    if isinstance(positions, (np.ndarray, Tensor)):
        return positions.ndim == 2
    several = (list, tuple, range, set, np.ndarray)
    return isinstance(positions, (list, tuple)) and any(
        isinstance(one, several) or (isinstance(one, Tensor) and one.ndim > 0) for one in positions
    )


def _mask_of(positions: Any) -> Bool[Tensor, "sample position"] | None:
    """Return rows of booleans, one for each sample, as a mask; None for other lists."""
    rows = [entries_of(one) for one in positions]
    if not rows or any(row is None or row.dtype != bool for row in rows):
        return None
    if len({len(row) for row in rows if row is not None}) > 1:
        return None
    return torch.from_numpy(np.stack([row for row in rows if row is not None]))


def _refuse_negative(numbers: Sequence[int]) -> None:
    if min(numbers, default=0) < 0:
        raise PositionError(
            f"Got the negative position {min(numbers)}, but positions of an intervention count "
            "from the start of the sequence, because its end moves during generation. Use "
            "xi.at.last for the last position of a prompt."
        )


def _check_rows(n_rows: int, n_samples: int, *, exact: bool = False) -> None:
    if n_rows not in ((n_samples,) if exact else (1, n_samples)):
        raise InputError(
            f"Got positions with {n_rows} rows for a batch of {n_samples} samples. Give one row "
            "per sample."
        )


def _refuse_padding(n_samples: int, batch: RunningBatch | None, only: int | None = None) -> None:
    """Raise InputError if positions are numbers although samples begin after padding."""
    if batch is None or batch.padding is None or n_samples == 1:
        return
    padded = [i for i, n in enumerate(batch.padding.tolist()) if n and only in (None, i)]
    if padded:
        raise InputError(
            "One number is a different token in each sample of this batch: sample "
            f"{padded[0]} has {int(batch.padding[padded[0]])} padding tokens before others. Give "
            "positions by phrase or keyword ('red circle', 'last'), by a selector such as "
            "xi.at.image, by a function of the sample, or by a boolean mask [sample, position]."
        )


class RunningBatch:
    """The batch that a model is running, for one ``intervene`` block.

    Attributes:
        samples: The prepared samples, with padding and without attention; None if the inputs were
            not prepared by the VLM.
        padding: The number of padding tokens before other tokens of each sample, at its start or
            after image features; None if the model received no mask ``[sample, position]``.
        is_decode_step: Whether this run is a decode step of the previous batch.
    """

    def __init__(self, model: VLM | nn.Module) -> None:
        self.vlm = model if isinstance(model, VLM) else None
        self.samples: tuple[Sample, ...] | None = None
        self.padding: Int[Tensor, " sample"] | None = None
        self.is_decode_step = False
        self.masks: dict[Any, Tensor] = {}  # by selection, for the current batch
        self._ids: Tensor | None = None
        self._prompts: Sequence[Prompt] | None = None
        self._generating: Mapping[str, Any] | None = None

    def read_generation(self) -> None:
        """Read the inputs of a generation that does not run the forward of the whole model."""
        inputs = None if self.vlm is None else self.vlm.generating
        if inputs is not None and inputs is not self._generating:
            self._generating, self._ids = inputs, None
            self._read((), inputs)
            self._ids = None  # the next forward of the whole model is not a decode step

    def read_forward(self, module: nn.Module, args: Any, options: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Read the arguments of a forward; a forward pre-hook of the model."""
        self._generating = None if self.vlm is None else self.vlm.generating
        self._read(args, options)

    def _read(self, args: Any, options: Mapping[str, Any]) -> None:
        given = (options.get(name) for name in ("decoder_input_ids", "input_ids"))
        ids: Any = next((each for each in given if each is not None), None)
        if ids is None:
            ids = args[0] if args else options.get("inputs_embeds")
        if not isinstance(ids, Tensor) or ids.ndim < 2:
            return
        before = self._ids
        self.is_decode_step = before is not None and (
            ids.shape[1] == 1 or _begins_with(ids, before)
        )
        if self.is_decode_step:
            return
        self._ids = ids
        self.masks.clear()
        given = (options.get(name) for name in ("attention_mask", "decoder_attention_mask"))
        counts = [_n_before(each) for each in given if isinstance(each, Tensor) and each.ndim == 2]
        self.padding = torch.stack(counts).amax(0) if counts else None
        prompts = None if self.vlm is None or ids.ndim > 2 else self.vlm.prompts_of(ids)
        if prompts is None or prompts is not self._prompts:
            self._prompts = prompts
            self.samples = None
            if prompts is not None:
                self.samples = tuple(sample_of_prompt(each, i) for i, each in enumerate(prompts))


def _n_before(mask: Tensor) -> Int[Tensor, " sample"]:
    """Return the number of hidden positions of each sample before its last visible position."""
    shown = mask != 0
    return (~shown & (shown.flip(1).cumsum(1).flip(1) > 0)).sum(1)


def _begins_with(ids: Tensor, start: Tensor) -> bool:
    same = ids.shape[0] == start.shape[0] and ids.ndim == start.ndim
    longer = same and ids.shape[1] > start.shape[1]
    return longer and torch.equal(ids[:, : start.shape[1]], start.to(ids))


def sample_of_prompt(prompt: Prompt, number: int) -> Sample:
    """Return a prepared prompt as a sample without attention, in which selectors are resolved."""
    return Sample(
        name=f"sample-{number}",
        tokens=prompt.tokens,
        text=prompt.text,
        question=prompt.question,
        answer="",
        n_prompt=prompt.n_positions,
        grids=prompt.grids,
        images=prompt.images,
        calls={},
        cross_keys=prompt.cross_keys,
        video_grids=prompt.video_grids,
        videos=prompt.videos,
    )
