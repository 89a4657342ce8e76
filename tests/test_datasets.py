"""Data sets from the files their authors publish, and folders of images as users have them."""

import hashlib
import os
import pickle
import re
import shutil
from urllib.error import URLError

import numpy as np
import pytest
import torch
from evaluating import SMALL, make_pictures
from PIL import Image
from torchvision.datasets import stl10

from src import checkpoint
from src.config import SUBSETS, parse_cls_eval, parse_knn_eval, parse_lincls_eval, parse_train
from src.data.datasets import CIFAR100_SUPERCLASSES, open_data, open_folder, published_classes
from src.errors import InputError

SUPERCLASSES = """
aquatic_mammals: beaver dolphin otter seal whale
fish: aquarium_fish flatfish ray shark trout
flowers: orchid poppy rose sunflower tulip
food_containers: bottle bowl can cup plate
fruit_and_vegetables: apple mushroom orange pear sweet_pepper
household_electrical_devices: clock keyboard lamp telephone television
household_furniture: bed chair couch table wardrobe
insects: bee beetle butterfly caterpillar cockroach
large_carnivores: bear leopard lion tiger wolf
large_man-made_outdoor_things: bridge castle house road skyscraper
large_natural_outdoor_scenes: cloud forest mountain plain sea
large_omnivores_and_herbivores: camel cattle chimpanzee elephant kangaroo
medium-sized_mammals: fox porcupine possum raccoon skunk
non-insect_invertebrates: crab lobster snail spider worm
people: baby boy girl man woman
reptiles: crocodile dinosaur lizard snake turtle
small_mammals: hamster mouse rabbit shrew squirrel
trees: maple_tree oak_tree palm_tree pine_tree willow_tree
vehicles_1: bicycle bus motorcycle pickup_truck train
vehicles_2: lawn_mower rocket streetcar tank tractor
"""
MEMBERS = {line.split(": ")[0]: line.split(": ")[1].split() for line in SUPERCLASSES.strip().splitlines()}
# of the lists of ImageNet-50, -100 and -200
DIGESTS = ["1bf348de16b5d843", "cc76c3260eea6dd8", "8f129a78304272c8"]
FINE = sorted(name for names in MEMBERS.values() for name in names)


@pytest.fixture
def unchecked(monkeypatch):
    """Let small files stand for the published ones, whose checksums torchvision knows."""
    for module in ("cifar", "stl10"):
        monkeypatch.setattr(
            f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: os.path.isfile(path)
        )


def write_pickle(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))


def pixels(count, seed=0):
    """Rows of CIFAR's files: 1024 red values, row by row, then green, then blue."""
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def test_cifar10_joins_five_batches_in_order(tmp_path, unchecked):
    folder = tmp_path / "cifar-10-batches-py"
    for i in range(1, 6):
        write_pickle(folder / f"data_batch_{i}", {"data": pixels(2, i), "labels": [i, 9 - i]})
    write_pickle(folder / "test_batch", {"data": pixels(3), "labels": [7, 0, 9]})
    write_pickle(folder / "batches.meta", {"label_names": [f"class{k}" for k in range(10)]})
    train, test = (open_data("cifar10", split, root=str(tmp_path)) for split in ("train", "test"))
    assert train.labels.tolist() == [1, 8, 2, 7, 3, 6, 4, 5, 5, 4]
    assert torch.equal(train.images[2].flatten(), torch.from_numpy(pixels(2, 2)[0]))
    assert (test.images.shape, test.images.dtype, test.channels) == ((3, 3, 32, 32), torch.uint8, 3)
    assert test.labels.tolist() == [7, 0, 9]
    assert test.classes[9] == "class9"
    assert test.picture(1)[2, 5].tolist() == [pixels(3)[1, c * 1024 + 2 * 32 + 5] for c in range(3)]


