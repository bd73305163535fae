"""Many volumes with one model: which they are, workers that stay, and volumes that fail by themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import LONGEST, Case, labels_of, segment, smooth, status_of, store
from volseg.cli.job_commands import run_batch as batch_command
from volseg.cluster import batch
from volseg.cluster.crew import Crew, Member
from volseg.errors import InputError, JobInterrupted, SpecError
from volseg.execution.driver import Tally
from volseg.spec.batch import BatchSpec

REPO = Path(__file__).parents[1]
VOLUMES = 20


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty small scans in folders by day, of which one has a broken chunk and one broken metadata."""
    folder = tmp_path_factory.mktemp("scans")
    for number in range(VOLUMES):
        store(folder / f"day-{number:02d}" / "recon.zarr", smooth((24, 16, 16), seed=number), chunks=(12, 16, 16))
    (chunk, *_) = sorted((folder / "day-03" / "recon.zarr" / "c").rglob("0"))
    chunk = next(path for path in chunk.rglob("*") if path.is_file()) if chunk.is_dir() else chunk
    chunk.write_bytes(chunk.read_bytes()[:10])
    (folder / "day-11" / "recon.zarr" / "zarr.json").write_text("{")
    return folder


def spec_of(case: Case, **options: Any) -> BatchSpec:
    return BatchSpec.read({"model": case.bundle, "overlap": 0.25, "block": "12,16,16", "attempts": 1, **options})


