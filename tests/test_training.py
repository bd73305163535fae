"""Training: it learns, resumes, stops and refuses; and each part does what it says."""

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.support import process, run, store, wait_until
from volseg.errors import (
    InputError,
    JobError,
    JobInterrupted,
    OutputExistsError,
    PlanError,
    SpecError,
    VolumeError,
)
from volseg.geometry import Box, Triple
from volseg.intensity import Scaling
from volseg.models.bundle import load_network, read_manifest
from volseg.models.config import Axis, to_network
from volseg.spec import TrainSpec
from volseg.storage.volume import open_volume
from volseg.training import loop
from volseg.training.augment import Augmentation, change_intensity
from volseg.training.average import WeightAverage
from volseg.training.checkpoint import Workplace
from volseg.training.greys import measure_greys
from volseg.training.index import build_index
from volseg.training.losses import sigmoid_loss, softmax_loss
from volseg.training.metrics import ClassCounts, ProbabilityCounts
from volseg.training.planning import TrainPlan, augmentation_for, make_plan
from volseg.training.progress import TrainProgress
from volseg.training.replicas import Gradients
from volseg.training.sampler import IGNORED, Prefetcher, Region, Sampler
from volseg.training.schedule import learning_rate, progress_of
from volseg.training.train import train
from volseg.training.validate import Validator, spread, windows
from volseg.training.view import NetworkView

SHAPE = (12, 48, 40)


