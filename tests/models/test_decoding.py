"""Ways to generate: what is captured right, and what is refused because it is not one answer."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from tests.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.attention import AttentionCall, stitch
from xmodal_interp.capturing import capture
from xmodal_interp.errors import CaptureError, InputError
from xmodal_interp.hooks import record

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


RULE = (
    "A sample is one answer, read once and in order, so that each row of attention is a token of "
    "it. "
)
WAY_OUT = (
    " Generate greedily or by sampling; for anything else record the calls as they come with "
    "xi.record(model)."
)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 2}, "num_beams=2 reads several answers at once and drops all but one."),
        (
            {"do_sample": True, "num_return_sequences": 2},
            "num_return_sequences=2 gives several answers to one prompt.",
        ),
        (
            {"guidance_scale": 2.0},
            "guidance_scale=2.0 reads each step twice, with and without the prompt.",
        ),
        (
            {"prompt_lookup_num_tokens": 2},
            "prompt_lookup_num_tokens=2 reads tokens of the prompt again and drops those it "
            "rejects.",
        ),
        (
            {"assistant_model": torch.nn.Linear(1, 1)},
            "assistant_model=Linear reads tokens of another model and drops those it rejects.",
        ),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True returns more than ids."),
        (
            {"generation_config": GenerationConfig(do_sample=True, num_return_sequences=3)},
            "num_return_sequences=3 gives several answers to one prompt.",
        ),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_what_is_not_one_answer_read_in_order_is_refused(options, words) -> None:
    with pytest.raises(InputError) as error:
        capture(tiny_vlm("llava"), picture(), QUESTION, max_new_tokens=2, generation=options)
    assert str(error.value) == RULE + words + WAY_OUT


def test_beams_of_a_checkpoint_are_left_out() -> None:
    """Greedy unless told otherwise, whatever stands in the checkpoint's generation settings."""
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
def test_a_recording_of_any_way_to_generate_changes_nothing(options) -> None:
    """As the calls come: rows of beams, of drafts that are rejected, of both readings."""
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
        heard = model.generate(**inputs_of("llava"), **options)
    hook.remove()
    assert torch.equal(alone, heard)
    for layer in range(4):
        calls = [call for call in recording.calls if call.layer == layer]
        assert [call.n_queries for call in calls] == steps
        sums = [call.probs().sum(-1) for call in calls]
        assert all(torch.allclose(each, torch.ones_like(each), atol=1e-5) for each in sums)


@pytest.mark.parametrize("family", ["llava", "mllama"])
def test_a_cache_that_holds_the_beginning_is_refused(family: str) -> None:
    """The rows of its positions are not computed; the other rows would be put too early.

    ``generate`` of transformers 5.23 reads what the cache does not hold only
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
        "this run does not compute. Pass an empty cache or none, or record the calls with "
        "xi.record(model)."
    )
    with pytest.raises(InputError) as refusal:
        capture(vlm, picture(), QUESTION, max_new_tokens=2, generation={"past_key_values": cache})
    assert str(refusal.value) == message


def test_a_first_call_with_keys_of_before_is_not_put_at_the_beginning() -> None:
    q, k = torch.randn(2, 1, 2, 6, 4)
    first = AttentionCall(
        tower="language", kind="self", layer=0, module="m", call=0, scaling=0.5,
        q=q[:, :, 2:5], k=k[:, :, :5], mask=torch.ones(5, 5).tril().bool()[None, None, 2:],
    )  # fmt: skip
    step = replace(first, q=q[:, :, 5:], k=k, mask=None, call=1)
    with pytest.raises(CaptureError, match="attends to 5 keys with 3 queries"):
        stitch([first, step], 6)
