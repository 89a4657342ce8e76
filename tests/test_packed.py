"""Networks in the safetensors format: the same predictions as the checkpoint, and no trust in what a file says."""

import json
from pathlib import Path

import pytest
import torch
from evaluating import digit_probabilities, run_here, save_untrained
from safetensors.torch import save_file

from src import checkpoint, packed
from src.errors import InputError
from src.export import pack
from src.loading import load_backbone

SHIPPED = Path(__file__).parents[1] / "models" / "digits.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    history = [{"epoch": 1, "classifier": 0}, {"epoch": 2, "classifier": 1, "loss_0": 1.0}]
    return save_untrained(path, "--hidden-dim", "32", "--dim", "16", "--classes", "10", "12", history=history)


def test_a_packed_network_is_that_of_the_checkpoint(trained, tmp_path):
    said = pack(trained, tmp_path / "small.safetensors")
    assert "small.safetensors: " in said
    state, whole = checkpoint.load(tmp_path / "small.safetensors"), checkpoint.load(trained)
    assert state["config"] == whole["config"]
    assert state["history"] == whole["history"][-1:]
    assert state["model"].keys() == whole["model"].keys()
    assert all(torch.equal(state["model"][name], value) for name, value in whole["model"].items())
    for one, two in zip(digit_probabilities(tmp_path / "small.safetensors"), digit_probabilities(trained), strict=True):
        assert torch.equal(one, two)


def test_an_evaluation_takes_a_packed_network(trained, tmp_path, evaluate):
    pack(trained, tmp_path / "small.safetensors")
    result, _ = evaluate("cls_eval", "--checkpoint", tmp_path / "small.safetensors")
    assert (result["classifier"], result["images"]) == (1, 360)


def test_tensors_of_others_are_read_by_their_names(tmp_path):
    from torchvision import models  # slow to import

    network = models.resnet18(num_classes=3)
    save_file(network.state_dict(), tmp_path / "other.safetensors")
    backbone, _ = load_backbone(tmp_path / "other.safetensors", "resnet18")
    assert torch.equal(backbone.state_dict()["conv1.weight"], network.conv1.weight)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"\xff" * 100, b"PK\3\4" + bytes(50)])
def test_a_damaged_file_is_refused(content, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"no intact safetensors file|no state dict|not written by"):
        checkpoint.load(path)


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 100_000, "x" * (packed.LONGEST + 1)])
def test_damaged_metadata_are_refused(text, tmp_path):
    path = tmp_path / "bad.safetensors"
    save_file({"a": torch.zeros(2)}, path, {packed.ENTRY: text})
    with pytest.raises(InputError, match="its metadata are damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize("changes", [{"config": 3}, {"history": [3]}, {"epoch": -1}, {"version": 99}, {"format": "x"}])
def test_entries_of_a_wrong_type_are_refused(changes, trained, tmp_path):
    state = checkpoint.load(trained)
    kept = {name: state[name] for name in ("format", "version", "config", "epoch", "history")}
    save_file(state["model"], tmp_path / "bad.safetensors", {packed.ENTRY: json.dumps({**kept, **changes})})
    with pytest.raises(InputError):
        checkpoint.load(tmp_path / "bad.safetensors")


def test_packing_refuses_what_it_cannot_write(trained, tmp_path):
    with pytest.raises(InputError, match=r"expected a name that ends in \.safetensors"):
        pack(trained, tmp_path / "x.pt")
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(InputError, match="exists already"):
        pack(trained, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="cannot be written"):
        pack(trained, tmp_path / "missing" / "x.safetensors")


def test_the_shipped_network_knows_the_digits(tmp_path, capsys):
    assert SHIPPED.stat().st_size < 1_000_000
    state = checkpoint.load(SHIPPED)
    assert (state["config"]["data"], state["config"]["seed"], state["config"]["epochs"]) == ("digits", 0, 90)
    run_here("cls_eval", "--checkpoint", SHIPPED, "--output-dir", tmp_path)
    assert json.loads((tmp_path / "cls_eval.json").read_text())["acc"] > 0.94
