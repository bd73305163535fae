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
from volseg.execution.policy import MAX_CRASHES, Strikes, after_error, after_loss, starts_exhausted
from volseg.inference.attempt import Failure, Kind, attempt
from volseg.storage.ledger import Receipt


@pytest.mark.parametrize(
    ("errors", "attempts", "decision"),
    [(1, 3, "retry"), (2, 3, "retry"), (3, 3, "set aside"), (1, 1, "set aside"), (4, 3, "set aside")],
)
def test_a_block_may_raise_so_many_errors(errors: int, attempts: int, decision: str) -> None:
    assert after_error(Strikes(errors=errors), "retryable", attempts) == decision


def test_crashes_are_no_errors_and_errors_no_crashes() -> None:
    assert after_error(Strikes(errors=1, crashes=MAX_CRASHES - 1), "retryable", 2) == "retry alone"
    assert after_loss(Strikes(errors=99, crashes=1), infrastructure=False) == "retry"


@pytest.mark.parametrize("attempts", [1, 100])
def test_what_must_fail_again_is_not_tried_again(attempts: int) -> None:
    assert after_error(Strikes(errors=1), "hopeless", attempts) == "set aside"
    assert after_error(Strikes(errors=1), "job", attempts) == "stop the job"


def test_a_block_that_outlives_workers_runs_alone_and_is_set_aside_in_the_end() -> None:
    decisions = [after_loss(Strikes(crashes=n), infrastructure=False) for n in range(1, MAX_CRASHES + 1)]
    assert decisions == ["retry", *["retry alone"] * (MAX_CRASHES - 2), "set aside"]


def test_a_lost_node_is_nobody_s_fault_but_a_suspect_stays_one() -> None:
    assert after_loss(Strikes(errors=2, crashes=0), infrastructure=True) == "retry"
    assert after_loss(Strikes(crashes=2), infrastructure=True) == "retry alone"
    assert after_loss(Strikes(crashes=MAX_CRASHES), infrastructure=True) == "retry alone"
    assert after_error(Strikes(errors=1, crashes=2), "retryable", 3) == "retry alone"


@pytest.mark.parametrize("workers", [1, 8])
def test_workers_may_fail_to_start_a_few_times(workers: int) -> None:
    assert not starts_exhausted(workers + 2, workers)
    assert starts_exhausted(workers + 3, workers)


# ---------------------------------------------------------------- one attempt


def outcome_of(error: BaseException) -> Failure:
    def process(index: int) -> Receipt:
        assert index == 7
        raise error

    failure = attempt(process, 7)
    assert isinstance(failure, Failure)
    assert failure.index == 7
    assert pickle.loads(pickle.dumps(failure)) == failure
    return failure


def test_a_receipt_passes_through() -> None:
    receipt = Receipt(7, {"0": "ab"}, {"0/c/0/0/0": 3})
    assert attempt(lambda index: receipt, 7) is receipt


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
