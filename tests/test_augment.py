"""Changes of training patches: one geometry for all, each strength alone, rings and drift, and the preview."""

import dataclasses
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from volseg.geometry import Triple
from volseg.training import artefacts
from volseg.training.artefacts import draw_drift, draw_rings
from volseg.training.augment import Augmentation, change_intensity, draw_geometry, stretch, take
from volseg.training.preview import preview
from volseg.training.region import IGNORED

PLANES = ((0, 1), (0, 2), (1, 2))
STILL = Augmentation(
    planes=(), quarter_turns=(), flips=(), warp_probability=1.0, angle=0, zoom=0, elastic=0, intensity_probability=1.0,
    gain=0, offset=0, gamma=0, noise=0, field=0, blur=0,
)  # fmt: skip


def grid_of(how: Augmentation, patch: Triple, seed: int) -> Tensor:
    """Return the drawn source coordinates relative to those of the patch itself."""
    points = draw_geometry(how, patch, np.random.default_rng(seed)).points
    assert points is not None
    axes = [torch.arange(n, dtype=torch.float32) - (n - 1) / 2 for n in patch]
    return stretch(points, patch) - torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def changed(how: Augmentation, image: Tensor, seed: int) -> Tensor:
    before = image.clone()
    result = change_intensity(image, how, np.random.default_rng(seed))
    assert torch.equal(image, before), "the image itself must stay as it is"
    assert result.shape == image.shape
    assert torch.equal(result, change_intensity(image, how, np.random.default_rng(seed)))
    return result


# ---------------------------------------------------------------- shape


@pytest.mark.parametrize("sides", [(1, 20, 30), (7, 5, 9), (40, 3, 2), (2, 1, 1)])
def test_stretched_points_are_linear_between_them(sides: Triple) -> None:
    coarse = tuple(1 if n == 1 else 6 for n in sides)
    points = np.random.default_rng(0).standard_normal((*coarse, 2)).astype(np.float32)
    expected = functional.interpolate(
        torch.from_numpy(points).permute(3, 0, 1, 2)[None], sides, mode="trilinear", align_corners=True
    )
    torch.testing.assert_close(stretch(points, sides), expected[0].permute(1, 2, 3, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("patch", [(12, 16, 16), (1, 24, 20)])
def test_an_image_is_read_where_its_geometry_says(patch: Triple) -> None:
    how = Augmentation(planes=PLANES, quarter_turns=PLANES, flips=(0, 1, 2), warp_probability=1.0, shift=0.2)
    size = tuple(3 * n if n > 1 else 1 for n in patch)
    places = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in size), indexing="ij"))
    middle = np.array([(n - 1) / 2 for n in size], np.float32)
    for seed in range(8):
        geometry = draw_geometry(how, patch, np.random.default_rng(seed))
        assert geometry.points is not None
        found = geometry.finish(take(places, geometry.points + middle, patch))
        points = stretch(geometry.points + middle, patch)
        expected = geometry.finish(points.permute(3, 0, 1, 2))
        inside = torch.stack([(points[..., i] >= 0) & (points[..., i] <= n - 1) for i, n in enumerate(size)]).all(0)
        inside = geometry.finish(inside[None]).expand(3, -1, -1, -1)
        assert inside.float().mean() > 0.6
        torch.testing.assert_close(found[inside], expected[inside], rtol=0, atol=1e-3)


def test_flips_and_quarter_turns_reach_every_position() -> None:
    how = dataclasses.replace(STILL, flips=(0, 1, 2), quarter_turns=PLANES, warp_probability=0.0)
    cube = torch.arange(27.0).reshape(1, 3, 3, 3)
    seen = set()
    for seed in range(400):
        geometry = draw_geometry(how, (3, 3, 3), np.random.default_rng(seed))
        assert geometry.points is None
        values = geometry.finish(cube)
        assert sorted(values.flatten().tolist()) == list(range(27))
        seen.add(tuple(values.flatten().tolist()))
    assert len(seen) > 30
    turns = dataclasses.replace(how, flips=(), quarter_turns=((1, 2),))
    drawn = [draw_geometry(turns, (1, 2, 2), np.random.default_rng(seed)) for seed in range(40)]
    assert len({tuple(d.finish(cube[:, :1, :2, :2]).flatten().tolist()) for d in drawn}) == 4
    flat = draw_geometry(how, (1, 4, 5), np.random.default_rng(0))
    assert flat.turn is None, "unequal sides cannot be exchanged"


