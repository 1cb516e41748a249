"""Samples that hold statistics: every analysis gives the numbers of a full capture."""

import dataclasses
import functools

import numpy as np
import pandas as pd
import pytest
import torch

import xmodal_interp as xi
from tests.helpers.attention_variants import BACKBONES, llava_over
from tests.helpers.clips import clip
from tests.helpers.real import GENERATING, SOME, asked, real, settled
from tests.helpers.store_samples import assert_same_fields
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.attention.statistics import HELD
from xmodal_interp.capturing.key_groups import KeyGroups
from xmodal_interp.capturing.run import Keep, capture, capture_batch
from xmodal_interp.errors import CaptureError, InputError, NotRecordedError, StoreError
from xmodal_interp.hooks.recorder import Settings, Statistics, record_with
from xmodal_interp.models import VLM
from xmodal_interp.sample import Sample
from xmodal_interp.shapes.tiny_models import build_processor
from xmodal_interp.store import StoreWriter, open_store

ALL = ("mass", "entropy", "received")
NEW = {"max_new_tokens": 4, "generation": {"min_new_tokens": 4}}
WORDS = ["What color is the red circle?", "how many shapes ?"]
OF_SEQUENCE = (
    functools.partial(xi.cross_modal_ratio, sink_threshold=None),
    functools.partial(xi.token_ratio, sink_threshold=None, queries="last"),
    xi.block_statistics,
)
OF_ALL = (
    xi.attention_entropy,
    functools.partial(xi.attention_entropy, tower="vision"),
    xi.attention_sinks,
    xi.sink_rate,
)
SIZES = ("n_samples", "n_heads", "n_queries", "n_keys")


@functools.cache
def vlm_of(name: str) -> VLM:
    if name.startswith("shipped "):
        return xi.load(name.removeprefix("shipped "))
    if name in BACKBONES:
        model = llava_over(name, **BACKBONES[name], attn_implementation="eager")
        return VLM(model, build_processor("llava"))
    return tiny_vlm(name)


def both(vlm: VLM, queries: str = "all", **options) -> list[list[Sample]]:
    """Return a padded batch of two samples, captured in full and with statistics."""
    images = [[picture(seed=1)], [picture(seed=2)]]
    keeps = (Keep(queries=queries), Keep(queries=queries, statistics=ALL))
    return [capture_batch(vlm, images, WORDS, keep=keep, **NEW, **options) for keep in keeps]


def assert_same_tables(analyses, full: Sample, held: Sample) -> None:
    for analysis in analyses:
        expected = analysis(full)
        pd.testing.assert_frame_equal(analysis(held), expected, rtol=1e-6, atol=1e-6)
        assert len(expected)


def assert_same_calls(full: Sample, held: Sample) -> None:
    """Assert that each call has the same statistics as the full one, and no operands."""
    assert list(full.calls) == list(held.calls)
    for key, call in full.calls.items():
        other = held.calls[key]
        assert other.holds_statistics
        names = {name for name, _, _ in other.tensors()}
        assert names <= {*HELD, "mask", "sinks", "segments", "rows"}
        assert all(getattr(call, name) == getattr(other, name) for name in SIZES)
        assert torch.equal(call.visible(), other.visible())
        close = {"atol": 1e-6, "rtol": 1e-5, "equal_nan": True}
        torch.testing.assert_close(other.entropy(), call.entropy(), **close)
        weights = other.counted.float()
        torch.testing.assert_close(other.received(weights), call.received(weights), **close)
        if key[0] == "language":
            groups = other.groups[0]
            members = groups == torch.arange(int(groups.max()) + 1)[:, None]
            torch.testing.assert_close(other.mass(members), call.mass(members), **close)


