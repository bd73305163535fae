"""Choosing dimension, network, patch and batch where the user leaves them open: plain arithmetic from shapes and sizes.

The rules are those of nnU-Net (Isensee et al. 2021) in short: axes with coarse voxels are pooled later, patches cover
as much as the budget of one step allows, and levels end where a patch has become small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log2
from typing import Any, Literal

from pydantic import ValidationError

from volseg.errors import PlanError, SpecError, nearest
from volseg.geometry.box import Triple
from volseg.models.config import NetworkConfig, to_network, to_volume
from volseg.models.measure import complete
from volseg.models.registry import architecture
from volseg.spec import TrainSpec
from volseg.training.augment import Augmentation
from volseg.training.greys import GreySpread
from volseg.training.index import LabelIndex

_SIDE = {2: 256, 3: 64}
_WIDTHS = {2: (16, 32, 64, 128, 256), 3: (16, 32, 64, 128)}
_BATCH = {2: 4, 3: 2}
# The coarsest level keeps at least this many voxels a side.
_SMALLEST = 4
# Voxels so much longer than wide are better taken slice by slice; so are regions of so few slices.
_ANISOTROPIC = 3.0
_FEW_SLICES = 16
# Of the slices that a region spans, the share that must hold labels for a network to learn from their neighbours.
_LABELLED = 0.5
# Above this share of the classes' entropy, place is taken to tell the class.
_PLACED = 0.12

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


def choose_dims(
    spec: TrainSpec, regions: Sequence[Triple], voxel_size: tuple[float, float, float] | None, labelled: float
) -> Literal[2, 3]:
    """Choose between slices (2) and volumes (3) where `spec` leaves it open.

    Slices suit coarse voxels along their axis, few slices, and labels on less than half of the slices (`labelled` is
    their share in the training regions).
    """
    if spec.dims is not None:
        return spec.dims
    depth = {axis: max(sides) for axis, sides in zip("zyx", zip(*regions, strict=True), strict=True)}[spec.axis]
    coarse = voxel_size is not None and max(voxel_size) >= _ANISOTROPIC * min(voxel_size)
    return 2 if coarse or depth < _FEW_SLICES or labelled < _LABELLED else 3


def make_plan(spec: TrainSpec, facts: DataFacts, memory: int, *, devices: int = 1) -> TrainPlan:
    """Choose what `spec`, whose dims are settled, leaves open.

    `memory` is what one training worker may take, in bytes; the step's patches are shared by `devices` of them. Raises
    PlanError where a given patch does not fit region or network or nothing fits the memory, SpecError where the
    network's options clash.
    """
    region = to_network(facts.region, spec.axis) if spec.flat else facts.region
    aspect = _aspect(spec, facts.voxel_size)
    wanted = _given_patch(spec) or _open_patch(spec, region, aspect)
    config = _make_config(spec, _levels(spec, wanted, aspect), facts)
    patch = _check_patch(spec, wanted, region, config) if spec.patch is not None else _fit_patch(wanted, config)
    batch = spec.batch or max(_BATCH[2 if spec.flat else 3], devices)
    return _fit_memory(spec, TrainPlan(config, patch, batch), memory, parts=spec.accumulate * devices)


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


def _levels(spec: TrainSpec, patch: Triple, aspect: tuple[float, float, float]) -> dict[str, Any]:
    """Return widths and pools of a U-Net for `patch` as far as they are open.

    Each level halves the axes whose voxels are the finest by then, while the patch has enough of them.
    """
    widths = spec.widths or _WIDTHS[2 if spec.flat else 3]
    if spec.pools is not None:
        return {"widths": widths}
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
    return {"widths": widths[: len(pools) + 1], "pools": tuple(pools)}


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


def augmentation_for(
    spec: TrainSpec, voxel_size: tuple[float, float, float] | None, index: LabelIndex, greys: GreySpread | None
) -> Augmentation:
    """Choose the changes that `spec` leaves open.

    Turns in planes of equal voxel sizes only, quarter turns where up is not up: where a voxel's place gives its class
    away, as in a body, a quarter turn would put organs where they never are: on such a volume leaving them out raised
    the Dice of muscle from 0.41 to 0.63 (measured). Grey values change about as much as those of one class do anyway.
    """
    how = spec.augmentation
    sizes = voxel_size or (1.0, 1.0, 1.0)
    if spec.flat:
        rest = [v for v, axis in zip(sizes, "zyx", strict=True) if axis != spec.axis]
        sizes = (float("inf"), rest[0], rest[1])
    pairs = [(a, b) for a, b in ((0, 1), (0, 2), (1, 2)) if abs(sizes[a] - sizes[b]) <= 0.1 * min(sizes[a], sizes[b])]
    quarter = [p for p in pairs if how.turns == "always" or (how.turns == "auto" and index.place_tells(p) < _PLACED)]
    between, within = (greys.between, greys.within) if greys else (0.1, 0.4)
    change = min(max(2 * between, 0.03), 0.5)

    def strength(given: float | None, planned: float) -> float:
        return planned if given is None else given

    return Augmentation(
        planes=tuple(pairs),
        quarter_turns=tuple(quarter),
        flips=((1, 2) if spec.flat else (0, 1, 2)) if how.flips else (),
        warp_probability=how.warp,
        angle=how.angle,
        zoom=how.zoom,
        shift=how.shift,
        elastic=how.elastic,
        intensity_probability=how.grey,
        gain=strength(how.contrast, change),
        offset=strength(how.brightness, change),
        field=strength(how.shading, change),
        gamma=strength(how.gamma, min(change, 0.3)),
        noise=strength(how.noise, min(max(0.3 * within, 0.02), 0.3)),
        blur=how.blur,
        rings=how.rings,
        drift=how.drift,
        rotation_axis=_rotation_axis(spec),
    )


def _rotation_axis(spec: TrainSpec) -> int:
    """Return where the volume's z, around which a tomogram is recorded, lies in network coordinates."""
    return 0 if not spec.flat or spec.axis == "z" else 1
