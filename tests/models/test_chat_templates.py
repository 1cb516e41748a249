"""Roles and turns of the tokens of a chat, with the templates of six model families."""

import copy

import pytest
import torch

from tests.helpers import chat_templates
from tests.helpers.real import real, settled
from tests.helpers.tiny import picture
from xmodal_interp.capturing.run import capture
from xmodal_interp.errors import InputError
from xmodal_interp.models import VLM

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
SYSTEM, FIRST, SECOND, THIRD = (
    "answer in one word",
    "what is it?",
    "a circle",
    "and this? a circle?",
)
CHAT = [
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": [{"type": "image", "image": picture(seed=1)}, FIRST]},
    {"role": "assistant", "content": [{"type": "text", "text": SECOND}]},
    {"role": "user", "content": [THIRD, {"type": "image", "image": picture(seed=2)}]},
]
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
TEXTS = {
    "qwen2_vl": (
        chat_templates.QWEN2_VL,
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{VISION}{FIRST}<|im_end|>\n"
        f"<|im_start|>assistant\n{SECOND}<|im_end|>\n<|im_start|>user\n{THIRD}{VISION}<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    "llava": (
        chat_templates.LLAVA_1_5,
        f"{SYSTEM} USER: <image>\n{FIRST} ASSISTANT: {SECOND} USER: <image>\n{THIRD} ASSISTANT:",
    ),
    "smolvlm": (
        chat_templates.SMOLVLM,
        f"<|im_start|>System: {SYSTEM}<end_of_utterance>\nUser:<image>{FIRST}<end_of_utterance>\n"
        f"Assistant: {SECOND}<end_of_utterance>\nUser: {THIRD}<image><end_of_utterance>\n"
        "Assistant:",
    ),
    "gemma3": (
        chat_templates.GEMMA_3,
        f"<s><start_of_turn>user\n{SYSTEM}\n\n<start_of_image>{FIRST}<end_of_turn>\n"
        f"<start_of_turn>model\n{SECOND}<end_of_turn>\n<start_of_turn>user\n{THIRD}"
        "<start_of_image><end_of_turn>\n<start_of_turn>model\n",
    ),
    "mistral3": (
        chat_templates.PIXTRAL,
        f"<s>[INST][IMG]{FIRST}[/INST]{SECOND}</s>[INST]{SYSTEM}\n\n{THIRD}[IMG][/INST]",
    ),
    "mllama": (
        chat_templates.LLAMA_3_2,
        "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        f"Today Date: 26 Jul 2024\n\n{SYSTEM}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        f"<|image|>{FIRST}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{SECOND}"
        f"<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{THIRD}<|image|><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
}


def with_template(model_type: str) -> VLM:
    processor = copy.copy(settled(model_type))
    processor.chat_template = TEXTS[model_type][0]
    return VLM(real(model_type)[0], processor)


@pytest.mark.parametrize("model_type", TEXTS)
def test_the_roles_and_turns_of_a_published_template(model_type: str) -> None:
    vlm = with_template(model_type)
    text = TEXTS[model_type][1]
    sample = capture(vlm, prompt=CHAT, max_new_tokens=2)
    assert sample.text.startswith(text)
    tokens = sample.tokens
    prompt = tokens[: sample.n_prompt]
    for turn, (role, of_turn) in enumerate(
        [("system", SYSTEM), ("user", FIRST), ("assistant", SECOND), ("user", THIRD)]
    ):
        rows = prompt.loc[prompt["turn"].eq(turn) & prompt["kind"].eq("text")]
        assert set(rows["role"]) == {role}
        start, end = rows["start"].min(), rows["end"].max()
        assert sample.text[start:end].strip() == of_turn
        assert end == text.index(of_turn) + len(of_turn)
    for image, turn in enumerate((1, 3)):
        rows = prompt.loc[prompt["image"].eq(image)]
        if model_type != "mllama":  # images are read by cross-attention; one token marks each
            assert len(rows) == sample.grids[image].n_tokens
        assert set(rows["role"]) <= {"user", "template"}
        of_image = rows.loc[rows["kind"].eq("image")]
        assert set(of_image["role"]) <= {"user"}
        assert set(of_image["turn"]) <= {turn}
    outside = prompt[prompt["role"].eq("template")]
    assert outside["turn"].isna().all()
    assert not outside["kind"].eq("image").any()
    assert tokens["turn"][sample.n_prompt :].eq(4).all()


@pytest.mark.parametrize("model_type", [each for each in TEXTS if each != "mllama"])
def test_the_inputs_are_those_of_the_processor(model_type: str) -> None:
    """The processor reads the text of its template and the images of all messages."""
    vlm = with_template(model_type)
    text = TEXTS[model_type][1]
    images = [picture(seed=1), picture(seed=2)]
    given = {"text": text, "images": images, "return_tensors": "pt"}
    if text.startswith("<s>"):
        given["add_special_tokens"] = False
    ours, _ = vlm.prepare([[]], [CHAT])
    assert torch.equal(ours["input_ids"], vlm.processor(**given)["input_ids"])


@pytest.mark.parametrize(
    "model_type", ["pp_chart2table", "internvl", "llama4", "ovis2", "idefics2", "qwen3_vl"]
)
def test_images_have_the_turns_of_their_messages(model_type: str) -> None:
    """With one template for all: ``pp_chart2table`` writes 16 placeholders for each image."""
    vlm = VLM(real(model_type)[0], settled(model_type))
    sample = capture(vlm, prompt=CHAT, answer="a red circle")
    tokens = sample.tokens
    for image, turn in enumerate((1, 3)):
        rows = tokens.loc[sample.where("image", image=image)]
        assert len(rows) == sample.grids[image].n_tokens
        assert set(rows["role"]) == {"user"}
        assert set(rows["turn"]) == {turn}
    for turn, text in enumerate((SYSTEM, FIRST, SECOND, THIRD)):
        rows = tokens.loc[sample.where("text", turn=turn)]
        assert sample.text[rows["start"].min() : rows["end"].max()].strip() == text
        assert set(rows["role"]) == {CHAT[turn]["role"]}
    assert sample.where(role="generated").tolist() == sample.where(turn=4).tolist()
    assert sample.answer == "a red circle"


def test_a_template_that_refuses_the_order_of_roles() -> None:
    chat = [{"role": "user", "content": "where?"}, {"role": "user", "content": "and where?"}]
    with pytest.raises(InputError) as refusal:
        capture(with_template("gemma3"), prompt=chat)
    assert str(refusal.value) == (
        "The chat template of Gemma3Processor fails on messages of the roles user, user: "
        "Conversation roles must alternate user/assistant/user/assistant/.... Leave out messages "
        "that it does not take, or write the whole prompt."
    )


def test_tool_messages_of_a_template_with_another_name_for_them() -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": "circle"}}}
    chat = [
        *CHAT[1:2],
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "find", "content": "two circles"},
    ]
    sample = capture(with_template("mllama"), prompt=chat)
    rows = sample.tokens.loc[sample.where(role="tool")]
    assert sample.text[rows["start"].min() : rows["end"].max()] == "two circles"
    assert set(rows["turn"]) == {2}
    assert "<|start_header_id|>ipython<|end_header_id|>\n\ntwo circles<|eot_id|>" in sample.text
    assert '\n\n{"name": "find", "parameters": {"what": "circle"}}<|eot_id|>' in sample.text
    assert sample.provenance["messages"][1]["tool_calls"] == [call]


def test_a_template_that_drops_a_message_is_an_error() -> None:
    vlm = with_template("qwen2_vl")
    vlm.processor.chat_template = (
        "{% for message in messages if message['role'] != 'system' %}{% for part in "
        "message['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}"
    )
    chat = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "where?"}]
    with pytest.raises(InputError) as refusal:
        capture(vlm, prompt=chat)
    assert str(refusal.value) == (
        f"The chat template's prompt 'where?' does not contain the message text {SYSTEM!r}. Use a "
        "chat template that keeps message texts unchanged."
    )
