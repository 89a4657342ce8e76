"""Presets against the published scripts, and docs/recipes.md against the programs."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from src.config import (
    ClsEvalOptions,
    KnnEvalOptions,
    LinclsEvalOptions,
    TrainOptions,
    as_plain,
    flag,
    parse_train,
    read_method,
)
from src.config.flags import expand_presets
from src.errors import InputError

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "recipes.md"


def resolved(*words: str) -> dict:
    """Every setting of a run, the data aside."""
    options, _, knobs = parse_train(["--data", "somewhere", *words])
    return {**as_plain(options), **as_plain(knobs)}


# ---- the published rows, as the fact sheet gives them ---------------------------------------------------------------
# Batches are per node × nodes. What a row does not name stays as in its first line's base.

NODES_OF_SIX = {"batch_size": 372 * 11, "sync_bn_group": 22}
TRAIN_100EP = {
    **NODES_OF_SIX,
    "arch": "resnet50",
    "epochs": 100,
    "lr": 4.8,
    "warmup_start": 0.3,
    "final_lr": 0.0048,
    "warmup_epochs": 10,
    "optimizer": "lars",
    "momentum": 0.9,
    "weight_decay": 1e-6,
    "clip_grad": 0.0,
    "seed": 0,
    "head_bn": True,
    "precision": "float32",
    "classes": [1000, 2000, 4000, 8000],
    "fixed_classifiers": False,
    "queue_length": 262144,
    "use_neighbors": True,
    "dim": 128,
    "hidden_dim": 4096,
    "head_layers": 2,
    "row_tau": 0.1,
    "col_tau": 0.05,
    "eps": 1e-12,
    "activation": "leaky_relu",
    "augment": "dino",
    "global_crops_number": 2,
    "global_crops_size": 224,
    "global_crops_scale": [0.4, 1.0],
    "local_crops_number": 6,
    "local_crops_size": 96,
    "local_crops_scale": [0.05, 0.4],
    "log_every": 16,
    "save_every": 25,
}
LR_OF_800 = {"lr": 3.2, "warmup_start": 0.2, "final_lr": 0.0032}
ABLATION = {**TRAIN_100EP, "precision": "float16", "head_bn": False}
NO_MULTICROP = {"local_crops_number": 0, "global_crops_scale": [0.14, 1.0]}

SECOND = {
    "published": {**TRAIN_100EP, "epochs": 800, **LR_OF_800, "sync_bn_group": 0},
    "100ep": TRAIN_100EP,
    "200ep": {**TRAIN_100EP, "epochs": 200},
    "400ep": {**TRAIN_100EP, "epochs": 400},
    "800ep": {**TRAIN_100EP, "epochs": 800, **LR_OF_800},
    "100ep_ablation": ABLATION,
    # augmentations
    "100ep_no_multicrop": {**ABLATION, **NO_MULTICROP},
    "100ep_no_nn": {**ABLATION, "use_neighbors": False},
    "100ep_no_nn_no_multicrop": {**ABLATION, **NO_MULTICROP, "use_neighbors": False},
    # classifiers_and_classes
    "100ep_1x1k": {**ABLATION, "classes": [1000]},
    "100ep_1x2k": {**ABLATION, "classes": [2000]},
    "100ep_1x4k": {**ABLATION, "classes": [4000]},
    "100ep_1x8k": {**ABLATION, "classes": [8000]},
    "100ep_5x1k": {**ABLATION, "classes": [1000] * 5},
    "100ep_10x1k": {**ABLATION, "classes": [1000] * 10},
    "100ep_15x1k": {**ABLATION, "classes": [1000] * 15},
    "100ep_fixed_cls": {**ABLATION, "fixed_classifiers": True},
    # learning_rate
    "100ep_base_lr_0.1": {**ABLATION, "lr": 1.6, "warmup_start": 0.1, "final_lr": 0.0016},
    "100ep_base_lr_0.2": {**ABLATION, "lr": 3.2, "warmup_start": 0.2, "final_lr": 0.0032},
    "100ep_base_lr_0.4": {**ABLATION, "lr": 6.4, "warmup_start": 0.4, "final_lr": 0.0064},
    # mlp
    "100ep_dim_256": {**ABLATION, "dim": 256},
    "100ep_hidden_dim_8192": {**ABLATION, "hidden_dim": 8192},
    "100ep_hidden_dim_8192_dim_256": {**ABLATION, "hidden_dim": 8192, "dim": 256},
    "100ep_num_hidden_3": {**ABLATION, "head_layers": 3},
    "100ep_num_hidden_3_dim_256": {**ABLATION, "head_layers": 3, "dim": 256},
    "100ep_no_mlp": {**ABLATION, "head_layers": 0, "dim": 2048, "queue_length": 131072},
    # queue_len
    "100ep_q_len_128K": {**ABLATION, "queue_length": 128 * 1024, **LR_OF_800},
    "100ep_q_len_512K": {**ABLATION, "queue_length": 512 * 1024},
    "100ep_q_len_1M": {**ABLATION, "queue_length": 1024 * 1024},
    # softmax_temp
    "100ep_col_tau_3e-2_row_tau_1e-1": {**ABLATION, "col_tau": 0.03, "row_tau": 0.1},
    "100ep_col_tau_3e-2_row_tau_7e-2": {**ABLATION, "col_tau": 0.03, "row_tau": 0.07},
    "100ep_col_tau_5e-2_row_tau_7e-2": {**ABLATION, "col_tau": 0.05, "row_tau": 0.07},
    # weight_decay
    "100ep_wd_5e-6": {**ABLATION, "weight_decay": 5e-6},
    "100ep_wd_1e-5": {**ABLATION, "weight_decay": 1e-5},
    "100ep_wd_5e-5": {**ABLATION, "weight_decay": 5e-5},
}
# batch_size: nodes of four GPUs with 32 images each; float32 and batch normalisation in the head as in the main runs
for name, nodes, group, lr, start, warmup, queue in (
    ("100ep_bs_256", 2, 0, 0.3, 0.3, 0, 16384),
    ("100ep_bs_512", 4, 0, 0.6, 0.3, 0, 262144),
    ("100ep_bs_1024", 8, 16, 1.2, 0.3, 10, 262144),
    ("100ep_bs_2048", 16, 32, 2.4, 0.3, 10, 262144),
):
    rates = {"lr": lr, "warmup_start": start, "warmup_epochs": warmup, "final_lr": round(lr / 1000, 6)}
    SECOND[name] = {**TRAIN_100EP, "batch_size": 128 * nodes, "sync_bn_group": group, "queue_length": queue, **rates}

TRAIN_V1 = {
    "arch": "resnet50",
    "batch_size": 1024 * 4,
    "sync_bn_group": 4,
    "softmax_group": 256,
    "epochs": 800,
    "lr": 3.2,
    "warmup_start": 0.2,
    "final_lr": 0.0032,
    "warmup_epochs": 10,
    "optimizer": "lars",
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "num_classes": 1000,
    "num_classifiers": 30,
    "learnable": False,
    "precision": "float16",
    "dim": 128,
    "hidden_dim": 4096,
    "head_layers": 3,
    "tau": 0.1,
    "normalize_targets": False,
    "global_crops_number": 2,
    "local_crops_number": 0,
    "global_crops_size": 224,
    "global_crops_scale": [0.2, 1.0],
    "augment": "moco_v2",
    "log_every": 16,
    "save_every": 50,
}
V1_100EP = {**TRAIN_V1, "epochs": 100, "lr": 4.8, "warmup_start": 0.3, "final_lr": 0.0048}
CIFAR = {
    **TRAIN_V1,
    "arch": "cifar_resnet18",
    "batch_size": 256,
    "sync_bn_group": 0,
    "softmax_group": 0,
    "epochs": 800,
    "lr": 3.2,
    "final_lr": 0.032,
    "warmup_epochs": 0,
    "optimizer": "sgd",
    "weight_decay": 1e-6,
    "num_classes": 30,
    "num_classifiers": 30,
    "dim": 64,
    "hidden_dim": 256,
    "head_layers": 3,
    "tau": 0.3,
    "normalize_targets": True,
    "precision": "float32",
    "global_crops_size": 32,
}
FIRST = {
    "published": {**TRAIN_V1, "sync_bn_group": 0},
    "800ep": TRAIN_V1,
    "100ep": V1_100EP,
    **{
        f"100ep_{k}x{c}": {**V1_100EP, "num_classifiers": k, "num_classes": c}
        for k, c in ((1, 300), (1, 1000), (1, 3000), (30, 300), (30, 3000), (50, 1000), (100, 128))
    },
    "100ep_learnable_cls": {**V1_100EP, "learnable": True},
    **{
        f"100ep_lr_{base}": {**V1_100EP, "lr": lr, "warmup_start": base, "final_lr": final}
        for base, lr, final in (
            (0.05, 0.8, 0.0008),
            (0.1, 1.6, 0.0016),
            (0.2, 3.2, 0.0032),
            (0.4, 6.4, 0.0064),
            (0.5, 8.0, 0.008),
        )
    },
    **{
        f"100ep_dim_{dim}_num_hidden_{hidden}x4096": {**V1_100EP, "dim": dim, "head_layers": hidden + 1}
        for dim, hidden in ((128, 1), (128, 3), (256, 1), (256, 2))
    },
    "100ep_no_mlp": {**V1_100EP, "dim": 2048, "head_layers": 0},
    **{f"100ep_wd_{wd}": {**V1_100EP, "weight_decay": float(wd)} for wd in ("1e-3", "1e-5", "1e-6", "1e-7")},
    "cifar10": CIFAR,
    "cifar100-20": {**CIFAR, "num_classes": 60},
}

# SwAV and what its authors compare it with: GPUs × images on each; 2x224+6x96 means two views of 224 pixels, six of 96
TRAIN_SWAV = {
    "arch": "resnet50",
    "batch_size": 8 * 8 * 64,
    "sync_bn_group": 8,
    "epochs": 800,
    "lr": 4.8,
    "warmup_start": 0.3,
    "final_lr": 0.0048,
    "warmup_epochs": 10,
    "optimizer": "lars",
    "momentum": 0.9,
    "weight_decay": 1e-6,
    "bias_decay": True,
    "clip_grad": 0.0,
    "precision": "float16",
    "prototypes": 3000,
    "temperature": 0.1,
    "epsilon": 0.05,
    "sinkhorn_iterations": 3,
    "assign_views": [0, 1],
    "dim": 128,
    "hidden_dim": 2048,
    "head_bn": True,
    "queue_length": 0,
    "freeze_prototypes": 313,
    "augment": "swav",
    "global_crops_number": 2,
    "global_crops_size": 224,
    "global_crops_scale": [0.14, 1.0],
    "local_crops_number": 6,
    "local_crops_size": 96,
    "local_crops_scale": [0.05, 0.14],
    "save_every": 25,
}
TWO_VIEWS = {"global_crops_size": 224, "global_crops_scale": [0.08, 1.0], "local_crops_number": 0}
FOUR_SMALL = {"global_crops_size": 160, "global_crops_scale": [0.08, 1.0], "local_crops_number": 4}
SWAV_BS256 = {
    "batch_size": 4 * 64,
    "sync_bn_group": 0,
    "lr": 0.6,
    "warmup_epochs": 0,
    "warmup_start": 0.0,
    "final_lr": 0.0006,
    "queue_length": 3840,
    "queue_start": 15,
    "freeze_prototypes": 5005,
}
SWAV = {
    "published": {**TRAIN_SWAV, "sync_bn_group": 0},
    **{f"{epochs}ep": {**TRAIN_SWAV, "epochs": epochs} for epochs in (100, 200, 400, 800)},
    "400ep_2x224": {**TRAIN_SWAV, "epochs": 400, **TWO_VIEWS},
    "200ep_bs256": {**TRAIN_SWAV, "epochs": 200, **SWAV_BS256},
    "400ep_bs256": {**TRAIN_SWAV, "epochs": 400, **SWAV_BS256},
    "RN50w2_400ep": {
        **TRAIN_SWAV,
        "epochs": 400,
        "arch": "resnet50w2",
        "hidden_dim": 8192,
        "batch_size": 16 * 8 * 32,
        "local_crops_number": 4,
    },
    "RN50w4_400ep": {
        **TRAIN_SWAV,
        "epochs": 400,
        "arch": "resnet50w4",
        "hidden_dim": 8192,
        "batch_size": 8 * 8 * 40,
        "local_crops_number": 4,
        "global_crops_scale": [0.08, 1.0],
        "local_crops_scale": [0.08, 0.14],
        "queue_length": 2560,
        "queue_start": 0,
    },
    "RN50w5_400ep": {
        **TRAIN_SWAV,
        "epochs": 400,
        "arch": "resnet50w5",
        "hidden_dim": 10240,
        "head_bn": False,
        "batch_size": 16 * 8 * 12,
        "warmup_start": 0.1875,
        "final_lr": 0.0,
        "local_crops_number": 4,
        "queue_length": 1536,
        "queue_start": 0,
    },
}
# neither queue nor codes; DeepCluster-v2's prototypes are never trained, its trainer has no mixed precision
OF_SWAV_ALONE = ("epsilon", "sinkhorn_iterations", "queue_length", "freeze_prototypes")
TRAIN_DC = {
    **{name: value for name, value in TRAIN_SWAV.items() if name not in OF_SWAV_ALONE},
    "precision": "float32",
    "prototypes": [3000, 3000, 3000],
    "kmeans_iterations": 10,
}
DEEPCLUSTER_V2 = {
    "published": {**TRAIN_DC, "sync_bn_group": 0},
    "800ep": TRAIN_DC,
    "400ep": {**TRAIN_DC, "epochs": 400, **FOUR_SMALL},
    "400ep_2x224": {**TRAIN_DC, "epochs": 400, **TWO_VIEWS},
}
# no script was published: SwAV's settings, the views of the released models; the solver's are our choice, after SeLa
TRAIN_SELA_V2 = {name: value for name, value in TRAIN_DC.items() if name != "kmeans_iterations"} | {
    "epochs": 400,
    "lam": 25.0,
    "tolerance": 0.1,
    "freeze_prototypes": 313,
}
SELA_V2 = {
    "published": {**TRAIN_SELA_V2, **FOUR_SMALL, "sync_bn_group": 0},
    "400ep": {**TRAIN_SELA_V2, **FOUR_SMALL},
    "400ep_2x224": {**TRAIN_SELA_V2, **TWO_VIEWS},
}
# SeLa's scripts and the defaults of its programs. --epochs 400 runs 401 epochs there.
TRAIN_SELA = {
    "arch": "sela_resnet50",
    "epochs": 401,
    "batch_size": 256,
    "optimizer": "sgd",
    "momentum": 0.9,
    "lr": 0.08,
    "lr_drops": [150, 300, 350],
    "warmup_epochs": 0,
    "warmup_start": 0.0,
    "weight_decay": 1e-5,
    "bias_decay": True,
    "augment": "sela_3",
    "global_crops_number": 1,
    "global_crops_size": 224,
    "global_crops_scale": [0.08, 1.0],
    "local_crops_number": 0,
    "classes": [3000] * 10,
    "lam": 25.0,
    "tolerance": 0.1,
    "max_iterations": 0,
    "updates": 100,
    "update_spacing": "quadratic",
    "update_heads": "all",
    "rotation": "none",
}
TRAIN_SELA_CIFAR = {
    **TRAIN_SELA,
    "arch": "sela_alexnet",
    "epochs": 400,
    "batch_size": 128,
    "lr": 0.03,
    "lr_drops": [240, 320],
    "weight_decay": 5e-4,
    "global_crops_scale": [0.2, 1.0],
    "classes": [128] * 10,
    "lam": 10.0,
    "tolerance": 0.01,
    "updates": 400,
    "update_spacing": "linear",
    "update_heads": "in_turn",
}
SELA = {
    "published": TRAIN_SELA,
    "resnet": TRAIN_SELA,
    "alexnet": {**TRAIN_SELA, "arch": "sela_alexnet"},
    "retrain": {
        **TRAIN_SELA,
        "arch": "sela_alexnet",
        "updates": 0,
        "rotation": "add",
        "epochs": 91,
        "batch_size": 64,
        "lr": 0.05,
        "lr_drops": [30, 60, 80],
    },
    "cifar": TRAIN_SELA_CIFAR,
}
# SCAN's three steps, from the authors' configurations
SIMCLR_CIFAR = {
    "arch": "cifar_resnet18",
    "global_crops_number": 2,
    "global_crops_size": 32,
    "global_crops_scale": [0.2, 1.0],
    "local_crops_number": 0,
    "augment": "simclr",
    "anchors": "one",
    "temperature": 0.1,
    "dim": 128,
    "hidden_dim": 512,
    "head_layers": 2,
    "head_bn": False,
    "epochs": 500,
    "batch_size": 512,
    "optimizer": "sgd",
    "momentum": 0.9,
    "lr": 0.4,
    "final_lr": 0.0004,  # lr * rate^3
    "warmup_epochs": 0,
    "warmup_start": 0.0,
    "weight_decay": 1e-4,
}
SIMCLR = {
    "published": SIMCLR_CIFAR,
    "cifar10": SIMCLR_CIFAR,
    "cifar100-20": SIMCLR_CIFAR,
    "stl10": {**SIMCLR_CIFAR, "arch": "stl_resnet18", "global_crops_size": 96},
}
CONSTANT = {"warmup_epochs": 0, "warmup_start": 0.0}
ADAM = {"optimizer": "adam", "lr": 1e-4, "final_lr": 1e-4, "weight_decay": 1e-4, **CONSTANT}
SCAN_CIFAR = {
    "arch": "cifar_resnet18",
    "global_crops_number": 1,
    "global_crops_size": 32,
    "local_crops_number": 0,
    "augment": "scan_strong",
    "num_classifiers": 1,
    "num_classes": 10,
    "neighbors": 20,
    "entropy_weight": 5.0,
    "epochs": 50,
    "batch_size": 128,
    **ADAM,
}
SCAN_IMAGENET = {
    **SCAN_CIFAR,
    "arch": "resnet50",
    "global_crops_size": 224,
    "global_crops_scale": [0.2, 1.0],
    "augment": "simclr",
    "freeze": ["backbone"],
    "num_classifiers": 10,
    "neighbors": 50,
    "mine_from": "backbone",
    "epochs": 100,
    "optimizer": "sgd",
    "momentum": 0.9,
    "lr": 5.0,
    "final_lr": 5.0,
    "weight_decay": 0.0,
}
SCAN = {
    "published": SCAN_CIFAR,
    "cifar10": SCAN_CIFAR,
    "cifar100-20": {**SCAN_CIFAR, "num_classes": 20, "epochs": 100, "batch_size": 512},
    "stl10": {**SCAN_CIFAR, "arch": "stl_resnet18", "global_crops_size": 96, "epochs": 100},
    **{
        f"imagenet-{classes}": {
            **SCAN_IMAGENET,
            "num_classes": classes,
            "batch_size": size,
            "subset": f"imagenet-{classes}",
        }
        for classes, size in ((50, 512), (100, 1024), (200, 1024))
    },
    "imagenet": {**SCAN_IMAGENET, "num_classes": 1000, "batch_size": 4096},
}
SELFLABEL_CIFAR = {
    "arch": "cifar_resnet18",
    "global_crops_number": 2,
    "global_crops_size": 32,
    "local_crops_number": 0,
    "augment": "scan_self_label",
    "num_classes": 10,
    "threshold": 0.99,
    "balance": True,
    "ema": "off",
    "epochs": 200,
    "batch_size": 1000,
    **ADAM,
}
SELFLABEL_IMAGENET = {
    **SELFLABEL_CIFAR,
    "arch": "resnet50",
    "global_crops_size": 224,
    "balance": False,
    "ema": "published",
    "ema_alpha": 0.999,
    "epochs": 25,
    "batch_size": 512,
    "optimizer": "sgd",
    "momentum": 0.9,
    "lr": 0.03,
    "final_lr": 0.03,
    "weight_decay": 0.0,
}
SELFLABEL = {
    "published": SELFLABEL_CIFAR,
    "cifar10": SELFLABEL_CIFAR,
    "cifar100-20": {**SELFLABEL_CIFAR, "num_classes": 20},
    "stl10": {**SELFLABEL_CIFAR, "arch": "stl_resnet18", "global_crops_size": 96, "epochs": 100},
    **{
        f"imagenet-{classes}": {**SELFLABEL_IMAGENET, "num_classes": classes, "subset": f"imagenet-{classes}"}
        for classes in (50, 100, 200)
    },
}
# what no program of others says
OWN = {"digits", "small_images", "photographs", "cifar10", "cifar100-20", "stl10"}
OURS = {name: OWN | {"cifar10_200ep"} for name in ("swav", "deepcluster_v2", "sela_v2")} | {"self_classifier": OWN}
OURS |= {"self_classifier_v1": OWN - {"cifar10", "cifar100-20"}, "self_classifier_simclr": OWN | {"published"}}
OURS["sela"] = OWN
OURS |= {method: OWN - {"cifar10", "cifar100-20", "stl10"} for method in ("simclr", "scan", "selflabel")}
ROWS = [
    ("self_classifier", SECOND),
    ("self_classifier_v1", FIRST),
    ("swav", SWAV),
    ("deepcluster_v2", DEEPCLUSTER_V2),
    ("sela_v2", SELA_V2),
    ("sela", SELA),
    ("simclr", SIMCLR),
    ("scan", SCAN),
    ("selflabel", SELFLABEL),
]


@pytest.mark.parametrize(
    ("method", "preset", "row"), [(method, preset, row) for method, rows in ROWS for preset, row in rows.items()]
)
def test_preset_is_the_published_row(method, preset, row):
    ours = resolved("--method", method, "--preset", preset)
    assert {name: ours[name] for name in row} == row
    # what the row does not speak of is as it is everywhere
    defaults = {**as_plain(TrainOptions(data="somewhere")), **as_plain(read_method(method).config())}
    unspoken = {name for name in ours if name not in row} - {"arch"}
    assert {name: ours[name] for name in unspoken} == {name: defaults[name] for name in unspoken}


@pytest.mark.parametrize(("method", "rows"), ROWS)
def test_every_preset_has_a_row(method, rows):
    assert set(read_method(method).presets) == {*rows, *OURS[method]}


def test_presets_may_build_on_earlier_ones():
    presets = {"a": {"lr": 1.0, "dim": 2}, "b": {"base": "a", "lr": 3.0}, "c": {"base": "b", "epochs": 4}}
    assert expand_presets(presets) == {
        "a": {"lr": 1.0, "dim": 2},
        "b": {"lr": 3.0, "dim": 2},
        "c": {"lr": 3.0, "dim": 2, "epochs": 4},
    }
    with pytest.raises(KeyError):
        expand_presets({"b": {"base": "a"}, "a": {}})


def test_a_preset_is_taken_by_its_name_by_its_data_and_below_flags():
    words = ["--method", "self_classifier_v1", "--data-root", "somewhere"]
    for data, size in (("cifar10", 30), ("cifar100-20", 60)):
        options, _, knobs = parse_train([*words, "--data", data])
        assert (options.arch, knobs.num_classes) == ("cifar_resnet18", size)
    assert resolved("--preset", "100ep_dim_256", "--dim", "64")["dim"] == 64
    with pytest.raises(
        InputError, match="--preset 100ep_dim_512: self_classifier has no such preset: did you mean 100ep_dim_256"
    ):
        parse_train(["--preset", "100ep_dim_512"])


# ---- docs/recipes.md ------------------------------------------------------------------------------------------------
# The options of the original programs, from the fact sheet.

SHARED_2 = "data -a --arch -j --workers -p --print-freq --seed --save-path --pretrained "
HEAD = "--cls-size --num-cls --dim --hidden-dim --num-hidden "
RANKS = "--world-size --rank --dist-url --dist-backend --gpu --multiprocessing-distributed "
RATES = "--epochs --start-epoch -b --batch-size --lr --learning-rate --cos --sgd --lars --momentum --wd --weight-decay --resume "
TRAIN_2 = (
    SHARED_2
    + HEAD
    + RANKS
    + RATES
    + "--warmup-epochs --start-warmup --final-lr --rm-pretrained-cls --queue-len --row-tau "
    "--col-tau --use-amp --syncbn_process_group_size --use-lsf-env --use-bn --fixed-cls --global-crops-scale "
    "--local-crops-number --local-crops-scale --patch-size --clip-grad --no-nn-aug --no-bias-wd --bbone-wd --eps "
    "--subset-file --no-leaky"
)
VIEWS = "--nmb_crops --size_crops --min_scale_crops --max_scale_crops --crops_for_assign "
SWAV_RANKS = "--dist_url --world_size --rank --local_rank "
TRAIN_SWAV_OPTIONS = (
    "--data_path --temperature --feat_dim --nmb_prototypes --epochs --batch_size --base_lr --final_lr --freeze_prototypes_niters "
    "--wd --warmup_epochs --start_warmup --arch --hidden_mlp --workers --checkpoint_freq --sync_bn --syncbn_process_group_size "
    "--dump_path --seed " + SWAV_RANKS
)
ORIGINAL = {
    "train (second generation)": TRAIN_2,
    "train (first generation)": HEAD.replace("--hidden-dim", "").replace("--dim", "")
    + "--tau --use-aug --subset-size --no-mlp --learnable-cls -e --evaluate --use-amp --sgd --lars",
    "train_cifar (first generation)": HEAD
    + "--data --data_path -j --workers --epochs --start-epoch -b --batch-size --lr "
    "--final-lr --momentum --wd --cos --sgd --lars --no-mlp -p --print-freq --resume --seed --pretrained --save-path --tau",
    "cls_eval (both generations)": SHARED_2 + HEAD + "-b --batch-size --tau --use-bn --no-leaky --num-classes "
    "--num-samples-per-class --cls-num --subset-file --model --kmeans-cls --superclass --imagenet-info-path --no-mlp",
    "kmeans_eval (second generation)": SHARED_2 + "-b --train-batch-size --label-subset --num-classes --load-features "
    "--kk --model --backbone-dim",
    "lincls_eval and eval (both generations)": SHARED_2 + RANKS + RATES + "--val-batch-size --nesterov -e --evaluate "
    "--no-freeze",
    "knn_eval (both generations)": SHARED_2
    + HEAD
    + "-b --train-batch-size --val-batch-size --nb-knn --label-subset --tau "
    "--num-classes --use-bn --no-leaky --use-mlp --load-features --use-half --subset-file --kk --subset-size",
    "tsne_imagenet (first generation)": SHARED_2
    + HEAD
    + "-b --batch-size --num-plots --num-samples --num-classes --tau "
    "--no-mlp",
    "main_swav": VIEWS
    + TRAIN_SWAV_OPTIONS
    + "--epsilon --sinkhorn_iterations --queue_length --epoch_queue_starts --use_fp16 "
    "--use_pil_blur --improve_numerical_stability",
    "main_deepclusterv2": "--nmb_prototypes --freeze_prototypes_niters",
    "eval_linear": SWAV_RANKS
    + "--dump_path --seed --data_path --workers --arch --pretrained --global_pooling --use_bn --epochs "
    "--batch_size --lr --wd --nesterov --scheduler_type --decay_epochs --gamma --final_lr",
    "eval_semisup": SWAV_RANKS + "--labels_perc --dump_path --seed --data_path --workers --arch --pretrained --epochs "
    "--batch_size --lr --lr_last_layer --decay_epochs --gamma",
    "main (SeLa)": "--epochs --batch-size --lr --lrdrop --wd --dtype --nopts --augs --paugs --lamb --cpu --arch --archspec --ncl "
    "--hc --device --modeldevice --exp --workers --imagenet-path --comment --log-intv --log-iter",
    "cifar (SeLa)": "--device --resume -r --test-only --restart --arch --ncl --hc --lamb --nopts --lr --momentum --epochs "
    "--batch-size --datadir --exp --type",
    "retrain_with_rotnet (SeLa)": "--epochs --batch-size --lr --lrdrop --arch --archspec --ncl --hc --init --val-only --onlyrot "
    "--data --device --exp --workers --imagenet-path --comment --log-interval --logiter",
    "eval_linear_probes (SeLa)": "--arch --data --ckpt-dir --device --modelpath --results --workers --epochs --batch-size "
    "--learning-rate --tencrops --evaluate --datadir --name",
    "eval_resnet (SeLa)": "--device --arch --ncl --hc --workers --epochs --batch-size --learning-rate --ckpt-dir --datadir "
    "--modelpath --name --evaluate",
    "the detection programs": "--config-file --resume --eval-only --num-gpus --num-machines --machine-rank --dist-url",
}


def sections() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Program → (the command that replaces it, its rows (theirs, here))."""
    found = {}
    for part in re.split(r"^## Options of ", DOCUMENT.read_text(), flags=re.MULTILINE)[1:]:
        title, _, text = part.partition("\n")
        program, _, ours = title.partition(" → ")
        rows = re.findall(r"^\| (`.+?) \| (.+?) \|$", text, flags=re.MULTILINE)
        found[program] = (ours.strip("`"), rows)
    return found


