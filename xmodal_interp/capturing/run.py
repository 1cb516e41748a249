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
from typing import Any, SupportsIndex

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from xmodal_interp import at
from xmodal_interp.arguments import as_list, list_if_iterator, one_or_several
from xmodal_interp.at import Selector
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
from xmodal_interp.models.chats import Chat, Messages
from xmodal_interp.models.generation import check_answers, described
from xmodal_interp.models.known_answers import answer_ids, last_text
from xmodal_interp.models.model_inputs import with_answer
from xmodal_interp.models.next_tokens import next_tokens
from xmodal_interp.models.token_table import (
    Columns,
    following_columns,
    generated_columns,
    token_table,
)
from xmodal_interp.sample import CallKey, Sample
from xmodal_interp.upstream import attention_backend, commit_of
from xmodal_interp.vocabulary import TOWERS, TURN, Tower


@dataclass(frozen=True)
class Keep:
    """Selects the parts of the attention that a capture keeps.

    Attributes:
        towers: Towers to keep.
        layers: Layers to keep in each tower; negative numbers count from the last layer of each
            tower. Or a boolean mask with one entry per layer of the deepest tower. None keeps all
            layers.
        values: Keep the values V too.
        norms: Keep the share of attention in each token's update, for ``attention_rollout`` with
            ``alpha="norm"``, and the norm of each token's hidden state, for ``token_norms``.
        queries: Query rows of language layers to keep: ``"all"``, ``"text"`` (text after the last
            image or video, and generated tokens), or another string or typed selector of
            :mod:`xmodal_interp.at`, such as ``at.predicts(at.answer)``. With ``statistics``,
            ``"all"`` or ``"text"``.
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
    layers: SupportsIndex | Collection[Any] | np.ndarray | Tensor | None = None
    values: bool = False
    norms: bool = False
    queries: str | at.TypedSelector = "all"
    probabilities: bool = False
    statistics: Collection[str] = ()

    def __post_init__(self) -> None:
        self._check_statistics()
        self._check_queries()
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

    def _check_queries(self) -> None:
        if self.queries == at.text:
            object.__setattr__(self, "queries", "text")
        given = self.queries
        if isinstance(given, str) and given in ("all", "text"):
            return
        if not isinstance(given, (str, at.TypedSelector)) or at.has_function(given):
            raise InputError(
                "queries must be 'all', 'text', or another string or selector of xi.at without a "
                f"function; got {quoted(given)}."
            )
        if self.statistics:
            raise InputError(
                f"With statistics, queries must be 'all' or 'text'; got {quoted(given)}."
            )

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
    def given_layers(self) -> SupportsIndex | Collection[Any] | np.ndarray | Tensor | None:
        """``layers`` as they were passed: a mask stays a mask."""
        return getattr(self, "_mask", self.layers)


def capture(  # noqa: PLR0913  # the settings of a run; all but three have defaults
    vlm: VLM,
    image: ImageLike | Iterable[ImageLike] = (),
    prompt: str | Messages = "",
    *,
    answer: str | None = None,
    videos: Video | Iterable[Video] = (),
    max_new_tokens: int = 0,
    keep: Keep | None = None,
    system: str | None = None,
    generation: Mapping[str, Any] | None = None,
    name: str | None = None,
    processor_options: Mapping[str, Any] | None = None,
) -> Sample:
    """Run a model on images or videos and a question or a chat, and record its attention.

    The model keeps its attention backend and its cache. Its outputs are bitwise identical to those
    without capture. The tokens of a sample are the positions of the language model; for a vision
    model, which reads one image and no prompt, those of the vision tower (``Sample.tower``).

    Args:
        vlm: Model and processor.
        image: An image, or a list of images in order; by default none. An image is a path, a URL, a
            PIL image, an array, the bytes of a file, or a dict with ``bytes`` or ``path``; see
            ``xmodal_interp.models.open_image``.
        prompt: The question. It is put after the images and videos in the model's chat template; a
            question with placeholders (``"<image> ..."``) keeps them where they are. A prompt with
            placeholders that ``apply_chat_template`` already rendered is used as it is, as is every
            prompt with placeholders if ``processor.chat_template`` is None. Empty for a vision
            model.

            Or the messages of a chat, ``[{"role": "user", "content": ...}, ...]``, with images in
            any message: ``xi.capture(vlm, prompt=messages)``. Parts ``{"type": "image"}`` without a
            picture take the next of ``image``. The token table has the role of each message and its
            number, ``turn``. See :mod:`~xmodal_interp.models.chats`.
        answer: An answer to run the model on, instead of generating one (teacher forcing). Its
            tokens are labelled as generated, and each has a row. By default, the last message of a
            chat, if it is the assistant's.
        videos: A :class:`Video`, or a list of videos.
        max_new_tokens: Number of tokens to generate greedily; 0 runs the prompt only.
        keep: The parts of the attention to keep; by default the queries and keys of all layers.
        system: A system message; an error if the prompt is used as it is.
        generation: Further arguments of ``model.generate``. They are in the sample's provenance.
        name: Name of the sample in tables and stores; by default ``"sample-0"``.
        processor_options: Options of the image and video processor, such as ``{"max_pixels":
            50176}`` or ``{"do_pan_and_scan": True}``; those of the VLM are kept.

    Raises:
        InputError: An image or video cannot be read, the prompt is empty, an answer is given and
            also generated, or the model requires further inputs.
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
        answers=None if answer is None else [answer],
        processor_options=processor_options,
    )[0]
    return sample if name is None else sample.changed(name=name)


