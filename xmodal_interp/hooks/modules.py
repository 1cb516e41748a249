"""Which modules of a model are attention, and what each is called: tower, kind, layer.

An attention module is the innermost module that is recognised as one by

1. the name of its class (``Attention``, ``Attn``), or
2. the code of its class: it calls ``scaled_dot_product_attention`` or transformers' attention
   interface, or
3. the name of its attribute (``attn``, ``attention``), where the code of its class calls a softmax.

Its tower follows from ownership: the configuration of the sub-model it sits in is the vision,
audio, connector, text or another part of the model's configuration. Where it is none of these, the
names on the way to the module say which tower it is of. Its layer is the index of its block,
counted through the tower and kind in the order of ``named_modules``. Attention whose
scores compare channels, not positions, is a separate kind.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from types import FunctionType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from xmodal_interp.errors import InputError, UnsupportedModelError
from xmodal_interp.models import VLM

if TYPE_CHECKING:
    from xmodal_interp.vocabulary import AttentionKind, Tower

_ATTENTION = re.compile(r"Attention|Attn")
_NO_ATTENTION = re.compile(  # what is before and after one, mixtures of states of earlier layers
    r"AttentionOutput$|Attention\w*Projection$|AttentionResidual|Attention\w*Bias$"
)
_NAMED = re.compile(r"(^|\.)(\w*_)?(attn|attention)(\.\d+)?$")  # also in a ModuleList
_CALLS = {  # by what the code of an attention module calls
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "ALL_ATTENTION_FUNCTIONS",
}
_WITHOUT_MATRIX = re.compile(
    r"LinearAttention|DeltaNet|Mamba|ShortConv|RepMixer|DeformableAttention|RGLRU|RecurrentBlock"
    r"|LightningAttention|RwkvSelfAttention"
    r"|AssignAttention"  # each key chooses among the queries
)
_CHANNELS = re.compile(r"Channel|(^|_)XCA|CrossCovariance|(^|\.)xca(\.|$)")
_CROSS = re.compile(r"cross|x_attn|encoder_attn|enc(oder)?_?dec(oder)?", re.IGNORECASE)
_LATENTS = re.compile(  # their queries are learned, or one for all positions
    r"perceiver|resampler|pooling|(attn|attention|attentional)_?pool", re.IGNORECASE
)
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
            f"{type(model).__name__} has no module with softmax attention: no class is named "
            "Attention or calls scaled_dot_product_attention, and no module named attn calls a "
            "softmax. Record a model that has some."
        )
    identities = _Names(model).identities(found)
    return {module: identities[path] for path, module in found.items()}


def attention_holders(
    model: nn.Module, known: Mapping[nn.Module, Identity]
) -> dict[nn.Module, Identity]:
    """Modules of attention classes that hold others, with the identity of the first they hold."""
    holders: dict[nn.Module, Identity] = {}
    for module, identity in known.items():
        parts = identity.module.split(".")
        for path in (".".join(parts[:n]) for n in range(len(parts))):
            holder = model.get_submodule(path)
            if holder is not module and holder not in holders and _is_attention(holder, path):
                holders[holder] = replace(identity, module=path)
    return holders


def module_of(model: Any) -> nn.Module:
    """The module of a VLM, or a module itself.

    Raises:
        InputError: Something else.
    """
    bare = model.model if isinstance(model, VLM) else model
    if not isinstance(bare, nn.Module):
        raise InputError(
            "A model is a VLM or a module of torch, such as xi.load(name) or from_pretrained give; "
            f"got an object of {type(bare).__name__}."
        )
    return bare


def weighs_no_tokens(module: nn.Module) -> bool:
    """Whether a module's class says that what it weighs is something else, such as earlier states.

    Some do so by functions that are made for attention.
    """
    name = type(module).__name__
    return bool(_NO_ATTENTION.search(name) or _WITHOUT_MATRIX.search(name))


def layers_without_matrix(model: nn.Module) -> tuple[Identity, ...]:
    """Layers that mix tokens without a softmax over keys.

    Linear attention, state spaces, convolutions, assignment to groups.
    """
    found = {p: m for p, m in model.named_modules() if _WITHOUT_MATRIX.search(type(m).__name__)}
    outermost = {
        path: module
        for path, module in found.items()
        if not any(path.startswith(f"{other}.") for other in found)
    }
    return tuple(_Names(model).identities(outermost).values())


def identity_of(
    model: nn.Module, module: nn.Module, known: Collection[Identity]
) -> Identity | None:
    """What a module that proved to be attention is called; None if the model does not have it.

    Its layer is counted behind the known ones, if there is one of its number already.
    """
    path = next((path for path, each in model.named_modules() if each is module), None)
    if path is None:
        return None
    alone = _Names(model).identities({path: module})[path]
    layers = {each.layer for each in known if (each.tower, each.kind) == (alone.tower, alone.kind)}
    return replace(alone, layer=max(layers) + 1) if alone.layer in layers else alone


def block_of(model: nn.Module, identity: Identity) -> nn.Module | None:
    """The block of a layer stack that an attention module is in: ``layers.3``; None if in none."""
    match = re.match(r".*\.\d+(?=\.|$)", identity.module)
    return model.get_submodule(match[0]) if match else None


def _innermost(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Attention modules that contain no other one; norms and the like inside them don't count."""
    found = {path: m for path, m in model.named_modules() if _is_attention(m, path)}
    outer = {module for path, module in found.items() for module in _around(found, path)}
    yield from ((path, module) for path, module in found.items() if module not in outer)


