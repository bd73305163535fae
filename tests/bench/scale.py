"""`make bench-scale`: does the driver keep up with 1,000 workers, and does its memory stay flat?

First a simulation: the driver, policy and ledger as they are, on a simulated cluster in virtual time, with failing
blocks, dying workers, lost machines, stragglers and killed drivers. Then a real run: tiny blocks on Ray actors inside
this process. Figures of CPU time and memory are of this machine; counts are the same everywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from math import prod
from pathlib import Path
from typing import Any

import psutil

from tests.bench.drive import Outcome, bare_seconds, simulate
from tests.bench.simulated import World
from volseg.geometry import BlockGrid, Box, PatchLattice, Triple, stride_for
from volseg.storage.ledger import HEARTBEAT_SECONDS

MIB = 1 << 20
TINY = 8
"""Side of a block of the real run."""


def main() -> None:
    """Run both and print their tables."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=1_000_000, help="blocks of the simulation")
    parser.add_argument("--workers", type=int, default=1000, help="workers of the simulation")
    parser.add_argument("--seconds", type=float, default=20.0, help="virtual seconds of a block")
    parser.add_argument("--kills", type=int, default=3, help="drivers that are killed in the simulation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", type=int, default=20_000, help="blocks of the real run at least; 0 for none")
    parser.add_argument("--real-workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where ledger and volumes lie [default: a temporary folder]")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    world = World(workers=arguments.workers, seconds=arguments.seconds, seed=arguments.seed)
    answer: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.blocks:
            outcome = simulate(Path(folder, "simulated"), arguments.blocks, world, kills=arguments.kills)
            answer["simulated"] = figures(outcome, world, bare_seconds(arguments.blocks, world))
            _print("simulated", answer["simulated"], arguments.json)
        if arguments.real:
            answer["real"] = real(Path(folder), arguments.real, arguments.real_workers)
            _print("real, on Ray", answer["real"], arguments.json)
    if arguments.json:
        print(json.dumps(answer))


def figures(outcome: Outcome, world: World, bare: float) -> dict[str, Any]:
    """Return what the table shows of a simulated job; `bare` is the CPU time of the simulation alone."""
    record, blocks, hours = outcome.record, outcome.blocks, outcome.virtual_seconds / 3600
    driver = max(outcome.total_seconds - bare, 1e-9)
    early, late = outcome.resident[len(outcome.resident) // 10], outcome.resident[-1]
    blocks_a_second = blocks / outcome.virtual_seconds
    seams = seam_bytes((512,) * 3, (128,) * 3, 0.25, sums=1)
    return {
        "blocks": blocks,
        "workers": world.workers,
        "virtual hours": round(hours, 3),
        "blocks with a receipt": outcome.receipts,
        "blocks set aside": outcome.failed,
        "attempts without a result, share": round(record.lost / record.attempts, 5),
        "workers and machines lost": record.losses,
        "stragglers": record.stragglers,
        "drivers killed": record.kills,
        "blocks computed twice, share": round(record.twice / blocks, 6),
        "worker time without a result, share": round(record.wasted / record.busy, 5),
        "worker time busy, share": round(record.busy / outcome.virtual_seconds / world.workers, 4),
        "driver CPU, us a block": round(driver / blocks * 1e6, 1),
        "driver, blocks a CPU second": round(blocks / driver),
        "receipts read back, us a block": round(outcome.read_seconds / blocks * 1e6, 1),
        "memory at a tenth, MiB": round(early / MIB, 1),
        "memory at the end, MiB": round(late / MIB, 1),
        "ledger writes": outcome.writes,
        "ledger writes a second": round(sum(outcome.writes.values()) / outcome.virtual_seconds, 3),
        "heartbeat every s": HEARTBEAT_SECONDS,
        "ledger bytes a block": round(outcome.ledger_bytes / blocks, 1),
        # The driver moves no seams yet: this is the arithmetic of what they will be, for blocks of this size and speed.
        "seams of a 512^3 block, patch 128, overlap 25 %, 2 classes, MiB": round(seams / MIB, 1),
        "seams at that rate, MiB/s a node": round(
            seams * blocks_a_second / (world.workers / world.workers_a_node) / MIB, 1
        ),
    }


def seam_bytes(block: Triple, patch: Triple, overlap: float, *, sums: int) -> int:
    """Return the bytes of one inner block's partial sums that belong to its neighbours: four a voxel and sum.

    The patches of a block are those whose origin lies in it; what they answer beyond the block's upper borders is the
    seam.
    """
    shape = (4 * block[0], 4 * block[1], 4 * block[2])
    lattice = PatchLattice(shape, patch, stride_for(patch, overlap))
    grid = BlockGrid(shape, block, Box.of(shape))
    _, ny, nx = grid.counts
    inner = grid.box((ny + 1) * nx + 1)
    sides = []
    for axis, start, stop in zip(lattice.axes, inner.start, inner.stop, strict=True):
        origins = [o for o in map(axis.origin, range(axis.count)) if start <= o < stop]
        sides.append(max(stop, origins[-1] + axis.side) - start)
    return 4 * sums * (prod(sides) - inner.size)


def real(folder: Path, blocks: int, workers: int) -> dict[str, Any]:
    """Segment a volume of at least so many tiny blocks on Ray actors inside this process."""
    import numpy as np

    from tests.support import make_bundle, store
    from volseg import api
    from volseg.spec import SegmentSpec

    side = 1
    while side**3 < blocks:
        side += 1
    sides = (TINY * side,) * 3
    bundle = make_bundle(folder / "bundle", classes=2, patch=(TINY,) * 3)
    grey = np.random.default_rng(0).integers(0, 256, sides, dtype=np.uint8)
    image = store(folder / "image.zarr", grey, chunks=(min(64, sides[0]),) * 3)
    spec = SegmentSpec.read({
        "input": image, "output": str(folder / "out.zarr"), "model": bundle, "executor": "ray", "workers": workers,
        "block": TINY, "overlap": 0, "patch": TINY,
    })  # fmt: skip
    process, resident = psutil.Process(), [0, 0]
    before = {"cpu": 0.0}

    def report(tally: Any) -> None:
        if tally.computed and not resident[0]:
            resident[0], before["cpu"] = process.memory_info().rss, time.process_time()
        resident[1] = process.memory_info().rss

    started = time.perf_counter()
    result = api.run_segment(spec, report)
    seconds = result["seconds"]
    cpu = time.process_time() - before["cpu"]
    return {
        "blocks": result["blocks"]["total"],
        "workers": workers,
        "status": result["status"],
        "blocks a second": round(result["blocks"]["total"] / seconds["work"], 1),
        "driver process CPU, us a block": round(cpu / result["blocks"]["total"] * 1e6, 1),
        "memory after the first block, MiB": round(resident[0] / MIB, 1),
        "memory at the last block, MiB": round(resident[1] / MIB, 1),
        "start, s": seconds["start"],
        "work, s": seconds["work"],
        "check and the rest, s": round(time.perf_counter() - started - seconds["start"] - seconds["work"], 2),
        "threads": threading.active_count(),
    }


def _print(title: str, values: dict[str, Any], quiet: bool) -> None:
    out = sys.stderr if quiet else sys.stdout
    width = max(map(len, values))
    print(title, file=out)
    for name, value in values.items():
        shown = ", ".join(f"{k} {v}" for k, v in sorted(value.items())) if isinstance(value, dict) else value
        print(f"  {name:{width}}  {shown}", file=out, flush=True)


if __name__ == "__main__":
    main()
