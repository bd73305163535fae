"""The manifests that all others are made from, and YAML as Kubernetes reads it."""

from __future__ import annotations

import re
from copy import deepcopy
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

Manifest = dict[str, Any]

_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./@-]*")
# Readers of YAML 1.1 take these for truth values, one letter ones included.
_TRUTHS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan"})


def load_base() -> tuple[Manifest, Manifest]:
    """Return the RayCluster and the RayJob of `base`, the latter with the former's spec as its own cluster's."""
    cluster, job = deepcopy(_read("raycluster.yaml")), deepcopy(_read("rayjob.yaml"))
    job["spec"]["rayClusterSpec"] = deepcopy(cluster["spec"])
    return cluster, job


def to_yaml(manifest: Manifest) -> str:
    """Write a manifest as YAML that no reader takes for anything else: text is quoted unless it cannot be but text."""
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


@cache
def _read(name: str) -> Manifest:
    document = yaml.safe_load((files("volseg.kube") / "base" / name).read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such, and never an alias, which kustomize and people dislike."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    if "\n" in text:
        style = "|"
    elif _PLAIN.fullmatch(text) and text.lower() not in _TRUTHS:
        style = ""
    else:
        style = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
