"""Training on Ray: the same result as in this process, whatever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.ray_cluster import cluster_process
from tests.support import descendants, title, wait_until
from tests.train_support import rows_of, scene, spec_for, volumes
from volseg.errors import InputError, JobInterrupted, VolumeError, WorkersLostError
from volseg.models.bundle import load_networks
from volseg.spec import TrainSpec
from volseg.training.checkpoint import Workplace
from volseg.training.progress import TrainProgress
from volseg.training.train import train

# Ray Train sets deprecated options of its own.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]

# Without batch normalisation, nothing depends on who holds which patch.
OPTIONS: dict[str, Any] = {"norm": "group", "max_steps": 60, "validations": 10, "workers": 2, "threads": 1}
STEPS = 60


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train looks after its workers every two seconds."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")


def train_workers(pid: int) -> list[Any]:
    return [p for p in descendants(pid) if "RayTrainWorker" in title(p)]


def same_weights(first: TrainSpec, second: TrainSpec) -> None:
    a, b = (load_networks(spec.out)[1][0].state_dict() for spec in (first, second))
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, rtol=1e-3, atol=2e-3)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    """The same training in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    spec = spec_for(folder, volumes(folder), **OPTIONS)
    train(spec)
    return spec


def like(spec: TrainSpec, folder: Path, **changes: Any) -> TrainSpec:
    return spec.model_copy(update={"out": str(folder / "bundle"), **changes})


@pytest.mark.chaos
@pytest.mark.usefixtures("one_ray")
def test_a_killed_worker_costs_a_restart_and_nothing_else(undisturbed: TrainSpec, tmp_path: Path) -> None:
    from volseg.cluster.ray_train import train_on_ray

    spec = like(undisturbed, tmp_path)
    workplace = Workplace.beside(spec.out)
    killed: list[int] = []
    notes: list[str] = []

    def kill(now: TrainProgress) -> None:
        if workplace.checkpoints() and not killed and now.step < STEPS:
            workers = train_workers(os.getpid())
            assert len(workers) == 2
            killed.append(now.step)
            workers[1].kill()

    result = train_on_ray(spec, kill, notes.append)
    assert killed
    assert result.steps == STEPS
    assert 0 < result.resumed_from < STEPS
    assert any("attempt 2" in note for note in notes)
    assert any(f"going on from step {result.resumed_from}" in note for note in notes)
    assert not Path(workplace.uri).exists()
    rows, expected = rows_of(spec), rows_of(undisturbed)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    np.testing.assert_allclose([r["loss"] for r in rows], [r["loss"] for r in expected], rtol=1e-4)
    same_weights(undisturbed, spec)


DRIVER = """
import sys
from volseg.cluster.ray_train import train_on_ray
from volseg.spec import TrainSpec
train_on_ray(TrainSpec.model_validate_json(sys.argv[1]))
"""


@pytest.mark.chaos
def test_after_a_killed_driver_the_same_command_goes_on(undisturbed: TrainSpec, tmp_path: Path) -> None:
    """It may also go on in one process: the checkpoints are volseg's."""
    spec = like(undisturbed, tmp_path, max_steps=3000, validations=1000)
    workplace = Workplace.beside(spec.out)
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, spec.model_dump_json()], start_new_session=True)
    try:
        wait_until(lambda: len(workplace.checkpoints()) == 2)
        family = descendants(driver.pid)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    wait_until(lambda: not any(process.is_running() and "RayTrainWorker" in title(process) for process in family))
    found = workplace.newest_valid(print)
    assert found is not None
    step = found[1]["step"]
    result = train(spec.model_copy(update={"max_steps": step + 2, "workers": None}))
    assert result.resumed_from == step > 0
    assert result.steps == step + 2


GROWING = """
import sys
from volseg.cluster import ray_train
from volseg.spec import TrainSpec
ray_train._GROW_SECONDS = 1.0
ray_train.train_on_ray(TrainSpec.model_validate_json(sys.argv[1]), note=lambda line: print(line, flush=True))
"""


