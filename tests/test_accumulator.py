"""The accumulator against a float64 reference: right values, and bits that no order of patches can change."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from volseg.blend import ONE, Window, axis_weights
from volseg.geometry import Box, PatchLattice, Triple, stride_for
from volseg.inference import accumulator as module
from volseg.inference.accumulator import Accumulator

CPU = torch.device("cpu")
Index = Triple
Patches = dict[Index, torch.Tensor]


def make_lattice(shape: Triple, patch: Triple, overlap: float) -> PatchLattice:
    return PatchLattice(shape, patch, stride_for(patch, overlap))


def all_of(lattice: PatchLattice) -> list[Index]:
    return list(lattice.touching(Box.of(lattice.shape)))


def answers(lattice: PatchLattice, sums: int, seed: int = 0) -> Patches:
    """Random probabilities of every patch; with one channel those of class 1, else a softmax."""
    rng = np.random.default_rng(seed)
    found = {}
    for index in all_of(lattice):
        logits = rng.normal(0, 2, (max(2, sums), *lattice.answer))
        values = np.exp(logits) / np.exp(logits).sum(axis=0)
        found[index] = torch.from_numpy(values[-sums:].astype(np.float32))
    return found


def accumulate(
    lattice: PatchLattice, patches: Patches, window: Window = "gaussian", box: Box | None = None, order: Any = None
) -> Accumulator:
    sums = next(iter(patches.values())).shape[0]
    found = Accumulator(box or Box.of(lattice.shape), [lattice], window, sums, CPU)
    indices = list(lattice.touching(found.box))
    for i in order.permutation(len(indices)) if order else range(len(indices)):
        found.add(indices[i], patches[indices[i]])
    return found


def reference(lattice: PatchLattice, patches: Patches, window: Window) -> NDArray[np.float64]:
    """Blend in float64 by the definition: weighted mean over all patches, each axis normalised."""
    sums = next(iter(patches.values())).shape[0]
    volume = Box.of(lattice.shape)
    total = np.zeros((sums, *lattice.shape))
    for index, probability in patches.items():
        inside = lattice.box(index).intersect(volume)
        part = tuple(slice(0, side) for side in inside.shape)
        z, y, x = (axis_weights(axis, i, window)[s] for axis, i, s in zip(lattice.axes, index, part, strict=True))
        weight = z[:, None, None] * y[:, None] * x
        total[(slice(None), *inside.slices)] += probability.numpy()[(slice(None), *part)].astype(np.float64) * weight
    return total


LATTICES = [
    make_lattice((20, 23, 17), (8, 8, 8), 0.5),
    make_lattice((20, 23, 17), (8, 12, 6), 0.25),
    make_lattice((1, 30, 29), (1, 16, 16), 0.5),
    make_lattice((5, 11, 3), (8, 8, 8), 0.5),
    make_lattice((16, 16, 16), (8, 8, 8), 0.0),
    PatchLattice((20, 23, 17), (12, 12, 12), (4, 3, 4), (2, 3, 2)),
]


@pytest.mark.parametrize("window", ["gaussian", "constant"])
@pytest.mark.parametrize("sums", [1, 3])
@pytest.mark.parametrize("lattice", LATTICES, ids=str)
def test_sums_are_those_of_float64(lattice: PatchLattice, sums: int, window: Window) -> None:
    patches = answers(lattice, sums)
    expected = reference(lattice, patches, window)
    found = accumulate(lattice, patches, window)
    sum_ = found._sum.numpy().astype(np.float64) / ONE
    np.testing.assert_allclose(sum_, expected, rtol=0, atol=5e-7)

    labels, probabilities = found.labels(0.5).numpy(), found.probabilities().numpy()
    assert labels.dtype == probabilities.dtype == np.uint8
    every = expected if sums > 1 else np.concatenate([1 - expected, expected])
    assert probabilities.shape == every.shape
    assert np.abs(probabilities - 255 * every).max() <= 0.5 + 1e-3
    # Where two classes are closer than the resolution, either may win.
    ordered = np.sort(every, axis=0)
    clear = ordered[-1] - ordered[-2] > 2e-6
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(labels[clear], every.argmax(axis=0)[clear])


@pytest.mark.parametrize("sums", [1, 4])
@pytest.mark.parametrize("lattice", LATTICES, ids=str)
def test_any_order_of_patches_gives_the_same_bits(lattice: PatchLattice, sums: int) -> None:
    patches = answers(lattice, sums, seed=3)
    first = accumulate(lattice, patches)
    for seed in range(4):
        other = accumulate(lattice, patches, order=np.random.default_rng(seed))
        assert torch.equal(first._sum, other._sum)
        assert torch.equal(first.labels(0.5), other.labels(0.5))
        assert torch.equal(first.probabilities(), other.probabilities())


VIEWS = [
    make_lattice((20, 23, 17), (1, 12, 8), 0.5),
    make_lattice((20, 23, 17), (12, 1, 8), 0.5),
    make_lattice((20, 23, 17), (16, 24, 1), 0.25),
]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("sums", [1, 3])
def test_several_views_are_averaged(count: int, sums: int) -> None:
    """The mean of the views in float64; in any order of views and patches; and it is one where all agree."""
    views = VIEWS[:count]
    patches = [answers(lattice, sums, seed) for seed, lattice in enumerate(views)]
    expected = sum(reference(of, p, "gaussian") for of, p in zip(views, patches, strict=True)) / count
    found = Accumulator(Box.of(views[0].shape), views, "gaussian", sums, CPU)
    shuffled = Accumulator(Box.of(views[0].shape), views, "gaussian", sums, CPU)
    everything = [(v, i) for v, of in enumerate(views) for i in all_of(of)]
    for view, index in everything:
        found.add(index, patches[view][index], view)
    for place in np.random.default_rng(7).permutation(len(everything)):
        view, index = everything[place]
        shuffled.add(index, patches[view][index], view)
    np.testing.assert_allclose(found._sum.numpy() / ONE, expected, rtol=0, atol=5e-7)
    assert torch.equal(found._sum, shuffled._sum)

    certain = Accumulator(Box.of(views[0].shape), views, "gaussian", 1, CPU)
    for view, index in everything:
        certain.add(index, torch.ones((1, *views[view].answer)), view)
    assert (certain._sum.to(torch.int64) - ONE).abs().max().item() <= 5e-7 * ONE


@pytest.mark.parametrize("window", ["gaussian", "constant"])
def test_any_part_of_a_volume_has_the_bits_of_the_whole(window: Window) -> None:
    lattice = LATTICES[0]
    patches = answers(lattice, 3, seed=4)
    whole = accumulate(lattice, patches, window)
    for box in (Box((0, 0, 0), (7, 9, 5)), Box((3, 5, 2), (4, 6, 3)), Box((11, 2, 6), (20, 23, 17))):
        part = accumulate(lattice, patches, window, box)
        assert torch.equal(part._sum, whole._sum[(slice(None), *box.slices)])


def test_a_patch_elsewhere_adds_nothing() -> None:
    lattice = LATTICES[0]
    found = Accumulator(Box((0, 0, 0), (3, 3, 3)), [lattice], "gaussian", 1, CPU)
    found.add((3, 0, 0), torch.ones((1, 8, 8, 8)))
    assert not found._sum.any()


def test_products_are_rounded_to_the_nearest_step() -> None:
    lattice = make_lattice((1, 1, 4), (1, 1, 4), 0.0)
    found = Accumulator(Box.of(lattice.shape), [lattice], "constant", 1, CPU)
    found.add((0, 0, 0), (torch.tensor([0.25, 0.75, 1.75, 2.25]) / ONE).reshape(1, 1, 1, 4))
    assert found._sum.flatten().tolist() == [0, 1, 2, 2]


def filled(sums: NDArray[np.int64]) -> Accumulator:
    """Return an accumulator that holds these sums (c, z, y, x)."""
    box = Box.of((sums.shape[1], sums.shape[2], sums.shape[3]))
    found = Accumulator(box, [PatchLattice(box.shape, box.shape, box.shape)], "constant", sums.shape[0], CPU)
    found._sum.copy_(torch.from_numpy(sums.astype(np.int32)))
    return found


def test_ties_go_to_the_lowest_class() -> None:
    """Every pattern of three sums out of three values, in one volume."""
    patterns = np.array(list(product([10, 20, 30], repeat=3))).T.reshape(3, 1, 1, 27)
    np.testing.assert_array_equal(filled(patterns).labels(0.5).numpy(), patterns.argmax(axis=0))
    assert filled(np.full((3, 1, 1, 1), ONE // 3)).labels(0.5).item() == 0
    assert filled(np.zeros((3, 1, 1, 1), np.int64)).labels(0.5).item() == 0


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.75])
def test_class_1_wins_above_the_threshold_only(threshold: float) -> None:
    at = round(threshold * ONE)
    sums = np.array([0, at - 1, at, at + 1, ONE]).reshape(1, 1, 1, 5)
    assert filled(sums).labels(threshold).flatten().tolist() == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(("classes", "dtype"), [(256, torch.uint8), (257, torch.int32), (300, torch.int32)])
def test_many_classes(classes: int, dtype: torch.dtype) -> None:
    sums = np.random.default_rng(0).integers(0, ONE, (classes, 4, 5, 6))
    sums[classes - 1, 0, 0, 0] = ONE + 1
    labels = filled(sums).labels(0.5)
    assert labels.dtype == dtype
    assert labels[0, 0, 0].item() == classes - 1
    np.testing.assert_array_equal(labels.numpy(), sums.argmax(axis=0))


@pytest.mark.parametrize("slab", [1, 7, 60, 10**9])
@pytest.mark.parametrize("sums", [1, 3])
def test_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch, sums: int, slab: int) -> None:
    values = np.random.default_rng(1).integers(0, ONE + 1, (sums, 11, 5, 4))
    whole = filled(values)
    labels, probabilities = whole.labels(0.5), whole.probabilities()
    monkeypatch.setattr(module, "SLAB_VOXELS", slab)
    parts = filled(values)
    assert torch.equal(parts.labels(0.5), labels)
    assert torch.equal(parts.probabilities(), probabilities)
    slabs = parts._slabs()
    assert [part.start for part in slabs[1:]] == [part.stop for part in slabs[:-1]]
    assert (slabs[0].start, slabs[-1].stop) == (0, 11)
    assert all((part.stop - part.start) * 20 <= max(slab, 20) for part in slabs)


def test_probabilities_are_rounded_to_the_nearest_of_255() -> None:
    steps = np.arange(256)
    exact = np.round(steps * (ONE / 255)).astype(np.int64)
    sums = np.stack([exact, ONE - exact]).reshape(2, 1, 1, 256)
    np.testing.assert_array_equal(filled(np.concatenate([sums, sums[:1]])).probabilities()[0, 0, 0].numpy(), steps)
    one = filled(sums[:1]).probabilities()[:, 0, 0].numpy().astype(int)
    np.testing.assert_array_equal(one, [255 - steps, steps])
    # Sums that rounding has pushed past 0 or 1 stay inside.
    beyond = filled(np.array([-5, -ONE // 50, ONE + 300, ONE + ONE // 50]).reshape(1, 1, 1, 4)).probabilities()[:, 0, 0]
    assert beyond.tolist() == [[255, 255, 0, 0], [0, 0, 255, 255]]


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_probabilities_of_a_voxel_sum_to_one(classes: int) -> None:
    lattice = LATTICES[1]
    patches = answers(lattice, 1 if classes == 2 else classes, seed=8)
    total = accumulate(lattice, patches).probabilities().to(torch.int64).sum(dim=0)
    # Two classes share one sum; more are rounded apart, half a step each.
    most = 0 if classes == 2 else classes / 2
    assert (total - 255).abs().max().item() <= most


def test_certain_answers_survive_blending_exactly() -> None:
    """One-hot answers that agree everywhere give 255 and 0 whatever the weights."""
    for lattice in LATTICES:
        truth = torch.from_numpy(np.random.default_rng(2).integers(0, 3, lattice.shape))
        patches = {}
        for index in all_of(lattice):
            padded = torch.zeros(lattice.answer, dtype=torch.int64)
            inside = lattice.box(index).intersect(Box.of(lattice.shape))
            padded[tuple(slice(0, side) for side in inside.shape)] = truth[inside.slices]
            patches[index] = torch.nn.functional.one_hot(padded, 3).movedim(-1, 0).float()
        found = accumulate(lattice, patches)
        assert torch.equal(found.labels(0.5).to(torch.int64), truth)
        assert torch.equal(found.probabilities() == 255, torch.nn.functional.one_hot(truth, 3).movedim(-1, 0) == 1)
