"""Events on stderr: JSON lines with job, block and attempt, or words for people; stdout holds the result alone."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import Case, run, segment_words, store
from tests.train_support import scene
from volseg.cli import commands, log, show
from volseg.cli.log import Log, choose, log_of, writing
from volseg.cli.main import main
from volseg.cli.progress import ProgressLine
from volseg.client.state import _reason
from volseg.errors import BlockError, SpecError
from volseg.inference.block_processor import BlockProcessor
from volseg.journal import Line
from volseg.planning.task import Task

Json = dict[str, Any]


def events_of(text: str) -> list[Json]:
    """Return the events of a log; every line must be one."""
    found = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "event"} <= set(event) for event in found)
    return found


def named(events: list[Json], name: str) -> list[Json]:
    return [event for event in events if event["event"] == name]


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (log.MODE, log.LEVEL, *log._IN_A_JOB):
        monkeypatch.delenv(name, raising=False)


def fail_once(monkeypatch: pytest.MonkeyPatch, bad: int, times: int) -> None:
    """Make block `bad` fail so many times."""
    read, left = BlockProcessor._read, [times]

    def wrapped(self: BlockProcessor, task: Task) -> Any:
        if task.index == bad and left[0]:
            left[0] -= 1
            raise BlockError("the storage hiccuped")
        return read(self, task)

    monkeypatch.setattr(BlockProcessor, "_read", wrapped)


def test_a_job_as_json(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_once(monkeypatch, bad=1, times=2)
    output = tmp_path / "out.zarr"
    words = segment_words(case, output, "--executor", "serial", "--overlap", 0.25, "--block", "24,24,24")
    assert main([*map(str, words), "--json", "--log", "json", "--log-level", "debug"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    events = events_of(err)
    assert [event["event"] for event in events][:2] == ["job started", "worker ready"]
    (ended,) = named(events, "job ended")
    (started,) = named(events, "job started")
    blocks = report["blocks"]["total"]
    common = {"job": report["job_key"][:12], "attempt": 1, "output": str(output), "submission": ""}
    assert all(common.items() <= event.items() for event in events if event["event"] != "progress")
    assert (started["blocks"], started["workers"], started["device"]) == (blocks, 1, "cpu")
    assert started["forwards"] == report["forwards"] == ended["forwards"]
    assert (ended["status"], ended["computed"], ended["retried"]) == ("complete", blocks, 2)
    assert ended["written_bytes"] == report["bytes"]["written"] > 0
    done = named(events, "block done")
    assert sorted(event["block"] for event in done) == list(range(blocks))
    assert all(event["level"] == "debug" and event["read_seconds"] > 0 for event in done)
    failed = named(events, "block failed")
    assert [(event["block"], event["errors"]) for event in failed] == [(1, 1), (1, 2)]
    assert failed[0]["message"] == "block 1 is tried again: the storage hiccuped"
    assert "message" not in failed[1]
    assert len(named(events, "block retried")) == 2
    last = named(events, "progress")[-1]
    assert (last["job"], last["done"], last["total"], last["workers"]) == (common["job"], blocks, blocks, 1)


def test_blocks_are_told_only_at_debug(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A million blocks must not write a million lines; and a block that is set aside is an error."""
    fail_once(monkeypatch, bad=1, times=9)
    monkeypatch.setenv("VOLSEG_LOG", "json")
    words = segment_words(case, tmp_path / "out.zarr", "--executor", "serial", "--roi", "0:24,0:24,:", "--attempts", 2)
    assert main([*map(str, words), "--overlap", "0.25", "--block", "24,24,24"]) == 3
    out, err = capsys.readouterr()
    assert "1 of 3 blocks were set aside" in out
    events = events_of(err)
    assert not named(events, "block done")
    (aside,) = named(events, "block set aside")
    assert (aside["block"], aside["level"], aside["error"]) == (1, "error", "the storage hiccuped")
    (ended,) = named(events, "job ended")
    assert (ended["status"], ended["failed"], ended["level"]) == ("partial", 1, "error")


