"""Tables of several runs."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from src.results import Group, Result, as_csv, as_tables, group, latex, main, markdown, read_results

RUNS = [
    {"acc": 0.90, "nmi": 0.80, "ami": 0.70, "ari": 0.500, "mapping": {"0": 3}, "method": "swav"},
    {"acc": 0.92, "nmi": 0.80, "ami": 0.71, "ari": 0.600, "method": "swav"},
    {"acc": 0.97, "nmi": 0.80, "ami": 0.75, "ari": 0.775, "method": "swav"},
]


def write(folder, evaluation, content):
    """Write the result of one evaluation; return the folder as text."""
    folder.mkdir(exist_ok=True)
    (folder / f"{evaluation}.json").write_text(json.dumps(content))
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    return [write(tmp_path / f"run_{i}", "cls_eval", run) for i, run in enumerate(RUNS)]


def read_csv(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


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


# ---- CSV ------------------------------------------------------------------------------------------------------------

COMMON = {"method": "swav", "epochs": 5, "seed": 3, "protocol": 'central view, "best", and\nmore'}
KNN = {"10": {"top1": 1 / 3, "top5": 0.9}, "20": {"top1": 0.25, "top5": 1.0}}
PROBE = {"top1": 0.75, "top5": 0.875, "best_epoch": 4, "last_top1": 0.7, "last_top5": 0.85}


def test_csv_has_one_row_per_run_and_metric(tmp_path):
    quality = {"used": 9, "balance_hard": 0.9, "balance_soft": 0.8}
    for name in ("a", "b"):
        write(tmp_path / name, "lincls_eval", {**COMMON, **PROBE})
        write(tmp_path / name, "cls_eval", {**RUNS[0], **COMMON, "quality": quality})
        write(tmp_path / name, "knn_eval", {**COMMON, "k": KNN})
    runs = [str(tmp_path / "a"), str(tmp_path / "b")]
    rows = read_csv(as_csv(group(read_results(runs))))
    assert list(rows[0]) == ["evaluation", "group", "run", "seed", "protocol", "metric", "value"]
    expected = {
        "cls_eval": {"acc": 0.9, "nmi": 0.8, "ami": 0.7, "ari": 0.5, "balance_hard": 0.9, "balance_soft": 0.8},
        "knn_eval": {"10-nn top1": 1 / 3, "10-nn top5": 0.9, "20-nn top1": 0.25, "20-nn top5": 1.0},
        "lincls_eval": {
            "top1 (best epoch)": 0.75,
            "top5 (best epoch)": 0.875,
            "top1 (last epoch)": 0.7,
            "top5 (last epoch)": 0.85,
        },
    }
    assert [(row["evaluation"], row["run"], row["metric"], float(row["value"])) for row in rows] == [
        (evaluation, run, metric, value)
        for evaluation, scores in expected.items()
        for run in runs
        for metric, value in scores.items()
    ]
    assert {(row["group"], row["seed"], row["protocol"]) for row in rows} == {
        ("swav", "3", COMMON["protocol"].replace("\n", "\\n"))
    }


def test_csv_names_the_groups_and_leaves_an_unknown_seed_empty(tmp_path):
    runs = [write(tmp_path / f"{n}", "cls_eval", {**RUNS[0], "epochs": n}) for n in (5, 9)]
    rows = read_csv(as_csv(group(read_results(runs))))
    assert [(row["group"], row["run"]) for row in rows[::4]] == [
        ("swav, epochs 5", runs[0]),
        ("swav, epochs 9", runs[1]),
    ]
    assert {row["seed"] for row in rows} == {""}


def test_means_of_a_csv_are_refused(folders, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["results.py", "table", *folders, "--format", "csv", "--means"])
    with pytest.raises(SystemExit) as stopped:
        main()
    output, errors = capsys.readouterr()
    assert (stopped.value.code, output, errors.count("\n")) == (2, "", 1)
    assert "--means has no effect on --format csv" in errors


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_latex_escapes_what_it_must():
    result = Result(
        evaluation="cls_eval",
        folder="runs/a_b&c%#$d\\",
        method="x",
        seed="",
        protocol="",
        settings=(),
        scores={"top1": 0.5},
        balances={},
    )
    line = latex([Group("x", [result])]).splitlines()[3]
    assert line == "runs/a\\_b\\&c\\%\\#\\$d\\textbackslash{} & 50.0 \\\\"


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
        {"method": "simclr", "epochs": 5, "seed": 1, "protocol": "q", "kmeans": fitted | {"early_stop": True}},
    ]
    found = [write(tmp_path / f"{i}", "cls_eval", {**RUNS[0], **run}) for i, run in enumerate(runs)]
    groups = group(read_results(found))
    assert [([Path(result.folder).name for result in each.results], each.name) for each in groups] == [
        (["0", "3"], "swav, epochs 5"),
        (["1"], "simclr, by classifier"),
        (["2"], "swav, epochs 9, protocol p"),
        (["4", "5"], "simclr, by k-means 10 on head at unit length, 50 images, 2 x random"),
        (["6"], "swav, epochs 9, protocol another"),
        (["7"], "simclr, by k-means 10 on head at unit length, 50 images, 2 x random, early stop"),
    ]
    assert "| swav, epochs 5: mean ± std of 2 |" in markdown(groups)


def test_every_evaluation_has_its_table(tmp_path):
    for seed in (0, 1):
        common = {"method": "swav", "epochs": 5, "seed": seed, "protocol": "p"}
        write(tmp_path / f"{seed}", "cls_eval", {**RUNS[seed], **common})
        write(tmp_path / f"{seed}", "knn_eval", {**common, "k": {**KNN, "10": {"top1": 0.5 + 0.1 * seed, "top5": 0.9}}})
    write(tmp_path / "1", "lincls_eval", {**common, **PROBE})
    groups = group(read_results([str(tmp_path / "0"), str(tmp_path / "1")]))
    assert as_tables(groups, "markdown", means=True).splitlines() == [
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
        "| run | TOP1 (best epoch) | TOP5 (best epoch) | TOP1 (last epoch) | TOP5 (last epoch) |",
        "|---|---|---|---|---|",
        "| swav (1 run) | 75.0 | 87.5 | 70.0 | 85.0 |",
    ]
    assert as_tables(groups, "latex", means=True).splitlines()[0] == "% cls_eval"


def test_a_fast_probe_has_no_last_epoch(tmp_path):
    full = write(tmp_path / "full", "lincls_eval", {**PROBE, "method": "swav", "protocol": "trained"})
    fast = write(tmp_path / "fast", "lincls_eval", {"top1": 0.5, "top5": 0.6, "method": "swav", "protocol": "fast"})
    groups = group(read_results([full, fast]))
    assert [each.name for each in groups] == ["swav, protocol trained", "swav, protocol fast"]
    assert groups[1].scores == ["top1", "top5"]
    assert f"| {fast} |  |  |  |  | 50.0 | 60.0 |" in markdown(groups)


def test_one_run_has_no_spread(folders):
    assert markdown(group(read_results(folders[:1]))).count("\n") == 2


def test_runs_keep_the_order_they_were_named_in(folders):
    assert [result.scores["acc"] for result in read_results([folders[2], folders[0]])] == [0.97, 0.90]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has none of cls_eval, knn_eval, lincls_eval.json; run an evaluation"),
        ('{"cluster_sizes": [4, 4]}', "has no scores, because its data has no labels; leave it out"),
        ('{"acc": 0.5, "nmi": 0.5}', "has no 'ami'; run cls_eval.py again"),
        ('{"acc": null, "nmi": 0.5, "ami": 0.5, "ari": 0.5}', "is not a result of cls_eval.py"),
        ("", "is not a result of cls_eval.py; run it again"),
        ('{"acc": 0.5, "nm', "is not a result of cls_eval.py"),  # a full disk
        ('["acc"]', "is not a result of cls_eval.py"),
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


def test_a_reader_that_stops_early_is_no_error(folders):
    reader, writer = os.pipe()
    os.close(reader)  # as head does once it has seen enough
    try:
        done = subprocess.run(
            [sys.executable, "-m", "src.results", "table", *folders],
            cwd=Path(__file__).parents[1],
            stdout=writer,
            stderr=subprocess.PIPE,
            timeout=60,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line(folders):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "src.results", "table", *folders],
            cwd=Path(__file__).parents[1],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "results: error: No space left on device" in done.stderr


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
