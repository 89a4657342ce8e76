"""Rows: hostile names of files, folders and classes, hostile values of flags, hostile variables of the environment."""

import csv
import os
import random
import shutil
import signal
import subprocess
import time
from functools import cache
from pathlib import Path

from tests.campaign.images import pictures, train
from tests.campaign.runs import command, inputs, intact, run, start
from tests.campaign.trials import ANY_ENDING, CANARY, CONTROL, LIMIT, first, judge, row
from tests.processes import ROOT, environment

NAMES = (
    *(
        b"\x1b[31mred",
        b"\x1b]0;title\x07",
        b"two\nlines",
        b"return\rtrain.py: saved",
        b"tab\there",
        b"back\b\b\b",
        b"\x9b2J",
    ),
    *(
        b"\xff\xfe not UTF-8",
        b"\xed\xa0\x80",
        "\u202egpj.exe".encode(),
        "\u200b".encode(),
        "\U0001f600 \u4e2d\u6587".encode(),
    ),
    *(
        b"-rf",
        b"--help",
        b"$(touch executed)",
        b"`touch executed`",
        b";touch executed;",
        b"%s%n%x",
        b"{0.__class__}",
        b"*",
    ),
    *(
        b"'quoted'",
        b'"double"',
        b"a,b;c|d",
        b"=cmd|'/c calc'!A1",
        b"@SUM(1)",
        b"x" * 250,
        b" ",
        b"\\n",
        b"a\x7fb",
        b"con",
    ),
)


def _shown(name: bytes) -> str:
    return repr(name if len(name) < 40 else name[:10] + b"...")


@cache
def trained() -> Path:
    """Return a checkpoint of a network for pictures."""
    folder = inputs() / "pictures"
    run(train(pictures(), folder))
    return folder / "checkpoint.pt"


def control_in_files(folder: Path) -> str:
    """Return a problem if a file of text that a program wrote holds control characters or cannot be parsed."""
    for path in [*folder.rglob("*.csv"), *folder.rglob("*.json"), *folder.rglob("*.jsonl")]:
        text = path.read_text(encoding="utf-8")
        if found := CONTROL.search(text):
            return f"{path.name} holds the control character {found[0]!r}"
        if path.suffix == ".csv" and len({len(line) for line in csv.reader(text.splitlines(keepends=True))}) > 1:
            return f"{path.name} has lines of different lengths"
    return ""


PLACES = (
    "image",
    "bad image",
    "class",
    "data folder",
    "output folder",
    "checkpoint",
    "missing checkpoint",
    "subset",
    "archive",
)


