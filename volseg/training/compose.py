"""From a spec and its data to what a rank trains: dimension, plan, task."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from volseg.errors import PlanError, SpecError
from volseg.journal import Note
from volseg.models.manifest import read_manifest
from volseg.models.registry import architecture, build
from volseg.spec import TrainSpec
from volseg.training.augment import Augmentation
from volseg.training.data import Data, volume_shape
from volseg.training.greys import measure_greys
from volseg.training.index import count_slices
from volseg.training.initial import settle_init, start_from
from volseg.training.losses import balanced_weights, deep_supervision_loss, make_loss
from volseg.training.planning import DataFacts, Means, TrainPlan, choose_dims, make_plan
from volseg.training.sampler import Sampler
from volseg.training.schedule import make_schedule
from volseg.training.site import Site
from volseg.training.sources import open_sources
from volseg.training.strengths import augmentation_for
from volseg.training.task import Context, Task
from volseg.training.validate import Setting, Validator
from volseg.training.view import NetworkView, TileCache

# Floating-point operations a second that training reaches on small networks, about: what is planned must not depend on
# the hour. 2D and 3D networks of 8 and 16 channels, AVX2, one thread: 1.6e10 to 4e10 (measured).
_THREAD_SPEED = 3e10
_GPU_SPEED = 5e12


def settle(spec: TrainSpec, site: Site, before: Literal[2, 3] | None = None) -> TrainSpec:
    """Return `spec` with its dims chosen where they were left open, and the architecture of the bundle it starts from.

    `before` are the dims of an earlier attempt, which this one goes on with. Raises what opening volumes and bundle
    raises.
    """
    spec = settle_init(spec)
    if spec.dims is not None:
        return spec
    if before is not None:
        return spec.model_copy(update={"dims": before})
    sources = open_sources(spec)
    cache = TileCache(1 << 28, 1 << 28)
    axis = "zyx".index(spec.axis)
    counts = [count_slices(NetworkView(s.labelled, "z", cache), s.train, spec.ignore)[axis] for s in sources]
    slices = sum(box.shape[axis] for s in sources for box in s.train)
    labelled = sum(int(np.count_nonzero(rows)) for rows in counts) / max(slices, 1)
    image = sources[0].image
    shapes = tuple(box.shape for s in sources for box in s.train)
    facts = DataFacts(shapes, image.voxel_size, image.channels or 1, 1)
    return spec.model_copy(update={"dims": choose_dims(spec, facts, labelled, means_of(site))})


def means_of(site: Site) -> Means:
    """Return what all ranks together have to work with, each as much as this one."""
    speed = _GPU_SPEED if site.device.type == "cuda" else _THREAD_SPEED * site.threads
    return Means(site.memory, speed * site.group.world, site.group.world)


def plan_for(spec: TrainSpec, data: Data, site: Site) -> TrainPlan:
    """Return the plan for this rank's memory; raises PlanError and SpecError."""
    if isinstance(spec.class_weights, tuple) and len(spec.class_weights) != len(data.names):
        raise SpecError(
            f"{len(spec.class_weights)} class_weights, {len(data.names)} classes ({', '.join(data.names)}): give one "
            "a class, the background's first; nothing was trained"
        )
    facts = DataFacts(
        regions=tuple(volume_shape(spec, region.box) for region in data.train),
        voxel_size=data.images[0].voxel_size,
        channels=data.images[0].channels or 1,
        outputs=1 if len(data.names) == 2 else len(data.names),
        init=read_manifest(spec.init).arguments if spec.init is not None else None,
    )
    return make_plan(spec, facts, means_of(site))


def check_shares(plan: TrainPlan, world: int) -> None:
    """Raise PlanError where `world` workers are more than the patches of a step."""
    if world > plan.batch:
        raise PlanError(
            f"a step of {plan.batch} patches cannot be shared by {world} workers, each needs one; nothing was trained: "
            f"say --batch {world} or more, or --workers {plan.batch}"
        )


def plan_values(plan: TrainPlan) -> dict[str, Any]:
    """Return `plan` as plain values, for a checkpoint."""
    return {"config": plan.config.model_dump(mode="json"), "patch": list(plan.patch), "batch": plan.batch}


def plan_from(spec: TrainSpec, values: dict[str, Any]) -> TrainPlan:
    """Return the plan that `plan_values` made values of."""
    z, y, x = values["patch"]
    return TrainPlan(
        architecture(spec.architecture).config.model_validate(values["config"]), (z, y, x), values["batch"]
    )


def describe(spec: TrainSpec, plan: TrainPlan, data: Data, world: int) -> str:
    """Say in a line what will be trained on how much."""
    config = plan.config
    sides = "x".join(str(side) for side in plan.patch if side > 1 or config.dims == 3)
    shared = f" over {world} workers" if world > 1 else ""
    text = (
        f"{config.dims}D {spec.architecture}, {config.parameter_count:,} weights; {plan.batch} patches of {sides} a "
        f"step{shared}, learning rate {spec.learning_rate:g}; {int(data.index.totals.sum()):,} labelled voxels"
    )
    return text if data.val else text + "; no validation region: the last weights will be kept"


def make_network(spec: TrainSpec, data: Data, plan: TrainPlan, say: Note) -> nn.Module:
    """Return the network that a training starts from: random weights, or those of the bundle that `spec` names."""
    network = build(spec.architecture, plan.config)
    if spec.init is not None:
        say(start_from(network, spec.init, data.names, plan.config.in_channels))
    return network


def planned_augmentation(spec: TrainSpec, data: Data) -> Augmentation | None:
    """Return how patches are changed, None where they are not."""
    if not spec.augment:
        return None
    greys = measure_greys(data.train, data.index)
    return augmentation_for(spec, data.images[0].voxel_size, data.index, greys)


def make_task(spec: TrainSpec, data: Data, plan: TrainPlan, context: Context, network: nn.Module) -> Task:
    """Return what is trained, starting from `network`."""
    sigmoid = len(data.names) == 2
    validator = None
    if data.val:
        # One thread reads the next window while the GPU works on another's.
        threads = context.threads if context.device.type == "cpu" else 2
        setting = Setting(plan.patch, plan.config.margin, len(data.names), sigmoid, threads)
        validator = Validator(data.val, setting, context.group)
    weights = spec.class_weights
    if weights == "balanced":
        weights = balanced_weights(data.index.totals.tolist())
    loss = make_loss(
        # What binary cross entropy is for more than two classes.
        "ce" if spec.loss == "bce" and not sigmoid else spec.loss,
        sigmoid=sigmoid, gamma=spec.focal_gamma, beta=spec.tversky_beta,
        class_weights=torch.tensor(weights, device=context.device) if weights is not None else None,
    )  # fmt: skip
    return Task(
        network=network,
        sampler=Sampler(data, plan.patch, plan.answer, planned_augmentation(spec, data), spec.seed),
        validator=validator,
        loss=deep_supervision_loss(loss),
        schedule=make_schedule(spec.schedule, spec.learning_rate, warm_up=spec.warm_up, cycles=spec.cycles),
        sigmoid=sigmoid,
        batch=plan.batch,
        max_steps=spec.most_steps,
        max_seconds=spec.max_minutes * 60 if spec.max_minutes is not None else None,
        weight_decay=spec.weight_decay,
        seed=spec.seed,
        accumulate=spec.accumulate,
        validations=spec.validations,
        patience=spec.patience,
        average=spec.average,
        snapshots=spec.snapshots,
        sync_norm=spec.sync_norm,
    )
