"""The benchmarks measure what they name: their statistics by numpy are those of the package."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import cost_plot
import measurements
import numpy as np
import on_gpu
import pandas as pd
import public_analyses
import pytest
import random_models
import torch
import works
from PIL import Image

import xmodal_interp as xi
from xmodal_interp.attention import AttentionCall

TINY = random_models.Shape(layers=2, heads=4, kv_heads=2, width=64, mlp=128, d_head=16, images=2)
OF_ONE_ROW_PER_HEAD_AND_QUERY = ("token_ratio", "cross_modal_ratio", "attention_entropy")
PLACED = ("layer", "head", "row", "col")


@pytest.fixture(scope="module")
def scene() -> random_models.Scene:
    return random_models.Scene(TINY, side=4)


@pytest.fixture(scope="module")
def by_numpy(scene):
    attentions, layout = scene.attentions(), scene.layout()
    return {work.name: work.numpy(attentions, layout) for work in works.works() if work.numpy}


def close(found, expected) -> None:
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-4, atol=1e-6)


def table_of(name: str, sample: xi.Sample) -> pd.DataFrame:
    return next(work for work in works.works() if work.name == name).run(sample)


def test_every_analysis_of_a_sample_is_measured() -> None:
    named = {work.name.split(",")[0] for work in works.works()} | {
        *works.LEARNED_QUERIES,
        *works.OF_NORMS,
    }
    of_models = {"answer_accuracy", "head_pruning", "pruning_curve"}
    of_speech = {"time_alignment", "token_times"}
    assert set(xi.analysis.__all__) - named == of_models | of_speech


def test_numpy_computes_what_the_analyses_return(scene, by_numpy) -> None:
    sample = scene.capture()
    for name in OF_ONE_ROW_PER_HEAD_AND_QUERY:
        for column, values in by_numpy[name].items():
            close(values.ravel(), table_of(name, sample)[column])
    mass = torch.stack([each[0, ..., 0] for each in works.image_mass(sample)])
    close(by_numpy["image mass of text rows"]["mass"], mass)
    for n in (1, works.N_QUERIES):
        name = f"attention_rollout, {n} quer{'y' if n == 1 else 'ies'}"
        close(by_numpy[name]["rollout"].ravel(), table_of(name, sample)["rollout"])
    close(by_numpy["rollout_matrix"]["rollout"], xi.rollout_matrix(sample))
    blocks = xi.block_statistics(sample)
    blocks["block"] = pd.Categorical(blocks["block"], ["T-V", "V-T", "V-V", "T-T"])
    blocks = blocks.sort_values(["layer", "head", "block"])
    for column in ("mass", "mean", "lift"):
        close(by_numpy["block_statistics"][column].ravel(), blocks[column])
    recent = xi.recency_index(sample)
    close(by_numpy["recency_index"]["mass"].ravel(), recent["mass"])
    allocation = xi.attention_allocation(sample).query("segment == 'image'")
    close(
        by_numpy["attention_allocation"]["allocation_mean"].ravel(), allocation["allocation_mean"]
    )
    of_places = xi.raster_map(sample).sort_values(list(PLACED))
    close(by_numpy["raster_map"]["lift"].ravel(), of_places["lift"])
    summary = xi.cross_modal_summary(sample).iloc[0]
    for column, value in by_numpy["cross_modal_summary"].items():
        close(float(value), float(summary[column]))


def test_numpy_computes_the_sinks_and_the_bins_of_the_analyses(scene, by_numpy) -> None:
    sample = scene.capture()
    sinks = xi.attention_sinks(sample, threshold=0.3)
    at = tuple(sinks[name].to_numpy() for name in ("layer", "head", "key"))
    close(by_numpy["attention_sinks"]["received"][at], sinks["received"])
    assert (by_numpy["attention_sinks"]["sink"][at] == sinks["sink"]).all()
    rates = xi.sink_rate(sample)
    for column in ("first", "any"):
        close(by_numpy["sink_rate"][column], rates[column])
    bias = xi.positional_bias(sample)
    blocks, axes = ("text->text", "text->image", "image->image"), ("distance", "key")
    width = (bias["stop"] - bias["start"]).iloc[0]
    index = (
        bias["layer"],
        bias["head"],
        bias["block"].map(blocks.index),
        bias["axis"].map(axes.index),
        bias["start"] // width,
    )
    values = by_numpy["positional_bias"]["raw"]
    close(values[tuple(each.to_numpy() for each in index)], bias["raw"])
    assert np.isfinite(values).sum() == len(bias)


def test_a_work_is_measured_in_time_and_memory(scene) -> None:
    chosen = ["capture", "token_ratio", "rollout_matrix"]
    rows = [
        *measurements.times(scene, chosen, 2),
        *measurements.memory(scene, chosen, eager=True),
        *measurements.eager_times(scene, chosen, 1),
    ]
    about = {"package": "now", "model": "large", "asked": 64}
    result = public_analyses.combined([about | row for row in rows])
    assert list(result["work"]) == chosen
    assert result["time"].gt(0.5).all()
    assert (result["time"][1:] > result["time"][0]).all()  # the analysis comes on top
    assert result["eager_time"].gt(0.5).all()
    matrix = scene.n_tokens**2 * 8 / 2**20
    assert result["kept_mb"].gt(0).all()
    assert result["alone_mb"][2] > matrix / 2 or matrix < 0.5
    assert {"beyond_mb", "eager_mb", "noise", "sdpa_share"} <= set(result.columns)
    text = public_analyses.printed(result)
    assert [line.split(" | ")[0].strip("| ") for line in text.splitlines()[2:5]] == chosen


def test_what_a_package_lacks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name in xi.analysis.__all__ if name != "attention_sinks"]
    earlier = SimpleNamespace(**{name: getattr(xi, name) for name in names})
    earlier.analysis = SimpleNamespace(__all__=names)
    monkeypatch.setattr(works, "package", lambda: earlier)
    assert "attention_sinks" not in [work.name for work in works.works()]
    rows = [
        {"package": "before", "model": "large", "work": "capture", "time": 2.0},
        {"package": "now", "model": "large", "work": "capture", "time": 1.0},
        {"package": "now", "model": "large", "work": "attention_sinks", "time": 1.5},
    ]
    more = {"asked": 9, "tokens": 9, "spread": 0.1, "plain_s": 1.0, "sdpa_share": 0.2, "noise": 0.0}
    more |= {"alone_mb": 1.0, "beyond_mb": 0.0, "eager_time": np.nan, "eager_mb": np.nan}
    result = public_analyses.combined([row | more for row in rows])
    lines = public_analyses.printed(result).splitlines()
    assert [cell.strip() for cell in lines[3].split("|")[1:7]] == [
        *("attention_sinks", "9", "", "", "1.50", "0.10")
    ]


def test_a_growth_is_the_peak_of_the_memory_in_use() -> None:
    growth, _ = measurements.Meter("cpu").growth(lambda: bytearray(64 * 2**20) and None)
    assert 60 < growth < 90


def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        public_analyses.packages_of([f"before={tmp_path}"])
    assert "does not contain xmodal_interp" in str(error.value)


def test_a_plot_has_a_panel_for_each_work(tmp_path: Path) -> None:
    rows = [
        {"package": package, "work": work, "tokens": tokens, "time": time_, "eager_time": 3 * time_}
        for package in ("before", "now")
        for work, time_ in (("capture", 1.0), ("token_ratio", 2.0))
        for tokens in (1000, 2000)
    ]
    result = pd.DataFrame(rows).assign(model="large", asked=lambda table: table["tokens"])
    cost_plot.draw(result, tmp_path / "costs.png")
    with Image.open(tmp_path / "costs.png") as picture:
        assert picture.width > 900


def test_the_checks_for_a_gpu_pass_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without flex attention, which is compiled for a minute."""
    options = [
        "--device",
        "cpu",
        "--tokens",
        "32",
        "72",
        "--rounds",
        "1",
        "--ways",
        "flash",
        "math",
    ]
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", *options])
    assert on_gpu.main() == 0
    printed = capsys.readouterr().out
    assert "Not checked" not in printed
    assert printed.count("| token_ratio ") == 2
    assert ", 0 failed" in printed


def test_a_wrong_statistic_fails_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    right = AttentionCall.mass
    monkeypatch.setattr(AttentionCall, "mass", lambda *args: right(*args) * (1 + 1e-4))
    failed = {check.what for check in on_gpu.statistic_checks(24, 16, "cpu") if not check.passes}
    assert failed == {"mass", "mass and entropy of some heads and rows"}


def test_wrong_operands_fail_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    right = on_gpu.replica_probs
    monkeypatch.setattr(on_gpu, "replica_probs", lambda *args: right(*args).roll(1, -1))
    failed = {
        check.what
        for check in on_gpu.recording_checks(on_gpu.TINY, 4, ["math"])
        if not check.passes
    }
    assert failed == {"math: output of attention", "math: probs"}


def test_what_would_exceed_the_time_limit_is_left_out() -> None:
    result, left_out = on_gpu.table(on_gpu.TINY, [32, 72], 1, ["capture"], time.monotonic())
    assert set(result["asked"]) == {32}
    assert "everything, 72 tokens" in left_out
