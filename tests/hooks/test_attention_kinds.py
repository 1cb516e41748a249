"""Attention modules are found under any class name; attention over channels is a separate kind.

Classes like those below exist in timm 1.0.31: ``XCA`` (xcit), ``GPSA`` and ``MHSA`` (convit);
and in transformers 5.23: ``LongcatFlashMLA``, ``MiniMaxLightningAttention``,
``Phi4MultimodalAudioRelativeAttentionBias``, ``Florence2VisionChannelAttention``.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.tiny import QUESTION, picture
from xmodal_interp.errors import CaptureError, UnsupportedModelError
from xmodal_interp.hooks import attention_modules, record
from xmodal_interp.hooks.attention_modules import layers_without_matrix

HEADS, WIDTH, TOKENS = 2, 8, 5


class MHSA(nn.Module):
    """Computes its softmax inline, in a class whose name does not contain "attention"."""

    num_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def operands(self, x: Tensor) -> Tensor:
        n, tokens, _ = x.shape
        return self.qkv(x).reshape(n, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)

    def probs(self, x: Tensor) -> Tensor:
        q, k, _ = self.operands(x)
        return (q @ k.transpose(-1, -2)).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.probs(x) @ self.operands(x)[2]
        return mixed.transpose(1, 2).flatten(2)


class XCA(MHSA):
    """Computes attention over channels with torch's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.operands(x).transpose(-1, -2)
        mixed = functional.scaled_dot_product_attention(q, k, v, scale=1.0)
        return mixed.permute(0, 3, 1, 2).flatten(2)


