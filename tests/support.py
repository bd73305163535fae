"""What the integration tests share: tiny bundles, volumes, jobs inside this process and in processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import torch
import zarr
from numpy.typing import NDArray

from volseg import api
from volseg.geometry import Triple
from volseg.intensity import Scaling
from volseg.models.bundle import save_bundle
from volseg.models.graph import Graph
from volseg.models.hardware import has_bf16
from volseg.models.manifest import BundleManifest, ClassInfo
from volseg.models.program import Add
from volseg.models.registry import build, make_config
from volseg.spec import SegmentSpec

# Two cores are all there is: more threads would only wait for each other.
torch.set_num_threads(1)

needs_bf16 = pytest.mark.skipif(not has_bf16("cpu"), reason="no bf16 on this processor")

T = TypeVar("T")
LONGEST = 120.0
"""Seconds after which a test gives up waiting; never a measure of anything."""


@dataclass(frozen=True)
class Case:
    """An input and a bundle that many tests share."""

    image: str
    bundle: str
    folder: Path


def smooth(shape: Triple, seed: int = 0, low: float = 0.0, high: float = 255.0) -> NDArray[np.float32]:
    """Return a smooth random volume (z, y, x) that spans low..high, so that classes form regions, not salt."""
    values = np.random.default_rng(seed).normal(size=shape)
    for axis, size in enumerate(shape):
        for _ in range(2 if size > 4 else 0):
            values = sum((np.roll(values, k, axis) for k in (-2, -1, 1, 2)), values)
    values -= values.min()
    values *= (high - low) / max(values.max(), 1e-9)
    return (values + low).astype(np.float32)


def store(path: Path, data: NDArray[Any], dtype: str | None = "uint8", **options: Any) -> str:
    """Write a plain Zarr array and return its path; `options` go to zarr."""
    values = data if dtype is None else data.astype(dtype)
    options.setdefault("chunks", tuple(min(16, size) for size in values.shape))
    array = zarr.create_array(str(path), shape=values.shape, dtype=values.dtype, **options)
    array[...] = values
    return str(path)


def make_bundle(
    path: Path, *, dims: int = 3, classes: int = 3, patch: Triple = (16, 16, 16), channels: int = 1, seed: int = 0,
    scaling: Scaling | None = None, axis: str = "z", members: int = 1, class_bias: Sequence[float] | None = None,
    sigmoid: bool | None = None, architecture: str = "unet", **network: Any,
) -> str:  # fmt: skip
    """Write a bundle with random weights, tuned so that every class wins somewhere, and return its path.

    `network` are further arguments of the architecture; `members` networks with weights of their own make an ensemble.
    """
    torch.manual_seed(seed)
    sigmoid = classes == 2 if sigmoid is None else sigmoid
    if architecture == "unet":
        network.setdefault("widths", (4, 8))
    arguments = {"dims": dims, "in_channels": channels, "out_channels": 1 if sigmoid else classes, **network}
    config = make_config(architecture, arguments)
    networks = [build(architecture, config).eval() for _ in range(members)]
    for net in networks:
        _balance(net)
    manifest = BundleManifest.model_validate({
        "architecture": architecture,
        "arguments": config.model_dump(mode="json"),
        "classes": [ClassInfo(id=i, name=f"class {i}", color=f"#{i * 40 % 256:02x}8040") for i in range(classes)],
        "activation": "sigmoid" if sigmoid else "softmax",
        "threshold": 0.5 if sigmoid else None,
        "class_bias": class_bias,
        "scaling": scaling or Scaling(low=(0,) * channels, high=(255,) * channels, mean=(120,) * channels,
                                      std=(50,) * channels),
        "patch": patch, "axis": axis, "voxel_size": (0.5, 0.5, 0.5), "unit": "micrometer",
    })  # fmt: skip
    save_bundle(str(path), networks, manifest)
    return str(path)


def _balance(net: torch.nn.Module) -> None:
    """Change the last layer so that the classes' logits spread alike around zero, each winning somewhere."""
    assert isinstance(net, Graph)
    config = net.config
    sides = config.fit((16, 32, 32) if config.dims == 3 else (1, 64, 64), up=True)
    sample = torch.from_numpy((smooth(sides, seed=99) - 120) / 50)
    x = sample.expand(1, config.in_channels, *sides) if config.dims == 3 else sample.expand(config.in_channels, *sides)
    with torch.inference_mode():
        logits = net(x if config.dims == 3 else x.transpose(0, 1)).transpose(0, 1).flatten(1)
    spread, centre = logits.std(dim=1), logits.median(dim=1).values
    answer = next(op for op in config.program.ops if op.name == config.program.answers[0])
    for name in answer.sources if isinstance(answer, Add) else (answer.name,):
        last = net.get_submodule(f"{name}.conv")
        weight, bias = last.get_parameter("weight"), last.get_parameter("bias")
        with torch.no_grad():
            # A transposed convolution has its outputs second.
            outputs = weight if isinstance(last, torch.nn.Conv2d | torch.nn.Conv3d) else weight.transpose(0, 1)
            outputs.mul_((2 / spread).view(-1, *[1] * (weight.ndim - 1)))
            bias.sub_(centre).mul_(2 / spread)
        # Of a sum, the first part alone is moved.
        centre = torch.zeros_like(centre)


