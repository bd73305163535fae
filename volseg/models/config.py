"""Arguments of the U-Net and the arithmetic of its cost; needs no torch, so that a plan can be made without it.

Network coordinates are (slice axis, rows, columns) for a 2D network and (z, y, x) for a 3D one; a 2D network's patches
have depth 1. `to_network` and `to_volume` change between them and volume coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from volseg.geometry.box import AXES, Triple

Axis = Literal["z", "y", "x"]

# One value a channel and 32-bit buffers of a normalisation layer: weight, bias, running mean, running variance.
_NORM_PARAMETERS = 2
_NORM_BUFFER_BYTES = 8
_COUNTER_BYTES = 8


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


class UNetConfig(BaseModel):
    """Arguments of the U-Net: an encoder and a decoder with a skip connection at every level.

    `widths` are the channels of each level, finest first; `pools` the pooling factors (z, y, x) between levels, one
    less than `widths` (for 2D the first entry of each is 1). Unknown keys and values outside their limits are refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dims: Literal[2, 3] = 3
    in_channels: int = Field(1, ge=1, le=256)
    out_channels: int = Field(2, ge=1, le=65535)
    widths: tuple[int, ...] = Field((16, 32, 64, 128), min_length=1, max_length=8)
    convs_per_level: int = Field(2, ge=1, le=8)
    norm: Literal["batch", "instance", "group", "none"] = "batch"
    activation: Literal["relu", "leaky_relu", "silu"] = "relu"
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    up: Literal["transpose", "nearest"] = "transpose"
    residual: bool = False
    pools: tuple[Triple, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _default_pools(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("pools") is None:
            factor = (1, 2, 2) if values.get("dims", 3) == 2 else (2, 2, 2)
            values = values | {"pools": (factor,) * (len(values.get("widths", cls.model_fields["widths"].default)) - 1)}
        return values

    @model_validator(mode="after")
    def _check(self) -> UNetConfig:
        if any(not 1 <= w <= 4096 for w in self.widths):
            raise ValueError("every width must be from 1 to 4096 channels")
        if len(self.factors) != len(self.widths) - 1:
            raise ValueError(f"{len(self.widths)} widths need {len(self.widths) - 1} pools, got {len(self.factors)}")
        if any(not 1 <= f <= 8 for pool in self.factors for f in pool):
            raise ValueError("every pooling factor must be from 1 to 8")
        if self.dims == 2 and any(pool[0] != 1 for pool in self.factors):
            raise ValueError("a 2D network cannot pool across slices: the first factor of every pool must be 1")
        if self.norm == "group" and any(w % group_count(w) for w in self.widths):
            raise ValueError("group normalisation needs widths that are multiples of 8, or below 8")
        return self

    @property
    def factors(self) -> tuple[Triple, ...]:
        """Pooling factors (z, y, x) between the levels, finest first."""
        return self.pools or ()

    @property
    def pooling(self) -> Triple:
        """Total pooling factor in network coordinates; the sides of a patch must be multiples of it."""
        a, b, c = (prod(pool[i] for pool in self.factors) for i in range(3))
        return a, b, c

    @property
    def parameter_count(self) -> int:
        """Number of trained values."""
        return sum(layer.parameters for layer in self._layers())

    @property
    def state_bytes(self) -> int:
        """Bytes of all stored tensors at 32 bits: trained values and the statistics of batch normalisation."""
        buffers = 0
        if self.norm == "batch":
            buffers = sum(_NORM_BUFFER_BYTES * y.cout + _COUNTER_BYTES for y in self._layers() if y.kind == "conv")
        return 4 * self.parameter_count + buffers

    def flops(self, patch: Triple) -> int:
        """Floating-point operations (two a multiply-add) of one forward of a `patch` in network coordinates."""
        return sum(2 * layer.macs * prod(patch) // layer.shrink for layer in self._layers())

    def activation_bytes(self, patch: Triple, batch: int = 1, itemsize: int = 4) -> int:
        """Predicted peak bytes that one eval forward adds: activations alive at a time, the answer, and scratch.

        The input, the weights and what torch itself holds are not in it. `patch` is in network coordinates.
        """
        from volseg.models.footprint import peak_bytes

        return peak_bytes(self, patch, batch, itemsize)

    def _layers(self) -> Iterator[_Layer]:
        yield from layers(self)


class _Layer(BaseModel):
    """One convolution: its channels, taps and how many input-resolution voxels share one output voxel."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["conv", "shortcut", "up", "head"]
    cin: int
    cout: int
    taps: int
    shrink: int
    normed: bool = False

    @property
    def macs(self) -> int:
        """Multiply-adds an output voxel."""
        return self.cin * self.cout * (1 if self.kind == "up" else self.taps)

    @property
    def parameters(self) -> int:
        """Trained values: kernel, bias (absent before a norm), and the norm's weight and bias."""
        bias = 0 if self.normed else self.cout
        return self.cin * self.cout * self.taps + bias + (_NORM_PARAMETERS * self.cout if self.normed else 0)


def group_count(width: int) -> int:
    """Return the number of groups of a group normalisation over `width` channels: 8, or all where there are fewer."""
    return min(8, width)


def layers(config: UNetConfig) -> Iterator[_Layer]:
    """Yield every convolution of the network in the order of the forward."""
    shrink = [prod(prod(pool) for pool in config.factors[:i]) for i in range(len(config.widths))]
    cin = config.in_channels
    for width, factor in zip(config.widths, shrink, strict=True):
        yield from _block(config, cin, width, factor)
        cin = width
    for i in reversed(range(len(config.factors))):
        width = config.widths[i]
        if config.up == "transpose":
            yield _Layer(kind="up", cin=cin, cout=width, taps=prod(config.factors[i]), shrink=shrink[i])
            cin = width
        yield from _block(config, cin + width, width, shrink[i])
        cin = width
    yield _Layer(kind="head", cin=cin, cout=config.out_channels, taps=1, shrink=1)


def _block(config: UNetConfig, cin: int, cout: int, shrink: int) -> Iterator[_Layer]:
    normed = config.norm != "none"
    for i in range(config.convs_per_level):
        source = cin if i == 0 else cout
        yield _Layer(kind="conv", cin=source, cout=cout, taps=3**config.dims, shrink=shrink, normed=normed)
    if config.residual and cin != cout:
        yield _Layer(kind="shortcut", cin=cin, cout=cout, taps=1, shrink=shrink)
