"""The list of a folder's images, and when it is taken from the cache."""

import json
import os
import time
from collections import Counter

import pytest

from src.data import listing
from src.data.folders import find_images
from src.data.formats import describe_others
from src.data.listing import list_images
from src.errors import InputError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SELF_CLASSIFIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "WORTH_KEEPING", 3)
    return tmp_path / "cache" / "listings"


@pytest.fixture
def folder(tmp_path):
    """Three images in a, one in a/deeper; two in b; all of it is ten seconds old."""
    top = tmp_path / "images"
    for name in ("a/1.png", "a/2.JPG", "a/deeper/3.jpeg", "a/x.txt", "a/.hidden.png", "b/2.png", "b/10.png", "c/1.png"):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).touch()
    for parent, _, _ in os.walk(top):
        os.utime(parent, (time.time() - 10,) * 2)
    return top


def expected(top):
    return [
        [f"{top}/a/1.png", f"{top}/a/2.JPG", f"{top}/a/deeper/3.jpeg"],
        [f"{top}/b/10.png", f"{top}/b/2.png"],
    ]


def forbid_walking(monkeypatch):
    monkeypatch.setattr(listing, "_walk", lambda *_: pytest.fail("the folder was listed"))


def test_a_list_is_kept_and_taken_again(folder, cache, monkeypatch):
    assert list_images(folder, ["a", "b"]) == expected(folder)
    assert len(list(cache.iterdir())) == 1
    forbid_walking(monkeypatch)
    assert list_images(folder, ["a", "b"]) == expected(folder)


def test_other_folders_are_another_list(folder, cache):
    list_images(folder, ["a", "b"])
    assert list_images(folder, ["c"]) == [[f"{folder}/c/1.png"]]
    assert [len(paths) for paths in list_images(folder, [""])] == [6]


@pytest.mark.parametrize("change", ["new", "deeper", "gone", "folder gone", "renamed"])
def test_what_has_changed_is_listed_again(folder, cache, change):
    before = list_images(folder, ["a", "b"])
    if change == "new":
        (folder / "b" / "3.png").touch()
    elif change == "deeper":
        (folder / "a" / "deeper" / "4.png").touch()
    elif change == "gone":
        (folder / "a" / "1.png").unlink()
    elif change == "renamed":
        (folder / "a" / "1.png").rename(folder / "a" / "4.png")
    else:
        (folder / "a" / "deeper" / "3.jpeg").unlink()
        (folder / "a" / "deeper").rmdir()
    after = list_images(folder, ["a", "b"])
    assert after != before
    assert [sorted(os.listdir(folder / "b"))] == [[path.split("/")[-1] for path in after[1]]]


def test_a_folder_that_changes_right_now_is_not_kept(folder, cache):
    (folder / "b" / "3.png").touch()
    list_images(folder, ["a", "b"])
    assert not cache.exists()


def test_few_images_are_not_kept(folder, cache, monkeypatch):
    monkeypatch.setattr(listing, "WORTH_KEEPING", 6)
    list_images(folder, ["a", "b"])
    assert not cache.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"folders": {}}', '{"folders": [], "images": 3}'])
def test_a_damaged_file_is_as_good_as_none(folder, cache, content):
    list_images(folder, ["a", "b"])
    (file,) = cache.iterdir()
    file.write_text(content)
    assert list_images(folder, ["a", "b"]) == expected(folder)
    assert json.loads(file.read_text())["images"]


def test_a_cache_that_cannot_be_written_is_done_without(folder, cache):
    cache.parent.write_text("a file where a folder should be")
    assert list_images(folder, ["a", "b"]) == expected(folder)


def test_names_that_are_no_text(folder, cache, monkeypatch):
    path = os.fsencode(folder / "a") + b"/\xff\xe4.png"
    with open(path, "wb"):
        pass
    os.utime(folder / "a", (time.time() - 10,) * 2)
    first = list_images(folder, ["a"])
    assert path in [os.fsencode(each) for each in first[0]]
    forbid_walking(monkeypatch)
    assert list_images(folder, ["a"]) == first


def test_a_long_listing_says_how_far_it_is(folder, cache, monkeypatch, capsys):
    monkeypatch.setattr(listing, "SECONDS_BETWEEN_LINES", -1.0)
    monkeypatch.setattr(listing, "_walk", lambda top, *_: (f"{top}/{i}.png" for i in range(2500)))
    list_images(folder, ["a"])
    assert capsys.readouterr().out == "".join(f"listing {folder}: {n},000 images so far\n" for n in (1, 2))


@pytest.mark.parametrize(
    "images",
    [
        5,
        [],
        [[], [], []],
        [["a/1.png"], 5],
        [["a/1.png"], [5]],
        [["a/1.png"], ["/etc/passwd"]],
        [["a/1.png"], ["../x.png"]],
        [["a/1.png"], ["b/text.txt"]],
    ],
    ids=str,
)
def test_a_list_of_other_contents_is_made_again(folder, cache, images):
    before = list_images(folder, ["a", "b"])
    (kept,) = cache.iterdir()
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"images": images}))
    assert list_images(folder, ["a", "b"]) == before


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"folders": {}, "images": [["a/1.png"], []]}', "[" + "[]," * 5_000_000 + "[]]"]
)
def test_a_hostile_list_is_made_again(folder, cache, content):
    before = list_images(folder, ["a", "b"])
    (kept,) = cache.iterdir()
    kept.write_text(content)
    assert list_images(folder, ["a", "b"]) == before


def test_other_files_are_counted_by_suffix_and_hidden_ones_are_not(folder, cache, monkeypatch):
    for name in ("a/deeper/y.CR2", "a/z.cr2", "b/README", "b/.hidden.txt"):
        (folder / name).touch()
    for parent, _, _ in os.walk(folder):
        os.utime(parent, (time.time() - 10,) * 2)
    others = Counter()
    list_images(folder, ["a", "b"], others=others)
    assert others == {".cr2": 2, ".txt": 1, "": 1}
    forbid_walking(monkeypatch)  # the list is taken from the cache
    again = Counter()
    list_images(folder, ["a", "b"], others=again)
    assert again == others


@pytest.mark.parametrize("damage", [{"others": {".txt": "x"}}, {"others": [1]}, {"others": None}])
def test_a_damaged_count_in_the_cache_is_made_again(folder, cache, damage):
    list_images(folder, ["a", "b"])
    (file,) = cache.iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    others = Counter()
    assert list_images(folder, ["a", "b"], others=others) == expected(folder)
    assert others == {".txt": 1}


def test_a_line_names_the_files_that_are_not_read():
    assert describe_others({}) == ""
    assert describe_others({".cr2": 1, ".txt": 3, "": 1}) == (
        "files that are not read: 3 .txt, 1 without a suffix, 1 .cr2"
    )
    assert "`pip install pillow-heif`" in describe_others({".heic": 12000})
    assert describe_others({f".{letter}": 1 for letter in "abcdefgh"}).endswith(".f and 2 others")


def test_a_folder_with_nothing_but_unreadable_images_is_told_why(tmp_path):
    (tmp_path / "a.cr2").touch()
    with pytest.raises(InputError, match=r"no image in this folder \(files that are not read: 1 \.cr2\), expected"):
        find_images(str(tmp_path), "train")
