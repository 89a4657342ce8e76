"""Tables over several runs."""

import json
import sys

import pytest

from src.results import main, markdown, read_results

RUNS = [
    {"acc": 0.90, "nmi": 0.80, "ami": 0.70, "ari": 0.500, "mapping": {"0": 3}},
    {"acc": 0.92, "nmi": 0.80, "ami": 0.71, "ari": 0.600},
    {"acc": 0.97, "nmi": 0.80, "ami": 0.75, "ari": 0.775},
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
    assert markdown(["a", "b", "c"], read_results(folders)).splitlines() == [
        "| run | ACC | NMI | AMI | ARI |",
        "|---|---|---|---|---|",
        "| a | 90.0 | 80.0 | 70.0 | 50.0 |",
        "| b | 92.0 | 80.0 | 71.0 | 60.0 |",
        "| c | 97.0 | 80.0 | 75.0 | 77.5 |",
        "| mean ± std of 3 | 93.0 ± 3.6 | 80.0 ± 0.0 | 72.0 ± 2.6 | 62.5 ± 13.9 |",
    ]


def test_one_run_has_no_spread(folders):
    assert markdown(folders[:1], read_results(folders[:1])).count("\n") == 2


def test_runs_keep_the_order_they_were_named_in(folders):
    assert [result["acc"] for result in read_results([folders[2], folders[0]])] == [0.97, 0.90]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file; run cls_eval.py on the checkpoint"),
        ('{"cluster_sizes": [4, 4]}', "has no scores, its data had no labels"),
        ('{"acc": 0.5, "nmi": 0.5}', "ami, ari missing"),
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
