"""Networks of MONAI as an architecture: a class of `monai.networks.nets` by name, and the arguments of its constructor.

MONAI is no dependency of volseg: it is imported when such a network is built. Nothing outside that namespace can be
named.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Self

from pydantic import Field, JsonValue, model_validator

from volseg.errors import BundleError, nearest
from volseg.models.network import TracedConfig

if TYPE_CHECKING:
    from torch import nn

_NAMESPACE = "monai.networks.nets"
_OURS = ("spatial_dims", "in_channels", "out_channels")


class MonaiConfig(TracedConfig):
    """Arguments of a MONAI network: `network` is the name of its class, `arguments` what its constructor takes.

    `spatial_dims`, `in_channels` and `out_channels` come from `dims`, `in_channels` and `out_channels`.
    """

    network: str = Field(pattern=r"^[A-Z][A-Za-z0-9_]*$", max_length=100)
    arguments: dict[str, JsonValue] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        taken = [name for name in _OURS if name in self.arguments]
        if taken:
            raise ValueError(f"{', '.join(taken)} follow from dims, in_channels and out_channels: leave them out")
        return self


def first_line(error: Exception) -> str:
    """Return what a foreign error says, without the pages that may follow."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def build_monai(config: MonaiConfig) -> nn.Module:
    """Return the network with random weights.

    Raises BundleError where MONAI is not installed, has no such network, or refuses its arguments.
    """
    from torch import nn

    try:
        nets = importlib.import_module(_NAMESPACE)
    except ImportError as error:
        raise BundleError(
            f"network {config.network!r} needs MONAI, which cannot be imported here ({first_line(error)}); nothing was "
            "built: pip install monai"
        ) from None
    found = getattr(nets, config.network, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith(_NAMESPACE)):
        raise BundleError(
            f"{_NAMESPACE} has no network {config.network!r}{nearest(config.network, dir(nets))}; nothing was built: "
            "give the name of one of its classes"
        )
    sizes = (config.dims, config.in_channels, config.out_channels)
    try:
        network: nn.Module = found(**dict(zip(_OURS, sizes, strict=True)), **config.arguments)
    except (TypeError, ValueError, KeyError, AssertionError, RuntimeError, ImportError) as error:
        raise BundleError(
            f"MONAI's {config.network} refuses its arguments ({first_line(error)}); nothing was built: "
            "see its documentation, and give them in `arguments`"
        ) from error
    return network
