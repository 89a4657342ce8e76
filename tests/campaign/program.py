"""The program: choose rows, try their faults, print the table, and keep the results."""

import argparse
import fnmatch
import math
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from src.measured import campaign_table
from tests.campaign import disks, folders, fuzzing, images, kills, long_runs, names, pairs  # noqa: F401  they register rows
from tests.campaign.table import RESULTS, provenance, write
from tests.campaign.trials import ROWS, NotHere, Row

SHOWN = 20  # failures of a row that are kept


def try_row(
    row: Row, numbers: range | list[int], seed: int, *, loud: bool, seconds: float = math.inf
) -> dict[str, Any]:
    """Try the faults of a row.

    Args:
        seconds: time after which no further fault is tried.

    Returns:
        The entry of the row in the results: `tried`, `survived`, and the failures with the command that repeats each.
    """
    began, tried, failures = time.monotonic(), 0, []
    memory = Path("/dev/shm")  # where writing costs no time
    place = Path(tempfile.mkdtemp(prefix=f"campaign-{row.name}-", dir=memory if os.access(memory, os.W_OK) else None))
    reason = ""
    try:
        for number, problem in row.run(numbers, seed, place):
            tried += 1
            if problem:
                command = f"python -m tests.campaign --row {row.name} --seed {seed} --only {number}"
                failures.append({"problem": problem, "command": command})
                if loud:
                    print(f"  {problem}\n    {command}", flush=True)
            if time.monotonic() - began > seconds:
                break
    except NotHere as why:
        reason = str(why)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    entry = {"what": row.what, "tried": tried, "survived": tried - len(failures), "failures": failures[:SHOWN]}
    return {
        **entry,
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        **({"left out": reason} if reason else {}),
    }


def main() -> None:
    """Run the program. The exit status is 1 if a fault was not survived."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaign",
        description="Break runs and files in many ways and check after each fault that nothing is lost.",
    )
    parser.add_argument(
        "--row",
        nargs="+",
        default=[],
        metavar="NAME",
        help='rows to try; * stands for any letters: "fuzz-*" (default: all)',
    )
    parser.add_argument("--list", action="store_true", help="list the rows and try nothing")
    parser.add_argument("--count", type=int, help="number of faults per row (default: that of each row)")
    parser.add_argument("--short", action="store_true", help="try the few faults of each row that the fast tests try")
    parser.add_argument("--only", type=int, help="try the fault of this number only")
    parser.add_argument("--first", type=int, default=0, help="number of the first fault")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="time after which a row tries no further fault (default: no limit)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults")
    parser.add_argument("--record", action="store_true", help=f"keep the results in {RESULTS}, and renew its tables")
    options = parser.parse_args()
    if options.list:
        print("\n".join(f"{row.name:28}{row.count:>7}  {row.what}" for row in ROWS.values()))
        return
    found: dict[str, dict[str, Any]] = {}
    for pattern in options.row:
        if not fnmatch.filter(ROWS, pattern):
            parser.error(f"--row {pattern}: no such row, --list lists them")
    for row in [row for row in ROWS.values() if any(fnmatch.fnmatch(row.name, each) for each in options.row or "*")]:
        count = options.count or (row.short if options.short else row.count)
        numbers = range(options.first, options.first + count) if options.only is None else [options.only]
        if not count:
            continue
        print(f"{row.name}: {row.what}", flush=True)
        found[row.name] = try_row(row, numbers, options.seed, loud=True, seconds=60 * options.minutes) | provenance()
        print(
            f"  {found[row.name]['survived']} of {found[row.name]['tried']} survived, {found[row.name]['seconds']} s",
            flush=True,
        )
        if options.record:
            write(found, [*ROWS])
    print(campaign_table(found), end="")
    raise SystemExit(int(any(entry["failures"] for entry in found.values())))
