"""The forward on CPUs: tiled convolutions, sources apart, pooling without places, against torch's own modules."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tests.support import needs_bf16
from volseg.geometry import Triple
from volseg.models.fold import for_inference, memory_format
from volseg.models.forward import CpuForward, pool
from volseg.models.hardware import has_bf16
from volseg.models.program import Activation
from volseg.models.registry import build, make_config
from volseg.models.tiles import MADE, READ, tiles_of
from volseg.models.winograd import CpuConv

torch.set_num_threads(1)

# Wide enough for tiles and for concatenations that are not copied.
WIDE: list[tuple[str, dict[str, Any]]] = [
    ("unet", {"widths": (16, 32)}),
    ("unet", {"widths": (16, 16), "padded": False, "norm": "none", "activation": "leaky_relu"}),
    ("unet", {"widths": (16, 16), "up": "nearest", "residual": True, "activation": "silu"}),
    ("unet", {"widths": (16, 16), "norm": "instance"}),
    ("unet", {"widths": (16, 16), "norm": "group", "up_kernel": 3}),
    ("unet", {"widths": (8, 16, 32), "stem": True}),
    ("inception_unet", {"widths": (64, 64)}),
    ("fcn8", {"widths": (8, 8, 8, 8, 8)}),
    ("vgg_classifier", {"widths": (8, 16), "hidden": 16}),
]


def last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def convolution(dims: int, cin: int, cout: int, pad: int, *, bias: bool = True) -> nn.Conv2d | nn.Conv3d:
    kind = nn.Conv2d if dims == 2 else nn.Conv3d
    return kind(cin, cout, 3, padding=pad, bias=bias).requires_grad_(False)


@pytest.mark.parametrize("kernels", ["tiled", "direct", "plain"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("name", "values"), WIDE, ids=str)
def test_every_network_answers_as_its_modules_do(name: str, values: dict[str, Any], dims: int, kernels: Any) -> None:
    torch.manual_seed(0)
    config = make_config(name, {"dims": dims, "in_channels": 2, "out_channels": 3, **values})
    net = build(name, config).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    sides = config.fit((20, 28, 24) if dims == 3 else (1, 44, 60), up=True)
    x = torch.randn(2, 2, *sides[3 - dims :])
    with torch.inference_mode():
        ready = for_inference(net, kernels=kernels)
        assert isinstance(ready, CpuForward) == (kernels != "plain")
        expected = net(x)
        x = x.contiguous(memory_format=memory_format(ready))
        for _ in range(2):
            torch.testing.assert_close(ready(x), expected, rtol=1e-4, atol=1e-4)
        if has_bf16("cpu"):
            reduced = for_inference(net, dtype=torch.bfloat16, kernels=kernels)(x.bfloat16()).float()
            assert float((reduced - expected).pow(2).mean()) < 0.01 * float(expected.var())


@settings(max_examples=25, deadline=None)
@given(
    dims=st.sampled_from([2, 3]), depth=st.integers(4, 21), rest=st.integers(3, 9), pad=st.sampled_from([0, 1]),
    widths=st.lists(st.sampled_from([1, 8, 16, 17]), min_size=1, max_size=3), cout=st.sampled_from([1, 8, 24]),
    activation=st.sampled_from(["none", "relu", "leaky_relu", "silu"]), batch=st.integers(1, 2), bias=st.booleans(),
)  # fmt: skip
def test_a_convolution_of_several_sources_is_that_of_their_concatenation(
    dims: int, depth: int, rest: int, pad: int, widths: list[int], cout: int, activation: Activation, batch: int,
    bias: bool,
) -> None:  # fmt: skip
    torch.manual_seed(depth)
    conv = convolution(dims, sum(widths), cout, pad, bias=bias)
    sources = [last(torch.randn(batch, width, depth, *[rest] * (dims - 1))) for width in widths]
    with torch.inference_mode():
        expected = conv(torch.cat(sources, 1))
        expected = {"none": expected, "relu": F.relu(expected), "leaky_relu": F.leaky_relu(expected, 0.01),
                    "silu": F.silu(expected)}[activation]  # fmt: skip
        held = list(sources)
        found = CpuConv(conv, widths, activation)(held)
    assert not held, "the sources are let go"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_tiles_are_little_less_exact_than_a_direct_convolution() -> None:
    torch.manual_seed(0)
    conv = convolution(3, 64, 32, 1)
    x = last(torch.randn(1, 64, 16, 16, 16).relu_())
    with torch.inference_mode():
        exact = F.conv3d(
            x.double(), conv.weight.double(), conv.bias.double() if conv.bias is not None else None, padding=1
        )
        errors = [
            float((CpuConv(conv, [64], "none", tiled=tiled)([x]) - exact).pow(2).mean().sqrt())
            for tiled in (True, False)
        ]
    assert 0 < errors[0] < 4 * errors[1] < 1e-5


@needs_bf16
def test_bf16_tiles_are_as_exact_as_bf16_allows() -> None:
    torch.manual_seed(0)
    conv = convolution(3, 64, 32, 1)
    x = last(torch.randn(1, 64, 16, 16, 16).relu_())
    with torch.inference_mode():
        exact = conv(x)
        conv, x = conv.bfloat16(), x.bfloat16()
        errors = [
            float((CpuConv(conv, [64], "none", tiled=tiled)([x]) - exact).pow(2).mean().sqrt())
            for tiled in (True, False)
        ]
    assert 0 < errors[0] < 3 * errors[1] < 0.02


def test_the_place_in_a_batch_does_not_matter() -> None:
    torch.manual_seed(0)
    conv = CpuConv(convolution(3, 16, 16, 1), [16], "relu")
    x = torch.randn(3, 16, 12, 10, 10)
    with torch.inference_mode():
        together = conv([last(x)])
        for place in range(3):
            assert torch.equal(conv([last(x[place : place + 1])])[0], together[place])


def test_threads_may_share_a_network_from_its_first_forward_on() -> None:
    """As those of a validation do."""
    torch.manual_seed(0)
    convolutions = [CpuConv(convolution(3, 64, 64, 1), [16] * 4, "relu") for _ in range(20)]
    x = last(torch.randn(1, 16, 8, 8, 8))
    gate = threading.Barrier(2)

    def run() -> list[torch.Tensor]:
        torch.set_num_threads(1)
        found = []
        with torch.inference_mode():
            for conv in convolutions:
                gate.wait()
                found.append(conv([x] * 4))
        return found

    with ThreadPoolExecutor(2) as pool:
        first, second = (future.result() for future in [pool.submit(run) for _ in range(2)])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [(2, 2, 2), (1, 2, 2), (3, 1, 2), (2, 2), (1, 3)])
def test_pooling_is_torchs(kernel: tuple[int, ...], dtype: torch.dtype) -> None:
    x = last(torch.randn(2, 5, *(6 * k for k in kernel)).to(dtype))
    expected = F.max_pool2d(x, kernel) if len(kernel) == 2 else F.max_pool3d(x, kernel)
    assert torch.equal(pool(x, kernel), expected)
    x[0, 0, 1] = torch.nan
    assert torch.equal(pool(x, kernel).isnan(), (F.max_pool2d if len(kernel) == 2 else F.max_pool3d)(x, kernel).isnan())


@pytest.mark.parametrize(
    ("kernel", "cin", "cout", "made", "count"),
    [
        ((3, 3, 3), 16, 16, (64, 64, 64), 16),
        ((1, 3, 3), 16, 16, (1, 62, 64), 16),
        ((3, 3, 3), 16, 16, (6, 8, 8), 2),
        ((3, 3, 3), 16, 16, (5, 8, 8), None),
        ((3, 3, 3), 16, 16, (2, 8, 8), None),
        ((3, 3, 3), 1, 16, (64, 64, 64), None),
        ((1, 1, 1), 16, 16, (64, 64, 64), None),
        ((5, 5, 5), 16, 16, (64, 64, 64), None),
    ],
)
def test_what_is_tiled(kernel: Triple, cin: int, cout: int, made: Triple, count: int | None) -> None:
    tiles = tiles_of(kernel, cin, cout, made)
    assert (None if tiles is None else tiles.count) == count
    if tiles is not None:
        assert 1 <= tiles.chunk <= tiles.count
        assert READ * tiles.count < 3 * MADE * tiles.count
