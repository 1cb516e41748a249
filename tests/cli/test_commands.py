"""The command line: results, files, exit codes and one-line errors."""

import functools
import json
from importlib.metadata import entry_points

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import xmodal_interp as xi
from tests.helpers.store_samples import items
from tests.helpers.tiny import picture
from tests.helpers.vision import registers_vlm
from xmodal_interp import block_statistics
from xmodal_interp.cli import printing
from xmodal_interp.cli.commands import app
from xmodal_interp.cli.menu import ANALYSES, FIGURES
from xmodal_interp.hooks.knockout import KnockOut
from xmodal_interp.models import support
from xmodal_interp.store import open_store

run = CliRunner().invoke


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    picture().save(folder / "scene.png")
    rows = [{"image": "scene.png", "prompt": "how many shapes ?", "name": "counted"}]
    pd.DataFrame(rows).to_csv(folder / "items.csv", index=False)
    result = run(app, ["capture", str(folder / "store"), "--items", str(folder / "items.csv")])
    assert result.exit_code == 0, result.output
    return folder / "store"


def test_analyze_prints_and_writes(store, tmp_path) -> None:
    printed = run(app, ["analyze", str(store), "cross-modal-ratio"])
    assert printed.exit_code == 0
    assert "lift" in printed.output
    path = tmp_path / "ratio.parquet"
    written = run(app, ["analyze", str(store), "cross-modal-ratio", "--path", str(path)])
    assert written.exit_code == 0
    assert len(pd.read_parquet(path)) == 32


def test_analyze_passes_the_number_of_processes(store, monkeypatch) -> None:
    given = []

    @functools.wraps(xi.sink_rate)
    def recorded(samples, **options):
        given.append(options)
        return xi.sink_rate(samples, **options)

    monkeypatch.setattr(xi.analysis, "sink_rate", recorded)
    for options in ([], ["--workers", "2"]):
        assert run(app, ["analyze", str(store), "sink-rate", *options]).exit_code == 0
    assert given == [{"workers": 1}, {"workers": 2}]


def test_printed_tables_fit_the_terminal(store) -> None:
    """80 columns, no truncated cells; values that all rows share are printed once."""
    printed = run(app, ["analyze", str(store), "block-statistics", "--rows", "1000"]).output
    table = block_statistics(open_store(store))
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\u2026" not in printed
    assert lines[:3] == ["sample: counted", "tower: language", "kind: self"]
    heads = [line.split() for line in lines if line.split()[:2] == ["layer", "head"]]
    shown = {name for head in heads for name in head}
    assert shown | {"sample", "tower", "kind", "visible"} == set(table.columns)
    assert (
        sum(line.split()[:1] == ["3"] for line in lines) == len(heads) * table["layer"].eq(3).sum()
    )
    row = next(line.split() for line in lines if line.split()[:3] == ["0", "0", "T-V"])
    there = table.query("layer == 0 and head == 0 and block == 'T-V'").iloc[0]
    assert dict(zip(heads[0], row, strict=True))["mass"] == f"{there['mass']:.4g}"


def test_names_may_have_underscores_and_short_floats_are_printed_short(store) -> None:
    printed = run(app, ["analyze", str(store), "cross_modal_ratio", "--rows", "1"])
    assert printed.exit_code == 0, printed.output
    assert printing._cell(np.float32(0.0066244537)) == "0.006624"
    assert printing._cell(np.float32("nan")) == printing._cell(pd.NA) == "-"


def test_the_installed_command_is_this_app() -> None:
    (script,) = entry_points(group="console_scripts", name="xmodal")
    assert script.load() is app


def test_plot_writes_a_figure(store, tmp_path) -> None:
    path = tmp_path / "layers.png"
    options = ["--queries", "shapes", "--path", str(path)]
    result = run(app, ["plot", str(store), "layer-overlays", *options])
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(b"\x89PNG")


def test_info_of_a_store_and_of_a_model(store) -> None:
    held = run(app, ["info", str(store)])
    assert held.exit_code == 0
    assert f"{store.name}: 1 sample, " in held.output.replace("\n", "")
    assert "model_class" in held.output
    assert "{" not in held.output
    model = run(app, ["info", "llava"])
    assert model.exit_code == 0
    assert "LlavaForConditionalGeneration" in model.output


