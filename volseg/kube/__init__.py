"""Kubernetes through KubeRay: a spec becomes a RayJob. Plain values in, plain values out; nothing is sent anywhere."""

from volseg.kube.manifests import load_base, to_yaml
from volseg.kube.render import Kind, Placement, kind_of, render_job

__all__ = ["Kind", "Placement", "kind_of", "load_base", "render_job", "to_yaml"]
