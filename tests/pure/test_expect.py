"""What a job will take: the plan's forwards at the measured pace."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.pure.test_plan import model, spec
from volseg.geometry import Triple
from volseg.planning import Plan, Resources, VolumeFacts, make_plan
from volseg.planning.expect import Pace, expect
from volseg.planning.memory import GIB

SIDE = st.integers(64, 700)


def plan_of(shape: Triple, workers: int, members: int = 1) -> Plan:
    facts = model(members=members)
    return make_plan(spec(overlap=0.5), VolumeFacts(shape, 1, 1), facts, Resources(workers, 4 * GIB, "cpu", 0))


@given(st.tuples(SIDE, SIDE, SIDE), st.integers(1, 50), st.integers(1, 3))
def test_it_lies_between_a_fair_share_and_the_bound(shape: Triple, workers: int, members: int) -> None:
    plan = plan_of(shape, workers, members)
    found = expect(plan, Pace(workers=2, forwards=100, seconds=10.0))
    each = 0.2
    assert found["seconds"] == pytest.approx(plan.forwards * each / plan.workers, abs=1e-3)
    largest = max(
        sum(lattice.count_touching(plan.grid.box(i).intersect(plan.region)) for lattice in plan.lattices)
        for i in range(len(plan.grid))
    )
    assert plan.largest_block == largest
    bound = found["seconds"] + largest * members * each * (1 - 1 / plan.workers)
    assert found["seconds_at_most"] == pytest.approx(bound, abs=2e-3)


def test_twice_the_workers_take_half_the_time() -> None:
    pace = Pace(workers=1, forwards=10, seconds=5.0)
    one, two = (expect(plan_of((640, 640, 640), n), pace) for n in (8, 16))
    assert one["forwards"] <= two["forwards"]
    assert two["seconds"] == pytest.approx(one["seconds"] / 2 * two["forwards"] / one["forwards"])
    assert one["storage"]["writes_per_second"] == pytest.approx(640**3 / one["seconds"], rel=1e-3)
