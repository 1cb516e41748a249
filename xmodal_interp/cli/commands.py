"""The command line ``xmodal``: each command calls a public function.

Commands use the public names of the package, which are imported when a command runs. ``--help``
therefore imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

import xmodal_interp as xi
from xmodal_interp.cli.menu import ANALYSES, FIGURES, listing, options_of
from xmodal_interp.cli.printing import (
    Group,
    check_model_name,
    check_output,
    err,
    say,
    show,
    show_answers,
    show_long,
    show_or_write,
    show_store,
)
from xmodal_interp.errors import InputError, counted
from xmodal_interp.vocabulary import SHIPPED

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help=(
        "Record and analyse the attention of a vision-language model.\n\n"
        "Start with `xmodal demo`. Then capture your own model: "
        "`xmodal capture runs/mine --model Qwen/Qwen2-VL-2B-Instruct --image cat.png "
        "--prompt 'Where is the cat?'`, analyse the store: "
        "`xmodal analyze runs/mine cross-modal-ratio`, and draw a figure: "
        "`xmodal plot runs/mine layer-overlays --queries cat --path cat_layers.png`."
    ),
)


def _one_of(offer: tuple[str, ...], metavar: str) -> Any:
    """Return a command argument whose value must be one of the names in ``offer``."""

    def known(name: str) -> str:
        name = name.replace("_", "-")  # the names in Python have underscores
        if name not in offer:
            raise typer.BadParameter(f"must be one of {', '.join(offer)}; got {name!r}.")
        return name

    return typer.Argument(
        help="A name from the list below",
        metavar=metavar,
        callback=known,
        autocompletion=lambda: list(offer),
    )


Folder = Annotated[Path, typer.Argument(help="Folder of a store", metavar="STORE")]
Model = Annotated[str, typer.Option(help=f"Hub id, folder, or shipped model: {', '.join(SHIPPED)}")]
Dtype = Annotated[
    str, typer.Option(help="Dtype of the weights: auto (as stored), float32, bfloat16, float16")
]
DeviceMap = Annotated[
    str | None, typer.Option(help="Passed to from_pretrained, such as auto or cuda")
]


AttnImplementation = Annotated[
    str | None,
    typer.Option(help="Attention backend of the model, such as sdpa, eager or flash_attention_2"),
]
ProcessorOption = Annotated[
    list[str] | None,
    typer.Option(
        help="An option of the image or video processor, such as max_pixels=50176 or "
        "do_pan_and_scan=true; repeat the option for several"
    ),
]
Queries = Annotated[
    str | None,
    typer.Option(
        help="Query tokens: a phrase; a keyword such as `last` (last prompt token), `text` (after "
        "the image), `answer` or `image 1`; or with a prefix: `phrase:last` (the word), `at:last` "
        "(the keyword), `predicts:yes` (the tokens that predict it), `positions:3,5`, `role:user`; "
        "or as in Python: `at.phrase('circle', occurrence=1)`"
    ),
]
Table = Annotated[
    Path | None, typer.Option("--path", help="File for the table: .csv, .parquet or .json")
]
Rows = Annotated[int, typer.Option(min=1, help="Number of rows to print")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing files")]


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Output folder")] = Path("xmodal_demo"),
    scenes: Annotated[int, typer.Option(min=20, help="Number of held-out scenes")] = 200,
    force: Force = False,
) -> None:
    """Run the demo on the shipped model: write a store, tables, pictures and a report.

    It takes about a minute on two cores, offline.
    """
    findings = xi.demo.run_demo(folder, n_scenes=scenes, force=force)
    for line in findings.lines:
        say(f"• {line}")
    say(f"\nAll files are in {folder}; start with {folder / 'report.html'}.")


@app.command()
def capture(
    store: Annotated[
        Path, typer.Argument(help="Folder of a new or an existing store", metavar="STORE")
    ],
    model: Model = "llava",
    image: Annotated[
        list[str] | None,
        typer.Option(help="Path or URL of an image; repeat the option for several images"),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="The question about the image; with --items, of all items without one"),
    ] = None,
    answer: Annotated[
        str | None,
        typer.Option(help="An answer to run the model on, instead of generating one"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the sample in the store")] = None,
    items: Annotated[
        Path | None,
        typer.Option(
            help="A file (.jsonl, .json, .csv, .tsv, .parquet) or a folder of items with image, "
            "prompt, ..., or with messages or conversations, or COCO captions"
        ),
    ] = None,
    image_folder: Annotated[
        Path | None,
        typer.Option(help="Where relative paths of --items start; default: the folder of the file"),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message")] = None,
    given_answers: Annotated[
        bool,
        typer.Option(
            "--given-answers", help="Run the model on the answers of the items; generate none"
        ),
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="Number of tokens to generate; default: 20, or 0 for a vision model or given "
            "answers"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of samples per batch")] = 1,
    layers: Annotated[
        list[int] | None,
        typer.Option(help="A layer to keep, -1 is the last; repeat the option; default: all"),
    ] = None,
    text_rows: Annotated[
        bool,
        typer.Option("--text-rows", help="Keep only query rows of text after the image"),
    ] = False,
    probabilities: Annotated[
        bool,
        typer.Option(
            "--probabilities", help="Keep dense float16 probabilities instead of queries and keys"
        ),
    ] = False,
    statistics: Annotated[
        list[str] | None,
        typer.Option(
            help="A statistic to keep instead of queries and keys (`mass`, `entropy` or "
            "`received`); repeat the option for several"
        ),
    ] = None,
    norms: Annotated[
        bool,
        typer.Option(
            "--norms", help="Keep the norm of each token, and the share of attention in its update"
        ),
    ] = False,
    on_error: Annotated[
        str, typer.Option(help="Items that cannot be captured: `raise` stops, `skip` lists them")
    ] = "raise",
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    attn_implementation: AttnImplementation = None,
    processor_option: ProcessorOption = None,
) -> None:
    """Run a model on images and questions, and write its attention to a store.

    Prints the model's answers. Run it again with the same store and settings to capture only the
    missing samples.
    """
    vlm = _loaded(model, dtype, device_map, attn_implementation, processor_option)
    given_answers = given_answers or answer is not None
    if max_new_tokens is None:
        max_new_tokens = 20 if vlm.family.language and not given_answers else 0
    if prompt is None and not vlm.family.language:
        prompt = ""
    asked = _asked(items, image, prompt, name, answer, image_folder)
    written = xi.capture_dataset(
        vlm,
        asked,
        store,
        max_new_tokens=max_new_tokens,
        given_answers=given_answers,
        batch_size=batch_size,
        system=system,
        on_error=cast("Any", on_error),  # checked there
        keep=xi.Keep(
            layers=None if not layers else tuple(layers),
            queries="text" if text_rows else "all",
            probabilities=probabilities,
            norms=norms,
            statistics=tuple(statistics or ()),
        ),
    )
    show_store(written)
    show_answers(written, [name] if items is None and name is not None else written.names)


@app.command(cls=listing("Analyses", "analysis", ANALYSES, ("queries",)))
def analyze(
    store: Folder,
    name: Annotated[str, _one_of(ANALYSES, "ANALYSIS")],
    path: Table = None,
    queries: Queries = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Number of processes that read the samples")
    ] = 1,
    rows: Rows = 20,
    force: Force = False,
) -> None:
    """Run one analysis on all samples of a store; print the table or write it to a file."""
    if path is not None:
        check_output(path, force=force)
    analysis, options = options_of("analysis", name, {"queries": _selector(queries)})
    show_or_write(analysis(xi.open_store(store), **options, workers=workers), path, rows)


@app.command()
def pointing(
    store: Folder,
    boxes: Annotated[
        str, typer.Option(help="Label of each sample that holds the box of the object, in pixels")
    ] = "box",
    queries: Queries = None,
    criterion: Annotated[
        str | None, typer.Option(help="A patch counts if it overlaps the box, or its centre is in")
    ] = None,
    path: Table = None,
    rows: Rows = 20,
    force: Force = False,
) -> None:
    """Print how often each head attends most to the labelled object (the pointing game)."""
    if path is not None:
        check_output(path, force=force)
    given = {"queries": _selector(queries), "criterion": criterion}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    table = xi.evaluation.pointing_game(xi.open_store(store), boxes, **options)
    show_or_write(table, path, rows)


@app.command()
def pruning(
    items: Annotated[
        Path, typer.Argument(help="A file or a folder of items with image, prompt and answer")
    ],
    model: Model = "llava",
    mode: Annotated[
        str, typer.Option(help="How a head is removed: uniform, zero or mean")
    ] = "uniform",
    layers: Annotated[
        list[int] | None,
        typer.Option(
            help="A layer whose heads are removed, -1 is the last; repeat the option; default: all"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of questions per forward")] = 32,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    attn_implementation: AttnImplementation = None,
    path: Table = None,
    rows: Rows = 20,
    force: Force = False,
) -> None:
    """Print how much the scores of known answers drop without each head."""
    if path is not None:
        check_output(path, force=force)
    asked = xi.read_items(items)
    table = xi.head_pruning(
        _loaded(model, dtype, device_map, attn_implementation),
        asked,
        mode=cast("Any", mode),  # checked there
        layers=layers or None,
        batch_size=batch_size,
    )
    show_or_write(table, path, rows)


@app.command(cls=listing("Figures", "figures", FIGURES, ("queries", "layer", "head")))
def plot(
    store: Folder,
    name: Annotated[str, _one_of(FIGURES, "FIGURE")],
    path: Annotated[Path, typer.Option(help="Output file: .png, .pdf or .svg")],
    sample: Annotated[str, typer.Option(help="Name or number of the sample")] = "0",
    queries: Queries = None,
    layer: Annotated[
        int | None,
        typer.Option(help="Layer; -1 is the last; default: that of the figure, usually the last"),
    ] = None,
    head: Annotated[int | None, typer.Option(help="Head; default: the mean of all heads")] = None,
    force: Force = False,
) -> None:
    """Draw one figure of one sample."""
    check_output(path, force=force)
    given = {"queries": _selector(queries), "layer": layer, "head": head}
    figure, options = options_of("figures", name, given)
    chosen = _sample(xi.open_store(store), sample)
    figure(chosen, **options, path=path)
    say(f"{chosen.name}: {chosen.question!r} -> {chosen.answer!r}; written to {path}")


@app.command()
def view(
    store: Folder,
    export: Annotated[
        Path | None,
        typer.Option(help="Write one HTML file that needs no server and no network, and stop"),
    ] = None,
    sample: Annotated[
        list[str] | None,
        typer.Option(help="Name or number of a sample; repeat the option; default: the first ones"),
    ] = None,
    layers: Annotated[
        list[int] | None,
        typer.Option(help="A layer to show; repeat the option for several; default: all"),
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(help="Query tokens: a phrase, `last` or `text`; default: all words"),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help="`all`, `top 64` or a number; default: all that fit in 16 MiB"),
    ] = None,
    tower: Annotated[str | None, typer.Option(help="`language` or `vision`")] = None,
    port: Annotated[int, typer.Option(help="Port of the server; default: a free one")] = 0,
    force: Force = False,
) -> None:
    """Show an interactive page of a store's samples: pictures, words, layers and heads.

    The page is served on 127.0.0.1, and rows are computed when they are looked at. With --export
    it is one file, with all rows inside.
    """
    if export is not None:
        check_output(export, force=force, option="--export")
    opened = xi.open_store(store)
    names = [_sample(opened, which).name for which in sample] if sample else None
    options: dict[str, Any] = {
        "layers": layers or None,
        "queries": queries,
        "heads": int(heads) if heads is not None and heads.isdigit() else heads,
        "tower": tower,
    }
    if export is None:
        shown = opened if names is None else opened[names]
        with xi.viewer.serve(shown, port=port, **options) as server:
            say(f"{server.url} shows {counted(len(shown), 'sample')}; Ctrl-C stops the server")
            server.wait()
        return
    page = xi.view(opened, names=names, **options)
    given = counted(page.n_given, "sample")
    say(f"{len(page.rows)} of {given}, {page.n_bytes / 1e6:.1f} MB of values")
    page.save(export)
    say(f"{export.stat().st_size / 1e6:.1f} MB written to {export}; open it in a browser")


@app.command()
def report(
    store: Folder,
    path: Annotated[Path, typer.Option(help="Output file: .html")] = Path("report.html"),
    samples: Annotated[
        list[str] | None,
        typer.Option(
            help="Name or number of a sample; repeat the option for several; default: all, or "
            "--max-samples that are evenly spaced"
        ),
    ] = None,
    max_samples: Annotated[int, typer.Option(min=1, help="Largest number of samples to use")] = 32,
    doctor: Annotated[
        bool,
        typer.Option("--doctor", help="Load the model of the store and add the doctor's verdict"),
    ] = False,
    force: Force = False,
) -> None:
    """Write a report of a store: one HTML file that can be mailed.

    It has what was captured, every analysis that applies with figure, null and interval, and the
    provenance.
    """
    check_output(path, force=force)
    opened = xi.open_store(store)
    chosen = [_sample(opened, each, "--samples").name for each in samples or ()]
    checkup = None
    if doctor and len(opened):
        about = opened[0].provenance
        model = str(about.get("model") or "")
        options = [f"{k}={json.dumps(v)}" for k, v in about.get("processor_options", {}).items()]
        dtype = str(about.get("dtype") or "auto")
        checkup = xi.doctor(_loaded(model, dtype, None, about.get("backend"), options))
    written = xi.report(
        opened,
        path,
        names=chosen or None,
        max_samples=max_samples,
        checkup=checkup,
        force=force,
    )
    for line in written.sentences:
        say(f"• {line}")
    n_bytes = written.path.stat().st_size
    say(f"\nWritten to {path} ({n_bytes / 1e6:.1f} MB, {counted(len(written.names), 'sample')}).")


@app.command()
def info(
    what: Annotated[
        str,
        typer.Argument(help="Folder of a store, folder or Hub id of a model, or a shipped model"),
    ],
) -> None:
    """Print the settings of a store, or the attention layers of a model."""
    import pandas as pd

    from xmodal_interp.arguments import user_path
    from xmodal_interp.upstream import attention_backend

    folder = user_path(what)
    if (folder / "manifest.json").exists():
        show_store(xi.open_store(what))
        return
    if what not in SHIPPED:
        check_model_name(what, folder)
    vlm = xi.load(what)
    modules = xi.hooks.attention_modules(vlm.model).values()
    rows = pd.DataFrame([(i.tower, i.kind, i.layer, i.module) for i in modules])
    rows.columns = pd.Index(["tower", "kind", "layer", "module"])
    groups = rows.groupby(["tower", "kind"], sort=False)
    table = groups.agg(layers=("layer", "nunique"), first=("module", "first")).reset_index()
    config = vlm.model.config
    n_weights = sum(weight.numel() for weight in vlm.model.parameters())
    say(
        f"{vlm.name}: {type(vlm.model).__name__}, {n_weights / 1e6:.1f}M weights, "
        f"{attention_backend(config)}, geometry {vlm.family.rule}"
    )
    show(table)


@app.command()
def check(store: Folder) -> None:
    """Verify all checksums of a store; exit code 1 if a file is damaged or missing."""
    table = xi.check_store(store)
    bad = table[~table["ok"]]
    if len(bad):
        show(bad)
        say(f"{len(bad)} of {len(table)} files are damaged or missing", to=err)
        raise typer.Exit(1)
    say(f"{len(table)} files, none damaged or missing")


@app.command()
def doctor(
    name: Annotated[
        str, typer.Argument(help=f"Hub id, folder, or shipped model: {', '.join(SHIPPED)}")
    ] = "llava",
    image: Annotated[
        str | None, typer.Argument(help="Path or URL of an image; default: a generated one")
    ] = None,
    prompt: Annotated[
        str | None, typer.Argument(help="A question; default: What is in the image?")
    ] = None,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    attn_implementation: AttnImplementation = None,
    processor_option: ProcessorOption = None,
) -> None:
    """Check whether recordings of a model's attention can be trusted; exit code 1 if not.

    Checks that the number of image tokens is as predicted, that recording changes neither outputs
    nor generated tokens, that every layer is recorded, that the probabilities are those of the
    model, and that hiding a key changes the output. Prints the measured value and the limit of each
    check, then the errors of each layer.

    Example: `xmodal doctor Qwen/Qwen2-VL-2B-Instruct cat.png "Where is it?"`
    """
    vlm = _loaded(name, dtype, device_map, attn_implementation, processor_option)
    checkup = xi.doctor(vlm, image, prompt)
    show(checkup.table)
    if len(checkup.layers):
        show_long(checkup.layers, len(checkup.layers))
    verdict = "PASS" if checkup.ok else "FAIL"
    say(verdict, checkup.summary, style="bold")
    if not checkup.ok:
        raise typer.Exit(1)


@app.command()
def families(
    words: Annotated[
        list[str] | None,
        typer.Argument(help="List only the types whose name, layers or rule contain these words"),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as a Markdown page")
    ] = False,
) -> None:
    """List all known model types: layers, largest error of probabilities, rule for image tokens.

    Measured on tiny models; `xmodal doctor NAME` measures your own model.
    """
    from xmodal_interp.models import support

    if markdown:
        if words:
            raise InputError("--markdown prints all types; leave out the words.")
        typer.echo(support.markdown(), nl=False)
        return
    table = support.families()
    shown = table[["model_type", "layers", "worst_error", "geometry"]]
    searched = shown.astype(str).agg(" ".join, axis=1).str.lower()
    for word in words or ():
        shown = shown[searched[shown.index].str.contains(word.lower(), regex=False)]
    if shown.empty:
        raise InputError(
            f"No known model type has {' and '.join(map(repr, words or ()))} in its name, layers "
            "or rule. xmodal families lists all."
        )
    show(shown)
    made = ", ".join(f"{library} {version}" for library, version in table.attrs.items())
    say(f"{len(shown)} of {len(table)} types, measured with {made}; --markdown prints all columns")


def _selector(given: str | None) -> Any:
    """Return the selector that an option means; None if it was not passed."""
    return None if given is None else xi.at.parse(given)


def _loaded(
    name: str,
    dtype: str,
    device_map: str | None,
    attn_implementation: str | None,
    processor_options: list[str] | None = None,
) -> xi.VLM:
    options: dict[str, Any] = {}
    if dtype != "auto" or name not in SHIPPED:  # shipped: stored in float16, run in float32
        options["dtype"] = dtype
    if device_map is not None:
        options["device_map"] = device_map
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    return xi.load(name, processor_options=_named_values(processor_options or []), **options)


def _named_values(written: list[str]) -> dict[str, Any]:
    """Return options that are written as ``name=value``; a value is JSON, or else a string."""
    options: dict[str, Any] = {}
    for each in written:
        name, equals, value = each.partition("=")
        if not (name and equals):
            raise InputError(f"--processor-option must be name=value; got {each!r}.")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _asked(
    items: Path | None,
    images: list[str] | None,
    prompt: str | None,
    name: str | None,
    answer: str | None,
    image_folder: Path | None,
) -> list[dict[str, Any]]:
    """Return the items of a file, or the single item given by the options."""
    if items is not None:
        if images or name is not None or answer is not None:
            raise InputError("--items cannot be combined with --image, --name or --answer.")
        return xi.read_items(items, prompt=prompt or None, image_folder=image_folder)
    if image_folder is not None:
        raise InputError("--image-folder requires --items.")
    if not images or prompt is None:
        raise InputError("Nothing to capture: pass --image with --prompt, or --items.")
    return [{"image": list(images), "prompt": prompt, "name": name, "answer": answer}]


def _sample(store: xi.Store, which: str, option: str = "--sample") -> xi.Sample:
    if which in store.names:
        return store[which]
    if not which.lstrip("-").isdigit() or not -len(store) <= int(which) < len(store):
        shown = ", ".join(store.names[:5]) + (", ..." if len(store) > 5 else "")
        raise InputError(
            f"{option} must be a number from 0 to {len(store) - 1} or a name ({shown}); got "
            f"{which!r}."
        )
    return store[int(which)]


if __name__ == "__main__":
    sys.exit(app())
