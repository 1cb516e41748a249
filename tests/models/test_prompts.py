"""The prompt of a question: the chat template, placeholders in the question, the system message."""

import copy

import pytest

from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.capturing.run import capture
from xmodal_interp.errors import InputError
from xmodal_interp.models import VLM
from xmodal_interp.models.prompts import rendered

SYSTEM = "describe the image"
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The template of LLaVA 1.5: images first, and no special tokens around messages."""


def vlm_with(template: str | None, family: str = "llava") -> VLM:
    vlm = tiny_vlm(family)
    processor = copy.copy(vlm.processor)
    processor.chat_template = template
    return VLM(vlm.model, processor)


@pytest.mark.parametrize("question", ["<image>\nwhere ?", "where ?\n<image>", "is <image> a cat ?"])
def test_a_placeholder_keeps_its_place_in_the_chat_template(question: str) -> None:
    prompt = rendered(vlm_with(LLAVA_TEMPLATE), question, 1, 0, system=SYSTEM)
    assert prompt.text == f"SYSTEM: {SYSTEM} USER: {question} ASSISTANT:"
    roles = {prompt.text[span.start : span.end]: span.role for span in prompt.spans}
    assert roles == {SYSTEM: "system", question: "user"}  # the placeholder is in the question


@pytest.mark.parametrize("mark", ["<image>", "<video>"])
def test_a_mark_that_is_plain_text_is_a_warning(mark: str) -> None:
    vlm = tiny_vlm("qwen2_vl")
    with pytest.warns(UserWarning, match="plain text for this model") as caught:
        capture(vlm, picture(), f"{mark}\n{QUESTION}")
    assert [str(each.message) for each in caught] == [
        f"The prompt contains {mark!r}, which is plain text for this model. If it is the place of "
        "a picture, write <|image_pad|> or <|video_pad|>, or pass messages."
    ]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_leading_placeholder_does_not_change_the_answer(family: str) -> None:
    vlm = tiny_vlm(family)
    bare = capture(vlm, picture(), QUESTION, system=SYSTEM, max_new_tokens=4)
    image = bare.text[bare.text.index("user:") + len("user:") : bare.text.index(QUESTION)].strip()
    placed = capture(vlm, picture(), f"{image} {QUESTION}", system=SYSTEM, max_new_tokens=4)
    assert placed.text.split() == bare.text.split()
    assert placed.answer == bare.answer
    assert placed.tokens["token"].tolist() == bare.tokens["token"].tolist()
    for role in ("system", "generated"):
        assert placed.where(role=role).tolist() == bare.where(role=role).tolist()


@pytest.mark.parametrize(
    "prompt",
    [
        "USER: <image>\nwhere ? ASSISTANT:",
        "USER: <image>\nwhere ? ASSISTANT: to the left",
        "A chat. USER: where <image> ?\nASSISTANT:",
    ],
)
def test_a_rendered_prompt_is_used_as_it_is(prompt: str) -> None:
    vlm = vlm_with(LLAVA_TEMPLATE)
    assert rendered(vlm, prompt, 1, 0).text == prompt
    with pytest.raises(InputError) as refusal:
        rendered(vlm, prompt, 1, 0, system=SYSTEM)
    assert str(refusal.value) == (
        f"The system message {SYSTEM!r} cannot be added: the prompt {prompt!r} is already "
        "rendered. Write it into the prompt, and leave out system."
    )


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama"])
def test_a_prompt_of_the_models_own_template_is_not_rendered_again(family: str) -> None:
    vlm = tiny_vlm(family)
    once = rendered(vlm, QUESTION, 1, 0, system=SYSTEM).text
    assert SYSTEM in once
    assert rendered(vlm, once, 1, 0).text == once


def test_a_system_message_without_a_template_is_an_error() -> None:
    vlm = vlm_with(None)
    assert rendered(vlm, "<image> where ?", 1, 0).text == "<image> where ?"
    with pytest.raises(InputError) as refusal:
        capture(vlm, picture(), "<image> where ?", system=SYSTEM)
    assert str(refusal.value) == (
        f"The system message {SYSTEM!r} cannot be added: LlavaProcessor has no chat template to "
        "put it in. Write it into the prompt, and leave out system."
    )


def test_a_template_that_refuses_the_system_role_is_an_error() -> None:
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + LLAVA_TEMPLATE
    )
    with pytest.raises(InputError) as refusal:
        capture(vlm_with(refusing), picture(), "<image>\nwhere ?", system=SYSTEM)
    assert str(refusal.value) == (
        "The chat template of LlavaProcessor fails on messages of the roles system, user: no "
        "system role. Leave out messages that it does not take, or write the whole prompt."
    )


def test_a_template_of_string_contents_is_an_error() -> None:
    of_strings = "{% for message in messages %}{{ 'a ' + message['content'] }}{% endfor %}"
    with pytest.raises(InputError) as refusal:
        capture(vlm_with(of_strings), picture(), QUESTION)
    assert str(refusal.value) == (
        "The chat template of LlavaProcessor fails on messages of the roles user: can only "
        'concatenate str (not "list") to str. Leave out messages that it does not take, or write '
        "the whole prompt."
    )
