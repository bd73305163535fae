"""What every network says of itself before it is built: allowed inputs, size, cost. Needs no torch, so plans can ask.

Network coordinates are (slice axis, rows, columns) for a 2D network and (z, y, x) for a 3D one; a 2D network's patches
have depth 1. `to_network` and `to_volume` change between them and volume coordinates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from math import prod
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from volseg.errors import BundleError
from volseg.geometry.box import AXES, Triple
from volseg.models.footprint import peak_bytes
from volseg.models.program import Program, group_count
from volseg.models.sides import Allowed

Axis = Literal["z", "y", "x"]


def to_network(triple: Triple, axis: Axis) -> Triple:
    """Put the slice axis of a volume's (z, y, x) first: ``(256, 1, 256)`` along y becomes ``(1, 256, 256)``."""
    i = AXES.index(axis)
    a, b, c = (triple[i], *(triple[j] for j in range(3) if j != i))
    return a, b, c


def to_volume(triple: Triple, axis: Axis) -> Triple:
    """Undo `to_network`: put the first entry back at the slice axis of the volume."""
    rest = list(triple[1:])
    rest.insert(AXES.index(axis), triple[0])
    a, b, c = rest
    return a, b, c


class NetworkConfig(BaseModel, ABC):
    """Arguments of an architecture, and what follows from them; all triples are in network coordinates.

    An input side n is allowed on an axis when ``n >= smallest and (n - phase) % pooling == 0``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dims: Literal[2, 3] = 3
    in_channels: int = Field(1, ge=1, le=256)
    out_channels: int = Field(2, ge=1, le=65535)

    @property
    @abstractmethod
    def pooling(self) -> Triple:
        """Step from one allowed side to the next: the total pooling factor."""

    @property
    @abstractmethod
    def phase(self) -> Triple:
        """Remainder of an allowed side over `pooling`; 0 for padded networks."""

    @property
    @abstractmethod
    def smallest(self) -> Triple:
        """Smallest allowed sides."""

    @property
    @abstractmethod
    def margin(self) -> Triple:
        """Voxels by which the answer is smaller than the input at each end; 0 for padded networks."""

    @property
    @abstractmethod
    def receptive_field(self) -> Triple:
        """Voxels to each side on which one answer depends.

        The statistics that instance and group normalisation take of the whole patch are not counted.
        """

    @property
    @abstractmethod
    def parameter_count(self) -> int:
        """Number of trained values."""

    @property
    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes of all stored tensors."""

    @abstractmethod
    def flops(self, patch: Triple) -> int:
        """Floating-point operations (two a multiply-add) of one forward of a `patch`."""

    @abstractmethod
    def activation_bytes(self, patch: Triple, batch: int = 1, itemsize: int = 4) -> int:
        """Predicted peak bytes that one eval forward adds: activations alive at a time, the answer, and scratch.

        The input, the weights and what torch itself holds are not in it.
        """

    @abstractmethod
    def convolved_values(self, patch: Triple) -> int:
        """Values that all convolutions make of one `patch`; what a training keeps is in proportion to them."""

    @abstractmethod
    def for_inference(self) -> Self:
        """Return the arguments of the same network without what only training uses."""

    def allows(self, sides: Triple) -> bool:
        """Tell whether an input of `sides` is allowed."""
        return all(side in rule for side, rule in zip(sides, self._rules(), strict=True))

    def fit(self, sides: Triple, *, up: bool) -> Triple:
        """Return the nearest allowed sides, none smaller than asked (`up`) or none larger, but for the smallest."""
        a, b, c = (rule.fit(side, up=up) for side, rule in zip(sides, self._rules(), strict=True))
        return a, b, c

    def side_rule(self) -> str:
        """Say in words which sides are allowed."""
        steps, phases, least = self.pooling[-self.dims :], self.phase[-self.dims :], self.smallest[-self.dims :]
        more = f" plus {phases}" if any(phases) else ""
        return f"multiples of {steps}{more}, at least {least}"

    def _rules(self) -> tuple[Allowed, ...]:
        return tuple(map(Allowed, self.pooling, self.phase, self.smallest))


class ProgramConfig(NetworkConfig):
    """Arguments of an architecture that is described by a program; everything else follows from that."""

    @abstractmethod
    def make_program(self) -> Program:
        """Return the network as a program."""

    @property
    def program(self) -> Program:
        """The network as a program, made once for all equal arguments."""
        return _program(self)

    @property
    def pooling(self) -> Triple:
        """See `NetworkConfig`."""
        a, b, c = (rule.step for rule in self.program.allowed)
        return a, b, c

    @property
    def phase(self) -> Triple:
        """See `NetworkConfig`."""
        a, b, c = (rule.phase for rule in self.program.allowed)
        return a, b, c

    @property
    def smallest(self) -> Triple:
        """See `NetworkConfig`."""
        a, b, c = (rule.smallest for rule in self.program.allowed)
        return a, b, c

    @property
    def margin(self) -> Triple:
        """See `NetworkConfig`."""
        return self.program.margin

    @property
    def receptive_field(self) -> Triple:
        """See `NetworkConfig`."""
        return self.program.receptive_field

    @property
    def parameter_count(self) -> int:
        """See `NetworkConfig`."""
        return self.program.parameter_count

    @property
    def state_bytes(self) -> int:
        """See `NetworkConfig`."""
        return self.program.state_bytes

    def flops(self, patch: Triple) -> int:
        """See `NetworkConfig`."""
        return self.program.main.flops(patch)

    def activation_bytes(self, patch: Triple, batch: int = 1, itemsize: int = 4) -> int:
        """See `NetworkConfig`."""
        return peak_bytes(self.program.main, patch, batch, itemsize)

    def convolved_values(self, patch: Triple) -> int:
        """See `NetworkConfig`."""
        return self.program.convolved_values(patch)

    def for_inference(self) -> Self:
        """See `NetworkConfig`; here nothing is for training only."""
        return self