def test_check_finds_damage(store) -> None:
    good = run(app, ["check", str(store)])
    assert good.exit_code == 0
    assert "none damaged or missing" in good.output
    tensors = next(store.glob("samples/counted/*.safetensors"))
    whole = tensors.read_bytes()
    try:
        tensors.write_bytes(whole[:-10])
        bad = run(app, ["check", str(store)])
    finally:
        tensors.write_bytes(whole)
    assert bad.exit_code == 1


def test_doctor_of_the_shipped_model_and_of_a_picture(store) -> None:
    plain = run(app, ["doctor"])
    assert plain.exit_code == 0, plain.output
    assert "PASS 11 checks passed: recordings of this model can be trusted." in plain.output
    scene = str(store.parent / "scene.png")
    asked = run(app, ["doctor", "llava", scene, "where is the red circle ?"])
    assert asked.exit_code == 0, asked.output


def test_doctor_fails_with_exit_code_1(monkeypatch) -> None:
    monkeypatch.setattr(KnockOut, "before", lambda _self, call, _site: call)
    result = run(app, ["doctor"])
    assert result.exit_code == 1
    assert (
        "FAIL 10 checks passed, 1 failed (a key hidden through the tap changes the output): do not "
        "trust recordings of this model." in result.output
    )


def test_families_prints_a_table_and_a_markdown_page() -> None:
    listed = run(app, ["families"])
    assert listed.exit_code == 0
    assert "97 types, measured with torch " in listed.output
    page = run(app, ["families", "--markdown"])
    assert page.output == support.markdown()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["info", "no/such-model"], "could not be loaded"),
        (["doctor", "no/such-model"], "could not be loaded"),
        (
            ["analyze", "nowhere", "sink-rate"],
            "Pass a folder that capture_dataset has written",
        ),
        (["capture", "x", "--prompt", "what ?"], "--image with --prompt, or --items"),
        (["capture", "x", "--items", "none.csv"], "The file of items 'none.csv' does not exist."),
        (
            ["capture", "x", "--items", "none.csv", "--image", "a.png"],
            "--items cannot be combined with --image, --name or --answer.",
        ),
        (
            ["capture", "x", "--image", "a.png", "--prompt", "?", "--image-folder", "y"],
            "--image-folder requires --items.",
        ),
        (
            ["capture", "x", "--image", "a.png", "--prompt", "?", "--dtype", "float17"],
            "dtype must be 'auto' or the name of a torch dtype such as 'bfloat16'; got 'float17'.",
        ),
    ],
)
def test_errors_are_one_line_with_exit_code_1(arguments, words) -> None:
    result = run(app, arguments)
    assert result.exit_code == 1
    assert result.output.startswith("error:")
    assert words in result.output
    assert "Traceback" not in result.output


def test_a_figure_in_an_unknown_format_is_an_error(store) -> None:
    path = store.parent / "a.foo"
    result = run(app, ["plot", str(store), "overlay", "--queries", "shapes", "--path", str(path)])
    assert result.exit_code == 1
    assert result.output.startswith("error: The file of a figure must end in ")
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["analyze", "block-statistics", "--queries", "shapes"], "does not take --queries"),
        (
            ["plot", "layer-overlays", "--queries", "shapes", "--layer", "9"],
            "does not take --layer",
        ),
        (["plot", "token-head-grid", "--head", "9"], "does not take --head"),
        (["plot", "attention-matrix", "--head", "99"], "99"),
        (["plot", "mask-structure", "--head", "99"], "99"),
    ],
)
def test_wrong_options_are_errors(store, tmp_path, arguments, words) -> None:
    command, name, *options = arguments
    path = tmp_path / ("a.png" if command == "plot" else "a.csv")
    result = run(app, [command, str(store), name, *options, "--path", str(path)])
    assert result.exit_code == 1
    assert words in result.output
    assert not path.exists()