def quiet(*_: object) -> None:
    """Take progress and say nothing."""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_two_of_twenty_are_corrupt(
    case: Case, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    kept: list[Any] = []
    keep = Crew.keep

    def remember(crew: Crew, member: Member) -> None:
        kept.append(member.actor._actor_id)
        keep(crew, member)

    monkeypatch.setattr(Crew, "keep", remember)
    values = {
        "input": f"{scans}/day-*/recon.zarr", "output": str(tmp_path / "seg"), "model": case.bundle, "overlap": "0.25",
        "block": "12,16,16", "attempts": "1", "workers": "2", "executor": "ray",
    }  # fmt: skip
    document, text, code = batch_command(Namespace(spec=None, assignments=[], **values))
    assert code == 3
    assert (document["status"], document["complete"], document["failed"]) == ("partial", VOLUMES - 2, 2)
    bad = {Path(v["input"]).parent.name: v for v in document["volumes"] if v["status"] != "complete"}
    assert {day: v["status"] for day, v in bad.items()} == {"day-03": "partial", "day-11": "failed"}
    assert "block 0 at 0:12,0:16,0:16: " in bad["day-03"]["error"]
    assert "zarr.json" in bad["day-11"]["error"]
    assert bad["day-03"]["blocks"] == {"total": 2, "computed": 0, "resumed": 0, "failed": 2}
    lines = text.splitlines()
    assert len(lines) == VOLUMES + 2
    assert lines[-1] == "18 complete, 2 not"
    assert "day-11" in capfd.readouterr().err
    # Two processes did all of it.
    assert len(set(kept)) == 2
    assert len(kept) > VOLUMES
    outputs = {path.parent.name: path for path in (tmp_path / "seg").glob("day-*/recon.zarr")}
    assert status_of(outputs["day-03"]) == "incomplete"
    assert "day-11" not in outputs
    assert all(status_of(path) == "complete" for day, path in outputs.items() if day != "day-03")
    alone = Case(str(scans / "day-07" / "recon.zarr"), case.bundle, tmp_path)
    segment(alone, tmp_path / "alone.zarr", overlap=0.25)
    np.testing.assert_array_equal(labels_of(outputs["day-07"]), labels_of(tmp_path / "alone.zarr"))


@pytest.mark.slow
def test_entry_point_with_a_list(case: Case, scans: Path, tmp_path: Path) -> None:
    """jobs/batch.py with a spec file that lists the volumes; what is done is not done again."""
    volumes = {str(scans / f"day-{n:02d}" / "recon.zarr"): str(tmp_path / f"{n}.zarr") for n in (5, 6)}
    (tmp_path / "batch.yaml").write_text(
        json.dumps({"model": case.bundle, "overlap": 0.25, "executor": "serial", "volumes": volumes})
    )
    done = subprocess.run(
        [sys.executable, str(REPO / "jobs" / "batch.py"), str(tmp_path / "batch.yaml"), "--json"],
        capture_output=True, text=True, timeout=LONGEST, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [v["output"] for v in document["volumes"]] == list(volumes.values())
    assert all(v["blocks"]["computed"] > 0 for v in document["volumes"])
    again = batch.run_batch(spec_of(case, volumes=volumes, executor="serial"), quiet, quiet)
    assert again["status"] == "complete"
    assert all(v["blocks"]["computed"] == 0 for v in again["volumes"])


@pytest.mark.parametrize(("executor", "workers"), [("serial", 1), ("threads", 2)])
def test_one_process_loads_the_model_once(
    case: Case, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executor: str, workers: int
) -> None:
    from volseg.models.bundle import load_networks

    loaded: list[str] = []

    def counted(uri: str) -> Any:
        loaded.append(uri)
        return load_networks(uri)

    monkeypatch.setattr("volseg.inference.choose.load_networks", counted)
    volumes = {str(scans / f"day-{n:02d}" / "recon.zarr"): str(tmp_path / f"{n}.zarr") for n in (5, 6, 7)}
    done = batch.run_batch(spec_of(case, volumes=volumes, executor=executor, workers=workers), quiet, quiet)
    assert [volume["status"] for volume in done["volumes"]] == ["complete"] * 3
    assert loaded == [case.bundle]
    alone = Case(str(scans / "day-07" / "recon.zarr"), case.bundle, tmp_path)
    segment(alone, tmp_path / "alone.zarr", overlap=0.25)
    np.testing.assert_array_equal(labels_of(tmp_path / "7.zarr"), labels_of(tmp_path / "alone.zarr"))


def test_pattern_gives_places(case: Case, scans: Path, tmp_path: Path) -> None:
    pairs = batch.list_volumes(spec_of(case, input=f"{scans}/day-0[12]/*.zarr", output=str(tmp_path / "seg")))
    assert pairs == [
        (str(scans / f"day-0{n}" / "recon.zarr"), str(tmp_path / "seg" / f"day-0{n}" / "recon.zarr")) for n in (1, 2)
    ]
    # What lies beside an output is no volume.
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr.volseg").mkdir()
    pairs = batch.list_volumes(spec_of(case, input=f"{tmp_path}/a*", output=str(tmp_path / "seg")))
    assert pairs == [(str(tmp_path / "a.zarr"), str(tmp_path / "seg" / "a.zarr"))]


def test_pattern_in_another_storage(case: Case) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for day in (1, 2):
        memory.pipe_file(f"/scans/2026-{day}/recon.zarr/zarr.json", b"{}")
    pairs = batch.list_volumes(spec_of(case, input="memory://scans/2026-*/recon.zarr", output="memory://seg"))
    assert [output for _, output in pairs] == ["memory://seg/2026-1/recon.zarr", "memory://seg/2026-2/recon.zarr"]
    assert all(volume.startswith("memory://") for volume, _ in pairs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, SpecError, "needs either a pattern"),
        ({"input": "a*", "output": "seg", "volumes": {"a": "b"}}, SpecError, "needs either a pattern"),
        ({"input": "a*"}, SpecError, "needs either a pattern"),
        ({"input": "a.zarr", "output": "seg"}, SpecError, r"pattern a\.zarr has no \*"),
        ({"input": "s3://scans-*/a.zarr", "output": "seg"}, SpecError, r"has no \* in a name below its root"),
        ({"input": "nothing-*", "output": "seg"}, InputError, r"nothing matches nothing-\*"),
        ({"volumes": {"a": "b", "c": "./b"}}, InputError, "would both be written to .*nothing was done"),
    ],
)
def test_wrong_batches(case: Case, options: dict[str, Any], error: type[InputError], message: str) -> None:
    with pytest.raises(error, match=message):
        batch.run_batch(spec_of(case, **options), quiet, quiet)


def test_interruption_ends_the_batch(case: Case, scans: Path, tmp_path: Path) -> None:
    """Ctrl-C means all volumes; the same batch goes on where it was."""
    volumes = {str(scans / f"day-{n:02d}" / "recon.zarr"): str(tmp_path / f"{n}.zarr") for n in (5, 6)}
    spec = spec_of(case, volumes=volumes, executor="serial")

    def stop(place: str, tally: Tally) -> None:
        if place == "2 of 2":
            raise KeyboardInterrupt

    with pytest.raises(JobInterrupted):
        batch.run_batch(spec, stop, quiet)
    assert status_of(tmp_path / "5.zarr") == "complete"
    result = batch.run_batch(spec, quiet, quiet)
    assert result["status"] == "complete"
    assert result["volumes"][0]["blocks"]["computed"] == 0
