"""Changes of a model that change its fingerprint, and resumed runs with a changed model."""

import copy
import functools
import shutil
import tempfile

import accelerate
import numpy as np
import pytest
import torch
import transformers
from torch import nn

import xmodal_interp as xi
from tests.helpers.store_samples import items, shipped
from xmodal_interp.capturing.dataset import capture_dataset
from xmodal_interp.capturing.fingerprint import described, fingerprint, tensor_digest
from xmodal_interp.errors import StoreError
from xmodal_interp.hooks import ablate_heads, intervene


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def last_layer(vlm: xi.VLM) -> nn.Module:
    return vlm.model.model.language_model.layers[-1]


def edit_one_number(vlm: xi.VLM) -> None:
    weight = last_layer(vlm).mlp.down_proj.weight
    with torch.no_grad():
        weight[77, 133] += 1e-3


def edit_frequencies(vlm: xi.VLM) -> None:
    vlm.model.model.language_model.rotary_emb.inv_freq[3] *= 1.01


def resize(vlm: xi.VLM) -> None:
    vlm.processor.image_processor.image_mean = [0.4, 0.5, 0.5]


def drop(vlm: xi.VLM) -> None:
    last_layer(vlm).mlp.train()


def rescale(vlm: xi.VLM) -> None:
    last_layer(vlm).self_attn.scaling *= 2


def steer(vlm: xi.VLM, alpha: float = 2.0) -> None:
    last_layer(vlm).register_forward_hook(lambda *given: given[-1] * alpha)


def replace_forward(vlm: xi.VLM) -> None:
    last_layer(vlm).mlp.forward = lambda states: states


