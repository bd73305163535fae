"""Random changes of training patches: one geometry for image and labels, then grey values of the image alone.

The ranges follow nnU-Net (Isensee et al. 2021) and the elastic deformation of the U-Net (Ronneberger et al. 2015),
narrowed where nine in ten volumes of the intended kinds do not vary that much. Validation data never come here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from volseg.geometry.box import Triple
from volseg.training.artefacts import draw_drift, draw_rings

_LEAST_BLUR = 0.3
_CONTROL_POINTS = 6


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How strongly patches are changed: probabilities a patch, angles in degrees, grey values in units of the std.

    `planes` are the pairs of axes (0 = slice axis) that are rotated a little, because their voxel sizes agree,
    `quarter_turns` those that may be exchanged, `flips` the axes that may be mirrored. `shift` and `elastic` are shares
    of a patch's side, `blur` is a sigma in voxels. `rotation_axis` is the axis that is the volume's z, around which a
    tomogram was recorded: rings lie around it, brightness drifts along it. A strength of 0 switches a change off.
    """

    planes: tuple[tuple[int, int], ...]
    quarter_turns: tuple[tuple[int, int], ...]
    flips: tuple[int, ...]
    warp_probability: float = 0.4
    angle: float = 20.0
    zoom: float = 0.25
    shift: float = 0.0
    elastic: float = 0.02
    intensity_probability: float = 0.5
    gain: float = 0.25
    offset: float = 0.25
    gamma: float = 0.3
    noise: float = 0.2
    field: float = 0.3
    blur: float = 1.0
    rings: float = 0.0
    drift: float = 0.0
    rotation_axis: int = 0


@dataclass(frozen=True, eq=False)
class Geometry:
    """One drawn change of shape: where each voxel of the patch is taken from, then flips and quarter turns.

    `points` (a, b, c, 3) are source coordinates in voxels relative to the patch's centre, at a few points a side from
    the first voxel to the last, linear between them; None for a plain crop.
    """

    points: NDArray[np.float32] | None
    flips: tuple[int, ...]
    turn: tuple[int, tuple[int, int]] | None

    def finish(self, values: Tensor) -> Tensor:
        """Mirror and turn `values` (c, ...)."""
        if self.flips:
            values = values.flip([1 + axis for axis in self.flips])
        if self.turn is not None:
            count, (a, b) = self.turn
            values = torch.rot90(values, count, (1 + a, 1 + b))
        return values


def draw_geometry(how: Augmentation, patch: Triple, rng: np.random.Generator) -> Geometry:
    """Draw a change of shape for a `patch` (network coordinates)."""
    flips = tuple(axis for axis in how.flips if patch[axis] > 1 and rng.random() < 0.5)
    square = [pair for pair in how.quarter_turns if patch[pair[0]] == patch[pair[1]] > 1]
    turn = None
    if square:
        turn = (int(rng.integers(4)), square[int(rng.integers(len(square)))])
    points = _draw_points(how, patch, rng) if rng.random() < how.warp_probability else None
    return Geometry(points, flips, turn if turn and turn[0] else None)


def _draw_points(how: Augmentation, patch: Triple, rng: np.random.Generator) -> NDArray[np.float32]:
    matrix = np.eye(3)
    for a, b in how.planes:
        if patch[a] > 1 and patch[b] > 1:
            angle = np.deg2rad(rng.uniform(-how.angle, how.angle))
            rotation = np.eye(3)
            rotation[a, a] = rotation[b, b] = np.cos(angle)
            rotation[a, b], rotation[b, a] = -np.sin(angle), np.sin(angle)
            matrix = matrix @ rotation
    live = np.array(patch) > 1
    matrix[live] *= _factor(how.zoom, rng)
    sides = live * np.array(patch)
    middle = sides * rng.uniform(-how.shift, how.shift, 3)
    # About six control points a side, displaced by a share of their distance: no folds.
    axes = [np.linspace(-(n - 1) / 2, (n - 1) / 2, _CONTROL_POINTS if n > 1 else 1) for n in patch]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1) @ matrix.T + middle
    if how.elastic:
        points += rng.standard_normal(points.shape) * rng.uniform(0, how.elastic) * sides
    drawn: NDArray[np.float32] = points.astype(np.float32)
    return drawn


def stretch(points: NDArray[np.float32], sides: Triple) -> Tensor:
    """Return (sides..., c), linear between the `points` (a, b, c, c), the first and the last voxels at the outer ones.

    An axis after the other, as products of matrices: a tenth of the time that interpolation in three axes takes.
    """
    a, b, c, channels = points.shape
    values = _weights(a, sides[0], 1) @ torch.from_numpy(np.ascontiguousarray(points)).reshape(a, -1)
    values = _weights(b, sides[1], 1) @ values.reshape(sides[0], b, -1)
    values = values.reshape(-1, c * channels) @ _weights(c, sides[2], channels).T
    return values.reshape(*sides, channels)


