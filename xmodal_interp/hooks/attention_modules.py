"""Find the attention modules of a model, and the tower, kind and layer of each.

An attention module is the innermost module that is recognised by

1. the name of its class (``Attention``, ``Attn``), or
2. the code of its class: it calls ``scaled_dot_product_attention`` or transformers' attention
   interface, or
3. the name of its attribute (``attn``, ``attention``), if the code of its class calls a softmax.

The tower is given by the first of these that applies:

1. the table ``UNDECLARED`` in :mod:`xmodal_interp.models.towers`, which lists classes;
2. a name of a connector (``qformer``, ``projector``) in the path below the innermost sub-model;
3. the configuration of a sub-model around the module, if it is the vision, audio, connector, text
   or another part of the model's configuration;
4. a name of a connector in the rest of the path;
5. the modality of the inputs that the class of such a sub-model declares, or whether the module is
   in the encoder or the decoder of a model whose forward takes an input for each;
6. the other names in the path, or the main input of the model.

Layers are numbered within each tower and kind, block by block, in the order of ``named_modules``.
Attention whose scores compare channels, not positions, has the kind ``channel``.

:func:`checked_heads` and :func:`layers_of` look up layers and heads that a user names.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from xmodal_interp.attention import entries_of, layer_index, number, numbers
from xmodal_interp.errors import InputError, LayerError, UnsupportedModelError
from xmodal_interp.models import VLM
from xmodal_interp.models.model_parts import ModelParts, parts_of
from xmodal_interp.models.towers import TOWER_OF_INPUT, declared_tower, undeclared_tower
from xmodal_interp.vocabulary import AttentionKind, Tower

_ATTENTION = re.compile(r"Attention|Attn")
_NO_ATTENTION = re.compile(  # parts of attention blocks; attention over states of earlier layers
    r"AttentionOutput$|Attention\w*Projection$|AttentionResidual|Attention\w*Bias$"
)
_ATTENTION_ATTRIBUTE = re.compile(r"(^|\.)(\w*_)?(attn|attention)(\.\d+)?$")  # also in a ModuleList
_ATTENTION_CALLS = {  # names in the code of attention modules
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "ALL_ATTENTION_FUNCTIONS",
}
_WITHOUT_MATRIX = re.compile(
    r"LinearAttention|DeltaNet|Mamba|ShortConv|RepMixer|DeformableAttention|RGLRU|RecurrentBlock"
    r"|LightningAttention|RwkvSelfAttention|LinearSelfAttention|AdditiveAttention|LambdaLayer"
    r"|FactorAttn"  # a softmax over the tokens of each channel
    r"|AssignAttention"  # softmax over the queries, for each key
)
_CHANNELS = re.compile(r"Channel|(^|_)XCA|CrossCovariance|(^|\.)xca(\.|$)")
_CROSS = re.compile(r"cross|x_attn|encoder_attn|enc(oder)?_?dec(oder)?", re.IGNORECASE)
_LATENTS = re.compile(  # modules with learned queries, or one query for all positions
    r"perceiver|resampler|pooling|(attn|attention|attentional)_?pool", re.IGNORECASE
)
_CONNECTOR = re.compile(
    r"q_?former|perceiver|resampler|connector|projector|projection|abstractor|merger", re.IGNORECASE
)
_VISION = re.compile(r"vision|visual|image|vit|vq_?model", re.IGNORECASE)
_VISION_CLASS = re.compile(r"Vision(Model|Transformer|Encoder|Backbone)")
_AUDIO = re.compile(r"audio|speech", re.IGNORECASE)
_TEXT = re.compile(r"text|lang", re.IGNORECASE)
_MAIN_INPUT, _IS_CROSS = "main_input_name", "is_cross_attention"  # attributes of modules


@dataclass(frozen=True)
class Identity:
    """The identity of an attention module: its path in the model, tower, kind and layer."""

    module: str
    tower: Tower
    kind: AttentionKind
    layer: int


@dataclass(frozen=True)
class Layers:
    """The layers of a model, by the path of their module.

    Attributes:
        identities: Every attention module, in module order.
        holders: Attention modules around these, with the identity of the first one inside.
        without_matrix: Layers that mix tokens without softmax attention.
    """

    identities: dict[str, Identity]
    holders: dict[str, Identity]
    without_matrix: tuple[Identity, ...]


def layers_in(parts: ModelParts) -> Layers:
    """Return the layers of a model; found once, and again if its modules or configurations change.

    Raises:
        UnsupportedModelError: The model has no module with softmax attention.
    """
    layers = parts.remembered(_layers, _declarations(parts))
    if not layers.identities:
        raise UnsupportedModelError(
            f"{type(parts.model).__name__} has no module with softmax attention: no class is named "
            "Attention or calls scaled_dot_product_attention, and no module named attn calls a "
            "softmax. Pass a model that has one."
        )
    return layers


def _layers(parts: ModelParts) -> Layers:
    found = dict(_innermost(parts.modules))
    identities = _IdentityFinder(parts.model).identities(found) if found else {}
    holders = _holders(parts.model, identities)
    return Layers(identities, holders, layers_without_matrix(parts.model))


def _declarations(parts: ModelParts) -> tuple[Any, ...]:
    """Return what identities depend on in addition to the classes and paths of the modules.

    These are the classes of the configurations, the main inputs that are set on a model, and flags
    that are set on a module.
    """
    found: list[Any] = []
    for path in ("", *parts.remembered(_with_declarations)):
        attributes = vars(parts.modules[path])
        config = attributes.get("config", None if path else getattr(parts.model, "config", None))
        found += (type(config), attributes.get(_MAIN_INPUT), attributes.get(_IS_CROSS, False))
        for name, part in getattr(config, "__dict__", {}).items():
            if isinstance(part, PreTrainedConfig):
                found += (name, type(part), hasattr(part, "text_config"))
    return tuple(found)


def _with_declarations(parts: ModelParts) -> list[str]:
    """Return the paths of sub-models and of modules that may be attention."""
    return [
        path
        for path, module in parts.modules.items()
        if isinstance(module, PreTrainedModel) or _is_attention(module, path)
    ]


def attention_modules(model: nn.Module) -> dict[nn.Module, Identity]:
    """Return every attention module of a model with its identity, in module order.

    Raises:
        UnsupportedModelError: The model has none.
    """
    parts = parts_of(model)
    identities = layers_in(parts).identities
    return {parts.modules[path]: identity for path, identity in identities.items()}


def _holders(model: nn.Module, known: Mapping[str, Identity]) -> dict[str, Identity]:
    """Return attention modules around known ones, with the identity of the first one inside."""
    holders: dict[str, Identity] = {}
    for inner, identity in known.items():
        for path in _parents(inner):
            holder = model.get_submodule(path)
            if path not in holders and _is_attention(holder, path):
                holders[path] = replace(identity, module=path)
    return holders


def module_of(model: Any) -> nn.Module:
    """Return the module of a VLM; a module is returned unchanged.

    Raises:
        InputError: The model is neither a VLM nor a module.
    """
    bare = model.model if isinstance(model, VLM) else model
    if not isinstance(bare, nn.Module):
        raise InputError(
            f"The model must be a VLM or a torch.nn.Module; got an object of "
            f"{type(bare).__name__}. Use xi.load(name) or from_pretrained."
        )
    return bare


def weighs_no_tokens(module: nn.Module) -> bool:
    """Return whether the name of a module's class shows that its attention is not over tokens.

    Such a module may call attention functions to mix states of earlier layers, for example.
    """
    name = type(module).__name__
    return bool(_NO_ATTENTION.search(name) or _WITHOUT_MATRIX.search(name))


def layers_without_matrix(model: nn.Module) -> tuple[Identity, ...]:
    """Return layers that mix tokens without softmax attention.

    These are linear attention, state spaces, convolutions and assignment to groups.
    """
    found = {p: m for p, m in model.named_modules() if _WITHOUT_MATRIX.search(type(m).__name__)}
    outermost = {
        path: module
        for path, module in found.items()
        if not any(path.startswith(f"{other}.") for other in found)
    }
    return tuple(_IdentityFinder(model).identities(outermost).values())


def identity_of(
    model: nn.Module, module: nn.Module, known: Collection[Identity]
) -> Identity | None:
    """Return the identity of a module that was discovered to be attention.

    If another module has its layer number, the number after the last known layer is used. Return
    None if the model does not contain the module.
    """
    path = next((path for path, each in model.named_modules() if each is module), None)
    if path is None:
        return None
    alone = _IdentityFinder(model).identities({path: module})[path]
    layers = {each.layer for each in known if (each.tower, each.kind) == (alone.tower, alone.kind)}
    return replace(alone, layer=max(layers) + 1) if alone.layer in layers else alone


def block_of(model: nn.Module, identity: Identity) -> nn.Module | None:
    """Return the block of a layer stack (``layers.3``) that contains a module; None without one."""
    match = re.match(r".*\.\d+(?=\.|$)", identity.module)
    return model.get_submodule(match[0]) if match else None


def _innermost(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yield attention modules that do not contain another attention module."""
    found = {path: m for path, m in modules.items() if _is_attention(m, path)}
    outer = {parent for path in found for parent in _parents(path)}
    yield from ((path, module) for path, module in found.items() if path not in outer)


