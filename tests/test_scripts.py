"""Every script under scripts/: what it asks Slurm for, what it starts, and on a real Slurm what becomes of that."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import time

import pytest
import torch
from conftest import ROOT
from slurm import SlurmCluster, why_not
from test_recipes import (
    DEEPCLUSTER_V2,
    FIRST,
    SCAN,
    SECOND,
    SELA,
    SELA_V2,
    SELFLABEL,
    SIMCLR,
    SWAV,
    tables_of_presets,
)

from src import checkpoint
from src.config import as_plain, parse_cls_eval, parse_knn_eval, parse_lincls_eval, parse_train
from src.distributed import Launch, read_launch
from src.errors import InputError
from src.releases import RELEASES

SCRIPTS = {str(path.relative_to(ROOT / "scripts")): path for path in sorted((ROOT / "scripts").rglob("*.sh"))}
COMMON = SCRIPTS.pop("common.sh")
CHAINS = [
    SCRIPTS.pop(f"scan/{name}.sh") for name in ("chain", "submit_chain")
]  # they start the scripts and programs of three steps
TRAININGS = sorted(name for name in SCRIPTS if re.search("train", name))
PROBES = {name for name in SCRIPTS if re.search("lincls|semisup|/eval", name)}
NEIGHBORS = {name for name in SCRIPTS if name.endswith("knn_eval.sh")}
EVALUATIONS = SCRIPTS.keys() - TRAININGS
PARSE = {"cls_eval.py": parse_cls_eval, "knn_eval.py": parse_knn_eval, "lincls_eval.py": parse_lincls_eval}

# ---- the published scripts, as the fact sheet gives them ------------------------------------------------------------

GROUPS = {
    "augmentations": "no_multicrop no_nn no_nn_no_multicrop",
    "batch_size": "bs_256 bs_512 bs_1024 bs_2048",
    "classifiers_and_classes": "1x1k 1x2k 1x4k 1x8k 5x1k 10x1k 15x1k fixed_cls",
    "learning_rate": "base_lr_0.1 base_lr_0.2 base_lr_0.4",
    "mlp": "dim_256 hidden_dim_8192 hidden_dim_8192_dim_256 num_hidden_3 num_hidden_3_dim_256 no_mlp",
    "queue_len": "q_len_128K q_len_512K q_len_1M",
    "softmax_temp": "col_tau_3e-2_row_tau_1e-1 col_tau_3e-2_row_tau_7e-2 col_tau_5e-2_row_tau_7e-2",
    "weight_decay": "wd_5e-6 wd_1e-5 wd_5e-5",
}
GROUPS_V1 = {
    "classifiers_and_classes": "1x300 1x1000 1x3000 30x300 30x3000 50x1000 100x128 learnable_cls",
    "learning_rate": "lr_0.05 lr_0.1 lr_0.2 lr_0.4 lr_0.5",
    "mlp": "dim_128_num_hidden_1x4096 dim_128_num_hidden_3x4096 dim_256_num_hidden_1x4096 dim_256_num_hidden_2x4096 no_mlp",
    "weight_decay": "wd_1e-3 wd_1e-5 wd_1e-6 wd_1e-7",
}
# script: the row of its options, then nodes, GPUs on each, CPUs for each, memory of a node, time limit
ROWS = {f"train_{n}ep.sh": (SECOND[f"{n}ep"], 11, 6, 16, "64G", "48:00:00") for n in (100, 200, 400, 800)}
ROWS["train.sh"] = ROWS["train_800ep.sh"]
ROWS["ablation/train_100ep.sh"] = (SECOND["100ep_ablation"], 11, 6, 16, "64G", "6:00:00")
for group, names in GROUPS.items():
    for name in names.split():
        nodes = {"bs_256": (2, 4), "bs_512": (4, 4), "bs_1024": (8, 4), "bs_2048": (16, 4)}.get(name, (11, 6))
        row = (SECOND[f"100ep_{name}"], *nodes, 16, "64G", "6:00:00")
        ROWS[f"ablation/{group}/train_100ep_{name}.sh"] = row
ROWS["first_generation/train.sh"] = (FIRST["800ep"], 4, 4, 16, "64G", "48:00:00")
ROWS["first_generation/ablation/train_100ep.sh"] = (FIRST["100ep"], 4, 4, 16, "64G", "6:00:00")
for group, names in GROUPS_V1.items():
    for name in names.split():
        row = (FIRST[f"100ep_{name}"], 4, 4, 16, "64G", "6:00:00")
        ROWS[f"first_generation/ablation/{group}/train_100ep_{name}.sh"] = row
for data in ("cifar10", "cifar100-20"):
    ROWS[f"first_generation/train_{data}.sh"] = (FIRST[data], 1, 1, 16, "32G", "6:00:00")
# linear classification, top-1 in percent, as published; then as above
LINEAR = {
    "swav/swav_100ep_pretrain.sh": (72.1, SWAV["100ep"], 8, 8, 8, "450G", "7:00:00"),
    "swav/swav_200ep_pretrain.sh": (73.9, SWAV["200ep"], 8, 8, 8, "450G", "13:00:00"),
    "swav/swav_400ep_pretrain.sh": (74.6, SWAV["400ep"], 8, 8, 8, "450G", "25:00:00"),
    "swav/swav_800ep_pretrain.sh": (75.3, SWAV["800ep"], 8, 8, 8, "450G", "50:00:00"),
    "swav/swav_400ep_2x224_pretrain.sh": (70.1, SWAV["400ep_2x224"], 8, 8, 8, "450G", "25:00:00"),
    "swav/swav_200ep_bs256_pretrain.sh": (72.7, SWAV["200ep_bs256"], 1, 4, 4, "150G", "72:00:00"),
    "swav/swav_400ep_bs256_pretrain.sh": (74.3, SWAV["400ep_bs256"], 1, 4, 4, "150G", "72:00:00"),
    "swav/swav_RN50w2_400ep_pretrain.sh": (77.3, SWAV["RN50w2_400ep"], 16, 8, 10, "450G", "72:00:00"),
    "swav/swav_RN50w4_400ep_pretrain.sh": (77.9, SWAV["RN50w4_400ep"], 8, 8, 10, "450G", "72:00:00"),
    "swav/swav_RN50w5_400ep_pretrain.sh": (78.5, SWAV["RN50w5_400ep"], 16, 8, 10, "450G", "72:00:00"),
    "deepcluster_v2/deepclusterv2_400ep_pretrain.sh": (74.3, DEEPCLUSTER_V2["400ep"], 8, 8, 8, "450G", "25:00:00"),
    "deepcluster_v2/deepclusterv2_400ep_2x224_pretrain.sh": (
        *(70.2, DEEPCLUSTER_V2["400ep_2x224"], 8, 8, 8, "450G", "25:00:00"),
    ),
    "deepcluster_v2/deepclusterv2_800ep_pretrain.sh": (75.2, DEEPCLUSTER_V2["800ep"], 8, 8, 8, "450G", "40:00:00"),
    # released models without a script: the resources of SwAV's 400 epochs
    "sela_v2/selav2_400ep_pretrain.sh": (71.8, SELA_V2["400ep"], 8, 8, 8, "450G", "25:00:00"),
    "sela_v2/selav2_400ep_2x224_pretrain.sh": (67.2, SELA_V2["400ep_2x224"], 8, 8, 8, "450G", "25:00:00"),
}
LINEAR["sela/sela_resnet_pretrain.sh"] = (61.5, SELA["resnet"], 1, 4, 6, "150G", "72:00:00")
ROWS |= {name: row for name, (_, *row) in LINEAR.items()}
for name, limit in (("alexnet_pretrain", "72:00:00"), ("alexnet_retrain", "72:00:00"), ("cifar_pretrain", "24:00:00")):
    row = SELA["retrain" if name == "alexnet_retrain" else name.partition("_")[0]]
    ROWS[f"sela/sela_{name}.sh"] = (row, 1, 4, 6, "150G", limit)
# SCAN's authors published configurations without resources: one GPU, and four for the large networks
SMALL, LARGE = ("cifar10", "cifar100-20", "stl10"), ("imagenet-50", "imagenet-100", "imagenet-200")
for name in SMALL:
    ROWS[f"simclr/simclr_{name}_train.sh"] = (SIMCLR[name], 1, 1, 16, "32G", "24:00:00")
    ROWS[f"scan/scan_{name}_train.sh"] = (SCAN[name], 1, 1, 16, "32G", "12:00:00")
    ROWS[f"selflabel/selflabel_{name}_train.sh"] = (SELFLABEL[name], 1, 1, 16, "32G", "12:00:00")
for name in LARGE:
    ROWS[f"scan/scan_{name}_train.sh"] = (SCAN[name], 1, 1, 16, "64G", "12:00:00")
    ROWS[f"selflabel/selflabel_{name}_train.sh"] = (SELFLABEL[name], 1, 4, 16, "64G", "12:00:00")
ROWS["scan/scan_imagenet_train.sh"] = (SCAN["imagenet"], 1, 4, 16, "64G", "48:00:00")
for name in ("cls_eval.sh", "unsupervised_cls_eval/cls_eval.sh"):
    ROWS[name] = ({"split": "test", "classifier": None, "grids": 15}, 1, 1, 64, "64G", "00:10:00")
for choice in ("lvl_2", "lvl_3", "lvl_4", "lvl_5", "lvl_6", "entity13", "entity30", "living17", "nonliving26"):
    row = ({"superclass": [choice.removeprefix("lvl_")], "classifier": None}, 1, 1, 64, "64G", "00:10:00")
    ROWS[f"unsupervised_cls_eval/cls_eval_superclass_{choice}.sh"] = row
KMEANS = {
    "kmeans": 1000,
    "layer": "backbone",
    "normalize": False,
    "fit_share": 0.1,
    "init": "k-means++",
    "restarts": 10,
    "early_stop": False,  # theirs: scikit-learn's rule
}
for name, model in (
    ("barlowtwins", "barlow-twins-1000ep"),
    ("dino", "dino-resnet50"),
    ("mocov2", "moco-v2-800ep"),
    ("obow", "obow-200ep"),
    ("simsiam", "simsiam-100ep"),
    ("swav", "swav-800ep"),
):
    row = ({**KMEANS, "checkpoint": model}, 1, 1, 64, "128G", "00:10:00")
    ROWS[f"kmeans_baselines/kmeans_eval_{name}.sh"] = row
# What a preset of a probe means is held against the published values here, not against the preset.
FROZEN = {"finetune": False, "train_bn": False, "schedule": "cosine", "epochs": 100, "momentum": 0.9, "nesterov": False}
LINCLS = {**FROZEN, "optimizer": "lars", "batch_size": 1024 * 4, "lr": 0.8, "weight_decay": 0, "crop_flip": True}
ROWS["lincls_eval.sh"] = (LINCLS, 4, 4, 16, "64G", "24:00:00")
ROWS["first_generation/eval.sh"] = (LINCLS, 4, 4, 16, "64G", "6:00:00")
LINCLS_SWAV = {**FROZEN, "optimizer": "sgd", "batch_size": 8 * 32, "lr": 0.3, "weight_decay": 1e-6, "crop_flip": True}
ROWS["swav/swav_800ep_lincls_eval.sh"] = (LINCLS_SWAV, 1, 8, 8, "450G", "48:00:00")
for percent, head, trunk in ((1, 5, 0.02), (10, 0.2, 0.01)):
    row = {"finetune": True, "train_bn": True, "train_share": percent / 100, "epochs": 20, "batch_size": 8 * 32}
    row |= {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0, "lr": head, "backbone_lr": trunk, "crop_flip": True}
    row |= {"schedule": "step", "decay_epochs": [12, 16], "gamma": 0.2}
    ROWS[f"swav/swav_800ep_semisup_{percent}_eval.sh"] = (row, 1, 8, 8, "450G", "12:00:00")
NEAREST = {"layer": "backbone", "tau": 0.1, "bank_share": 1, "bank_list": ""}
# theirs: one task of four GPUs and 64 CPUs; features in half precision
row = {**NEAREST, "k": [10, 20, 100, 200], "precision": "float16"}
ROWS["knn_eval.sh"] = (row, 1, 4, 16, "128G", "3:00:00")
ROWS["first_generation/knn_eval.sh"] = ({**NEAREST, "k": [20], "precision": "float32"}, 1, 1, 64, "128G", "3:00:00")
# theirs: one task of four GPUs and 64 CPUs
for name, row in (("cls_eval.sh", {"grids": 15}), ("tsne_imagenet.sh", {"tsne": 5, "tsne_classes": 10, "grids": 0})):
    ROWS[f"first_generation/{name}"] = (row, 1, 4, 16, "64G", "00:10:00")

# What is known of the published results; of all other scripts, nothing.
CLUSTERS = {
    "train_100ep.sh": "71.2 49.2 26.1 37.3",
    "train_200ep.sh": "72.5 51.6 28.1 39.4",
    "train_400ep.sh": "72.9 52.3 28.8 40.2",
    "train_800ep.sh": "73.3 53.1 29.5 41.1",
    "train.sh": "73.3 53.1 29.5 41.1",
    "cls_eval.sh": "73.3 53.1 29.5 41.1",
    "unsupervised_cls_eval/cls_eval.sh": "73.3 53.1 29.5 41.1",
    "unsupervised_cls_eval/cls_eval_superclass_lvl_2.sh": "74.0 54.3 30.9 85.7",
    "unsupervised_cls_eval/cls_eval_superclass_lvl_3.sh": "74.0 54.3 30.9 79.7",
    "unsupervised_cls_eval/cls_eval_superclass_lvl_4.sh": "74.0 54.3 30.9 71.8",
    "unsupervised_cls_eval/cls_eval_superclass_lvl_5.sh": "73.9 54.3 30.8 60.0",
    "unsupervised_cls_eval/cls_eval_superclass_lvl_6.sh": "74.1 55.3 32.1 46.7",
    "unsupervised_cls_eval/cls_eval_superclass_entity13.sh": "73.6 54.1 30.7 84.4",
    "unsupervised_cls_eval/cls_eval_superclass_entity30.sh": "72.9 53.4 29.8 81.0",
    "unsupervised_cls_eval/cls_eval_superclass_living17.sh": "67.2 51.8 26.4 90.8",
    "unsupervised_cls_eval/cls_eval_superclass_nonliving26.sh": "72.2 57.0 36.8 76.7",
    "kmeans_baselines/kmeans_eval_barlowtwins.sh": "68.8 48.3 14.7 33.2",
    "kmeans_baselines/kmeans_eval_obow.sh": "66.5 42.0 16.9 31.1",
    "kmeans_baselines/kmeans_eval_dino.sh": "66.2 42.3 15.6 30.7",
    "kmeans_baselines/kmeans_eval_mocov2.sh": "66.6 45.3 12.0 30.6",
    "kmeans_baselines/kmeans_eval_swav.sh": "64.1 38.8 13.4 28.1",
    "kmeans_baselines/kmeans_eval_simsiam.sh": "62.2 34.9 11.6 24.9",
}
PUBLISHED = dict.fromkeys(SCRIPTS, "none")
PUBLISHED |= {name: f"linear top-1 {row[0]}" for name, row in LINEAR.items()}
for name, scores in CLUSTERS.items():
    PUBLISHED[name] = "NMI {}, AMI {}, ARI {}, ACC {}".format(*scores.split())
PUBLISHED["lincls_eval.sh"] = "linear top-1 74.1"
PUBLISHED["swav/swav_800ep_lincls_eval.sh"] = "linear top-1 75.3"
for percent in (1, 10):  # the numbers are in a table of the paper that nobody has compared with this repository
    PUBLISHED[f"swav/swav_800ep_semisup_{percent}_eval.sh"] = "in arXiv:2006.09882, not checked here"
PUBLISHED["first_generation/tsne_imagenet.sh"] = "none (figures)"

# the authors' best models: NMI, ARI and ACC after SCAN, then after self-labelling
BEST = {
    "cifar10": ("71.5 66.5 81.6", "79.7 77.2 88.3"),
    "cifar100-20": ("44.9 28.3 44.0", "48.6 33.3 50.7"),
    "stl10": ("67.3 61.8 79.2", "69.8 64.6 80.9"),
    "imagenet-50": ("80.5 63.5 75.1", "82.2 66.1 76.8"),
    "imagenet-100": ("78.7 54.4 66.2", "80.8 57.6 68.9"),
    "imagenet-200": ("75.7 44.1 56.3", "77.2 47.0 58.1"),
}
for data, scores in BEST.items():
    for step, text in zip(("scan", "selflabel"), scores, strict=True):
        values = "NMI {}, ARI {}, ACC {} (the authors' best model)".format(*text.split())
        PUBLISHED[f"{step}/{step}_{data}_train.sh"] = values
PUBLISHED["scan/scan_imagenet_train.sh"] = "NMI 72.0, AMI 51.2, ARI 27.5, ACC 39.9"

FOLDERS = {"self_classifier": "", "self_classifier_v1": "first_generation/"}
OTHERS = ("swav", "deepcluster_v2", "sela_v2", "sela", "simclr", "scan", "selflabel")
FOLDERS |= {method: f"{method}/" for method in OTHERS}


def header(path) -> dict[str, str]:
    """What a script asks Slurm for."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH ")]
    words = [word.lstrip("-").partition("=") for line in lines for word in shlex.split(line)[1:]]
    return {name: value for name, _, value in words}


