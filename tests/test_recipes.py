"""Recipes, the notebook and the examples of the README run without errors."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
PICTURES = {
    "cross_modal_attention.py": ("--folder", 11),
    "masks_compared.py": ("--folder", 2),
    "cross_attention.py": ("--folder", 2),
    "qwen2_vl_visualizer.py": ("--save-path", 3),
    "vision_attention.py": ("--out", 5),
    "speech_alignment.py": ("--out", 2),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_recipe_writes_its_figures(name: str, tmp_path: Path) -> None:
    option, n_pictures = PICTURES[name]
    target = tmp_path / "layers.png" if option == "--save-path" else tmp_path
    command = [sys.executable, str(ROOT / "recipes" / name), option, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.png"))) == n_pictures


@pytest.mark.parametrize(
    ("name", "n_pictures"),
    [
        ("before_after", 3),
        ("first_steps", 3),
        ("large_data_set", 0),
        ("own_checkpoint", 0),
        ("position_and_sinks", 2),
        ("story", 12),
        ("which_heads_matter", 3),
    ],
)
def test_a_notebook_runs_and_is_committed_with_outputs(
    name: str, n_pictures: int, tmp_path: Path
) -> None:
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == n_pictures
    assert len(outputs) > 3
    for output in outputs:  # no errors, warnings or progress bars
        assert output.output_type in ("display_data", "execute_result", "stream")
        assert output.get("name") != "stderr"
    (tmp_path / "notebooks").mkdir()
    resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
    NotebookClient(notebook, timeout=600, resources=resources).execute()


def test_every_notebook_is_tested() -> None:
    (mark,) = test_a_notebook_runs_and_is_committed_with_outputs.pytestmark
    names = {name for name, _ in mark.args[1]}
    assert names == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert (tmp_path / "layers.png").exists()


def test_the_example_of_a_family_passes_the_doctor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    document = (ROOT / "docs" / "adding-a-family.md").read_text()
    code = document.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(ROOT)
    names: dict = {}
    exec(code, names)
    checkup = names["checkup"]
    assert names["vlm"].family.model_type == names["vlm"].model.config.model_type == "my_vlm"
    assert checkup.ok, checkup
    assert checkup.table["verdict"].eq("pass").all()


def test_the_example_of_an_analysis_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    document = (ROOT / "docs" / "adding-an-analysis.md").read_text()
    monkeypatch.chdir(ROOT)
    names: dict = {"__name__": "peak"}
    for block in document.split("```python\n")[1:3]:
        exec(block.split("```")[0], names)
    table, sample = names["table"], names["sample"]
    assert len(table) == 4 * 8
    rows = sample.find("green cross")
    expected = sample.probs(layer=2, heads=[5], queries=rows)[0].amax(-1).mean()
    assert table.query("layer == 2 and head == 5")["peak"].item() == pytest.approx(
        expected.item(), abs=1e-6
    )
    assert (table["peak"] >= table["null"]).all()
