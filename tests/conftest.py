"""Set-up of all tests: offline, one thread, the same random seed in each test."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # must be set before huggingface_hub is imported

import functools
import re
import types
import typing

import jaxtyping
import pytest
import torch
from jaxtyping import config as jaxtyping_config

torch.set_num_threads(1)  # tests run in two processes, and tiny models need one thread

_SHAPED = re.compile(r"\b(Bool|Float|Int)\[")
_jaxtyped = jaxtyping.jaxtyped


def _typed(*, typechecker):
    """``jaxtyping.jaxtyped`` for functions with shapes, the type checker alone for all others.

    jaxtyping binds the arguments of each call to compare shapes. That takes 60 microseconds, 5,000
    times in a capture: three quarters of a capture's time in tests. The import hook of jaxtyping
    looks up ``jaxtyping.jaxtyped``, which is therefore replaced by this function.
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
    """Resolve an annotation; return Any if its name exists for mypy only, as jaxtyping does."""
    holder = types.SimpleNamespace(__annotations__={"value": annotation})
    try:
        hint = typing.get_type_hints(holder, fn.__globals__, include_extras=True)["value"]
    except NameError:
        return typing.Any
    is_parameters = isinstance(hint, typing.ParamSpecArgs | typing.ParamSpecKwargs)
    return typing.Any if is_parameters else hint


jaxtyping.jaxtyped = _typed  # must be set before the package is imported


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-types",
        action="store_true",
        help="test all vision-language model types of transformers instead of a third of them",
    )


@pytest.fixture
def any_type():
    """Disable the runtime type checks of tests, to pass arguments of wrong types."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
