"""A CT phantom with known truth: a porous battery electrode, scanned and reconstructed slice by slice.

The structure is built in 3D (`build_electrode`), so neighbouring slices agree as they do in a real scan. Every slice is
then projected, measured with a noisy and imperfect detector, and reconstructed by filtered back projection (`scan`).
Arrays are (z, y, x), lengths are voxels and attenuations are 1/voxel unless said otherwise. Needs only NumPy and SciPy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse

F32 = NDArray[np.float32]
Progress = Callable[[int, int], None]

PORE, ACTIVE, BINDER = 0, 1, 2
CLASS_NAMES = ("pore", "active particles", "carbon binder")
ATTENUATION_ORDER = (PORE, BINDER, ACTIVE)
"""Class ids from the most transparent to the most absorbing phase."""

_BATCH = 8
_FAR = np.float32(1e3)


@dataclass(frozen=True)
class Electrode:
    """What the electrode is made of. Radii, gap, roughness in voxels; phases in 1/voxel; spread and texture relative.

    `packing` is the volume of the particles on offer per volume; some find no room. Binder fills the places whose
    distances to the two nearest particles add up to less than `gap`.
    """

    radius: tuple[float, float] = (13.0, 26.0)
    packing: float = 0.53
    gap: float = 17.0
    roughness: float = 0.8
    active: float = 0.0150
    binder: float = 0.0077
    pore: float = 0.0012
    speck: float = 0.1200
    particle_spread: float = 0.16
    binder_texture: float = 0.20
    specks_per_million: float = 8.0


@dataclass(frozen=True)
class Scanner:
    """How it is imaged. `photons` is the unattenuated count of a detector pixel in one projection, `blur` in voxels.

    `spectrum` lists (share of the photons, factor on the attenuation): several lines harden the beam and cause cupping.
    """

    angles: int = 120
    photons: float = 800.0
    gain_error: float = 0.02
    blur: float = 0.7
    spectrum: tuple[tuple[float, float], ...] = ((0.5, 1.4), (0.5, 0.6))


ELECTRODE = Electrode()
SCANNER = Scanner()


@dataclass(frozen=True)
class Phantom:
    """A scan and its truth: `image` uint16 and `labels` uint8, both (z, y, x); voxel size z, y, x in micrometers."""

    image: NDArray[np.uint16]
    labels: NDArray[np.uint8]
    class_names: tuple[str, ...] = CLASS_NAMES
    voxel_size_um: tuple[float, float, float] = (0.4, 0.4, 0.4)


class ParallelBeam:
    """Projection and filtered back projection of (y, x) slices, sharing one pixel-driven sparse matrix.

    The matrix spreads each pixel's mass over the three nearest detector bins by a quadratic B-spline, because linear
    interpolation shows moire; its transpose is the backprojector. The detector covers the slice's diagonal. The filter
    is the band-limited ramp of Kak and Slaney, "Principles of Computerized Tomographic Imaging" (1988), chapter 3,
    sampled in space so that the mean value is right.
    """

    def __init__(self, shape: tuple[int, int], angles: int) -> None:
        self.shape = shape
        self.angles = angles
        self.bins = int(np.ceil(np.hypot(*shape))) + 3
        self.matrix = self._system_matrix()
        self._length = 1 << int(np.ceil(np.log2(2 * self.bins)))
        lag = np.minimum(np.arange(self._length), self._length - np.arange(self._length))
        odd = lag % 2 == 1
        kernel = np.zeros(self._length)
        kernel[odd] = -1.0 / (np.pi * lag[odd]) ** 2
        kernel[0] = 0.25
        self._ramp = np.fft.rfft(kernel).real.astype(np.float32)[:, None]

    def _system_matrix(self) -> Any:
        y, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in self.shape), indexing="ij")
        theta = np.arange(self.angles) * (np.pi / self.angles)
        place = np.outer(x, np.cos(theta)) + np.outer(y, np.sin(theta)) + (self.bins - 1) / 2
        centre = np.rint(place).astype(np.int32)
        off = (place - centre).astype(np.float32)
        middle = centre + np.arange(self.angles, dtype=np.int32) * self.bins
        columns = middle[..., None] + np.array([-1, 0, 1], np.int32)
        values = np.stack([(0.5 - off) ** 2 / 2, 0.75 - off**2, (0.5 + off) ** 2 / 2], axis=-1)
        starts = np.arange(len(place) + 1, dtype=np.int32) * (3 * self.angles)
        return sparse.csr_array((values.ravel(), columns.ravel(), starts), shape=(len(place), self.angles * self.bins))

    def project(self, slices: F32) -> F32:
        """Line integrals (angle, bin, z) of attenuation slices (z, y, x)."""
        flat = np.ascontiguousarray(slices.reshape(len(slices), -1).T)
        lines: F32 = (self.matrix.T @ flat).reshape(self.angles, self.bins, len(slices))
        return lines

    def reconstruct(self, lines: F32) -> F32:
        """Attenuation slices (z, y, x) from line integrals (angle, bin, z)."""
        spectrum = np.fft.rfft(lines, n=self._length, axis=1) * self._ramp
        filtered = np.fft.irfft(spectrum, n=self._length, axis=1)[:, : self.bins].astype(np.float32)
        slices = self.matrix @ np.ascontiguousarray(filtered.reshape(-1, lines.shape[2]))
        scale = np.float32(np.pi / self.angles)
        result: F32 = np.ascontiguousarray(slices.T * scale).reshape(-1, *self.shape)
        return result


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, int, int], sigma: float) -> F32:
    """Gaussian random field of mean 0 and standard deviation 1 with a correlation length of about `sigma` voxels."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), sigma, mode="wrap", truncate=3.0)
    result: F32 = (noise - noise.mean()) / noise.std()
    return result


