"""What `kubectl kustomize` makes of the folders in deploy/kuberay, for machines that have no kubectl.

No package brings kustomize, so the few features that these folders use are done here and every other one is refused.
`kustomize.json` holds the digests of what kubectl itself made; a test compares, and asks kubectl, too, where there is
one. ``python -m tests.kustomize`` writes the digests anew, with kubectl.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.kube_schemas import Manifest, read_yaml

REPO = Path(__file__).parents[1]
KUBERAY = REPO / "deploy" / "kuberay"
RECORDED = Path(__file__).with_name("kustomize.json")
FOLDERS = tuple(
    sorted(str(path.parent.relative_to(KUBERAY)) for path in KUBERAY.glob("*/kustomization.yaml"))
)  # fmt: skip


def build(folder: Path) -> list[Manifest]:
    """Return the manifests of a kustomization."""
    return _apply([], folder)


def by_name(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Return manifests by ``Kind/name``; kustomize sorts them as it likes."""
    named = {f"{m['kind']}/{m['metadata']['name']}": m for m in manifests}
    assert len(named) == len(manifests)
    return named


def digest(manifests: list[Manifest]) -> str:
    """Name a set of manifests."""
    return hashlib.sha256(json.dumps(by_name(manifests), sort_keys=True).encode()).hexdigest()


def by_kubectl(folder: Path) -> list[Manifest] | None:
    """Return what kubectl makes of a folder, None where there is no kubectl."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        return None
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=True, timeout=60)
    return read_yaml(done.stdout)


def _apply(manifests: list[Manifest], folder: Path) -> list[Manifest]:
    """Return `manifests` with what the kustomization in `folder` adds and changes."""
    (settings,) = read_yaml((folder / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "resources", "components", "patches", "images", "replacements"}
    assert set(settings) <= known, f"{folder}: {set(settings) - known} is not done here"
    found = list(manifests)
    for name in settings.get("resources", []):
        place = folder / name
        found += build(place) if place.is_dir() else read_yaml(place.read_text())
    for name in settings.get("components", []):
        found = _apply(found, folder / name)
    for entry in settings.get("patches", []):
        found = _patched(found, entry, folder)
    for image in settings.get("images", []):
        _rename_images(found, image)
    for entry in settings.get("replacements", []):
        _replace(found, entry)
    return found


def _selected(manifest: Manifest, target: dict[str, str]) -> bool:
    assert set(target) <= {"group", "kind", "name"}
    group = manifest["apiVersion"].rpartition("/")[0]
    there = {"group": group, "kind": manifest["kind"], "name": manifest["metadata"]["name"]}
    return all(there[key] == value for key, value in target.items())


def _patched(manifests: list[Manifest], entry: dict[str, Any], folder: Path) -> list[Manifest]:
    assert set(entry) <= {"path", "patch", "target", "options"}
    (patch,) = read_yaml((folder / entry["path"]).read_text() if "path" in entry else entry["patch"])
    chosen = [manifest for manifest in manifests if _selected(manifest, entry["target"])]
    # kustomize says nothing of it, and then a misspelt target changes nothing. A component is for several kinds.
    assert chosen or folder.parent.name == "components", f"{folder}: nothing is {entry['target']}"
    if isinstance(patch, dict) and patch.get("$patch") == "delete":
        return [manifest for manifest in manifests if manifest not in chosen]
    for manifest in chosen:
        if isinstance(patch, list):
            for operation in patch:
                _operate(manifest, operation)
        else:
            _merge(manifest, patch)
    return manifests


def _merge(value: dict[str, Any], patch: dict[str, Any]) -> None:
    """Merge groups; all else, lists too, is replaced, as in kinds whose lists kustomize has no keys of."""
    for key, inner in patch.items():
        if isinstance(inner, dict) and isinstance(value.get(key), dict):
            _merge(value[key], inner)
        else:
            assert inner is not None, "removing by null is not done here"
            value[key] = copy.deepcopy(inner)


def _operate(document: Any, operation: dict[str, Any]) -> None:
    """Apply one operation of RFC 6902."""
    *path, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].lstrip("/").split("/")]
    for part in path:
        document = document[int(part)] if isinstance(document, list) else document[part]
    value = copy.deepcopy(operation["value"])
    if operation["op"] == "add" and isinstance(document, list):
        document.insert(len(document) if last == "-" else int(last), value)
        return
    assert operation["op"] in {"add", "replace"}, operation["op"]
    key: Any = int(last) if isinstance(document, list) else last
    if operation["op"] == "replace":
        document[key]
    document[key] = value


def _rename_images(manifests: list[Manifest], image: dict[str, str]) -> None:
    assert set(image) == {"name", "newName", "newTag"}
    for container in _containers(manifests):
        if container["image"].split(":")[0] == image["name"]:
            container["image"] = f"{image['newName']}:{image['newTag']}"


def _containers(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        for inner in value:
            yield from _containers(inner)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in {"containers", "initContainers"}:
                yield from inner
            else:
                yield from _containers(inner)


def _replace(manifests: list[Manifest], entry: dict[str, Any]) -> None:
    source = dict(entry["source"])
    keys = source.pop("fieldPath").split(".")
    (value,) = [manifest for manifest in manifests if _selected(manifest, source)]
    for key in keys:
        value = value[key]
    for target in entry["targets"]:
        for manifest in manifests:
            if _selected(manifest, target["select"]):
                for place in target["fieldPaths"]:
                    *path, last = place.split(".")
                    inner = manifest
                    for key in path:
                        inner = inner[key]
                    assert last in inner or target["options"]["create"]
                    inner[last] = copy.deepcopy(value)


if __name__ == "__main__":
    made = {folder: by_kubectl(KUBERAY / folder) for folder in FOLDERS}
    digests = {folder: digest(manifests) for folder, manifests in made.items() if manifests is not None}
    if not digests:
        sys.exit("kubectl is not installed, and only it may write the digests")
    RECORDED.write_text(json.dumps(digests, indent=1) + "\n")
