"""A training as a job: one driver at a time, a status that others read, an end that answers at once."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import wait_until
from tests.train_support import spec_for, volumes
from volseg import api
from volseg.cli.job_commands import _read_job
from volseg.cli.main import build_parser
from volseg.cli.options import parse, read_spec
from volseg.client import AsyncClient, Client, JobStatus, TrainResult
from volseg.client.state import in_words
from volseg.cluster.submission import command_words, identify, name_of
from volseg.errors import InputError, JobInterrupted, OutputExistsError, SpecError, StorageFullError, VolumeError
from volseg.execution import training
from volseg.execution.status import read_status
from volseg.execution.training import run_training
from volseg.models.manifest import read_manifest
from volseg.recipes import recipe_names, resolve
from volseg.spec import SegmentSpec, TrainSpec
from volseg.storage import ledger
from volseg.training.claim import training_key
from volseg.training.progress import ProgressCallback, TrainProgress

NOW = TrainProgress(4, 40, 2.0, None, 0.5, 1e-3)


@pytest.fixture(autouse=True)
def _quick_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_BEAT_SECONDS", 0.02)
    monkeypatch.setattr(ledger, "HEARTBEAT_SECONDS", 0.02)


def quiet(_: object) -> None:
    """Take what nobody needs."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return volumes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle that a training of two steps wrote, and its ledger."""
    folder = tmp_path_factory.mktemp("trained")
    api.run_train(spec_for(folder, data, max_steps=2))
    return folder


# ---------------------------------------------------------------- which training it is


def test_names(data: dict[str, str], tmp_path: Path) -> None:
    """Who does the work makes no other training; options, length, data and place do."""
    spec = spec_for(tmp_path, data)
    task = identify(spec)
    same = spec_for(tmp_path, data, workers=2, device="cpu", attempts=7, overwrite=True, webhook="https://lab/x")
    assert name_of(identify(same), 1) == name_of(task, 1)
    changed = tmp_path / "labels.zarr"
    shutil.copytree(data["labels"], changed)
    others = [
        identify(spec_for(tmp_path, data, seed=1)),
        identify(spec_for(tmp_path, data, max_steps=41)),
        identify(spec_for(tmp_path, data, recipe="tomo-fewslice")),
        identify(spec_for(tmp_path, data | {"labels": str(changed)})),
        identify(spec_for(tmp_path, data, out=str(tmp_path / "other"))),
    ]
    assert len({task.stem, *(other.stem for other in others)}) == 6
    assert task.metadata["volseg_output"] == str(tmp_path / "bundle")
    with pytest.raises(VolumeError, match="nothing at"):
        identify(spec_for(tmp_path, data | {"image": "/none.zarr"}))
    with pytest.raises(InputError, match=r"output .* and image .* overlap"):
        identify(spec_for(tmp_path, data, out=f"{data['image']}/bundle"))
    with pytest.raises(InputError, match="the spec says address"):
        identify(spec_for(tmp_path, data, address="10.0.0.1:6379"))


@pytest.mark.parametrize("recipe", recipe_names())
def test_command_line_says_the_same(recipe: str, tmp_path: Path) -> None:
    """What the driver on the cluster reads is what was submitted, whatever its recipe gives."""
    spec = resolve({
        "recipe": recipe, "image": ["a.zarr", "it's b.zarr"], "labels": ["c.zarr", "d.zarr"], "out": "o",
        "offset": "1,2,3;0", "train_roi": "0:4,:,:;none", "val_roi": "4:8,:,:", "pools": "1,2,2",
        "augmentation": {"warp": 0.11}, "workers": "1:3", "average": False, "max_minutes": 2,
    })  # fmt: skip
    words = command_words(spec)
    parser, known = build_parser()
    assert read_spec(parse(parser, known, words), TrainSpec, resolve) == spec
    assert json.loads(words[words.index("--set") + 1].partition("=")[2]) == ["a.zarr", "it's b.zarr"]


def test_a_spec_leaves_to_its_recipe_what_it_does_not_say(data: dict[str, str], tmp_path: Path) -> None:
    spec = TrainSpec(**data, out=str(tmp_path / "b"), recipe="tomo-fewslice", augmentation={"warp": 0.2})
    task = identify(spec)
    assert isinstance(task.spec, TrainSpec)
    assert (task.spec.class_weights, task.spec.augmentation.warp, task.spec.augmentation.angle) == ("balanced", 0.2, 30)