def test_cifar100_superclasses_are_those_of_its_authors(tmp_path, unchecked):
    folder = tmp_path / "cifar-100-python"
    for name in ("train", "test"):
        write_pickle(folder / name, {"data": pixels(100), "fine_labels": list(range(100)), "coarse_labels": [0] * 100})
    write_pickle(folder / "meta", {"fine_label_names": FINE})
    data = open_data("cifar100-20", "train", root=str(tmp_path))
    assert list(MEMBERS) == data.classes == CIFAR100_SUPERCLASSES
    found = {
        name: [fine for fine, k in zip(FINE, data.labels, strict=True) if k == i] for i, name in enumerate(MEMBERS)
    }
    assert found == MEMBERS


def write_stl10(root):
    folder = root / "stl10_binary"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 96, 96), dtype=np.uint8)  # stored column by column
    images[:3].tofile(folder / "train_X.bin")
    np.array([1, 10, 4], np.uint8).tofile(folder / "train_y.bin")  # 1..10
    images[3:5].tofile(folder / "unlabeled_X.bin")
    images[5:].tofile(folder / "test_X.bin")
    np.array([2], np.uint8).tofile(folder / "test_y.bin")
    (folder / "class_names.txt").write_text("airplane bird car cat deer dog horse monkey ship truck".replace(" ", "\n"))
    return torch.from_numpy(images).mT


def test_stl10_trains_on_labelled_and_unlabelled_images(tmp_path, unchecked):
    images = write_stl10(tmp_path)
    train, test = (open_data("stl10", split, root=str(tmp_path)) for split in ("train", "test"))
    assert train.labels.tolist() == [0, 9, 3, -1, -1]
    assert test.labels.tolist() == [1]
    assert torch.equal(train.images, images[:5])
    assert torch.equal(test.images, images[5:])
    assert (train.classes[0], train.classes[9], train.labels.dtype) == ("airplane", "truck", torch.int64)


def test_stl10_without_class_names_is_refused(tmp_path, unchecked):
    write_stl10(tmp_path)
    (tmp_path / "stl10_binary" / "class_names.txt").unlink()
    with pytest.raises(InputError, match=r"class_names\.txt is missing"):
        open_data("stl10", "train", root=str(tmp_path))


@pytest.mark.parametrize("name", ["cifar10", "cifar100-20", "stl10"])
def test_missing_files_name_the_folder_and_the_way_out(tmp_path, name):
    with pytest.raises(InputError, match=f"--data {name}: .*--data-root {tmp_path}.*: pass --download to download it"):
        open_data(name, "train", root=str(tmp_path))


# --------------------------------------------------------------------------------------------------------------------
# folders


def save(path, mode="RGB", colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 4), colour).save(path)


def names(data, top):
    return [os.path.relpath(path, top) for path in data.paths]


@pytest.fixture
def classes(tmp_path):
    for name in (
        "train/dog/b.png",
        "train/dog/deep/a.JPG",
        "train/blue cat/c.png",
        "train/ämne/d.png",
        "val/dog/e.png",
    ):
        save(tmp_path / name)
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no image")
    save(tmp_path / "train" / "dog" / ".hidden.png")
    return tmp_path


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_class_folders_are_classes_in_order_of_their_names(classes, held_out):
    (classes / "val").rename(classes / held_out)
    train, test = (open_folder(str(classes), split) for split in ("train", "test"))
    assert train.classes == ["blue cat", "dog", "ämne"]
    assert names(train, classes) == [
        "train/blue cat/c.png",
        "train/dog/b.png",
        "train/dog/deep/a.JPG",
        "train/ämne/d.png",
    ]
    assert train.labels.tolist() == [0, 1, 1, 2]
    assert names(test, classes) == [f"{held_out}/dog/e.png"]


