"""What a recording can't be asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np
from torch import nn

from xmodal_interp.attention import number
from xmodal_interp.errors import CaptureError, InputError
from xmodal_interp.hooks.modules import Identity
from xmodal_interp.vocabulary import TOWERS, Tower


def check_choice(
    towers: Sequence[Tower],
    layers: Sequence[SupportsIndex] | np.ndarray | None,
    known: Iterable[Identity],
) -> None:
    """Raise InputError for what is no list, a tower or a layer that there is not."""
    if isinstance(towers, str):
        raise InputError(f"towers is a list, such as ['language']; got {towers!r}.")
    given: Any = layers
    if given is not None and np.ndim(given) == 0:
        raise InputError(f"layers is a list, such as [0, 3]; got {layers!r}.")
    unknown = [tower for tower in towers if tower not in TOWERS]
    if unknown:
        raise InputError(
            f"towers must be among {', '.join(TOWERS)}; got {', '.join(map(repr, unknown))}."
        )
    if layers is not None:
        there = {identity.layer for identity in known if identity.tower in towers}
        missing = sorted({number(layer, "layer") for layer in layers} - there)
        if missing:
            raise InputError(
                f"layers must exist in the model. Its {' and '.join(towers)} layers are 0 to "
                f"{max(there, default=-1)}; "
                f"got {', '.join(map(str, missing))}."
            )


def refuse_replica(module: nn.Module, args: Any) -> None:  # noqa: ARG001
    """Raise CaptureError in a copy that ``nn.DataParallel`` made for one of its devices."""
    if getattr(module, "_is_replica", False):
        raise CaptureError(
            "A recording hears one model in one thread. nn.DataParallel runs copies of it in "
            "threads of their own. Record the model itself (parallel.module), or one process per "
            "device."
        )
