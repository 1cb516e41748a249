"""How exact recomputed probabilities are, measured while the model makes its calls.

* Applied to the values they give ``O' = P V``; the backend returned ``O``. The error is
  ``max |O' - O| / max |V|``.
* The modeling code's eager function, given the same operands, returns probabilities of its own. The
  error is ``max |P' - P|``.

Rows are sampled where a whole matrix would not fit.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from xmodal_interp.attention import AttentionCall
from xmodal_interp.hooks.bypass import Heard
from xmodal_interp.hooks.modules import Identity
from xmodal_interp.hooks.tapping import RawCall

LAYER_COLUMNS = (
    *("tower", "kind", "layer", "module"),
    *("calls", "output_error", "eager_error", "note"),
)
_BYTES = 64 * 2**20  # of float32 probabilities at a time
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def tolerance(dtype: torch.dtype) -> float:
    """The largest error of a probability that a model's precision explains."""
    return _TOLERANCES.get(dtype, _TOLERANCES[torch.bfloat16])


class Exactness:
    """Compares every call with what the backend made of it; memory stays bounded."""

    def __init__(self) -> None:
        self.n_calls = 0
        self.calls: dict[str, int] = defaultdict(int)
        self.notes: dict[str, str] = {}
        self.errors: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    @property
    def output_errors(self) -> list[float]:
        """One per call whose output could be compared."""
        return [error for of in self.errors.values() for error in of["output"]]

    @property
    def eager_errors(self) -> list[float]:
        """One per call that eager attention could be asked about."""
        return [error for of in self.errors.values() for error in of["eager"]]

    def look(self, heard: Heard, call: AttentionCall) -> None:
        """Measure one call."""
        self.n_calls += 1
        self.calls[call.module] += 1
        self.notes[call.module] = call.note
        if not isinstance(heard, RawCall):
            return  # the module's own probabilities: there is nothing to recompute
        rows = _rows(call)
        probs = call.probs(queries=rows)
        seeing = call.visible(rows).any(-1).expand(probs.shape[:-1])
        errors = self.errors[call.module]
        if heard.output is not None:
            errors["output"].append(_output_error(heard, heard.output[:, rows], probs, seeing))
        try:
            expected = _eager_probs(heard, call, rows)
        except (RuntimeError, TypeError) as error:  # of modeling code that can't be run as it is
            self.notes[call.module] = f"eager attention fails: {error}"
            return
        if expected is not None:
            gap = (expected.float() - probs).abs()[seeing]
            errors["eager"].append(float(gap.max()) if len(gap) else 0.0)

    def by_layer(self, modules: Sequence[Identity]) -> pd.DataFrame:
        """The largest errors of each layer; NaN where nothing could be compared."""
        records: list[dict[str, Any]] = []
        for each in modules:
            errors = self.errors.get(each.module, {})
            records.append(
                {
                    "tower": each.tower,
                    "kind": each.kind,
                    "layer": each.layer,
                    "module": each.module,
                    "calls": self.calls.get(each.module, 0),
                    "output_error": max(errors.get("output", []), default=float("nan")),
                    "eager_error": max(errors.get("eager", []), default=float("nan")),
                    "note": self.notes.get(each.module, "did not run"),
                }
            )
        return pd.DataFrame(records, columns=list(LAYER_COLUMNS))


def _rows(call: AttentionCall) -> list[int]:
    """Every row, or as many as fit, evenly spread."""
    n_fit = max(1, _BYTES // (4 * call.n_samples * call.n_heads * call.n_keys))
    step = -(-call.n_queries // n_fit)
    return list(range(0, call.n_queries, step))


def _output_error(heard: RawCall, output: Tensor, probs: Tensor, seeing: Tensor) -> float:
    """Of the rows that see a key; a probability that is NaN there is an error that is NaN."""
    values = heard.values_by_head
    ours = (probs @ values)[seeing]
    theirs = output.float().transpose(1, 2)[seeing]
    return float((ours - theirs).abs().max() / values.abs().max()) if len(ours) else 0.0


def _eager_probs(heard: RawCall, call: AttentionCall, rows: list[int]) -> Tensor | None:
    """Probabilities of the modeling code's own function on the same operands and mask."""
    if heard.eager is None or len(rows) < call.n_queries:
        return None
    visible = call.visible()
    hidden = torch.finfo(heard.query.dtype).min
    mask = torch.zeros(visible.shape, dtype=heard.query.dtype, device=visible.device)
    if heard.mask is not None and heard.mask.is_floating_point() and heard.mask.ndim == 4:
        mask = heard.mask.clone()
    mask = mask.masked_fill(~visible, hidden)
    _, probs = heard.eager(heard.module, heard.query, heard.key, heard.value, mask, **heard.options)
    return probs