# ---- without Slurm --------------------------------------------------------------------------------------------------


@pytest.fixture
def run_script(tmp_path):
    """Run a script with an srun that only prints its words."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit ${SRUN_EXITS:-0}\n')
    for name in ("scontrol", "scancel"):
        (programs / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
    for path in programs.iterdir():
        path.chmod(0o755)
    mine = {"DATASET_PATH": "/data sets/imagenet", "EXPERIMENT_PATH": "/experiments"}

    def run(name: str, *words: str, cwd=ROOT, **environ: str | None) -> subprocess.CompletedProcess:
        copy = tmp_path / "slurm_script"  # as sbatch does
        copy.write_text((ROOT / "scripts" / name).read_text())
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "PRETRAINED_PATH"))}
        together = {**outer, **mine, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", **environ}
        together = {k: v for k, v in together.items() if v is not None}
        return subprocess.run(["bash", copy, *words], cwd=cwd, env=together, capture_output=True, text=True, timeout=60)

    return run


def command(done: subprocess.CompletedProcess) -> list[str]:
    """The program that srun was to start, and its words."""
    assert done.returncode == 0, done.stderr
    words = done.stdout.splitlines()
    return words[words.index("python") + 1 :]


def test_the_scripts_are_the_published_ones():
    assert SCRIPTS.keys() == ROWS.keys()
    listed = {
        FOLDERS[method] + script.split()[-1] for method, rows in tables_of_presets().items() for _, script, _ in rows
    }
    assert listed == set(TRAININGS) - {"train.sh"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_asks_for_the_published_resources_and_starts_the_published_run(name, run_script):
    text = SCRIPTS[name].read_text()
    row, nodes, gpus, cpus, memory, limit = ROWS[name]
    asked = header(SCRIPTS[name])
    assert (asked["nodes"], asked["gpus-per-node"], asked["cpus-per-gpu"]) == (str(nodes), str(gpus), str(cpus))
    assert (asked["mem"], asked["time"]) == (memory, limit)
    assert "requeue" in asked
    assert asked.get("signal") == ("B:USR1@120" if name in TRAININGS or name in PROBES else None)
    hours, minutes, _ = map(int, limit.split(":"))
    cost = float(re.search(r"^# cost: at most ([\d.,]+) GPU hours", text, flags=re.MULTILINE)[1].replace(",", ""))
    assert cost == pytest.approx(nodes * gpus * (hours + minutes / 60), abs=0.05)
    assert re.search(r"^# published: .+   ours: not run$", text, flags=re.MULTILINE)
    assert text.endswith(' "$@"\n')
    assert text.count("launch ") == 1

    program, *words = command(run_script(name, SLURM_NNODES=str(nodes), SLURM_GPUS_ON_NODE=str(gpus)))
    if name in EVALUATIONS:
        expected = "lincls_eval.py" if name in PROBES else "knn_eval.py" if name in NEIGHBORS else "cls_eval.py"
        assert program == expected
        options = PARSE[program](words)
        assert options.checkpoint in RELEASES or options.checkpoint.startswith("/experiments/")
        found = as_plain(options)
        assert options.data == "/data sets/imagenet"
    else:
        assert program == "train.py"
        options, method, knobs = parse_train(words)
        assert FOLDERS[method] == next(folder for folder in reversed(FOLDERS.values()) if name.startswith(folder))
        found = {**as_plain(options), **as_plain(knobs)}
        assert "/data sets/imagenet" in (options.data, options.data_root)
        job = asked["job-name"]
        folder = "first_generation/" if name.startswith("first_generation/") else ""
        assert options.output_dir == f"/experiments/{folder}{job}"
    assert {key: found[key] for key in row} == row


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_script_says_the_published_value(name):
    published = re.search(r"^# published: (.+)   ours", SCRIPTS[name].read_text(), flags=re.MULTILINE)
    assert published[1] == PUBLISHED[name]


def test_no_two_evaluations_of_one_checkpoint_write_to_one_folder():
    folders = [
        found[1] for name in EVALUATIONS if (found := re.search(r'--output-dir "(.*)\$RUN"', SCRIPTS[name].read_text()))
    ]
    assert len(set(folders)) == len(folders) == 17
    for folder in folders:
        assert folder.partition("/")[2] in {header(path)["job-name"] for path in SCRIPTS.values()}


def test_no_two_trainings_share_a_folder_unless_they_are_the_same():
    folders = [re.search(r'--output-dir "(.*)\$RUN"', SCRIPTS[name].read_text())[1] for name in TRAININGS]
    assert len(set(folders)) == len(folders) - 1  # train.sh and train_800ep.sh


@pytest.mark.parametrize(
    "path", [COMMON, *CHAINS, *SCRIPTS.values()], ids=["common.sh", "chain.sh", "submit_chain.sh", *SCRIPTS]
)
def test_bash_can_read_it(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(path, os.X_OK) or path == COMMON


def test_one_task_for_each_gpu_of_what_was_allocated(run_script):
    given = {"SLURM_NNODES": "3", "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "96", "SLURM_CPUS_PER_GPU": "16"}
    words = run_script("train.sh", **given).stdout.splitlines()
    assert {"--ntasks=24", "--ntasks-per-node=8", "--cpus-per-task=12"} <= set(words)
    # without GPUs one task per node, which then has all cores
    given = {"SLURM_NNODES": "2", "SLURM_CPUS_ON_NODE": "4", "SLURM_GPUS_PER_NODE": "0"}
    words = run_script("train.sh", **given).stdout.splitlines()
    assert {"--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=4"} <= set(words)
    # salloc does not say what a node has, but what was asked for
    words = run_script("train.sh", **{**given, "SLURM_GPUS_PER_NODE": "a100:2"}).stdout.splitlines()
    assert {"--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=2"} <= set(words)


NUMBERS = ("NNODES", "GPUS_ON_NODE", "CPUS_ON_NODE", "ARRAY_TASK_ID", "ARRAY_JOB_ID", "JOB_ID", "GPUS_PER_NODE")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", ["a[$(touch x)]", "`touch x`", "1+1", "08", "-1", "2(x3)", 20 * "9", "\x1b[31m", "PATH"]
)
def test_what_is_no_number_is_neither_executed_nor_calculated(tmp_path, run_script, name, value):
    """Bash executes commands in the index of an array when it calculates."""
    (tmp_path / "here").mkdir()
    done = run_script("train.sh", REPOSITORY=str(ROOT), cwd=tmp_path / "here", **{f"SLURM_{name}": value})
    assert not list((tmp_path / "here").iterdir())
    assert not (ROOT / "x").exists()
    if name == "GPUS_PER_NODE":  # it may hold a text such as a100:4
        assert "--ntasks-per-node=1" in done.stdout.splitlines()
        return
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"SLURM_{name} is " in done.stderr
    assert "\x1b" not in done.stderr


def test_the_last_task_of_a_training_is_waited_for_a_minute_of_an_evaluation_for_ever(run_script):
    assert "--wait=60" in run_script("train.sh").stdout.splitlines()
    assert "--wait=60" in run_script("lincls_eval.sh").stdout.splitlines()
    assert "--wait=0" in run_script("first_generation/tsne_imagenet.sh").stdout.splitlines()
    assert "--wait=0" in run_script("lincls_eval.sh", "--fast").stdout.splitlines()  # the others have nothing to do


def test_flags_behind_the_script_win_and_may_hold_blanks(run_script):
    _, *words = command(run_script("train_100ep.sh", "--epochs", "30", "--output-dir", "/some where"))
    options, _, _ = parse_train(words)
    assert (options.epochs, options.output_dir, options.data) == (30, "/some where", "/data sets/imagenet")


def test_a_task_of_an_array_has_its_own_seed_and_folder(run_script):
    task = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "74"}
    options, _, _ = parse_train(command(run_script("train.sh", **task))[1:])
    assert (options.seed, options.output_dir) == (3, "/experiments/sc_800ep_train/seed_3")
    for name in ("cls_eval.sh", "knn_eval.sh", "lincls_eval.sh"):
        program, *words = command(run_script(name, **task))
        options = PARSE[program](words)
        assert options.checkpoint == "/experiments/sc_800ep_train/seed_3/checkpoint.pt"
        assert options.seed == (0 if name == "cls_eval.sh" else 3)


def test_a_released_model_may_be_scored(run_script):
    options = parse_cls_eval(command(run_script("cls_eval.sh", PRETRAINED_PATH="/models/it.pth.tar"))[1:])
    assert options.checkpoint == "/models/it.pth.tar"


def test_what_an_array_scores(run_script):
    """Of a folder of runs each task its seed's, beside it; of one file each task writes into a folder of its own."""
    task = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3", "SLURM_JOB_ID": "74", "SLURM_JOB_NAME": "probe"}
    for name in ("cls_eval.sh", "knn_eval.sh", "lincls_eval.sh", "first_generation/eval.sh"):
        program, *words = command(run_script(name, **task, PRETRAINED_PATH="/models/it.pth.tar"))
        options = PARSE[program](words)
        assert (options.checkpoint, options.output_dir) == ("/models/it.pth.tar", "/experiments/probe/seed_3")
        program, *words = command(run_script(name, **task, PRETRAINED_PATH=str(ROOT)))
        options = PARSE[program](words)
        assert (options.checkpoint, options.output_dir) == (f"{ROOT}/seed_3/checkpoint.pt", "")
    alone = parse_cls_eval(command(run_script("cls_eval.sh", PRETRAINED_PATH=str(ROOT)))[1:])
    assert alone.checkpoint == f"{ROOT}/checkpoint.pt"


