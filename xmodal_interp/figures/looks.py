"""The options that all overlays share."""

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
    """Keyword arguments of every figure on an image; they are explained at ``Look``."""

    hide: Positions | Literal["sinks"] | None
    boxes: Boxes | None
    smooth: bool
    vmax: float | None
    power: float


class Options(MapOptions, total=False):
    """Keyword arguments of every overlay; they are explained at ``Look``."""

    show: Show


@dataclass(frozen=True)
class Look:
    """How an overlay is drawn.

    Attributes:
        show: ``"probability"``, ``"share"`` of the attention that the image gets, or ``"lift"``:
            times uniform attention over what is visible.
        hide: Tokens to leave out of colours and scale and to mark with a cross: positions, or
            ``"sinks"``: those that ``attention_sinks`` finds in any of the heads that are shown.
        boxes: Boxes ``(x0, y0, x1, y1)`` in pixels to outline, such as the true place of a thing;
            with names if a mapping.
        smooth: Interpolate between tokens (bilinear); otherwise each token is one cell.
        vmax: Upper end of the colour scale; that of the values if not given.
        power: Colours of probabilities and shares grow with this power of the value: with the
            square root, weak attention shows beside strong; 1 is linear, 0 a log scale.
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
        """Which tokens of an image are left out.

        Args:
            place: The image.
            call: Where sinks are looked for; without one there are none to be found.
            heads: In which heads, all if not given.

        Raises:
            InputError: Positions that are not tokens of this image.
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
                f"hide names tokens of image {place.number}, which are among the positions "
                f"{place.keys.min()} to {place.keys.max()}; got "
                f"{', '.join(map(str, strangers[:6]))}."
            )
        return np.isin(place.keys, chosen)

    def scale(self, panels: Iterable[np.ndarray]) -> Scale:
        """One scale for all panels, in colours that lie over an image."""
        return self.over_image(scale_of(self.show, panels, vmax=self.vmax, power=self.power))

    def over_image(self, scale: Scale) -> Scale:
        """A scale in colours that lie over an image."""
        return scale.over(LIGHT if scale.diverging else DARK)
