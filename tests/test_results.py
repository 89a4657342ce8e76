"""Tables over several runs."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from src.results import Group, Result, as_csv, group, latex, main, markdown, read_results

RUNS = [
    {"acc": 0.90, "nmi": 0.80, "ami": 0.70, "ari": 0.500, "mapping": {"0": 3}, "method": "swav"},
    {"acc": 0.92, "nmi": 0.80, "ami": 0.71, "ari": 0.600, "method": "swav"},
    {"acc": 0.97, "nmi": 0.80, "ami": 0.75, "ari": 0.775, "method": "swav"},
]


@pytest.fixture
def folders(tmp_path):
    for i, run in enumerate(RUNS):
        (tmp_path / f"run_{i}").mkdir()
        (tmp_path / f"run_{i}" / "cls_eval.json").write_text(json.dumps(run))
    return [str(tmp_path / f"run_{i}") for i in range(len(RUNS))]


def test_mean_and_sample_standard_deviation_of_three_runs(folders):
    # acc: mean (90 + 92 + 97) / 3 = 93; deviations -3, -1, 4: sqrt((9 + 1 + 16) / 2) = 3.61
    # ami: mean 72; deviations -2, -1, 3: sqrt(14 / 2) = 2.65
    # ari: mean 62.5; deviations -12.5, -2.5, 15: sqrt((156.25 + 6.25 + 225) / 2) = 13.92
    groups = group(read_results(folders))
    assert markdown(groups).splitlines() == [
        "| run | ACC | NMI | AMI | ARI |",
        "|---|---|---|---|---|",
        f"| {folders[0]} | 90.0 | 80.0 | 70.0 | 50.0 |",
        f"| {folders[1]} | 92.0 | 80.0 | 71.0 | 60.0 |",
        f"| {folders[2]} | 97.0 | 80.0 | 75.0 | 77.5 |",
        "| mean ± std of 3 | 93.0 ± 3.6 | 80.0 ± 0.0 | 72.0 ± 2.6 | 62.5 ± 13.9 |",
    ]
    assert markdown(groups, means=True).splitlines()[2:] == [
        "| swav (3 runs) | 93.0 ± 3.6 | 80.0 ± 0.0 | 72.0 ± 2.6 | 62.5 ± 13.9 |"
    ]
    assert latex(groups, means=True).splitlines() == [
        "\\begin{tabular}{lrrrr}",
        "run & ACC & NMI & AMI & ARI \\\\",
        "\\hline",
        "swav (3 runs) & 93.0 $\\pm$ 3.6 & 80.0 $\\pm$ 0.0 & 72.0 $\\pm$ 2.6 & 62.5 $\\pm$ 13.9 \\\\",
        "\\end{tabular}",
    ]


def test_csv_is_for_programs(folders):
    lines = list(csv.DictReader(as_csv(group(read_results(folders))).splitlines()))
    assert [(line["run"], line["runs"], float(line["acc"]), line["acc_std"]) for line in lines[:3]] == [
        (folder, "1", run["acc"], "") for folder, run in zip(folders, RUNS, strict=True)
    ]
    assert (lines[3]["evaluation"], lines[3]["group"], lines[3]["run"], lines[3]["runs"]) == (
        "cls_eval",
        "swav",
        "mean",
        "3",
    )
    assert float(lines[3]["ari"]) == pytest.approx(0.625)
    assert float(lines[3]["ari_std"]) == pytest.approx(np.std([0.5, 0.6, 0.775], ddof=1))
    assert len(as_csv(group(read_results(folders)), means=True).splitlines()) == 2


def test_latex_escapes_what_it_must():
    result = Result("cls_eval", "runs/a_b&c%#", "x", (), {"top1": 0.5})
    assert latex([Group("x", [result])]).splitlines()[3] == "runs/a\\_b\\&c\\%\\# & 50.0 \\\\"


def test_runs_are_grouped_by_what_they_have_in_common(tmp_path):
    fitted = {
        "clusters": 10,
        "layer": "head",
        "normalize": True,
        "restarts": 2,
        "init": "random",
        "fit_images": 50,
        "seed": 0,
    }
    runs = [
        {"method": "swav", "epochs": 5, "seed": 0, "protocol": "p"},
        {"method": "simclr", "epochs": 5, "seed": 0, "protocol": "p"},
        {"method": "swav", "epochs": 9, "seed": 0, "protocol": "p"},
        {"method": "swav", "epochs": 5, "seed": 1, "protocol": "p"},
        {"method": "simclr", "epochs": 5, "seed": 1, "protocol": "q", "kmeans": fitted | {"inertia": 3.0}},
        {"method": "simclr", "epochs": 5, "seed": 2, "protocol": "q", "kmeans": fitted | {"inertia": 4.0, "seed": 2}},
        {"method": "swav", "epochs": 9, "seed": 3, "protocol": "another"},
    ]
    for i, run in enumerate(runs):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "cls_eval.json").write_text(json.dumps({**RUNS[0], **run}))
    groups = group(read_results([str(tmp_path / str(i)) for i in range(7)]))
    assert [([Path(result.folder).name for result in each.results], each.name) for each in groups] == [
        (["0", "3"], "swav, epochs 5"),
        (["1"], "simclr, by classifier"),
        (["2"], "swav, epochs 9, protocol p"),
        (["4", "5"], "simclr, by k-means 10 on head at unit length, 50 images, 2 x random"),
        (["6"], "swav, epochs 9, protocol another"),
    ]
    assert "| swav, epochs 5: mean ± std of 2 |" in markdown(groups)


def test_every_evaluation_has_its_table(tmp_path, run_python):
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        common = {"method": "swav", "epochs": 5, "seed": seed, "protocol": "p"}
        (folder / "cls_eval.json").write_text(json.dumps({**RUNS[seed], **common}))
        knn = {"10": {"top1": 0.5 + 0.1 * seed, "top5": 0.9}, "20": {"top1": 0.25, "top5": 1.0}}
        (folder / "knn_eval.json").write_text(json.dumps({**common, "k": knn}))
    (tmp_path / "1" / "lincls_eval.json").write_text(json.dumps({**common, "top1": 0.75, "top5": 0.875}))
    done = run_python("-m", "src.results", "table", tmp_path / "0", tmp_path / "1", "--means")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "cls_eval",
        "",
        "| run | ACC | NMI | AMI | ARI |",
        "|---|---|---|---|---|",
        "| swav (2 runs) | 91.0 ± 1.4 | 80.0 ± 0.0 | 70.5 ± 0.7 | 55.0 ± 7.1 |",
        "",
        "knn_eval",
        "",
        "| run | 10-NN TOP1 | 10-NN TOP5 | 20-NN TOP1 | 20-NN TOP5 |",
        "|---|---|---|---|---|",
        "| swav (2 runs) | 55.0 ± 7.1 | 90.0 ± 0.0 | 25.0 ± 0.0 | 100.0 ± 0.0 |",
        "",
        "lincls_eval",
        "",
        "| run | TOP1 | TOP5 |",
        "|---|---|---|",
        "| swav (1 run) | 75.0 | 87.5 |",
    ]


def test_one_run_has_no_spread(folders):
    assert markdown(group(read_results(folders[:1]))).count("\n") == 2


def test_runs_keep_the_order_they_were_named_in(folders):
    assert [result.scores["acc"] for result in read_results([folders[2], folders[0]])] == [0.97, 0.90]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "none of cls_eval, knn_eval, lincls_eval.json in it; run an evaluation"),
        ('{"cluster_sizes": [4, 4]}', "has no scores, its data had no labels"),
        ('{"acc": 0.5, "nmi": 0.5}', "'ami' missing"),
        ("", "not what cls_eval.py writes"),
        ('{"acc": 0.5, "nm', "not what cls_eval.py writes"),  # a full disk
        ('["acc"]', "not what cls_eval.py writes"),
    ],
)
def test_a_run_without_scores_is_one_line_and_status_2(folders, tmp_path, monkeypatch, capsys, text, message):
    (tmp_path / "bad").mkdir()
    if text is not None:
        (tmp_path / "bad" / "cls_eval.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["results.py", "table", *folders, str(tmp_path / "bad")])
    with pytest.raises(SystemExit) as stopped:
        main()
    output, errors = capsys.readouterr()
    assert (stopped.value.code, output, errors.count("\n")) == (2, "", 1)
    assert message in errors
    assert str(tmp_path / "bad") in errors


def test_the_program_prints_the_table(folders, run_python):
    done = run_python("-m", "src.results", "table", *folders)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("| mean ± std of 3 | 93.0 ± 3.6 |")


def test_a_run_given_twice_is_refused(folders, tmp_path):
    (tmp_path / "link").symlink_to(folders[0])
    for again in (folders[0], folders[0] + "/", str(tmp_path / "link")):
        with pytest.raises(ValueError, match="given twice; name each run once"):
            read_results([folders[0], folders[1], again])


def test_classifiers_of_another_size_are_another_group(folders):
    for folder, clusters in zip(folders, (10, 40, 10), strict=True):
        path = Path(folder) / "cls_eval.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "cluster_sizes": [1] * clusters}))
    groups = group(read_results(folders))
    assert [(each.name, len(each.results)) for each in groups] == [("swav, clusters 10", 2), ("swav, clusters 40", 1)]
