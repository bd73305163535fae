"""Is `volseg suggest` worth its name? Suggested, random and evenly spaced choice of what to label next, compared.

    python -m tests.bench.suggest RESULTS.jsonl --volume NAME IMAGE LABELS DIMS TRAIN_ROI VAL_ROI [--volume ...]

For every volume and seed: a few random slices (boxes where DIMS is 3) of the training region are labelled and a first
network is trained on them. Then each strategy adds as many again as `--n` says, a network is trained from scratch on
all of them, with the same seed and for the same time, and scored on the validation region. One JSON line a run is
appended to the results; the same command goes on where it stopped. `--report` only prints the table: paired differences
in mean foreground Dice with Student's 95 % interval over the seeds, as they come out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

STRATEGIES = ("suggested", "random", "even")
Json = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A volume with the regions to choose from and to score on; `box` is the shape of what is labelled at once."""

    name: str
    image: str
    labels: str
    dims: int
    train_roi: str
    val_roi: str
    box: tuple[int, int, int] | None


@dataclass(frozen=True)
class Budget:
    """How many are labelled at first and added then, and how long a training may take."""

    start: int
    n: int
    minutes: float
    steps: int


def main() -> None:
    """Run what is missing from the results and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.suggest", description=__doc__)
    parser.add_argument("results", type=Path, help="JSON lines, appended to; trainings lie beside it")
    parser.add_argument(
        "--volume", nargs=6, action="append", default=[],
        metavar=("NAME", "IMAGE", "LABELS", "DIMS", "TRAIN_ROI", "VAL_ROI"),
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--start", type=int, default=2, help="slices or boxes that are labelled at first")
    parser.add_argument("--n", type=int, default=3, help="slices or boxes that each strategy adds")
    parser.add_argument("--minutes", type=float, default=2.0, help="time of a training")
    parser.add_argument("--steps", type=int, default=100_000, help="steps of a training at most")
    parser.add_argument("--side", type=int, default=32, help="side of a box, for volumes of DIMS 3")
    parser.add_argument("--report", action="store_true", help="only print the table")
    arguments = parser.parse_args()
    if not arguments.report:
        budget = Budget(arguments.start, arguments.n, arguments.minutes, arguments.steps)
        folder = arguments.results.with_suffix(".work")
        folder.mkdir(parents=True, exist_ok=True)
        tasks = [_task(words, folder, arguments.side) for words in arguments.volume]
        # Seeds outside: after an interruption every volume has about as many pairs.
        for seed in range(arguments.seeds):
            for task in tasks:
                run_seed(task, seed, budget, folder / f"{task.name}-{seed}", arguments.results)
    print(table(read(arguments.results)))


def run_seed(task: Task, seed: int, budget: Budget, folder: Path, results: Path) -> None:
    """Run the strategies of one volume and seed that have no line yet."""
    from volseg.analysis.candidates import Candidates
    from volseg.geometry import Box
    from volseg.storage.volume import open_volume

    done = {(r["volume"], r["seed"], r["strategy"]) for r in read(results)}
    missing = [s for s in STRATEGIES if (task.name, seed, s) not in done]
    if not missing:
        return
    region = Box.parse(task.train_roi, open_volume(task.image).shape)
    candidates = Candidates.cut(region, task.box, 0)
    generator = np.random.default_rng([seed, 1])
    start = [int(i) for i in generator.choice(candidates.count, budget.start, replace=False)]
    for strategy in missing:
        if strategy == "suggested":
            chosen = _suggested(task, candidates, start, (seed, budget), folder / "first")
        elif strategy == "random":
            others = [i for i in range(candidates.count) if i not in start]
            chosen = [int(i) for i in generator.choice(others, budget.n, replace=False)]
        else:
            chosen = evenly(candidates.centres, start, budget.n)
        boxes = [str(candidates.box(i)) for i in (*start, *chosen)]
        line = {"volume": task.name, "seed": seed, "strategy": strategy, "boxes": boxes, "budget": vars(budget)}
        line |= _score(task, boxes, (seed, budget), folder / strategy)
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{task.name} seed {seed} {strategy}: {line['dice']:.4f} from {', '.join(boxes)}", flush=True)


def evenly(centres: NDArray[np.float64], start: Sequence[int], n: int) -> list[int]:
    """Return `n` candidates so that all lie as near as possible to one of them or of `start`, on average.

    One by one the best, then each is moved as long as that helps: for slices, what a person would call evenly spaced.
    """
    apart = np.linalg.norm(centres[:, None] - centres[None], axis=2)

    def best(others: list[int]) -> int:
        nearest = np.minimum(apart, apart[others].min(axis=0)).mean(axis=1)
        nearest[others] = np.inf
        return int(nearest.argmin())

    added: list[int] = []
    for _ in range(n):
        added.append(best([*start, *added]))
    for _ in range(100):
        before = list(added)
        for place in range(n):
            added[place] = best([*start, *added[:place], *added[place + 1 :]])
        if added == before:
            break
    return sorted(added)


def _suggested(task: Task, candidates: Any, start: Sequence[int], how: tuple[int, Budget], folder: Path) -> list[int]:
    import volseg
    from volseg.analysis.suggest import suggest
    from volseg.geometry import Box
    from volseg.storage.volume import open_volume

    _train(task, [str(candidates.box(i)) for i in start], how, folder)
    volseg.segment(
        task.image, str(folder / "result"), model=str(folder / "bundle"), roi=task.train_roi, probabilities=True,
        executor="serial",
    )  # fmt: skip
    image = open_volume(task.image)
    found = suggest(
        open_volume(str(folder / "result" / "probabilities")), image, n=how[1].n, box=task.box,
        region=Box.parse(task.train_roi, image.shape), labelled=[candidates.box(i) for i in start],
    )  # fmt: skip
    return [int(candidates.meeting(Box.parse(f["box"], image.shape))[0]) for f in found]


def _score(task: Task, boxes: Sequence[str], how: tuple[int, Budget], folder: Path) -> Json:
    """Train on `boxes` and score on the validation region."""
    import volseg

    _train(task, boxes, how, folder)
    output = str(folder / "result")
    volseg.segment(task.image, output, model=str(folder / "bundle"), roi=task.val_roi, executor="serial")
    scores = volseg.evaluate(output, task.labels, roi=task.val_roi)
    return {"dice": scores["mean_foreground_dice"], "classes": {c["name"]: c["dice"] for c in scores["classes"]}}


def _train(task: Task, boxes: Sequence[str], how: tuple[int, Budget], folder: Path) -> None:
    import volseg

    seed, budget = how
    bundle = folder / "bundle"
    if not (bundle / "model.json").exists():
        volseg.train(
            task.image, task.labels, str(bundle), dims=task.dims, train_roi="+".join(boxes), seed=seed,
            max_minutes=budget.minutes, max_steps=budget.steps,
        )  # fmt: skip


def _task(words: Sequence[str], folder: Path, side: int) -> Task:
    """Return a task; what is no Zarr is imported first."""
    name, image, labels, dims, train_roi, val_roi = words
    places = []
    for source, what in ((image, "image"), (labels, "labels")):
        place = source
        if source.endswith((".tif", ".tiff", ".npy")):
            from volseg import import_volume

            place = str(folder / f"{name}-{what}.zarr")
            if not Path(place).exists():
                import_volume(source, place, labels=what == "labels")
        places.append(place)
    box = (side, side, side) if dims == "3" else None
    return Task(name, places[0], places[1], int(dims), train_roi, val_roi, box)


def read(results: Path) -> list[Json]:
    """Return the lines of the results."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def table(lines: Iterable[Json]) -> str:
    """Return the means and the paired differences with their 95 % intervals, a row a volume and one over all."""
    dice: dict[str, dict[int, dict[str, float]]] = {}
    for line in lines:
        dice.setdefault(line["volume"], {}).setdefault(line["seed"], {})[line["strategy"]] = line["dice"]
    pairs = {name: [d for d in seeds.values() if len(d) == len(STRATEGIES)] for name, seeds in dice.items()}
    rows = [f"{'volume':12} {'pairs':>5} " + " ".join(f"{s:>9}" for s in STRATEGIES) + "  suggested less random, even"]
    for name, found in {**pairs, "all": [d for some in pairs.values() for d in some]}.items():
        means = " ".join(f"{np.mean([d[s] for d in found]) if found else float('nan'):9.4f}" for s in STRATEGIES)
        gains = "; ".join(difference([d["suggested"] - d[other] for d in found]) for other in STRATEGIES[1:])
        rows.append(f"{name:12} {len(found):5} {means}  {gains}")
    return "\n".join(rows)


def difference(values: Sequence[float]) -> str:
    """Return the mean of paired differences and its 95 % interval by Student's t, as text."""
    if len(values) < 2:
        return "too few pairs"
    mean, reach = float(np.mean(values)), float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return f"{mean:+.4f} ({mean - reach:+.4f} to {mean + reach:+.4f})"


if __name__ == "__main__":
    main()