def _pack(rng: np.random.Generator, shape: tuple[int, int, int], recipe: Electrode) -> NDArray[np.float64]:
    """Centres and radii, rows of (z, y, x, r), by random sequential addition from the largest particle to the smallest.

    Neighbours may sink into each other by a tenth, as particles of a calendered electrode do. Centres may lie outside.
    """
    smallest, margin = recipe.radius
    extent = np.array(shape) + 2 * margin
    drawn, volume = [], 0.0
    while volume < recipe.packing * float(np.prod(extent)):
        drawn.append(float(np.clip(rng.lognormal(np.log(np.sqrt(smallest * margin)), 0.35), smallest, margin)))
        volume += 4 / 3 * np.pi * drawn[-1] ** 3
    placed = np.empty((0, 4))
    for r in sorted(drawn, reverse=True):
        for _ in range(60):
            centre = rng.random(3) * extent - margin
            if np.all(np.linalg.norm(placed[:, :3] - centre, axis=1) > 0.9 * (placed[:, 3] + r)):
                placed = np.vstack([placed, [*centre, r]])
                break
    return placed


def _ellipsoid(rng: np.random.Generator, r: float) -> NDArray[np.float64]:
    """Random 3x3 matrix M: |M v| is 1 on the surface of a slightly ellipsoidal particle of radius about r."""
    axes = np.exp(rng.normal(0.0, 0.13, 3))
    rotation, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    result: NDArray[np.float64] = (rotation / (axes / np.cbrt(axes.prod()) * r)).T
    return result


