"""The memory prediction, checked by hand."""

from dataclasses import replace

import pytest

from volseg.planning.memory import SLAB_VOXELS, BlockCost, predict

COST = BlockCost(
    block=(32, 64, 64),
    reach=(64, 96, 96),
    patch=(32, 32, 32),
    channels=2,
    itemsize=2,
    sums=3,
    classes=3,
    probabilities=True,
    batch=1,
    activation_bytes=10_000_000,
    parameter_bytes=1_000_000,
)


def test_one_sum_by_hand() -> None:
    """131072 voxels a block, 589824 read, 32768 a patch; 3 classes as labels and probabilities are 4 bytes a voxel."""
    found = predict(COST, baseline=300_000_000)
    assert found.baseline == 300_000_000
    assert found.network == 2_000_000
    assert found.input == 2 * 589_824 * 2 * 2
    assert found.patch == 10_000_000 + 4 * 32_768 * (2 + 4 * 3)
    assert found.accumulator == 4 * 131_072 * 3
    assert found.output == 5 * 131_072 * 4 + 12 * 131_072
    assert found.allocator == 1_459_246  # 6 % of 24320768
    assert found.total == 300_000_000 + 24_320_768 + 1_459_246
    assert found.as_dict()["total"] == sum(v for name, v in found.as_dict().items() if name != "total")


def test_two_classes_need_one_sum_and_many_need_wider_labels() -> None:
    two = replace(COST, sums=1, classes=2, probabilities=False)
    assert predict(two, 0).accumulator == 4 * 131_072
    assert predict(two, 0).output == 5 * 131_072 + 12 * 131_072
    many = replace(COST, sums=257, classes=257, probabilities=False)
    assert many.label_itemsize == 2
    assert replace(many, classes=256).label_itemsize == 1
    assert predict(many, 0).output == 5 * 131_072 * 2 + 12 * 131_072


def test_the_temporary_slab_does_not_grow_with_the_block() -> None:
    small, large = (replace(COST, block=(depth, 512, 512), probabilities=False) for depth in (100, 200))
    assert predict(large, 0).output - predict(small, 0).output == 5 * 100 * 512 * 512
    # A slab is at least one slice.
    wide = replace(COST, block=(2, 2048, 2048), probabilities=False)
    assert SLAB_VOXELS < 2048 * 2048
    assert predict(wide, 0).output == 5 * 2 * 2048 * 2048 + 12 * 2048 * 2048


@pytest.mark.parametrize(
    "name", ["channels", "itemsize", "sums", "classes", "batch", "activation_bytes", "parameter_bytes"]
)
def test_more_of_anything_needs_more(name: str) -> None:
    assert predict(replace(COST, **{name: 2 * getattr(COST, name)}), 0).total > predict(COST, 0).total


def test_larger_shapes_need_more() -> None:
    before = predict(COST, 0).total
    assert predict(replace(COST, block=(64, 64, 64)), 0).total > before
    assert predict(replace(COST, reach=(128, 96, 96)), 0).total > before
    assert predict(replace(COST, patch=(64, 32, 32)), 0).total > before
