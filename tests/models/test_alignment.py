"""Characters and labels of every position, for processors that insert tokens into the prompt."""

import copy

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken

from tests.helpers.pixel_changes import vlm_of
from tests.helpers.tiny import QUESTION, tiny_vlm
from xmodal_interp.errors import GeometryError, PhraseError
from xmodal_interp.models import alignment
from xmodal_interp.models.alignment import counted_alignment, reported_alignment, shifted
from xmodal_interp.models.labels import Prompt
from xmodal_interp.models.token_table import generated_columns, token_table
from xmodal_interp.sample import Sample

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
WIDE = Image.new("RGB", (160, 96), (40, 40, 40))
MARKED = ("idefics3", "gemma3", "mistral3", "llama4", "internvl", "idefics2", "cohere2_vision")


def sample_of(prompt: Prompt) -> Sample:
    return Sample(
        "one",
        prompt.tokens,
        prompt.text,
        prompt.question,
        "",
        len(prompt.tokens),
        prompt.grids,
        prompt.images,
        {},
    )


ALIGNED = (
    *(*MARKED, "llava_next", "qwen3_vl", "paligemma", "blip-2"),
    # leading space removed, line break or separator added, unnamed markers, no placeholder
    *("fuyu", "pi0", "nemotron_h_omni", "pp_chart2table", "shieldgemma2"),
)


@pytest.mark.parametrize("model_type", ALIGNED)
def test_prompt_text_is_found_at_its_positions(model_type: str) -> None:
    vlm = vlm_of(model_type)
    question = "where is the red circle?"
    prompt = vlm.prepare([[WIDE]], [question])[1][0]
    sample = sample_of(prompt)
    found = sample.find("red circle")
    tokens = prompt.tokens.iloc[found]
    assert "".join(tokens["token"]).strip() == "red circle"
    assert tokens["kind"].eq("text").all()
    assert tokens["role"].eq("user").all()
    written = prompt.tokens[prompt.tokens["kind"].eq("text") & prompt.tokens["role"].eq("user")]
    text = "".join(prompt.text[a:b] for a, b in zip(written["start"], written["end"], strict=True))
    assert question.replace(" ", "") in text.replace(" ", "")


@pytest.mark.parametrize("model_type", MARKED)
def test_inserted_tokens_have_the_template_role(model_type: str) -> None:
    prompt = vlm_of(model_type).prepare([[WIDE]], ["where is the red circle?"])[1][0]
    tokens = prompt.tokens
    images = np.flatnonzero(tokens["kind"].eq("image"))
    inside = tokens.iloc[images[0] : images[-1] + 1]
    placeholder = tokens[["start", "end"]].iloc[images[0]]
    assert (inside[["start", "end"]] == placeholder).all(axis=None)
    added = inside[inside["kind"].ne("image")]
    assert added["role"].eq("template").all()
    assert added[["row", "col", "x0", "image", "view"]].isna().all(axis=None)
    assert set(added["kind"]) <= {"special", "text"}


def test_markers_and_breaks_by_name() -> None:
    tokens = vlm_of("mistral3").prepare([[WIDE]], [QUESTION])[1][0].tokens
    special = tokens[tokens["kind"].eq("special")]["token"].tolist()
    rows = int(tokens["row"].max()) + 1
    assert special.count("[IMG_BREAK]") == rows - 1
    assert special.count("[IMG_END]") == 1
    tokens = vlm_of("idefics3").prepare([[WIDE]], [QUESTION])[1][0].tokens
    marker = int(np.flatnonzero(tokens["token"].eq("<row_1_col_2>"))[0])
    assert tokens["tile"].iloc[marker + 1] == 1
    assert tokens["kind"].iloc[marker] == "special"


