"""`make bench`: volseg, its own forwards alone, and MONAI's sliding window, interleaved in one run.

All sides get the same network, fp32, the same allocator settings and two cores. Times are medians; ratios hold on other
machines, absolute times do not. Import of torch and Ray's start are reported apart for every side.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench import job

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_ARENA_MAX": "1",
}
SIDES = ("volseg serial", "volseg ray", "monai")


def main() -> None:
    """Run every side `--runs` times in turn and print one table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--size", type=int, default=160, help="side of the cubic volume")
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job.prepare(Path(folder), arguments.size, arguments.patch)
        results: dict[str, list[job.Timing]] = {side: [] for side in SIDES}
        for _ in range(arguments.runs):
            for side in SIDES:
                results[side].append(_run(side, folder, arguments))
    _print(results)


def _run(side: str, folder: str, arguments: argparse.Namespace) -> job.Timing:
    words = [sys.executable, "-m", "tests.bench.job", side, folder, str(arguments.patch), str(arguments.overlap)]
    environment = {**os.environ, **ALLOCATOR}
    done = subprocess.run(words, env=environment, check=True, capture_output=True, text=True)
    timing: job.Timing = json.loads(done.stdout.splitlines()[-1])
    print(f"{side}: {timing}", file=sys.stderr, flush=True)
    return timing


def _print(results: dict[str, list[job.Timing]]) -> None:
    def median(side: str, name: str) -> float:
        return statistics.median(t[name] for t in results[side] if t.get(name) is not None)

    reference = median("monai", "work")
    print(f"{'':14} {'start s':>8} {'work s':>8} {'x its forwards':>15} {'x MONAI':>8} {'forwards':>9} {'peak MiB':>9}")
    for side in results:
        work = median(side, "work")
        print(
            f"{side:14} {median(side, 'start'):8.2f} {work:8.2f} {work / median(side, 'forward'):15.3f} "
            f"{work / reference:8.3f} {median(side, 'forwards'):9.0f} {median(side, 'peak') / 2**20:9.0f}"
        )


if __name__ == "__main__":
    main()
