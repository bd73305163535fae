"""The arguments of all architectures that come with volseg, in one place to import them from; needs no torch."""

from volseg.models.fcn8 import FCN8Config
from volseg.models.inception import InceptionUNetConfig
from volseg.models.monai import MonaiConfig
from volseg.models.network import (
    Axis,
    LevelConfig,
    Measured,
    NetworkConfig,
    ProgramConfig,
    TracedConfig,
    to_network,
    to_volume,
)
from volseg.models.unet import UNetConfig
from volseg.models.vgg import VGGClassifierConfig

__all__ = [
    "Axis",
    "FCN8Config",
    "InceptionUNetConfig",
    "LevelConfig",
    "Measured",
    "MonaiConfig",
    "NetworkConfig",
    "ProgramConfig",
    "TracedConfig",
    "UNetConfig",
    "VGGClassifierConfig",
    "to_network",
    "to_volume",
]
