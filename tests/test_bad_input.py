"""Bad input, through the command line: one or two clear lines, no traceback, nothing half-written that looks whole."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from tests.support import (
    Case,
    labels_of,
    make_bundle,
    run,
    run_json,
    segment,
    segment_words,
    smooth,
    status_of,
    store,
)
from volseg.cli.main import main
from volseg.errors import BlockError
from volseg.geometry import Box
from volseg.intensity import Scaling
from volseg.models.bundle import load_networks, save_bundle
from volseg.storage import ome
from volseg.storage.volume import Layout, create_array, open_volume

SHAPE = (20, 21, 22)
PROGRESS = re.compile(r"^(import|segment|verify|evaluate|train): \d+/\d+ ")


@dataclass
class Lab:
    """Where one case lives: a good image and a good bundle, and the output that must not come to be."""

    path: Path
    image: str
    bundle: str

    @property
    def output(self) -> Path:
        return self.path / "out.zarr"

    def segment(self, *more: object, **change: object) -> list[str]:
        values = {"image": self.image, "bundle": self.bundle, "output": self.output, **change}
        words = [
            "segment",
            values["image"],
            values["output"],
            "--model",
            values["bundle"],
            "--executor",
            "serial",
            *more,
        ]
        return [str(word) for word in words]

    def train(self, labels: str, *more: object, image: str | None = None) -> list[str]:
        words = [
            "train",
            "--image",
            image or self.image,
            "--labels",
            labels,
            "--out",
            self.output,
            "--max-steps",
            1,
            *more,
        ]
        return [str(word) for word in words]

    def own_bundle(self) -> Path:
        """A copy of the bundle that may be damaged."""
        return Path(shutil.copytree(self.bundle, self.path / "bundle"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("bad")
    return store(folder / "image.zarr", smooth(SHAPE)), make_bundle(folder / "bundle")


@pytest.fixture
def lab(parts: tuple[str, str], tmp_path: Path) -> Lab:
    return Lab(tmp_path, *parts)


@dataclass(frozen=True)
class Item:
    """One kind of bad input: how it comes about, and what the answer must say."""

    make: Callable[[Lab], list[str]]
    code: int
    says: tuple[str, ...]


ITEMS: dict[str, Item] = {}


def item(name: str, *says: str, code: int = 2) -> Callable[[Callable[[Lab], list[str]]], Callable[[Lab], list[str]]]:
    def keep(make: Callable[[Lab], list[str]]) -> Callable[[Lab], list[str]]:
        assert name not in ITEMS
        ITEMS[name] = Item(make, code, says)
        return make

    return keep


# ---------------------------------------------------------------- paths and formats


@item("missing image", r"nothing at .*/nowhere\.zarr", "check the path")
def _(lab: Lab) -> list[str]:
    return lab.segment(image=lab.path / "nowhere.zarr")


@item("missing bundle", r"no model bundle at .*/nowhere", "volseg train")
def _(lab: Lab) -> list[str]:
    return lab.segment(bundle=lab.path / "nowhere")


@item("missing source of an import", r"nothing at .*/nowhere\.tif", "check the path")
def _(lab: Lab) -> list[str]:
    return ["import", str(lab.path / "nowhere.tif"), str(lab.output)]


@item("missing prediction", r"nothing at .*/nowhere\.zarr", "check the path")
def _(lab: Lab) -> list[str]:
    return ["evaluate", str(lab.path / "nowhere.zarr"), lab.image]


@item("missing volume of info", r"nothing at .*/nowhere\.zarr")
def _(lab: Lab) -> list[str]:
    return ["info", str(lab.path / "nowhere.zarr")]


@item("missing output of verify", r"/nowhere\.zarr", "nothing was checked")
def _(lab: Lab) -> list[str]:
    return ["verify", str(lab.path / "nowhere.zarr")]


@item("missing image of train", r"nothing at .*/nowhere\.zarr")
def _(lab: Lab) -> list[str]:
    return lab.train(lab.image, image=str(lab.path / "nowhere.zarr"))


@item("not a zarr: folder", r"holiday is not a Zarr", "volseg import")
def _(lab: Lab) -> list[str]:
    (lab.path / "holiday").mkdir()
    (lab.path / "holiday" / "photo.jpg").write_bytes(b"sun")
    return lab.segment(image=lab.path / "holiday")


@item("not a zarr: file", r"stack\.tif is not a Zarr", "volseg import")
def _(lab: Lab) -> list[str]:
    tifffile.imwrite(lab.path / "stack.tif", np.zeros((9, 4, 5), np.uint8), photometric="minisblack")
    return lab.segment(image=lab.path / "stack.tif")


@item("damaged metadata", r"zarr\.json is damaged", "restore it")
def _(lab: Lab) -> list[str]:
    (lab.path / "torn.zarr").mkdir()
    (lab.path / "torn.zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_')
    return lab.segment(image=lab.path / "torn.zarr")


@item("verify of a volume", r"image\.zarr is no segmentation that volseg wrote")
def _(lab: Lab) -> list[str]:
    return ["verify", lab.image]


@item("unreadable tiff", r"torn\.tif", "nothing was written")
def _(lab: Lab) -> list[str]:
    tifffile.imwrite(lab.path / "torn.tif", np.zeros((30, 40, 50), np.uint16), compression="zlib")
    whole = (lab.path / "torn.tif").read_bytes()
    (lab.path / "torn.tif").write_bytes(whole[: len(whole) // 3])
    return ["import", str(lab.path / "torn.tif"), str(lab.output)]


@item("no tiff at all", r"text\.tif")
def _(lab: Lab) -> list[str]:
    (lab.path / "text.tif").write_text("not an image")
    return ["import", str(lab.path / "text.tif"), str(lab.output)]


@item("slices of different sizes", r"s2\.tif is 9x10 uint8, s1\.tif is 8x10 uint8", "remove or resize")
def _(lab: Lab) -> list[str]:
    (lab.path / "slices").mkdir()
    for k, height in enumerate((8, 9, 8), start=1):
        tifffile.imwrite(lab.path / "slices" / f"s{k}.tif", np.zeros((height, 10), np.uint8))
    return ["import", str(lab.path / "slices"), str(lab.output)]


# ---------------------------------------------------------------- shapes, channels, labels


@item("wrong rank", r"2 axes, shape \(8, 9\)", "a volume has 3")
def _(lab: Lab) -> list[str]:
    return lab.segment(image=store(lab.path / "flat.zarr", np.zeros((8, 9))))


@item("rank five", r"5 axes, shape \(1, 1, 8, 9, 10\)")
def _(lab: Lab) -> list[str]:
    return lab.segment(image=store(lab.path / "five.zarr", np.zeros((1, 1, 8, 9, 10))))


@item("wrong channel count", r"input has 2 channel\(s\), the model was trained on 1", "another model")
def _(lab: Lab) -> list[str]:
    return lab.segment(image=store(lab.path / "two.zarr", np.zeros((2, 8, 9, 10))))


@item("labels of another shape: train", r"\(4, 5, 6\)", r"\(20, 21, 22\)", "nothing was trained")
def _(lab: Lab) -> list[str]:
    return lab.train(store(lab.path / "labels.zarr", np.zeros((4, 5, 6))))


@item("labels of another shape: evaluate", r"\(4, 5, 6\)", r"\(20, 21, 22\)", "nothing was scored")
def _(lab: Lab) -> list[str]:
    return ["evaluate", store(lab.path / "labels.zarr", np.zeros((4, 5, 6))), lab.image]


@item("labels of another shape: overlay", r"\(4, 5, 6\)", r"\(20, 21, 22\)", "nothing was drawn")
def _(lab: Lab) -> list[str]:
    return ["overlay", lab.image, store(lab.path / "labels.zarr", np.zeros((4, 5, 6))), str(lab.path / "o.png")]


@item("labels beyond the classes: train", "label 7 in the training region .* is beyond the classes 0..1", "--classes")
def _(lab: Lab) -> list[str]:
    labels = np.zeros(SHAPE)
    labels[3, 4, 5] = 7
    return lab.train(store(lab.path / "labels.zarr", labels), "--classes", "pore,solid")


@item("labels beyond the classes: import", "label 7", "2 class names", "name every class")
def _(lab: Lab) -> list[str]:
    np.save(lab.path / "labels.npy", np.full((3, 4, 5), 7, np.uint8))
    return ["import", str(lab.path / "labels.npy"), str(lab.output), "--labels", "--classes", "pore,solid"]


@item("no labelled voxel: train", "no labelled voxel", "255", "covers labelled slices")
def _(lab: Lab) -> list[str]:
    labels = np.full(SHAPE, 255)
    labels[0] = 1
    return lab.train(store(lab.path / "labels.zarr", labels), "--train-roi", "5:20,:,:")


@item("no labelled voxel: evaluate", r"region 5:20,0:21,0:22", "255", "choose a region with labels")
def _(lab: Lab) -> list[str]:
    return ["evaluate", lab.image, store(lab.path / "labels.zarr", np.full(SHAPE, 255)), "--roi", "5:,:,:"]


# ---------------------------------------------------------------- values


def _not_finite(lab: Lab, value: float, dtype: str = "float32") -> str:
    image = smooth(SHAPE)
    image[3, 4, 5] = value
    return store(lab.path / "float.zarr", image, dtype)


@item("nan in the input", "1 voxels that are NaN or Inf", "3,4,5", "--nan fill", code=3)
def _(lab: Lab) -> list[str]:
    return lab.segment(image=_not_finite(lab, np.nan))


@item("nan in the image of a training", "holds NaN or Inf in 0:5,0:5,5:11", "replace them")
def _(lab: Lab) -> list[str]:
    labels = store(lab.path / "labels.zarr", np.arange(20 * 21 * 22).reshape(SHAPE) % 2)
    return lab.train(labels, image=_not_finite(lab, np.nan))


@item("inf in the input", "1 voxels that are NaN or Inf", "--nan fill", code=3)
def _(lab: Lab) -> list[str]:
    return lab.segment(image=_not_finite(lab, -np.inf, "float16"))


@item("nan from the network", "the network answered NaN or Inf", "train", code=3)
def _(lab: Lab) -> list[str]:
    scaling = Scaling(low=(0,), high=(255,), mean=(0,), std=(1e-37,))
    return lab.segment(bundle=make_bundle(lab.path / "wild", scaling=scaling))


# ---------------------------------------------------------------- chunks


def _chunked(lab: Lab, **options: Any) -> Path:
    """A volume of 8 chunks."""
    return Path(store(lab.path / "image.zarr", smooth(SHAPE), chunks=(16, 16, 16), **options))


@item("truncated chunk", r"chunk c/1/0/1 of .*image\.zarr", "truncated or damaged", code=3)
def _(lab: Lab) -> list[str]:
    path = _chunked(lab)
    chunk = path / "c" / "1" / "0" / "1"
    chunk.write_bytes(chunk.read_bytes()[:-9])
    return lab.segment(image=path)


@item("truncated chunk of v2", r"chunk 1\.0\.1 of .*image\.zarr", code=3)
def _(lab: Lab) -> list[str]:
    path = _chunked(lab, zarr_format=2)
    chunk = path / "1.0.1"
    chunk.write_bytes(chunk.read_bytes()[:-9])
    return lab.segment(image=path)


def _torn(lab: Lab, name: str, values: Any) -> str:
    path = Path(store(lab.path / name, values, chunks=(16, 16, 16)))
    chunk = path / "c" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-9])
    return str(path)


@item("truncated chunk: train", r"chunk c/0/0/0 of .*labels\.zarr", "truncated or damaged", code=4)
def _(lab: Lab) -> list[str]:
    return lab.train(_torn(lab, "labels.zarr", np.arange(20 * 21 * 22).reshape(SHAPE) % 2))


@item("truncated chunk: image of train", r"chunk c/0/0/0 of .*scan\.zarr", "truncated or damaged", code=4)
def _(lab: Lab) -> list[str]:
    labels = store(lab.path / "labels.zarr", np.arange(20 * 21 * 22).reshape(SHAPE) % 2)
    return lab.train(labels, image=_torn(lab, "scan.zarr", smooth(SHAPE)))


@item("truncated chunk: evaluate", r"chunk c/0/0/0 of .*labels\.zarr", "truncated or damaged", code=4)
def _(lab: Lab) -> list[str]:
    return ["evaluate", lab.image, _torn(lab, "labels.zarr", np.arange(20 * 21 * 22).reshape(SHAPE) % 2)]


@item("truncated chunk: overlay", r"chunk c/0/0/0 of .*labels\.zarr", "truncated or damaged", code=4)
def _(lab: Lab) -> list[str]:
    labels = _torn(lab, "labels.zarr", np.arange(20 * 21 * 22).reshape(SHAPE) % 2)
    return ["overlay", lab.image, labels, str(lab.path / "o.png")]


@item("bit flip under a checksum", r"chunk c/0/1/0 of .*image\.zarr", "restore it", code=3)
def _(lab: Lab) -> list[str]:
    path = _chunked(lab, compressors=[ZstdCodec(), Crc32cCodec()])
    chunk = path / "c" / "0" / "1" / "0"
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 4
    chunk.write_bytes(data)
    return lab.segment(image=path)


@item("absent chunk that was written", r"chunk c/0/0/0 of .* is absent", "all were written", code=3)
def _(lab: Lab) -> list[str]:
    attributes = ome.group_attributes(
        "zyx", voxel_size=None, unit=None, name="image", volseg={"status": "complete", "all_chunks_written": True}
    )
    writer = create_array(str(lab.path / "ours.zarr"), Layout(SHAPE, (16, 16, 16), None, np.dtype("uint8")), attributes)
    writer.write(Box.of(SHAPE), smooth(SHAPE).astype("uint8"))
    (lab.path / "ours.zarr" / "0" / "c" / "0" / "0" / "0").unlink()
    return lab.segment(image=lab.path / "ours.zarr")


# ---------------------------------------------------------------- bundles


def _edit(bundle: Path, **values: object) -> Path:
    manifest = bundle / "model.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | values))
    return bundle


@item("bundle with changed weights", r"model\.safetensors is not what was trained", "digest")
def _(lab: Lab) -> list[str]:
    weights = lab.own_bundle() / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    return lab.segment(bundle=weights.parent)


@item("bundle with a changed manifest", r"model\.json was changed after training", "digest")
def _(lab: Lab) -> list[str]:
    return lab.segment(bundle=_edit(lab.own_bundle(), overlap=0.75))


@item("bundle without weights", r"model\.safetensors is missing", "copy the whole folder")
def _(lab: Lab) -> list[str]:
    bundle = lab.own_bundle()
    (bundle / "model.safetensors").unlink()
    return lab.segment(bundle=bundle)


@item("bundle without a manifest", r"model\.json is missing")
def _(lab: Lab) -> list[str]:
    bundle = lab.own_bundle()
    (bundle / "model.json").unlink()
    return lab.segment(bundle=bundle)


@item("bundle of an unknown architecture", r"unknown architecture 'unett' \(did you mean 'unet'\?\)")
def _(lab: Lab) -> list[str]:
    from volseg.models.manifest import BundleManifest

    bundle = lab.own_bundle()
    values = json.loads((bundle / "model.json").read_text()) | {"architecture": "unett", "digest": None}
    digest = BundleManifest.model_validate(values).compute_digest()
    return lab.segment(bundle=_edit(bundle, architecture="unett", digest=digest))


@item("bundle with nan weights", "head.conv.bias holds NaN or Inf")
def _(lab: Lab) -> list[str]:
    bundle = lab.own_bundle()
    manifest, (network,) = load_networks(str(bundle))
    with torch.no_grad():
        network.state_dict()["head.conv.bias"].fill_(float("nan"))
    save_bundle(str(bundle), [network], manifest, overwrite=True)
    return lab.segment(bundle=bundle)


# ---------------------------------------------------------------- the window, blocks and storage


@item("patch no multiple of the pooling", "patch side 15 on axis y", "pooling factor 2", "use 14 or 16")
def _(lab: Lab) -> list[str]:
    return lab.segment("--patch", "16,15,16")


@item("patch of the training", "14,15,16", "pooling factor", "nothing was trained")
def _(lab: Lab) -> list[str]:
    labels = store(lab.path / "labels.zarr", np.arange(20 * 21 * 22).reshape(SHAPE) % 2)
    return lab.train(labels, "--patch", "14,15,16", "--widths", "4,8")


for text in ("1", "1.5", "-0.1", "nan", "half"):

    @item(f"overlap {text}", "overlap", re.escape(text), "nothing was done")
    def _(lab: Lab, text: str = text) -> list[str]:
        return lab.segment(f"--overlap={text}")


@item("block no multiple of the shard", "block side 24 on axis x", "shard side 10", "use a block of 30")
def _(lab: Lab) -> list[str]:
    return lab.segment("--block", "20,20,24", "--shards", "10,10,10")


@item("shard no multiple of the chunk", "shard side 24 on axis x", "chunk side 7")
def _(lab: Lab) -> list[str]:
    return lab.segment("--block", "20,20,24", "--chunks", "10,10,7")


@item("memory limit too small", r"0\.20 GiB is too small for one block", r"at least 0\.\d+ GiB", "raise --memory")
def _(lab: Lab) -> list[str]:
    return lab.segment("--memory", "0.2")


@item(
    "memory limit too small for this block", r"block \[256, 256, 256\] needs .* GiB", r"--block \d+,\d+,\d+ would fit"
)
def _(lab: Lab) -> list[str]:
    image = zarr.create_array(str(lab.path / "big.zarr"), shape=(400, 400, 400), chunks=(64, 64, 64), dtype="uint8")
    return lab.segment("--block", "256", "--memory", "0.4", image=image.store_path.store.root)  # type: ignore[attr-defined]


@item("region outside", r"region '0:30,:,:'", "not inside 0:20")
def _(lab: Lab) -> list[str]:
    return lab.segment("--roi", "0:30,:,:")


@item("region of two axes", "2 ranges", "0:14,:,:")
def _(lab: Lab) -> list[str]:
    return lab.segment("--roi", "0:3,:")


@item("no gpu", "cuda", "GPU", "--device")
def _(lab: Lab) -> list[str]:
    return lab.segment("--device", "cuda")


@item("slice axis of a 3D network", "axis y", "3D", "leave it out")
def _(lab: Lab) -> list[str]:
    return lab.segment("--axis", "y")


@item("serial with an address", "serial", "address", "drop one")
def _(lab: Lab) -> list[str]:
    return lab.segment("--address", "127.0.0.1:6379")


# ---------------------------------------------------------------- outputs


@item("output of another spec", r"overlap|stride: \[8, 8, 8\] there, \[4, 4, 4\] asked for", "--overwrite")
def _(lab: Lab) -> list[str]:
    assert main(lab.segment()) == 0
    shutil.move(lab.output, lab.path / "kept.zarr")
    shutil.move(f"{lab.output}.volseg", lab.path / "kept.zarr.volseg")
    return lab.segment("--overlap", "0.75", output=lab.path / "kept.zarr")


@item("output that is not ours", r"thesis exists and volseg did not write it", "another place")
def _(lab: Lab) -> list[str]:
    (lab.path / "thesis").mkdir()
    return lab.segment("--overwrite", output=lab.path / "thesis")


@item("output inside the input", "overlap", "choose another output")
def _(lab: Lab) -> list[str]:
    return lab.segment(output=Path(lab.image) / "labels")


@item("output equal to the bundle", "overlap", "choose another output")
def _(lab: Lab) -> list[str]:
    return lab.segment("--overwrite", output=lab.bundle)


@item("import over something", r"taken exists", "--overwrite")
def _(lab: Lab) -> list[str]:
    np.save(lab.path / "v.npy", np.zeros((3, 4, 5), np.uint8))
    (lab.path / "taken").mkdir()
    return ["import", str(lab.path / "v.npy"), str(lab.path / "taken")]


# ---------------------------------------------------------------- options


def _yaml(lab: Lab, text: str) -> list[str]:
    (lab.path / "job.yaml").write_text(text)
    return lab.segment("--spec", lab.path / "job.yaml")


@item("unknown key in yaml", r"unknown option 'overlapp' \(did you mean 'overlap'\?\)")
def _(lab: Lab) -> list[str]:
    return _yaml(lab, "overlapp: 0.5\n")


@item("wrong value in yaml", "option 'workers'", "-1")
def _(lab: Lab) -> list[str]:
    return _yaml(lab, "workers: -1\n")


@item("yaml that is none", r"job\.yaml is no YAML", "correct it")
def _(lab: Lab) -> list[str]:
    return _yaml(lab, "overlap: [0.5\nblock: }{\n")


@item("yaml of a list", r"job\.yaml must hold 'option: value' lines")
def _(lab: Lab) -> list[str]:
    return _yaml(lab, "- overlap\n")


@item("missing yaml", r"nowhere\.yaml cannot be read", "check the path")
def _(lab: Lab) -> list[str]:
    return lab.segment("--spec", lab.path / "nowhere.yaml")


@item("unknown key in --set", r"unknown option 'wrokers' \(did you mean 'workers'\?\)")
def _(lab: Lab) -> list[str]:
    return lab.segment("--set", "wrokers=2")


@item("nested key in --set", r"window\.overlap|window")
def _(lab: Lab) -> list[str]:
    return lab.segment("--set", "window.overlap=0.5")


@item("--set without a value", "'overlap' has no value", "--set key=value")
def _(lab: Lab) -> list[str]:
    return lab.segment("--set", "overlap")


@item("unknown flag", r"unknown argument '--overlp' \(did you mean '--overlap'\?\)", "--help")
def _(lab: Lab) -> list[str]:
    return lab.segment("--overlp", "0.5")


@item("unknown command", "segmnt", "--help")
def _(lab: Lab) -> list[str]:
    return ["segmnt", lab.image, str(lab.output)]


@item("no model given", "MODEL must be given")
def _(lab: Lab) -> list[str]:
    return ["segment", lab.image, str(lab.output)]


@item("malformed patch", "option 'patch'", "'16x16'", "z,y,x")
def _(lab: Lab) -> list[str]:
    return lab.segment("--patch", "16x16")


@item("zero in a block", "option 'block'", "at least 1 voxel")
def _(lab: Lab) -> list[str]:
    return lab.segment("--block", "0,16,16")


# ---------------------------------------------------------------- the test


@pytest.mark.parametrize("name", ITEMS)
def test_refused(name: str, lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    bad = ITEMS[name]
    words = bad.make(lab)
    capsys.readouterr()
    before = snapshot(lab.path)
    assert main(words) == bad.code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not PROGRESS.match(line)]
    answer = "\n".join([*lines, out])
    assert "Traceback" not in answer
    assert "bug of volseg" not in answer
    assert 1 <= len(lines) <= 2
    assert max(map(len, lines)) < 700
    for text in bad.says:
        assert re.search(text, answer), f"{text!r} is not in {answer!r}"
    assert_nothing_whole(lab, words)
    if bad.code == 2 and "nan weights" not in name:
        assert snapshot(lab.path) == before

    capsys.readouterr()
    assert main([*words, "--json"]) == bad.code
    document = json.loads(capsys.readouterr().out)
    if bad.code == 3:
        assert document["status"] == "partial"
        assert document["blocks"]["failed"] == len(document["failed_blocks"]) == 1
    else:
        assert document == {"status": "error", "error": lines[-1].removeprefix("volseg: "), "exit_code": bad.code}


def snapshot(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*")}


def assert_nothing_whole(lab: Lab, words: list[str]) -> None:
    assert status_of(lab.output) in {None, "incomplete"}
    assert not (lab.output / "model.json").exists()
    if lab.output.exists():
        assert words[0] == "segment"
        assert main(["verify", str(lab.output)]) == 3


# ---------------------------------------------------------------- what is filled instead of refused


def test_nan_is_filled_and_counted(lab: Lab, tmp_path: Path) -> None:
    """Filled with the low end of the scaling: the bits of a volume that holds that value there."""
    image = smooth(SHAPE)
    image[0, 0, :7], image[11, 12, 13] = np.nan, np.inf
    bundle = make_bundle(tmp_path / "bundle", scaling=Scaling(low=(17.5,), high=(200,), mean=(120,), std=(50,)))
    case = Case(store(tmp_path / "nan.zarr", image, "float32"), bundle, tmp_path)
    report = segment(case, tmp_path / "filled.zarr", nan="fill", overlap=0.5, block="8,8,8")
    assert report["nonfinite_filled"] == 8
    image[~np.isfinite(image)] = 17.5
    other = Case(store(tmp_path / "low.zarr", image, "float32"), bundle, tmp_path)
    assert segment(other, tmp_path / "low-out.zarr", overlap=0.5)["nonfinite_filled"] == 0
    np.testing.assert_array_equal(labels_of(tmp_path / "filled.zarr"), labels_of(tmp_path / "low-out.zarr"))


def test_absent_chunks_are_fill_value_and_counted(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = smooth(SHAPE)
    image[:16, 16:, :16] = 90
    full = Case(store(tmp_path / "full.zarr", image), lab.bundle, tmp_path)
    holes = store(tmp_path / "holes.zarr", image, fill_value=90)
    for name in ("0/1/0",):
        (Path(holes) / "c" / name).unlink(missing_ok=True)
    segment(full, tmp_path / "a.zarr")
    assert main(lab.segment("--block", "8,8,8", image=holes)) == 0
    assert "note: 1 absent chunks were read as fill value" in capsys.readouterr().out
    np.testing.assert_array_equal(labels_of(lab.output), labels_of(tmp_path / "a.zarr"))


# ---------------------------------------------------------------- a bad block among good ones


def test_bad_block_is_set_aside_and_the_rest_goes_on(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _chunked(lab)
    chunk = path / "c" / "1" / "1" / "1"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-5])
    words = lab.segment("--block", "10,10,11", "--overlap", "0", "--patch", "10,10,10", "--attempts", "2", image=path)
    assert main([*words, "--json"]) == 3
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["status"] == "partial"
    # 2 x 3 x 2 blocks; those whose patches reach the damaged chunk cannot be done.
    failed = {entry["block"] for entry in report["failed_blocks"]}
    assert report["blocks"] == {"total": 12, "computed": 12 - len(failed), "resumed": 0, "failed": len(failed)}
    assert 0 < len(failed) < 12
    assert report["retried"] == len(failed)
    assert err.count("is tried again: chunk c/1/1/1") == len(failed)
    assert status_of(lab.output) == "incomplete"
    chunk.write_bytes(whole)
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"] == {
        "total": 12, "computed": len(failed), "resumed": 12 - len(failed), "failed": 0,
    }  # fmt: skip
    assert status_of(lab.output) == "complete"


# ---------------------------------------------------------------- disk full


def limited(limit: int) -> Callable[[], None]:
    def set_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return set_limit


def test_disk_full(lab: Lab) -> None:
    """It concerns every block alike: the job stops at once, and goes on when there is room."""
    case = Case(lab.image, lab.bundle, lab.path)
    words = segment_words(case, lab.output, "--executor", "serial", "--probabilities", "--block", "10,21,22")
    done = run(*words, preexec_fn=limited(3000))
    assert done.returncode == 4, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r"volseg: no space left while writing .*/out\.zarr/.*; the job stopped: free .*", line)
    assert status_of(lab.output) == "incomplete"
    assert not list(lab.path.rglob("*.tmp"))
    report = run_json(*words)
    assert report["status"] == "complete"
    segment(case, lab.path / "other.zarr", probabilities=True)
    np.testing.assert_array_equal(labels_of(lab.output), labels_of(lab.path / "other.zarr"))


def test_disk_full_on_import(lab: Lab) -> None:
    np.save(lab.path / "v.npy", np.random.default_rng(0).integers(0, 255, (20, 40, 40), dtype=np.uint8))
    done = run("import", lab.path / "v.npy", lab.output, preexec_fn=limited(3000))
    assert done.returncode == 4
    (line,) = [line for line in done.stderr.splitlines() if not PROGRESS.match(line)]
    assert "no space left while writing" in line
    assert [p.name for p in lab.path.iterdir()] == ["v.npy"]


# ---------------------------------------------------------------- every flipped bit

CODECS: dict[str, Any] = {
    "zstd and crc32c": [ZstdCodec(), Crc32cCodec()],
    "crc32c alone": [Crc32cCodec()],
    "zstd with its own checksum": [ZstdCodec(checksum=True)],
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("codecs", CODECS)
@pytest.mark.parametrize("box", ["0:20,0:21,0:22", "0:16,16:21,0:16", "1:9,17:20,3:6"])
def test_flipped_bits_never_pass(tmp_path: Path, codecs: str, sharded: bool, box: str) -> None:
    """Whatever part of a chunk is read: right voxels or an error, never wrong voxels."""
    image = np.random.default_rng(1).integers(0, 9, SHAPE).astype("uint8")
    shape: dict[str, Any] = {"chunks": (8, 8, 8), "shards": (16, 16, 16)} if sharded else {"chunks": (16, 16, 16)}
    path = Path(store(tmp_path / "image.zarr", image, compressors=CODECS[codecs], **shape))
    chunk = path / "c" / "0" / "1" / "0"
    data = chunk.read_bytes()
    part = Box.parse(box, SHAPE)
    found = 0
    for place in range(0, len(data), max(1, len(data) // 25)):
        damaged = bytearray(data)
        damaged[place] ^= 16
        chunk.write_bytes(damaged)
        try:
            values = open_volume(str(path)).read(part)
        except BlockError as error:
            assert "c/0/1/0" in str(error)  # noqa: PT017 - either outcome is right
            found += 1
        else:
            np.testing.assert_array_equal(values[0], image[part.slices])
    assert found > 5
