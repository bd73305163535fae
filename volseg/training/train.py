"""`train`: from a spec to a bundle. Opens the data, plans, runs the loop in this process, saves the bundle."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from volseg.errors import OutputExistsError, SpecError
from volseg.models.allocator import keep_freed_memory
from volseg.models.bundle import save_bundle
from volseg.models.config import to_volume
from volseg.models.manifest import MANIFEST_NAME, BundleManifest, ClassInfo
from volseg.models.registry import build
from volseg.spec import TrainSpec
from volseg.storage import files, ome
from volseg.training.checkpoint import Workplace, check_same
from volseg.training.curve import draw_curve
from volseg.training.data import Data, open_data, volume_shape
from volseg.training.greys import measure_greys
from volseg.training.loop import Context, Outcome, Task, fit
from volseg.training.planning import TrainPlan, augmentation_for, make_plan
from volseg.training.progress import ProgressCallback, TrainProgress, TrainResult
from volseg.training.sampler import Sampler
from volseg.training.validate import Validator

Note = Callable[[str], None]


def train(spec: TrainSpec, progress: ProgressCallback | None = None, note: Note | None = None) -> TrainResult:
    """Train a network as `spec` says and write its bundle to `spec.out`.

    `progress` is called about twice a second, `note` with single lines that the user should see. Killed at any time,
    the same call goes on from the last checkpoint in ``<out>.training``, and the time that was used counts. Raises
    kinds of InputError before anything is trained, JobError where the training diverges, JobInterrupted on Ctrl-C.
    """
    started = time.monotonic()
    say = note or (lambda _: None)
    _check_out(spec)
    data = open_data(spec, say)
    workplace = Workplace.beside(spec.out)
    stored = _stored(spec, workplace, say)
    sigmoid = len(data.names) == 2
    plan = make_plan(
        spec, volume_shape(spec, data.train.box), data.image.voxel_size, data.image.channels or 1,
        1 if sigmoid else len(data.names), int(psutil.virtual_memory().available * 0.8),
    )  # fmt: skip
    say(_describe(plan, data))
    context = _context(spec, workplace, progress, started, stored)
    before = torch.get_num_threads()
    try:
        keep_freed_memory()
        torch.set_num_threads(1)
        torch.manual_seed(spec.seed)
        outcome = fit(_task(spec, data, plan, context), context, stored)
    finally:
        torch.set_num_threads(before)
    return _finish(spec, data, plan, outcome, context, stored)


def _check_out(spec: TrainSpec) -> None:
    if not files.exists(spec.out):
        return
    if not files.exists(files.join(spec.out, MANIFEST_NAME)):
        raise OutputExistsError(
            f"{spec.out} exists and is no model bundle, so it will not be replaced; nothing was trained: choose "
            "another --out"
        )
    if not spec.overwrite:
        raise OutputExistsError(
            f"{spec.out} exists; nothing was trained: choose another --out, or say --overwrite to replace the bundle"
        )


def _stored(spec: TrainSpec, workplace: Workplace, say: Note) -> dict[str, Any] | None:
    if not spec.resume:
        workplace.remove()
        return None
    stored = workplace.load()
    if stored is not None:
        check_same(spec, stored["spec"])
        say(f"going on from step {stored['step']} after {stored['seconds']:.0f} s of training")
    return stored


def _task(spec: TrainSpec, data: Data, plan: TrainPlan, context: Context) -> Task:
    sigmoid = len(data.names) == 2
    augmentation = None
    if spec.augment:
        augmentation = augmentation_for(spec, data.image.voxel_size, data.index, measure_greys(data.train, data.index))
    validator = None
    if data.val is not None:
        validator = Validator(data.val, plan.patch, len(data.names), sigmoid=sigmoid, threads=context.threads)
    return Task(
        network=build("unet", plan.config),
        sampler=Sampler(data.train, data.index, plan.patch, augmentation, spec.seed),
        validator=validator,
        sigmoid=sigmoid,
        batch=plan.batch,
        max_steps=spec.max_steps,
        max_seconds=spec.max_minutes * 60 if spec.max_minutes is not None else None,
        learning_rate=spec.learning_rate,
        weight_decay=spec.weight_decay,
        seed=spec.seed,
    )


def _context(
    spec: TrainSpec,
    workplace: Workplace,
    progress: ProgressCallback | None,
    started: float,
    stored: dict[str, Any] | None,
) -> Context:
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise SpecError("--device cuda: no GPU can be used here; nothing was trained: say --device cpu, or auto")
    device = torch.device("cuda" if spec.device != "cpu" and torch.cuda.is_available() else "cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    told: list[TrainProgress] = []

    def report(now: TrainProgress) -> None:
        told[:] = [now]
        if progress is not None:
            progress(now)

    return Context(
        device=device,
        threads=spec.workers or cores if device.type == "cpu" else 1,
        low_precision=spec.precision == "bf16" or (spec.precision == "auto" and _fast_bf16(device)),
        save=lambda state: workplace.save(state | {"spec": spec.model_dump(mode="json")}),
        report=report,
        record=workplace.write_metrics,
        started=started,
        spent=float(stored["seconds"]) if stored else 0.0,
    )


def _fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    # Without these instructions bf16 is emulated and slower than fp32.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name)()) for name in names if hasattr(torch.cpu, name))


def _finish(
    spec: TrainSpec,
    data: Data,
    plan: TrainPlan,
    outcome: Outcome,
    context: Context,
    stored: dict[str, Any] | None,
) -> TrainResult:
    workplace = Workplace.beside(spec.out)
    threshold = (outcome.scores.threshold if outcome.scores else 0.5) if len(data.names) == 2 else None
    extra = {"metrics.jsonl": workplace.write_metrics(outcome.rows)}
    curve = draw_curve(outcome.rows)
    if curve is not None:
        extra["curve.png"] = curve
    manifest = _manifest(spec, data, plan, outcome, threshold, context.seconds)
    saved = save_bundle(spec.out, outcome.network, manifest, extra=extra, overwrite=spec.overwrite)
    workplace.remove()
    dice = dict(zip(data.names, outcome.scores.dice, strict=True)) if outcome.scores else None
    return TrainResult(
        bundle=files.absolute(spec.out),
        digest=saved.digest or "",
        steps=outcome.steps,
        seconds=round(context.seconds, 2),
        resumed_from=int(stored["step"]) if stored else 0,
        dice=dice,
        mean_foreground_dice=outcome.scores.mean_foreground if outcome.scores else None,
        weights=outcome.weights,
        threshold=threshold,
        steps_per_second=round(outcome.steps_per_second, 3),
        data_wait=round(outcome.data_wait, 4),
    )


def _manifest(
    spec: TrainSpec, data: Data, plan: TrainPlan, outcome: Outcome, threshold: float | None, seconds: float
) -> BundleManifest:
    from importlib.metadata import version

    # Those of the labels where they have any; elsewhere the ones that every picture of volseg uses.
    colours = {**dict(enumerate(ome.default_colours(len(data.names)))), **data.labels.colours}
    scores = outcome.scores
    return BundleManifest(
        architecture="unet",
        arguments=plan.config.model_dump(mode="json"),
        classes=tuple(
            ClassInfo(id=i, name=name, color="#{:02x}{:02x}{:02x}".format(*colours[i][:3]))
            for i, name in enumerate(data.names)
        ),
        activation="softmax" if threshold is None else "sigmoid",
        threshold=threshold,
        scaling=data.train.scaling,
        voxel_size=data.image.voxel_size,
        unit=data.image.unit,
        patch=to_volume(plan.patch, spec.axis) if spec.dims == 2 else plan.patch,
        axis=spec.axis,
        provenance={
            "spec": spec.model_dump(mode="json"),
            "image": data.image.identity(),
            "labels": data.labels.identity(),
            "labelled_voxels": dict(zip(data.names, data.index.totals.tolist(), strict=True)),
            "weights": outcome.weights,
            "steps": outcome.steps,
            "seconds": round(seconds, 1),
            "validation_dice": dict(zip(data.names, scores.dice, strict=True)) if scores else None,
            "versions": {name: version(name) for name in ("volseg", "torch", "numpy")},
        },
    )


def _describe(plan: TrainPlan, data: Data) -> str:
    config = plan.config
    sides = "x".join(str(side) for side in plan.patch if side > 1 or config.dims == 3)
    text = (
        f"{config.dims}D U-Net {'-'.join(map(str, config.widths))}, {config.parameter_count:,} weights; "
        f"{plan.batch} patches of {sides} a step; {int(data.index.totals.sum()):,} labelled voxels"
    )
    return text if data.val else text + "; no validation region: the last weights will be kept"