STATES = {
    "one number of a weight": (edit_one_number, {"weights_digest"}),
    "a buffer": (edit_frequencies, {"buffers_digest"}),
    "a generation setting": (
        lambda vlm: setattr(vlm.model.generation_config, "repetition_penalty", 1.5),
        {"generation_digest"},
    ),
    "an added token": (lambda vlm: vlm.tokenizer.add_tokens(["zebra"]), {"tokenizer_digest"}),
    "the padding side": (
        lambda vlm: setattr(vlm.tokenizer, "padding_side", "right"),
        {"tokenizer_digest"},
    ),
    "image normalisation": (resize, {"processor_digest"}),
    "the chat template": (
        lambda vlm: setattr(vlm.processor, "chat_template", "{{ messages }}"),
        {"processor_digest"},
    ),
    "training mode": (lambda vlm: vlm.model.train(), {"training", "modules_digest"}),
    "training mode of one block": (drop, {"training", "modules_digest"}),
    "a scaling": (rescale, {"modules_digest"}),
    "a hook": (steer, {"hooks"}),
    "a replaced forward": (replace_forward, {"hooks"}),
    "the backend of one tower": (
        lambda vlm: vlm.model.set_attn_implementation({"vision_config": "eager"}),
        {"config_digest"},
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_a_changed_model_changes_the_fingerprint(state: str) -> None:
    change, names = STATES[state]
    vlm = xi.load()
    before = fingerprint(vlm)
    change(vlm)
    assert changed(before, fingerprint(vlm)) == names


def test_global_settings_change_the_fingerprint() -> None:
    vlm, plain = shipped(), fingerprint(shipped())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert changed(plain, fingerprint(vlm)) == {"hooks"}
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        found = fingerprint(vlm)
    assert changed(plain, found) == {"autocast"}
    assert found["autocast"] == ["cpu bfloat16"]
    torch.set_float32_matmul_precision("medium")
    try:
        assert changed(plain, fingerprint(vlm)) == {"matmul_precision"}
    finally:
        torch.set_float32_matmul_precision("highest")
    assert changed(plain, fingerprint(vlm)) == set()


def test_a_replaced_attention_function_changes_the_fingerprint(monkeypatch) -> None:
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    vlm = xi.load()
    vlm.model.set_attn_implementation("sdpa")
    plain, original = fingerprint(vlm), functions["sdpa"]
    assert plain["hooks"] == []

    def sharper(module, query, key, value, mask, **options):
        return original(module, query * 2, key, value, mask, **options)

    monkeypatch.setitem(functions._local_mapping, "sdpa", sharper)
    found = fingerprint(vlm)
    assert changed(plain, found) == {"hooks"}
    assert found["hooks"][0].startswith("attention 'sdpa': ")


def test_interventions_change_the_fingerprint() -> None:
    found = []
    for heads, mode in (({1: [0]}, "zero"), ({1: [1]}, "zero"), ({1: [0]}, "uniform")):
        with pytest.raises(xi.errors.CaptureError, match="did not run"):  # noqa: SIM117
            with intervene(shipped(), ablate_heads(heads, mode)):
                found.append(fingerprint(shipped()))
    plain = fingerprint(shipped())
    assert [changed(plain, each) for each in found] == [{"interventions"}] * 3
    assert len({each["interventions"][0] for each in found}) == 3
    assert found[0]["interventions"][0].startswith("HeadAblation(mode='zero', tower='language', ")


def test_running_a_model_does_not_change_the_fingerprint() -> None:
    vlm = xi.load()
    before = fingerprint(vlm)
    item = items(1)[0]
    xi.capture(vlm, item["image"], item["prompt"], max_new_tokens=3)
    vlm.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    inputs, _ = vlm.prepare([[item["image"]]], [item["prompt"]])
    vlm.model(**inputs, output_attentions=True, output_hidden_states=True)  # leaves its own hooks
    with xi.record(vlm.model):
        assert fingerprint(vlm) == before


def test_the_path_of_a_model_does_not_matter(tmp_path) -> None:
    folder = tmp_path / "model"
    shipped().model.save_pretrained(folder)
    shipped().processor.save_pretrained(folder)
    (tmp_path / "link").symlink_to(folder)
    run = functools.partial(capture_dataset, path=tmp_path / "run", progress=False)
    run(xi.load(folder), items(1))
    for spelling in (f"{folder}/", f"{tmp_path}/../{tmp_path.name}/model", tmp_path / "link"):
        assert len(run(xi.load(spelling), items(1))) == 1
    shutil.move(folder, tmp_path / "moved")
    assert len(run(xi.load(tmp_path / "moved"), items(2))) == 2


@pytest.mark.parametrize("way", ["hook", "intervention", "weights", "training"])
def test_a_run_cannot_be_resumed_with_a_changed_model(tmp_path, way: str) -> None:
    vlm = xi.load()
    run = functools.partial(capture_dataset, vlm, items(2), tmp_path, progress=False)
    capture_dataset(vlm, items(1), tmp_path, progress=False)
    refused = pytest.raises(StoreError, match="The settings differ from those of the store")
    if way == "intervention":
        with (
            pytest.raises(xi.errors.CaptureError, match="did not run"),
            intervene(vlm, ablate_heads({0: [0]})),
            refused as refusal,
        ):
            run()
        assert 'interventions is [] in the store and ["HeadAblation(' in str(refusal.value)
        return
    {"hook": steer, "weights": edit_one_number, "training": drop}[way](vlm)
    with refused:
        run()


def test_a_store_of_an_earlier_release_is_read_only(tmp_path, monkeypatch) -> None:
    def as_before(_: xi.VLM) -> dict:
        return {"weights_digest": "of 16 numbers of each"}

    with monkeypatch.context() as patch:
        patch.setattr("xmodal_interp.capturing.dataset.fingerprint", as_before)
        capture_dataset(shipped(), items(1), tmp_path, progress=False)
    assert len(xi.open_store(tmp_path)) == 1
    with pytest.raises(StoreError) as refusal:
        capture_dataset(shipped(), items(1), tmp_path, progress=False)
    assert str(refusal.value) == (
        f"{tmp_path} can be read, but not extended: it was written by a release that recorded a "
        "model's state differently, so the model cannot be compared. Write to another folder."
    )


def test_offloaded_weights_have_the_same_digests(tmp_path) -> None:
    plain = fingerprint(shipped())
    for offload in (
        lambda model: accelerate.cpu_offload(model, torch.device("cpu")),
        lambda model: accelerate.disk_offload(
            model, tempfile.mkdtemp(dir=tmp_path), torch.device("cpu")
        ),
    ):
        vlm, edited = xi.load(), xi.load()
        edit_one_number(edited)
        offload(vlm.model)
        offload(edited.model)
        assert changed(plain, fingerprint(vlm)) == set()
        assert changed(plain, fingerprint(edited)) == {"weights_digest"}


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*quant:DeprecationWarning")
def test_scales_of_quantised_weights_change_the_fingerprint() -> None:
    def quantised(factor: float) -> xi.VLM:
        vlm = xi.load()
        layer = last_layer(vlm)
        with torch.no_grad():
            layer.mlp.down_proj.weight.mul_(factor)
        layer.mlp.down_proj = torch.ao.nn.quantized.dynamic.Linear.from_float(
            _with_settings(layer.mlp.down_proj)
        )
        return vlm

    def _with_settings(linear: nn.Module) -> nn.Module:
        linear.qconfig = torch.ao.quantization.default_dynamic_qconfig
        return linear

    once, again, twice = (quantised(factor) for factor in (1.0, 1.0, 2.0))
    held = [last_layer(v).mlp.down_proj.weight().int_repr() for v in (once, twice)]
    assert torch.equal(*held)
    assert changed(fingerprint(once), fingerprint(again)) == set()
    assert changed(fingerprint(once), fingerprint(twice)) == {"modules_digest"}


def test_scales_in_attributes_change_the_fingerprint() -> None:
    def with_scale(where: str, scale: float) -> dict:
        vlm = xi.load()
        linear = last_layer(vlm).mlp.down_proj
        held = linear if where == "module" else linear.weight
        held.quant_state = type("State", (), {})()
        held.quant_state.absmax = torch.full((3,), scale)
        return fingerprint(vlm)

    for where in ("module", "weight"):
        one, same, other = (with_scale(where, scale) for scale in (1.0, 1.0, 2.0))
        assert changed(one, same) == set()
        assert changed(one, other) == {"modules_digest"}


def test_any_change_of_a_tensor_changes_its_digest() -> None:
    """Includes permuted and negated slices, dtypes, shapes and single bits."""
    weight = torch.randn(64, 48)
    known = {tensor_digest(weight)}
    edits = [weight.flip(0), weight.roll(1, 1), -weight, weight[:, torch.randperm(48)], weight.T]
    edits += [weight.double(), weight.reshape(48, 64), weight.to_sparse()]
    for place in np.random.default_rng(0).choice(weight.numel(), 200, replace=False):
        one = weight.clone()
        bits = one.view(torch.int32).view(-1)
        bits[place] ^= 1  # flips the lowest bit of one number
        edits.append(one)
    known |= {tensor_digest(each) for each in edits}
    assert len(known) > 200
    assert tensor_digest(weight.T.contiguous().T) == tensor_digest(weight)
    assert tensor_digest(weight.bfloat16()) != tensor_digest(weight.half())


def test_hooks_are_compared_by_code_and_closure() -> None:
    def hook(alpha, vector):
        def steered(*given):
            return given[-1] + alpha * vector

        return steered

    one = described(hook(1.0, torch.ones(3)))
    assert described(hook(1.0, torch.ones(3))) == one
    assert described(hook(2.0, torch.ones(3))) != one
    assert described(hook(1.0, torch.zeros(3))) != one
    partial = functools.partial(hook, 3)
    assert (
        described(partial) == described(copy.copy(partial)) != described(functools.partial(hook, 4))
    )
    itself: list = [1]
    itself.append(itself)
    assert described(itself) == [1, "builtins.list"]
