"""SimCLR, mining, SCAN and self-labelling one after the other on a few steps of digits, and what wrong input gets."""

import json
import shutil

import numpy as np
import pytest
import torch
from evaluating import run_here

from src import mining
from src.checkpoint import load
from src.errors import InputError

QUICK = ("--data", "digits", "--device", "cpu", "--epochs", "1", "--batch-size", "256")


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Folder with the runs simclr, scan and selflabel."""
    folder = tmp_path_factory.mktemp("chain")
    run_here("train", "--method", "simclr", *QUICK, "--eval-every", "1", "--output-dir", folder / "simclr")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mining", str(folder / "simclr"), "--neighbors", "7", "--device", "cpu"])
        mining.main()
    words = ("--method", "scan", "--pretrained", folder / "simclr", "--neighbors", "5")
    run_here("train", *words, *QUICK, "--output-dir", folder / "scan")
    words = ("--method", "selflabel", "--pretrained", folder / "scan", "--threshold", "0.12", "--ema", "averaged")
    run_here("train", *words, *QUICK, "--output-dir", folder / "selflabel")
    return folder


def last(folder) -> dict:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_the_steps_follow_each_other(chain, tmp_path):
    assert last(chain / "simclr")["knn"] > 0.5
    scan, own = load(chain / "scan" / "checkpoint_best.pt"), load(chain / "selflabel" / "checkpoint_best.pt")
    file = np.load(chain / "simclr" / "neighbors.npz")
    assert scan["model"]["neighbors"].tolist() == file["train"][:, :6].tolist()
    assert scan["model"]["held_out_neighbors"].tolist() == file["held_out"].tolist()
    assert len(file["train"]) + len(file["held_out"]) == 1437
    assert last(chain / "scan").keys() >= {"selection_loss", "classifier", "total_pflop"}
    assert last(chain / "selflabel").keys() >= {"selection_loss", "confident", "held_out_confident_clusters"}
    assert torch.isfinite(own["model"]["before"]).all()
    run_here("cls_eval", "--checkpoint", chain / "selflabel", "--device", "cpu", "--output-dir", tmp_path)
    assert json.loads((tmp_path / "cls_eval.json").read_text())["method"] == "selflabel"


def test_the_best_epoch_is_kept_even_if_the_process_ended_before_its_copy(chain, tmp_path):
    folder = shutil.copytree(chain / "scan", tmp_path / "scan")
    (folder / "checkpoint_best.pt").unlink()
    words = ("--method", "scan", "--pretrained", chain / "simclr", "--neighbors", "5")
    run_here("train", *words, *QUICK, "--output-dir", folder)
    assert (folder / "checkpoint_best.pt").read_bytes() == (folder / "checkpoint.pt").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "scan"), "continues a run of simclr: run that step first, `python train.py --method simclr"),
        (("--method", "selflabel"), "continues a run of scan: run that step first"),
        (
            ("--method", "scan", "--pretrained", "simclr", "--num-classes", "2000"),
            "--num-classes 2000 is more than the",
        ),
        (("--method", "scan", "--pretrained", "simclr", "--neighbors", "2000"), "--neighbors 2000: expected fewer"),
        (("--method", "scan", "--pretrained", "simclr", "--neighbors", "9"), "7 neighbours of each image, expected"),
        (("--method", "scan", "--pretrained", "simclr", "--select-share", "0.2"), "other training images"),
        (("--method", "scan", "--pretrained", "simclr", "--mine-from", "backbone"), "another layer"),
        (
            ("--method", "scan", "--pretrained", "scan", "--neighbors-file", "simclr/neighbors.npz"),
            "weights of another checkpoint",
        ),
        (("--method", "selflabel", "--pretrained", "scan", "--num-classes", "12"), "give --num-classes 10"),
        (("--method", "selflabel", "--pretrained", "simclr"), "run the SCAN step first"),
        (
            ("--method", "scan", "--pretrained", "simclr", "--neighbors", "5", "--arch", "cifar_resnet18"),
            "does not fit this method and architecture",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(chain, monkeypatch, words, message):
    monkeypatch.chdir(chain)
    with pytest.raises(InputError, match=message):
        run_here("train", *words, *QUICK, "--output-dir", "refused")
    assert not (chain / "refused").exists()
