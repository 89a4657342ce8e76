"""Keep the results of the campaign. `src/measured.py` makes the table of the documentation from them."""

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

from src import documents
from tests.processes import ROOT

RESULTS = "docs/results/reliability.json"
PAGE = "docs/results/reliability.md"
Results = Mapping[str, Mapping[str, Any]]  # {name of a row: its entry}


def provenance() -> dict[str, str]:
    """Return commit, date, processor and versions of this run."""
    import numpy
    import PIL
    import torch

    commit, changed = (
        subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()
        for words in (
            ("rev-parse", "--short=7", "HEAD"),
            ("status", "--porcelain", "--untracked-files=no", "--", "src", "tests", "*.py"),
        )
    )
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
    versions |= {"Pillow": PIL.__version__, "Linux": platform.release().partition("-")[0]}
    return {
        "commit": f"{commit}+" if changed else commit,
        "date": date.today().isoformat(),
        "hardware": f"{os.cpu_count()} cores of {cpu[1] if cpu else platform.machine()}",
        "versions": ", ".join(f"{name} {version.partition('+')[0]}" for name, version in versions.items()),
    }


def load() -> dict[str, dict[str, Any]]:
    """Return the kept results."""
    path = ROOT / RESULTS
    return json.loads(path.read_text()) if path.exists() else {}


def write(found: Results, order: list[str]) -> None:
    """Add rows to the results, replacing earlier results of the same rows, and renew the page and the totals in README.

    Args:
        order: names of all rows in the order of the table.
    """
    with open(ROOT / PAGE) as page:
        fcntl.flock(page, fcntl.LOCK_EX)  # another process may add other rows
        results = {**load(), **found}
        results = {name: results[name] for name in order if name in results}
        (ROOT / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
        documents.differences(ROOT, write=True)