def _parents(path: str) -> list[str]:
    """Return the paths of the modules that contain the module at a path, the outermost first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts))]


def _is_attention(module: nn.Module, path: str) -> bool:
    kind = type(module)
    if weighs_no_tokens(module) or isinstance(module, PreTrainedModel):
        return False
    if next(module.children(), None) is None:
        return False
    return (
        isinstance(module, nn.MultiheadAttention)
        or bool(_ATTENTION.search(kind.__name__))
        or not _ATTENTION_CALLS.isdisjoint(_names_in_code(kind))
        or (bool(_ATTENTION_ATTRIBUTE.search(path)) and _calls_a_softmax(module))
    )


def _calls_a_softmax(module: nn.Module) -> bool:
    layers = any(isinstance(each, nn.Softmax) for each in module.children())
    return layers or "softmax" in _names_in_code(type(module))


def _names_in_code(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names used in the methods of a class; methods of torch's classes are left out."""
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


class _IdentityFinder:
    """Derives the identities of attention modules from their paths and the configurations."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.root = getattr(model, "config", None)
        self.configs: dict[str, Any] = {
            path: module.config
            for path, module in model.named_modules()
            if isinstance(module, PreTrainedModel)
        }

    def identities(self, found: Mapping[str, nn.Module]) -> dict[str, Identity]:
        """Return the identities by path; each module of one kind in a block is a separate layer."""
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
        """Return tower, kind, the container of the block, and the index of the block in it."""
        match = re.match(r"(.*)\.(\d+)(?:\.|$)", path)
        container, index = (match[1], int(match[2])) if match else (path, 0)
        return self._tower(path), self._kind(path, module), container, index

    def _tower(self, path: str) -> Tower:
        """Return the tower by the input of the sub-models around the module, else by its path."""
        owners = sorted((p for p in self.configs if _is_in(path, p)), key=len, reverse=True)
        known = undeclared_tower(self._holders(path))
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
        """Yield the module and every module around it, with the path from there to the module."""
        parts = path.split(".")
        for n in reversed(range(len(parts) + 1)):
            yield self.model.get_submodule(".".join(parts[:n])), ".".join(parts[n:])

    def _by_config(self, owner: str) -> Tower | None:
        """Return the tower by the attribute that holds the sub-model's configuration, or None."""
        config = self.configs[owner]
        around = sorted((p for p in self.configs if p != owner and _is_in(owner, p)), key=len)
        for whole in (*(self.configs[p] for p in reversed(around)), self.root):
            for attribute, tower in _TOWER_OF_CONFIG:
                part = getattr(whole, attribute, None)
                if part is None or type(config) is not type(part) or type(config) is type(whole):
                    continue
                if attribute != "encoder":
                    return tower
                if not hasattr(part, "text_config"):  # else its own parts give the tower
                    return declared_tower(self.model.get_submodule(owner)) or "language"
        return None

    def _by_stack(self, path: str, owners: Sequence[str]) -> Tower | None:
        """Return the tower by the inputs of an encoder-decoder model around the module, or None."""
        module = self.model.get_submodule(path)
        for owner in reversed(owners):
            model: Any = self.model.get_submodule(owner)
            parameters = inspect.signature(model.forward).parameters
            towers = (tower for name, tower in _DECODER_INPUTS.items() if name in parameters)
            decoder_tower = next(towers, None)
            if decoder_tower is None:
                continue
            for stack, tower in (
                (model.get_encoder(), TOWER_OF_INPUT.get(str(model.main_input_name), "language")),
                (model.get_decoder(), decoder_tower),
            ):
                if stack is not None and stack is not model and module in set(stack.modules()):
                    return tower
            return None
        return None

    def _names(self, path: str, owners: Sequence[str]) -> str:
        """Return the path without the attribute names of base models (``base_model_prefix``)."""
        parts = path.split(".")
        for owner in owners:
            at = len(owner.split(".")) if owner else 0
            prefix = getattr(self.model.get_submodule(owner), "base_model_prefix", "")
            if prefix and at < len(parts) and parts[at] == prefix:
                parts[at] = ""
        return ".".join(parts)

    def _by_name(self, names: str, owners: Sequence[str]) -> Tower:
        """Return the tower by the names in the path, else by the main input of the whole model."""
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
        return (
            "language" if reads_text else TOWER_OF_INPUT.get(str(whole.main_input_name), "language")
        )

    def _by_first_layer(self) -> Tower:
        """Return the tower of a model of another library by its embedding or convolution layers."""
        kinds = {type(module) for module in self.model.modules()}
        if nn.Embedding in kinds or not kinds & {nn.Conv1d, nn.Conv2d, nn.Conv3d}:
            return "language"
        return "vision" if kinds & {nn.Conv2d, nn.Conv3d} else "audio"

    def _kind(self, path: str, module: nn.Module) -> AttentionKind:
        """Return the kind by the names in the block: ``crossattention.self``, ``encoder_attn``.

        Attention with learned queries (a resampler, a pooling head) is cross-attention.
        """
        if _CHANNELS.search(type(module).__name__) or _CHANNELS.search(path.rpartition(".")[2]):
            return "channel"
        within = re.sub(r".*\.\d+\.", "", path).split(".")[-2:]
        holder = type(self.model.get_submodule(path.rpartition(".")[0])).__name__
        named = any(_CROSS.search(name) for name in (type(module).__name__, holder, *within))
        latent = _LATENTS.search(f"{path} {type(module).__name__} {holder}")
        declares_cross = getattr(module, _IS_CROSS, False)
        return "cross" if named or latent or declares_cross else "self"


