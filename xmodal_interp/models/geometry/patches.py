"""The patches of the vision tower, and the number of them per token."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from xmodal_interp.errors import GeometryError


def patch_side(config: Any, processor: Any = None) -> int:
    """Return the side of the vision tower's square patches, px.

    The configuration of a timm tower has no patch size; the processor's is used instead.
    """
    vision = vision_of(config)
    side = vision.patch_size if hasattr(vision, "patch_size") else processor.patch_size
    return int(side[0] if isinstance(side, (list, tuple)) else side)


def block_of(config: Any, merge: str | int, rows: int, cols: int) -> int:
    """Return the side of the block of patches that gives one token, in patches.

    For encoder-decoder models it is read from the configuration of the encoder.

    Raises:
        GeometryError: No square block leads to the number of tokens in the configuration.
    """
    if isinstance(merge, int):
        return merge
    value = attrgetter(merge)(getattr(config, "encoder", None) or config)
    if merge.endswith(("length", "tokens", "tokens_per_image")):
        return block_side(rows, cols, int(value))
    return round(1 / value) if value < 1 else int(value)


def block_side(rows: int, cols: int, n_tokens: int) -> int:
    """Return the side of the square blocks that merge rows x cols patches into n_tokens tokens.

    Raises:
        GeometryError: There is no such side.
    """
    for side in range(1, min(rows, cols) + 1):
        divides = rows % side == 0 and cols % side == 0
        if divides and (rows // side) * (cols // side) == n_tokens:
            return side
    raise GeometryError(
        f"No square blocks merge {rows} x {cols} patches into {n_tokens} tokens. Check that "
        "processor and model belong together."
    )


def vision_of(config: Any) -> Any:
    """Return the configuration of the vision tower.

    For an encoder-decoder model it is in the encoder's configuration or is that configuration. For
    a model that contains a vision-language model it is in the inner configuration.
    """
    encoder = getattr(config, "encoder", None)
    owners = (config, encoder, getattr(config, "vlm_config", None))
    found = (getattr(owner, "vision_config", None) for owner in owners)
    return next((vision for vision in found if vision is not None), encoder)
