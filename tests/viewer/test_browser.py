"""The page in a real browser: gestures, address, exports, values."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import xmodal_interp as xi
from tests.helpers import synthetic
from tests.helpers.clips import clip, vlm_of
from tests.helpers.figure_samples import fake, panels
from tests.helpers.viewer_samples import browser, need_browser, scene_sample, wait_for_viewer
from tests.viewer.test_page import HOSTILE
from xmodal_interp.viewer.codes import ERROR
from xmodal_interp.viewer.rows import shown_values

STATE = """() => {
  const { viewer } = document.getElementById("viewer");
  const { pins, row, measure, sinks, each, box, value, sample, compare, heads } = viewer.state;
  return { pins, row, measure, sinks, each, box, value, sample, compare, heads: [...heads],
    hover: viewer.hover, caption: viewer.parts.caption.textContent };
}"""
VALUES = """() => {
  const { viewer } = document.getElementById("viewer");
  return viewer.shownSeries.map((each) => Array.from(each.values));
}"""
SETTLED = """() => new Promise((done) => {
  requestAnimationFrame(() => requestAnimationFrame(() => done(true)));
})"""


@pytest.fixture(scope="module")
def chrome():
    need_browser()
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    need_browser()
    folder = tmp_path_factory.mktemp("pages")
    samples = {"one": scene_sample(), "two": scene_sample(5)}
    return xi.view(samples).save(folder / "page.html")


class Opened:
    """A page in the browser, with everything that it requested and reported."""

    def __init__(self, chrome, path: Path, address: str = "", **options) -> None:
        context = chrome.new_context(viewport={"width": 1280, "height": 900}, **options)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.page = context.new_page()
        self.requests, self.problems = [], []
        self.page.on("request", lambda r: self.requests.append(r.url))
        self.page.on("pageerror", lambda e: self.problems.append(str(e)))
        self.page.on("console", lambda m: self.problems.append(m.text))
        self.page.goto(f"{path.as_uri()}{address}")
        wait_for_viewer(self.page)
        self.settle()

    def settle(self) -> None:
        self.page.evaluate(SETTLED)

    @property
    def state(self) -> dict:
        self.settle()
        return self.page.evaluate(STATE)

    def values(self, series: int = 0) -> np.ndarray:
        self.settle()
        return np.array(self.page.evaluate(VALUES)[series], dtype=float)

    def largest(self) -> float:
        """Return the mean over the shown rows of their largest value: the bound of errors."""
        self.settle()
        return self.page.evaluate(
            """() => {
              const { viewer } = document.getElementById("viewer");
              const { sample: data, state } = viewer;
              let [total, n] = [0, 0];
              for (const query of viewer.queries(data, viewer.positions())) {
                for (const [row, weight, layer] of data.terms(state.heads, state.measure)) {
                  const block = data.block(query);
                  const factor = state.measure === "lift" ? block.visible[layer] : 1;
                  total += block.largest[row] * weight * factor;
                  n += weight;
                }
              }
              return total / n;
            }"""
        )

    def click(self, text: str) -> None:
        self.page.get_by_role("button", name=text, exact=True).first.click()
        self.settle()

    def place(self, part: str) -> dict:
        """Return the place of a canvas on the screen."""
        return self.page.evaluate(
            f"""() => {{
              const made = document.getElementById("viewer").viewer.parts.{part};
              made.scrollIntoView({{ block: "center" }});
              const {{ x, y }} = made.getBoundingClientRect();
              return {{ x, y }};
            }}"""
        )

    def head(self, layer: int, head: int) -> tuple[float, float]:
        """Return the point of a cell of the matrix of layers and heads."""
        at = self.place("heads")
        g = self.page.evaluate("document.getElementById('viewer').viewer.headGeometry")
        x = at["x"] + g["left"] + (head + 0.5) * g["cell"]
        return x, at["y"] + g["top"] + (layer + 0.5) * g["high"]

    def patch(self, row: float, col: float, cells: int = 12) -> tuple[float, float]:
        """Return the point of a patch of the first picture."""
        over = self.page.locator("canvas.v-over").first
        over.scroll_into_view_if_needed()
        box = over.bounding_box()
        return (
            box["x"] + (col + 0.5) * box["width"] / cells,
            box["y"] + (row + 0.5) * box["height"] / cells,
        )


@pytest.fixture
def opened(chrome, page_file):
    page = Opened(chrome, page_file)
    yield page
    assert page.problems == []
    assert [each for each in page.requests if not each.startswith("data:")] == [page_file.as_uri()]
    page.page.context.close()


def close_to(found: np.ndarray, expected: np.ndarray, largest: float | None = None) -> None:
    """Assert that values of the page are exact within the stated error."""
    assert (np.isnan(found) == np.isnan(expected)).all()
    largest = float(np.nanmax(expected)) if largest is None else largest
    assert np.nanmax(np.abs(found - expected)) <= ERROR * largest


def test_the_page_opens_at_the_answer(opened) -> None:
    sample = scene_sample()
    state = opened.state
    assert state["pins"] == [sample.n_prompt]
    assert state["row"] == "before"
    assert state["heads"] == [[3, None]]
    assert state["caption"] == "row that predicts “bottom” · layer 3, mean of 8 heads"
    largest = float(sample.probs(3, None, [sample.last]).mean(0).max())
    close_to(opened.values(), shown_values(sample, [sample.last], {3: None}), largest)


def test_hover_previews_and_click_pins_words(opened) -> None:
    sample = scene_sample()
    yellow, square = (int(sample.find(word)[0]) for word in ("yellow", "square"))
    word = opened.page.locator(f".v-word[data-position='{yellow}']")
    word.hover()
    assert opened.state["hover"]["word"] == yellow
    exact = shown_values(sample, [yellow - 1], {3: None})
    close_to(opened.values(), exact)
    assert opened.state["pins"] == [sample.n_prompt]
    word.click()
    opened.page.locator(f".v-word[data-position='{square}']").click(modifiers=["Shift"])
    opened.page.mouse.move(2, 2)
    assert opened.state["pins"] == [yellow, square]
    both = shown_values(sample, [yellow - 1, square - 1], {3: None})
    close_to(opened.values(), both)
    opened.click("Row of the word")
    close_to(opened.values(), shown_values(sample, [yellow, square], {3: None}))
    opened.click("One picture per word")
    close_to(opened.values(0), shown_values(sample, [yellow], {3: None}))
    close_to(opened.values(1), shown_values(sample, [square], {3: None}))
    assert opened.page.locator("figure.v-panel").count() == 2


def test_answer_tokens_have_their_probability(opened) -> None:
    """Also the end-of-sequence token, which has no position; words of the prompt have none."""
    sample = scene_sample()
    expected = sample.tokens["next_probability"].dropna().round(6).tolist()
    assert len(expected) > 1
    scored = opened.page.locator(".v-word.scored")
    assert scored.count() == len(expected)
    for number, probability in enumerate(expected):
        word = scored.nth(number)
        assert int(word.get_attribute("data-position")) == sample.n_prompt + number
        height = word.evaluate("word => getComputedStyle(word).backgroundSize").split()[1]
        assert float(height.removesuffix("%")) == pytest.approx(100 * probability, abs=1e-3)
        word.hover()
        opened.settle()
        shown = opened.page.locator(".v-words + *").inner_text()
        found = float(shown.split("probability ")[1].split(" ")[0])
        assert found == pytest.approx(probability, abs=1e-3)
    opened.page.locator(f".v-word[data-position='{int(sample.find('yellow')[0])}']").hover()
    opened.settle()
    assert "probability 0" not in opened.page.locator(".v-words + *").inner_text()


def test_heads_are_clicked_dragged_and_added(opened) -> None:
    sample = scene_sample()
    mouse = opened.page.mouse
    mouse.move(*opened.head(1, 2))
    assert opened.state["hover"]["cell"] == {"layer": 1, "head": 2}
    close_to(opened.values(), shown_values(sample, [sample.last], {1: [2]}))
    mouse.click(*opened.head(1, 2))
    assert opened.state["heads"] == [[1, [2]]]
    opened.page.keyboard.down("Shift")
    mouse.click(*opened.head(2, 7))
    opened.page.keyboard.up("Shift")
    assert opened.state["heads"] == [[1, [2]], [2, [7]]]
    mouse.move(*opened.head(0, 1))
    mouse.down()
    mouse.move(*opened.head(1, 3), steps=4)
    mouse.up()
    mouse.move(2, 2)
    assert opened.state["heads"] == [[0, [1, 2, 3]], [1, [1, 2, 3]]]
    exact = shown_values(sample, [sample.last], {0: [1, 2, 3], 1: [1, 2, 3]})
    close_to(opened.values(), exact)
    x, y = opened.head(2, 0)
    mouse.click(x - 30, y)
    assert opened.state["heads"] == [[2, None]]


def test_the_keyboard_steps_words_layers_and_measures(opened) -> None:
    sample = scene_sample()
    press = opened.page.keyboard.press
    press("ArrowRight")
    assert opened.state["pins"] == [sample.n_prompt + 1]
    press("ArrowLeft")
    press("ArrowLeft")
    assert opened.state["pins"] == [sample.n_prompt - 1]
    press("ArrowUp")
    assert opened.state["heads"] == [[2, None]]
    press("r")
    assert opened.state["row"] == "word"
    press("m")
    assert opened.state["measure"] == "lift"
    lift = shown_values(sample, [sample.n_prompt - 1], {2: None}, "lift")
    close_to(opened.values(), lift)
    opened.page.locator("canvas[role=application]").focus()
    press("ArrowRight")
    press("Enter")
    assert opened.state["heads"] == [[2, [1]]]


def test_the_address_holds_the_state(opened, chrome, page_file) -> None:
    opened.page.mouse.click(*opened.head(1, 2))
    opened.click("Lift")
    before = opened.state
    address = opened.page.evaluate("location.hash")
    assert address == (
        f"#sample=0&pins={scene_sample().n_prompt}&row=before&heads=1.2&measure=lift"
    )
    other = Opened(chrome, page_file, address)
    other.page.mouse.move(2, 2)
    again = other.state
    for name in ("pins", "row", "heads", "measure"):
        assert again[name] == before[name]
    other.page.evaluate("location.hash = '#sample=1&heads=0&pins=999&measure=nonsense'")
    other.settle()
    restored = other.state
    assert (restored["sample"], restored["heads"]) == (1, [[0, None]])
    assert restored["measure"] == "probability"
    assert restored["pins"] == [scene_sample(5).n_prompt]


def test_rollout_and_its_ratio(opened) -> None:
    sample = scene_sample()
    table = xi.attention_rollout(sample, [sample.last], baseline="uniform")
    seen = np.isfinite(table["log2_ratio"].to_numpy())
    opened.click("Rollout")
    close_to(opened.values(), np.where(seen, table["rollout"], np.nan))
    opened.click("Rollout lift")
    close_to(opened.values(), np.where(seen, np.exp2(table["log2_ratio"]), np.nan))


def test_a_box_ranks_heads_and_words(opened) -> None:
    sample = scene_sample()
    mouse = opened.page.mouse
    mouse.move(*opened.patch(0.7, 5.7))  # the centres of rows 1 to 3 and columns 6 to 9 are inside
    mouse.down()
    mouse.move(*opened.patch(3.3, 9.3), steps=5)
    mouse.up()
    state = opened.state
    assert state["value"] == "box"
    keys = [
        key
        for key in sample.where("image")
        if 1 <= sample.tokens["row"][key] <= 3 and 6 <= sample.tokens["col"][key] <= 9
    ]
    inside = opened.page.evaluate("document.getElementById('viewer').viewer.boxKeys()")
    assert inside == keys
    probs = sample.probs(3, None, [sample.last])[:, 0].double().numpy()
    expected = probs[:, inside].sum(-1)
    grid = opened.page.evaluate("document.getElementById('viewer').viewer.headGrid")
    bound = ERROR * len(inside) * probs.max(-1)
    assert (np.abs(np.array(grid[3]) - expected) <= bound).all()
    share = opened.page.evaluate("document.getElementById('viewer').viewer.boxShare()")
    assert share == pytest.approx(expected.mean(), abs=ERROR * len(inside) * probs.max())
    opened.page.keyboard.press("Escape")
    assert opened.state["box"] is None
    mouse.click(*opened.patch(0, 0))
    assert opened.page.evaluate("document.getElementById('viewer').viewer.boxKeys()") == [
        int(sample.where("image")[0])
    ]


def test_a_second_sample_and_the_difference(opened) -> None:
    one, two = scene_sample(), scene_sample(5)
    opened.page.get_by_label("compare with").select_option("1")
    opened.settle()
    assert opened.page.locator("figure.v-panel").count() == 3
    first = shown_values(one, [one.last], {3: None})
    second = shown_values(two, [two.last], {3: None})
    largest = max(np.nanmax(first), np.nanmax(second))
    close_to(opened.values(0), first, largest)
    close_to(opened.values(1), second, largest)
    if len(one) == len(two):
        close_to(opened.values(2), second - first, 2 * largest)


def test_uniform_attention_draws_no_structure(chrome, tmp_path) -> None:
    sample = fake(spread=0.0)
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    tokens = sample.tokens.copy()
    tokens.loc[sample.where("image"), ["x0", "y0", "x1", "y1"]] = sample.grids[0].boxes
    sample = sample.changed(images=(Image.fromarray(noise),), tokens=tokens)
    page = Opened(chrome, xi.view(sample, rollout=False).save(tmp_path / "page.html"))
    difference = page.page.evaluate(
        """async () => {
          const { viewer } = document.getElementById("viewer");
          await new Promise((done) => setTimeout(done, 100));
          viewer.draw();
          const [figure] = viewer.figures;
          const read = (canvas) => canvas.getContext("2d").getImageData(
            0, 0, figure.base.width, figure.base.height).data;
          const [drawn, ground] = [read(figure.base), read(viewer.dimmed(figure))];
          const found = [new Set(), new Set(), new Set()];
          drawn.forEach((level, i) => { if (i % 4 < 3) found[i % 4].add(level - ground[i]); });
          const brightest = ground.reduce((most, level, i) =>
            Math.max(most, i % 4 < 3 ? level : 0));
          return [found.map((each) => [...each]), brightest];
        }"""
    )
    levels, brightest = difference
    assert all(len(each) == 1 for each in levels)
    assert min(each[0] for each in levels) > 60
    assert brightest > 80


def test_copied_python_makes_the_same_picture(opened) -> None:
    sample = scene_sample()
    for address, series in (
        (f"#pins={sample.n_prompt}&row=before&heads=2", 0),
        (f"#pins={sample.n_prompt}&row=before&heads=1.2&measure=lift", 0),
        ("#pins=147,149&row=word&heads=0.1,0.4&measure=probability", 0),
        ("#pins=147,149&row=word&heads=3&panels=each", 1),
        (f"#pins={sample.n_prompt}&row=before&heads=0,2.3", 0),
        (f"#pins={sample.n_prompt}&row=before&heads=0,2.3&measure=lift", 0),
        (f"#pins={sample.n_prompt}&row=before&heads=3&measure=rollout", 0),
        (f"#pins={sample.n_prompt}&row=before&heads=3&measure=rollout-lift", 0),
    ):
        opened.page.evaluate(f"location.hash = {json.dumps(address)}")
        opened.settle()
        code = opened.page.evaluate("document.getElementById('viewer').viewer.python()")
        drawn = executed(code, {"samples": [sample, scene_sample(5)]})
        grid = np.ma.filled(panels(drawn)[series].images[1].get_array().astype(float), np.nan)
        if any(each in code for each in ("log2_ratio", 'meaning="ratio"', 'show="lift"')):
            grid = np.exp2(grid)
        values = opened.values(series)[sample.where("image")]
        close_to(values, grid.ravel(), opened.largest())


def test_heads_without_rows_show_their_sums_only(chrome, tmp_path) -> None:
    sample = scene_sample()
    viewed = xi.view(sample, heads="top 3", rollout=False)
    page = Opened(chrome, viewed.save(tmp_path / "page.html"))
    kept = viewed.rows[0].heads
    layer, head = next(
        (layer, head) for layer in range(4) for head in range(8) if (layer, head) not in kept
    )
    page.page.mouse.click(*page.head(layer, head))
    assert page.state["heads"] == [[3, None]]
    share = float(sample.probs(layer, head, [sample.last], sample.where("image")).sum())
    grid = page.page.evaluate("document.getElementById('viewer').viewer.headGrid")
    assert grid[layer][head] == pytest.approx(share, abs=1e-6)
    text = page.page.evaluate("document.getElementById('viewer').viewer.parts.headText.innerText")
    assert text.endswith("its rows are not in this page")
    page.page.mouse.click(*page.head(*kept[0]))
    assert page.state["heads"] == [[kept[0][0], [kept[0][1]]]]


def test_the_matrix_links_words_and_patches(opened) -> None:
    sample = scene_sample()
    at = opened.place("matrix")
    g = opened.page.evaluate("document.getElementById('viewer').viewer.matrixGeometry")
    row = [each["position"] for each in g["words"]].index(sample.n_prompt)
    column = g["keys"].index(int(sample.where("image")[17]))
    x = at["x"] + g["left"] + (column + 0.5) * g["wide"] / len(g["keys"])
    y = at["y"] + g["top"] + (row + 0.5) * g["high"]
    opened.page.mouse.move(x, y)
    hover = opened.state["hover"]
    assert (hover["word"], hover["key"]) == (sample.n_prompt, int(sample.where("image")[17]))
    text = opened.page.evaluate(
        "document.getElementById('viewer').viewer.parts.pictureText.innerText"
    )
    assert text.startswith("row 1, column 5 (x 40 to 48, y 8 to 16 px): probability ")
    opened.page.mouse.click(x, y + g["high"])
    assert opened.state["pins"] == [sample.n_prompt + 1]


def test_sinks_are_left_out_as_in_the_overlay(chrome, tmp_path) -> None:
    layout = "b" + "v" * 12 + "tttttttto"
    call = synthetic.random_call(len(layout))
    call.k[:, :, 5] *= 12
    call.q[:, 2:, :] = call.k[:, 1:, 5:6] / 10  # key 5 is a sink of heads 2 and 3
    sample = fake(layout, 3, 4, call=call)
    tokens = sample.tokens.copy()
    tokens.loc[sample.where("image"), ["x0", "y0", "x1", "y1"]] = sample.grids[0].boxes
    sample = sample.changed(tokens=tokens)
    path = xi.view(sample).save(tmp_path / "page.html")
    last = len(sample) - 1
    page = Opened(chrome, path, f"#pins={last}&row=word&heads=0.1,0.3&sinks=hidden")
    left_out = page.page.evaluate(
        "[...document.getElementById('viewer').viewer.shownSeries[0].left]"
    )
    assert left_out == [5]
    code = page.page.evaluate("document.getElementById('viewer').viewer.python()")
    assert 'hide="sinks"' in code
    grid = np.ma.filled(
        panels(executed(code, {"sample": sample}))[0].images[1].get_array().astype(float), np.nan
    ).ravel()
    values = page.values()[sample.where("image")]
    values[4] = np.nan
    close_to(values, grid, page.largest())
    page.page.locator("input[type=checkbox]").uncheck()
    page.settle()
    shown = page.page.evaluate("document.getElementById('viewer').viewer.shownSeries[0].left.size")
    assert shown == 0


def test_copied_python_of_two_samples_draws_both(opened) -> None:
    samples = [scene_sample(), scene_sample(5)]
    opened.page.get_by_label("compare with").select_option("1")
    opened.settle()
    code = opened.page.evaluate("document.getElementById('viewer').viewer.python()")
    drawn = executed(code, {"samples": samples})
    assert 'columns="sample"' in code
    for series, (axes, sample) in enumerate(zip(panels(drawn)[-2:], samples, strict=True)):
        grid = np.ma.filled(axes.images[1].get_array().astype(float), np.nan)
        values = opened.values(series)[sample.where("image")]
        close_to(values, grid.ravel(), float(sample.probs(3, None, [sample.last]).max()))


def executed(code: str, given: dict) -> Figure:
    """Run copied code and return the value of its last line."""
    *lines, last = code.strip().split("\n")
    names = dict(given)
    exec("\n".join(lines), names)
    return eval(last, names)


def test_the_button_copies_python_and_shows_it(opened) -> None:
    opened.click("Copy Python")
    shown = opened.page.locator("dialog pre").inner_text()
    assert opened.page.evaluate("navigator.clipboard.readText()") == shown
    last = scene_sample().last
    assert shown.strip().split("\n")[-1] == f"figures.overlay(sample, [{last}], 3)"
    opened.click("Close")


def test_csv_holds_all_values(opened) -> None:
    sample = scene_sample()
    with opened.page.expect_download() as waited:
        opened.click("CSV")
    lines = Path(waited.value.path()).read_text().splitlines()
    assert lines[0] == "picture,row,col,value,key,x0,y0,x1,y1"
    assert len(lines) == 145
    values = np.array([float(line.split(",")[3]) for line in lines[1:]])
    exact = shown_values(sample, [sample.last], {3: None})[sample.where("image")]
    largest = float(sample.probs(3, None, [sample.last]).mean(0).max())
    close_to(values, exact, largest)


def test_the_picture_is_copied_as_png(opened) -> None:
    size = opened.page.evaluate(
        """async () => {
          const { viewer } = document.getElementById("viewer");
          await viewer.copyPicture();
          const [item] = await navigator.clipboard.read();
          const blob = await item.getType("image/png");
          const image = await createImageBitmap(blob);
          return [image.width, image.height, viewer.composed().width];
        }"""
    )
    assert size[0] == size[2] > 300
    assert size[1] > 300


def test_hostile_text_is_inert(chrome, tmp_path) -> None:
    sample = fake()
    tokens = sample.tokens.assign(token=HOSTILE)
    hostile = sample.changed(
        tokens=tokens, name=HOSTILE, question=HOSTILE, answer=HOSTILE, text=HOSTILE * 20
    )
    path = xi.view({HOSTILE: hostile, "other": sample}, rollout=False).save(tmp_path / "p.html")
    page = Opened(chrome, path)
    page.click("About")
    page.click("Close")
    page.click("Words")
    assert page.page.locator("img").count() == 0
    assert page.page.locator("script").count() == 3
    assert "<img src=x onerror=alert(1)>" in page.page.locator("h1").first.inner_text()
    assert page.problems == []
    assert [each for each in page.requests if not each.startswith("data:")] == [path.as_uri()]


def test_the_frame_of_a_notebook_works(chrome) -> None:
    sample = scene_sample()
    page = chrome.new_page()
    problems = []
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.set_content(f"<h3>notebook</h3>{xi.view(sample)._repr_html_()}")
    frame = page.locator("iframe").element_handle().content_frame()
    wait_for_viewer(frame)
    word = frame.locator(f".v-word[data-position='{sample.n_prompt + 1}']")
    word.click()
    page.mouse.move(2, 2)
    frame.evaluate(SETTLED)
    assert frame.evaluate(STATE)["pins"] == [sample.n_prompt + 1]
    found = np.array(frame.evaluate(VALUES)[0], dtype=float)
    close_to(found, shown_values(sample, [sample.n_prompt], {3: None}))
    frame.get_by_role("button", name="Copy Python", exact=True).click()
    assert "figures.overlay(sample" in frame.locator("dialog pre").inner_text()
    assert problems == []


def test_a_damaged_page_is_a_clear_error(chrome, page_file, tmp_path) -> None:
    text = page_file.read_text("utf-8")
    start = text.index('id="blocks">') + len('id="blocks">')
    damaged = tmp_path / "damaged.html"
    damaged.write_text(text[:start] + "AAAA" + text[start + 4 :], "utf-8")
    page = chrome.new_page()
    page.goto(damaged.as_uri())
    alert = page.get_by_role("alert")
    alert.wait_for()
    assert alert.inner_text().startswith("This page cannot be shown")
    assert "Save the page again." in alert.inner_text()


def test_frames_of_a_video_and_a_patch_as_query(chrome, tmp_path) -> None:
    sample = xi.capture(vlm_of("qwen2_vl"), [], "what ?", videos=clip(4, 0), max_new_tokens=2)
    first = int(sample.where("video")[0])
    path = xi.view(sample, queries=[first, len(sample) - 1]).save(tmp_path / "video.html")
    page = Opened(chrome, path)
    frames = sample.video_grids[0].frames
    assert page.page.locator("figure.v-panel").count() == frames
    page.page.locator("canvas.v-over").first.dblclick(position={"x": 2, "y": 2})
    assert page.state["pins"] == [first]
    exact = shown_values(sample, [first], {page.state["heads"][0][0]: None})
    close_to(page.values(), exact)
    hidden = np.isnan(page.values()[sample.where("video", frame=frames - 1)])
    assert hidden.all()  # a causal model cannot attend to later frames


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 800, 1280, 2560])
def test_nothing_is_wider_than_the_page(chrome, page_file, scheme, width) -> None:
    context = chrome.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.goto(page_file.as_uri())
    wait_for_viewer(page)
    page.evaluate(SETTLED)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = page.evaluate(
        """() => [...document.querySelectorAll("section, h2, .v-segments, .v-button, canvas")]
          .filter((each) => each.getClientRects().length)
          .filter((each) => each.getBoundingClientRect().right > innerWidth + 0.5)
          .map((each) => each.className || each.tagName)"""
    )
    assert wide == []
    theme = page.evaluate("document.documentElement.dataset.theme")
    assert theme == scheme
    context.close()
