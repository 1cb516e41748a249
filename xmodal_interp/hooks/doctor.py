"""The contract of a recording, checked on the user's own model and input.

1. Is the model's output the same with and without recording, also while it generates?
2. Is every attention layer that runs heard?
3. Do the recomputed probabilities, applied to the values, give what the backend returned; are they
   those of the modeling code's eager function, where it names one?
4. Does a key that is hidden through the tap change the output: is the tap where the model reads?
5. Are there as many image tokens as the geometry of the model's family predicts?

All is measured in one process, in evaluation mode; the model is left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import Tensor, nn

from xmodal_interp.errors import CaptureError, GeometryError, InputError
from xmodal_interp.hooks.exactness import Exactness, tolerance
from xmodal_interp.hooks.interventions import intervene
from xmodal_interp.hooks.knockout import knock_out_attention
from xmodal_interp.hooks.recorder import listening
from xmodal_interp.hooks.recording import Choice, Recording
from xmodal_interp.models import VLM, ImageLike

COLUMNS = ("check", "verdict", "value", "limit", "note")
_NEW_TOKENS = 4


@dataclass(frozen=True, eq=False)
class Checkup:
    """What :func:`doctor` found.

    Attributes:
        table: One row per check: ``check``, ``verdict`` (``pass``, ``fail`` or ``skipped``),
            ``value`` (what was measured) and ``limit``, ``note``.
        layers: One row per attention layer: ``tower, kind, layer, module, calls, output_error,
            eager_error, note``; NaN where it could not be measured.
    """

    table: pd.DataFrame
    layers: pd.DataFrame

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.table["verdict"].eq("fail").any()

    def __repr__(self) -> str:
        """The table and the verdict."""
        verdict = "recordings of this model can be trusted" if self.ok else "do not trust them"
        return f"{self.table.to_string(index=False)}\n{verdict}"


def doctor(
    model: VLM | nn.Module,
    image: ImageLike | None = None,
    prompt: str = "What is in the image?",
    *,
    inputs: Mapping[str, Any] | None = None,
) -> Checkup:
    """Check on a model and an input of yours that recordings can be trusted.

    Args:
        model: A VLM; or any transformers model, and then its ``inputs``.
        image: An image for a VLM, a plain one with a few edges if not given.
        prompt: A question for a VLM.
        inputs: Arguments of a bare model.

    Raises:
        InputError: A bare model without inputs.
        CaptureError: A compiled model.
    """
    rows: list[tuple[Any, ...]] = []
    bare = model.model if isinstance(model, VLM) else model
    if isinstance(model, VLM):
        given = _prepared(model, image, prompt, rows)
    elif inputs is None:
        raise InputError("A bare model needs inputs: doctor(model, inputs=dict(input_ids=...)).")
    else:
        given = dict(inputs)
    exactness = Exactness()
    with _evaluating(bare), torch.no_grad():
        recording = _same_outputs(bare, given, exactness, rows)
        _same_answers(model, given, rows)
        _seen(recording, rows)
        _exact(exactness, bare, rows)
        _tapped(bare, given, recording, rows)
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return Checkup(table, exactness.by_layer(recording.modules if recording else ()))


def _prepared(
    vlm: VLM, image: ImageLike | None, prompt: str, rows: list[tuple[Any, ...]]
) -> dict[str, Any]:
    picture = _checkers() if image is None else image
    name = "image tokens are as many as predicted"
    try:
        inputs, (ready,) = vlm.prepare([[picture]], [prompt])
    except GeometryError as error:
        rows.append((name, "fail", float("nan"), float("nan"), str(error)))
        raise
    n_tokens = int(ready.tokens["kind"].eq("image").sum())
    expected = sum(grid.n_tokens for grid in ready.grids)
    verdict = "pass" if ready.grids else "skipped"
    rows.append((name, verdict, n_tokens, expected, "" if ready.grids else "no geometry"))
    return inputs


def _same_outputs(
    model: nn.Module, inputs: Mapping[str, Any], exactness: Exactness, rows: list[tuple[Any, ...]]
) -> Recording | None:
    """Plain forwards differ by as much as the model itself is random; a recorded one by no more."""
    first, again = (_tensors(_seeded(model, inputs)) for _ in range(2))
    own = _difference(first, again)
    name = "outputs are those without recording"
    try:
        with listening(model, Choice(values=True, inspect=exactness.look)) as recording:
            heard = _tensors(_seeded(model, inputs))
    except CaptureError as error:
        rows.append(("every attention layer is heard", "fail", float("nan"), 0, str(error)))
        return None
    value = _difference(first, heard)
    note = "" if own == 0 else "two plain forwards of the model differ by this limit"
    rows.append((name, "pass" if value <= own else "fail", value, own, note))
    return recording


def _same_answers(
    model: VLM | nn.Module, inputs: dict[str, Any], rows: list[tuple[Any, ...]]
) -> None:
    if not isinstance(model, VLM) or not model.model.can_generate():
        return
    options = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS}
    plain = model.generate(inputs, **options)
    try:
        with listening(model.model, Choice(reduce=lambda _: None)):
            heard = model.generate(inputs, **options)
    except CaptureError as error:
        rows.append(("layers are heard while generating", "fail", float("nan"), 0, str(error)))
        return
    n_changed = int((plain != heard).sum())
    verdict = "fail" if n_changed else "pass"
    rows.append(("generated tokens are those without recording", verdict, n_changed, 0, ""))


def _seen(recording: Recording | None, rows: list[tuple[Any, ...]]) -> None:
    if recording is None:
        return
    ran = {call.module for call in recording.calls}
    idle = [identity.module for identity in recording.modules if identity.module not in ran]
    note = f"did not run: {_listed(idle)}" if idle else ""
    rows.append(("every attention layer that ran is heard", "pass", len(ran), len(ran), note))
    if recording.without_matrix:
        names = _listed([identity.module for identity in recording.without_matrix])
        n_layers = len(recording.without_matrix)
        rows.append(
            ("layers without a softmax have no matrix", "skipped", n_layers, n_layers, names)
        )


def _exact(exactness: Exactness, model: nn.Module, rows: list[tuple[Any, ...]]) -> None:
    limit = tolerance(next(iter(model.parameters())).dtype)
    for name, errors in (
        ("probabilities give the backend's output", exactness.output_errors),
        ("probabilities are those of eager attention", exactness.eager_errors),
    ):
        n_calls = exactness.n_calls
        note = f"{len(errors)} of {n_calls} calls" if len(errors) < n_calls else ""
        worst = max(errors, default=float("nan"))
        verdict = "skipped" if not errors else "pass" if worst <= limit else "fail"
        rows.append((name, verdict, worst, limit, note))


def _tapped(
    model: nn.Module,
    inputs: Mapping[str, Any],
    recording: Recording | None,
    rows: list[tuple[Any, ...]],
) -> None:
    """Hide one key from the last query of every layer that the tap can edit."""
    name = "a key hidden through the tap changes the output"
    asked = [call for call in recording.calls if not call.note] if recording else []
    towers = [c for c in asked if c.kind == "self" and c.n_keys > 1 and c.n_queries == c.n_keys]
    chosen = [c for c in towers if c.tower == "language"] or towers
    if not chosen:
        rows.append((name, "skipped", float("nan"), 0, "no layer that asks the interface"))
        return
    tower, last = chosen[-1].tower, chosen[-1].n_queries - 1
    layers = sorted({c.layer for c in chosen if c.tower == tower and c.n_queries == last + 1})
    visible = chosen[-1].visible([last])[:, :, 0].all(1).all(0).nonzero()[:, 0]
    keys = [int(key) for key in visible if key < last][:1]
    if not keys:
        rows.append((name, "skipped", float("nan"), 0, "the last query sees one key only"))
        return
    cut = knock_out_attention([last], keys, layers=layers, tower=tower)
    plain = _tensors(_seeded(model, inputs))
    try:
        with intervene(model, cut):
            changed = _difference(plain, _tensors(_seeded(model, inputs)))
    except CaptureError as error:
        rows.append((name, "skipped", float("nan"), 0, str(error)))
        return
    note = f"{tower} layers, query {last}, key {keys[0]}"
    rows.append((name, "pass" if changed > 0 else "fail", changed, 0, note))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _seeded(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """A forward with the same random numbers every time, for models that draw some."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model(**inputs)


def _tensors(output: Any) -> list[Tensor]:
    """Every floating-point tensor of a model's output, caches left out."""
    if isinstance(output, Tensor):
        return [output.detach().float()] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [t for value in output.values() for t in _tensors(value)]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in _tensors(value)]
    return []


def _difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest absolute difference; NaN where only one has it counts as infinite."""
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        if a.shape != b.shape or not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        gap = (a.nan_to_num() - b.nan_to_num()).abs()
        worst = max(worst, float(gap.max()) if gap.numel() else 0.0)
    return worst


def _checkers() -> Image.Image:
    """A picture with edges everywhere, so that no patch is like all others."""
    side, cell = 224, 16
    picture = Image.new("RGB", (side, side))
    for place in range((side // cell) ** 2):
        row, col = divmod(place, side // cell)
        color = ((37 * row) % 256, (61 * col) % 256, (29 * (row + col)) % 256)
        picture.paste(color, (col * cell, row * cell, (col + 1) * cell, (row + 1) * cell))
    return picture


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
