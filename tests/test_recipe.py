"""The recipe that follows the data, and settings of presets that follow what the command line changes."""

import pytest
import torch
from PIL import Image

from src.config import Survey, method_names, parse_train, read_method
from src.config.flags import expand_presets
from src.data.datasets import ImageFiles, MemoryImages
from src.data.survey import survey
from src.errors import InputError


def parsed(folder, *words, images=1000, side=32, gpu=False):
    """Return options, knobs and notes for a folder of which only the survey is known."""
    notes = []
    options, _, knobs = parse_train(
        ["--data", str(folder), *words], survey=lambda data: Survey(images=images, side=side, gpu=gpu), notes=notes
    )
    return options, knobs, notes


@pytest.mark.parametrize(
    ("found", "preset"),
    [
        ({"images": 1_281_167, "side": 375, "gpu": True}, "published"),
        ({"images": 1_281_167, "side": 375}, "photographs"),
        ({"images": 5_000, "side": 375, "gpu": True}, "photographs"),
        ({"images": 1_000_000, "side": 32, "gpu": True}, "small_images"),
        ({"images": 50_000, "side": 64}, "small_images"),
        ({"images": 50_000, "side": 65}, "photographs"),
    ],
)
def test_the_preset_follows_number_and_size_of_the_images_and_the_device(tmp_path, found, preset):
    _, _, notes = parsed(tmp_path, **found)
    assert notes[0].startswith(f"recipe: preset {preset}, ")


def test_the_views_have_the_size_of_small_images(tmp_path):
    assert parsed(tmp_path, side=28)[0].global_crops_size == 32
    tiny, _, _ = parsed(tmp_path, side=9)
    assert (tiny.global_crops_size, tiny.arch) == (8, "small_convnet")
    assert parsed(tmp_path, side=300)[0].arch == "resnet18"
    assert (
        parsed(tmp_path, side=300, gpu=True)[0].arch,
        parsed(tmp_path, side=300, gpu=True)[0].global_crops_size,
    ) == (
        "resnet50",
        224,
    )