def test_tiles_and_thumbnail_in_the_table() -> None:
    prompt = vlm_of("idefics3").prepare([[WIDE]], [QUESTION])[1][0]
    (grid,), tokens = prompt.grids, prompt.tokens
    image = tokens[tokens["kind"].eq("image")]
    assert image["view"].eq("thumbnail").sum() == 4
    assert image["tile"][image["view"].eq("thumbnail")].isna().all()
    assert image["tile"].max() + 1 == grid.rows // 2 * (grid.cols // 2)
    values = np.arange(len(image), dtype=float)
    sample = sample_of(prompt)
    assert sample.grid(values).shape == (grid.rows, grid.cols)
    assert sample.grid(values, view="thumbnail").tolist() == [
        [len(image) - 4, len(image) - 3],
        [len(image) - 2, len(image) - 1],
    ]
    with pytest.raises(GeometryError) as refusal:
        sample.grid(values, view="left")
    assert str(refusal.value) == (
        "Image 0 has no view 'left'. The views of this image are 'image' and 'thumbnail'."
    )


def test_samples_of_a_batch_equal_single_samples() -> None:
    vlm = vlm_of("internvl")
    tall = Image.new("RGB", (70, 150))
    together = vlm.prepare([[WIDE], [tall, WIDE]], [QUESTION, "what ?"])[1]
    alone = [
        vlm.prepare([of], [q])[1][0] for of, q in (([WIDE], QUESTION), ([tall, WIDE], "what ?"))
    ]
    for one, other in zip(together, alone, strict=True):
        read = one.tokens[one.tokens["kind"].ne("padding")].reset_index(drop=True)
        assert read.equals(other.tokens.reset_index(drop=True))