def test_flat_and_nested_folders_have_no_labels_and_are_both_splits(tmp_path):
    for name in ("b.png", "x/y/a.webp", "日本.png", ".git/c.png"):
        save(tmp_path / name)
    for split in ("train", "test"):
        data = open_folder(str(tmp_path), split)
        assert names(data, tmp_path) == ["b.png", "x/y/a.webp", "日本.png"]
        assert (data.labels.tolist(), data.classes) == ([-1] * 3, [])


@pytest.fixture
def without_splits(tmp_path):
    """20 cats, 10 dogs in a subfolder, and a folder without images."""
    for i in range(20):
        save(tmp_path / "cat" / f"{i:02}.png")
    for i in range(10):
        save(tmp_path / "dog" / "deep" / f"{i}.png")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_class_folders_without_splits_are_labels(without_splits):
    for split in ("train", "test"):
        data = open_data(str(without_splits), split)
        assert (data.classes, torch.bincount(data.labels).tolist()) == (["cat", "dog"], [20, 10])
        assert [os.sep + "dog" + os.sep in path for path in data.paths] == (data.labels == 1).tolist()


def test_unlabelled_ignores_class_folders(without_splits):
    data = open_data(str(without_splits), "train", unlabelled=True)
    assert (data.classes, data.labels.tolist()) == ([], [-1] * 30)
    for i in range(3):
        save(without_splits / "train" / "b" / f"{i}.png")
    data = open_data(str(without_splits), "train", unlabelled=True)
    assert (data.classes, data.labels.tolist()) == ([], [-1] * 3)


def test_an_image_beside_the_folders_means_no_labels(without_splits):
    save(without_splits / "beside.png")
    assert open_data(str(without_splits), "train").classes == []


def test_one_folder_is_no_classes(tmp_path):
    save(tmp_path / "holiday" / "a.png")
    assert open_data(str(tmp_path), "train").classes == []


def test_a_share_of_each_class_is_held_out_always_the_same(without_splits):
    train, test = (open_data(str(without_splits), split, val_share=0.3) for split in ("train", "test"))
    assert torch.bincount(train.labels).tolist() == [14, 7]
    assert torch.bincount(test.labels).tolist() == [6, 3]
    assert not set(train.paths) & set(test.paths)
    assert sorted(train.paths + test.paths) == open_data(str(without_splits), "train").paths
    assert test.paths == open_data(str(without_splits), "test", val_share=0.3).paths
    flat = open_data(str(without_splits), "test", val_share=0.3, unlabelled=True)
    assert len(flat) == 9


def test_a_share_that_does_not_fit_is_refused(without_splits):
    with pytest.raises(
        InputError, match=r"--val-share 0\.001 of the 20 images of --data .* leaves none for the test split"
    ):
        open_data(str(without_splits / "cat"), "test", val_share=0.001)
    save(without_splits / "train" / "a.png")
    save(without_splits / "val" / "a.png")
    with pytest.raises(InputError, match=r"--val-share is for folders without splits, but --data .* has train, val"):
        open_data(str(without_splits), "test", val_share=0.5)


def test_links_are_followed_once_even_in_a_circle(tmp_path):
    save(tmp_path / "in" / "a.png")
    save(tmp_path / "elsewhere" / "b.png")
    (tmp_path / "in" / "round").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "again").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "file.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    assert names(open_folder(str(tmp_path / "in"), "train"), tmp_path / "in") == ["a.png", "file.png", "link/b.png"]


@pytest.mark.parametrize(
    ("made", "split", "message"),
    [
        ([], "train", "no image in this folder"),
        (["x.png/"], "train", "no image in this folder"),
        (["train/"], "train", "no image in train/"),
        (["train/a/", "train/b/"], "train", "2 class folders in train/ hold no image"),
        (["train/a/"], "test", "has train, but the test split needs val or test"),
        (["val/a/"], "train", "has val, but the train split needs train"),
    ],
)
def test_folders_without_images_are_refused(tmp_path, made, split, message):
    for name in made:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(InputError, match=message):
        open_folder(str(tmp_path), split)


