"""Eight processes submit one spec at the same moment, again and again: how many runs are there?

    python -m tests.bench.submissions [--rounds 50] [--processes 8]

Every round has an output of its own. The answer is one JSON line: rounds, rounds with exactly one run, seconds. Exit
code 1 where a round had another number of runs than one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.ray_cluster import ClusterProcess, cluster_process
from tests.support import make_bundle, smooth, store
from tests.test_submit import TOGETHER


def main() -> int:
    """Run all rounds and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--processes", type=int, default=8)
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="volseg-bench-") as name:
        folder = Path(name)
        image, bundle = store(folder / "image.zarr", smooth((16, 16, 16))), make_bundle(folder / "bundle")
        with cluster_process(folder / "cluster", [1, 1], "bench-token-0123456789abcdef") as cluster:
            right = sum(
                _round(cluster, [image, str(folder / f"{number}.zarr"), bundle], arguments.processes) == 1
                for number in range(arguments.rounds)
            )
    answer = {"rounds": arguments.rounds, "one_run": right, "seconds": round(time.monotonic() - started, 1)}
    print(json.dumps(answer))
    return 0 if right == arguments.rounds else 1


def _round(cluster: ClusterProcess, places: list[str], processes: int) -> int:
    """Submit together and return how many runs there were: names, or attempts in the ledger."""
    words = [sys.executable, "-c", TOGETHER, cluster.address, *places]
    submitters = [
        subprocess.Popen(words, env=cluster.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    for submitter in submitters:
        assert submitter.stdout is not None
        assert submitter.stdout.readline() == "ready\n"
    for submitter in submitters:
        assert submitter.stdin is not None
        submitter.stdin.write("go\n")
        submitter.stdin.flush()
    names = {submitter.communicate()[0].strip() for submitter in submitters}
    if len(names) > 1:
        return len(names)
    subprocess.run(
        [sys.executable, "-m", "volseg", "wait", *names, "--address", cluster.address],
        env=cluster.environment, check=True, capture_output=True,
    )  # fmt: skip
    return len(list(Path(f"{places[1]}.volseg").glob("*/attempts/*.json")))


if __name__ == "__main__":
    sys.exit(main())
