"""Choosing dimension, network, patch and batch where the user leaves them open: plain arithmetic from shapes and sizes.

The rules are those of nnU-Net (Isensee et al. 2021) in short: axes with coarse voxels are pooled later, patches cover
as much as the budget of one step allows, and levels end where a patch has become small. The size of the network, and in
the end its dimension, follow from the time as well: a small network that sees enough patches beats a large one that
does not. Measured on two cores in two to four minutes: pores in nano-CT 0.54 with 16 to 256 channels and 0.79 with 8 to
128; bone, muscle and gut in a CT 0.32 with a 3D network and 0.73 with a 2D one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log2
from typing import Any, Literal

from pydantic import ValidationError

from volseg.errors import PlanError, SpecError, nearest
from volseg.geometry.box import Triple
from volseg.models.config import NetworkConfig, to_network, to_volume
from volseg.models.measure import complete
from volseg.models.registry import architecture
from volseg.spec import TrainSpec

_SIDE = {2: 256, 3: 64}
_BATCH = {2: 4, 3: 2}
# Networks to choose from, the largest first: channels of the finest level, and whether that is only a stem.
_SIZES = ((32, False), (16, False), (8, False), (8, True))
_LEVELS = {2: 5, 3: 4}
# Steps that a network needs to get near what it can do; forward and backward of a step cost three forwards.
_ENOUGH = 2000
# Measured on a CT of a body: after 1,300 steps a small 3D network does as well as a 2D one that has learnt what slices
# tell. Where this was measured, steps were slower than they are taken to be here; on most machines more of them fit.
_ENOUGH_FOR_VOLUMES = 1000
_STEP_COST = 3
# Without a limit of time, a training may take about as long.
_USUAL_SECONDS = 3600.0
_UNLIMITED = 1 << 62
# The coarsest level keeps at least this many voxels a side.
_SMALLEST = 4
# Voxels so much longer than wide are better taken slice by slice; so are regions of so few slices.
_ANISOTROPIC = 3.0
_FEW_SLICES = 16
# Of the slices that a region spans, the share that must hold labels for a network to learn from their neighbours.
_LABELLED = 0.5

# Options of every training by the name that an architecture may have for them.
_ARGUMENTS = {
    "widths": "widths",
    "pools": "pools",
    "convs": "convs_per_level",
    "activation": "activation",
    "norm": "norm",
    "dropout": "dropout",
}


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What planning needs to know of the data: training regions (z, y, x), voxel size, channels in, channels out."""

    regions: tuple[Triple, ...]
    voxel_size: tuple[float, float, float] | None
    channels: int
    outputs: int
    init: Mapping[str, Any] | None = None
    """Arguments of the network that the training starts from."""

    @property
    def region(self) -> Triple:
        """Sides that some region has along each axis."""
        z, y, x = (max(sides) for sides in zip(*self.regions, strict=True))
        return z, y, x


