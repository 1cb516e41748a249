"""Which weights of a model came from its checkpoint.

A weight that the checkpoint lacks is initialised at random by transformers, which prints a report
and goes on. Whoever reads numbers off such a model must know.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from xmodal_interp.errors import InputError

_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class CheckpointReport:
    """How a checkpoint differs from the model that was made of it; empty if it does not.

    Attributes:
        missing: Weights of the model that the checkpoint lacks: they are random.
        mismatched: Weights of another shape in the checkpoint: they are random.
        unexpected: Weights of the checkpoint that the model has no use for.
    """

    missing: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    @classmethod
    def of(cls, loading_info: Any) -> CheckpointReport:
        """The report of ``from_pretrained(..., output_loading_info=True)``.

        Raises:
            InputError: Something else.
        """
        if isinstance(loading_info, cls):
            return loading_info
        if not isinstance(loading_info, Mapping):
            raise InputError(
                f"loading is a {type(loading_info).__name__}. Pass the second result of "
                "from_pretrained(name, output_loading_info=True)."
            )
        return cls(*(_names(loading_info.get(f"{f.name}_keys", ())) for f in fields(cls)))

    def __bool__(self) -> bool:
        """Whether there is a difference."""
        return bool(self.missing or self.mismatched or self.unexpected)

    @property
    def n_random(self) -> int:
        """How many weights are random."""
        return len(self.missing) + len(self.mismatched)

    @property
    def differences(self) -> dict[str, list[str]]:
        """The names by kind of difference, without empty ones; JSON-ready."""
        return {f.name: list(names) for f in fields(self) if (names := getattr(self, f.name))}

    def __str__(self) -> str:
        """Each kind of difference with its first names."""
        about = {
            "missing": "not in the checkpoint, so random",
            "mismatched": "of another shape in the checkpoint, so random",
            "unexpected": "in the checkpoint, but not in the model",
        }
        return "; ".join(
            f"{about[kind]}: {_first(names)}" for kind, names in self.differences.items()
        )


def _names(keys: Iterable[Any]) -> tuple[str, ...]:
    """Sorted names; mismatched keys come with two shapes."""
    return tuple(sorted(key if isinstance(key, str) else str(key[0]) for key in keys))


def _first(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