def segment(case: Case, output: Path, **options: Any) -> dict[str, Any]:
    """Segment in this process, serially unless told otherwise, and return the report."""
    options.setdefault("executor", "serial")
    values = {"input": case.image, "output": str(output), "model": case.bundle, **options}
    return api.run_segment(SegmentSpec.read(values))


def labels_of(output: Path | str) -> NDArray[Any]:
    """Return the labels (z, y, x) by zarr alone, without volseg's reader."""
    array = zarr.open_array(f"{output}/0", mode="r")
    return np.asarray(array[...])


def probabilities_of(output: Path | str) -> NDArray[np.uint8]:
    """Return the probabilities (c, z, y, x) by zarr alone."""
    array = zarr.open_array(f"{output}/probabilities/0", mode="r")
    return np.asarray(array[...])


def status_of(output: Path | str) -> str | None:
    """Return what the output says of itself, None where there is none."""
    document = Path(output) / "zarr.json"
    if not document.exists():
        return None
    status = json.loads(document.read_text())["attributes"]["volseg"]["status"]
    assert isinstance(status, str)
    return status


# ---------------------------------------------------------------- processes


def command(*words: object) -> list[str]:
    """Return the command line of volseg in a process of its own."""
    return [sys.executable, "-m", "volseg", *map(str, words)]


def segment_words(case: Case, output: Path, *more: object) -> tuple[object, ...]:
    """Return the words of a segment command."""
    return ("segment", case.image, output, "--model", case.bundle, *more)


@contextlib.contextmanager
def process(*words: object, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run volseg in a process group of its own, which is gone afterwards with all that it started."""
    started = subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **options
    )
    family: list[psutil.Process] = []
    try:
        yield started
        family = descendants(started.pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        started.communicate()


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run volseg to its end and return its exit code and output."""
    with process(*words, **options) as started:
        out, err = started.communicate(timeout=LONGEST)
        return subprocess.CompletedProcess(started.args, started.returncode, out, err)


def run_json(*words: object, **options: Any) -> dict[str, Any]:
    """Run volseg with --json, expect success, and return the document."""
    done = run(*words, "--json", **options)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert isinstance(document, dict)
    return document


def long(*values: Any) -> Any:
    """Return a case of a parametrised test that only `make chaos` runs."""
    return pytest.param(*values, marks=pytest.mark.chaos)


def wait_until(condition: Callable[[], T], alive: subprocess.Popen[str] | None = None) -> T:
    """Poll until `condition` holds and return its value; fails when `alive` ends before that."""
    stop = time.monotonic() + LONGEST
    while not (value := condition()):
        if alive is not None and alive.poll() is not None:
            out, err = alive.communicate()
            raise AssertionError(f"the process ended with {alive.returncode} before that:\n{out}\n{err}")
        assert time.monotonic() < stop, "waited in vain"
        time.sleep(0.01)
    return value


def receipts_of(output: Path | str) -> list[Path]:
    """Return the segments of receipts in the ledgers of an output."""
    return sorted(Path(f"{output}.volseg").glob("*/receipts/*.jsonl"))


def done_blocks(output: Path | str) -> set[int]:
    """Return the blocks that have a receipt."""
    return {json.loads(line)["index"] for path in receipts_of(output) for line in path.read_text().splitlines()}


def descendants(pid: int) -> list[psutil.Process]:
    """Return all processes below `pid`; none where it is gone."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def actors(pid: int) -> list[psutil.Process]:
    """Return the processes of segmenting Ray actors below `pid`."""
    return [p for p in descendants(pid) if "SegmentActor" in title(p)]


def title(process: psutil.Process) -> str:
    """Return a process' command line, empty where it is gone; Ray's workers write there what they do."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
