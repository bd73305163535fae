"""The ledger: one header, receipts that survive, and exactly one driver, dead or alive."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from volseg.errors import JobError, VolumeError
from volseg.storage import files
from volseg.storage import ledger as module
from volseg.storage.ledger import STALE_SECONDS, Ledger, Receipt, ledger_root

KEY = "0123456789abcdef"


def receipt(index: int, **stats: float) -> Receipt:
    return Receipt(index, {"0": f"{index:064x}"}, {f"0/c/0/0/{index}": 100 + index}, stats)


@pytest.fixture
def output(tmp_path: Path) -> str:
    return str(tmp_path / "out.zarr")


@pytest.fixture
def ledger(output: str) -> Ledger:
    return Ledger(output, KEY)


def by_block(ledger: Ledger) -> dict[int, Receipt]:
    found = list(ledger.receipts())
    assert len({receipt.index for receipt in found}) == len(found)
    return {receipt.index: receipt for receipt in found}


def blocks(ledger: Ledger) -> set[int]:
    return set(by_block(ledger))


def segments(ledger: Ledger) -> list[str]:
    return files.list_names(files.join(ledger.path, "receipts"))


# ---------------------------------------------------------------- what is written once


def test_it_lies_beside_the_output(output: str, ledger: Ledger) -> None:
    assert ledger_root(output + "/") == output + ".volseg"
    assert ledger.path == f"{output}.volseg/{KEY}"
    assert ledger.header() is None


def test_the_header_is_written_once(output: str, ledger: Ledger) -> None:
    assert ledger.create({"block": [96, 96, 96]}) == {"block": [96, 96, 96]}
    assert Ledger(output, KEY).create({"block": [64, 64, 64]}) == {"block": [96, 96, 96]}
    assert ledger.header() == {"block": [96, 96, 96]}
    assert Ledger(output, "another").header() is None


def test_the_first_worker_names_the_numerics(output: str, ledger: Ledger) -> None:
    assert ledger.numerics({"chip": "a"}) == {"chip": "a"}
    assert Ledger(output, KEY).numerics({"chip": "b"}) == {"chip": "a"}


# ---------------------------------------------------------------- receipts


def test_receipts_of_all_segments_and_attempts_are_read(output: str, ledger: Ledger) -> None:
    assert ledger.take()
    for indices in ((3, 1), (7,), (0, 2)):
        for index in indices:
            ledger.add(receipt(index, voxels=index))
        ledger.tick({}, force=True)
    ledger.end(None)
    second = Ledger(output, KEY)
    assert second.take()
    second.add(receipt(5))
    second.tick({}, force=True)
    assert by_block(second) == {i: receipt(i, voxels=i) for i in (0, 1, 2, 3, 7)} | {5: receipt(5)}
    assert segments(ledger) == [f"00001-{n:06d}.jsonl" for n in range(3)] + ["00002-000000.jsonl"]


def test_a_later_receipt_replaces_an_earlier_one(output: str, ledger: Ledger) -> None:
    assert ledger.take()
    ledger.add(receipt(4, attempt=1))
    ledger.tick({}, force=True)
    ledger.end(None)
    second = Ledger(output, KEY)
    assert second.take()
    second.add(receipt(4, attempt=2))
    second.tick({}, force=True)
    assert by_block(second) == {4: receipt(4, attempt=2)}


@pytest.mark.parametrize("torn", [b'{"index":4,"dig', b"", b"[]", b'{"index":4}', b"\0" * 100])
def test_a_receipt_that_cannot_be_read_is_none(ledger: Ledger, torn: bytes) -> None:
    assert ledger.take()
    for index in (3, 4):
        ledger.add(receipt(index))
    ledger.tick({}, force=True)
    path = Path(ledger.path, "receipts", "00001-000000.jsonl")
    path.write_bytes(path.read_bytes().splitlines()[0] + b"\n" + torn)
    assert by_block(ledger) == {3: receipt(3)}


@pytest.mark.parametrize("torn", [b"", b'{"block":[9', b"[]"])
def test_a_damaged_fact_is_not_taken_as_absent(output: str, ledger: Ledger, torn: bytes) -> None:
    """Another header would contradict the blocks that are there."""
    ledger.create({"block": [9, 9, 9]})
    ledger.numerics({"chip": "a"})
    for name in ("header.json", "numerics.json"):
        Path(ledger.path, name).write_bytes(torn)
    for ask in (ledger.header, lambda: ledger.create({}), lambda: ledger.numerics({})):
        with pytest.raises(VolumeError, match=r"is damaged; nothing was done: restore it, or remove that folder"):
            ask()


def test_a_torn_heartbeat_or_attempt_names_no_living_driver(output: str, ledger: Ledger) -> None:
    """They are what a power cut may leave."""
    assert ledger.take()
    ledger.tick({}, force=True)
    for name in ("heartbeat.json", "attempts/00001.json"):
        Path(ledger.path, name).write_bytes(b"")
    second = Ledger(output, KEY)
    assert second.driver() is None
    assert second.take()
    assert second.attempt == 2


def test_receipts_are_flushed_when_they_are_due(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ledger.take()
    monkeypatch.setattr(module, "FLUSH_SECONDS", 1e12)
    ledger.add(receipt(1))
    ledger.tick({})
    assert by_block(ledger) == {}
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.0)
    ledger.tick({})
    assert blocks(ledger) == {1}
    # Nothing new, no new segment.
    ledger.tick({}, force=True)
    assert len(segments(ledger)) == 1


def test_receipts_wait_until_they_can_be_written(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ledger.take()
    ledger.add(receipt(1))

    def full(*_: Any) -> bool:
        raise JobError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(files, "create_bytes", full)
        with pytest.raises(JobError):
            ledger.tick({}, force=True)
    ledger.add(receipt(2))
    ledger.tick({}, force=True)
    assert blocks(ledger) == {1, 2}


def test_a_segment_is_never_written_over(output: str, ledger: Ledger) -> None:
    assert ledger.take()
    ledger.add(receipt(1))
    ledger.tick({}, force=True)
    twin = Ledger(output, KEY)
    twin.attempt = ledger.attempt
    twin.add(receipt(2))
    with pytest.raises(JobError, match=r"00001-000000\.jsonl are in .* already, so another process drives this job"):
        twin.tick({}, force=True)
    assert blocks(ledger) == {1}


def test_half_a_segment_is_not_looked_at(ledger: Ledger) -> None:
    assert ledger.take()
    ledger.add(receipt(1))
    ledger.tick({}, force=True)
    files.write_bytes(files.join(ledger.path, "receipts", ".00001-000001.jsonl.1234.tmp"), b'{"index":')
    files.write_bytes(files.join(ledger.path, "attempts", ".00009.json"), b"{")
    assert blocks(ledger) == {1}
    assert ledger.driver() is not None


def test_reports_and_traces_are_kept(ledger: Ledger) -> None:
    assert ledger.take()
    assert ledger.report() is None
    ledger.trace(7, "boom", "Traceback ...")
    (name,) = files.list_names(files.join(ledger.path, "failures"))
    assert name.startswith("00001-7-")
    assert files.read_bytes(files.join(ledger.path, "failures", name)) == b"boom\n\nTraceback ..."
    ledger.end({"status": "partial"})
    assert ledger.report() == {"status": "partial"}


# ---------------------------------------------------------------- one driver


def test_one_driver_at_a_time(output: str, ledger: Ledger) -> None:
    assert ledger.driver() is None
    assert ledger.take()
    other = Ledger(output, KEY)
    assert not other.take()
    driver = other.driver()
    assert driver is not None
    assert driver["pid"] > 0
    ledger.end(None)
    assert other.driver() is None
    assert other.take()
    assert (ledger.attempt, other.attempt) == (1, 2)


def test_who_saw_the_same_last_attempt_comes_too_late(
    output: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Ledger(output, KEY)
    monkeypatch.setattr(other, "_last_attempt", lambda: 0)
    assert ledger.take()
    record = ledger.driver()
    assert not other.take()
    assert ledger.driver() == record


def test_a_driver_that_could_not_say_that_it_ended_does_not_block_its_own_process(
    output: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a notebook the process lives on: after a full disk the same call must be able to resume."""
    assert ledger.take()

    def full(*_: Any) -> None:
        raise JobError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", full)
        with pytest.raises(JobError):
            ledger.end(None)
    assert Ledger(output, KEY).take()