def capture_batch(  # noqa: PLR0913  # the settings of a run; all but three have defaults
    vlm: VLM,
    images: Iterable[ImageLike | Iterable[ImageLike]],
    prompts: Iterable[str | Messages | Chat] | None = None,
    *,
    videos: Iterable[Video | Iterable[Video]] | None = None,
    max_new_tokens: int = 0,
    keep: Keep | None = None,
    system: str | None = None,
    generation: Mapping[str, Any] | None = None,
    answers: Iterable[str | None] | None = None,
    processor_options: Mapping[str, Any] | None = None,
) -> list[Sample]:
    """Run ``capture`` on a padded batch and return one sample for each prompt.

    ``images`` and ``videos`` have one entry for each prompt: an image, or a list of images.
    ``answers`` are given answers; None for a prompt without one.

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
    known = [None] * len(prompts) if answers is None else as_list(answers, "answers")
    if len(known) != len(prompts):
        raise InputError(
            f"answers must have one entry for each of {len(prompts)} prompts; got {len(known)}."
        )
    asked = [
        _asked(vlm, *of_sample) for of_sample in zip(pictures, prompts, clips, known, strict=True)
    ]
    given = [each.answer for each in asked]
    check_answers(vlm.model, given, max_new_tokens, language=vlm.family.language)
    options = _Options(system, max_new_tokens, keep, generation or {}, processor_options)
    samples: dict[int, Sample] = {}
    groups = vlm.batches(
        [each.images for each in asked], options.generation if max_new_tokens else None
    )
    for group in groups:
        of_group = _run(vlm, [asked[i] for i in group], options, several=len(groups) > 1)
        for index, sample in zip(group, of_group, strict=True):
            samples[index] = sample.changed(name=f"sample-{index}")
    return [samples[index] for index in range(len(prompts))]


@dataclass(frozen=True, eq=False)
class _Asked:
    """One sample of a batch, as it is passed to :meth:`VLM.prepare`.

    Attributes:
        images: Its images.
        prompt: Its question or its chat.
        videos: Its videos.
        answer: Its given answer; None if it has none.
    """

    images: Sequence[ImageLike]
    prompt: str | Chat
    videos: Sequence[Video]
    answer: str | None


def _asked(
    vlm: VLM,
    images: Sequence[ImageLike],
    prompt: Any,
    videos: Sequence[Video],
    answer: str | None,
) -> _Asked:
    """Return one sample; the last message of the assistant is the answer of a chat.

    Raises:
        InputError: The prompt is neither a string nor messages, or there are two answers.
    """
    if isinstance(prompt, str):
        return _Asked(images, prompt, videos, answer)
    chat, images, videos = vlm.read_chat(prompt, images, videos)
    if answer is not None and chat.answer is not None:
        raise InputError(
            f"The messages end with the assistant's answer {chat.answer!r}, and answer={answer!r} "
            "was passed too. Leave out one of them."
        )
    answer = chat.answer if answer is None else answer
    return _Asked(images, replace(chat, answer=None), videos, answer)


@dataclass(frozen=True, eq=False)
class _Options:
    """The options of a run; see :func:`capture`."""

    system: str | None
    max_new_tokens: int
    keep: Keep
    generation: Mapping[str, Any]
    processor: Mapping[str, Any] | None


def _run(
    vlm: VLM, asked: Sequence[_Asked], options: _Options, *, several: bool = False
) -> list[Sample]:
    """Run the model once and return one sample for each prompt.

    Samples whose given answers have different lengths are run separately: padding between the
    answers would be in the rows of the shorter ones.

    Args:
        vlm: Model and processor.
        asked: The samples.
        options: The options.
        several: Whether there are other runs with these options.
    """
    keep, max_new_tokens, generation = options.keep, options.max_new_tokens, options.generation
    inputs, prompts_read = vlm.prepare(
        [each.images for each in asked],
        [each.prompt for each in asked],
        system=options.system,
        videos=[each.videos for each in asked],
        processor_options=options.processor,
    )
    check_whole(vlm.model, inputs)
    answers = _answer_ids(vlm, prompts_read, asked)
    lengths = {len(ids) for ids in answers}
    if len(lengths) > 1:
        return _by_length(vlm, asked, options, [len(ids) for ids in answers])
    if answers[0]:
        last = [last_text(prompt) for prompt in prompts_read]
        inputs = with_answer(vlm.model, inputs, answers, last)
    groups = _key_groups(vlm, prompts_read, keep, answers)
    settings = Settings(
        towers=keep.towers,
        layers=keep.given_layers,
        values=keep.values,
        norms=keep.norms,
        statistics=None if groups is None else Statistics(tuple(keep.statistics), groups.of),
    )
    n_steps = len(answers[0]) + bool(answers[0])  # every token of a given answer is read
    with (
        ExitStack() as stack,
        torch.no_grad(),
        next_tokens(vlm.model, answers if answers[0] else None) as observed,
        record_with(settings, vlm.model) as recording,
    ):
        if groups is not None:
            groups.stacks = stacks_of(vlm.model, recording.modules)
            if keep.queries == "text":
                groups.register(vlm.model, stack)
        new = torch.zeros(len(prompts_read), 0, dtype=torch.long)
        if max_new_tokens > 0:
            given = dict(generation)
            if several and "past_key_values" in given:  # each run needs an empty cache
                given["past_key_values"] = copy.deepcopy(given["past_key_values"])
            given = observed.with_criterion(given)
            output = vlm.generate(inputs, max_new_tokens=max_new_tokens, **given)
            new = output[:, prompt_ids(inputs).shape[1] :]
            n_steps = new.shape[1]
            ends = vlm.end_ids_with(generation)
            answers = [_until_end(ids, ends) for ids in new.tolist()]
        else:
            vlm.run(inputs)
    layers: dict[str, list[int]] = defaultdict(list)
    for identity in recording.modules:
        layers[f"{identity.tower}.{identity.kind}"].append(identity.layer)
    about = provenance(vlm.with_options(options.processor), layers, max_new_tokens, keep)
    about |= {"generation": described(generation)} if generation else {}
    batch = _BatchCalls.of(vlm, inputs, prompts_read, recording)
    if not vlm.family.language:
        batch.refuse_other_positions(prompts_read)
    n_read = prompts_read[0].n_positions + max(n_steps - 1, 0)
    rotary = _rotary_by_sample(recording.rotary, len(prompts_read), n_read)
    probabilities = observed.probabilities(n_steps if max_new_tokens else len(answers[0]))
    samples = []
    for index, (prompt, ids, positions, each) in enumerate(
        zip(prompts_read, answers, rotary, asked, strict=True)
    ):
        known = {**about, **_about(each)}
        following = new[index].tolist()[: len(ids) + 1] if max_new_tokens else list(ids)
        answer = _Answer(
            list(ids),
            n_steps,
            following,
            None if probabilities is None else probabilities[index, : len(following)].numpy(),
        )
        samples.append(_sample(vlm, index, prompt, answer, batch, keep, known, positions))
    return [_with_given(sample, each.answer) for sample, each in zip(samples, asked, strict=True)]


def _with_given(sample: Sample, answer: str | None) -> Sample:
    """Return a sample with its given answer; decoded ids may lack words or special tokens of it."""
    return sample if answer is None else sample.changed(answer=answer.strip())


def _key_groups(
    vlm: VLM, prompts: Sequence[Prompt], keep: Keep, answers: Sequence[Sequence[int]]
) -> KeyGroups | None:
    """Return the groups of keys for the statistics to keep; None if none are kept."""
    if not keep.statistics:
        return None
    special = special_ids(vlm.tokenizer) if vlm.family.language else ()
    return KeyGroups(prompts, str(keep.queries), special, answers)


def _answer_ids(
    vlm: VLM, prompts: Sequence[Prompt], asked: Sequence[_Asked]
) -> list[Sequence[int]]:
    """Return the token ids of the given answer of each sample; none for samples without one."""
    return [
        () if each.answer is None else answer_ids(vlm, prompt.text, each.answer)
        for each, prompt in zip(asked, prompts, strict=True)
    ]


def _by_length(
    vlm: VLM, asked: Sequence[_Asked], options: _Options, lengths: Sequence[int]
) -> list[Sample]:
    """Run the samples with answers of each length separately."""
    samples: dict[int, Sample] = {}
    for length in dict.fromkeys(lengths):
        alike = [i for i, each in enumerate(lengths) if each == length]
        of_length = _run(vlm, [asked[i] for i in alike], options)
        samples |= dict(zip(alike, of_length, strict=True))
    return [samples[index] for index in range(len(asked))]


def _about(asked: _Asked) -> dict[str, Any]:
    """Return the part of the provenance that differs between the samples of a batch."""
    about: dict[str, Any] = {}
    if isinstance(asked.prompt, Chat):
        about["messages"] = [*asked.prompt.messages]
    if asked.answer is not None:
        about["answer"] = "given"
    return about


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
        **({"processor_options": vlm.processor_options} if vlm.processor_options else {}),
        "layers": {name: sorted(set(of)) for name, of in layers.items()},
        "max_new_tokens": max_new_tokens,
        "kept": _kept(keep),
        "versions": dict(_versions()),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _kept(keep: Keep) -> dict[str, Any]:
    kept: dict[str, Any] = {f.name: getattr(keep, f.name) for f in fields(keep)}
    kept |= {"towers": [*keep.towers], "statistics": [*keep.statistics]}
    kept["queries"] = keep.queries if isinstance(keep.queries, str) else repr(keep.queries)
    if not keep.statistics:  # as in stores of earlier releases, which can be continued
        del kept["statistics"]
    return kept


@cache  # package metadata is read from disk
def _versions() -> Mapping[str, str]:
    of_packages = {name: version(name) for name in ("torch", "transformers")}
    return of_packages | {"python": platform.python_version()}


@dataclass(frozen=True, eq=False)
class _Answer:
    """The answer of one sample.

    Attributes:
        ids: The ids, without the end-of-sequence token.
        n_steps: The number of steps that generated the batch.
        following: The ids with the end-of-sequence token, if one was generated.
        probabilities: The probability of each of ``following``; None if it was not observed.
    """

    ids: list[int]
    n_steps: int
    following: list[int]
    probabilities: np.ndarray | None


def _sample(
    vlm: VLM,
    index: int,
    prompt: Prompt,
    new: _Answer,
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
        new: Its answer.
        batch: The calls of the batch.
        keep: The parts of the attention to keep.
        about: The provenance.
        rotary: Its positions from :func:`_rotary_by_sample`.
    """
    ids = new.ids
    fed = ids[: max(new.n_steps - 1, 0)]  # the last generated token is not fed to the model
    answer, text = generated_columns(fed, ids, vlm.tokenizer, prompt.text)
    if prompt.n_turns:
        answer[TURN] = [prompt.n_turns] * len(fed)
    following = following_columns(
        new.following, new.probabilities, answer, text, vlm.tokenizer, prompt.n_positions
    )
    sample = Sample.with_later(
        {"tokens": partial(_tokens, prompt.columns, answer, rotary, following)},
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
    sample = sample if keep.queries == "all" else _with_rows(sample, keep.queries)
    return _with_probabilities(sample) if keep.probabilities else sample


def _tokens(
    columns: Columns, answer: Columns, rotary: Tensor | None, following: Columns
) -> pd.DataFrame:
    """Return the token table of a sample; padding tokens have no rotary position (NA)."""
    if rotary is None:
        return token_table(columns, answer, following)
    missing = np.array([kind == "padding" for kind in (*columns["kind"], *answer["kind"])])
    more = {
        f"rope_{axis}": pd.arrays.IntegerArray(
            positions[: len(missing)].numpy().copy(), missing.copy()
        )
        for axis, positions in zip(AXES, rotary.long(), strict=True)
    }
    return token_table(columns, answer, more | following)


def _with_rows(sample: Sample, queries: Selector) -> Sample:
    """Keep only the selected query rows in language calls."""
    if queries == "text":  # may be none
        wanted = torch.from_numpy(sample.text_after_image())
    else:
        wanted = sample.positions(queries).unique()
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