@dataclass(frozen=True, slots=True)
class Means:
    """What a training has to work with: bytes of one worker, floating-point operations a second of all together."""

    memory: int
    speed: float
    workers: int = 1


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What a training will do: the network, its patch and the patch's answer (network coordinates), patches a step."""

    config: NetworkConfig
    patch: Triple
    batch: int

    @property
    def answer(self) -> Triple:
        """Sides of the patch that the network answers for: smaller than the patch without padding."""
        a, b, c = (side - 2 * m for side, m in zip(self.patch, self.config.margin, strict=True))
        return a, b, c

    def training_bytes(self, parts: int = 1) -> int:
        """Estimate the memory of one step in `parts`: what the forward keeps for the backward, and as much again."""
        # A convolution's output, the normalised copy, their gradients; the weights with both moments of the optimiser.
        kept = self.config.convolved_values(self.patch) * -(-self.batch // parts)
        return 4 * 4 * kept + 16 * self.config.parameter_count

    def step_flops(self) -> float:
        """Estimate the floating-point operations of one step."""
        return float(_STEP_COST * self.batch * self.config.flops(self.patch))


def choose_dims(spec: TrainSpec, facts: DataFacts, labelled: float, means: Means) -> Literal[2, 3]:
    """Choose between slices (2) and volumes (3) where `spec` leaves it open.

    Slices suit coarse voxels along their axis, few slices, and labels on less than half of the slices (`labelled` is
    their share in the training regions); and where the time is too short for the smallest network in 3D.
    """
    if spec.dims is not None:
        return spec.dims
    depth = facts.region["zyx".index(spec.axis)]
    size = facts.voxel_size
    coarse = size is not None and max(size) >= _ANISOTROPIC * min(size)
    if coarse or depth < _FEW_SLICES or labelled < _LABELLED:
        return 2
    # Who names a patch or pools of three axes wants them all.
    if spec.patch is not None or spec.pools is not None:
        return 3
    plan = make_plan(spec.model_copy(update={"dims": 3}), facts, means)
    return 3 if _is_enough(spec, plan, means, _ENOUGH_FOR_VOLUMES) else 2


def make_plan(spec: TrainSpec, facts: DataFacts, means: Means) -> TrainPlan:
    """Choose what `spec`, whose dims are settled, leaves open.

    Of the sizes of networks the largest that the time allows; the step's patches are shared by the workers. Raises
    PlanError where a given patch does not fit region or network or nothing fits the memory, SpecError where the
    network's options clash.
    """
    plan = _plan_of(spec, facts, means, _SIZES[-1])
    if _is_open(spec, facts):
        for size in _SIZES[:-1]:
            larger = _plan_of(spec, facts, replace(means, memory=_UNLIMITED), size)
            if _is_enough(spec, larger, means) and larger.training_bytes(_parts(spec, means)) <= means.memory:
                return larger
    return plan


def _plan_of(spec: TrainSpec, facts: DataFacts, means: Means, size: tuple[int, bool]) -> TrainPlan:
    """Return the plan with a network of `size`, where that is open."""
    region = to_network(facts.region, spec.axis) if spec.flat else facts.region
    aspect = _aspect(spec, facts.voxel_size)
    wanted = _given_patch(spec) or _open_patch(spec, region, aspect)
    config = _make_config(spec, _levels(spec, wanted, aspect, size), facts)
    patch = _check_patch(spec, wanted, region, config) if spec.patch is not None else _fit_patch(wanted, config)
    batch = spec.batch or max(_BATCH[2 if spec.flat else 3], means.workers)
    return _fit_memory(spec, TrainPlan(config, patch, batch), means.memory, _parts(spec, means))


def _is_open(spec: TrainSpec, facts: DataFacts) -> bool:
    """Whether the size of the network is to be planned."""
    return spec.architecture == "unet" and spec.widths is None and facts.init is None


def _is_enough(spec: TrainSpec, plan: TrainPlan, means: Means, steps: int = _ENOUGH) -> bool:
    """Whether the time allows so many `steps`, or as many as are wanted at most."""
    seconds = 60 * spec.max_minutes if spec.max_minutes is not None else _USUAL_SECONDS
    if spec.folds is not None and spec.max_minutes is not None:
        seconds /= spec.folds
    return seconds * means.speed >= min(steps, spec.most_steps) * plan.step_flops()


def _parts(spec: TrainSpec, means: Means) -> int:
    return spec.accumulate * means.workers


def _aspect(spec: TrainSpec, voxel_size: tuple[float, float, float] | None) -> tuple[float, float, float]:
    """Return voxel sizes in network coordinates, the smallest in use as 1."""
    if voxel_size is None:
        return 1.0, 1.0, 1.0
    if not spec.flat:
        finest = min(voxel_size)
        a, b, c = (v / finest for v in voxel_size)
        return a, b, c
    rest = [v for v, axis in zip(voxel_size, "zyx", strict=True) if axis != spec.axis]
    return 1.0, rest[0] / min(rest), rest[1] / min(rest)


def _given_patch(spec: TrainSpec) -> Triple | None:
    if spec.patch is None:
        return None
    patch = to_network(spec.patch, spec.axis) if spec.flat else spec.patch
    if spec.flat and patch[0] != 1:
        raise PlanError(
            f"patch {spec.patch} has {patch[0]} slices along {spec.axis}, but a 2D network takes one at a time; "
            f"nothing was trained: use {to_volume((1, *patch[1:]), spec.axis)}, or --dims 3"
        )
    return patch


def _open_patch(spec: TrainSpec, region: Triple, aspect: tuple[float, float, float]) -> Triple:
    side = spec.side or _SIDE[2 if spec.flat else 3]
    first = 1 if spec.flat else _power(side / aspect[0])
    return min(first, region[0]), min(_power(side / aspect[1]), region[1]), min(_power(side / aspect[2]), region[2])


def _power(value: float) -> int:
    """Return the power of two nearest to `value`, at least 8."""
    return int(max(8, 2 ** round(log2(value))))


def _levels(
    spec: TrainSpec, patch: Triple, aspect: tuple[float, float, float], size: tuple[int, bool]
) -> dict[str, Any]:
    """Return widths, pools and stem of a U-Net of `size` for `patch` as far as they are open.

    Each level halves the axes whose voxels are the finest by then, while the patch has enough of them.
    """
    first, stem = size
    stem = stem and spec.widths is None
    count = _LEVELS[2 if spec.flat else 3] + (stem and not spec.flat)
    widths = spec.widths or tuple(first << level for level in range(count))
    if spec.pools is not None:
        return {"widths": widths[: len(spec.pools) + 1], "stem": stem}
    sides, spacing = list(patch), list(aspect)
    pools: list[Triple] = []
    for _ in widths[1:]:
        live = [i for i in range(3) if (i or not spec.flat) and sides[i] >= 2 * _SMALLEST]
        finest = min((spacing[i] for i in live), default=0)
        factors = [2 if i in live and spacing[i] < 2 * finest else 1 for i in range(3)]
        if spec.widths is None and max(factors) == 1:
            break
        pools.append((factors[0], factors[1], factors[2]))
        sides = [s // f for s, f in zip(sides, factors, strict=True)]
        spacing = [s * f for s, f in zip(spacing, factors, strict=True)]
    return {"widths": widths[: len(pools) + 1], "pools": tuple(pools), "stem": stem}


def _make_config(spec: TrainSpec, levels: dict[str, Any], facts: DataFacts) -> NetworkConfig:
    kind = architecture(spec.architecture).config
    given = {option: getattr(spec, option) for option in _ARGUMENTS if getattr(spec, option) is not None}
    if "pools" in given and spec.flat:
        given["pools"] = tuple(to_network(pool, spec.axis) for pool in given["pools"])
    unknown = [option for option in given if _ARGUMENTS[option] not in kind.model_fields]
    unknown += [f"network.{name}" for name in spec.network if name not in kind.model_fields]
    if unknown:
        hint = nearest(unknown[0].removeprefix("network."), kind.model_fields)
        raise SpecError(
            f"architecture {spec.architecture} has no option {unknown[0]}{hint}; nothing was trained: leave it out, or "
            "choose another architecture"
        )
    planned = facts.init if facts.init is not None else levels if spec.architecture == "unet" else {}
    values: dict[str, Any] = {
        **planned,
        **{_ARGUMENTS[option]: value for option, value in given.items()},
        **spec.network,
        "dims": 2 if spec.flat else 3,
        "in_channels": facts.channels,
        "out_channels": facts.outputs,
    }
    try:
        return complete(spec.architecture, kind.model_validate(values))
    except ValidationError as error:
        faults = "; ".join(str(e["msg"]).removeprefix("Value error, ") for e in error.errors())
        raise SpecError(f"the network cannot be built: {faults}; nothing was trained") from None


def _check_patch(spec: TrainSpec, patch: Triple, region: Triple, config: NetworkConfig) -> Triple:
    """Return the given `patch`; raises PlanError where network or region cannot take it."""

    def shown(triple: Triple) -> str:
        sides = to_volume(triple, spec.axis) if spec.flat else triple
        return ",".join(str(side) for side in sides)

    lower, upper = config.fit(patch, up=False), config.fit(patch, up=True)
    if patch not in {lower, upper}:
        other = f" or {shown(upper)}" if upper != lower else ""
        rule = f"is no multiple of the pooling factor {shown(config.pooling)}"
        if config.phase != (0, 0, 0):
            rule = "is none that this unpadded network takes"
        raise PlanError(
            f"patch {shown(patch)} {rule}: its levels would not fit together again; nothing was trained: use "
            f"{shown(lower)}{other}"
        )
    largest = config.fit(_grown(region, config), up=True)
    if any(side > most for side, most in zip(patch, largest, strict=True)):
        fitting = tuple(min(side, most) for side, most in zip(patch, largest, strict=True))
        raise PlanError(
            f"patch {shown(patch)} is larger than the training region {shown(region)}: the network would learn from "
            f"repeated borders; nothing was trained: use {shown((fitting[0], fitting[1], fitting[2]))}"
        )
    return patch


def _fit_patch(answer: Triple, config: NetworkConfig) -> Triple:
    """Return the network's input sides whose answer is nearest to `answer`."""
    wanted = _grown(answer, config)
    lower, upper = config.fit(wanted, up=False), config.fit(wanted, up=True)
    # A region that is a little smaller than a patch is better filled up than cut down.
    z, y, x = (up if up - side <= side - down else down for down, side, up in zip(lower, wanted, upper, strict=True))
    return z, y, x


def _grown(sides: Triple, config: NetworkConfig) -> Triple:
    a, b, c = (side + 2 * m for side, m in zip(sides, config.margin, strict=True))
    return a, b, c


def _fit_memory(spec: TrainSpec, plan: TrainPlan, memory: int, parts: int) -> TrainPlan:
    while plan.training_bytes(parts) > memory:
        smaller = _smaller(plan) if spec.patch is None else None
        if smaller is None:
            needed = plan.training_bytes(parts) / 2**30
            raise PlanError(
                f"training with patch {plan.patch} and batch {plan.batch} needs about {needed:.2g} GiB, "
                f"{memory / 2**30:.2g} GiB are to be had; nothing was trained: choose a smaller --patch, --batch or "
                "--widths, or take the batch in more parts (--accumulate)"
            )
        plan = smaller
    return plan


def _smaller(plan: TrainPlan) -> TrainPlan | None:
    """Halve the longest side of the patch as far as the network lets it be."""
    config = plan.config
    for i in sorted(range(3), key=lambda i: -plan.patch[i]):
        a, b, c = (side // 2 if j == i else side for j, side in enumerate(plan.patch))
        patch = config.fit((a, b, c), up=True)
        if patch[i] < plan.patch[i]:
            return TrainPlan(config, patch, plan.batch)
    return None