def test_a_required_option_is_named(store, tmp_path, monkeypatch) -> None:
    def required(sample, queries, path=None):
        raise AssertionError(sample, queries, path)

    monkeypatch.setattr(xi.figures, "overlay", required)
    result = run(app, ["plot", str(store), "overlay", "--path", str(tmp_path / "a.png")])
    assert result.exit_code == 1
    assert "requires --queries" in result.output


def test_a_type_error_inside_an_analysis_is_raised(store, monkeypatch) -> None:
    def broken(store, queries=None):
        return len(store) + queries  # an int and a string

    monkeypatch.setattr(xi.analysis, "token_ratio", broken)
    result = run(app, ["analyze", str(store), "token-ratio", "--queries", "shapes"])
    assert isinstance(result.exception, TypeError)


def test_help_lists_every_name_with_its_options(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command, offer in (("analyze", ANALYSES), ("plot", FIGURES)):
        lines = run(app, [command, "--help"]).output.splitlines()
        for name in offer:
            assert sum(f"• {name}: " in line for line in lines) == 1
    assert any("--queries --layer --head" in line for line in lines)


def test_a_store_can_be_extended_by_single_images(tmp_path) -> None:
    picture().save(tmp_path / "scene.png")
    store = str(tmp_path / "store")
    options = ["--image", str(tmp_path / "scene.png"), "--layers", "1", "--max-new-tokens", "1"]
    for name, prompt in (("a", "how many shapes ?"), ("b", "what color is the circle ?")):
        result = run(app, ["capture", store, "--prompt", prompt, "--name", name, *options])
        assert result.exit_code == 0, result.output
    assert open_store(store).names == ("a", "b")
    printed = " ".join(run(app, ["info", store]).output.split())
    assert "layers 1," in printed
    assert "max_new_tokens 1 " in printed


def test_a_store_of_statistics_can_be_analysed(tmp_path) -> None:
    picture().save(tmp_path / "scene.png")
    store = str(tmp_path / "store")
    options = ["--image", str(tmp_path / "scene.png"), "--prompt", "how many shapes ?"]
    options += ["--statistics", "mass", "--statistics", "received", "--max-new-tokens", "1"]
    result = run(app, ["capture", store, *options])
    assert result.exit_code == 0, result.output
    (sample,) = open_store(store)
    assert sample.provenance["kept"]["statistics"] == ["mass", "received"]
    assert all(call.holds_statistics for call in sample.calls.values())
    assert run(app, ["check", store]).exit_code == 0
    assert run(app, ["analyze", store, "block-statistics"]).exit_code == 0
    refused = run(app, ["analyze", store, "attention-entropy"])
    assert refused.exit_code == 1
    assert "not entropy. Add 'entropy'" in " ".join(refused.output.split())


def test_the_shipped_models_take_a_dtype(tmp_path) -> None:
    picture().save(tmp_path / "scene.png")
    options = ["--image", str(tmp_path / "scene.png"), "--prompt", "what ?"]
    run(app, ["capture", str(tmp_path / "store"), *options, "--dtype", "bfloat16"])
    assert open_store(tmp_path / "store")[0].provenance["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.csv", b"", "empty.csv has no rows; it must have at least one item."),
        ("cut.jsonl", b'{"image": "a', "cut.jsonl cannot be read as JSONL: line 1: "),
        ("latin.csv", b"image,prompt\na.png,\xe9\n", "latin.csv cannot be read as CSV in UTF-8"),
        ("rows.csv", b"image,prompt\n", "rows.csv has no rows; it must have at least one item."),
    ],
)
def test_unreadable_items_are_errors(tmp_path, name, content, words) -> None:
    (tmp_path / name).write_bytes(content)
    result = run(app, ["capture", str(tmp_path / "store"), "--items", str(tmp_path / name)])
    assert result.exit_code == 1
    assert words in result.output
    assert not (tmp_path / "store").exists()


def test_a_figure_that_cannot_be_written_is_an_error(store, tmp_path) -> None:
    (tmp_path / "file").write_text("not a folder")
    wrong = {
        tmp_path / "file" / "a.png": "Cannot write the figure",
        tmp_path / "no_ending": "The file of a figure must end in",
    }
    for path, words in {**wrong, tmp_path: "is a folder."}.items():
        options = ["--queries", "shapes", "--path", str(path)]
        result = run(app, ["plot", str(store), "overlay", *options])
        assert result.exit_code == 1
        assert words in " ".join(result.output.split())
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_wrong_usage_is_exit_code_2() -> None:
    result = run(app, ["analyze", "x", "no-such-analysis"])
    assert result.exit_code == 2
    assert "cross-modal-ratio" in result.output