def scene(shape: Triple = SHAPE, classes: int = 2, seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return an image (z, y, x) of bright cuboids on noise, and its labels."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    for _ in range(60):
        z, y, x = (int(rng.integers(0, max(1, n - 4))) for n in shape)
        labels[z : z + 4, y : y + 8, x : x + 8] = rng.integers(1, classes)
    image = 60 + 60 * labels.astype(np.float64) + rng.normal(0, 20, shape)
    return image.clip(0, 255).astype(np.uint8), labels


def volumes(folder: Path, classes: int = 2, **changes: Any) -> dict[str, str]:
    image, labels = scene(classes=classes)
    image, labels = changes.get("image", image), changes.get("labels", labels)
    return {"image": store(folder / "image.zarr", image, None), "labels": store(folder / "labels.zarr", labels, None)}


def spec_for(folder: Path, data: dict[str, str], **options: Any) -> TrainSpec:
    values: dict[str, Any] = {
        "out": str(folder / "bundle"), "dims": 2, "train_roi": "0:8,:,:", "val_roi": "9:12,:,:", "widths": (8, 16),
        "patch": (1, 32, 32), "batch": 4, "max_steps": 40, "workers": 2, "precision": "fp32",
    }  # fmt: skip
    return TrainSpec.read(values | data | options)


# ---------------------------------------------------------------- the whole of it


@pytest.mark.parametrize(
    ("classes", "options"),
    [
        (2, {}),
        (2, {"axis": "x", "train_roi": ":,:,0:30", "val_roi": ":,:,30:40", "patch": (16, 32, 1), "precision": "bf16"}),
        (3, {"dims": 3, "patch": (8, 24, 24), "pools": "1,2,2", "residual": True, "max_steps": 80}),
    ],
)
def test_it_learns_and_writes_a_bundle(tmp_path: Path, classes: int, options: dict[str, Any]) -> None:
    spec = spec_for(tmp_path, volumes(tmp_path, classes), **options)
    told: list[TrainProgress] = []
    notes: list[str] = []
    threads = torch.get_num_threads()
    result = train(spec, told.append, notes.append)
    assert torch.get_num_threads() == threads
    assert result.mean_foreground_dice is not None
    assert result.mean_foreground_dice > (0.8 if classes == 2 else 0.7)
    assert result.steps == spec.max_steps == told[-1].step
    assert told[-1].learning_rate < spec.learning_rate / 100
    manifest, network = load_network(spec.out)
    assert manifest.digest == result.digest
    assert manifest.patch == spec.patch
    assert manifest.axis == spec.axis
    assert manifest.activation == ("sigmoid" if classes == 2 else "softmax")
    assert manifest.threshold == result.threshold
    assert manifest.provenance["spec"]["seed"] == 0
    assert all(bool(torch.isfinite(t).all()) for t in network.state_dict().values())
    rows = [json.loads(line) for line in (tmp_path / "bundle" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == spec.max_steps
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert max(r["val_dice"] or 0.0 for r in rows if "val_dice" in r) > 0.7
    assert (tmp_path / "bundle" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not Path(spec.out + ".training").exists()
    assert any("U-Net" in note for note in notes)


def test_sparse_labels_are_enough(tmp_path: Path) -> None:
    image, labels = scene()
    sparse = np.full_like(labels, 255)
    sparse[2], sparse[6] = labels[2], labels[6]
    sparse[9:] = labels[9:]
    result = train(spec_for(tmp_path, volumes(tmp_path, image=image, labels=sparse)))
    assert result.mean_foreground_dice is not None
    assert result.mean_foreground_dice > 0.8


def test_without_a_validation_region_the_last_weights_are_kept_and_it_says_so(tmp_path: Path) -> None:
    notes: list[str] = []
    spec = spec_for(tmp_path, volumes(tmp_path), val_roi=None, max_steps=3, augment=False)
    result = train(spec, note=notes.append)
    assert result.dice is None
    assert result.threshold == 0.5
    assert "no validation region" in result.weights
    assert any("no validation region" in note for note in notes)


def test_minutes_limit_a_training(tmp_path: Path) -> None:
    told: list[TrainProgress] = []
    spec = spec_for(tmp_path, volumes(tmp_path), max_minutes=0.03, max_steps=10**6)
    result = train(spec, told.append)
    assert 0 < result.steps < 10**6
    assert told[-2].learning_rate < spec.learning_rate / 10, "the learning rate has come down by then"


def weights(spec: TrainSpec) -> dict[str, Tensor]:
    return dict(load_network(spec.out)[1].state_dict())


def test_an_interrupted_training_ends_with_the_weights_of_an_undisturbed_one(tmp_path: Path) -> None:
    data = volumes(tmp_path)
    options: dict[str, Any] = {"max_steps": 14}
    whole = spec_for(tmp_path, data, **options)
    train(whole)
    broken = spec_for(tmp_path, data, out=str(tmp_path / "broken"), **options)

    def stop(now: TrainProgress) -> None:
        if now.step >= 5:
            raise KeyboardInterrupt

    with pytest.raises(JobInterrupted, match=r"stopped at step \d+ .*the same command goes on"):
        train(broken, stop)
    assert not Path(broken.out).exists()
    notes: list[str] = []
    result = train(broken, note=notes.append)
    assert 5 <= result.resumed_from < 14
    assert any("going on from step" in note for note in notes)
    expected, found = weights(whole), weights(broken)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_other_options_do_not_resume(tmp_path: Path) -> None:
    data = volumes(tmp_path)

    def stop(now: TrainProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(JobInterrupted):
        train(spec_for(tmp_path, data), stop)
    with pytest.raises(SpecError, match="seed: 0 there, 7 now"):
        train(spec_for(tmp_path, data, seed=7))
    result = train(spec_for(tmp_path, data, seed=7, resume=False, max_steps=2))
    assert result.resumed_from == 0


@pytest.mark.slow
def test_a_killed_training_goes_on(tmp_path: Path) -> None:
    data = volumes(tmp_path)
    out = tmp_path / "bundle"
    words = [
        "train", "--image", data["image"], "--labels", data["labels"], "--dims", 2, "--train-roi", "0:8,:,:",
        "--val-roi", "9:12,:,:", "--widths", "4,8", "--patch", "1,16,16", "--out", out,
    ]  # fmt: skip
    with process(*words, "--max-steps", 2000) as started:
        wait_until((Path(f"{out}.training") / "checkpoint.pt").exists, started)
        started.send_signal(signal.SIGKILL)
        started.wait()
    assert not out.exists()
    stored = Workplace.beside(str(out)).load()
    assert stored is not None
    assert stored["step"] > 0
    done = run(*words, "--max-steps", stored["step"] + 3, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["resumed_from"] == stored["step"]
    assert result["steps"] == stored["step"] + 3
    assert result["seconds"] > stored["seconds"]


def test_a_loss_that_is_no_number_stops_the_training_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_for(tmp_path, volumes(tmp_path), workers=1)
    calls = []

    def poisoned(logits: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        return sigmoid_loss(logits, labels) * (float("nan") if len(calls) == 20 else 1.0)

    monkeypatch.setattr(loop, "sigmoid_loss", poisoned)
    with pytest.raises(JobError, match=r"the loss or its gradient is nan at step 20: .*--learning-rate below 0.002"):
        train(spec)
    assert not Path(spec.out).exists()
    stored = Workplace.beside(spec.out).load()
    assert stored is not None
    assert 0 < stored["step"] < 20
    assert all(bool(torch.isfinite(t).all()) for t in stored["network"].values())
    monkeypatch.undo()
    assert (
        train(spec_for(tmp_path, {"image": spec.image, "labels": spec.labels}, workers=1, learning_rate=1e-4)).steps
        == 40
    )


# ---------------------------------------------------------------- what is refused

IMAGE, LABELS = scene()
NAN = np.where(LABELS == 1, np.nan, 1.0).astype(np.float32)

REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], type[InputError], str]] = [
    ("shape", {"labels": LABELS[1:]}, {}, VolumeError, r"labels .* have shape \(11, 48, 40\), the image"),
    ("float labels", {"labels": LABELS.astype(np.float32)}, {}, VolumeError, "classes are whole numbers"),
    ("label beyond", {"labels": LABELS * 4}, {"classes": "a,b"}, VolumeError, "label 4 in the training region"),
    ("objects", {"labels": LABELS.astype(np.uint16) * 5000}, {}, VolumeError, "look like object numbers"),
    ("negative", {"labels": -LABELS.astype(np.int16)}, {}, VolumeError, "label -1"),
    ("nothing labelled", {"labels": np.full_like(LABELS, 255)}, {}, VolumeError, "training region holds no labelled"),
    ("nothing to validate", {"labels": np.where(np.arange(12)[:, None, None] < 9, LABELS, 255).astype(np.uint8)}, {},
     VolumeError, "validation region holds no labelled voxel"),
    ("overlap", {}, {"val_roi": "7:9,:,:"}, SpecError, "share 7:8,0:48,0:40"),
    ("malformed region", {}, {"train_roi": "0:8"}, SpecError, "needs one each for z, y, x"),
    ("outside", {}, {"val_roi": "9:13,:,:"}, SpecError, "is not inside 0:12"),
    ("one class", {"labels": LABELS * 0}, {"classes": "a"}, SpecError, "two are the least"),
    ("patch", {}, {"patch": (1, 31, 32)}, PlanError, "1,31,32 is no multiple of the pooling factor 1,2,2.*use 1,30,32"),
    ("thick patch", {}, {"patch": (2, 32, 32)}, PlanError, "takes one at a time"),
    ("network", {}, {"pools": "1,2,2;1,2,2"}, SpecError, "2 widths need 1 pools"),
    ("NaN", {"image": NAN}, {}, VolumeError, "holds NaN or Inf near"),
    ("only NaN", {"image": NAN * np.nan}, {}, VolumeError, "no finite value"),
    ("no image", {}, {"image": "/nowhere/image.zarr"}, VolumeError, "nowhere"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "options", "kind", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_bad_input_is_refused(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], kind: type[InputError], message: str
) -> None:
    spec = spec_for(
        tmp_path, volumes(tmp_path, **changes) | options, **{k: v for k, v in options.items() if k != "image"}
    )
    with pytest.raises(kind, match=message) as caught:
        train(spec)
    assert "\n" not in str(caught.value)
    assert not Path(spec.out).exists()


def test_an_existing_place_is_not_lost(tmp_path: Path) -> None:
    data = volumes(tmp_path)
    spec = spec_for(tmp_path, data, max_steps=2)
    train(spec)
    digest = read_manifest(spec.out).digest
    with pytest.raises(OutputExistsError, match="--overwrite"):
        train(spec)
    assert read_manifest(spec.out).digest == digest
    train(spec_for(tmp_path, data, max_steps=2, seed=1, overwrite=True))
    assert read_manifest(spec.out).digest != digest
    (tmp_path / "papers").mkdir()
    with pytest.raises(OutputExistsError, match="is no model bundle"):
        train(spec_for(tmp_path, data, out=str(tmp_path / "papers"), overwrite=True))


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpecError, match="no GPU"):
        train(spec_for(tmp_path, volumes(tmp_path), device="cuda"))


def test_a_checkpoint_that_is_none_is_named(tmp_path: Path) -> None:
    spec = spec_for(tmp_path, volumes(tmp_path))
    folder = Path(spec.out + ".training")
    folder.mkdir()
    (folder / "checkpoint.pt").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
    with pytest.raises(SpecError, match="is no checkpoint of volseg"):
        train(spec)


# ---------------------------------------------------------------- planning


def plan(
    region: Triple, voxel: tuple[float, float, float] | None = None, memory: int = 1 << 40, **options: Any
) -> TrainPlan:
    spec = TrainSpec.read({"image": "i", "labels": "l", "out": "o", **options})
    return make_plan(spec, region, voxel, 1, 2, memory)


def test_planned_patches_fit_region_pooling_and_voxels() -> None:
    assert plan((100, 1000, 1000), dims=2).patch == (1, 256, 256)
    assert plan((1000, 20, 1000), dims=2, axis="y").patch == (1, 256, 256)
    assert plan((14, 100, 130), dims=2).patch == (1, 96, 128)
    assert plan((200, 200, 200)).patch == (64, 64, 64)
    thin = plan((20, 500, 500), (5, 1, 1))
    assert thin.config.factors[:2] == ((1, 2, 2), (1, 2, 2))
    assert thin.patch[0] < 32
    tiny = plan((3, 9, 200))
    assert tiny.config.factors[0] == (1, 2, 2)
    for made in (thin, tiny, plan((5, 6, 7)), plan((1, 1, 1))):
        assert all(side % factor == 0 for side, factor in zip(made.patch, made.config.pooling, strict=True))


def test_memory_shrinks_an_open_patch_and_refuses_a_given_one() -> None:
    full = plan((200, 200, 200))
    assert plan((200, 200, 200), memory=full.training_bytes() // 2).patch < full.patch
    with pytest.raises(PlanError, match="choose a smaller --patch"):
        plan((200, 200, 200), memory=1 << 20, patch=64)
    with pytest.raises(PlanError, match="GiB are to be had"):
        plan((200, 200, 200), memory=1 << 10)


def test_turns_need_equal_voxel_sizes_and_quarter_turns_a_place_that_tells_nothing(tmp_path: Path) -> None:
    shape = (32, 32, 32)
    anywhere = np.random.default_rng(0).integers(0, 2, shape).astype(np.uint8)
    layers = np.broadcast_to((np.arange(32)[:, None] // 16).astype(np.uint8), shape).copy()
    indices = []
    for name, labels in (("anywhere", anywhere), ("layers", layers)):
        view = NetworkView(open_volume(store(tmp_path / name, labels, None)), "z", 1 << 20)
        indices.append(build_index(view, Box.of(shape), None, 255, "training"))
    assert indices[0].place_tells((1, 2)) < 0.01
    assert indices[1].place_tells((1, 2)) == pytest.approx(1.0)
    assert indices[1].place_tells((0, 2)) == pytest.approx(0.0)

    def chosen(voxel: tuple[float, float, float] | None, which: int = 0, **options: Any) -> Augmentation:
        spec = TrainSpec.read({"image": "i", "labels": "l", "out": "o", **options})
        return augmentation_for(spec, voxel, indices[which], None)

    assert chosen(None).planes == chosen(None).quarter_turns == ((0, 1), (0, 2), (1, 2))
    assert chosen((5, 1, 1.05)).quarter_turns == ((1, 2),)
    assert chosen((5, 1, 1), dims=2).planes == ((1, 2),)
    assert chosen((5, 1, 1), dims=2, axis="y").planes == ()
    assert chosen(None, 1).planes == ((0, 1), (0, 2), (1, 2))
    assert chosen(None, 1).quarter_turns == ((0, 2),)
    assert chosen(None, 1, turns="always").quarter_turns == ((0, 1), (0, 2), (1, 2))
    assert chosen(None, turns="never").quarter_turns == ()


def test_grey_values_change_as_much_as_those_of_a_class_do(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (8, 64, 64)).astype(np.uint8)
    steady = np.where(labels == 1, 3.0, -3.0) + rng.normal(0, 0.1, labels.shape)
    drifting = steady + np.linspace(-1, 1, 64)
    found = []
    for name, image in (("steady", steady), ("drifting", drifting)):
        region = region_of(tmp_path / name, image + 100, labels, Box.of(labels.shape))
        index = build_index(region.labels, region.box, 2, 255, "training")
        greys = measure_greys(region, index)
        assert greys is not None
        found.append(greys)
    assert found[0].between < 0.02
    assert found[0].within == pytest.approx(0.1, rel=0.1)
    assert found[1].between == pytest.approx(0.56, rel=0.1), "the spread of four quarters of a slope of 2"
    spec = TrainSpec.read({"image": "i", "labels": "l", "out": "o"})
    calm, wild = (augmentation_for(spec, None, index, greys) for greys in found)
    assert calm.offset < 0.1
    assert wild.offset > 0.4
    assert calm.noise < 0.05


# ---------------------------------------------------------------- reading and sampling


@settings(deadline=None)
@given(st.sampled_from("zyx"), st.integers(1, 4000), st.data())
def test_a_view_reads_what_is_there_in_the_networks_order(axis: Axis, capacity: int, data: st.DataObject) -> None:
    values = np.arange(2 * 7 * 9 * 11, dtype=np.int32).reshape(2, 7, 9, 11)

    class Fake:
        shape: Triple = (7, 9, 11)
        chunks: Triple = (3, 4, 5)
        dtype = values.dtype
        channels = 2

        def read(self, box: Box) -> NDArray[Any]:
            return values[(slice(None), *box.slices)]

    view = NetworkView(Fake(), axis, capacity)
    view._tile = (3, 4, 5)  # the planned tile would hold the whole of so small a volume
    turned = np.moveaxis(values, 1 + "zyx".index(axis), 1)
    assert view.shape == turned.shape[1:] == to_network((7, 9, 11), axis)
    for _ in range(3):
        spans = [sorted(data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)))) for n in view.shape]
        start, stop = (tuple(s[i] if i == 0 else max(s[1], s[0] + 1) for s in spans) for i in (0, 1))
        box = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
        np.testing.assert_array_equal(view.read(box), turned[(slice(None), *box.slices)])


def region_of(folder: Path, image: NDArray[Any], labels: NDArray[Any], box: Box, capacity: int = 1 << 22) -> Region:
    views = [
        NetworkView(open_volume(store(folder / f"{name}.zarr", values, None)), "z", capacity)
        for name, values in (("image", image), ("labels", labels))
    ]
    return Region(views[0], views[1], box, Scaling(low=(0,), high=(1e6,), mean=(0,), std=(1,)), 255)


def test_the_index_counts_every_labelled_voxel_once(tmp_path: Path) -> None:
    _, labels = scene(classes=4)
    labels[:, ::3] = 255
    box = Box((1, 5, 3), (11, 47, 33))
    view = NetworkView(open_volume(store(tmp_path / "l.zarr", labels, None)), "z", 1 << 20)
    view._tile = (4, 16, 16)
    index = build_index(view, box, None, 255, "training")
    inside = labels[box.slices]
    np.testing.assert_array_equal(index.totals, np.bincount(inside[inside != 255]))
    for tile, counts in zip(index.tiles, index.counts, strict=True):
        part = labels[tile.slices]
        np.testing.assert_array_equal(counts, np.bincount(part[part != 255], minlength=len(counts)))


PLANES = ((0, 1), (0, 2), (1, 2))
GEOMETRY = Augmentation(
    planes=PLANES, quarter_turns=PLANES, flips=(0, 1, 2), warp_probability=0.0, intensity_probability=0.0
)


@pytest.mark.parametrize("warp", [0.0, 1.0])
def test_image_and_labels_change_their_shape_together(tmp_path: Path, warp: float) -> None:
    z, y, x = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in (40, 44, 48)), indexing="ij")
    image = 2 * z + y + 0.5 * x
    region = region_of(tmp_path, image, image.astype(np.uint8), Box.of((40, 44, 48)))
    index = build_index(region.labels, region.box, 256, 255, "training")
    how = dataclasses.replace(GEOMETRY, warp_probability=warp)
    sampler = Sampler(region, index, (16, 16, 16), how, seed=3)
    seen = set()
    for step in range(40):
        values, labels = sampler.draw(step, 0)
        assert values.shape == (1, 16, 16, 16)
        known = labels != IGNORED
        assert known.float().mean() > 0.5
        # A label is the image rounded down at the nearest voxel: at most 1 + half a voxel's slope away.
        away = (values[0] - labels)[known]
        assert float(away.min()) > -2.0
        assert float(away.max()) < 3.0
        if warp == 0.0:
            assert float(away.min()) >= 0.0
            assert float(away.max()) < 1.0
            gradient = [int(torch.sign(values[0].diff(dim=i).mean())) for i in range(3)]
            sizes = [round(float(values[0].diff(dim=i).abs().mean()), 1) for i in range(3)]
            seen.add((*gradient, *sizes))
    if warp == 0.0:
        assert len(seen) > 15, "flips and turns of three axes"


def test_nothing_outside_the_region_is_ever_seen(tmp_path: Path) -> None:
    box = Box((2, 10, 8), (9, 30, 31))
    image, labels = np.full(SHAPE, 1e5, np.float32), np.full(SHAPE, 7, np.uint8)
    image[box.slices], labels[box.slices] = 1.0, 1
    labels[4, 12:20, 10:20] = 2
    region = region_of(tmp_path, image, labels, box)
    index = build_index(region.labels, box, 3, 255, "training")
    how = dataclasses.replace(GEOMETRY, warp_probability=0.5)
    for patch in ((8, 16, 16), (4, 32, 32)):
        sampler = Sampler(region, index, patch, how, seed=0)
        for step in range(25):
            values, found = sampler.draw(step, 1)
            assert float(values.max()) <= 1.001
            assert set(torch.unique(found).tolist()) <= {IGNORED, 1, 2}


def test_rare_classes_are_drawn_often_and_every_patch_can_be_made_again(tmp_path: Path) -> None:
    labels = np.zeros((4, 128, 128), np.uint8)
    labels[2, 100:104, 20:24] = 1
    region = region_of(tmp_path, labels.astype(np.float32), labels, Box.of(labels.shape))
    index = build_index(region.labels, region.box, 2, 255, "training")
    sampler = Sampler(region, index, (1, 16, 16), GEOMETRY, seed=0)
    hits = sum(bool((sampler.draw(step, 0)[1] == 1).any()) for step in range(60))
    assert hits > 20
    again = Sampler(region, index, (1, 16, 16), GEOMETRY, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(sampler.batch(5, 3), again.batch(5, 3), strict=True))
    assert not torch.equal(sampler.batch(5, 3)[0], sampler.batch(6, 3)[0])


def test_a_volume_larger_than_the_cache_is_worked_through_slowly(tmp_path: Path) -> None:
    labels = (np.random.default_rng(0).random((64, 128, 128)) < 0.01).astype(np.uint8)
    region = region_of(tmp_path, labels, labels, Box.of(labels.shape), capacity=300_000)
    assert region_of(tmp_path / "all", labels, labels, Box.of(labels.shape)).slots is None
    for view in (region.image, region.labels):
        view._tile = (16, 16, 16)
    index = build_index(region.labels, region.box, 2, 255, "training")
    assert region.slots is not None
    sampler = Sampler(region, index, (8, 8, 8), None, seed=0)
    places = [sampler._place(step, np.random.default_rng([step, number])) for step in range(300) for number in range(4)]

    def tiles(some: list[Triple]) -> set[Triple]:
        return {(z // 16, y // 16, x // 16) for z, y, x in some}

    assert len(tiles(places[:40])) < 8 * region.slots < len(tiles(places)), "few at a time, many over all"


def test_grey_values_change_within_bounds() -> None:
    image = torch.linspace(-2, 2, 4096).reshape(1, 1, 64, 64)
    how = Augmentation(planes=(), quarter_turns=(), flips=(), intensity_probability=1.0)
    changed = [change_intensity(image.clone(), how, np.random.default_rng(seed)) for seed in range(30)]
    assert all(bool(torch.isfinite(c).all()) and c.shape == image.shape for c in changed)
    assert len({float(c.mean()) for c in changed}) == 30
    assert all(float(torch.corrcoef(torch.stack([image.flatten(), c.flatten()]))[0, 1]) > 0.8 for c in changed)
    still = change_intensity(
        image.clone(), dataclasses.replace(how, intensity_probability=0.0), np.random.default_rng(0)
    )
    assert torch.equal(still, image)


def test_what_fails_while_patches_are_made_is_raised_where_they_are_used(tmp_path: Path) -> None:
    image, labels = scene()
    values = image.astype(np.float32)
    values[:, 20] = np.inf
    region = region_of(tmp_path, values, labels, Box.of(SHAPE))
    index = build_index(region.labels, region.box, 2, 255, "training")
    patches = Prefetcher(Sampler(region, index, (1, 48, 40), None, 0), 2, 0)
    with pytest.raises(VolumeError, match="holds NaN or Inf"):
        patches.next()
    patches.close()


# ---------------------------------------------------------------- losses, scores, optimisation


def test_losses_by_hand() -> None:
    labels = torch.tensor([[[1, 0], [1, IGNORED]]])
    logits = torch.tensor([[[[2.0, -1.0], [0.5, 9.0]]]])
    p = torch.sigmoid(logits[0, 0].flatten()[:3])
    entropy = -(p[0].log() + (1 - p[1]).log() + p[2].log()) / 3
    dice = (2 * (p[0] + p[2]) + 1) / (p.sum() + 2 + 1)
    torch.testing.assert_close(sigmoid_loss(logits, labels), entropy + 1 - dice)
    both = torch.cat([torch.zeros_like(logits), logits], dim=1)
    torch.testing.assert_close(softmax_loss(both, labels), sigmoid_loss(logits, labels))


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
def test_ignored_voxels_have_no_gradient(loss: Any) -> None:
    channels = 3 if loss is softmax_loss else 1
    logits = torch.randn(2, channels, 4, 5, requires_grad=True)
    labels = torch.randint(0, 2, (2, 4, 5))
    labels[:, 1] = IGNORED
    loss(logits, labels).backward()
    assert logits.grad is not None
    assert float(logits.grad[:, :, 1].abs().max()) == 0.0
    assert float(logits.grad[:, :, 0].abs().max()) > 0.0
    nothing = loss(logits, torch.full_like(labels, IGNORED))
    assert nothing.item() == 0.0


def test_dice_by_hand_and_absent_classes() -> None:
    counts = ClassCounts(4)
    counts.add(np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0]))
    scores = counts.scores()
    assert scores.dice[:3] == pytest.approx((2 / 4, 4 / 5, 0.0))
    assert scores.dice[3] is None
    assert scores.mean_foreground == pytest.approx(0.4)
    assert scores.sizes == (2, 2, 1, 0)
    assert scores.merit == pytest.approx(0.8 * 2**0.5 / (2**0.5 + 1))


def test_the_best_threshold_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 5000)
    probability = np.clip(0.35 * truth + rng.uniform(0, 0.5, 5000), 0, 1).astype(np.float32)
    counts = ProbabilityCounts()
    counts.add(truth[:2000], probability[:2000])
    counts.add(truth[2000:], probability[2000:])
    scores = counts.scores()

    def dice(threshold: float) -> float:
        won = probability >= threshold
        return float(2 * (won & (truth == 1)).sum() / (won.sum() + truth.sum()))

    assert scores.threshold is not None
    assert scores.dice[1] == pytest.approx(dice(scores.threshold))
    assert scores.dice[1] == pytest.approx(max(dice(i / 256) for i in range(52, 205)))
    assert counts.scores(0.25).dice[1] == pytest.approx(dice(0.25))
    assert ProbabilityCounts().scores().mean_foreground is None


def test_the_learning_rate_rises_and_falls_by_steps_or_time() -> None:
    rates = [learning_rate(1.0, i / 100) for i in range(101)]
    assert rates[0] < 0.1
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 0.01
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert progress_of(10, 100, 1.0, None) == 0.1
    assert progress_of(10, 100, 30.0, 60.0) == 0.5
    assert progress_of(10, 100, 70.0, 60.0) == 1.0


def weight_of(network: nn.Module) -> float:
    return next(p.item() for p in network.parameters() if p.ndim == 2)


def test_the_average_follows_the_weights() -> None:
    net = nn.Linear(1, 1)
    average = WeightAverage(net)
    before = weight_of(average.network)
    with torch.no_grad():
        net.weight.add_(1.0)
    average.update(net, step=20)
    assert weight_of(average.network) == pytest.approx(before + 0.5)
    for step in range(21, 400):
        average.update(net, step)
    assert weight_of(average.network) == pytest.approx(before + 1.0, abs=0.01)


def test_replicas_give_the_gradients_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 1, 1))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return ((logits[:, 0] - labels) ** 2).mean()

    images, labels = torch.randn(5, 1, 4, 6, 8), torch.randint(0, 2, (5, 4, 6, 8))
    results = []
    for replicas in (1, 2, 3, 8):
        worker = Gradients(net, loss, replicas)
        value = worker.compute(images, labels)
        worker.close()
        results.append((value, [p.grad.clone() for p in net.parameters() if p.grad is not None]))
    for value, gradients in results[1:]:
        assert value == pytest.approx(results[0][0])
        for a, b in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- validation


