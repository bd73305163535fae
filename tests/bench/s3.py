"""Objects of 4 MiB on S3, written and read by volseg and by obstore in turn, on both servers of the tests.

    python -m tests.bench.s3 [--objects 24] [--runs 5]

Whole objects only: obstore takes no answer to a ranged read from rclone's server, which sends status 200 with it.
Prints medians of MiB a second, and milliseconds of this process' CPU an object.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore
from obstore.store import S3Store

from tests.s3_servers import REGION, Server, run_moto, run_rclone
from volseg.storage import s3

SIZE = 4 << 20
Timing = tuple[float, float]


def main() -> None:
    """Measure both servers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=24)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    with run_moto() as moto:
        _measure(moto, arguments.objects, arguments.runs)
    with tempfile.TemporaryDirectory() as folder, run_rclone(Path(folder)) as rclone:
        _measure(rclone, arguments.objects, arguments.runs)


def _measure(server: Server, objects: int, runs: int) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(server.environment)
    sides, timings = _sides(server), dict[tuple[int, str], list[Timing]]()
    for do in sides.values():
        do(0)
    for _ in range(runs):
        for threads in (1, 4):
            with ThreadPoolExecutor(threads) as pool:
                for name, do in sides.items():
                    timings.setdefault((threads, name), []).append(_time(pool, do, objects))
    for (threads, name), found in sorted(timings.items()):
        rate, cpu = (statistics.median(values) for values in zip(*found, strict=True))
        sys.stdout.write(f"{server.name:7} {threads} thread(s)  {name:14} {rate:6.0f} MiB/s  {cpu:5.1f} ms CPU\n")


def _sides(server: Server) -> dict[str, Callable[[int], None]]:
    bucket, data, fs = server.new_bucket(), os.urandom(SIZE), s3.filesystem()
    store = S3Store(
        bucket, endpoint=server.endpoint, region=REGION, access_key_id=server.key, secret_access_key=server.secret,
        client_options={"allow_http": True}, virtual_hosted_style_request=False,
    )  # fmt: skip

    def read(number: int) -> None:
        assert len(fs.read(f"{bucket}/a{number}")) == SIZE

    def read_by_obstore(number: int) -> None:
        assert len(bytes(obstore.get(store, f"b{number}").bytes())) == SIZE

    def write_by_obstore(number: int) -> None:
        obstore.put(store, f"b{number}", data, use_multipart=False)

    return {
        "volseg write": lambda number: fs.write(f"{bucket}/a{number}", data),
        "obstore write": write_by_obstore,
        "volseg read": read,
        "obstore read": read_by_obstore,
    }


def _time(pool: ThreadPoolExecutor, do: Callable[[int], None], objects: int) -> Timing:
    cpu, wall = time.process_time(), time.perf_counter()
    list(pool.map(do, range(objects)))
    wall = time.perf_counter() - wall
    return objects * SIZE / 2**20 / wall, (time.process_time() - cpu) / objects * 1000


if __name__ == "__main__":
    main()
