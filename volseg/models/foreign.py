"""Bundles from networks that were trained elsewhere: weights out of a file, everything else from who knows it."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from volseg.errors import BundleError, InputError
from volseg.geometry.box import Box, Triple
from volseg.intensity import Scaling
from volseg.models.bundle import build_apart, save_bundle, shortened, tensor_faults
from volseg.models.description import WEIGHTS_LIMIT, BundleManifest, ClassInfo
from volseg.models.measure import complete
from volseg.models.network import Axis, NetworkConfig, to_volume
from volseg.models.registry import make_config
from volseg.spec import Spec
from volseg.storage import files, ome
from volseg.storage.volume import open_volume

# Keys under which training frameworks put the tensors beside the state of their optimiser.
_NESTED = ("state_dict", "model_state_dict", "network_weights", "model")
_PATCH = {2: 256, 3: 64}
_SAMPLED_BOXES = 32
_SAMPLED_SIDE = 64


class ForeignNetwork(Spec):
    """What a network that was trained elsewhere is, as far as its weights do not say it.

    `weights` are one file a member: safetensors, or a state dict that torch saved. Of its tensors' names `prefix` is
    dropped, such as ``module.``. `arguments` are those of `architecture`; channels follow from classes and scaling.
    The scaling is `(clip(v, low, high) - mean) / std` with one entry a channel, or measured on the volume `image` as
    training does. `patch` is (z, y, x) in voxels; without it the nearest that fits 256 voxels a side in 2D, 64 in 3D.
    """

    architecture: str
    weights: tuple[str, ...] = Field(min_length=1)
    classes: tuple[str, ...] = Field(min_length=2)
    arguments: dict[str, Any] = Field(default_factory=dict)
    prefix: str = ""
    image: str | None = None
    scaling: Scaling | None = None
    patch: Triple | None = None
    axis: Axis = "z"
    activation: Literal["softmax", "sigmoid"] = "softmax"
    threshold: float | None = None
    class_bias: tuple[float, ...] | None = None
    voxel_size: tuple[float, float, float] | None = None
    unit: str | None = None
    overlap: float = 0.5


def import_network(uri: str, given: ForeignNetwork, *, overwrite: bool = False) -> BundleManifest:
    """Write a bundle of a network that was trained elsewhere to `uri` and return its manifest.

    Floating-point weights of other precisions become 32 bits. Raises InputError where what was given is wrong or
    contradicts itself, BundleError where the weights do not fit the architecture, VolumeError where `image` is no
    volume, OutputExistsError where something lies at `uri` and `overwrite` is not set.
    """
    scaling = _scaling(given)
    outputs = 1 if given.activation == "sigmoid" else len(given.classes)
    arguments = {**given.arguments, "in_channels": scaling.channels, "out_channels": outputs}
    clashing = [f"{k} {given.arguments[k]}, not {v}" for k, v in arguments.items() if given.arguments.get(k, v) != v]
    if clashing:
        raise InputError(
            f"the arguments say {', '.join(clashing)} as classes and scaling do; nothing was written: leave them out, "
            "or correct the classes or the scaling"
        )
    config = complete(given.architecture, make_config(given.architecture, arguments))
    networks = [_network(given, config, place) for place in given.weights]
    manifest = _manifest(given, config, scaling)
    return save_bundle(uri, networks, manifest, overwrite=overwrite)


def _scaling(given: ForeignNetwork) -> Scaling:
    if (given.scaling is None) == (given.image is None):
        raise InputError(
            f"{'neither' if given.image is None else 'both'} intensity statistics and image were given; nothing was "
            "written: give low, high, mean and std if you know how grey values were scaled, else an image to measure"
        )
    return given.scaling or sample_scaling(given.image or "")


def sample_scaling(image_uri: str) -> Scaling:
    """Return the scaling statistics of the volume at `image_uri`, taken from boxes spread evenly over it.

    Raises VolumeError where it is no volume, InputError where its sample holds no finite value.
    """
    image = open_volume(image_uri)
    side = (_SAMPLED_SIDE,) * 3
    cells = list(Box.of(image.shape).tiles((side[0], side[1], side[2])))
    count = min(_SAMPLED_BOXES, len(cells))
    chosen = [cells[(2 * i + 1) * len(cells) // (2 * count)] for i in range(count)]
    samples = np.concatenate([image.read(box).reshape(image.channels or 1, -1) for box in chosen], axis=1)
    try:
        return Scaling.measure(samples)
    except ValueError as error:
        raise InputError(f"{image_uri}: {error}; nothing was written: give low, high, mean and std") from None


def _network(given: ForeignNetwork, config: NetworkConfig, place: str) -> nn.Module:
    network = build_apart(given.architecture, config.for_inference())
    needed = network.state_dict()
    found = {}
    for name, tensor in read_tensors(place).items():
        short = name.removeprefix(given.prefix)
        like = needed.get(short)
        floating = like is not None and like.is_floating_point() and tensor.is_floating_point()
        found[short] = tensor.to(like.dtype) if like is not None and floating else tensor
    faults = tensor_faults(needed, found)
    if faults:
        raise BundleError(
            f"{place} does not fit {given.architecture!r}: {shortened(faults)}; nothing was written: give the "
            "arguments that the network was trained with, or the prefix of its tensors' names"
        )
    network.load_state_dict(found)
    return network.eval()


def read_tensors(place: str) -> dict[str, Tensor]:
    """Return the tensors in a file of safetensors or of torch, by name; nothing in it is ever run.

    In a torch file they may lie one level down, beside the state of an optimiser. Raises InputError where the file is
    missing or too large, BundleError where it holds something else.
    """
    size = files.size(place)
    if size is None:
        raise InputError(f"no weights at {place}: nothing is there; nothing was written: give the file of the weights")
    if size > WEIGHTS_LIMIT:
        raise InputError(f"{place} has {size} bytes, more than the {WEIGHTS_LIMIT} that are allowed; it was not read")
    data = files.read_bytes(place)
    if zipfile.is_zipfile(BytesIO(data)) or data[:1] == b"\x80":
        return _from_torch(place, data)
    try:
        return dict(load_tensors(data))
    except SafetensorError as error:
        raise BundleError(
            f"{place} is neither a safetensors file ({error}) nor one that torch saved; nothing was written"
        ) from None


def _from_torch(place: str, data: bytes) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            content = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BundleError(
            f"{place} cannot be read as weights alone ({reason}); nothing was written, and nothing in it was run: "
            "save network.state_dict() with torch.save"
        ) from None
    for key in ("", *_NESTED):
        values = content if not key else content.get(key) if isinstance(content, Mapping) else None
        if isinstance(values, Mapping) and values and all(isinstance(v, Tensor) for v in values.values()):
            return {str(name): tensor.contiguous() for name, tensor in values.items()}
    raise BundleError(
        f"{place} holds no tensors by name, neither on top nor under {', '.join(_NESTED)}; nothing was written: save "
        "network.state_dict() with torch.save"
    )


def _manifest(given: ForeignNetwork, config: NetworkConfig, scaling: Scaling) -> BundleManifest:
    side = _PATCH[config.dims]
    usual: Triple = config.fit((1 if config.dims == 2 else side, side, side), up=True)
    patch = given.patch or (to_volume(usual, given.axis) if config.dims == 2 else usual)
    threshold = given.threshold
    if threshold is None and given.activation == "sigmoid":
        threshold = 0.5
    try:
        return BundleManifest(
            architecture=given.architecture,
            arguments=config.model_dump(mode="json"),
            classes=_classes(given.classes),
            activation=given.activation,
            threshold=threshold,
            class_bias=given.class_bias,
            scaling=scaling,
            voxel_size=given.voxel_size,
            unit=given.unit,
            patch=patch,
            axis=given.axis,
            overlap=given.overlap,
            provenance={"imported": [files.absolute(place) for place in given.weights], "image": given.image},
        )
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'options'}: {e['msg']}" for e in error.errors()[:5])
        raise InputError(f"the network cannot be described so: {faults}; nothing was written") from None


def _classes(names: Sequence[str]) -> tuple[ClassInfo, ...]:
    colours = ome.default_colours(len(names))
    return tuple(
        ClassInfo(id=i, name=name, color="#{:02x}{:02x}{:02x}".format(*colours[i][:3])) for i, name in enumerate(names)
    )
