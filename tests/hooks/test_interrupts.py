"""The model and torch are restored after Ctrl-C at any moment.

torch (2.14.1, ``nn.Module._call_impl``) calls the ``always_call`` hooks of a module only after an
``Exception``. After a ``KeyboardInterrupt`` it calls no forward hook, so hooks cannot undo changes.

Python calls the handler of a signal when it enters a function, after a call of a function that is
written in C, and when a loop jumps back. The first two are the places at which a profile function
is called (``sys.setprofile``), so the tests interrupt there. A timer would choose other places in
each run of the tests.

What holds after an interrupt: the state is restored when the ``with`` block has ended, even if the
exception is kept. One signal is too early for that: if it arrives when ``Block.__exit__`` or
``Block._restore`` is entered, the state is restored when the exception is released.
"""

from __future__ import annotations

import contextlib
import inspect
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _pop_mode_temporarily,
)
from transformers.modeling_utils import AttentionInterface

import xmodal_interp as xi
from tests.helpers.real import real, settled
from xmodal_interp import contexts
from xmodal_interp.hooks import attention_interface, compiled, recorder, torch_attention
from xmodal_interp.hooks.inline_attention import FunctionMode
from xmodal_interp.verification.missed_attention import missed_modules

OBSERVERS = (
    *(contexts._blocks, attention_interface._observers),
    *(torch_attention._observers, compiled._observers),
)
PARTS = ("xmodal_interp/", "torch/overrides.py", "contextlib.py", "torch/nn/modules/module.py")
"""Parts of the names of the files in which the tests interrupt."""
EXITS = ("_Recorder.exit", "UpdateShares._leave", "FunctionMode.end", "_Observed.__call__")
"""Functions in which the tests interrupt everywhere; in the others, only with ``--all-types``."""
UNDONE_LATER = ("Block.__exit__", "Block._restore")
BLIP = "blip"  # its attention computes its own softmax: it is recorded by a TorchFunctionMode


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return all state that a block can change."""
    return {
        "modes": list(_get_current_function_mode_stack()),
        "hooks": {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
            for name, m in model.named_modules()
        },
        "training": [module.training for module in model.modules()],
        "kernel": functional.scaled_dot_product_attention,
        "interface": (
            AttentionInterface.get_interface,
            vars(AttentionInterface).get("__getitem__"),
        ),
        "observers": [(each.n_registered, each.active()) for each in OBSERVERS],
        "in kernel": torch_attention._inside.get(),
        "deferring": contexts.DeferredSignals._is_open,
        "handlers": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)),
    }


@pytest.fixture(autouse=True)
def clean_stack() -> Iterator[None]:
    """Remove the modes that a failed test leaves, so that the next test can pass."""
    yield
    left = _get_current_function_mode_stack()
    for _ in left:
        _pop_mode()
    assert left == []


class Place(NamedTuple):
    """Where Python calls the handler of a signal.

    Attributes:
        file: The file of the function that runs.
        function: The qualified name of the function.
        line: The line of the file that runs.
        called: The function written in C that was called; None if the function is being entered.
    """

    file: str
    function: str
    line: int
    called: str | None

    @classmethod
    def of(cls, frame: FrameType, event: str, arg: Any) -> Place | None:
        """Return the place of an event of ``sys.setprofile``; None if no handler is called."""
        if event not in ("call", "c_return"):
            return None
        called = None if event == "call" else arg.__qualname__
        return cls(frame.f_code.co_filename, frame.f_code.co_qualname, frame.f_lineno, called)


Profile = Callable[[FrameType, str, Any], None]


@contextmanager
def profiled(profile: Profile) -> Iterator[None]:
    """Call a function at every place of this block."""
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)


def interrupt(frame: FrameType) -> None:
    """Do what Python does at a place after Ctrl-C, once."""
    sys.setprofile(None)
    handler = signal.getsignal(signal.SIGINT)
    assert callable(handler), "the tests run with SIGINT ignored"
    handler(signal.SIGINT, frame)


def places_of(run: Callable[[], object]) -> Counter[Place]:
    """Return the places at which a run can be interrupted, with their number of occurrences."""
    found: Counter[Place] = Counter()

    def note(frame: FrameType, event: str, arg: Any) -> None:
        place = Place.of(frame, event, arg)
        if place is not None and any(part in place.file for part in PARTS):
            found[place] += 1

    with profiled(note):
        run()
    return found


def interrupted(
    run: Callable[[], object], chosen: Place, occurrence: int
) -> KeyboardInterrupt | None:
    """Run with an interrupt at an occurrence of a place; None if Python drops the interrupt.

    Python drops an exception in ``__del__``, in the callback of a weakref, and in a generator that
    is released.
    """
    left = occurrence

    def count(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal left
        is_near = frame.f_code.co_qualname == chosen.function
        if is_near and Place.of(frame, event, arg) == chosen:
            left -= 1
            if left == 0:
                interrupt(frame)

    try:
        with profiled(count):
            run()
    except KeyboardInterrupt as error:
        return error
    assert left == 0, f"{chosen} was not reached"
    return None


def runs() -> dict[str, tuple[nn.Module, Callable[[], object]]]:
    """Return functions that run a model with hooks; each takes tens of milliseconds."""
    vlm = xi.VLM(real(BLIP)[0], settled(BLIP))
    inputs, _ = vlm.prepare([["docs/scene.png"]], ["where is the red circle ?"])
    llava = xi.VLM(real("llava")[0], settled("llava"))
    cut = xi.ablate_heads({0: [0]}, mode="zero")
    its_inputs, _ = llava.prepare([["docs/scene.png"]], ["where is the red circle ?"])

    def record() -> None:
        with xi.record(vlm.model):
            vlm.model(**inputs)

    def norms() -> None:
        with xi.record(llava.model, norms=True):
            llava.model(**its_inputs)

    def edit() -> None:
        with xi.record(llava.model), xi.intervene(llava.model, cut):
            llava.model(**its_inputs)

    return {
        "record": (vlm.model, record),
        "norms": (llava.model, norms),
        "edit": (llava.model, edit),
    }


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("way", ["record", "norms", "edit"])
def test_everything_is_restored_after_an_interrupt(
    way: str, request: pytest.FixtureRequest
) -> None:
    model, run = runs()[way]
    with torch.no_grad():
        run()  # fill caches that are filled only once
        places = [
            (place, occurrence)
            for place, n in sorted(places_of(run).items(), key=str)
            for occurrence in sorted({1, n})
        ]
        if not request.config.getoption("--all-types"):
            at_exit = [each for each in places if each[0].function in EXITS]
            places = places[:: len(places) // 40] + at_exit
        before = state_of(model)
        n_arrived = 0
        for place, occurrence in places:
            error = interrupted(run, place, occurrence)
            n_arrived += error is not None
            if place.function not in UNDONE_LATER:
                assert state_of(model) == before, place
            del error
            assert state_of(model) == before, place
    assert n_arrived > 0.9 * len(places)


class UserMode(TorchFunctionMode):
    """A mode that is not of this package."""

    def __torch_function__(self, function, types, args=(), options=None):
        return function(*args, **(options or {}))


def interrupt_while_popped(way: str) -> Profile:
    """Return a profile function that interrupts torch while a mode of ours is off its stack.

    torch puts the mode back when a generator goes on. At two places an interrupt does not reach the
    generator, which is then released together with the traceback.
    """
    manager = contextlib._GeneratorContextManager
    place = {"enter": (manager.__enter__, "c_return"), "exit": (manager.__exit__, "call")}[way]

    def profile(frame: FrameType, event: str, arg: Any) -> None:  # noqa: ARG001
        if (frame.f_code, event) == (place[0].__code__, place[1]):
            generator = frame.f_locals["self"].gen
            pops = generator.gi_code is inspect.unwrap(_pop_mode_temporarily).__code__
            if pops and isinstance(generator.gi_frame.f_locals["old"], FunctionMode):
                interrupt(frame)

    return profile


@pytest.mark.parametrize("way", ["enter", "exit"])
@pytest.mark.parametrize("what", ["record", "norms"])
def test_torch_does_not_put_back_a_mode_whose_block_has_ended(what: str, way: str) -> None:
    _, run = runs()[what]
    with (
        torch.no_grad(),
        pytest.raises(KeyboardInterrupt) as kept,
        profiled(interrupt_while_popped(way)),
    ):
        run()
    assert _get_current_function_mode_stack() == []
    del kept  # releases the traceback
    assert _get_current_function_mode_stack() == []


def test_a_mode_that_torch_puts_back_in_its_block_observes_once() -> None:
    vlm = xi.VLM(real(BLIP)[0], settled(BLIP))
    inputs, _ = vlm.prepare([["docs/scene.png"]], ["where is the red circle ?"])
    with torch.no_grad(), xi.record(vlm.model) as expected:
        vlm.model(**inputs)
    kept: list[BaseException] = []

    def release(*_: Any) -> None:
        kept.clear()

    attention = vlm.model.get_submodule(expected.calls[0].module)
    inner = next(m for m in attention.modules() if isinstance(m, nn.Linear))
    with torch.no_grad(), xi.record(vlm.model) as recording:
        try:
            with profiled(interrupt_while_popped("enter")):
                vlm.model(**inputs)
        except KeyboardInterrupt as error:
            kept.append(error)
        assert kept
        with inner.register_forward_pre_hook(release):
            vlm.model(**inputs)
        assert not kept
    whole = recording.calls[-len(expected.calls) :]
    for call, other in zip(whole, expected.calls, strict=True):
        assert call.module == other.module
        assert torch.equal(call.probs(), other.probs())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_the_end_of_a_mode_keeps_the_modes_of_the_user() -> None:
    mode, outer, inner = FunctionMode(), UserMode(), UserMode()

    @contextmanager
    def three_modes() -> Iterator[None]:
        with outer:
            mode.begin()
            with inner:
                yield

    with three_modes():
        places = places_of(mode.end)
    assert len(places) > 10
    for place, n in places.items():
        for occurrence in {1, n // 2 + 1, n}:
            with three_modes():
                interrupted(mode.end, place, occurrence)
                modes = _get_current_function_mode_stack()
                assert modes in ([outer, inner], [outer, mode, inner]), place
                mode.end()
                assert _get_current_function_mode_stack() == [outer, inner], place


@pytest.mark.parametrize("way", ["enter", "exit"])
def test_an_interrupt_of_the_doctor_keeps_the_modes_of_the_user(way: str) -> None:
    vlm = xi.VLM(real(BLIP)[0], settled(BLIP))
    inputs, _ = vlm.prepare([["docs/scene.png"]], ["where is the red circle ?"])
    with torch.no_grad(), xi.record(vlm.model) as recording:
        vlm.model(**inputs)

    def run() -> None:
        with profiled(interrupt_while_popped(way)):
            vlm.model(**inputs)

    with torch.no_grad(), UserMode() as mode:
        with pytest.raises(KeyboardInterrupt) as kept:
            missed_modules(vlm.model, run, recording)
        assert _get_current_function_mode_stack() == [mode]
        del kept
        assert _get_current_function_mode_stack() == [mode]


def test_a_recording_is_complete_after_an_interrupt_inside_the_recorder() -> None:
    """An interrupt between two bytecodes can leave the recorder's context variable set."""
    vlm = xi.load()
    inputs, _ = vlm.prepare([["docs/scene.png"]], ["where is the red circle ?"])

    def calls() -> int:
        with torch.no_grad(), xi.record(vlm.model) as recording:
            vlm.model(**inputs)
        return len(recording.calls)

    expected = calls()
    recorder._is_recording.set(True)
    assert calls() == expected > 0


