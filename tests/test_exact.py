"""Exact mode: equal to one forward over the whole volume, and the same bits whoever computes which tiles."""

from __future__ import annotations

from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn

from tests.support import Case, labels_of, long, make_bundle, probabilities_of, segment, smooth, store
from volseg import api
from volseg.cluster.submission import identify
from volseg.errors import InputError, VerifyError
from volseg.execution.prepare import Cores, prepare
from volseg.geometry import AXES, BlockSet, Box, Triple
from volseg.inference.block_processor import take_patch
from volseg.inference.predictor import Predictor
from volseg.intensity import Scaling
from volseg.models.bundle import load_networks
from volseg.models.fold import for_inference, memory_format
from volseg.models.foreign import ForeignNetwork, import_network
from volseg.models.measure import complete
from volseg.models.network import TracedConfig
from volseg.models.registry import Architecture, build, make_config
from volseg.planning import exact
from volseg.planning.memory import GIB
from volseg.spec import SegmentSpec

CPU = torch.device("cpu")
TOLERANCE = 1e-5


def whole_forward(bundle: str, data: NDArray[Any], *, mirror: bool = False, axes: str | None = None) -> NDArray[Any]:
    """Return probabilities (sums, z, y, x) of one forward over the whole volume (c, z, y, x), made with numpy's pads.

    Below and above it is continued by the margin, above also to the next side that the network takes.
    """
    manifest, networks = load_networks(bundle)
    config, scaling = manifest.config, manifest.scaling
    columns = [np.array(c, np.float32).reshape(-1, 1, 1, 1) for c in (scaling.low, scaling.high, scaling.mean)]
    scaled = (np.clip(data.astype(np.float32), columns[0], columns[1]) - columns[2]) / np.reshape(
        scaling.std, (-1, 1, 1, 1)
    )
    found = []
    for axis in axes or (manifest.axis if config.dims == 2 else "z"):
        order = (0, *(i + 1 for i in _turned(axis))) if config.dims == 2 else (0, 1, 2, 3)
        x = np.transpose(scaled, order)
        depth, *rest = x.shape[1:]
        sides: Triple = (1, rest[0], rest[1]) if config.dims == 2 else (depth, rest[0], rest[1])
        with_margin = tuple(n + 2 * m for n, m in zip(sides, config.margin, strict=True))
        fitted = config.fit((with_margin[0], with_margin[1], with_margin[2]), up=True)
        pads = [(m, f - n - m) for n, m, f in zip(sides, config.margin, fitted, strict=True)]
        tensor = torch.from_numpy(np.pad(x, [(0, 0), *pads], mode="edge").astype(np.float32))
        batch = tensor.transpose(0, 1) if config.dims == 2 else tensor[None]
        spatial = range(2, batch.ndim)
        flips = [f for n in range(len(spatial) + 1 if mirror else 1) for f in combinations(spatial, n)]
        mean = torch.stack([_probabilities(manifest, net, batch, flip) for net in networks for flip in flips]).mean(0)
        mean = mean.transpose(0, 1) if config.dims == 2 else mean[0]
        cut = mean[:, :depth, : rest[0], : rest[1]].numpy()
        found.append(np.transpose(cut, np.argsort(order)))
    return np.asarray(np.mean(found, axis=0))


def _turned(axis: str) -> tuple[int, ...]:
    i = AXES.index(axis)
    return (i, *(j for j in range(3) if j != i))


@torch.inference_mode()
def _probabilities(manifest: Any, net: torch.nn.Module, batch: torch.Tensor, flip: tuple[int, ...]) -> torch.Tensor:
    ready = for_inference(net)
    logits = ready(batch.flip(flip).contiguous(memory_format=memory_format(net))).flip(flip)
    if manifest.activation == "sigmoid":
        return torch.sigmoid(logits)
    both = torch.softmax(logits, dim=1)
    return both[:, 1:] if len(manifest.classes) == 2 else both