@pytest.mark.parametrize(("folder", "message"), [("", "--data is empty"), ("no/where", "no such folder")])
def test_a_missing_folder_is_named(folder, message):
    with pytest.raises(InputError, match=message):
        open_folder(folder, "train")


# --------------------------------------------------------------------------------------------------------------------
# subsets


def subset(classes, content):
    (classes / "list").write_bytes(content)
    return open_data(str(classes), "train", subset_file=str(classes / "list"))


def test_a_subset_keeps_classes_in_the_order_of_its_file(classes):
    data = subset(classes, "\ufeffämne and more\r\n\r\nblue cat\r\n".encode())
    assert (data.classes, data.labels.tolist()) == (["ämne", "blue cat"], [1, 0])
    assert names(data, classes) == ["train/blue cat/c.png", "train/ämne/d.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"dog\nbird\n", "class bird is not"),
        (b"dog\ndog\n", "listed twice"),
        (b" \n\n", "no class"),
        (b"\xff\xfe", "not a text"),
    ],
)
def test_a_wrong_subset_file_is_refused(classes, content, message):
    with pytest.raises(InputError, match=f"--subset-file .*{message}"):
        subset(classes, content)


def test_a_subset_of_digits_and_a_missing_file(tmp_path):
    (tmp_path / "list").write_text("7\n3\n")
    data = open_data("digits", "test", subset_file=str(tmp_path / "list"))
    assert data.labels.bincount().tolist() == [36, 37]
    with pytest.raises(InputError, match="No such file"):
        open_data("digits", "test", subset_file=str(tmp_path / "none"))


def test_the_published_subsets_are_sorted_and_contain_each_other():
    lists = [published_classes(name) for name in SUBSETS]
    assert [len(each) for each in lists] == [50, 100, 200]
    for each in lists:
        assert each == sorted(set(each))
        assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in each)
    assert set(lists[0]) < set(lists[1]) < set(lists[2])
    assert lists[0][:3] + lists[0][-1:] == [
        "n01601694",
        "n01669191",
        "n01755581",
        "n07753592",
    ]  # as the sheet prints them
    # SHA-256 of the sorted ids, one per line
    digests = [hashlib.sha256("".join(f"{wnid}\n" for wnid in each).encode()).hexdigest()[:16] for each in lists]
    assert digests == DIGESTS


def test_a_published_subset_numbers_its_classes_in_its_order(tmp_path):
    wanted = published_classes("imagenet-50")
    make_pictures(tmp_path, dict.fromkeys([*wanted, "n00000001", "n99999999"], (0, 90, 0)), splits=[("train", 1)])
    data = open_data(str(tmp_path), "train", subset="imagenet-50")
    assert data.classes == wanted
    assert [os.path.basename(os.path.dirname(data.paths[row])) for row in np.argsort(data.labels.numpy())] == wanted
    for missing in wanted[:2]:
        shutil.rmtree(tmp_path / "train" / missing)
        with pytest.raises(
            InputError,
            match=r"^--subset imagenet-50: (class n01601694 is|2 classes, such as n01601694, are) not among the 5\d",
        ):
            open_data(str(tmp_path), "train", subset="imagenet-50")


def test_data_without_these_classes_get_one_line():
    line = "^--subset imagenet-100: 100 classes, such as n01558993, are not among the 10 classes of the data set: .*$"
    with pytest.raises(InputError, match=line):
        open_data("digits", "train", subset="imagenet-100")


@pytest.mark.parametrize("parse", [parse_train, parse_cls_eval, parse_knn_eval, parse_lincls_eval])
def test_wrong_and_contradicting_subsets_are_refused(parse):
    words = [] if parse is parse_train else ["--checkpoint", "x"]
    with pytest.raises(
        InputError, match=r"^--subset imagenet-10: expected one of imagenet-50, imagenet-100, imagenet-200$"
    ):
        parse([*words, "--subset", "imagenet-10"])
    with pytest.raises(
        InputError, match=r"^--subset and --subset-file both choose the classes to keep: drop one of them$"
    ):
        parse([*words, "--data", "x", "--subset", "imagenet-50", "--subset-file", "mine.txt"])


