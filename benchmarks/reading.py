"""Measure what the checks of a checkpoint cost, as shares of the time to load it.

    python benchmarks/reading.py

The file holds a ResNet-50 with the head of Self-Classifier's digits recipe and has 100 MB. The checks are: the walk over the
pickle with the comparison of sizes (`inspection.py`), the types of the entries (`schema.py`), and the comparison of the
configuration with the file before the network is built (`loading.is_modest`). The checksums, which torch does not verify
and which this project has always verified, are a row of their own: they find damage, not hostile contents. The time is that of
the process, because the checks are short and other programs would disturb them. There is one thread: the others would wait
actively, and their time would count.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.common import in_words, machine, parse, parser, peak_memory, seconds_in_turns, spread, write
from src import checkpoint, inspection, schema
from src.config import as_plain, parse_train
from src.loading import is_modest, load_method
from src.methods import build_method


def save(path: Path, arch: str) -> None:
    """Write a checkpoint with random weights."""
    words = ["--data", "photographs", "--arch", arch, "--classes", "1000", "--hidden-dim", "512", "--queue-length", "0"]
    options, name, knobs = parse_train([*words, "--batch-size", "256", "--base-lr", "0.2"])
    settings = {"method": name, "channels": 3, **as_plain(options), **as_plain(knobs)}
    method = build_method(name, knobs, settings)
    checkpoint.save(path, {"config": settings, "history": [], "epoch": 0, "done": 0, "model": method.state_dict()})


def main() -> None:
    arguments = parse(parser(__doc__))
    torch.set_num_threads(1)
    where = machine("torch") | {"threads": 1}
    print(in_words(where), flush=True)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        save(path, "resnet18" if arguments.quick else "resnet50")
        size = path.stat().st_size
        content = torch.load(path, weights_only=True)
        network, _ = load_method(path)
        settings = content["config"]

        def inspect() -> None:
            with open(path, "rb") as file:
                inspection.checked_checkpoint(file, verify=False)

        def verify() -> None:
            with open(path, "rb") as file, inspection.open_zip(file) as archive:
                archive.testzip()

        sides = {
            "sizes and names in the file": inspect,
            "types of the entries": lambda: schema.check(dict(content)),
            "sizes in the configuration": lambda: is_modest(settings, network.config),
            "checksums": verify,
            "torch.load alone": lambda: torch.load(path, weights_only=True),
            "read a file (checkpoint.load)": lambda: checkpoint.load(path),
            "load a network (load_method)": lambda: load_method(path),
        }
        seconds = seconds_in_turns(sides, 3 if arguments.quick else 15, clock=time.process_time)
        peak = peak_memory(lambda: load_method(path))
    reading, building = (median(seconds[name]) for name in list(sides)[-2:])
    checks = [median(seconds[name]) for name in list(sides)[:3]]
    ratios = {
        "checks / load_method": sum(checks) / building,
        "checks / checkpoint.load": sum(checks[:2]) / reading,
        "checksums / checkpoint.load": median(seconds["checksums"]) / reading,
    }
    print(
        f"a file of {size:,} bytes; milliseconds of this process: median (range) of {len(seconds['checksums'])} turns"
    )
    for name, values in seconds.items():
        print(f"{name:32}{spread([1000 * value for value in values], 1)}")
    for name, ratio in ratios.items():
        print(f"{name:42}{100 * ratio:.1f} %")
    print(f"load_method: at most {peak:,} bytes more memory, {peak / size:.2f} times the file")
    write(arguments.json, where, [{"bytes": size, "seconds": seconds, "ratios": ratios, "peak_memory": peak}])


if __name__ == "__main__":
    main()
