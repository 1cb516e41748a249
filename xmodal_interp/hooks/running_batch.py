"""Track which samples a model is running, so that interventions find the positions of each sample.

A hook on the model reads its arguments. The token ids are compared with those of the last batch
that :meth:`VLM.prepare` labelled; the attention mask gives the number of padding tokens before each
sample. A decode step belongs to the previous batch. Some models (BLIP-2, Kosmos-2) generate with an
inner model only; for these, the inputs of :meth:`VLM.generate` are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from xmodal_interp.models import VLM, Prompt
from xmodal_interp.sample import Sample


class RunningBatch:
    """The batch that a model is running, for one ``intervene`` block.

    Attributes:
        samples: The prepared samples, with padding and without attention; None if the inputs were
            not prepared by the VLM.
        padding: The number of padding tokens before other tokens of each sample, at its start or
            after image features; None if the model received no mask ``[sample, position]``.
        goes_on: Whether this run is a decode step of the previous batch.
    """

    def __init__(self, model: VLM | nn.Module) -> None:
        self.vlm = model if isinstance(model, VLM) else None
        self.samples: tuple[Sample, ...] | None = None
        self.padding: Int[Tensor, " sample"] | None = None
        self.goes_on = False
        self.masks: dict[Any, Tensor] = {}  # by selection, for the current batch
        self._ids: Tensor | None = None
        self._prompts: Sequence[Prompt] | None = None
        self._generating: Mapping[str, Any] | None = None

    def look(self) -> None:
        """Read the inputs of a generation that does not run the forward of the whole model."""
        inputs = None if self.vlm is None else self.vlm.generating
        if inputs is not None and inputs is not self._generating:
            self._generating, self._ids = inputs, None
            self._read((), inputs)
            self._ids = None  # the next forward of the whole model is not a decode step

    def enter(self, module: nn.Module, args: Any, options: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Read the arguments of a forward; registered as a forward pre-hook."""
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
        self.goes_on = before is not None and (ids.shape[1] == 1 or _begins_with(ids, before))
        if self.goes_on:
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
                self.samples = tuple(_as_sample(each, i) for i, each in enumerate(prompts))


def _n_before(mask: Tensor) -> Int[Tensor, " sample"]:
    """Return the number of hidden positions of each sample before its last visible position."""
    shown = mask != 0
    return (~shown & (shown.flip(1).cumsum(1).flip(1) > 0)).sum(1)


def _begins_with(ids: Tensor, start: Tensor) -> bool:
    same = ids.shape[0] == start.shape[0] and ids.ndim == start.ndim
    longer = same and ids.shape[1] > start.shape[1]
    return longer and torch.equal(ids[:, : start.shape[1]], start.to(ids))


def _as_sample(prompt: Prompt, number: int) -> Sample:
    return Sample(
        name=f"sample-{number}",
        tokens=prompt.tokens,
        text=prompt.text,
        question=prompt.question,
        answer="",
        n_prompt=len(prompt.tokens),
        grids=prompt.grids,
        images=prompt.images,
        calls={},
        cross_keys=prompt.cross_keys,
        video_grids=prompt.video_grids,
        videos=prompt.videos,
    )
