"""One worker's process: how many threads compute, and what a predictor does to a patch."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support import Case, make_bundle
from volseg.errors import NonFiniteError
from volseg.geometry import Box, PatchLattice
from volseg.inference.accumulator import Accumulator
from volseg.inference.attempt import Answer
from volseg.inference.block_processor import native, take_patch
from volseg.inference.predictor import Predictor, fingerprint
from volseg.inference.worker import Worker
from volseg.intensity import Scaling
from volseg.models.bundle import load_networks
from volseg.models.manifest import BundleManifest
from volseg.planning.task import Task
from volseg.storage.ledger import Receipt

CPU = torch.device("cpu")


def threads_of_openmp() -> int:
    """Ask the OpenMP that torch uses how many threads a convolution of the calling thread would get."""
    libraries = set(re.findall(r"(/\S*lib(?:g|i)omp\S*)", Path("/proc/self/maps").read_text()))
    # Other packages may have brought one of their own.
    (library,) = [path for path in libraries if "torch" in path] or libraries
    return int(ctypes.CDLL(library).omp_get_max_threads())


def test_every_thread_of_a_worker_computes_with_one_thread() -> None:
    """OpenMP keeps the number for each calling thread, and blocks are processed in threads of their own."""

    class Processor:
        def process(self, task: Task, inbox: object) -> Answer:
            return Answer(task.index, Receipt(task.index, {}, {}, {"threads": threads_of_openmp()}))

        def cancel(self) -> None:
            pass

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        worker = object.__new__(Worker)
        worker._threads, worker._processor = 3, Processor()  # type: ignore[assignment]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(worker.attempt, [Task(0), Task(1)]))
        assert [a.receipt.stats["threads"] for a in found if isinstance(a, Answer) and a.receipt] == [1, 1]
        worker.close()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- predictor

PATCH = (8, 8, 8)


class Log(list[Tensor]):
    """Shared by the copies that a predictor makes of its network."""

    def __deepcopy__(self, memo: object) -> Log:
        return self


class Recording(nn.Module):
    """A network that answers with its input, one logit a class, and remembers what it was given."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.seen = Log()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return torch.cat([x[:, :1] * (c + 1) for c in range(self.classes)], dim=1)


def test_what_an_earlier_job_freed_does_not_raise_what_the_next_one_may_hold(case: Case, tmp_path: Path) -> None:
    words = [sys.executable, "-c", _TWO_JOBS, case.image, str(tmp_path / "out.zarr"), case.bundle]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    first, second = json.loads(done.stdout)
    assert second - first < FREED // 4


FREED = 400 << 20

_TWO_JOBS = f"""
import json, sys
import torch
from volseg.execution.output import create_output
from volseg.execution.prepare import local_cores, prepare
from volseg.inference.worker import Worker
from volseg.spec import SegmentSpec
spec = SegmentSpec.read(dict(zip(("input", "output", "model"), sys.argv[1:])) | {{"executor": "serial"}})
job = prepare(spec, local_cores(spec), "serial")
create_output(job)
first = Worker(job.spec, job.plan, job.bundle_digest)
large, small = torch.ones({FREED} // 4), torch.ones(100)
del large
second = Worker(job.spec, job.plan, job.bundle_digest, first)
print(json.dumps([worker._processor._heap for worker in (first, second)]))
"""


def manifest_of(tmp_path: Path, classes: int = 3, **more: Any) -> BundleManifest:
    return load_networks(make_bundle(tmp_path / "bundle", classes=classes, patch=PATCH, **more))[0]


def predictor_of(manifest: BundleManifest, *networks: nn.Module, batch: int = 1, mirror: bool = False) -> Predictor:
    return Predictor(manifest, networks, mirror=mirror, batch=batch, precision="fp32", device=CPU)


def answers(predictor: Predictor, patches: Iterable[Tensor], axis: str = "z") -> list[Tensor]:
    return list(predictor.run(patches, axis))


def raw(count: int, channels: int = 1, low: float = 0, high: float = 255) -> list[Tensor]:
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.uniform(low, high, (channels, *PATCH)).astype(np.float32)) for _ in range(count)]


