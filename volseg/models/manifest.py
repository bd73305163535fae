"""`model.json`, the description that makes a bundle complete: everything but the weights, readable without torch.

A bundle is a folder with `model.json` and `model.safetensors`, or `model-0.safetensors`, `model-1.safetensors` and so
on where several networks answer together. The manifest holds the digest of every file of weights, and its own: whoever
changes one of them is found out before anything is computed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator

from pydantic import ValidationError

from volseg.errors import BundleError
from volseg.models.config import NetworkConfig, to_network, to_volume
from volseg.models.description import (
    WEIGHTS_LIMIT,
    WEIGHTS_NAME,
    BundleManifest,
    ClassInfo,
    FileInfo,
    InputSides,
    digest_of,
    weights_names,
)
from volseg.storage import files

__all__ = [
    "MANIFEST_NAME",
    "WEIGHTS_NAME",
    "BundleManifest",
    "ClassInfo",
    "FileInfo",
    "InputSides",
    "bundle_digest",
    "network_faults",
    "read_description",
    "read_manifest",
    "read_weights",
    "weights_names",
]

FORMAT_VERSION = 2
MANIFEST_NAME = "model.json"
MANIFEST_LIMIT = 1 << 20
MEMBERS_LIMIT = 256
# Names, shapes and offsets of the tensors stand before the values.
_HEADER_LIMIT = 1 << 20


def read_manifest(uri: str) -> BundleManifest:
    """Read and check the bundle at `uri` without loading a network.

    Raises BundleError where a file is missing, too large or damaged, a value is not allowed, the architecture is
    unknown, or the weights are not of the size that it needs.
    """
    manifest = read_description(uri)
    for _ in read_weights(uri, manifest):
        pass
    return manifest


def read_description(uri: str) -> BundleManifest:
    """Read and check `model.json` alone: whether the weights are what it says is left to `read_weights`."""
    manifest = _parse(uri, _read_limited(uri, MANIFEST_NAME, MANIFEST_LIMIT))
    faults = network_faults(manifest)
    if faults:
        raise BundleError(f"{files.join(uri, MANIFEST_NAME)}: {'; '.join(faults)}; the bundle cannot be used")
    return manifest


def read_weights(uri: str, manifest: BundleManifest) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the content of every file of weights, checked one after the other; raises BundleError."""
    for name in weights_names(manifest.members):
        info = manifest.files[name]
        weights = _read_limited(uri, name, info.size)
        found = hashlib.sha256(weights).hexdigest()
        if (len(weights), found) != (info.size, info.sha256):
            raise BundleError(
                f"{files.join(uri, name)} is not what was trained: {len(weights)} bytes with digest {found[:12]}, "
                f"expected {info.size} with {info.sha256[:12]}; the bundle is not used: train again or copy it anew"
            )
        yield name, weights


def bundle_digest(uri: str) -> str:
    """Return the digest that names the bundle at `uri`, weights included; raises BundleError like `read_manifest`."""
    digest = read_manifest(uri).digest
    assert digest is not None  # read_manifest refuses a manifest without one
    return digest


def _read_limited(uri: str, name: str, limit: int) -> bytes:
    place = files.join(uri, name)
    size = files.size(place)
    if size is None:
        if not files.exists(uri):
            raise BundleError(f"no model bundle at {uri}: nothing is there; give the folder that `volseg train` wrote")
        raise BundleError(f"{uri} is no complete model bundle: {name} is missing; train again or copy the whole folder")
    if size > limit:
        raise BundleError(
            f"{place} has {size} bytes, more than the {limit} that are allowed for it; it was not read: "
            "the bundle is damaged or not volseg's"
        )
    return files.read_bytes(place)


def _parse(uri: str, data: bytes) -> BundleManifest:
    place = files.join(uri, MANIFEST_NAME)
    try:
        values = json.loads(data, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{place} is not JSON ({error}); the bundle cannot be used: train again or copy it anew"
        ) from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{place}: format_version is {version!r}, this version of volseg reads {FORMAT_VERSION}; "
            "use the version that wrote the bundle, or train again"
        )
    try:
        manifest = BundleManifest.model_validate(values)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}" for e in error.errors()[:5])
        raise BundleError(f"{place} is not allowed: {faults}; the bundle cannot be used") from None
    if manifest.digest != digest_of(values):
        raise BundleError(
            f"{place} was changed after training: its digest is {str(manifest.digest)[:12]}, "
            f"its content gives {digest_of(values)[:12]}; the bundle is not used: train again or copy it anew"
        )
    return manifest


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


def network_faults(manifest: BundleManifest) -> list[str]:
    """Return what does not fit together: network, classes, scaling, patch, files; raises BundleError for arguments."""
    config = manifest.config
    outputs = 1 if manifest.activation == "sigmoid" else len(manifest.classes)
    faults = []
    if config.out_channels != outputs:
        faults.append(f"the network has {config.out_channels} output channels, its classes need {outputs}")
    if config.in_channels != manifest.scaling.channels:
        faults.append(f"the network takes {config.in_channels} channels, the scaling has {manifest.scaling.channels}")
    return faults + _patch_faults(manifest, config) + _file_faults(manifest, config)


def _patch_faults(manifest: BundleManifest, config: NetworkConfig) -> list[str]:
    patch, axis = manifest.patch, manifest.axis
    flat = config.dims == 2
    sides = to_network(patch, axis) if flat else patch
    if flat and sides[0] != 1:
        return [f"patch {patch} has {sides[0]} slices along {axis}, a 2D network takes one at a time"]
    if manifest.sides().allow(patch):
        return []
    fitting = sorted({config.fit(sides, up=False), config.fit(sides, up=True)})
    named = " and ".join(str(to_volume(n, axis) if flat else n) for n in fitting)
    return [f"patch {patch} is no input of the network, whose pooling is {manifest.pooling}: the nearest is {named}"]


def _file_faults(manifest: BundleManifest, config: NetworkConfig) -> list[str]:
    names = weights_names(manifest.members)
    if set(manifest.files) != set(names) or len(names) > MEMBERS_LIMIT:
        return [
            f"its files must be {WEIGHTS_NAME} alone or up to {MEMBERS_LIMIT} named model-0.safetensors, "
            f"model-1.safetensors and so on, got {sorted(manifest.files)[:5]}"
        ]
    total = sum(info.size for info in manifest.files.values())
    if total > WEIGHTS_LIMIT:
        return [f"its weights are {total} bytes together, more than the {WEIGHTS_LIMIT} that are allowed"]
    wrong = [name for name in names if not 0 <= manifest.files[name].size - config.state_bytes <= _HEADER_LIMIT]
    if not wrong:
        return []
    return [f"{wrong[0]} has {manifest.files[wrong[0]].size} bytes, the architecture needs {config.state_bytes}"]
