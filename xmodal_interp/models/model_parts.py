"""The modules of a model by path, and values that are computed from them once.

A capture of a small model would spend more time on walks over its modules than on its forward, so
:func:`parts_of` walks once, and remembers values that follow from the modules' classes and paths,
such as the layers of the model. Each call compares the classes, names and sharing of all modules
with those of the last call: a replaced or added module (an adapter of PEFT, for example) is seen,
and the values are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from xmodal_interp.upstream import module_tree

T = TypeVar("T")


@dataclass(eq=False)
class _Remembered:
    """What is remembered of a model. It holds no module, so that the model can be freed.

    Attributes:
        structure: Class and children of every module, breadth first.
        paths: The path of every module, breadth first.
        order: Indices of these in the order of ``named_modules``, which is depth first.
        values: The results of :meth:`ModelParts.remembered`, and what they depend on.
    """

    structure: list[Any]
    paths: list[str]
    order: list[int]
    values: dict[Callable[..., Any], tuple[Hashable, Any]] = field(default_factory=dict)


_remembered: WeakKeyDictionary[nn.Module, _Remembered] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class ModelParts:
    """The modules of a model at one time.

    Attributes:
        model: The model.
        modules: Each module by its path, in the order of ``named_modules``; the model's own path is
            empty. A module that several others share is listed once.
    """

    model: nn.Module
    modules: dict[str, nn.Module]
    _known: _Remembered

    def remembered(self, make: Callable[[ModelParts], T], depends_on: Hashable = None) -> T:
        """Return ``make(self)``, which is called again only if the model changes.

        Args:
            make: A function of the module level. Its result must follow from the classes and paths
                of the modules and from ``depends_on``, and must not contain a module.
            depends_on: Everything else that the result depends on.
        """
        before = self._known.values.get(make)
        if before is None or before[0] != depends_on:
            before = self._known.values[make] = (depends_on, make(self))
        value: T = before[1]
        return value


def parts_of(model: nn.Module) -> ModelParts:
    """Return the modules of a model as they are now."""
    found, structure = module_tree(model)
    known = _remembered.get(model)
    if known is None or known.structure != structure:
        index = {module: at for at, module in enumerate(found)}
        at_path = [(path, index[module]) for path, module in model.named_modules()]
        paths = [path for path, _ in sorted(at_path, key=lambda each: each[1])]
        known = _remembered[model] = _Remembered(structure, paths, [at for _, at in at_path])
    return ModelParts(model, {known.paths[at]: found[at] for at in known.order}, known)
