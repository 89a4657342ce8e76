"""cls_eval.py as a user types it: the list of who is where, grids of clusters, maps, other checkpoints beside it."""

import csv
import os
from functools import partial

import numpy as np
import pytest
import torch
from evaluating import digit_probabilities, make_pictures, save_untrained, torchvision_trunk
from PIL import Image
from sklearn.metrics import adjusted_mutual_info_score
from torchvision import transforms

from src import checkpoint
from src.config import parse_cls_eval
from src.data.datasets import open_data
from src.errors import InputError
from src.loading import load_method
from src.reports.clusters import best_clusters, clusters_by_log_sum


def save(path, *words, **more):
    """Two classifiers, of which the history names the second."""
    return save_untrained(path, "--classes", "10", "12", *words, history=[{"classifier": 1}], **more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "checkpoint.pt")


@pytest.fixture
def run(evaluate):
    return partial(evaluate, "cls_eval")


@pytest.fixture
def pictures(tmp_path):
    """A folder with val/ of three classes of three images."""
    colours = {"class_0": (150, 0, 0), "class_1": (0, 150, 0), "class_2": (0, 0, 150)}
    return make_pictures(tmp_path / "pictures", colours, splits=[("val", 3)], size=(260, 300), noise=100)


def listed(folder):
    with (folder / "out" / "clusters.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def clusters_of(path, classifier):
    return digit_probabilities(path)[classifier].argmax(dim=1).numpy()


def test_every_image_is_listed_with_its_cluster_and_its_class(trained, run, tmp_path):
    result, printed = run("--checkpoint", trained)
    data = open_data("digits", "test")
    probabilities = digit_probabilities(trained)[1]
    lines = listed(tmp_path)
    assert [int(line["image"]) for line in lines] == list(range(360))
    clusters = torch.tensor([int(line["cluster"]) for line in lines])
    confidences = probabilities.gather(1, clusters[:, None])[:, 0]
    torch.testing.assert_close(
        confidences, probabilities.amax(dim=1), rtol=1e-5, atol=0
    )  # the most probable, or as much
    assert [float(line["confidence"]) for line in lines] == pytest.approx(confidences.tolist(), rel=1e-3)
    assert [line["class"] for line in lines] == [data.classes[label] for label in data.labels.tolist()]
    right = sum(line["class"] == line["class_of_cluster"] for line in lines)
    assert right / 360 == pytest.approx(result["acc"])
    assert "clusters.csv" in printed


def test_files_without_labels_are_listed_by_name(run, tmp_path):
    path = save(tmp_path / "rgb.pt", "--global-crops-size", "16", channels=3)
    folder = tmp_path / "pictures"
    folder.mkdir()
    names = ["a, b.png", "ä.png", "plain.png", "“q”.png"]
    for i, name in enumerate(names):
        Image.fromarray(np.full((20, 24, 3), 60 * i, np.uint8)).save(folder / name)
    result, printed = run("--checkpoint", path, "--data", folder, "--workers", "0", "--tsne", "1", "--pca")
    lines = listed(tmp_path)
    assert set(lines[0]) == {"image", "cluster", "confidence"}
    assert {line["image"] for line in lines} == {str(folder / name) for name in names}
    sizes = np.bincount([int(line["cluster"]) for line in lines], minlength=12)
    assert sizes.tolist() == result["cluster_sizes"]
    assert "no labels, so no scores" in printed
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"cls_eval.json", "clusters.csv", "gallery.png", "sizes.png", "tsne_0.png", "pca.png"}


def test_best_clusters_by_hand():
    labels = np.array([0] * 9 + [1] * 1 + [1] * 9 + [2] * 8 + [2] * 12 + [0] * 6)
    clusters = np.array([4] * 10 + [7] * 9 + [2] * 8 + [5] * 18)
    found = best_clusters(labels, clusters, {4: 0, 7: 1, 2: 2, 5: 2})
    assert [row["cluster"] for row in found] == [7, 4, 5]  # 2 is pure, but has eight images
    assert [row["accuracy"] for row in found] == pytest.approx([1, 0.9, 12 / 18])
    assert found[2] == {"cluster": 5, "class": 2, "images": 18, "accuracy": pytest.approx(2 / 3)}


