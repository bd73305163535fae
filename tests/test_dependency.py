"""The halo of a network is what NaN outside a window reaches: as far as computed, and no less far."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from volseg.geometry import Halo
from volseg.models.dependency import halo_of, patch_dependent
from volseg.models.measure import measure_network
from volseg.models.network import ProgramConfig, TracedConfig
from volseg.models.prove import prove_halo
from volseg.models.registry import build, make_config


def probe(network: nn.Module, config: ProgramConfig, axis: int) -> tuple[int, int]:
    """Return how many answers NaN before a cut and behind another one spoils beyond it, along `axis`."""
    halo, step, margin = halo_of(config.program), config.pooling[axis], config.margin[axis]
    long = 4 * max(halo.before[axis], halo.after[axis]) + 8 * step + 6 * margin
    wanted = [1, 1, 1]
    wanted[axis] = long
    sides = config.fit((wanted[0], wanted[1], wanted[2]), up=True)
    x, dim = (
        torch.randn(1, config.in_channels, *sides[3 - config.dims :], dtype=torch.float64),
        axis - (3 - config.dims) + 2,
    )
    first = sides[axis] // 2 // step * step
    last = sides[axis] - first
    spoilt = []
    for a, b in ((0, first), (last, sides[axis])):
        poisoned = x.clone()
        poisoned.narrow(dim, a, b - a).fill_(torch.nan)
        with torch.inference_mode():
            bad = torch.isnan(network(poisoned))
        spoilt.append(torch.nonzero(bad.any(dim=[i for i in range(bad.ndim) if i != dim])).flatten())
    before, after = int(spoilt[0].max()) + 1 - first, last - 2 * margin - int(spoilt[1].min())
    # Of an unpadded network the answer ends before what a window's end spoils.
    return max(0, before), max(0, after)


def check(name: str, arguments: dict[str, Any]) -> None:
    config = make_config(name, {"in_channels": 1, "out_channels": 2, "norm": "batch", **arguments})
    assert isinstance(config, ProgramConfig)
    torch.manual_seed(0)
    network = build(name, config).eval().double()
    halo = halo_of(config.program)
    assert halo.step == config.pooling
    for axis in range(3 - config.dims, 3):
        assert (halo.before[axis], halo.after[axis]) == probe(network, config, axis)
        assert max(halo.before[axis], halo.after[axis]) <= config.receptive_field[axis]


@st.composite
def unets(draw: st.DrawFn) -> dict[str, Any]:
    levels = draw(st.integers(1, 4))
    pools = [(1, draw(st.integers(1, 3)), draw(st.integers(1, 3))) for _ in range(levels - 1)]
    largest = max((f for pool in pools for f in pool), default=1)
    transposed = draw(st.booleans())
    padded = draw(st.booleans())
    return {
        "dims": 2, "widths": (2,) * levels, "pools": pools, "convs_per_level": draw(st.integers(1, 2)),
        "padded": padded, "stem": draw(st.booleans()),
        "up": "transpose" if transposed else "nearest", "residual": draw(st.booleans()),
        "up_kernel": draw(st.one_of(st.none(), st.integers(largest, largest + 3))) if transposed else None,
    }  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(unets())
def test_the_halo_of_any_unet_is_what_nan_reaches(arguments: dict[str, Any]) -> None:
    try:
        make_config("unet", arguments).fit((1, 1, 1), up=True)
    except ValueError:
        # Unpadded skips whose voxels do not lie on one another: no such network can be.
        return
    check("unet", arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("unet", {"dims": 3, "widths": (2, 2, 2)}),
        ("unet", {"dims": 3, "widths": (2, 2), "pools": ((1, 2, 3),), "up_kernel": 4}),
        ("inception_unet", {"dims": 2, "widths": (4, 4, 4)}),
        ("fcn8", {"dims": 2, "widths": (2, 2, 2, 2, 2)}),
        ("vgg_classifier", {"dims": 2, "widths": (2, 2, 2), "hidden": 2}),
    ],
    ids=str,
)
def test_the_halo_of_every_architecture_is_what_nan_reaches(name: str, arguments: dict[str, Any]) -> None:
    check(name, arguments)


def test_layers_that_see_the_whole_patch_are_named() -> None:
    config = make_config("unet", {"dims": 2, "widths": (8, 8), "norm": "group", "deep_supervision": 0})
    assert isinstance(config, ProgramConfig)
    names = patch_dependent(config.program)
    assert len(names) == 6
    assert names[0] == "encoder.0.0"
    fcn = make_config("fcn8", {"dims": 2, "widths": (2,) * 5, "norm": "instance"})
    assert isinstance(fcn, ProgramConfig)
    assert patch_dependent(fcn.program)[:1] == ("encoder.0.norm",)
    plain = make_config("unet", {"dims": 2, "norm": "batch"})
    assert isinstance(plain, ProgramConfig)
    assert patch_dependent(plain.program) == ()


# ---------------------------------------------------------------- networks whose layers are not known


class Known(TracedConfig):
    """Arguments of the networks below."""


class Strided(nn.Module):
    """Halves the sides, whatever they are, by convolutions that look further forth than back; repeats voxels."""

    def __init__(self, levels: int, *, choosy: bool = False) -> None:
        super().__init__()
        self.downs = nn.ModuleList([nn.Conv2d(1, 1, 3, stride=2, padding=1) for _ in range(levels)])
        self.choosy = choosy

    def forward(self, x: Tensor) -> Tensor:
        sides = x.shape[2:]
        if self.choosy and any(side % 2 ** len(self.downs) for side in sides):
            raise RuntimeError("sides must be multiples")
        for down in self.downs:
            x = down(x)
        return nn.functional.interpolate(x, scale_factor=2.0 ** len(self.downs))[..., : sides[0], : sides[1]]


def traced(network: nn.Module) -> TracedConfig:
    return Known(dims=2, in_channels=1, out_channels=1, measured=measure_network(network, 2, 1))


def proven(network: nn.Module) -> tuple[Halo | None, str]:
    torch.manual_seed(1)
    return prove_halo(network.eval(), traced(network))


def test_a_strided_network_is_proven() -> None:
    halo, why = proven(Strided(2, choosy=True))
    assert (halo, why) == (Halo((0, 4, 4), (0, 0, 0), (1, 4, 4)), "")


def test_a_network_that_takes_every_size_is_proven_on_its_true_step() -> None:
    assert traced(Strided(3)).pooling == (1, 1, 1)
    halo, why = proven(Strided(3))
    assert (halo, why) == (Halo((0, 8, 8), (0, 0, 0), (1, 8, 8)), "")


def test_the_same_of_a_program_and_of_its_network() -> None:
    config = make_config("unet", {"dims": 2, "widths": (2, 2, 2), "up_kernel": 3, "in_channels": 1, "out_channels": 1})
    assert isinstance(config, ProgramConfig)
    halo, _ = proven(build("unet", config))
    assert halo == halo_of(config.program)


class Mean(nn.Module):
    """Takes a mean over all without a layer for it."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=(2, 3), keepdim=True)


class Edges(nn.Module):
    """Looks at nothing but a voxel and its place in the input."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linspace(0, 1, x.shape[-1], dtype=x.dtype, device=x.device)


@pytest.mark.parametrize(
    ("network", "why"),
    [
        (
            nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2), nn.Conv2d(2, 1, 1)),
            r"its layer 1 \(Insta",
        ),
        (nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 1, 1)), r"its layer 1 \(GroupNorm\)"),
        (Mean(), "was not seen to end within"),
        (Edges(), "differs from that to the whole, wherever the part begins"),
    ],
    ids=["instance", "group", "mean", "place"],
)
def test_networks_that_need_the_whole_patch_are_refused(network: nn.Module, why: str) -> None:
    halo, reason = proven(network)
    assert halo is None
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(reason)