def test_a_shift_moves_the_whole_patch_by_a_share_of_its_sides() -> None:
    how = dataclasses.replace(STILL, shift=0.25)
    for patch in ((1, 40, 20), (8, 40, 20)):
        moves = torch.stack([grid_of(how, patch, seed).reshape(-1, 3) for seed in range(60)])
        torch.testing.assert_close(moves, moves[:, :1].expand_as(moves), rtol=0, atol=1e-4)
        most = moves[:, 0].abs().amax(0)
        limits = torch.tensor([0.25 * n if n > 1 else 0.0 for n in patch])
        assert (most <= limits + 1e-4).all()
        assert (most >= 0.8 * limits).all()


@pytest.mark.parametrize("strength", [{"angle": 30.0}, {"zoom": 0.5}, {"shift": 0.3}, {"elastic": 0.1}])
def test_each_change_of_shape_has_a_strength_of_its_own(strength: dict[str, Any]) -> None:
    planes = dataclasses.replace(STILL, planes=PLANES)
    for patch in ((1, 16, 16), (8, 8, 8)):
        assert float(grid_of(planes, patch, 0).abs().max()) < 1e-4
        moved = grid_of(dataclasses.replace(planes, **strength), patch, 0).abs()
        assert float(moved.max()) > 0.1
        if patch[0] == 1:
            assert float(moved[..., 0].max()) == 0.0, "a slice stays in its plane"


# ---------------------------------------------------------------- grey values

NOISE = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 6, 24, 20), np.float32))


@pytest.mark.parametrize("name", ["gain", "offset", "gamma", "noise", "field", "blur", "rings", "drift"])
def test_each_change_of_grey_values_has_a_strength_of_its_own(name: str) -> None:
    strength: dict[str, Any] = {name: 1.0}
    how = dataclasses.replace(STILL, **strength)
    for image in (NOISE, NOISE[:1, :1]):
        for seed in range(10):
            assert torch.equal(changed(STILL, image, seed), image)
        results = [changed(how, image, seed) for seed in range(30)]
        assert all(bool(torch.isfinite(r).all()) for r in results)
        different = sum(not torch.equal(r, image) for r in results)
        assert 3 <= different <= 30
        never = dataclasses.replace(how, intensity_probability=0.0)
        assert torch.equal(changed(never, image, 0), image)


def test_contrast_and_brightness_are_apart() -> None:
    for seed in range(20):
        scaled = changed(dataclasses.replace(STILL, gain=0.5), NOISE, seed)
        torch.testing.assert_close(scaled / NOISE, (scaled / NOISE)[:1, :1, :1, :1].expand_as(NOISE))
        assert 1 / 1.5 <= float((scaled / NOISE).mean()) <= 1.5
        lifted = changed(dataclasses.replace(STILL, offset=0.5), NOISE, seed) - NOISE
        assert float(lifted.std()) < 1e-6
        assert abs(float(lifted.mean())) <= 0.5


def test_gamma_keeps_the_range() -> None:
    how = dataclasses.replace(STILL, gamma=1.0)
    for seed in range(20):
        result = changed(how, NOISE, seed)
        assert float(result.min()) == pytest.approx(float(NOISE.min()), abs=1e-4)
        assert float(result.max()) == pytest.approx(float(NOISE.max()), abs=1e-4)


def test_a_blur_spreads_evenly_and_does_not_reach_the_other_border() -> None:
    how = dataclasses.replace(STILL, blur=3.0)
    flat, corner = torch.full((1, 1, 32, 32), 2.0), torch.zeros(1, 1, 32, 32)
    corner[..., 0, 0] = 1.0
    found = []
    for seed in range(40):
        torch.testing.assert_close(changed(how, flat, seed), flat)
        result = changed(how, corner, seed)
        assert float(result[..., 16:, :].abs().max()) == 0.0
        assert float(result[..., :, 16:].abs().max()) == 0.0
        found.append(float(result.max()))
    assert min(found) < 0.4
    assert max(found) == 1.0
    wide = changed(how, NOISE[:, :2], int(np.argmin(found)))
    torch.testing.assert_close(wide.mean((2, 3)), NOISE[:, :2].mean((2, 3)), rtol=0, atol=0.1), "slices stay apart"


# ---------------------------------------------------------------- rings and drift


def spread_along_arcs(plane: NDArray[np.float32], distance: float) -> float:
    """Return the share of the variance that is along arcs around the best of all centres at `distance` voxels."""
    y, x = np.indices(plane.shape) - (np.array(plane.shape)[:, None, None] - 1) / 2
    shares = []
    for angle in np.linspace(0, 2 * np.pi, 720, endpoint=False):
        radius = np.hypot(y - distance * np.sin(angle), x - distance * np.cos(angle))
        bins = (4 * (radius - radius.min())).astype(np.intp).ravel()
        sizes, sums = np.bincount(bins), np.bincount(bins, weights=plane.ravel())
        squares = np.bincount(bins, weights=plane.ravel() ** 2)
        shares.append((squares - sums**2 / np.maximum(sizes, 1)).sum())
    return float(min(shares) / max(((plane - plane.mean()) ** 2).sum(), 1e-12))