def _distances(
    rng: np.random.Generator, shape: tuple[int, int, int], particles: NDArray[np.float64], reach: float
) -> tuple[F32, F32, NDArray[np.int32]]:
    """Signed distance to the nearest and second nearest particle, and which is nearest; beyond `reach` a constant."""
    first, second = np.full(shape, _FAR), np.full(shape, _FAR)
    owner = np.zeros(shape, np.int32)
    for index, (*centre, r) in enumerate(particles):
        shaper = _ellipsoid(rng, r)
        size = 1.35 * r + reach
        low = [max(0, int(c - size)) for c in centre]
        high = [min(n, int(c + size) + 2) for c, n in zip(centre, shape, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            continue
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        grid = np.ogrid[box]
        parts = [sum(row[k] * (grid[k] - centre[k]) for k in range(3)) for row in shaper]
        distance = ((np.sqrt(parts[0] ** 2 + parts[1] ** 2 + parts[2] ** 2) - 1) * r).astype(np.float32)
        nearer = distance < first[box]
        second[box] = np.minimum(second[box], np.where(nearer, first[box], distance))
        first[box] = np.where(nearer, distance, first[box])
        owner[box][nearer] = index
    return first, second, owner


def build_electrode(shape: tuple[int, int, int], seed: int, recipe: Electrode) -> tuple[NDArray[np.uint8], F32]:
    """Labels uint8 and attenuation float32, both (z, y, x), of a milled pillar of electrode standing along z in air.

    Particles are polydisperse ellipsoids with rough surfaces; binder fills the necks, where two particles come close;
    the rest is pore, as is the air around the pillar. Dense specks lie inside particles and belong to them.
    """
    rng = np.random.default_rng([seed, 0])
    particles = _pack(rng, shape, recipe)
    first, second, owner = _distances(rng, shape, particles, recipe.gap + 4)
    rough = _smooth_noise(rng, shape, 3.0) * np.float32(recipe.roughness)
    patchy = _smooth_noise(rng, shape, 9.0) * np.float32(2.5)
    solid = ndimage.gaussian_filter(first, 1.0) + rough < 0
    neck = ndimage.gaussian_filter((first + second + patchy < recipe.gap).astype(np.float32), 2.8, truncate=3.0) > 0.5
    y, x = np.ogrid[: shape[1], : shape[2]]
    off_axis = np.hypot(y - (shape[1] - 1) / 2, x - (shape[2] - 1) / 2)
    pillar = off_axis[None] + rough < min(shape[1:]) / 2 - 3
    labels = np.where(solid, ACTIVE, np.where(neck, BINDER, PORE)).astype(np.uint8) * pillar
    spread = 1 + recipe.particle_spread * np.clip(rng.standard_normal(len(particles)), -2, 2)
    texture = 1 + recipe.binder_texture * np.clip(_smooth_noise(rng, shape, 1.5), -2.5, 2.5)
    phases = np.array([recipe.pore, recipe.active, recipe.binder], np.float32)
    attenuation = phases[labels] * pillar
    attenuation *= np.where(labels == ACTIVE, spread.astype(np.float32)[owner], 1)
    attenuation *= np.where(labels == BINDER, texture, 1)
    _add_specks(rng, attenuation, first, recipe, pillar & (labels == ACTIVE))
    return labels, attenuation.astype(np.float32)


def _add_specks(
    rng: np.random.Generator, attenuation: F32, depth: F32, recipe: Electrode, allowed: NDArray[np.bool_]
) -> None:
    inside = np.flatnonzero(allowed & (depth < -4))
    count = min(len(inside), round(recipe.specks_per_million * attenuation.size / 1e6))
    for spot in rng.choice(inside, count, replace=False):
        centre = np.unravel_index(spot, attenuation.shape)
        box = tuple(slice(max(0, int(c) - 3), int(c) + 4) for c in centre)
        part = attenuation[box]
        axes = np.ogrid[tuple(slice(n) for n in part.shape)]
        away = sum((axis + cut.start - c) ** 2 for axis, cut, c in zip(axes, box, centre, strict=True))
        part[away < rng.uniform(1.5, 2.6) ** 2] = recipe.speck


def scan(attenuation: F32, seed: int, scanner: Scanner, progress: Progress | None = None) -> F32:
    """Reconstructed attenuation (z, y, x) of an attenuation (z, y, x), by Beer-Lambert, noise, gain errors, then FBP.

    A detector row sees one slice, so gain errors, constant over the angles, become rings; they reach over a few slices,
    as dust on a scintillator does. Infinite `Scanner.photons` mean no noise. `progress(done, total)` counts slices.
    """
    rng = np.random.default_rng([seed, 1])
    depth = len(attenuation)
    beam = ParallelBeam((attenuation.shape[1], attenuation.shape[2]), scanner.angles)
    gain = ndimage.gaussian_filter1d(
        rng.standard_normal((depth, beam.bins), np.float32), 2.0, axis=0, mode="wrap", truncate=3.0
    )
    gain = gain * np.abs(gain)  # Heavy tails: most bins are well calibrated, a few make the rings that one sees.
    gain = np.exp(scanner.gain_error * gain / gain.std()).T[None]
    blurred = ndimage.gaussian_filter(attenuation, scanner.blur, truncate=3.0) if scanner.blur else attenuation
    result = np.empty_like(attenuation)
    for start in range(0, depth, _BATCH):
        stop = min(start + _BATCH, depth)
        lines = beam.project(blurred[start:stop])
        passed = sum(np.float32(share) * np.exp(lines * np.float32(-factor)) for share, factor in scanner.spectrum)
        if np.isfinite(scanner.photons):
            passed = np.maximum(rng.poisson(scanner.photons * passed), 1).astype(np.float32) / scanner.photons
        result[start:stop] = beam.reconstruct(-np.log(passed * gain[..., start:stop]).astype(np.float32))
        if progress is not None:
            progress(stop, depth)
    return result


def make_phantom(
    shape: tuple[int, int, int] = (128, 192, 192),
    seed: int = 0,
    electrode: Electrode = ELECTRODE,
    scanner: Scanner = SCANNER,
    progress: Progress | None = None,
) -> Phantom:
    """The phantom of `make demo`; the same arguments give the same voxels. `progress(done, total)` counts slices.

    Grey values are stretched over uint16 by one range for the whole volume, from its 0.05th to its 99.95th percentile.
    """
    if progress is not None:
        progress(0, shape[0])
    labels, attenuation = build_electrode(shape, seed, electrode)
    grey = scan(attenuation, seed, scanner, progress)
    low, high = np.percentile(grey, [0.05, 99.95])
    image = np.clip((grey - low) * (65535 / max(high - low, 1e-12)), 0, 65535).astype(np.uint16)
    return Phantom(image, labels)


def multi_otsu(image: NDArray[Any], classes: int) -> NDArray[np.float64]:
    """The `classes - 1` thresholds of greatest between-class variance over a 256-bin histogram (Liao et al., 2001).

    Found by dynamic programming over the bins, which is exact; a threshold itself belongs to the class above it.
    """
    counts, edges = np.histogram(image, bins=256)
    centres = (edges[:-1] + edges[1:]) / 2
    mass = np.concatenate([[0.0], np.cumsum(counts)])
    moment = np.concatenate([[0.0], np.cumsum(counts * centres)])
    weight = mass[None] - mass[:, None]
    between = np.where(weight > 0, (moment[None] - moment[:, None]) ** 2 / np.where(weight > 0, weight, 1), -np.inf)
    best, cuts = between[0], []
    for _ in range(classes - 1):
        options = best[:, None] + between
        cuts.append(options.argmax(axis=0))
        best = options.max(axis=0)
    bins, at = [], len(counts)
    for cut in reversed(cuts):
        at = int(cut[at])
        bins.append(at)
    return np.asarray(edges[bins[::-1]])


def mean_foreground_dice(prediction: NDArray[Any], truth: NDArray[Any]) -> float:
    """Mean Dice over the classes other than 0 that occur in either label array; 1.0 when there is none."""
    scores = []
    for index in range(1, int(max(prediction.max(), truth.max())) + 1):
        said, true = prediction == index, truth == index
        size = int(said.sum()) + int(true.sum())
        if size:
            scores.append(2 * int((said & true).sum()) / size)
    return float(np.mean(scores)) if scores else 1.0


def multi_otsu_dice(phantom: Phantom) -> float:
    """Mean foreground Dice of thresholding the grey values of the whole volume: what one gets without a network."""
    thresholds = multi_otsu(phantom.image, len(ATTENUATION_ORDER))
    ranks = np.searchsorted(thresholds, phantom.image, side="right")
    return mean_foreground_dice(np.array(ATTENUATION_ORDER, np.uint8)[ranks], phantom.labels)
