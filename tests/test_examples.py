"""The README's examples for other workflow tools, taken from it and run with the real tools against a real cluster.

The tools live in an environment of their own, which has neither torch nor Ray (`make examples`); VOLSEG_EXAMPLES names
the folder of its programs. What is replaced in an example is the address of the cluster.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ray_cluster import REPO, ClusterProcess, cluster_process
from tests.support import LONGEST, make_bundle, smooth, status_of, store

pytestmark = [pytest.mark.ray, pytest.mark.examples]

TOKEN = "canary-token-e0d1"
ADDRESS = "http://head:8265"
SCANS = ("monday", "tuesday")
TOOLS = Path(os.environ.get("VOLSEG_EXAMPLES", REPO / ".venv-examples" / "bin"))


def example(word: str) -> str:
    """Return the one block of code in the README that holds a word."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (REPO / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if word in block]
    assert isinstance(found, str)
    assert len(found.splitlines()) < 20
    assert found.count(ADDRESS) == 1
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    with cluster_process(tmp_path_factory.mktemp("cluster"), [2], TOKEN) as started:
        yield started


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder as the examples expect it."""
    for number, scan in enumerate(SCANS):
        store(tmp_path / "scans" / f"{scan}.zarr", smooth((16, 16, 16), seed=number))
    make_bundle(tmp_path / "w" / "unet")
    return tmp_path


def run(cluster: ClusterProcess, place: Path, *words: str) -> str:
    """Run a program of the tools' environment in `place`, which is its home, too; nothing leaves the machine."""
    environment = {
        **cluster.environment, "HOME": str(place), "PATH": f"{TOOLS}:{os.environ['PATH']}", "PYTHONPATH": "",
        "DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_HOME": str(place / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "100",
    }  # fmt: skip
    done = subprocess.run(
        [str(TOOLS / words[0]), *words[1:]], cwd=place, env=environment, capture_output=True, text=True,
        timeout=LONGEST, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [status_of(place / "seg" / f"{scan}.zarr") for scan in SCANS] == ["complete"] * len(SCANS)
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout


def test_submitters_need_neither_torch_nor_ray() -> None:
    code = "import importlib.util as u; print([m for m in ('torch', 'ray') if u.find_spec(m)])"
    assert subprocess.run([TOOLS / "python", "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_snakemake(cluster: ClusterProcess, place: Path) -> None:
    (place / "Snakefile").write_text(example("rule segment:").replace(ADDRESS, cluster.address))
    run(cluster, place, "snakemake", "--cores", "2")
    reports = [json.loads((place / "reports" / f"{scan}.json").read_text()) for scan in SCANS]
    assert [Path(report["output"]).name for report in reports] == [f"{scan}.zarr" for scan in SCANS]
    # What is done is not done again, and what is lost is asked for and answered at once.
    (place / "reports" / "monday.json").unlink()
    run(cluster, place, "snakemake", "--cores", "2")
    assert json.loads((place / "reports" / "monday.json").read_text()) == reports[0]


@pytest.mark.parametrize("tool", ["prefect", "dask"])
def test_scripts(cluster: ClusterProcess, place: Path, tool: str) -> None:
    (place / "flow.py").write_text(example(f"from {tool}").replace(ADDRESS, cluster.address))
    printed = run(cluster, place, "python", "flow.py")
    shares = json.loads(printed.strip().splitlines()[-1].replace("'", '"'))
    assert len(shares) == len(SCANS)
    assert [sum(share.values()) for share in shares] == pytest.approx([1.0] * len(SCANS), abs=1e-4), shares
