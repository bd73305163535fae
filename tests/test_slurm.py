"""deploy/slurm/volseg.sbatch: its body, run as it stands on a pretended allocation of two nodes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests import fake_slurm
from tests.kustomize import REPO
from tests.support import LONGEST, Case, descendants, done_blocks, labels_of, segment, wait_until
from volseg.cluster import gather

SCRIPT = REPO / "deploy" / "slurm" / "volseg.sbatch"
SLOW: dict[str, Any] = {"overlap": 0.6, "block": "8,16,10"}


class Allocation:
    """Two nodes with one core each and a disk of their own; a batch script runs on the first one."""

    def __init__(self, folder: Path, disks: Path) -> None:
        self.disks, self.log = disks, folder / "scontrol.log"
        commands = folder / "bin"
        fake_slurm.install(commands)
        for node in (0, 1):
            (disks / f"n{node}").mkdir()
        self.environment = {
            **os.environ, **fake_slurm.environment_of(0, disks), "FAKE_SLURM_DISKS": str(disks),
            "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPO),
            "FAKE_SLURM_LOG": str(self.log), "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "1",
        }  # fmt: skip

    @contextlib.contextmanager
    def batch(self, *words: object) -> Iterator[subprocess.Popen[str]]:
        """Run the script; whatever it started is gone afterwards, by its numbers."""
        started = subprocess.Popen(
            ["bash", str(SCRIPT), *map(str, words)], env=self.environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            yield started
        finally:
            family = descendants(started.pid)
            started.kill()
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            started.communicate()

    def used(self) -> list[str]:
        """Return what lies on the nodes' disks."""
        return sorted(str(path.relative_to(self.disks)) for path in self.disks.glob("*/*"))


@pytest.fixture
def allocation(tmp_path: Path) -> Iterator[Allocation]:
    # Sockets lie on the nodes' disks, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as disks:
        yield Allocation(tmp_path, Path(disks))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.chaos
def test_time_is_over_and_the_next_one_goes_on(allocation: Allocation, slow_case: Case, tmp_path: Path) -> None:
    output, case = tmp_path / "out.zarr", slow_case
    spec = {"input": case.image, "output": str(output), "model": case.bundle, **SLOW}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    words = ("segment", "--spec", tmp_path / "spec.yaml", "--json")
    with allocation.batch(*words) as job:
        wait_until(lambda: len(done_blocks(output)) > 0)
        family = descendants(job.pid)
        assert_private(family)
        # Each Ray has temporary files, object store and sockets on its own node's disk.
        assert allocation.used() == ["n0/v4711-head0", "n0/v4711-worker0", "n1/v4711-worker1"]
        for place in allocation.used():
            assert list((allocation.disks / place).glob("session_*/sockets/plasma_store*"))
        job.send_signal(signal.SIGUSR1)
        out, err = job.communicate(timeout=LONGEST)
        assert job.returncode == 130, err
        assert "the time is over; back into the queue" in err
        assert_gone(family)
    assert allocation.log.read_text() == "scontrol requeue 4711\n"
    assert allocation.used() == []
    kept = len(done_blocks(output))
    with allocation.batch(*words) as job:
        out, err = job.communicate(timeout=LONGEST)
        assert job.returncode == 0, err
    report = json.loads(out)
    assert report["blocks"]["resumed"] == kept
    assert report["blocks"]["computed"] == report["blocks"]["total"] - kept > 0
    assert "2 worker(s)" in err
    assert allocation.used() == []
    segment(case, tmp_path / "alone.zarr", overlap=SLOW["overlap"])
    np.testing.assert_array_equal(labels_of(output), labels_of(tmp_path / "alone.zarr"))


def assert_private(family: list[psutil.Process]) -> None:
    """The token is in no argument, and the cluster turns away whoever has none."""
    (driver,) = [p for p in family if p.cmdline()[1:4] == ["-m", "volseg", "segment"]]
    environment = driver.environ()
    token, address = environment["RAY_AUTH_TOKEN"], environment["RAY_ADDRESS"]
    assert len(token) == 64
    assert environment["RAY_AUTH_MODE"] == "token"
    assert not any(token in word for process in family for word in process.cmdline())
    stranger = {**environment, "RAY_AUTH_TOKEN": "0" * 64}
    script = f"import ray; ray._raylet.GcsClient(address={address!r})"
    refused = subprocess.run(
        [sys.executable, "-c", script], env=stranger, capture_output=True, text=True, check=False, timeout=LONGEST
    )
    assert "AuthenticationError" in refused.stderr


def assert_gone(family: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(family, timeout=LONGEST)
    assert not alive


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        ((), {}, "no command: sbatch deploy/slurm/volseg.sbatch segment"),
        (("segment",), {"PATH": "NONE"}, "python finds no volseg with Ray here; nothing was started"),
    ],
)
def test_refused_before_anything_starts(
    allocation: Allocation, words: tuple[str, ...], changes: dict[str, str], message: str, tmp_path: Path
) -> None:
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    allocation.environment |= {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"} if changes else {}
    with allocation.batch(*words) as job:
        _, err = job.communicate(timeout=LONGEST)
    assert job.returncode == 2
    assert message in err
    assert allocation.used() == []


def test_nobody_to_gather(capsys: pytest.CaptureFixture[str]) -> None:
    """A head that never answers, and one that ended: a line, and the code that ends the batch job."""
    nowhere = "127.0.0.1:1"
    assert gather.main([nowhere, "2", "--patience", "0"]) == 2
    assert "no Ray cluster answers at '127.0.0.1:1'" in capsys.readouterr().err
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    assert gather.main([nowhere, "2", "--head", str(ended.pid)]) == 4
    assert "the head of the cluster ended before its workers joined" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.usefixtures("one_ray")
def test_fewer_machines_than_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert gather.gather("the one that is connected", 1) == 1
    assert gather.main(["the one that is connected", "2", "--patience", "0"]) == 0
    assert "only 1 of 2 machines have joined; they begin without the others" in capsys.readouterr().err


def test_bash_reads_it_and_slurm_its_options() -> None:
    bash = shutil.which("bash")
    assert bash is not None
    subprocess.run([bash, "-n", str(SCRIPT)], check=True, capture_output=True)
    lines = SCRIPT.read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    # Slurm stops to look for them at the first command.
    assert lines.index("set -euo pipefail") > max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert {"--ntasks-per-node=1", "--requeue", "--no-kill", "--open-mode=append"} <= set(options)
    (warning,) = [option for option in options if option.startswith("--signal=")]
    assert re.fullmatch(r"--signal=B:USR1@\d{2,}", warning)