def by_tiles(bundle: str, image: str, data: NDArray[Any], **options: Any) -> tuple[NDArray[Any], Any]:
    """Return what the tiles of a planned job answer, put together in float32, and the plan."""
    values = {"input": image, "output": f"{image}.out", "model": bundle, "blend": "exact", **options}
    job = prepare(SegmentSpec.read(values), Cores(1, 0, "cpu", 1, 4 * GIB), "serial")
    manifest, networks = load_networks(bundle)
    predictor = Predictor(
        manifest, networks, mirror=job.spec.mirror, batch=job.plan.batch, precision="fp32", device=CPU
    )  # fmt: skip
    voxels, whole = torch.from_numpy(data), Box.of(job.plan.shape)
    total = np.zeros((predictor.sums, *job.plan.shape), np.float32)
    for view in job.plan.views:
        seen = np.zeros(job.plan.shape, int)
        for index in view.lattice.touching(whole):
            source, box = view.lattice.source(index), view.lattice.box(index)
            (answer,) = predictor.run([take_patch(voxels, source, whole)], view.axis)
            total[(slice(None), *box.slices)] += answer[(slice(None), *view.lattice.kept(index))].numpy()
            seen[box.slices] += 1
        assert (seen == 1).all()
    return total / len(job.plan.views), job.plan


def check(folder: Path, shape: Triple, tile: str | None, **network: Any) -> None:
    """Compare tiles with the whole forward for a bundle of `network` and a volume of `shape`."""
    options: dict[str, Any] = {name: network.pop(name) for name in ("mirror", "axis_option") if name in network}
    bundle = make_bundle(folder / "unet", **network)
    channels = network.get("channels", 1)
    data = np.stack([smooth(shape, seed=c) for c in range(channels)]).astype(np.uint8)
    image = store(folder / "image.zarr", data if channels > 1 else data[0])
    axes = options.pop("axis_option", None)
    asked: dict[str, Any] = {
        **options,
        **({"tile": tile} if tile else {}),
        **({"axis": ",".join(axes)} if axes else {}),
    }
    found, plan = by_tiles(bundle, image, data, **asked)
    expected = whole_forward(bundle, data, mirror=options.get("mirror", False), axes=axes)
    assert tile is None or plan.patches > 1, "one tile compares nothing"
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    assert expected.std() > 0.01


DEEP = {"widths": (3, 4, 5)}


FLAT: dict[str, Any] = {"dims": 2, "patch": (1, 16, 16)}
FCN: dict[str, Any] = {"architecture": "fcn8", "widths": (3, 3, 4, 4, 4), "dims": 2, "patch": (1, 32, 32)}
UNPADDED: dict[str, Any] = {"dims": 2, "padded": False}