def test_the_cpu_is_used_if_the_command_line_says_so(tmp_path):
    assert parsed(tmp_path, "--device", "cpu", side=300, gpu=True)[0].arch == "resnet18"


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("images", [8, 20, 1000, 50_000])
@pytest.mark.parametrize("side", [32, 300])
def test_the_recipe_of_every_method_passes_the_checks_of_the_method(tmp_path, method, images, side):
    options, knobs, _ = parsed(tmp_path, "--method", method, images=images, side=side)
    from src.methods import METHODS

    METHODS[method].check_data(
        knobs,
        batch_size=options.batch_size,
        num_images=images,
        num_views=options.num_views,
        steps=options.epochs * (images // options.batch_size),
    )
    assert options.batch_size <= max(images / 4, 2)


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize(("data", "number"), [("cifar10", 10), ("cifar100-20", 20), ("stl10", 10)])
def test_a_data_set_chooses_the_preset_of_its_name(method, data, number):
    notes = []
    options, _, knobs = parse_train(["--method", method, "--data", data, "--data-root", "somewhere"], notes=notes)
    assert notes == [f"recipe: preset {data}, for --data {data}; a flag overrides each value"]
    if (method == "self_classifier_v1" and data != "stl10") or method in ("simclr", "scan", "selflabel"):
        return  # the authors' recipes, see tests/test_recipes.py
    assert (options.arch, options.global_crops_size) == (("resnet18", 96) if data == "stl10" else ("cifar_convnet", 24))
    if method != "self_classifier_v1":  # it has two clusters per class
        sizes = next(getattr(knobs, name) for name in ("classes", "prototypes") if hasattr(knobs, name))
        assert (min(sizes) if isinstance(sizes, tuple) else sizes) == number


def test_shared_values_reach_only_presets_that_build_on_them():
    presets = {"a": {"lr": 1}, "b": {"base": "a"}, "old": {"lr": 2}, "c": {"base": "old"}, "d": {"base": "b", "lr": 3}}
    shared = {"a": {"dim": 4, "lr": 0}, "b": {"dim": 5}, "c": {"dim": 6}, "d": {"dim": 7}}
    assert expand_presets(presets, shared=shared) == {
        "a": {"dim": 4, "lr": 1},
        "b": {"dim": 5, "lr": 1},
        "old": {"lr": 2},
        "c": {"lr": 2},
        "d": {"dim": 7, "lr": 3},
    }


def test_a_given_flag_wins_and_the_others_follow_it(tmp_path):
    whole, _, _ = parsed(tmp_path)
    options, _, notes = parsed(tmp_path, "--batch-size", str(whole.batch_size // 4), "--classes", "500")
    assert options.batch_size == whole.batch_size // 4
    assert options.lr == pytest.approx(whole.lr / 2, rel=1e-3)
    assert not any(note.startswith(("--batch-size", "--classes")) for note in notes)


def test_small_data_sets_get_more_epochs_and_fewer_clusters(tmp_path):
    preset = read_method("self_classifier").presets["small_images"]
    assert parsed(tmp_path, images=50_000)[0].epochs == preset["epochs"]
    assert parsed(tmp_path, images=25_000)[0].epochs == 2 * preset["epochs"]
    assert parsed(tmp_path, images=100)[0].epochs == 60
    assert parsed(tmp_path, images=100, side=300)[0].epochs == 30
    assert max(parsed(tmp_path, images=100)[1].classes) == 12
    assert parsed(tmp_path, "--classes", "40", images=100)[1].classes == (40,)


def test_too_few_images_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"--data .*: 7 images, expected at least 8"):
        parsed(tmp_path, images=7)


def test_a_named_preset_looks_at_nothing(tmp_path):
    def fail(data):
        raise AssertionError("the folder was examined")

    options, _, _ = parse_train(["--data", str(tmp_path), "--preset", "100ep"], survey=fail)
    assert options.epochs == 100
    parse_train(["--data", "digits"], survey=fail)


@pytest.mark.parametrize("method", method_names())
def test_one_epoch_does_not_fail_on_the_warm_up_of_a_preset(method):
    options, _, _ = parse_train(["--method", method, "--data", "somewhere", "--epochs", "1"])
    assert options.warmup_epochs == 0
    with pytest.raises(InputError, match="--warmup-epochs 3 exceeds --epochs 1"):
        parse_train(["--method", method, "--data", "somewhere", "--epochs", "1", "--warmup-epochs", "3"])


def test_a_survey_reads_sizes_from_headers(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(5)]
    for i, path in enumerate(paths):
        Image.new("RGB", (40 + i, 30 + i)).save(path)
    (tmp_path / "5.png").write_bytes(b"no image")
    paths.append(str(tmp_path / "5.png"))
    found = survey(ImageFiles(paths, torch.full((6,), -1), []), gpu=False)
    assert found == Survey(images=6, side=32, gpu=False)
    with pytest.raises(InputError, match=r"5\.png: not a readable image"):
        survey(ImageFiles(paths[5:], torch.full((1,), -1), []), gpu=False)


def test_small_files_of_one_size_are_held_in_memory(tmp_path):
    paths = [str(tmp_path / f"{i:03}.png") for i in range(150)]
    for path in paths:
        Image.new("RGB", (32, 32)).save(path)
    data = ImageFiles(paths, torch.full((150,), -1), [])
    found = survey(data, gpu=False)
    assert found == Survey(images=150, side=32, gpu=False, uniform=True)
    assert parsed(tmp_path, images=150)[0].in_memory is False
    options, _, _ = parse_train(["--data", str(tmp_path)], survey=lambda folder: found)
    assert options.in_memory
    Image.new("RGB", (32, 33)).save(paths[2])  # not in the sample
    assert not survey(data, gpu=False).uniform


def test_a_survey_of_images_in_memory():
    images = MemoryImages(torch.zeros(7, 3, 20, 10, dtype=torch.uint8), torch.zeros(7).long(), ["a"])
    assert survey(images, gpu=True) == Survey(images=7, side=10, gpu=True, uniform=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methd", "swav"], "--methd: did you mean --method?"),
        (["--method", "swaw"], "did you mean swav?"),
        (["--optimizer", "xyz"], "expected one of lars, sgd, adamw"),
    ],
)
def test_a_misspelt_word_gets_a_suggestion(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_train(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_finished_run_of_a_recipe_gets_more_epochs(run_program, tmp_path):
    """The recipe derives the warm-up from the number of epochs, and a finished run is past it."""
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
    words = ("train.py", "--data", tmp_path, "--workers", "1", "--no-in-memory", "--output-dir", tmp_path / "run")
    assert run_program(*words, "--epochs", "1").returncode == 0
    done = run_program(*words, "--epochs", "2")
    assert done.returncode == 0, done.stderr
    assert "The result is not that of a run that began with --epochs 2" in done.stdout


def test_one_epoch_does_not_fail_on_the_frozen_prototypes_of_a_preset(run_program, tmp_path):
    words = ("train.py", "--method", "swav", "--device", "cpu", "--epochs", "1")
    done = run_program(*words, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "--freeze-prototypes 0: a fiftieth of the 11 steps" in done.stdout
    given = run_program(*words, "--freeze-prototypes", "11", "--output-dir", tmp_path / "given")
    assert given.returncode == 2
    assert "--freeze-prototypes 11 is not less than the 11 steps" in given.stderr
