"""docs/fidelity.md: that it can be found, covers every method, and names only flags, tests and pages that exist."""

import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_recipes import flags_of

from src.config import method_names, read_method
from src.losses import self_classifier_v1_terms

DOCUMENT = ROOT / "docs" / "fidelity.md"
TITLES = {
    "self_classifier": "Self-Classifier, second generation",
    "self_classifier_simclr": "Self-Classifier with SimCLR",
    "self_classifier_v1": "Self-Classifier, first generation",
    "swav": "SwAV",
    "deepcluster_v2": "DeepCluster-v2",
    "sela_v2": "SeLa-v2",
    "sela": "SeLa",
    "simclr": "SimCLR",
    "scan": "SCAN",
    "selflabel": "Self-labelling",
}


def tables() -> dict[str, list[list[str]]]:
    """Title of a section → the cells of the rows of its table, without the header."""
    found = {}
    for part in DOCUMENT.read_text().split("\n## ")[1:]:
        title, _, text = part.partition("\n")
        lines = [line for line in text.splitlines() if line.startswith("|")]
        found[title] = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]
    return found


def test_the_page_is_linked():
    assert "(docs/fidelity.md)" in (ROOT / "README.md").read_text()
    assert "(fidelity.md)" in (ROOT / "docs" / "README.md").read_text()


def test_every_method_and_kind_of_evaluation_has_a_table():
    found = tables()
    assert set(TITLES) == set(method_names())
    for title in (*TITLES.values(), "Evaluation", "Files that others released"):
        assert found[title], title
    protocols = {row[0].partition(",")[0] for row in found["Evaluation"]}
    assert protocols >= {
        "clusters",
        "grids",
        "k-means",
        "nearest neighbours",
        "linear probe",
        "semi-supervised",
        "t-SNE",
    }


def test_every_row_is_complete():
    for title, rows in tables().items():
        assert len({len(row) for row in rows}) == 1, title
        assert all(all(row) for row in rows), title


@pytest.mark.parametrize("method", TITLES)
def test_a_method_that_departs_says_so_in_the_table(method):
    """A method's file lists its departures; the table has at least as many."""
    text = (ROOT / "src" / "methods" / f"{method}.py").read_text().split('"""')[1]
    assert len(tables()[TITLES[method]]) >= len(re.findall(r"^- ", text, flags=re.MULTILINE)) > 0


def test_it_names_only_flags_and_files_that_exist():
    text = DOCUMENT.read_text()
    known = {
        "--no-leaky",
        "--use-amp",
        "--use-half",
        "--hidden_mlp",
        "--freeze_prototypes_niters",
        "--subset-size",
        "--cos",
        "--sgd",
        "--cls-num",
    }  # of the originals
    for method in method_names():
        known |= flags_of(f"train.py --method {method}")
    for program in ("cls_eval.py", "knn_eval.py", "lincls_eval.py"):
        known |= flags_of(program)
    assert not set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - known
    for name in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\]\(([\w/]+\.md)", text):
        assert (ROOT / "docs" / name).is_file(), name
    presets = {name for method in method_names() for name in read_method(method).presets}
    assert {"800ep", "100ep_ablation", "RN50w5_400ep", "400ep", "400ep_2x224"} <= presets


@pytest.mark.parametrize(("num_classes", "tau"), [(1000, 0.1), (30, 0.3)])
def test_what_rounding_the_quotient_in_the_first_generation_does(num_classes, tau):
    """Cosines are half precision in both codes; theirs also rounds the cosines over tau."""
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(num_classes, 128, dtype=torch.float64), dim=1)
    for _ in range(3):
        near = vectors[torch.randint(num_classes, (256,))] * 128**0.5 / 2.5
        images = torch.randn(256, 128, dtype=torch.float64) + near
        views = [F.normalize(images + 0.3 * torch.randn_like(images), dim=1) for _ in range(2)]
        cosines = [(view @ vectors.T).half() for view in views]
        whole = {"normalize_targets": False, "group": 0}
        exact = self_classifier_v1_terms([[z.double() for z in cosines]], tau, **whole)
        rounded = self_classifier_v1_terms([[(z / tau).double() for z in cosines]], 1.0, **whole)
        assert ((rounded - exact) / exact).abs() < 2e-6


def test_the_recipes_say_what_was_half_precision():
    (row,) = re.findall(r"^\| `--use-amp` .*2\^16.*$", (ROOT / "docs" / "recipes.md").read_text(), flags=re.MULTILINE)
    assert "autocast runs softmax and log_softmax in float32, and only `out/τ` is rounded to half precision" in row
