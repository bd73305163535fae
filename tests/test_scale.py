"""The driver, policy and ledger as they are, on a simulated cluster where everything goes wrong now and then."""

from pathlib import Path

import pytest

from tests.bench.drive import ATTEMPTS, simulate
from tests.bench.scale import seam_bytes
from tests.bench.simulated import World
from volseg.planning.memory import IN_HAND
from volseg.storage.ledger import FLUSH_SECONDS, HEARTBEAT_SECONDS, MOST_TRACES, Ledger

BLOCKS, WORKERS, KILLS = 5000, 50, 1


@pytest.mark.chaos
def test_thousands_of_blocks_on_a_cluster_that_fails(tmp_path: Path) -> None:
    """Every block is done once in the ledger, hardly one computed twice, and nothing is kept of those that are done."""
    world = World(workers=WORKERS, seconds=10)
    outcome = simulate(tmp_path, BLOCKS, world, kills=KILLS, count_objects=True)
    record = outcome.record

    assert outcome.failed == 0, f"{ATTEMPTS} attempts are enough for every block here"
    assert sorted(r.index for r in Ledger(str(tmp_path / "out"), "job").receipts()) == list(range(BLOCKS))
    assert min(record.finished) == 1
    assert record.kills == KILLS
    assert 0.05 < record.lost / record.attempts < 0.08
    assert record.losses.keys() >= {"crash", "node"}
    assert record.attempts >= BLOCKS + record.twice
    assert 0 < record.twice < 0.01 * BLOCKS

    # Alive at once: what waits for the next flush, what is in hand, and blocks in trouble; far fewer than are done.
    assert max(outcome.objects) <= IN_HAND * WORKERS
    assert outcome.writes["receipts"] <= outcome.virtual_seconds / FLUSH_SECONDS + 2 * (KILLS + 1)
    assert outcome.writes["heartbeat.json"] <= outcome.virtual_seconds / HEARTBEAT_SECONDS + 2 * (KILLS + 1)
    assert outcome.writes["failures"] <= MOST_TRACES * (KILLS + 1)
    assert outcome.writes["attempts"] == outcome.writes["ended"] == KILLS + 1


def test_a_killed_driver_loses_what_waited_for_the_next_flush(tmp_path: Path) -> None:
    """And nothing else: those few blocks are computed again."""
    world = World(workers=20, seconds=1, errors=0, crashes=0, nodes=0, preemptions=0, written=0)
    outcome = simulate(tmp_path, 1000, world, kills=2)
    assert outcome.receipts == 1000
    assert 0 < outcome.record.twice <= 2 * 20 * (FLUSH_SECONDS + 1) / 0.75
    assert outcome.record.attempts - outcome.record.lost == 1000 + outcome.record.twice


def test_a_simulation_can_be_repeated(tmp_path: Path) -> None:
    first, second = (simulate(tmp_path / name, 200, World(workers=7, seed=3), kills=1) for name in "ab")
    assert first.record == second.record
    assert first.virtual_seconds == second.virtual_seconds
    assert first.record != simulate(tmp_path / "c", 200, World(workers=7, seed=4), kills=1).record


def test_without_trouble_every_block_is_computed_once(tmp_path: Path) -> None:
    calm = World(workers=5, start=10, errors=0, crashes=0, nodes=0, preemptions=0)
    outcome = simulate(tmp_path, 300, calm)
    assert (outcome.record.attempts, outcome.record.twice, outcome.retried, outcome.notes) == (300, 0, 0, 0)
    assert set(outcome.record.finished) == {1}


@pytest.mark.parametrize(("overlap", "end"), [(0.0, 32), (0.25, 40), (0.5, 40)])
@pytest.mark.parametrize("sums", [1, 3])
def test_seams_are_what_patches_answer_beyond_their_block(overlap: float, end: int, sums: int) -> None:
    """Of the second block, 16:32 on each axis: the last origin in it is 16, 24 and 24."""
    side = end - 16
    assert seam_bytes((16, 16, 16), (16, 16, 16), overlap, sums=sums) == 4 * sums * (side**3 - 16**3)
