"""What blending and exact mode would each cost for the same volume, network and memory, and which one to take."""

from __future__ import annotations

from math import prod
from typing import Any

from volseg.errors import InputError
from volseg.geometry import TileLattice
from volseg.planning.exact import FIRST_FORWARD
from volseg.planning.make import make_plan
from volseg.planning.plan import ModelFacts, Plan, Resources, VolumeFacts
from volseg.spec import SegmentSpec

_OWN = ("patch", "overlap", "tile", "block", "chunks", "shards")
# Exact mode is no guess between patches: it may cost a little more.
_WORTH = 1.1


def compare(
    spec: SegmentSpec, volume: VolumeFacts, model: ModelFacts, resources: Resources, plan: Plan
) -> dict[str, Any]:
    """Return `blended`, `exact` and `advice`: what both cost, one of them as `plan` says, the other as planned anew.

    `relative_time` is the time of the worker that ends last over that of blending, by floating-point operations and, on
    CPUs, what the first forward of each shape takes longer.
    A way that is refused has only `why`.
    """
    other = _planned(spec, volume, model, resources)
    exact, blended = (plan, other) if plan.exact else (other, plan)
    base = _time(blended) if isinstance(blended, Plan) else None
    return {
        "blended": _cost(blended, base),
        "exact": _cost(exact, base),
        "advice": _advice(blended, exact),
    }


def _planned(spec: SegmentSpec, volume: VolumeFacts, model: ModelFacts, resources: Resources) -> Plan | str:
    """Return the plan of the way that was not asked for, or why there is none."""
    blend = "gaussian" if spec.blend == "exact" else "exact"
    try:
        return make_plan(spec.model_copy(update={"blend": blend, **dict.fromkeys(_OWN)}), volume, model, resources)
    except InputError as error:
        return str(error)


def _cost(plan: Plan | str, base: float | None) -> dict[str, Any]:
    if isinstance(plan, str):
        return {"why": plan}
    summary = plan.summary()
    kept = ("forwards", "forwards_per_patch", "forwards_per_voxel", "flops", "views")
    return {
        **{name: summary[name] for name in kept},
        "memory_per_worker": summary["memory_per_worker"]["total"],
        "relative_time": None if base is None else round(_time(plan) / base, 4),
    }


def _time(plan: Plan) -> float:
    """Return the time of the worker that ends last, in floating-point operations."""
    total = sum(n * view.flops for view, n in zip(plan.views, plan.computed, strict=True))
    largest = sum(_largest_share(plan, number) * n * view.flops for number, (view, n) in enumerate(
        zip(plan.views, plan.computed, strict=True)
    ))  # fmt: skip
    workers, blocks = plan.workers, len(plan.grid)
    rounds = -(-blocks // workers) * largest
    work = max(total / workers, min(total / workers + largest * (1 - 1 / workers), rounds))
    first = FIRST_FORWARD * sum(view.flops_of_shapes for view in plan.views) if plan.device == "cpu" else 0.0
    return work * plan.forwards_a_patch + first


def _largest_share(plan: Plan, number: int) -> float:
    """Return the largest share of all that is computed in one view that falls to one block."""
    lattice, grid = plan.lattices[number], plan.grid
    shares = []
    for axis, line in enumerate(lattice.axes):
        low, high = grid.region.start[axis], grid.region.stop[axis]
        sums = [
            sum(n * count for n, count in line.lengths(max(a, low), min(b, high)).items())
            for a, b in grid.axis_spans(axis)
        ]
        shares.append(max(sums) / sum(sums))
    return prod(shares)


def _advice(blended: Plan | str, exact: Plan | str) -> str:
    if isinstance(exact, str):
        return "blend: exact mode is not possible here"
    if isinstance(blended, str):
        return "exact: blending is not possible here"
    ratio = _time(exact) / _time(blended)
    if ratio <= _WORTH:
        return f"exact: {ratio:.2f} of the time of blending, and equal to one forward over the whole volume"
    clipped = all(
        tile >= size
        for lattice in exact.lattices
        if isinstance(lattice, TileLattice)
        for tile, size, read in zip(lattice.stride, lattice.shape, lattice.patch, strict=True)
        if read > 1
    )
    more = "" if clipped else "; more memory for each worker allows larger tiles, which read less around them"
    return f"blend: exact would take {ratio:.2f} times as long{more}"