@cache
def _weights(points: int, side: int, channels: int) -> Tensor:
    """Return what each of `points` gives to each voxel of a `side`, (side * channels, points * channels)."""
    place = torch.arange(side, dtype=torch.float64) * ((points - 1) / max(side - 1, 1))
    weights = (1 - (place[:, None] - torch.arange(points)).abs()).clamp_min_(0).float()
    return torch.kron(weights, torch.eye(channels))


def take(values: NDArray[np.float32], points: NDArray[np.float32], sides: Triple) -> Tensor:
    """Read `values` (c, ...) where `points` (a, b, c, 3), stretched to `sides`, say; returns (c, sides...).

    Points are in voxels of `values`. Linear between voxels; the border is continued outwards.
    """
    source = torch.from_numpy(np.ascontiguousarray(values))[None]
    # From -1 to 1, the last coordinate first. On the few points this costs nothing.
    ends = np.array([max(n - 1, 1) for n in values.shape[1:]], np.float32)
    where = (2 * points / ends - 1)[..., ::-1]
    if values.shape[1] == sides[0] == 1:
        flat = _sample(source[:, :, 0], stretch(where[..., :2], sides))
        return flat[0][:, None]
    return _sample(source, stretch(where, sides)[None])[0]


def _sample(source: Tensor, where: Tensor) -> Tensor:
    return F.grid_sample(source, where, mode="bilinear", padding_mode="border", align_corners=True)


def change_intensity(image: Tensor, how: Augmentation, rng: np.random.Generator) -> Tensor:
    """Return `image` (c, ...), in units of its std, with other grey values; the image itself is left as it is.

    In this order: contrast and brightness, drift, gamma, shading, blur, rings, noise.
    """
    patch = (image.shape[1], image.shape[2], image.shape[3])
    often = how.intensity_probability
    if rng.random() < often:
        image = image * _factor(how.gain, rng) + float(rng.uniform(-how.offset, how.offset))
    if how.drift and rng.random() < often:
        image = _drift(image, float(rng.uniform(0, how.drift)), how.rotation_axis, rng)
    if how.gamma and rng.random() < often / 2:
        image = _gamma(image, _factor(how.gamma, rng))
    if how.field and rng.random() < often / 2:
        points = rng.standard_normal((*(1 if n == 1 else 3 for n in patch), 1), np.float32)
        image = image + stretch(points, patch)[..., 0] * float(rng.uniform(0, how.field))
    if how.blur and rng.random() < often / 4:
        image = _blur(image, float(rng.uniform(min(_LEAST_BLUR, how.blur), how.blur)))
    if how.rings and rng.random() < often:
        pattern = torch.from_numpy(draw_rings(patch, how.rotation_axis, rng))
        image = image + pattern * float(rng.uniform(0, how.rings))
    if how.noise and rng.random() < often / 2:
        seed = torch.Generator().manual_seed(int(rng.integers(2**63)))
        image = image + torch.randn(image.shape, generator=seed) * float(rng.uniform(0, how.noise))
    return image


def _factor(strength: float, rng: np.random.Generator) -> float:
    """Draw from 1 / (1 + strength) to 1 + strength."""
    return float(np.exp(rng.uniform(-1, 1) * np.log1p(strength)))


def _drift(image: Tensor, amount: float, axis: int, rng: np.random.Generator) -> Tensor:
    """Let brightness go by up to `amount` along `axis`, and contrast by half as much."""
    shape = [1, 1, 1, 1]
    shape[1 + axis] = size = image.shape[1 + axis]
    lift, gain = (torch.from_numpy(draw_drift(size, rng)).reshape(shape) for _ in range(2))
    return image * torch.exp(gain * float(np.log1p(amount / 2))) + lift * amount


def _gamma(image: Tensor, exponent: float) -> Tensor:
    low, high = image.amin(), image.amax()
    spread = (high - low).clamp_min(1e-6)
    return ((image - low) / spread).pow(exponent) * spread + low


def _blur(image: Tensor, sigma: float) -> Tensor:
    """Convolve with a Gaussian along every axis that has more than two voxels, the border continued outwards."""
    reach = max(1, ceil(2 * sigma))
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float32) / sigma) ** 2)
    weights = (taps / taps.sum()).tolist()
    for axis in range(1, 4):
        size = image.shape[axis]
        if size > 2:
            wide = image.index_select(axis, torch.arange(-reach, size + reach).clamp_(0, size - 1))
            image = wide.narrow(axis, 0, size) * weights[0]
            for start, weight in enumerate(weights[1:], 1):
                image.add_(wide.narrow(axis, start, size), alpha=weight)
    return image