@pytest.mark.parametrize("queries", ["all", "text"])
@pytest.mark.parametrize(
    "name", ["shipped llava", "shipped qwen2_vl", "mistral", "gpt_oss", "mllama"]
)
def test_analyses_of_statistics_equal_those_of_a_full_capture(name, queries, tmp_path) -> None:
    """Padded batches with generation: shipped models, a sliding window, sinks, cross-attention."""
    vlm = vlm_of(name)
    full, held = both(vlm, queries)
    for index, (sample, other) in enumerate(zip(full, held, strict=True)):
        assert sample.answer == other.answer
        assert_same_calls(sample, other)
        analyses = OF_ALL if name == "mllama" else OF_ALL + OF_SEQUENCE
        if queries == "text":
            analyses = [each for each in analyses if each is not xi.block_statistics]
        assert_same_tables(analyses, sample, other)
        with StoreWriter(tmp_path / f"{index}", settings={}) as writer:
            writer.write(other)
        stored = open_store(tmp_path / f"{index}")[0]
        assert_same_tables(analyses, sample, stored)
        for key, call in other.calls.items():
            fields = [dict(vars(each)) for each in (stored.calls[key], call)]
            for each in fields:
                each.pop("memo", None)
            assert_same_fields(*fields)


def test_columns_without_sinks_if_every_sink_is_a_group() -> None:
    """In the shipped LLaVA the first position is the only sink at this threshold."""
    full, held = both(vlm_of("shipped llava"))
    tables = [xi.cross_modal_ratio(samples, sink_threshold=0.9) for samples in (full, held)]
    pd.testing.assert_frame_equal(tables[1], tables[0], rtol=1e-6, atol=1e-6)
    assert tables[0]["n_sinks"].eq(1).all()


def test_sinks_that_are_no_group_are_an_error() -> None:
    held = both(tiny_vlm("qwen2_vl"))[1][0]
    with pytest.raises(NotRecordedError) as refusal:
        xi.cross_modal_ratio(held, sink_threshold=0.05)
    message = str(refusal.value)
    assert "it cannot separate the keys" in message
    assert message.endswith(
        "or capture with Keep() to keep q and k. Or pass sink_threshold=None to leave out the "
        "columns without sinks."
    )
    without = dataclasses.replace(
        held,
        calls={
            key: dataclasses.replace(call, key_received=None) for key, call in held.calls.items()
        },
    )
    with pytest.raises(
        NotRecordedError, match=r"not received\. Add .* Or pass sink_threshold=None"
    ):
        xi.cross_modal_ratio(without)


def test_analyses_that_need_more_name_what_is_missing() -> None:
    held = both(tiny_vlm("llava"))[1][0]
    for analysis, layer in ((xi.attention_rollout, 3), (xi.positional_bias, 0)):
        with pytest.raises(NotRecordedError) as refusal:
            analysis(held)
        assert str(refusal.value) == (
            f"language self-attention, layer {layer}, call 0 holds the statistics mass, entropy "
            "and received, not q and k. Capture with Keep() to keep q and k."
        )
    with pytest.raises(NotRecordedError) as refusal:
        xi.attention_distance(held)
    assert str(refusal.value) == (
        "vision self-attention, layer 0, call 0 holds the statistics entropy and received, not "
        "mass. Capture with Keep() to keep q and k."
    )
    with pytest.raises(NotRecordedError, match="queries, each with weight 1"):
        xi.attention_sinks(held, n_positions=20)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model_type" in metafunc.fixturenames:
        everything = metafunc.config.getoption("all_types")
        some = [name for name in GENERATING if name in SOME or name in GENERATING[::12]]
        metafunc.parametrize("model_type", GENERATING if everything else some)


@pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
@pytest.mark.parametrize("queries", ["all", "text"])
def test_calls_of_every_type(model_type: str, queries: str) -> None:
    vlm = VLM(real(model_type)[0], settled(model_type))
    options = {"max_new_tokens": 4}
    keeps = (Keep(queries=queries), Keep(queries=queries, statistics=ALL))
    full, held = (capture(vlm, picture(), asked(vlm, 1), keep=keep, **options) for keep in keeps)
    assert full.answer == held.answer
    assert_same_calls(full, held)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=["static", "none"]
)
def test_steps_are_joined_with_every_cache(name, options) -> None:
    vlm, new = vlm_of(name), {**NEW, "generation": {**NEW["generation"], **options}}
    keeps = (Keep(), Keep(statistics=ALL))
    full, held = (capture(vlm, picture(), QUESTION, keep=keep, **new) for keep in keeps)
    assert_same_calls(full, held)


def logits_of(vlm: VLM, keep: Keep | None) -> list[torch.Tensor]:
    """Return the logits of each step, captured or (None) not."""
    found = []
    hook = vlm.model.register_forward_hook(lambda *args: found.append(args[2].logits.clone()))
    try:
        if keep is None:
            inputs = vlm.prepare([[picture()]], [QUESTION])[0]
            with torch.no_grad():
                vlm.generate(inputs, max_new_tokens=4, min_new_tokens=4)
        else:
            capture(vlm, picture(), QUESTION, keep=keep, **NEW)
    finally:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["shipped llava", "shipped qwen2_vl", "mistral", "mllama"])
def test_outputs_of_the_model_are_bit_identical(name) -> None:
    vlm = vlm_of(name)
    plain, recorded = logits_of(vlm, None), logits_of(vlm, Keep(statistics=ALL))
    assert len(plain) == len(recorded) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))


def test_a_sample_that_ends_early_counts_its_own_steps_only(monkeypatch) -> None:
    """The other sample of the batch goes on; the tokens after the end belong to no sample."""
    vlm = vlm_of("shipped llava")
    first = both(vlm)[0][0].tokens.query("role == 'generated'")["token"].iloc[0]
    end = vlm.tokenizer.convert_tokens_to_ids(first)
    monkeypatch.setattr(vlm.model.generation_config, "eos_token_id", end)
    options = {"max_new_tokens": 5}
    images = [[picture(seed=1)], [picture(seed=2)]]
    full, held = (
        capture_batch(vlm, images, WORDS, keep=keep, **options)
        for keep in (Keep(), Keep(statistics=ALL))
    )
    assert len(full[0].tokens) < len(full[1].tokens)
    for sample, other in zip(full, held, strict=True):
        assert_same_calls(sample, other)
        assert_same_tables(OF_ALL + OF_SEQUENCE, sample, other)


def test_generated_special_tokens_are_not_text() -> None:
    """With queries="text" they are not counted, as in a full capture."""
    vlm = vlm_of("shipped llava")
    special = vlm.tokenizer.convert_tokens_to_ids("<image>")
    forced = {"max_new_tokens": 4, "generation": {"min_new_tokens": 4}}
    forced["generation"]["logits_processor"] = [
        lambda ids, scores: torch.where(
            (torch.arange(scores.shape[1]) == special) & (ids.shape[1] % 2 == 0), 1e4, scores
        )
    ]
    keeps = (Keep(queries="text"), Keep(queries="text", statistics=ALL))
    full, held = (capture(vlm, picture(), QUESTION, keep=keep, **forced) for keep in keeps)
    generated = full.tokens.query("role == 'generated'")["kind"]
    assert set(generated) == {"special", "text"}
    assert_same_tables((xi.attention_sinks, xi.attention_entropy), full, held)


def test_statistics_take_memory_linear_in_the_length() -> None:
    """At 144 + 14 and 10 more tokens, per layer: a few numbers per head and position."""
    vlm = vlm_of("llama")
    short, long = (
        capture(vlm, picture(), question, keep=Keep(statistics=ALL)).call(0)
        for question in (QUESTION, QUESTION + " how many shapes are in the image ?" * 2)
    )
    n_groups = short.group_mass.shape[-1]
    assert 2 <= n_groups == long.group_mass.shape[-1] <= 4
    per_position = short.n_heads * 4 * (n_groups + 2) + 2 + 1
    for call in (short, long):
        assert call.n_bytes == call.n_keys * per_position
    assert long.n_keys > short.n_keys


