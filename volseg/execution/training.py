"""A training as a job: one driver at a time, and how far it is can be read beside the bundle.

The ledger of the trainings that write a bundle lies in ``<bundle>.volseg/training``, as that of a segmentation lies
beside its output; checkpoints are kept elsewhere (`volseg.training.checkpoint`).
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from volseg.errors import InputError, JobInterrupted, VolsegError
from volseg.execution import lines
from volseg.execution.driver import SUBMISSION
from volseg.execution.output import wait_for_driver
from volseg.execution.prepare import short_name
from volseg.execution.status import RESULT, TRAINING, finished_training
from volseg.journal import Note, tagged
from volseg.spec import TrainSpec
from volseg.storage import files
from volseg.storage.ledger import Ledger, ledger_root
from volseg.storage.places import check_places
from volseg.training.claim import check_out, training_key
from volseg.training.progress import ProgressCallback, TrainProgress, TrainResult

_BEAT_SECONDS = 1.0
Train = Callable[[TrainSpec, ProgressCallback, Note], TrainResult]


def run_training(spec: TrainSpec, train: Train, progress: ProgressCallback, note: Note) -> dict[str, Any]:
    """Bring the training of `spec` to its end by `train` and return its report; a finished one answers at once.

    Where another process trains for the same bundle, this one waits for it first. With `overwrite` a finished training
    is made anew. Raises what `train` raises; where that is InputError, nothing is left behind.
    """
    out = files.absolute(spec.out)
    note = tagged(note, kind="training", output=out)
    check_places(writes=[out, ledger_root(out)])
    key, ledger, anew = training_key(spec), Ledger(out, TRAINING), spec.overwrite
    while True:
        if not anew and (report := finished_training(out, key)) is not None:
            note(f"{out} is the result of this training already")
            return report
        check_out(spec)
        if ledger.take():
            break
        wait_for_driver(ledger, note)
        anew = False
    whose = {"attempt": ledger.attempt, "job_key": key, "submission": os.environ.get(SUBMISSION, "")}
    note = tagged(note, job=short_name(key), attempt=ledger.attempt, submission=os.environ.get(SUBMISSION, ""))
    note(lines.training_started(spec))
    try:
        with _Pulse(ledger, {**whose, "total": spec.most_steps if spec.max_minutes is None else 0}) as pulse:

            def report_progress(now: TrainProgress) -> None:
                pulse.take(now)
                progress(now)

            result = train(spec, report_progress, note)
    except InputError as error:
        if ledger.attempt == 1:
            ledger.end(None)
            files.remove(ledger_root(out))
        else:
            ledger.end(_failure(error) | whose)
        note(lines.stopped(error))
        raise
    except VolsegError as error:
        ledger.end(None if isinstance(error, JobInterrupted) else _failure(error) | whose)
        note(lines.stopped(error))
        raise
    except BaseException as error:
        ledger.end(None)
        note(lines.stopped(error))
        raise
    done = {"status": "complete", **result.as_dict(), **whose}
    # Kept apart: a later attempt that fails must not make this result forgotten.
    files.write_bytes(files.join(ledger.path, RESULT), json.dumps(done).encode())
    ledger.end(done)
    note(lines.training_ended(done))
    return done


def _failure(error: VolsegError) -> dict[str, Any]:
    return {"status": "failed", "error": str(error), "type": type(error).__name__, "exit_code": error.exit_code}


class _Pulse:
    """Writes the heartbeat from a thread of its own: a training may be silent for minutes while it validates."""

    def __init__(self, ledger: Ledger, facts: dict[str, Any]) -> None:
        self._ledger, self._facts = ledger, facts
        self._first: TrainProgress | None = None
        self._last: TrainProgress | None = None
        self._fault: VolsegError | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def __enter__(self) -> _Pulse:
        self._ledger.tick(self._beat(), force=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if error is None and self._fault is not None:
            raise self._fault

    def take(self, now: TrainProgress) -> None:
        """Keep what is new for the next beat; raises what the last beat met, because nobody sees this training."""
        # Every fold of a training counts its steps from the start.
        self._first = now if self._first is None or now.step < self._first.step else self._first
        self._last = now
        if self._fault is not None:
            raise self._fault

    def _run(self) -> None:
        while not self._over.wait(_BEAT_SECONDS):
            try:
                self._ledger.tick(self._beat())
            except VolsegError as error:
                self._fault = error
                return

    def _beat(self) -> dict[str, Any]:
        first, now = self._first, self._last
        if first is None or now is None:
            return self._facts
        each = (now.seconds - first.seconds) / max(1, now.step - first.step)
        left, total = (now.max_steps - now.step) * each, now.max_steps
        if now.max_seconds is not None and (not each or now.max_seconds - now.seconds < left):
            # The time ends it, after about so many steps.
            left = max(0.0, now.max_seconds - now.seconds)
            total = now.step + round(left / each) if each else 0
        return {
            **self._facts, "total": total, "resumed": first.step, "computed": now.step - first.step,
            "seconds": round(now.seconds - first.seconds, 3), "left": round(left, 1), "loss": now.loss,
            "best_dice": now.best_dice,
        }  # fmt: skip
