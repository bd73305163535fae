"""Kills, interruptions, repetitions: the same command finishes the job, computes nothing twice, and the bits stay."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.support import (
    LONGEST,
    Case,
    actors,
    descendants,
    done_blocks,
    labels_of,
    long,
    probabilities_of,
    process,
    receipts_of,
    run,
    run_json,
    segment,
    segment_words,
    status_of,
    wait_until,
)
from volseg import api
from volseg.errors import InputError, JobInterrupted, OutputExistsError
from volseg.execution.driver import Tally
from volseg.spec import SegmentSpec

# Many small blocks, so that a job is far from its end when its first receipts appear.
BLOCKS = 75
OPTIONS: dict[str, Any] = {"overlap": 0.5, "block": "8,16,10", "probabilities": True}
WORDS = ("--overlap", 0.5, "--block", "8,16,10", "--probabilities")
SERIAL = (*WORDS, "--executor", "serial")
THREADS = (*WORDS, "--executor", "threads", "--workers", 2)
RAY = (*WORDS, "--executor", "ray", "--workers", 2)


@pytest.fixture(scope="module")
def case(slow_case: Case) -> Case:
    return slow_case


@pytest.fixture(scope="module")
def undisturbed(case: Case) -> Path:
    output = case.folder / "undisturbed.zarr"
    assert segment(case, output, **OPTIONS)["blocks"]["computed"] == BLOCKS
    return output


def assert_whole(output: Path, undisturbed: Path) -> None:
    assert status_of(output) == status_of(output / "probabilities") == "complete"
    np.testing.assert_array_equal(labels_of(output), labels_of(undisturbed))
    np.testing.assert_array_equal(probabilities_of(output), probabilities_of(undisturbed))
    assert api.verify(str(output), deep=True)["status"] == "verified"


def assert_resumes(case: Case, output: Path, undisturbed: Path, words: tuple[object, ...]) -> None:
    """Run the command again: it computes exactly the blocks that have no receipt."""
    before, segments = done_blocks(output), set(receipts_of(output))
    assert 0 < len(before) < BLOCKS
    assert status_of(output) == "incomplete"
    report = run_json(*segment_words(case, output, *words))
    assert report["status"] == "complete"
    assert report["blocks"] == {
        "total": BLOCKS, "computed": BLOCKS - len(before), "resumed": len(before), "failed": 0,
    }  # fmt: skip
    lines = [line for path in set(receipts_of(output)) - segments for line in path.read_text().splitlines()]
    computed = [json.loads(line)["index"] for line in lines]
    assert sorted(computed) == sorted(set(range(BLOCKS)) - before)
    assert_whole(output, undisturbed)


def started(job: subprocess.Popen[str], output: Path) -> None:
    wait_until(lambda: receipts_of(output), job)


# ---------------------------------------------------------------- kills


@pytest.mark.parametrize("words", [long(SERIAL), THREADS], ids=["serial", "threads"])
def test_driver_killed(case: Case, undisturbed: Path, tmp_path: Path, words: tuple[object, ...]) -> None:
    output = tmp_path / "out.zarr"
    with process(*segment_words(case, output, *words)) as job:
        started(job, output)
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait(LONGEST) == -signal.SIGKILL
    assert_resumes(case, output, undisturbed, words)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
def test_driver_of_ray_workers_killed_then_everything(case: Case, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    with process(*segment_words(case, output, *RAY)) as job:
        started(job, output)
        workers = actors(job.pid)
        os.kill(job.pid, signal.SIGKILL)
        assert job.wait(LONGEST) == -signal.SIGKILL
        # Workers do not outlive their driver: nobody goes on computing for nothing.
        assert workers
        assert not psutil.wait_procs(workers, timeout=LONGEST)[1]
    before = set(receipts_of(output))
    with process(*segment_words(case, output, *RAY)) as job:
        wait_until(lambda: set(receipts_of(output)) - before, job)
        for member in [*descendants(job.pid), psutil.Process(job.pid)]:
            member.kill()
        job.wait(LONGEST)
    # Who finishes does not matter: the executor is no part of the job.
    assert_resumes(case, output, undisturbed, SERIAL)


@pytest.mark.ray
@pytest.mark.usefixtures("one_ray")
def test_workers_killed(case: Case, undisturbed: Path, tmp_path: Path) -> None:
    """Killed workers are replaced; no error is counted against their blocks, not even the single one allowed here."""
    output, victims, notes = tmp_path / "out.zarr", set[int](), list[str]()

    def kill(tally: Tally) -> None:
        if tally.computed and tally.workers == 2 and not victims:
            for worker in actors(os.getpid()):
                victims.add(worker.pid)
                worker.kill()

    options = {**OPTIONS, "executor": "ray", "workers": 2, "attempts": 1}
    values = {"input": case.image, "output": str(output), "model": case.bundle, **options}
    report = api.run_segment(SegmentSpec.read(values), kill, notes.append)
    assert len(victims) == 2
    assert report["blocks"] == {"total": BLOCKS, "computed": BLOCKS, "resumed": 0, "failed": 0}
    assert report["workers"]["lost"] == 2
    assert 2 <= report["retried"] <= 4
    assert sum("was lost" in note for note in notes) == 2
    assert_whole(output, undisturbed)


# ---------------------------------------------------------------- interruptions


@pytest.mark.parametrize(
    ("number", "words"),
    [long(signal.SIGINT, SERIAL), long(signal.SIGTERM, SERIAL), (signal.SIGINT, THREADS)],
    ids=["ctrl-c", "sigterm", "ctrl-c to threads"],
)
def test_interrupted(
    case: Case, undisturbed: Path, tmp_path: Path, number: signal.Signals, words: tuple[object, ...]
) -> None:
    output = tmp_path / "out.zarr"
    with process(*segment_words(case, output, *words, "--json")) as job:
        started(job, output)
        job.send_signal(number)
        out, err = job.communicate(timeout=LONGEST)
    assert_stopped(job.returncode, out, err, output)
    assert_resumes(case, output, undisturbed, SERIAL)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
def test_ray_interrupted(case: Case, undisturbed: Path, tmp_path: Path) -> None:
    """A terminal sends Ctrl-C to the driver and to all that Ray started."""
    output = tmp_path / "out.zarr"
    with process(*segment_words(case, output, *RAY, "--json")) as job:
        started(job, output)
        workers = actors(job.pid)
        os.killpg(job.pid, signal.SIGINT)
        out, err = job.communicate(timeout=LONGEST)
        assert not psutil.wait_procs(workers, timeout=LONGEST)[1]
    assert_stopped(job.returncode, out, err, output)
    # Ray's daemons and workers are chatty: the second run's stdout holds its report alone, its stderr progress alone.
    words = segment_words(case, output, *RAY, "--json")
    done = run(*words)
    assert done.returncode == 0, done.stderr
    # The second one may be ready only when nothing is left.
    assert json.loads(done.stdout)["workers"] in ({"used": used, "lost": 0} for used in (1, 2))
    assert all(line.startswith("segment: ") for line in done.stderr.splitlines()), done.stderr
    assert_whole(output, undisturbed)


def assert_stopped(code: int, out: str, err: str, output: Path) -> None:
    done = len(done_blocks(output))
    assert 0 < done < BLOCKS
    line = f"interrupted: {done} of {BLOCKS} blocks are done and kept; run the same command again to go on"
    assert code == 130, err
    assert err.splitlines()[-1] == f"volseg: {line}"
    assert "Traceback" not in err
    assert json.loads(out) == {"status": "error", "error": line, "exit_code": 130}
    assert status_of(output) == "incomplete"


# ---------------------------------------------------------------- two commands at once


@pytest.mark.chaos
@pytest.mark.parametrize("end", [signal.SIGCONT, signal.SIGKILL], ids=["goes on", "is killed"])
def test_second_command_waits(case: Case, undisturbed: Path, tmp_path: Path, end: signal.Signals) -> None:
    """It attaches to the job that runs, computes nothing twice, and takes over where that one dies."""
    output = tmp_path / "out.zarr"
    with process(*segment_words(case, output, *SERIAL)) as first:
        started(first, output)
        first.send_signal(signal.SIGSTOP)
        with process(*segment_words(case, output, *SERIAL, "--json")) as second:
            assert second.stderr is not None
            line = second.stderr.readline()
            assert line.startswith(f"process {first.pid} on ")
            assert line.rstrip().endswith("works on this output; waiting until it ends")
            before = len(done_blocks(output))
            first.send_signal(end)
            out, err = second.communicate(timeout=LONGEST)
            assert second.returncode == 0, err
            first.wait(LONGEST)
    report = json.loads(out)
    resumed = BLOCKS if end == signal.SIGCONT else before
    assert report["blocks"] == {"total": BLOCKS, "computed": BLOCKS - resumed, "resumed": resumed, "failed": 0}
    assert report["status"] == "complete"
    assert_whole(output, undisturbed)


@pytest.mark.chaos
def test_overwrite_waits_for_the_other_job(case: Case, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    with process(*segment_words(case, output, "--overlap", 0.5, "--block", "8,16,10", "--executor", "serial")) as first:
        started(first, output)
        first.send_signal(signal.SIGSTOP)
        with process(*segment_words(case, output, *SERIAL, "--overwrite")) as second:
            assert second.stderr is not None
            assert second.stderr.readline().startswith(f"process {first.pid} on ")
            assert not (output / "probabilities").exists()
            first.kill()
            first.wait(LONGEST)
            _, err = second.communicate(timeout=LONGEST)
            assert second.returncode == 0, err
    assert_whole(output, undisturbed)


# ---------------------------------------------------------------- what a resume keeps and checks


def part(case: Case, output: Path, blocks: int) -> int:
    """Interrupt a job when `blocks` blocks are done; return how many are."""

    def stop(tally: Tally) -> None:
        if tally.computed >= blocks:
            raise KeyboardInterrupt

    values = {
        "input": case.image,
        "output": str(output),
        "model": case.bundle,
        "executor": "serial",
        **OPTIONS,
    }
    with pytest.raises(JobInterrupted, match=f"of {BLOCKS} blocks are done and kept"):
        api.run_segment(SegmentSpec.read(values), stop)
    return len(done_blocks(output))


def test_complete_job_again(case: Case, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    shutil.copytree(undisturbed, output)
    shutil.copytree(f"{undisturbed}.volseg", f"{output}.volseg")
    before = {p: p.stat().st_mtime_ns for p in output.rglob("c/**/*") if p.is_file()}
    assert len(before) == 2 * BLOCKS
    report = segment(case, output, **OPTIONS)
    assert report["blocks"] == {"total": BLOCKS, "computed": 0, "resumed": BLOCKS, "failed": 0}
    assert report["forwards"] == 0
    assert {p: p.stat().st_mtime_ns for p in output.rglob("c/**/*") if p.is_file()} == before
    assert_whole(output, undisturbed)


def test_report_of_a_resumed_job(case: Case, undisturbed: Path, tmp_path: Path) -> None:
    """Counts of voxels cover the whole result, not only what this run computed."""
    output = tmp_path / "out.zarr"
    part(case, output, 10)
    report = segment(case, output, **OPTIONS)
    counts = np.bincount(labels_of(undisturbed).ravel(), minlength=3)
    assert [c["voxels"] for c in report["classes"]] == counts.tolist()
    assert report["output"] == str(output)


@pytest.mark.parametrize("array", [long("0"), "probabilities/0"])
def test_damaged_objects_are_computed_again(case: Case, undisturbed: Path, tmp_path: Path, array: str) -> None:
    output = tmp_path / "out.zarr"
    segment(case, output, **OPTIONS)
    objects = sorted(p for p in (output / array / "c").rglob("*") if p.is_file())
    assert len(objects) == BLOCKS
    objects[3].unlink()
    objects[40].write_bytes(objects[40].read_bytes()[:-5])
    found = api.verify(str(output))
    assert found["status"] == "damaged"
    assert [d["error"] for d in found["damaged"]] == ["an object is absent or has another size"] * 2
    done = run(*segment_words(case, output, *SERIAL, "--json"))
    assert done.returncode == 0, done.stderr
    assert "2 block(s) have a receipt but their objects are gone or changed" in done.stderr
    assert json.loads(done.stdout)["blocks"] == {"total": BLOCKS, "computed": 2, "resumed": BLOCKS - 2, "failed": 0}
    assert_whole(output, undisturbed)


@pytest.mark.chaos
def test_all_objects_gone(case: Case, undisturbed: Path, tmp_path: Path) -> None:
    """The ledger alone proves nothing."""
    output = tmp_path / "out.zarr"
    segment(case, output, **OPTIONS)
    shutil.rmtree(output)
    assert segment(case, output, **OPTIONS)["blocks"]["computed"] == BLOCKS
    assert_whole(output, undisturbed)


def test_resume_keeps_the_block_grid(case: Case, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    done = part(case, output, 5)
    other = {**OPTIONS, "block": "20,20,20", "chunks": "10,10,10"}
    report = segment(case, output, **other)
    assert report["blocks"] == {"total": BLOCKS, "computed": BLOCKS - done, "resumed": done, "failed": 0}
    assert_whole(output, undisturbed)


def test_resume_without_a_ledger(case: Case, undisturbed: Path, tmp_path: Path) -> None:
    """An output whose ledger is gone cannot be trusted: it is refused, and --overwrite makes it anew."""
    output = tmp_path / "out.zarr"
    part(case, output, 5)
    shutil.rmtree(f"{output}.volseg")
    other = {**OPTIONS, "block": "20,20,20"}
    with pytest.raises(OutputExistsError, match=r"its ledger .*out\.zarr\.volseg.* is gone, .*--overwrite"):
        segment(case, output, **other)
    assert status_of(output) == "incomplete"
    assert segment(case, output, **other, overwrite=True)["blocks"] == {
        "total": 18, "computed": 18, "resumed": 0, "failed": 0,
    }  # fmt: skip
    assert_whole(output, undisturbed)


def test_another_device_is_refused_unless_named(case: Case, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    done = part(case, output, 5)
    (numerics,) = Path(f"{output}.volseg").glob("*/numerics.json")
    first = json.loads(numerics.read_text())
    numerics.write_text(json.dumps({**first, "chip": "abacus", "name": "0123456789ab"}))
    with pytest.raises(InputError, match=r"chip abacus then, .* now") as refused:
        segment(case, output, **OPTIONS)
    assert f"--allow-device {first['name']}" in str(refused.value)
    assert len(done_blocks(output)) == done
    report = segment(case, output, **OPTIONS, allow_device=first["name"])
    assert report["blocks"]["resumed"] == done
    assert_whole(output, undisturbed)


def test_another_batch_is_refused(case: Case, tmp_path: Path) -> None:
    """The size of a batch decides the last bits of a forward."""
    output = tmp_path / "out.zarr"
    part(case, output, 5)
    with pytest.raises(InputError, match="batch 1 then, 2 now"):
        segment(case, output, **OPTIONS, batch=2)


# ---------------------------------------------------------------- overwriting


def test_overwrite(case: Case, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    segment(case, output, overlap=0.25)
    before = labels_of(output)
    with pytest.raises(OutputExistsError, match=r"probabilities: false there, true asked for.*--overwrite"):
        segment(case, output, **OPTIONS)
    np.testing.assert_array_equal(labels_of(output), before)
    assert status_of(output) == "complete"
    assert segment(case, output, **OPTIONS, overwrite=True)["blocks"]["computed"] == BLOCKS
    assert_whole(output, undisturbed)
    assert len(list(Path(f"{output}.volseg").iterdir())) == 1
    # With the same spec there is nothing to replace.
    assert segment(case, output, **OPTIONS, overwrite=True)["blocks"]["computed"] == 0


def test_overwrite_spares_what_volseg_did_not_write(case: Case, tmp_path: Path) -> None:
    output = tmp_path / "thesis.zarr"
    output.mkdir()
    (output / "chapter1.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="volseg did not write it"):
        segment(case, output, overwrite=True)
    assert (output / "chapter1.txt").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.zarr"]
