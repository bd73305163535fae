"""The commands: each runs one job of the Python interface and returns its result and an exit code."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from volseg.cli import show
from volseg.cli.options import read_spec
from volseg.cli.progress import ProgressLine, quantity
from volseg.errors import InputError, JobError
from volseg.spec import SegmentSpec, TrainSpec, parse_floats, parse_triple

Result = tuple[dict[str, Any], str, int]
"""The JSON document, the text for people, the exit code."""


def run_import(arguments: argparse.Namespace) -> Result:
    """`volseg import`."""
    from volseg.storage.importer import import_volume

    with ProgressLine("import", "slices") as line:
        result = import_volume(
            arguments.source, arguments.destination, voxel_size=parse_floats(arguments.voxel_size, "--voxel-size"),
            unit=arguments.unit, chunks=_triple(arguments.chunks, "--chunks"),
            shards=_triple(arguments.shards, "--shards"), labels=arguments.labels,
            class_names=_names(arguments.classes), overwrite=arguments.overwrite, progress=line.update,
        )  # fmt: skip
    return result, show.imported(result), 0


def run_info(arguments: argparse.Namespace) -> Result:
    """`volseg info`."""
    from volseg.storage.describe import describe

    result = describe(arguments.uri)
    return result, show.table(result), 0


def run_train(arguments: argparse.Namespace) -> Result:
    """`volseg train`."""
    spec = read_spec(arguments, TrainSpec)
    from volseg.training.train import train

    with ProgressLine("train", "steps") as line:
        result = train(spec, progress=show.TrainingLine(line), note=line.note).as_dict()
    return result, show.trained(result), 0


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

        def report(tally: Any) -> None:
            seconds = max(time.monotonic() - started, 1e-9)
            extra = f"{quantity(tally.voxels / seconds, 'voxel/s')}, {tally.workers} worker(s)"
            if tally.failed:
                extra += f", {len(tally.failed)} set aside"
            line.update(tally.done, tally.total, extra)

        result = api.run_segment(spec, report, line.note)
    if result["status"] == "partial":
        return result, api.partial_message(result), 3
    return result, show.segmented(result), 0


def run_verify(arguments: argparse.Namespace) -> Result:
    """`volseg verify`."""
    from volseg.execution.verify import verify

    with ProgressLine("verify", "blocks") as line:
        result = verify(arguments.output, deep=arguments.deep, progress=line.update)
    return result, show.verified(result), {"verified": 0, "incomplete": 3}.get(result["status"], 4)


def run_evaluate(arguments: argparse.Namespace) -> Result:
    """`volseg evaluate`."""
    from volseg.analysis.evaluate import evaluate

    with ProgressLine("evaluate", "boxes") as line:
        result = evaluate(
            arguments.prediction, arguments.truth, roi=arguments.roi, ignore=arguments.ignore, progress=line.update
        )
    return result, show.evaluated(result), 0


def run_overlay(arguments: argparse.Namespace) -> Result:
    """`volseg overlay`."""
    from volseg.analysis.overlay import overlay

    result = overlay(arguments.image, arguments.labels, arguments.out, position=_triple(arguments.at, "--at"))
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


def _triple(text: str | None, option: str) -> tuple[int, int, int] | None:
    if text is None:
        return None
    try:
        parsed = parse_triple(text)
    except ValueError as error:
        raise InputError(f"{option} {text!r}: {error}; nothing was done") from None
    assert isinstance(parsed, tuple)
    z, y, x = parsed
    return int(z), int(y), int(x)


def _names(text: str | None) -> tuple[str, ...] | None:
    return tuple(name.strip() for name in text.split(",")) if text else None
