"""Released models by name, and what a method takes from whose file."""

import json
import re
import subprocess
import sys
import types

import pytest
import torch
from conftest import GOLDEN, ROOT
from torchvision import models

from src import checkpoint, config, downloads, pretrained
from src.errors import InputError, RunError, run_script
from src.loading import load_backbone, load_method, start_from
from src.methods import METHODS, build_method
from src.pretrained import get
from src.releases import RELEASES, Release, resolve


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SELF_CLASSIFIER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def settings_of(arch, size=32):
    """What a configuration says of the network: colour images of this size."""
    names = ("arch", "channels", "global_crops_size", "patch_size", "global_crops_number")
    return dict(zip(names, (arch, 3, size, 16, 2), strict=True))


def small_method(classes=(3, 5), queue=0, arch="resnet18", dim=4):
    kind = METHODS["self_classifier"]
    knobs = kind.Config(classes=classes, dim=dim, hidden_dim=8, queue_length=queue)
    return build_method("self_classifier", knobs, settings_of(arch))


def names_of_the_authors(state, first_generation=False):
    """Our state dict as their file would hold it."""
    renamed = {}
    if first_generation:
        state = {key.replace("projection_head.mlp.", "backbone.fc."): value for key, value in state.items()}
        return {
            "module." + re.sub(r"classifiers\.(\d+)\.weight", r"cls_\1", key): value for key, value in state.items()
        }
    for key, value in state.items():
        key = key.replace("projection_head.mlp.", "mlp_head.mlp.")
        renamed["module." + re.sub(r"classifiers\.(\d+)\.", r"cls_\1.", key)] = value
    return renamed


# --------------------------------------------------------------------------------------------------------------------
# names


def test_every_release_has_a_place_of_its_own():
    assert len({release.url for release in RELEASES.values()}) == len(RELEASES)
    for name, release in RELEASES.items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert release.url.startswith("https://")
        assert release.what.strip()


def test_a_path_is_taken_as_it_is(cache, tmp_path):
    (tmp_path / "swav-800ep").touch()
    assert resolve(tmp_path / "swav-800ep") == tmp_path / "swav-800ep"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swav-800ep", r"swav-800ep is not in .*cache: fetch it first, python -m src\.pretrained get swav-800ep"),
        ("swav800ep", "no such file, and no released model of that name; did you mean swav-800ep"),
        ("runs/nothing.pt", "no such file.*see python -m src.pretrained list$"),
    ],
)
def test_what_is_not_here_is_said(cache, name, message):
    with pytest.raises(InputError, match=message):
        resolve(name)


def test_a_file_of_a_folder_is_named(cache):
    folder = cache / "self-classifier"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.pth.tar").touch()
    (folder / ".hidden").touch()
    assert resolve("self-classifier") == folder / "a.pth.tar"
    (folder / "deep" / "b.pth.tar").touch()
    assert resolve("self-classifier/deep/b.pth.tar") == folder / "deep" / "b.pth.tar"
    for name in ("self-classifier", "self-classifier/c.pth.tar"):
        with pytest.raises(InputError, match=r"one of self-classifier/a\.pth\.tar, self-classifier/deep/b\.pth\.tar"):
            resolve(name)


# --------------------------------------------------------------------------------------------------------------------
# get


def test_get_downloads_once_and_checks_afterwards(cache, tmp_path, monkeypatch):
    monkeypatch.setitem(RELEASES, "swav-800ep", Release("SwAV", (tmp_path / "model.pth.tar").as_uri()))
    (tmp_path / "model.pth.tar").write_bytes(b"weights")
    fetched = []

    def fetch(url, target, size, md5, sha256):
        fetched.append((size, sha256[:4]))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"weights")

    monkeypatch.setattr(downloads, "download", fetch)
    assert get("swav-800ep") == get("swav-800ep") == [cache / "swav-800ep" / "model.pth.tar"]
    assert resolve("swav-800ep").read_bytes() == b"weights"
    assert fetched == [(0, "")]

    # removed and fetched again: it must be what was recorded
    resolve("swav-800ep").unlink()
    get("swav-800ep")
    assert fetched[1:] == [(7, "9a12")]

    resolve("swav-800ep").write_bytes(b"changed")
    with pytest.raises(RunError, match=r"expected 9a12.* as at the first download"):
        get("swav-800ep")


