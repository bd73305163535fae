"""Bundles with their networks: saving after training, loading for inference. No pickle, nothing stored is ever run."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from volseg.errors import BundleError, OutputExistsError
from volseg.models.config import NetworkConfig
from volseg.models.manifest import (
    MANIFEST_NAME,
    BundleManifest,
    FileInfo,
    bundle_digest,
    network_faults,
    read_description,
    read_manifest,
    read_weights,
    weights_names,
)
from volseg.models.registry import build
from volseg.storage import files

__all__ = ["BundleManifest", "bundle_digest", "load_networks", "read_manifest", "save_bundle", "tensor_faults"]


def load_networks(uri: str) -> tuple[BundleManifest, list[nn.Module]]:
    """Load the bundle at `uri`: its manifest and its networks (one, or the members of an ensemble) for inference.

    They are in eval mode, fp32, on the CPU. Raises BundleError as `read_manifest` does, and where the stored tensors
    differ from what the architecture needs in name, shape or type, or are not finite.
    """
    manifest = read_description(uri)
    config = manifest.config
    networks = []
    for name, data in read_weights(uri, manifest):
        network = build(manifest.architecture, config)
        try:
            tensors = load_tensors(data)
        except SafetensorError as error:
            raise BundleError(f"{files.join(uri, name)} is no safetensors file: {error}") from None
        faults = tensor_faults(network.state_dict(), tensors)
        if faults:
            raise BundleError(
                f"{files.join(uri, name)} does not fit its architecture: {shortened(faults)}; it is not used"
            )
        network.load_state_dict(tensors)
        networks.append(network.eval())
    return manifest, networks


def save_bundle(
    uri: str,
    networks: Sequence[nn.Module],
    manifest: BundleManifest,
    *,
    extra: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> BundleManifest:
    """Write a bundle of one network, or of the members of an ensemble, and return its manifest with the digests.

    What only training uses is left out: the stored arguments are those of `config.for_inference()`, the stored tensors
    exactly its own. Locally the bundle is written beside its place and renamed, so that it is there whole or not at
    all; on other storage `model.json` comes last. `extra` holds further files by name, such as a curve picture; no
    digest covers them. Raises OutputExistsError where something lies at `uri` and `overwrite` is not set, BundleError
    where the networks do not fit the manifest.
    """
    if files.exists(uri) and not overwrite:
        raise OutputExistsError(f"{uri} exists; nothing was written: choose another place, or say --overwrite")
    config = manifest.config.for_inference()
    needed = _state_of(build_apart(manifest.architecture, config))
    names = weights_names(len(networks))
    weights = {name: _pack(network, needed) for name, network in zip(names, networks, strict=True)}
    identities = {n: FileInfo(sha256=hashlib.sha256(w).hexdigest(), size=len(w)) for n, w in weights.items()}
    sealed = manifest.model_copy(update={"arguments": config.model_dump(mode="json")}).sealed(identities)
    faults = network_faults(sealed)
    if faults:
        raise BundleError(f"the bundle {uri} would not be usable: {'; '.join(faults)}; nothing was written")
    text = sealed.model_dump_json(indent=2) + "\n"
    content = {**(extra or {}), **weights, MANIFEST_NAME: text.encode()}
    if files.is_local(uri):
        _write_folder(files.local_path(uri), content)
    else:
        files.remove(uri)
        for name, data in content.items():
            files.write_bytes(files.join(uri, name), data)
    return sealed


def build_apart(architecture: str, config: NetworkConfig) -> nn.Module:
    """Return a network with random weights and leave torch's random numbers as they were."""
    with torch.random.fork_rng(devices=[]):
        return build(architecture, config)


def tensor_faults(needed: Mapping[str, Tensor], found: Mapping[str, Tensor], *, finite: bool = True) -> list[str]:
    """Return in words how `found` differs from the tensors that are `needed`, and whether values are not `finite`."""
    faults = [f"{name} is missing" for name in needed.keys() - found.keys()]
    faults += [f"{name} is unknown" for name in found.keys() - needed.keys()]
    for name in needed.keys() & found.keys():
        a, b = needed[name], found[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            faults.append(f"{name} is {tuple(b.shape)} {b.dtype}, needs {tuple(a.shape)} {a.dtype}")
        elif finite and not bool(torch.isfinite(b).all()):
            faults.append(f"{name} holds NaN or Inf")
    return sorted(faults)


def shortened(faults: Sequence[str]) -> str:
    """Return the first three faults and how many more there are."""
    return "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")


def _state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}


def _pack(network: nn.Module, needed: Mapping[str, Tensor]) -> bytes:
    # Cloned, because safetensors refuses tensors that share their memory.
    found = {name: t.clone() for name, t in _state_of(network).items() if name in needed}
    # Values that are not finite are what loading refuses: whoever saves them can still look at them.
    faults = tensor_faults(needed, found, finite=False)
    if faults:
        raise BundleError(f"the network does not fit its arguments: {shortened(faults)}; nothing was written")
    return save_tensors(found)


def _write_folder(path: Path, content: Mapping[str, bytes]) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    old = path.with_name(f".{path.name}.{uuid.uuid4().hex}.old")
    try:
        temporary.mkdir(parents=True)
        for name, data in content.items():
            (temporary / name).write_bytes(data)
        # A folder cannot be renamed over a filled one: the old bundle steps aside first.
        if path.exists():
            path.replace(old)
        temporary.replace(path)
    except OSError as error:
        if old.exists() and not path.exists():
            old.replace(path)
        raise files.storage_error(error, str(path)) or error from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.is_dir():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.unlink(missing_ok=True)
