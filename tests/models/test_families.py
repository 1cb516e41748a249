"""Every type has a record, and every record has a rule or a reason."""

import copy
from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import (
    CONFIG_MAPPING,
    BlipForQuestionAnswering,
    BlipModel,
    LlavaModel,
    Qwen2VLModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import xmodal_interp as xi
from tests.helpers.pixel_changes import embeddings, vlm_of
from tests.helpers.real import real
from tests.helpers.tiny import tiny_vlm
from tests.helpers.tiny_configs import tiny_config
from xmodal_interp.errors import GeometryError, InputError, PhraseError, UnsupportedModelError
from xmodal_interp.models import FAMILIES, VLM
from xmodal_interp.models.records import family_of

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)


def test_every_type_has_a_record() -> None:
    assert len(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) == 97
    assert set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) <= set(FAMILIES)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_record_has_a_rule_or_a_reason(model_type: str) -> None:
    family = FAMILIES[model_type]
    assert family.model_type == model_type
    assert family.geometry is not None or (family.reason or "").endswith(".")
    assert (family.rule == "none") == (family.geometry is None)


@pytest.mark.parametrize(
    "model_type", ["blip-2", "instructblip", "idefics2", "aria", "kosmos-2", "kosmos-2.5"]
)
def test_queries_are_outside_the_grid_and_patches_are_on_it(model_type: str) -> None:
    vlm = vlm_of(model_type)
    _, (prompt,) = vlm.prepare([[Image.new("RGB", (120, 70))]], ["where is the red circle?"])
    (grid,) = prompt.grids
    image = prompt.tokens[prompt.tokens["kind"] == "image"]
    assert len(image) == grid.n_tokens == 8
    assert image["image"].eq(0).all()
    assert image[["row", "col", "x0", "view", "tile"]].isna().all(axis=None)
    assert grid.arranged(grid.patch_places[:, 0].astype(float)).shape[0] == grid.patch_rows > 0
    with pytest.raises(GeometryError) as refusal:
        grid.arranged(image["start"].to_numpy(float))
    assert str(refusal.value) == (
        "Image 0 has no grid. Its image tokens are learned queries, each of which attends to the "
        "whole image, so they have no row and column; xi.on_patches maps their values to the "
        "patches that they attend to."
    )


def test_a_type_that_takes_frames_as_images_requires_their_number() -> None:
    vlm = vlm_of("instructblipvideo")
    frames = [Image.new("RGB", (120, 70))] * 4
    _, (prompt,) = vlm.prepare([frames], ["where is the red circle?"])
    images = prompt.tokens.loc[prompt.tokens["kind"] == "image", "image"]
    assert images.tolist() == [number for number in range(4) for _ in range(8)]
    for n in (1, 5):
        with pytest.raises(GeometryError) as refusal:
            vlm.prepare([frames[:1] * n], ["where is the red circle?"])
        assert str(refusal.value) == (
            "The model type 'instructblipvideo' takes the 4 frames of a video as images; got "
            f"{n}. Give each prompt 4 images, the frames in order."
        )


def test_a_type_without_a_rule_still_labels_its_tokens() -> None:
    vlm = vlm_of("aria")
    vlm = replace(vlm, family=replace(vlm.family, geometry=None))
    _, prompt = embeddings(vlm, [Image.new("RGB", (120, 70)), Image.new("RGB", (70, 120))])
    assert [grid.n_tokens for grid in prompt.grids] == [
        prompt.tokens["image"].eq(i).sum() for i in range(2)
    ]
    assert prompt.grids[0].n_tokens > 0
    assert prompt.tokens.loc[prompt.tokens["kind"] == "image", "row"].isna().all()
    with pytest.raises(GeometryError, match=r"^Image 1 has no grid. Its image tokens are learned"):
        prompt.grids[1].arranged(prompt.grids[1].places[:, 0].astype(float), number=1)


@pytest.mark.parametrize("model_type", ["pp_formulanet", "vision-encoder-decoder"])
def test_a_type_without_text_input_refuses_a_prompt(model_type: str) -> None:
    with pytest.raises(InputError) as error:
        vlm_of(model_type).prepare([[Image.new("RGB", (64, 48))]], ["what is it?"])
    assert str(error.value) == (
        f"A {model_type} model takes no prompt; got 'what is it?'. Pass an empty prompt, ''."
    )


