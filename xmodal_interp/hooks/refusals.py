"""The errors of a recording: what cannot be recorded, and what to do instead."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, SupportsIndex

import numpy as np
from torch import Tensor, nn

from xmodal_interp.attention import layer_index, numbers
from xmodal_interp.errors import (
    CaptureError,
    InputError,
    UnsupportedModelError,
    XmodalError,
    quoted,
)
from xmodal_interp.hooks.attention_modules import Identity, ranged
from xmodal_interp.upstream import is_in_vmap, is_replica, parameters_of, tensor_parallel_size
from xmodal_interp.vocabulary import TOWERS, AttentionKind, Tower


def chosen_layers(
    towers: Sequence[Tower],
    layers: SupportsIndex | Collection[Any] | np.ndarray | Tensor | None,
    known: Collection[Identity],
) -> frozenset[Any] | None:
    """Return the chosen layers, given by number or by a mask; None for all.

    A number from 0 is that of a layer in each tower and kind. A negative number counts from the
    last layer of each tower and kind, and is returned as ``tower, kind, layer`` of these layers.

    Raises:
        InputError: Layers or towers are not a list, or do not exist.
        LayerError: A number is not whole, or a mask has a wrong length.
    """
    check_towers(towers)
    if layers is None:
        return None
    groups: dict[tuple[Tower, AttentionKind], set[int]] = {}
    for each in known:
        if each.tower in towers:
            groups.setdefault((each.tower, each.kind), set()).add(each.layer)
    there = set().union(*groups.values())
    given: Any = layers
    if isinstance(given, (str, slice)) or not isinstance(given, Iterable | SupportsIndex):
        raise InputError(
            f"layers must be a number or a list, such as -1 or [0, 3]; got {quoted(layers)}."
        )
    chosen: set[Any] = set()
    missing = []
    for layer in dict.fromkeys(numbers(layers, "layer", max(there, default=-1) + 1)):
        found = {
            (*group, index)
            for group, of_group in groups.items()
            if (index := layer_index(layer, sorted(of_group))) in of_group
        }
        chosen |= found if layer < 0 else {layer}
        missing += [] if found else [layer]
    if missing:
        named = "layers" if set(towers) == set(TOWERS) else f"{' and '.join(towers)} layers"
        has = f"has {named} {ranged(there)}" if there else f"has no {named}"
        raise InputError(
            f"Got layers {', '.join(map(str, sorted(missing)))}, but the model {has}. Count layers "
            "from 0; negative numbers count from the last."
        )
    return frozenset(chosen)


def check_towers(towers: Any) -> None:
    """Raise InputError if ``towers`` is not a list of towers, or is empty."""
    if isinstance(towers, str) or not isinstance(towers, Iterable):
        raise InputError(f"towers must be a list, such as ['language']; got {quoted(towers)}.")
    named = list(towers)
    unknown = [tower for tower in named if not (isinstance(tower, str) and tower in TOWERS)]
    if unknown:
        raise InputError(
            f"towers must be among {', '.join(TOWERS)}; got {', '.join(map(quoted, unknown))}."
        )
    if not named:
        raise InputError("towers is empty. Leave it out for all towers.")


def refuse_unseen(names: Iterable[str]) -> None:
    """Raise CaptureError for modules that ran without a recorded call."""
    unseen = sorted(set(names))
    if unseen:
        raise CaptureError(
            "Some attention could not be recorded: these modules ran, but neither used "
            "transformers' attention interface nor called scaled_dot_product_attention or a "
            f"softmax: {', '.join(unseen)}. Leave out their tower with towers= if you don't need "
            "it."
        )


def refuse_failure(error: Exception, *, of_reduce: bool) -> None:
    """Raise the error that occurred in the recorder while the model ran.

    Errors of this package and of ``reduce`` are raised unchanged, others as CaptureError.
    """
    if of_reduce or isinstance(error, XmodalError):
        raise error
    raise CaptureError(
        "The model ran to its end, but recording its attention failed with "
        f"{type(error).__name__}: {error}. Leave out the tower that fails with towers=, and report "
        "the traceback above."
    ) from error


def refuse_vmap() -> None:
    """Raise CaptureError inside ``torch.func.vmap``."""
    if is_in_vmap():
        raise CaptureError(
            "A model inside torch.func.vmap cannot be recorded, because the values of its tensors "
            "cannot be read there. Call the model with the batch, without vmap."
        )


def refuse_split(modules: Iterable[nn.Module]) -> None:
    """Raise UnsupportedModelError for modules whose layers are split over processes.

    With tensor parallelism each process runs some heads of every layer, numbered from 0.
    """
    n_processes = 1
    for module in modules:
        n_processes = max(n_processes, tensor_parallel_size(module))
        for weight in parameters_of(module).values():
            if type(weight) is nn.Parameter or weight is None:
                continue
            mesh = getattr(weight, "device_mesh", None)  # only a DTensor has one
            names = getattr(mesh, "mesh_dim_names", None) or ()
            if mesh is not None and "tp" in names:
                n_processes = max(n_processes, int(mesh.size(names.index("tp"))))
    if n_processes > 1:
        raise UnsupportedModelError(
            f"The layers of this model are split over {n_processes} processes (tensor "
            "parallelism), so this process has only some of their heads. Load the model without "
            "tp_plan, for example with device_map='auto'."
        )


def refuse_another_thread(*, in_batches: bool = False) -> None:
    """Raise CaptureError for a model that ran only outside the thread or task of the block."""
    if in_batches:
        raise CaptureError(
            "Continuous batching (generate_batch) cannot be recorded: transformers runs the model "
            "in a separate thread, on tokens of several requests at once. Use generate."
        )
    raise CaptureError(
        "The model ran in another thread (or task) than the with block, so nothing was recorded. "
        "Enter the block around the call of the model, in the function that the thread runs."
    )


def refuse_replica(module: nn.Module, args: Any) -> None:  # noqa: ARG001
    """Raise CaptureError in a copy that ``nn.DataParallel`` made for one of its devices."""
    if is_replica(module):
        raise CaptureError(
            "nn.DataParallel runs copies of the model in separate threads, which cannot be "
            "recorded. Record the model itself (parallel.module), or use one process per device."
        )
