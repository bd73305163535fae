"""The tree of errors: exit codes follow from what the handler does, and every leaf belongs to one branch."""

import inspect
import pickle

import pytest

from volseg import errors
from volseg.errors import BlockError, InputError, JobError, JobInterrupted, JobPartial, VolsegError, nearest

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, VolsegError)]


@pytest.mark.parametrize("kind", ALL)
def test_exit_codes_follow_the_branch(kind: type[VolsegError]) -> None:
    expected = 2 if issubclass(kind, InputError) else {JobPartial: 3, JobInterrupted: 130}.get(kind, 4)
    assert kind.exit_code == expected


@pytest.mark.parametrize("kind", ALL)
def test_an_error_belongs_to_one_branch_and_crosses_processes(kind: type[VolsegError]) -> None:
    branches = (InputError, BlockError, JobError, JobPartial, JobInterrupted, errors.VerifyError)
    assert sum(issubclass(kind, branch) for branch in branches) == (kind is not VolsegError)
    error = kind("what, why, and what to do")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (kind, "what, why, and what to do")


def test_only_what_may_succeed_later_is_tried_again() -> None:
    assert errors.CorruptChunkError.retryable
    assert not errors.NonFiniteError.retryable


def test_a_partial_result_carries_its_report() -> None:
    assert JobPartial("1 block failed", {"failed": 1}).report == {"failed": 1}
    assert JobPartial("1 block failed").report == {}


def test_nearest_hints_at_a_misspelling_only() -> None:
    known = ["overlap", "output", "patch"]
    assert nearest("ovelap", known) == " (did you mean 'overlap'?)"
    assert nearest("zzz", known) == ""