def test_a_container_is_put_before_python(run_script):
    done = run_script("train.sh", CONTAINER="apptainer exec --nv it.sif")
    assert "\napptainer\nexec\n--nv\nit.sif\npython\ntrain.py\n" in done.stdout


def test_a_setup_of_the_nodes_comes_first_once_on_each(run_script):
    given = {"SLURM_NNODES": "3", "SLURM_GPUS_ON_NODE": "8", "NODE_SETUP": "tar xf 'my data.tar'"}
    words = run_script("train.sh", **given).stdout.splitlines()
    assert words[:5] == ["--ntasks=3", "--ntasks-per-node=1", "bash", "-c", "tar xf 'my data.tar'"]
    assert "--ntasks=24" in words[5:]
    done = run_script("train.sh", **given, SRUN_EXITS="4")
    assert (done.returncode, done.stderr) == (1, "slurm_script: NODE_SETUP failed on a node: correct the command\n")
    assert "--ntasks=24" not in done.stdout


@pytest.mark.parametrize("missing", ["DATASET_PATH", "EXPERIMENT_PATH"])
@pytest.mark.parametrize("name", ["train.sh", "cls_eval.sh", "first_generation/train_cifar10.sh"])
def test_a_path_that_is_not_set_is_one_line_and_status_2(name, missing, run_script):
    for value in (None, ""):
        done = run_script(name, **{missing: value})
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(rf"\S+: {missing} is not set: export {missing}=the folder .+\n", done.stderr)


