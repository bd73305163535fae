"""Architectures by name: the only way from a bundle's text to a network. Needs no torch until one is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from volseg.errors import BundleError, nearest
from volseg.models.config import UNetConfig

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network that can be asked for by name: the model of its arguments and the function that builds it."""

    config: type[UNetConfig]
    build: Callable[[UNetConfig], nn.Module]


def _unet(config: UNetConfig) -> nn.Module:
    from volseg.models.unet import build_unet

    return build_unet(config)


ARCHITECTURES = {"unet": Architecture(UNetConfig, _unet)}


def architecture(name: str) -> Architecture:
    """Return the architecture called `name`; raises BundleError with the nearest right name."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        known = ", ".join(sorted(ARCHITECTURES))
        raise BundleError(
            f"unknown architecture {name!r}{nearest(name, ARCHITECTURES)}; this version knows {known}: "
            "train the model again, or use the version of volseg that wrote it"
        ) from None


def make_config(name: str, arguments: dict[str, Any]) -> UNetConfig:
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


def build(name: str, config: UNetConfig) -> nn.Module:
    """Return a network of architecture `name` with random weights."""
    return architecture(name).build(config)
