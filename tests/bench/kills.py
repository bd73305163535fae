"""Is a training whose workers are killed as good as an undisturbed one? One worker dies by SIGKILL at a random step.

    python -m tests.bench.kills RESULTS.jsonl --seeds 10

For every seed a small network is trained undisturbed in this process, and on two Ray workers of which one, by chance,
is killed at a step drawn by the seed. One JSON line a seed is appended to the results; the same command goes on where
it stopped. Printed are the validation Dice of both, the steps that were done twice, and whether the killed runs end
within the spread of the undisturbed ones.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import descendants, title
from tests.train_support import spec_for, volumes
from volseg.cluster.ray_train import train_on_ray
from volseg.cluster.session import RaySession
from volseg.spec import TrainSpec
from volseg.training.progress import TrainProgress
from volseg.training.train import train

WORKERS = 2


def main() -> None:
    """Run the seeds that are missing from the results and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.kills", description=__doc__)
    parser.add_argument("results", type=Path, help="JSON lines, appended to")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=150, help="steps of a training")
    chosen = parser.parse_args()
    done = {row["seed"] for row in _read(chosen.results)}
    missing = [seed for seed in range(chosen.seeds) if seed not in done]
    # Ray Train looks after its workers every two seconds, which is a third of such a training.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    if missing:
        with RaySession(None, workers=WORKERS), tempfile.TemporaryDirectory() as folder:
            data = volumes(Path(folder))
            for seed in missing:
                row = _pair(Path(folder) / str(seed), data, seed, chosen.steps)
                with chosen.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print(report(_read(chosen.results)))


def _pair(folder: Path, data: dict[str, str], seed: int, steps: int) -> dict[str, Any]:
    options: dict[str, Any] = {"max_steps": steps, "validations": 10, "seed": seed, "norm": "group", "threads": 1}
    calm = train(spec_for(folder / "calm", data, **options))
    spec = spec_for(folder / "killed", data, **options, workers=WORKERS)
    rng = np.random.default_rng(seed)
    step, victim = int(rng.integers(1, steps)), int(rng.integers(WORKERS))
    killed, notes, told = _train_and_kill(spec, step, victim)
    return {
        "seed": seed, "asked_at": step, "killed_at": killed, "victim": victim, "undisturbed": calm.mean_foreground_dice,
        "dice": told.mean_foreground_dice, "steps": told.steps, "resumed_from": told.resumed_from,
        "attempts": 1 + sum("attempt" in note for note in notes),
    }  # fmt: skip


def _train_and_kill(spec: TrainSpec, step: int, victim: int) -> tuple[int | None, list[str], Any]:
    """Train on Ray and kill a worker as soon as `step` is reported; return where that was, the notes and the result."""
    killed: list[int] = []
    notes: list[str] = []

    def kill(now: TrainProgress) -> None:
        if now.step >= step and not killed:
            workers = [p for p in descendants(os.getpid()) if "RayTrainWorker" in title(p)]
            killed.append(now.step)
            workers[victim % len(workers)].kill()

    result = train_on_ray(spec, kill, notes.append)
    return (killed[0] if killed else None), notes, result


def _read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def report(rows: list[dict[str, Any]]) -> str:
    """Write what happened to each seed as a Markdown table, and what follows from it."""
    lines = ["| seed | killed at step | went on from | Dice, killed | Dice, undisturbed |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = f"{row['killed_at']} | {row['resumed_from']} | {row['dice']:.4f} | {row['undisturbed']:.4f}"
        lines.append(f"| {row['seed']} | {numbers} |")
    low, high = min(row["undisturbed"] for row in rows), max(row["undisturbed"] for row in rows)
    within = sum(low <= row["dice"] <= high for row in rows)
    return "\n".join(
        [*lines, f"{within} of {len(rows)} killed runs end within the undisturbed {low:.4f} to {high:.4f}"]
    )


if __name__ == "__main__":
    main()
