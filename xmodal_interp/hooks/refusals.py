"""What a recording, or an intervention, can't be asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from xmodal_interp.errors import CaptureError, InputError
from xmodal_interp.hooks.modules import Identity
from xmodal_interp.vocabulary import TOWERS, Tower


def refuse_compiled(model: nn.Module) -> None:
    """Raise CaptureError for a model of which all or a part is compiled by ``torch.compile``."""
    for path, module in model.named_modules():
        if isinstance(module, torch._dynamo.eval_frame.OptimizedModule) or getattr(
            module, "_compiled_call_impl", None
        ):
            part = f"{path} ({type(module).__name__}) is" if path else "This model is"
            raise CaptureError(
                "Compiled code runs without asking for its attention functions, so nothing could "
                f"be heard. {part} compiled. Record the model as it was before torch.compile "
                "(model._orig_mod)."
            )


def check_choice(
    towers: Sequence[Tower], layers: Sequence[int] | None, known: Iterable[Identity]
) -> None:
    """Raise InputError for a tower or a layer that there is not."""
    unknown = [tower for tower in towers if tower not in TOWERS]
    if unknown:
        raise InputError(
            f"towers must be among {', '.join(TOWERS)}; got {', '.join(map(repr, unknown))}."
        )
    if layers is not None:
        there = {identity.layer for identity in known if identity.tower in towers}
        missing = sorted(set(layers) - there)
        if missing:
            raise InputError(
                f"layers must exist in the model. Its {' and '.join(towers)} layers are 0 to "
                f"{max(there, default=-1)}; "
                f"got {', '.join(map(str, missing))}."
            )
