"""What is remembered of a model's modules is never older than the model."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.capturing.run import capture
from xmodal_interp.hooks import attention_modules, record
from xmodal_interp.hooks.attention_modules import layers_in
from xmodal_interp.models import VLM
from xmodal_interp.models.model_parts import parts_of


def tree() -> nn.Module:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(nn.ReLU(), shared), nn.ModuleDict({"a": shared}), nn.ReLU())
    model.register_module("nothing", None)
    return model


def names(parts) -> list[str]:
    return [f"{path} {type(module).__name__}" for path, module in parts.modules.items()]


def change_class(model) -> None:
    model[2] = nn.GELU()


def add(model) -> None:
    model[0].append(nn.Tanh())


def rename(model) -> None:
    model[1]["b"] = model[1].pop("a")


def unshare(model) -> None:
    model[1]["a"] = nn.Linear(2, 2)


def remove(model) -> None:
    del model[2]


@pytest.mark.parametrize("change", [change_class, add, rename, unshare, remove])
def test_values_are_computed_again_if_the_modules_change(change) -> None:
    model = tree()
    for _ in range(2):
        parts = parts_of(model)
        assert list(parts.modules.items()) == list(model.named_modules())
    before = parts.remembered(names)
    assert parts_of(model).remembered(names) is before
    change(model)
    parts = parts_of(model)
    assert list(parts.modules.items()) == list(model.named_modules())
    after = parts.remembered(names)
    assert after == names(parts)
    assert after is not before


def test_another_module_of_the_same_class_is_returned_at_once() -> None:
    model = tree()
    before = parts_of(model).remembered(names)
    model[2] = nn.ReLU()
    parts = parts_of(model)
    assert parts.modules["2"] is model[2]
    assert parts.remembered(names) is before


def test_a_model_is_freed_although_it_is_remembered() -> None:
    model = tree()
    parts_of(model).remembered(names)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_layers_are_found_again_if_a_flag_or_a_configuration_changes() -> None:
    model = copy.deepcopy(tiny_vlm("llava").model)
    layers = layers_in(parts_of(model))
    assert layers_in(parts_of(model)) is layers
    path = next(path for path, each in layers.identities.items() if each.tower == "language")
    model.get_submodule(path).is_cross_attention = True
    assert layers_in(parts_of(model)).identities[path].kind == "cross"
    del model.get_submodule(path).is_cross_attention
    assert layers_in(parts_of(model)).identities == layers.identities
    model.config.qformer_config = type(model.config.vision_config)()
    assert layers_in(parts_of(model)) is not layers


def test_a_capture_sees_layers_that_were_added_or_removed_since_the_last_one() -> None:
    known = tiny_vlm("llava")
    vlm = VLM(copy.deepcopy(known.model), known.processor)
    n_before = len(capture(vlm, picture(), QUESTION).layers())
    stack = vlm.model.model.language_model.layers
    stack.append(copy.deepcopy(stack[0]))
    stack[-1].self_attn.layer_idx = n_before
    vlm.model.config.text_config.num_hidden_layers = n_before + 1
    longer = capture(vlm, picture(), QUESTION)
    assert longer.layers() == list(range(n_before + 1))
    assert longer.provenance["layers"]["language.self"] == list(range(n_before + 1))
    del stack[0], stack[0]
    vlm.model.config.text_config.num_hidden_layers = n_before - 1
    for layer, block in enumerate(stack):
        block.self_attn.layer_idx = layer
    shorter = capture(vlm, picture(), QUESTION)
    assert shorter.layers() == list(range(n_before - 1))
    inputs = vlm.prepare([[picture()]], [QUESTION])[0]
    with torch.no_grad(), record(vlm.model) as recording:
        vlm.run(inputs)
    assert len(recording.calls) == len(attention_modules(vlm.model))