def flags_of(command: str) -> set[str]:
    """Every flag of a command such as `train.py --method self_classifier_v1`."""
    words = command.split()
    scripts = {"cls_eval.py": ClsEvalOptions, "knn_eval.py": KnnEvalOptions, "lincls_eval.py": LinclsEvalOptions}
    others = set()
    if words[0] in scripts:
        names = fields(scripts[words[0]])
    else:
        method = read_method(words[2] if "--method" in words else "self_classifier")
        names = [*fields(TrainOptions), *fields(method.config)]
        others = {"--method", "--preset", "--base-lr"}
    return {text for field in names for text in (flag(field.name), flag("no_" + field.name))} | others


def test_every_original_program_and_option_is_on_the_left():
    assert set(sections()) == set(ORIGINAL)
    for program, (_, rows) in sections().items():
        listed = [word for theirs, _ in rows for word in re.findall(r"`([^`]+)`", theirs)]
        assert sorted(listed) == sorted(set(ORIGINAL[program].split())), program


def test_every_row_names_a_flag_of_ours_or_says_why_there_is_none():
    for program, (command, rows) in sections().items():
        for theirs, here in rows:
            named = re.findall(r"`(--[\w-]+)", here)
            if not named or here.startswith("not here"):
                assert here.startswith(("not here, because ", "not here yet")), (program, theirs)
            assert command or not named, (program, theirs)
            unknown = set(named) - flags_of(command) if command else set()
            assert not unknown, (program, theirs)


