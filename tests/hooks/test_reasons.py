"""Errors give the right reason and a way out, and attention that can be recorded is recorded."""

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import xmodal_interp as xi
from tests.helpers.attention_variants import of
from tests.helpers.model_types import tiny
from xmodal_interp.errors import CaptureError, InputError
from xmodal_interp.hooks import record


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(self.projection(x), x, x)


def llama(**options) -> tuple[nn.Module, dict]:
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 16}
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=4, **options)
    return LlamaForCausalLM(config).eval(), {"input_ids": torch.arange(8)[None]}


@pytest.mark.filterwarnings("ignore:_compile flag")  # transformers calls create_block_mask with it
def test_flex_attention_is_recorded_and_not_edited() -> None:
    """transformers 5.23 passes a ``BlockMask``, which is not a tensor, to flex attention.

    For 8 tokens, the CPU kernel of torch 2.14.1 returns wrong or NaN rows in some processes.
    """
    model, inputs = llama()
    inputs = {"input_ids": torch.arange(20)[None]}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True).attentions[0]
        model.set_attn_implementation("flex_attention")
        alone = model(**inputs).logits
        with record(model) as recording:
            assert torch.equal(model(**inputs).logits, alone)
    torch.testing.assert_close(recording.calls[0].probs(), expected, atol=1e-5, rtol=0)
    assert recording.calls[0].visible()[0, 0].equal(torch.ones(20, 20).tril().bool())
    cut = xi.knock_out_attention([7], [0], layers=[0])
    with torch.no_grad(), pytest.raises(CaptureError) as error, xi.intervene(model, cut):
        model(**inputs)
    assert str(error.value) == (
        "Flex attention receives a function instead of a mask, which cannot be edited. Load the "
        "model with attn_implementation='sdpa' to intervene."
    )


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap has no rule for the kernel
def test_vmap_is_refused() -> None:
    model = nn.Sequential(Attention())
    x = torch.randn(3, 2, 5, 4)
    with torch.no_grad():
        alone = torch.func.vmap(model)(x)
        with pytest.raises(CaptureError) as error, record(model):
            assert torch.equal(torch.func.vmap(model)(x), alone)
    assert str(error.value) == (
        "A model inside torch.func.vmap cannot be recorded, because the values of its tensors "
        "cannot be read there. Call the model with the batch, without vmap."
    )


def test_continuous_batching_is_refused() -> None:
    model, inputs = llama()
    scope = {"__name__": "transformers.generation.continuous_batching.continuous_api"}
    exec("def run(model, inputs): model(**inputs)", scope)

    def elsewhere() -> None:
        thread = threading.Thread(target=scope["run"], args=(model, inputs))
        thread.start()
        thread.join()

    with torch.no_grad(), pytest.raises(CaptureError) as error, record(model):
        elsewhere()
    assert str(error.value) == (
        "Continuous batching (generate_batch) cannot be recorded: transformers runs the model in a "
        "separate thread, on tokens of several requests at once. Use generate."
    )


def test_heads_of_torchs_attention_are_not_edited() -> None:
    model = tiny("siglip").model
    pool = xi.ablate_heads({0: [0]}, tower="vision", kind="cross")
    with pytest.raises(CaptureError) as error, xi.intervene(model, pool):
        pass
    assert str(error.value) == (
        "vision cross-attention, layers 0, is torch.nn.MultiheadAttention, whose heads cannot be "
        "edited: one torch function computes them and the output projection. Leave these layers "
        "out."
    )


def test_layers_without_the_interface_are_not_edited() -> None:
    model, inputs = of("blip")
    cut = xi.ablate_heads({0: [0]})
    with torch.no_grad(), pytest.raises(CaptureError) as error, xi.intervene(model, cut):
        model(**inputs)
    assert str(error.value) == (
        "An intervention did not edit all its layers: language self-attention, layers 0, ran "
        "without transformers' attention interface, where heads are edited. Leave them out."
    )


def test_the_doctor_names_the_input_of_the_model() -> None:
    model = tiny("siglip").model.vision_model
    with pytest.raises(InputError, match=r"inputs=dict\(pixel_values=\.\.\.\)\), or a VLM"):
        xi.doctor(model)
