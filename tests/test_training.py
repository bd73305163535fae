"""Training as a whole: it learns, resumes, stops and refuses."""

import hashlib
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import long, process, run, wait_until
from tests.train_support import scene, spec_for, volumes
from volseg.errors import InputError, JobInterrupted, OutputExistsError, PlanError, SpecError, VolumeError
from volseg.models.bundle import load_networks
from volseg.models.hardware import has_bf16
from volseg.models.manifest import read_manifest
from volseg.training.checkpoint import Workplace
from volseg.training.progress import TrainProgress
from volseg.training.train import train

LOW = "bf16" if has_bf16("cpu") else "auto"

# ---------------------------------------------------------------- the whole of it


@pytest.mark.parametrize(
    ("classes", "options"),
    [
        (2, {}),
        (2, {"axis": "x", "train_roi": ":,:,0:30", "val_roi": ":,:,30:40", "patch": (12, 32, 1), "precision": LOW}),
        long(3, {"dims": 3, "patch": (8, 24, 24), "pools": "1,2,2", "network": {"residual": True}, "max_steps": 80}),
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
    manifest, (network,) = load_networks(spec.out)
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
    assert any("unet" in note for note in notes)


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
    spec = spec_for(tmp_path, volumes(tmp_path), max_minutes=0.03, max_steps=None)
    result = train(spec, told.append)
    assert 0 < result.steps < 10**6
    assert told[-2].learning_rate < spec.learning_rate / 10, "the learning rate has come down by then"


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


@pytest.mark.parametrize("validation", [{"val_roi": "16:24,:,:"}, {"val_roi": None, "folds": 2}], ids=["one", "folds"])
def test_a_resumed_training_keeps_its_dimension(tmp_path: Path, validation: dict[str, Any]) -> None:
    """Too short for volumes at first; with the time that it is given then, it would have begun with them."""
    image, labels = scene((24, 24, 24))
    data = volumes(tmp_path, image=image, labels=labels)
    open_: dict[str, Any] = {
        "dims": None,
        "widths": None,
        "patch": None,
        "side": 16,
        "batch": 2,
        "axis": "y",
        **validation,
    }
    options = {**open_, "train_roi": "0:16,:,:" if "folds" not in validation else ":,:,:"}

    def stop(now: TrainProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(JobInterrupted):
        train(spec_for(tmp_path, data, **options, max_minutes=0.005, max_steps=None), stop)
    later = {**options, "max_minutes": 5, "max_steps": 4}
    result = train(spec_for(tmp_path, data, **later))
    assert result.resumed_from > 0
    manifest = read_manifest(result.bundle)
    assert (manifest.config.dims, manifest.axis, manifest.patch) == (2, "y", (16, 1, 16))
    anew = train(spec_for(tmp_path, data, **later, resume=False, overwrite=True))
    assert read_manifest(anew.bundle).config.dims == 3


@pytest.mark.chaos
@pytest.mark.slow
def test_a_killed_training_goes_on(tmp_path: Path) -> None:
    data = volumes(tmp_path)
    out = tmp_path / "bundle"
    words = [
        "train", "--image", data["image"], "--labels", data["labels"], "--dims", 2, "--train-roi", "0:8,:,:",
        "--val-roi", "9:12,:,:", "--widths", "4,8", "--patch", "1,16,16", "--out", out,
    ]  # fmt: skip
    with process(*words, "--max-steps", 2000) as started:
        wait_until(lambda: list(Path(f"{out}.training").glob("checkpoints/*/manifest.json")), started)
        started.send_signal(signal.SIGKILL)
        started.wait()
    assert not out.exists()
    found = Workplace.beside(str(out)).newest_valid(lambda _: None)
    assert found is not None
    stored = found[1]
    assert stored["step"] > 0
    done = run(*words, "--max-steps", stored["step"] + 3, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["resumed_from"] == stored["step"]
    assert result["steps"] == stored["step"] + 3
    assert result["seconds"] > stored["seconds"]


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
    ("patch", {}, {"patch": (1, 31, 32)}, PlanError, "no multiple of the pooling factor 1,2,2.*use 1,30,32 or 1,32,32"),
    ("thick patch", {}, {"patch": (2, 32, 32)}, PlanError, "takes one at a time"),
    ("network", {}, {"pools": "1,2,2;1,2,2"}, SpecError, "2 widths need 1 pools"),
    ("large patch", {}, {"patch": (1, 64, 32)}, PlanError, "larger than the training region 8,48,40.*use 1,48,32"),
    ("weights", {}, {"class_weights": (1, 2, 3)}, SpecError, "3 class_weights, 2 classes"),
    ("NaN", {"image": NAN}, {}, VolumeError, "holds NaN or Inf in"),
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
    folder = Path(spec.out + ".training") / "checkpoints" / "000000001-0"
    folder.mkdir(parents=True)
    state = b"cos\nsystem\n(S'touch /tmp/x'\ntR."
    (folder / "state.pt").write_bytes(state)
    entry = {"size": len(state), "sha256": hashlib.sha256(state).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"step": 1, "files": {"state.pt": entry}}))
    with pytest.raises(SpecError, match="is no checkpoint of volseg"):
        train(spec)
