"""predict.py as a user types it: every image once, sorted, interrupted and continued, and whatever a folder may hold."""

import csv
import hashlib
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from evaluating import read_json, run_here, save_untrained
from PIL import Image
from processes import Forked, environment

from src import checkpoint, fingerprints
from src.config import parse_cls_eval, parse_predict
from src.data import stream
from src.data.datasets import open_data
from src.data.unpack import write_files
from src.data.walk import walk
from src.errors import InputError, RunError, printable
from src.evaluation.session import open_session
from src.features import predict_clusters
from src.loading import load_classifiers
from src.prediction import program
from src.prediction.atlas import labels_of
from src.prediction.names import Names, as_file_name
from src.prediction.sorting import file_name

HEAD = ("--hidden-dim", "32", "--dim", "16", "--queue-length", "0")
SMALL = ("--arch", "small_convnet", "--global-crops-size", "16", "--local-crops-number", "0", *HEAD)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint for digits with two classifiers, of which the history names the second."""
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    return save_untrained(path, *HEAD, "--classes", "10", "12", history=[{"classifier": 1}])


def save_coloured(path, seed=0):
    """Write a checkpoint for small colour images that tells colours apart, and whose training images are nowhere."""
    save_untrained(path, *SMALL, "--classes", "5", "5", "--data", "nowhere", channels=3, seed=seed)
    network, _ = load_classifiers(path)
    colours = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1]]).view(5, 3, 1, 1) * 4 - 2.0
    with torch.no_grad():
        embeddings = network.embed(colours.expand(5, 3, 16, 16))
    state = checkpoint.load(path)
    for k in range(2):
        state["model"][f"classifiers.{k}.weight_v"].copy_(embeddings - embeddings.mean(dim=0))
    checkpoint.save(path, {key: state[key] for key in ("config", "history", "epoch", "model")})
    return path


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    return save_coloured(tmp_path_factory.mktemp("run") / "checkpoint.pt")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A flat folder of 40 digits."""
    folder = tmp_path_factory.mktemp("digits") / "flat"
    write_files(open_data("digits", "test"), folder, most=40)
    return folder


