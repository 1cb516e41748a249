#!/usr/bin/env bash
# If two models are offloaded to the same folder, accelerate runs the second with the weights of the first.
#
# Versions: accelerate 1.15.0, torch 2.14.1 (CPU), Python 3.11. Observed on 2026-11-29.
#
# `disk_offload(model, folder)` and `dispatch_model(..., offload_dir=folder)` write the weights only if
# the folder has no `index.json` yet (accelerate/big_modeling.py). Otherwise they use the weights in the
# folder, even if these are from another model. Two models with the same names and shapes, such as a
# checkpoint and its fine-tuned version, then both run with the weights of the model that was offloaded
# first. Outputs are wrong, without an error or a warning. If the folder lacks a weight of the model, its
# first forward raises a KeyError with the name of the weight. Use a separate folder for each model.
#
# Observed output:
#     first model:            16.0 before offloading, 16.0 after
#     second, same folder:    64.0 before offloading, 16.0 after
#     third, dispatch_model: 144.0 before offloading, 16.0 after
#     second, fresh folder:   64.0 before offloading, 64.0 after
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 accelerate==1.15.0
cat > "$folder/show.py" <<'PYTHON'
import tempfile

import accelerate
import torch
from accelerate import disk_offload, dispatch_model
from torch import nn

assert (accelerate.__version__, torch.__version__.split("+")[0]) == ("1.15.0", "2.14.1")


def constant(value):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for weight in model.parameters():
        nn.init.constant_(weight, value)
    return model


def before_and_after(name, model, offload):
    ones = torch.ones(1, 4)
    before = model(ones)[0, 0].item()
    offload(model)
    after = model(ones)[0, 0].item()
    print(f"{name}: {before} before offloading, {after} after")
    return before, after


with tempfile.TemporaryDirectory() as used, tempfile.TemporaryDirectory() as fresh:

    def dispatch(model):
        dispatch_model(model, {"0": "disk", "1": "disk"}, main_device="cpu", offload_dir=used)

    first = before_and_after("first model", constant(1.0), lambda m: disk_offload(m, used))
    second = before_and_after("second, same folder", constant(2.0), lambda m: disk_offload(m, used))
    third = before_and_after("third, dispatch_model", constant(3.0), dispatch)
    again = before_and_after("second, fresh folder", constant(2.0), lambda m: disk_offload(m, fresh))

assert first == (16.0, 16.0)
assert second == (64.0, 16.0)
assert third == (144.0, 16.0)
assert again == (64.0, 64.0)
print("as described")
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
