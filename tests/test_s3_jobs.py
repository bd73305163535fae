"""Whole jobs with every path on S3: the bits are those of local files, whatever goes wrong with the requests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.flaky_proxy import TROUBLES, failing, proxy
from tests.s3_servers import Server
from tests.support import make_bundle, run_json, smooth
from tests.train_support import scene
from volseg import api
from volseg.errors import JobInterrupted
from volseg.execution.driver import Tally
from volseg.execution.verify import verify
from volseg.geometry import Box
from volseg.models.bundle import load_networks, save_bundle
from volseg.spec import SegmentSpec, TrainSpec
from volseg.storage import files
from volseg.storage.importer import import_volume
from volseg.storage.ledger import ledger_root
from volseg.storage.s3_requests import ATTEMPTS
from volseg.storage.volume import open_volume
from volseg.training.progress import TrainProgress

pytest_plugins = ("tests.s3_fixtures",)
pytestmark = pytest.mark.usefixtures("short_pauses")

OPTIONS = {"block": "16,16,16", "chunks": "8,8,8", "shards": "16,16,16", "overlap": 0.25}
BLOCKS = 4


@dataclass(frozen=True)
class Local:
    """A job done with local files: its source, its bundle, and the labels that come out."""

    source: str
    bundle: str
    labels: NDArray[Any]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Local:
    folder = tmp_path_factory.mktemp("local")
    np.save(folder / "a.npy", smooth((14, 22, 26)).astype(np.uint8))
    make_bundle(folder / "bundle")
    at = At(str(folder))
    bring(at, str(folder / "a.npy"))
    at.segment()
    return Local(str(folder / "a.npy"), at("bundle"), labels_at(at("out.zarr")))


@dataclass(frozen=True)
class At:
    """A place for all paths of a job."""

    root: str

    def __call__(self, name: str) -> str:
        return files.join(self.root, name)

    def segment(self, report: Callable[[Tally], None] | None = None, **options: Any) -> dict[str, Any]:
        values = {"input": self("a.zarr"), "output": self("out.zarr"), "model": self("bundle"), "executor": "serial"}
        return api.run_segment(SegmentSpec.read({**values, **OPTIONS, **options}), report)


def bring(at: At, source: str) -> None:
    import_volume(source, at("a.zarr"), chunks=(8, 8, 8), shards=(16, 16, 16))


def bring_all(at: At, local: Local) -> None:
    bring(at, local.source)
    manifest, networks = load_networks(local.bundle)
    save_bundle(at("bundle"), networks, manifest)


def labels_at(output: str) -> NDArray[Any]:
    volume = open_volume(output)
    labels: NDArray[Any] = volume.read(Box.of(volume.shape))[0]
    return labels


def test_everything_on_s3(bucket: str, local: Local) -> None:
    at = At(bucket)
    bring_all(at, local)
    report = at.segment()
    assert report["blocks"] == {"total": BLOCKS, "computed": BLOCKS, "resumed": 0, "failed": 0}
    np.testing.assert_array_equal(labels_at(at("out.zarr")), local.labels)
    assert len(np.unique(local.labels)) == 3
    assert verify(at("out.zarr"), deep=True)["status"] == "verified"
    assert at.segment()["blocks"]["resumed"] == BLOCKS
    files.remove(at("out.zarr/0/c/0/1/1"))
    assert verify(at("out.zarr"))["status"] == "damaged"
    assert at.segment()["blocks"] == {"total": BLOCKS, "computed": 1, "resumed": BLOCKS - 1, "failed": 0}
    np.testing.assert_array_equal(labels_at(at("out.zarr")), local.labels)


def test_an_interrupted_job_goes_on(bucket: str, local: Local) -> None:
    at = At(bucket)
    bring_all(at, local)

    def stop(tally: Tally) -> None:
        if tally.done:
            raise KeyboardInterrupt

    with pytest.raises(JobInterrupted, match="run the same command again"):
        at.segment(stop)
    assert open_volume(at("out.zarr")).status == "incomplete"
    report = at.segment()
    assert report["blocks"]["resumed"] > 0
    assert report["blocks"]["resumed"] + report["blocks"]["computed"] == BLOCKS
    np.testing.assert_array_equal(labels_at(at("out.zarr")), local.labels)
    replaced = at.segment(overlap=0.5, overwrite=True)
    assert replaced["blocks"]["computed"] == BLOCKS
    assert len(files.list_names(ledger_root(at("out.zarr")))) == 1


@pytest.mark.slow
def test_a_fifth_of_all_requests_fails(server: Server, local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxy(server.endpoint) as flaky:
        flaky.rule = failing(0.2, seed=1)
        server.behind(flaky.endpoint).use(monkeypatch)
        at = At(f"s3://{server.new_bucket()}")
        bring_all(at, local)
        report = at.segment()
        assert verify(at("out.zarr"), deep=True)["status"] == "verified"
    assert report["blocks"] == {"total": BLOCKS, "computed": BLOCKS, "resumed": 0, "failed": 0}
    assert {trouble for _, trouble in flaky.troubled} == set(TROUBLES)
    assert len(flaky.troubled) > 0.15 * len(flaky.seen)
    assert 1 < flaky.longest() <= ATTEMPTS
    server.use(monkeypatch)
    np.testing.assert_array_equal(labels_at(at("out.zarr")), local.labels)


@pytest.mark.chaos
@pytest.mark.ray
def test_the_commands_with_two_workers(server: Server, local: Local, tmp_path: Path) -> None:
    """Every path on S3, a process a command, a fifth of the requests failing: the bits are those of local files."""
    with proxy(server.endpoint) as flaky:
        flaky.rule = failing(0.2, seed=2, in_a_row=ATTEMPTS - 1)
        at, there = At(f"s3://{server.new_bucket()}"), server.behind(flaky.endpoint)
        environment = {**{n: v for n, v in os.environ.items() if not n.startswith("AWS_")}, **there.environment}
        answers = []

        def volseg(*words: object) -> dict[str, Any]:
            answers.append(run_json(*words, env=environment))
            return answers[-1]

        storage = ("--chunks", "8,8,8", "--shards", "16,16,16")
        volseg("import", local.source, at("a.zarr"), *storage)
        labels = tmp_path / "labels.npy"
        np.save(labels, local.labels)
        volseg("import", labels, at("truth.zarr"), "--labels", *storage)
        volseg(
            "train", "--image", at("a.zarr"), "--labels", at("truth.zarr"), "--out", at("own"), "--max-steps", 3,
            "--train-roi", "0:8,:,:", "--val-roi", "8:14,:,:", "--dims", 2, "--widths", "4,8", "--patch", "1,16,16",
        )  # fmt: skip
        assert volseg("model", at("own"))["classes"]
        manifest, networks = load_networks(local.bundle)
        save_bundle(str(tmp_path / "bundle"), networks, manifest)
        for path in (tmp_path / "bundle").iterdir():
            server.client().put_object(Bucket=at.root[5:], Key=f"bundle/{path.name}", Body=path.read_bytes())
        job = (at("a.zarr"), at("out.zarr"), "--model", at("bundle"), "--workers", 2)
        options = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
        assert volseg("plan", *job, *options)["blocks"] == BLOCKS
        report = volseg("segment", *job, *options, "--executor", "ray")
        assert volseg("verify", at("out.zarr"), "--deep")["status"] == "verified"
        score = volseg("evaluate", at("out.zarr"), at("truth.zarr"))
        volseg("overlay", at("a.zarr"), at("out.zarr"), at("cross.png"))
        assert volseg("info", at("out.zarr"))["status"] == "complete"
    assert report["blocks"] == {"total": BLOCKS, "computed": BLOCKS, "resumed": 0, "failed": 0}
    # The second one may be ready only when nothing is left.
    assert report["workers"] in ({"used": used, "lost": 0} for used in (1, 2))
    assert score["mean_foreground_dice"] == 1.0
    assert {trouble for _, trouble in flaky.troubled} == set(TROUBLES)
    assert len(flaky.troubled) > 0.15 * len(flaky.seen)
    np.testing.assert_array_equal(labels_at(at("out.zarr")), local.labels)
    assert server.secret not in json.dumps(answers)


@pytest.mark.slow
def test_training_on_s3(bucket: str, tmp_path: Path) -> None:
    """Data, checkpoints and bundle; an interrupted training goes on from its checkpoint."""
    at = At(bucket)
    image, labels = scene()
    for name, data in (("image", image), ("labels", labels)):
        np.save(tmp_path / f"{name}.npy", data)
        import_volume(str(tmp_path / f"{name}.npy"), at(f"{name}.zarr"), labels=name == "labels")
    spec = TrainSpec.read({
        "image": at("image.zarr"), "labels": at("labels.zarr"), "out": at("bundle"), "dims": 2, "widths": (4, 8),
        "train_roi": "0:8,:,:", "val_roi": "9:12,:,:", "patch": (1, 16, 16), "batch": 2, "max_steps": 4, "threads": 1,
        "precision": "fp32",
    })  # fmt: skip

    def stop(now: TrainProgress) -> None:
        if now.step >= 2:
            raise KeyboardInterrupt

    with pytest.raises(JobInterrupted):
        api.run_train(spec, stop)
    assert files.list_names(at("bundle.training/checkpoints"))
    result = api.run_train(spec)
    assert result["resumed_from"] > 0
    assert result["steps"] == 4
    assert {"model.json", "model.safetensors"} <= set(files.list_names(at("bundle")))
    assert load_networks(at("bundle"))[0].digest == result["digest"]
