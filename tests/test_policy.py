"""What happens to a block after a failure, and how a failure is told from a bug, a full disk and a Ctrl-C."""

import errno
import pickle

import pytest

from volseg.errors import (
    BlockError,
    CorruptChunkError,
    JobInterrupted,
    NonFiniteError,
    StorageDeniedError,
    StorageFullError,
    VolumeError,
)
from volseg.execution.policy import (
    MAX_CRASHES,
    NODES_APART,
    NODES_TOGETHER,
    PATIENCE_SECONDS,
    REPEAT_SECONDS,
    Loss,
    Strikes,
    Vigil,
    after_error,
    after_loss,
    starts_exhausted,
    worth_a_second_copy,
)
from volseg.inference.attempt import Answer, Failure, Kind, attempt
from volseg.storage.ledger import Receipt


@pytest.mark.parametrize(
    ("errors", "attempts", "decision"),
    [(1, 3, "retry"), (2, 3, "retry"), (3, 3, "set aside"), (1, 1, "set aside"), (4, 3, "set aside")],
)
def test_a_block_may_raise_so_many_errors(errors: int, attempts: int, decision: str) -> None:
    assert after_error(Strikes(errors=errors), "retryable", attempts) == decision


def test_crashes_are_no_errors_and_errors_no_crashes() -> None:
    assert after_error(Strikes(errors=1, crashes=MAX_CRASHES - 1), "retryable", 2) == "retry alone"
    assert after_loss(Strikes(errors=99, crashes=1), "crash") == "retry"


@pytest.mark.parametrize("attempts", [1, 100])
def test_what_must_fail_again_is_not_tried_again(attempts: int) -> None:
    assert after_error(Strikes(errors=1), "hopeless", attempts) == "set aside"
    assert after_error(Strikes(errors=1), "job", attempts) == "stop the job"


def test_a_block_that_outlives_workers_runs_alone_and_is_set_aside_in_the_end() -> None:
    decisions = [after_loss(Strikes(crashes=n), "crash") for n in range(1, MAX_CRASHES + 1)]
    assert decisions == ["retry", *["retry alone"] * (MAX_CRASHES - 2), "set aside"]


@pytest.mark.parametrize("loss", ["node", "preemption"])
def test_a_lost_machine_is_no_crash_but_a_suspect_stays_one(loss: Loss) -> None:
    assert after_loss(Strikes(errors=2, crashes=0), loss) == "retry"
    assert after_loss(Strikes(crashes=2), loss) == "retry alone"
    assert after_loss(Strikes(crashes=MAX_CRASHES), loss) == "retry alone"
    assert after_error(Strikes(errors=1, crashes=2), "retryable", 3) == "retry alone"


def test_losses_are_counted_by_what_was_lost() -> None:
    none = Strikes(errors=1)
    assert none.with_loss("crash", apart=True) == Strikes(errors=1, crashes=1)
    assert none.with_loss("node", apart=False) == Strikes(errors=1, nodes=1)
    assert none.with_loss("node", apart=True) == Strikes(errors=1, nodes=1, nodes_apart=1)
    assert none.with_loss("preemption", apart=True) == none


def test_a_block_whose_machines_go_runs_apart_and_is_set_aside_in_the_end() -> None:
    strikes = Strikes()
    decisions: list[str] = []
    while not decisions or decisions[-1] != "set aside":
        strikes = strikes.with_loss("node", apart=decisions[-1:] == ["retry apart"])
        decisions.append(after_loss(strikes, "node"))
    assert decisions == ["retry"] * (NODES_TOGETHER - 1) + ["retry apart"] * NODES_APART + ["set aside"]


def test_machines_lost_among_other_blocks_or_with_notice_never_set_a_block_aside() -> None:
    assert after_loss(Strikes(nodes=1000), "node") == "retry apart"
    assert after_loss(Strikes(nodes=1000, nodes_apart=NODES_APART), "preemption") == "retry apart"


