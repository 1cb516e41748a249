"""Generation options: those that are captured, and those that are refused."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.attention import AttentionCall, stitch
from xmodal_interp.capturing.run import capture, capture_batch
from xmodal_interp.errors import CaptureError, InputError
from xmodal_interp.hooks import record
from xmodal_interp.models.generation import described

FAMILIES = ["llava", "qwen2_vl", "mllama"]
N = 6


def inputs_of(family: str) -> dict:
    return tiny_vlm(family).prepare([[picture()]], [QUESTION])[0]


def read_at_once(family: str, ids: torch.Tensor) -> list:
    """The calls of the language tower when prompt and answer are read in one forward."""
    vlm, inputs = tiny_vlm(family), inputs_of(family)
    n_new = ids.shape[1] - inputs["input_ids"].shape[1]
    fed = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in fed:
        types = fed["mm_token_type_ids"]
        fed["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, n_new))
    if "cross_attention_mask" in fed:
        mask = fed["cross_attention_mask"]
        last = mask[:, -1:].expand(-1, n_new, -1, -1)
        fed["cross_attention_mask"] = torch.cat([mask, last], 1)
    with torch.no_grad(), record(vlm.model, towers=["language"]) as recording:
        vlm.model(**fed, use_cache=False)
    return recording.calls


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 5},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 50},
        {"repetition_penalty": 1.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_one_forward(family, options) -> None:
    vlm, options = tiny_vlm(family), {"min_new_tokens": N, **options}
    torch.manual_seed(1)
    with torch.no_grad():
        ids = vlm.generate(inputs_of(family), max_new_tokens=N, **options)
    torch.manual_seed(1)
    sample = capture(vlm, picture(), QUESTION, max_new_tokens=N, generation=options)
    n_prompt = inputs_of(family)["input_ids"].shape[1]
    assert sample.answer == vlm.tokenizer.decode(ids[0, n_prompt:], skip_special_tokens=True)
    for call in read_at_once(family, ids[:, :-1]):
        ours = sample.probs(call.layer, kind=call.kind)
        torch.testing.assert_close(ours, call.probs()[0], atol=1e-5, rtol=0)


REST = (
    ", so the rows of attention are not those of one answer's tokens in order. Generate greedily "
    "or by sampling, or record the calls with xi.record(model)."
)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "num_beams=2 generates several answers at once and keeps one of them"),
        (
            {"do_sample": True, "num_return_sequences": 2},
            "num_return_sequences=2 generates several answers to one prompt",
        ),
        (
            {"guidance_scale": 2.0},
            "guidance_scale=2.0 runs each step twice, with and without the prompt",
        ),
        (
            {"prompt_lookup_num_tokens": 2},
            "prompt_lookup_num_tokens=2 runs tokens copied from the prompt and drops those it "
            "rejects",
        ),
        (
            {"assistant_model": torch.nn.Linear(1, 1)},
            "assistant_model=Linear runs tokens proposed by another model and drops those it "
            "rejects",
        ),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True returns more than ids"),
        (
            {"generation_config": GenerationConfig(do_sample=True, num_return_sequences=3)},
            "num_return_sequences=3 generates several answers to one prompt",
        ),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_options_for_more_than_one_answer_in_order_are_refused(options, words) -> None:
    with pytest.raises(InputError) as error:
        capture(tiny_vlm("llava"), picture(), QUESTION, max_new_tokens=2, generation=options)
    assert str(error.value) == words + REST


def test_beams_in_the_generation_config_are_ignored() -> None:
    """Generation is greedy by default, even if the checkpoint's settings are not."""
    vlm = tiny_vlm("llava")
    beaming = replace(vlm, model=copy.deepcopy(vlm.model))
    beaming.model.generation_config.num_beams = 4
    plain = capture(vlm, picture(), QUESTION, max_new_tokens=4)
    assert capture(beaming, picture(), QUESTION, max_new_tokens=4).answer == plain.answer


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 2},
        {"guidance_scale": 2.0},
    ],
    ids=str,
)
def test_recording_does_not_change_generation(options) -> None:
    """The calls of beams, rejected drafts and guidance are all recorded."""
    model, options = tiny_vlm("llava").model, {"min_new_tokens": N, "max_new_tokens": N, **options}
    torch.manual_seed(2)
    alone = model.generate(**inputs_of("llava"), **options)
    steps: list[int] = []

    def count(module: torch.nn.Module, args: tuple, given: dict) -> None:  # noqa: ARG001
        steps.append(given["position_ids"].shape[-1])

    rotary = model.model.language_model.rotary_emb
    hook = rotary.register_forward_pre_hook(count, with_kwargs=True)
    torch.manual_seed(2)
    with record(model, towers=["language"]) as recording:
        recorded = model.generate(**inputs_of("llava"), **options)
    hook.remove()
    assert torch.equal(alone, recorded)
    for layer in range(4):
        calls = [call for call in recording.calls if call.layer == layer]
        assert [call.n_queries for call in calls] == steps
        sums = [call.probs().sum(-1) for call in calls]
        assert all(torch.allclose(each, torch.ones_like(each), atol=1e-5) for each in sums)


