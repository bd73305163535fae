"""Lines: text for people that carries what it says for machines."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from volseg.journal import LEVELS, Line, parse, tagged, teller

FACTS = st.dictionaries(
    st.sampled_from(["job", "block", "attempt", "worker", "error"]),
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
)


@given(text=st.text(), event=st.text(min_size=1), level=st.sampled_from(LEVELS), facts=FACTS)
def test_json_is_one_line_and_comes_back(text: str, event: str, level: str, facts: dict[str, object]) -> None:
    line = Line(text, event, level, **facts)  # type: ignore[arg-type]
    written = line.as_json(1_700_000_000.1234)
    assert "\n" not in written
    document = json.loads(written)
    assert list(document)[:3] == ["time", "level", "event"]
    assert document["time"] == "2023-11-14T22:13:20.123Z"
    found = parse(written)
    assert found is not None
    assert (found[1], found[1].event, found[1].level, found[1].facts) == (line, event, level, line.facts)


@pytest.mark.parametrize("text", ["", "{", '{"time": 1', '{"status": "complete"}', '{"time": "x"}', "volseg: no"])
def test_what_is_no_event(text: str) -> None:
    assert parse(text) is None


def test_a_line_is_its_text() -> None:
    line = Line("block 3 is tried again", "block failed", "warning", block=3)
    assert line == "block 3 is tried again"
    again = pickle.loads(pickle.dumps(line))
    assert (again, again.event, again.level, again.facts) == (line, "block failed", "warning", {"block": 3})
    assert Line.of(line) is line
    assert (Line.of("plain").event, Line.of("plain").facts) == ("note", {})
    assert Line("", "worker ready", worker=1).as_text() == "worker ready: worker=1"


def test_own_facts_win() -> None:
    heard: list[str] = []
    tagged(tagged(heard.append, job="outer", attempt=1), job="inner")(Line("x", block=1, attempt=2))
    (line,) = heard
    assert isinstance(line, Line)
    assert line.facts == {"job": "inner", "attempt": 2, "block": 1}


def test_people_are_spared_what_only_machines_want() -> None:
    notes: list[str] = []
    traces: list[str] = []
    tell = teller(notes.append, traces.append)
    for line in ("text", Line("", "worker ready"), Line("more", "block failed")):
        tell(line)
    assert notes == ["text", "more"]
    assert traces == ["text", "", "more"]


def test_no_credential_in_text_or_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-of-a-line")
    written = Line("it says canary-of-a-line", error="canary-of-a-line!", block=1).as_json(0)
    assert "canary" not in written
    assert json.loads(written)["error"] == "***!"