def test_a_file_put_there_by_hand_must_have_the_published_digest(cache):
    path = cache / "moco-v2-800ep" / "moco_v2_800ep_pretrain.pth.tar"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"other weights")
    with pytest.raises(RunError, match=r"the md5 is .*, expected a04e12f8 as published: remove the file and download"):
        get("moco-v2-800ep")
    assert downloads.recorded(cache) == {}


def test_get_names_what_it_does_not_know(cache):
    with pytest.raises(InputError, match=r"simsiam: .*did you mean simsiam-100ep"):
        get("simsiam")
    assert not cache.exists()


@pytest.fixture
def gdown(monkeypatch):
    """In place of the package: a Google Drive folder of two files."""
    module = types.ModuleType("gdown")

    def download_folder(url, output, quiet, resume):
        module.calls.append((url, resume))
        if module.error:
            raise module.error
        (pretrained.Path(output) / "deep").mkdir(parents=True, exist_ok=True)
        for name in module.files:
            (pretrained.Path(output) / name).write_text(name)
        return module.files

    def download(id, output, quiet, resume):
        if module.error:
            raise module.error
        if id != module.file:
            return None
        pretrained.Path(output).write_text(id)
        return output

    module.calls, module.error, module.files, module.file = [], None, ["a.pth.tar", "deep/b.pth.tar"], ""
    module.download_folder, module.download = download_folder, download
    monkeypatch.setitem(sys.modules, "gdown", module)
    return module


def test_a_google_drive_folder_comes_through_gdown(cache, gdown):
    gdown.error = OSError("quota")
    with pytest.raises(RunError, match=r"drive\.google\.com.*quota; the same command continues"):
        get("self-classifier")
    with pytest.raises(InputError, match="fetch it first"):
        resolve("self-classifier/a.pth.tar")
    gdown.error = None
    assert [path.name for path in get("self-classifier")] == ["a.pth.tar", "b.pth.tar"]
    assert resolve("self-classifier/deep/b.pth.tar").read_text() == "deep/b.pth.tar"
    assert set(downloads.recorded(cache)) == {"self-classifier/a.pth.tar", "self-classifier/deep/b.pth.tar"}
    assert gdown.calls == [(RELEASES["self-classifier"].url, True)] * 2


def test_a_google_drive_file_comes_through_gdown(cache, gdown):
    wanted = RELEASES["scan-stl10"].url.partition("id=")[2]
    with pytest.raises(RunError, match=r"drive\.google\.com.*gdown found no file there.*pass its path and --arch"):
        get("scan-stl10")
    gdown.file = wanted
    (path,) = get("scan-stl10")
    assert path == cache / "scan-stl10" / "scan-stl10.pth.tar" == resolve("scan-stl10")
    assert path.read_text() == wanted
    gdown.error = OSError("quota")
    with pytest.raises(RunError, match=r"drive\.google\.com.*quota; the same command tries again"):
        get("scan-cifar10")
    with pytest.raises(InputError, match="fetch it first"):
        resolve("scan-cifar10")


def test_an_empty_google_drive_folder_is_said(cache, gdown):
    gdown.files = []
    with pytest.raises(RunError, match="no file there"):
        get("self-classifier-v1")


def test_without_gdown_the_way_by_hand_is_said(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    for name in ("self-classifier", "scan-stl10"):
        with pytest.raises(InputError, match=r"pip install gdown, or fetch https://drive\.google.* by hand"):
            get(name)


def test_the_command_line(cache):
    def run(*words):
        command = [sys.executable, "-X", "importtime", "-m", "src.pretrained", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)

    (cache / "dino-resnet50").mkdir(parents=True)
    (cache / "dino-resnet50" / "m.pth").write_bytes(b"0" * 2_000_000)
    done = run("list")
    assert done.returncode == 0, done.stderr
    assert " torch\n" not in done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[: len(RELEASES)]] == list(RELEASES)
    assert [line.split()[0] for line in lines if "2 MB here" in line] == ["dino-resnet50"]


