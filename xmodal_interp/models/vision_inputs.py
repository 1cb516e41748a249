"""Inputs and labelled positions of models without a language model.

A sample of such a model has one image and no prompt. Its positions are those of the vision tower:
class tokens, registers and patches, as the family's rule names and places them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from xmodal_interp.errors import InputError, quoted
from xmodal_interp.models import geometry
from xmodal_interp.models.chats import Chat
from xmodal_interp.models.geometry import ImageGrid
from xmodal_interp.models.labels import Prompt
from xmodal_interp.models.processor_calls import FAILURES
from xmodal_interp.models.token_table import Columns, with_places

if TYPE_CHECKING:
    from xmodal_interp.models.vlm import VLM


@dataclass(frozen=True)
class ImagesOnly:
    """An image processor in the place of a processor, for the geometry rules."""

    image_processor: Any

    @property
    def class_name(self) -> str:
        """The class of the image processor, for messages."""
        return type(self.image_processor).__name__


def image_processor_of(processor: Any) -> Any:
    """Return the image processor of a processor, or the image processor that was passed.

    Raises:
        InputError: There is none.
    """
    found = getattr(processor, "image_processor", processor)
    if not hasattr(found, "preprocess"):
        raise InputError(
            "The processor of a vision model must be an image processor; got "
            f"{type(processor).__name__}. Load it with AutoImageProcessor."
        )
    return found


def prepared(
    vlm: VLM, images: Sequence[tuple[Image.Image, ...]], questions: Sequence[str | Chat]
) -> tuple[dict[str, Any], list[Prompt]]:
    """Return the inputs of a vision model, and the labelled positions of each sample.

    Args:
        vlm: Model, image processor and family record.
        images: The images of each sample.
        questions: The question of each sample, which must be empty.

    Raises:
        InputError: A sample has a question, or another number of images than one, or the processor
            fails on an image.
        GeometryError: The family's rule does not fit the image processor.
    """
    asked = next((question for question in questions if question), None)
    if asked is not None:
        shown = [*asked.messages] if isinstance(asked, Chat) else asked
        raise InputError(
            f"A {vlm.family.model_type} model has no language model; got the prompt "
            f"{quoted(shown)}. Leave the prompt out."
        )
    for of_sample in images:
        if len(of_sample) != 1:
            raise InputError(
                f"A {vlm.family.model_type} model reads one image per sample; got "
                f"{len(of_sample)}. Use xi.capture_batch for several images."
            )
    pictures = [image for (image,) in images]
    try:
        outputs = vlm.processor(images=pictures, return_tensors="pt")
    except FAILURES as error:
        sizes = ", ".join(f"{one.width} x {one.height}" for one in pictures)
        raise InputError(
            f"{type(vlm.processor).__name__} failed on this input: {error} (images of {sizes} px)."
        ) from error
    rule: Any = vlm.family.geometry
    processor = ImagesOnly(vlm.processor)
    grids = geometry.applied(rule, processor, vlm.model.config, outputs, pictures)
    prompts = [
        Prompt("", "", (image,), (grid,), position_columns(grid), None)
        for image, grid in zip(pictures, grids, strict=True)
    ]
    return _read_by(vlm.model, outputs), prompts


def position_columns(grid: ImageGrid) -> Columns:
    """Return columns of the token table for the positions of a vision tower.

    The grid must be that of a vision model, whose tokens are the positions of the tower.
    """
    names = grid.patch_names
    placed = grid.patch_places[:, 0] >= 0
    if names is None:
        names = np.where(placed, "", "special")
    padding = names == geometry.PADDING
    kinds = np.where(placed, "image", np.where(padding, geometry.PADDING, "special"))
    n = len(names)
    bare = {"kind": ["image"] * n, "image": [0] * n, "video": [np.nan] * n}
    return {
        **with_places(bare, [grid]),
        "token": [name or "patch" for name in names.tolist()],
        "kind": kinds.tolist(),
        "role": [None] * n,
        "start": [-1] * n,
        "end": [-1] * n,
    }


def fixes_size(processor: Any) -> bool:
    """Return whether an image processor converts all images to one size, so that none is padded."""
    size = getattr(processor, "size", None) or {}
    sides = size.get("height") is not None and size.get("width") is not None
    return bool(sides or getattr(processor, "do_center_crop", False))


def _read_by(model: Any, outputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors among the outputs of a processor that the model's forward names."""
    names = inspect.signature(model.forward).parameters
    return {
        name: value
        for name, value in outputs.items()
        if isinstance(value, Tensor) and name in names
    }
