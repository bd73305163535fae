"""Entry point of the `volseg` command: parser, errors, exit codes.

Exit codes: 0 done, 2 the user's input is wrong, 3 partial, 4 failed, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from volseg import __version__
from volseg.cli import commands
from volseg.cli.options import Parser, add_spec_options, parse
from volseg.errors import InputError, VolsegError
from volseg.spec import SegmentSpec, TrainSpec

_EPILOG = """examples:
  volseg import stack.tif image.zarr --voxel-size 0.5,0.5,0.5 --unit micrometer
  volseg train --image image.zarr --labels labels.zarr --train-roi 0:14,:,: --val-roi 14:17,:,: --out unet
  volseg plan image.zarr result.zarr --model unet
  volseg segment image.zarr result.zarr --model unet --workers 2
  volseg verify result.zarr

Exit codes: 0 done, 2 the input is wrong, 3 partial, 4 failed, 130 interrupted.
With --json, stdout holds one JSON document and nothing else.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    wants_json = "--json" in (sys.argv[1:] if words is None else words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        document, text, code = execute(words)
    except VolsegError as error:
        return _fail(str(error), error.exit_code, wants_json, getattr(error, "report", None))
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to go on", 130, wants_json)
    except ModuleNotFoundError as error:
        extra = {"torch": "torch", "ray": "ray", "matplotlib": "plot", "scipy": "demo", "skimage": "demo"}
        package = (error.name or "").partition(".")[0]
        hint = f"pip install 'volseg[{extra[package]}]'" if package in extra else f"install {package}"
        return _fail(
            f"this command needs the package {package}, which is not installed: {hint}",
            InputError.exit_code,
            wants_json,
        )
    except Exception as error:
        if os.environ.get("VOLSEG_DEBUG"):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return _fail(f"unexpected {reason}; this is a bug of volseg: VOLSEG_DEBUG=1 shows where", 4, wants_json)
    _print(json.dumps(document) if wants_json else text)
    return code


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Whoever read has seen enough (`volseg info ... | head`); Python must not fail again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def execute(words: Sequence[str] | None) -> commands.Result:
    """Parse and run one command; return its JSON document, its text for people and its exit code."""
    parser, known = build_parser()
    arguments = parse(parser, known, words)
    if arguments.command is None:
        return {}, parser.format_help(), 0
    run: Callable[[Any], commands.Result] = arguments.run
    # Libraries print, Ray about every worker that dies: only the result may stand on stdout.
    with contextlib.redirect_stdout(sys.stderr):
        return run(arguments)


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """Return the parser and those of the commands by name."""
    parser = Parser(
        prog="volseg", description="Segment tomography volumes that exceed memory: Zarr in, labels out.",
        epilog=_EPILOG, formatter_class=_formatter(), allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"volseg {__version__}", help="print the version")
    groups = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    known: dict[str, Parser] = {}

    def command(name: str, run: Callable[[Any], commands.Result], summary: str, details: str = "") -> Parser:
        added: Parser = groups.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {details}".strip(), allow_abbrev=False
        )
        added.add_argument("--json", action="store_true", help="print one JSON document on stdout, nothing else")
        added.set_defaults(run=run)
        known[name] = added
        return added

    _add_data_commands(command)
    _add_job_commands(command)
    _add_result_commands(command)
    return parser, known


_Command = Callable[..., Parser]


def _add_data_commands(command: _Command) -> None:
    add = command(
        "import", commands.run_import, "turn a stack of images into an OME-Zarr volume",
        "The stack is streamed: memory does not grow with the volume.",
    )  # fmt: skip
    add.add_argument("source", metavar="SRC", help="multi-page TIFF, a folder of TIFF or PNG slices, or a .npy file")
    add.add_argument("destination", metavar="DST", help="OME-Zarr to write, such as scan.zarr")
    add.add_argument("--voxel-size", metavar="Z,Y,X", help="edge lengths of a voxel, such as 0.1,0.022,0.022")
    add.add_argument("--unit", metavar="TEXT", help="unit of the voxel size, such as micrometer or nanometer")
    add.add_argument("--labels", action="store_true", help="the stack holds class numbers, not grey values")
    add.add_argument("--classes", metavar="LIST", help="class names from 0 on, comma-separated (with --labels)")
    add.add_argument("--chunks", metavar="Z,Y,X", help="chunk shape in voxels [default: about 64 a side]")
    add.add_argument("--shards", metavar="Z,Y,X", help="shard shape in voxels [default: planned]")
    add.add_argument("--overwrite", action="store_true", help="replace a volume that exists at DST")
    add = command("info", commands.run_info, "tell what a volume is: shape, chunks, voxel size, classes, state")
    add.add_argument("uri", metavar="URI", help="a Zarr array or an OME-Zarr")


def _add_job_commands(command: _Command) -> None:
    add = command(
        "train", commands.run_train, "train a network on labelled regions and write a bundle",
        "Voxels labelled 255 are ignored, so a few labelled slices are enough. The same command resumes.",
    )  # fmt: skip
    add_spec_options(add, TrainSpec)
    for name, run, summary in (
        ("plan", commands.run_plan, "tell what a segmentation would cost, and refuse what cannot work"),
        ("segment", commands.run_segment, "segment a volume with a trained bundle"),
    ):
        add = command(
            name, run, summary,
            "The result does not depend on workers, blocks or interruptions; the same command resumes.",
        )  # fmt: skip
        add_spec_options(add, SegmentSpec, positional=("input", "output"))


def _add_result_commands(command: _Command) -> None:
    add = command("verify", commands.run_verify, "check a segmentation against its receipts")
    add.add_argument("output", metavar="OUTPUT", help="what `volseg segment` wrote")
    add.add_argument("--deep", action="store_true", help="read every block and compare digests, too")
    add = command("evaluate", commands.run_evaluate, "score a label volume against the truth, streamed")
    add.add_argument("prediction", metavar="PREDICTION", help="label volume to score")
    add.add_argument("truth", metavar="TRUTH", help="label volume to score against")
    add.add_argument("--roi", metavar="RANGES", help="region z,y,x such as 14:17,:,: [default: everything]")
    add.add_argument(
        "--ignore", metavar="N", type=int, default=255, help="label of the truth to leave out [default: 255]"
    )
    add = command("overlay", commands.run_overlay, "draw three planes of an image with its labels as a PNG")
    add.add_argument("image", metavar="IMAGE", help="image volume")
    add.add_argument("labels", metavar="LABELS", help="label volume of the same shape")
    add.add_argument("out", metavar="OUT.png", help="picture to write")
    add.add_argument("--at", metavar="Z,Y,X", help="voxel where the planes cross [default: the centre]")
    add = command("demo", commands.run_demo, "run the whole job on a CT phantom with known truth")
    add.add_argument("folder", nargs="?", default="volseg-demo", metavar="FOLDER", help="where everything is written")
    add.add_argument("--max-minutes", type=float, default=2.0, metavar="F", help="time for training [default: 2]")
    add.add_argument("--seed", type=int, default=1, metavar="N", help="seed of phantom and training [default: 1]")


def _formatter() -> Any:
    import argparse

    return argparse.RawDescriptionHelpFormatter


def _fail(message: str, code: int, wants_json: bool, report: dict[str, Any] | None = None) -> int:
    if wants_json:
        document = {"status": "error", "error": message, "exit_code": code}
        _print(json.dumps(document | ({"report": report} if report else {})))
    print(f"volseg: {message}", file=sys.stderr)
    return code
