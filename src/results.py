"""Tables over many runs: `python -m src.results table DIR...` reads the `cls_eval.json` of each folder.

Prints every run and the mean and sample standard deviation, as Markdown.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

SCORES = ("acc", "nmi", "ami", "ari")


def read_results(folders: list[str]) -> list[dict]:
    """The evaluation of each run. Raises ValueError if a folder has none, a damaged one, or one without labels."""
    results = []
    for folder in folders:
        path = Path(folder) / "cls_eval.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; run cls_eval.py on the checkpoint of {folder} first")
        try:
            result = json.loads(path.read_text())
        except ValueError:
            result = None
        if not isinstance(result, dict):
            raise ValueError(f"{path}: not what cls_eval.py writes; run it again")
        if "acc" not in result:
            raise ValueError(f"{path}: has no scores, its data had no labels")
        if missing := [name for name in SCORES if name not in result]:
            raise ValueError(f"{path}: {', '.join(missing)} missing; run cls_eval.py again")
        results.append(result)
    return results


def markdown(folders: list[str], results: list[dict]) -> str:
    """A row per run, then mean ± standard deviation, in percent."""
    lines = ["| run | " + " | ".join(name.upper() for name in SCORES) + " |", "|---" * (len(SCORES) + 1) + "|"]
    for folder, result in zip(folders, results, strict=True):
        lines.append(f"| {folder} | " + " | ".join(f"{100 * result[name]:.1f}" for name in SCORES) + " |")
    if len(results) > 1:
        columns = {name: [100 * result[name] for result in results] for name in SCORES}
        spread = [f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" for values in columns.values()]
        lines.append(f"| mean ± std of {len(results)} | " + " | ".join(spread) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m src.results", description="Tables over many runs.")
    parser.add_argument("what", choices=["table"])
    parser.add_argument("folders", nargs="+", metavar="DIR", help="output folders of cls_eval.py")
    args = parser.parse_args()
    try:
        print(markdown(args.folders, read_results(args.folders)))
    except ValueError as error:
        parser.exit(2, f"results: error: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
