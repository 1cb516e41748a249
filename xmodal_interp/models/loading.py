"""Load a model by name: a Hub id, a folder, or a tiny model shipped with the package."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from importlib.resources import files
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.utils import logging

from xmodal_interp.arguments import user_path
from xmodal_interp.contexts import Block
from xmodal_interp.errors import InputError, UnsupportedModelError, quoted
from xmodal_interp.models.model_state import CheckpointReport
from xmodal_interp.models.processor_options import checked_options, with_options
from xmodal_interp.models.records import family_of
from xmodal_interp.models.vlm import VLM
from xmodal_interp.vocabulary import SHIPPED

_LONGEST_NAME = 4096  # maximal length of a path in bytes
_UNREADABLE = (OSError, RuntimeError, SafetensorError, EOFError, UnpicklingError)


def load(
    name: str | Path | None = None,
    *,
    processor_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> VLM:
    """Load a vision-language model, or a vision model, and its processor.

    A warning names weights that the checkpoint lacks, that have another shape in it, or that the
    model does not use. They are also in the attribute ``loading`` of the result.

    Args:
        name: A Hub id, a folder, or ``"llava"`` or ``"qwen2_vl"`` for a tiny trained model shipped
            with the package. The default is the shipped LLaVA. Shipped models load offline.
        processor_options: Options of the image and video processor that replace the checkpoint's,
            such as ``{"max_pixels": 50176}`` or ``{"do_pan_and_scan": True}``.
        **options: Arguments of ``from_pretrained``, such as ``dtype="auto"``,
            ``device_map="auto"``, ``attn_implementation=...`` or ``revision=...``.

    Raises:
        InputError: There is no such model, it cannot be loaded with these options, or the processor
            has no such option.
        UnsupportedModelError: The model type has no family record, is text-only, or is that of a
            vision model without one position per patch.
    """
    source = _source(name)
    shared: dict[str, Any] = {
        key: options[key]
        for key in ("revision", "trust_remote_code", "token", "cache_dir")
        if key in options
    }
    config = _config(source, shared)
    family = family_of(config)
    shipped = name is None or str(name) in SHIPPED
    if shipped:
        options.setdefault("dtype", "float32")  # trained in float32, stored in float16
    _check_dtype(options.get("dtype"))
    auto = AutoProcessor if family.language else AutoImageProcessor
    processor = _processor(source, shared, name, auto)
    with_options(processor, checked_options(processor_options))  # wrong ones, before the weights
    with Block(_without_progress_bar) if shipped else nullcontext():
        class_ = AutoModelForImageTextToText if family.language else _own_class(config)
        model, loading = _model(source, options, class_)
    if loading:
        warnings.warn(
            f"The checkpoint {source!r} does not match {type(model).__name__}. Weights {loading}."
            + " Results of random weights are meaningless; load a complete checkpoint."
            * bool(loading.n_random),
            UserWarning,
            stacklevel=2,
        )
    return VLM(model.eval(), processor, family, loading, processor_options)


def shipped_path(family: str) -> Path:
    """Return the folder of a shipped checkpoint."""
    return Path(str(files("xmodal_interp") / "shapes" / "checkpoints" / family))


def _source(name: Any) -> str:
    """Return the Hub id or the folder of a model.

    Raises:
        InputError: The name is not a usable string or path, or the folder holds only an adapter.
    """
    if name is not None and not isinstance(name, (str, PathLike)):
        raise InputError(f"The name of a model must be a string or a path; got {quoted(name)}.")
    if name is None or str(name) in SHIPPED:
        return str(shipped_path(str(name or "llava")))
    source = str(user_path(name)) if str(name).startswith("~") else str(name)
    if len(source.encode(errors="replace")) > _LONGEST_NAME or "\0" in source:
        raise InputError(
            f"The model name {quoted(source)} is not a valid path. Give a Hub id or a folder."
        )
    adapter = Path(source) / "adapter_config.json"
    if adapter.is_file() and not adapter.with_name("config.json").is_file():
        raise InputError(
            f"{source!r} holds only a PEFT adapter, not a whole model. Load its base model "
            "and pass VLM(PeftModel.from_pretrained(base.model, folder), base.processor)."
        )
    return source


def _config(source: str, shared: dict[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(source, **shared)
    except OSError as error:
        raise InputError(
            f"{source!r} could not be loaded: {_first_line(error).rstrip('.')}. "
            f"Give a folder, a Hub id, or one of the shipped models {', '.join(SHIPPED)}."
        ) from error
    except ValueError as error:
        raise UnsupportedModelError(
            f"transformers does not support the model type of {source!r}: {error}"
        ) from error


def _own_class(config: Any) -> Any:
    """Return the class of transformers that a checkpoint of a vision model names."""
    named = (getattr(transformers, name, None) for name in config.architectures or ())
    return next((class_ for class_ in named if class_ is not None), AutoModel)


def _model(source: str, options: dict[str, Any], class_: Any) -> tuple[Any, CheckpointReport]:
    try:
        loaded: Any = class_.from_pretrained(source, **{**options, "output_loading_info": True})
    except _UNREADABLE as error:  # missing, truncated or mismatched weights, unknown device
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise InputError(
            f"The weights of {source!r} could not be loaded{f' with {given}' if given else ''}: "
            f"{error}"
        ) from error
    model, info = loaded
    return model, CheckpointReport.of(info)


_EXTRAS = {"torchvision": "xmodal-interp[vision]"}
"""Packages that an extra of this package installs."""


def _processor(source: str, shared: dict[str, Any], name: Any, auto: Any) -> Any:
    """Return the processor of a model that a user loads by ``name``.

    It is loaded before the weights, which may take minutes.
    """
    try:
        return auto.from_pretrained(source, **shared)
    except ImportError as error:
        first = _first_line(error)
        found = re.search(r"requires the (\S+) library", first)
        package = found[1].lower() if found else error.name
        what = (
            f"{package}, which is not installed" if package else f"a package: {first.rstrip('.')}"
        )
        install = f" Install it: pip install '{_EXTRAS.get(package, package)}'." if package else ""
        shown = str(name) if str(name) in SHIPPED else source
        raise InputError(
            f"The processor of {shown!r} requires {what}.{install}"
        ) from None  # 60 lines of transformers, whose last one is in this message
    except Exception as error:  # tokenizers raises Exception itself for a file that it cannot read
        raise InputError(
            f"The processor of {source!r} could not be loaded: "
            f"{_first_line(error).rstrip('.')}. Save one there with processor.save_pretrained, or "
            "pass your own with VLM(model, processor)."
        ) from error


def _first_line(error: Exception) -> str:
    """Return the first line of a message that is not empty, or the name of the error's class."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def _check_dtype(dtype: Any) -> None:
    if not isinstance(dtype, str) or dtype == "auto":
        return
    if not isinstance(getattr(torch, dtype.removeprefix("torch."), None), torch.dtype):
        raise InputError(
            f"dtype must be 'auto' or the name of a torch dtype such as 'bfloat16'; got {dtype!r}."
        )


def _without_progress_bar(stack: ExitStack) -> None:
    """Disable the progress bar of transformers: shipped models load instantly."""
    if logging.is_progress_bar_enabled():
        stack.callback(logging.enable_progress_bar)
        logging.disable_progress_bar()
