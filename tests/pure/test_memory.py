"""The memory prediction, checked by hand."""

from dataclasses import replace

import pytest

from volseg.planning.memory import SLAB_VOXELS, BlockCost, ForwardCost, predict
from volseg.planning.seams import Seams

FORWARD = ForwardCost(patch=(32, 32, 32), answer=(32, 32, 32), activation_bytes=10_000_000)
COST = BlockCost(
    block=(32, 64, 64),
    reach=(64, 96, 96),
    extent=(32, 64, 64),
    forwards=(FORWARD,),
    channels=2,
    itemsize=2,
    sums=3,
    classes=3,
    probabilities=True,
    batch=1,
    parameter_bytes=1_000_000,
)


def test_one_sum_by_hand() -> None:
    """131072 voxels a block, 589824 read, 32768 a patch; 3 classes as labels and probabilities are 4 bytes a voxel."""
    found = predict(COST, baseline=300_000_000)
    assert found.baseline == 300_000_000
    assert found.network == 3_000_000
    assert found.input == 2 * 589_824 * 2 * 2
    assert found.patch == 10_000_000 + 4 * 32_768 * (2 + 4 * 3)
    assert found.accumulator == 4 * 131_072 * 3
    assert found.output == 5 * 131_072 * 4 + 12 * 131_072
    assert found.cache == 589_824 * 2 * 2
    assert found.allocator == 1_660_803  # 6 % of 27680064
    assert found.total == 300_000_000 + 27_680_064 + 1_660_803
    assert found.as_dict()["total"] == sum(v for name, v in found.as_dict().items() if name != "total")


def test_two_classes_need_one_sum_and_many_need_wider_labels() -> None:
    two = replace(COST, sums=1, classes=2, probabilities=False)
    assert predict(two, 0).accumulator == 4 * 131_072
    assert predict(two, 0).output == 5 * 131_072 + 12 * 131_072
    many = replace(COST, sums=257, classes=257, probabilities=False)
    assert many.label_itemsize == 2
    assert replace(many, classes=256).label_itemsize == 1
    assert predict(many, 0).output == 5 * 131_072 * 2 + 12 * 131_072


def test_without_a_halo_no_chunk_is_kept_for_the_next_block() -> None:
    assert predict(replace(COST, reach=COST.block), 0).cache == 0


def test_what_blocks_give_each_other() -> None:
    """All of it in one process; what a worker has in hand where it lies in an object store."""
    shared = Seams((4, 4, 4), ahead=10_000, bound=1_000_000, out=3000, core=5000)
    assert predict(replace(COST, seams=shared), 0).seams == 2 * 3000 + 2 * 5000
    one_process = replace(COST, seams=replace(shared, local=True))
    assert predict(one_process, 0).seams == 1_000_000
    assert predict(one_process, 0, together=4).seams == 250_000
    assert predict(COST, 0).seams == 0
    wider = replace(COST, extent=(48, 80, 80))
    assert predict(wider, 0).accumulator == 4 * 48 * 80 * 80 * 3


def test_workers_of_one_process_share_what_is_there_once() -> None:
    """Rounded up: together they have no less than there is."""
    one, three = predict(COST, 1001), predict(COST, 1001, together=3)
    assert three.baseline == 334
    assert 3 * three.network - one.network in {0, 1, 2}
    assert replace(three, baseline=one.baseline, network=one.network, allocator=one.allocator) == one


def test_the_temporary_slab_does_not_grow_with_the_block() -> None:
    small, large = (replace(COST, block=(depth, 512, 512), probabilities=False) for depth in (100, 200))
    assert predict(large, 0).output - predict(small, 0).output == 5 * 100 * 512 * 512
    # A slab is at least one slice.
    wide = replace(COST, block=(2, 2048, 2048), probabilities=False)
    assert SLAB_VOXELS < 2048 * 2048
    assert predict(wide, 0).output == 5 * 2 * 2048 * 2048 + 12 * 2048 * 2048


def test_an_unpadded_network_answers_for_less_than_it_reads() -> None:
    unpadded = replace(COST, forwards=(replace(FORWARD, answer=(8, 16, 16)),))
    assert predict(unpadded, 0).patch == 10_000_000 + 4 * (32_768 * 2 + 2048 * 4 * 3)


def test_an_ensemble_needs_all_weights_and_the_activations_of_one() -> None:
    """And one more array of probabilities: the mean so far."""
    three = predict(replace(COST, members=3), 0)
    assert three.network == 9_000_000
    assert three.patch == predict(COST, 0).patch + 4 * 32_768 * 3
    # A mirrored patch and its answer turned back come on top, whatever the number of mirror images.
    assert predict(replace(COST, mirrors=8), 0).patch == predict(COST, 0).patch + 4 * 32_768 * (3 + 2 + 3)
    assert predict(replace(COST, mirrors=4, members=3), 0).patch == predict(replace(COST, mirrors=8), 0).patch


def test_views_take_turns_and_the_largest_counts() -> None:
    small = ForwardCost(patch=(1, 32, 32), answer=(1, 32, 32), activation_bytes=1_000_000)
    assert predict(replace(COST, forwards=(small, FORWARD, small)), 0) == predict(COST, 0)


@pytest.mark.parametrize(
    "name", ["channels", "itemsize", "sums", "classes", "batch", "members", "mirrors", "parameter_bytes"]
)
def test_more_of_anything_needs_more(name: str) -> None:
    assert predict(replace(COST, **{name: 2 * getattr(COST, name)}), 0).total > predict(COST, 0).total


def test_larger_shapes_need_more() -> None:
    before = predict(COST, 0).total
    assert predict(replace(COST, block=(64, 64, 64)), 0).total > before
    assert predict(replace(COST, reach=(128, 96, 96)), 0).total > before
    larger = (
        replace(FORWARD, patch=(64, 32, 32)),
        replace(FORWARD, answer=(32, 64, 32)),
        replace(FORWARD, activation_bytes=20_000_000),
    )
    for forward in larger:
        assert predict(replace(COST, forwards=(forward,)), 0).total > before