def test_decode_steps_of_one_sample_hold_one_sum_of_what_keys_receive() -> None:
    """Otherwise a long answer would need a number per head, key and step."""
    vlm = vlm_of("llama")
    inputs = vlm.prepare([[picture()]], [QUESTION])[0]
    settings = Settings(towers=("language",), statistics=Statistics(("received",), _one_group_each))
    with torch.no_grad(), record_with(settings, vlm.model) as recording:
        vlm.generate(inputs, max_new_tokens=6, min_new_tokens=6)
    of_layer = [call for call in recording.calls if call.layer == 0]
    assert len(of_layer) == 6
    assert [call.key_received is not None for call in of_layer] == [False] * 5 + [True]
    n_rows = sum(call.n_queries for call in of_layer)
    total = of_layer[-1].key_received.sum(-1)
    torch.testing.assert_close(total, torch.full_like(total, n_rows), rtol=1e-5, atol=0)


def _one_group_each(call):
    from xmodal_interp.attention.statistics import Labels

    groups = torch.zeros(call.n_samples, call.n_keys, dtype=torch.int16)
    return Labels(groups, 1, torch.ones(call.n_samples, call.n_queries, dtype=torch.bool))


@pytest.mark.parametrize("names", [("mass",), ("entropy",), ("received",), ("received", "mass")])
def test_any_choice_of_statistics(names) -> None:
    vlm = vlm_of("llama")
    whole, some = (
        capture(vlm, picture(), QUESTION, keep=Keep(statistics=each), **NEW)
        for each in (ALL, names)
    )
    fields = {"mass": "group_mass", "entropy": "row_entropy", "received": "key_received"}
    for key, call in some.calls.items():
        for name, field in fields.items():
            expected = getattr(whole.calls[key], field) if name in names else None
            if key[0] != "language" and names == ("mass",):
                continue
            if expected is None:
                assert getattr(call, field) is None
            else:
                torch.testing.assert_close(getattr(call, field), expected)
        assert all(getattr(call, name) == getattr(whole.calls[key], name) for name in SIZES)


def test_entropy_of_kept_probabilities_is_over_keys_without_learned_sinks() -> None:
    vlm = vlm_of("gpt_oss")
    full, dense, held = (
        xi.attention_entropy(capture(vlm, picture(), QUESTION, keep=keep))
        for keep in (Keep(), Keep(probabilities=True), Keep(statistics=["mass", "entropy"]))
    )
    assert full["sink_mass"].gt(0.01).all()
    columns = ["entropy", "relative_entropy", "sink_mass"]
    pd.testing.assert_frame_equal(dense[columns], full[columns], atol=2e-3)
    pd.testing.assert_frame_equal(held[columns], full[columns], atol=1e-6)


def test_norms_are_kept_too() -> None:
    vlm = tiny_vlm("llava")
    full, held = (
        capture(vlm, picture(), QUESTION, keep=Keep(norms=True, statistics=each), **NEW)
        for each in ((), ("entropy",))
    )
    for key, call in full.calls.items():
        torch.testing.assert_close(held.calls[key].update_share, call.update_share)


