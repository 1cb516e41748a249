"""Run a model on images and questions, record its attention, and return samples.

1. ``VLM.prepare`` makes model inputs and token tables.
2. The model generates (or runs once) with the user's settings, while ``record`` records its calls.
3. The calls of a batch are split into samples. Language calls of a layer (prefill and decode steps)
   are joined into one call with a query row per token (:mod:`.language_calls`); calls of the vision
   tower and the connector are split by image (:mod:`.vision_calls`).
4. Each sample gets its tokens, its calls and the provenance. ``Keep`` selects the calls, and the
   tensors and rows of each call.
"""

from __future__ import annotations

import copy
import platform
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from xmodal_interp.arguments import as_list, list_if_iterator, one_or_several
from xmodal_interp.attention import AttentionCall, entries_of, numbers
from xmodal_interp.attention.kernels import lowered_precision
from xmodal_interp.attention.statistics import FIELDS, finished
from xmodal_interp.capturing.key_groups import KeyGroups
from xmodal_interp.capturing.language_calls import (
    Stacks,
    over_positions,
    stacks_of,
    without_padding_keys,
)
from xmodal_interp.capturing.vision_calls import Layer, by_layer, towers_by_image
from xmodal_interp.errors import GeometryError, InputError, quoted
from xmodal_interp.hooks import Recording
from xmodal_interp.hooks.position_ids import AXES
from xmodal_interp.hooks.recorder import Settings, Statistics, record_with
from xmodal_interp.hooks.refusals import check_towers
from xmodal_interp.models import (
    VLM,
    ImageLike,
    Prompt,
    Video,
    check_vlm,
    check_whole,
    checked_length,
    input_device,
    prompt_ids,
)
from xmodal_interp.models.alignment import special_ids
from xmodal_interp.models.token_table import Columns, generated_columns, token_table
from xmodal_interp.sample import CallKey, Sample
from xmodal_interp.upstream import attention_backend, commit_of
from xmodal_interp.vocabulary import TOWERS, Tower


@dataclass(frozen=True)
class Keep:
    """Selects the parts of the attention that a capture keeps.

    Attributes:
        towers: Towers to keep.
        layers: Layers to keep in each tower, numbered from 0; or a boolean mask with one entry per
            layer of the deepest tower. None keeps all layers.
        values: Keep the values V too.
        norms: Keep the share of attention in each token's update, for ``attention_rollout`` with
            ``alpha="norm"``, and the norm of each token's hidden state, for ``token_norms``.
        queries: Query rows of language layers to keep: ``"all"``, or ``"text"`` (text after the
            last image or video, and generated tokens).
        probabilities: Keep dense float16 probabilities instead of queries and keys. They are larger
            and rounded to 11 bits, but are read without being recomputed.
        statistics: Statistics to keep instead of queries and keys, computed while the model runs:
            ``"mass"`` (probability on groups of keys: the first position, each image, each video,
            text, special, padding and generated tokens; language tower only), ``"entropy"`` and
            ``"received"`` (what each key receives from all queries without padding). They need a
            few numbers per head and position. Analyses that need more raise
            :class:`NotRecordedError`.
    """

    towers: tuple[Tower, ...] = TOWERS
    layers: Collection[Any] | np.ndarray | Tensor | None = None
    values: bool = False
    norms: bool = False
    queries: str = "all"
    probabilities: bool = False
    statistics: Collection[str] = ()

    def __post_init__(self) -> None:
        self._check_statistics()
        if not isinstance(self.queries, str) or self.queries not in ("all", "text"):
            raise InputError(f"queries must be 'all' or 'text'; got {quoted(self.queries)}.")
        object.__setattr__(self, "towers", list_if_iterator(self.towers))
        object.__setattr__(self, "layers", list_if_iterator(self.layers))
        check_towers(self.towers)
        object.__setattr__(self, "towers", tuple(self.towers))
        if self.layers is None:
            return
        row = entries_of(self.layers)
        if row is not None and row.dtype == bool:
            object.__setattr__(self, "_mask", tuple(row.tolist()))
        n_masked = None if row is None else len(row)
        object.__setattr__(self, "layers", tuple(numbers(self.layers, "layer", n_masked)))

    def _check_statistics(self) -> None:
        names = list_if_iterator(self.statistics)
        if isinstance(names, str) or not set(names) <= set(FIELDS):
            raise InputError(
                f"statistics must be a list of {', '.join(map(repr, FIELDS))}; got "
                f"{quoted(self.statistics)}."
            )
        if names and (self.values or self.probabilities):
            other = "values" if self.values else "probabilities"
            raise InputError(
                f"Got statistics and {other}=True, but statistics are kept instead of {other}. "
                "Pass one of them."
            )
        object.__setattr__(self, "statistics", tuple(name for name in FIELDS if name in names))

    @property
    def given_layers(self) -> Collection[Any] | np.ndarray | Tensor | None:
        """``layers`` as they were passed: a mask stays a mask."""
        return getattr(self, "_mask", self.layers)