def test_submitted_from_elsewhere_it_says_what_to_do(run_script, tmp_path):
    done = run_script("train.sh", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "submit from the repository's folder, or export REPOSITORY=that folder"
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "common.sh").write_text(COMMON.read_text())
    done = run_script("train.sh", cwd=tmp_path, SLURM_JOB_NAME="sc_800ep_train")
    assert done.returncode == 2
    assert done.stderr.startswith(f"sc_800ep_train: no train.py in {tmp_path}: submit from the repository's folder")
    assert command(run_script("train.sh", cwd=tmp_path, REPOSITORY=str(ROOT)))
    assert command(run_script("train.sh", cwd=tmp_path, SLURM_SUBMIT_DIR=str(ROOT)))


@pytest.mark.parametrize("status", ["1", "2", "137", "143"])
def test_a_step_that_fails_without_a_signal_is_not_requeued(status, run_script):
    # 143 as well: the other tasks of one that failed end with it
    done = run_script("train.sh", SLURM_JOB_ID="7", SRUN_EXITS=status)
    assert done.returncode == int(status)
    assert "scontrol" not in done.stdout


# ---- the learning rate of another batch -----------------------------------------------------------------------------


def rates(*words: str) -> tuple:
    options, _, _ = parse_train(["--data", "somewhere", *words])
    return options.lr, options.warmup_start, options.final_lr


