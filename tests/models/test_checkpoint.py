"""Weights that differ from the checkpoint are named by the warning of load, by the doctor and in
the provenance."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import xmodal_interp as xi
from tests.helpers.tiny import picture, tiny_vlm
from xmodal_interp.errors import InputError
from xmodal_interp.models import CheckpointReport, loading
from xmodal_interp.models.loading import shipped_path

CHECK = "all weights come from the checkpoint"
MISSING = "model.language_model.layers.1.self_attn.q_proj.weight"
WIDE = "model.vision_tower.encoder.layers.0.mlp.fc1.bias"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped LLaVA with one missing, one unexpected and one mismatched weight."""
    folder = tmp_path_factory.mktemp("checkpoint") / "llava"
    shutil.copytree(shipped_path("llava"), folder)
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    stored = "language_model.model.layers.{}.self_attn.q_proj.weight"
    weights[stored.format(9)] = weights.pop(stored.format(1))
    weights[WIDE.removeprefix("model.")] = torch.zeros(7)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_names_are_in_the_warning_the_doctor_and_the_provenance(damaged: Path) -> None:
    with pytest.warns(UserWarning, match="The checkpoint") as warned:
        vlm = xi.load(damaged, ignore_mismatched_sizes=True)
    (message,) = (str(w.message) for w in warned if "The checkpoint" in str(w.message))
    assert f"not in the checkpoint, so random: {MISSING}; " in message
    assert f"of another shape in the checkpoint, so random: {WIDE}; " in message
    assert "in the checkpoint, but not in the model: " in message
    assert "layers.9.self_attn.q_proj.weight" in message
    checkup = xi.doctor(vlm, picture(), "where is the red circle ?")
    assert not checkup.ok
    row = checkup.table.set_index("check").loc[CHECK]
    assert (row["verdict"], row["value"]) == ("fail", 2)
    assert MISSING in row["note"]
    found = xi.capture(vlm, picture(), "where is the red circle ?").provenance["checkpoint"]
    assert found["missing"] == [MISSING]
    assert found["mismatched"] == [WIDE]
    assert [name.endswith("layers.9.self_attn.q_proj.weight") for name in found["unexpected"]]
    json.dumps(found)


def test_a_whole_checkpoint_has_no_report() -> None:
    vlm = xi.load()
    assert vlm.loading == CheckpointReport()
    assert "checkpoint" not in xi.capture(vlm, picture(), "where is it ?").provenance


def test_loading_info_of_a_model_in_memory_is_kept(damaged: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.modeling_utils.log_state_dict_report", lambda **_: None)
        model, info = AutoModelForImageTextToText.from_pretrained(
            damaged, output_loading_info=True, ignore_mismatched_sizes=True, dtype="float32"
        )
    vlm = xi.VLM(model.eval(), tiny_vlm("llava").processor, loading=info)
    assert vlm.loading is not None
    assert vlm.loading.missing == (MISSING,)
    assert tiny_vlm("llava").loading is None
    with pytest.raises(InputError) as error:
        xi.VLM(model, tiny_vlm("llava").processor, loading=["a"])
    assert str(error.value) == (
        "loading must be a mapping; got a list. Pass the second result of from_pretrained(name, "
        "output_loading_info=True)."
    )


def test_many_names_are_counted() -> None:
    report = CheckpointReport(missing=tuple(f"w{i}" for i in range(9)))
    assert str(report) == "not in the checkpoint, so random: w0, w1, w2, w3, w4 and 4 more"
    assert bool(report)
    assert not CheckpointReport()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.safetensors", "^The weights of '.*' could not be loaded: .*header"),
        ("processor_config.json", "^The processor of '.*' could not be loaded: "),
        ("tokenizer.json", "^The processor of '.*' could not be loaded: "),
    ],
)
def test_truncated_files_are_refused(tmp_path: Path, name: str, message: str) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(shipped_path("llava"), folder)
    with (folder / name).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(InputError, match=message):
        xi.load(folder)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ImportError("\nThe processor requires the Torchvision library but it was not found.\n"),
            r"requires torchvision, which is not installed\. Install it: pip install "
            r"'xmodal-interp\[vision\]'\.$",
        ),
        (
            ImportError("No module named 'num2words'", name="num2words"),
            r"requires num2words, which is not installed\. Install it: pip install 'num2words'\.$",
        ),
        (RuntimeError(), r"could not be loaded: RuntimeError\. Save one there with processor"),
    ],
    ids=["package", "module", "no message"],
)
def test_the_reason_why_a_processor_is_not_loaded_is_named(monkeypatch, error, message) -> None:
    """transformers 5.23 begins the message about a missing package with an empty line."""

    def fail(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(loading.AutoProcessor, "from_pretrained", fail)
    with pytest.raises(InputError, match=message):
        xi.load()
