"""What every test runs under: no network, two threads, the same random numbers in any order."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so it stands first

import pytest
import torch
from jaxtyping import config as jaxtyping_config

torch.set_num_threads(2)


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