@pytest.mark.parametrize("words", [["get", "swav"], ["get"], ["fetch", "swav-800ep"], []])
def test_a_wrong_command_is_one_line_and_status_2(words, cache, capsys, monkeypatch):
    status, _ = run_main(capsys, monkeypatch, *words)
    assert status == 2


# --------------------------------------------------------------------------------------------------------------------
# from a file to a method


def test_an_authors_file_becomes_a_method(tmp_path):
    method = small_method(queue=6, arch="small_convnet")
    torch.nn.init.normal_(method.classifiers[1].weight_g)
    state = method.state_dict()
    weights = {key: value for key, value in state.items() if not key.startswith("queue.")}
    content = {"state_dict": names_of_the_authors(weights), "arch": "small_convnet", "epoch": 100}
    torch.save(content, tmp_path / "model_100.pth.tar")
    loaded, record = load_method(tmp_path / "model_100.pth.tar")
    assert (record["epoch"], record["history"], record["config"]["data"]) == (100, [], "")
    assert loaded.config.queue_length == 0
    assert not loaded.training
    images = torch.rand(2, 3, 32, 32)
    for found, expected in zip(loaded.predict(images), method.eval().predict(images), strict=True):
        assert torch.equal(found, expected)


def test_an_authors_file_of_the_first_generation_becomes_a_method(tmp_path):
    knobs = METHODS["self_classifier_v1"].Config(num_classifiers=2, num_classes=5, dim=4, hidden_dim=8)
    method = build_method("self_classifier_v1", knobs, settings_of("small_convnet"))
    state = names_of_the_authors(method.state_dict(), first_generation=True)
    torch.save({"state_dict": state, "arch": "small_convnet", "epoch": 800}, tmp_path / "v1.pth.tar")
    loaded, record = load_method(tmp_path / "v1.pth.tar")
    assert (record["config"]["method"], record["epoch"]) == ("self_classifier_v1", 800)
    images = torch.rand(2, 3, 32, 32)
    for found, expected in zip(loaded.predict(images), method.eval().predict(images), strict=True):
        assert torch.equal(found, expected)


def test_the_authors_own_file_becomes_a_method():
    path = GOLDEN / "shufflenet_initial.pth.tar"
    if not path.exists():
        pytest.skip(f"the authors' checkpoint is not here: {path.name} is looked for beside the repository")
    method, record = load_method(path)
    assert (method.config.classes, method.config.hidden_dim, method.config.dim) == ((10, 20), 64, 16)
    assert (record["config"]["arch"], record["epoch"], len(method.queue.embeddings)) == ("shufflenet_v2_x0_5", 0, 64)
    start_from(small_method((10, 20), 8, "shufflenet_v2_x0_5", 16), "another", str(path))
    with pytest.raises(
        InputError, match=r"mlp\.0\.weight \(64, 1024\) instead of \(8, 1024\).*mlp\.3\.weight \(16, 64\)"
    ):
        start_from(small_method((10, 20), 8, "shufflenet_v2_x0_5", 16), "self_classifier", str(path))


def prototype_method(name, prototypes, arch="resnet18", **knobs):
    kind = METHODS[name]
    return build_method(name, kind.Config(prototypes=prototypes, dim=4, hidden_dim=8, **knobs), settings_of(arch))


def names_of_swavs_authors(method):
    """The network of a method with prototypes as the authors of SwAV release it: a flat dictionary, DataParallel's names."""
    renamed = {}
    for key, value in method.state_dict().items():
        if key.startswith(("backbone.", "projection_head.", "classifiers.")):
            key = key.removeprefix("backbone.").replace("projection_head.mlp.", "projection_head.")
            several = len(method.classifiers) > 1
            key = re.sub(r"classifiers\.(\d+)\.", r"prototypes.prototypes\1." if several else "prototypes.", key)
            renamed[f"module.{key}"] = value
    return renamed


