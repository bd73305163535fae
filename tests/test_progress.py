"""Progress: plain lines where nobody watches a terminal, numbers that people can read, and a clean stdout."""

import time

import pytest

from volseg.cli.progress import ProgressLine, clock, quantity, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1:00 min"), (185, "3:05 min"), (3599.6, "1:00 h"), (7800, "2:10 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 v/s"),
        (12.34, "12.3 v/s"),
        (999.4, "999 v/s"),
        (999.9, "1 kv/s"),
        (1.5e6, "1.5 Mv/s"),
        (2e9, "2 Gv/s"),
        (3e12, "3 Tv/s"),
    ],
)
def test_quantities(value: float, text: str) -> None:
    assert quantity(value, "v/s") == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (300 << 20, "300 MiB"), (5 << 40, "5 TiB")]
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_plain_lines_are_few_and_go_to_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with ProgressLine("segment", "blocks") as line:
        for done in range(9):
            line.update(done, 8, "2 worker(s)")
            now[0] += 4
        line.update(8, 8, "2 worker(s)")
        line.note("block 3 is tried again")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "segment: 3/8 blocks, 2 worker(s), 12 s, about 20 s left",
        "segment: 6/8 blocks, 2 worker(s), 24 s, about 8 s left",
        "segment: 8/8 blocks, 2 worker(s), 32 s",
        "block 3 is tried again",
    ]


def test_the_time_left_counts_from_where_this_run_began(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with ProgressLine("segment", "blocks") as line:
        line.update(90, 100)
        now[0] += 10
        line.update(92, 100)
    assert capsys.readouterr().err == "segment: 92/100 blocks, 10 s, about 40 s left\n"


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with ProgressLine("segment", "blocks") as line:
        line.update(3, 8, "[2 workers]")
        line.note("block 3 is [tried] again")
        line.update(8, 8)
    out, err = capsys.readouterr()
    assert out == ""
    assert "8/8" in err
    assert "blocks" in err
    assert "block 3 is [tried] again" in err
