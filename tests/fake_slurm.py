"""A pretended allocation on this machine, for `deploy/slurm`: ``srun`` and ``scontrol`` run or note everything here.

A node is an environment: a number, a name, and a disk of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

KNOWN = {"--export", "--nodes", "--ntasks", "--ntasks-per-node", "--kill-on-bad-exit", "--cpus-per-task"}


def environment_of(node: int, disks: Path) -> dict[str, str]:
    """Return what Slurm and its site tell a process on a node."""
    return {"SLURM_NODEID": str(node), "SLURMD_NODENAME": f"node{node}", "SLURM_TMPDIR": str(disks / f"n{node}")}


def install(folder: Path) -> None:
    """Put the commands into a folder for the PATH."""
    folder.mkdir()
    for name in ("srun", "scontrol"):
        script = f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" {name} "$@"\n'
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)


def srun(words: list[str]) -> int:
    """Run a command once a node; signals are passed on, and nothing else is ended."""
    options: dict[str, str] = {}
    while words[0].startswith("--"):
        name, sign, value = words.pop(0).partition("=")
        assert sign, f"{name} has no value"
        assert name in KNOWN, f"srun knows no {name}"
        options[name] = value
    assert options["--ntasks"] == options["--nodes"] == os.environ["SLURM_JOB_NUM_NODES"]
    disks = Path(os.environ["FAKE_SLURM_DISKS"])
    tasks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        for task in tasks:
            task.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    for node in range(int(options["--nodes"])):
        tasks.append(subprocess.Popen(words, env={**os.environ, **environment_of(node, disks)}))
    return max(task.wait() for task in tasks)


def main() -> int:
    """Do as the command that this was called as."""
    name, *words = sys.argv[1:]
    if name == "srun":
        return srun(words)
    with Path(os.environ["FAKE_SLURM_LOG"]).open("a") as log:
        log.write(" ".join([name, *words]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