@row("30 hostile names of images, classes, folders, checkpoints and listed classes", count=270, short=0)
def hostile_name(folder: Path, rng: random.Random, number: int) -> str:
    place, name = PLACES[number % len(PLACES)], NAMES[number // len(PLACES) % len(NAMES)]
    data = Path(shutil.copytree(pictures(), folder / "data"))
    spelled, out = os.fsdecode(name), folder / "out"
    words = train(data, out)
    if place == "image":
        next(data.rglob("*.png")).rename(data / "class 0" / f"{spelled}.png" if len(name) < 200 else data / spelled)
        words = [
            "cls_eval.py",
            "--checkpoint",
            str(trained()),
            "--data",
            str(data),
            "--device",
            "cpu",
            "--output-dir",
            str(out),
        ]
    elif place == "bad image":
        (data / "class 0" / f"{spelled[:200]}.png").write_bytes(b"bad")
    elif place == "class":
        (data / "class 0").rename(data / spelled)
        (data / "train").mkdir()
        for each in [path for path in data.iterdir() if path.name != "train"]:
            each.rename(data / "train" / each.name)
        shutil.copytree(data / "train", data / "val")
        words = [
            "cls_eval.py",
            "--checkpoint",
            str(trained()),
            "--data",
            str(data),
            "--device",
            "cpu",
            "--output-dir",
            str(out),
        ]
    elif place == "data folder":
        data = data.rename(folder / f"d{spelled}"[:240])
        words = train(data, out)
    elif place == "output folder":
        words = train(data, folder / f"o{spelled}"[:240])
    elif place == "checkpoint":
        target = folder / f"c{spelled}"[:240]
        shutil.copyfile(intact(), target)
        words = ["knn_eval.py", "--checkpoint", str(target), "--device", "cpu", "--output-dir", str(out)]
    elif place == "missing checkpoint":
        words = ["cls_eval.py", "--checkpoint", str(folder / spelled), "--device", "cpu"]
    elif place == "subset":
        (folder / "list.txt").write_bytes(name + b"\n")
        words = train(data, out, "--subset-file", str(folder / "list.txt"))
    else:
        words = ["-m", "src.pretrained", "export", spelled or "x", str(folder / "out.pth")]
    done = run(words)
    problem = first(judge(done, allowed=[0, 1, 2], lines=1), control_in_files(out) if out.exists() else "")
    return f"{place} called {_shown(name)}: {problem}" if problem else ""


FLAGS = (
    *("--seed", "--epochs", "--batch-size", "--lr", "--warmup-epochs", "--warmup-start", "--final-lr", "--momentum"),
    *(
        "--weight-decay",
        "--clip-grad",
        "--hidden-dim",
        "--dim",
        "--queue-length",
        "--classes",
        "--row-tau",
        "--col-tau",
    ),
    *("--accumulate", "--save-every", "--eval-every", "--log-every", "--sync-bn-group", "--head-layers", "--eps"),
    *(
        "--global-crops-number",
        "--global-crops-size",
        "--global-crops-scale",
        "--patch-size",
        "--keep-decoded",
        "--freeze",
    ),
    *(
        "--arch",
        "--method",
        "--preset",
        "--data",
        "--device",
        "--precision",
        "--augment",
        "--subset-file",
        "--output-dir",
    ),
)
VALUES = (
    *(
        "99999999999999999999",
        "-99999999999999999999",
        "9223372036854775807",
        "9223372036854775808",
        "-9223372036854775809",
    ),
    *(
        "4294967296",
        "2147483648",
        "1000000000000",
        "9" * 5000,
        "1e400",
        "-1e400",
        "1e-400",
        "nan",
        "-nan",
        "inf",
        "-inf",
    ),
    *(
        "0",
        "-0",
        "-1",
        "",
        " ",
        "1.5",
        "1_000",
        "0x10",
        "\u0663",
        "\u00b2",
        "\x1b[31m",
        "a\nb",
        "x" * 100_000,
        "\udcff",
        "None",
    ),
)


@row("38 flags of train.py with 31 hostile values", count=620, short=0)
def hostile_flag(folder: Path, rng: random.Random, number: int) -> str:
    flag = FLAGS[number % len(FLAGS)]
    value = VALUES[(number // len(FLAGS) * 7 + number) % len(VALUES)]
    words = [*command(folder / "run"), f"{flag}={value}"]
    code = "import resource, sys; sys.path.insert(0, '.'); room = 8 << 30; resource.setrlimit(resource.RLIMIT_AS, (room, room));"
    code += f"sys.argv = {words!r}; import runpy; runpy.run_path('train.py', run_name='__main__')"
    process = start(["-c", code])
    for _ in range(100):  # a run of a billion epochs is what was asked for
        if process.poll() is not None:
            break
        time.sleep(0.05)
    else:
        process.send_signal(signal.SIGTERM)
    problem = judge(process.finish(LIMIT), allowed=ANY_ENDING)
    return f"{flag}={value[:30]!r}: {problem}" if problem else ""


VARIABLES = (
    *("SLURM_NNODES", "SLURM_CPUS_ON_NODE", "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE", "SLURM_ARRAY_TASK_ID"),
    *(
        "SLURM_JOB_ID",
        "SLURM_ARRAY_JOB_ID",
        "SLURM_JOB_NAME",
        "DATASET_PATH",
        "EXPERIMENT_PATH",
        "CONTAINER",
        "PRETRAINED_PATH",
    ),
)
PAYLOADS = (
    *(
        "a[$(touch {0})]",
        "$(touch {0})",
        "`touch {0}`",
        "1;touch {0}",
        "1 && touch {0}",
        "1\ntouch {0}",
        "x[`touch {0}`]+1",
    ),
    *("1+a[$(touch {0})]", "BASH_VERSINFO[$(touch {0})0]", "0x10", "-1", "9" * 40, "08", "", "$", "\x1b[31m"),
)
SCRIPTS = ("train.sh", "lincls_eval.sh", "knn_eval.sh", "cls_eval.sh")


@row("variables of Slurm and paths that hold commands, read by the scripts", count=192, short=1)
def hostile_variable(folder: Path, rng: random.Random, number: int) -> str:
    variable, payload = VARIABLES[number % len(VARIABLES)], PAYLOADS[number // len(VARIABLES) % len(PAYLOADS)]
    stubs = folder / "bin"
    stubs.mkdir()
    for name in ("srun", "scontrol", "scancel"):
        (stubs / name).write_text("#!/bin/sh\nexit 0\n")
        (stubs / name).chmod(0o755)
    clean = {name: value for name, value in environment().items() if not name.startswith("SLURM")}
    given = {"DATASET_PATH": "/data", "EXPERIMENT_PATH": str(folder), variable: payload.format(folder / CANARY)}
    script = rng.choice(SCRIPTS)
    environ = {**clean, "PATH": f"{stubs}:{clean['PATH']}", "REPOSITORY": str(ROOT), **given}
    done = subprocess.run(
        ["bash", f"scripts/{script}"], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=LIMIT
    )
    problem = judge(done, allowed=[0, 1, 2])
    return f"{script} with {variable}={payload!r}: {problem}" if problem else ""
