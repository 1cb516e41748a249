"""What every test runs under: no network, one thread, the same random numbers in any order."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so it stands first

import functools
import re
import types
import typing

import jaxtyping
import pytest
import torch
from jaxtyping import config as jaxtyping_config

torch.set_num_threads(1)  # tiny models are no faster with more, and two processes run

_SHAPED = re.compile(r"\b(Bool|Float|Int)\[")
_jaxtyped = jaxtyping.jaxtyped


def _typed(*, typechecker):
    """``jaxtyping.jaxtyped`` for what has shapes, the type checker alone for other functions.

    jaxtyping binds the arguments of each call to compare shapes: 60 microseconds, 5,000 times in a
    capture, three quarters of its time in tests. Its import hook takes this name from the package.
    """

    def decorate(fn):
        annotations = getattr(fn, "__annotations__", {})
        if isinstance(fn, type) or any(_SHAPED.search(str(each)) for each in annotations.values()):
            return _jaxtyped(fn, typechecker=typechecker)
        parts = fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__
        checked = functools.update_wrapper(types.FunctionType(*parts), fn)
        checked.__kwdefaults__ = fn.__kwdefaults__
        checked.__annotations__ = {n: _resolved(a, fn) for n, a in annotations.items()}
        checked = typechecker(checked)

        @functools.wraps(fn)
        def call(*args, **options):
            chosen = fn if jaxtyping_config.jaxtyping_disable else checked
            return chosen(*args, **options)

        return call

    return decorate


def _resolved(annotation, fn):
    """What an annotation names; anything, where only mypy knows the name, as in jaxtyping."""
    holder = types.SimpleNamespace(__annotations__={"value": annotation})
    try:
        hint = typing.get_type_hints(holder, fn.__globals__, include_extras=True)["value"]
    except NameError:
        return typing.Any
    is_parameters = isinstance(hint, typing.ParamSpecArgs | typing.ParamSpecKwargs)
    return typing.Any if is_parameters else hint


jaxtyping.jaxtyped = _typed  # before the package is imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-types",
        action="store_true",
        help="test every model type of transformers for images and text, not a third of them",
    )


@pytest.fixture
def any_type():
    """The type checks of tests would refuse what users may well pass."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