@pytest.mark.parametrize("batch", [1024, 2048])
def test_base_lr_gives_the_published_rates_of_other_batches(batch):
    scaled = rates("--preset", "100ep", "--batch-size", str(batch), "--base-lr", "0.3")
    assert scaled == pytest.approx(rates("--preset", f"100ep_bs_{batch}"), rel=1e-12)


def test_base_lr_gives_the_published_learning_rates():
    for base in ("0.1", "0.2", "0.4"):
        scaled = rates("--preset", "100ep_ablation", "--batch-size", "4096", "--base-lr", base)
        assert scaled == pytest.approx(rates("--preset", f"100ep_base_lr_{base}"), rel=1e-12)
    words = ("--preset", "100ep", "--base-lr", "0.2", "--warmup-start", "0", "--final-lr", "0.5", "--batch-size", "256")
    assert rates(*words) == (0.2, 0, 0.5)


@pytest.mark.parametrize("method", ["self_classifier", "swav", "sela_v2"])
def test_base_lr_scales_the_warm_up_of_any_preset(method):
    """A preset need not begin at its base rate: with its own base and batch it stays what it is."""
    words = ("--method", method, "--preset", "digits", "--data", "digits")
    own = rates(*words)
    base = own[0] * 256 / 128
    assert rates(*words, "--base-lr", str(base)) == pytest.approx(own)
    assert rates(*words, "--batch-size", "256", "--base-lr", str(base)) == pytest.approx(
        [2 * own[0], own[1], 2 * own[2]]
    )


