"""Report how the weights of a model differ from its checkpoint.

transformers initialises weights that the checkpoint lacks at random, prints a report and continues.
Results of such a model are meaningless, so the report is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from xmodal_interp.errors import InputError

_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class CheckpointReport:
    """The differences between a checkpoint and the model loaded from it; empty if there are none.

    Attributes:
        missing: Weights of the model that the checkpoint lacks; they are random.
        mismatched: Weights that have another shape in the checkpoint; they are random.
        unexpected: Weights of the checkpoint that the model does not use.
    """

    missing: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    @classmethod
    def of(cls, loading_info: Any) -> CheckpointReport:
        """Return the report of ``from_pretrained(..., output_loading_info=True)``.

        Raises:
            InputError: ``loading_info`` is neither a mapping nor a report.
        """
        if isinstance(loading_info, cls):
            return loading_info
        if not isinstance(loading_info, Mapping):
            raise InputError(
                f"loading must be a mapping; got a {type(loading_info).__name__}. Pass the second "
                "result of from_pretrained(name, output_loading_info=True)."
            )
        return cls(*(_names(loading_info.get(f"{f.name}_keys", ())) for f in fields(cls)))

    def __bool__(self) -> bool:
        """Whether there is a difference."""
        return bool(self.missing or self.mismatched or self.unexpected)

    @property
    def n_random(self) -> int:
        """Number of random weights."""
        return len(self.missing) + len(self.mismatched)

    @property
    def differences(self) -> dict[str, list[str]]:
        """The names of the weights for each kind of difference that occurs; JSON-serialisable."""
        return {f.name: list(names) for f in fields(self) if (names := getattr(self, f.name))}

    def __str__(self) -> str:
        """Each kind of difference that occurs, with the first weight names."""
        about = {
            "missing": "not in the checkpoint, so random",
            "mismatched": "of another shape in the checkpoint, so random",
            "unexpected": "in the checkpoint, but not in the model",
        }
        return "; ".join(
            f"{about[kind]}: {_first(names)}" for kind, names in self.differences.items()
        )


def _names(keys: Iterable[Any]) -> tuple[str, ...]:
    """Return sorted names; mismatched keys are tuples of name and two shapes."""
    return tuple(sorted(key if isinstance(key, str) else str(key[0]) for key in keys))


def _first(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
