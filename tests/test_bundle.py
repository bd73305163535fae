"""Bundles: what is saved comes back; what is missing, changed or malformed is refused with a reason; nothing is run."""

import errno
import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from volseg.errors import BundleError, OutputExistsError, StorageFullError
from volseg.intensity import Scaling
from volseg.models.bundle import bundle_digest, load_network, read_manifest, save_bundle
from volseg.models.config import UNetConfig
from volseg.models.manifest import BundleManifest, ClassInfo, FileInfo
from volseg.models.registry import build

CONFIG = UNetConfig(dims=3, out_channels=3, widths=(4, 8), pools=((1, 2, 2),))


def manifest(**changes: Any) -> BundleManifest:
    values: dict[str, Any] = {
        "architecture": "unet",
        "arguments": CONFIG.model_dump(mode="json"),
        "classes": [ClassInfo(id=i, name=f"class {i}", color="#80ff00") for i in range(3)],
        "activation": "softmax",
        "scaling": Scaling(low=(0,), high=(9,), mean=(4,), std=(2,)),
        "voxel_size": (2, 1, 1),
        "unit": "micrometer",
        "patch": (5, 16, 16),
        "provenance": {"spec": {"seed": 3}},
    }
    return BundleManifest.model_validate(values | changes)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_bundle(str(tmp_path / "bundle"), build("unet", CONFIG), manifest())
    return tmp_path / "bundle"


