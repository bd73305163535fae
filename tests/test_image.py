"""deploy/Dockerfile, what goes into its build, and the check of a container's health."""

from __future__ import annotations

import http.server
import importlib.util
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType

import pytest

from tests.kustomize import REPO
from volseg.kube import load_base
from volseg.kube.render import JOBS_FOLDER

DOCKERFILE = REPO / "deploy" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions with their arguments, lines joined, comments gone."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    found = [line.partition(" ") for line in lines if line.strip()]
    return [(name, rest.strip()) for name, _, rest in found]


def arguments(name: str) -> list[str]:
    return [rest for word, rest in instructions() if word == name]


def test_the_linter_has_nothing_to_say(tmp_path: Path) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert hadolint is not None
    done = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    # And it would say it.
    (tmp_path / "Dockerfile").write_text("FROM python:latest\n")
    assert subprocess.run([hadolint, str(tmp_path / "Dockerfile")], capture_output=True, check=False).returncode == 1


def test_the_base_is_pinned_by_a_digest() -> None:
    given = dict(argument.partition("=")[::2] for argument in arguments("ARG"))
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", given["BASE_DIGEST"])
    assert arguments("FROM") == ["python:${BASE_TAG}@${BASE_DIGEST}"]
    # Ours, not the base's, decides for CPU or GPU, and by itself for the GPU.
    assert given["TORCH_INDEX"] == ""
    (minor,) = re.findall(r"^python_version = \"(.*)\"", (REPO / "pyproject.toml").read_text(), re.MULTILINE)
    assert given["BASE_TAG"].startswith(f"{minor}-slim")


def test_it_runs_as_the_user_of_the_manifests() -> None:
    (user,) = arguments("USER")
    pod = load_base()[0]["spec"]["headGroupSpec"]["template"]["spec"]
    assert user == f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    words = [name for name, _ in instructions()]
    # Nothing is installed or copied by that user, so it can change nothing.
    assert not {"RUN", "COPY", "ADD"} & set(words[words.index("USER") :])
    (home,) = {e["value"] for e in pod["containers"][0]["env"] if e["name"] == "HOME"}
    assert f"HOME={home} " in " ".join(arguments("ENV"))
    assert f"--home-dir {home} " in " ".join(arguments("RUN"))


def test_no_compiler_and_nothing_unpinned() -> None:
    runs = " ".join(arguments("RUN"))
    assert not re.search(r"apt|gcc|g\+\+|build-essential|curl|wget", runs)
    installs = re.findall(r"pip install .*?(?:&&|$)", runs)
    assert installs
    assert all("constraints.txt" in install for install in installs)
    (extras,) = re.findall(r"'\.\[(.*?)\]'", runs)
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


def copied() -> list[str]:
    """Return what is copied into the image."""
    return [source for rest in arguments("COPY") for source in rest.split()[:-1]]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    rules = [line for line in (REPO / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert {"volseg", "jobs", "constraints.txt"} <= set(copied())
    for source in copied():
        assert (REPO / source).exists()
        assert source in {rule[1:] for rule in rules if rule.startswith("!")}
    # Everything else stays out: no data, no history, no environment, no credentials.
    assert rules[0] == "*"
    for private in ("volseg/cli/__pycache__", "w/out.zarr", "jobs/main.pyc"):
        assert any(fnmatchcase(private, rule.replace("**", "*")) for rule in rules)


def test_the_entry_points_lie_where_the_manifests_look() -> None:
    (folder,) = arguments("WORKDIR")
    assert f"{folder}/jobs" == JOBS_FOLDER
    assert "jobs jobs" in arguments("COPY")
    assert {path.name for path in (REPO / "jobs").glob("*.py")} == {"segment.py", "train.py", "batch.py"}
    (check,) = arguments("HEALTHCHECK")
    assert f"{folder}/healthcheck.py" in check
    assert "deploy/healthcheck.py healthcheck.py" in arguments("COPY")


# ---------------------------------------------------------------- health


@pytest.fixture(scope="module")
def health() -> ModuleType:
    spec = importlib.util.spec_from_file_location("healthcheck", REPO / "deploy" / "healthcheck.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def agent() -> Iterator[tuple[int, list[bytes]]]:
    """Something that answers like a node's agent, on a port of its own; the list says what."""
    answers = [b"success"]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/local_raylet_healthz" else 404)
            self.end_headers()
            self.wfile.write(answers[0])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1], answers
        server.shutdown()
        thread.join()


def lines_of(port: int) -> list[str]:
    return ["/x/ray/raylet/raylet --socket", f"python -u /x/ray/dashboard/agent.py --listen-port={port} --more"]


def test_health_of_a_node(health: ModuleType, agent: tuple[int, list[bytes]]) -> None:
    port, answers = agent
    assert health.is_well(lines_of(port))
    answers[0] = b"raylet is gone"
    assert not health.is_well(lines_of(port))
    assert not health.is_well(["/x/ray/raylet/raylet --socket"])


def test_health_without_a_node_and_without_an_answer(health: ModuleType, agent: tuple[int, list[bytes]]) -> None:
    assert health.is_well(["volseg segment a b", "bash"])
    # Nothing listens where the test's own server does not.
    assert not health.is_well([*lines_of(agent[0]), *lines_of(1)])
    assert health.ports(["python agent.py", "python ray/dashboard/agent.py"]) == {"52365"}


def test_processes_are_read_from_proc(health: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "12").mkdir()
    (tmp_path / "12" / "cmdline").write_bytes(b"python\0-u\0agent.py\0")
    (tmp_path / "self").mkdir()
    assert health.commands(tmp_path) == ["python -u agent.py "]
