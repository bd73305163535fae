"""The demo's CT phantom: its projector, its reconstruction, its structure, and how hard it is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from volseg.demo.phantom import (
    ACTIVE,
    BINDER,
    CLASS_NAMES,
    ELECTRODE,
    PORE,
    SCANNER,
    ParallelBeam,
    Phantom,
    Scanner,
    build_electrode,
    make_phantom,
    mean_foreground_dice,
    multi_otsu,
    multi_otsu_dice,
    scan,
)

SHAPE = (24, 112, 112)
IDEAL = Scanner(photons=math.inf, gain_error=0.0, spectrum=((1.0, 1.0),))


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom(SHAPE, seed=3)


def disc(radius: float, value: float = 0.01, side: int = 96) -> NDArray[np.float32]:
    away = np.hypot(*np.ogrid[-(side - 1) / 2 : side / 2, -(side - 1) / 2 : side / 2])
    return np.where(away < radius, value, 0).astype(np.float32)[None]


def test_the_projector_preserves_mass_at_every_angle() -> None:
    slices = np.random.default_rng(0).random((2, 20, 31), np.float32)
    lines = ParallelBeam((20, 31), 17).project(slices)
    assert lines.shape == (17, ParallelBeam((20, 31), 17).bins, 2)
    np.testing.assert_allclose(lines.sum(axis=1), np.tile(slices.sum(axis=(1, 2)), (17, 1)), rtol=1e-4)


def test_a_point_lands_where_the_geometry_says() -> None:
    beam = ParallelBeam((41, 61), 2)
    slices = np.zeros((1, 41, 61), np.float32)
    slices[0, 26, 37] = 1.0
    lines = beam.project(slices)[..., 0]
    centroid = (lines * np.arange(beam.bins)).sum(axis=1) - (beam.bins - 1) / 2
    np.testing.assert_allclose(centroid, [37 - 30, 26 - 20], atol=1e-4)


def test_projection_and_backprojection_are_adjoint() -> None:
    rng = np.random.default_rng(1)
    beam = ParallelBeam((15, 22), 9)
    slices = rng.random((1, 15, 22), np.float32)
    lines = rng.random((9, beam.bins), np.float32)
    forward = float((beam.project(slices)[..., 0] * lines).sum())
    backward = float((slices[0].ravel() * (beam.matrix @ lines.ravel())).sum())
    assert forward == pytest.approx(backward, rel=1e-4)


def test_a_noise_free_disc_recovers_its_attenuation() -> None:
    result = scan(disc(30.0), 0, IDEAL)[0]
    inside, outside = disc(26.0)[0] > 0, disc(34.0)[0] == 0
    assert result[inside].mean() == pytest.approx(0.01, rel=0.01)
    assert result[inside].std() < 0.02 * 0.01
    assert abs(result[outside].mean()) < 0.01 * 0.01


def test_slices_are_reconstructed_independently_and_in_order() -> None:
    slices = np.concatenate([disc(10.0 + z, side=48) for z in range(11)])
    whole = scan(slices, 0, Scanner(photons=math.inf, gain_error=0.0, blur=0.0))
    single = scan(slices[9:10], 0, Scanner(photons=math.inf, gain_error=0.0, blur=0.0))
    np.testing.assert_allclose(whole[9:10], single, atol=1e-6)


def test_a_spectrum_of_two_lines_causes_cupping() -> None:
    def edge_over_centre(scanner: Scanner) -> float:
        result = scan(disc(40.0), 0, scanner)[0]
        rim = (disc(36.0)[0] > 0) & (disc(30.0)[0] == 0)
        return float(result[rim].mean() / result[disc(10.0)[0] > 0].mean())

    assert edge_over_centre(IDEAL) == pytest.approx(1.0, abs=0.01)
    assert edge_over_centre(Scanner(photons=math.inf, gain_error=0.0, spectrum=((0.5, 1.6), (0.5, 0.4)))) > 1.03


def test_gain_errors_make_rings_and_few_photons_make_noise() -> None:
    def errors(scanner: Scanner) -> tuple[float, float]:
        """Spread of an error's mean over circles around the axis, and of what is left of it."""
        error = (scan(disc(40.0), 0, scanner) - scan(disc(40.0), 0, IDEAL))[0]
        ring = np.hypot(*np.ogrid[-47.5:48, -47.5:48]).astype(int)
        circles = np.bincount(ring.ravel(), error.ravel()) / np.bincount(ring.ravel())
        return float(circles[5:40].std()), float((error - circles[ring])[ring < 40].std())

    line = ((1.0, 1.0),)
    rings, rest = errors(Scanner(photons=math.inf, gain_error=0.02, spectrum=line))
    noise_rings, noise = errors(Scanner(photons=800, gain_error=0.0, spectrum=line))
    less = errors(Scanner(photons=80_000, gain_error=0.0, spectrum=line))[1]
    assert rings > rest / 2
    assert noise > 4 * noise_rings
    assert noise == pytest.approx(10 * less, rel=0.2)


