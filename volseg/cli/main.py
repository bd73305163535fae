"""Entry point of the `volseg` command: parser, errors, exit codes.

Exit codes: 0 done, 2 the user's input is wrong, 3 partial, 4 failed, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from volseg import __version__
from volseg.cli import commands, model_commands
from volseg.cli.job_commands import add_job_commands
from volseg.cli.kube_command import add_kube_command
from volseg.cli.log import LEVEL, MODE, Log, choose, log_of, writing
from volseg.cli.options import Parser, add_spec_options, parse
from volseg.errors import InputError, VolsegError
from volseg.journal import Line
from volseg.redaction import redact
from volseg.spec import BenchSpec, SegmentSpec, TrainSpec

_EPILOG = """examples:
  volseg import stack.tif image.zarr --voxel-size 0.5,0.5,0.5 --unit micrometer
  volseg train --image image.zarr --labels labels.zarr --train-roi 0:14,:,: --val-roi 14:17,:,: --out unet
  volseg plan image.zarr result.zarr --model unet
  volseg segment image.zarr result.zarr --model unet --workers 2
  volseg verify result.zarr

Exit codes: 0 done, 2 the input is wrong, 3 partial, 4 failed, 130 interrupted.
With --json, stdout holds one JSON document and nothing else.
"""


_EXTRAS = {
    "torch": "torch",
    "ray": "ray",
    "matplotlib": "plot",
    "onnx": "export",
    "onnxscript": "export",
    "scipy": "metrics",
    "skimage": "metrics",
}
"""Optional packages and the extra that brings each."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = sys.argv[1:] if words is None else words
    wants_json = "--json" in words
    fail = partial(_fail, log=log_of(words), wants_json=wants_json)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        document, text, code = execute(words)
    except VolsegError as error:
        return fail(str(error), error.exit_code, report=getattr(error, "report", None))
    except KeyboardInterrupt:
        return fail("interrupted; run the same command again to go on", 130)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "volseg":
            return fail(_unexpected(error), 4)
        hint = f"pip install 'volseg[{_EXTRAS[package]}]'" if package in _EXTRAS else f"install {package}"
        text = f"this command needs the package {package}, which is not installed: {hint}"
        return fail(text, InputError.exit_code)
    except Exception as error:  # noqa: BLE001 - the last place: said in one line, and all of it where it was asked for
        return fail(_unexpected(error), 4)
    _print(json.dumps(document) if wants_json else text)
    return code


def _unexpected(error: Exception) -> str:
    if os.environ.get("VOLSEG_DEBUG"):
        # Not left to Python, which would print what nobody may read.
        print(redact(traceback.format_exc()), file=sys.stderr)
    reason = f"{type(error).__name__}: {' '.join(redact(str(error)).split())[:300]}"
    return f"unexpected {reason}; this is a bug of volseg: VOLSEG_DEBUG=1 shows where"


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
    with writing(choose(arguments.log, arguments.log_level)):
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
        _add_log_options(added)
        added.set_defaults(run=run)
        known[name] = added
        return added

    _add_data_commands(command)
    _add_job_commands(command)
    _add_model_commands(command)
    add_job_commands(command)
    add_kube_command(command)
    _add_result_commands(command)
    return parser, known


def _add_log_options(parser: Parser) -> None:
    parser.add_argument(
        "--log", metavar="MODE",
        help=f"events on stderr: text, json (a line each), auto (json in a cluster's job) [default: {MODE}, else auto]",
    )  # fmt: skip
    parser.add_argument(
        "--log-level", metavar="LEVEL",
        help=f"least level of events: debug, info, warning, error [default: {LEVEL}, else info]",
    )  # fmt: skip


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
    add.usage = "volseg train [SPEC.yaml] [--recipe NAME] --image IMAGE --labels LABELS --out BUNDLE [options]"
    add.add_argument("--preview", metavar="OUT.png", help="draw changed training patches and train nothing")
    add_spec_options(add, TrainSpec, file_first=True)
    add = command("recipes", commands.run_recipes, "list the named trainings that ship with volseg, or explain one")
    add.add_argument("name", nargs="?", metavar="NAME", help="recipe to explain with all its options")
    for name, run, summary in (
        ("plan", commands.run_plan, "tell what a segmentation would cost, and refuse what cannot work"),
        ("segment", commands.run_segment, "segment a volume with a trained bundle"),
    ):
        add = command(
            name, run, summary,
            "The result does not depend on workers, blocks or interruptions; the same command resumes.",
        )  # fmt: skip
        add.usage = f"volseg {name} INPUT OUTPUT --model BUNDLE [options]"
        add_spec_options(add, SegmentSpec, positional=("input", "output"))
    add = command(
        "bench", commands.run_bench, "measure this machine and tell what a volume of a given size would take",
        "Segments a volume of noise in a temporary folder, which takes about a minute.",
    )  # fmt: skip
    add.usage = "volseg bench [MODEL] [--shape Z,Y,X] [--workers N] [--overlap F] [options]"
    add_spec_options(add, BenchSpec, positional=("model",))


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
    add.add_argument(
        "--slab-axis",
        choices=("z", "y", "x"),
        help="axis that the slabs of the interval are cut across [default: longest]",
    )
    add.add_argument(
        "--surface", metavar="TOLERANCE", nargs="?", type=float, const=True, default=False,
        help="measure surface distances; TOLERANCE of the surface Dice in the voxels' unit [default: one voxel]",
    )  # fmt: skip
    add.add_argument("--rand-class", metavar="N", type=int, help="class of membranes: adds the Rand score of ISBI 2012")
    add = command("overlay", commands.run_overlay, "draw three planes of an image with its labels as a PNG")
    add.add_argument("image", metavar="IMAGE", help="image volume")
    add.add_argument("labels", metavar="LABELS", help="label volume of the same shape")
    add.add_argument("out", metavar="OUT.png", help="picture to write")
    add.add_argument("--at", metavar="Z,Y,X", help="voxel where the planes cross [default: the centre]")
    add = command("demo", commands.run_demo, "run the whole job on a CT phantom with known truth")
    add.add_argument("folder", nargs="?", default="volseg-demo", metavar="FOLDER", help="where everything is written")
    add.add_argument("--max-minutes", type=float, default=2.0, metavar="F", help="time for training [default: 2]")
    add.add_argument("--seed", type=int, default=1, metavar="N", help="seed of phantom and training [default: 1]")