# Programs are asked for again and again while a plan is made, and networks differ little within a process.
@lru_cache(maxsize=64)
def _program(config: ProgramConfig) -> Program:
    return config.make_program()


class LevelConfig(ProgramConfig):
    """Arguments of an architecture that works at several resolutions.

    `widths` are the channels of each level, finest first; `pools` the pooling factors (z, y, x) between levels (for 2D
    the first entry of each is 1). Unknown keys and values outside their limits are refused.
    """

    pools_more: ClassVar[int] = -1
    """How many more pools than levels there are."""
    largest_pool: ClassVar[int] = 8

    widths: tuple[int, ...] = Field((16, 32, 64, 128), min_length=1, max_length=8)
    norm: Literal["batch", "instance", "group", "none"] = "batch"
    activation: Literal["relu", "leaky_relu", "silu"] = "relu"
    pools: tuple[Triple, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _default_pools(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("pools") is None:
            factor = (1, 2, 2) if values.get("dims", 3) == 2 else (2, 2, 2)
            widths = values.get("widths", cls.model_fields["widths"].default)
            levels = len(widths) if isinstance(widths, list | tuple) else 0
            values = values | {"pools": (factor,) * (levels + cls.pools_more)}
        return values

    @model_validator(mode="after")
    def _check_levels(self) -> Self:
        if any(not 1 <= w <= 4096 for w in self.widths):
            raise ValueError("every width must be from 1 to 4096 channels")
        needed = len(self.widths) + self.pools_more
        if len(self.factors) != needed:
            raise ValueError(f"{len(self.widths)} widths need {needed} pools, got {len(self.factors)}")
        if any(not 1 <= f <= self.largest_pool for pool in self.factors for f in pool):
            raise ValueError(f"every pooling factor must be from 1 to {self.largest_pool}")
        if self.dims == 2 and any(pool[0] != 1 for pool in self.factors):
            raise ValueError("a 2D network cannot pool across slices: the first factor of every pool must be 1")
        if self.norm == "group" and any(w % group_count(w) for w in self.normed_widths()):
            raise ValueError("group normalisation needs widths that are multiples of 8, or below 8")
        return self

    @property
    def factors(self) -> tuple[Triple, ...]:
        """Pooling factors (z, y, x) between the levels, finest first."""
        return self.pools or ()

    def normed_widths(self) -> tuple[int, ...]:
        """Return the channels that normalisations work on."""
        return self.widths


class Measured(BaseModel):
    """What was found out about a network by running it; see `measure.measure_network`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pooling: Triple
    phase: Triple
    smallest: Triple
    margin: Triple
    receptive_field: Triple
    parameter_count: int = Field(ge=0)
    state_bytes: int = Field(ge=0)
    macs_per_voxel: float = Field(ge=0.0, allow_inf_nan=False)
    convolved_values_per_voxel: float = Field(ge=0.0, allow_inf_nan=False)
    activation_bytes_per_voxel: float = Field(ge=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for p, r, n, m in zip(self.pooling, self.phase, self.smallest, self.margin, strict=True):
            if p < 1 or not 0 <= r < p or n < 1 or (n - r) % p or not 0 <= 2 * m < n:
                raise ValueError(f"a side of {n} with pooling {p}, phase {r} and margin {m} contradicts itself")
        return self


class TracedConfig(NetworkConfig):
    """Base for the arguments of networks that have no program: `measured` holds what was found by running them once.

    `measure.complete` fills it in when a training begins.
    """

    measured: Measured | None = None

    @property
    def _found(self) -> Measured:
        if self.measured is None:
            raise BundleError(
                f"nothing is known of this {type(self).__name__}'s sizes and cost; it cannot be planned with: "
                "measure it first with volseg.models.measure.complete"
            )
        return self.measured

    @property
    def pooling(self) -> Triple:
        """See `NetworkConfig`; like all below it raises BundleError before the network was measured."""
        return self._found.pooling

    @property
    def phase(self) -> Triple:
        """See `NetworkConfig`."""
        return self._found.phase

    @property
    def smallest(self) -> Triple:
        """See `NetworkConfig`."""
        return self._found.smallest

    @property
    def margin(self) -> Triple:
        """See `NetworkConfig`."""
        return self._found.margin

    @property
    def receptive_field(self) -> Triple:
        """See `NetworkConfig`."""
        return self._found.receptive_field

    @property
    def parameter_count(self) -> int:
        """See `NetworkConfig`."""
        return self._found.parameter_count

    @property
    def state_bytes(self) -> int:
        """See `NetworkConfig`."""
        return self._found.state_bytes

    def flops(self, patch: Triple) -> int:
        """See `NetworkConfig`."""
        return round(2 * self._found.macs_per_voxel * prod(patch))

    def activation_bytes(self, patch: Triple, batch: int = 1, itemsize: int = 4) -> int:
        """See `NetworkConfig`."""
        return round(self._found.activation_bytes_per_voxel * prod(patch) * batch * itemsize / 4)

    def convolved_values(self, patch: Triple) -> int:
        """See `NetworkConfig`."""
        return round(self._found.convolved_values_per_voxel * prod(patch))

    def for_inference(self) -> Self:
        """See `NetworkConfig`; here nothing is for training only."""
        return self
