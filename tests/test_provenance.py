"""What a run records about its code, its machine and its data."""

import json
import os

import pytest
import torch

from src import fingerprints, provenance
from src.data.datasets import ImageFiles, MemoryImages, open_data

CPU = torch.device("cpu")
REVISION = "0" * 40


def test_each_start_adds_a_line(tmp_path):
    digits = open_data("digits", "train")
    for step in (0, 7):
        provenance.record_start(tmp_path, digits, revision=REVISION, step=step, device=CPU)
    first, second = (json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines())
    assert (first["step"], second["step"]) == (0, 7)
    assert first == {**second, "step": 0}
    assert first["versions"]["torch"] == torch.__version__.split("+")[0]
    assert (first["revision"], first["ranks"], first["threads"], first["images"]) == (REVISION, 1, 1, 1437)
    assert "gpu" not in first
    assert f"{len(os.sched_getaffinity(0))} cores" in first["processor"]


def test_only_the_first_rank_writes(run_ranks, tmp_path):
    run_ranks(
        2,
        f"""
        from src import provenance
        from src.data.datasets import open_data
        digits = open_data("digits", "test")
        provenance.record_start(out, digits, revision={REVISION!r}, step=0, device=torch.device("cpu"))
        torch.save(rank, out / f"{{rank}}.pt")
        """,
    )
    (line,) = (tmp_path / "starts.jsonl").read_text().splitlines()
    assert json.loads(line)["ranks"] == 2


def test_the_processor_is_named_where_linux_describes_none(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "Path", lambda _: tmp_path / "missing")
    assert provenance.processor().split(",")[0]


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.tensor([[[[1]]], [[[3]]]]), [0, 1]),
        (torch.tensor([[[[2]]], [[[1]]]]), [0, 1]),
        (torch.tensor([[[[1, 2]]]]), [0]),
        (torch.tensor([[[[1]]], [[[2]]]]), [1, 0]),
    ],
)
def test_the_fingerprint_of_images_depends_on_contents_order_shape_and_labels(images, labels):
    first = MemoryImages(torch.tensor([[[[1]]], [[[2]]]], dtype=torch.uint8), torch.tensor([0, 1]), ["a", "b"])
    again = MemoryImages(first.images.clone(), first.labels.clone(), ["a", "b"])
    other = MemoryImages(images.to(torch.uint8), torch.tensor(labels), ["a", "b"])
    assert fingerprints.of_data(first) == fingerprints.of_data(again)
    assert fingerprints.of_data(first) != fingerprints.of_data(other)


def test_the_fingerprint_of_files_is_that_of_their_names_below_the_folder():
    def of(*paths, labels=(0, 1)):
        return fingerprints.of_data(ImageFiles(list(paths), torch.tensor(labels), ["a", "b"]))

    here = of("/disk/train/a/1.png", "/disk/train/b/1.png")
    assert here == of("/elsewhere/a/1.png", "/elsewhere/b/1.png")
    assert here != of("/disk/train/a/1.png", "/disk/train/b/2.png")
    assert here != of("/disk/train/b/1.png", "/disk/train/a/1.png")
    assert here != of("/disk/train/a/1.png", "/disk/train/b/1.png", labels=(0, 0))
    assert of("/disk/1.png", labels=(0,)) == of("/other/1.png", labels=(0,)) != of("/disk/2.png", labels=(0,))
