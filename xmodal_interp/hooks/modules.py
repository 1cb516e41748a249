"""Which modules of a model are attention, and what each is called: tower, kind, layer.

An attention module is the innermost module whose class is named so. Its tower follows from
ownership: the configuration of the sub-model it sits in is the vision, the text or the connector
part of the model's configuration. Its layer is the index of its block, counted through the tower
and kind in the order of ``named_modules``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from xmodal_interp.errors import UnsupportedModelError

if TYPE_CHECKING:
    from xmodal_interp.vocabulary import AttentionKind, Tower

_ATTENTION = re.compile(r"Attention|Attn")
_WITHOUT_MATRIX = re.compile(
    r"LinearAttention|DeltaNet|Mamba|ShortConv|RepMixer|DeformableAttention|RGLRU|RecurrentBlock"
)
_CROSS = re.compile(r"cross|x_attn|encoder_attn|enc(oder)?_?dec(oder)?", re.IGNORECASE)
_LATENTS = re.compile(r"perceiver|resampler|pooling", re.IGNORECASE)  # their queries are learned
_CONNECTOR = re.compile(
    r"q_?former|perceiver|resampler|connector|projector|projection|abstractor|merger", re.IGNORECASE
)
_VISION = re.compile(r"vision|visual|image|vit|vq_?model", re.IGNORECASE)
_AUDIO = re.compile(r"audio|speech", re.IGNORECASE)


@dataclass(frozen=True)
class Identity:
    """What an attention module is called."""

    module: str
    tower: Tower
    kind: AttentionKind
    layer: int


def attention_modules(model: nn.Module) -> dict[nn.Module, Identity]:
    """Every attention module of a model with its identity, in module order.

    Raises:
        UnsupportedModelError: The model has none.
    """
    found = dict(_innermost(model))
    if not found:
        raise UnsupportedModelError(
            f"To listen to attention, a model needs attention modules. {type(model).__name__} has "
            "no module whose class is "
            "named Attention."
        )
    names = _Names(model)
    return {module: names.identity(path, module) for path, module in found.items()}


def layers_without_matrix(model: nn.Module) -> tuple[Identity, ...]:
    """Layers that mix tokens without a softmax: linear attention, state spaces, convolutions."""
    names = _Names(model)
    found = {p: m for p, m in model.named_modules() if _WITHOUT_MATRIX.search(type(m).__name__)}
    outermost = {
        path: module
        for path, module in found.items()
        if not any(path.startswith(f"{other}.") for other in found)
    }
    return tuple(names.identity(path, module) for path, module in outermost.items())


def identity_of(model: nn.Module, module: nn.Module) -> Identity | None:
    """What a module that proved to be attention is called; None if the model does not have it."""
    path = next((path for path, each in model.named_modules() if each is module), None)
    return None if path is None else _Names(model).identity(path, module)


def block_of(model: nn.Module, identity: Identity) -> nn.Module | None:
    """The block of a layer stack that an attention module is in: ``layers.3``; None if in none."""
    match = re.match(r".*\.\d+(?=\.|$)", identity.module)
    return model.get_submodule(match[0]) if match else None


def _innermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules of attention classes that hold no other.

    Norms and the like inside of them don't count.
    """
    for path, module in model.named_modules():
        if _is_attention(module) and not any(
            _is_attention(m) for m in module.modules() if m is not module
        ):
            yield path, module


def _is_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    return (
        bool(_ATTENTION.search(name))
        and not _WITHOUT_MATRIX.search(name)
        and not isinstance(module, PreTrainedModel)
        and bool(list(module.children()))
    )


class _Names:
    """Numbers the blocks of a model, container by container."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.root = getattr(model, "config", None)
        self.parts: dict[str, Any] = {
            path: module.config
            for path, module in model.named_modules()
            if isinstance(module, PreTrainedModel)
        }
        self.offsets: dict[tuple[Tower, AttentionKind, str], int] = {}
        self.next: dict[tuple[Tower, AttentionKind], int] = {}

    def identity(self, path: str, module: nn.Module) -> Identity:
        tower, kind = self._tower(path), self._kind(path, module)
        match = re.match(r"(.*)\.(\d+)(?:\.|$)", path)
        container, index = (match[1], int(match[2])) if match else (path, 0)
        key = (tower, kind, container)
        if key not in self.offsets:
            self.offsets[key] = self.next.get((tower, kind), 0)
        layer = self.offsets[key] + index
        self.next[tower, kind] = max(self.next.get((tower, kind), 0), layer + 1)
        return Identity(path, tower, kind, layer)

    def _tower(self, path: str) -> Tower:
        """By the innermost sub-model's configuration; then by name.

        A model without a vision part is all language.
        """
        owner = max(
            (p for p in self.parts if path == p or path.startswith(f"{p}.") or p == ""),
            key=len,
            default=None,
        )
        inside = path[len(owner) :] if owner is not None else path
        if _CONNECTOR.search(inside):
            return "connector"
        config = self.root if owner is None else self.parts[owner]
        for attribute, tower in _PARTS:
            part = getattr(self.root, attribute, None)
            mixed = attribute == "encoder" and hasattr(part, "text_config")
            if type(config) is type(part) and config is not self.root and not mixed:
                return tower
        if _CONNECTOR.search(path):
            return "connector"
        if _AUDIO.search(path):
            return "audio"
        if getattr(self.model, "main_input_name", "") == "pixel_values" and not hasattr(
            self.root, "text_config"
        ):
            return "vision"
        return "vision" if _VISION.search(path) else "language"

    def _kind(self, path: str, module: nn.Module) -> AttentionKind:
        """By what it is called within its block, as ``crossattention.self``, ``encoder_attn``.

        Learned queries (of a resampler, of a pooling head) are no tokens: they attend across.
        """
        within = re.sub(r".*\.\d+\.", "", path).split(".")[-2:]
        holder = type(self.model.get_submodule(path.rpartition(".")[0])).__name__
        named = any(_CROSS.search(name) for name in (type(module).__name__, *within))
        latent = _LATENTS.search(f"{path} {type(module).__name__} {holder}")
        says_so = getattr(module, "is_cross_attention", False)
        return "cross" if named or latent or says_so else "self"


_PARTS: tuple[tuple[str, Tower], ...] = (
    ("vision_config", "vision"),
    ("audio_config", "audio"),
    ("protein_encoder_config", "other"),
    ("qformer_config", "connector"),
    ("perceiver_config", "connector"),
    ("text_config", "language"),
    ("encoder", "vision"),
    ("decoder", "language"),
)
