"""The model and torch are restored after Ctrl-C at any moment.

torch (2.14.1, ``nn.Module._call_impl``) calls the ``always_call`` hooks of a module only after an
``Exception``. After a ``KeyboardInterrupt`` it calls no forward hook, so hooks cannot undo changes.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack
from transformers.modeling_utils import AttentionInterface

import xmodal_interp as xi
from tests.helpers.real import real, settled
from xmodal_interp import contexts
from xmodal_interp.hooks import attention_interface, compiled, recorder, torch_attention

OBSERVERS = (
    *(contexts._blocks, attention_interface._observers),
    *(torch_attention._observers, compiled._observers),
)
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
        "deferring": contexts.DeferredSignals._is_open,
        "handlers": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)),
    }


@contextmanager
def interrupting() -> Iterator[Callable[[float], None]]:
    """Yield a function that raises ``KeyboardInterrupt`` after a number of seconds."""

    def interrupt(number: int, frame: Any) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        yield partial(signal.setitimer, signal.ITIMER_REAL)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


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

    def edit() -> None:
        with xi.record(llava.model), xi.intervene(llava.model, cut):
            llava.model(**its_inputs)

    return {"record": (vlm.model, record), "edit": (llava.model, edit)}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("way", ["record", "edit"])
def test_everything_is_restored_after_an_interrupt(way: str, n_interrupts: int) -> None:
    """Python drops an interrupt in a weakref's callback; torch's dynamo has such callbacks."""
    model, run = runs()[way]
    run()  # fill caches that are filled only once
    chosen = random.Random(0)
    arrived = 0
    with torch.no_grad(), interrupting() as after:
        before = state_of(model)
        for _ in range(n_interrupts):
            try:
                after(chosen.uniform(1e-4, 0.04))
                run()
                after(0)
            except KeyboardInterrupt:
                arrived += 1
            assert state_of(model) == before
    assert arrived > n_interrupts / 4


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


@pytest.fixture
def n_interrupts(request: pytest.FixtureRequest) -> int:
    """The number of interrupts: thousands with ``--all-types``."""
    return 2000 if request.config.getoption("--all-types") else 40


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