def test_ids_that_do_not_match_the_prompt_are_refused() -> None:
    tokenizer = tiny_vlm("llava").tokenizer
    ids = tokenizer("where is the red circle")["input_ids"]
    replacement = {
        "type": "image",
        "span": (0, 7),
        "new_span": (0, 14),
        "text": "<image>",
        "replacement": "<image><image>",
    }
    with pytest.raises(GeometryError) as refusal:
        reported_alignment(ids, ["<image> where"], tokenizer, [replacement])
    assert str(refusal.value) == (
        f"The processor returned {len(ids)} ids, which are not the 3 ids of the prompt with the "
        "1 replacements that it reports. Check that processor and tokenizer belong together."
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    with pytest.raises(GeometryError) as refusal:
        counted_alignment([image] * 3, ["<image>"], tokenizer, image, [2])
    assert str(refusal.value) == (
        "The 3 ids that the processor returned are not the prompt with its placeholders expanded: "
        "3 of them are image tokens, where 1 images should have 2 tokens. Check that processor, "
        "family record and model belong together."
    )


def test_a_prompt_with_all_image_tokens_is_not_expanded() -> None:
    tokenizer = tiny_vlm("llava").tokenizer
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = "<image><image>where<image>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    alignment = counted_alignment(ids, [text], tokenizer, image, [2, 1])
    assert [p.expansion for p in alignment.tokens] == [0, 0, None, 1]
    spans = [(p.start, p.end) for p in alignment.tokens]
    assert spans == [(0, 7), (7, 14), (14, 19), (19, 26)]
    with pytest.raises(GeometryError, match="2 images should have 3, 1 tokens"):
        counted_alignment(ids, [text], tokenizer, image, [3, 1])


def test_prompt_text_is_found_after_insertions() -> None:
    assert shifted([0, 3, 5], "what ?", "<image><bos>what ?\n") == [12, 15, 17]
    with pytest.raises(GeometryError, match="The processor changed the prompt"):
        shifted([0], "what ?", "<image>when ?")


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_words_outside_the_vocabulary_are_text(family: str) -> None:
    lacking = ("🙂", "é", "中文", "zebra")
    sample = sample_of(
        tiny_vlm(family).prepare([[WIDE]], [f"the {' '.join(lacking)} <unk> cross"])[1][0]
    )
    for word in lacking:
        (token,) = sample.find(word)
        assert sample.tokens["kind"].iloc[token] == "text"
        assert sample.tokens["role"].iloc[token] == "user"
        assert sample.tokens["token"].iloc[token] == "<unk>"  # what the model reads
        assert token in sample.text_after_image()
    special = sample.tokens[sample.tokens["kind"].eq("special")]
    assert special["token"].tolist().count("<unk>") == 1  # the one written in the question
    with pytest.raises(PhraseError, match="'<unk>' is not in"):
        sample.find("<unk>")


def test_headers_of_a_chat_template_are_special() -> None:
    """Headers as in Llama 3 have no name in the tokenizer; only their flag marks them special."""
    vlm = copy.deepcopy(tiny_vlm("llava"))
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    vlm.tokenizer.add_tokens([AddedToken(each, special=True) for each in headers])
    assert not set(headers) & set(vlm.tokenizer.all_special_tokens)
    start, end, stop = headers
    text = f"{start}user:{end}<image> where is the red circle ?{stop}{start}assistant:{end}"
    tokens = vlm.prepare([[WIDE]], [text])[1][0].tokens
    shown = tokens[tokens["kind"].eq("special")]
    assert shown["token"].tolist() == [start, end, stop, start, end]
    assert (shown["end"] - shown["start"]).tolist() == [len(each) for each in shown["token"]]
    written = tokens.loc[tokens["kind"].eq("text"), "token"].tolist()
    assert written == ["user:", "where", "is", "the", "red", "circle", "?", "assistant:"]
    ids = vlm.tokenizer.convert_tokens_to_ids(["red", stop])
    columns, text = generated_columns(ids, ids, vlm.tokenizer, "")
    answered = token_table(columns)
    assert answered["kind"].tolist() == ["text", "special"]
    assert answered["token"].tolist() == ["red", stop]
    assert text == " red"


def test_a_beginning_written_by_the_processor_has_the_template_role() -> None:
    prompt = vlm_of("molmo2").prepare([[WIDE]], ["look at <|image|> the red circle"])[1][0]
    sample = sample_of(prompt)
    assert prompt.text == "<s>user: look at <|image|> the red circleassistant:"
    tokens = prompt.tokens
    assert tokens["token"].iloc[sample.find("the red")].str.cat().strip() == "the red"
    assert tokens["role"].iloc[sample.find("look at")].eq("user").all()
    begun = tokens[tokens["token"].eq("<s>")]
    assert len(begun) > 0
    assert begun["role"].eq("template").all()
    assert tokens["kind"].eq("image").sum() == prompt.grids[0].n_tokens


def test_replacements_of_another_prompt_are_refused() -> None:
    tokenizer = tiny_vlm("llava").tokenizer
    reported = {"type": "image", "span": (4, 11), "new_span": (4, 18), "text": "<image>"}
    with pytest.raises(GeometryError) as refusal:
        reported_alignment(
            [5, 6],
            iter(["<image> of a cat"]),
            tokenizer,
            [reported | {"replacement": "<image>" * 2}],
        )
    assert str(refusal.value) == (
        "The processor reports that it replaced '<image>' at 4, but the prompt '<image> of a cat' "
        "has no such text there. Check that processor and prompt belong together."
    )


def test_equal_tokens_of_an_expansion_share_one_span() -> None:
    """The spans are those of the tokens one by one, in any order and across any border."""
    replacements = [
        {
            "span": (2, 5),
            "new_span": (2, 8),
            "text": "<i>",
            "replacement": "<i><i>",
            "type": "image",
        },
        {"span": (6, 9), "new_span": (9, 9), "text": "<j>", "replacement": "", "type": "image"},
        {"span": (9, 10), "new_span": (9, 13), "text": "x", "replacement": "abcd", "type": "image"},
    ]
    expanded = "ab<i><i>cabcdef"
    offsets = [(a, b) for a in range(len(expanded)) for b in range(a, min(a + 5, 15) + 1)]
    chosen = np.random.default_rng(0)
    for _ in range(50):
        picked = [offsets[i] for i in chosen.integers(len(offsets), size=8)]
        for spans in (picked, sorted(picked), [(0, 0), *sorted(picked), (0, 0)]):
            alone = [alignment._token_span(expanded, a, b, replacements) for a, b in spans]
            assert list(alignment._token_spans(expanded, spans, replacements)) == alone
    first, second, other = alignment._token_spans(expanded, [(2, 5), (5, 8), (9, 10)], replacements)
    assert first is second
    assert first != other
