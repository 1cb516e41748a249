"""A block records only its own thread or task, and copies of the model do not get its hooks."""

import asyncio
import copy
import pickle
import threading

import pytest
import torch

from tests.helpers.intervened import inputs_of
from tests.helpers.tiny import tiny_vlm
from xmodal_interp.errors import CaptureError
from xmodal_interp.hooks import record


def in_another_thread(run) -> None:
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def test_other_threads_are_not_recorded() -> None:
    model, inputs = tiny_vlm("llava").model, inputs_of(tiny_vlm("llava"))
    with record(model, norms=True) as recording:
        in_another_thread(lambda: model(**inputs))
        model.model.vision_tower(inputs["pixel_values"])
    assert {call.tower for call in recording.calls} == {"vision"}
    assert recording.rotary is None


def test_a_model_that_ran_in_another_thread_only_is_an_error() -> None:
    model, inputs = tiny_vlm("llava").model, inputs_of(tiny_vlm("llava"))
    with pytest.raises(CaptureError) as error, record(model):
        in_another_thread(lambda: model(**inputs))
    assert str(error.value) == (
        "The model ran in another thread (or task) than the with block, so nothing was recorded. "
        "Enter the block around the call of the model, in the function that the thread runs."
    )
    with record(model) as recording:  # no error if the other thread has its own block
        in_another_thread(lambda: recorded(model, inputs))
    assert recording.calls == []


def recorded(model: torch.nn.Module, inputs: dict) -> list:
    with torch.no_grad(), record(model) as recording:
        model(**inputs)
    return recording.calls


def test_tasks_of_one_thread_record_at_once() -> None:
    model, inputs = tiny_vlm("llava").model, inputs_of(tiny_vlm("llava"))

    async def task() -> list:
        with record(model, norms=True) as recording:
            for _ in range(2):
                await asyncio.sleep(0)
                model(**inputs)
        return recording.calls

    async def together() -> list[list]:
        return await asyncio.gather(*(task() for _ in range(3)))

    with torch.no_grad():  # the mode belongs to the thread, so it applies to all tasks
        recorded_by_task = asyncio.run(together())
    for calls in recorded_by_task:
        assert [call.call for call in calls] == [0] * 7 + [1] * 7


def test_copies_of_a_model_are_not_recorded() -> None:
    model, inputs = copy.deepcopy(tiny_vlm("llava").model), inputs_of(tiny_vlm("llava"))
    with torch.no_grad():
        alone = model(**inputs).logits
        with record(model, norms=True) as recording:
            other = copy.deepcopy(model)
            saved = pickle.loads(pickle.dumps(model.model.language_model.rotary_emb))
            assert torch.equal(other(**inputs).logits, alone)
            assert recording.calls == []
            assert recording.rotary is None
        assert torch.equal(other(**inputs).logits, alone)
        assert len(recorded(other, inputs)) == 7
    assert not any("forward" in vars(module) for module in other.modules())
    assert type(saved) is type(model.model.language_model.rotary_emb)
