"""Results are those of evaluation mode, even if modules were left in training mode."""

import copy

import numpy as np
import peft
import pytest
import torch

import xmodal_interp as xi
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.evaluation import deletion_curve
from xmodal_interp.models import VLM, evaluation_mode, modules_in_training

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
ITEMS = [{"image": picture(), "prompt": QUESTION, "answer": "red"}]
WARNING = "modules are in training mode, so any dropout in them is active"


@pytest.fixture(scope="module")
def adapted() -> VLM:
    """An adapter in training mode with dropout, in a model whose ``training`` is False."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.5
    )
    own = tiny_vlm("llava")
    model = peft.get_peft_model(copy.deepcopy(own.model), settings)
    model.training = False  # as in transformers' own add_adapter
    return VLM(model, own.processor)


@pytest.fixture(scope="module")
def evaluated(adapted: VLM) -> VLM:
    return VLM(copy.deepcopy(adapted.model).eval(), adapted.processor)


def test_dropout_of_an_adapter_is_off_while_a_sample_is_captured(adapted, evaluated) -> None:
    names = modules_in_training(adapted.model)
    assert len(names) > 100
    right = xi.capture(evaluated, picture(), QUESTION, max_new_tokens=2)
    with pytest.warns(UserWarning, match=WARNING):
        ours = xi.capture(adapted, picture(), QUESTION, max_new_tokens=2)
    with pytest.warns(UserWarning, match=WARNING):
        prompt_only = xi.capture(adapted, picture(), QUESTION)
    for layer in range(4):
        assert torch.equal(ours.probs(layer=layer), right.probs(layer=layer))
    rows = right.probs(layer=3)[:, : right.n_prompt, : right.n_prompt]
    torch.testing.assert_close(prompt_only.probs(layer=3), rows, atol=1e-5, rtol=0)
    assert modules_in_training(adapted.model) == names


def test_dropout_of_an_adapter_is_off_in_evaluation_and_pruning(adapted, evaluated) -> None:
    def numbers(vlm: VLM) -> list[np.ndarray]:
        heads = xi.head_pruning(vlm, ITEMS, layers=[0], heads=[0, 1], progress=False)
        curve = deletion_curve(vlm, ITEMS, "random", steps=2, progress=False)
        means = xi.mean_head_outputs(vlm, ITEMS)
        answers = xi.answer_accuracy(vlm, ITEMS, max_new_tokens=3)
        return [
            heads.select_dtypes("number").to_numpy(),
            curve.select_dtypes("number").to_numpy(),
            torch.stack([*means.means.values()]).numpy(),
            answers["predicted"].to_numpy(),
        ]

    with pytest.warns(UserWarning, match=WARNING):
        ours = numbers(adapted)
    for one, other in zip(ours, numbers(evaluated), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_doctor_reports_training_mode(adapted) -> None:
    checkup = xi.doctor(adapted, picture(), QUESTION)
    assert checkup.ok
    row = checkup.table.set_index("check").loc["every module is in evaluation mode"]
    n = len(modules_in_training(adapted.model))
    assert (row["verdict"], row["value"]) == ("skipped", n)
    assert row["note"].startswith(f"{n} {WARNING} (")
    assert row["note"].endswith("xi.record(model) does not: call model.eval()")


def test_the_mode_of_each_module_is_restored() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    model[1].eval()
    inside = ["not entered"]

    def fail() -> None:
        with evaluation_mode(model, warn=False):
            inside[:] = modules_in_training(model)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == []
    assert modules_in_training(model) == ["the model", "0"]
    model.eval()
    model[0].train()
    message = (
        "1 module is in training mode, so any dropout in them is active (0). They are in "
        "evaluation mode for this call; call model.eval() to keep them there, or record a model in "
        "training mode with xi.record(model)."
    )
    with (
        pytest.warns(UserWarning, match=WARNING.split(" ", 2)[2]) as warned,
        evaluation_mode(model),
    ):
        pass
    assert [str(w.message) for w in warned] == [message]