def test_the_file_tells_which_job(data: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(json.dumps({**data, "out": "o", "dims": 2}))
    (tmp_path / "job.yaml").write_text(json.dumps({"input": "i", "output": "o", "model": "m"}))
    parser, known = build_parser()

    def read(*words: str) -> SegmentSpec | TrainSpec:
        arguments = parse(parser, known, ["submit", *words])
        arguments.__dict__.pop("address", None)
        return _read_job(arguments)

    spec = read(str(tmp_path / "train.yaml"), "--device", "cpu", "--set", "augmentation.warp=0.3")
    assert isinstance(spec, TrainSpec)
    assert (spec.dims, spec.device, spec.augmentation.warp) == (2, "cpu", 0.3)
    assert isinstance(read(str(tmp_path / "job.yaml"), "--overlap", "0.25"), SegmentSpec)
    with pytest.raises(SpecError, match="describes a training, which has no option --overlap; nothing was submitted"):
        read(str(tmp_path / "train.yaml"), "--overlap", "0.25")


# ---------------------------------------------------------------- the ledger beside the bundle


def test_status_while_it_trains_and_after_it_stopped(data: dict[str, str], tmp_path: Path) -> None:
    spec = spec_for(tmp_path, data)
    seen = []

    def train(_: TrainSpec, progress: ProgressCallback, __: object) -> TrainResult:
        progress(NOW)
        progress(replace(NOW, step=14, seconds=4.0, best_dice=0.8))
        wait_until(lambda: read_status(spec.out).done == 14)
        seen.append(read_status(spec.out))
        raise JobInterrupted("stopped by the user")

    with pytest.raises(JobInterrupted):
        run_training(spec, train, quiet, quiet)
    (status,) = seen
    assert (status.state, status.unit, status.total, status.done) == ("running", "steps", 40, 14)
    assert (status.rate, status.seconds_left, status.loss, status.best_dice) == (5.0, 5.2, 0.5, 0.8)
    assert status.job_key == training_key(spec)
    after = read_status(spec.out)
    assert (after.state, after.ended, after.seconds_left) == ("stopped", True, None)


def _has_done(out: str, steps: int) -> bool:
    return read_status(out).done == steps


def test_status_where_the_time_is_the_limit(data: dict[str, str], tmp_path: Path) -> None:
    """Nobody knows the number of steps; the pace tells it."""
    spec = spec_for(tmp_path, data, max_minutes=1, max_steps=None)
    now = replace(NOW, max_steps=spec.most_steps, max_seconds=60.0)
    seen = []

    def train(_: TrainSpec, progress: ProgressCallback, __: object) -> TrainResult:
        for told in (now, replace(now, step=now.step + 10, seconds=now.seconds + 2)):
            progress(told)
            wait_until(partial(_has_done, spec.out, told.step))
            seen.append(read_status(spec.out))
        raise JobInterrupted("stopped by the user")

    with pytest.raises(JobInterrupted):
        run_training(spec, train, quiet, quiet)
    first, second = seen
    assert (first.total, first.done) == (0, now.step)
    left = 60 - now.seconds - 2
    assert (second.total, second.seconds_left) == (now.step + 10 + round(5 * left), left)
    assert read_status(spec.out, "0123").state == "absent"
    words = in_words(JobStatus("", "", "running", 40, 14, unit="steps", loss=0.5, best_dice=0.8, seconds_left=5.2))
    assert words == "running, 14 of 40 steps, loss 0.500, best Dice 0.800, about 5 s left"


def test_time_left_goes_by_the_limit_that_comes_first(data: dict[str, str], tmp_path: Path) -> None:
    spec, left = spec_for(tmp_path, data), list[float | None]()

    def train(_: TrainSpec, progress: ProgressCallback, __: object) -> TrainResult:
        progress(NOW)
        # A fold begins anew.
        for now in (replace(NOW, step=24, seconds=4.0, max_seconds=5.0), replace(NOW, step=1, seconds=5.0)):
            progress(now)
            wait_until(lambda now=now: read_status(spec.out).loss == 0.5 and read_status(spec.out).done == now.step)  # type: ignore[misc]
            left.append(read_status(spec.out).seconds_left)
        raise JobInterrupted("stopped by the user")

    with pytest.raises(JobInterrupted):
        run_training(spec, train, quiet, quiet)
    assert left == [1.0, None]


def test_a_failure_is_told(data: dict[str, str], tmp_path: Path) -> None:
    spec = spec_for(tmp_path, data)

    def train(*_: object) -> TrainResult:
        raise StorageFullError("no space left")

    with pytest.raises(StorageFullError):
        run_training(spec, train, quiet, quiet)
    status = read_status(spec.out)
    assert (status.state, status.error, status.attempt) == ("failed", "no space left", 1)
    assert (status.report or {})["type"] == "StorageFullError"


def test_what_is_refused_leaves_nothing(data: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing was trained"):
        api.run_train(spec_for(tmp_path, data, class_weights=(1, 2, 3)))
    assert not list(tmp_path.iterdir())


def test_a_lost_ledger_stops_the_training(
    data: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody could see how it does, and another driver would take it for dead."""
    spec, lost = spec_for(tmp_path, data), StorageFullError("no space for the heartbeat")

    def tick(*_: object, **options: object) -> None:
        if "force" not in options:
            raise lost

    monkeypatch.setattr(ledger.Ledger, "tick", tick)

    def train(_: TrainSpec, progress: ProgressCallback, __: object) -> TrainResult:
        wait_until(lambda: progress(NOW))
        raise AssertionError

    with pytest.raises(StorageFullError, match="no space for the heartbeat"):
        run_training(spec, train, quiet, quiet)


def test_a_finished_training_answers_at_once(data: dict[str, str], trained: Path) -> None:
    def never(*_: object) -> TrainResult:
        raise AssertionError

    spec, notes = spec_for(trained, data, max_steps=2), list[str]()
    report = run_training(spec, never, quiet, notes.append)
    assert (report["status"], report["steps"]) == ("complete", 2)
    assert report["digest"] == read_manifest(spec.out).digest
    assert notes == [f"{spec.out} is the result of this training already"]
    status = read_status(spec.out)
    assert (status.state, status.done, status.total) == ("complete", 2, 2)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        run_training(spec_for(trained, data, max_steps=3), never, quiet, quiet)
    with pytest.raises(AssertionError):
        run_training(spec_for(trained, data, max_steps=2, overwrite=True), never, quiet, quiet)
    # An attempt that came to nothing makes the result no worse.
    assert run_training(spec, never, quiet, quiet) == report
    assert read_status(spec.out, training_key(spec)).state == "complete"


def test_a_bundle_that_was_replaced_is_no_result(data: dict[str, str], trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    spec = spec_for(tmp_path, data, max_steps=2)
    assert read_status(spec.out, training_key(spec)).state == "complete"
    shutil.rmtree(spec.out)
    assert read_status(spec.out, training_key(spec)).state == "stopped"
    api.run_train(spec_for(tmp_path, data, max_steps=2, seed=3))
    assert read_status(spec.out, training_key(spec)).state == "absent"


def test_two_drivers_of_one_training(data: dict[str, str], trained: Path, tmp_path: Path) -> None:
    """The second one waits, and answers with what the first one made."""
    spec, notes, answers = spec_for(tmp_path, data, max_steps=2), list[str](), list[dict[str, Any]]()
    begun, go_on = threading.Event(), threading.Event()

    def train(spec: TrainSpec, *_: object) -> TrainResult:
        begun.set()
        assert go_on.wait(60)
        shutil.copytree(trained / "bundle", spec.out)
        digest = read_manifest(spec.out).digest or ""
        return TrainResult(spec.out, digest, 2, 1.0, 0, None, None, "last", None, 1.0, 0.0)

    def run(train: Callable[..., TrainResult], note: Callable[[str], None]) -> None:
        answers.append(run_training(spec, train, quiet, note))

    first = threading.Thread(target=run, args=(train, quiet))
    first.start()
    assert begun.wait(60)
    second = threading.Thread(target=run, args=(pytest.fail, notes.append))
    second.start()
    wait_until(lambda: notes)
    assert "works on this output; waiting until it ends" in notes[0]
    go_on.set()
    first.join(60)
    second.join(60)
    assert len(answers) == 2
    assert answers[0] == answers[1]


# ---------------------------------------------------------------- through the client


@pytest.mark.slow
def test_embedded(data: dict[str, str], tmp_path: Path) -> None:
    """Submitted, watched, cancelled, gone on with, and asked for again by whoever wants the result."""
    spec = spec_for(tmp_path, data, max_steps=200, validations=20)

    with Client(None) as client:
        job = client.submit(spec)
        assert client.submit(spec).attached
        wait_until(lambda: list(Path(f"{spec.out}.training/checkpoints").glob("*/manifest.json")))
        status = job.status()
        assert (status.state, status.unit, status.total) == ("running", "steps", 200)
        job.cancel()
        with pytest.raises(JobInterrupted, match=r"stopped with \d+ of 200 steps done .*submit it again to go on"):
            job.result(60)
        again = client.submit(spec)
        assert again.id != job.id
        states = [now.state for now in again.watch(0.2, timeout=100)]
        assert states[-1] == "complete"
        result: TrainResult = again.result()
        assert 0 < result.resumed_from < 200
        assert result.mean_foreground_dice == again.status().best_dice
        assert result.digest == read_manifest(spec.out).digest
        assert [found.id for found in client.jobs()] == [again.id]
        assert client.job(spec.out).result() == result

    async def ask() -> TrainResult:
        async with AsyncClient(None) as client:
            job = await client.submit(spec)
            assert job.attached
            return await job.result(5)

    assert asyncio.run(ask()) == result