@pytest.mark.chaos
def test_a_training_grows_when_a_machine_comes(undisturbed: TrainSpec, tmp_path: Path) -> None:
    with cluster_process(tmp_path / "cluster", [1], None) as cluster:
        changes = {"workers": (1, 2), "address": cluster.gcs, "max_steps": 30_000, "validations": 1000}
        spec = like(undisturbed, tmp_path, **changes)
        workplace = Workplace.beside(spec.out)
        said = tmp_path / "said"
        with said.open("w") as file:
            words = [sys.executable, "-c", GROWING, spec.model_dump_json()]
            driver = subprocess.Popen(words, env=cluster.environment, stdout=file, stderr=file, text=True)
        try:
            wait_until(workplace.checkpoints, driver)
            assert len(train_workers(os.getpid())) == 1
            cluster.ask("add", '{"num_cpus":1}')
            wait_until(lambda: len(train_workers(os.getpid())) == 2, driver)
            wait_until(lambda: "going on from step" in said.read_text(), driver)
            found = workplace.newest_valid(print)
            assert found is not None
            grown = found[1]["step"]
            wait_until(lambda: int(workplace.checkpoints()[-1].partition("-")[0]) > grown, driver)
            driver.send_signal(signal.SIGINT)
            driver.wait()
        finally:
            driver.kill()
            driver.wait()
    assert "attempt 2 begins with those that are there" in said.read_text()
    found = workplace.newest_valid(print)
    assert found is not None
    step = found[1]["step"]
    assert step > grown > 0
    # What two workers left behind goes on in one process.
    result = train(spec.model_copy(update={"max_steps": step + 2, "workers": None, "address": None}))
    assert result.resumed_from == step


@pytest.mark.chaos
@pytest.mark.usefixtures("one_ray")
def test_ctrl_c_stops_after_a_checkpoint(undisturbed: TrainSpec, tmp_path: Path) -> None:
    from volseg.cluster.ray_train import train_on_ray

    spec = like(undisturbed, tmp_path)

    def stop(now: TrainProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(JobInterrupted, match=r"stopped at step \d+ by the user; the same command goes on"):
        train_on_ray(spec, stop)
    assert not Path(spec.out).exists()
    assert not train_workers(os.getpid())
    result = train(spec)
    assert result.resumed_from > 0
    same_weights(undisturbed, spec)


@pytest.mark.usefixtures("one_ray")
def test_what_the_user_must_mend_comes_back_as_it_is(tmp_path: Path) -> None:
    from volseg.cluster.ray_train import train_on_ray

    image, labels = scene()
    spec = spec_for(tmp_path, volumes(tmp_path, image=image, labels=labels[1:]), **OPTIONS)
    with pytest.raises(VolumeError, match="nothing was trained"):
        train_on_ray(spec)


@pytest.mark.usefixtures("one_ray")
def test_too_few_machines_are_refused(tmp_path: Path) -> None:
    from volseg.cluster.ray_train import choose_crew, train_on_ray

    data = volumes(tmp_path)
    with pytest.raises(InputError, match=r"--workers 99: a worker needs a CPU of its own, and the Ray cluster has 4;"):
        train_on_ray(spec_for(tmp_path, data, workers=99))
    with pytest.raises(InputError, match="--device cuda: the Ray cluster has no GPU"):
        train_on_ray(spec_for(tmp_path, data, workers=2, device="cuda"))
    crew = choose_crew(spec_for(tmp_path, data, workers="2:9", threads=None))
    assert (crew.low, crew.high, crew.threads, crew.gpus) == (2, 9, 1, False)
    assert not list(tmp_path.glob("bundle*"))


def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import ray

    from volseg.cluster import ray_train

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    spec = spec_for(tmp_path, {"image": "i", "labels": "l"}, workers=4, threads=None)
    with pytest.raises(
        InputError, match=r"needs a GPU .* has 2; .*: say --workers 2, or --device cpu, or add machines"
    ):
        ray_train.choose_crew(spec)
    assert ray_train.choose_crew(spec.model_copy(update={"device": "cpu"})).threads == 2
    assert ray_train.choose_crew(spec.model_copy(update={"workers": (2, 2)})).gpus


def test_the_reason_of_a_lost_group_is_the_worker_that_failed_by_itself() -> None:
    import ray.train

    from volseg.cluster.ray_train import _Job

    job = _Job(None)
    error: Any = ray.train  # its classes depend on a switch
    failures = {
        0: RuntimeError("[gloo] Connection closed by peer"),
        1: RuntimeError("Traceback\nMemoryError: too much"),
    }
    job._answer.set_exception(error.WorkerGroupError("", failures))
    with pytest.raises(WorkersLostError, match=r"failed 4 time\(s\), the last time: MemoryError: too much; .*goes on"):
        job.result(4)