@pytest.mark.parametrize(
    ("name", "prototypes", "head_bn", "becomes"),
    [
        ("swav", 7, True, "swav"),
        ("swav", 7, False, "swav"),
        ("deepcluster_v2", (7, 5, 6), True, "deepcluster_v2"),
        ("sela_v2", (7, 5, 6), True, "deepcluster_v2"),
    ],
)
def test_a_released_file_with_prototypes_becomes_a_method(tmp_path, name, prototypes, head_bn, becomes):
    torch.manual_seed(0)
    method = prototype_method(name, prototypes, head_bn=head_bn).eval()
    torch.save(names_of_swavs_authors(method), tmp_path / "released.pth.tar")
    loaded, record = load_method(tmp_path / "released.pth.tar")
    assert type(loaded) is METHODS[becomes]
    assert (loaded.config.prototypes, loaded.config.dim, loaded.config.hidden_dim) == (prototypes, 4, 8)
    assert loaded.config.head_bn is head_bn
    assert not loaded.training
    settings = record["config"]
    assert (settings["method"], settings["arch"], settings["augment"], settings["data"]) == (
        becomes,
        "resnet18",
        "swav",
        "",
    )
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        for found, expected in zip(loaded.predict(images), method.predict(images), strict=True):
            assert torch.equal(found, expected)


HEADS_OF_THREE = {f"module.prototypes.prototypes{k}.weight": [3000, 128] for k in range(3)}


@pytest.fixture(scope="module")
def swav_files(tmp_path_factory):
    """Files of a ResNet-50 with one head and with three, with the names and shapes of the authors' own network.

    See key_layouts.json of the golden data. Returns {three heads: the file}.
    """
    path = GOLDEN / "key_layouts.json"
    if not path.exists():
        pytest.skip(f"the authors' layouts are not here: {path.name} is looked for beside the repository")
    shapes = dict(json.loads(path.read_text())["swav_resnet50"])
    generator, folder = torch.Generator().manual_seed(0), tmp_path_factory.mktemp("swav")
    state = {key: torch.rand(shape, generator=generator) for key, shape in (shapes | HEADS_OF_THREE).items()}
    torch.save({key: value for key, value in state.items() if key not in HEADS_OF_THREE}, folder / "one.pth.tar")
    del state["module.prototypes.weight"]
    torch.save(state, folder / "three.pth.tar")
    return {False: folder / "one.pth.tar", True: folder / "three.pth.tar"}


@pytest.mark.parametrize(
    ("heads", "name", "knobs", "said"),
    [
        # SwAV's layout with three heads is that of DeepCluster-v2 and SeLa-v2
        (True, "sela_v2", {}, "loaded backbone (318), projection_head (9), classifiers (3); left out nothing"),
        (True, "deepcluster_v2", {}, "loaded backbone (318), projection_head (9), classifiers (3); left out n"),
        (True, "swav", {}, "loaded backbone (318), projection_head (9); left out classifiers (3); initial values"),
        (
            False,
            "swav",
            {},
            "loaded backbone (318), projection_head (9), classifiers (1); left out nothing; initial values",
        ),
        (
            False,
            "sela_v2",
            {},
            "loaded backbone (318), projection_head (9); left out classifiers (1); initial values for cl",
        ),
        (
            False,
            "sela_v2",
            {"prototypes": (3000,)},
            "loaded backbone (318), projection_head (9), classifiers (1); left",
        ),
        (
            False,
            "deepcluster_v2",
            {"hidden_dim": 64},
            "loaded backbone (318); left out projection_head (9), classifiers",
        ),
        (
            False,
            "self_classifier",
            {},
            "loaded backbone (318); left out projection_head (9), classifiers (1); initial val",
        ),
    ],
)
def test_networks_with_prototypes_start_from_each_others_files(swav_files, heads, name, knobs, said):
    state = torch.load(swav_files[heads])
    kind = METHODS[name]
    method = build_method(name, kind.Config(**knobs), settings_of("resnet50", 224))
    start = {key: value.clone() for key, value in method.state_dict().items()}
    line = start_from(method, name, str(swav_files[heads]))
    assert f": {said}" in line, line
    assert "\n" not in line
    theirs = {
        "backbone": ("conv1.weight", "module.conv1.weight"),
        "projection_head": ("mlp.3.weight", "module.projection_head.3.weight"),
        "classifiers": ("0.weight", "module.prototypes.prototypes0.weight" if heads else "module.prototypes.weight"),
    }
    taken = line.partition("; left out")[0]
    for part, (key, source) in theirs.items():
        own = f"{part}.{key}"
        if own in start:
            expected = state[source] if f"{part} (" in taken else start[own]
            assert torch.equal(method.state_dict()[own], expected), own