def _add_model_commands(command: _Command) -> None:
    add = command("model", model_commands.run_model, "tell what a bundle is: network, classes, data, scores")
    add.add_argument("bundle", metavar="BUNDLE", help="folder that `volseg train` wrote")
    add.add_argument("--picture", metavar="OUT.png", help="draw its predictions on validation slices, too")
    add.add_argument("--slices", type=int, default=3, metavar="N", help="slices of the picture [default: 3]")
    add.add_argument("--image", metavar="IMAGE", help="volume to predict [default: that of the training]")
    add.add_argument("--labels", metavar="LABELS", help="its labels [default: those of the training]")
    add.add_argument("--roi", metavar="RANGES", help="region the slices are from [default: the validation region]")
    add = command(
        "export", model_commands.run_export, "write a bundle's network for other programs",
        "It takes raw grey values and gives probabilities: scaling and activation are inside.",
    )  # fmt: skip
    add.add_argument("bundle", metavar="BUNDLE", help="folder that `volseg train` wrote")
    add.add_argument("out", metavar="OUT", help="file to write: .onnx, or .pt2 for torch.export")
    add.add_argument("--member", type=int, metavar="N", help="one network of an ensemble [default: the mean of all]")
    add.add_argument("--overwrite", action="store_true", help="replace a file that exists at OUT")
    add = command(
        "import-model", model_commands.run_import_model, "make a bundle of a network that was trained elsewhere",
        "The architecture is built in, one of MONAI's, or one that an installed package registers.",
    )  # fmt: skip
    add.add_argument(
        "description", metavar="DESCRIPTION.yaml", help="architecture, arguments, weights, classes, scaling"
    )
    add.add_argument("out", metavar="OUT", help="folder of the bundle that is written")
    add.add_argument("--overwrite", action="store_true", help="replace a bundle that exists at OUT")
    add = command(
        "tune", model_commands.run_tune, "measure the ways to run a bundle on this machine and keep the best",
        "The choice lies beside the bundle and holds for the same patch, batch, precision and kind of device; segment "
        "finds it there.",
    )  # fmt: skip
    add.add_argument("image", metavar="IMAGE", help="image volume whose patches are computed")
    add.add_argument("--model", required=True, metavar="BUNDLE", help="model bundle that is measured")
    add.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16", "auto"),
                     help="what segment will be asked for [default: fp32]")  # fmt: skip
    add.add_argument("--patch", metavar="Z,Y,X", help="network input z,y,x in voxels [default: the bundle's]")
    add.add_argument("--batch", type=int, metavar="N", help="patches a forward [default: 1 on CPUs, 4 on GPUs]")
    add.add_argument("--axis", metavar="LIST", help="axes of a 2D network, as segment takes them")
    add.add_argument("--roi", metavar="RANGES", help="region to take patches from [default: everything]")
    add.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="where the network runs [default: auto]"
    )
    add = command(
        "suggest", model_commands.run_suggest, "tell which slices or boxes are most worth labelling next",
        "By the network's uncertainty, and unlike each other and what is labelled already.",
    )  # fmt: skip
    add.add_argument("image", metavar="IMAGE", help="image volume")
    add.add_argument("--model", required=True, metavar="BUNDLE", help="bundle trained on what is labelled so far")
    add.add_argument("--n", type=int, default=3, metavar="N", help="how many [default: 3]")
    add.add_argument("--labels", metavar="LABELS", help="labels so far: labelled slices are left out")
    add.add_argument("--roi", metavar="RANGES", help="region to choose from [default: everything]")
    add.add_argument("--axis", metavar="A", help="axis that slices are cut across [default: the bundle's]")
    add.add_argument("--box", metavar="Z,Y,X", help="sides of boxes, for a 3D bundle [default: its patch]")
    add.add_argument("--workers", type=int, metavar="N", help="number of workers [default: one a GPU or core]")


def _formatter() -> Any:
    import argparse

    return argparse.RawDescriptionHelpFormatter


def _fail(message: str, code: int, *, log: Log, wants_json: bool, report: dict[str, Any] | None = None) -> int:
    if wants_json:
        document = {"status": "error", "error": message, "exit_code": code}
        _print(json.dumps(document | ({"report": report} if report else {})))
    if log.json:
        log.write(Line(message, "failed", "error", exit_code=code))
    else:
        print(f"volseg: {message}", file=sys.stderr)
    return code