def test_the_same_seed_gives_the_same_voxels_and_another_seed_others(phantom: Phantom) -> None:
    again, other = make_phantom(SHAPE, seed=3), make_phantom(SHAPE, seed=4)
    assert np.array_equal(phantom.image, again.image)
    assert np.array_equal(phantom.labels, again.labels)
    assert not np.array_equal(phantom.labels, other.labels)


def test_what_a_phantom_is_made_of(phantom: Phantom) -> None:
    assert phantom.image.shape == phantom.labels.shape == SHAPE
    assert phantom.image.dtype == np.dtype(np.uint16)
    assert phantom.labels.dtype == np.dtype(np.uint8)
    assert phantom.class_names == CLASS_NAMES
    assert set(np.unique(phantom.labels)) == {PORE, ACTIVE, BINDER}
    assert len(phantom.voxel_size_um) == 3
    assert (int(phantom.image.min()), int(phantom.image.max())) == (0, 65535)
    pillar = np.hypot(*np.ogrid[-55.5:56, -55.5:56]) < 50
    shares = np.bincount(phantom.labels[:, pillar].ravel()) / phantom.labels[:, pillar].size
    assert 0.10 < shares[PORE] < 0.50
    assert 0.30 < shares[ACTIVE] < 0.60
    assert 0.15 < shares[BINDER] < 0.45
    assert not phantom.labels[:, :4, :4].any()


def test_phases_are_brighter_in_the_order_of_their_attenuation(phantom: Phantom) -> None:
    means = [phantom.image[phantom.labels == phase].mean() for phase in (PORE, BINDER, ACTIVE)]
    assert means[1] > 1.2 * means[0]
    assert means[2] > 1.2 * means[1]


def test_the_structure_is_three_dimensional(phantom: Phantom) -> None:
    near = np.mean(phantom.labels[1:] == phantom.labels[:-1])
    far = np.mean(phantom.labels[20:] == phantom.labels[:-20])
    assert near > 0.95
    assert far < 0.85


def test_thresholds_fail_because_of_the_imaging_not_of_the_structure(phantom: Phantom) -> None:
    labels, attenuation = build_electrode(SHAPE, 3, ELECTRODE)
    assert np.array_equal(labels, phantom.labels)
    ideal = np.clip(scan(attenuation, 3, IDEAL) * 2e6, 0, 65535).astype(np.uint16)
    assert multi_otsu_dice(phantom) < 0.75
    assert multi_otsu_dice(Phantom(ideal, labels)) > multi_otsu_dice(phantom) + 0.12


def test_progress_counts_the_slices_up_to_the_last() -> None:
    seen: list[tuple[int, int]] = []
    make_phantom((11, 40, 40), seed=0, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 11)
    assert seen[-1] == (11, 11)
    assert seen == sorted(seen)


def test_sides_may_differ_and_the_default_scanner_may_be_replaced() -> None:
    wide = make_phantom((5, 48, 70), seed=1, scanner=IDEAL)
    assert wide.image.shape == (5, 48, 70)
    assert not np.array_equal(wide.image, make_phantom((5, 48, 70), seed=1, scanner=SCANNER).image)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_multi_otsu_finds_the_best_of_all_thresholds(classes: int) -> None:
    values = np.random.default_rng(classes).choice([0, 3, 4, 9, 11, 20, 22, 30], 500).astype(np.float64)
    cuts = multi_otsu(values, classes)

    def within(edges: tuple[float, ...] | NDArray[np.float64]) -> float:
        group = np.searchsorted(edges, values, side="right")
        parts = [values[group == g] for g in np.unique(group)]
        return float(sum(((part - part.mean()) ** 2).sum() for part in parts))

    best = min(within(edges) for edges in itertools.combinations([1.0, 3.5, 6.0, 10.0, 15.0, 21.0, 25.0], classes - 1))
    assert within(cuts) == pytest.approx(best, rel=1e-9)


def test_mean_dice_leaves_out_the_background_and_absent_classes() -> None:
    truth = np.array([0, 0, 1, 1, 3, 3])
    assert mean_foreground_dice(truth, truth) == 1.0
    assert mean_foreground_dice(np.array([0, 0, 1, 0, 3, 3]), truth) == pytest.approx((2 / 3 + 1) / 2)
    assert mean_foreground_dice(np.zeros(3, int), np.zeros(3, int)) == 1.0
