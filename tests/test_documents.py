"""Run cards hold how runs were made; the tables of README and docs are those of the cards."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from evaluating import run_here

from src import cards, documents, measured, results
from src.config import method_names
from src.errors import InputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
START = {
    "step": 0,
    "revision": COMMIT,
    "versions": {"python": "3.11.7", "torch": "2.15.0"},
    "processor": "Abacus, 2 cores, AVX2",
    "ranks": 1,
    "threads": 1,
    "images": 1437,
    "fingerprint": "f" * 64,
}


def write_run(folder: Path, seed: int, acc: float, *, start: dict = START, **changed: object) -> Path:
    """Write the files of a run of two epochs, with classifiers of 3, 3 and 6 clusters of which the second is chosen."""
    folder.mkdir(parents=True)
    config = {
        "method": "swav",
        "seed": seed,
        "epochs": 2,
        "lr": 0.1,
        "data": "/disk/pictures/",
        "output_dir": "/disk/out",
    }
    epochs = [
        {"epoch": 1, "step": 5, "loss": 1.23456789, "seconds": 45.0, "images_per_second": 9.0, "classifier": 0}
        | {"used_0": 1, "used_1": 2, "used_2": 5},
        {"epoch": 2, "step": 10, "loss": 0.5, "seconds": 60.0, "images_per_second": 9.0, "classifier": 1}
        | {"used_0": 2, "used_1": 3, "used_2": 6, "acc": 0.25, "total_pflop": 0.123456},
    ]
    sizes = ((3, acc - 0.2), (3, acc), (6, acc - 0.4))
    evaluation = {
        "checkpoint": "/disk/out/checkpoint.pt",
        "acc": acc,
        "nmi": 1 / 3,
        "ami": 0.25,
        "ari": 0.125,
        "mapping": {"0": 1},
        "classifiers": [{"size": size, "acc": each} for size, each in sizes],
    }
    files = {"config.json": config | changed, "cls_eval.json": evaluation}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "starts.jsonl").write_text(json.dumps(start) + "\n")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    return folder


# ---- cards ----------------------------------------------------------------------------------------------------------


def test_a_card_holds_how_a_run_was_made_and_its_numbers(tmp_path):
    run = write_run(tmp_path / "run", 3, 0.9)
    (path,) = cards.collect([str(run)], tmp_path / "cards")
    assert path == tmp_path / "cards" / "swav-3.json"
    card = json.loads(path.read_text())
    assert card == {
        "method": "swav",
        "seed": 3,
        "config": {"method": "swav", "seed": 3, "epochs": 2, "lr": 0.1, "data": "pictures"},
        "starts": [START],
        "minutes": 1.75,  # 45 s and 60 s
        "pflop": 0.12346,
        "per_epoch": {
            "loss": [1.2346, 0.5],
            "classifier": [0, 1],
            "used of classifier 1": [2, 3],
            "acc": [None, 0.25],
            "total_pflop": [None, 0.12346],
        },
        "cls_eval": {
            "acc": 0.9,
            "nmi": 0.3333333,
            "ami": 0.25,
            "ari": 0.125,
            "classifiers": [{"size": 3, "acc": 0.7}, {"size": 3, "acc": 0.9}, {"size": 6, "acc": 0.5}],
        },
    }
    assert len(path.read_text().splitlines()) == 2 + len(
        card
    )  # one line per entry, so that a commit shows what changed


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("starts.jsonl", None, r"starts\.jsonl: No such file or directory, expected a file of train\.py"),
        ("config.json", None, r"config\.json: No such file"),
        ("config.json", '{"epochs": 2}', "its files have no 'method': name the folder of a run"),
        ("metrics.jsonl", '{"epoch": 1, "seconds": 1}\n', "1 of 2 epochs are finished: finish the run first"),
        ("metrics.jsonl", '{"epoch": 1, "sec\n', r"metrics\.jsonl: damaged, expected JSON objects"),
        ("starts.jsonl", json.dumps({**START, "revision": f"{COMMIT}+"}), r"expected a commit without changes: commit"),
    ],
)
def test_a_run_that_cannot_be_replayed_gets_no_card(tmp_path, capsys, monkeypatch, name, content, message):
    good, bad = write_run(tmp_path / "good", 0, 0.9), write_run(tmp_path / "bad", 1, 0.9)
    (bad / name).unlink() if content is None else (bad / name).write_text(content)
    with pytest.raises(InputError, match=message):
        cards.collect([str(good), str(bad)], tmp_path / "cards")
    assert not (tmp_path / "cards").exists()

    monkeypatch.setattr(sys, "argv", ["results.py", "card", str(bad), "--output", str(tmp_path / "cards")])
    with pytest.raises(SystemExit) as stopped:
        results.main()
    output, errors = capsys.readouterr()
    assert (stopped.value.code, output, errors.count("\n")) == (2, "", 1)


def test_two_runs_for_one_card_are_refused(tmp_path):
    runs = [str(write_run(tmp_path / name, 0, 0.9)) for name in "ab"]
    with pytest.raises(
        InputError, match="another run has the same method and seed: write its card to another --output"
    ):
        cards.collect(runs, tmp_path / "cards")


def test_train_writes_what_a_card_needs(tmp_path, monkeypatch):
    monkeypatch.setattr("src.checkpoint.code_revision", lambda: COMMIT)
    words = ("--method", "swav", "--epochs", 2, "--warmup-epochs", 1, "--freeze-prototypes", 0, "--dim", 8)
    for _ in range(2):  # the second command finds a finished run, and starts nothing
        run_here("train", *words, "--output-dir", tmp_path / "run")
    card = cards.make_card(tmp_path / "run")
    (start,) = card["starts"]
    assert start["images"] == 1437
    assert len(start["fingerprint"]) == 64
    assert {"python", "torch", "numpy"} <= set(start["versions"])
    assert start["processor"]
    assert card["minutes"] > 0
    assert len(card["per_epoch"]["loss"]) == 2
    assert card["config"]["dim"] == 8
    assert str(tmp_path) not in json.dumps(card)


# ---- documents ------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path):
    """A folder with a README and cards of two runs: accuracies 90 and 96, of single classifiers 70, 90, 76 and 96."""
    runs = [str(write_run(tmp_path / f"run {seed}", seed, acc)) for seed, acc in ((0, 0.9), (1, 0.96))]
    cards.collect(runs, tmp_path / "docs" / "results" / "toys")
    (tmp_path / "docs" / "results" / "toys.md").write_text("No numbers.\n")
    (tmp_path / "README.md").write_text(
        "# Toys\n\n<!-- results: seeds toys/swav all -->\n<!-- end -->\n\n"
        "Single ones reach <!-- results: single toys/swav 0-1 --><!-- end --> %, chosen ones at least "
        "<!-- results: worst toys/swav 0-1 --><!-- end -->.\n"
    )
    return tmp_path


def test_tables_and_words_are_rebuilt_from_cards(project):
    assert len(documents.differences(project, write=True)) == 3
    assert documents.differences(project) == []
    # mean and sample standard deviation of 90 and 96: 93 and sqrt(9 + 9)
    assert (project / "README.md").read_text() == (
        "# Toys\n\n<!-- results: seeds toys/swav all -->\n"
        "| seed | ACC | NMI | AMI | ARI | mean ACC of the 2 candidates | worst candidate |\n"
        "|---|---|---|---|---|---|---|\n"
        "| 0 | 90.0 | 33.3 | 25.0 | 12.5 | 80.0 | 70.0 |\n"
        "| 1 | 96.0 | 33.3 | 25.0 | 12.5 | 86.0 | 76.0 |\n"
        "| mean ± std, all | 93.0 ± 4.2 | 33.3 ± 0.0 | 25.0 ± 0.0 | 12.5 ± 0.0 |  |  |\n"
        "<!-- end -->\n\n"
        "Single ones reach <!-- results: single toys/swav 0-1 -->70.0 to 96.0<!-- end --> %, chosen ones at least "
        "<!-- results: worst toys/swav 0-1 -->90.0<!-- end -->.\n"
    )


def test_methods_are_compared_by_means(project):
    """The candidates of two runs are 70, 90, 76 and 96."""
    results = project / "docs" / "results"
    assert documents.methods(results, "toys", "0-1", "swav").splitlines()[3:] == [
        "| SwAV | 93.0 ± 4.2 | 90.0 | 33.3 ± 0.0 | 25.0 ± 0.0 | 12.5 ± 0.0 | 83.0 | 2, and 1 larger ones |"
    ]
    assert documents.accuracies(results, "toys", "0-1", "swav").splitlines()[1:] == [
        "| method | seed 0 | seed 1 |",
        "|---|---|---|",
        "| SwAV | 90.0 | 96.0 |",
    ]


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ("| 86.0 | 76.0 |", "| 86.0 | 76.1 |", "README.md: seeds toys/swav all: found '| 1 | 96.0 |"),
        ("-->90.0<", "-->91.0<", "README.md: worst toys/swav 0-1: found '91.0', the cards give '90.0'"),
        ("| 0 | 90.0 | 33.3 | 25.0 | 12.5 | 80.0 | 70.0 |\n", "", "found '| 1 | 96.0 | 33.3"),
        ("<!-- end -->\n\nSingle", "| extra |\n<!-- end -->\n\nSingle", "found '| extra |', the cards give ''"),
    ],
)
def test_a_change_by_hand_is_found(project, before, after, line):
    documents.differences(project, write=True)
    path = project / "README.md"
    assert path.read_text().count(before) == 1
    path.write_text(path.read_text().replace(before, after))
    (found,) = documents.differences(project)
    assert line in found


def test_a_changed_card_is_found(project):
    documents.differences(project, write=True)
    card = project / "docs" / "results" / "toys" / "swav-1.json"
    card.write_text(card.read_text().replace('"acc": 0.96}', '"acc": 0.97}').replace('"acc": 0.96,', '"acc": 0.97,'))
    assert len(documents.differences(project)) == 2  # the table and the range; the worst run is the other one


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("speed toys", "README.md: results: speed: no such block, expected one of seeds, methods"),
        ("seeds toys/sela_v2", "has no card of sela_v2: write it with python -m src.results card"),
        ("worst toys/swav 0-4", "there is no card of seed 2"),
        ("methods toys 0-4 swav", "there is no card of seed 2"),
        ("worst toys/swav", "README.md: results: worst toys/swav: wrong number of arguments"),
        ("value speed 0 d", r"speed\.json: No such file or directory, expected a card"),
        ("value toys/swav-0 minute d", "results: value toys/swav-0 minute d: a card has no 'minute'"),
        ("value toys/swav-0 minutes d", "results: value toys/swav-0 minutes d: Unknown format code"),
    ],
)
def test_a_block_without_function_or_card_is_one_line(project, block, message):
    (project / "README.md").write_text(f"<!-- results: {block} -->\n<!-- end -->\n")
    with pytest.raises(InputError, match=message):
        documents.differences(project)


def test_a_card_without_scores_is_one_line(project):
    card = project / "docs" / "results" / "toys" / "swav-1.json"
    card.write_text(card.read_text().replace('"cls_eval"', '"another"'))
    with pytest.raises(InputError, match=r"README\.md: results: seeds toys/swav all: a card has no 'cls_eval': score"):
        documents.differences(project)


def test_a_table_of_numbers_needs_cards_or_a_reason(project):
    documents.differences(project, write=True)
    page, table = (
        project / "docs" / "results" / "toys.md",
        "| speed | |\n|---|---|\n| ours | 2.5× |\n| all | **1,3** |\n",
    )
    page.write_text(f"Text.\n\n{table}\n")
    (line,) = documents.differences(project)
    assert line.startswith("docs/results/toys.md: the table '| ours | 2.5× |' has numbers, but neither")
    page.write_text(f"Text.\n\n<!-- no card: on a borrowed machine -->\n{table}\n")
    assert documents.differences(project) == []
    page.write_text(f"<!-- no cards on this page: on a borrowed machine -->\nText.\n\n{table}\n")
    assert documents.differences(project) == []
    page.write_text("| flag | |\n|---|---|\n| `--lr` | above 0 |\n")
    assert documents.differences(project) == []
    (project / "docs" / "data.md").write_text(table)  # other pages have tables of settings
    assert documents.differences(project) == []


def test_different_machines_are_not_named_as_one(project):
    folder = project / "docs" / "results" / "toys"
    assert (
        documents.made_with(folder.parent, "toys")
        == "Abacus, 2 cores, AVX2, Python 3.11.7, torch 2.15.0, commit 01234567"
    )
    card = folder / "swav-1.json"
    card.write_text(card.read_text().replace("Abacus", "Slide rule"))
    with pytest.raises(InputError, match="the cards have 2 processors, versions or commits, expected one"):
        documents.made_with(folder.parent, "toys")


# ---- measurements ---------------------------------------------------------------------------------------------------


def write_card(project: Path, name: str, card: object) -> Path:
    path = project / "docs" / "results" / f"{name}.json"
    path.write_text(json.dumps(card))
    return project / "docs" / "results"


def test_a_number_of_a_card_stands_in_a_sentence(project):
    row = {
        "seconds": {"ours, both": [0.3, 0.1, 0.2], "old": {"median": 68e-3}},
        "peak": 3 << 20,
        "share": 0.046,
        "text": "a",
    }
    folder = write_card(project, "speed", {"results": [{}, row]})
    assert measured.value(folder, "speed", "1", "seconds", "ours,_both", ".2f") == "0.20"  # the median of the turns
    assert measured.value(folder, "speed", "1", "seconds", "old", ".0fms") == "68"
    assert measured.value(folder, "speed", "1", "peak", ".0fMiB") == "3"
    assert measured.value(folder, "speed", "1", "share", ".1%") == "4.6 %"
    assert measured.value(folder, "speed", "1", "text", "s") == "a"


def test_times_have_three_digits_and_a_range():
    assert measured.spread([0.25, 0.125, 12.5]) == "0.250 (0.125 to 12.5)"
    assert measured.spread([1234.5]) == "1,234"  # one turn has no range
    assert (
        measured.spread({"median": 0.62, "least": 0.6, "most": 0.7}) == "0.62 (0.6 to 0.7)"
    )  # copied: no digits are added


def test_the_bytes_of_more_ranks_follow_from_those_of_two(project):
    """Two ranks of 10 images and 5 classes send one vector, 2 · 1/2 · 5 · 4 bytes, and all logits, 1/2 · 10 · 5 · 4 bytes."""
    row = {"processes": 2, "views": 1, "N": 10, "C": 5, "sent_bytes": {"ours": 20, "gathered": 100}}
    folder = write_card(project, "loss", {"results": [row]})
    # four ranks, two views, a million classes, 1000 images: 2 · 3/4 · 2e6 · 4 bytes and 3/4 · 2e6 · 1000 · 4 bytes
    assert measured.sent(folder, "loss", "2", "1000000", "1000", "4").splitlines()[3] == "| 4 | 12.0 MB | 6.0 GB |"


def test_the_campaign_is_compared_with_its_results(project):
    row = {"what": "kills", "tried": 1200, "survived": 1199, "commit": "abc", "date": "today", "hardware": "one core"}
    write_card(project, "reliability", {"a": {**row, "versions": "Python 3"}})
    page = project / "docs" / "results" / "reliability.md"
    page.write_text("<!-- results: campaign -->\n<!-- end -->\nAll: <!-- results: faults --><!-- end -->.\n")
    documents.differences(project, write=True)
    assert page.read_text() == (
        "<!-- results: campaign -->\ntoday, one core, Python 3.\n\n"
        "| what | tried | survived | failures | commit |\n|---|---|---|---|---|\n"
        "| kills | 1,200 | 1,199 | 1 | abc |\n| **all** | **1,200** | **1,199** | **1** |  |\n<!-- end -->\n"
        "All: <!-- results: faults -->1,200 faults tried, 1,199 survived<!-- end -->.\n"
    )
    page.write_text(page.read_text().replace("1,199 survived", "1,200 survived"))
    (line,) = documents.differences(project)
    assert line.startswith("docs/results/reliability.md: faults: found '1,200 faults tried, 1,200 survived'")


# ---- this project ---------------------------------------------------------------------------------------------------


def test_the_tables_of_this_project_are_those_of_its_cards():
    assert documents.differences(ROOT) == []


def test_a_digit_changed_in_readme_is_found(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    text = (ROOT / "README.md").read_text()
    start = text.index("| Self-Classifier, 3-layer convnet")
    place = start + text[start:].index("±") - 2  # the last digit of the accuracy
    digit = "1" if text[place] != "1" else "2"
    (tmp_path / "README.md").write_text(text[:place] + digit + text[place + 1 :])
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["results.py", "verify"])
    with pytest.raises(SystemExit) as stopped:
        results.main()
    output, _ = capsys.readouterr()
    assert stopped.value.code == 1
    assert output.startswith("README.md: overview: found ")

    monkeypatch.setattr(sys, "argv", ["results.py", "verify", "--write"])
    results.main()
    assert (tmp_path / "README.md").read_text() == text


def test_the_cards_of_this_project_are_small_and_name_no_machine():
    found = list((ROOT / "docs" / "results").rglob("*-[0-9]*.json"))
    assert len(found) >= 25
    assert sum(path.stat().st_size for path in found) < 2_000_000
    for path in found:
        card = json.loads(path.read_text())
        assert card["method"] in method_names()
        assert path.stat().st_size < 30_000
        assert {"config", "starts", "minutes", "per_epoch", "cls_eval"} <= card.keys()
        assert "/" not in json.dumps(card["config"])
