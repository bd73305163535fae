"""The commands around bundles and labels: what a bundle is, what leaves and enters it, what to label next."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from volseg.cli import show
from volseg.cli.commands import Result, parse_names, parse_sides
from volseg.cli.progress import ProgressLine
from volseg.errors import InputError

_SUFFIXES = {".onnx": "export_onnx", ".pt2": "export_program"}


def run_model(arguments: argparse.Namespace) -> Result:
    """`volseg model`."""
    from volseg import api

    result = api.describe_model(arguments.bundle)
    if arguments.picture is not None:
        image, labels, roi = _data_of(arguments, result)
        result["picture"] = api.draw_predictions(
            arguments.bundle, image, arguments.picture, labels=labels, roi=roi, count=arguments.slices
        )
    return result, show.model(result), 0


def _data_of(arguments: argparse.Namespace, model: dict[str, Any]) -> tuple[str, str | None, str | None]:
    """Return image, labels and region to draw: those given, else those that the bundle was validated on."""
    spec = model["provenance"].get("spec", {})
    if arguments.image is not None:
        return arguments.image, arguments.labels, arguments.roi
    if not spec:
        raise InputError("the bundle does not say what it was trained on; nothing was drawn: name an --image")
    regions = spec.get("val_roi") or spec.get("train_roi") or [None]
    # Of several boxes the first one is enough to look at.
    region = arguments.roi or (regions[0].split("+")[0] if regions[0] else None)
    same = spec.get("offset") is None
    return spec["image"][0], arguments.labels or (spec["labels"][0] if same else None), region


def run_export(arguments: argparse.Namespace) -> Result:
    """`volseg export`."""
    suffix = Path(arguments.out).suffix
    if suffix not in _SUFFIXES:
        raise InputError(
            f"{arguments.out} has suffix {suffix!r}: the suffix says the format, .onnx or .pt2 (torch.export); nothing "
            "was written"
        )
    from volseg.models import export

    write = getattr(export, _SUFFIXES[suffix])
    result = write(arguments.bundle, arguments.out, member=arguments.member, overwrite=arguments.overwrite)
    return result, show.exported(result), 0


def run_import_model(arguments: argparse.Namespace) -> Result:
    """`volseg import-model`."""
    from volseg.cli.options import load_yaml
    from volseg.models.foreign import ForeignNetwork, import_network

    given = ForeignNetwork.read(load_yaml(arguments.description))
    manifest = import_network(arguments.out, given, overwrite=arguments.overwrite)
    result = {"bundle": arguments.out, "digest": manifest.digest, "architecture": manifest.architecture}
    return result, show.table(result), 0


def run_tune(arguments: argparse.Namespace) -> Result:
    """`volseg tune`."""
    from volseg import api

    with ProgressLine("tune", "candidates") as line:
        result = api.tune(
            arguments.image, model=arguments.model, note=line.note, precision=arguments.precision,
            device=arguments.device, patch=parse_sides(arguments.patch, "--patch"), batch=arguments.batch,
            axis=parse_names(arguments.axis), roi=arguments.roi,
        )  # fmt: skip
    return result, show.tuned(result), 0


def run_suggest(arguments: argparse.Namespace) -> Result:
    """`volseg suggest`."""
    from volseg import api

    with ProgressLine("suggest", "boxes") as line:
        result = api.suggest(
            arguments.image, model=arguments.model, n=arguments.n, labels=arguments.labels,
            box=parse_sides(arguments.box, "--box"), progress=line.update, roi=arguments.roi,
            axis=parse_names(arguments.axis), workers=arguments.workers,
        )  # fmt: skip
    return result, show.suggested(result), 0
