"""Bundles: what is saved comes back; what is missing, changed or malformed is refused with a reason; nothing is run."""

import errno
import hashlib
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load, save
from torch import nn

from volseg.errors import BundleError, OutputExistsError, StorageFullError
from volseg.geometry import Triple
from volseg.intensity import Scaling
from volseg.models.bundle import bundle_digest, load_networks, read_manifest, save_bundle
from volseg.models.config import Axis, UNetConfig
from volseg.models.manifest import BundleManifest, ClassInfo, FileInfo, InputSides
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
    save_bundle(str(tmp_path / "bundle"), [build("unet", CONFIG)], manifest())
    return tmp_path / "bundle"


def test_a_bundle_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    net = build("unet", CONFIG).eval()
    saved = save_bundle(str(tmp_path / "b"), [net], manifest(), extra={"note.txt": b"hello"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b"], "nothing is left beside it"
    assert (tmp_path / "b" / "note.txt").read_bytes() == b"hello"
    read, (loaded,) = load_networks(str(tmp_path / "b"))
    assert read == saved == read_manifest(str(tmp_path / "b"))
    assert read.pooling == (1, 2, 2)
    assert bundle_digest(str(tmp_path / "b")) == saved.digest
    x = torch.randn(1, 1, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(net(x), loaded(x))
    assert not loaded.training


def test_the_digest_names_weights_and_meaning(tmp_path: Path) -> None:
    net = build("unet", CONFIG)
    first = save_bundle(str(tmp_path / "a"), [net], manifest()).digest
    assert save_bundle(str(tmp_path / "b"), [net], manifest()).digest == first
    assert save_bundle(str(tmp_path / "c"), [net], manifest(overlap=0.25)).digest != first
    nn.init.ones_(next(net.parameters()))
    assert save_bundle(str(tmp_path / "d"), [net], manifest()).digest != first


def test_pooling_follows_the_slice_axis(tmp_path: Path) -> None:
    config = UNetConfig(dims=2, out_channels=1, widths=(4, 8), pools=((1, 2, 4),))
    classes = [ClassInfo(id=i, name=f"class {i}", color="#80ff00") for i in range(2)]
    written = manifest(
        arguments=config.model_dump(mode="json"), patch=(8, 1, 16), axis="y", classes=classes, activation="sigmoid",
        threshold=0.4,
    )  # fmt: skip
    save_bundle(str(tmp_path / "b"), [build("unet", config)], written)
    assert read_manifest(str(tmp_path / "b")).pooling == (2, 1, 4)


@pytest.mark.parametrize(("axis", "patch"), [("z", (1, 8, 16)), ("y", (8, 1, 16)), ("x", (8, 16, 1))])
def test_a_2d_network_can_go_along_any_axis(axis: Axis, patch: Triple) -> None:
    config = UNetConfig(dims=2, out_channels=3, widths=(4, 8), pools=((1, 2, 4),))
    along_y = manifest(arguments=config.model_dump(mode="json"), patch=(8, 1, 16), axis="y")
    assert along_y.patch_along(axis) == patch
    sides = along_y.sides(axis)
    assert sides.pooling == sides.smallest == tuple({1: 1, 8: 2, 16: 4}[side] for side in patch)
    assert sides.margin == sides.phase == (0, 0, 0)
    assert sides.allow(patch)
    assert not sides.allow((3, 5, 7))
    assert manifest().patch_along(axis) == (5, 16, 16), "a 3D network has no slice axis"


def test_input_sides_follow_phase_and_smallest_side() -> None:
    sides = InputSides(pooling=(1, 8, 8), phase=(0, 4, 4), smallest=(1, 28, 20), margin=(0, 6, 6))
    assert [n for n in range(60) if sides.allow((1, n, 20))] == [28, 36, 44, 52]
    assert [n for n in range(40) if sides.allow((1, 28, n))] == [20, 28, 36]
    assert not sides.allow((0, 28, 20))


# ---------------------------------------------------------------- ensembles


@pytest.fixture
def ensemble(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    save_bundle(str(tmp_path / "bundle"), [build("unet", CONFIG) for _ in range(3)], manifest(class_bias=(0.5, 0, -1)))
    return tmp_path / "bundle"


def test_an_ensemble_comes_back_member_by_member(ensemble: Path) -> None:
    names = ["model-0.safetensors", "model-1.safetensors", "model-2.safetensors"]
    assert sorted(p.name for p in ensemble.iterdir()) == [*names, "model.json"]
    read, networks = load_networks(str(ensemble))
    assert read.members == 3
    assert list(read.class_bias or ()) == [0.5, 0, -1]
    for name, network in zip(names, networks, strict=True):
        stored = load((ensemble / name).read_bytes())
        assert all(torch.equal(stored[key], value) for key, value in network.state_dict().items())
    assert not torch.equal(networks[0].state_dict()["head.conv.weight"], networks[1].state_dict()["head.conv.weight"])


def test_the_digest_names_every_member_and_the_bias(ensemble: Path) -> None:
    read, networks = load_networks(str(ensemble))
    place = str(ensemble.parent / "other")
    assert save_bundle(place, networks, read).digest == read.digest
    assert save_bundle(place, networks[::-1], read, overwrite=True).digest != read.digest
    assert save_bundle(place, networks[:2], read, overwrite=True).digest != read.digest
    unbiased = read.model_copy(update={"class_bias": None})
    assert save_bundle(place, networks, unbiased, overwrite=True).digest != read.digest
    assert save_bundle(place, networks[:1], read, overwrite=True).members == 1
    assert sorted(p.name for p in Path(place).iterdir()) == ["model.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("activation", "bias", "message"),
    [
        ("softmax", (0.5, 1), "class_bias has 2 entries, its 3 classes need one each"),
        ("softmax", (0.5, math.inf, 0), "every class_bias must be a finite number"),
        ("softmax", (0.5, math.nan, 0), "every class_bias must be a finite number"),
        ("sigmoid", (0.5, 1), "belongs to the softmax activation"),
    ],
)
def test_a_class_bias_that_means_nothing_is_refused(activation: str, bias: tuple[float, ...], message: str) -> None:
    changes: dict[str, Any] = {"class_bias": bias}
    if activation == "sigmoid":
        changes |= {"activation": "sigmoid", "threshold": 0.5, "classes": manifest().classes[:2]}
    with pytest.raises(ValidationError, match=message):
        manifest(**changes)


# ---------------------------------------------------------------- what is stored


def test_what_only_training_uses_is_left_out(tmp_path: Path) -> None:
    """The heads of deep supervision are neither in the weights nor in the arguments."""
    config = CONFIG.model_copy(update={"widths": (4, 8, 8), "pools": ((1, 2, 2), (1, 2, 2)), "deep_supervision": 1})
    plain = config.for_inference()
    trained, network = build("unet", config).eval(), build("unet", plain)
    assert trained.state_dict().keys() > network.state_dict().keys()
    described = manifest(arguments=config.model_dump(mode="json"))
    saved = save_bundle(str(tmp_path / "b"), [trained], described)
    assert saved.arguments == plain.model_dump(mode="json")
    assert load((tmp_path / "b" / "model.safetensors").read_bytes()).keys() == network.state_dict().keys()
    loaded = load_networks(str(tmp_path / "b"))[1][0]
    x = torch.randn(1, 1, 2, 8, 8)
    with torch.inference_mode():
        assert torch.equal(trained(x), loaded(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (4, 6)}, r"the network does not fit its arguments: .*is \(.*needs \("),
        ({"convs_per_level": 1}, "the network does not fit its arguments: .*is missing.*and 15 more; nothing was"),
        ({"out_channels": 2}, "the network has 2 output channels, its classes need 3; nothing was written"),
    ],
    ids=["shape", "missing", "classes"],
)
def test_networks_that_do_not_fit_are_not_saved(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    other = UNetConfig.model_validate(CONFIG.model_dump() | changes)
    arguments = (other if "out_channels" in changes else CONFIG).model_dump(mode="json")
    with pytest.raises(BundleError, match=message):
        save_bundle(str(tmp_path / "b"), [build("unet", other)], manifest(arguments=arguments))
    assert not list(tmp_path.iterdir())


def test_saving_leaves_random_numbers_alone(tmp_path: Path) -> None:
    network = build("unet", CONFIG)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    save_bundle(str(tmp_path / "b"), [network], manifest())
    assert torch.equal(torch.rand(3), expected)


def test_a_score_that_is_no_number_does_not_spoil_the_bundle(tmp_path: Path) -> None:
    saved = save_bundle(str(tmp_path / "b"), [build("unet", CONFIG)], manifest(provenance={"dice": [0.5, math.nan]}))
    read = read_manifest(str(tmp_path / "b"))
    assert read.digest == saved.digest
    assert read.provenance == {"dice": [0.5, None]}


def test_reading_the_manifest_does_not_load_torch(bundle: Path) -> None:
    code = "import sys; from volseg.models.manifest import read_manifest; read_manifest(sys.argv[1]); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_existing_place_is_kept_unless_told_otherwise(bundle: Path) -> None:
    before = bundle_digest(str(bundle))
    with pytest.raises(OutputExistsError, match="--overwrite"):
        save_bundle(str(bundle), [build("unet", CONFIG)], manifest())
    assert bundle_digest(str(bundle)) == before
    (bundle / "old.txt").write_text("of the old bundle")
    saved = save_bundle(str(bundle), [build("unet", CONFIG)], manifest(overlap=0.1), overwrite=True)
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
        save_bundle(str(bundle), [build("unet", CONFIG)], manifest(), overwrite=True)
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
    values["head.conv.wight"] = values.pop("head.conv.weight")


def reshape(values: dict[str, torch.Tensor]) -> None:
    values["head.conv.weight"] = values["head.conv.weight"].reshape(4, 3, 1, 1, 1).contiguous()


def pickled(data: bytes) -> bytes:
    return pickle.dumps(sys.exit) + b"\0" * (len(data) - len(pickle.dumps(sys.exit)))


FAULTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("missing manifest", lambda p: (p / "model.json").unlink(), "model.json is missing"),
    ("missing weights", lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
    ("no JSON", lambda p: (p / "model.json").write_text("{"), "is not JSON"),
    ("no object", lambda p: (p / "model.json").write_text("[1]"), "format_version is None"),
    ("huge manifest", lambda p: (p / "model.json").write_bytes(b" " * (2 << 20)), "more than the 1048576"),
    ("another version", edit(format_version=1), "format_version is 1, this version of volseg reads 2"),
    ("changed manifest", lambda p: (p / "model.json").write_text(
        (p / "model.json").read_text().replace("class 1", "class 7")), "was changed after training"),
    ("flipped bit", flip, "is not what was trained"),
    ("cut weights", cut, "is not what was trained"),
    ("unknown architecture", edit(architecture="unnet"), "unknown architecture 'unnet'.*did you mean 'unet'"),
    ("unknown argument", edit(arguments__width=(4, 8)), "did you mean 'widths'"),
    ("bad argument", edit(arguments__dropout=2), "dropout"),
    ("unknown key", edit(treshold=0.3), "treshold"),
    ("patch", edit(patch=[5, 15, 16]), r"no input of the network.* nearest is \(5, 14, 16\) and \(5, 16, 16\)"),
    ("patch below the smallest", edit(patch=[5, 1, 16]), r"the nearest is \(5, 2, 16\)"),
    ("slices of a 2D network", edit(arguments__dims=2, patch=[5, 16, 16]), "has 5 slices along z"),
    ("class bias of a wrong length", edit(class_bias=[0.5, 1]), "class_bias has 2 entries, its 3 classes need"),
    ("class bias that is no number", edit(class_bias=[0, "much", 0]), "class_bias.1"),
    ("NaN", edit(class_bias=[0, float("nan"), 0]), "NaN is no finite number"),
    ("a number beyond all", lambda p: (p / "model.json").write_text(
        (p / "model.json").read_text().replace('"seed": 3', '"seed": 1e999')), "1e999 is no finite number"),
    ("threshold", edit(threshold=0.5), "a threshold belongs to the sigmoid"),
    ("class ids", edit(classes=[{"id": i, "name": "a", "color": "#000000"} for i in (0, 2, 1)]), "class ids must be"),
    ("too few outputs", edit(arguments__out_channels=2), "2 output channels, its classes need 3"),
    ("channels", edit(arguments__in_channels=2), "takes 2 channels, the scaling has 1"),
    ("scaling", edit(scaling__std=[0.0]), "every std must be above 0"),
    ("foreign file", edit(files={"run.py": {"sha256": "0" * 64, "size": 3}}), "its files must be"),
    ("too many weights", edit(arguments__widths=(64, 512)), "the architecture needs"),
    ("renamed tensor", swap(tensors(rename)), "head.conv.weight is missing"),
    ("reshaped tensor", swap(tensors(reshape)), r"head.conv.weight is \(4, 3, 1, 1, 1\)"),
    ("half precision", swap(tensors(lambda v: v.update({"head.conv.bias": v["head.conv.bias"].double()}))), "float64"),
    ("NaN weights", swap(tensors(lambda v: v["head.conv.bias"].fill_(float("nan")))), "head.conv.bias holds NaN"),
    ("a pickle", swap(pickled), "is no safetensors file"),
]  # fmt: skip


def of_member(number: int, fault: Callable[[Path], object]) -> Callable[[Path], object]:
    """Return a fault of one member's weights: it finds them under the name that a single network's have."""

    def apply(path: Path) -> None:
        member, single = path / f"model-{number}.safetensors", path / "model.safetensors"
        member.rename(single)
        fault(path)
        if single.exists():
            single.rename(member)

    return apply


def named_wrongly(path: Path) -> None:
    files = json.loads((path / "model.json").read_text())["files"]
    files["model-7.safetensors"] = files.pop("model-1.safetensors")
    edit(files=files)(path)


ENSEMBLE_FAULTS: list[tuple[str, Callable[[Path], object], str]] = [
    ("missing member", lambda p: (p / "model-1.safetensors").unlink(), "model-1.safetensors is missing"),
    ("damaged member", of_member(2, flip), "model-2.safetensors is not what was trained"),
    ("cut member", of_member(1, cut), "model-1.safetensors is not what was trained"),
    ("member of another name", named_wrongly, "its files must be model.safetensors alone or up to 256 named model-0"),
    ("members that are too large together", edit(files={
        f"model-{i}.safetensors": {"sha256": "0" * 64, "size": 2 << 30} for i in range(3)}),
     "its weights are 6442450944 bytes together, more than the 4294967296"),
    ("member of another size", edit(files={
        f"model-{i}.safetensors": {"sha256": "0" * 64, "size": 99 + 10**5 * i} for i in range(3)}),
     "model-0.safetensors has 99 bytes, the architecture needs"),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "message"), [f[1:] for f in ENSEMBLE_FAULTS], ids=[f[0] for f in ENSEMBLE_FAULTS])
def test_a_faulty_ensemble_is_refused(ensemble: Path, fault: Callable[[Path], object], message: str) -> None:
    fault(ensemble)
    for read in (load_networks, read_manifest):
        with pytest.raises(BundleError, match=message) as caught:
            read(str(ensemble))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("fault", "message"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_faulty_bundle_is_refused(bundle: Path, fault: Callable[[Path], object], message: str) -> None:
    fault(bundle)
    with pytest.raises(BundleError, match=message) as caught:
        load_networks(str(bundle))
    assert "\n" not in str(caught.value)


def test_a_missing_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no model bundle at .*nowhere"):
        read_manifest(str(tmp_path / "nowhere"))
