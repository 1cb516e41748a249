"""VLM: a vision-language model, or a vision model, with its processor.

It turns images and questions into model inputs with labelled positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from PIL import Image

from xmodal_interp.arguments import as_list, one_or_several, string
from xmodal_interp.errors import GeometryError, InputError, quoted
from xmodal_interp.html_summary import html_summary
from xmodal_interp.models import geometry, processor_calls, vision_inputs
from xmodal_interp.models.chats import Chat, Messages, read_chat
from xmodal_interp.models.encoders import encoder_in
from xmodal_interp.models.generation import arguments_of, check_decoding, end_ids_of, ends_by_text
from xmodal_interp.models.geometry import ImageGrid
from xmodal_interp.models.labels import Prompt, Unlabelled, labelled
from xmodal_interp.models.media import ImageLike, Video, flat, open_image, open_video
from xmodal_interp.models.model_inputs import (
    as_generated,
    for_generate,
    input_row,
    prompt_ids,
    with_start,
)
from xmodal_interp.models.model_state import (
    CheckpointReport,
    evaluation_mode,
    input_device,
    refuse_virtual_tokens,
)
from xmodal_interp.models.processor_options import checked_options, with_options
from xmodal_interp.models.processor_settings import completed
from xmodal_interp.models.prompts import rendered
from xmodal_interp.models.records import (
    TEXT_MODELS_ALONE,
    Family,
    family_of,
    refuse_other_class,
)
from xmodal_interp.models.resized import in_original_pixels, original_size

_generating: ContextVar[tuple[object, Mapping[str, Any]]] = ContextVar(
    "xmodal_interp_generating", default=(None, {})
)
"""The VLM whose :meth:`~VLM.generate` is running in this thread or task, and its inputs."""


@dataclass(frozen=True, eq=False)
class VLM:
    """A model, its processor and its family record.

    A vision model without a language model is accepted too: it reads one image per sample and no
    prompt, and the positions of its samples are those of its vision tower.

    Attributes:
        model: A model of transformers, or a PEFT wrapper of one. Of a dual encoder such as CLIP,
            only the vision tower is kept.
        processor: The processor of the model; for a vision model, its image processor. Settings
            that it lacks (``patch_size`` in older checkpoints) are taken from the model, in a copy.
        family: The record of the model type; looked up by the type if not given.
        loading: A ``CheckpointReport``: how the checkpoint differs from the model. Pass the second
            result of ``from_pretrained(name, output_loading_info=True)``. None if not known.
        processor_options: Options of the image and video processor that replace its settings, such
            as ``{"max_pixels": 50176}`` or ``{"do_pan_and_scan": True}``.

    Raises:
        InputError: ``model`` is not a model of transformers, or ``processor`` has no tokenizer; for
            a vision model, ``processor`` is not an image processor.
        UnsupportedModelError: The model type has no family record and no image token id in its
            configuration, or is text-only; the model is not of the generating class of its type, or
            it has a PEFT adapter with virtual tokens.
    """

    model: Any
    processor: Any
    family: Family = None  # type: ignore[assignment]  # filled from the model type
    loading: Any = None  # a CheckpointReport after construction
    processor_options: Any = None  # a dict after construction

    def __post_init__(self) -> None:
        if not hasattr(self.model, "config"):
            raise InputError(
                "model must be a transformers model; got an object of "
                f"{type(self.model).__name__}. xi.load(name) loads model and processor."
            )
        refuse_virtual_tokens(self.model)
        given: Any = self.family
        if given is None:
            object.__setattr__(self, "family", family_of(self.model.config))
            refuse_other_class(self.model)
        elif not isinstance(given, Family):
            raise InputError(f"family must be a Family record; got {quoted(given)}.")
        if self.loading is not None:
            object.__setattr__(self, "loading", CheckpointReport.of(self.loading))
        if not self.family.language:
            object.__setattr__(self, "model", encoder_in(self.model))
            found = vision_inputs.image_processor_of(self.processor)
            object.__setattr__(self, "processor", found)
        elif not hasattr(self.processor, "tokenizer"):
            raise InputError(
                "The processor must have a tokenizer and an image processor; got "
                f"{type(self.processor).__name__}. Load both with AutoProcessor."
            )
        options = checked_options(self.processor_options)
        processor = with_options(completed(self.processor, self.model), options)
        object.__setattr__(self, "processor", processor)
        object.__setattr__(self, "processor_options", options)

    def __repr__(self) -> str:
        """Classes, model type, dtype and device; the model's own repr lists every module."""
        return (
            f"VLM({type(self.model).__name__}, {type(self.processor).__name__}; "
            f"{self.family.model_type}, {self.model.dtype}, {self.model.device})"
        )

    def _repr_html_(self) -> str:
        """Return a summary for notebooks: classes, model type, weights, dtype and device."""
        n_weights = sum(weight.numel() for weight in self.model.parameters())
        return html_summary(
            f"VLM {self.name}",
            {
                "model": type(self.model).__name__,
                "processor": type(self.processor).__name__,
                "model type": self.family.model_type,
                "weights": f"{n_weights:,} in {self.model.dtype} on {self.model.device}",
            },
        )

    @property
    def name(self) -> str:
        """The name or path that the model was loaded from, or its class name."""
        return str(getattr(self.model, "name_or_path", "") or type(self.model).__name__)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer; None for a model without a language model."""
        return self.processor.tokenizer if self.family.language else None

    @property
    def end_ids(self) -> set[int]:
        """The ids that end an answer, with the generation settings of the checkpoint."""
        return self.end_ids_with({})

    def end_ids_with(self, options: Mapping[str, Any]) -> set[int]:
        """Return the ids that end an answer if :meth:`generate` is called with these options."""
        if self.family.rewritten:
            return {self.model.config.text_config.sep_token_id}
        return end_ids_of(self.model, options)

    def prepare(
        self,
        images: Iterable[ImageLike | Iterable[ImageLike]],
        questions: Iterable[str | Chat | Messages],
        *,
        system: str | None = None,
        videos: Iterable[Video | Iterable[Video]] | None = None,
        processor_options: Mapping[str, Any] | None = None,
    ) -> tuple[dict[str, Any], list[Prompt]]:
        """Return the model inputs for a batch, and the labelled positions of each sample.

        Args:
            images: For each sample, its image or its images in order.
            questions: The question of each sample. It is put into the chat template, after its
                images and videos, or with its placeholders where it has them. A question with
                placeholders that was rendered by a chat template before is the whole prompt. It
                may be empty if a decoder starts from its start token alone, and must be empty if
                the model takes no text or is a vision model. Messages (see :mod:`.chats`) are put
                into the chat template too; they must not end with the assistant's.
            system: A system message, for the chat template.
            videos: For each sample, its video or its videos in order.
            processor_options: Options of the image and video processor, such as ``max_pixels``.

        Raises:
            GeometryError: The processor's ids do not match the prompt and the family's rule, or the
                family has no rule for videos.
            InputError: A question is empty, an image or video cannot be read, the processor has no
                chat template or its template drops videos, a system message cannot be added, or
                the numbers of placeholders and images differ.
        """
        if processor_options:
            prepared = self.with_options(processor_options).prepare(
                images, questions, system=system, videos=videos
            )
            if self.family.language:
                object.__setattr__(self, "_prepared", (prompt_ids(prepared[0]), prepared[1]))
            return prepared
        questions = as_list(questions, "questions")
        pictures = [one_or_several(of) for of in as_list(images, "images")]
        clips = [one_or_several(of) for of in ([] if videos is None else as_list(videos, "videos"))]
        clips = clips or [[]] * len(pictures)
        asked: list[str | Chat] = []
        for i, question in enumerate(questions):
            if isinstance(question, str):
                string(question, "A prompt")
                asked.append(question)
                continue
            chat, pictures[i], clips[i] = self.read_chat(question, pictures[i], clips[i])
            if chat.answer is not None:
                raise InputError(
                    f"The messages end with the assistant's {chat.answer!r}, which is an answer "
                    "and no part of a prompt. Leave it out here, or pass the messages to "
                    "xi.capture."
                )
            asked.append(chat)
        background = processor_calls.composite_of(self.processor)
        opened = [tuple(open_image(image, background) for image in of) for of in pictures]
        shown = [tuple(open_video(video) for video in of) for of in clips]
        if flat(shown) and self.family.video is None:
            raise GeometryError(
                f"The model type {self.family.model_type!r} has no rule that places video tokens. "
                "Pass a family record with one, or record the attention with xi.record(model)."
            )
        if not self.family.language:
            inputs, labelled_prompts = vision_inputs.prepared(self, opened, asked)
            return self._moved(inputs), labelled_prompts
        prompts = [
            rendered(self, question, len(of), len(clips), system=system)
            for question, of, clips in zip(asked, opened, shown, strict=True)
        ]
        plain = [each.question if isinstance(each, Chat) else each for each in asked]
        inputs, replacements = processor_calls.processed(self, plain, prompts, opened, shown)
        grids = self._grids(inputs, opened)
        video_grids = self._applied(self.family.video, inputs, shown)
        begun = with_start(self.model, inputs, len(prompts))
        self._check_ids(begun, len(prompts))
        labelled_prompts = [
            labelled(
                self,
                Unlabelled(
                    question=question,
                    images=opened[i],
                    videos=shown[i],
                    prompt=prompts[i],
                    replacements=replacements[i],
                    grids=grids[i],
                    video_grids=video_grids[i],
                    row=input_row(self.family, begun, i, grids[i]),
                ),
            )
            for i, question in enumerate(plain)
        ]
        if self.family.rewritten:
            begun = as_generated(self.model.config, begun)
        inputs = self._moved(begun)
        object.__setattr__(self, "_prepared", (prompt_ids(inputs), labelled_prompts))
        return inputs, labelled_prompts

    def read_chat(
        self, given: Any, images: Sequence[ImageLike] = (), videos: Sequence[Video] = ()
    ) -> tuple[Chat, list[ImageLike], list[Video]]:
        """Return the chat of some messages, and its images and videos (see :mod:`.chats`)."""
        return read_chat(given, images, videos, placeholders=self.placeholders)

    def with_options(self, options: Mapping[str, Any] | None) -> VLM:
        """Return a VLM whose processor has further ``processor_options``."""
        added = checked_options(options)
        if not added:
            return self
        return replace(self, processor_options={**self.processor_options, **added})

    def prompts_of(self, ids: torch.Tensor) -> list[Prompt] | None:
        """Return the prompts that :meth:`prepare` labelled last, if their ids are these.

        Args:
            ids: ``[sample, position]``, as passed to the model; generated ids may follow.
        """
        known, prompts = getattr(self, "_prepared", (None, None))
        if known is None or len(known) != len(ids) or ids.shape[1] < known.shape[1]:
            return None
        same = torch.equal(ids[:, : known.shape[1]], known.to(ids))
        return prompts if same else None

    @property
    def runs_alone(self) -> bool:
        """Whether padding changes the results, so that samples are run one by one."""
        if not self.family.language:
            return not vision_inputs.fixes_size(self.processor)
        text = self.model.config.get_text_config(decoder=True)
        return (
            self.family.alone is not None or getattr(text, "model_type", None) in TEXT_MODELS_ALONE
        )

    def batches(
        self,
        images: Sequence[Sequence[ImageLike]],
        options: Mapping[str, Any] | None = None,
    ) -> list[list[int]]:
        """Split samples into batches in which padding does not change the results.

        For most model types, all samples share one batch. If text attends to images by
        cross-attention, or the processor puts images before the prompt, the images of a sample are
        padded to the largest number of images, so only samples with equal numbers share a batch.
        If answers may end at a string or another criterion, each sample is a batch, because padding
        after such an answer cannot be distinguished from it.

        Args:
            images: For each sample, its images.
            options: Arguments of :meth:`generate`; None if nothing is generated.

        Returns:
            The indices of the samples of each batch.
        """
        if self.runs_alone or (options is not None and ends_by_text(self.model, options)):
            return [[index] for index in range(len(images))]
        by_count = not self.family.in_sequence or self.family.in_front
        groups: dict[int, list[int]] = {}
        for index, of_sample in enumerate(images):
            groups.setdefault(len(of_sample) if by_count else 0, []).append(index)
        return list(groups.values())

    def generate(self, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
        """Return token ids of prompt and answer, ``[sample, position]``; greedy by default.

        Modules in training mode are in evaluation mode for the call, with a warning.

        Raises:
            InputError: The options select a decoding method other than greedy decoding or sampling.
        """
        check_decoding(self.model, options)
        given = for_generate(inputs) if self.family.rewritten else inputs
        before = _generating.get()
        try:  # an interrupt can be between a call and the assignment of its result
            _generating.set((self, inputs))
            with evaluation_mode(self.model):
                output = self.model.generate(**given, **arguments_of(options))
        finally:
            _generating.set(before)
        return cast("torch.Tensor", output)

    @property
    def generating(self) -> Mapping[str, Any] | None:
        """Return the inputs of the :meth:`generate` call that is running in this thread or task."""
        vlm, inputs = _generating.get()
        return inputs if vlm is self else None

    def run(self, inputs: dict[str, Any], **options: Any) -> Any:
        """Return the output of one forward without a cache.

        Modules in training mode are in evaluation mode for the call, with a warning.

        Args:
            inputs: The inputs that ``prepare`` returned.
            **options: Further arguments of the model's forward.
        """
        if self.family.language:
            options = {"use_cache": False, **options}
        with evaluation_mode(self.model):
            return self.model(**inputs, **options)

    @property
    def placeholder(self) -> str | None:
        """The placeholder of an image in a prompt; None if images have no placeholder."""
        if self.family.placeholder is None:
            return self.family.image_mark
        token = getattr(self.processor, self.family.placeholder, None)
        token_id = self.family.image_token_id(self.model.config)
        if token is None and token_id is not None:
            token = self.tokenizer.convert_ids_to_tokens(token_id)
        return None if token is None else str(getattr(token, "content", token))

    @property
    def video_placeholder(self) -> str | None:
        """The placeholder of a video in a prompt; None if the family has no rule for videos."""
        if self.family.video is None:
            return None
        token = getattr(self.processor, "video_token", None)
        return None if token is None else str(getattr(token, "content", token))

    @property
    def placeholders(self) -> tuple[str | None, str | None]:
        """The placeholders of an image and of a video in a prompt; None if there is none."""
        return self.placeholder, self.video_placeholder

    def _check_ids(self, inputs: Mapping[str, Any], n_prompts: int) -> None:
        """Raise InputError unless the processor returned one row of token ids per prompt."""
        ids = prompt_ids(inputs)
        if ids is None:
            raise InputError(
                f"{type(self.processor).__name__} returned no token ids of the prompt, only "
                f"{', '.join(inputs)}. Record the attention with xi.record(model)."
            )
        if len(ids) != n_prompts:
            raise InputError(
                f"{type(self.processor).__name__} returned {len(ids)} rows of token ids for "
                f"{n_prompts} prompts. Record the attention with xi.record(model)."
            )

    def _grids(
        self, inputs: Any, opened: Sequence[tuple[Image.Image, ...]]
    ) -> list[tuple[ImageGrid, ...] | None]:
        """Return the grids of each sample's images; None if the family has no rule."""
        if self.family.geometry is None and flat(opened):
            return [None] * len(opened)
        placed = self._applied(self.family.geometry, inputs, opened)
        reason = self.family.reason
        return [tuple(replace(grid, reason=grid.reason or reason) for grid in of) for of in placed]

    def _applied(
        self, rule: Any, inputs: Any, visuals: Sequence[tuple[Any, ...]]
    ) -> list[tuple[Any, ...]]:
        """Return the grids that a rule gives for the images, or videos, of each sample."""
        every = flat(visuals)
        grids: Iterator[Any] = iter(())
        if rule is not None and every:
            config = self.model.config
            grids = iter(geometry.applied(rule, self.processor, config, inputs, every))
        return [
            tuple(in_original_pixels(next(grids), original_size(each)) for each in of_sample)
            for of_sample in visuals
        ]

    def _moved(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Move inputs to the model's device, and cast pixels to its dtype."""
        device, moved = input_device(self.model), dict(inputs)
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                pixels = "pixel_values" in name or name.startswith("image_patches")
                cast_to = self.model.dtype if pixels and value.is_floating_point() else None
                moved[name] = value.to(device, cast_to)
        return moved


def check_vlm(vlm: Any) -> None:
    """Raise InputError if the argument is not a VLM, such as a model without its processor."""
    if not isinstance(vlm, VLM):
        raise InputError(
            f"vlm must be a VLM; got an object of {type(vlm).__name__}. Use xi.load(name) or "
            "xi.VLM(model, processor)."
        )
