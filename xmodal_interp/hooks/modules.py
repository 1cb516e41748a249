"""Which modules of a model are attention, and what each is called: tower, kind, layer.

An attention module is the innermost module that is recognised as one by

1. the name of its class (``Attention``, ``Attn``), or
2. the code of its class: it calls ``scaled_dot_product_attention`` or transformers' attention
   interface, or
3. the name of its attribute (``attn``, ``attention``), where the code of its class calls a softmax.

Its tower follows from what the sub-models that it is in read: their configuration is the vision,
audio, connector, text or another part of the model's configuration; their class declares the
modality of its inputs; or they are the encoder or decoder of a model whose forward takes an input
for each. Where none of these tells, the names on the way to the module do. Its layer is the index
of its block, counted through the tower and kind in the order of ``named_modules``. Attention whose
scores compare channels, not positions, is a separate kind.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from xmodal_interp.errors import InputError, UnsupportedModelError
from xmodal_interp.models import VLM
from xmodal_interp.models.streams import READS, declared_tower, known_stream

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
    r"|LightningAttention|RwkvSelfAttention|LinearSelfAttention|AdditiveAttention|LambdaLayer"
    r"|FactorAttn"  # a softmax over the tokens of each channel
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
_VISION_CLASS = re.compile(r"Vision(Model|Transformer|Encoder|Backbone)")
_AUDIO = re.compile(r"audio|speech", re.IGNORECASE)
_TEXT = re.compile(r"text|lang", re.IGNORECASE)


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
        isinstance(module, nn.MultiheadAttention)
        or bool(_ATTENTION.search(kind.__name__))
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
        """By what the sub-models that it is in read; then by name."""
        owners = sorted((p for p in self.parts if _is_in(path, p)), key=len, reverse=True)
        known = known_stream(self._holders(path))
        if known is not None:
            return known
        if _CONNECTOR.search(path[len(owners[0]) :] if owners else path):
            return "connector"
        for owner in owners:
            tower = self._by_config(owner)
            if tower is not None:
                return tower
        names = self._names(path, owners)
        if _CONNECTOR.search(names):
            return "connector"
        reads = (
            *(declared_tower(self.model.get_submodule(o), own=True) for o in owners[:-1]),
            self._by_stack(path, owners),
            *(declared_tower(self.model.get_submodule(o)) for o in owners),
        )
        found = next((tower for tower in reads if tower is not None), None)
        return self._by_name(names, owners) if found is None else found

    def _holders(self, path: str) -> Iterator[tuple[nn.Module, str]]:
        """Every module that one is in, itself first, with its path inside of it."""
        parts = path.split(".")
        for n in reversed(range(len(parts) + 1)):
            yield self.model.get_submodule(".".join(parts[:n])), ".".join(parts[n:])

    def _by_config(self, owner: str) -> Tower | None:
        """By the part that a sub-model's configuration is of one that it is in."""
        config = self.parts[owner]
        around = sorted((p for p in self.parts if p != owner and _is_in(owner, p)), key=len)
        for whole in (*(self.parts[p] for p in reversed(around)), self.root):
            for attribute, tower in _PARTS:
                part = getattr(whole, attribute, None)
                if part is None or type(config) is not type(part) or type(config) is type(whole):
                    continue
                if attribute != "encoder":
                    return tower
                if not hasattr(part, "text_config"):  # else it is mixed: its parts have names
                    return declared_tower(self.model.get_submodule(owner)) or "language"
        return None

    def _by_stack(self, path: str, owners: Sequence[str]) -> Tower | None:
        """By the inputs of the outermost model whose forward takes one for its decoder."""
        module = self.model.get_submodule(path)
        for owner in reversed(owners):
            model: Any = self.model.get_submodule(owner)
            takes = inspect.signature(model.forward).parameters
            written = next((_DECODED[name] for name in _DECODED if name in takes), None)
            if written is None:
                continue
            for stack, tower in (
                (model.get_encoder(), READS.get(str(model.main_input_name), "language")),
                (model.get_decoder(), written),
            ):
                if stack is not None and stack is not model and module in set(stack.modules()):
                    return tower
            return None
        return None

    def _names(self, path: str, owners: Sequence[str]) -> str:
        """The path without the names that whole models have in their heads' classes."""
        parts = path.split(".")
        for owner in owners:
            at = len(owner.split(".")) if owner else 0
            prefix = getattr(self.model.get_submodule(owner), "base_model_prefix", "")
            if prefix and at < len(parts) and parts[at] == prefix:
                parts[at] = ""
        return ".".join(parts)

    def _by_name(self, names: str, owners: Sequence[str]) -> Tower:
        """By the names on the way; the rest is of what the whole model reads first."""
        if _AUDIO.search(names):
            return "audio"
        if _TEXT.search(names.rpartition(".")[0]):
            return "language"
        innermost = type(self.model.get_submodule(owners[0])).__name__ if owners else ""
        if _VISION.search(names) or _VISION_CLASS.search(innermost):
            return "vision"
        if not owners:
            return self._by_first_layer()
        whole: Any = self.model.get_submodule(owners[-1])
        reads_text = whole.main_input_name == "input_ids" or whole.can_generate()
        return "language" if reads_text else READS.get(str(whole.main_input_name), "language")

    def _by_first_layer(self) -> Tower:
        """What a model of another library reads: tokens by an embedding, else by a convolution."""
        kinds = {type(module) for module in self.model.modules()}
        if nn.Embedding in kinds or not kinds & {nn.Conv1d, nn.Conv2d, nn.Conv3d}:
            return "language"
        return "vision" if kinds & {nn.Conv2d, nn.Conv3d} else "audio"

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
    ("video_config", "vision"),
    ("audio_config", "audio"),
    ("protein_encoder_config", "other"),
    ("qformer_config", "connector"),
    ("perceiver_config", "connector"),
    ("text_config", "language"),
    ("text_encoder", "language"),
    ("audio_encoder", "audio"),
    ("encoder", "vision"),  # or what it reads, if it is of another kind
    ("decoder", "language"),
)
_DECODED: dict[str, Tower] = {"decoder_input_ids": "language", "decoder_input_values": "audio"}


def _is_in(path: str, owner: str) -> bool:
    return path == owner or path.startswith(f"{owner}.") or owner == ""
