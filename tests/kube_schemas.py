"""Manifests against schemas, strictly: KubeRay's own for Ray's kinds, Kubernetes' for the others.

A cluster drops fields that it does not know, without a word; here they are errors.
"""

from __future__ import annotations

import json
import lzma
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

SCHEMAS = Path(__file__).parent / "schemas"
Manifest = dict[str, Any]

_METADATA = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"


class StrictLoader(yaml.SafeLoader):
    """YAML in which no key stands twice; PyYAML would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        assert not twice, f"{node.start_mark}: {twice} twice"
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> list[Any]:
    """Return all documents of a YAML text."""
    return list(yaml.load_all(text, StrictLoader))


def faults(manifest: Manifest) -> list[str]:
    """Return what is wrong with a manifest, with the place of each fault."""
    kind, group = manifest.get("kind", ""), str(manifest.get("apiVersion", "")).rpartition("/")[0]
    validator = _of_ray(kind) if group == "ray.io" else _of_kubernetes(kind)
    if validator is None:
        return [f"no schema of {manifest.get('apiVersion')} {kind}"]
    filled = _with_defaults(manifest, validator.schema) if group == "ray.io" else manifest
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(filled)]


@cache
def _of_ray(kind: str) -> Draft202012Validator | None:
    path = SCHEMAS / f"ray.io_{kind.lower()}s.yaml.xz"
    if not path.exists():
        return None
    definition = yaml.load(lzma.decompress(path.read_bytes()), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema = _strict(version["schema"]["openAPIV3Schema"])
    core = _core()
    # A resource definition leaves its metadata to Kubernetes, which knows their fields.
    schema["properties"]["metadata"] = {"$ref": f"#/$defs/{_METADATA}"}
    schema["properties"]["apiVersion"] = {"const": "ray.io/v1"}
    schema["properties"]["kind"] = {"const": kind}
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return Draft202012Validator({**schema, "$defs": core["$defs"]})


@cache
def _of_kubernetes(kind: str) -> Draft202012Validator | None:
    core = _core()
    if kind not in core["$defs"]:
        return None
    return Draft202012Validator({
        "$ref": f"#/$defs/{kind}", "$defs": core["$defs"], "required": ["apiVersion", "kind", "metadata"]
    })  # fmt: skip


@cache
def _core() -> dict[str, Any]:
    document = json.loads(lzma.decompress((SCHEMAS / "kubernetes-1.37.json.xz").read_bytes()))
    assert isinstance(document, dict)
    return document


def _strict(node: Any) -> Any:
    """Turn OpenAPI v3 of a resource definition into JSON Schema that refuses unknown fields."""
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    schema = {
        key: {name: _strict(inner) for name, inner in value.items()} if key == "properties" else _strict(value)
        for key, value in node.items()
        if not key.startswith("x-kubernetes-") and key not in {"default", "description", "nullable", "format"}
    }
    if "default" in node:
        schema["default"] = node["default"]
    if node.get("type") == "object" and not node.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    if node.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if node.get("nullable"):
        schema["type"] = [schema["type"], "null"]
    return schema


def _with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    """Fill in what a cluster fills in before it validates."""
    if isinstance(value, dict):
        known = schema.get("properties", {})
        extra = schema.get("additionalProperties")
        filled = {
            key: _with_defaults(inner, known.get(key) or (extra if isinstance(extra, dict) else {}))
            for key, inner in value.items()
        }
        return {k: s["default"] for k, s in known.items() if "default" in s and k not in value} | filled
    if isinstance(value, list):
        return [_with_defaults(inner, schema.get("items", {})) for inner in value]
    return value
