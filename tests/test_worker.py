"""One worker's process: how many threads compute, and what a predictor does to a patch."""

from __future__ import annotations

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support import make_bundle
from volseg.errors import NonFiniteError
from volseg.inference.predictor import Predictor, fingerprint
from volseg.inference.worker import Worker
from volseg.intensity import Scaling
from volseg.models.bundle import load_network
from volseg.models.manifest import BundleManifest
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
        def process(self, index: int) -> Receipt:
            return Receipt(index, {}, {}, {"threads": threads_of_openmp()})

        def cancel(self) -> None:
            pass

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        worker = object.__new__(Worker)
        worker._threads, worker._processor = 3, Processor()  # type: ignore[assignment]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(worker.attempt, range(2)))
        assert [r.stats["threads"] for r in found if isinstance(r, Receipt)] == [1, 1]
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


def manifest_of(tmp_path: Path, classes: int = 3, **more: Any) -> BundleManifest:
    return load_network(make_bundle(tmp_path / "bundle", classes=classes, patch=PATCH, **more))[0]


def predictor_of(manifest: BundleManifest, network: nn.Module, batch: int = 1, **more: Any) -> Predictor:
    return Predictor(manifest, network, PATCH, axis="z", batch=batch, precision="fp32", device=CPU, **more)


def raw(count: int, channels: int = 1, low: float = 0, high: float = 255) -> list[Tensor]:
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.uniform(low, high, (channels, *PATCH)).astype(np.float32)) for _ in range(count)]


def test_patches_are_scaled_as_the_bundle_says(tmp_path: Path) -> None:
    scaling = Scaling(low=(10, 0), high=(200, 90), mean=(100, 50), std=(30, 20))
    manifest, network = manifest_of(tmp_path, channels=2, scaling=scaling), Recording(3)
    patches = raw(1, channels=2)
    list(predictor_of(manifest, network).run(patches))
    np.testing.assert_allclose(network.seen[0][0].numpy(), scaling.apply(patches[0].numpy()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32, torch.float16])
def test_raw_values_of_any_kind_and_any_view(tmp_path: Path, dtype: torch.dtype) -> None:
    manifest, network = manifest_of(tmp_path), Recording(3)
    volume = torch.arange(3 * 20 * 20 * 20).remainder(250).reshape(3, 20, 20, 20).to(dtype)
    view = volume[1:2, 3:19:2, 5:13, 7:15]
    list(predictor_of(manifest, network).run([view]))
    expected = manifest.scaling.apply(view.to(torch.float32).numpy())
    np.testing.assert_allclose(network.seen[0][0].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize(("batch", "count"), [(1, 3), (3, 3), (3, 4), (4, 1)])
def test_batches_have_one_size_and_every_patch_one_answer(tmp_path: Path, batch: int, count: int) -> None:
    manifest, network = manifest_of(tmp_path), Recording(3)
    predictor = predictor_of(manifest, network, batch)
    patches = raw(count)
    found = list(predictor.run(patches))
    assert len(found) == predictor.forwards == count
    assert {x.shape[0] for x in network.seen} == {batch}
    for patch, probability in zip(patches, found, strict=True):
        x = torch.from_numpy(manifest.scaling.apply(patch.numpy()))
        expected = torch.softmax(torch.cat([x, 2 * x, 3 * x]), dim=0)
        torch.testing.assert_close(probability, expected)


def test_two_classes_are_one_probability(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, classes=2)
    assert manifest.activation == "sigmoid"
    (patch,) = raw(1)
    predictor = predictor_of(manifest, Recording(1))
    (found,) = predictor.run([patch])
    assert (predictor.sums, found.shape) == (1, (1, *PATCH))
    torch.testing.assert_close(found, torch.sigmoid(torch.from_numpy(manifest.scaling.apply(patch.numpy()))))


def test_two_softmax_channels_are_one_probability_too(tmp_path: Path) -> None:
    two = manifest_of(tmp_path, classes=2).model_copy(update={"activation": "softmax", "threshold": None})
    (patch,) = raw(1)
    (found,) = predictor_of(two, Recording(2)).run([patch])
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
    assert len(list(predictor.run([well]))) == 1
    with pytest.raises(NonFiniteError, match="the network answered NaN or Inf"):
        list(predictor.run([ill]))


def test_what_an_ill_block_left_in_the_batch_does_not_make_the_next_one_ill(tmp_path: Path) -> None:
    predictor = predictor_of(manifest_of(tmp_path), Sick(float("nan")), batch=3)
    well, ill = torch.full((1, *PATCH), 100.0), torch.full((1, *PATCH), 250.0)
    with pytest.raises(NonFiniteError):
        list(predictor.run([well, well, ill]))
    assert len(list(predictor.run([well]))) == 1


def test_a_fingerprint_names_what_the_numerics_depend_on() -> None:
    first, second = fingerprint("cpu"), fingerprint("cpu")
    assert first == second
    assert {"device", "torch", "chip", "instructions", "name"} <= set(first)
    assert re.fullmatch(r"[0-9a-f]{12}", first["name"])