def test_a_warm_up_goes_up():
    words = ("--preset", "100ep", "--batch-size", "1024", "--lr", "0.1")
    # the preset's share, where its own start is above
    assert rates(*words) == pytest.approx([0.1, 0.1 * 0.3 / 4.8, 0.0048])
    with pytest.raises(
        InputError, match=r"--warmup-start 0\.3 is above --lr 0\.1, but a warm-up raises the learning rate"
    ):
        rates(*words, "--warmup-start", "0.3")
    assert rates(*words, "--warmup-start", "0.3", "--warmup-epochs", "0")[0] == 0.1


@pytest.mark.parametrize("batch", [1024, 2048])
def test_the_learning_rate_follows_the_batch_size(batch):
    """lars: the published rule, to the digits that the published scripts print."""
    assert rates("--preset", "100ep", "--batch-size", str(batch)) == pytest.approx(
        rates("--preset", f"100ep_bs_{batch}"), rel=1e-3
    )


def test_adamw_follows_the_square_root_of_the_batch_size():
    words = ("--method", "self_classifier", "--preset", "digits", "--data", "digits")
    assert rates(*words, "--batch-size", "32") == pytest.approx([0.001, 0.0001, 0.000001])


def test_a_given_learning_rate_does_not_follow():
    assert rates("--preset", "100ep", "--batch-size", "4096") == (4.8, 0.3, 0.0048)
    assert rates("--preset", "100ep", "--batch-size", "1024", "--lr=1") == (1, 0.3, 0.0048)
    with pytest.raises(InputError, match="--base-lr and --lr"):
        rates("--base-lr", "1", "--lr", "1")
    with pytest.raises(InputError, match=r"--base-lr is 0\.0"):
        rates("--base-lr", "0")


def test_dry_run_prints_the_configuration_without_torch(run_python):
    done = run_python("-X", "importtime", "train.py", "--preset", "100ep_dim_256", "--data", "x", "--dry-run")
    assert done.returncode == 0
    assert " torch\n" not in done.stderr
    printed = json.loads(done.stdout)
    options, method, knobs = parse_train(["--preset", "100ep_dim_256", "--data", "x"])
    assert printed == {"method": method, **as_plain(options), **as_plain(knobs)}
    assert run_python("train.py", "--dry-run", "--lr", "-1").returncode == 2


@pytest.mark.parametrize("program", PARSE)
def test_dry_run_of_an_evaluation_opens_no_file(program, run_python):
    words = ["--checkpoint", "nowhere.pt", "--data", "x", "--seed", "3"]
    done = run_python("-X", "importtime", program, *words, *["--kmeans", "5"] * (program == "cls_eval.py"), "--dry-run")
    assert done.returncode == 0
    assert " torch\n" not in done.stderr
    printed = json.loads(done.stdout)
    assert (printed["checkpoint"], printed["seed"], printed["precision"]) == ("nowhere.pt", 3, "float32")
    assert run_python(program, *words, "--batch-size", "0", "--dry-run").returncode == 2


def test_a_probe_of_another_batch_without_a_learning_rate_is_refused(run_script):
    def of(*words: str):
        return parse_lincls_eval(["--checkpoint", "x", "--data", "somewhere", *words])

    _, *words = command(run_script("lincls_eval.sh", "--batch-size", "1024"))
    message = r"--batch-size 1024: --lr 0\.8 of --preset self_classifier is for 4096 images; --lr 0\.2 scales it"
    with pytest.raises(InputError, match=message):
        parse_lincls_eval(words)
    assert parse_lincls_eval([*words, "--lr", "0.2"]).lr == 0.2
    assert of("--preset", "self_classifier", "--batch-size=4092").lr == 0.8
    with pytest.raises(
        InputError, match=r"--backbone-lr 0\.01 of --preset swav_semi_10 is for 256 images; --backbone-lr 0\.02 "
    ):
        of("--preset", "swav_semi_10", "--batch-size", "512", "--lr", "0.4")
    assert of("--preset", "swav_semi_10", "--batch-size", "512", "--lr=0.4", "--backbone-lr=0.02").batch_size == 512
    assert of("--preset", "swav", "--batch-size", "512", "--fast").batch_size == 512  # which tries rates of its own
    assert of("--batch-size", "512").lr == 0.8  # nobody named a preset


# ---- docs/cluster.md ------------------------------------------------------------------------------------------------


def test_every_submission_in_the_document_is_understood(run_script):
    text = (ROOT / "docs" / "cluster.md").read_text()
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("sbatch ")]
    submissions = [shlex.split(line, comments=True) for line in lines]
    assert len(submissions) >= 5
    for words in submissions:
        path = next(word for word in words if word.startswith("scripts/"))
        program, *given = command(run_script(path.removeprefix("scripts/"), *words[words.index(path) + 1 :]))
        PARSE.get(program, parse_train)(given)
    assert set(re.findall(r"`(scripts/[\w./-]+\.(?:sh|def))`", text)) <= {
        str(path.relative_to(ROOT)) for path in (ROOT / "scripts").rglob("*.*")
    }


