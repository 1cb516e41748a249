"""Reports: numbers of the sentences, stores of other kinds, hostile text, refused files."""

import html
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import xmodal_interp as xi
from tests.helpers.pixel_changes import textured
from tests.helpers.real import real, settled
from tests.helpers.store_samples import items, shipped
from tests.helpers.tiny import QUESTION, picture
from tests.helpers.vision import registers_vlm
from xmodal_interp import analysis, evaluation
from xmodal_interp.cli.commands import app
from xmodal_interp.demo.pipeline import held_out_scenes, of_kind, questions_about
from xmodal_interp.errors import InputError
from xmodal_interp.evaluation import bootstrap_interval
from xmodal_interp.reporting import analyses, writing
from xmodal_interp.reporting.estimates import short
from xmodal_interp.reporting.page import Section
from xmodal_interp.reporting.questions import ELSEWHERE, NEED_THE_MODEL, QUESTIONS, eight_layers

CODE = re.compile(r'<p class="code"><code>(.*?)</code></p>', re.DOTALL)
HOSTILE = (
    "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7 * 7 }} \u202e\x1b[31m"
)
LABELS = ("name", "image", "prompt", "answer", "box", "other_boxes")


class Parsed(HTMLParser):
    """The tags, the text outside scripts and styles, and the tables of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "table":
            self.rows = self.tables[dict(attrs)["data-file"]] = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(dict(attrs).get("data-v") or "")

    def handle_endtag(self, tag) -> None:  # noqa: ARG002
        self._inside = ""

    def handle_data(self, data) -> None:
        if self._inside in ("script", "style"):
            return
        self.text.append(data)
        if self._inside in ("td", "th") and not self.rows[-1][-1]:
            self.rows[-1][-1] = data


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    chosen = of_kind(questions_about(held_out_scenes(4)), "color")
    asked = [{name: item[name] for name in LABELS} for item in chosen]
    folder = tmp_path_factory.mktemp("report") / "store"
    return xi.capture_dataset(shipped(), asked, folder, max_new_tokens=2, progress=False)


@pytest.fixture(scope="module")
def made(store, tmp_path_factory):
    report = xi.report(store, tmp_path_factory.mktemp("page") / "report.html")
    return report, Parsed(report.path.read_text("utf-8"))


@pytest.fixture
def without_figures(monkeypatch):
    """Leave out the figures, which take most of the time."""
    monkeypatch.setattr(analyses, "_draw", lambda *_: None)
    monkeypatch.setattr(writing, "_look_section", lambda _: Section("One sample", "look"))


def interval_of(values) -> list[str]:
    found = bootstrap_interval(values)
    return [short(found.estimate), short(found.low), short(found.high)]


def test_a_sentence_has_the_numbers_of_the_analysis(made, store) -> None:
    report, _ = made
    table = xi.cross_modal_ratio(store)
    means = table.groupby("sample", sort=False)[["ratio", "null"]].mean()
    value, low, high = interval_of(means["ratio"])
    difference, *ends = interval_of(means["ratio"] - means["null"])
    by_layer = table.groupby("layer")["ratio"].mean()
    (found,) = [line for line in report.sentences if line.startswith("Share of text attention")]
    assert found.startswith(
        f"Share of text attention on the image: {value} (95% interval {low} to {high}, 4 samples); "
        f"{short(means['null'].mean())} under uniform attention. It is lower: the difference is "
        f"{difference} ({ends[0]} to {ends[1]}). By layer: {short(by_layer.min())} (layer "
        f"{by_layer.idxmin()}) to {short(by_layer.max())} (layer {by_layer.idxmax()}); of 4 layers,"
    )


def test_rows_of_a_section_are_those_of_the_analysis(made, store) -> None:
    _, page = made
    header, *rows = page.tables["focus-of-the-heads-entropy-by-head.csv"]
    shown = pd.DataFrame(rows, columns=header)
    assert len(shown) == 4 * 8 + 3 * 4
    for tower in ("language", "vision"):
        expected = xi.attention_entropy(store, tower=tower).groupby(["layer", "head"])
        part = shown[shown["tower"] == tower]
        for column in ("entropy", "null"):
            np.testing.assert_allclose(
                part[column].astype(float), expected[column].mean(), rtol=1e-12
            )


def test_every_analysis_is_a_section_or_left_out_with_a_reason(made) -> None:
    report, page = made
    sections = {attrs["id"] for tag, attrs in page.tags if tag == "section"}
    for name in (*analysis.__all__, "pointing_game", "best_head"):
        applies = name.replace("_", "-") in sections
        assert applies != (name in set(report.left_out["analysis"])), name
    assert report.left_out["reason"].str.len().min() > 10
    reasons = report.left_out.set_index(["analysis", "tower"])["reason"]
    assert reasons["token_norms", "language"] == (
        "language self-attention, layer 0, call 0 was captured without token norms. Capture with "
        "Keep(norms=True)."
    )


def run_lines(code: str, names: dict) -> object:
    """Return the value of the last line of some Python."""
    *before, last = code.split("\n")
    exec("\n".join(before), names)
    return eval(last, names)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.analysis)
def test_the_shown_call_gives_the_values_of_the_section(question, tmp_path) -> None:
    """The values per sample, before they are averaged, are those of the last line of the call."""
    samples = samples_for(question.analysis, tmp_path / "store")
    for tower in question.towers:
        table = question.table(samples, tower)
        code = question.code.format(tower=tower, layers=eight_layers(samples))
        found = run_lines(code, {"xi": xi, "samples": samples})
        value = question.value.column
        if question.analysis == "answers":
            assert table[value].tolist() == [known == answer for known, answer in found]
        elif question.analysis == "query_patches":
            assert table[value].tolist() == [each.item() for each in found]
        elif question.analysis == "raster_bias":
            slopes = found[["row_slope", "col_slope", "edge_slope"]].to_numpy().T.ravel()
            np.testing.assert_array_equal(table[value], slopes)
        elif question.analysis == "token_norms":
            largest = found.groupby(["sample", "layer"], sort=False)[value].max()
            np.testing.assert_array_equal(table[value], largest)
        else:
            assert len(found) == len(table)
            np.testing.assert_array_equal(found[value], table[value])


def samples_for(name: str, folder: Path) -> list[xi.Sample]:
    """Return two samples to which an analysis applies."""
    if name == "query_patches":
        vlm = xi.VLM(real("blip-2")[0], settled("blip-2"))
        return [xi.capture(vlm, textured(150, 70), QUESTION)]
    chosen = of_kind(questions_about(held_out_scenes(2)), "color")
    asked = [{label: item[label] for label in LABELS} for item in chosen]
    keep = xi.Keep(norms=name == "token_norms")
    return list(
        xi.capture_dataset(shipped(), asked, folder, keep=keep, max_new_tokens=2, progress=False)
    )


def test_the_shown_calls_are_complete(made, store, monkeypatch) -> None:
    """All code blocks of the page run in the order of the page, from the folder of the store."""
    report, _ = made
    monkeypatch.chdir(store.path.parent)
    document = report.path.read_text("utf-8")
    blocks = [html.unescape(part) for part in CODE.findall(document)]
    assert len(blocks) == 1 + 1 + len({*report.glance["analysis"]})
    names: dict = {}
    for block in blocks:
        if not block.startswith("xmodal doctor"):
            exec(block, names)
    assert [sample.name for sample in names["samples"]] == list(store.names)


def test_the_page_holds_no_folder_of_this_machine(made, store) -> None:
    """A page may be mailed; a model or store folder is shown by its last name."""
    report, page = made
    document = report.path.read_text("utf-8")
    model = Path(store[0].provenance["model"])
    assert model.is_absolute()
    for folder in {model.parent, store.path.parent, Path.cwd(), report.path.parent}:
        assert str(folder) not in document
    assert ["settings.model", model.name] in page.tables["store.csv"]
    assert "xmodal doctor MODEL" in document


def test_every_public_analysis_is_known() -> None:
    """A new analysis must be added to the report, or to the list of those it cannot run."""
    known = {question.analysis for question in QUESTIONS} | {*NEED_THE_MODEL} | {*ELSEWHERE}
    tools = {"Interval", "bootstrap_interval", "curve_areas", "holm_adjusted"}
    assert {*analysis.__all__, *evaluation.__all__} - tools <= known


def test_links_lead_to_sections_and_nothing_is_requested(made) -> None:
    report, page = made
    ids = {attrs["id"] for tag, attrs in page.tags if tag == "section"}
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert {link.removeprefix("#") for link in links} == ids
    sources = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert len(sources) > 20
    assert all(source.startswith(("data:image/png", "data:image/jpeg")) for source in sources)
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "base", "form"}
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and "content" in a and "http-equiv" in a
    )
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert report.path.stat().st_size < 8e6


def test_what_was_captured_is_stated(made) -> None:
    _, page = made
    text = " ".join(page.text)
    assert "The model is LlavaForConditionalGeneration (float32, sdpa attention)" in text
    assert "A sample has 154 positions on average: 144 image, 9 text, 1 special." in text
    assert "Unknown: no verdict of the doctor was passed to this report" in text
    assert "All 4 samples. Intervals are 95% intervals over 4 samples of 4 pictures" in text


@pytest.mark.usefixtures("without_figures")
def test_one_sample_has_no_interval(store, tmp_path) -> None:
    report = xi.report(store[0], tmp_path / "one.html")
    ratio = xi.cross_modal_ratio(store[0])
    value, null = ratio["ratio"].mean(), ratio["null"].mean()
    (found,) = [line for line in report.sentences if line.startswith("Share of text attention")]
    assert found.startswith(
        f"Share of text attention on the image: {short(value)} (1 sample, so there is no "
        f"interval); {short(null)} under uniform attention. The difference is "
        f"{short(value - null)}; whether it holds for others is unknown."
    )
    assert set(report.glance["against_null"]) == {"no interval"}
    assert report.glance[["low", "high", "difference_low"]].isna().all(axis=None)
    text = report.path.read_text("utf-8")
    assert "Higher than their null" not in text
    assert "With one picture there are no intervals" in text


@pytest.mark.usefixtures("without_figures")
def test_samples_of_one_picture_are_one_cluster(tmp_path) -> None:
    image = picture()
    questions = ["how many shapes ?", "what color is the circle ?"]
    samples = xi.capture_batch(shipped(), [[image], [image]], questions)
    report = xi.report(samples, tmp_path / "page.html")
    assert "(2 samples of one picture, so there is no interval)" in report.sentences[0]
    assert report.glance["difference_low"].isna().all()


@pytest.mark.usefixtures("without_figures")
def test_text_of_prompts_is_never_interpreted(tmp_path) -> None:
    asked = [{**items(1)[0], "prompt": HOSTILE, "answer": HOSTILE}]
    store = xi.capture_dataset(shipped(), asked, tmp_path / "store", progress=False)
    sample = store[0].changed(name="<b>x</b>")
    report = xi.report(sample, tmp_path / "page.html")
    page = report.path.read_text("utf-8")
    parsed = Parsed(page)
    assert "{{ 7 * 7 }}" in page
    assert not [a for _, a in parsed.tags if any(name.startswith("on") for name in a)]
    assert len([tag for tag, _ in parsed.tags if tag == "script"]) == 1
    assert not [a for tag, a in parsed.tags if tag == "img" and a["src"] == "x"]
    assert "\u202e" not in page
    assert "\x1b" not in page
    assert "<b>x</b>" in parsed.text
    text = " ".join(parsed.text)
    assert HOSTILE[:40] in text


def test_a_store_with_statistics_only(tmp_path) -> None:
    keep = xi.Keep(statistics=("mass",))
    store = xi.capture_dataset(
        shipped(), items(3), tmp_path / "store", keep=keep, max_new_tokens=2, progress=False
    )
    report = xi.report(store, tmp_path / "page.html")
    ratio = xi.cross_modal_ratio(store, sink_threshold=None)
    value = short(ratio.groupby("sample")["ratio"].mean().mean())
    assert any(
        line.startswith(f"Share of text attention on the image: {value} ")
        for line in report.sentences
    )
    reasons = report.left_out.set_index(["analysis", "tower"])["reason"]
    for name in ("attention_rollout", "positional_bias"):
        assert "holds the statistic mass, not q and k." in reasons[name, "language"]
    text = " ".join(Parsed(report.path.read_text("utf-8")).text)
    assert "Kept of the language tower: statistics (mass of key groups)" in text
    assert "A figure could not be drawn." in text


def test_a_store_of_a_vision_model(tmp_path) -> None:
    asked = [{"image": picture(32, 32, seed), "prompt": ""} for seed in range(3)]
    store = xi.capture_dataset(
        registers_vlm(), asked, tmp_path / "store", max_new_tokens=0, progress=False
    )
    report = xi.report(store, tmp_path / "page.html")
    assert {"attention_entropy", "attention_distance", "block_statistics"} <= set(
        report.glance["analysis"]
    )
    entropy = xi.attention_entropy(store)["entropy"].mean()
    assert any(
        line.startswith(f"Entropy, vision tower: {short(entropy)} nats")
        for line in report.sentences
    )
    assert "cross_modal_ratio" in set(report.left_out["analysis"])
    text = " ".join(Parsed(report.path.read_text("utf-8")).text)
    assert "Positions of the vision tower by kind." in text


@pytest.mark.usefixtures("without_figures")
def test_samples_to_which_an_analysis_does_not_apply_are_left_out(tmp_path) -> None:
    samples = xi.capture_batch(
        shipped(), [[picture()], [picture(seed=1)], []], ["how many shapes ?"] * 2 + ["hello"]
    )
    report = xi.report(samples, tmp_path / "page.html")
    ratio = xi.cross_modal_ratio(samples[:2])["ratio"].mean()
    (found,) = [line for line in report.sentences if line.startswith("Share of text attention")]
    assert found.startswith(f"Share of text attention on the image: {short(ratio)} (95% interval ")
    assert "2 samples" in found
    text = " ".join(Parsed(report.path.read_text("utf-8")).text)
    assert (
        "Left out of cross_modal_ratio (language tower): 1 of 3 samples. The first reason: " in text
    )


@pytest.mark.usefixtures("without_figures")
def test_more_samples_than_the_limit_are_evenly_spaced(store, tmp_path) -> None:
    report = xi.report(store, tmp_path / "page.html", max_samples=2)
    assert report.names == [store.names[0], store.names[3]]
    text = " ".join(Parsed(report.path.read_text("utf-8")).text)
    assert "2 of 4 samples: evenly spaced in their order." in text


@pytest.mark.usefixtures("without_figures")
def test_the_verdict_is_the_one_that_was_passed(store, tmp_path) -> None:
    checkup = xi.doctor(shipped())
    report = xi.report(store[0], tmp_path / "page.html", checkup=checkup)
    page = Parsed(report.path.read_text("utf-8"))
    assert f"PASS: {checkup.summary}" in page.text
    assert len(page.tables["checks.csv"]) == len(checkup.table) + 1


@pytest.mark.usefixtures("without_figures")
def test_existing_files_and_wrong_paths_are_refused(store, tmp_path) -> None:
    path = tmp_path / "page.html"
    path.write_text("mine")
    refused = {
        path: f"{str(path)!r} exists. Choose another path, or pass force=True to overwrite it.",
        tmp_path / "page.txt": f"path must end in .html; got {str(tmp_path / 'page.txt')!r}.",
        store.path / "page.html": (
            f"{str(store.path / 'page.html')!r} is inside the store {str(store.path)!r}, where "
            "only samples are written. Choose another path."
        ),
    }
    for wrong, message in refused.items():
        with pytest.raises(InputError) as error:
            xi.report(store, wrong)
        assert str(error.value) == message
    assert path.read_text() == "mine"
    with pytest.raises(InputError, match="requires at least one sample; got none"):
        xi.report([], tmp_path / "none.html")
    assert {each.name for each in tmp_path.iterdir()} == {"page.html"}
    xi.report(store[0], path, force=True)
    assert path.read_text("utf-8").startswith("<!doctype html>")


@pytest.mark.usefixtures("without_figures")
def test_the_command_writes_a_report(store, tmp_path) -> None:
    run = CliRunner().invoke
    path = tmp_path / "page.html"
    name = store.names[1]
    arguments = ["report", str(store.path), "--path", str(path), "--samples", name]
    done = run(app, [*arguments, "--samples", "0"])
    assert done.exit_code == 0, done.output
    assert "2 samples" in done.output
    assert path.exists()
    again = run(app, arguments)
    assert again.exit_code == 1
    assert "exists. Choose another --path, or pass --force to overwrite it." in again.output
    wrong = run(
        app, ["report", str(store.path), "--path", str(tmp_path / "a.html"), "--samples", "9"]
    )
    assert wrong.exit_code == 1
    assert "--samples must be a number from 0 to 3 or a name" in wrong.output.replace("\n", " ")
