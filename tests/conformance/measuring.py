"""Measurements of recording on one tiny model, for the tests of this suite and for the matrix.

The forward and the generation of each model run three times with the same seed: unobserved,
observed at the level of torch's functions, and recorded.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

from tests.conformance.spying import ObservedCall, spy
from tests.helpers.model_types import Tiny
from xmodal_interp.hooks.recorder import Recording, Settings, record_with
from xmodal_interp.verification.exactness import Exactness

WORST = pytest.StashKey[dict[str, float]]()  # by model, for the summary of a test run


@dataclass(frozen=True, eq=False)
class Run:
    """One recorded run of a model.

    Attributes:
        same: Whether every output tensor is bit for bit that of the unobserved run.
        spied: Number of softmax attention calls of each module, observed in torch's functions.
        recording: The recording.
        exactness: The package's own measure of its errors.
        spied_errors: For each call, the largest difference to the observed probabilities.
    """

    same: bool
    spied: Counter[str]
    recording: Recording
    exactness: Exactness
    spied_errors: tuple[float, ...]

    @property
    def recorded(self) -> Counter[str]:
        """Number of recorded calls of each module."""
        return Counter(call.module for call in self.recording.calls)


@dataclass(frozen=True, eq=False)
class Measured:
    """Runs of a forward, of a generation if the model can generate, and of other calls."""

    forward: Run
    generation: Run | None
    others: tuple[Run, ...] = ()

    @property
    def runs(self) -> tuple[Run, ...]:
        """All runs."""
        generation = () if self.generation is None else (self.generation,)
        return (self.forward, *generation, *self.others)

    @property
    def error(self) -> float:
        """The largest of the three errors."""
        errors = (self.spied_error, self.output_error, self.eager_error)
        return _worst(error for error in errors if error == error)

    @property
    def spied_error(self) -> float:
        """The largest error against the observed probabilities, over all calls."""
        return _worst(error for run in self.runs for error in run.spied_errors)

    @property
    def output_error(self) -> float:
        """The largest error of ``P V``; NaN if nothing was compared."""
        return _worst(error for run in self.runs for error in run.exactness.output_errors)

    @property
    def eager_error(self) -> float:
        """The largest error against eager attention; NaN if nothing was compared."""
        return _worst(error for run in self.runs for error in run.exactness.eager_errors)


def measured(tiny: Tiny) -> Measured:
    """Run the forward, the generation and the other calls of a tiny model."""
    forward = _run(tiny.model, lambda: tiny.model(**tiny.inputs))
    others = tuple(_run(tiny.model, call) for call in tiny.others)
    if not tiny.generate_inputs:
        return Measured(forward, None, others)
    generation = _run(tiny.model, lambda: tiny.model.generate(**tiny.generate_inputs))
    return Measured(forward, generation, others)


def _run(model: torch.nn.Module, call: Callable[[], Any]) -> Run:
    alone, _ = _once(call, nullcontext())
    _, spied = _once(call, spy(model))
    exactness = Exactness()
    recorder = record_with(Settings(values=True, inspect=exactness.inspect), model)
    tensors, recording = _once(call, recorder)
    return Run(
        same=_same(alone, tensors),
        spied=Counter(each.module for each in spied),
        recording=recording,
        exactness=exactness,
        spied_errors=tuple(_spied_errors(recording, spied)),
    )


def _spied_errors(recording: Recording, spied: Sequence[ObservedCall]) -> Iterator[float]:
    """Compare the calls of each module in order; the column of a sink is the last."""
    of_module: dict[str, list[Tensor]] = defaultdict(list)
    for each in spied:
        of_module[each.module].append(each.probs)
    for call in recording.calls:
        queue = of_module[call.module]
        if not queue:  # another test compares the numbers of calls
            continue
        ours = call.probs()
        theirs = queue.pop(0)[..., : call.n_keys].reshape(ours.shape)
        gap = (ours - theirs).abs()[call.visible().any(-1).expand(ours.shape[:-1])]
        yield float(gap.max()) if len(gap) else 0.0


def _once(call: Callable[[], Any], around: AbstractContextManager[Any]) -> tuple[list[Tensor], Any]:
    with torch.random.fork_rng(devices=[]), torch.no_grad(), around as observed:
        torch.manual_seed(0)
        output = call()
    leaves = _pytree.tree_leaves(output if isinstance(output, Tensor) else dict(output))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], observed


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(one, other, strict=True)
    )


def _worst(errors: Iterable[float]) -> float:
    return max(errors, default=float("nan"))