@settings(deadline=None)
@given(st.tuples(*[st.integers(1, 24)] * 3), st.tuples(*[st.integers(2, 16)] * 3))
def test_cores_tile_the_region_and_lie_in_their_windows(size: Triple, patch: Triple) -> None:
    box = Box.of(size).shifted((3, 0, 7))
    seen = np.zeros(size, np.uint8)
    for window, core in windows(box, patch):
        assert window.shape == patch
        assert window.contains(core)
        seen[core.relative_to(box.start).slices] += 1
    assert (seen == 1).all()


def test_windows_are_spread_evenly() -> None:
    items = [(Box.of((i + 1, 1, 1)), Box.of((1, 1, 1))) for i in range(10)]
    assert spread(items, 10) == items
    assert [w.shape[0] for w, _ in spread(items, 4)] == [1, 4, 7, 10]
    assert len(spread(items, 1)) == 1


def test_validation_scores_the_labelled_voxels_of_the_region_only(tmp_path: Path) -> None:
    labels = np.zeros((4, 20, 20), np.uint8)
    labels[1:3, 5:15, 5:15] = 1
    image = labels.astype(np.float32)
    labels[2, :7] = 255
    region = region_of(tmp_path, image, labels, Box((1, 0, 0), (3, 20, 20)))
    net = nn.Conv3d(1, 2, 1)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1, 1))
        assert net.bias is not None
        net.bias.copy_(torch.tensor([0.5, -0.5]))
    validator = Validator(region, (2, 8, 8), 2, sigmoid=False, threads=2)
    scores = validator.score(net)
    assert scores.dice == (1.0, 1.0)
    assert validator.score(net, torch.bfloat16, most=3).dice[0] == 1.0
