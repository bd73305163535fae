"""Exported networks: raw grey values in, the bundle's own probabilities out."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from tests.support import make_bundle
from volseg.errors import BundleError, InputError, OutputExistsError
from volseg.intensity import Scaling
from volseg.models.bundle import load_networks, read_manifest
from volseg.models.export import export_onnx, export_program

SCALING = Scaling(low=(10,), high=(240,), mean=(120,), std=(50,))


def expected(bundle: str, raw: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return a bundle's probabilities (b, classes, ...) of raw grey values, by numpy from each member's logits."""
    manifest, networks = load_networks(bundle)
    total = np.zeros(1)
    for network in networks:
        with torch.inference_mode():
            logits = network(torch.from_numpy(manifest.scaling.apply(raw))).numpy().astype(np.float64)
        if manifest.activation == "sigmoid":
            one = 1 / (1 + np.exp(-logits))
            total = total + np.concatenate([1 - one, one], axis=1)
        else:
            bias = np.array(manifest.class_bias or np.zeros(logits.shape[1]))
            powers = np.exp(logits + bias.reshape(-1, *[1] * (logits.ndim - 2)))
            total = total + powers / powers.sum(axis=1, keepdims=True)
    return total / len(networks)


def greys(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(len(shape)).uniform(0, 255, shape).astype(np.float32)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bundle of two 2D networks with three classes and a bias."""
    return make_bundle(
        tmp_path_factory.mktemp("flat") / "bundle", dims=2, patch=(16, 1, 24), axis="y", members=2, scaling=SCALING,
        class_bias=(0.7, -0.4, 0), residual=True,
    )  # fmt: skip


def test_onnx_gives_the_probabilities_of_raw_grey_values(flat: str, tmp_path: Path) -> None:
    told = export_onnx(flat, str(tmp_path / "net.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for shape in ((1, 1, 16, 24), (3, 1, 8, 40)):
        (got,) = session.run(["probabilities"], {"raw": greys(*shape)})
        assert got.shape == (shape[0], 3, *shape[2:])
        np.testing.assert_allclose(got, expected(flat, greys(*shape)), atol=1e-4)
    assert told["input"]["shape"] == [None, 1, None, None]
    assert told["input"]["axes"] == ["b", "c", "z", "x"]
    assert told["input"]["sides"]["step"] == [2, 2]
    assert (told["members"], told["bundle"]) == (2, read_manifest(flat).digest)
    stored = json.loads(session.get_modelmeta().custom_metadata_map["volseg.json"])
    assert stored["classes"] == told["classes"]
    assert stored["input"] == told["input"]


@pytest.mark.chaos
def test_a_single_member_can_be_exported(flat: str, tmp_path: Path) -> None:
    both, one = (tmp_path / name for name in ("both.pt2", "one.pt2"))
    export_program(flat, str(both))
    assert export_program(flat, str(one), member=1)["members"] == 1
    raw = torch.from_numpy(greys(2, 1, 16, 24))
    manifest, networks = load_networks(flat)
    scaled = torch.from_numpy(manifest.scaling.apply(raw.numpy()))
    with torch.inference_mode():
        probabilities = torch.softmax(networks[1](scaled) + torch.tensor([0.7, -0.4, 0]).view(-1, 1, 1), dim=1)
    answer = torch.export.load(one).module()(raw)
    torch.testing.assert_close(answer, probabilities, atol=1e-4, rtol=0)
    together = torch.export.load(both).module()(raw)
    np.testing.assert_allclose(together.detach().numpy(), expected(flat, raw.numpy()), atol=1e-4)
    assert (together - answer).abs().max() > 0.01


def test_a_3d_sigmoid_is_exported_with_both_classes(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", classes=2, patch=(8, 8, 8), scaling=SCALING)
    extra = {"volseg.json": ""}
    told = export_program(bundle, str(tmp_path / "net.pt2"))
    program = torch.export.load(tmp_path / "net.pt2", extra_files=extra).module()
    for shape in ((1, 1, 8, 8, 8), (2, 1, 6, 8, 10)):
        got = program(torch.from_numpy(greys(*shape))).detach().numpy()
        np.testing.assert_allclose(got, expected(bundle, greys(*shape)), atol=1e-4)
        np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-6)
    assert told["input"]["shape"] == [None, 1, None, None, None]
    assert told["output"]["threshold"] == 0.5
    assert json.loads(extra["volseg.json"])["classes"] == told["classes"]


@pytest.mark.chaos
def test_an_unpadded_network_is_exported_with_its_margin(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", dims=2, patch=(1, 44, 44), padded=False)
    told = export_program(bundle, str(tmp_path / "net.pt2"))
    program = torch.export.load(tmp_path / "net.pt2").module()
    margin = read_manifest(bundle).margin[1:]
    assert tuple(told["output"]["margin"]) == margin
    assert min(margin) > 0
    for side in (44, 48):
        got = program(torch.from_numpy(greys(1, 1, side, side))).detach().numpy()
        assert got.shape == (1, 3, side - 2 * margin[0], side - 2 * margin[1])
        np.testing.assert_allclose(got, expected(bundle, greys(1, 1, side, side)), atol=1e-4)


@pytest.mark.chaos
def test_the_smallest_sides_are_those_that_the_exported_network_takes(tmp_path: Path) -> None:
    """Coarse tensors of a single voxel are ruled out by the exporter in some networks; then a step more is needed."""
    bundle = make_bundle(tmp_path / "b", dims=2, architecture="fcn8", widths=(2, 2, 2, 2, 2), patch=(1, 32, 32))
    told = export_program(bundle, str(tmp_path / "net.pt2"))
    program = torch.export.load(tmp_path / "net.pt2").module()
    raw = greys(1, 1, *told["input"]["sides"]["smallest"])
    np.testing.assert_allclose(program(torch.from_numpy(raw)).detach().numpy(), expected(bundle, raw), atol=1e-4)
    assert told["input"]["patch"] == list(raw.shape[2:])


def test_exports_that_cannot_be_are_refused(flat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "net.onnx"
    with pytest.raises(InputError, match=r"member 2 was asked for, but .* has 2, numbered from 0"):
        export_onnx(flat, str(out), member=2)
    monkeypatch.setattr("volseg.models.export._ONNX_LIMIT", 1000)
    with pytest.raises(BundleError, match="an ONNX file holds at most 1000; nothing was written"):
        export_onnx(flat, str(out))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(
        InputError, match=r"needs the package onnxscript, which is not .* pip install 'volseg\[export\]'"
    ):
        export_onnx(flat, str(out))
    assert not out.exists()
    out.write_text("mine")
    for export in (export_onnx, export_program):
        with pytest.raises((OutputExistsError, InputError)):
            export(flat, str(out))
    with pytest.raises(OutputExistsError, match="exists; nothing was written"):
        export_program(flat, str(out))
    assert out.read_text() == "mine"
