"""Checkpoints: whole or not used, the last two kept, written beside the training, and only for the same training."""

from __future__ import annotations

import json
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train_support import spec_for, volumes
from volseg.errors import SpecError, StorageFullError
from volseg.storage import files
from volseg.training.checkpoint import CheckpointWriter, Workplace
from volseg.training.claim import check_same


def state(step: int) -> dict[str, Any]:
    return {"step": step, "network": {"weight": torch.full((3,), float(step))}, "rows": [{"loss": 0.5}], "best": None}


def written(workplace: Workplace, *steps: int) -> list[str]:
    return [workplace.save(state(step)) for step in steps]


@pytest.fixture(params=["local", "memory"])
def workplace(request: pytest.FixtureRequest, tmp_path: Path) -> Workplace:
    if request.param == "local":
        return Workplace.beside(str(tmp_path / "bundle"))
    return Workplace.beside(f"memory://{uuid.uuid4().hex}/bundle")


def test_the_newest_whole_checkpoint_is_found(workplace: Workplace) -> None:
    assert workplace.newest_valid(print) is None
    names = written(workplace, 9, 120, 30)
    found = workplace.newest_valid(print)
    assert found is not None
    name, stored = found
    assert name == names[1]
    assert name.startswith("000000120-")
    assert stored["step"] == 120
    assert torch.equal(stored["network"]["weight"], torch.full((3,), 120.0))
    assert stored["rows"] == [{"loss": 0.5}]


def damage(workplace: Workplace, name: str, how: str) -> None:
    place = files.join(workplace.uri, "checkpoints", name)
    pt, manifest = files.join(place, "state.pt"), files.join(place, "manifest.json")
    data = files.read_bytes(pt)
    if how == "flipped bit":
        files.write_bytes(pt, data[:40] + bytes([data[40] ^ 1]) + data[41:])
    elif how == "cut":
        files.write_bytes(pt, data[: len(data) // 2])
    elif how == "no manifest":
        files.remove(manifest)
    elif how == "broken manifest":
        files.write_bytes(manifest, files.read_bytes(manifest)[:-20])
    elif how == "no state":
        files.remove(pt)


@pytest.mark.parametrize("how", ["flipped bit", "cut", "no manifest", "broken manifest", "no state"])
def test_a_damaged_checkpoint_is_passed_over_with_a_note(tmp_path: Path, how: str) -> None:
    workplace = Workplace.beside(str(tmp_path / "bundle"))
    names = written(workplace, 10, 20)
    damage(workplace, names[1], how)
    notes: list[str] = []
    found = workplace.newest_valid(notes.append)
    assert found is not None
    assert found[0] == names[0]
    assert len(notes) == 1
    assert names[1] in notes[0]
    assert "is not used: " in notes[0]


def test_without_a_whole_one_nothing_is_trained(tmp_path: Path) -> None:
    workplace = Workplace.beside(str(tmp_path / "bundle"))
    (name,) = written(workplace, 10)
    damage(workplace, name, "cut")
    with pytest.raises(SpecError, match=r"is not what its manifest says, and no other one verifies; .*--no-resume"):
        workplace.newest_valid(lambda _: None)
    damage(workplace, name, "no manifest")
    assert workplace.newest_valid(lambda _: None) is None, "a first one that was never finished is no loss"


def test_a_checkpoint_never_runs_code(tmp_path: Path) -> None:
    workplace = Workplace.beside(str(tmp_path / "bundle"))
    workplace.write(b"cos\nsystem\n(S'touch /tmp/x'\ntR.", 5)
    with pytest.raises(SpecError, match="is no checkpoint of volseg"):
        workplace.newest_valid(lambda _: None)


def test_the_last_two_are_kept(workplace: Workplace) -> None:
    damaged, resumed = written(workplace, 90, 50)
    writer = CheckpointWriter(workplace, resumed)
    writer.save(state(60))
    writer.flush()
    kept = workplace.checkpoints()
    assert resumed in kept
    assert damaged not in kept, "it was passed over, and would stand before all later ones"
    assert len(kept) == 2
    writer.save(state(70))
    writer.save(state(80))
    writer.close()
    assert [int(name.partition("-")[0]) for name in workplace.checkpoints()] == [70, 80]


def test_writing_does_not_stop_the_training_and_takes_the_state_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workplace = Workplace.beside(str(tmp_path / "bundle"))
    gate, write = threading.Event(), Workplace.write

    def slow(self: Workplace, data: bytes, step: int) -> str:
        gate.wait(60)
        return write(self, data, step)

    monkeypatch.setattr(Workplace, "write", slow)
    writer = CheckpointWriter(workplace)
    now = state(10)
    writer.save(now)
    now["network"]["weight"] += 1
    assert workplace.checkpoints() == []
    gate.set()
    writer.close()
    found = workplace.newest_valid(print)
    assert found is not None
    assert float(found[1]["network"]["weight"][0]) == 10.0


def test_what_fails_while_writing_is_raised_by_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Workplace, data: bytes, step: int) -> str:
        raise StorageFullError("no space left")

    monkeypatch.setattr(Workplace, "write", full)
    writer = CheckpointWriter(Workplace.beside(str(tmp_path / "bundle")))
    writer.save(state(1))
    with pytest.raises(StorageFullError):
        writer.save(state(2))
    writer.close()


def test_only_the_same_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = volumes(tmp_path)
    spec = spec_for(tmp_path, data)
    stored = json.loads(spec.model_dump_json())
    check_same(spec_for(tmp_path, data, max_steps=9, learning_rate=1e-5, workers=2, threads=1), stored)
    with pytest.raises(SpecError, match="seed: 0 there, 7 now"):
        check_same(spec_for(tmp_path, data, seed=7), stored)
    monkeypatch.chdir(tmp_path)
    check_same(spec_for(tmp_path, {"image": "image.zarr", "labels": "./labels.zarr"}, out="bundle"), stored)
