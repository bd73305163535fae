"""`volseg bench`: what is measured on this machine, and what follows from it for a volume of another size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import make_bundle
from volseg import api
from volseg.cli.main import main
from volseg.errors import InputError
from volseg.execution.prepare import Cores, model_facts
from volseg.execution.trial import measure, trial_shape
from volseg.geometry import Box, Triple
from volseg.models.manifest import read_manifest
from volseg.planning import Resources, VolumeFacts, make_plan
from volseg.planning.memory import GIB
from volseg.spec import BenchSpec, SegmentSpec
from volseg.storage.volume import open_volume

CORES = Cores(4, 0, "cpu", 4, 8 * GIB)


class Machine:
    """Stands for `run_segment`: a forward takes a second on each worker, a tenth of it reading and writing."""

    def __init__(self) -> None:
        self.specs: list[SegmentSpec] = []
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, spec: SegmentSpec) -> dict[str, Any]:
        volume = open_volume(spec.input)
        self.specs.append(spec)
        self.shapes.append(volume.shape)
        volume.read(Box.of(volume.shape))  # raises where something is missing
        workers = spec.workers or 1
        forwards = 40 * workers
        return {
            "forwards": forwards, "voxels": 1000 * workers, "workers": {"used": workers},
            "seconds": {"start": 2.0, "work": 44.0, "forward": 1.0 * forwards, "read": 2.0, "write": 2.0},
            "memory": {"peak": 123},
        }  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_bundle(tmp_path_factory.mktemp("bench") / "bundle", classes=2)


def answer(bundle: str | None, **options: Any) -> tuple[dict[str, Any], Machine]:
    machine = Machine()
    spec = BenchSpec.read({"model": bundle, **options})
    return measure(spec, CORES, machine, lambda _: None), machine


def test_what_is_expected_follows_from_what_was_measured(bundle: str) -> None:
    found, machine = answer(bundle, shape="160", overlap=0.5, workers=2, seconds=20)
    measured, expected = found["measured"], found["expected"]
    assert [(spec.workers, spec.executor) for spec in machine.specs] == [(1, "serial"), (2, "auto")]
    assert measured["seconds_per_forward"] == pytest.approx(44 * 2 / 80)
    assert measured["voxels_per_second"] == pytest.approx(2000 / 44, abs=0.1)
    assert measured["share_of_time"]["forward"] == pytest.approx(80 / 88, abs=1e-3)
    assert expected["forwards"] >= 19**3
    assert expected["seconds"] == pytest.approx(expected["forwards"] * 1.1 / 2)
    assert expected["seconds"] < expected["seconds_at_most"] < 2 * expected["seconds"]
    assert expected["voxels_per_second"] == pytest.approx(160**3 / expected["seconds"], rel=1e-3)
    assert not any("were not measured" in line for line in found["assumed"])


def test_the_measured_volume_fits_the_time(bundle: str) -> None:
    """A forward takes a second: 20 s of two workers are 40 patches."""
    _, machine = answer(bundle, overlap=0.5, workers=2, seconds=20)
    (_, shape) = machine.shapes
    patches = [(side - 16) // 8 + 1 for side in shape]
    assert 40 <= patches[0] * patches[1] * patches[2] <= 48


@pytest.mark.parametrize(("workers", "measured", "said"), [(None, 4, False), (4, 4, False), (64, 4, True)])
def test_more_workers_than_here_are_extrapolated_and_it_is_said(
    bundle: str, workers: int | None, measured: int, said: bool
) -> None:
    found, _ = answer(bundle, shape=(512, 512, 512), workers=workers)
    assert found["measured"]["workers"] == measured
    assert found["expected"]["workers"] == (workers or 4)
    assert (found["assumed"][0] == f"{workers} workers were not measured: 4 were, on this machine") == said


def test_without_a_bundle_the_network_is_named(tmp_path: Path) -> None:
    found, machine = answer(None, shape="128")
    assert found["measured"]["model"] == "3D U-Net 16-32-64-128, random weights"
    assert found["measured"]["patch"] == (64, 64, 64)
    assert found["assumed"][-1] == "the network is the one named above: give your bundle to measure yours"
    assert [spec.executor for spec in machine.specs] == ["serial", "auto"]
    assert not Path(machine.specs[0].input).exists()


def test_flat_patches_make_a_thick_volume(tmp_path: Path) -> None:
    flat = make_bundle(tmp_path / "flat", dims=2, patch=(1, 32, 32))
    _, machine = answer(flat, overlap=0.5, workers=1, seconds=50)
    z, y, x = machine.shapes[1]
    assert min(z, y, x) >= 32
    assert 50 <= z * (y // 16 - 1) * (x // 16 - 1) <= 100


def test_memory_bounds_the_expected_job(bundle: str) -> None:
    with pytest.raises(InputError, match=r"memory limit 0\.10 GiB is too small"):
        answer(bundle, memory=0.1)


def test_a_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(InputError, match=r"RAY_ADDRESS names a cluster \(ray://head:10001\); nothing was measured"):
        api.bench(shape="64")


@pytest.mark.parametrize("words", [["--shape", "0"], ["--shape", "1,2"], ["--seconds", "0"], ["--overlap", "1"]])
def test_options_are_checked(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == 2
    assert words[0].removeprefix("--") in capsys.readouterr().err


def test_the_command_measures_this_machine(bundle: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", bundle, "--shape", "64,64,64", "--workers", "1", "--seconds", "0.2", "--overlap", "0.25"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    measured, expected = found["measured"], found["expected"]
    assert measured["device"] == "cpu"
    assert measured["forwards"] >= 3
    assert measured["seconds_per_forward"] == pytest.approx(measured["seconds"] / measured["forwards"], rel=0.01)
    assert expected["seconds"] == pytest.approx(expected["forwards"] * measured["seconds_per_forward"], rel=0.01)
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "expected" in text
    assert "64 x 64 x 64 voxels on 1 worker(s)" in text
    assert "- every worker is as fast as those measured here" in text


@pytest.mark.parametrize(
    ("patches", "shape"),
    [(0, (16, 16, 16)), (1, (16, 16, 16)), (2, (28, 16, 16)), (8, (28, 28, 28)), (9, (40, 28, 28))],
)
def test_patches_are_added_where_the_volume_is_shortest(bundle: str, patches: int, shape: Triple) -> None:
    spec = SegmentSpec.read({"input": "-", "output": "-", "model": bundle, "overlap": 0.25})
    facts = model_facts(read_manifest(bundle), spec)
    plan = make_plan(spec, VolumeFacts((100, 100, 100), 1, 1), facts, Resources(1, GIB, "cpu", 0))
    assert trial_shape(plan, patches) == shape
