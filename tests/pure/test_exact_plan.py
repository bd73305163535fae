"""Plans of exact mode: their counts against brute force, the choice of the tile, and what they advise."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import pytest

from tests.pure.test_plan import flat, model, resources, spec, view, volume
from volseg.errors import PlanError
from volseg.geometry import Box, Halo, Triple
from volseg.planning import ModelFacts, Plan, ViewFacts, compare, make_plan
from volseg.planning.exact import TILE_BYTES
from volseg.planning.memory import GIB


def halo(before: int, after: int, step: int, axes: str = "zyx") -> Halo:
    def triple(value: int, otherwise: int) -> Triple:
        z, y, x = (value if axis in axes else otherwise for axis in "zyx")
        return z, y, x

    return Halo(triple(before, 0), triple(after, 0), triple(step, 1))


SOLID = model(view(halo=halo(14, 11, 8)))
SECTIONS = model(flat("z", halo=halo(44, 44, 8, "yx")), dims=2)
ALONG_ALL = model(*(flat(axis, halo=halo(9, 9, 8, "zyx".replace(axis, ""))) for axis in "zyx"), dims=2)
UNPADDED = model(view(patch=(60,) * 3, phase=(4,) * 3, smallest=(44,) * 3, margin=(20,) * 3, halo=halo(0, 0, 8)))


def exact(**options: Any) -> Any:
    return spec(blend="exact", **options)


@pytest.mark.parametrize(
    ("facts", "shape", "options"),
    [
        (SOLID, (70, 64, 50), {"tile": "16,20,24"}),
        (SOLID, (70, 64, 50), {"tile": "16,20,24", "roi": "3:30,20:21,:"}),
        (SECTIONS, (5, 300, 200), {"tile": "1,64,96"}),
        (ALONG_ALL, (33, 40, 50), {"tile": "16,16,32"}),
        (UNPADDED, (30, 64, 50), {"tile": "10,16,24"}),
        (SOLID, (70, 64, 50), {}),
    ],
    ids=["3D", "region", "2D", "2.5D", "unpadded", "planned"],
)
def test_costs_are_those_of_all_tiles(facts: ModelFacts, shape: Triple, options: dict[str, Any]) -> None:
    plan = make_plan(exact(**options), volume(*shape), facts, resources())
    windows = [of.source(i).shape for of in plan.lattices for i in of.touching(plan.region)]
    summary = plan.summary()
    assert summary["forwards"] == summary["patches"] == len(windows)
    assert summary["forwards_per_patch"] == 1
    assert summary["forwards_per_voxel"] == round(sum(map(prod, windows)) / plan.region.size, 4)
    assert summary["flops"] == pytest.approx(sum(1000.0 * prod(w) for w in windows))
    for lattice in plan.lattices:
        assert all(b % t == 0 or b >= s for b, t, s in zip(plan.block, lattice.stride, plan.shape, strict=True))
        assert lattice.patch == tuple(max(lengths) for lengths in zip(*(
            lattice.source(i).shape for i in lattice.touching(Box.of(shape))), strict=True))  # fmt: skip


@pytest.mark.parametrize("facts", [SOLID, SECTIONS, ALONG_ALL, UNPADDED], ids=["3D", "2D", "2.5D", "unpadded"])
def test_the_tile_depends_on_volume_and_network_alone(facts: ModelFacts) -> None:
    def tile(**options: Any) -> Triple | None:
        given = {name: options.pop(name) for name in ("workers", "memory", "device") if name in options}
        return make_plan(exact(**options), volume(300, 500, 400), facts, resources(**given)).tile

    usual = tile()
    assert usual == tile(workers=7) == tile(memory=6) == tile(roi="0:20,5:77,:") == tile(device="cuda")
    assert usual == tile(probabilities=False, executor="serial")


def test_more_memory_makes_tiles_larger_and_cheaper_up_to_a_limit() -> None:
    def plan(memory: float) -> Plan:
        return make_plan(exact(), volume(1000), SOLID, resources(memory))

    plans = [plan(memory) for memory in (0.5, 1, 2, 8, 64)]
    costs = [p.summary()["forwards_per_voxel"] for p in plans]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 1.5 * costs[-1]
    assert plans[-1].tile == plans[-2].tile
    for memory, found in zip((0.5, 1, 2, 8, 64), plans, strict=True):
        assert found.memory.total <= memory * GIB
    one = make_plan(exact(block=plans[-1].tile), volume(1000), SOLID, resources(64))
    assert one.memory.total - resources().baseline <= TILE_BYTES[3]


def test_a_volume_that_fits_is_one_tile_and_reads_nothing_twice() -> None:
    plan = make_plan(exact(), volume(3, 768, 770), SECTIONS, resources())
    assert plan.tile is not None
    assert plan.patches == 3
    # To the next multiple of the pooling factor.
    assert plan.summary()["forwards_per_voxel"] == round(776 / 770, 4)


def test_a_single_large_section_is_cut_so_that_more_than_one_forward_finds_its_memory_ready() -> None:
    roomy = replace(SECTIONS, views=(replace(SECTIONS.views[0], activation_bytes=lambda p, n: 40 * prod(p) * n),))
    one, many = (make_plan(exact(), volume(n, 3072, 3072), roomy, resources()).tile for n in (1, 100))
    assert (one, many) == ((1, 1536, 1536), (1, 3072, 3072))


def test_blocks_are_whole_tiles_of_all_views() -> None:
    plan = make_plan(exact(tile="6,10,15"), volume(60), ALONG_ALL, resources())
    assert all(side % tile == 0 or side >= 60 for side, tile in zip(plan.block, (6, 10, 15), strict=True))
    with pytest.raises(PlanError, match="block side 20 on axis z is no multiple of tile side 6"):
        make_plan(exact(tile="6,10,15", block=20), volume(60), ALONG_ALL, resources())
    assert make_plan(exact(tile="6,10,15", block="24,20,64"), volume(60), ALONG_ALL, resources()).block == (24, 20, 64)


def test_mirrored_windows_have_the_larger_halo_on_both_sides() -> None:
    once, mirrored = (
        make_plan(exact(tile=16), volume(160), replace(SOLID, mirrors=mirrors), resources()).lattices[0]
        for mirrors in (1, 8)
    )
    # 14 before and 11 after are both less than 16; of 20 and 11 the larger one counts.
    assert once.patch == mirrored.patch == (48, 48, 48)
    wide: ViewFacts = view(halo=halo(20, 11, 8))
    once, mirrored = (
        make_plan(exact(tile=16), volume(160), model(wide, mirrors=mirrors), resources()).lattices[0]
        for mirrors in (1, 8)
    )
    assert (once.patch, mirrored.patch) == ((56,) * 3, (64,) * 3)


def compared(facts: ModelFacts, *shape: int, memory: float = 8, **options: Any) -> dict[str, Any]:
    given, data, means = spec(**options), volume(*shape), resources(memory)
    return compare(given, data, facts, means, make_plan(given, data, facts, means))


def test_both_ways_are_compared_whichever_was_asked_for() -> None:
    one, other = compared(SECTIONS, 40, 1000, 1000), compared(SECTIONS, 40, 1000, 1000, blend="exact")
    assert one == other
    assert one["blended"]["relative_time"] == 1
    assert one["exact"]["forwards"] == 40
    assert 0.2 < one["exact"]["relative_time"] < 0.35
    assert one["advice"].startswith("exact: 0.2")


def test_where_halos_cost_more_than_overlaps_blending_is_advised() -> None:
    deep = model(view(halo=halo(90, 90, 8)))
    found = compared(deep, 1000)
    assert found["exact"]["relative_time"] > 2
    assert found["advice"].startswith("blend: exact would take")
    assert "more memory for each worker allows larger tiles" in found["advice"]


def test_what_is_not_possible_is_said() -> None:
    none = model(view(inexact="its layer norm sees everything"))
    found = compared(none, 100)
    assert set(found["exact"]) == {"why"}
    assert "its layer norm sees everything" in found["exact"]["why"]
    with pytest.raises(PlanError, match="not possible with this model: its layer norm sees everything"):
        make_plan(exact(), volume(100), none, resources())