@pytest.mark.parametrize("command", ["analyze", "plot"])
def test_outputs_never_overwrite_files_or_enter_stores(store, tmp_path, command) -> None:
    ending = "png" if command == "plot" else "csv"
    name = "mask-structure" if command == "plot" else "block-statistics"
    there, link, folder = (tmp_path / f"{n}.{ending}" for n in ("there", "link", "folder"))
    there.write_text("years of work")
    link.symlink_to(tmp_path / f"target.{ending}")
    folder.mkdir()
    (tmp_path / "store").symlink_to(store)
    sample = next((store / "samples").iterdir())
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    refused = {
        there: "exists. Choose another --path, or pass --force to overwrite it.",
        link: "is a symbolic link.",
        folder: "is a folder.",
        store / f"new.{ending}": "where only samples are written.",
        sample / "image-0.png": "where only samples are written.",
        store / "manifest.json": "where only samples are written.",
        tmp_path / "store" / f"new.{ending}": "where only samples are written.",
    }
    for path, words in refused.items():
        for force in ([], ["--force"]) if path != there else ([],):
            result = run(app, [command, str(store), name, "--path", str(path), *force])
            assert result.exit_code == 1
            assert words in " ".join(result.output.split())
    assert there.read_text() == "years of work"
    assert not link.exists()
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    result = run(app, [command, str(store), name, "--path", str(there), "--force"])
    assert result.exit_code == 0, result.output
    assert there.read_bytes() != b"years of work"


def test_a_failed_capture_leaves_no_files(tmp_path) -> None:
    picture().save(tmp_path / "scene.png")
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    options = ["--image", str(tmp_path / "scene.png"), "--prompt", "what ?"]
    result = run(app, ["capture", str(folder), *options])
    assert result.exit_code == 1
    assert [found.name for found in folder.rglob("*")] == ["thesis.tex"]


def test_a_vision_model_is_checked_and_captured_without_a_prompt(tmp_path) -> None:
    vlm = registers_vlm()
    vlm.model.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    picture().save(tmp_path / "photo.jpg")
    model, photo = str(tmp_path / "model"), str(tmp_path / "photo.jpg")
    checked = run(app, ["doctor", model, photo])
    assert checked.exit_code == 0, checked.output
    command = ["capture", str(tmp_path / "store"), "--model", model, "--image", photo]
    captured = run(app, [*command, "--name", "photo"])
    assert captured.exit_code == 0, captured.output
    sample = xi.open_store(tmp_path / "store")["photo"]
    assert sample.tower == "vision"
    assert sample.tokens["token"].tolist()[:3] == ["class", "register 0", "register 1"]
    written = run(app, ["analyze", str(tmp_path / "store"), "attention-sinks"])
    assert written.exit_code == 0, written.output
    target = str(tmp_path / "a.png")
    drawn = run(app, ["plot", str(tmp_path / "store"), "layer-overlays", "--path", target])
    assert drawn.exit_code == 0, drawn.output
    asked = run(app, [*command, "--name", "other", "--prompt", "what is it?"])
    assert asked.exit_code == 1
    assert "has no language model" in asked.output


def scene_items(folder, n=3):
    asked = items(n)
    for number, item in enumerate(asked):
        item["image"].save(folder / f"{number}.png")
        item["image"] = f"{number}.png"
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return asked


