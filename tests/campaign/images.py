"""Rows: image files and folders that are damaged, huge, strange, or removed while a run reads them."""

import contextlib
import io
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from src import checkpoint
from tests.campaign.runs import compare, run, start
from tests.campaign.trials import KILLED, LIMIT, STOPPED, judge, row

PICTURES = 120  # one damaged picture in so many is replaced by another one
NETWORK = "--arch small_convnet --global-crops-size 8 --local-crops-number 0 --classes 3 --dim 4 --hidden-dim 8"
TRAINING = f"{NETWORK} --queue-length 0 --epochs 1 --warmup-epochs 0 --batch-size 60 --device cpu --workers 1"
Write = Callable[[Path, random.Random], object]


def train(data: Path, folder: Path, *words: str) -> list[str]:
    """Return the words of a short training on a folder of images."""
    return ["train.py", "--data", str(data), *TRAINING.split(), "--output-dir", str(folder), *words]


@cache
def pictures() -> Path:
    """Return a folder of small pictures, which its user copies."""
    top = Path(tempfile.mkdtemp(prefix="campaign-pictures-"))
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        folder = top / f"class {i % 3}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")
    return top


def _encoded(mode: str = "RGB", kind: str = "PNG", size: tuple[int, int] = (12, 12), **options: object) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **options)
    return file.getvalue()


def _frames(kind: str) -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (12, 12), (i, 0, 0)) for i in range(20)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def _bomb() -> bytes:
    """Return a PNG of 30,000 x 30,000 pixels in about 110 kB."""
    return _encoded("1", size=(30_000, 30_000))


BAD: dict[str, Write] = {
    "no bytes": lambda path, rng: path.write_bytes(b""),
    "zeros": lambda path, rng: path.write_bytes(bytes(5000)),
    "random bytes": lambda path, rng: path.write_bytes(rng.randbytes(5000)),
    "cut": lambda path, rng: path.write_bytes(_encoded(size=(200, 200))[: rng.randrange(1, 300)]),
    "a cut JPEG": lambda path, rng: path.write_bytes(_encoded(kind="JPEG", size=(200, 200))[: rng.randrange(1, 1500)]),
    "flipped bits": lambda path, rng: path.write_bytes(
        _flipped(_encoded(kind=rng.choice(["PNG", "JPEG", "GIF", "TIFF"])), rng)
    ),
    "1 x 5000": lambda path, rng: path.write_bytes(_encoded(size=(1, 5000))),
    "5000 x 1": lambda path, rng: path.write_bytes(_encoded(size=(5000, 1))),
    "1 x 1": lambda path, rng: path.write_bytes(_encoded(size=(1, 1))),
    "20000 x 20000": lambda path, rng: path.write_bytes(_encoded("L", size=(20_000, 20_000))),
    "30000 x 30000 in two colours": lambda path, rng: path.write_bytes(_bomb()),
    "65500 x 16": lambda path, rng: path.write_bytes(_encoded(kind="JPEG", size=(65_500, 16))),
    "CMYK": lambda path, rng: path.write_bytes(_encoded("CMYK", "JPEG")),
    "16 bits": lambda path, rng: path.write_bytes(_encoded("I;16", "PNG")),
    "32 bits": lambda path, rng: path.write_bytes(_encoded("I", "TIFF")),
    "floating point": lambda path, rng: path.write_bytes(_encoded("F", "TIFF")),
    "palette": lambda path, rng: path.write_bytes(_encoded("P", "PNG")),
    "transparent palette": lambda path, rng: path.write_bytes(_encoded("P", "PNG", transparency=0)),
    "grey with transparency": lambda path, rng: path.write_bytes(_encoded("LA", "PNG")),
    "two colours": lambda path, rng: path.write_bytes(_encoded("1", "PNG")),
    "animated": lambda path, rng: path.write_bytes(_frames(rng.choice(["GIF", "PNG", "WEBP", "TIFF"]))),
    "text": lambda path, rng: path.write_text("not an image\n" * 100),
    "a web page": lambda path, rng: path.write_text("<html><body>404</body></html>"),
    "SVG": lambda path, rng: path.write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'),
    "PostScript": lambda path, rng: path.write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(executed) (w) file\n"
    ),
    "a named pipe": lambda path, rng: os.mkfifo(path),
    "a folder": lambda path, rng: path.mkdir(),
    "a link to itself": lambda path, rng: path.symlink_to(path.name),
    "a link to nothing": lambda path, rng: path.symlink_to("nothing"),
    "a link to zeros": lambda path, rng: path.symlink_to("/dev/zero"),
    "a link to a folder above": lambda path, rng: path.symlink_to(".."),
    "a link to the terminal": lambda path, rng: path.symlink_to("/dev/tty"),
    "a link to random bytes": lambda path, rng: path.symlink_to("/dev/urandom"),
    "unreadable": lambda path, rng: (path.write_bytes(b"x"), path.chmod(0)),
}


def _flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 20)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@row("one bad image among 120, of 34 kinds and with 5 suffixes", count=136, short=1)
def bad_image(folder: Path, rng: random.Random, number: int) -> str:
    data = Path(shutil.copytree(pictures(), folder / "data"))
    kind = [*BAD][number % len(BAD)]
    BAD[kind](data / "class 1" / f"bad{rng.choice(['.jpg', '.png', '.gif', '.tif', '.webp'])}", rng)
    problem = judge(run(train(data, folder / "run")), allowed=[0])
    return f"{kind}: {problem}" if problem else ""