@pytest.mark.parametrize("family", ["llava", "mllama"])
def test_a_cache_with_positions_is_refused(family: str) -> None:
    """The rows of cached positions are not computed, so other rows would be misplaced.

    ``generate`` of transformers 5.23 only runs positions that are not in the cache
    (``prepare_inputs_for_generation``).
    """
    vlm = tiny_vlm(family)
    inputs, _ = vlm.prepare([[picture()]], [QUESTION])
    text_config = vlm.model.config.get_text_config()
    cache = DynamicCache(config=text_config)
    capture(vlm, picture(), QUESTION, max_new_tokens=2, generation={"past_key_values": cache})
    held = cache.get_seq_length()
    assert held > inputs["input_ids"].shape[1]  # an empty one is filled, and is not refused
    message = (
        f"The cache in past_key_values already holds {held} positions, whose rows of attention "
        "this run does not compute. Pass an empty cache or no cache, or record the calls with "
        "xi.record(model)."
    )
    with pytest.raises(InputError) as refusal:
        capture(vlm, picture(), QUESTION, max_new_tokens=2, generation={"past_key_values": cache})
    assert str(refusal.value) == message


def test_a_first_call_with_cached_keys_is_refused() -> None:
    q, k = torch.randn(2, 1, 2, 6, 4)
    first = AttentionCall(
        tower="language", kind="self", layer=0, module="m", call=0, scaling=0.5,
        q=q[:, :, 2:5], k=k[:, :, :5], mask=torch.ones(5, 5).tril().bool()[None, None, 2:],
    )  # fmt: skip
    step = replace(first, q=q[:, :, 5:], k=k, mask=None, call=1)
    with pytest.raises(CaptureError, match="attends to 5 keys with 3 queries"):
        stitch([first, step], 6)


def test_a_generation_config_is_used_as_given(caplog) -> None:
    """Sampling of a ``generation_config`` is sampling; what it leaves open is greedy."""
    vlm = tiny_vlm("llava")
    inputs = inputs_of("llava")
    config = GenerationConfig(do_sample=True, temperature=5.0, top_k=0, min_new_tokens=N)
    torch.manual_seed(3)
    expected = vlm.model.generate(**inputs, **config.to_diff_dict(), max_new_tokens=N)
    torch.manual_seed(3)
    options = {"generation_config": config}
    sampled = capture(vlm, picture(), QUESTION, max_new_tokens=N, generation=options)
    n_prompt = inputs["input_ids"].shape[1]
    answer = vlm.tokenizer.decode(expected[0, n_prompt:], skip_special_tokens=True)
    greedy = capture(vlm, picture(), QUESTION, max_new_tokens=N, generation={"min_new_tokens": N})
    assert sampled.answer == answer != greedy.answer
    options = {"generation_config": GenerationConfig(min_new_tokens=N)}
    left_open = capture(vlm, picture(), QUESTION, max_new_tokens=N, generation=options)
    assert left_open.answer == greedy.answer
    options = {"generation_config": config, "do_sample": False}
    overridden = capture(vlm, picture(), QUESTION, max_new_tokens=N, generation=options)
    assert overridden.answer == greedy.answer
    assert (config.do_sample, config.max_new_tokens) == (True, None)
    assert "deprecated" not in caplog.text


def test_the_provenance_has_the_arguments_of_generate() -> None:
    vlm = tiny_vlm("llava")
    config = GenerationConfig(do_sample=True, temperature=5.0)
    options = {"generation_config": config, "min_new_tokens": 2, "streamer": None, "seed": {1}}
    assert described(options) == {
        "generation_config": {"do_sample": True, "temperature": 5.0},
        "min_new_tokens": 2,
        "streamer": None,
        "seed": "set",
    }
    options = {"min_new_tokens": 2, "generation_config": config}
    sample = capture(vlm, picture(), QUESTION, max_new_tokens=2, generation=options)
    assert sample.provenance["generation"] == described(options)
    json.dumps(sample.provenance)
    greedy = capture(vlm, picture(), QUESTION, max_new_tokens=2)
    assert "generation" not in greedy.provenance