@pytest.mark.usefixtures("any_type")
def test_capture_prints_answers_and_takes_its_options(tmp_path) -> None:
    asked = scene_items(tmp_path, 2)
    asked.append({"image": "nowhere.png", "prompt": "?", "answer": ""})
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, asked)))
    store = tmp_path / "store"
    given = ["--items", str(tmp_path / "items.jsonl"), "--max-new-tokens", "3", "--norms"]
    given += ["--system", "be brief .", "--attn-implementation", "eager"]
    stopped = run(app, ["capture", str(store), *given])
    assert stopped.exit_code == 1
    assert "There is no image file" in stopped.output
    result = run(app, ["capture", str(store), *given, "--on-error", "skip"])
    assert result.exit_code == 0, result.output
    captured = open_store(store)
    for sample in captured:
        assert f"{sample.name}: {sample.question!r} -> {sample.answer!r}" in result.output
        assert sample.answer
        assert sample.text.count("be brief .") == 1
        assert sample.call(0).update_share is not None
        assert sample.provenance["backend"] == "eager"
    assert "1 item could not be captured; the first: Item 2 ('item-000002'): There" in (
        result.output
    )
    assert captured.failures["item"].tolist() == [2]
    wrong = run(app, ["capture", str(store), *given, "--on-error", "ignore"])
    assert wrong.output == "error: on_error must be 'raise' or 'skip'; got 'ignore'.\n"


def test_capture_of_one_image_prints_its_answer_only(tmp_path) -> None:
    picture().save(tmp_path / "scene.png")
    options = ["--image", str(tmp_path / "scene.png"), "--prompt", "how many shapes ?"]
    for name in "ab":
        result = run(app, ["capture", str(tmp_path / "store"), *options, "--name", name])
        assert result.exit_code == 0, result.output
    last = open_store(tmp_path / "store")["b"]
    assert [*filter(None, result.output.splitlines())][
        -1
    ] == f"b: 'how many shapes ?' -> {last.answer!r}"
    assert "a: 'how many" not in result.output


def test_pointing_and_pruning_are_those_of_python(tmp_path) -> None:
    asked = scene_items(tmp_path)
    for item in asked:
        item["box"] = [0, 0, 48, 96]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, asked)))
    path, store = str(tmp_path / "items.jsonl"), str(tmp_path / "store")
    assert run(app, ["capture", store, "--items", path, "--max-new-tokens", "0"]).exit_code == 0
    table = tmp_path / "table.parquet"
    result = run(app, ["pointing", store, "--criterion", "centre", "--path", str(table)])
    assert result.exit_code == 0, result.output
    expected = xi.evaluation.pointing_game(open_store(store), criterion="centre")
    pd.testing.assert_frame_equal(pd.read_parquet(table), expected)
    assert run(app, ["pointing", store, "--boxes", "none"]).exit_code == 1
    given = ["pruning", path, "--layers", "1", "--mode", "zero", "--path", str(table), "--force"]
    result = run(app, given)
    assert result.exit_code == 0, result.output
    expected = xi.head_pruning(xi.load(), path, mode="zero", layers=[1], progress=False)
    pd.testing.assert_frame_equal(pd.read_parquet(table), expected, check_dtype=False)
    assert set(expected["layer"]) == {1}


def test_info_of_a_folder_that_is_no_store_is_an_error_at_once(tmp_path, monkeypatch) -> None:
    """Without a request to the Hub."""

    def refuse(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr(xi.models.loading.AutoConfig, "from_pretrained", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "manifest.json").write_text("{}")
    rest = "Pass the folder of a store or a model, a Hub id, or a shipped model.\n"
    wrong = {
        "empty": "neither a store (it has no manifest.json) nor a model (it has no config.json)",
        "a.txt": "a file",
        "./none": "not an existing folder",
        "runs/none": "not an existing folder",
        "a/b/c": "not an existing folder",
    }
    for name, problem in wrong.items():
        result = run(app, ["info", name])
        assert (result.exit_code, result.output) == (1, f"error: {name!r} is {problem}. {rest}")
    with pytest.raises(AssertionError, match="loaded"):
        run(app, ["info", "some/model"], catch_exceptions=False)


def test_families_are_filtered_by_words() -> None:
    result = run(app, ["families", "LLAVA", "next"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    types = [name for name in support.families()["model_type"] if "llava_next" in name]
    assert [line.split()[0] for line in lines[1:-1] if line.split()[0] in types] == types
    assert lines[-1].startswith(f"{len(types)} of {len(support.families())} types")
    assert run(app, ["families", "nosuch"]).output == (
        "error: No known model type has 'nosuch' in its name, layers or rule. xmodal families "
        "lists all.\n"
    )
