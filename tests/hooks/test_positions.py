"""Positions of interventions, given as numbers, masks or selectors of samples."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import xmodal_interp as xi
from tests.helpers.intervened import call_of, inputs_of, logits
from tests.helpers.real import asked_in_full, real, settled
from tests.helpers.tiny import picture, tiny_vlm
from xmodal_interp import at
from xmodal_interp.capturing.run import capture, capture_batch
from xmodal_interp.errors import CaptureError, InputError, LayerError, PositionError
from xmodal_interp.hooks import record
from xmodal_interp.hooks.ablation import ablate_heads
from xmodal_interp.hooks.attention_modules import Identity
from xmodal_interp.hooks.interventions import Site, intervene
from xmodal_interp.hooks.knockout import knock_out_attention
from xmodal_interp.models import VLM

ASKED = ["What color is the red circle?", "red square ?"]  # the second is padded


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return tiny_vlm("llava")


def spellings(n: int, chosen: list[int]) -> dict[str, Any]:
    mask = np.isin(np.arange(n), chosen)
    return {
        "list": mask.tolist(),
        "numpy": mask,
        "torch": torch.tensor(mask),
        "pandas": pd.Series(mask, index=range(7, 7 + n)),
        "nullable": pd.Series(mask, dtype="boolean"),
        "numbers of pandas": pd.Series(chosen, index=[5] * len(chosen)),
        "narrow": np.array(chosen, dtype=np.uint8) if max(chosen) < 256 else chosen,
    }


@pytest.mark.parametrize("spelling", spellings(2, [0]))
def test_masks_of_positions_layers_and_heads(vlm: VLM, spelling: str) -> None:
    inputs = inputs_of(vlm)
    n = inputs["input_ids"].shape[1]
    queries, keys = [150, 152], [3, 7, 149]
    expected = logits(vlm, inputs, knock_out_attention(queries, keys, layers=[0, 3], heads=[1, 6]))
    of = {
        name: spellings(length, chosen)[spelling]
        for name, length, chosen in (
            ("queries", n, queries),
            ("keys", n, keys),
            ("layers", 4, [0, 3]),
            ("heads", 8, [1, 6]),
        )
    }
    cut = knock_out_attention(of["queries"], of["keys"], layers=of["layers"], heads=of["heads"])
    assert torch.equal(logits(vlm, inputs, cut), expected)
    ablated = ablate_heads({0: of["heads"]}, queries=of["queries"])
    numbers = ablate_heads({0: [1, 6]}, queries=queries)
    assert torch.equal(logits(vlm, inputs, ablated), logits(vlm, inputs, numbers))


REFUSALS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "short mask": (
        lambda: ablate_heads({0: [0]}, queries=np.ones(100, dtype=bool)),
        PositionError,
        "A mask must have one entry per position, 154 in all; got 100 entries.",
    ),
    "long mask": (
        lambda: ablate_heads({0: [0]}, queries=np.ones(200, dtype=bool)),
        PositionError,
        "An intervention edits position 199, but language self-attention ran over positions 0 to "
        "153. Choose positions of the sequence.",
    ),
    "fraction": (
        lambda: knock_out_attention([150.5], [3]),
        PositionError,
        "Positions of an intervention must be a number, a list of numbers, a slice, a boolean "
        "mask, a phrase, a selector of xi.at, or a function of a sample; got [150.5].",
    ),
    "one boolean": (
        lambda: knock_out_attention(True, 3),
        PositionError,
        "Positions of an intervention must be a number, a list of numbers, a slice, a boolean "
        "mask, a phrase, a selector of xi.at, or a function of a sample; got True.",
    ),
    "mask of heads": (
        lambda: ablate_heads({0: np.ones(7, dtype=bool)}),
        LayerError,
        "A mask must have one entry per head, 8 in all; got 7 entries. Pass numbers instead, such "
        "as numpy.flatnonzero(mask).",
    ),
    "mask of layers": (
        lambda: knock_out_attention(5, 2, layers=np.ones(5, dtype=bool)),
        LayerError,
        "A mask must have one entry per layer, 4 in all; got 5 entries. Pass numbers instead, such "
        "as numpy.flatnonzero(mask).",
    ),
    "half a layer": (
        lambda: knock_out_attention(5, 2, layers=[0.5]),
        InputError,
        "layers must be a number or a list, such as -1 or [0, 3]; got [0.5].",
    ),
    "half a head": (
        lambda: ablate_heads({0: [0.5]}),
        LayerError,
        "heads must be a number or a list of numbers, such as [0, 3] or range(4); got [0.5].",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(vlm: VLM, name: str) -> None:
    make, error, message = REFUSALS[name]
    with pytest.raises(error) as refusal:
        logits(vlm, inputs_of(vlm), make())
    assert str(refusal.value) == message


def test_a_recording_accepts_a_mask_of_layers(vlm: VLM) -> None:
    mask = np.array([True, False, False, True])
    with torch.no_grad(), record(vlm.model, towers=["language"], layers=mask) as recording:
        vlm.model(**inputs_of(vlm))
    assert [call.layer for call in recording.calls] == [0, 3]
    with pytest.raises(LayerError, match="A mask must have one entry per layer, 4 in all; got 3"):
        record(vlm.model, layers=mask[:3]).__enter__()


BY_NAME: dict[str, tuple[Any, Any]] = {
    "keywords and phrases": ("last", "red"),
    "functions": (lambda s: s.last, lambda s: s.find("red")),
    "typed selectors": (at.last, at.phrase("red")),
    "unions": (at.last | at.last, [at.phrase("red"), "red", lambda s: s.find("red")]),
    "a selector for each sample": ([["last"], [at.last]], [["red"], [at.phrase("red")]]),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_selectors_are_resolved_in_each_sample_of_a_padded_batch(vlm: VLM, name: str) -> None:
    """A padded sample gives the same logits as alone; its cut edges are shifted by the padding."""
    queries, keys = BY_NAME[name]
    pictures = [[picture(seed=i)] for i in range(2)]
    inputs, prompts = vlm.prepare(pictures, ASKED)
    assert prompts[1].tokens["kind"].eq("padding").sum() > 3
    with record(vlm.model, towers=["language"]) as recording:
        cut = logits(vlm, inputs, knock_out_attention(queries, keys))
    for number, (of, asked) in enumerate(zip(pictures, ASKED, strict=True)):
        alone, (prompt,) = vlm.prepare([of], [asked])
        text = prompt.tokens
        red = text.index[text["token"].str.strip().str.strip("▁Ġ").eq("red")].tolist()
        last = len(text) - 1
        expected = logits(vlm, alone, knock_out_attention(last, red))[0, -1]
        torch.testing.assert_close(cut[number, -1], expected, atol=1e-5, rtol=1e-5)
        assert (logits(vlm, alone)[0, -1] - expected).abs().max() > 1e-3
        shift = len(prompts[number].tokens) - len(text)
        for call in recording.calls:
            probs = call.select_sample(number).probs(queries=[last + shift])[0, :, 0, shift:]
            assert not probs[:, red].any()
            assert (probs > 0).sum(-1).eq(last + 1 - len(red)).all()


def test_numbers_are_refused_if_samples_begin_after_padding(vlm: VLM) -> None:
    inputs, prompts = vlm.prepare([[picture()], [picture()]], ASKED)
    n_padding = int(prompts[1].tokens["kind"].eq("padding").sum())
    message = (
        "One number is a different token in each sample of this batch: sample 1 has "
        f"{n_padding} padding tokens before others. Give positions by phrase or keyword "
        "('red circle', 'last'), by a selector such as xi.at.image, by a function of the sample, "
        "or by a boolean mask [sample, position]."
    )
    given = [5, [5], slice(5, 9), np.arange(len(prompts[0].tokens)) == 5, [[5], [9]]]
    for cut in (
        *(knock_out_attention(positions, slice(None)) for positions in given),
        knock_out_attention(slice(None), 5),
        ablate_heads({0: [0]}, queries=5),
    ):
        with pytest.raises(InputError) as refusal:
            logits(vlm, inputs, cut)
        assert str(refusal.value) == message
    logits(vlm, inputs, knock_out_attention(slice(None), slice(None)))
    mask = torch.zeros(2, len(prompts[0].tokens), dtype=torch.bool)
    mask[:, -1] = True
    by_mask = logits(vlm, inputs, ablate_heads({0: [0]}, queries=mask))
    by_name = logits(vlm, inputs, ablate_heads({0: [0]}, queries="last"))
    assert torch.equal(by_mask, by_name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("n_new", [0, 2])
@pytest.mark.parametrize("name", ["pix2struct", "blip-2"])
def test_numbers_are_refused_for_padding_at_other_places(name: str, n_new: int) -> None:
    """In a decoder with its own mask, and after image features with an inner ``generate``."""
    vlm = VLM(real(name)[0], settled(name))
    questions = [asked_in_full(vlm, each, 1) for each in ASKED]
    with (
        pytest.raises(InputError, match="sample 1 has 4 padding tokens before others"),
        intervene(vlm, ablate_heads({0: [0]}, queries=5)),
    ):
        capture_batch(vlm, [[picture()], [picture()]], questions, max_new_tokens=n_new)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["blip-2", "kosmos-2"])
def test_selectors_if_an_inner_model_generates(name: str) -> None:
    """The forward of the whole model, in which ids are read, does not run."""
    vlm = VLM(real(name)[0], settled(name))
    question = asked_in_full(vlm, ASKED[0], 1)
    with intervene(vlm, knock_out_attention("last", "red circle")):
        sample = capture(vlm, picture(), question, max_new_tokens=2)
    cut = sample.probs(0, queries="last", keys="red circle")
    assert not cut.any()
    assert sample.probs(0, queries=[sample.last + 1], keys="red circle").all()


def test_selectors_during_generation_of_a_batch(vlm: VLM) -> None:
    inputs, prompts = vlm.prepare([[picture(seed=i)] for i in range(2)], ASKED)
    options = {"max_new_tokens": 4, "min_new_tokens": 4}
    mask = torch.zeros(2, len(prompts[0].tokens), dtype=torch.bool)
    mask[:, -1] = True
    answers = []
    for queries in ("last", mask):
        with intervene(vlm, ablate_heads({0: range(8), 3: range(8)}, queries=queries)):
            answers.append(vlm.generate(inputs, **options))
    assert torch.equal(*answers)


def test_selectors_require_prepared_samples(vlm: VLM) -> None:
    other = {**inputs_of(vlm), "input_ids": inputs_of(vlm)["input_ids"].flip(0)}
    vlm.prepare([[picture()]], ["another question ?"])
    with pytest.raises(CaptureError, match="The model ran inputs that the VLM did not prepare"):
        logits(vlm, other, ablate_heads({0: [0]}, queries="last"))
    bare = vlm.model
    with pytest.raises(CaptureError):
        logits(VLM(bare, vlm.processor), inputs_of(vlm), ablate_heads({0: [0]}, queries="last"))
    with pytest.raises(InputError, match="positions that are not tokens of the prompt"):
        logits(vlm, inputs_of(vlm), ablate_heads({0: [0]}, tower="vision", queries="last"))


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["additive", "boolean"])
def test_a_mask_with_one_row_for_all_queries_is_cut(kind: str, backend: str) -> None:
    """Bridgetower uses masks ``[sample, 1, 1, key]``."""
    q, k = torch.zeros(2, 1, 3, 4), torch.randn(2, 1, 3, 4)
    seen = torch.tensor([[True, True, True], [True, True, False]])[:, None, None]
    mask = seen if kind == "boolean" else torch.zeros(2, 1, 1, 3).masked_fill(~seen, -1e4)
    call = call_of(q, k, k, backend=backend, is_causal=False)
    call = type(call)(call.module, q, k, k, mask, backend, call.options)
    site = Site(Identity("encoder.0", "language", "self", 0), (0,), 0)
    cut = knock_out_attention(2, 0).before(call, site).mask
    assert cut is not None
    if cut.dtype == torch.bool:
        hidden = ~cut.expand(2, 1, 3, 3)
    else:
        hidden = cut.expand(2, 1, 3, 3) < -1e3
    before = (~seen).expand(2, 1, 3, 3) if not (kind == "boolean" and backend == "eager") else None
    expected = torch.zeros(2, 1, 3, 3, dtype=torch.bool) if before is None else before.clone()
    expected[:, :, 2, 0] = True
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize(
    ("selector", "start"),
    [
        (at.answer, 0),
        (at.predicts(at.answer), -1),
        (at.answer | at.last, -1),
        ([lambda s: s.last, at.answer], -1),
    ],
    ids=range(4),
)
def test_the_answer_is_every_position_after_the_prompt(selector: Any, start: int) -> None:
    """In decode steps, in a padded batch, and on a given answer."""
    vlm = xi.load()
    pictures, asked = [picture(seed=1), picture(seed=2)], ["where is the red circle ?", "where ?"]
    given = {"answers": ["top left", "bottom right"]}
    for options in ({"max_new_tokens": 3}, given):
        several = cut_off(vlm, pictures, asked, selector, options)
        for number, sample in enumerate(several):
            one = (
                options if "max_new_tokens" in options else {"answers": [given["answers"][number]]}
            )
            n_prompt = len(vlm.prepare([[pictures[number]]], [asked[number]])[1][0].tokens)
            where = slice(n_prompt + start, None)
            (alone,) = cut_off(vlm, [pictures[number]], [asked[number]], where, one)
            (untouched,) = cut_off(vlm, [pictures[number]], [asked[number]], [], one)
            padding = len(sample) - len(alone)
            assert alone.answer == sample.answer
            rows = range(n_prompt - 2, len(alone))
            for layer in range(4):
                expected = alone.probs(layer, queries=list(rows))
                found = sample.probs(layer, queries=[row + padding for row in rows])
                torch.testing.assert_close(found[..., padding:], expected, atol=1e-5, rtol=1e-5)
            cut = alone.probs(0, keys=at.image).sum(-1)
            seen = untouched.probs(0, keys=at.image).sum(-1)
            assert cut[:, n_prompt + start :].eq(0).all()
            assert torch.equal(cut[:, : n_prompt + start], seen[:, : n_prompt + start])


def cut_off(
    vlm: VLM, pictures: list[Any], asked: list[str], queries: Any, options: dict[str, Any]
) -> list[Any]:
    """Capture with no attention from the queries to the image."""
    with intervene(vlm, knock_out_attention(queries, at.image)):
        return capture_batch(vlm, pictures, asked, **options)