# --------------------------------------------------------------------------------------------------------------------
# odd files


def first_pixel(folder):
    image = open_folder(str(folder), "train").decode(0)
    assert image.dtype == torch.uint8
    return tuple(image[:, 0, 0].tolist())


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "expected"),
    [
        ("L", 77, "png", (77, 77, 77)),
        ("LA", (77, 0), "png", (77, 77, 77)),
        ("RGBA", (10, 20, 30, 128), "png", (10, 20, 30)),
        ("1", 1, "png", (255, 255, 255)),
        ("I;16", 0x8012, "png", (128, 128, 128)),  # clipped at 255 it would be white
        ("I;16", 0x8012, "tif", (128, 128, 128)),
        ("I", 0x4012, "tif", (64, 64, 64)),
        ("I", 200, "tif", (200, 200, 200)),  # eight bits in wider pixels
    ],
)
def test_every_mode_becomes_rgb(tmp_path, mode, colour, suffix, expected):
    save(tmp_path / f"a.{suffix}", mode, colour)
    assert first_pixel(tmp_path) == expected


def test_cmyk_jpeg_is_shown_in_its_colours(tmp_path):
    save(tmp_path / "a.jpg", "CMYK", (0, 255, 255, 0))
    assert first_pixel(tmp_path) == pytest.approx((255, 0, 0), abs=3)


@pytest.mark.parametrize("words", [{}, {"transparency": 0}, {"transparency": b"\x00\x80"}])
def test_palette_keeps_its_colours_with_and_without_transparency(tmp_path, words):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([1, 2, 3, 200, 100, 50])
    image.save(tmp_path / "a.png", **words)
    assert first_pixel(tmp_path) == (200, 100, 50)


def test_a_turned_photograph_is_read_as_stored_like_torchvision_does(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned when shown
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert open_folder(str(tmp_path), "train").decode(0).shape == (3, 4, 6)


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "dangling", "pipe", "float", "wide"])
def test_a_damaged_file_is_listed_and_raises_when_opened(tmp_path, kind):
    path = tmp_path / "a.tif"
    if kind == "truncated":
        Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
        path = tmp_path / "a.png"
        path.write_bytes(path.read_bytes()[:1500])
    elif kind == "dangling":
        path.symlink_to(tmp_path / "gone.tif")
    elif kind == "pipe":
        os.mkfifo(path)  # nobody will ever write to it
    elif kind in ("float", "wide"):
        save(path, "F" if kind == "float" else "I", 70000)
    else:
        path.write_bytes(b"" if kind == "empty" else b"not an image")
    data = open_folder(str(tmp_path), "train")
    assert len(data) == 1
    with pytest.raises(OSError):  # noqa: PT011  each kind has its own message
        data.decode(0)


def test_a_class_without_test_images_does_not_shift_the_others(tmp_path):
    for split, classes in (("train", "abc"), ("val", "acz")):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / name / "1.png")
    assert open_data(str(tmp_path), "train").classes == ["a", "b", "c"]
    held_out = open_data(str(tmp_path), "test")
    assert held_out.classes == ["a", "b", "c", "z"]
    assert held_out.labels.tolist() == [0, 2, 3]


def test_a_name_that_is_too_long_is_one_line():
    with pytest.raises(InputError, match="File name too long"):
        open_data("a" * 300, "train")


# --------------------------------------------------------------------------------------------------------------------
# image files in memory


def test_small_files_become_a_data_set_in_memory(tmp_path):
    files = open_folder(str(make_pictures(tmp_path, {"red": (200, 0, 0), "blue": (0, 0, 200)}, size=(20, 24))), "train")
    held = files.in_memory()
    assert held.images.shape == (10, 3, 20, 24)
    assert held.images.dtype == torch.uint8
    assert all(torch.equal(held.images[i], files.decode(i)) for i in range(10))
    assert torch.equal(held.labels, files.labels)
    assert held.classes == files.classes == ["blue", "red"]


