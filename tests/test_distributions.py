"""The wheel and the source archive hold all files, and the installed wheel runs without a clone."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import xmodal_interp

ROOT = Path(xmodal_interp.__file__).parent.parent
SKIPPED = ("__pycache__",)


def run(*command: str, folder: Path, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(folder: Path, out: Path) -> dict[str, Path]:
    run("-m", "hatchling", "build", "-d", str(out), folder=folder)
    (wheel,), (archive,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return {"wheel": wheel, "archive": archive}


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return {name for name in opened.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    return build(ROOT, tmp_path_factory.mktemp("built"))


def test_the_wheel_holds_every_file_of_the_package(built) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "xmodal_interp").rglob("*")
        if path.is_file() and not {*path.parts} & {*SKIPPED}
    }
    assert names_in(built["wheel"]) == files
    assert "xmodal_interp/py.typed" in files


def test_the_archive_builds_the_same_wheel(built, tmp_path) -> None:
    with tarfile.open(built["archive"]) as opened:
        opened.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    again = build(source, tmp_path / "again")
    assert names_in(again["wheel"]) == names_in(built["wheel"])
    assert (source / "tests" / "test_distributions.py").is_file()


def test_the_installed_wheel_runs(built, tmp_path) -> None:
    """Installed without dependencies, which come from this environment."""
    target = tmp_path / "installed"
    command = ("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(target))
    run(*command, str(built["wheel"]), folder=tmp_path)
    code = (
        "import xmodal_interp as xi; from PIL import Image\n"
        "sample = xi.capture(xi.load(), Image.new('RGB', (96, 96)), 'how many shapes ?')\n"
        "print(xi.__file__, len(xi.cross_modal_ratio(sample)) > 0)"
    )
    path = {"PYTHONPATH": str(target)}
    said = run("-c", code, folder=tmp_path, **path).split()
    assert said == [str(target / "xmodal_interp" / "__init__.py"), "True"]
    shown = run("-m", "xmodal_interp", "families", "llava", folder=tmp_path, **path)
    assert "llava" in shown
