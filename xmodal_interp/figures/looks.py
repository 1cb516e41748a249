"""Drawing options that all overlays share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
from jaxtyping import Bool

from xmodal_interp.analysis.sinks import sink_keys
from xmodal_interp.attention import AttentionCall, Positions, resolve
from xmodal_interp.errors import InputError
from xmodal_interp.figures.drawing import DARK, LIGHT
from xmodal_interp.figures.placement import Boxes, Place
from xmodal_interp.figures.scales import Scale, Show, check_show, scale_of


class MapOptions(TypedDict, total=False):
    """Keyword arguments of every figure on an image; see ``Look``."""

    hide: Positions | Literal["sinks"] | None
    boxes: Boxes | None
    smooth: bool
    vmax: float | None
    power: float


class Options(MapOptions, total=False):
    """Keyword arguments of every overlay; see ``Look``."""

    show: Show


@dataclass(frozen=True)
class Look:
    """How an overlay is drawn.

    Attributes:
        show: ``"probability"``; ``"share"``, probability divided by the total on the image; or
            ``"lift"``, probability divided by uniform attention over the visible keys.
        hide: Tokens to exclude from the colour scale and mark with a cross: positions, or
            ``"sinks"`` for those that ``attention_sinks`` finds in any of the drawn heads.
        boxes: Boxes ``(x0, y0, x1, y1)`` in pixels to outline, such as an object's true box; a
            mapping gives them names.
        smooth: Interpolate between tokens (bilinear); otherwise each token is one cell.
        vmax: Upper end of the colour scale; the largest value if not given.
        power: Exponent of the colour scale for probabilities and shares: 1 is linear, 0 is a log
            scale. The default, the square root, keeps weak attention visible next to strong.
    """

    show: Show = "probability"
    hide: Positions | Literal["sinks"] | None = None
    boxes: Boxes | None = None
    smooth: bool = False
    vmax: float | None = None
    power: float = 0.5

    def __post_init__(self) -> None:
        check_show(self.show)

    def left_out(
        self, place: Place, call: AttentionCall | None = None, heads: Positions | None = None
    ) -> Bool[np.ndarray, " token"] | None:
        """Return True on the image tokens that ``hide`` excludes, or None if ``hide`` is None.

        Args:
            place: The image.
            call: Attention call in which sinks are searched; required for ``hide="sinks"``.
            heads: Heads in which sinks are searched; all if not given.

        Raises:
            InputError: ``hide`` holds positions that are not tokens of this image, or is
                ``"sinks"`` without a call.
        """
        if self.hide is None:
            return None
        if isinstance(self.hide, str):
            if self.hide != "sinks" or call is None:
                allowed = "positions" if call is None else "'sinks' or positions"
                raise InputError(f"hide must be {allowed}; got {self.hide!r}.")
            chosen_heads = resolve(slice(None) if heads is None else heads, call.n_heads, "head")
            rows = call.query_positions.cpu()
            if place.present is not None:
                rows = rows[place.present[rows.numpy()]]
            found = sink_keys(call, chosen_heads.tolist(), rows).any(0).numpy()
            return np.asarray(found[place.keys], dtype=bool)
        chosen = resolve(self.hide, int(place.keys.max()) + 1, "position").numpy()
        strangers = sorted(set(chosen.tolist()) - set(place.keys.tolist()))
        if strangers:
            raise InputError(
                f"hide holds positions that are not tokens of image {place.number}: "
                f"{', '.join(map(str, strangers[:6]))}. Its tokens are among the positions "
                f"{place.keys.min()} to {place.keys.max()}."
            )
        return np.isin(place.keys, chosen)

    def scale(self, panels: Iterable[np.ndarray]) -> Scale:
        """Return one colour scale for all panels, with the transparency of an overlay."""
        return self.over_image(scale_of(self.show, panels, vmax=self.vmax, power=self.power))

    def over_image(self, scale: Scale) -> Scale:
        """Return the scale with the transparency of an overlay."""
        return scale.over(LIGHT if scale.diverging else DARK)
