"""Recording in half precision, under autocast, in inference mode and in several threads."""

import threading

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.attention_variants import (
    FAMILIES,
    OTHERS,
    STEPS,
    assert_complete_and_exact,
    cast,
    first,
    of,
)
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.attention import AttentionCall
from xmodal_interp.capturing.run import capture
from xmodal_interp.errors import CaptureError
from xmodal_interp.hooks import record
from xmodal_interp.hooks.recorder import Settings, record_with
from xmodal_interp.models import VLM
from xmodal_interp.verification.exactness import Exactness, tolerance

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", FAMILIES + OTHERS)
def test_half_precision(name, dtype) -> None:
    model, inputs = of(name)
    model, inputs = model.to(dtype), cast(inputs, dtype)
    exactness = Exactness()
    with torch.no_grad():
        alone = first(model(**inputs))
        with record_with(Settings(values=True, inspect=exactness.inspect), model) as recording:
            recorded = first(model(**inputs))
    assert torch.equal(alone, recorded)
    assert_complete_and_exact(recording.calls, model)
    assert all(call.q is None or call.q.dtype == dtype for call in recording.calls)
    assert all(error < tolerance(dtype) for error in exactness.output_errors)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_sample_of_half_precision(dtype) -> None:
    model, _ = of("llava")
    sample = capture(
        VLM(model.to(dtype), tiny_vlm("llava").processor), picture(), QUESTION, **STEPS
    )
    assert sample.provenance["dtype"] == str(dtype).removeprefix("torch.")
    sums = sample.probs(0).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("name", FAMILIES + OTHERS)
def test_autocast(name) -> None:
    model, inputs = of(name)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        alone = first(model(**inputs))
        with record(model, values=True) as recording:
            recorded = first(model(**inputs))
    assert torch.equal(alone, recorded)
    assert_complete_and_exact(recording.calls, model)


def test_reduced_calls_are_in_full_precision_under_autocast() -> None:
    model, inputs = of("llava")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with record(model, towers=["language"]) as kept:
            model(**inputs)
        with record(model, towers=["language"], reduce=lambda call: call.probs()) as reduced:
            model(**inputs)
    for probs, call in zip(reduced.results, kept.calls, strict=True):
        assert probs.dtype == torch.float32
        assert torch.equal(probs, call.probs())


def test_a_call_is_read_in_full_precision_under_autocast() -> None:
    model, inputs = of("llava")
    with torch.no_grad(), record(model, towers=["language"], layers=[0]) as recording:
        model(**inputs)
    (call,) = recording.calls
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probs, mass = call.probs(), call.mass(torch.ones(1, call.n_keys))
    assert probs.dtype == mass.dtype == torch.float32
    assert torch.equal(probs, call.probs())


@pytest.mark.parametrize("name", FAMILIES + OTHERS)
def test_inference_mode(name) -> None:
    model, inputs = of(name)
    with torch.inference_mode():
        alone = first(model(**inputs))
        with record(model, values=True) as recording:
            recorded = first(model(**inputs))
    assert torch.equal(alone, recorded)
    assert_complete_and_exact(recording.calls, model)


def two_models() -> list[tuple[nn.Module, dict]]:
    return [of("llava"), of("qwen2_vl")]


def one_model() -> list[tuple[nn.Module, dict]]:
    vlm, (model, inputs) = tiny_vlm("llava"), of("llava")
    return [
        (model, inputs),
        (model, vlm.prepare([[picture(seed=3)]], ["how many shapes ?"])[0]),
    ]


@pytest.mark.parametrize("models", [two_models, one_model])
def test_two_threads_record_at_once(models) -> None:
    pairs = models()

    def recorded(model: nn.Module, inputs: dict) -> tuple[Tensor, list[AttentionCall]]:
        with torch.no_grad(), record(model, norms=True) as recording:
            output = first(model(**inputs))
        return output, recording.calls

    expected = [recorded(*pair) for pair in pairs]
    n_hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pairs[0][0].modules()]
    found: list = [[], []]
    barrier = threading.Barrier(2)

    def work(i: int) -> None:
        for _ in range(4):
            barrier.wait(30)
            found[i].append(recorded(*pairs[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (output, calls), runs in zip(expected, found, strict=True):
        assert len(runs) == 4
        for other, recorded in runs:
            assert torch.equal(output, other)
            assert [c.module for c in recorded] == [c.module for c in calls]
            assert all(torch.equal(a.q, b.q) for a, b in zip(calls, recorded, strict=True))
            assert all(torch.equal(a.k, b.k) for a, b in zip(calls, recorded, strict=True))
    model = pairs[0][0]
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert after == n_hooks
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("begins", [True, False], ids=["pre-hooks", "hooks"])
def test_a_block_ends_while_another_thread_runs_the_model(begins) -> None:
    """The hooks are removed just before torch calls them there, without keyword arguments."""
    model, inputs = of("llava")
    ended, inside = threading.Event(), threading.Event()
    found: list[Tensor] = []

    def wait(*_: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert ended.wait(30)

    def work() -> None:
        with torch.no_grad():
            found.append(first(model(**inputs)))

    block = model.model.language_model.layers[1]
    sites = [block, block.self_attn, model.model.language_model.rotary_emb]
    for site in sites:
        put = site.register_forward_pre_hook if begins else site.register_forward_hook
        thread = threading.Thread(target=work)
        inside.clear()
        ended.clear()
        with put(wait):
            with torch.no_grad(), record(model, norms=True) as recording:
                alone = first(model(**inputs))
                thread.start()
                assert inside.wait(30)
            ended.set()
            thread.join()
        assert torch.equal(found.pop(), alone)
        assert_complete_and_exact(recording.calls, model)


def test_data_parallel_without_devices_is_recorded() -> None:
    model, inputs = of("llava")
    with torch.no_grad(), record(nn.DataParallel(model)) as recording:
        nn.DataParallel(model)(**inputs)
    assert len(recording.calls) == 7


def test_copies_of_data_parallel_are_refused() -> None:
    """They are made for several devices, and have the hooks of the model."""
    model, _ = of("llava")
    attention = model.model.language_model.layers[0].self_attn
    with pytest.raises(CaptureError) as error, record(model):
        attention._replicate_for_data_parallel()(torch.zeros(1, 1, 128))
    assert str(error.value) == (
        "nn.DataParallel runs copies of the model in separate threads, which cannot be recorded. "
        "Record the model itself (parallel.module), or use one process per device."
    )