def test_grids_show_images_of_their_cluster(trained, run, monkeypatch, tmp_path):
    from src.reports import figures

    shown, grid = [], figures.grid
    monkeypatch.setattr(
        figures, "grid", lambda path, images, **how: shown.append((path.name, images)) or grid(path, images, **how)
    )
    result, printed = run("--checkpoint", trained, "--grids", "3")
    data = open_data("digits", "test")
    clusters = clusters_of(trained, 1)
    assert [name for name, _ in shown] == [f"grid_{rank}.png" for rank in range(len(result["grids"]))]
    assert 1 <= len(shown) <= 3
    for (_, images), row in zip(shown, result["grids"], strict=True):
        members = {data.picture(i).tobytes() for i in np.flatnonzero(clusters == row["cluster"])}
        assert len(images) == 9
        assert {image.tobytes() for image in images} <= members
        inside = data.labels.numpy()[clusters == row["cluster"]]
        assert row["images"] == len(inside)
        assert row["accuracy"] == pytest.approx((inside == data.classes.index(row["class"])).mean())
        assert f"cluster {row['cluster']}, {100 * row['accuracy']:.1f} %" in printed


def test_clusters_of_the_first_generation_by_hand():
    clusters = np.array([4] * 10 + [7] * 9 + [2] * 8 + [5] * 9)
    log_sums = np.array([3.0] * 5 + [5.0] * 5 + [9.0] * 9 + [1.0] * 8 + [2.0] * 9)
    found = clusters_by_log_sum(clusters, log_sums)  # cluster 2 has eight images
    assert found == [
        {"cluster": 5, "images": 9, "log_sum": 2.0},
        {"cluster": 4, "images": 10, "log_sum": 4.0},
        {"cluster": 7, "images": 9, "log_sum": 9.0},
    ]


def test_grids_of_the_first_generation_are_those_of_its_authors(run, monkeypatch, tmp_path):
    """The lowest mean of -Σ_y log p(y|x) comes first, and a grid shows the first nine images of its cluster."""
    from src.reports import figures

    words = ("--method", "self_classifier_v1", "--preset", "digits", "--num-classifiers", "2", "--num-classes", "6")
    path = save_untrained(tmp_path / "v1.pt", *words)
    state = checkpoint.load(path)
    method, _ = load_method(path)
    images = 2 * (open_data("digits", "test").images.float() / 255) - 1
    with torch.no_grad():  # centre the embeddings, so that the images are not all of one cluster
        mean = method.projection_head.mlp(method.backbone(images)).mean(dim=0)
    last = max((key for key in state["model"] if key.startswith("projection_head")), key=lambda key: key.split(".")[2])
    state["model"][last.rpartition(".")[0] + ".bias"] -= mean
    checkpoint.save(path, {key: state[key] for key in ("config", "history", "epoch", "model")})
    shown, grid = [], figures.grid
    monkeypatch.setattr(
        figures, "grid", lambda path, images, **how: shown.append((images, how)) or grid(path, images, **how)
    )
    result, printed = run("--checkpoint", path, "--grids", "15")
    data, probabilities = open_data("digits", "test"), digit_probabilities(path)[0].double()
    clusters, log_sums = probabilities.argmax(dim=1), -probabilities.log().sum(dim=1)
    means = {k: log_sums[clusters == k].mean().item() for k in clusters.unique().tolist() if (clusters == k).sum() >= 9}
    assert len(means) > 1
    assert [row["cluster"] for row in result["grids"]] == sorted(means, key=means.get)
    for (images, how), row in zip(shown, result["grids"], strict=True):
        assert how == {"framed": False}
        nine = np.flatnonzero(clusters == row["cluster"])[:9]
        assert all(np.array_equal(image, data.picture(i)) for image, i in zip(images, nine, strict=True))
        assert row["log_sum"] == pytest.approx(means[row["cluster"]], rel=1e-5)
        assert f"cluster {row['cluster']}, -Σ log p {row['log_sum']:.1f} on average" in printed


def test_grids_of_the_first_generation_need_no_labels(run, tmp_path):
    words = ("--num-classifiers", "2", "--num-classes", "2", "--arch", "small_convnet", "--global-crops-size", "16")
    words = ("--method", "self_classifier_v1", "--preset", "digits", *words)
    path = save_untrained(tmp_path / "rgb.pt", *words, channels=3)
    make_pictures(tmp_path / "pictures", {"": (90, 0, 0)}, splits=[("", 20)], size=(20, 24), noise=100)
    result, _ = run("--checkpoint", path, "--data", tmp_path / "pictures", "--workers", "0", "--grids", "1")
    assert set(result["grids"][0]) == {"cluster", "images", "log_sum"}
    assert (tmp_path / "out" / "grid_0.png").exists()
    with pytest.raises(InputError, match="--grids sorts clusters by accuracy"):
        run("--checkpoint", path, "--data", tmp_path / "pictures", "--workers", "0", "--grids", "1", "--kmeans", "2")


