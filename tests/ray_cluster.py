"""A Ray cluster in a process of its own, so that its environment is not that of the tests.

``python -m tests.ray_cluster '{"nodes": [1, 1]}'`` starts a head without CPUs and with a dashboard, and workers with so
many CPUs each; it prints one line of JSON and then obeys lines on stdin, machines being numbered as they came:

- ``add RESOURCES`` adds a machine, with JSON such as ``{"num_cpus": 1, "memory": 100000000}`` (no blanks)
- ``pod CPUS SECONDS`` adds one by ``ray start --block``, as a container does; SIGTERM drains it for so many seconds
- ``kill I``, ``drain I SECONDS``, ``sigterm I``: SIGTERM for a pod's first process, else for Ray's daemon there

It ends with stdin.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

REPO = Path(__file__).parents[1]


class ClusterProcess:
    """Talks to the process that holds a cluster."""

    def __init__(self, process: subprocess.Popen[str], environment: dict[str, str]) -> None:
        self._process = process
        self.environment = environment
        """What a process needs that talks to the cluster."""
        facts = self._answer()
        self.address: str = facts["dashboard"]
        self.gcs: str = facts["gcs"]
        self.nodes: list[str] = facts["nodes"]
        """Ray's ids of the machines, in the order in which they came."""

    def ask(self, *words: object) -> dict[str, Any]:
        """Send a command and return the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self.nodes = answer["nodes"]
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the cluster's process ended"
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer


@contextmanager
def cluster_process(folder: Path, nodes: list[int], token: str | None) -> Iterator[ClusterProcess]:
    """Start a cluster; with a token it lets in only those who have it."""
    folder.mkdir(parents=True, exist_ok=True)
    # Jobs start `python` and import volseg from the folder that is tested.
    environment = {
        **os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(REPO),
        "RAY_AUTH_MODE": "disabled" if token is None else "token", "XDG_STATE_HOME": str(folder / "state"),
    }  # fmt: skip
    if token is not None:
        (folder / "token").write_text(token)
        environment["RAY_AUTH_TOKEN_PATH"] = str(folder / "token")
    words = [sys.executable, "-m", "tests.ray_cluster", json.dumps({"nodes": nodes})]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=REPO
    ) as process:
        try:
            yield ClusterProcess(process, environment)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(60)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert isinstance(port, int)
    return port


def _serve(nodes: list[int], folder: Path) -> None:
    from ray.cluster_utils import Cluster

    # The agents' usual port may be another cluster's on this machine, and without its agent a head takes no jobs.
    head = {
        "num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": _free_port(),
        "dashboard_agent_listen_port": _free_port(), "temp_dir": str(folder),
    }  # fmt: skip
    cluster: Any = Cluster(initialize_head=True, connect=False, head_node_args=head)
    # Where several clusters run on a machine, Ray takes any of them for the one that a job's driver belongs to, unless
    # this file, which `ray start` would write, says which.
    (folder / "ray_current_cluster").write_text(cluster.address)
    machines = _Machines(cluster)
    try:
        for count in nodes:
            machines.add(json.dumps({"num_cpus": count}))
        _say({"dashboard": f"http://{cluster.head_node.webui_url}", "gcs": cluster.address, "nodes": machines.ids})
        for line in sys.stdin:
            word, *arguments = line.split()
            getattr(machines, word)(*arguments)
            _say({"nodes": machines.ids})
    finally:
        machines.end()
        cluster.shutdown()


class _Machines:
    """What the commands do; `ids` are those of Ray, in the order in which the machines came."""

    def __init__(self, cluster: Any) -> None:
        self._cluster = cluster
        self._nodes: list[Any] = []
        self.ids: list[str] = []

    def add(self, resources: str) -> None:
        node = self._cluster.add_node(dashboard_agent_listen_port=_free_port(), **json.loads(resources))
        self._nodes.append(node)
        self.ids.append(node.node_id)

    def pod(self, cpus: str, seconds: str) -> None:
        before = self._alive()
        environment = {**os.environ, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": seconds}
        words = ["--address", self._cluster.address, "--num-cpus", cpus, "--dashboard-agent-listen-port"]
        line = [str(Path(sys.executable).parent / "ray"), "start", *words, str(_free_port()), "--block"]
        self._nodes.append(subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=sys.stderr))
        stop = time.monotonic() + 60
        while not (new := self._alive() - before):
            assert time.monotonic() < stop, "no machine came"
            time.sleep(0.05)
        self.ids += new

    def kill(self, number: str) -> None:
        self._cluster.remove_node(self._nodes[int(number)], allow_graceful=False)

    def drain(self, number: str, seconds: str) -> None:
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]

        date = int((time.time() + float(seconds)) * 1000)
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        client = self._cluster.head_node.get_gcs_client()
        accepted, why = client.drain_node(self.ids[int(number)], reason, "asked by a test", date)
        assert accepted, why

    def sigterm(self, number: str) -> None:
        node = self._nodes[int(number)]
        process = node if isinstance(node, subprocess.Popen) else node.all_processes["raylet"][0].process
        process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        for pod in [node for node in self._nodes if isinstance(node, subprocess.Popen) and node.poll() is None]:
            family = psutil.Process(pod.pid).children(recursive=True)
            pod.kill()
            pod.wait()
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def _alive(self) -> set[str]:
        return {node["NodeID"] for node in self._cluster.global_state.node_table() if node["Alive"]}


def _say(answer: dict[str, Any]) -> None:
    sys.__stdout__.write(json.dumps(answer) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    sys.stdout = sys.stderr
    # A short path, as sockets need it, of this cluster's own.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as name:
        own = Path(os.environ["RAY_TMPDIR"], "ray") if "RAY_TMPDIR" in os.environ else Path(name)
        own.mkdir(exist_ok=True)
        _serve(asked["nodes"], own)