def test_without_a_rule_tokens_are_labelled_by_kind() -> None:
    unruled = replace(
        FAMILIES["idefics"], geometry=None, image_mark=None, reason="No rule is known."
    )
    vlm = xi.VLM(*real("idefics"), unruled)
    sample = xi.capture(vlm, Image.new("RGB", (64, 48)), "where is the red circle?")
    image = sample.tokens[sample.tokens["kind"] == "image"]
    assert image["image"].eq(0).all()
    assert image[["row", "col", "x0"]].isna().all(axis=None)
    assert {"text", "special"} & set(sample.tokens["kind"])
    with pytest.raises(PhraseError, match="its tokens are unknown"):
        sample.find("red circle")
    with pytest.raises(GeometryError):
        sample.grid(image["start"].to_numpy(float))


def test_a_processor_that_returns_several_prompts_for_one_is_refused() -> None:
    vlm = vlm_of("shieldgemma2")
    vlm = replace(vlm, family=replace(vlm.family, writes_prompt=False))
    with pytest.raises(InputError) as error:
        vlm.prepare([[Image.new("RGB", (64, 48))]], ["is it harmful?"])
    assert str(error.value) == (
        "ShieldGemma2Processor returned 3 rows of token ids for 1 prompts. Record the attention "
        "with xi.record(model)."
    )


def test_a_processor_that_writes_prompts_is_given_the_policy() -> None:
    vlm = vlm_of("shieldgemma2")
    images = [[Image.new("RGB", (64, 48))], [Image.new("RGB", (48, 64))]]
    inputs, prompts = vlm.prepare(images, ["it shall not show a red circle"] * 2)
    assert len(inputs["input_ids"]) == 2
    for prompt in prompts:
        users = prompt.tokens[prompt.tokens["role"].eq("user") & prompt.tokens["kind"].eq("text")]
        assert "".join(users["token"]).strip() == "it shall not show a red circle"
        assert prompt.grids[0].n_tokens == prompt.tokens["kind"].eq("image").sum() == 16
    with pytest.raises(InputError) as error:
        vlm.prepare(images, ["it shall not show a circle", "it shall not show a square"])
    assert str(error.value) == (
        "This processor applies one policy (the question) to all images of a batch; got 2 "
        "questions. Prepare a separate batch for each question."
    )


def test_patches_without_a_tower_have_the_dtype_of_the_model() -> None:
    vlm = vlm_of("fuyu")
    half = replace(vlm, model=copy.deepcopy(vlm.model).to(torch.bfloat16))
    inputs, _ = half.prepare([[Image.new("RGB", (64, 48))]], ["what ?"])
    assert inputs["image_patches"].dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.isfinite(half.model(**inputs).logits).all()


@pytest.mark.parametrize(
    ("family", "kind", "expected"),
    [
        ("blip", BlipForQuestionAnswering, "BlipForConditionalGeneration"),
        ("blip", BlipModel, "BlipForConditionalGeneration"),
        ("llava", LlavaModel, "LlavaForConditionalGeneration"),
        ("qwen2_vl", Qwen2VLModel, "Qwen2VLForConditionalGeneration"),
    ],
)
def test_another_class_of_a_type_is_refused(family, kind, expected) -> None:
    processor = tiny_vlm("llava").processor
    with torch.device("meta"):
        model = kind._from_config(tiny_config(CONFIG_MAPPING[family]))
    with pytest.raises(UnsupportedModelError) as error:
        VLM(model, processor)
    assert str(error.value) == (
        f"A VLM of the model type {family!r} requires a {expected}; got a {kind.__name__}. Load it "
        "with xi.load(name), or record this model's attention with xi.record(model)."
    )


def test_a_subclass_of_the_generating_class_is_accepted() -> None:
    own = tiny_vlm("llava")

    class Mine(type(own.model)):
        pass

    assert VLM(Mine(own.model.config), own.processor).family is own.family


@pytest.mark.parametrize("model_type", ["lxmert", "whisper", "wav2vec2", "visual_bert"])
def test_types_with_other_inputs_than_text_are_not_called_text_only(model_type) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        family_of(CONFIG_MAPPING[model_type]())
    assert str(error.value).startswith(
        f"The model type {model_type!r} has no family record, which labelling tokens requires; "
        f"xmodal_interp.models.FAMILIES has {len(FAMILIES)} types."
    )
