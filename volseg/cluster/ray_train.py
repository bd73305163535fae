"""Training on Ray workers: the adapter of `volseg.training.ranks.run_rank` to Ray Train.

Ray Train starts a group of workers, lets torch's processes meet, and starts the whole group again when a worker is
lost. Everything else is volseg's: checkpoints lie in the training's own folder and not in Ray's, so that a training
that lost its driver goes on with the same command, on Ray or without.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import uuid
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.exceptions import RayError

from volseg.cluster.board import Board, messenger
from volseg.cluster.machines import alive_nodes, shortage
from volseg.cluster.reach import refuse_unseen
from volseg.cluster.session import RaySession
from volseg.cluster.worker import WORKER_ENVIRONMENT, clean_errors
from volseg.errors import InputError, JobInterrupted, VolsegError, WorkersLostError
from volseg.journal import Note
from volseg.spec import TrainSpec
from volseg.storage import files, rate
from volseg.training.claim import check_out, inputs_of
from volseg.training.distributed import Group, TorchGroup
from volseg.training.progress import ProgressCallback, TrainResult
from volseg.training.ranks import run_rank
from volseg.training.site import Site, cores, memory_share

# Which classes these modules hold depends on a switch that type checkers do not know.
_train: Any = ray.train
_torch: Any = ray.train.torch

_POLL_SECONDS = 0.3
# Workers load torch and open the volumes first.
_SLOW_START_SECONDS = 30.0
# A step that is under way is finished before a training stops.
_STOP_SECONDS = 20.0
# A training that runs with fewer workers than it may have looks this often for room. To grow it goes back to the last
# checkpoint, so not too often.
_GROW_SECONDS = 60.0
# A worker whose partner died says this; the partner's death is the cause.
_COLLATERAL = ("Connection closed by peer", "Connection reset", "gloo", "NCCL", "Socket", "Broken pipe")


@dataclass(frozen=True)
class _Crew:
    """Who trains: LOW:HIGH workers with so many threads each, on GPUs or not."""

    low: int
    high: int
    threads: int
    gpus: bool


def train_on_ray(spec: TrainSpec, progress: ProgressCallback | None = None, note: Note | None = None) -> TrainResult:
    """Train like `volseg.training.train.train` on the workers that `spec.workers` asks for, at `spec.address`.

    Without an address (nor RAY_ADDRESS), Ray is started inside this process. A worker that dies costs an attempt, a
    machine that is taken away does not; the group goes on from the newest checkpoint. Raises what the same training in
    this process would raise, InputError where the cluster lacks the workers or a machine does not see a local path,
    WorkersLostError after the last attempt.
    """
    check_out(spec)
    address = spec.address or os.environ.get("RAY_ADDRESS")
    with RaySession(address, cores()), tempfile.TemporaryDirectory(prefix="volseg-train-") as folder:
        crew = choose_crew(spec)
        _refuse_unseen(spec, "GPU" if crew.gpus else "CPU")
        board = ray.remote(Board).options(num_cpus=0).remote()
        job = _Job(_trainer(_portable(spec), crew, board, folder))
        job.start()
        return _follow(job, board, progress or (lambda _: None), note or (lambda _: None), crew)


def choose_crew(spec: TrainSpec) -> _Crew:
    """Return the workers for `spec` on the connected cluster; raises InputError where it has too few CPUs or GPUs."""
    total = ray.cluster_resources()  # type: ignore[no-untyped-call]
    cpus, gpus = int(total.get("CPU", 0)), int(total.get("GPU", 0))
    if spec.device == "cuda" and gpus == 0:
        raise InputError(
            "--device cuda: the Ray cluster has no GPU; nothing was trained: leave --device out, or say cpu"
        )
    on_gpus = gpus > 0 and spec.device != "cpu"
    low, high = spec.workers or (1, 1)
    there, kind = (gpus, "GPU") if on_gpus else (cpus, "CPU")
    if low > there:
        other = ", or --device cpu" if on_gpus and low <= cpus else ""
        more = f"say --workers {there}{other}, or add machines" if there else "add machines"
        raise InputError(
            f"--workers {low}: a worker needs a {kind} of its own, and the Ray cluster has {there}; nothing was "
            f"trained: {more}"
        )
    return _Crew(low, high, spec.threads or max(1, cpus // high), on_gpus)


def _refuse_unseen(spec: TrainSpec, kind: str) -> None:
    """Raise InputError where a machine that may train does not see a local path."""
    able = [node["NodeID"] for node in alive_nodes() if node["Resources"].get(kind, 0) >= 1]
    refuse_unseen(inputs_of(spec), spec.out, able)


def _portable(spec: TrainSpec) -> TrainSpec:
    """Return `spec` with absolute places, because workers run in folders of their own."""
    lists = {name: getattr(spec, name) for name in ("image", "labels", "mask")}
    changes: dict[str, Any] = {n: tuple(map(files.absolute, uris)) for n, uris in lists.items() if uris is not None}
    changes |= {name: files.absolute(uri) for name in ("out", "init") if (uri := getattr(spec, name)) is not None}
    return spec.model_copy(update=changes)


def _trainer(spec: TrainSpec, crew: _Crew, board: Any, folder: str) -> Any:
    environment = WORKER_ENVIRONMENT | {name: str(crew.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return _torch.TorchTrainer(
        _work,
        train_loop_config={"spec": spec, "threads": crew.threads, "board": board},
        torch_config=_torch.TorchConfig(backend="nccl" if crew.gpus else "gloo"),
        scaling_config=_train.ScalingConfig(
            num_workers=crew.low if crew.low == crew.high else (crew.low, crew.high),
            elastic_resize_monitor_interval_s=_GROW_SECONDS,
            use_gpu=crew.gpus,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if crew.gpus else {})},
        ),
        run_config=_train.RunConfig(
            name=f"volseg-{uuid.uuid4().hex[:8]}",
            # For Ray's own bookkeeping; nothing of it is needed again.
            storage_path=folder,
            failure_config=_train.FailureConfig(max_failures=spec.attempts, max_preemption_failures=-1),
            worker_runtime_env={"env_vars": environment},
            logging_config=_train.LoggingConfig(log_level="CRITICAL"),
        ),
    )


# ---------------------------------------------------------------- in a worker


def _work(config: dict[str, Any]) -> TrainResult | VolsegError:
    """Run one rank; what is raised on purpose comes back as a value, because to try again would not help."""
    context = ray.train.get_context()
    world, rank = context.get_world_size(), context.get_world_rank()
    rate.share(world)
    device = _torch.get_device()
    group = TorchGroup(device) if world > 1 else Group()
    with messenger(config["board"], active=rank == 0) as told:
        site = Site(
            device=device,
            threads=config["threads"],
            memory=memory_share(device, context.get_local_world_size()),
            report=told.report,
            note=told.note,
            stop=lambda: told.stopped,
            restarted=told.restarted,
            group=group,
        )
        try:
            with clean_errors():
                return run_rank(config["spec"], site)
        except VolsegError as error:
            return error


# ---------------------------------------------------------------- in the driver


class _Job:
    """Ray Train in a thread, so that the driver's main thread hears Ctrl-C."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._answer: Future[TrainResult | VolsegError] = Future()

    def start(self) -> None:
        """Begin; the thread does not keep the process from ending."""
        threading.Thread(target=self._run, name="ray-train", daemon=True).start()

    def over(self, seconds: float) -> bool:
        """Wait at most so long, and tell whether it has ended."""
        return bool(wait([self._answer], seconds).done)

    def result(self, attempts: int) -> TrainResult:
        """Return the result, or raise what went wrong after so many attempts."""
        try:
            answer = self._answer.result()
        except (_train.TrainingFailedError, RayError) as error:
            raise WorkersLostError(
                f"the training workers failed {max(attempts, 1)} time(s), the last time: {_cause(error)}; training "
                "stopped, no bundle was written: the same command goes on from the last checkpoint"
            ) from error
        if isinstance(answer, VolsegError):
            raise answer
        return answer

    def _run(self) -> None:
        try:
            self._answer.set_result(self._trainer.fit().return_value)
        except Exception as error:  # noqa: BLE001 - handed to the main thread, which raises it
            self._answer.set_exception(error)


