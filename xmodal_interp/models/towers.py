"""The tower of a sub-model, from the declarations of its class or from a table.

The classes of transformers declare ``input_modalities`` and ``main_input_name``. A class may
inherit them from the base class of its model type, which declares the inputs of the whole model.
Modules that are not models declare neither; ``UNDECLARED`` lists the few that cannot be identified
otherwise. Most are parts of models that are not image-text-to-text models and have no family
record, so they are listed by class.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from xmodal_interp.vocabulary import Tower

_DECLARED = "input_modalities"
TOWER_OF_INPUT: dict[str, Tower] = {
    "pixel_values": "vision",
    "pixel_values_videos": "vision",
    "flattened_patches": "vision",
    "input_values": "audio",
    "input_features": "audio",
    "spectrogram": "audio",
    "audio_mel": "audio",
    "past_values": "other",
}
"""The tower of a model, by the name of its main input."""
_MODALITIES: dict[str, Tower] = {
    "image": "vision",
    "video": "vision",
    "audio": "audio",
    "text": "language",
    "time": "other",
}
UNDECLARED: dict[str, tuple[tuple[str, Tower], ...]] = {
    # the relation encoder and one side of the cross encoder read detected regions
    "LxmertEncoder": ((r"r_layers\.|x_layers\.\d+\.(visn_self_att|visual_attention)", "vision"),),
    # it upsamples the activations of the vision encoder, conditioned on the text
    "CLIPSegDecoder": ((r"", "vision"),),
    # attention between the frames of a clip
    "XCLIPModel": ((r"mit\.", "vision"),),
    # its encoder is that of T5, and its input is a spectrogram
    "Pop2PianoForConditionalGeneration": ((r"encoder\.", "audio"),),
    # denoises a canvas of tokens, whose positions are not those of the prompt
    "DiffusionGemmaDecoderModel": ((r"", "other"),),
    "Sam3LiteTextTextModel": ((r"", "language"),),
    "PerceiverForMaskedLM": ((r"", "language"),),
}
"""By class name: patterns of module paths inside it, and the tower of the attention there."""


def declared_tower(model: Any, *, own: bool = False) -> Tower | None:
    """Return the tower of a model by the modality that its class declares.

    The declaration of a class overrides those of its parents. The result is None if the class
    declares no modality or several.

    Args:
        model: A model of transformers.
        own: Whether to ignore inherited declarations.
    """
    lineage = type(model).__mro__
    by_name, by_kind = (_declared_by(lineage, name) for name in ("main_input_name", _DECLARED))
    if own and min(by_name, by_kind) > 0:
        return None
    name, general = str(model.main_input_name), lineage.index(PreTrainedModel)
    if by_name < by_kind and by_name < general:
        return "language" if name == "input_ids" else TOWER_OF_INPUT.get(name)
    if by_kind == general:  # the default, which declares nothing
        return TOWER_OF_INPUT.get(name)
    declared = getattr(model, _DECLARED)
    kinds = {_MODALITIES.get(k) for k in ([declared] if isinstance(declared, str) else declared)}
    return kinds.pop() if len(kinds) == 1 else None


def _declared_by(lineage: Sequence[type], attribute: str) -> int:
    """Return the index of the first class of a lineage (MRO) that defines an attribute."""
    return next(n for n, each in enumerate(lineage) if attribute in vars(each))


def undeclared_tower(inside: Iterable[tuple[nn.Module, str]]) -> Tower | None:
    """Return the tower of a module by the classes of the modules that contain it.

    Args:
        inside: Each containing module, with the path of the module inside it.
    """
    for holder, path in inside:
        for pattern, tower in UNDECLARED.get(type(holder).__name__, ()):
            if re.match(pattern, path):
                return tower
    return None
