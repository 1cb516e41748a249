"""The vision tower's patches, and how many of them give one token."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from xmodal_interp.errors import GeometryError


def patch_side(config: Any, processor: Any = None) -> int:
    """The side of the vision tower's square patches, px.

    Towers of timm don't say in their configuration; there the processor does.
    """
    vision = vision_of(config)
    side = vision.patch_size if hasattr(vision, "patch_size") else processor.patch_size
    return int(side[0] if isinstance(side, (list, tuple)) else side)


def block_of(config: Any, merge: str | int, rows: int, cols: int) -> int:
    """The side of the square of patches that gives one token.

    Of encoder-decoder models, the encoder's configuration says so.

    Raises:
        GeometryError: The configuration gives a number of tokens that no square leads to.
    """
    if isinstance(merge, int):
        return merge
    value = attrgetter(merge)(getattr(config, "encoder", None) or config)
    if merge.endswith(("length", "tokens", "tokens_per_image")):
        return block_side(rows, cols, int(value))
    return round(1 / value) if value < 1 else int(value)


def block_side(rows: int, cols: int, n_tokens: int) -> int:
    """The side of the square blocks by which rows x cols patches give so many tokens.

    Raises:
        GeometryError: No side divides both and gives this number.
    """
    for side in range(1, min(rows, cols) + 1):
        divides = rows % side == 0 and cols % side == 0
        if divides and (rows // side) * (cols // side) == n_tokens:
            return side
    raise GeometryError(
        f"Square blocks of patches must give the image's tokens. {rows} x {cols} patches cannot "
        f"give {n_tokens} tokens."
    )


def vision_of(config: Any) -> Any:
    """The configuration of the vision tower.

    That of an encoder-decoder model is in the encoder's, or is the encoder's own; that of a model
    with a vision-language model inside is in the inner one's.
    """
    encoder = getattr(config, "encoder", None)
    owners = (config, encoder, getattr(config, "vlm_config", None))
    found = (getattr(owner, "vision_config", None) for owner in owners)
    return next((vision for vision in found if vision is not None), encoder)