def test_the_block_for_lsf_tells_each_task_its_place(tmp_path):
    text = (ROOT / "docs" / "cluster.md").read_text().partition("## IBM's LSF")[2]
    script = re.search(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)[1]
    start = (
        'for r in 0 1 2; do JSM_NAMESPACE_RANK=$r JSM_NAMESPACE_LOCAL_RANK=$((r % 2)) JSM_NAMESPACE_SIZE=3 "$@"; done'
    )
    (tmp_path / "jsrun").write_text(f'#!/bin/sh\nwhile [ "$1" != bash ]; do shift; done\n{start}\n')
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\nenv\necho\n')
    for path in tmp_path.iterdir():
        path.chmod(0o755)
    job = {"LSB_MCPU_HOSTS": "batch1 1 gpu03 42 gpu04 42", "LSB_JOBID": "40017", "DATASET_PATH": "digits"}
    environ = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "EXPERIMENT_PATH": "/experiments", **job}
    done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    places = []
    for printed in done.stdout.strip().split("\n\n"):
        line, *variables = printed.splitlines()
        program, *words = shlex.split(line)
        assert (program, parse_train(words)[0].epochs) == ("train.py", 800)
        places.append(read_launch(dict(each.split("=", 1) for each in variables)))
    assert places == [Launch(rank, 3, rank % 2, "gpu03", 20017) for rank in range(3)]


# ---- on a real Slurm ------------------------------------------------------------------------------------------------

on_slurm = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not())]
EPOCHS = 8
DIGITS = f"--preset digits --epochs {EPOCHS} --warmup-epochs 1 --classes 10 10 20 --dim 16 --hidden-dim 32 --device cpu"


def fit(nodes: int) -> list[str]:
    """What the test cluster has."""
    return [f"--nodes={nodes}", "--gpus-per-node=1", "--cpus-per-gpu=1", "--mem=1"]


@pytest.fixture(scope="module")
def cluster():
    with SlurmCluster(ROOT) as running:
        yield running
    assert not running.processes()


@pytest.fixture
def submit(cluster, tmp_path):
    """Submit a script; returns the job's number. Runs lie in the test's folder, and so does log.txt."""

    def submit(nodes: int, *words: str, folder=tmp_path) -> str:
        paths = {"DATASET_PATH": "digits", "EXPERIMENT_PATH": str(folder)}
        fixed = ("sbatch", "--parsable", f"--output={folder / 'log.txt'}", *fit(nodes))
        done = cluster.run(*fixed, *words, **paths)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return submit


def field(cluster, job: str, name: str) -> str:
    shown = cluster.run("scontrol", "show", "job", job).stdout
    return re.search(rf"\b{name}=(\S+)", shown)[1]


def wait_until(condition, complaint, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, complaint()
        time.sleep(0.05)


def wait_for_end(cluster, job: str, folder) -> str:
    """The state in which a job ended."""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    log = folder / "log.txt"
    wait_until(lambda: field(cluster, job, "JobState") in over, lambda: log.read_text() if log.exists() else "no log")
    return field(cluster, job, "JobState")


@pytest.fixture(scope="module")
def trained(cluster, tmp_path_factory):
    """The folder of the experiments in which train.sh was run to its end, and cls_eval.sh behind it."""
    folder = tmp_path_factory.mktemp("whole")
    environ = {"DATASET_PATH": "digits", "EXPERIMENT_PATH": str(folder)}
    sbatch = ("sbatch", "--parsable", f"--output={folder / 'log.txt'}")
    train = cluster.run(*sbatch, *fit(2), "scripts/train.sh", *DIGITS.split(), **environ).stdout.strip()
    behind = f"--dependency=afterok:{train}"
    score = cluster.run(*sbatch, *fit(1), behind, "scripts/cls_eval.sh", "--device", "cpu", **environ).stdout.strip()
    for job in (train, score):
        assert wait_for_end(cluster, job, folder) == "COMPLETED", (folder / "log.txt").read_text()
    return folder


def assert_ended_with_the_weights_of(trained, folder):
    one, two = (checkpoint.load(each / "checkpoint.pt") for each in (trained / "sc_800ep_train", folder))
    assert (one["epoch"], two["epoch"]) == (EPOCHS, EPOCHS)
    assert one["model"].keys() == two["model"].keys()
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())