def test_missing_workers_are_told_after_a_while_and_again_only_where_there_is_none() -> None:
    vigil = Vigil()

    def word(there: int, now: float, reason: str = "no room") -> str:
        return vigil.word(there, 2, now, lambda: reason)

    assert not word(0, 100.0)
    assert not word(0, 99.0 + PATIENCE_SECONDS)
    assert word(0, now := 100.0 + PATIENCE_SECONDS) == "no room"
    assert not word(0, now + PATIENCE_SECONDS)
    assert word(0, now + 2 * PATIENCE_SECONDS, "no machine") == "no machine"
    assert not word(0, now + 3 * PATIENCE_SECONDS, "no machine")
    assert word(0, now := now + 2 * PATIENCE_SECONDS + REPEAT_SECONDS, "no machine") == "no machine"
    # One came: its patience begins anew, and is told once.
    assert not word(1, now)
    assert word(1, now + PATIENCE_SECONDS) == "no room"
    assert not word(1, now + 1e9, "no machine")
    assert not word(2, now + 2e9)
    assert not word(2, now + 3e9)


@pytest.mark.parametrize("workers", [1, 8])
def test_workers_may_fail_to_start_a_few_times(workers: int) -> None:
    assert not starts_exhausted(workers + 2, workers)
    assert starts_exhausted(workers + 3, workers)


@pytest.mark.parametrize(
    ("elapsed", "usual", "copies", "worth"),
    [
        (1e9, None, 1, False),  # nothing was done yet: nobody knows what is usual
        (203.0, 100.0, 1, False),
        (203.1, 100.0, 1, True),
        (1e9, 100.0, 2, False),  # once more is enough
        (3.1, 0.01, 1, True),
        (2.9, 0.01, 1, False),  # a pause is no slowness
    ],
)
def test_a_block_that_takes_unusually_long_is_worth_a_second_copy(
    elapsed: float, usual: float | None, copies: int, worth: bool
) -> None:
    assert worth_a_second_copy(elapsed, usual, copies) is worth


# ---------------------------------------------------------------- one attempt


def outcome_of(error: BaseException) -> Failure:
    def process() -> Answer:
        raise error

    failure = attempt(process, 7)
    assert isinstance(failure, Failure)
    assert failure.index == 7
    assert pickle.loads(pickle.dumps(failure)) == failure
    return failure


def test_an_answer_passes_through() -> None:
    answer = Answer(7, Receipt(7, {"0": "ab"}, {"0/c/0/0/0": 3}))
    assert attempt(lambda: answer, 7) is answer


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (CorruptChunkError("chunk c/0 is truncated"), "retryable"),
        (BlockError("it did not work"), "retryable"),
        (NonFiniteError("3 voxels are NaN"), "hopeless"),
        (StorageFullError("no space left"), "job"),
        (StorageDeniedError("no permission"), "job"),
    ],
)
def test_a_foreseen_error_is_told_in_its_own_words(error: Exception, kind: Kind) -> None:
    assert outcome_of(error) == Failure(7, kind, str(error))


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), MemoryError("no room"), VolumeError("gone")])
def test_any_other_error_is_tried_again_and_keeps_its_traceback(error: Exception) -> None:
    failure = outcome_of(error)
    assert failure.kind == "retryable"
    assert failure.message == f"{type(error).__name__}: {error}"
    assert "Traceback" in failure.details
    assert "in process" in failure.details


def test_a_full_disk_stops_the_job_whoever_meets_it() -> None:
    failure = outcome_of(OSError(errno.ENOSPC, "No space left on device"))
    assert failure.kind == "job"
    assert "no space left while writing the output" in failure.message
    assert outcome_of(OSError(errno.EIO, "Input/output error")).kind == "retryable"


@pytest.mark.parametrize("error", [JobInterrupted("stopped"), KeyboardInterrupt(), SystemExit(1)])
def test_an_interruption_is_no_failure(error: BaseException) -> None:
    with pytest.raises(type(error)):
        outcome_of(error)
