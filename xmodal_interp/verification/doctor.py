"""The doctor: check on the user's own model and input that recordings can be trusted.

1. Is the number of image tokens, of keys of cross-attention to an image, or of positions of a
   vision model, the one that the geometry of the model's family predicts?
2. If the pixels of a patch change, does the key at its labelled position change? Are the boxes of
   patches and tokens those that test images measure in the processor?
3. Is the model's output the same with and without recording, in a forward and in a generation?
4. Is every attention layer that runs recorded, for any class and any implementation?
5. Do the recomputed probabilities, applied to the values, give the output of the backend, in a
   forward and in every step of a generation? Do they equal the probabilities of the modeling code's
   eager function, if it has one? The output is also checked with each backend and cache passed.
6. Does hiding a key through the tap change the output, so that interventions have an effect?

All checks run in one process, with the model in evaluation mode. The model is left unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel

from xmodal_interp.attention import AttentionCall
from xmodal_interp.errors import CaptureError, GeometryError, InputError
from xmodal_interp.hooks.attention_modules import module_of
from xmodal_interp.hooks.compiled import refuse_compiled
from xmodal_interp.hooks.interventions import intervene
from xmodal_interp.hooks.knockout import knock_out_attention
from xmodal_interp.hooks.probability_check import Gap
from xmodal_interp.hooks.recorder import Recording, Settings, record_with
from xmodal_interp.hooks.refusals import refuse_split
from xmodal_interp.models import (
    VLM,
    ImageLike,
    Prompt,
    as_original,
    check_whole,
    described_training,
    evaluation_mode,
    modules_in_training,
)
from xmodal_interp.models.geometry import ProbedTokens
from xmodal_interp.models.model_parts import parts_of
from xmodal_interp.upstream import attention_setting, restore_attention_setting
from xmodal_interp.verification._private import difference, seeded, tensors_of
from xmodal_interp.verification.exactness import Exactness
from xmodal_interp.verification.measured_boxes import compared_boxes
from xmodal_interp.verification.missed_attention import missed_modules
from xmodal_interp.verification.painting import SIZES, painted_patches

COLUMNS = ("check", "verdict", "value", "limit", "note")
QUESTION = "What is in the image?"
_NEW_TOKENS = 4
_UNKNOWN = float("nan")
_NO_RULE = "the family has no rule that predicts their number"
_ATTENDED = 1e-3  # hiding a key with this probability changes the output measurably


@dataclass(frozen=True, eq=False)
class Checkup:
    """The result of :func:`doctor`.

    Attributes:
        table: One row per check: ``check``, ``verdict`` (``pass``, ``fail`` or ``skipped``),
            ``value`` (the measured value; NaN if it could not be measured), ``limit`` (the values
            that pass, such as ``"at most 1e-05"``) and ``note``.
        layers: One row per attention layer: ``tower, kind, layer, module, calls, output_error,
            eager_error, note``; an error is NaN if it could not be measured.
    """

    table: pd.DataFrame
    layers: pd.DataFrame

    @property
    def ok(self) -> bool:
        """True if no check failed."""
        return not self.table["verdict"].eq("fail").any()

    @property
    def summary(self) -> str:
        """The result in one line."""
        counts = self.table["verdict"].value_counts()
        n_passed, n_skipped = int(counts.get("pass", 0)), int(counts.get("skipped", 0))
        skipped = f", {n_skipped} skipped" if n_skipped else ""
        if self.ok:
            return f"{n_passed} checks passed{skipped}: recordings of this model can be trusted."
        failed = self.table.loc[self.table["verdict"].eq("fail"), "check"]
        return (
            f"{n_passed} checks passed{skipped}, {len(failed)} failed ({'; '.join(failed)}): do "
            "not trust recordings of this model."
        )

    def __repr__(self) -> str:
        """The table and the summary."""
        return f"{self.table.to_string(index=False)}\n{self.summary}"


@dataclass(eq=False)
class _Findings:
    """Collects the rows of the table."""

    rows: list[tuple[Any, ...]] = field(default_factory=list)

    def judge(self, check: str, value: float, limit: str, note: str = "", *, passed: bool) -> None:
        self.rows.append((check, "pass" if passed else "fail", value, limit, note))

    def skip(self, check: str, note: str, value: float = _UNKNOWN) -> None:
        self.rows.append((check, "skipped", value, "", note))

    def checkup(self, layers: pd.DataFrame) -> Checkup:
        return Checkup(pd.DataFrame(self.rows, columns=list(COLUMNS)), layers)


def doctor(
    model: VLM | nn.Module,
    image: ImageLike | None = None,
    prompt: str | None = None,
    *,
    inputs: Mapping[str, Any] | None = None,
    backends: Sequence[str] = (),
    caches: Sequence[str] = (),
) -> Checkup:
    """Check that recordings of a model can be trusted, on an input of yours.

    The checks run a few forwards of the model, and for a VLM two generations of four tokens. Its
    processor runs on about 30 test images. The model, its configuration and the random state are
    left as they were.

    Args:
        model: A VLM, or any transformers model together with ``inputs``.
        image: An image for a VLM. If not given, a generated image with many edges is used.
        prompt: A question for a VLM; "What is in the image?" if not given. A vision model takes
            none.
        inputs: Keyword arguments of the forward of a bare model.
        backends: Further attention implementations to check, such as ``"eager"`` or one that you
            registered.
        caches: For a VLM: further caches to check in a generation, such as ``"static"`` (values of
            ``cache_implementation`` of ``generate``).

    Returns:
        A table of checks, a table of layers, and the result (``ok``, ``summary``).

    Raises:
        InputError: A bare model was given without inputs, or a VLM with inputs; a backend is not
            registered; or caches were given for a model that is not a VLM or does not generate.
        CaptureError: The model is compiled.
        UnsupportedModelError: The model has no attention modules, or its layers are split over
            processes.
    """
    findings, exactness = _Findings(), Exactness()
    bare = module_of(model)
    parts = parts_of(bare)
    refuse_compiled(parts.modules)
    refuse_split(parts.modules.values())
    _check_names(model, backends, caches)
    if isinstance(model, VLM):
        if inputs is not None:
            raise InputError(
                "doctor got a VLM and inputs=, but a VLM makes its inputs from an image and a "
                "prompt. Pass image= and prompt=, or the bare model: "
                "doctor(vlm.model, inputs=...)."
            )
        prompt = _question(model, prompt)
        prepared = _checked_inputs(model, image, prompt, findings)
        if prepared is None:
            return findings.checkup(exactness.by_layer(()))
        given, ready = prepared
    elif inputs is None:
        name = getattr(bare, "main_input_name", "input_ids")
        raise InputError(
            f"doctor got a bare {type(bare).__name__} without inputs. Pass "
            f"doctor(model, inputs=dict({name}=...)), or a VLM, which makes its own inputs."
        )
    else:
        given = dict(inputs)
    _check_state(model, findings)
    with evaluation_mode(bare, warn=False), torch.no_grad():
        if isinstance(model, VLM):
            _check_places(model, prompt or "", ready.images[0].size, findings)
        recording = _check_outputs(bare, given, exactness, findings)
        if isinstance(model, VLM):
            _check_cross_keys(model, ready, recording, findings)
            _check_generation(model, given, exactness, findings)
        if recording is not None:
            _check_recorded(bare, given, recording, findings)
            _check_probs(exactness, findings)
            for backend in backends:
                _check_backend(backend, bare, given, findings)
            for cache in caches:
                _check_cache(cache, model, given, findings)
            _check_interventions(bare, given, recording, findings)
    return findings.checkup(exactness.by_layer(recording.modules if recording else ()))


def _question(vlm: VLM, prompt: str | None) -> str:
    if prompt is not None:
        return prompt
    return QUESTION if vlm.family.language else ""


def _check_names(model: VLM | nn.Module, backends: Sequence[str], caches: Sequence[str]) -> None:
    for name, given in (("backends", backends), ("caches", caches)):
        if isinstance(given, str):
            raise InputError(f"{name} must be a list, such as [{given!r}]; got {given!r}.")
    bare = module_of(model)
    if caches and not (isinstance(model, VLM) and bare.can_generate()):  # type: ignore[operator]
        raise InputError(
            f"Got caches {', '.join(map(repr, caches))} for a {type(bare).__name__}, which is not "
            "a VLM that generates. Leave caches= out."
        )


def _check_state(model: VLM | nn.Module, findings: _Findings) -> None:
    """Check that all weights come from the checkpoint, and report modules in training mode."""
    if isinstance(model, VLM) and model.loading is not None:
        check, n_random = "all weights come from the checkpoint", model.loading.n_random
        note = f"weights {model.loading}" if model.loading else ""
        findings.judge(check, n_random, "exactly 0", note, passed=not model.loading)
    training = modules_in_training(module_of(model))
    if training:
        note = (
            f"{described_training(training)}; the doctor and xi.capture switch them to evaluation "
            "mode, but xi.record(model) does not: call model.eval()"
        )
        findings.skip("every module is in evaluation mode", note, len(training))


def _checked_inputs(
    vlm: VLM, image: ImageLike | None, prompt: str, findings: _Findings
) -> tuple[dict[str, Any], Prompt] | None:
    picture = _checkers() if image is None else as_original(image)  # boxes in its pixels
    check = "the number of image tokens is as predicted"
    try:
        inputs, (ready,) = vlm.prepare([[picture]], [prompt])
    except GeometryError as error:
        findings.judge(check, _UNKNOWN, "", str(error), passed=False)
        return None
    check_whole(vlm.model, inputs)
    if not vlm.family.in_sequence:
        return inputs, ready  # the keys of cross-attention are counted in the recording
    n_tokens = int(ready.tokens["kind"].eq("image").sum())
    if n_tokens == 0 and vlm.family.marks_tokens:
        findings.judge(check, 0, "more than 0", _unmarked(vlm), passed=False)
    elif vlm.family.geometry is None:
        findings.skip(check, vlm.family.reason or _NO_RULE, n_tokens)
    else:
        expected = sum(grid.n_tokens for grid in ready.grids)
        findings.judge(check, n_tokens, f"exactly {expected}", passed=n_tokens == expected)
    return inputs, ready


def _check_cross_keys(
    vlm: VLM, ready: Prompt, recording: Recording | None, findings: _Findings
) -> None:
    """Check the number of keys of cross-attention to the image, if images are not tokens."""
    if vlm.family.in_sequence or recording is None:
        return
    if not vlm.family.language:
        _check_positions(ready, recording, findings)
        return
    check = "the number of image keys is as predicted"
    counts = {
        call.n_keys for call in recording.calls if call.tower == "language" and call.kind == "cross"
    }
    expected = sum(grid.n_tokens for grid in ready.grids)
    if not counts:
        findings.skip(check, "no cross-attention of the language tower was recorded")
    elif vlm.family.geometry is None:
        findings.skip(check, vlm.family.reason or _NO_RULE, max(counts))
    else:
        worst = max(counts, key=lambda n: abs(n - expected))
        findings.judge(check, worst, f"exactly {expected}", passed=counts == {expected})


def _check_positions(ready: Prompt, recording: Recording, findings: _Findings) -> None:
    """Check the number of positions of every self-attention layer of a vision model."""
    counts = {
        n
        for call in recording.calls
        if call.tower == "vision" and call.kind == "self"
        for n in (call.n_queries, call.n_keys)
    }
    expected = ready.n_positions
    worst = max(counts, key=lambda n: abs(n - expected), default=0)
    check = "the number of vision positions is as predicted"
    findings.judge(check, worst, f"exactly {expected}", passed=counts == {expected})


def _unmarked(vlm: VLM) -> str:
    """Return the reason why no position of a prompt with an image is labelled as an image token."""
    family, config = vlm.family, vlm.model.config
    if family.image_mask is not None:
        return f"the model's input {family.image_mask!r} marks no position"
    token_id = family.image_token_id(config)
    if token_id is None:
        return (
            f"the family names image_token={family.image_token!r}, which the configuration of the "
            "model does not have; name the attribute that holds the id of the image tokens"
        )
    return (
        f"the family names image_token={family.image_token!r}, which is {token_id} in the "
        "configuration of the model; no token of the prompt has this id"
    )


def _check_places(vlm: VLM, prompt: str, size: tuple[int, int], findings: _Findings) -> None:
    """Check that positions and boxes on the image are the labelled ones.

    Args:
        vlm: Model and processor.
        prompt: A question.
        size: Width and height of the user's image, px. The test images have its orientation,
            because some processors refuse one of them.
        findings: Where results are added.
    """
    check = "painting a patch changes the key at its position"
    sizes = [(height, width) if size[0] < size[1] else (width, height) for width, height in SIZES]
    try:
        painted = painted_patches(vlm, prompt, (*sizes, size))
    except (CaptureError, GeometryError, InputError) as error:
        findings.judge(check, _UNKNOWN, "", str(error), passed=False)
        return
    if painted.misfit:
        findings.judge(check, _UNKNOWN, "", painted.misfit, passed=False)
    elif painted.patches:
        wrong = [patch for patch in painted.patches if not patch.at_its_place]
        note = "; ".join(
            f"row, col {patch.place}: "
            f"{'no key' if patch.found is None else f'the key at {patch.found}'} changed"
            for patch in wrong
        )
        findings.judge(check, len(wrong), "exactly 0", note, passed=not wrong)
    else:
        findings.skip(check, painted.reason)
    _check_boxes(vlm, prompt, (painted.size, size), findings)
    check, others = "only image tokens change with the image", painted.unlabelled
    if others is None:
        findings.skip(check, painted.unlabelled_reason)
    else:
        note = f"positions {_first_few([str(n) for n in others])}" if others else ""
        findings.judge(check, len(others), "exactly 0", note, passed=not others)


def _check_boxes(
    vlm: VLM, prompt: str, sizes: Sequence[tuple[int, int]], findings: _Findings
) -> None:
    """Check that the boxes of the rule are those that test images measure in the processor."""
    check = "boxes are those measured with test images"
    if vlm.family.geometry is None:
        findings.skip(check, vlm.family.reason or "the family has no geometry rule")
        return
    if isinstance(vlm.family.geometry, ProbedTokens):
        findings.skip(check, "the type has no family record, so its boxes were measured this way")
        return
    try:
        measured = compared_boxes(vlm, prompt, sizes)
    except (GeometryError, InputError) as error:
        findings.judge(check, _UNKNOWN, "", str(error), passed=False)
        return
    left_out = "; ".join(dict.fromkeys(measured.reasons.values()))
    if not measured.gaps:
        findings.skip(check, left_out)
        return
    worst = max(measured.gaps, key=lambda gap: gap.ratio)
    note = f"px, in a test image of {worst.size[0]} x {worst.size[1]}"
    if not worst.agrees:
        ours, theirs = _edges(worst.box), _edges(worst.measured)
        note += f": {worst.what} {worst.index} is at {ours} by the rule, and at {theirs} measured"
    note += f"; not compared: {left_out}" if left_out else ""
    limit = f"at most {worst.limit:.2g}"
    findings.judge(check, worst.distance, limit, note, passed=worst.agrees)


def _edges(box: Sequence[float]) -> str:
    """Return a box for a message."""
    if any(math.isnan(edge) for edge in box):
        return "no place in the image"
    return f"({', '.join(f'{edge:.1f}' for edge in box)})"


def _check_outputs(
    model: nn.Module, inputs: Mapping[str, Any], exactness: Exactness, findings: _Findings
) -> Recording | None:
    """Check that outputs with recording are equal, up to the difference of two plain forwards."""
    first, again = (tensors_of(seeded(lambda: model(**inputs))) for _ in range(2))
    own = difference(first, again)
    try:
        settings = Settings(values=True, inspect=exactness.inspect, refuse=False)
        with record_with(settings, model) as recording:
            recorded = tensors_of(seeded(lambda: model(**inputs)))
    except CaptureError as error:
        findings.judge(
            "every attention layer that ran is recorded", _UNKNOWN, "", str(error), passed=False
        )
        return None
    value = difference(first, recorded)
    note = "" if own == 0 else "the limit is the difference between two plain forwards"
    check = "outputs are the same with and without recording"
    findings.judge(check, value, f"at most {own:.2g}", note, passed=value <= own)
    return recording


def _check_generation(
    vlm: VLM, inputs: dict[str, Any], exactness: Exactness, findings: _Findings
) -> None:
    if not vlm.model.can_generate():
        return
    options = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS}
    check = "generated tokens are the same with and without recording"
    try:
        plain = seeded(lambda: vlm.generate(inputs, **options))
    except InputError as error:  # the model does not generate token by token
        findings.skip(check, str(error))
        return
    try:
        with record_with(_measuring(exactness), vlm.model):
            recorded = seeded(lambda: vlm.generate(inputs, **options))
    except CaptureError as error:
        findings.judge(check, _UNKNOWN, "", str(error), passed=False)
        return
    same_shape = plain.shape == recorded.shape
    n_changed = int((plain != recorded).sum()) if same_shape else recorded.numel()
    note = f"changed tokens of {_NEW_TOKENS} generated ones"
    findings.judge(check, n_changed, "exactly 0", note, passed=n_changed == 0)


def _check_recorded(
    model: nn.Module, inputs: Mapping[str, Any], recording: Recording, findings: _Findings
) -> None:
    missed = missed_modules(model, lambda: seeded(lambda: model(**inputs)), recording)
    ran = {call.module for call in recording.calls}
    idle = [each.module for each in recording.modules if each.module not in {*ran, *missed}]
    found = {"not recorded": missed, "did not run": idle}
    note = "; ".join(f"{what}: {_first_few(names)}" for what, names in found.items() if names)
    check, expected = "every attention layer that ran is recorded", len(ran) + len(missed)
    findings.judge(check, len(ran), f"exactly {expected}", note, passed=not missed)
    if recording.without_matrix:
        names = _first_few([identity.module for identity in recording.without_matrix])
        check = "layers without softmax attention are not recorded"
        findings.skip(check, names, len(recording.without_matrix))


def _measuring(exactness: Exactness) -> Settings:
    """Return the settings that measure every call and keep none."""
    return Settings(reduce=lambda _: None, inspect=exactness.inspect, refuse=False)


def _check_probs(exactness: Exactness, findings: _Findings) -> None:
    for check, gaps in (
        ("probabilities give the backend's output", exactness.output_gaps),
        ("probabilities equal those of eager attention", exactness.eager_gaps),
    ):
        _judge_gaps(check, gaps, exactness.n_calls, findings)


def _judge_gaps(check: str, gaps: Sequence[Gap], n_calls: int, findings: _Findings) -> None:
    """Add a row for the call with the largest ratio of error to limit."""
    compared = f"{len(gaps)} of {n_calls} calls could be compared"
    if not gaps:
        findings.skip(check, compared)
        return
    worst = max(gaps, key=lambda gap: math.inf if math.isnan(gap.error) else gap.error / gap.limit)
    note = compared if len(gaps) < n_calls else ""
    limit = f"at most {worst.limit:.0e}"
    findings.judge(check, worst.error, limit, note, passed=worst.agrees)


def _check_backend(
    backend: str, model: nn.Module, inputs: Mapping[str, Any], findings: _Findings
) -> None:
    check = f"probabilities give the output of backend {backend!r}"
    exactness = Exactness()
    try:
        with _switched_backend(model, backend), record_with(_measuring(exactness), model):
            seeded(lambda: model(**inputs))
    except CaptureError as error:
        findings.judge(check, _UNKNOWN, "", str(error), passed=False)
        return
    except ImportError as error:
        findings.skip(check, str(error).partition("\n")[0])
        return
    _judge_gaps(check, exactness.output_gaps, exactness.n_calls, findings)


@contextmanager
def _switched_backend(model: nn.Module, name: str) -> Iterator[None]:
    """Switch every part of the model that supports it to another attention implementation."""
    configs = {
        id(each.config): each.config
        for each in model.modules()
        if isinstance(each, PreTrainedModel)
    }.values()
    before = [(config, attention_setting(config)) for config in configs]
    try:
        try:
            model.set_attn_implementation(name)  # type: ignore[operator]
        except ValueError as error:
            raise InputError(
                f"{name!r} is not an attention implementation of this model: {error}"
            ) from error
        yield
    finally:
        for config, setting in before:
            restore_attention_setting(config, setting)


def _check_cache(
    cache: str, vlm: VLM | nn.Module, inputs: dict[str, Any], findings: _Findings
) -> None:
    assert isinstance(vlm, VLM)
    check = f"probabilities give the output with cache {cache!r}"
    exactness = Exactness()
    options = {
        "max_new_tokens": _NEW_TOKENS,
        "min_new_tokens": _NEW_TOKENS,
        "cache_implementation": cache,
    }
    try:
        with record_with(_measuring(exactness), vlm.model):
            seeded(lambda: vlm.generate(inputs, **options))
    except CaptureError as error:
        findings.judge(check, _UNKNOWN, "", str(error), passed=False)
        return
    _judge_gaps(check, exactness.output_gaps, exactness.n_calls, findings)


def _check_interventions(
    model: nn.Module, inputs: Mapping[str, Any], recording: Recording, findings: _Findings
) -> None:
    """Hide one key from a late query, in every layer that the tap can edit."""
    check = "a key hidden through the tap changes the output"
    editable = [call for call in recording.calls if not call.note]
    square = [c for c in editable if c.kind == "self" and c.n_keys > 1 and c.n_queries == c.n_keys]
    chosen = [c for c in square if c.tower == "language"] or square
    if not chosen:
        findings.skip(check, "no self-attention layer uses transformers' attention interface")
        return
    tower, shape = chosen[-1].tower, (chosen[-1].n_samples, chosen[-1].n_queries)
    same = (c for c in chosen if c.tower == tower and (c.n_samples, c.n_queries) == shape)
    edge = _attended_pair(chosen[-1])
    if edge is None:
        findings.skip(check, "each query has only one visible key")
        return
    sample, query, key = edge
    queries, keys = torch.zeros(2, *shape, dtype=torch.bool)
    queries[sample, query] = keys[sample, key] = True
    layers = sorted({call.layer for call in same})
    cut = knock_out_attention(queries, keys, layers=layers, tower=tower)
    plain = tensors_of(seeded(lambda: model(**inputs)))
    try:
        with intervene(model, cut):
            changed = difference(plain, tensors_of(seeded(lambda: model(**inputs))))
    except CaptureError as error:
        findings.skip(check, str(error))
        return
    note = f"{tower} layers, query {query}, key {key}"
    findings.judge(check, changed, "more than 0", note, passed=changed > 0)


def _attended_pair(call: AttentionCall) -> tuple[int, int, int] | None:
    """Return a sample, a late query, and the other key that this query attends to most.

    The query is the last one that attends to another position with a probability above 0.001, or
    the one with the largest such probability. The sample is the one in which this query has the
    most visible keys, because in other samples its keys may be padding. None if each query has only
    one visible key.
    """
    best: tuple[float, tuple[int, int, int]] | None = None
    for query in reversed(range(call.n_queries)):
        visible = call.visible([query])[:, :, 0].expand(call.n_samples, -1, -1)
        counts = visible.sum(-1).amin(1)
        sample = int(counts.argmax())
        keys = [key for key in visible[sample].all(0).nonzero()[:, 0].tolist() if key != query]
        if counts[sample] < 2 or not keys:
            continue
        probs = call.probs(queries=[query])[sample, :, 0].amax(0)
        key = max(keys, key=probs.tolist().__getitem__)
        if best is None or float(probs[key]) > best[0]:
            best = float(probs[key]), (sample, query, key)
        if best[0] > _ATTENDED:
            break
    return None if best is None else best[1]


def _checkers() -> Image.Image:
    """Return an image of colored squares, so that patches differ from each other."""
    side, cell = 224, 16
    picture = Image.new("RGB", (side, side))
    for place in range((side // cell) ** 2):
        row, col = divmod(place, side // cell)
        color = ((37 * row) % 256, (61 * col) % 256, (29 * (row + col)) % 256)
        picture.paste(color, (col * cell, row * cell, (col + 1) * cell, (row + 1) * cell))
    return picture


def _first_few(names: list[str]) -> str:
    """Return the first three names and the number of the others, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