@contextlib.contextmanager
def small_disk(folder, room: int):
    """Mount a disk of `room` bytes in a new folder."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={room}", "test", folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no disk of a given size can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


class TestOnSlurm:
    pytestmark = on_slurm

    @pytest.mark.parametrize("name", SCRIPTS)
    def test_slurm_takes_the_script(self, cluster, name):
        done = cluster.run("sbatch", "--test-only", *fit(2), f"scripts/{name}")
        assert done.returncode == 0, done.stderr
        assert " using 2 processors on nodes " in done.stderr

    def test_two_nodes_train_and_the_dependent_job_scores(self, trained):
        log = (trained / "log.txt").read_text()
        assert "64 images on each of 2 x cpu" in log
        scores = json.loads((trained / "sc_800ep_train" / "cls_eval.json").read_text())
        assert all(0 < scores[name] < 1 for name in ("acc", "nmi", "ami", "ari"))
        assert scores["acc"] > 0.3
        assert (scores["epochs"], scores["images"]) == (EPOCHS, 360)

    def test_two_nodes_learn_what_one_process_learns(self, trained, run_python, tmp_path):
        words = ("--data", "digits", "--seed", "0", *DIGITS.split(), "--output-dir", tmp_path)
        assert run_python("train.py", "--preset", "800ep", *words).returncode == 0
        done = run_python("cls_eval.py", "--checkpoint", tmp_path / "checkpoint.pt", "--device", "cpu")
        assert done.returncode == 0, done.stderr
        folders = (trained / "sc_800ep_train", tmp_path)
        # the same views in the same batches: what differs is the rounding of sums, which the steps then magnify
        first = [json.loads((each / "metrics.jsonl").read_text().partition("\n")[0])["loss"] for each in folders]
        assert first[0] == pytest.approx(first[1], rel=1e-3)
        scores = [json.loads((each / "cls_eval.json").read_text())["acc"] for each in folders]
        assert scores[0] == pytest.approx(scores[1], abs=0.15)

    def test_cut_off_by_the_signal_and_by_a_requeue_it_ends_with_the_weights_of_an_undisturbed_run(
        self, cluster, trained, submit, tmp_path
    ):
        # of an array, whose tasks are told apart by more than SLURM_JOB_ID
        job = submit(2, "--array=0", "scripts/train.sh", *DIGITS.split()) + "_0"
        folder, log = tmp_path / "sc_800ep_train" / "seed_0", tmp_path / "log.txt"

        def shown() -> str:
            return log.read_text() + cluster.run("scontrol", "show", "job", job).stdout

        def started_again(restarts: int) -> None:
            state = lambda: (field(cluster, job, "JobState"), field(cluster, job, "Restarts"))  # noqa: E731
            wait_until(lambda: state() == ("RUNNING", str(restarts)), shown)

        wait_until((folder / "checkpoint.pt").exists, lambda: log.exists() and log.read_text())
        cluster.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1 does ahead of the limit
        started_again(1)
        step = int(re.search(r"stopped by SIGTERM: saved .* at step (\d+)", log.read_text())[1])
        saved = (folder / "checkpoint.pt").stat().st_mtime_ns
        wait_until(lambda: (folder / "checkpoint.pt").stat().st_mtime_ns > saved, shown)
        assert f"resuming from step {step} " in log.read_text()
        cluster.run("scontrol", "requeue", job)
        started_again(2)
        assert wait_for_end(cluster, job, tmp_path) == "COMPLETED"
        assert log.read_text().count("resuming from step ") == 2
        assert_ended_with_the_weights_of(trained, folder)

    def test_kill_9_of_one_rank_ends_the_job_within_a_minute_and_it_is_not_requeued(self, cluster, submit, tmp_path):
        job = submit(2, "scripts/train.sh", *DIGITS.split())
        folder, log = tmp_path / "sc_800ep_train", tmp_path / "log.txt"
        wait_until((folder / "checkpoint.pt").exists, lambda: log.exists() and log.read_text())
        os.kill(cluster.pid(job, rank=1), signal.SIGKILL)
        killed = time.monotonic()
        assert wait_for_end(cluster, job, tmp_path) == "FAILED"
        assert time.monotonic() - killed < 60
        assert field(cluster, job, "ExitCode") != "0:0"
        assert field(cluster, job, "Restarts") == "0"
        assert "rank 1 of 2 no longer answers" in log.read_text()
        assert 1 <= checkpoint.load(folder / "checkpoint.pt")["epoch"] < EPOCHS

    def test_a_job_that_fails_is_not_requeued(self, cluster, submit, tmp_path):
        job = submit(2, "scripts/train.sh", "--lr", "-1")
        assert wait_for_end(cluster, job, tmp_path) == "FAILED"
        assert (field(cluster, job, "ExitCode"), field(cluster, job, "Restarts")) == ("2:0", "0")
        assert "--lr is -1.0: expected a number above 0" in (tmp_path / "log.txt").read_text()

    @pytest.mark.parametrize("signalled", [False, True])
    def test_a_job_whose_disk_fills_fails_with_one_line_and_is_not_requeued(
        self, cluster, trained, submit, tmp_path, signalled
    ):
        size, log = (trained / "sc_800ep_train" / "checkpoint.pt").stat().st_size, tmp_path / "log.txt"
        # Without a signal, the second checkpoint does not fit. With one, not even the first does.
        with small_disk(tmp_path / "disk", size // 2 if signalled else 3 * size // 2) as disk:
            job = submit(2, "scripts/train.sh", *DIGITS.split(), "--output-dir", str(disk / "run"))
            if signalled:
                wait_until(lambda: log.exists() and "parameters; writing to" in log.read_text(), lambda: "no log")
                cluster.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1 does ahead of the limit
            assert wait_for_end(cluster, job, tmp_path) == "FAILED", log.read_text()
            said = log.read_text()
            assert (field(cluster, job, "ExitCode"), field(cluster, job, "Restarts")) == ("1:0", "0"), said
            assert "Traceback" not in said
            errors = [line for line in said.splitlines() if "train.py: error" in line]
            assert len(errors) == 1, said
            assert "checkpoint.pt cannot be written (No space left on device)" in errors[0]
            assert ("no checkpoint has been saved yet" if signalled else "(epoch 1, step 0), is kept") in errors[0]
            subprocess.run(["mount", "-o", f"remount,size={40 * size}", disk], check=True)
            job = submit(2, "scripts/train.sh", *DIGITS.split(), "--output-dir", str(disk / "run"))
            assert wait_for_end(cluster, job, tmp_path) == "COMPLETED", log.read_text()
            assert_ended_with_the_weights_of(trained, disk / "run")

    def test_the_setup_runs_on_both_nodes_ahead_of_the_training(self, cluster, tmp_path):
        paths = {"DATASET_PATH": "digits", "EXPERIMENT_PATH": str(tmp_path)}
        sbatch = ("sbatch", "--parsable", f"--output={tmp_path}/log.txt", *fit(2), "scripts/train.sh", "--dry-run")
        setup = f'touch "{tmp_path}/$SLURMD_NODENAME"; echo it is set up'
        job = cluster.run(*sbatch, **paths, NODE_SETUP=setup).stdout.strip()
        assert wait_for_end(cluster, job, tmp_path) == "COMPLETED", (tmp_path / "log.txt").read_text()
        log = (tmp_path / "log.txt").read_text()
        assert log.count("it is set up") == 2
        assert log.count('"epochs": 800') == 2
        assert log.rindex("it is set up") < log.index('"epochs": 800')
        assert len(list(tmp_path.glob("0x7f*"))) == 2
        job = cluster.run(*sbatch, **paths, NODE_SETUP="exit $SLURM_NODEID").stdout.strip()
        assert wait_for_end(cluster, job, tmp_path) == "FAILED"
        assert "sc_800ep_train: NODE_SETUP failed on a node" in (tmp_path / "log.txt").read_text()

    def test_every_task_of_an_array_has_its_seed(self, cluster, submit, tmp_path):
        paths = {"DATASET_PATH": "somewhere", "EXPERIMENT_PATH": str(tmp_path)}
        output = f"--output={tmp_path}/%a.txt"
        sbatch = ("sbatch", "--parsable", "--array=1-2", output, *fit(1))
        job = cluster.run(*sbatch, "scripts/ablation/mlp/train_100ep_dim_256.sh", "--dry-run", **paths).stdout.strip()
        for seed in (1, 2):
            assert wait_for_end(cluster, f"{job}_{seed}", tmp_path) == "COMPLETED"
            printed = (tmp_path / f"{seed}.txt").read_text()
            assert f'"seed": {seed},' in printed
            assert f'"output_dir": "{tmp_path}/sc_100ep_train_dim_256/seed_{seed}"' in printed
