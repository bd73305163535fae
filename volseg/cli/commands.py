"""The commands: each runs one job of the Python interface and returns its result and an exit code."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from volseg.cli import show
from volseg.cli.options import read_spec
from volseg.cli.progress import ProgressLine, quantity
from volseg.errors import InputError, JobError
from volseg.recipes import load_recipe, recipe_names, resolve
from volseg.spec import BenchSpec, SegmentSpec, TrainSpec, parse_floats, parse_triple

if TYPE_CHECKING:
    from volseg.execution.driver import Tally

Result = tuple[dict[str, Any], str, int]
"""The JSON document, the text for people, the exit code."""


def run_import(arguments: argparse.Namespace) -> Result:
    """`volseg import`."""
    from volseg.storage.importer import import_volume

    with ProgressLine("import", "slices") as line:
        result = import_volume(
            arguments.source, arguments.destination, voxel_size=parse_floats(arguments.voxel_size, "--voxel-size"),
            unit=arguments.unit, chunks=parse_sides(arguments.chunks, "--chunks"),
            shards=parse_sides(arguments.shards, "--shards"), labels=arguments.labels,
            class_names=parse_names(arguments.classes), overwrite=arguments.overwrite, progress=line.update,
        )  # fmt: skip
    return result, show.imported(result), 0


def run_info(arguments: argparse.Namespace) -> Result:
    """`volseg info`."""
    from volseg.storage.describe import describe

    result = describe(arguments.uri)
    return result, show.table(result), 0


def run_train(arguments: argparse.Namespace) -> Result:
    """`volseg train`."""
    from volseg import api

    spec = read_spec(arguments, TrainSpec, resolve)
    if arguments.preview is not None:
        result = api.preview(spec, arguments.preview)
        return result, f"wrote {result['picture']}; nothing was trained", 0
    with ProgressLine("train", "steps") as line:
        result = api.run_train(spec, show.TrainingLine(line), trace=line.note)
    return result, show.trained(result), 0


def run_recipes(arguments: argparse.Namespace) -> Result:
    """`volseg recipes`."""
    if arguments.name is None:
        recipes = [load_recipe(name) for name in recipe_names()]
        return {"recipes": [recipe.model_dump() for recipe in recipes]}, show.recipes(recipes), 0
    recipe = load_recipe(arguments.name)
    return recipe.model_dump(), show.recipe(recipe), 0


def run_plan(arguments: argparse.Namespace) -> Result:
    """`volseg plan`."""
    from volseg import api

    result = api.run_plan(read_spec(arguments, SegmentSpec))
    return result, show.planned(result), 0


def run_segment(arguments: argparse.Namespace) -> Result:
    """`volseg segment`."""
    from volseg import api

    spec = read_spec(arguments, SegmentSpec)
    started = time.monotonic()
    with ProgressLine("segment", "blocks") as line:

        def report(tally: Tally) -> None:
            seconds = max(time.monotonic() - started, 1e-9)
            extra = f"{quantity(tally.voxels / seconds, 'voxel/s')}, {tally.workers} worker(s)"
            if tally.failed:
                extra += f", {len(tally.failed)} set aside"
            line.update(tally.done, tally.total, extra, **facts_of(tally))

        result = api.run_segment(spec, report, trace=line.note)
    if result["status"] == "partial":
        return result, api.partial_message(result), 3
    return result, show.segmented(result), 0


def run_bench(arguments: argparse.Namespace) -> Result:
    """`volseg bench`."""
    from volseg import api

    with ProgressLine("bench", "blocks") as line:
        result = api.run_bench(
            read_spec(arguments, BenchSpec), lambda tally: line.update(tally.done, tally.total), line.note
        )
    return result, show.measured(result), 0


def facts_of(tally: Tally) -> dict[str, Any]:
    """Return what a progress event of a segmentation says beside its counts."""
    return {
        "computed": tally.computed, "resumed": tally.resumed,
        "failed": len(tally.failed), "retried": tally.retried, "workers": tally.workers, "voxels": tally.voxels,
    }  # fmt: skip


def run_verify(arguments: argparse.Namespace) -> Result:
    """`volseg verify`."""
    from volseg.execution.verify import verify

    with ProgressLine("verify", "blocks") as line:
        result = verify(arguments.output, deep=arguments.deep, progress=line.update)
    return result, show.verified(result), {"verified": 0, "incomplete": 3}.get(result["status"], 4)


def run_evaluate(arguments: argparse.Namespace) -> Result:
    """`volseg evaluate`."""
    from volseg.analysis.evaluate import evaluate

    with ProgressLine("evaluate", "steps") as line:
        result = evaluate(
            arguments.prediction, arguments.truth, roi=arguments.roi, ignore=arguments.ignore,
            slab_axis=arguments.slab_axis, surface=arguments.surface, rand_class=arguments.rand_class,
            progress=line.update,
        )  # fmt: skip
    return result, show.evaluated(result), 0


def run_overlay(arguments: argparse.Namespace) -> Result:
    """`volseg overlay`."""
    from volseg.analysis.overlay import overlay

    result = overlay(arguments.image, arguments.labels, arguments.out, position=parse_sides(arguments.at, "--at"))
    return result, f"wrote {result['picture']}", 0


def run_demo(arguments: argparse.Namespace) -> Result:
    """`volseg demo`."""
    from volseg.cli.main import execute
    from volseg.demo import run

    def command(words: list[str]) -> dict[str, Any]:
        document, text, code = execute(words)
        print(text, file=sys.stderr, flush=True)
        if code:
            raise JobError(f"the demo stopped: volseg {words[0]} ended with exit code {code}")
        return document

    result = run.run_demo(arguments.folder, command, max_minutes=arguments.max_minutes, seed=arguments.seed)
    return result, run.summary(result), 0


def parse_sides(text: str | None, option: str) -> tuple[int, int, int] | None:
    """Turn the text of `option` into (z, y, x); raises InputError."""
    if text is None:
        return None
    try:
        parsed = parse_triple(text)
    except ValueError as error:
        raise InputError(f"{option} {text!r}: {error}; nothing was done") from None
    assert isinstance(parsed, tuple)
    z, y, x = parsed
    return int(z), int(y), int(x)


def parse_names(text: str | None) -> tuple[str, ...] | None:
    """Cut a list at its commas."""
    return tuple(name.strip() for name in text.split(",")) if text else None
