"""Teacher forcing gives the product of stepwise probabilities, for every type that generates.

The model generates the known answer token by token, with its own cache and inputs. The scores of
one forward over prompt and answer must equal those of these steps. Some types are tested by
default, all of them with ``--all-types``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GenerationMixin

from tests.helpers.real import ANSWER, GENERATING, asked, some_of, vlm_with_exact_steps
from tests.helpers.tiny import picture
from xmodal_interp.analysis.answers import answer_scores, check_causal
from xmodal_interp.analysis.pruning import head_pruning
from xmodal_interp.errors import UnsupportedModelError
from xmodal_interp.evaluation.faithfulness import deletion_curve
from xmodal_interp.hooks.ablation import ablate_heads
from xmodal_interp.hooks.interventions import intervene
from xmodal_interp.models import VLM
from xmodal_interp.models.known_answers import batches_of
from xmodal_interp.models.model_inputs import with_answer, without_last

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
LIMIT = 1e-5  # nats per token, in float32, of values around 10


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        names = GENERATING if metafunc.config.getoption("all_types") else some_of(GENERATING)
        metafunc.parametrize("name", names)


@contextmanager
def forced(model: torch.nn.Module, ids: Sequence[int]) -> Iterator[list[Tensor]]:
    """Make ``generate`` choose these tokens; yield the log-probabilities of each step.

    The outputs of the model are changed, because some ``generate`` methods drop logits processors.
    """
    steps: list[Tensor] = []
    depth = 0

    def enter(*_: Any) -> None:
        nonlocal depth
        depth += 1

    def leave(_module: Any, _args: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1
        if depth == 0:
            last = output.logits[:, -1]
            steps.append(last.float().log_softmax(-1))
            chosen = torch.full_like(last, -torch.inf)
            chosen[:, ids[len(steps) - 1]] = 0
            output.logits = chosen[:, None]

    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, GenerationMixin):
                stack.callback(module.register_forward_pre_hook(enter).remove)
                stack.callback(module.register_forward_hook(leave).remove)
        yield steps


def stepwise(vlm: VLM, item: dict[str, Any], ids: Sequence[int]) -> float:
    """Return the mean log-probability of an answer's tokens when the model generates them."""
    inputs, _ = vlm.prepare([[item["image"]]], [item["prompt"]])
    with forced(vlm.model, ids) as steps, torch.no_grad():
        vlm.generate(inputs, max_new_tokens=len(ids), min_new_tokens=len(ids))
    assert len(steps) == len(ids)
    return float(torch.stack(steps)[range(len(ids)), 0, list(ids)].double().mean())


def test_the_score_of_an_answer_equals_that_of_its_steps(name: str) -> None:
    vlm = vlm_with_exact_steps(name)
    item = {"image": picture(), "prompt": asked(vlm, 1), "answer": ANSWER}
    (batch,) = batches_of(vlm, [item], batch_size=1)
    (ids,) = batch.answers
    assert len(ids) == 3
    assert "labels" not in batch.inputs
    score = answer_scores(vlm, batch)[1, 0]
    assert score == pytest.approx(stepwise(vlm, item, ids), abs=LIMIT)
    check_causal(vlm, batch)


def test_paligemma_can_be_pruned_and_its_tokens_deleted() -> None:
    """The processor returns ``labels``, and the answer is not in the bidirectional prefix."""
    vlm = vlm_with_exact_steps("paligemma")
    item = {"image": picture(), "prompt": asked(vlm, 1), "answer": ANSWER}
    (batch,) = batches_of(vlm, [item], batch_size=1)
    assert batch.inputs["token_type_ids"][0, -4:].tolist() == [0, 1, 1, 1]
    expected = stepwise(vlm, item, batch.answers[0])
    table = head_pruning(vlm, [item], layers=[0], heads=[0], progress=False, n_bootstrap=10)
    assert table.attrs["base"]["all"]["log_prob"] == pytest.approx(expected, abs=LIMIT)
    curve = deletion_curve(vlm, [item], "random", steps=2, progress=False)
    assert np.log(curve["probability"][0]) == pytest.approx(expected, abs=LIMIT)


def test_layers_that_share_keys_are_pruned_by_whole_forwards() -> None:
    """Gemma 3n stores shared keys in a dictionary, which layers that are skipped do not fill."""
    vlm = vlm_with_exact_steps("gemma3n")
    item = {"image": picture(), "prompt": asked(vlm, 1), "answer": ANSWER}
    (batch,) = batches_of(vlm, [item], batch_size=1)
    table = head_pruning(
        vlm, [item], layers=[1, 3], heads=[1], mode="zero", progress=False, n_bootstrap=10
    )
    base = answer_scores(vlm, batch)[1, 0]
    assert table["layer"].unique().tolist() == [1, 3]
    for row in table[table["question_kind"] == "all"].itertuples():
        with intervene(vlm, ablate_heads({row.layer: [1]}, "zero")):
            drop = base - answer_scores(vlm, batch)[1, 0]
        assert row.log_prob_drop == pytest.approx(drop, abs=LIMIT)
    assert table["log_prob_drop"].abs().min() > 1e-3
    curve = deletion_curve(vlm, [item], "random", steps=2, progress=False)
    assert np.log(curve["probability"][0]) == pytest.approx(base, abs=LIMIT)


@pytest.mark.parametrize("model_type", ["paligemma", "dots3_note"])
def test_a_model_whose_prompt_depends_on_the_answer_is_refused(model_type: str) -> None:
    """The causes are an answer in the bidirectional prefix, and ties of sparse attention."""
    vlm = vlm_with_exact_steps(model_type)
    item = {"image": picture(), "prompt": asked(vlm, 1), "answer": ANSWER}
    (batch,) = batches_of(vlm, [item], batch_size=1)
    if model_type == "paligemma":
        batch.inputs["token_type_ids"][:] = 0
    for module in vlm.model.modules():
        if hasattr(module, "index_topk"):
            module.index_topk = 8
    with pytest.raises(UnsupportedModelError, match=r"change by .* when that token is appended"):
        check_causal(vlm, batch)


def test_the_answer_after_an_image_has_no_image_type() -> None:
    """Gemma 3 attends in both directions between tokens of the image type."""
    vlm = vlm_with_exact_steps("gemma3")
    inputs = {
        "input_ids": torch.arange(6)[None],
        "token_type_ids": torch.tensor([[0, 0, 0, 1, 1, 1]]),
    }
    longer = with_answer(vlm.model, inputs, [[7, 8]], last_text=[2])
    assert longer["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 0, 0]]


def test_pixels_as_long_as_the_prompt_are_not_extended() -> None:
    vlm = vlm_with_exact_steps("llava")
    inputs = {
        "input_ids": torch.arange(6)[None],
        "attention_mask": torch.ones(1, 6, dtype=torch.long),
        "pixel_values": torch.randn(1, 6, 4),
    }
    longer = with_answer(vlm.model, inputs, [[7, 8]], [5])
    assert longer["input_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 7, 8]]
    assert longer["attention_mask"].tolist() == [[1] * 8]
    assert torch.equal(longer["pixel_values"], inputs["pixel_values"])
    assert all(torch.equal(without_last(longer)[k][:, :6], inputs[k]) for k in inputs)