def test_an_interrupted_and_a_broken_job(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*map(str, segment_words(case, tmp_path / "out.zarr", "--executor", "serial", "--log", "json"))]
    for error, code, status in ((KeyboardInterrupt(), 130, "stopped"), (ZeroDivisionError("bug"), 4, "broken")):

        def stop(*_: object, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr("volseg.execution.segment.reopen", stop)
        assert main(words) == code
        events = events_of(capsys.readouterr().err)
        assert named(events, "job ended")[0]["status"] == status
        assert (events[-1]["event"], events[-1]["level"], events[-1]["exit_code"]) == ("failed", "error", code)


def test_people_read_the_same_words_as_before(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_once(monkeypatch, bad=0, times=1)
    words = segment_words(case, tmp_path / "out.zarr", "--executor", "serial", "--roi", "0:16,0:16,0:16")
    assert main([*map(str, words)]) == 0
    first, second = capsys.readouterr().err.splitlines()
    assert first == "block 0 is tried again: the storage hiccuped"
    assert second.startswith("segment: 1/1 blocks, ")


def test_training_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, labels = scene()
    places = {name: store(tmp_path / f"{name}.zarr", data) for name, data in (("image", image), ("labels", labels))}
    words = ["train", "--out", str(tmp_path / "bundle"), "--dims", "2", "--train-roi", "0:8,:,:", "--patch", "1,16,16"]
    words += ["--widths", "4,8", "--batch", "2", "--max-steps", "2", "--threads", "1", "--log", "json"]
    assert main([*words, "--image", places["image"], "--labels", places["labels"]]) == 0
    out, err = capsys.readouterr()
    assert "bundle" in out
    events = events_of(err)
    common = {"kind": "training", "output": str(tmp_path / "bundle"), "attempt": 1}
    assert all(common.items() <= event.items() for event in events if event["event"] != "progress")
    assert (events[0]["event"], events[0]["max_steps"]) == ("job started", 2)
    assert (events[-1]["event"], events[-1]["status"], events[-1]["steps"]) == ("job ended", "complete", 2)
    last = named(events, "progress")[-1]
    assert {"step", "loss", "learning_rate", "task"} <= set(last)
    assert (last["job"], last["attempt"]) == (events[0]["job"], 1)


@pytest.mark.parametrize("name", log._IN_A_JOB)
def test_a_job_of_a_cluster_writes_json(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "x")
    assert choose(None, None).json
    assert not choose("text", None).json
    monkeypatch.setenv(log.MODE, "text")
    assert not choose(None, None).json
    assert choose("json", "warning") == Log(json=True, level="warning")
    monkeypatch.delenv(log.MODE)
    assert main(["info", "/absent"]) == 2
    (event,) = events_of(capsys.readouterr().err)
    assert (event["event"], event["exit_code"]) == ("failed", 2)
    assert "/absent" in event["message"]


def test_unknown_modes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "x", "--log", "xml"]) == 2
    said = capsys.readouterr().err
    assert said == "volseg: --log 'xml' is not known; nothing was done: say one of auto, text, json\n"
    monkeypatch.setenv(log.LEVEL, "loud")
    with pytest.raises(SpecError, match=r"VOLSEG_LOG_LEVEL 'loud' is not known.* info, debug, warning, error"):
        choose(None, None)
    monkeypatch.delenv(log.LEVEL)
    # A command line that is refused still says so in the form that it asks for.
    assert log_of(["segment", "--log=json", "--wrong"]).json
    assert log_of(["segment", "--log", "json"]).json
    assert not log_of(["segment", "--log", "xml"]).json


