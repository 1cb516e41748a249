"""Forwards with replayed block outputs are bit-identical to whole forwards."""

import pytest
import torch
from torch import nn

from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.hooks.ablation import ablate_heads
from xmodal_interp.hooks.block_cache import BlockOutputs, remember_blocks, replay
from xmodal_interp.hooks.interventions import intervene

FAMILIES = ["llava", "qwen2_vl", "mllama"]


def remembered(family: str) -> tuple[nn.Module, dict, torch.Tensor, BlockOutputs]:
    vlm = tiny_vlm(family)
    inputs = vlm.prepare([[picture()]], [QUESTION])[0]
    with torch.no_grad(), remember_blocks(vlm.model) as memory:
        base = vlm.model(**inputs, use_cache=False).logits
    return vlm.model, inputs, base, memory


@pytest.mark.parametrize("family", FAMILIES)
def test_replaying_the_blocks_before_any_layer_changes_nothing(family: str) -> None:
    model, inputs, base, memory = remembered(family)
    for (tower, kind, layer), block in memory.blocks.items():
        earlier = memory.before(tower, kind, layer)
        assert block not in earlier
        ran: list[nn.Module] = []
        hooks = [
            module.register_forward_pre_hook(lambda m, _, ran=ran: ran.append(m))
            for module in earlier
        ]
        ablation = ablate_heads({layer: [1]}, tower=tower, kind=kind)
        with torch.no_grad():
            with replay(earlier):
                assert torch.equal(model(**inputs, use_cache=False).logits, base)
            for hook in hooks:
                hook.remove()
            with intervene(model, ablation):
                expected = model(**inputs, use_cache=False).logits
            with replay(earlier), intervene(model, ablation):
                assert torch.equal(model(**inputs, use_cache=False).logits, expected)
        assert set(ran) == set(earlier)  # the blocks are called, and return the remembered output
    assert len(earlier) == len(set(memory.blocks.values())) - 1


def test_forwards_are_restored_after_an_exception() -> None:
    model, inputs, base, memory = remembered("llava")
    earlier = memory.before("language", "self", 2)
    own = next(iter(earlier))
    own.forward = forward = own.forward  # as accelerate sets it on dispatched models
    try:
        with pytest.raises(KeyboardInterrupt), replay(earlier):
            raise KeyboardInterrupt
        assert own.__dict__.pop("forward") is forward
    finally:
        own.__dict__.pop("forward", None)
    assert not any("forward" in module.__dict__ for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**inputs, use_cache=False).logits, base)


def test_blocks_that_ran_twice_are_not_replayed() -> None:
    vlm = tiny_vlm("llava")
    inputs = vlm.prepare([[picture()]], [QUESTION])[0]
    with torch.no_grad(), remember_blocks(vlm.model) as memory:
        vlm.model(**inputs, use_cache=False)
        vlm.model(**inputs, use_cache=False)
    assert memory.before("language", "self", 3) == {}
