"""Architectures by name: the only way from a bundle's text to a network. Needs no torch until one is built.

Other packages add architectures through entry points of the group `volseg.networks`, each an `Architecture`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from volseg.errors import BundleError, nearest
from volseg.models.config import (
    FCN8Config,
    InceptionUNetConfig,
    MonaiConfig,
    NetworkConfig,
    ProgramConfig,
    UNetConfig,
    VGGClassifierConfig,
)
from volseg.models.monai import build_monai

if TYPE_CHECKING:
    from torch import nn

ENTRY_POINTS = "volseg.networks"


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network that can be asked for by name: the model of its arguments and the function that builds it.

    The network maps (b, in_channels, [z,] y, x) to logits (b, out_channels, [z,] y, x), smaller by twice the margin;
    in train mode it may return a tuple of logits, finest first, the coarser ones covering the same voxels.
    """

    config: type[NetworkConfig]
    build: Callable[[Any], nn.Module]


def _graph(config: ProgramConfig) -> nn.Module:
    from volseg.models.graph import build_graph

    return build_graph(config)


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({
    "unet": Architecture(UNetConfig, _graph),
    "inception_unet": Architecture(InceptionUNetConfig, _graph),
    "fcn8": Architecture(FCN8Config, _graph),
    "vgg_classifier": Architecture(VGGClassifierConfig, _graph),
    "monai": Architecture(MonaiConfig, build_monai),
})  # fmt: skip


def architecture(name: str) -> Architecture:
    """Return the architecture called `name`: one of volseg's own, else one that an installed package registers.

    Only an entry point of just this name is ever loaded. Raises BundleError with the nearest right name, and where the
    entry point cannot be loaded or is no `Architecture`.
    """
    found = ARCHITECTURES.get(name)
    return found if found is not None else _plugged_in(name)


def make_config(name: str, arguments: dict[str, Any]) -> NetworkConfig:
    """Check `arguments` of architecture `name`; raises BundleError that names every wrong one."""
    kind = architecture(name).config
    try:
        return kind.model_validate(arguments)
    except ValidationError as error:
        faults = []
        for e in error.errors():
            key = ".".join(str(part) for part in e["loc"])
            hint = nearest(key, kind.model_fields) if e["type"] == "extra_forbidden" else ""
            faults.append(f"{key or 'arguments'}: {e['msg']}{hint}")
        raise BundleError(f"arguments of architecture {name!r} are not allowed: {'; '.join(faults)}") from None


def build(name: str, config: NetworkConfig) -> nn.Module:
    """Return a network of architecture `name` with random weights."""
    return architecture(name).build(config)


def _plugged_in(name: str) -> Architecture:
    points = metadata.entry_points(group=ENTRY_POINTS)
    matching = [point for point in points if point.name == name]
    if not matching:
        names = sorted({*ARCHITECTURES, *(point.name for point in points)})
        raise BundleError(
            f"unknown architecture {name!r}{nearest(name, names)}; this version knows {', '.join(names)}: train the "
            "model again, use the version of volseg that wrote it, or install the package that registers it"
        )
    if len({point.value for point in matching}) > 1:
        places = ", ".join(sorted(point.value for point in matching))
        raise BundleError(
            f"architecture {name!r} is registered more than once ({places}); none was loaded: uninstall all but one"
        )
    place = matching[0].value
    try:
        found = matching[0].load()
    except (ImportError, AttributeError) as error:
        raise BundleError(
            f"architecture {name!r} is registered as {place}, which cannot be loaded ({error}); nothing was built: "
            "repair the package that registers it"
        ) from error
    if not (isinstance(found, Architecture) and issubclass(found.config, NetworkConfig)):
        raise BundleError(
            f"architecture {name!r} is registered as {place}, a {type(found).__name__}; nothing was built: it must be "
            "a volseg.models.registry.Architecture of a NetworkConfig and a function that builds its network"
        )
    return found
