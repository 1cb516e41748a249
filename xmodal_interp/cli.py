"""``xmodal``: the same functions from the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from xmodal_interp import analysis, figures
from xmodal_interp.capturing import Keep
from xmodal_interp.dataset import capture_dataset
from xmodal_interp.demo import run_demo
from xmodal_interp.errors import InputError
from xmodal_interp.hooks import attention_modules
from xmodal_interp.hooks import doctor as checked
from xmodal_interp.items import read_items
from xmodal_interp.models import SHIPPED, load, support
from xmodal_interp.printing import Group, err, out, show, show_long, show_store, write
from xmodal_interp.sample import Sample
from xmodal_interp.store import Store, check_store, open_store

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help=(
        "How does a vision-language model look at an image?\n\n"
        "Start with `xmodal demo`. Then capture a model of your own: "
        "`xmodal capture runs/mine --model Qwen/Qwen2-VL-2B-Instruct --image cat.png "
        "--prompt 'Where is the cat?'`, ask a question of the store: "
        "`xmodal analyze runs/mine cross-modal-ratio`, and look: "
        "`xmodal plot runs/mine layer-overlays --queries cat --path cat_layers.png`."
    ),
)

Folder = Annotated[Path, typer.Argument(help="The folder of a store")]
Model = Annotated[str, typer.Option(help=f"Hub id, folder, or shipped: {', '.join(SHIPPED)}")]

ANALYSES: dict[str, Callable[..., pd.DataFrame]] = {
    "cross-modal-ratio": analysis.cross_modal_ratio,
    "token-ratio": analysis.token_ratio,
    "block-statistics": analysis.block_statistics,
    "cross-modal-summary": analysis.cross_modal_summary,
    "attention-allocation": analysis.attention_allocation,
    "attention-rollout": analysis.attention_rollout,
    "positional-bias": analysis.positional_bias,
    "recency-index": analysis.recency_index,
    "attention-sinks": analysis.attention_sinks,
    "sink-rate": analysis.sink_rate,
    "raster-bias": analysis.raster_bias,
    "raster-profile": analysis.raster_profile,
    "attention-entropy": analysis.attention_entropy,
    "attention-distance": analysis.attention_distance,
}
AnalysisName = StrEnum("AnalysisName", {name: name for name in ANALYSES})  # type: ignore[misc]

PLOTS: dict[str, Callable[..., Any]] = {
    "overlay": figures.overlay,
    "overlays": figures.overlays,
    "head-overlays": figures.head_overlays,
    "layer-overlays": figures.layer_overlays,
    "token-head-grid": figures.token_head_grid,
    "attention-matrix": figures.attention_matrix,
    "token-patch-matrix": figures.token_patch_matrix,
    "mask-structure": figures.mask_structure,
}
PlotName = StrEnum("PlotName", {name: name for name in PLOTS})  # type: ignore[misc]
_WITHOUT_LAYER = {"layer-overlays"}
_WITH_QUERIES = {"overlay", "overlays", "head-overlays", "layer-overlays", "token-head-grid"}


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where everything goes")] = Path("xmodal_demo"),
    scenes: Annotated[int, typer.Option(min=20, help="Held-out scenes")] = 200,
) -> None:
    """Run the whole story on the shipped model: store, tables, pictures, one report.

    It takes about a minute on two cores and needs no network.
    """
    findings = run_demo(folder, n_scenes=scenes)
    for line in findings.lines:
        out.print(f"• {line}", highlight=False, soft_wrap=True)
    out.print(f"\nEverything is in [bold]{folder}[/]; begin with {folder / 'report.html'}.")


@app.command()
def capture(
    store: Annotated[Path, typer.Argument(help="The store to write, or to go on with")],
    model: Model = "llava",
    image: Annotated[list[Path] | None, typer.Option(help="An image; again for more")] = None,
    prompt: Annotated[str | None, typer.Option(help="The question about it")] = None,
    items: Annotated[
        Path | None, typer.Option(help="A CSV or JSONL file with columns image, prompt, ...")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at once")] = 1,
    layers: Annotated[list[int] | None, typer.Option(help="Layers to keep; all if none")] = None,
    text_rows: Annotated[bool, typer.Option("--text-rows", help="Keep text queries only")] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Keep dense float16 probabilities, not Q and K")
    ] = False,
    dtype: Annotated[str, typer.Option(help="Weights: auto, float32, bfloat16, float16")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="For accelerate, such as auto")] = None,
) -> None:
    """Run a model on images and questions, and keep its attention in a store.

    Call it again with the same store and settings: only what is missing is captured.
    """
    if items is not None:
        todo = read_items(items)
    elif image and prompt is not None:
        todo = [{"image": [str(path) for path in image], "prompt": prompt}]
    else:
        raise InputError("There must be something to capture: --image with --prompt, or --items.")
    options: dict[str, Any] = {} if model in SHIPPED else {"dtype": dtype}
    if device_map is not None:
        options["device_map"] = device_map
    keep = Keep(
        layers=None if not layers else tuple(layers),
        queries="text" if text_rows else "all",
        probabilities=probabilities,
    )
    written = capture_dataset(
        load(model, **options),
        todo,
        store,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        keep=keep,
    )
    show_store(written)


@app.command()
def analyze(
    store: Folder,
    name: Annotated[AnalysisName, typer.Argument(help="Which analysis")],
    path: Annotated[
        Path | None, typer.Option(help="Write the table here: .csv, .parquet or .json")
    ] = None,
    queries: Annotated[str | None, typer.Option(help="A phrase of the text, or last")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to print")] = 20,
) -> None:
    """Ask one question of every sample of a store; print the table, or write it."""
    options = {} if queries is None else {"queries": queries}
    try:
        table = ANALYSES[name](open_store(store), **options)
    except TypeError:
        if not options:
            raise
        raise InputError(f"{name} takes no --queries.") from None
    if path is None:
        show_long(table, rows)
    else:
        write(table, path)
        out.print(f"{len(table)} rows written to {path}")


@app.command()
def plot(
    store: Folder,
    name: Annotated[PlotName, typer.Argument(help="Which figure")],
    path: Annotated[Path, typer.Option(help="Where to write it: .png, .pdf, .svg")],
    sample: Annotated[str, typer.Option(help="Name or number of the sample")] = "0",
    queries: Annotated[str | None, typer.Option(help="A phrase of the question or answer")] = None,
    layer: Annotated[int, typer.Option(help="Layer; negative counts from the last")] = -1,
    head: Annotated[int | None, typer.Option(help="Head; the mean of all if not given")] = None,
) -> None:
    """Draw one figure of one sample."""
    chosen = _sample(open_store(store), sample)
    options: dict[str, Any] = {} if name in _WITHOUT_LAYER else {"layer": layer}
    if head is not None and name not in {"head-overlays", "token-head-grid", "mask-structure"}:
        options["head"] = head
    if name in _WITH_QUERIES:
        if queries is None and name not in {"overlays", "token-head-grid"}:
            raise InputError(f"{name} shows where a phrase looks: give it with --queries.")
        options["queries"] = queries
    elif queries is not None:
        raise InputError(f"{name} takes no --queries.")
    PLOTS[name](chosen, **options, path=path)
    out.print(f"{chosen.name}: {chosen.question!r} -> {chosen.answer!r}; written to {path}")


@app.command()
def info(
    what: Annotated[str, typer.Argument(help="A store, a model's folder or Hub id, or shipped")],
) -> None:
    """Tell what a store holds, or what attention a model has."""
    if (Path(what) / "manifest.json").exists():
        show_store(open_store(what))
        return
    vlm = load(what)
    modules = attention_modules(vlm.model).values()
    rows = pd.DataFrame([(i.tower, i.kind, i.layer, i.module) for i in modules])
    rows.columns = pd.Index(["tower", "kind", "layer", "module"])
    groups = rows.groupby(["tower", "kind"], sort=False)
    table = groups.agg(layers=("layer", "nunique"), first=("module", "first")).reset_index()
    config = vlm.model.config
    n_weights = sum(weight.numel() for weight in vlm.model.parameters())
    out.print(
        f"{vlm.name}: {type(vlm.model).__name__}, {n_weights / 1e6:.1f}M weights, "
        f"{config._attn_implementation}, geometry {vlm.family.rule}",
        highlight=False,
    )
    show(table)


@app.command()
def check(store: Folder) -> None:
    """Verify every checksum of a store; exit code 1 if anything is damaged or missing."""
    table = check_store(store)
    bad = table[~table["ok"]]
    if len(bad):
        show(bad)
        err.print(f"{len(bad)} of {len(table)} files are damaged or missing")
        raise typer.Exit(1)
    out.print(f"{len(table)} files, all as they were written")


@app.command()
def doctor(
    name: Annotated[
        str, typer.Argument(help=f"Hub id, folder, or shipped: {', '.join(SHIPPED)}")
    ] = "llava",
    image: Annotated[Path | None, typer.Argument(help="An image; a plain one if none")] = None,
    prompt: Annotated[str, typer.Argument(help="A question")] = "What is in the image?",
    dtype: Annotated[str, typer.Option(help="Weights: auto, float32, bfloat16, float16")] = "auto",
    device_map: Annotated[str | None, typer.Option(help="For accelerate, such as auto")] = None,
) -> None:
    """Check that a model's attention can be trusted as it is recorded; exit code 1 if not.

    Are there as many image tokens as predicted, do outputs and generated tokens stay the same, is
    every layer heard, are the probabilities those of the model, does the tap sit where the model
    reads? Each check shows what was measured and what passes; then each layer, with its errors.

    Try it on your own picture: `xmodal doctor Qwen/Qwen2-VL-2B-Instruct cat.png "Where is it?"`
    """
    options: dict[str, Any] = {} if name in SHIPPED else {"dtype": dtype}
    if device_map is not None:
        options["device_map"] = device_map
    checkup = checked(load(name, **options), image, prompt)
    show(checkup.table)
    if len(checkup.layers):
        show(checkup.layers)
    out.print(
        f"[bold]{'PASS' if checkup.ok else 'FAIL'}[/] {checkup.summary}",
        highlight=False,
        soft_wrap=True,
    )
    if not checkup.ok:
        raise typer.Exit(1)


@app.command()
def families(
    markdown: Annotated[bool, typer.Option("--markdown", help="As a page of docs")] = False,
) -> None:
    """List every model type: layers by tower, exactness, where image tokens stand, processor.

    Measured on tiny models; `xmodal doctor NAME` tells it of a model of your own.
    """
    if markdown:
        typer.echo(support.markdown(), nl=False)
        return
    table = support.families()
    show(table[["model_type", "layers", "worst_error", "geometry"]])
    made = ", ".join(f"{library} {version}" for library, version in table.attrs.items())
    out.print(f"{len(table)} types, measured with {made}; more: --markdown", highlight=False)


def _sample(store: Store, which: str) -> Sample:
    if which in store.names:
        return store[which]
    if not which.lstrip("-").isdigit() or not -len(store) <= int(which) < len(store):
        shown = ", ".join(store.names[:5]) + (", ..." if len(store) > 5 else "")
        raise InputError(
            f"--sample must be a name or a number from 0 to {len(store) - 1}; got {which!r}. "
            f"Names are {shown}."
        )
    return store[int(which)]


if __name__ == "__main__":
    sys.exit(app())
