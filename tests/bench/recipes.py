"""Every recipe on the same volumes for the same time: trains, segments and scores, and prints one table.

Runs one volume and recipe after the other, each in a process of its own, and appends a line of JSON for each that is
finished: interrupted, the same command goes on. Scores are of the validation part, segmented with the bundle's own
settings. `python -m tests.bench.recipes --data FOLDER --minutes 10`; FOLDER holds a folder a volume with raw.tif and
labels.tif. With `--few` the default recipe is trained on four labelled slices alone, too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECIPES = ("default", "tomo-fewslice", "inception-snapshot", "patchify-unet", "fcn8", "salt-unet")
FEW = "default, 4 slices"
COMPARISONS = ("tomo-fewslice-vgg", "inception-snapshot-single", "inception-snapshot-plain")


@dataclass(frozen=True)
class Case:
    """A volume, its voxel size, its regions, and the classes that have enough voxels to be scored (all if empty).

    `few` are four slices of the training region, evenly spaced.
    """

    name: str
    voxel_size: str
    unit: str
    train: str
    val: str
    few: tuple[str, ...]
    classes: tuple[int, ...] = ()


def _slices(*numbers: int, x: str = ":") -> tuple[str, ...]:
    return tuple(f"{z}:{z + 1},:,{x}" for z in numbers)


CASES = (
    Case("nanoct", "0.1,0.022,0.022", "micrometer", "0:14,:,:", "14:17,:,:", _slices(1, 5, 8, 12)),
    Case("isbi2012", "50,4,4", "nanometer", "0:20,:,:", "20:24,:,:", _slices(2, 7, 12, 17)),
    Case("ct_body", "3,3,3", "millimeter", ":,:,0:61", ":,:,61:71", _slices(14, 42, 70, 98, x="0:61"), (1, 2, 5)),
)


def main() -> None:
    """Run what is missing and print the table of all results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder a volume")
    parser.add_argument("--minutes", type=float, default=10.0, help="training time a recipe and volume")
    parser.add_argument("--work", type=Path, default=Path("w/recipes"), help="where bundles and results are kept")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="recipes [default: the six]")
    parser.add_argument("--comparisons", action="store_true", help="the recipes' comparison models, too")
    parser.add_argument("--few", action="store_true", help="the default recipe on four slices, too")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    results = chosen.work / f"results-{chosen.minutes:g}.jsonl"
    recipes = [*chosen.recipes, *(COMPARISONS if chosen.comparisons else ()), *([FEW] if chosen.few else [])]
    cases = [case for case in CASES if (chosen.data / case.name).is_dir()]
    for case in cases:
        _import(case, chosen.data, chosen.work)
        for recipe in recipes:
            if (case.name, recipe) not in {(row["volume"], row["recipe"]) for row in _read(results)}:
                row = _run(case, recipe, chosen.work, chosen.minutes)
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    print(table(_read(results), [case.name for case in cases], recipes))


def _volseg(*words: object) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "volseg", *map(str, words), "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    document: dict[str, Any] = json.loads(done.stdout)
    if done.returncode:
        raise SystemExit(f"volseg {words[0]} ended with {done.returncode}: {document.get('error')}")
    return document


def _import(case: Case, data: Path, work: Path) -> None:
    if not (work / f"{case.name}-labels.zarr").exists():
        size = ("--voxel-size", case.voxel_size, "--unit", case.unit)
        _volseg("import", data / case.name / "raw.tif", work / f"{case.name}.zarr", *size, "--overwrite")
        _volseg("import", data / case.name / "labels.tif", work / f"{case.name}-labels.zarr", "--labels")


def _run(case: Case, recipe: str, work: Path, minutes: float) -> dict[str, Any]:
    image, labels = work / f"{case.name}.zarr", work / f"{case.name}-labels.zarr"
    place = f"{case.name}-{recipe.replace(', ', '-').replace(' ', '-')}"
    bundle, output = work / place, work / f"{place}.zarr"
    name, train = ("default", "+".join(case.few)) if recipe == FEW else (recipe, case.train)
    started = time.monotonic()
    trained = _volseg(
        "train", "--recipe", name, "--image", image, "--labels", labels, "--train-roi", train,
        "--val-roi", case.val, "--out", bundle, "--max-minutes", f"{minutes:g}", "--overwrite",
    )  # fmt: skip
    segmented = _volseg("segment", image, output, "--model", bundle, "--roi", case.val, "--overwrite")
    scores = _volseg("evaluate", output, labels, "--roi", case.val)
    dice = {c["id"]: c["dice"] for c in scores["classes"] if c["id"] > 0}
    kept = [dice[i] or 0.0 for i in case.classes] if case.classes else [d for d in dice.values() if d is not None]
    return {
        "volume": case.name,
        "recipe": recipe,
        "dice": sum(kept) / len(kept),
        "classes": dice,
        "steps": trained["steps"],
        "seconds": round(time.monotonic() - started, 1),
        "forwards": segmented["forwards"],
    }


def _read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def table(rows: list[dict[str, Any]], volumes: list[str], recipes: list[str]) -> str:
    """Write Dice (and steps) of every recipe and volume as a Markdown table, the best of each volume in bold."""
    found = {(row["volume"], row["recipe"]): row for row in rows}
    rivals = [r for r in recipes if r != FEW]
    best = {v: max((found[v, r]["dice"] for r in rivals if (v, r) in found), default=None) for v in volumes}
    lines = ["| recipe | " + " | ".join(volumes) + " |", "|---|" + "---|" * len(volumes)]
    for recipe in recipes:
        cells = []
        for volume in volumes:
            row = found.get((volume, recipe))
            text = "-" if row is None else f"{row['dice']:.3f}"
            if row is not None and row["dice"] == best[volume]:
                text = f"**{text}**"
            cells.append(text if row is None else f"{text} ({row['steps']} steps)")
        lines.append(f"| {recipe} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