def test_the_order_of_names_does_not_matter() -> None:
    assert Keep(statistics=["received", "mass"]).statistics == ("mass", "received")
    vlm = tiny_vlm("llava")
    kept = capture(vlm, picture(), QUESTION, keep=Keep(statistics={"entropy"})).provenance["kept"]
    assert kept["statistics"] == ["entropy"]
    full = capture(vlm, picture(), QUESTION).provenance["kept"]
    assert "statistics" not in full  # stores of earlier releases can be continued


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"statistics": "mass"},
            "statistics must be a list of 'mass', 'entropy', 'received'; got 'mass'.",
        ),
        (
            {"statistics": ["mass", "distance"]},
            "statistics must be a list of 'mass', 'entropy', 'received'; got ['mass', 'distance'].",
        ),
        (
            {"statistics": ["mass"], "values": True},
            "Got statistics and values=True, but statistics are kept instead of values. Pass one "
            "of them.",
        ),
        (
            {"statistics": ["mass"], "probabilities": True},
            "Got statistics and probabilities=True, but statistics are kept instead of "
            "probabilities. Pass one of them.",
        ),
    ],
)
def test_wrong_statistics_are_errors(options, message) -> None:
    with pytest.raises(InputError) as refusal:
        Keep(**options)
    assert str(refusal.value) == message


def test_groups_are_those_of_the_labels() -> None:
    """The first position, each image, text, special tokens and generated tokens are separate."""
    vlm = vlm_of("shipped qwen2_vl")
    images = [picture(seed=1), picture(seed=2)]
    held = capture(vlm, images, QUESTION, keep=Keep(statistics=ALL), **NEW)
    groups = held.call(0).groups[0].numpy()
    generated = held.tokens["role"].eq("generated").to_numpy()
    wanted = {f"{name} prompt": mask & ~generated for name, mask in held.groups().items()}
    wanted |= {"generated": generated, "first": np.arange(len(groups)) == 0}
    wanted = {
        name: mask & ((np.arange(len(groups)) > 0) | (name == "first"))
        for name, mask in wanted.items()
    }
    assert {"image 0 prompt", "image 1 prompt", "text prompt"} <= set(wanted)
    for mask in wanted.values():
        assert len(set(groups[mask])) <= 1
    assert len(set(groups)) == sum(mask.any() for mask in wanted.values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["qwen2_vl", "llava_onevision"])
def test_images_and_videos_are_separate_groups(name) -> None:
    vlm = VLM(*real(name))
    clips = [clip(4, 0), clip(4, 1)]
    options = {"videos": clips, "max_new_tokens": 2}
    full, held = (
        capture(vlm, [picture()], QUESTION, keep=keep, **options)
        for keep in (Keep(), Keep(statistics=ALL))
    )
    assert_same_calls(full, held)
    assert_same_tables(OF_SEQUENCE, full, held)
    groups = held.call(0).groups[0].numpy()
    visual = [mask for name, mask in held.groups().items() if name.startswith(("image", "video"))]
    assert len(visual) == 3
    assert all(len(set(groups[mask])) == 1 for mask in visual)
    assert len({groups[mask][0] for mask in visual}) == 3


def test_a_store_of_statistics_can_be_continued(tmp_path) -> None:
    vlm, items = xi.load(), [{"image": picture(seed=i), "prompt": QUESTION} for i in range(2)]
    options = {"keep": Keep(statistics=("entropy", "received")), "max_new_tokens": 1}
    xi.capture_dataset(vlm, items[:1], tmp_path, progress=False, **options)
    store = xi.capture_dataset(vlm, items, tmp_path, progress=False, **options)
    assert len(store) == 2
    assert xi.attention_sinks(store)["sample"].nunique() == 2
    with pytest.raises(StoreError, match=r"statistics"):
        xi.capture_dataset(vlm, items, tmp_path, progress=False, max_new_tokens=1)


def test_a_call_of_another_batch_has_no_labels() -> None:
    vlm = tiny_vlm("llava")
    call = capture(vlm, picture(), QUESTION).call(0)
    _, prompts = vlm.prepare([[picture()]] * 2, [QUESTION] * 2)
    with pytest.raises(CaptureError) as refusal:
        KeyGroups(prompts, "all").of(call)
    assert str(refusal.value) == (
        "language self-attention, layer 0, call 0 ran on 1 sequences for 2 prompts, so its keys "
        "have no known groups. Capture with Keep() to keep q and k."
    )