@pytest.mark.parametrize("sides", [0.3, 4.0])
def test_rings_are_constant_along_arcs_around_a_centre(monkeypatch: pytest.MonkeyPatch, sides: float) -> None:
    monkeypatch.setattr(artefacts, "_PARTIAL", 0.0)
    monkeypatch.setattr(artefacts, "_NEAREST", sides)
    monkeypatch.setattr(artefacts, "_FARTHEST", sides)
    shares = []
    for seed in range(8):
        pattern = draw_rings((1, 48, 40), 0, np.random.default_rng(seed))
        assert pattern.shape == (1, 48, 40)
        assert pattern.dtype == np.float32
        assert np.abs(pattern).max() == pytest.approx(1.0)
        shares.append(spread_along_arcs(pattern[0], sides * 48))
    assert max(shares) < 0.3
    assert min(shares) < 0.05
    noise = np.random.default_rng(0).normal(size=(48, 40)).astype(np.float32)
    assert spread_along_arcs(noise, sides * 48) > 0.6, "of what has no centre"


def test_rings_may_end_at_an_angle(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(partial: float, seed: int) -> float:
        monkeypatch.setattr(artefacts, "_PARTIAL", partial)
        return float((draw_rings((1, 64, 64), 0, np.random.default_rng(seed)) == 0).mean())

    shares = [(empty(0.0, seed), empty(1.0, seed)) for seed in range(40)]
    assert all(part >= whole for whole, part in shares)
    assert sum(0.1 < part < 0.95 and part > whole + 0.05 for whole, part in shares) > 25


def main_direction(plane: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the unit vector along which `plane` changes most."""
    down, right = np.gradient(plane.astype(np.float64))
    gradient = np.stack([down.ravel(), right.ravel()])
    direction: NDArray[np.float64] = np.linalg.eigh(gradient @ gradient.T)[1][:, 1]
    return direction


def test_rings_end_along_a_ray_from_their_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[NDArray[np.float32]] = []

    def keep(values: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
        seen.append(values)
        return np.ones_like(values)

    monkeypatch.setattr(artefacts, "_one_side", keep)
    monkeypatch.setattr(artefacts, "_PARTIAL", 1.0)
    # So far away, arcs are straight lines and rays are parallel.
    monkeypatch.setattr(artefacts, "_NEAREST", 200.0)
    monkeypatch.setattr(artefacts, "_FARTHEST", 200.0)
    for seed in range(10):
        pattern = draw_rings((1, 48, 48), 0, np.random.default_rng(seed))[0]
        assert abs(float(main_direction(pattern) @ main_direction(seen[-1]))) < 0.25, seed


def test_rings_lie_across_the_axis_of_rotation() -> None:
    for seed in range(10):
        upright = draw_rings((1, 40, 56), 1, np.random.default_rng(seed))
        lying = draw_rings((1, 56, 40), 2, np.random.default_rng(seed))
        np.testing.assert_array_equal(upright, lying.transpose(0, 2, 1))
        # In a slice that holds the axis, rows of one group of slices are the same stripes.
        steps = np.abs(np.diff(upright[0], axis=0)).max(1)
        assert (steps == 0).any() or seed
    volume = [draw_rings((8, 24, 24), 0, np.random.default_rng(seed)) for seed in range(20)]
    kinds = [len(np.unique(pattern.reshape(8, -1), axis=0)) for pattern in volume]
    assert min(kinds) <= 2
    assert max(kinds) >= 6


def test_rings_are_at_most_as_high_as_their_strength() -> None:
    how = dataclasses.replace(STILL, rings=0.7, rotation_axis=1)
    heights = [float((changed(how, NOISE, seed) - NOISE).abs().max()) for seed in range(40)]
    assert max(heights) <= 0.7 + 1e-5
    assert max(heights) > 0.5
    slices = [changed(how, torch.zeros(1, 1, 24, 20), seed) for seed in range(40)]
    assert any(float(s.std(2).max()) < 1e-6 < float(s.std()) for s in slices), "stripes in slices that hold the axis"
    both = changed(how, NOISE, int(np.argmax(heights))) - NOISE
    torch.testing.assert_close(both[0], both[1], rtol=0, atol=1e-5)


def test_drift_is_a_smooth_walk_along_its_axis() -> None:
    for seed in range(30):
        walk = draw_drift(64, np.random.default_rng(seed))
        assert np.abs(walk).max() == pytest.approx(1.0)
        assert walk.mean() == pytest.approx(0.0, abs=1e-5)
        assert np.abs(np.diff(walk)).max() < 0.35
    single = [float(draw_drift(1, np.random.default_rng(seed))[0]) for seed in range(50)]
    assert -1 <= min(single) < -0.6
    assert 0.6 < max(single) <= 1


@pytest.mark.parametrize("axis", [0, 1])
def test_drift_changes_brightness_and_contrast_along_the_axis_of_rotation(axis: int) -> None:
    how = dataclasses.replace(STILL, drift=0.8, rotation_axis=axis)
    others = [i for i in (1, 2, 3) if i != 1 + axis]
    dark, bright = torch.zeros(1, 6, 24, 20), torch.ones(1, 6, 24, 20)
    seen = 0
    for seed in range(20):
        lift = changed(how, dark, seed)
        gain = changed(how, bright, seed) - lift
        for values, low, high in ((lift, -0.8, 0.8), (gain, 1 / 1.4, 1.4)):
            assert low - 1e-5 <= float(values.min())
            assert float(values.max()) <= high + 1e-5
            assert float(values.std(others, correction=0).max()) < 1e-5
        seen += float(lift.std()) > 0.02 and float(gain.std()) > 0.01
    assert seen > 3
    slices = [changed(how, dark[:, :1, :1], seed) for seed in range(20)]
    assert len({float(s.mean()) for s in slices}) > 5, "a single slice as a whole"


# ---------------------------------------------------------------- preview


def picture(pairs: list[tuple[Tensor, Tensor]], colours: dict[int, tuple[int, int, int] | None]) -> NDArray[np.uint8]:
    with Image.open(BytesIO(preview(pairs, colours))) as opened:
        assert opened.format == "PNG"
        return np.asarray(opened.convert("RGB"))


def count(shown: NDArray[np.uint8], colour: tuple[int, int, int]) -> int:
    return int((np.abs(shown.astype(int) - colour).max(-1) <= 1).sum())


def test_a_preview_shows_image_and_labels_side_by_side() -> None:
    image = torch.full((1, 3, 160, 160), -1.0)
    image[:, :, 80:] = 1.0
    labels = torch.zeros((3, 160, 160), dtype=torch.int64)
    labels[1, :, :40] = 1
    one = picture([(image, labels)], {0: None, 1: (255, 0, 0)})
    # Half of white and half of red; half of black and half of red.
    assert count(one, (255, 128, 128)) == 80 * 40
    assert count(one, (128, 0, 0)) == 80 * 40
    assert count(one, (255, 255, 255)) >= 80 * 160 + 80 * 120
    labels[1, :, 80:] = IGNORED
    hatched = picture([(image, labels)], {0: None, 1: (255, 0, 0)})
    assert hatched.shape == one.shape
    assert count(one, (255, 255, 255)) - count(hatched, (255, 255, 255)) == 80 * 80 // 8
    several = picture([(image, labels)] * 5, {})
    assert several.size > 4 * one.size


def test_the_patches_of_a_preview_share_one_range_of_greys_and_show_colours() -> None:
    image = torch.linspace(-1, 1, 160 * 160).reshape(1, 1, 160, 160)
    labels = torch.zeros((1, 160, 160), dtype=torch.int64)
    bright = picture([(image, labels), (image + 5, labels)], {})
    # Values of -1 to 1 and of 4 to 6 leave the greys in the middle of their common range empty.
    greys = bright[(bright == bright[..., :1]).all(axis=-1)][:, 0]
    assert not ((greys > 90) & (greys < 165)).any()
    rgb = torch.full((3, 1, 160, 160), -1.0)
    rgb[0] = 1.0
    assert count(picture([(rgb, labels)], {}), (255, 0, 0)) == 2 * 160 * 160


def test_a_preview_frames_an_answer_that_is_smaller_than_its_patch() -> None:
    image = torch.zeros((1, 1, 40, 40))
    image[..., 0, 0], image[..., 0, 1] = -1.0, 1.0
    whole = picture([(image, torch.ones((1, 40, 40), dtype=torch.int64))], {1: (0, 0, 255)})
    inner = picture([(image, torch.ones((1, 20, 20), dtype=torch.int64))], {1: (0, 0, 255)})
    blue = [(g // 2, g // 2, (g + 255) // 2) for g in (127, 128)]
    # Voxels of a small patch are drawn as 4 x 4 pixels.
    assert max(count(whole, b) for b in blue) >= 16 * (40 * 40 - 2)
    assert max(count(inner, b) for b in blue) == 16 * 18 * 18
