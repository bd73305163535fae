"""What a training leaves to planning: dimension, network, patch, batch, strength of changes; and what is refused."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import store
from volseg.errors import BundleError, PlanError, SpecError
from volseg.geometry import Box, Triple
from volseg.spec import TrainSpec
from volseg.storage.volume import open_volume
from volseg.training.augment import Augmentation
from volseg.training.greys import GreySpread
from volseg.training.index import Asked, LabelIndex, build_index
from volseg.training.planning import DataFacts, Means, TrainPlan, choose_dims, make_plan
from volseg.training.strengths import augmentation_for
from volseg.training.view import NetworkView, TileCache

BASE = {"image": "i", "labels": "l", "out": "o"}
Voxel = tuple[float, float, float]


def plan(
    region: Triple, voxel: Voxel | None = None, memory: int = 1 << 40, speed: float = 1e12, **options: Any
) -> TrainPlan:
    spec = TrainSpec.read(BASE | {"dims": 3} | options)
    return make_plan(spec, DataFacts((region,), voxel, 1, 2), Means(memory, speed))


def size(made: TrainPlan) -> tuple[tuple[int, ...], bool]:
    arguments = made.config.model_dump()
    return arguments["widths"], arguments["stem"]


def test_planned_patches_fit_region_pooling_and_voxels() -> None:
    assert plan((100, 1000, 1000), dims=2).patch == (1, 256, 256)
    assert plan((1000, 20, 1000), dims=2, axis="y").patch == (1, 256, 256)
    assert plan((100, 1000, 1000), dims=2, side=128).patch == (1, 128, 128)
    assert plan((14, 100, 130), dims=2).patch == (1, 96, 128)
    assert plan((200, 200, 200)).patch == (64, 64, 64)
    thin = plan((20, 500, 500), (5, 1, 1))
    assert thin.patch[0] < 32
    for made in (thin, plan((3, 9, 200)), plan((5, 6, 7)), plan((1, 1, 1))):
        assert made.config.fit(made.patch, up=True) == made.patch == made.answer


def test_axes_with_coarse_voxels_are_pooled_later() -> None:
    pools = plan((20, 500, 500), (5, 1, 1)).config.model_dump()["pools"]
    assert pools[:2] == ((1, 2, 2), (1, 2, 2))
    assert plan((3, 9, 200)).config.model_dump()["pools"][0] == (1, 2, 2)


def test_an_unpadded_network_gets_a_patch_whose_answer_is_what_was_wanted() -> None:
    made = plan((20, 512, 512), dims=2, network={"padded": False}, widths=(8, 16, 32, 64, 128))
    assert made.config.margin == (0, 92, 92)
    assert made.config.fit(made.patch, up=True) == made.patch
    assert abs(made.answer[1] - 256) <= 8


def test_a_patch_that_no_network_or_region_takes_is_refused() -> None:
    with pytest.raises(PlanError, match=r"1,31,32 is no multiple of the pooling factor 1,2,2.*use 1,30,32 or 1,32,32"):
        plan((8, 64, 64), dims=2, widths=(8, 16), patch=(1, 31, 32))
    with pytest.raises(PlanError, match="takes one at a time"):
        plan((8, 64, 64), dims=2, patch=(2, 32, 32))
    with pytest.raises(PlanError, match=r"patch 1,128,64 is larger than the training region 8,100,64.*use 1,112,64"):
        plan((8, 100, 64), dims=2, patch=(1, 128, 64), widths=(8, 8, 8, 8, 8))
    # A region that no side of the network meets may be filled up.
    assert plan((8, 100, 64), dims=2, patch=(1, 112, 64), widths=(8, 8, 8, 8, 8)).patch == (1, 112, 64)


def test_memory_shrinks_an_open_patch_and_refuses_a_given_one() -> None:
    """Of an open network, too, as long as there is a smaller one."""
    full = plan((200, 200, 200))
    half = plan((200, 200, 200), memory=full.training_bytes() // 2)
    assert (half.patch, half.training_bytes() <= full.training_bytes() // 2) == (full.patch, True)
    assert size(half)[0] < size(full)[0]
    smallest = plan((200, 200, 200), speed=1.0)
    smaller = plan((200, 200, 200), memory=smallest.training_bytes() // 2)
    assert (size(smaller), smaller.patch < full.patch) == (size(smallest), True)
    assert smaller.training_bytes() <= smallest.training_bytes() // 2
    with pytest.raises(PlanError, match="choose a smaller --patch"):
        plan((200, 200, 200), memory=1 << 20, patch=64)
    with pytest.raises(PlanError, match="GiB are to be had"):
        plan((200, 200, 200), memory=1 << 10)


def test_parts_of_a_step_save_memory() -> None:
    whole = plan((200, 200, 200), batch=8)
    limit = whole.training_bytes() // 2
    fixed: dict[str, Any] = {"batch": 8, "patch": 64, "widths": size(whole)[0]}
    assert plan((200, 200, 200), memory=limit, accumulate=4, **fixed).patch == whole.patch
    with pytest.raises(PlanError, match="--accumulate"):
        plan((200, 200, 200), memory=limit, **fixed)


def test_every_worker_gets_a_patch() -> None:
    spec = TrainSpec.read(BASE | {"dims": 3})
    assert make_plan(spec, DataFacts(((99, 99, 99),), None, 1, 2), Means(1 << 40, 1e12, 5)).batch == 5


@pytest.mark.parametrize(("dims", "region", "levels"), [(2, (20, 512, 512), 5), (3, (128, 128, 128), 4)])
def test_the_network_grows_with_the_time_and_the_machine(dims: int, region: Triple, levels: int) -> None:
    """A size is chosen from the speed on at which its 2000 steps fit the time."""
    stem = (tuple(8 << i for i in range(5)), True)
    sizes = [stem, *((tuple(first << i for i in range(levels)), False) for first in (8, 16, 32))]
    assert size(plan(region, dims=dims, speed=1.0)) == stem
    for smaller, (widths, _) in pairwise(sizes):
        speed = 2000 / 60 * plan(region, dims=dims, widths=widths).step_flops()
        assert size(plan(region, dims=dims, max_minutes=1, speed=1.001 * speed)) == (widths, False)
        assert size(plan(region, dims=dims, max_minutes=1, speed=0.999 * speed)) == smaller
        assert size(plan(region, dims=dims, max_minutes=5, folds=5, speed=0.999 * speed)) == smaller


def test_what_the_user_says_of_the_network_is_not_planned() -> None:
    assert size(plan((128, 128, 128), widths=(4, 8), speed=1.0)) == ((4, 8), False)
    assert size(plan((128, 128, 128), network={"stem": True}, speed=1e15)) == ((32, 64, 128, 256), True)
    assert size(plan((128, 128, 128), pools="2;2", speed=1.0)) == ((8, 16, 32), True)
    # A short training needs no network that could learn for long.
    assert size(plan((128, 128, 128), max_steps=20, max_minutes=10, speed=6e10))[0][0] == 32


@pytest.mark.parametrize(
    ("voxel", "shape", "labelled", "dims"),
    [
        (None, (100, 100, 100), 1.0, 3),
        ((3.0, 3.0, 3.0), (100, 100, 100), 1.0, 3),
        ((3.0, 1.0, 1.0), (100, 100, 100), 1.0, 2),
        ((1.0, 1.0, 1.0), (15, 100, 100), 1.0, 2),
        ((1.0, 1.0, 1.0), (100, 100, 100), 0.49, 2),
    ],
)
def test_slices_or_volumes(voxel: Voxel | None, shape: Triple, labelled: float, dims: int) -> None:
    facts, means = DataFacts((shape,), voxel, 1, 2), Means(1 << 40, 1e12)
    assert choose_dims(TrainSpec.read(BASE), facts, labelled, means) == dims
    for given in (2, 3):
        assert choose_dims(TrainSpec.read(BASE | {"dims": given}), facts, labelled, means) == given


@pytest.mark.parametrize(
    ("options", "speed", "dims"),
    [
        ({"max_minutes": 5}, 6e10, 2),
        ({"max_minutes": 60}, 6e10, 3),
        ({"max_minutes": 60, "folds": 12}, 6e10, 2),
        ({"max_minutes": 10}, 6e10, 3),
        ({"max_minutes": 5}, 5e12, 3),
        ({}, 6e10, 3),
        ({"max_minutes": 5, "patch": 64}, 6e10, 3),
        ({"max_minutes": 5, "side": 16}, 6e10, 3),
    ],
)
def test_volumes_need_time(options: dict[str, Any], speed: float, dims: int) -> None:
    facts, means = DataFacts(((100, 100, 100),), None, 1, 2), Means(1 << 40, speed)
    assert choose_dims(TrainSpec.read(BASE | options), facts, 1.0, means) == dims


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"architecture": "fcn8", "network": {"up": "nearest"}}, "architecture fcn8 has no option network.up"),
        ({"architecture": "fcn8", "pools": "1,2,2"}, "5 widths need 5 pools"),
        ({"network": {"residul": True}}, r"no option network.residul \(did you mean 'residual'\?\)"),
        ({"widths": (8, 16), "pools": "2;2"}, "the network cannot be built: 2 widths need 1 pools"),
        ({"widths": (9, 18), "norm": "group"}, "multiples of 8"),
    ],
)
def test_options_that_the_network_cannot_have_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        plan((64, 64, 64), **options)


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(BundleError, match=r"unknown architecture 'fcn9' \(did you mean 'fcn8'\?\)"):
        plan((64, 64, 64), architecture="fcn9")


def test_a_training_that_starts_from_a_bundle_has_its_network() -> None:
    first = plan((64, 64, 64), widths=(8, 16, 24), norm="group")
    spec = TrainSpec.read(BASE | {"dims": 3, "dropout": 0.1})
    facts = DataFacts(((64, 64, 64),), None, 2, 5, init=first.config.model_dump())
    config = make_plan(spec, facts, Means(1 << 40, 1e12)).config.model_dump()
    assert (config["widths"], config["norm"], config["dropout"]) == ((8, 16, 24), "group", 0.1)
    assert (config["in_channels"], config["out_channels"]) == (2, 5)


# ---------------------------------------------------------------- changes of the patches


def indices(folder: Path) -> list[LabelIndex]:
    shape = (32, 32, 32)
    anywhere = np.random.default_rng(0).integers(0, 2, shape).astype(np.uint8)
    layers = np.broadcast_to((np.arange(32)[:, None] // 16).astype(np.uint8), shape).copy()
    found = []
    for name, labels in (("anywhere", anywhere), ("layers", layers)):
        view = NetworkView(open_volume(store(folder / name, labels, None)), "z", TileCache(1 << 20))
        found.append(LabelIndex((build_index(view, Box.of(shape), Asked(None, 255, "training", name)),)))
    return found


def test_turns_need_equal_voxel_sizes_and_quarter_turns_a_place_that_tells_nothing(tmp_path: Path) -> None:
    anywhere, layers = indices(tmp_path)

    def chosen(voxel: Voxel | None, index: LabelIndex = anywhere, **options: Any) -> Augmentation:
        spec = TrainSpec.read(BASE | {"dims": 3} | options)
        return augmentation_for(spec, voxel, index, None)

    assert chosen(None).planes == chosen(None).quarter_turns == ((0, 1), (0, 2), (1, 2))
    assert chosen((5, 1, 1.05)).quarter_turns == ((1, 2),)
    assert chosen((5, 1, 1), dims=2).planes == ((1, 2),)
    assert chosen((5, 1, 1), dims=2, axis="y").planes == ()
    assert chosen(None, layers).planes == ((0, 1), (0, 2), (1, 2))
    assert chosen(None, layers).quarter_turns == ((0, 2),)
    assert chosen(None, layers, augmentation={"turns": "always"}).quarter_turns == ((0, 1), (0, 2), (1, 2))
    assert chosen(None, augmentation={"turns": "never"}).quarter_turns == ()
    assert chosen(None).flips == (0, 1, 2)
    assert chosen(None, dims=2).flips == (1, 2)
    assert chosen(None, augmentation={"flips": False}).flips == ()
    axes = [chosen(None, dims=2, axis=axis).rotation_axis for axis in "zyx"]
    assert [*axes, chosen(None).rotation_axis] == [0, 1, 1, 0]


def test_grey_values_change_as_the_data_do_unless_the_user_says_otherwise(tmp_path: Path) -> None:
    index = indices(tmp_path)[0]
    greys = GreySpread(between=0.05, within=0.2)
    planned = augmentation_for(TrainSpec.read(BASE | {"dims": 3}), None, index, greys)
    assert (planned.gain, planned.offset, planned.field, planned.gamma) == (0.1, 0.1, 0.1, 0.1)
    assert planned.noise == pytest.approx(0.06)
    given = {"contrast": 0.0, "brightness": 0.3, "shading": 0.4, "gamma": 0.5, "noise": 0.6, "rings": 0.7, "drift": 0.8}
    told = augmentation_for(TrainSpec.read(BASE | {"dims": 3, "augmentation": given}), None, index, greys)
    assert (told.gain, told.offset, told.field, told.gamma, told.noise) == (0.0, 0.3, 0.4, 0.5, 0.6)
    assert (told.rings, told.drift) == (0.7, 0.8)