def test_agreement_with_other_checkpoints(trained, run, tmp_path):
    other = save(tmp_path / "other.pt", "--classes", "7", "9", seed=3)
    result, printed = run("--checkpoint", trained, "--compare", other, trained.parent)  # also the folder of a run
    ours, theirs = (clusters_of(path, 1) for path in (trained, other))
    expected = {str(other): adjusted_mutual_info_score(ours, theirs), str(trained.parent): 1}
    assert result["quality"]["compared_with"] == pytest.approx(expected, abs=1e-9)
    assert f"agreement with {other}: AMI {100 * expected[str(other)]:.1f}" in printed


def test_k_means_is_compared_with_a_classifier(trained, run):
    result, _ = run("--checkpoint", trained, "--kmeans", "4", "--restarts", "1", "--compare", trained)
    assert -0.1 < result["quality"]["compared_with"][str(trained)] < 1


def test_figures_as_pdf(trained, run, tmp_path):
    run("--checkpoint", trained, "--figures", "pdf", "--pca", "--tsne", "1", "--tsne-classes", "2", "--grids", "1")
    drawn = {path.name for path in (tmp_path / "out").iterdir()} - {"cls_eval.json", "clusters.csv"}
    assert drawn == {f"{name}.pdf" for name in ("confusion", "gallery", "sizes", "grid_0", "pca", "tsne_0")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "nowhere.pt"], "nowhere.pt"),
        (["--grids", "-1"], "--grids is -1"),
    ],
)
def test_wrong_flags(trained, run, words, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run("--checkpoint", trained, *words)
    assert not (tmp_path / "out").exists()


def test_classes_of_a_figure_without_the_figure_are_refused():
    words = ["--checkpoint", "x", "--tsne-classes", "10"]  # the default, and given all the same
    with pytest.raises(InputError, match="--tsne-classes has no effect: --tsne is not given; drop one of them"):
        parse_cls_eval(words)
    assert parse_cls_eval([*words, "--tsne", "1"]).tsne_classes == 10


def test_what_does_not_fit_is_refused_before_any_image_is_read(trained, run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "src.evaluation.classification.predict_clusters", lambda *_, **__: pytest.fail("images were read")
    )
    colour = save(tmp_path / "rgb.pt", "--global-crops-size", "16", channels=3)
    with pytest.raises(InputError, match=r"rgb\.pt: the network takes images with 3 channels, but --data digits has 1"):
        run("--checkpoint", trained, "--compare", colour)
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(folder / "a.png")
    with pytest.raises(InputError, match="--grids sorts clusters by accuracy"):
        run("--checkpoint", colour, "--data", folder, "--workers", "0", "--grids", "2")
    assert not (tmp_path / "out").exists()


# ---- networks of others ---------------------------------------------------------------------------------------------


def test_heads_of_scan_and_sela_are_scored(run, pictures, tmp_path):
    network, data = torchvision_trunk("resnet18"), open_data(str(pictures), "test")
    transform = transforms.Compose(
        [
            transforms.Resize(256, antialias=True),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    torch.manual_seed(0)
    heads = [torch.nn.Linear(512, 5), torch.nn.Linear(512, 5), torch.nn.Linear(512, 4)]
    with torch.no_grad():
        features = network(torch.stack([transform(Image.fromarray(data.picture(i))) for i in range(len(data))]))
        for head in heads:
            head.bias -= head(features).mean(dim=0)  # so that the images are not all of one cluster
        logits = [head(features) for head in heads]
    assert min(len(each.argmax(dim=1).unique()) for each in logits) > 1
    scan = {f"backbone.{key}": value for key, value in network.state_dict().items()}
    for k, head in enumerate(heads):
        scan |= {f"cluster_head.{k}.{name}": value for name, value in head.state_dict().items()}
    torch.save({"model": scan, "head": 1}, tmp_path / "scan.pth.tar")
    sela = network.state_dict() | {f"fc.{name}": value for name, value in heads[2].state_dict().items()}
    torch.save({"state_dict": sela, "labels": torch.zeros(1, 99)}, tmp_path / "sela.pth")

    def listed_as_most_likely(logits):
        """The pixels are equal, but the sums of the networks may round otherwise."""
        clusters = torch.tensor([int(line["cluster"]) for line in listed(tmp_path)])
        short = logits.amax(dim=1) - logits.gather(1, clusters[:, None])[:, 0]
        return (short < 1e-4).all()

    words = ("--arch", "resnet18", "--data", pictures, "--workers", "0")
    result, printed = run("--checkpoint", tmp_path / "scan.pth.tar", *words)
    assert (result["classifier"], result["method"]) == (1, "SCAN, ResNet-50")
    assert [row["size"] for row in result["classifiers"]] == [5, 5, 4]
    assert "classifier 1 (chosen)" in printed
    assert listed_as_most_likely(logits[1])
    result, _ = run("--checkpoint", tmp_path / "sela.pth", *words)
    assert (result["classifier"], len(result["cluster_sizes"])) == (0, 4)
    assert listed_as_most_likely(logits[2])

    scan["cluster_head.0.weight"] = torch.zeros(5, 100)
    torch.save({"model": scan, "head": 1}, tmp_path / "narrow.pth")
    found = r"classifiers\.0\.weight has the shape \(5, 100\), but the backbone resnet18 has 512"
    with pytest.raises(InputError, match=found):
        run("--checkpoint", tmp_path / "narrow.pth", "--data", pictures, "--workers", "0")


def test_a_backbone_alone_has_no_clusters(run, pictures, tmp_path):
    torch.save(torchvision_trunk("resnet18").state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(InputError, match=r"without classifiers.*; --kmeans K clusters the features of any backbone"):
        run("--checkpoint", tmp_path / "backbone.pth", "--arch", "resnet18", "--data", pictures)


# ---- what is left behind --------------------------------------------------------------------------------------------


def test_a_second_evaluation_leaves_nothing_of_the_first(trained, run, tmp_path):
    run("--checkpoint", trained, "--grids", "2", "--tsne", "1", "--tsne-classes", "2")
    (tmp_path / "out" / "mine.png").touch()
    run("--checkpoint", trained, "--classifier", "0", "--figures", "pdf")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"cls_eval.json", "clusters.csv", "confusion.pdf", "gallery.pdf", "sizes.pdf", "mine.png"}


def test_an_evaluation_that_is_cut_off_changes_nothing(trained, run, tmp_path, monkeypatch):
    run("--checkpoint", trained)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def cut_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("src.reports.clusters.write_clusters", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run("--checkpoint", trained, "--classifier", "0", "--pca")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_folder_in_the_way_is_named(trained, run, tmp_path):
    (tmp_path / "out" / "clusters.csv").mkdir(parents=True)
    with pytest.raises(InputError, match=r"--output-dir .*clusters\.csv: Is a directory; give another"):
        run("--checkpoint", trained)
    assert not list((tmp_path / "out").glob(".*"))
    assert not (tmp_path / "out" / "cls_eval.json").exists()


def test_weights_that_are_no_numbers_are_refused(trained, run, tmp_path):
    state = checkpoint.load(trained)
    state["model"] = {
        key: torch.full_like(v, torch.nan) if v.is_floating_point() else v for key, v in state["model"].items()
    }
    checkpoint.save(tmp_path / "nan.pt", {key: state[key] for key in ("config", "history", "epoch", "model")})
    with pytest.raises(InputError, match="probabilities that are NaN or infinite for 360 of 360 images"):
        run("--checkpoint", tmp_path / "nan.pt")
    with pytest.raises(InputError, match="features that are NaN or infinite for 360 of 360 images"):
        run("--checkpoint", tmp_path / "nan.pt", "--kmeans", "3")
    assert not (tmp_path / "out").exists()


def test_names_that_are_no_text_are_listed_and_drawn(run, tmp_path):
    path = save(tmp_path / "rgb.pt", "--global-crops-size", "16", channels=3)
    folder = os.fsencode(tmp_path / "pictures" / "val") + b"/C\xff"
    os.makedirs(folder)
    for name in (b"a\rb.png", b"\xe4.png", b"n\nl.png"):
        with open(os.path.join(folder, name), "wb") as file:
            Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(file, "PNG")
    run("--checkpoint", path, "--data", tmp_path / "pictures", "--workers", "0", "--pca")
    with (tmp_path / "out" / "clusters.csv").open(encoding="utf-8", newline="") as file:
        escaped = [line["image"] for line in csv.DictReader(file)]
    names = {os.fsencode(name.encode("latin-1", "backslashreplace").decode("unicode_escape")) for name in escaped}
    assert names == {os.path.join(folder, name) for name in (b"a\rb.png", b"\xe4.png", b"n\nl.png")}
    os.remove(os.path.join(folder, b"a\rb.png"))
    with pytest.raises(InputError, match="needs three, there are 2"):
        run("--checkpoint", path, "--data", tmp_path / "pictures", "--workers", "0", "--tsne", "1")


def test_a_history_that_names_no_classifier_or_one_too_many(run, tmp_path):
    result, _ = run("--checkpoint", save_untrained(tmp_path / "a.pt", "--classes", "10", history=[{"loss": 1.0}]))
    assert result["classifier_chosen_by"] == "being the first"
    path = save_untrained(tmp_path / "b.pt", "--classes", "10", history=[{"classifier": 9}])
    with pytest.raises(
        InputError, match="the checkpoint names classifier 9: this checkpoint has the classifiers 0 to 0"
    ):
        run("--checkpoint", path)