def test_a_bundle_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    net = build("unet", CONFIG).eval()
    saved = save_bundle(str(tmp_path / "b"), net, manifest(), extra={"note.txt": b"hello"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"], "nothing is left beside it"
    assert (tmp_path / "b" / "note.txt").read_bytes() == b"hello"
    read, loaded = load_network(str(tmp_path / "b"))
    assert read == saved == read_manifest(str(tmp_path / "b"))
    assert read.pooling == (1, 2, 2)
    assert bundle_digest(str(tmp_path / "b")) == saved.digest
    x = torch.randn(1, 1, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(net(x), loaded(x))
    assert not loaded.training


def test_the_digest_names_weights_and_meaning(tmp_path: Path) -> None:
    net = build("unet", CONFIG)
    first = save_bundle(str(tmp_path / "a"), net, manifest()).digest
    assert save_bundle(str(tmp_path / "b"), net, manifest()).digest == first
    assert save_bundle(str(tmp_path / "c"), net, manifest(overlap=0.25)).digest != first
    nn.init.ones_(next(net.parameters()))
    assert save_bundle(str(tmp_path / "d"), net, manifest()).digest != first


def test_pooling_follows_the_slice_axis(tmp_path: Path) -> None:
    config = UNetConfig(dims=2, out_channels=1, widths=(4, 8), pools=((1, 2, 4),))
    classes = [ClassInfo(id=i, name=f"class {i}", color="#80ff00") for i in range(2)]
    written = manifest(
        arguments=config.model_dump(mode="json"), patch=(8, 1, 16), axis="y", classes=classes, activation="sigmoid",
        threshold=0.4,
    )  # fmt: skip
    save_bundle(str(tmp_path / "b"), build("unet", config), written)
    assert read_manifest(str(tmp_path / "b")).pooling == (2, 1, 4)


def test_reading_the_manifest_does_not_load_torch(bundle: Path) -> None:
    code = "import sys; from volseg.models.manifest import read_manifest; read_manifest(sys.argv[1]); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_existing_place_is_kept_unless_told_otherwise(bundle: Path) -> None:
    before = bundle_digest(str(bundle))
    with pytest.raises(OutputExistsError, match="--overwrite"):
        save_bundle(str(bundle), build("unet", CONFIG), manifest())
    assert bundle_digest(str(bundle)) == before
    (bundle / "old.txt").write_text("of the old bundle")
    saved = save_bundle(str(bundle), build("unet", CONFIG), manifest(overlap=0.1), overwrite=True)
    assert bundle_digest(str(bundle)) == saved.digest != before
    assert sorted(p.name for p in bundle.iterdir()) == ["model.json", "model.safetensors"]
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]


def test_a_full_disk_leaves_the_old_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = bundle_digest(str(bundle))
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "model.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageFullError):
        save_bundle(str(bundle), build("unet", CONFIG), manifest(), overwrite=True)
    assert bundle_digest(str(bundle)) == before
    assert [p.name for p in bundle.parent.iterdir()] == ["bundle"]


def edit(**changes: Any) -> Callable[[Path], None]:
    """Return a change of model.json after which its digest is right again."""

    def apply(path: Path) -> None:
        values = json.loads((path / "model.json").read_text())
        for key, value in changes.items():
            target = values
            *parents, last = key.split("__")
            for parent in parents:
                target = target[parent]
            target[last] = value
        values["digest"] = None
        text = json.dumps({k: v for k, v in values.items() if k != "digest"}, sort_keys=True, separators=(",", ":"))
        values["digest"] = hashlib.sha256(text.encode()).hexdigest()
        (path / "model.json").write_text(json.dumps(values))

    return apply


def swap(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Return a change of the weights after which all digests are right again."""

    def apply(path: Path) -> None:
        data = change((path / "model.safetensors").read_bytes())
        (path / "model.safetensors").write_bytes(data)
        info = FileInfo(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
        edit(files={"model.safetensors": info.model_dump()})(path)

    return apply


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[bytes], bytes]:
    def apply(data: bytes) -> bytes:
        values = load(data)
        change(values)
        return save(values)

    return apply


def flip(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-7] ^= 1
    (path / "model.safetensors").write_bytes(data)


def cut(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-100])


def rename(values: dict[str, torch.Tensor]) -> None:
    values["head.wight"] = values.pop("head.weight")


def reshape(values: dict[str, torch.Tensor]) -> None:
    values["head.weight"] = values["head.weight"].reshape(4, 3, 1, 1, 1).contiguous()


def pickled(data: bytes) -> bytes:
    return pickle.dumps(sys.exit) + b"\0" * (len(data) - len(pickle.dumps(sys.exit)))


FAULTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("missing manifest", lambda p: (p / "model.json").unlink(), "model.json is missing"),
    ("missing weights", lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
    ("no JSON", lambda p: (p / "model.json").write_text("{"), "is not JSON"),
    ("no object", lambda p: (p / "model.json").write_text("[1]"), "format_version is None"),
    ("huge manifest", lambda p: (p / "model.json").write_bytes(b" " * (2 << 20)), "more than the 1048576"),
    ("another version", edit(format_version=2), "format_version is 2"),
    ("changed manifest", lambda p: (p / "model.json").write_text(
        (p / "model.json").read_text().replace("class 1", "class 7")), "was changed after training"),
    ("flipped bit", flip, "is not what was trained"),
    ("cut weights", cut, "is not what was trained"),
    ("unknown architecture", edit(architecture="unnet"), "unknown architecture 'unnet'.*did you mean 'unet'"),
    ("unknown argument", edit(arguments__width=(4, 8)), "did you mean 'widths'"),
    ("bad argument", edit(arguments__dropout=2), "dropout"),
    ("unknown key", edit(treshold=0.3), "treshold"),
    ("patch", edit(patch=[5, 15, 16]), "no multiple of the pooling factor"),
    ("threshold", edit(threshold=0.5), "a threshold belongs to the sigmoid"),
    ("class ids", edit(classes=[{"id": i, "name": "a", "color": "#000000"} for i in (0, 2, 1)]), "class ids must be"),
    ("too few outputs", edit(arguments__out_channels=2), "2 output channels, its classes need 3"),
    ("channels", edit(arguments__in_channels=2), "takes 2 channels, the scaling has 1"),
    ("scaling", edit(scaling__std=[0.0]), "every std must be above 0"),
    ("foreign file", edit(files={"run.py": {"sha256": "0" * 64, "size": 3}}), "its files must be"),
    ("too many weights", edit(arguments__widths=(64, 512)), "the architecture needs"),
    ("renamed tensor", swap(tensors(rename)), "head.weight is missing"),
    ("reshaped tensor", swap(tensors(reshape)), r"head.weight is \(4, 3, 1, 1, 1\)"),
    ("half precision", swap(tensors(lambda v: v.update({"head.bias": v["head.bias"].double()}))), "float64"),
    ("NaN", swap(tensors(lambda v: v["head.bias"].fill_(float("nan")))), "head.bias holds NaN"),
    ("a pickle", swap(pickled), "is no safetensors file"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_faulty_bundle_is_refused(bundle: Path, fault: Callable[[Path], object], message: str) -> None:
    fault(bundle)
    with pytest.raises(BundleError, match=message) as caught:
        load_network(str(bundle))
    assert "\n" not in str(caught.value)


def test_a_missing_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no model bundle at .*nowhere"):
        read_manifest(str(tmp_path / "nowhere"))
