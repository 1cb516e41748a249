"""The doctor passes correct recordings, and each of its checks fails on the fault it checks."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

import xmodal_interp as xi
from tests.helpers.attention_variants import FastAttn, Mixer, llava_with, n_hooks
from tests.helpers.real import asked, real, settled
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.errors import CaptureError, GeometryError, InputError
from xmodal_interp.hooks import recorder
from xmodal_interp.models import FAMILIES
from xmodal_interp.models.geometry import (
    FixedGrid,
    ImageGrid,
    MergedPatches,
    ProbedTokens,
    anyres_tiles,
    aspect_ratio_tiles,
    patch_order,
)
from xmodal_interp.verification import painting
from xmodal_interp.verification.doctor import COLUMNS, Checkup
from xmodal_interp.verification.exactness import LAYER_COLUMNS

TOKENS = "the number of image tokens is as predicted"
WEIGHTS = "all weights come from the checkpoint"
PLACED = "painting a patch changes the key at its position"
BOXES = "boxes are those measured with test images"
KEYS = "the number of image keys is as predicted"
CHANGES = "only image tokens change with the image"
OUTPUTS = "outputs are the same with and without recording"
GENERATED = "generated tokens are the same with and without recording"
RECORDED = "every attention layer that ran is recorded"
BACKEND = "probabilities give the backend's output"
EAGER = "probabilities equal those of eager attention"
TAP = "a key hidden through the tap changes the output"


def failed(checkup: Checkup) -> list[str]:
    return checkup.table.loc[checkup.table["verdict"] == "fail", "check"].tolist()


def check_of(checkup: Checkup, name: str):
    return checkup.table.set_index("check").loc[name]


@pytest.mark.parametrize(("name", "n_layers"), [("llava", 7), ("qwen2_vl", 6)])
def test_the_shipped_models_pass(name: str, n_layers: int) -> None:
    checkup = xi.doctor(xi.load(name), picture(), "where is the red circle ?")
    assert checkup.ok
    table = checkup.table
    assert tuple(table.columns) == COLUMNS
    assert table["check"].tolist() == [
        TOKENS,
        WEIGHTS,
        PLACED,
        BOXES,
        CHANGES,
        OUTPUTS,
        GENERATED,
        RECORDED,
        BACKEND,
        EAGER,
        TAP,
    ]
    assert table["verdict"].eq("pass").all()
    assert check_of(checkup, OUTPUTS)["value"] == 0
    assert check_of(checkup, RECORDED)["value"] == n_layers
    assert tuple(checkup.layers.columns) == LAYER_COLUMNS
    assert len(checkup.layers) == n_layers
    assert checkup.layers[["output_error", "eager_error"]].max(axis=None) < 1e-5
    assert checkup.summary == "11 checks passed: recordings of this model can be trusted."
    assert repr(checkup).endswith(checkup.summary)


def of_mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return MistralForCausalLM(config).eval()


def test_a_bare_model_is_checked_with_given_inputs() -> None:
    checkup = xi.doctor(of_mistral(), inputs={"input_ids": torch.arange(12).view(2, 6)})
    assert checkup.ok
    assert checkup.table["check"].tolist() == [OUTPUTS, RECORDED, BACKEND, EAGER, TAP]


def test_a_tower_that_does_not_run_is_named() -> None:
    ids = torch.arange(10, 16)[None]
    checkup = xi.doctor(tiny_vlm("llava").model, inputs={"input_ids": ids})
    assert checkup.ok
    note = check_of(checkup, RECORDED)["note"]
    assert note.startswith("did not run: model.vision_tower.encoder.layers.0.self_attn, ")
    assert checkup.layers.loc[checkup.layers["tower"] == "vision", "note"].eq("did not run").all()


def test_a_wrong_scaling_is_found(monkeypatch) -> None:
    right = recorder.as_attention_call

    def twice_as_sharp(*args):
        call = right(*args)
        return dataclasses.replace(call, scaling=2 * call.scaling)

    monkeypatch.setattr(recorder, "as_attention_call", twice_as_sharp)
    checkup = xi.doctor(tiny_vlm("llava"), picture(), QUESTION)
    assert failed(checkup) == [BACKEND, EAGER]
    assert check_of(checkup, EAGER)["value"] > 0.1
    assert checkup.summary == (
        "8 checks passed, 2 failed (probabilities give the backend's output; probabilities equal "
        "those of eager attention): do not trust recordings of this model."
    )


def test_a_lost_mask_is_found(monkeypatch) -> None:
    right = recorder.as_attention_call

    def unmasked(*args):
        return dataclasses.replace(right(*args), mask=None, causal=False)

    monkeypatch.setattr(recorder, "as_attention_call", unmasked)
    checkup = xi.doctor(tiny_vlm("llava"), picture(), QUESTION)
    assert BACKEND in failed(checkup)
    layers = checkup.layers
    assert layers.loc[layers["tower"] == "language", "output_error"].min() > 1e-3
    assert layers.loc[layers["tower"] == "vision", "output_error"].max() < 1e-5  # it has no mask


def test_nan_probabilities_are_found(monkeypatch) -> None:
    """One layer has NaN errors, and the errors of the others are within their limits."""
    right = recorder.as_attention_call

    def undefined(raw, identity, *args):
        call = right(raw, identity, *args)
        broken = (identity.tower, identity.layer) == ("language", 1)
        return dataclasses.replace(call, q=call.q * torch.nan) if broken else call

    monkeypatch.setattr(recorder, "as_attention_call", undefined)
    assert failed(xi.doctor(tiny_vlm("llava"), picture(), QUESTION)) == [BACKEND, EAGER]


def test_attention_that_is_not_recorded_is_found() -> None:
    class BareAttention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = (x @ self.projection(x).transpose(-1, -2)).exp()
            return scores / scores.sum(-1, keepdim=True) @ x

    checkup = xi.doctor(torch.nn.Sequential(BareAttention()), inputs={"input": torch.ones(1, 3, 4)})
    assert failed(checkup) == [RECORDED]
    assert "or a softmax: 0." in check_of(checkup, RECORDED)["note"]
    assert len(checkup.layers) == 0


def test_a_layer_whose_calls_are_lost_is_found(monkeypatch) -> None:
    right = recorder._Recorder._keep

    def forgetful(self, module, call):
        identity = self.known.identities[module]
        if (identity.tower, identity.layer) != ("language", 1):
            right(self, module, call)

    monkeypatch.setattr(recorder._Recorder, "_keep", forgetful)
    checkup = xi.doctor(tiny_vlm("llava"), picture(), QUESTION)
    assert failed(checkup) == [RECORDED]
    row = check_of(checkup, RECORDED)
    assert (row["value"], row["limit"]) == (6, "exactly 7")
    assert row["note"] == "not recorded: model.language_model.layers.1.self_attn"


@pytest.mark.parametrize("kind", [Mixer, FastAttn])
@pytest.mark.parametrize("way", ["softmax", "exp"])
@pytest.mark.parametrize("parts", [True, False], ids=["parts", "whole"])
def test_a_replaced_attention_layer_is_recorded_or_found(kind, way, parts) -> None:
    model, inputs = llava_with(lambda old: kind(old, way, parts=parts))
    checkup = xi.doctor(model, inputs=inputs)
    recorded = way == "softmax"
    assert (RECORDED in failed(checkup)) != recorded
    if not recorded:
        assert "model.language_model.layers.1" in check_of(checkup, RECORDED)["note"]


def test_a_block_that_mixes_no_tokens_is_not_reported() -> None:
    """Some blocks of hybrid models are multilayer perceptrons."""

    class Perceptron(torch.nn.Linear):
        def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple:
            return super().forward(hidden_states), None

    model, inputs = llava_with(lambda _: Perceptron(128, 128))
    checkup = xi.doctor(model, inputs=inputs)
    assert checkup.ok
    assert check_of(checkup, RECORDED)["value"] == 6


def test_a_kernel_that_was_imported_by_name_is_found() -> None:
    kernel = torch.nn.functional.scaled_dot_product_attention

    class MHA(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return kernel(super().forward(x), x, x)

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(self.inner(x), x, x)

    model = torch.nn.Sequential(Attention(), MHA(4, 4))
    checkup = xi.doctor(model, inputs={"input": torch.randn(1, 2, 3, 4)})
    assert failed(checkup) == [RECORDED]
    row = check_of(checkup, RECORDED)
    assert (row["value"], row["limit"], row["note"]) == (1, "exactly 2", "not recorded: 1")


def test_an_observer_that_changes_the_output_is_found(monkeypatch) -> None:
    right = recorder._Recorder.after

    def louder(self, call, output):
        right(self, call, output)
        return output * 1.5

    monkeypatch.setattr(recorder._Recorder, "after", louder)
    checkup = xi.doctor(tiny_vlm("llava"), picture(), QUESTION)
    assert OUTPUTS in failed(checkup)
    assert check_of(checkup, OUTPUTS)["value"] > 0.01


def test_answers_that_change_are_found(monkeypatch) -> None:
    """Single forwards are correct, but the last token of a repeated generation changes."""
    vlm = xi.load()
    generate, answers = type(vlm).generate, []

    def another(self, inputs, **options):
        ids = generate(self, inputs, **options)
        ids[:, -1] += len(answers)
        answers.append(ids)
        return ids

    monkeypatch.setattr(type(vlm), "generate", another)
    checkup = xi.doctor(vlm, picture(), QUESTION)
    assert failed(checkup) == [GENERATED]
    assert check_of(checkup, GENERATED)["value"] == 1


def test_a_tap_without_effect_is_found(monkeypatch) -> None:
    monkeypatch.setattr(
        "xmodal_interp.hooks.knockout.KnockOut.before", lambda _self, call, _site: call
    )
    assert failed(xi.doctor(tiny_vlm("llava"), picture(), QUESTION)) == [TAP]


def test_image_tokens_that_do_not_fit_are_found(monkeypatch) -> None:
    def refuse(*_args, **_options):
        raise GeometryError("144 tokens, 196 predicted.")

    monkeypatch.setattr(xi.VLM, "prepare", refuse)
    checkup = xi.doctor(tiny_vlm("llava"))
    assert failed(checkup) == [TOKENS]
    assert check_of(checkup, TOKENS)["note"] == "144 tokens, 196 predicted."


WRONG = {
    **dict.fromkeys(("llava_next", "granite4_vision"), "has no attribute 'image_grid_pinpoints'"),
    "idefics3": "'LlavaConfig' object has no attribute 'scale_factor'",
    "gemma3": "'LlavaConfig' object has no attribute 'mm_tokens_per_image'",
    "mllama": "'CLIPVisionConfig' object has no attribute 'max_num_tiles'",
    "blip-2": "'LlavaConfig' object has no attribute 'num_query_tokens'",
    "chameleon": "'LlavaConfig' object has no attribute 'vq_config'",
    "florence2": "'CLIPVisionConfig' object has no attribute 'patch_stride'",
    "internvl": "'LlavaConfig' object has no attribute 'downsample_ratio'",
    "kosmos-2": "'LlavaConfig' object has no attribute 'latent_query_num'",
    "mistral3": "KeyError: 'image_sizes'",
    "inkling2": "TypeError: unsupported operand type(s) for /: 'int' and 'NoneType'",
}


@pytest.mark.parametrize("model_type", WRONG)
def test_a_family_of_another_type_is_a_failed_check(model_type: str) -> None:
    own, wrong = tiny_vlm("llava"), FAMILIES[model_type]
    checkup = xi.doctor(xi.VLM(own.model, own.processor, family=wrong), picture(), QUESTION)
    assert failed(checkup) == [TOKENS]
    note = check_of(checkup, TOKENS)["note"]
    assert note.startswith(
        f"The geometry rule {wrong.rule} does not fit a 'llava' model with LlavaProcessor ("
    )
    assert f"{WRONG[model_type]})" in note


def test_a_rule_that_does_not_fit_is_refused_with_its_cause() -> None:
    own = tiny_vlm("llava")
    family = dataclasses.replace(own.family, geometry=anyres_tiles)
    with pytest.raises(GeometryError, match="rule anyres_tiles does not fit") as refusal:
        xi.capture(xi.VLM(own.model, own.processor, family=family), picture(), QUESTION)
    assert isinstance(refusal.value.__cause__, AttributeError)


def test_a_rule_of_another_number_of_grids_is_a_failed_check() -> None:
    def none_at_all(*_given) -> list:
        return []

    own = tiny_vlm("llava")
    family = dataclasses.replace(own.family, geometry=none_at_all)
    checkup = xi.doctor(xi.VLM(own.model, own.processor, family=family), picture(), QUESTION)
    assert failed(checkup) == [TOKENS]
    assert check_of(checkup, TOKENS)["note"] == (
        "The geometry rule none_at_all returned 0 grids for 1 images or videos of a 'llava' model. "
        "Pass VLM(model, processor, family=...) a family record with a rule for this model."
    )


def test_the_model_and_the_random_state_are_restored() -> None:
    vlm = tiny_vlm("llava")
    model = vlm.model
    model.train()
    model.model.vision_tower.eval()
    try:
        modes = [module.training for module in model.modules()]
        config, hooks, state = model.config.to_json_string(), n_hooks(model), torch.get_rng_state()
        weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        assert xi.doctor(vlm, picture(), QUESTION).ok
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), state)
        assert model.config.to_json_string() == config
        assert n_hooks(model) == hooks
        assert all(torch.equal(weights[name], w) for name, w in model.state_dict().items())
        assert all(weight.grad is None for weight in model.parameters())
    finally:
        model.eval()


def test_refusals() -> None:
    vlm = tiny_vlm("llava")
    with pytest.raises(InputError) as none:
        xi.doctor(vlm.model)
    assert str(none.value) == (
        "doctor got a bare LlavaForConditionalGeneration without inputs. Pass doctor(model, "
        "inputs=dict(input_ids=...)), or a VLM, which makes its own inputs."
    )
    with pytest.raises(InputError) as both:
        xi.doctor(vlm, inputs={})
    assert str(both.value) == (
        "doctor got a VLM and inputs=, but a VLM makes its inputs from an image and a prompt. Pass "
        "image= and prompt=, or the bare model: doctor(vlm.model, inputs=...)."
    )
    with pytest.raises(CaptureError) as compiled:
        xi.doctor(torch.compile(vlm.model, backend="eager"), inputs={})
    assert str(compiled.value) == (
        "This model is compiled, and attention in compiled code cannot be recorded or edited. Use "
        "the model as it was before torch.compile (model._orig_mod)."
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_the_message_names_inputs_that_are_missing() -> None:
    with pytest.raises(InputError, match="requires state besides images"):
        xi.doctor(xi.VLM(*real("pi0")), picture(), "pick it up")


@pytest.mark.parametrize(
    ("named", "note"),
    [
        (
            "vision_feature_layer",
            "which is -1 in the configuration of the model; no token of the prompt",
        ),
        ("picture_id", "which the configuration of the model does not have; name the attribute"),
    ],
)
def test_a_family_without_an_image_token_fails(named: str, note: str) -> None:
    """Without a geometry rule, the fault shows only in the missing image tokens."""
    own = tiny_vlm("llava")
    family = dataclasses.replace(own.family, image_token=named, geometry=None)
    checkup = xi.doctor(xi.VLM(own.model, own.processor, family=family), picture(), QUESTION)
    assert failed(checkup) == [TOKENS, CHANGES]
    row = check_of(checkup, TOKENS)
    assert (row["value"], row["limit"]) == (0, "more than 0")
    assert check_of(checkup, CHANGES)["value"] == 144
    assert f"image_token={named!r}, {note}" in row["note"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_with_a_row_of_one_token_is_checked(side: str) -> None:
    """A query of that row sees one key, which cannot be hidden, so the other row is used."""
    model = of_mistral()
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 1:] = 0
    mask = mask.flip(1) if side == "left" else mask
    ids = torch.arange(12).view(2, 6)
    checkup = xi.doctor(model, inputs={"input_ids": ids, "attention_mask": mask})
    assert checkup.ok
    row = check_of(checkup, TAP)
    # the key that the last query of the longer row attends to most
    assert (row["verdict"], row["note"]) == ("pass", "language layers, query 5, key 4")


def test_rows_of_one_token_only_are_skipped() -> None:
    ids, mask = torch.arange(6)[None], torch.tensor([[1, 0, 0, 0, 0, 0]])
    checkup = xi.doctor(of_mistral(), inputs={"input_ids": ids, "attention_mask": mask})
    assert checkup.ok
    row = check_of(checkup, TAP)
    assert (row["verdict"], row["note"]) == ("skipped", "each query has only one visible key")


def test_a_family_with_a_wrong_image_token_fails() -> None:
    """Without a geometry rule, the fault shows in tokens that do not change with the image."""
    own = tiny_vlm("llava")
    config = own.model.config
    ids = own.prepare([[picture()]], [QUESTION])[0]["input_ids"][0].tolist()
    config.of_a_word = ids[-3]
    try:
        family = dataclasses.replace(own.family, image_token="of_a_word", geometry=None)
        checkup = xi.doctor(xi.VLM(own.model, own.processor, family=family), picture(), QUESTION)
    finally:
        del config.of_a_word
    assert failed(checkup) == [CHANGES]
    assert check_of(checkup, TOKENS)["verdict"] == "skipped"
    assert check_of(checkup, CHANGES)["value"] == 144


def test_patches_in_another_order_fail(monkeypatch) -> None:
    monkeypatch.setattr(patch_order, "_sorts_by_windows", lambda _module: False)
    checkup = xi.doctor(xi.VLM(real("muse_glimmer")[0], settled("muse_glimmer")))
    assert failed(checkup) == [PLACED]
    assert "the key at (" in check_of(checkup, PLACED)["note"]


def with_rule(vlm: xi.VLM, rule) -> xi.VLM:
    return dataclasses.replace(vlm, family=dataclasses.replace(vlm.family, geometry=rule))


def changed(grid: ImageGrid, **fields) -> ImageGrid:
    return dataclasses.replace(grid, **fields)


@pytest.mark.parametrize("rule", [FixedGrid(shift=2.5), FixedGrid(tower_before=2, shift=2.5)])
def test_a_rule_with_another_number_of_positions_fails(rule: FixedGrid) -> None:
    """The patches cannot be painted, but that is the fault of the rule."""
    checkup = xi.doctor(with_rule(tiny_vlm("llava"), rule), picture(), QUESTION)
    assert failed(checkup) == [PLACED, BOXES]
    assert check_of(checkup, PLACED)["note"] == (
        f"the geometry rule FixedGrid places {144 + rule.tower_before} positions of the vision "
        "tower, but its layers read 145 (the difference is often a class token)"
    )


def test_a_wrong_class_token_of_a_tower_without_keys_fails() -> None:
    """Its attention is recorded as probabilities, so no patch can be painted."""
    vlm = xi.VLM(real("blip")[0], settled("blip"))
    assert check_of(xi.doctor(vlm, picture(), QUESTION), PLACED)["verdict"] == "skipped"
    rule = dataclasses.replace(vlm.family.geometry, tower_before=0)
    checkup = xi.doctor(with_rule(vlm, rule), picture(), QUESTION)
    assert failed(checkup) == [PLACED]
    assert (
        "places 64 positions of the vision tower, but its layers read 65"
        in (check_of(checkup, PLACED)["note"])
    )


def test_boxes_that_are_off_by_patches_fail() -> None:
    rule = FixedGrid(tower_before=1, shift=2.5)
    checkup = xi.doctor(with_rule(tiny_vlm("llava"), rule), picture(), QUESTION)
    assert failed(checkup) == [PLACED, BOXES]
    row = check_of(checkup, BOXES)
    assert row["value"] == pytest.approx(2.5 * 140 / 12, rel=0.01)  # the portrait has 12 columns
    assert row["note"].startswith("px, in a test image of 140 x 300: patch ")


def test_boxes_that_are_off_by_less_than_half_a_patch_fail() -> None:
    """The middle of a painted patch is still in its box."""
    rule = FixedGrid(tower_before=1, shift=0.4)
    checkup = xi.doctor(with_rule(tiny_vlm("llava"), rule), picture(), QUESTION)
    assert failed(checkup) == [BOXES]
    assert check_of(checkup, BOXES)["value"] == pytest.approx(0.4 * 140 / 12, rel=0.02)


def test_boxes_outside_of_the_image_fail() -> None:
    """The rule has rows and columns, and gives none of them a box."""
    rule = FixedGrid(tower_before=1, shift=100)
    checkup = xi.doctor(with_rule(tiny_vlm("llava"), rule), picture(), QUESTION)
    assert failed(checkup) == [BOXES]
    row = check_of(checkup, BOXES)
    assert row["value"] == float("inf")
    assert "is at no place in the image by the rule, and at (" in row["note"]


def test_boxes_larger_than_the_image_fail() -> None:
    right = tiny_vlm("llava").family.geometry

    def enlarged(*given) -> list:
        far = [-1.0, -1.0, 1e4, 1e4]
        return [changed(g, patch_boxes=0 * g.patch_boxes + far) for g in right(*given)]

    checkup = xi.doctor(with_rule(tiny_vlm("llava"), enlarged), picture(), QUESTION)
    assert failed(checkup) == [PLACED, BOXES]
    assert check_of(checkup, PLACED)["note"] == (
        "no box that the geometry rule enlarged gives to a patch lies inside the image"
    )


def test_token_boxes_in_another_order_fail() -> None:
    """The patches are right, so painting one does not find the fault."""
    right = tiny_vlm("qwen2_vl").family.geometry

    def reversed_tokens(*given) -> list:
        return [changed(grid, boxes=grid.boxes[::-1]) for grid in right(*given)]

    checkup = xi.doctor(with_rule(tiny_vlm("qwen2_vl"), reversed_tokens), picture(), QUESTION)
    assert failed(checkup) == [BOXES]
    assert ": token " in check_of(checkup, BOXES)["note"]


def test_patches_in_the_order_of_another_processor_fail() -> None:
    vlm = with_rule(tiny_vlm("qwen2_vl"), MergedPatches(by_rows=True))
    assert failed(xi.doctor(vlm, picture(), QUESTION)) == [PLACED, BOXES]


def test_a_rule_that_fits_the_users_image_only_fails() -> None:
    right = tiny_vlm("llava").family.geometry

    def of_squares(processor, config, inputs, images) -> list:
        if images[0].width != images[0].height:
            raise GeometryError("144 tokens, 196 predicted.")
        return right(processor, config, inputs, images)

    checkup = xi.doctor(with_rule(tiny_vlm("llava"), of_squares), picture(64, 64), QUESTION)
    assert failed(checkup) == [PLACED]
    assert check_of(checkup, PLACED)["note"] == "144 tokens, 196 predicted."


def test_a_painted_patch_that_changes_no_key_fails(monkeypatch) -> None:
    monkeypatch.setattr(painting, "_over", lambda picture, _box: picture)
    checkup = xi.doctor(tiny_vlm("llava"), picture(), QUESTION)
    assert failed(checkup) == [PLACED]
    row = check_of(checkup, PLACED)
    assert (row["value"], row["note"].count("no key changed")) == (3, 3)


def test_a_number_of_positions_that_depends_on_the_pixels_fails(monkeypatch) -> None:
    monkeypatch.setattr(painting, "_over", lambda picture, _box: picture.resize((96, 64)))
    checkup = xi.doctor(tiny_vlm("qwen2_vl"), picture(), QUESTION)
    assert failed(checkup) == [PLACED]
    assert check_of(checkup, PLACED)["note"] == (
        "the number of positions of the vision tower changes when a patch is painted"
    )


def test_a_portrait_is_checked_with_portraits() -> None:
    right = tiny_vlm("llava").family.geometry

    def of_portraits(processor, config, inputs, images) -> list:
        if images[0].width > images[0].height:
            raise GeometryError("It rotates the image by 90 degrees.")
        return right(processor, config, inputs, images)

    assert xi.doctor(with_rule(tiny_vlm("llava"), of_portraits), picture(64, 96), QUESTION).ok


def test_a_size_that_the_processor_refuses_is_not_painted(monkeypatch) -> None:
    right = xi.VLM.prepare

    def prepare(self, images, questions, **options):
        if max(images[0][0].size) > 300:
            raise InputError("The image is too large.")
        return right(self, images, questions, **options)

    monkeypatch.setattr(xi.VLM, "prepare", prepare)
    assert painting.painted_patches(tiny_vlm("llava"), QUESTION).size == (224, 88)
    with pytest.raises(InputError, match="too large"):
        painting.painted_patches(tiny_vlm("llava"), QUESTION, sizes=[(400, 400)])


CROSS = ["mllama", "blip", "pix2struct", "idefics", "pp_formulanet", "vision-encoder-decoder"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("model_type", CROSS)
def test_keys_of_cross_attention_are_counted(model_type: str) -> None:
    vlm = xi.VLM(real(model_type)[0], settled(model_type))
    checkup = xi.doctor(vlm, picture(), asked(vlm, 1))
    assert checkup.ok
    assert check_of(checkup, KEYS)["verdict"] == "pass"
    row = check_of(checkup, CHANGES)
    assert (row["verdict"], row["note"]) == (
        "skipped",
        "images are read by cross-attention, so there are no image tokens",
    )


def test_a_wrong_number_of_keys_fails() -> None:
    def too_many(*given) -> list:
        (grid,) = aspect_ratio_tiles(*given)
        more = {name: getattr(grid, name) for name in ("places", "boxes", "tiles")}
        return [changed(grid, **{n: np.concatenate([each, each[-1:]]) for n, each in more.items()})]

    vlm = xi.VLM(real("mllama")[0], settled("mllama"))
    checkup = xi.doctor(with_rule(vlm, too_many), picture(), asked(vlm, 1))
    assert failed(checkup) == [KEYS]
    n_keys = int(check_of(checkup, KEYS)["value"])
    assert check_of(checkup, KEYS)["limit"] == f"exactly {n_keys + 1}"


def test_checks_without_a_rule_or_without_keys_are_skipped_with_the_reason() -> None:
    own = tiny_vlm("llava")
    checkup = xi.doctor(with_rule(own, None), picture(), QUESTION)
    assert checkup.ok
    assert check_of(checkup, BOXES)["note"] == "the family has no geometry rule"
    assert check_of(checkup, PLACED)["note"] == (
        "the geometry rule none places no positions of the vision tower"
    )
    checkup = xi.doctor(with_rule(own, ProbedTokens("image_token_id")), picture(), QUESTION)
    assert checkup.ok
    row = check_of(checkup, BOXES)
    assert (row["verdict"], row["note"]) == (
        "skipped",
        "the type has no family record, so its boxes were measured this way",
    )


def test_a_language_tower_that_mixes_positions_without_attention_is_skipped() -> None:
    vlm = xi.VLM(real("lfm2_vl")[0], settled("lfm2_vl"))
    row = check_of(xi.doctor(vlm, picture(), QUESTION), CHANGES)
    assert (row["verdict"], row["note"]) == (
        "skipped",
        "layers of the language tower that are not attention mix positions",
    )
