"""Divide the keys of a call into groups that are known before the model runs.

Groups of the language tower: the first position without padding, each image, each video, text,
special tokens, padding, and all generated tokens. Whether a generated token is special is known
only after the run, so generated tokens are a separate group. Keys of cross-attention are divided
by image. Keys of other towers are one group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from xmodal_interp.attention import AttentionCall
from xmodal_interp.attention.statistics import Labels
from xmodal_interp.capturing.language_calls import Stacks
from xmodal_interp.errors import CaptureError
from xmodal_interp.models import Prompt
from xmodal_interp.vocabulary import VISUAL_KINDS

FIRST, TEXT, SPECIAL, PADDING, GENERATED, IMAGES = range(6)
"""Numbers of the groups; those of the images begin with ``IMAGES``, videos follow."""


class KeyGroups:
    """The groups of the keys of one run, and the queries that are counted.

    Args:
        prompts: The prompts of the batch.
        queries: ``Keep.queries``. With ``"text"``, only text after the last image, in prompt and
            answer, is computed and counted.
        special: Ids of special tokens.
        answers: Ids of the given answer of each prompt, all of one length; empty if there are none.

    Attributes:
        stacks: Encoder and decoder of the language tower; must be set before the model runs.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        queries: str,
        special: Collection[int] = (),
        answers: Sequence[Sequence[int]] = (),
    ) -> None:
        self.stacks = Stacks(frozenset(), merged=False)
        self._n_encoder = prompts[0].n_encoder
        self._only_text = queries == "text"
        n_images = max(len(prompt.grids) for prompt in prompts)
        self._n_groups = IMAGES + n_images + max(len(prompt.video_grids) for prompt in prompts)
        self._groups = np.stack([_groups_of(prompt, n_images) for prompt in prompts])
        self._counted = np.stack([_counted(prompt, queries) for prompt in prompts])
        self._of_images = [
            None if prompt.cross_keys is None else IMAGES + prompt.cross_keys["image"].to_numpy(int)
            for prompt in prompts
        ]
        self._n_read: dict[str, int] = defaultdict(int)
        self._special = list(special)
        self._ids = np.zeros((len(prompts), 0), dtype=int)
        self._answer_is_text = ~np.isin(np.array(answers, dtype=int), self._special)

    def register(self, model: nn.Module, stack: ExitStack) -> None:
        """Note the ids that the model reads, until the stack is closed."""
        for module in model.modules():
            if hasattr(module, "get_input_embeddings"):  # the model, or its language model
                hook = module.register_forward_pre_hook(self._note_ids, with_kwargs=True)
                stack.callback(hook.remove)

    def _note_ids(self, _: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        ids = inputs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and not ids.is_floating_point():
            self._ids = ids.cpu().numpy()

    def of(self, call: AttentionCall) -> Labels:
        """Return the groups of the keys of a call, and the queries that are counted.

        Calls of a layer must be passed in the order of the run.

        Raises:
            CaptureError: The call has another number of samples than the batch.
        """
        if call.tower != "language":
            groups = np.zeros((call.n_samples, call.n_keys), dtype=np.int16)
            counted = np.ones((call.n_samples, call.n_queries), dtype=bool)
            return _labels(call, groups, 1, counted)
        if call.n_samples != len(self._groups):
            raise CaptureError(
                f"{call.name} ran on {call.n_samples} sequences for {len(self._groups)} prompts, "
                "so its keys have no known groups. Capture with Keep() to keep q and k."
            )
        start, offset = self._place(call)
        n, encoder = self._n_encoder, slice(0, self._n_encoder)
        if call.module in self.stacks.encoder:
            own, counted = self._groups[:, encoder], self._counted[:, encoder]
        else:
            own, counted = self._groups[:, n:], self._counted[:, n:]
        rows = _from(counted, start, call.n_queries, after=True)
        if self._only_text and start >= counted.shape[1] and self._ids.shape == rows.shape:
            rows = ~np.isin(self._ids, self._special)  # as in the token table of the answer
        n_answered = start + call.n_queries - counted.shape[1]
        if self._only_text and n_answered > 0 and self._answer_is_text.size:
            rows[:, -n_answered:] = self._answer_is_text[:, :n_answered]
        if call.kind == "cross":
            keys = self._cross_groups(call.n_keys)
        elif self._holds_both(call):
            keys = _from(own, offset, call.n_keys - n, after=GENERATED)
            keys = np.concatenate([keys, self._groups[:, encoder]], 1)
        else:
            keys = _from(own, offset, call.n_keys, after=GENERATED)
        return _labels(call, keys, self._n_groups, rows, only_counted=self._only_text)

    def _holds_both(self, call: AttentionCall) -> bool:
        """Return whether the keys of a call are those of the decoder and of the encoder."""
        in_decoder = self._n_encoder > 0 and call.module not in self.stacks.encoder
        return self.stacks.merged and in_decoder

    def _place(self, call: AttentionCall) -> tuple[int, int]:
        """Return the positions of the first query and the first key of a call.

        A cache holds the keys from the first position, or the last keys so far.
        """
        n_keys = call.n_keys - (self._n_encoder if self._holds_both(call) else 0)
        reads_all = call.kind == "self" and call.n_queries == n_keys
        start = 0 if reads_all else self._n_read[call.module]
        self._n_read[call.module] = start + call.n_queries
        return start, max(0, start + call.n_queries - n_keys)

    def _cross_groups(self, n_keys: int) -> Int[np.ndarray, "sample key"]:
        """Return the groups of the keys of a cross-attention: an encoder, or images."""
        if self._n_encoder:
            return _from(self._groups[:, : self._n_encoder], 0, n_keys, after=PADDING)
        groups = np.full((len(self._groups), n_keys), PADDING, dtype=np.int16)
        for row, of_images in zip(groups, self._of_images, strict=True):
            if of_images is not None:
                row[: len(of_images)] = of_images[:n_keys]
        return groups


def _groups_of(prompt: Prompt, n_images: int) -> Int[np.ndarray, " position"]:
    """Return the group of each position of a prompt."""
    kinds = np.asarray(prompt.columns["kind"])
    groups = np.select([kinds == "special", kinds == "padding"], [SPECIAL, PADDING], TEXT)
    for kind, first in zip(("image", "video"), (IMAGES, IMAGES + n_images), strict=True):
        number = np.asarray(prompt.columns[kind], dtype=float)
        groups = np.where(kinds == kind, first + np.nan_to_num(number).astype(int), groups)
    groups[np.flatnonzero(kinds != "padding")[:1]] = FIRST
    return groups.astype(np.int16)


def _counted(prompt: Prompt, queries: str) -> Bool[np.ndarray, " position"]:
    """Return which positions of a prompt are counted."""
    kinds = np.asarray(prompt.columns["kind"])
    counted: Bool[np.ndarray, " position"] = kinds != "padding"
    if queries == "text":
        last = np.flatnonzero(np.isin(kinds, list(VISUAL_KINDS))).max(initial=-1)
        counted = (kinds == "text") & (np.arange(len(kinds)) > last)
    return counted


def _from(values: np.ndarray, start: int, length: int, *, after: int) -> np.ndarray:
    """Return columns from ``start``; columns after the last one have the value ``after``."""
    found = values[:, start : start + length]
    return np.pad(found, ((0, 0), (0, length - found.shape[1])), constant_values=after)


def _labels(
    call: AttentionCall,
    groups: Int[np.ndarray, "sample key"],
    n_groups: int,
    counted: Bool[np.ndarray, "sample query"],
    *,
    only_counted: bool = False,
) -> Labels:
    rows = torch.from_numpy(np.flatnonzero(counted.any(0))).to(call.device)
    return Labels(
        groups=torch.from_numpy(groups).to(call.device),
        n_groups=n_groups,
        counted=torch.from_numpy(counted).to(call.device),
        rows=rows if only_counted else None,
    )
