"""Observe every softmax attention in torch's functions: the reference of these tests.

It is independent of how a model computes its attention: fused, by ``nn.MultiheadAttention``, or
with an inline softmax in an attention module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
# The softmax of these is not over keys, but over experts, states of earlier layers, sampling points
# or (in GroupViT) queries.
NOT_ATTENTION = re.compile(
    r"router|gate$|indexer|hyper_?(connection|head)|mixer$|AttentionResidual|deformable|AssignAttention",
    re.IGNORECASE,
)
SOFTMAX = {torch.softmax, F.softmax, Tensor.softmax, torch._C._nn.__dict__.get("softmax")}


@dataclass(frozen=True)
class ObservedCall:
    """One observed attention call.

    Attributes:
        module: Qualified name of the module that made the call.
        probs: The probabilities; heads and samples may share one axis.
        sharpness: Mean total variation distance, 0 to 1, of the rows from the uniform distribution
            over their visible keys; rows with a single visible key are left out.
    """

    module: str
    probs: Tensor
    sharpness: float

    @property
    def n_keys(self) -> int:
        """Number of keys."""
        return self.probs.shape[-1]


@contextmanager
def spy(model: nn.Module) -> Iterator[list[ObservedCall]]:
    """Collect the attention calls inside the block."""
    observer = _Spy()
    handles = [
        handle
        for name, module in model.named_modules()
        for handle in (
            module.register_forward_pre_hook(lambda _m, _a, name=name: observer.open.append(name)),
            module.register_forward_hook(lambda _m, _a, _o: observer.close(), always_call=True),
        )
    ]
    observer.classes = {name: type(module).__name__ for name, module in model.named_modules()}
    try:
        with observer:
            yield observer.calls
    finally:
        for handle in handles:
            handle.remove()


class _Spy(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[ObservedCall] = []
        self.open: list[str] = []
        self.classes: dict[str, str] = {}

    def close(self) -> None:
        self.open.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            if self._in_attention():
                self._note(_probs(*args, **kwargs))
        elif func is F.multi_head_attention_forward:
            wanted = kwargs | {"need_weights": True, "average_attn_weights": False}
            self._note(func(*args, **wanted)[1])
        result = func(*args, **kwargs)
        if func in SOFTMAX and result.ndim >= 3 and self._in_attention():
            self._note(result)
        return result

    def _in_attention(self) -> bool:
        name = self.open[-1] if self.open else ""
        leaf = name.rsplit(".", 1)[-1]
        named = f"{leaf} {self.classes.get(name, '')}"
        parent = name.rsplit(".", 1)[0]
        inside = f"{named} {parent.rsplit('.', 1)[-1]} {self.classes.get(parent, '')}"
        return bool(ATTENTION.search(inside)) and not NOT_ATTENTION.search(named)

    def _note(self, probs: Tensor) -> None:
        probs = probs.detach().float()
        seen = probs > 0
        n_seen = seen.sum(-1, keepdim=True)
        distance = 0.5 * ((probs - 1 / n_seen.clamp(min=1)) * seen).abs().sum(-1)
        rows = distance[n_seen[..., 0] > 1]
        sharpness = float(rows.mean()) if rows.numel() else 0.0
        self.calls.append(ObservedCall(self.open[-1] if self.open else "", probs, sharpness))


def _probs(
    query: Tensor,
    key: Tensor,
    value: Tensor,  # noqa: ARG001
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the probabilities of ``F.scaled_dot_product_attention``, by its documentation."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        else:
            scores = scores + attn_mask
    return scores.softmax(-1).nan_to_num()
