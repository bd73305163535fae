"""The bundle of a finished training: networks, manifest, metrics, curve."""

from __future__ import annotations

from importlib.metadata import version

from volseg.models.bundle import save_bundle
from volseg.models.config import to_volume
from volseg.models.manifest import BundleManifest, ClassInfo
from volseg.spec import TrainSpec
from volseg.storage import ome
from volseg.training.curve import draw_curve
from volseg.training.data import Data
from volseg.training.planning import TrainPlan
from volseg.training.task import Outcome


def write_bundle(spec: TrainSpec, data: Data, plan: TrainPlan, outcome: Outcome, seconds: float, metrics: bytes) -> str:
    """Write the bundle of `spec.out`, an ensemble where there are several networks, and return its digest.

    `metrics` is what becomes metrics.jsonl.
    """
    extra = {"metrics.jsonl": metrics}
    curve = draw_curve(outcome.rows)
    if curve is not None:
        extra["curve.png"] = curve
    manifest = _manifest(spec, data, plan, outcome, seconds)
    return save_bundle(spec.out, outcome.networks, manifest, extra=extra, overwrite=spec.overwrite).digest or ""


def _manifest(spec: TrainSpec, data: Data, plan: TrainPlan, outcome: Outcome, seconds: float) -> BundleManifest:
    # Those of the labels where they have any; elsewhere the ones that every picture of volseg uses.
    colours = {**dict(enumerate(ome.default_colours(len(data.names)))), **data.labels[0].colours}
    scores = outcome.scores
    image = data.images[0]
    return BundleManifest(
        architecture=spec.architecture,
        arguments=plan.config.model_dump(mode="json"),
        classes=tuple(
            ClassInfo(id=i, name=name, color="#{:02x}{:02x}{:02x}".format(*colours[i][:3]))
            for i, name in enumerate(data.names)
        ),
        activation="softmax" if outcome.threshold is None else "sigmoid",
        threshold=outcome.threshold,
        class_bias=outcome.class_bias,
        scaling=data.scaling,
        voxel_size=image.voxel_size,
        unit=image.unit,
        patch=to_volume(plan.patch, spec.axis) if spec.flat else plan.patch,
        axis=spec.axis,
        provenance={
            "spec": spec.model_dump(mode="json"),
            "images": [volume.identity() for volume in data.images],
            "labels": [volume.identity() for volume in data.labels],
            "labelled_voxels": dict(zip(data.names, data.index.totals.tolist(), strict=True)),
            "weights": outcome.weights,
            "steps": outcome.steps,
            "seconds": round(seconds, 1),
            "validation_dice": dict(zip(data.names, scores.dice, strict=True)) if scores else None,
            "validation_accuracy": scores.accuracy if scores else None,
            "versions": {name: version(name) for name in ("volseg", "torch", "numpy")},
        },
    )
