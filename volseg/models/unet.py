"""The U-Net in 2D and 3D (Ronneberger et al. 2015, Cicek et al. 2016), with optional residual blocks (He et al. 2016).

One class for all variants; `UNetConfig` says which. Memory: a tensor is let go as soon as its last reader has run, so
the peak of a forward is what the finest decoder level needs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from volseg.models.config import UNetConfig, group_count


def _conv(config: UNetConfig, cin: int, cout: int, kernel: int, *, bias: bool) -> nn.Module:
    kind = nn.Conv2d if config.dims == 2 else nn.Conv3d
    return kind(cin, cout, kernel, padding=kernel // 2, bias=bias)


def _norm(config: UNetConfig, width: int) -> nn.Module:
    if config.norm == "batch":
        return nn.BatchNorm2d(width) if config.dims == 2 else nn.BatchNorm3d(width)
    if config.norm == "instance":
        kind = nn.InstanceNorm2d if config.dims == 2 else nn.InstanceNorm3d
        return kind(width, affine=True)
    if config.norm == "group":
        return nn.GroupNorm(group_count(width), width)
    return nn.Identity()


def _activation(config: UNetConfig) -> nn.Module:
    if config.activation == "relu":
        return nn.ReLU(inplace=True)
    if config.activation == "leaky_relu":
        return nn.LeakyReLU(0.01, inplace=True)
    return SiLU()


class SiLU(nn.Module):
    """x * sigmoid(x), in place where no gradient needs the input."""

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to itself."""
        return F.silu(x, inplace=not torch.is_grad_enabled())


class Stage(nn.Module):
    """Convolution, normalisation, activation: run one by one by `Block`, so that no frame keeps an input alive."""

    def __init__(self, config: UNetConfig, cin: int, cout: int, *, active: bool) -> None:
        super().__init__()
        self.conv = _conv(config, cin, cout, 3, bias=config.norm == "none")
        self.norm = _norm(config, cout)
        self.act = _activation(config) if active else nn.Identity()


class Block(nn.Module):
    """The convolutions of one level, with an optional shortcut around them."""

    def __init__(self, config: UNetConfig, cin: int, cout: int) -> None:
        super().__init__()
        last = config.convs_per_level - 1
        self.stages = nn.ModuleList(
            Stage(config, cin if i == 0 else cout, cout, active=not (config.residual and i == last))
            for i in range(config.convs_per_level)
        )
        self.residual = config.residual
        # Of the block's input and its shortcut, the one with fewer channels is what stays in memory meanwhile.
        self.early = cin >= cout
        self.shortcut = _conv(config, cin, cout, 1, bias=True) if config.residual and cin != cout else nn.Identity()
        self.act = _activation(config) if config.residual else nn.Identity()
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """Map the single tensor of `inputs` (b, cin, ...) to (b, cout, ...).

        The list is emptied: with the caller's reference gone, the input's memory is free once it has been read.
        """
        x = inputs.pop()
        kept = (self.shortcut(x) if self.early else x) if self.residual else None
        for stage in self.stages:
            assert isinstance(stage, Stage)
            x = stage.conv(x)
            x = stage.norm(x)
            x = stage.act(x)
        if kept is not None:
            x = x.add_(kept if self.early else self.shortcut(kept))
            del kept
        return self.dropout(self.act(x))  # type: ignore[no-any-return]


class UNet(nn.Module):
    """U-Net from (b, in_channels, [z,] y, x) to logits (b, out_channels, [z,] y, x).

    Every side must be a multiple of the pooling factor; otherwise ValueError.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self._factors = [pool[3 - config.dims :] for pool in config.factors]
        cin = config.in_channels
        self.encoder = nn.ModuleList()
        for width in config.widths:
            self.encoder.append(Block(config, cin, width))
            cin = width
        self.ups = nn.ModuleList()
        self.decoder = nn.ModuleList()
        for i in reversed(range(len(self._factors))):
            width = config.widths[i]
            self.ups.append(self._up(cin, width, self._factors[i]))
            self.decoder.append(Block(config, (width if config.up == "transpose" else cin) + width, width))
            cin = width
        self.head = _conv(config, cin, config.out_channels, 1, bias=True)
        self.apply(_initialise)

    def _up(self, cin: int, cout: int, factor: tuple[int, ...]) -> nn.Module:
        if self.config.up == "nearest":
            return nn.Upsample(scale_factor=tuple(float(f) for f in factor), mode="nearest")
        if self.config.dims == 2:
            return nn.ConvTranspose2d(cin, cout, (factor[0], factor[1]), (factor[0], factor[1]))
        pool = (factor[0], factor[1], factor[2])
        return nn.ConvTranspose3d(cin, cout, pool, pool)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits; see the class for shapes."""
        pooling = self.config.pooling[3 - self.config.dims :]
        if x.ndim != self.config.dims + 2 or any(s % p for s, p in zip(x.shape[2:], pooling, strict=True)):
            raise ValueError(
                f"input {tuple(x.shape)} must be (b, c, {'z, ' * (self.config.dims - 2)}y, x) "
                f"with sides that are multiples of {pooling}"
            )
        skips: list[Tensor] = []
        for i, block in enumerate(self.encoder):
            if i:
                skips.append(x)
                x = self._pool(x, i - 1)
            holder = [x]
            del x
            x = block(holder)
        for up, block in zip(self.ups, self.decoder, strict=True):
            x = up(x)
            holder = [torch.cat((skips.pop(), x), dim=1)]
            del x
            x = block(holder)
        return self.head(x)  # type: ignore[no-any-return]

    def _pool(self, x: Tensor, level: int) -> Tensor:
        factor = self._factors[level]
        return F.max_pool2d(x, factor) if self.config.dims == 2 else F.max_pool3d(x, factor)


def _initialise(module: nn.Module) -> None:
    # He et al. 2015; torch's own default is meant for linear activations and starts the loss lower than it learns.
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_unet(config: UNetConfig) -> nn.Module:
    """Return a U-Net with random weights."""
    return UNet(config)
