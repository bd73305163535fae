"""Bundles from networks that were trained elsewhere: what fits segments, what does not is refused, nothing is run."""

import pickle
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import save
from torch import nn

from tests.support import Case, segment, smooth, store
from volseg.analysis.card import describe_model
from volseg.errors import BundleError, OutputExistsError, VolsegError
from volseg.intensity import Scaling
from volseg.models.bundle import load_networks
from volseg.models.export import export_program
from volseg.models.foreign import ForeignNetwork, import_network
from volseg.models.network import TracedConfig
from volseg.models.registry import Architecture, build, make_config

SCALING = Scaling(low=(10,), high=(240,), mean=(120,), std=(50,))


class PluginConfig(TracedConfig):
    """Arguments of the plug-in of these tests."""

    width: int = 4


class Plugin(nn.Module):
    """A user's own network; `choosy` ones decide by values, which no exporter can follow."""

    def __init__(self, config: PluginConfig) -> None:
        super().__init__()
        self.inner = nn.Conv3d(config.in_channels, config.width, 3, padding=1)
        self.outer = nn.Conv3d(config.width, config.out_channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.outer(torch.relu(self.inner(x)))
        return logits


class ChoosyPlugin(Plugin):
    """Decides by values, which no exporter can follow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_meta or bool(x.sum() > 0):
            return super().forward(x)
        return -super().forward(x)


PLUGIN = Architecture(PluginConfig, Plugin)
CHOOSY = Architecture(PluginConfig, ChoosyPlugin)


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        metadata.EntryPoint(name, f"{__name__}:{value}", "volseg.networks")
        for name, value in (("plugin", "PLUGIN"), ("choosy", "CHOOSY"))
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda **wanted: metadata.EntryPoints(points).select(**wanted))


def unet_weights(folder: Path, name: str = "net.pt", **changes: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Save the weights of a small U-Net and return them with what `ForeignNetwork` needs to know of them."""
    arguments = {"dims": 2, "widths": (4, 8)}
    torch.manual_seed(3)
    network = build("unet", make_config("unet", {**arguments, "out_channels": 3}))
    tensors = {key: value.clone() for key, value in network.state_dict().items()}
    torch.save(tensors, folder / name)
    given = {"architecture": "unet", "arguments": arguments, "weights": (str(folder / name),),
             "classes": ("air", "pore", "metal"), "scaling": SCALING, "patch": (1, 16, 16)}  # fmt: skip
    return tensors, given | changes


def test_a_foreign_network_becomes_a_bundle_that_segments(tmp_path: Path) -> None:
    tensors, given = unet_weights(tmp_path, class_bias=(0, 0.5, 0), voxel_size=(1, 2, 2), unit="micrometer")
    manifest = import_network(str(tmp_path / "b"), ForeignNetwork(**given))
    read, (network,) = load_networks(str(tmp_path / "b"))
    assert read == manifest
    assert all(torch.equal(value, tensors[name]) for name, value in network.state_dict().items())
    assert [c.name for c in read.classes] == ["air", "pore", "metal"]
    assert (read.scaling, read.patch, read.unit) == (SCALING, (1, 16, 16), "micrometer")
    assert read.provenance["imported"] == [str(tmp_path / "net.pt")]
    image = store(tmp_path / "image.zarr", smooth((3, 20, 24)))
    report = segment(Case(image, str(tmp_path / "b"), tmp_path), tmp_path / "out.zarr")
    assert report["status"] == "complete"


def test_a_plug_in_becomes_a_bundle_that_segments(tmp_path: Path, plugins: None) -> None:
    torch.manual_seed(0)
    (tmp_path / "w.safetensors").write_bytes(save(Plugin(PluginConfig(in_channels=1, out_channels=1)).state_dict()))
    image = store(tmp_path / "image.zarr", smooth((8, 12, 12)))
    given = ForeignNetwork(
        architecture="plugin", weights=(str(tmp_path / "w.safetensors"),), classes=("air", "pore"), image=image,
        activation="sigmoid", patch=(8, 8, 8),
    )  # fmt: skip
    manifest = import_network(str(tmp_path / "b"), given)
    assert manifest.threshold == 0.5
    values = np.asarray(zarr.open_array(str(tmp_path / "image.zarr"), mode="r")[...])
    assert manifest.scaling.mean[0] == pytest.approx(values.mean(), abs=1)
    assert manifest.config.receptive_field == (1, 1, 1)
    report = segment(Case(image, str(tmp_path / "b"), tmp_path), tmp_path / "out.zarr")
    assert report["status"] == "complete"
    told = describe_model(str(tmp_path / "b"))
    assert (told["architecture"], told["parameters"]) == ("plugin", 4 * 27 + 4 + 4 + 1)


def test_several_files_make_an_ensemble(tmp_path: Path) -> None:
    _, given = unet_weights(tmp_path)
    weights = (*given["weights"], *given["weights"])
    assert import_network(str(tmp_path / "b"), ForeignNetwork(**(given | {"weights": weights}))).members == 2


@pytest.mark.parametrize("nested", [None, "state_dict", "model"])
def test_weights_are_found_where_frameworks_put_them(tmp_path: Path, nested: str | None) -> None:
    tensors, given = unet_weights(tmp_path, prefix="module.")
    renamed: Any = {f"module.{name}": t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    torch.save({nested: renamed, "epoch": 3} if nested else renamed, tmp_path / "net.pt")
    import_network(str(tmp_path / "b"), ForeignNetwork(**given))
    (network,) = load_networks(str(tmp_path / "b"))[1]
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, tensors[name], atol=1e-3, rtol=1e-3)


def test_the_patch_left_out_is_the_usual_one(tmp_path: Path) -> None:
    _, given = unet_weights(tmp_path, patch=None, axis="y")
    assert import_network(str(tmp_path / "b"), ForeignNetwork(**given)).patch == (256, 1, 256)


class Harmful:
    """Unpickled, it would end the tests."""

    def __reduce__(self) -> Any:
        return sys.exit, (7,)


def write(content: Any) -> Any:
    def change(folder: Path) -> None:
        if isinstance(content, bytes):
            (folder / "net.pt").write_bytes(content)
        else:
            torch.save(content(torch.load(folder / "net.pt")), folder / "net.pt")

    return change


def with_nan(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors["head.conv.bias"][0] = float("nan")
    return tensors


FOREIGN_FAULTS: list[tuple[str, Any, dict[str, Any], str]] = [
    ("no file", lambda p: (p / "net.pt").unlink(), {}, "no weights at .*net.pt: nothing is there"),
    ("text", write(b"hello"), {}, "is neither a safetensors file .* nor one that torch saved"),
    ("a pickle that runs something", write(pickle.dumps(Harmful())), {}, "nothing in it was run"),
    ("the whole network", lambda p: torch.save(nn.Linear(1, 1), p / "net.pt"), {}, "save network.state_dict()"),
    ("no tensors", write(lambda _: {"epoch": 3}), {}, "holds no tensors by name"),
    ("NaN", write(with_nan), {}, "head.conv.bias holds NaN or Inf; nothing was written"),
    ("other widths", None, {"arguments": {"dims": 2, "widths": (4, 6)}}, r"does not fit 'unet': .* needs \("),
    ("a prefix", write(lambda t: {f"net.{k}": v for k, v in t.items()}), {}, "is missing.*or the prefix of"),
    ("too few classes for its outputs", None, {"classes": ("air", "pore")}, r"head.conv.bias is \(3,\)"),
    ("outputs that clash", None, {"arguments": {"dims": 2, "widths": (4, 8), "out_channels": 4}},
     "out_channels 4, not 3.*nothing was written"),
    ("unknown network", None, {"architecture": "unnet"}, "unknown architecture 'unnet'.*did you mean 'unet'"),
    ("unknown argument", None, {"arguments": {"dims": 2, "width": (4, 8)}}, "did you mean 'widths'"),
    ("no scaling", None, {"scaling": None}, "neither intensity statistics and image were given"),
    ("two scalings", None, {"image": "image.zarr"}, "both intensity statistics and image were given"),
    ("patch", None, {"patch": (1, 15, 16)}, r"the nearest is \(1, 14, 16\) and \(1, 16, 16\); nothing was written"),
    ("class bias", None, {"class_bias": (1, 2)}, "class_bias has 2 entries, its 3 classes need one each; nothing"),
    ("sigmoid", None, {"activation": "sigmoid"}, r"is \(3,\) .*needs \(1,\)"),
    ("unit", None, {"threshold": 0.4}, "a threshold belongs to the sigmoid"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "options", "message"), [f[1:] for f in FOREIGN_FAULTS], ids=[f[0] for f in FOREIGN_FAULTS]
)
def test_a_foreign_network_that_does_not_fit_is_refused(
    tmp_path: Path, change: Any, options: dict[str, Any], message: str
) -> None:
    _, given = unet_weights(tmp_path)
    if change is not None:
        change(tmp_path)
    with pytest.raises(VolsegError, match=message) as caught:
        import_network(str(tmp_path / "b"), ForeignNetwork(**(given | options)))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_an_existing_bundle_is_not_replaced_silently(tmp_path: Path) -> None:
    _, given = unet_weights(tmp_path)
    import_network(str(tmp_path / "b"), ForeignNetwork(**given))
    with pytest.raises(OutputExistsError, match="--overwrite"):
        import_network(str(tmp_path / "b"), ForeignNetwork(**given))
    import_network(str(tmp_path / "b"), ForeignNetwork(**(given | {"axis": "z", "unit": None})), overwrite=True)


def test_a_network_that_decides_by_values_is_not_exported(tmp_path: Path, plugins: None) -> None:
    torch.manual_seed(0)
    (tmp_path / "w.safetensors").write_bytes(save(Plugin(PluginConfig(in_channels=1, out_channels=2)).state_dict()))
    given = ForeignNetwork(
        architecture="choosy", weights=(str(tmp_path / "w.safetensors"),), classes=("air", "pore"), scaling=SCALING,
    )  # fmt: skip
    import_network(str(tmp_path / "b"), given)
    with pytest.raises(BundleError, match=r"torch.export cannot follow the network 'choosy'") as caught:
        export_program(str(tmp_path / "b"), str(tmp_path / "net.pt2"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "net.pt2").exists()
