"""Samples read from a store equal the written ones, bit for bit."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import xmodal_interp as xi
from tests.helpers.store_samples import (
    SETTINGS,
    N,
    assert_same,
    assert_same_bits,
    assert_same_fields,
    call,
    items,
    sample,
    shipped,
)
from xmodal_interp.attention import AttentionCall, fused
from xmodal_interp.attention import call as call_module
from xmodal_interp.attention.statistics import HELD, Labels, reduced
from xmodal_interp.models import Thumbnail
from xmodal_interp.sample import Sample
from xmodal_interp.store import Store, StoreWriter, check_store, open_store, schema


def written(path, samples: list[Sample], **options) -> Store:
    with StoreWriter(path, SETTINGS, **options) as writer:
        for each in samples:
            writer.write(each)
    return open_store(path)


CALLS = {
    "causal": call(),
    "no mask": call(causal=False, mask=None),
    "values": call(v=torch.randn(1, 1, N, 3)),
    "half": call(q=torch.randn(1, 2, N, 3).bfloat16(), k=torch.randn(1, 1, N, 3).bfloat16()),
    "soft-cap, sinks, window": call(softcap=30.0, sinks=torch.randn(2), sliding_window=2),
    "boolean mask": call(causal=False, mask=torch.rand(1, 1, N, N) < 0.5),
    "mask per head": call(causal=False, mask=torch.rand(1, 2, N, N) < 0.5),
    "additive mask": call(causal=False, mask=torch.randn(1, 1, N, N)),
    "bias": call(bias=torch.randn(1, 2, N, N)),
    "rows": call(q=torch.randn(1, 2, 2, 3), rows=torch.tensor([1, 4])),
    "cached": call(q=torch.randn(1, 2, 2, 3), offset=3),
    "dense": call(q=None, k=None, dense=torch.rand(1, 2, N, N).half()),
    "view": call(q=torch.randn(1, N, 2, 3).transpose(1, 2), k=torch.randn(4, 1, N, 3)[2:3]),
    "expanded": call(
        causal=False, mask=torch.ones(1, 1, 1, N, dtype=torch.bool).expand(1, 1, N, N)
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_call(tmp_path, name):
    made = sample(calls=[CALLS[name]])
    assert_same(written(tmp_path / "store", [made])[0], made)


def test_two_calls_of_a_layer_share_its_sinks(tmp_path):
    sinks = torch.randn(2)
    made = sample(calls=[call(sinks=sinks), call(call=1, sinks=sinks)])
    assert_same(written(tmp_path, [made])[0], made)


def test_labels_and_provenance(tmp_path):
    labels = {"n": np.int64(3), "box": np.array([1.0, 2.5]), 7: ("a", None), 10: True}
    found = written(tmp_path, [sample(labels=labels, provenance={"model": "m"})])[0]
    assert found.labels == {"n": 3, "box": [1.0, 2.5], "7": ["a", None], "10": True}
    assert found.provenance == {"model": "m"}


def test_text_without_image_and_cross_keys(tmp_path):
    plain = sample("plain", grids=(), images=())
    crossed = sample("crossed", cross_keys=sample().tokens.iloc[:2])
    crossed = sample("crossed", cross_keys=crossed.cross_keys.reset_index(drop=True))
    store = written(tmp_path, [plain, crossed])
    assert_same(store["plain"], plain)
    assert_same(store["crossed"], crossed)


@pytest.mark.parametrize(
    "name", ["a", "42", "caf\u00e9 \u732b", "x.jpg#0", "\u0645\u0631\u062d\u0628\u0627", "n" * 200]
)
def test_names(tmp_path, name):
    assert written(tmp_path, [sample(name)])[name].name == name


def test_images_without_copies(tmp_path):
    pixels = sample().images[0]
    pixels.save(tmp_path / "cat.png")
    at_hand = sample("at hand", provenance={"images": [str(tmp_path / "cat.png")]})
    store = written(tmp_path / "store", [at_hand, sample("nowhere")], images=False)
    np.testing.assert_array_equal(np.asarray(store["at hand"].images[0]), np.asarray(pixels))
    assert store["nowhere"].images == ()
    assert not list(store.path.rglob("*.png"))


def test_stored_image_is_a_pil_image(tmp_path):
    found = written(tmp_path, [sample()])[0].images[0]
    assert (found.size, found.mode) == ((8, 4), "RGB")
    assert found.resize((4, 2)).size == (4, 2)
    assert found.convert("L").mode == "L"
    assert found.copy().tobytes() == found.tobytes() == sample().images[0].tobytes()
    assert isinstance(found, Image.Image)


@pytest.mark.parametrize("shape", [(0,), (1,), (7, 3), (1, 2, 5, 5), (1, 1, 16, 16)])
def test_packing(shape):
    mask = torch.rand(shape) < 0.5
    bits = schema.packed(mask)
    assert bits.dtype == torch.uint8
    assert bits.numel() == -(-mask.numel() // 8)
    assert_same_bits(schema.unpacked(bits, shape), mask)


def test_a_mask_is_stored_once(tmp_path):
    mask = torch.rand(1, 1, 64, 64) < 0.5
    square = {"q": torch.randn(1, 2, 64, 3), "k": torch.randn(1, 1, 64, 3), "causal": False}
    given = [call(i, mask=mask, **square) for i in range(3)]  # the same memory
    given += [call(i, mask=mask.clone(), **square) for i in range(3, 6)]  # the same content
    made = sample(calls=[*given, call(6, mask=~mask, **square)])
    store = written(tmp_path, [made])
    assert_same(store[0], made)
    folder = store.path / schema.SAMPLES / "one"
    record = json.loads((folder / schema.SAMPLE).read_text())
    assert [each["shared"]["mask"] for each in record["calls"]] == ["shared-0"] * 6 + ["shared-1"]
    assert (folder / schema.SHARED).stat().st_size < 2 * 64 * 64 / 8 + 400


def test_a_copy_of_a_stored_sample_has_the_masks_of_its_layers(tmp_path):
    """Several masks are read into the same memory, because each is freed before the next."""
    masks = [torch.rand(1, 1, 64, 64) < 0.5 for _ in range(8)]
    biases = [torch.randn(1, 2, 64, 64) for _ in range(8)]
    square = {"q": torch.randn(1, 2, 64, 4), "k": torch.randn(1, 1, 64, 4), "causal": False}
    calls = [call(i, mask=masks[i], bias=biases[i], **square) for i in range(8)]
    made = sample(calls=calls)
    once = written(tmp_path / "once", [made])
    twice = written(tmp_path / "twice", [once[0]])
    assert_same(twice[0], made)


def test_masks_are_shared_in_memory_while_held(tmp_path):
    mask = torch.rand(1, 1, N, N) < 0.5
    calls = written(tmp_path, [sample(calls=[call(i, mask=mask) for i in range(2)])])[0].calls
    one, other = calls.values()
    assert one.mask is other.mask
    assert calls["language", "self", 0, 0] is one


def test_padded_batch_with_stitched_decoding(tmp_path):
    asked = items(3)
    made = xi.capture_batch(
        shipped(),
        [[each["image"]] for each in asked],
        [each["prompt"] for each in asked],
        max_new_tokens=4,
        keep=xi.Keep(values=True),
    )
    assert any((each.tokens["kind"] == "padding").any() for each in made)
    assert all(each.call(0).mask is not None for each in made)
    store = written(tmp_path, made)
    for found, expected in zip(store, made, strict=True):
        assert_same(found, expected)
        assert found.provenance == json.loads(schema.json_text(expected.provenance))


def test_two_images_of_a_model_with_one_vision_call_per_image(tmp_path):
    images = [each["image"].resize((96, 64 + 32 * i)) for i, each in enumerate(items(2))]
    made = xi.capture(shipped("qwen2_vl"), images, "where is the red circle ?", max_new_tokens=2)
    assert {key[3] for key in made.calls if key[0] == "vision"} == {0, 1}
    found = written(tmp_path, [made])[0]
    assert_same(found, made)
    pd.testing.assert_series_equal(found.tokens["image"], made.tokens["image"])


def test_every_file_states_format_and_version(tmp_path):
    stored = written(tmp_path, [sample(calls=[call(mask=torch.ones(1, 1, N, N).bool())])])
    with StoreWriter(tmp_path, SETTINGS) as writer:
        writer.note_failure({"item": 0, "name": None, "error": "E", "message": "m"})
    for path in stored.path.rglob("*"):
        if path.is_file() and path.name != schema.LOCK:
            content = path.read_bytes()
            if path.suffix == ".npz":
                with np.load(path) as arrays:
                    content = f"{arrays['format']} version {arrays['version']}".encode()
            assert schema.FORMAT.encode() in content, path
            assert b"version" in content, path


def test_tiles_a_thumbnail_and_a_reason(tmp_path):
    whole = sample().grids[0]
    small = np.array([[-1, -1], [0, 0]])
    patches = np.array([[-1, -1], [-1, -1], [0, 0]])
    tiled = dataclasses.replace(
        whole,
        tiles=np.array([0, -1]),
        thumbnail=Thumbnail(1, 1, small, 1, 1, patches),
        patch_boxes=np.array([[np.nan] * 4, [0.0, 0, 4, 4], [4, 0, 8, 4]]),
    )
    unplaced = dataclasses.replace(whole, reason="Its tokens are queries.")
    one = sample(grids=(tiled, unplaced), images=sample().images * 2)
    found = written(tmp_path, [one])["one"]
    for field in ("tiles", "patch_boxes"):
        np.testing.assert_array_equal(getattr(found.grids[0], field), getattr(tiled, field))
        assert getattr(found.grids[1], field) is None
    assert_same_fields(vars(found.grids[0].thumbnail), vars(tiled.thumbnail))
    assert found.grids[1].thumbnail is None
    assert (found.grids[0].reason, found.grids[1].reason) == (None, "Its tokens are queries.")


def test_a_new_field_of_a_call_needs_a_new_version_of_the_format():
    """Stores of version 2 hold these fields. For other fields, increment ``schema.VERSION``."""
    names = {each.name for each in dataclasses.fields(AttentionCall)}
    assert schema.VERSION == 2
    assert names == {
        *("tower", "kind", "layer", "module", "call", "q", "k", "scaling", "v", "mask", "bias"),
        *("causal", "offset", "softcap", "sinks", "sliding_window", "rows", "dense"),
        *("update_share", "segments", "note"),
        *HELD,  # version 3 of ``sample.json``
        "token_norm",  # version 4 of ``sample.json``
    }


def test_a_sample_with_statistics_has_a_version_that_older_readers_refuse(tmp_path):
    whole = sample("whole", [call(0)])
    labels = Labels(torch.zeros(1, N, dtype=torch.int16), 1, torch.ones(1, N, dtype=torch.bool))
    held = sample("held", [call(1), reduced(call(0), ["mass", "entropy", "received"], labels)])
    store = written(tmp_path, [whole, held])
    versions = {
        path.parent.name: json.loads(path.read_text())["version"]
        for path in store.path.rglob(schema.SAMPLE)
    }
    assert versions == {"whole": 2, "held": 3}
    assert store.manifest["version"] == 2
    for key, expected in held.calls.items():
        fields = [dict(vars(each)) for each in (store["held"].calls[key], expected)]
        for each in fields:
            each.pop("memo", None)
        assert_same_fields(*fields)
    assert store["held"].calls["language", "self", 0, 0].holds_statistics
    assert check_store(store.path)["ok"].all()


def test_results_that_analyses_share_are_computed_once_per_stored_sample(tmp_path, monkeypatch):
    made = xi.capture(shipped(), Image.new("RGB", (96, 96)), "what color ?")
    stored = written(tmp_path / "store", [made])[0]
    monkeypatch.setattr(call_module, "SMALL_CELLS", 0)
    first = xi.attention_sinks(stored)
    monkeypatch.setattr(fused, "column_pass", None)
    pd.testing.assert_frame_equal(xi.attention_sinks(stored), first)
    monkeypatch.undo()
    pd.testing.assert_frame_equal(xi.attention_sinks(made), first, rtol=1e-5)