def make_colours(folder, names, size=(20, 24)):
    """Write one picture of a random colour with noise under each of these names, which may hold folders."""
    rng = np.random.default_rng(0)
    for name in names:
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            pixels = rng.integers(0, 200, 3) + rng.integers(0, 56, (*size, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return folder


def predict(file, data, out, *words):
    """Run predict.py without workers, and without the atlas unless it is asked for."""
    words = words if "--atlas" in words else ("--no-atlas", *words)
    run_here("predict", "--checkpoint", file, "--data", data, "--output-dir", out, "--workers", "0", *words)


def lines_of(out, name="assignments.csv"):
    with (out / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def restored(text):
    """Undo the escapes of `printable`."""
    return text.encode("latin-1", "backslashreplace").decode("unicode_escape")


def checksums(folder):
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def tree(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


# ---- predictions ----------------------------------------------------------------------------------------------------


def test_every_digit_is_listed_once_as_the_network_sees_it(trained, digits, tmp_path):
    predict(trained, digits, tmp_path / "out", "--batch-size", "16")
    lines = lines_of(tmp_path / "out")
    assert [line["path"] for line in lines] == [f"{i:05}.png" for i in range(40)]
    network, _ = load_classifiers(trained)
    images = 2 * (open_data("digits", "test").images[:40].float() / 255) - 1
    with torch.no_grad():
        p = (network.predict(images)[1] / network.temperature).softmax(dim=1)
        embeddings = network.embed(images)
        known = network.embed(2 * (open_data("digits", "train").images.float() / 255) - 1)
        owner = network.classifiers[1](known).argmax(dim=1)
    best, order = p.sort(dim=1, descending=True, stable=True)
    for i, line in enumerate(lines):
        assert (int(line["cluster"]), int(line["second_cluster"])) == tuple(order[i, :2].tolist())
        assert float(line["confidence"]) == pytest.approx(best[i, 0].item(), abs=1e-6)
        assert float(line["second_probability"]) == pytest.approx(best[i, 1].item(), abs=1e-6)
        mean = known[owner == order[i, 0]].mean(dim=0)
        expected = (embeddings[i] - mean).norm().item() if len(known[owner == order[i, 0]]) else None
        assert float(line["distance"]) == pytest.approx(expected, abs=2e-3)
    result = read_json(tmp_path / "out", "predict")
    assert (result["images"], result["classifier"], result["means_of"]) == (40, 1, "1,437 training images")


def test_the_probabilities_are_those_of_cls_eval(coloured, tmp_path):
    folder = make_colours(tmp_path / "pictures", [f"{i}.png" for i in range(9)])
    predict(coloured, folder, tmp_path / "out", "--batch-size", "4")
    words = ["--checkpoint", str(coloured), "--data", str(folder), "--workers", "0"]
    session = open_session(parse_cls_eval(words), part="classifiers", splits=("test",), batch_size=256)
    data = session.splits["test"]
    clusters, confidences, *_ = predict_clusters(session.network, session.batches(data), len(data))
    lines = lines_of(tmp_path / "out")
    assert [line["path"] for line in lines] == [os.path.relpath(path, folder) for path in data.paths]
    assert [int(line["cluster"]) for line in lines] == clusters[0].tolist()
    assert [float(line["confidence"]) for line in lines] == pytest.approx(confidences[0].tolist(), abs=1e-6)
    assert {line["name"] for line in lines} == {f"cluster {k}" for k in set(clusters[0].tolist())}


def test_without_training_images_the_means_are_those_of_the_predicted_images(coloured, tmp_path):
    folder = make_colours(tmp_path / "pictures", [f"{i}.png" for i in range(6)])
    predict(coloured, folder, tmp_path / "out")
    assert read_json(tmp_path / "out", "predict")["means_of"] == "6 predicted images"
    sizes = [each["images"] for each in read_json(tmp_path / "out", "predict")["clusters"]]
    for line in lines_of(tmp_path / "out"):
        if sizes[int(line["cluster"])] == 1:  # the image is the mean
            assert float(line["distance"]) == 0


def test_nested_folders_and_one_image(coloured, tmp_path):
    names = ["a/1.png", "a/b/2.png", "c/3.png", "top.png"]
    folder = make_colours(tmp_path / "pictures", names)
    predict(coloured, folder, tmp_path / "out")
    assert [line["path"] for line in lines_of(tmp_path / "out")] == names
    predict(coloured, folder / "a/b/2.png", tmp_path / "one", "--sort", "copies")
    (line,) = lines_of(tmp_path / "one")
    (beside,) = (each for each in lines_of(tmp_path / "out") if each["path"] == "a/b/2.png")
    assert (line["path"], line["cluster"]) == ("2.png", beside["cluster"])
    assert float(line["confidence"]) == pytest.approx(float(beside["confidence"]), abs=1e-6)
    assert tree(tmp_path / "one" / "sorted") == {f"{line['cluster']}/2.png"}


def test_the_default_folder_has_the_name_of_the_data(trained, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_here("predict", "--checkpoint", trained, "--data", digits, "--workers", "0")
    assert (tmp_path / "runs" / "predicted" / "flat" / "assignments.csv").exists()


def test_workers_return_the_same(trained, digits, tmp_path):
    for workers in ("0", "1"):
        run_here(
            *("predict", "--checkpoint", trained, "--data", digits, "--batch-size", "8"),
            *("--workers", workers, "--output-dir", tmp_path / workers),
        )
    assert lines_of(tmp_path / "0") == lines_of(tmp_path / "1")


def test_only_a_few_batches_are_read_ahead(trained, digits):
    asked = []

    def requests():
        for i in range(40):
            asked.append(i)
            yield [(i, str(digits / f"{i:05}.png"))]

    views = program.open_classifier(
        parse_predict(["--checkpoint", str(trained), "--data", str(digits)]), example=str(digits / "00000.png")
    ).views
    batches = stream.stream(requests(), views, device=torch.device("cpu"), workers=0)
    next(batches)
    assert len(asked) == 1
    batches.close()


# ---- trust and atlas ------------------------------------------------------------------------------------------------


def test_partition_clusters_and_images_are_judged(coloured, tmp_path, capsys):
    folder = make_colours(tmp_path / "pictures", [f"{i}.png" for i in range(30)])
    predict(coloured, folder, tmp_path / "out")
    found = read_json(tmp_path / "out", "predict")["trust"]
    # Both classifiers of this network are equal.
    assert (found["partition"]["level"], found["partition"]["independent"]) == ("yellow", 0)
    assert (found["partition"]["same_run"], found["partition"]["same_run_confirms"]) == (1, 1)
    lines = lines_of(tmp_path / "out")
    confidences = np.array([float(line["confidence"]) for line in lines])
    assert found["images"]["expected_accuracy"] == pytest.approx(confidences.mean(), abs=1e-6)
    levels = ["green" if c >= 0.9 else "yellow" if c >= 0.6 else "red" for c in confidences]
    assert [line["trust"] for line in lines] == levels
    assert sum(each["images"] for each in found["clusters"]) == found["sample"] == 30
    assert {each["stability"] for each in found["clusters"]} <= {1.0, None}
    printed = capsys.readouterr().out
    assert "partition: yellow, no independent run to compare with" in printed
    assert "1 of 1 other classifiers of this run find the same partition" in printed


def test_the_atlas_shows_the_predictions(coloured, tmp_path):
    names = ["a/<b>.png", "a/1.png", "b/2.png"]
    folder = make_colours(tmp_path / "pictures", names)
    predict(coloured, folder, tmp_path / "out", "--atlas")
    page = (tmp_path / "out" / "atlas.html").read_text()
    assert "3 images" in page
    assert "partition: yellow" in page
    assert "a/<b>.png" not in page  # it is escaped


def test_class_folders_are_labels():
    labels, classes = labels_of(["a/1.png", "b/c/2.png", "a/3.png"])
    assert (labels.tolist(), classes) == ([0, 1, 0], ["a", "b"])
    assert labels_of(["a/1.png", "2.png"]) == (None, [])
    assert labels_of(["a/1.png", "a/2.png"]) == (None, [])


# ---- sorted folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["links", "copies"])
def test_images_are_sorted_and_the_originals_stay_as_they_were(kind, coloured, tmp_path):
    folder = make_colours(tmp_path / "pictures", ["a.png", "b/a.png", "b/c.png", "b__c.png"])
    before = checksums(folder)
    predict(coloured, folder, tmp_path / "out", "--sort", kind)
    assert checksums(folder) == before
    found = {}
    for path in (tmp_path / "out" / "sorted").rglob("*.png"):
        assert path.is_symlink() == (kind == "links")
        found[hashlib.sha256(path.read_bytes()).hexdigest()] = path.parent.name
    assert sorted(found) == sorted(before.values())
    by_path = {line["path"]: line["cluster"] for line in lines_of(tmp_path / "out")}
    assert all(found[before[str(folder / path)]] == cluster for path, cluster in by_path.items())


def test_links_become_copies_and_stay_sorted_after_an_update(coloured, tmp_path):
    folder = make_colours(tmp_path / "pictures", ["a.png", "b.png"])
    predict(coloured, folder, tmp_path / "out", "--sort", "links")
    predict(coloured, folder, tmp_path / "out", "--sort", "copies")
    (folder / "a.png").unlink()
    Image.open(folder / "b.png").rotate(180).save(folder / "b.png")  # the same colours, and so the same cluster
    make_colours(folder, ["new.png"])
    predict(coloured, folder, tmp_path / "out", "--update")
    (copy,) = (tmp_path / "out" / "sorted").rglob("b.png")
    assert copy.read_bytes() == (folder / "b.png").read_bytes()
    by_path = {f"{line['cluster']}/{line['path']}" for line in lines_of(tmp_path / "out")}
    assert tree(tmp_path / "out" / "sorted") == by_path
    assert not any(path.is_symlink() for path in (tmp_path / "out" / "sorted").rglob("*"))


def test_a_link_in_the_output_folder_is_not_followed(coloured, tmp_path):
    folder = make_colours(tmp_path / "pictures", ["a.png"])
    outside = tmp_path / "outside"
    outside.mkdir()
    predict(coloured, folder, tmp_path / "out")
    (tmp_path / "out" / "sorted").symlink_to(outside)
    with pytest.raises(InputError, match="is a link or a file, expected a folder"):
        predict(coloured, folder, tmp_path / "out", "--sort", "copies")
    (tmp_path / "out" / "sorted").unlink()
    (tmp_path / "out" / "sorted").mkdir()
    (tmp_path / "out" / "sorted" / lines_of(tmp_path / "out")[0]["cluster"]).symlink_to(outside)
    with pytest.raises(InputError, match="is a link or a file, expected a folder"):
        predict(coloured, folder, tmp_path / "out", "--sort", "copies")
    assert not list(outside.iterdir())


def test_a_link_in_the_place_of_a_copy_is_replaced_and_not_written_through(coloured, tmp_path):
    folder = make_colours(tmp_path / "pictures", ["a.png"])
    predict(coloured, folder, tmp_path / "out")
    group = tmp_path / "out" / "sorted" / lines_of(tmp_path / "out")[0]["cluster"]
    group.mkdir(parents=True)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (group / "a.png").symlink_to(victim)
    predict(coloured, folder, tmp_path / "out", "--sort", "copies")
    assert victim.read_text() == "precious"
    assert (group / "a.png").read_bytes() == (folder / "a.png").read_bytes()


def test_different_paths_have_different_names(tmp_path):
    (tmp_path / "a__b.png").touch()
    paths = ["a__b.png", "a/b.png", "a_/b.png", "a/_b.png", "a__/b.png", "a/__b.png", "x" * 150 + "/" + "y" * 150]
    names = [file_name(path, tmp_path) for path in paths]
    assert len(set(names)) == len(paths)
    assert names[0] == "a__b.png"
    assert file_name("c/d.png", tmp_path) == "c__d.png"
    assert all(len(name.encode()) <= 255 and "/" not in name for name in names)


# ---- interrupted, continued, updated ------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that were decoded."""
    names, decode = [], stream.decode

    def counting(path):
        names.append(os.path.basename(path))
        return decode(path)

    monkeypatch.setattr(stream, "decode", counting)
    # The judgement of trust looks at a sample again.
    monkeypatch.setattr("src.prediction.network.Classifier.equals", property(lambda self: [self.number]))
    return names


def test_an_interrupted_run_continues_without_repeats_and_gaps(trained, digits, tmp_path, decoded, capsys, monkeypatch):
    real = stream.decode

    def interrupting(path):
        if path.endswith("00020.png"):
            signal.raise_signal(signal.SIGINT)
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "decode", interrupting)
        with pytest.raises(SystemExit) as end:
            predict(trained, digits, tmp_path / "out", "--batch-size", "8")
    assert end.value.code == 130
    assert "stopped by SIGINT after 24 of 40 files: the same command continues" in capsys.readouterr().out
    assert not (tmp_path / "out" / "assignments.csv").exists()
    predict(trained, digits, tmp_path / "out", "--batch-size", "8")
    assert sorted(decoded) == [f"{i:05}.png" for i in range(40)]
    assert "continuing: 24 of 40 files are done" in capsys.readouterr().out
    predict(trained, digits, tmp_path / "whole", "--batch-size", "8")
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "whole")


def _killed(file, data, out):
    decode = stream.decode

    def killing(path):
        if path.endswith("00020.png"):
            os._exit(9)
        return decode(path)

    stream.decode = killing
    predict(file, data, out, "--batch-size", "8")


def test_a_killed_run_continues(trained, digits, tmp_path, decoded):
    process = Forked(_killed, trained, digits, tmp_path / "out", environ=environment())
    assert process.finish(120).returncode == 9
    predict(trained, digits, tmp_path / "out", "--batch-size", "8")
    assert sorted(decoded) == [f"{i:05}.png" for i in range(16, 40)]
    assert [line["path"] for line in lines_of(tmp_path / "out")] == [f"{i:05}.png" for i in range(40)]


def test_an_update_predicts_only_what_is_new_or_changed(coloured, tmp_path, decoded, capsys):
    folder = make_colours(tmp_path / "pictures", ["a.png", "b.png", "c.png"])
    predict(coloured, folder, tmp_path / "out")
    first = {line["path"]: line for line in lines_of(tmp_path / "out")}
    (folder / "a.png").unlink()
    make_colours(folder, ["d/d.png"])
    shutil.copy(folder / "c.png", folder / "b.png")
    decoded.clear()
    predict(coloured, folder, tmp_path / "out")  # without --update the list stays
    assert not decoded
    assert len(lines_of(tmp_path / "out")) == 3
    predict(coloured, folder, tmp_path / "out", "--update")
    assert sorted(decoded) == ["b.png", "d.png"]
    assert "update: 1 new, 1 changed and 1 missing files" in capsys.readouterr().out
    second = {line["path"]: line for line in lines_of(tmp_path / "out")}
    assert sorted(second) == ["b.png", "c.png", "d/d.png"]
    assert second["b.png"]["cluster"] == first["c.png"]["cluster"]
    assert second["c.png"]["confidence"] == first["c.png"]["confidence"]


# ---- what a folder may hold ---------------------------------------------------------------------------------------


def test_files_that_are_no_images_are_listed_with_the_reason(coloured, tmp_path, capsys):
    folder = make_colours(tmp_path / "pictures", ["good.png", "cut.png"])
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:200])
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("no image")
    (folder / "notes.txt").write_text("notes")
    (folder / ".hidden.png").touch()
    (folder / "gone.png").symlink_to("nothing")
    os.mkfifo(folder / "pipe.png")
    (folder / "round").symlink_to(folder)
    predict(coloured, folder, tmp_path / "out")
    assert [line["path"] for line in lines_of(tmp_path / "out")] == ["good.png"]
    reasons = {line["path"]: line["reason"] for line in lines_of(tmp_path / "out", "skipped.csv")}
    assert sorted(reasons) == ["cut.png", "empty.jpg", "gone.png", "notes.txt", "pipe.png", "text.png"]
    assert reasons["notes.txt"].startswith("no image: expected a name that ends in .")
    assert reasons["gone.png"] == "cannot be read (No such file or directory)"
    assert reasons["pipe.png"] == "no regular file"
    assert "cannot be decoded" in reasons["cut.png"]
    assert str(folder) not in "".join(reasons.values())
    assert "1 image in 1 of 5 clusters" in capsys.readouterr().out


def test_a_folder_without_a_readable_image_ends_with_one_line(coloured, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "notes.txt").write_text("notes")
    with pytest.raises(InputError, match=r"no image in this folder; notes.txt: no image: expected a name"):
        predict(coloured, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (folder / "text.png").write_text("no image")
    with pytest.raises(RunError, match=r"none of the files in .* can be decoded: .*skipped.csv lists the reasons"):
        predict(coloured, folder, tmp_path / "out")
    assert len(lines_of(tmp_path / "out", "skipped.csv")) == 2


def test_any_file_name_is_listed_and_sorted(coloured, tmp_path):
    names = [
        b'"q".png',
        b"<b>x&.png",
        b"a\nb.png",
        "😀.png".encode(),
        b"\xff\xfe.png",
        b"a,b;c.png",
        b"back\\slash.png",
    ]
    folder = make_colours(tmp_path / "pictures", [os.fsdecode(name) for name in names])
    predict(coloured, folder, tmp_path / "out", "--sort", "links")
    lines = lines_of(tmp_path / "out")
    assert sorted(line["path"] for line in lines) == sorted(
        printable(os.fsdecode(name), reversible=True) for name in names
    )
    found = {os.fsencode(path.name): path for path in (tmp_path / "out" / "sorted").rglob("*.png")}
    assert sorted(found) == sorted(names)
    assert all(path.exists() for path in found.values())


def test_the_walk_is_sorted_and_leaves_a_folder_out(tmp_path):
    make_colours(tmp_path, ["b/1.png", "a/2.png", "a/c/3.png", "z.png", "out/4.png"])
    (tmp_path / "link").symlink_to(tmp_path / "a")
    status = (tmp_path / "out").stat()
    paths = [entry.path for entry in walk(tmp_path, without=(status.st_dev, status.st_ino))]
    assert paths == ["z.png", "a/2.png", "a/c/3.png", "b/1.png"]


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "found", "a/found"])
def test_an_output_folder_inside_the_input_is_refused(place, coloured, tmp_path):
    folder = make_colours(tmp_path / "pictures", ["a/1.png"])
    before = tree(folder)
    (tmp_path / "link").symlink_to(folder)
    for out in (folder / place, tmp_path / "link" / place):
        with pytest.raises(InputError, match="lies in --data"):
            predict(coloured, folder, out)
    assert tree(folder) == before