@row("a folder in which every image is bad in the same way", count=68, short=0)
def bad_images(folder: Path, rng: random.Random, number: int) -> str:
    kind = [*BAD][number % len(BAD)]
    if "20000" in kind:
        return ""  # a minute for each of them is not a hang
    data = folder / "data" / "class"
    data.mkdir(parents=True)
    for i in range(60):
        BAD[kind](data / f"{i}.{rng.choice(['jpg', 'png'])}", rng)
    problem = judge(run(train(data.parent, folder / "run")), allowed=[0, 1, 2])
    return f"{kind}: {problem}" if problem else ""


CIRCLES: dict[str, Callable[[Path], object]] = {
    "a link to the folder above": lambda top: (top / "class 0" / "up").symlink_to(".."),
    "a link to itself": lambda top: (top / "loop").symlink_to("loop"),
    "two links to each other": lambda top: ((top / "a").symlink_to("b"), (top / "b").symlink_to("a")),
    "a link to the root's links": lambda top: (top / "proc").symlink_to("/proc/self/fd"),
    "50 links to one another": lambda top: [(top / f"l{i}").symlink_to(f"l{(i + 1) % 50}") for i in range(50)],
    "200 folders in one another": lambda top: _deep(top, 200),
    "an unreadable folder": lambda top: ((top / "closed").mkdir(), (top / "closed").chmod(0)),
    "an empty class": lambda top: (top / "empty").mkdir(),
}


def _deep(top: Path, depth: int) -> None:
    here = top
    for _ in range(depth):
        here = here / "deep"
        here.mkdir()
    shutil.copyfile(next(top.glob("class 0/*.png")), here / "x.png")


@row("folders of images with links in a circle and other traps", count=16, short=0)
def circles(folder: Path, rng: random.Random, number: int) -> str:
    data = Path(shutil.copytree(pictures(), folder / "data"))
    kind = [*CIRCLES][number % len(CIRCLES)]
    CIRCLES[kind](data)
    problem = judge(run(train(data, folder / "run")), allowed=[0, 2])
    return f"{kind}: {problem}" if problem else ""


@row("images that are removed, emptied or replaced while a run reads them", count=40, short=0)
def removed_images(folder: Path, rng: random.Random, number: int) -> str:
    data = Path(shutil.copytree(pictures(), folder / "data"))
    process = start(train(data, folder / "run", "--epochs", "30"))
    time.sleep(rng.uniform(0, 4))
    files = sorted(data.rglob("*.png"))
    kind = ("all removed", "one removed", "all emptied", "folder renamed", "half replaced by text")[number % 5]
    if kind == "folder renamed":
        data.rename(folder / "moved")
    for path in (
        [] if kind == "folder renamed" else files if "all" in kind else files[::2] if "half" in kind else files[:1]
    ):
        if "removed" in kind:
            path.unlink()
        else:
            path.write_text("" if "emptied" in kind else "text")
    problem = judge(process.finish(LIMIT), allowed=[0, 1, 2])
    return f"{kind}: {problem}" if problem else ""


WORKERS = ("--epochs", "3", "--batch-size", "20", "--workers", "2", "--save-every", "1")
STRUCK = {"nothing": 0, "kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}


@cache
def undisturbed() -> tuple[dict, float]:
    """Return the checkpoints of an undisturbed run from files with two workers, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        done = run(train(pictures(), Path(folder), *WORKERS))
        if problem := judge(done, allowed=[0], lines=0):
            raise RuntimeError(f"the undisturbed run failed: {problem}")
        seconds = time.monotonic() - began
        return {path.name: checkpoint.load(path) for path in Path(folder).glob("*.pt")}, seconds


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that live."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(status.parent.name))
    return found


@row(
    "runs from image files whose workers or main process are killed or signalled at a random moment", count=60, short=0
)
def struck_workers(folder: Path, rng: random.Random, number: int) -> str:
    expected, seconds = undisturbed()
    kind, wait = [*STRUCK, "kill -9 of a worker"][number % 5], rng.uniform(0.1, 1.0) * seconds
    words = train(pictures(), folder / "run", *WORKERS)
    process = start(words)
    time.sleep(wait)
    workers = children(process.pid)
    with contextlib.suppress(ProcessLookupError):
        if kind == "kill -9 of a worker":
            if workers:
                os.kill(rng.choice(workers), signal.SIGKILL)
        elif STRUCK[kind] and process.poll() is None:
            process.send_signal(STRUCK[kind])
    problem = judge(process.finish(LIMIT), allowed=[0, 1, 2, KILLED, *STOPPED])
    ended = time.monotonic() + 20  # a worker looks every few seconds whether its run still lives
    while not problem and any(Path(f"/proc/{worker}").exists() for worker in workers):
        time.sleep(0.1)
        if time.monotonic() > ended:
            problem = "a worker is left behind"
    if not problem:
        problem = judge(run(words), allowed=[0], lines=0) or compare(folder / "run", expected)
    return f"{kind} after {wait:.2f} s: {problem}" if problem else ""


@row("a folder of 100,000 images", count=1, short=0)
def many_files(folder: Path, rng: random.Random, number: int) -> str:
    source = next(pictures().rglob("*.png"))
    for i in range(100):
        part = folder / "data" / f"class {i}"
        part.mkdir(parents=True)
        shutil.copyfile(source, part / "0.png")
        for j in range(1, 1000):  # a file has at most 65,000 names
            os.link(part / "0.png", part / f"{j}.png")
    words = train(folder / "data", folder / "run", "--batch-size", "2000")
    done = start(words).finish(15 * LIMIT)
    problem = judge(done, allowed=[0], lines=0)
    return problem or ("" if "100,000 images" in done.stdout else "the log does not count 100,000 images")
