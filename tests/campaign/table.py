"""Keep the results of the campaign, and render them as the table of the documentation."""

import fcntl
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from tests.processes import ROOT

RESULTS = "docs/results/reliability.json"
PAGE = "docs/results/reliability.md"
START, END = "<!-- table: python -m tests.campaign --record -->\n", "<!-- end of the table -->\n"
Results = Mapping[str, Mapping[str, Any]]  # {name of a row: its entry}


def provenance() -> dict[str, str]:
    """Return commit, date, processor and versions of this run."""
    import numpy
    import PIL
    import torch

    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    versions |= {"Pillow": PIL.__version__, "Linux": platform.release().partition("-")[0]}
    return {
        "commit": commit,
        "date": date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores of {cpu[1] if cpu else platform.machine()}",
        "versions": ", ".join(f"{name} {version.partition('+')[0]}" for name, version in versions.items()),
    }


def totals(results: Results) -> tuple[int, int]:
    """Return how many faults were tried and how many were survived."""
    tried, survived = (sum(entry[key] for entry in results.values()) for key in ("tried", "survived"))
    return tried, survived


def render(results: Results) -> str:
    """Return the table in Markdown, with the totals in its last row."""
    lines = ["| what | tried | survived | failures | commit |", "|---|---|---|---|---|"]
    for entry in results.values():
        note = f" (left out: {entry['left out']})" if "left out" in entry else ""
        counts = f"{entry['tried']:,} | {entry['survived']:,} | {entry['tried'] - entry['survived']:,}"
        lines.append(f"| {entry['what']}{note} | {counts} | {entry['commit']} |")
    tried, survived = totals(results)
    lines.append(f"| **all** | **{tried:,}** | **{survived:,}** | **{tried - survived:,}** | |")
    return "\n".join(lines) + "\n"


def where(results: Results) -> str:
    """Return one line per machine and version with which rows were tried."""
    found = {f"{entry['date']}, {entry['hardware']}, {entry['versions']}." for entry in results.values()}
    return "".join(f"{line}\n" for line in sorted(found))


def sentence(results: Results) -> str:
    """Return the totals as README states them."""
    tried, survived = totals(results)
    return f"{tried:,} faults tried, {survived:,} survived"


def load() -> dict[str, dict[str, Any]]:
    """Return the kept results."""
    path = ROOT / RESULTS
    return json.loads(path.read_text()) if path.exists() else {}


def write(found: Results, order: list[str]) -> None:
    """Add rows to the results, replacing earlier results of the same rows, and renew the page and the totals in README.

    Args:
        order: names of all rows in the order of the table.
    """
    with open(ROOT / PAGE, "r+") as page:
        fcntl.flock(page, fcntl.LOCK_EX)  # another process may add other rows
        results = {**load(), **found}
        results = {name: results[name] for name in order if name in results}
        (ROOT / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
        text = page.read()
        before, _, rest = text.partition(START)
        _, _, after = rest.partition(END)
        page.seek(0)
        page.write(f"{before}{START}{where(results)}\n{render(results)}{END}{after}")
        page.truncate()
        readme = ROOT / "README.md"
        readme.write_text(re.sub(r"[\d,]+ faults tried, [\d,]+ survived", sentence(results), readme.read_text()))