def capture(  # noqa: PLR0913  # the settings of a run; all but three have defaults
    vlm: VLM,
    image: ImageLike | Iterable[ImageLike],
    prompt: str = "",
    *,
    videos: Video | Iterable[Video] = (),
    max_new_tokens: int = 0,
    keep: Keep | None = None,
    system: str | None = None,
    generation: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Sample:
    """Run a model on images or videos and a question, and record its attention.

    The model keeps its attention backend and its cache. Its outputs are bitwise identical to those
    without capture. The tokens of a sample are the positions of the language model; for a vision
    model, which reads one image and no prompt, those of the vision tower (``Sample.tower``).

    Args:
        vlm: Model and processor.
        image: A path, a PIL image, or a list of these in order; an empty list for no image.
        prompt: The question. It is put after the images and videos in the model's chat template; a
            question with placeholders (``"<image> ..."``) keeps them where they are. A prompt with
            placeholders that ``apply_chat_template`` already rendered is used as it is, as is every
            prompt with placeholders if ``processor.chat_template`` is None. Empty for a vision
            model.
        videos: A :class:`Video`, or a list of videos.
        max_new_tokens: Number of tokens to generate greedily; 0 runs the prompt only.
        keep: The parts of the attention to keep; by default the queries and keys of all layers.
        system: A system message; an error if the prompt is used as it is.
        generation: Further arguments of ``model.generate``.
        name: Name of the sample in tables and stores; by default ``"sample-0"``.

    Raises:
        InputError: An image or video cannot be read, the prompt is empty, or the model requires
            further inputs.
        GeometryError: Videos were given for a model type whose video tokens have no known places.
        CaptureError: Attention could not be recorded.
    """
    sample = capture_batch(
        vlm,
        [one_or_several(image)],
        [prompt],
        videos=[one_or_several(videos)],
        max_new_tokens=max_new_tokens,
        keep=keep,
        system=system,
        generation=generation,
    )[0]
    return sample if name is None else sample.changed(name=name)


def capture_batch(
    vlm: VLM,
    images: Iterable[ImageLike | Iterable[ImageLike]],
    prompts: Iterable[str] | None = None,
    *,
    videos: Iterable[Video | Iterable[Video]] | None = None,
    max_new_tokens: int = 0,
    keep: Keep | None = None,
    system: str | None = None,
    generation: Mapping[str, Any] | None = None,
) -> list[Sample]:
    """Run ``capture`` on a padded batch and return one sample for each prompt.

    ``images`` and ``videos`` have one entry for each prompt: an image, or a list of images.

    Results of a sample do not depend on the other samples in the batch. Where padding would change
    them, the batch is split into groups that can share a run: see :meth:`VLM.batches`. Leave
    ``prompts`` out for a vision model.
    """
    check_vlm(vlm)
    max_new_tokens = checked_length(max_new_tokens, generation)
    if max_new_tokens and not vlm.family.language:
        raise InputError(
            f"A {vlm.family.model_type} model generates no tokens; got max_new_tokens="
            f"{max_new_tokens}. Leave it out."
        )
    keep = Keep() if keep is None else keep
    if not isinstance(keep, Keep):
        raise InputError(f"keep must be a Keep, such as Keep(layers=[0, 1]); got {keep!r}.")
    images = as_list(images, "images")
    prompts = [""] * len(images) if prompts is None else as_list(prompts, "prompts")
    if not prompts:
        raise InputError("prompts is empty; pass at least one prompt.")
    clips = [()] * len(prompts) if videos is None else as_list(videos, "videos")
    if not len(images) == len(prompts) == len(clips or prompts):
        raise InputError(
            "images, prompts and videos must have one entry for each sample; got "
            f"{len(images)} entries of images, {len(prompts)} prompts and {len(clips)} entries of "
            "videos."
        )
    clips = clips or [()] * len(prompts)
    pictures, clips = [[one_or_several(each) for each in given] for given in (images, clips)]
    samples: dict[int, Sample] = {}
    groups = vlm.batches(pictures, (generation or {}) if max_new_tokens else None)
    for group in groups:
        options = dict(generation or {})
        if "past_key_values" in options and len(groups) > 1:  # each run needs an empty cache
            options["past_key_values"] = copy.deepcopy(options["past_key_values"])
        of_group = _run(
            vlm,
            [pictures[i] for i in group],
            [prompts[i] for i in group],
            [clips[i] for i in group],
            system,
            max_new_tokens,
            keep,
            options,
        )
        for index, sample in zip(group, of_group, strict=True):
            samples[index] = sample.changed(name=f"sample-{index}")
    return [samples[index] for index in range(len(prompts))]


def _run(
    vlm: VLM,
    images: Sequence[Sequence[ImageLike]],
    prompts: Sequence[str],
    videos: Sequence[Sequence[Video]],
    system: str | None,
    max_new_tokens: int,
    keep: Keep,
    generation: Mapping[str, Any],
) -> list[Sample]:
    """Run the model once and return one sample for each prompt."""
    inputs, prompts_read = vlm.prepare(images, prompts, system=system, videos=videos)
    check_whole(vlm.model, inputs)
    groups = None
    if keep.statistics:
        special = special_ids(vlm.tokenizer) if vlm.family.language else ()
        groups = KeyGroups(prompts_read, keep.queries, special)
    settings = Settings(
        towers=keep.towers,
        layers=keep.given_layers,
        values=keep.values,
        norms=keep.norms,
        statistics=None if groups is None else Statistics(tuple(keep.statistics), groups.of),
    )
    with ExitStack() as stack, torch.no_grad(), record_with(settings, vlm.model) as recording:
        if groups is not None:
            groups.stacks = stacks_of(vlm.model, recording.modules)
            if keep.queries == "text":
                groups.register(vlm.model, stack)
        new = torch.zeros(len(prompts_read), 0, dtype=torch.long)
        if max_new_tokens > 0:
            output = vlm.generate(inputs, max_new_tokens=max_new_tokens, **generation)
            new = output[:, prompt_ids(inputs).shape[1] :]
        else:
            vlm.run(inputs)
    layers: dict[str, list[int]] = defaultdict(list)
    for identity in recording.modules:
        layers[f"{identity.tower}.{identity.kind}"].append(identity.layer)
    about = provenance(vlm, layers, max_new_tokens, keep)
    ends = vlm.end_ids_with(generation) if new.shape[1] else set()
    answers = [_until_end(ids, ends) for ids in new.tolist()]
    batch = _BatchCalls.of(vlm, inputs, prompts_read, recording)
    if not vlm.family.language:
        batch.refuse_other_positions(prompts_read)
    n_read = prompts_read[0].n_positions + max(new.shape[1] - 1, 0)
    rotary = _rotary_by_sample(recording.rotary, len(prompts_read), n_read)
    return [
        _sample(vlm, index, prompt, (ids, new.shape[1]), batch, keep, about, positions)
        for index, (prompt, ids, positions) in enumerate(
            zip(prompts_read, answers, rotary, strict=True)
        )
    ]


def _rotary_by_sample(
    rotary: Tensor | None, n_samples: int, n_read: int
) -> Sequence[Tensor | None]:
    """Return the rotary positions of each sample, ``[axis, position]``.

    None for each sample, unless there is one position per token and axis.
    """
    if rotary is None or rotary.shape[::2] != (len(AXES), n_read):
        return [None] * n_samples
    return rotary.expand(-1, n_samples, -1).unbind(1)


@dataclass(frozen=True, eq=False)
class _BatchCalls:
    """The attention calls of a batch.

    Attributes:
        by_layer: The calls of each layer, in order.
        by_image: For each layer that reads images, the call of each image, per sample.
        stacks: The encoder and decoder of the language tower.
    """

    by_layer: Mapping[Layer, Sequence[AttentionCall]]
    by_image: Mapping[Layer, Sequence[Mapping[int, AttentionCall]]]
    stacks: Stacks

    @classmethod
    def of(
        cls, vlm: VLM, inputs: Mapping[str, Any], prompts: Sequence[Prompt], recording: Recording
    ) -> _BatchCalls:
        """Group the recorded calls by layer and by image."""
        by_image = towers_by_image(vlm, inputs, prompts, recording.calls)
        stacks = stacks_of(vlm.model, recording.modules)
        return cls(by_layer(recording.calls), by_image, stacks)

    def of_sample(
        self, index: int, prompt: Prompt, n_positions: int
    ) -> dict[CallKey, AttentionCall]:
        """Return the calls of one sample with ``n_positions`` positions of prompt and answer."""
        n_cross_keys = None if prompt.cross_keys is None else len(prompt.cross_keys)
        calls: dict[CallKey, AttentionCall] = {}
        for (tower, kind, layer), of_layer in self.by_layer.items():
            if tower == "language":
                own = [call.select_sample(index) for call in of_layer]
                whole = over_positions(own, n_positions, prompt.n_encoder, self.stacks)
                whole = without_padding_keys(whole, n_cross_keys)
                if kind == "cross" and n_cross_keys is not None and whole.n_keys != n_cross_keys:
                    raise GeometryError(_mis_sized("images", n_cross_keys, whole))
                numbered = {0: finished(whole)}
            elif tower == "other":  # positions are neither tokens nor patches
                numbered = {
                    n: replace(c.select_sample(index), call=n) for n, c in enumerate(of_layer)
                }
            else:
                numbered = dict(self.by_image[tower, kind, layer][index])
            calls |= {(tower, kind, layer, number): numbered[number] for number in sorted(numbered)}
        return calls

    def refuse_other_positions(self, prompts: Sequence[Prompt]) -> None:
        """Raise GeometryError if a layer of a vision model has other positions than its tokens."""
        for (tower, kind, _), of_samples in self.by_image.items():
            if tower != "vision" or kind != "self":
                continue
            for of_sample, prompt in zip(of_samples, prompts, strict=True):
                call = of_sample[0]
                if not call.n_queries == call.n_keys == prompt.n_positions:
                    raise GeometryError(_mis_sized("image", prompt.n_positions, call))


def _mis_sized(what: str, n_positions: int, call: AttentionCall) -> str:
    """Return the message for a geometry rule that does not fit the model."""
    has = "has" if what == "image" else "have"
    return (
        f"By the family's geometry rule, the {what} {has} {n_positions} positions, but {call.name} "
        f"has {call.n_keys} keys. Pass VLM(model, processor, family=...) with a rule for this "
        "model, such as geometry.PatchTokens(before={'class': 1})."
    )


def provenance(
    vlm: VLM, layers: Mapping[str, Sequence[int]], max_new_tokens: int, keep: Keep
) -> dict[str, Any]:
    """Return the model, versions and settings of a capture as JSON-serialisable values."""
    config = vlm.model.config
    return {
        "model": vlm.name,
        "model_class": type(vlm.model).__name__,
        "model_type": config.model_type,
        "revision": commit_of(config),
        "dtype": str(vlm.model.dtype).removeprefix("torch."),
        **lowered_precision(input_device(vlm.model)),
        "backend": attention_backend(config),
        "processor": type(vlm.processor).__name__,
        **({} if vlm.family.language else {"tower": "vision"}),
        **({"checkpoint": vlm.loading.differences} if vlm.loading else {}),
        "layers": {name: sorted(set(of)) for name, of in layers.items()},
        "max_new_tokens": max_new_tokens,
        "kept": _kept(keep),
        "versions": dict(_versions()),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _kept(keep: Keep) -> dict[str, Any]:
    kept: dict[str, Any] = {f.name: getattr(keep, f.name) for f in fields(keep)}
    kept |= {"towers": [*keep.towers], "statistics": [*keep.statistics]}
    if not keep.statistics:  # as in stores of earlier releases, which can be continued
        del kept["statistics"]
    return kept


@cache  # package metadata is read from disk
def _versions() -> Mapping[str, str]:
    of_packages = {name: version(name) for name in ("torch", "transformers")}
    return of_packages | {"python": platform.python_version()}


def _sample(
    vlm: VLM,
    index: int,
    prompt: Prompt,
    new: tuple[list[int], int],
    batch: _BatchCalls,
    keep: Keep,
    about: dict[str, Any],
    rotary: Tensor | None,
) -> Sample:
    """Return one sample of a batch.

    Args:
        vlm: Model and processor.
        index: The number of the sample in the batch.
        prompt: Its prompt.
        new: Its generated ids, and the number of steps that generated the batch.
        batch: The calls of the batch.
        keep: The parts of the attention to keep.
        about: The provenance.
        rotary: Its positions from :func:`_rotary_by_sample`.
    """
    ids, n_steps = new
    fed = ids[: max(n_steps - 1, 0)]  # the last generated token is not fed to the model
    answer, text = generated_columns(fed, ids, vlm.tokenizer, prompt.text)
    sample = Sample.with_later(
        {"tokens": partial(_tokens, prompt.columns, answer, rotary)},
        name=f"sample-{index}",
        text=text,
        question=prompt.question,
        answer=vlm.tokenizer.decode(ids, skip_special_tokens=True).strip() if ids else "",
        n_prompt=prompt.n_positions,
        grids=prompt.grids,
        images=prompt.images,
        calls=batch.of_sample(index, prompt, prompt.n_positions + len(fed)),
        cross_keys=prompt.cross_keys,
        provenance=about,
        video_grids=prompt.video_grids,
        videos=prompt.videos,
    )
    sample = sample if keep.queries == "all" else _text_rows(sample)
    return _with_probabilities(sample) if keep.probabilities else sample


def _tokens(columns: Columns, answer: Columns, rotary: Tensor | None) -> pd.DataFrame:
    """Return the token table of a sample; padding tokens have no rotary position (NA)."""
    if rotary is None:
        return token_table(columns, answer)
    missing = np.array([kind == "padding" for kind in (*columns["kind"], *answer["kind"])])
    more = {
        f"rope_{axis}": pd.arrays.IntegerArray(
            positions[: len(missing)].numpy().copy(), missing.copy()
        )
        for axis, positions in zip(AXES, rotary.long(), strict=True)
    }
    return token_table(columns, answer, more)


def _text_rows(sample: Sample) -> Sample:
    """Keep only the query rows of text after images and videos in language calls."""
    wanted = torch.from_numpy(sample.text_after_image())
    calls = {
        key: call.select_rows(wanted[wanted < call.n_queries].to(call.device))
        if key[0] == "language"
        else call
        for key, call in sample.calls.items()
    }
    return sample.changed(calls=calls)


def _with_probabilities(sample: Sample) -> Sample:
    """Replace queries and keys by float16 probabilities.

    Masks stay, because they define visibility, and sinks, because rows with a sink do not sum to 1.
    The position bias is dropped: the probabilities include it.
    """
    calls = {
        key: replace(call, dense=call.probs().half(), q=None, k=None, bias=None)
        for key, call in sample.calls.items()
    }
    return sample.changed(calls=calls)


def _until_end(ids: list[int], ends: Collection[int]) -> list[int]:
    """Return the generated ids before the first end-of-sequence token."""
    return next((ids[:i] for i, token in enumerate(ids) if token in ends), ids)