def tables_of_presets() -> dict[str, list[tuple[str, str, str]]]:
    """Method → the rows (preset, script, flags that it is the same as) under its heading."""
    headings = {
        "Self-Classifier, second generation": "self_classifier",
        "First generation": "self_classifier_v1",
        "SwAV": "swav",
        "DeepCluster-v2": "deepcluster_v2",
        "SeLa-v2": "sela_v2",
        "SeLa": "sela",
        "SimCLR": "simclr",
        "SCAN": "scan",
        "Self-labelling": "selflabel",
    }
    presets = DOCUMENT.read_text().partition("\n## Options of")[0]
    parts = [part.partition("\n") for part in presets.split("\n### ")[1:]]
    row = r"^\| `([\w.-]+)` \| `([^`]+)` \| `(--preset [^`]+)` \|$"
    return {headings[title]: re.findall(row, text, flags=re.MULTILINE) for title, _, text in parts}


def test_every_preset_is_what_its_row_says():
    tables = tables_of_presets()
    assert list(tables) == [method for method, _ in ROWS]
    for method, rows in tables.items():
        assert {name for name, _, _ in rows} == set(read_method(method).presets) - {"published", *OURS[method]}
        for name, _, words in rows:
            same = resolved("--method", method, *shlex.split(words))
            assert resolved("--method", method, "--preset", name) == same, (method, name)


def test_every_command_in_the_document_is_understood():
    commands = re.findall(r"^python train\.py (.*?)(?: +#.*)?$", DOCUMENT.read_text(), flags=re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        parse_train(shlex.split(command.replace('"$IMAGENET"', "somewhere")))
