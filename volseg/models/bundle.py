"""Bundles with their network: saving after training, loading for inference. No pickle, nothing stored is ever run."""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from volseg.errors import BundleError, OutputExistsError
from volseg.models.manifest import (
    MANIFEST_NAME,
    WEIGHTS_NAME,
    BundleManifest,
    FileInfo,
    bundle_digest,
    read_checked,
    read_manifest,
)
from volseg.models.registry import build
from volseg.storage import files

__all__ = ["BundleManifest", "bundle_digest", "load_network", "read_manifest", "save_bundle"]


def load_network(uri: str) -> tuple[BundleManifest, nn.Module]:
    """Load the bundle at `uri`: its manifest and its network in eval mode, fp32, on the CPU.

    Raises BundleError as `read_manifest` does, and where the stored tensors differ from what the architecture needs in
    name, shape or type, or are not finite.
    """
    manifest, data = read_checked(uri)
    network = build(manifest.architecture, manifest.config)
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        raise BundleError(f"{files.join(uri, WEIGHTS_NAME)} is no safetensors file: {error}") from None
    _check_tensors(uri, network.state_dict(), tensors)
    network.load_state_dict(tensors)
    return manifest, network.eval()


def save_bundle(
    uri: str,
    network: nn.Module,
    manifest: BundleManifest,
    *,
    extra: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> BundleManifest:
    """Write a bundle to `uri` and return its manifest with the digests filled in.

    Locally it is written beside its place and renamed, so that a bundle is there whole or not at all; on other storage
    `model.json` comes last. `extra` holds further files by name, such as a curve picture; no digest covers them.
    Raises OutputExistsError where something lies at `uri` and `overwrite` is not set.
    """
    if files.exists(uri) and not overwrite:
        raise OutputExistsError(f"{uri} exists; nothing was written: choose another place, or say --overwrite")
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in network.state_dict().items()}
    weights = save_tensors(tensors)
    sealed = manifest.sealed(FileInfo(sha256=hashlib.sha256(weights).hexdigest(), size=len(weights)))
    text = sealed.model_dump_json(indent=2) + "\n"
    content = {**(extra or {}), WEIGHTS_NAME: weights, MANIFEST_NAME: text.encode()}
    if files.is_local(uri):
        _write_folder(files.local_path(uri), content)
    else:
        files.remove(uri)
        for name, data in content.items():
            files.write_bytes(files.join(uri, name), data)
    return sealed


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


def _check_tensors(uri: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    faults = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    faults += [f"{name} is unknown" for name in found.keys() - wanted.keys()]
    for name in wanted.keys() & found.keys():
        a, b = wanted[name], found[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            faults.append(f"{name} is {tuple(b.shape)} {b.dtype}, needs {tuple(a.shape)} {a.dtype}")
        elif not bool(torch.isfinite(b).all()):
            faults.append(f"{name} holds NaN or Inf")
    if faults:
        shown = "; ".join(sorted(faults)[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
        raise BundleError(f"{files.join(uri, WEIGHTS_NAME)} does not fit its architecture: {shown}; it is not used")
