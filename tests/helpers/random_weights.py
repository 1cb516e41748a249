"""Random weights with which every attention layer affects the output and none is near uniform.

Libraries initialise for training: small weights, zero biases, closed gates. Here every tensor is
redrawn so that activations stay of order one from layer to layer:

* matrices and kernels have a deviation of ``1 / sqrt(fan in)``, larger for queries and keys;
* embeddings and position tables are of order one;
* norms are spread around their old values, biases around zero;
* closed or nearly closed gates and layer scales are opened.
"""

from __future__ import annotations

import re
import zlib

import torch
from torch import Tensor, nn

SHARPER = 2.5  # gain of query and key projections; scores then have a deviation of about 2 to 3
SPREAD = 0.2
OPEN = 0.8
QUERY_OR_KEY = re.compile(
    r"(^|[._])(q|k|qk|qkv|query|key|query_key_value|in|kv)(_[ab])?(_proj\w*|_b|_a)?(\.|$)"
)
QUERY_OR_KEY_NORM = re.compile(r"(^|[._])(q|k|query|key)_?(layer)?_?norm\b")
GATE = re.compile(r"gate|gamma|layer_?scale|lambda|alpha|\bls\d|scale")
# Time constants of state-space and linear attention layers; with random values they would diverge.
DYNAMICS = re.compile(r"A_log|dt_bias|\.D$|inv_freq|dt_")


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Redraw all weights of a model in place, each from its name and the seed."""
    embeddings = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    }
    for name, weight in model.named_parameters():
        if DYNAMICS.search(name) or not weight.is_floating_point():
            continue
        draw = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        noise = torch.randn(weight.shape, generator=draw)
        weight.copy_(_drawn(name, weight, noise, is_embedding=name in embeddings))


def _drawn(name: str, old: Tensor, noise: Tensor, *, is_embedding: bool) -> Tensor:
    if (old.numel() and bool((old == old.flatten()[0]).all())) or old.ndim < 2:
        level = float(old.float().mean()) if old.numel() else 0.0
        shut = abs(level) < 0.5 and GATE.search(name) and not name.endswith("bias")
        sharper = 1.0 if QUERY_OR_KEY_NORM.search(name) and not name.endswith("bias") else 0.0
        return (OPEN if shut else level) + sharper + SPREAD * noise
    if is_embedding or "position" in name or "pos_emb" in name or "token" in name:
        return 0.7 * noise
    fan_in = old[0].numel() if old.ndim != 3 else min(old.shape[1:])
    gain = SHARPER if QUERY_OR_KEY.search(name) else 1.0
    if "channel_attn" in name:  # scores of channel attention are sums over all positions
        gain = 0.5
    return noise * gain / fan_in**0.5