def test_patches_are_scaled_as_the_bundle_says(tmp_path: Path) -> None:
    scaling = Scaling(low=(10, 0), high=(200, 90), mean=(100, 50), std=(30, 20))
    manifest, network = manifest_of(tmp_path, channels=2, scaling=scaling), Recording(3)
    patches = raw(1, channels=2)
    answers(predictor_of(manifest, network), patches)
    np.testing.assert_allclose(network.seen[0][0].numpy(), scaling.apply(patches[0].numpy()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.float16])
def test_raw_values_of_any_kind_and_any_view(tmp_path: Path, dtype: torch.dtype) -> None:
    manifest, network = manifest_of(tmp_path), Recording(3)
    volume = torch.arange(3 * 20 * 20 * 20).remainder(250).reshape(3, 20, 20, 20).to(dtype)
    view = volume[1:2, 3:19:2, 5:13, 7:15]
    answers(predictor_of(manifest, network), [view])
    expected = manifest.scaling.apply(view.to(torch.float32).numpy())
    np.testing.assert_allclose(network.seen[0][0].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(("batch", "count"), [(1, 3), (3, 3), (3, 4), (4, 1)])
def test_batches_have_one_size_and_every_patch_one_answer(tmp_path: Path, batch: int, count: int) -> None:
    manifest, network = manifest_of(tmp_path), Recording(3)
    predictor = predictor_of(manifest, network, batch=batch)
    patches = raw(count)
    found = answers(predictor, patches)
    assert len(found) == predictor.forwards == count
    assert {x.shape[0] for x in network.seen} == {batch}
    for patch, probability in zip(patches, found, strict=True):
        x = torch.from_numpy(manifest.scaling.apply(patch.numpy()))
        expected = torch.softmax(torch.cat([x, 2 * x, 3 * x]), dim=0)
        torch.testing.assert_close(probability, expected)


def test_a_twin_shares_the_networks_and_nothing_that_a_run_changes(tmp_path: Path) -> None:
    """Two threads of a process, one after the other at every patch; the twin is made of one that has run already."""
    manifest, network = manifest_of(tmp_path), Recording(3)
    one, patches = predictor_of(manifest, network, batch=2), raw(4)
    expected = answers(one, patches)
    two = one.twin()
    assert (two.forwards, two.seconds) == (0, 0)
    with torch.inference_mode():
        one._fill(patches[:2])
        two._fill(patches[2:])
        found = [one._answer(2), two._answer(2)]
    torch.testing.assert_close(torch.cat(found), torch.stack(expected), rtol=0, atol=0)
    answers(two, patches)
    assert (one.forwards, two.forwards) == (4, 4)


def test_two_classes_are_one_probability(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, classes=2)
    assert manifest.activation == "sigmoid"
    (patch,) = raw(1)
    predictor = predictor_of(manifest, Recording(1))
    (found,) = answers(predictor, [patch])
    assert (predictor.sums, found.shape) == (1, (1, *PATCH))
    torch.testing.assert_close(found, torch.sigmoid(torch.from_numpy(manifest.scaling.apply(patch.numpy()))))


def test_two_softmax_channels_are_one_probability_too(tmp_path: Path) -> None:
    two = manifest_of(tmp_path, classes=2).model_copy(update={"activation": "softmax", "threshold": None})
    (patch,) = raw(1)
    (found,) = answers(predictor_of(two, Recording(2)), [patch])
    x = torch.from_numpy(two.scaling.apply(patch.numpy()))
    torch.testing.assert_close(found, torch.softmax(torch.cat([x, 2 * x]), dim=0)[1:])


class Sick(Recording):
    """Answers NaN or Inf for patches whose middle is high."""

    def __init__(self, value: float) -> None:
        super().__init__(3)
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        found[x[:, 0, 4, 4, 4] > 1, 0, 0, 0, 0] = self.value
        return found


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_answer_that_is_no_number_is_refused(tmp_path: Path, value: float) -> None:
    predictor = predictor_of(manifest_of(tmp_path), Sick(value))
    well, ill = torch.full((1, *PATCH), 100.0), torch.full((1, *PATCH), 250.0)
    assert len(answers(predictor, [well])) == 1
    with pytest.raises(NonFiniteError, match="the network answered NaN or Inf"):
        answers(predictor, [ill])


def test_a_gpu_is_asked_once_at_the_end(tmp_path: Path) -> None:
    """Every question in between would make it wait; the block is refused all the same, and only that one."""
    predictor = predictor_of(manifest_of(tmp_path), Sick(float("nan")))
    predictor._ask_at_once = False
    well, ill = torch.full((1, *PATCH), 100.0), torch.full((1, *PATCH), 250.0)
    running = predictor.run([well, ill, well], "z")
    assert len([next(running) for _ in range(3)]) == 3
    with pytest.raises(NonFiniteError, match="the network answered NaN or Inf"):
        next(running)
    assert len(answers(predictor, [well])) == 1


@pytest.mark.parametrize("classes", [2, 300])
@pytest.mark.parametrize("kind", ["uint16", "float16", "bool"])
def test_nothing_but_that_question_leaves_the_device(
    tmp_path: Path, kind: str, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which has no values: whatever asked for one, or met a tensor on the CPU, would fail."""
    asked: list[torch.device] = []
    monkeypatch.setattr(Predictor, "_refuse_nonfinite", lambda self: asked.append(self._finite.device))
    manifest, networks = load_networks(
        make_bundle(tmp_path / "bundle", classes=classes, padded=False, patch=(22, 20, 24), members=2)
    )
    device, box = torch.device("meta"), Box.of((9, 7, 10))
    predictor = Predictor(manifest, networks, mirror=True, batch=2, precision="bf16", device=device)
    voxels = torch.from_numpy(native(np.zeros((1, *box.shape), kind))).to(device)
    lattice = PatchLattice(box.shape, (22, 20, 24), (3, 4, 4), manifest.margin)
    accumulator = Accumulator(box, [lattice], "gaussian", predictor.sums, device)
    indices = list(lattice.touching(box))
    patches = (take_patch(voxels, lattice.source(i), box) for i in indices)
    with torch.inference_mode():
        for index, probability in zip(indices, predictor.run(patches, "z"), strict=True):
            accumulator.add(index, probability)
        labels, probabilities = accumulator.labels(0.5), accumulator.probabilities()
    assert (labels.shape, probabilities.shape) == (box.shape, (classes, *box.shape))
    assert {labels.device, probabilities.device} == {device}
    assert asked == [device]


def test_what_an_ill_block_left_in_the_batch_does_not_make_the_next_one_ill(tmp_path: Path) -> None:
    predictor = predictor_of(manifest_of(tmp_path), Sick(float("nan")), batch=3)
    well, ill = torch.full((1, *PATCH), 100.0), torch.full((1, *PATCH), 250.0)
    with pytest.raises(NonFiniteError):
        answers(predictor, [well, well, ill])
    assert len(answers(predictor, [well])) == 1


class Uneven(nn.Module):
    """A network that is its own mirror image along no axis: logits grow along every axis, from the first class on."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        ramp = sum(torch.linspace(0, i + 1, x.shape[i]).view(-1, *[1] * (x.ndim - 1 - i)) for i in range(2, x.ndim))
        return torch.cat([x[:, :1] * ramp * self.factor * c for c in (1.0, -0.5, 0.25)], dim=1)


def test_mirror_images_are_averaged_in_probabilities(tmp_path: Path) -> None:
    manifest, network = manifest_of(tmp_path), Uneven()
    predictor = predictor_of(manifest, network, mirror=True, batch=2)
    patches = raw(3)
    found = answers(predictor, patches)
    assert predictor.forwards == 3 * 8
    for patch, probability in zip(patches, found, strict=True):
        x = torch.from_numpy(manifest.scaling.apply(patch.numpy()))[None]
        expected = torch.zeros((3, *PATCH), dtype=torch.float64)
        for flip in ((), (2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4)):
            expected += torch.softmax(network(x.flip(flip)).double(), dim=1).flip(flip)[0] / 8
        torch.testing.assert_close(probability.double(), expected, rtol=0, atol=1e-6)
        plain = torch.softmax(network(x), dim=1)[0].double()
        assert (plain - expected).abs().max() > 0.1


def test_members_are_averaged_in_probabilities_whatever_their_order(tmp_path: Path) -> None:
    manifest, networks = manifest_of(tmp_path), [Uneven(0.2), Uneven(1.0), Uneven(-2.0)]
    (patch,) = raw(1)
    predictor = predictor_of(manifest, *networks)
    (found,) = answers(predictor, [patch])
    assert predictor.forwards == 3
    x = torch.from_numpy(manifest.scaling.apply(patch.numpy()))[None]
    expected = torch.stack([torch.softmax(network(x).double(), dim=1)[0] for network in networks]).mean(dim=0)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(answers(predictor_of(manifest, *networks[::-1]), [patch])[0], found, rtol=0, atol=1e-6)
    logits = torch.stack([network(x)[0] for network in networks]).mean(dim=0)
    assert (torch.softmax(logits, dim=0).double() - expected).abs().max() > 0.05


def test_mirrored_members_are_all_counted(tmp_path: Path) -> None:
    predictor = predictor_of(manifest_of(tmp_path), Uneven(), Uneven(2.0), mirror=True)
    answers(predictor, raw(2))
    assert predictor.forwards == 2 * 2 * 8


def test_an_ill_member_is_found_among_well_ones(tmp_path: Path) -> None:
    predictor = predictor_of(manifest_of(tmp_path), Recording(3), Sick(float("nan")))
    with pytest.raises(NonFiniteError):
        answers(predictor, [torch.full((1, *PATCH), 250.0)])


def test_a_class_bias_is_added_to_the_logits(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path).model_copy(update={"class_bias": (0.5, -1.0, 2.0)})
    (patch,) = raw(1)
    (found,) = answers(predictor_of(manifest, Recording(3)), [patch])
    x = torch.from_numpy(manifest.scaling.apply(patch.numpy()))
    torch.testing.assert_close(found, torch.softmax(torch.cat([x + 0.5, 2 * x - 1, 3 * x + 2]), dim=0))

    pair = manifest_of(tmp_path / "pair", classes=2, sigmoid=False).model_copy(update={"class_bias": (0.5, -1.0)})
    (found,) = answers(predictor_of(pair, Recording(2)), [patch])
    torch.testing.assert_close(found, torch.softmax(torch.cat([x + 0.5, 2 * x - 1]), dim=0)[1:])


@pytest.mark.parametrize("axis", ["z", "y", "x"])
def test_a_2d_network_sees_slices_along_any_axis(tmp_path: Path, axis: str) -> None:
    """One predictor serves all axes, with mirrors in the plane only."""
    bundle = make_bundle(tmp_path / "flat", dims=2, patch=(1, 8, 8))
    manifest, network = load_networks(bundle)[0], Recording(3)
    predictor = predictor_of(manifest, network, mirror=True)
    volume = torch.from_numpy(np.random.default_rng(1).uniform(0, 255, (1, 8, 6, 4)).astype(np.float32))
    flat = "zyx".index(axis)
    slices = [volume.narrow(flat + 1, i, 1) for i in range(volume.shape[flat + 1])]
    found = answers(predictor, slices, axis)
    assert predictor.forwards == 4 * len(slices)
    assert {x.shape for x in network.seen} == {(1, 1, *(s for i, s in enumerate((8, 6, 4)) if i != flat))}
    x = torch.from_numpy(manifest.scaling.apply(volume.numpy()))
    expected = torch.softmax(torch.cat([x, 2 * x, 3 * x]), dim=0)
    torch.testing.assert_close(torch.cat(found, dim=flat + 1), expected)


def test_patches_are_taken_one_batch_at_a_time(tmp_path: Path) -> None:
    """Patches beyond the volume are copies: a block's worth of them must not lie about at once."""
    taken: list[int] = []

    def patches() -> Iterable[Tensor]:
        for number, patch in enumerate(raw(6)):
            taken.append(number)
            yield patch

    running = predictor_of(manifest_of(tmp_path), Recording(3), batch=2).run(patches(), "z")
    next(running)
    assert taken == [0, 1]


def test_a_fingerprint_names_what_the_numerics_depend_on() -> None:
    first, second = fingerprint("cpu"), fingerprint("cpu")
    assert first == second
    assert {"device", "torch", "chip", "instructions", "name"} <= set(first)
    assert re.fullmatch(r"[0-9a-f]{12}", first["name"])