def test_what_a_run_remembers_is_not_taken_into_another(tmp_path):
    for name, knobs in (("swav", {"queue_length": 6}), ("deepcluster_v2", {})):
        prototypes = 3 if name == "swav" else (3, 5)
        old = prototype_method(name, prototypes, "small_convnet", **knobs)
        new = prototype_method(name, prototypes, "small_convnet", **{key: 8 for key in knobs})
        if name == "swav":
            old.queues[0].push(torch.rand(6, 4))
            old.queue_started.fill_(True)
        else:
            old.bank.make_room(20)
            old.bank.written.fill_(True)
        checkpoint.save(
            tmp_path / "c.pt", {"model": old.state_dict(), "config": {"method": name, "arch": "small_convnet"}}
        )
        start_from(new, name, str(tmp_path / "c.pt"))
        for one, two in zip(old.parameters(), new.parameters(), strict=True):
            assert torch.equal(one, two)
        fresh = {key: value for key, value in new.state_dict().items() if key.startswith(("queue", "bank"))}
        assert fresh
        assert not any(value.any() for value in fresh.values())


def test_files_without_classifiers_of_a_method_are_no_methods(tmp_path):
    torch.save({"conv1.weight": torch.ones(1), "layer1.0.w": torch.ones(1)}, tmp_path / "dino.pth")
    with pytest.raises(InputError, match=r"a backbone \(a ResNet in torchvision's names.*expected self_classifier"):
        load_method(tmp_path / "dino.pth")
    torch.save(small_method(arch="cifar_resnet18").state_dict(), tmp_path / "plain.pth")
    with pytest.raises(InputError, match="does not name its architecture"):
        load_method(tmp_path / "plain.pth")
    torch.save(small_method().state_dict(), tmp_path / "resnet18.pth")
    assert load_method(tmp_path / "resnet18.pth")[1]["config"]["arch"] == "resnet18"  # known by its blocks


def run_main(capsys, monkeypatch, *words) -> tuple[int, str]:
    """The command line in this process: exit status, and the one line that it prints."""
    monkeypatch.setattr(sys, "argv", ["pretrained.py", *map(str, words)])
    try:
        run_script(pretrained.main)
        status = 0
    except SystemExit as error:
        status = error.code
    printed = capsys.readouterr()
    text = printed.err if status else printed.out
    assert text.count("\n") == 1
    assert (printed.err == "") == (status == 0)
    return status, text


def trained(path, arch):
    """Write a checkpoint as train.py does."""
    method = small_method(arch=arch)
    options = config.as_plain(config.TrainOptions(arch=arch, global_crops_size=32))
    settings = {**options, **config.as_plain(method.config), "method": "self_classifier", "channels": 3}
    checkpoint.save(path, {"model": method.state_dict(), "config": settings, "history": []})
    return method


def test_an_exported_backbone_is_torchvisions(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    method = trained(tmp_path / "c.pt", "resnet18").eval()
    status, said = run_main(capsys, monkeypatch, "export", tmp_path / "c.pt", tmp_path / "out.pth")
    assert status == 0
    assert "out.pth: 120 tensors of resnet18, 512 features; load them into torchvision.models.resnet18()" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pt", "out.pth"]
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    assert type(state) is dict
    network = models.resnet18(num_classes=3).eval()
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    network.fc = torch.nn.Identity()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(images), method.backbone(images))

    # and back, as any file of others
    assert torch.equal(load_backbone(tmp_path / "out.pth", "resnet18")[0].conv1.weight, method.backbone.conv1.weight)
    status, _ = run_main(
        capsys, monkeypatch, "export", tmp_path / "out.pth", tmp_path / "again.pth", "--arch", "resnet18"
    )
    assert status == 0
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert all(torch.equal(value, again[key]) for key, value in state.items())