def test_a_recording_continues_after_an_interrupt_in_its_block() -> None:
    vlm = xi.VLM(real(BLIP)[0], settled(BLIP))
    inputs, _ = vlm.prepare([["docs/scene.png"]], ["where is the red circle ?"])
    with torch.no_grad(), xi.record(vlm.model) as expected:
        vlm.model(**inputs)
    attention = vlm.model.get_submodule(expected.calls[-1].module)
    dropout = next(m for m in attention.modules() if isinstance(m, nn.Dropout))

    def interrupt(module: nn.Module, args: Any) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    with torch.no_grad(), xi.record(vlm.model) as recording:
        with dropout.register_forward_pre_hook(interrupt), pytest.raises(KeyboardInterrupt):
            vlm.model(**inputs)
        n_modes = len(_get_current_function_mode_stack())
        vlm.model(**inputs)
    assert n_modes == 1  # the mode of the interrupted module ends when another one is entered
    assert not _get_current_function_mode_stack()
    whole = recording.calls[-len(expected.calls) :]
    for call, other in zip(whole, expected.calls, strict=True):
        assert call.module == other.module
        assert torch.equal(call.probs(), other.probs())


def test_a_signal_is_deferred_while_a_block_is_entered_or_exited() -> None:
    made: list[str] = []

    def change(stack: Any) -> str:
        made.append("changed")
        signal.raise_signal(signal.SIGINT)
        stack.callback(made.append, "restored")
        return "value"

    with pytest.raises(KeyboardInterrupt), contexts.Block(change):
        made.append("entered")
    assert made == ["changed", "restored"]

    def back() -> None:
        signal.raise_signal(signal.SIGINT)
        made.append("restored")

    made.clear()
    with pytest.raises(KeyboardInterrupt), contexts.Block(lambda stack: stack.callback(back)):
        made.append("entered")
    assert made == ["entered", "restored"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
