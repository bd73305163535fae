"""Random changes of training patches: one geometry for image and labels, then grey values of the image alone.

The ranges follow nnU-Net (Isensee et al. 2021) and the elastic deformation of the U-Net (Ronneberger et al. 2015),
narrowed where nine in ten volumes of the intended kinds do not vary that much. Validation data never come here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from volseg.geometry.box import Triple


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How strongly patches are changed: probabilities a patch, angles in degrees, grey values in units of the std.

    `planes` are the pairs of axes (0 = slice axis) that are rotated a little, because their voxel sizes agree,
    `quarter_turns` those that may be exchanged, `flips` the axes that may be mirrored.
    """

    planes: tuple[tuple[int, int], ...]
    quarter_turns: tuple[tuple[int, int], ...]
    flips: tuple[int, ...]
    warp_probability: float = 0.4
    angle: float = 20.0
    zoom: float = 0.25
    elastic: float = 0.02
    intensity_probability: float = 0.5
    gain: float = 0.25
    offset: float = 0.25
    gamma: float = 0.3
    noise: float = 0.2
    field: float = 0.3


@dataclass(frozen=True, eq=False)
class Geometry:
    """One drawn change of shape: where each voxel of the patch is taken from, then flips and quarter turns.

    `grid` (sides..., 3) holds source coordinates in voxels relative to the patch's centre, or None for a plain crop.
    """

    grid: Tensor | None
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
    grid = _draw_grid(how, patch, rng) if rng.random() < how.warp_probability else None
    return Geometry(grid, flips, turn if turn and turn[0] else None)


def _draw_grid(how: Augmentation, patch: Triple, rng: np.random.Generator) -> Tensor:
    matrix = np.eye(3)
    for a, b in how.planes:
        if patch[a] > 1 and patch[b] > 1:
            angle = np.deg2rad(rng.uniform(-how.angle, how.angle))
            rotation = np.eye(3)
            rotation[a, a] = rotation[b, b] = np.cos(angle)
            rotation[a, b], rotation[b, a] = -np.sin(angle), np.sin(angle)
            matrix = matrix @ rotation
    scale = np.exp(rng.uniform(-1, 1) * np.log1p(how.zoom))
    live = [i for i in range(3) if patch[i] > 1]
    matrix[live] *= scale
    axes = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in patch]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    grid = points @ torch.from_numpy(matrix.T.astype(np.float32))
    if how.elastic:
        grid += _draw_displacement(how.elastic, patch, rng)
    return grid


def _draw_displacement(strength: float, patch: Triple, rng: np.random.Generator) -> Tensor:
    # About six control points a side, displaced by a share of their distance: no folds.
    coarse = [1 if n == 1 else 6 for n in patch]
    sides = np.array([n if n > 1 else 0 for n in patch], np.float32)
    amount = rng.uniform(0, strength) * sides
    points = rng.standard_normal((1, 3, *coarse), np.float32) * amount.reshape(1, 3, 1, 1, 1)
    return resize(torch.from_numpy(points.astype(np.float32)), patch)[0].permute(1, 2, 3, 0)


def resize(values: Tensor, patch: Triple) -> Tensor:
    """Stretch (b, c, ...) linearly to the sides of `patch`."""
    if patch[0] == 1:
        return F.interpolate(values[:, :, 0], patch[1:], mode="bilinear", align_corners=True)[:, :, None]
    return F.interpolate(values, patch, mode="trilinear", align_corners=True)


def take(values: NDArray[np.float32], grid: Tensor, mode: str) -> Tensor:
    """Read `values` (c, ...) at `grid` (sides..., 3), voxel coordinates; returns (c, sides...).

    Mode "bilinear" continues the border outwards; "nearest" gives 0 beyond it.
    """
    source = torch.from_numpy(np.ascontiguousarray(values))[None]
    sides = torch.tensor([max(n - 1, 1) for n in values.shape[1:]], dtype=torch.float32)
    # The last coordinate comes first for grid_sample.
    where = (2 * grid / sides - 1).flip(-1)
    padding = "border" if mode == "bilinear" else "zeros"
    if values.shape[1] == 1 and grid.shape[0] == 1:
        flat = F.grid_sample(source[:, :, 0], where[..., :2], mode=mode, padding_mode=padding, align_corners=True)
        return flat[0][:, None]
    return F.grid_sample(source, where[None], mode=mode, padding_mode=padding, align_corners=True)[0]


def change_intensity(image: Tensor, how: Augmentation, rng: np.random.Generator) -> Tensor:
    """Return `image` (c, ...), in units of its std, with another contrast, brightness, shading, blur and noise."""
    patch = (image.shape[1], image.shape[2], image.shape[3])
    if rng.random() < how.intensity_probability:
        image = image * float(np.exp(rng.uniform(-1, 1) * np.log1p(how.gain))) + float(
            rng.uniform(-how.offset, how.offset)
        )
    if rng.random() < how.intensity_probability / 2:
        image = _gamma(image, float(np.exp(rng.uniform(-1, 1) * np.log1p(how.gamma))))
    if rng.random() < how.intensity_probability / 2:
        points = rng.standard_normal((1, 1, *(1 if n == 1 else 3 for n in patch)), np.float32)
        image = image + resize(torch.from_numpy(points), patch)[0] * float(rng.uniform(0, how.field))
    if rng.random() < how.intensity_probability / 4:
        image = _blur(image, float(rng.uniform(0.3, 1.0)))
    if rng.random() < how.intensity_probability / 2:
        seed = torch.Generator().manual_seed(int(rng.integers(2**63)))
        image = image + torch.randn(image.shape, generator=seed) * float(rng.uniform(0, how.noise))
    return image


def _gamma(image: Tensor, exponent: float) -> Tensor:
    low, high = image.amin(), image.amax()
    spread = (high - low).clamp_min(1e-6)
    return ((image - low) / spread).pow(exponent) * spread + low


def _blur(image: Tensor, sigma: float) -> Tensor:
    taps = torch.exp(-0.5 * (torch.arange(-2, 3, dtype=torch.float32) / sigma) ** 2)
    taps /= taps.sum()
    for axis in range(1, 4):
        if image.shape[axis] > 2:
            image = sum(
                (float(tap) * torch.roll(image, shift, axis) for shift, tap in zip(range(-2, 3), taps, strict=True)),
                torch.zeros(()),
            )
    return image