def test_a_generation_config_that_cannot_be_captured_is_an_error() -> None:
    vlm = tiny_vlm("llava")

    def refusal(config) -> str:
        options = {"generation_config": config}
        with pytest.raises(InputError) as error:
            capture(vlm, picture(), QUESTION, max_new_tokens=2, generation=options)
        return str(error.value)

    assert refusal(GenerationConfig(num_beams=3)) == (
        "num_beams=3 generates several answers at once and keeps one of them" + REST
    )
    assert refusal({"do_sample": True}) == (
        "generation_config must be a transformers.GenerationConfig; got an object of dict."
    )
    assert refusal(GenerationConfig(max_new_tokens=50)) == (
        "The generation_config has max_new_tokens=50, but the argument max_new_tokens is 2. Pass "
        "the same number as the argument."
    )


@pytest.mark.parametrize("own", ["argument", "list", "tensor", "config"])
def test_padding_after_an_own_end_token_is_not_generated(own: str) -> None:
    """In a batch, the answer that ends first is filled up with padding."""
    vlm = tiny_vlm("llava")
    images, questions = [[picture()], [picture()]], [QUESTION, "how many shapes ?"]
    options = {"min_new_tokens": 0}
    no_end = {"eos_token_id": None}
    whole = capture_batch(vlm, images, questions, max_new_tokens=N, generation=no_end)
    answers = [vlm.tokenizer(each.answer, add_special_tokens=False)["input_ids"] for each in whole]
    both = {*answers[0]} & {*answers[1]}
    lengths = {token: tuple(ids.index(token) for ids in answers) for token in both}
    end, n_before = next((t, n) for t, n in lengths.items() if n[0] != n[1] and min(n) > 0)
    ends = {
        "argument": {"eos_token_id": end},
        "list": {"eos_token_id": [end]},
        "tensor": {"eos_token_id": torch.tensor(end)},
        "config": {"generation_config": GenerationConfig(eos_token_id=end)},
    }[own]
    samples = capture_batch(vlm, images, questions, max_new_tokens=N, generation=options | ends)
    for sample, image, question in zip(samples, images, questions, strict=True):
        alone = capture(vlm, image, question, max_new_tokens=N, generation=options | ends)
        assert sample.answer == alone.answer
        pad = len(sample.where("padding"))
        assert sample.tokens["token"][pad:].tolist() == alone.tokens["token"].tolist()
    assert tuple(len(sample.where(role="generated")) for sample in samples) == n_before


class EndsAt(StoppingCriteria):
    """Ends an answer after a token that is no end-of-sequence token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):  # noqa: ARG002
        return input_ids[:, -1] == self.token


def test_answers_that_end_by_a_criterion_are_not_filled_up() -> None:
    vlm = tiny_vlm("llava")
    images, questions = [[picture()], [picture()]], [QUESTION, "how many shapes ?"]
    eos = {"eos_token_id": None}
    whole = capture_batch(vlm, images, questions, max_new_tokens=N, generation=eos)
    answers = [each.answer.split() for each in whole]
    word = next(w for w in answers[0] if w in answers[1] and answers[0].index(w) > 1)
    assert answers[0].index(word) != answers[1].index(word)
    criterion = EndsAt(vlm.tokenizer.convert_tokens_to_ids(word))
    options = {"stopping_criteria": StoppingCriteriaList([criterion])}
    samples = capture_batch(vlm, images, questions, max_new_tokens=N, generation=options)
    for sample, answer, image, question in zip(samples, answers, images, questions, strict=True):
        assert sample.answer.split() == answer[: answer.index(word) + 1]
        alone = capture(vlm, image, question, max_new_tokens=N, generation=options)
        assert sample.tokens["token"].tolist() == alone.tokens["token"].tolist()


def test_options_of_generation_without_tokens_to_generate_are_an_error() -> None:
    with pytest.raises(InputError) as refusal:
        capture(tiny_vlm("llava"), picture(), QUESTION, generation={"do_sample": True})
    assert str(refusal.value) == (
        "generation={'do_sample': True} has no effect, because max_new_tokens is 0. Pass the "
        "number of tokens to generate, or leave generation out."
    )