_TOWER_OF_CONFIG: tuple[tuple[str, Tower], ...] = (
    ("vision_config", "vision"),
    ("video_config", "vision"),
    ("audio_config", "audio"),
    ("protein_encoder_config", "other"),
    ("qformer_config", "connector"),
    ("perceiver_config", "connector"),
    ("text_config", "language"),
    ("text_encoder", "language"),
    ("audio_encoder", "audio"),
    ("encoder", "vision"),  # replaced by the tower that the encoder's class declares, if any
    ("decoder", "language"),
)
_DECODER_INPUTS: dict[str, Tower] = {
    "decoder_input_ids": "language",
    "decoder_input_values": "audio",
}


def _is_in(path: str, owner: str) -> bool:
    return path == owner or path.startswith(f"{owner}.") or owner == ""


def head_counts(model: nn.Module, tower: Tower) -> dict[int, int]:
    """Return the number of query heads of each self-attention layer of a tower, by layer.

    Raises:
        LayerError: The tower has no self-attention, or a layer's number of heads is unknown.
    """
    counts = layers_of(attention_modules(model), tower, "self")
    unknown = [layer for layer, module in counts.items() if n_heads_of(module) is None]
    if unknown:
        raise LayerError(
            f"The number of heads of {tower} self-attention, layers {ranged(unknown)}, is unknown. "
            "Set num_heads on these modules, or num_attention_heads in their config."
        )
    return {layer: n_heads_of(module) or 0 for layer, module in counts.items()}