def _follow(job: _Job, board: Any, progress: ProgressCallback, note: Note, crew: _Crew) -> TrainResult:
    """Pass on what the workers tell until the training is over."""
    started, attempts, waiting = time.monotonic(), 0, True
    try:
        while True:
            over = job.over(_POLL_SECONDS)
            now, lines, count = ray.get(board.take.remote())
            if count > max(attempts, 1):
                note(f"workers were lost, or more came: attempt {count} begins with those that are there")
            attempts = count
            for line in lines:
                note(line)
            if now is not None:
                progress(now)
            if over:
                return job.result(attempts)
            if waiting and (attempts or time.monotonic() - started > _SLOW_START_SECONDS):
                if not attempts:
                    note(f"waiting for {crew.low} workers: {shortage('GPU' if crew.gpus else 'CPU')}")
                waiting = False
    except KeyboardInterrupt:
        board.stop.remote()
        if job.over(_STOP_SECONDS):
            return job.result(attempts)
        raise JobInterrupted(
            "training stopped by the user; the same command goes on from the last checkpoint"
        ) from None


def _cause(error: Exception) -> str:
    """Return the reason of a failed group in one line: of several workers, the one that failed by itself."""
    failures = list(error.worker_failures.values()) if isinstance(error, _train.WorkerGroupError) else [error]
    own = [f for f in failures if not any(mark in str(f) for mark in _COLLATERAL)]
    lines = [line for line in str((own or failures)[0]).splitlines() if line.strip()]
    # Ray puts the traceback first and the error last.
    return lines[-1].strip()[:300] if lines else "no reason was given"