def test_files_of_several_sizes_or_damaged_are_not_held_in_memory(tmp_path):
    folder = make_pictures(tmp_path, {"red": (200, 0, 0)}, size=(20, 24))
    Image.new("RGB", (24, 21)).save(folder / "train" / "red" / "9.png")
    with pytest.raises(
        InputError, match=r"--in-memory needs images of one size, .*0.png has 20 x 24 .*9.png has 21 x 24"
    ):
        open_folder(str(folder), "train").in_memory()
    (folder / "train" / "red" / "9.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"--in-memory: .*9.png cannot be decoded"):
        open_folder(str(folder), "train").in_memory()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep-decoded", "1"], "--in-memory decodes every file once, so --keep-decoded has nothing to do"),
        (["--decode-on-gpu"], "--in-memory decodes every file once, so --decode-on-gpu has nothing to do"),
        (["--data", "digits"], "--in-memory has no effect: --data digits is in memory anyway"),
    ],
)
def test_in_memory_with_other_flags_that_hold_images_is_refused(words, message):
    with pytest.raises(InputError, match=message):
        parse_train(["--data", "pictures", "--in-memory", *words])


def test_a_damaged_file_does_not_end_a_run_in_memory(run_program, tmp_path):
    folder = make_pictures(tmp_path / "pictures", {"red": (200, 0, 0)}, splits=[("train", 150)])
    damaged = next((folder / "train").rglob("*.png"))
    damaged.write_bytes(damaged.read_bytes()[:60])
    words = ("train.py", "--preset", "published", "--data", folder, *SMALL, "--batch-size", "8", "--base-lr", "0.1")
    words += ("--epochs", "1", "--workers", "1", "--in-memory", "--output-dir", tmp_path / "run")
    done = run_program(*words)
    assert done.returncode == 0, done.stderr
    assert f"--in-memory: {damaged} cannot be decoded" in done.stdout
    assert "until then the files are decoded in every epoch" in done.stdout
    assert "damaged image" in done.stdout


def test_a_run_in_memory_learns_from_the_same_images(run_program, tmp_path):
    folder = make_pictures(
        tmp_path / "pictures", {"red": (200, 0, 0), "blue": (0, 0, 200)}, splits=[("train", 8), ("val", 4)]
    )
    words = (
        "train.py",
        "--preset",
        "published",
        "--data",
        folder,
        *SMALL,
        "--augment",
        "crop_flip",
        "--batch-size",
        "8",
        "--base-lr",
        "0.1",
    )
    words += ("--epochs", "2", "--warmup-epochs", "0", "--eval-every", "1", "--workers", "1")
    for name, flags in (("files", []), ("memory", ["--in-memory"])):
        done = run_program(*words, *flags, "--output-dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
    files, memory = (checkpoint.load(tmp_path / name / "checkpoint.pt") for name in ("files", "memory"))
    for name, value in files["model"].items():  # the crops may differ by a grey level
        torch.testing.assert_close(memory["model"][name], value, rtol=0.1, atol=0.02)


def test_stl10_is_downloaded_over_https_first_and_its_md5_is_compared(tmp_path, monkeypatch):
    asked = []

    def refuse(url, root, filename, md5):
        asked.append((url.partition("://")[0], md5))
        raise URLError("no answer")

    monkeypatch.setattr(stl10, "download_and_extract_archive", refuse)
    with pytest.raises(InputError, match="--data stl10: <urlopen error no answer>"):
        open_data("stl10", "train", root=str(tmp_path), download=True)
    assert asked == [("https", stl10.STL10.tgz_md5), ("http", stl10.STL10.tgz_md5)]
