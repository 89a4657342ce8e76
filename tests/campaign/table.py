"""Keep the results of the campaign, and render them as the table of the documentation."""

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


def provenance() -> dict[str, str]:
    """Return commit, date, processor and versions of this run."""
    import numpy
    import PIL
    import torch

    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}, Pillow {PIL.__version__}"
    hardware = f"{os.cpu_count()} cores, {cpu[1] if cpu else platform.machine()}"
    return {"commit": commit, "date": date.today().isoformat(), "hardware": hardware, "versions": versions}


def render(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table `what | tried | survived | failures` in Markdown, with the totals in the last row."""
    lines = ["| what | tried | survived | failures |", "|---|---|---|---|"]
    for entry in found.values():
        failures = len_failures(entry)
        note = f" ({entry['left out']})" if entry.get("left out") else ""
        lines.append(f"| {entry['what']}{note} | {entry['tried']:,} | {entry['survived']:,} | {failures} |")
    tried, survived = (sum(entry[key] for entry in found.values()) for key in ("tried", "survived"))
    lines.append(f"| **all** | **{tried:,}** | **{survived:,}** | **{tried - survived}** |")
    return "\n".join(lines)


def len_failures(entry: Mapping[str, Any]) -> int:
    """Return the number of failures of a row."""
    return entry["tried"] - entry["survived"]


def write(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Add rows to the results, replacing earlier results of the same rows, and renew the table in the page."""
    path = ROOT / RESULTS
    results = json.loads(path.read_text()) if path.exists() else {}
    results.update(found)
    path.write_text(json.dumps(results, indent=1) + "\n")