@pytest.mark.parametrize(
    ("shape", "tile", "network"),
    [
        ((3, 61, 83), "1,16,16", {**FLAT, **DEEP}),
        ((2, 70, 90), "1,24,31", {**FLAT, **DEEP, "up": "nearest"}),
        ((2, 70, 90), "1,7,64", {**FLAT, **DEEP, "up_kernel": 3}),
        ((2, 70, 90), "1,16,16", {**FLAT, **DEEP, "up_kernel": 4}),
        ((2, 70, 90), "1,20,20", {**UNPADDED, **DEEP, "patch": (1, 60, 60)}),
        ((2, 70, 90), "1,13,20", {**UNPADDED, "patch": (1, 28, 28), "widths": (3, 4), "up_kernel": 3}),
        ((2, 70, 90), "1,12,12", {**DEEP, "dims": 2, "patch": (1, 12, 12), "pools": ((1, 3, 2), (1, 2, 3))}),
        ((2, 50, 60), "1,16,16", {**FLAT, **DEEP, "residual": True}),
        ((2, 50, 60), "1,16,16", {**FLAT, **DEEP, "stem": True}),
        ((1, 130, 150), "1,32,64", {**FLAT, "widths": (3, 3, 4, 4, 5), "convs_per_level": 1}),
        ((1, 260, 270), "1,64,64", FCN),
        ((1, 140, 90), "1,32,32", {**FLAT, "architecture": "inception_unet", "widths": (4, 8)}),
        ((1, 90, 70), "1,16,16", {**FLAT, "architecture": "vgg_classifier", "widths": (4, 4, 4)}),
        ((40, 3, 50), "16,1,16", {"dims": 2, "patch": (16, 1, 16), "axis": "y", "widths": (3, 4), "channels": 2}),
        ((37, 41, 29), "8,12,16", {"widths": (3, 4)}),
        ((50, 45, 40), "16,16,16", {**DEEP, "convs_per_level": 1, "up": "nearest", "classes": 2}),
        ((25, 26, 27), "6,8,10", {"widths": (3, 4), "padded": False, "patch": (28, 28, 28)}),
        ((1, 40, 50), "4,16,16", {"widths": (3, 4)}),
        ((50, 1, 1), "16,16,16", {"widths": (3, 4)}),
        ((5, 50, 70), "1,16,16", {**FLAT, **DEEP, "up_kernel": 3, "mirror": True, "members": 2}),
        ((20, 21, 22), "8,8,8", {"widths": (3, 4), "mirror": True, "up_kernel": 3}),
        ((33, 35, 37), "12,16,12", {**FLAT, "widths": (3, 4), "axis_option": "zyx"}),
        ((2, 33, 5), None, {**FLAT, **DEEP}),
        ((3, 4, 5), None, {**DEEP}),
    ],
    ids=str,
)
def test_tiles_are_the_whole_forward(tmp_path: Path, shape: Triple, tile: str | None, network: dict[str, Any]) -> None:
    check(tmp_path, shape, tile, **network)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_any_tile_of_any_volume(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    sides = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 60), st.integers(1, 60)))
    tile = data.draw(st.tuples(st.just(1), st.integers(3, 40), st.integers(3, 40)))
    network = data.draw(st.sampled_from([
        {**FLAT, "widths": (3, 4, 4)}, {**FLAT, "widths": (3, 4), "up_kernel": 5},
        {**UNPADDED, "widths": (3, 4), "patch": (1, 28, 28), "up": "nearest"},
    ]))  # fmt: skip
    folder = tmp_path_factory.mktemp("any")
    bundle = make_bundle(folder / "unet", **network)
    values = smooth(sides).astype(np.uint8)
    image = store(folder / "image.zarr", values)
    found, _ = by_tiles(bundle, image, values[None], tile=",".join(map(str, tile)))
    np.testing.assert_allclose(found, whole_forward(bundle, values[None]), rtol=0, atol=TOLERANCE)


# ---------------------------------------------------------------- jobs


EXACT: dict[str, Any] = {"blend": "exact", "tile": "16,16,16", "probabilities": True}
Bits = tuple[NDArray[Any], NDArray[np.uint8]]


def bits(case: Case, output: Path, **options: Any) -> Bits:
    report = segment(case, output, **{**EXACT, **options})
    assert report["status"] == "complete"
    return labels_of(output), probabilities_of(output)