def test_what_libraries_print(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It becomes events, or stays text; without credentials, never on stdout, and in whole lines."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-a-library")

    def noise(_: object) -> commands.Result:
        print("first", end=" ")
        print("line of canary-of-a-library")
        sys.stderr.write("to stderr\rand again\n")
        print("rest", end="")
        return {"a": 1}, "the result", 0

    monkeypatch.setattr(commands, "run_info", noise)
    assert main(["info", "x", "--log", "json"]) == 0
    out, err = capsys.readouterr()
    assert out == "the result\n"
    events = events_of(err)
    assert all(event["event"] == "output" for event in events)
    assert [event["message"] for event in events] == ["first line of ***", "to stderr", "and again", "rest"]
    assert main(["info", "x"]) == 0
    out, err = capsys.readouterr()
    assert out == "the result\n"
    assert "canary" not in err
    assert err.splitlines()[-1] == "rest"


def test_a_command_inside_of_another(capsys: pytest.CaptureFixture[str]) -> None:
    with writing(Log(json=True)), writing(Log(json=False)), ProgressLine("x") as line:
        line.note("note")
    (event,) = events_of(capsys.readouterr().err)
    assert event["message"] == "note"


def test_all_for_people_at_debug(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(log.LEVEL, "debug")
    with ProgressLine("segment") as line:
        line.note(Line("", "block done", "debug", block=3))
    assert capsys.readouterr().err == "block done: block=3\n"


def test_levels(capsys: pytest.CaptureFixture[str]) -> None:
    written = Log(json=False, level="warning")
    written.write(Line("info"))
    written.write(Line("warned", level="warning"))
    assert capsys.readouterr().err == "warned\n"


def test_reason_of_a_failed_job_whose_log_is_json() -> None:
    """Ray keeps the end of the log and nothing else of a driver that failed."""
    event = Line("no permission to write", "failed", "error", exit_code=4).as_json(time.time())
    assert _reason(f'Job failed, last logs:\n{event}\n{{"status": "error"}}\n') == "no permission to write"
    assert _reason("Job failed\nvolseg: told as text\n") == "told as text"


def test_progress_of_a_training_says_what_it_knows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from volseg.training.progress import TrainProgress

    monkeypatch.setenv(log.MODE, "json")
    with ProgressLine("train") as line:
        show.TrainingLine(line)(TrainProgress(9, 9, 3.0, None, 0.25, 0.1, 0.5, 0.5))
    (event,) = events_of(capsys.readouterr().err)
    assert (event["loss"], event["val_dice"], event["done"], event["event"]) == (0.25, 0.5, 9, "progress")


def test_a_process_of_its_own(case: Case, tmp_path: Path) -> None:
    done = run(*segment_words(case, tmp_path / "o.zarr", "--executor", "serial", "--roi", "0:16,:,:", "--log", "json"))
    assert done.returncode == 0
    assert named(events_of(done.stderr), "job ended")
    assert done.stdout.startswith("complete: ")


def test_a_batch_as_json(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own events, and those of every volume with its place in the batch."""
    (tmp_path / "b.zarr").mkdir()
    (tmp_path / "b.zarr" / "zarr.json").write_text("{")
    (tmp_path / "a.zarr").symlink_to(case.image)
    words = ["--input", f"{tmp_path}/*.zarr", "--output", str(tmp_path / "seg"), "--model", case.bundle, "--json"]
    more = ["--executor", "serial", "--roi", "0:16,0:16,0:16", "--log", "json"]
    assert main(["batch", *words, *more]) == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["failed"] == 1
    events = events_of(err)
    assert (events[0]["event"], events[0]["volumes"]) == ("batch started", 2)
    assert (events[-1]["event"], events[-1]["complete"], events[-1]["failed"]) == ("batch ended", 1, 1)
    assert len({event["batch"] for event in events if event["event"] != "progress"}) == 1
    assert named(events, "job ended")[0]["volume"] == "1 of 2"
    (failed,) = named(events, "volume failed")
    assert failed["input"] == str(tmp_path / "b.zarr")
