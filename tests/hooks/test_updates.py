"""The share of attention in each token's update, against norms taken by hand."""

import numpy as np
import pytest
import torch

from tests.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.analysis import rollout_matrix
from xmodal_interp.capturing import Keep, capture, capture_batch
from xmodal_interp.errors import InputError
from xmodal_interp.hooks import record
from xmodal_interp.store import StoreWriter, open_store

NORMS = Keep(norms=True)


def by_hand(model, run) -> dict[str, list[torch.Tensor]]:
    """``|o| / (|o| + |x|)`` of every block with a ``self_attn`` or ``attn``, run by run."""
    shares: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, block in model.named_modules():
        attention = getattr(block, "self_attn", None) or getattr(block, "attn", None)
        if attention is None:
            continue
        entered: list[torch.Tensor] = []

        def enter(_, args, options, entered=entered):
            entered.append(args[0] if args else options["hidden_states"])

        def leave(_, __, output, name=name, entered=entered):
            o = (output[0] if isinstance(output, tuple) else output).norm(dim=-1)
            x = entered[-1].norm(dim=-1)
            shares.setdefault(name, []).append(o / (o + x))

        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(attention.register_forward_hook(leave))
    run()
    for handle in handles:
        handle.remove()
    return shares


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "mllama"])
def test_norms_are_those_of_the_blocks(family) -> None:
    vlm = tiny_vlm(family)
    inputs, _ = vlm.prepare([[picture()]], [QUESTION])
    with torch.no_grad():
        hand = by_hand(vlm.model, lambda: vlm.model(**inputs))
        plain = vlm.model(**inputs).logits
        with record(vlm.model, norms=True) as recording:
            recorded = vlm.model(**inputs).logits
    assert torch.equal(plain, recorded)
    checked = 0
    for call in recording.calls:
        assert call.update_share.shape == (call.n_samples, call.n_queries)
        (share,) = hand.get(call.module.rpartition(".")[0], [None])
        if share is not None:
            torch.testing.assert_close(call.update_share.flatten(), share.flatten())
            checked += 1
    assert checked >= 4


def test_a_row_per_token_in_generation_a_batch_and_a_store(tmp_path) -> None:
    vlm = tiny_vlm("llava")
    alone = capture(vlm, picture(), QUESTION, max_new_tokens=3, keep=NORMS)
    without = capture(
        vlm, picture(), QUESTION, max_new_tokens=3, keep=NORMS, generation={"use_cache": False}
    )
    images, prompts = (
        [[picture(seed=1)], [picture()]],
        ["Look, how many shapes are here?", QUESTION],
    )
    together = capture_batch(vlm, images, prompts, max_new_tokens=3, keep=NORMS)[1]
    for layer in alone.layers():
        share = alone.call(layer).update_share
        assert share.shape == (1, alone.call(layer).n_queries)
        assert ((share > 0) & (share < 1)).all()
        n = share.shape[1]
        torch.testing.assert_close(without.call(layer).update_share[:, :n], share)
        n_padding = int(together.tokens["kind"].eq("padding").sum())
        assert n_padding > 0
        padded = together.call(layer).update_share[:, n_padding:]
        torch.testing.assert_close(padded[:, :n], share, atol=1e-5, rtol=1e-4)
    with StoreWriter(tmp_path / "s", settings={}) as writer:
        writer.write(alone)
    stored = open_store(tmp_path / "s")[0]
    expected = rollout_matrix(alone, alpha="norm")
    assert not np.allclose(expected, rollout_matrix(alone), atol=1e-2)
    torch.testing.assert_close(rollout_matrix(stored, alpha="norm"), expected)


def test_norms_and_reduce_exclude_each_other() -> None:
    vlm = tiny_vlm("llava")
    with (
        pytest.raises(InputError, match="choose one"),
        record(vlm.model, norms=True, reduce=lambda call: call.n_bytes),
    ):
        pass
