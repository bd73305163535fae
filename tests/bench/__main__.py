"""`make bench`: volseg, its own forwards alone, and its peers, interleaved in one run.

All sides get the same trained network, scan, patch, overlap, precision, allocator settings and two cores. Times are
medians. Ratios hold on other machines, absolute times do not. What happens once (import of torch, start of Ray,
compilation) is reported apart. The limit is the time of the same patches' forwards and nothing else, on as many cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.bench import job

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_ARENA_MAX": "1",
}
SERIAL = "volseg, serial"


def main() -> None:
    """Run every side `--runs` times in turn and print one table an overlap."""
    from tests.bench import peers

    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=160, help="side of the cubic phantom")
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--overlap", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=2.0, help="time to train the network")
    parser.add_argument("--only", nargs="+", metavar="SIDE", help="sides to measure [default: all]")
    parser.add_argument("--folder", type=Path, help="where scan and network are kept for the next run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all timings")
    arguments = parser.parse_args()
    sides = [*job.VOLSEG, *(peer for peer in peers.PEERS if peers.installed(peer))]
    for peer in [peer for peer in peers.PEERS if not peers.installed(peer)]:
        print(f"{peer} is not installed here and is left out: pip install 'volseg[bench]'", file=sys.stderr)
    if unknown := set(arguments.only or ()) - set(sides):
        parser.error(f"no such side: {', '.join(sorted(unknown))}; there are: {'; '.join(sides)}")
    # What the others are compared with is always there.
    chosen = [side for side in sides if not arguments.only or side in {*job.VOLSEG, *arguments.only}]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "bundle" / "model.json").exists():
            dice = job.prepare(folder, arguments.size, arguments.patch, arguments.minutes)
            print(f"trained for {arguments.minutes:g} minutes: validation Dice {dice:.3f}", file=sys.stderr, flush=True)
        settings = [
            job.Setting(str(folder), arguments.patch, overlap, arguments.precision) for overlap in arguments.overlap
        ]
        results = _run_all(chosen, settings, arguments.runs)
    for setting, timings in zip(settings, results, strict=True):
        print(table(setting, timings))
    if arguments.json:
        found = [{"setting": asdict(s), "timings": t} for s, t in zip(settings, results, strict=True)]
        arguments.json.write_text(json.dumps(found, indent=1))


def _run_all(sides: Sequence[str], settings: Sequence[job.Setting], runs: int) -> list[dict[str, list[job.Timing]]]:
    results: list[dict[str, list[job.Timing]]] = [{side: [] for side in sides} for _ in settings]
    for _ in range(runs):
        for setting, timings in zip(settings, results, strict=True):
            for side in sides:
                timing = _run(side, setting)
                if not side.startswith("forwards alone"):
                    timing["differs"] = _differs(setting, side)
                timings[side].append(timing)
                shown = ", ".join(f"{name} {value:.6g}" for name, value in timing.items())
                print(f"{setting.overlap:g} {side}: {shown}", file=sys.stderr, flush=True)
    return results


def _run(side: str, setting: job.Setting) -> job.Timing:
    words = [sys.executable, "-m", "tests.bench.job", side, json.dumps(asdict(setting))]
    done = subprocess.run(words, env={**os.environ, **ALLOCATOR}, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    timing: job.Timing = json.loads(done.stdout.splitlines()[-1])
    return timing


def _differs(setting: job.Setting, side: str) -> float:
    """Return the share of voxels whose label differs from that of volseg in one process."""
    import numpy as np
    import zarr

    def labels(name: str) -> Any:
        place = setting.result(name)
        return np.asarray(zarr.open_array(place / "0" if name in job.VOLSEG else place, mode="r")[:])

    return float((labels(side) != labels(SERIAL)).mean())


def table(setting: job.Setting, timings: dict[str, list[job.Timing]]) -> str:
    """Return the medians of one setting as text."""

    def median(side: str, name: str) -> float:
        return statistics.median(t.get(name, 0.0) for t in timings[side])

    lines = [
        f"\npatch {setting.patch}, overlap {setting.overlap:.0%}, {setting.precision}, medians of "
        f"{len(timings[SERIAL])}; differs: share of labels unlike those of {SERIAL!r}",
        f"{'':24} {'start s':>8} {'once s':>7} {'work s':>8} {'x the limit':>12} {'x MONAI':>8} {'forwards':>9} "
        f"{'peak MiB':>9} {'differs':>9}",
    ]
    monai = median("MONAI", "work") if "MONAI" in timings else float("nan")
    for side in timings:
        cores = job.VOLSEG.get(side, job.CORES)
        limit = median(f"forwards alone, {cores} core{'s' * (cores > 1)}", "work")
        work = median(side, "work")
        lines.append(
            f"{side:24} {median(side, 'start'):8.2f} {median(side, 'once'):7.2f} {work:8.2f} {work / limit:12.3f} "
            f"{work / monai:8.3f} {median(side, 'forwards'):9.0f} {median(side, 'peak') / 2**20:9.0f} "
            f"{median(side, 'differs'):9.4%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
