"""Which model made a store: digests that tell another model, or another state of it, at once."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import Tensor, nn

from xmodal_interp.models import VLM
from xmodal_interp.store.schema import digest_of

_WHERE_FROM = ("_name_or_path", "transformers_version")  # moving a folder changes no model


def model_digests(vlm: VLM) -> dict[str, str]:
    """SHA-256 of a model's config, of its processor's settings, and of its weights.

    The weights' is over up to 16 numbers of each parameter: fast, and enough to tell a checkpoint
    from another.
    """
    processor: dict[str, Any] = json.loads(vlm.processor.to_json_string())
    processor["chat_template"] = getattr(vlm.processor, "chat_template", None)
    config = json.loads(vlm.model.config.to_json_string(use_diff=False))
    return {
        "config_digest": digest_of(_portable(config)),
        "processor_digest": digest_of(_portable(processor)),
        "weights_digest": _weights_digest(vlm.model),
    }


def _portable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _portable(v) for k, v in value.items() if k not in _WHERE_FROM}
    return [_portable(v) for v in value] if isinstance(value, list) else value


def _weights_digest(model: nn.Module) -> str:
    """Parameters that are not in memory, or of a quantised kind, take part by name and shape."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        held = type(weight) is nn.Parameter and type(weight.data) is Tensor and not weight.is_meta
        if held and weight.numel():
            flat = weight.detach().reshape(-1)
            few = flat[:: max(1, len(flat) // 16)][:16]
            digest.update(few.float().cpu().numpy().tobytes())
    return digest.hexdigest()