def test_what_cannot_be_exported_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    trained(tmp_path / "small.pt", "small_convnet")
    (tmp_path / "there.pth").write_text("precious")
    for source, target, message in (
        ("small.pt", "out.pth", "its backbone is small_convnet, which torchvision does not have"),
        ("small.pt", "there.pth", "there.pth exists already: name another file"),
        ("missing.pt", "out.pth", "no such file"),
        ("there.pth", "out.pth", "not a checkpoint, or damaged"),
    ):
        status, said = run_main(capsys, monkeypatch, "export", tmp_path / source, tmp_path / target)
        assert (status, message in said) == (2, True), said
    trained(tmp_path / "c.pt", "resnet18")
    status, said = run_main(capsys, monkeypatch, "export", tmp_path / "c.pt", tmp_path / "no" / "out.pth")
    assert (status, "out.pth cannot be written (No such file or directory)" in said) == (2, True)
    monkeypatch.setattr(torch, "save", lambda tensors, file: file.write(b"x") and file.seek(-9))
    status, said = run_main(capsys, monkeypatch, "export", tmp_path / "c.pt", tmp_path / "out.pth")
    assert (status, "out.pth cannot be written (Invalid argument)" in said) == (1, True)
    assert (tmp_path / "there.pth").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.pt", "small.pt", "there.pth"]


def test_weights_of_the_same_method_are_taken_without_the_queue(tmp_path):
    old, new = small_method(queue=6), small_method(queue=4)
    old.queue.push(torch.rand(6, 4), torch.arange(6))
    settings = {"method": "self_classifier", "arch": "resnet18"}
    checkpoint.save(tmp_path / "c.pt", {"model": old.state_dict(), "config": settings})
    said = start_from(new, "self_classifier", str(tmp_path / "c.pt"))
    assert said == (
        f"--pretrained {tmp_path}/c.pt (train.py): loaded backbone (120), projection_head (9), classifiers (4); "
        "left out queue (5); initial values for queue (5)"
    )
    assert torch.equal(new.backbone.conv1.weight, old.backbone.conv1.weight)
    assert torch.equal(new.classifiers[1].weight_v, old.classifiers[1].weight_v)
    assert not new.queue.full
    assert not new.queue.embeddings.any()


def test_of_another_method_only_the_backbone_is_taken(tmp_path):
    old, new = small_method(), small_method()
    head = new.projection_head.mlp[0].weight.clone()
    state = {key.removeprefix("backbone."): v for key, v in old.state_dict().items() if key.startswith("backbone.")}
    swav = {f"module.{key}": value for key, value in state.items()}
    swav |= {"module.projection_head.0.weight": torch.rand(8, 512), "module.prototypes.weight": torch.rand(30, 4)}
    torch.save(swav, tmp_path / "swav.pth.tar")
    said = start_from(new, "self_classifier", str(tmp_path / "swav.pth.tar"))
    assert said.endswith(
        "(SwAV): loaded backbone (120); left out projection_head (1), classifiers (1); "
        "initial values for projection_head (9), classifiers (4)"
    )
    assert torch.equal(new.backbone.layer4[1].bn2.running_var, old.backbone.layer4[1].bn2.running_var)
    assert torch.equal(new.projection_head.mlp[0].weight, head)

    torch.save({"network": {**state, "fc.weight": torch.rand(3, 512)}}, tmp_path / "obow.pth")
    assert "left out fc (1); initial" in start_from(new, "self_classifier", str(tmp_path / "obow.pth"))


def test_a_backbone_that_does_not_fit_is_refused_naming_tensors(tmp_path):
    state = {key: value for key, value in small_method().state_dict().items() if key.startswith("backbone.")}
    changed = {**state, "backbone.conv1.weight": torch.rand(64, 1, 7, 7), "backbone.bn1.bias": torch.rand(2)}
    torch.save(changed, tmp_path / "shapes.pth")
    message = r"bias \(2,\) instead of \(64,\)"
    with pytest.raises(InputError, match=r"conv1\.weight \(64, 1, 7, 7\) instead of \(64, 3, 7, 7\).*" + message):
        start_from(small_method(), "self_classifier", str(tmp_path / "shapes.pth"))
    del state["backbone.bn1.bias"]
    torch.save(state, tmp_path / "missing.pth")
    with pytest.raises(InputError, match=r"1 missing: backbone\.bn1\.bias"):
        start_from(small_method(), "self_classifier", str(tmp_path / "missing.pth"))