DRIVER = """
import sys
from volseg.storage.ledger import Ledger, Receipt
ledger = Ledger(sys.argv[1], sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
taken = ledger.take()
if taken:
    ledger.add(Receipt(1, {}, {}))
    ledger.tick({}, force=True)
print(taken, flush=True)
sys.stdin.readline()
"""


@contextmanager
def processes(output: str, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Start drivers that wait for a line, try to take the job, and stay until another line."""
    with ExitStack() as stack:
        started = []
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, output, KEY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            started.append(process)
        for process in started:
            assert answer(process) == "ready"
        yield started


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("go\n")
    process.stdin.flush()


def test_of_many_processes_at_the_same_moment_one_drives(output: str) -> None:
    with processes(output, 8) as started:
        for process in started:
            tell(process)
        assert sorted(answer(process) for process in started) == ["False"] * 7 + ["True"]
        assert not Ledger(output, KEY).take()


def test_a_killed_driver_is_dead_at_once(output: str, ledger: Ledger) -> None:
    with processes(output, 1) as (process,):
        tell(process)
        assert answer(process) == "True"
        driver = ledger.driver()
        assert driver is not None
        assert driver["pid"] == process.pid
        # It began after this process did: its start is its own, not the machine's.
        own = Ledger(output + "2", KEY)
        assert own.take()
        mine = own.driver()
        assert mine is not None
        assert driver["started"] > mine["started"]
        assert not ledger.take()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert ledger.driver() is None
        assert ledger.take()
        assert ledger.attempt == 2
        assert blocks(ledger) == {1}


def test_a_killed_driver_that_nobody_has_buried_is_dead_too(output: str, ledger: Ledger) -> None:
    with processes(output, 1) as (process,):
        tell(process)
        assert answer(process) == "True"
        process.send_signal(signal.SIGKILL)
        # Its end of the pipe closes when it dies; it stays a zombie until somebody waits for it.
        assert answer(process) == ""
        deadline = time.monotonic() + 30
        while ledger.driver() is not None:
            assert time.monotonic() < deadline
        assert process.returncode is None
        assert ledger.take()


def attempts(ledger: Ledger, **changes: Any) -> None:
    """Pretend that this driver was another one."""
    uri = files.join(ledger.path, "attempts", f"{ledger.attempt:05d}.json")
    record = json.loads(files.read_bytes(uri))
    files.write_bytes(uri, json.dumps(record | changes).encode())


def beat(ledger: Ledger, age: float, attempt: int | None = None) -> None:
    content = {"time": time.time() - age, "attempt": ledger.attempt if attempt is None else attempt}
    files.write_bytes(files.join(ledger.path, "heartbeat.json"), json.dumps(content).encode())


@pytest.mark.parametrize("elsewhere", [{"host": "another"}, {"boot": "before"}])
def test_elsewhere_the_heartbeat_decides(output: str, ledger: Ledger, elsewhere: dict[str, str]) -> None:
    assert ledger.take()
    old = time.time() - 10 * STALE_SECONDS
    attempts(ledger, **elsewhere, time=old)
    other = Ledger(output, KEY)
    beat(ledger, age=STALE_SECONDS / 2)
    assert other.driver() is not None
    assert not other.take()
    beat(ledger, age=STALE_SECONDS + 5)
    assert other.driver() is None
    assert other.take()


def test_elsewhere_a_driver_that_has_just_begun_has_no_heartbeat_yet(output: str, ledger: Ledger) -> None:
    assert ledger.take()
    attempts(ledger, host="another")
    beat(ledger, age=1000, attempt=0)
    assert Ledger(output, KEY).driver() is not None
    attempts(ledger, time=time.time() - STALE_SECONDS - 5)
    assert Ledger(output, KEY).driver() is None


def test_a_reused_process_number_is_not_the_driver(output: str, ledger: Ledger) -> None:
    with processes(output, 1) as (process,):
        tell(process)
        assert answer(process) == "True"
        ledger.attempt = 1
        attempts(ledger, started=1.5)
        assert ledger.driver() is None
        assert ledger.take()


def test_a_tick_beats(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ledger.take()
    uri = files.join(ledger.path, "heartbeat.json")
    ledger.tick({"computed": 3}, force=True)
    first = json.loads(files.read_bytes(uri))
    assert (first["attempt"], first["computed"]) == (1, 3)
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 1e12)
    ledger.tick({"computed": 4})
    assert json.loads(files.read_bytes(uri)) == first
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.0)
    ledger.tick({"computed": 5})
    assert json.loads(files.read_bytes(uri))["computed"] == 5


def test_tracebacks_are_kept_up_to_a_limit(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TRACES", 3)
    for index in range(5):
        ledger.trace(index, "no luck", "Traceback: here")
    folder = files.join(ledger.path, "failures")
    texts = [files.read_bytes(files.join(folder, name)).decode() for name in files.list_names(folder)]
    assert len(texts) == 3
    assert all(text.startswith("no luck\n\nTraceback: here") for text in texts)
    assert ["later ones are not kept" in text for text in texts] == [False, False, True]


def test_receipts_come_newest_first_and_a_few_segments_at_a_time(
    output: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ledger.take()
    for index in range(40):
        ledger.add(receipt(index // 2, attempt=index))
        ledger.tick({}, force=True)
    read: list[str] = []
    real = files.read_bytes

    def reading(uri: str) -> bytes:
        read.append(uri)
        return real(uri)

    monkeypatch.setattr(files, "read_bytes", reading)
    stream = Ledger(output, KEY).receipts()
    assert [next(stream).stats["attempt"] for _ in range(3)] == [39, 37, 35]
    assert len(read) <= 5 + module._READERS
    assert [r.index for r in stream] == list(range(16, -1, -1))


@pytest.mark.parametrize("index", [-1, "3", 1.5, None])
def test_a_receipt_of_no_block_is_none(ledger: Ledger, index: object) -> None:
    line = json.dumps({"index": index, "digests": {}, "objects": {}, "stats": {}}).encode()
    files.create_bytes(files.join(ledger.path, "receipts", "00001-000000.jsonl"), line)
    assert list(ledger.receipts()) == []


def test_the_clock_says_what_is_due(output: str) -> None:
    now = [100.0]
    ledger = Ledger(output, KEY, clock=lambda: now[0])
    assert ledger.take()
    for index in range(6):
        ledger.add(receipt(index))
        ledger.tick({})
        now[0] += module.FLUSH_SECONDS / 2
    assert blocks(ledger) == set(range(5))
    assert len(segments(ledger)) == 3
