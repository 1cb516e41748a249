"""Functions that tests run in other processes; the module imports nothing that a worker lacks."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import torch


def about_process(_: Any) -> Iterator[dict[str, Any]]:
    yield {
        "id": os.getpid(),
        "threads": torch.get_num_threads(),
        "waiting": os.environ.get("OMP_WAIT_POLICY"),
        "heavy": sorted({"transformers", "torchvision", "matplotlib"} & set(sys.modules)),
    }


def killed(_: Any) -> Iterator[dict[str, Any]]:
    os._exit(1)
    yield {}