class GPSA(MHSA):
    """Adds two softmaxes, one of contents and one of positions, as ConViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(HEADS, TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        by_place = self.places.expand(len(x), -1, -1, -1).softmax(-1)
        mixed = (0.5 * self.probs(x) + 0.5 * by_place) @ self.operands(x)[2]
        return mixed.transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, name: str, attention: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, attention)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.get_submodule(self.name)(x)


def stack(*blocks: nn.Module) -> nn.Module:
    return nn.Sequential(*blocks).eval()


def names(model: nn.Module) -> list[tuple]:
    return [(i.kind, i.layer, i.module) for i in attention_modules(model).values()]


@pytest.mark.parametrize("name", ["attn", "attention", "self_attn"])
def test_attention_is_found_by_its_attribute_name(name) -> None:
    model = stack(*(Block(name, MHSA()) for _ in range(3)))
    assert names(model) == [("self", i, f"{i}.{name}") for i in range(3)]
    x = torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        alone = model(x)
        with record(model) as recording:
            assert torch.equal(model(x), alone)
        expected = model[0].get_submodule(name).probs(x)
    assert [call.layer for call in recording.calls] == [0, 1, 2]
    torch.testing.assert_close(recording.calls[0].probs(), expected, atol=1e-6, rtol=0)


def test_a_sum_of_softmaxes_is_refused_and_another_layer_is_not() -> None:
    model = stack(Block("attn", GPSA()), Block("attn", MHSA()))
    x = torch.randn(2, TOKENS, WIDTH)
    with (
        torch.no_grad(),
        pytest.raises(
            CaptureError,
            match=r"^0\.attn computes 2 softmaxes over the same tokens in one run, and how it "
            r"combines them is unknown\. Leave out its tower or layer with towers= or layers=\.$",
        ),
        record(model),
    ):
        model(x)
    with torch.no_grad(), record(model, layers=[1]) as recording:
        model(x)
    assert [call.module for call in recording.calls] == ["1.attn"]
    expected = model[1].attn.probs(model[0](x)).detach()
    torch.testing.assert_close(recording.calls[0].probs(), expected, atol=1e-6, rtol=0)


def test_a_module_named_attn_without_a_softmax_is_not_attention() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.projection = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.projection(x).sigmoid()

    assert names(stack(Block("attn", Gate()), Block("attn", MHSA()))) == [("self", 0, "1.attn")]
    with pytest.raises(UnsupportedModelError, match=r"Sequential has no module with softmax att"):
        attention_modules(stack(Block("attn", Gate())))


def test_attention_over_channels_is_a_separate_kind() -> None:
    model = stack(Block("attn", XCA()), Block("attn", MHSA()), Block("attn", XCA()))
    assert names(model) == [
        ("channel", 0, "0.attn"),
        ("self", 0, "1.attn"),
        ("channel", 1, "2.attn"),
    ]
    x = torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad(), record(model) as recording:
        model(x)
        q, k, _ = model[0].attn.operands(x).transpose(-1, -2)
    call = recording.calls[0]
    assert (call.kind, call.n_queries, call.n_keys) == ("channel", WIDTH // HEADS, WIDTH // HEADS)
    torch.testing.assert_close(call.probs(), (q @ k.transpose(-1, -2)).softmax(-1))


def test_statistics_over_positions_exclude_attention_over_channels() -> None:
    import xmodal_interp as xi
    from tests.helpers.real import real, settled

    vlm = xi.VLM(real("florence2")[0], settled("florence2"))
    vision = [i for i in attention_modules(vlm.model).values() if i.tower == "vision"]
    places = [(i.kind, i.layer) for i in vision]
    assert places == [(kind, layer) for layer in range(4) for kind in ("self", "channel")]
    sample = xi.capture(vlm, picture(), QUESTION)
    for kind in ("self", "channel"):
        assert sample.layers("vision", kind) == list(range(4))
    assert sample.call(0, tower="vision", kind="channel").n_keys < 20
    entropies = xi.attention_entropy(sample, tower="vision")
    assert sorted(set(entropies["layer"])) == list(range(4))


def test_classes_named_attention_that_are_not_softmax_attention() -> None:
    class RelativeAttentionBias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, HEADS)

    class LightningAttention(MHSA):
        pass

    model = stack(Block("bias", RelativeAttentionBias()), Block("attn", MHSA()))
    assert names(model) == [("self", 0, "1.attn")]
    model = stack(Block("attn", LightningAttention()), Block("attn", MHSA()))
    assert names(model) == [("self", 0, "1.attn")]
    assert [each.module for each in layers_without_matrix(model)] == ["0.attn"]


def test_latent_attention_in_a_module_list_of_a_layer() -> None:
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 32, "ffn_hidden_size": 32, "num_layers": 2}
    heads = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8}
    ranks = {"q_lora_rank": 8, "kv_lora_rank": 8, "num_attention_heads": 4}
    experts = {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2}
    config = LongcatFlashConfig(**sizes, **heads, **ranks, **experts, expert_ffn_hidden_size=16)
    model = LongcatFlashForCausalLM(config).eval()
    ids = torch.arange(2, 14)[None]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        alone = model(input_ids=ids, output_attentions=True)
        with record(model) as recording:
            assert torch.equal(model(input_ids=ids).logits, alone.logits)
    assert [call.layer for call in recording.calls] == [0, 1, 2, 3]
    for call, expected in zip(recording.calls, alone.attentions, strict=True):
        torch.testing.assert_close(call.probs(), expected, atol=1e-5, rtol=0)


class TalkingHeads(MHSA):
    """Mixes the heads' probabilities before the product with V, as ``TalkingHeadAttn`` does."""

    def __init__(self, *, after: bool) -> None:
        super().__init__()
        self.after = after
        self.mix = nn.Linear(HEADS, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.operands(x)
        scores = q @ k.transpose(-1, -2)
        if not self.after:
            scores = self.mix(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        probs = scores.softmax(-1)
        if self.after:
            probs = self.mix(probs.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (probs @ v).transpose(1, 2).flatten(2)


def test_talking_heads_are_refused() -> None:
    model = stack(Block("attn", TalkingHeads(after=False)), Block("attn", TalkingHeads(after=True)))
    x = torch.randn(2, TOKENS, WIDTH)
    with (
        torch.no_grad(),
        pytest.raises(
            CaptureError,
            match=r"^1\.attn mixes the results of its softmax by a learned layer before the "
            r"product with the values \(talking heads\), so no head has these probabilities\. "
            r"Leave out its tower or layer with towers= or layers=\.$",
        ),
        record(model),
    ):
        model(x)
    with torch.no_grad(), record(model, layers=[0]) as recording:
        model(x)
    assert [call.module for call in recording.calls] == ["0.attn"]


def test_heads_that_are_folded_into_the_batch_of_blocks_are_unfolded() -> None:
    """``HaloAttn`` of timm has probabilities ``[sample x head, block, query, key]``."""
    heads, blocks = 4, 3

    class HaloAttn(nn.Module):
        num_heads = heads

        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            n = len(x)
            q = self.q(x).view(n, blocks, TOKENS, heads, -1).permute(0, 3, 1, 2, 4).flatten(0, 1)
            self.probs = (q @ q.transpose(-1, -2)).softmax(-1)
            mixed = (self.probs @ q).view(n, heads, blocks, TOKENS, -1)
            return mixed.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)

    model = stack(Block("attn", HaloAttn()))
    with torch.no_grad(), record(model) as recording:
        model(torch.randn(2, blocks * TOKENS, WIDTH))
    expected = model[0].attn.probs.view(2, heads, blocks * TOKENS, TOKENS)
    torch.testing.assert_close(recording.calls[0].probs(), expected, atol=0, rtol=0)
    assert recording.calls[0].note.endswith("keys are numbered within the chunk of each query")


@pytest.mark.parametrize(
    "name", ["LinearSelfAttention", "EfficientAdditiveAttention", "LambdaLayer"]
)
def test_a_softmax_with_one_row_for_all_queries_is_not_softmax_attention(name) -> None:
    """MobileViTv2 and SwiftFormer compute one weighted mean for all queries."""

    def forward(self: MHSA, x: Tensor) -> Tensor:
        return x * self.qkv(x)[..., :1].transpose(1, 2).softmax(-1) @ x

    kind = type(name, (MHSA,), {"forward": forward})
    model = stack(Block("self_attn", kind()), Block("attn", MHSA()))
    assert names(model) == [("self", 0, "1.attn")]
    assert [each.module for each in layers_without_matrix(model)] == ["0.self_attn"]
