"""Fine-tuning: a training that starts from the weights of a bundle, also with other classes or channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from volseg.errors import SpecError
from volseg.models.bundle import load_networks
from volseg.models.manifest import BundleManifest, read_manifest
from volseg.spec import TrainSpec


def settle_init(spec: TrainSpec) -> TrainSpec:
    """Return `spec` with architecture and dimension of the bundle that it starts from, if it does.

    Raises BundleError where there is no good bundle, SpecError where another dimension was asked for.
    """
    if spec.init is None:
        return spec
    manifest = read_manifest(spec.init)
    dims = manifest.config.dims
    if spec.dims not in {None, dims}:
        raise SpecError(
            f"--init {spec.init} is a {dims}D network, --dims {spec.dims} was asked for: their weights have other "
            "shapes; nothing was trained: leave out --dims, or start without --init"
        )
    return spec.model_copy(update={"architecture": manifest.architecture, "dims": dims})


def start_from(network: nn.Module, uri: str, names: Sequence[str], channels: int) -> str:
    """Fill `network`, which reads `channels`, with the weights of the bundle at `uri`; return a line on what was taken.

    An ensemble gives its first member. A first layer with other channels gets the mean over the bundle's, so that its
    answers keep their size; of a last layer the classes whose `names` agree are taken. What fits nothing stays
    random. Raises SpecError where no tensor fits.
    """
    manifest, networks = load_networks(uri)
    source = networks[0].state_dict()
    rows = _same_classes(manifest, names)
    target = network.state_dict()
    taken, changed, fresh = 0, 0, []
    for name, tensor in target.items():
        found = _fit(source.get(name), tensor, (manifest.config.in_channels, channels), rows)
        if found is None:
            fresh.append(name)
            continue
        taken += 1
        changed += source[name].shape != tensor.shape
        target[name] = found
    if not taken:
        raise SpecError(
            f"no weight of --init {uri} fits the network that is to be trained; nothing was trained: leave out the "
            "options that change it, or --init"
        )
    network.load_state_dict(target)
    text = f"starting from {uri}: {taken} of {len(target)} tensors taken"
    text += f", {changed} of them fitted to other channels or classes" if changed else ""
    return text + (f"; new: {', '.join(fresh[:4])}{' ...' if len(fresh) > 4 else ''}" if fresh else "")


def _same_classes(manifest: BundleManifest, names: Sequence[str]) -> list[tuple[int, int]]:
    """Return pairs of a row of the new head and the row of the old one that answers for the same class."""
    known = [c.name for c in manifest.classes]
    if len(names) == 2 or len(known) == 2:
        # One sigmoid channel answers for a pair of classes.
        return [(0, 0)] if list(names) == known else []
    return [(i, known.index(name)) for i, name in enumerate(names) if name in known]


def _fit(
    source: Tensor | None, target: Tensor, channels: tuple[int, int], rows: list[tuple[int, int]]
) -> Tensor | None:
    if source is None or source.ndim != target.ndim:
        return None
    if source.shape == target.shape:
        return source.clone()
    if source.ndim > 2 and (source.shape[1], target.shape[1]) == channels and source.shape[2:] == target.shape[2:]:
        return _other_channels(source, target) if source.shape[0] == target.shape[0] else None
    if source.shape[1:] == target.shape[1:] and rows:
        head = target.clone()
        for new, old in rows:
            head[new] = source[old]
        return head
    return None


@torch.no_grad()
def _other_channels(source: Tensor, target: Tensor) -> Tensor:
    """Return a first layer for other channels: the mean over the old ones, as strong in all as those together."""
    mean = source.mean(dim=1, keepdim=True) * (source.shape[1] / target.shape[1])
    return mean.expand_as(target).clone()
