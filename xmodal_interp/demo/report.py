"""Report of the demo: ``report.html``, and the same content as ``report.md``."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from PIL import Image

from xmodal_interp.demo.pictures import Captioned
from xmodal_interp.models import VLM
from xmodal_interp.printable import markdown_escaped, printable

_SHOWN = ("accuracy", "best_head", "best_head_untrained", "ratio")


def write_report(
    folder: Path,
    vlm: VLM,
    tables: dict[str, pd.DataFrame],
    pictures: list[Captioned],
    lines: list[str],
) -> None:
    """Write both pages to ``folder``; links to pictures and tables are relative to it."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_template),
        autoescape=True,
        trim_blocks=True,
        finalize=lambda value: printable(value) if isinstance(value, str) else value,
    )
    content = {
        "model": vlm.name.rsplit("/", 1)[-1],
        "model_class": type(vlm.model).__name__,
        "n_weights": sum(weight.numel() for weight in vlm.model.parameters()),
        "n_asked": int(tables["accuracy"]["n"].sum()),
        "lines": lines,
        "pictures": [
            (p.path.relative_to(folder).as_posix(), p.title, p.caption, _inches(p.path))
            for p in pictures
        ],
        "tables": {name: _rounded(tables[name]) for name in _SHOWN},
        "files": sorted(tables),
    }
    (folder / "report.html").write_text(environment.get_template("report.html").render(content))
    plain = jinja2.Environment(loader=jinja2.FunctionLoader(_template), trim_blocks=True)
    plain.filters["md"] = lambda value: markdown_escaped(str(value))
    (folder / "report.md").write_text(plain.get_template("report.md").render(content))


def _template(name: str) -> str:
    return (files("xmodal_interp.demo") / f"{name}.jinja").read_text()


def _inches(path: Path) -> float:
    """Return the drawn width of a picture, so that all pictures have one text size on the page."""
    with Image.open(path) as image:
        return round(float(image.width / image.info["dpi"][0]), 2)


def _rounded(table: pd.DataFrame) -> dict[str, Any]:
    rows = [
        [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row]
        for row in table.itertuples(index=False)
    ]
    return {"columns": [str(column) for column in table.columns], "rows": rows}