def test_an_output_folder_with_other_files_is_refused(coloured, tmp_path):
    folder = make_colours(tmp_path / "pictures", ["1.png"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"holds other files, such as thesis\.txt"):
        predict(coloured, folder, tmp_path / "out")
    assert tree(tmp_path / "out") == {"thesis.txt"}
    with pytest.raises(InputError, match=r"lies in --data|holds other files"):
        predict(coloured, folder, tmp_path)


def test_a_folder_with_predictions_of_something_else_is_refused(coloured, trained, digits, tmp_path):
    folder = make_colours(tmp_path / "pictures", ["1.png"])
    other = make_colours(tmp_path / "other", ["1.png"])
    predict(coloured, folder, tmp_path / "out")
    with pytest.raises(InputError, match="holds predictions of other images"):
        predict(coloured, other, tmp_path / "out")
    with pytest.raises(InputError, match="holds predictions of classifier 0"):
        predict(coloured, folder, tmp_path / "out", "--classifier", "1")
    again = save_coloured(tmp_path / "again.pt", seed=1)
    with pytest.raises(InputError, match="holds predictions of another checkpoint"):
        predict(again, folder, tmp_path / "out")
    with pytest.raises(InputError, match="holds predictions of another evaluation view"):
        predict(coloured, folder, tmp_path / "out", "--eval-size", "24")
    assert len(lines_of(tmp_path / "out")) == 1


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\0" + bytes(100), b"nonsense" * 1000])
def test_a_damaged_database_is_refused(content, coloured, tmp_path):
    folder = make_colours(tmp_path / "pictures", ["1.png"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.db").write_bytes(content)
    if not content:  # the file was created and the process killed
        predict(coloured, folder, tmp_path / "out")
        return
    with pytest.raises(InputError, match=r"damaged, or not written by this version of predict\.py"):
        predict(coloured, folder, tmp_path / "out")
    assert (tmp_path / "out" / "predictions.db").read_bytes() == content


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x"], "--checkpoint is missing"),
        (["--checkpoint", "x"], "--data is missing"),
        (["--checkpoint", "x", "--data", "digits"], "expected a folder of image files, or one image file"),
        (["--checkpoint", "x", "--data", "x", "--batch-size", "0"], "--batch-size is 0"),
    ],
)
def test_wrong_flags(words, message):
    with pytest.raises(InputError, match=message):
        parse_predict(words)


def test_what_is_missing_is_named(coloured, tmp_path):
    with pytest.raises(InputError, match="no such folder or file"):
        predict(coloured, tmp_path / "nothing", tmp_path / "out")
    folder = make_colours(tmp_path / "pictures", ["1.png"])
    with pytest.raises(InputError, match="classifiers 0 to 1"):
        predict(coloured, folder, tmp_path / "out", "--classifier", "2")
    assert not (tmp_path / "out").exists()


# ---- names --------------------------------------------------------------------------------------------------------


def save_names(path, file, classifier=0, **content):
    network, _ = load_classifiers(file)
    head = {"format": "self-classifier names", "version": 1, "model": fingerprints.of_weights(network)}
    path.write_text(json.dumps({**head, "classifier": classifier, **content}))
    return path


def test_names_are_applied_and_remembered(coloured, tmp_path):
    folder = make_colours(tmp_path / "pictures", [f"{i}.png" for i in range(30)])
    predict(coloured, folder, tmp_path / "out", "--sort", "links")
    lines = lines_of(tmp_path / "out")
    used = sorted({int(line["cluster"]) for line in lines})
    assert len(used) >= 2
    first, second, *_ = used
    moved = next(line["path"] for line in lines if int(line["cluster"]) == first)
    clusters = {str(first): {"name": "Ä/../cats"}, str(second): {"into": first}}
    clusters |= {str(k): {"rejected": True} for k in used[2:]}
    names = save_names(
        tmp_path / "names.json", coloured, clusters=clusters, split=[{"name": "odd", "from": first, "images": [moved]}]
    )
    predict(coloured, folder, tmp_path / "out", "--names", names)
    for _ in range(2):
        groups = {}
        for line in lines_of(tmp_path / "out"):
            k = int(line["cluster"])
            groups[line["path"]] = line["name"]
            expected = "odd" if line["path"] == moved else "Ä/../cats" if k in (first, second) else "rejected"
            assert line["name"] == expected
        folders = {"odd": "split odd", "Ä/../cats": f"{first} Ä_.._cats", "rejected": "rejected"}
        assert tree(tmp_path / "out" / "sorted") == {f"{folders[name]}/{path}" for path, name in groups.items()}
        predict(coloured, folder, tmp_path / "out")  # without --names, those of the last run stay


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": "another"}, "the names belong to another model"),
        ({"classifier": 1}, "the names belong to classifier 1, but this is classifier 0"),
        ({"format": "x"}, "not a file of names"),
        ({"clusters": {"5": {}}}, "expected the numbers 0 to 4"),
        ({"clusters": {"-1": {}}}, "expected the numbers 0 to 4"),
        ({"clusters": []}, "expected the numbers 0 to 4"),
        ({"clusters": {"0": {"name": 3}}}, "a name is '3'"),
        ({"clusters": {"0": {"name": " "}}}, "expected text of 1 to 200 characters"),
        ({"clusters": {"0": {"name": "x" * 201}}}, "expected text of 1 to 200 characters"),
        ({"clusters": {"0": {"into": 0}}}, "cluster 0 is merged into 0, expected another cluster"),
        ({"clusters": {"0": {"into": 9}}}, "cluster 0 is merged into 9, expected another cluster"),
        ({"clusters": {"0": {"into": 1}, "1": {"into": 2}}}, "which is itself merged into 2"),
        ({"split": [{"name": "x", "images": "a"}]}, "split holds something else"),
        ({"split": [3]}, "split holds something else"),
    ],
)
def test_names_that_do_not_fit_are_refused(content, message, coloured, tmp_path):
    folder = make_colours(tmp_path / "pictures", ["1.png"])
    names = save_names(tmp_path / "names.json", coloured, **content)
    with pytest.raises(InputError, match=message):
        predict(coloured, folder, tmp_path / "out", "--names", names)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", None])
def test_a_file_that_holds_no_names_is_refused(content, coloured, tmp_path):
    folder = make_colours(tmp_path / "pictures", ["1.png"])
    if content is not None:
        (tmp_path / "names.json").write_bytes(content)
    with pytest.raises(InputError, match="expected the file that the atlas saves"):
        predict(coloured, folder, tmp_path / "out", "--names", tmp_path / "names.json")


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", ".", "a\0b", "a\nb", "😀", "x" * 300, " . ", "C:\\x"])
def test_folders_of_clusters_have_names_that_stay_inside(name):
    found = as_file_name(name)
    assert found not in ("", ".", "..")
    assert "/" not in found
    assert found.isprintable()
    assert len(found.encode()) <= 100
    names = Names(clusters=12, names={3: name})
    assert names.folder_of(3, "a.png") == f"03 {found}"
    assert names.folder_of(4, "a.png") == "04"