def checked_heads(
    wanted: Mapping[Any, Any],
    layers: Mapping[int, int | None],
    name: str,
) -> dict[int, tuple[int, ...]]:
    """Return existing heads by layer, without duplicates and with negative numbers resolved.

    Args:
        wanted: Heads by layer: numbers (negative ones count from the end), or a mask with an entry
            for each head.
        layers: The number of heads of every existing layer; None if unknown.
        name: The name of the layers for a message, such as ``"language self-attention"``.

    Raises:
        LayerError: A layer or head does not exist.
    """
    found: dict[int, tuple[int, ...]] = {}
    known = sorted(layers)
    for given, several in wanted.items():
        layer = number(given, "layer")
        index = layer_index(layer, known)
        if index not in layers:
            raise LayerError(f"There is no layer {layer}: {name} has layers {ranged(known)}.")
        count = layers[index]
        several = list(several) if isinstance(several, Iterator) else several
        row = entries_of(several)
        heads = [] if row is not None and not len(row) else numbers(several, "head", count)
        for head in heads:
            if head < 0 if count is None else not -count <= head < count:
                there = "an unknown number of heads" if count is None else f"heads 0 to {count - 1}"
                raise LayerError(f"There is no head {head}: {name}, layer {index}, has {there}.")
        positive = [head + (count or 0) if head < 0 else head for head in heads]
        found[index] = tuple(dict.fromkeys((*found.get(index, ()), *positive)))
    return found


def layers_of(
    known: Mapping[nn.Module, Identity], tower: Tower, kind: AttentionKind
) -> dict[int, nn.Module]:
    """Return the attention modules of a tower and kind, by layer.

    Raises:
        LayerError: The model has none.
    """
    found = {i.layer: m for m, i in known.items() if (i.tower, i.kind) == (tower, kind)}
    if not found:
        there = sorted({f"{i.tower} {i.kind}-attention" for i in known.values()})
        raise LayerError(
            f"The model has no {tower} {kind}-attention. It has {', '.join(there)}; pass one of "
            "these as tower= and kind=."
        )
    return dict(sorted(found.items()))


def n_heads_of(module: nn.Module) -> int | None:
    """Return the number of query heads of a layer, from its module or config; None if unknown."""
    for owner in (module, getattr(module, "config", None)):
        for name in ("num_attention_heads", "num_heads", "n_heads", "heads"):
            count = getattr(owner, name, None)
            if isinstance(count, int):
                return count
    return None


def ranged(values: Iterable[int]) -> str:
    """Return numbers as a string: ``"0 to 3"``, or ``"0, 2, 3"`` if some are missing."""
    ordered = sorted(values)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))