def _around(found: Mapping[str, nn.Module], path: str) -> Iterator[nn.Module]:
    """The modules among ``found`` that contain the module at a path."""
    parts = path.split(".") if path else []
    for n in range(len(parts)):
        outer = ".".join(parts[:n])
        if outer in found:
            yield found[outer]


def _is_attention(module: nn.Module, path: str) -> bool:
    kind = type(module)
    if weighs_no_tokens(module) or isinstance(module, PreTrainedModel):
        return False
    if next(module.children(), None) is None:
        return False
    return (
        bool(_ATTENTION.search(kind.__name__))
        or not _CALLS.isdisjoint(_names_in_code(kind))
        or (bool(_NAMED.search(path)) and _calls_a_softmax(module))
    )


def _calls_a_softmax(module: nn.Module) -> bool:
    layers = any(isinstance(each, nn.Softmax) for each in module.children())
    return layers or "softmax" in _names_in_code(type(module))


def _names_in_code(kind: type[nn.Module]) -> frozenset[str]:
    """The names that the methods of a module's class use, those of torch's own classes left out."""
    known = _NAMES_IN_CODE.get(kind)
    if known is not None:
        return known
    methods = [
        method
        for each in kind.__mro__
        if issubclass(each, nn.Module) and not each.__module__.startswith("torch.")
        for method in vars(each).values()
    ]
    codes = [m.__code__ for m in methods if isinstance(m, FunctionType)]
    found = _NAMES_IN_CODE[kind] = frozenset(name for code in codes for name in code.co_names)
    return found


_NAMES_IN_CODE: WeakKeyDictionary[type[nn.Module], frozenset[str]] = WeakKeyDictionary()


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

    def identities(self, found: Mapping[str, nn.Module]) -> dict[str, Identity]:
        """Block by block; where one block has several modules of a kind, each is a layer."""
        places = {path: self._place(path, module) for path, module in found.items()}
        per_block: dict[tuple[Any, ...], int] = {}
        for place, count in Counter(places.values()).items():
            per_block[place[:3]] = max(per_block.get(place[:3], 1), count)
        offsets: dict[tuple[Any, ...], int] = {}
        ends: dict[tuple[Any, ...], int] = {}
        ranks: Counter[tuple[Any, ...]] = Counter()
        identities = {}
        for path, place in places.items():
            tower, kind, _, index = place
            offset = offsets.setdefault(place[:3], ends.get((tower, kind), 0))
            layer = offset + index * per_block[place[:3]] + ranks[place]
            ranks[place] += 1
            ends[tower, kind] = max(ends.get((tower, kind), 0), layer + 1)
            identities[path] = Identity(path, tower, kind, layer)
        return identities

    def _place(self, path: str, module: nn.Module) -> tuple[Tower, AttentionKind, str, int]:
        """Tower, kind, container of blocks, and which of its blocks."""
        match = re.match(r"(.*)\.(\d+)(?:\.|$)", path)
        container, index = (match[1], int(match[2])) if match else (path, 0)
        return self._tower(path), self._kind(path, module), container, index

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
            if type(config) is not type(part) or config is self.root:
                continue
            if attribute != "encoder":
                return tower
            if not hasattr(part, "text_config"):  # else it is mixed: its parts have names
                return self._encoder_tower(owner)
        if _CONNECTOR.search(path):
            return "connector"
        if _AUDIO.search(path):
            return "audio"
        if getattr(self.model, "main_input_name", "") == "pixel_values" and not hasattr(
            self.root, "text_config"
        ):
            return "vision"
        return "vision" if _VISION.search(path) else "language"

    def _encoder_tower(self, owner: str | None) -> Tower:
        """By what the encoder of an encoder-decoder reads; its decoder is of the language."""
        reads = getattr(self.model.get_submodule(owner or ""), "main_input_name", "")
        return _READS.get(reads, "language")

    def _kind(self, path: str, module: nn.Module) -> AttentionKind:
        """By what it is called within its block, as ``crossattention.self``, ``encoder_attn``.

        Learned queries (of a resampler, of a pooling head) are no tokens: they attend across.
        """
        if _CHANNELS.search(type(module).__name__) or _CHANNELS.search(path.rpartition(".")[2]):
            return "channel"
        within = re.sub(r".*\.\d+\.", "", path).split(".")[-2:]
        holder = type(self.model.get_submodule(path.rpartition(".")[0])).__name__
        named = any(_CROSS.search(name) for name in (type(module).__name__, holder, *within))
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
    ("encoder", "vision"),  # or what it reads, if it is of another kind
    ("decoder", "language"),
)
_READS: dict[str, Tower] = {
    "pixel_values": "vision",
    "input_values": "audio",
    "input_features": "audio",
}