def assert_same(a: Bits, b: Bits) -> None:
    for first, second in zip(a, b, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.fixture(scope="module")
def reference(case: Case) -> Bits:
    """One block for all tiles."""
    return bits(case, case.folder / "exact-whole.zarr", block="48,48,64")


def test_a_job_gives_the_labels_and_probabilities_of_the_whole_forward(case: Case, reference: Bits) -> None:
    labels, probabilities = reference
    assert set(np.unique(labels)) == {0, 1, 2}
    data = zarr.open_array(case.image, mode="r")[...]
    expected = whole_forward(case.bundle, np.asarray(data)[None])
    assert np.abs(probabilities / 255 - expected).max() <= 0.5 / 255 + TOLERANCE
    best = np.sort(expected, axis=0)
    sure = best[-1] - best[-2] > 2 * TOLERANCE
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(labels[sure], expected.argmax(axis=0)[sure])


@pytest.mark.parametrize("block", ["16,16,16", "32,16,48", "16,64,32"])
def test_blocks_do_not_matter(case: Case, reference: Bits, tmp_path: Path, block: str) -> None:
    assert_same(bits(case, tmp_path / "out.zarr", block=block), reference)


@pytest.mark.ray
@pytest.mark.parametrize(("workers", "block"), [long(2, "16,32,32"), (3, "32,16,16")])
@pytest.mark.usefixtures("one_ray")
def test_workers_do_not_matter(case: Case, reference: Bits, tmp_path: Path, workers: int, block: str) -> None:
    assert_same(bits(case, tmp_path / "out.zarr", executor="ray", workers=workers, block=block), reference)


def test_a_batch_of_windows_of_several_shapes(case: Case, reference: Bits, tmp_path: Path) -> None:
    """They are never put together; another batch is other numerics, so the last bits may differ."""
    _, probabilities = bits(case, tmp_path / "out.zarr", batch=3)
    assert np.abs(probabilities.astype(int) - reference[1]).max() <= 1


def test_reduced_precision_is_guarded_by_windows_of_several_shapes(flat_case: Case, tmp_path: Path) -> None:
    options: dict[str, Any] = {"blend": "exact", "tile": "1,8,8", "roi": "0:3,:,:", "batch": 2}
    report = segment(flat_case, tmp_path / "out.zarr", precision="auto", **options)
    assert report["status"] == "complete"
    full = segment(flat_case, tmp_path / "full.zarr", **options)
    assert full["forwards"] == report["forwards"]
    assert (labels_of(tmp_path / "out.zarr") != labels_of(tmp_path / "full.zarr")).mean() < 0.001


def test_a_region_holds_the_bits_of_the_whole(case: Case, reference: Bits, tmp_path: Path) -> None:
    region = Box((5, 17, 3), (30, 33, 47))
    found = bits(case, tmp_path / "out.zarr", roi=str(region), block="16,16,32")
    for part, whole in zip(found, reference, strict=True):
        np.testing.assert_array_equal(part[(..., *region.slices)], whole[(..., *region.slices)])


def test_every_tile_is_computed_once(case: Case, tmp_path: Path) -> None:
    report = segment(case, tmp_path / "out.zarr", **EXACT, block="16,32,16")
    assert report["forwards"] == report["patches"] == 3 * 3 * 4


def test_a_stopped_job_goes_on_with_its_tile_whatever_memory_there_is_now(
    flat_case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"blend": "exact", "block": "1,26,22", "probabilities": True}
    segment(flat_case, tmp_path / "a.zarr", **options)
    output = tmp_path / "b.zarr"
    monkeypatch.setattr(BlockSet, "missing", lambda done, count: iter(range(5)))
    with pytest.raises(VerifyError):
        segment(flat_case, output, **options)
    monkeypatch.undo()
    monkeypatch.setattr(exact, "_PARTS", (3,))
    other = api.plan(flat_case.image, str(tmp_path / "c.zarr"), model=flat_case.bundle, blend="exact")
    planned = api.plan(flat_case.image, str(output), model=flat_case.bundle, **options)
    assert planned["tile"] == (1, 26, 22) != other["tile"]
    report = segment(flat_case, output, **options)
    assert report["blocks"] == {"total": 13, "computed": 8, "resumed": 5, "failed": 0}
    np.testing.assert_array_equal(probabilities_of(output), probabilities_of(tmp_path / "a.zarr"))


def test_another_tile_is_another_job(flat_case: Case, tmp_path: Path) -> None:
    options: dict[str, Any] = {"blend": "exact", "executor": "serial"}
    keys = {
        api.plan(flat_case.image, str(tmp_path / "o"), model=flat_case.bundle, **options, **more)["job_key"]
        for more in ({}, {"tile": "1,26,22"}, {"tile": "1,16,32"}, {"tile": "1,16,32", "block": "2,32,32"})
    }
    assert len(keys) == 2


def test_what_is_submitted_names_its_tile(flat_case: Case, tmp_path: Path) -> None:
    spec = SegmentSpec.read(
        {"input": flat_case.image, "output": str(tmp_path / "o"), "model": flat_case.bundle, "blend": "exact"}
    )
    submitted = identify(spec).spec
    assert isinstance(submitted, SegmentSpec)
    assert submitted.tile == (1, 26, 22)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blend": "exact", "patch": "1,16,16"}, r"patch \(1, 16, 16\) was given, but blend exact has no patches"),
        ({"blend": "exact", "overlap": 0}, "overlap 0.0 was given, but blend exact has no patches"),
        ({"tile": "1,16,16"}, "tile 1,16,16 belongs to blend exact, and blend is gaussian: say"),
        ({"blend": "exact", "tile": "4,16,16"}, "is 4 deep on axis z, but a 2D network takes single slices along it"),
        (
            {"blend": "exact", "tile": "1,8,8", "block": "2,8,12"},
            "block side 12 on axis x is no multiple of tile side 8",
        ),
        ({"blend": "exact", "tile": "1,0,8"}, "every side must be at least 1 voxel"),
        ({"blend": "exact", "memory": 0.28}, r"too small for one tile of exact mode: at least 0\.[0-9]+ GiB a worker"),
    ],
    ids=str,
)
def test_what_cannot_be_exact_is_refused(
    flat_case: Case, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        segment(flat_case, tmp_path / "out.zarr", **options)
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_a_network_that_normalises_over_the_patch_is_refused_by_the_name_of_its_layer(
    case: Case, tmp_path: Path, norm: str
) -> None:
    bundle = make_bundle(tmp_path / "unet", norm=norm)
    with pytest.raises(InputError, match=r"its layer encoder\.0\.0 and 5 more normalises over the whole patch"):
        segment(Case(case.image, bundle, tmp_path), tmp_path / "out.zarr", blend="exact")
    planned = api.plan(case.image, str(tmp_path / "out.zarr"), model=bundle, executor="serial")
    assert "encoder.0.0" in planned["compared"]["exact"]["why"]
    assert planned["compared"]["advice"] == "blend: exact mode is not possible here"


# ---------------------------------------------------------------- networks of others


class OwnConfig(TracedConfig):
    """Arguments of the plug-in of these tests."""

    norm: bool = False


class Own(nn.Module):
    """A user's own network: strided, and it repeats voxels."""

    def __init__(self, config: OwnConfig) -> None:
        super().__init__()
        self.down = nn.Conv2d(config.in_channels, 4, 3, stride=2, padding=1)
        self.norm = nn.InstanceNorm2d(4) if config.norm else nn.Identity()
        self.up = nn.ConvTranspose2d(4, config.out_channels, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.up(torch.relu(self.norm(self.down(x))))
        return logits


OWN = Architecture(OwnConfig, Own)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [metadata.EntryPoint("own", f"{__name__}:OWN", "volseg.networks")]
    monkeypatch.setattr(metadata, "entry_points", lambda **wanted: metadata.EntryPoints(points).select(**wanted))


def own_bundle(folder: Path, **arguments: Any) -> str:
    torch.manual_seed(0)
    config = complete("own", make_config("own", {"dims": 2, "in_channels": 1, "out_channels": 2, **arguments}))
    (folder / "w.safetensors").write_bytes(save(build("own", config).state_dict()))
    given = ForeignNetwork(
        architecture="own", weights=(str(folder / "w.safetensors"),), classes=("a", "b"), patch=(1, 16, 16),
        arguments={"dims": 2, **arguments}, scaling=Scaling(low=(0,), high=(255,), mean=(120,), std=(50,)),
    )  # fmt: skip
    import_network(str(folder / "own"), given)
    return str(folder / "own")


@pytest.mark.usefixtures("own")
def test_a_network_of_unknown_layers_is_exact_where_that_is_proven(tmp_path: Path) -> None:
    bundle, data = own_bundle(tmp_path), smooth((2, 45, 50)).astype(np.uint8)
    image = store(tmp_path / "image.zarr", data)
    found, plan = by_tiles(bundle, image, data[None], tile="1,8,10")
    assert plan.summary()["views"][0]["halo_before"] == (0, 2, 2)
    np.testing.assert_allclose(found, whole_forward(bundle, data[None]), rtol=0, atol=TOLERANCE)
    planned = api.plan(image, str(tmp_path / "out.zarr"), model=bundle, executor="serial")
    assert "measured only when --blend exact asks" in planned["compared"]["exact"]["why"]


@pytest.mark.usefixtures("own")
def test_a_network_of_unknown_layers_that_needs_the_whole_patch_is_refused(tmp_path: Path) -> None:
    case = Case(store(tmp_path / "image.zarr", smooth((2, 45, 50))), own_bundle(tmp_path, norm=True), tmp_path)
    with pytest.raises(InputError, match=r"its layer norm \(InstanceNorm2d\) takes statistics of the whole patch"):
        segment(case, tmp_path / "out.zarr", blend="exact")
