"""Networks: what the configuration foretells is what torch does; folding changes nothing; memory is as predicted."""

import json
import statistics
import subprocess
import sys
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tests.support import long
from volseg.errors import BundleError
from volseg.geometry import Triple
from volseg.models.config import Axis, UNetConfig, to_network, to_volume
from volseg.models.fold import fold_batch_norm, for_inference, memory_format
from volseg.models.footprint import Heap
from volseg.models.registry import build, make_config

VARIANTS: list[dict[str, Any]] = [
    {},
    {"residual": True},
    {"residual": True, "convs_per_level": 1},
    {"norm": "group", "activation": "silu", "convs_per_level": 3},
    {"norm": "none", "activation": "leaky_relu", "up": "nearest", "dropout": 0.1},
    {"norm": "instance", "up": "nearest", "residual": True},
    {"stem": True},
    {"widths": (8,), "stem": True},
    {"pools": ((1, 2, 2), (1, 4, 2)), "norm": "batch"},
]


def network(dims: int, **values: Any) -> tuple[UNetConfig, nn.Module]:
    config = UNetConfig.model_validate(
        {"dims": dims, "in_channels": 2, "out_channels": 3, "widths": (8, 16, 24), **values}
    )
    torch.manual_seed(0)
    net = build("unet", config)
    for module in net.modules():  # statistics as after a training, or folding would hide its mistakes
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.weight, 0.5, 2)
    return config, net


def sample(config: UNetConfig, times: int = 2) -> torch.Tensor:
    sides = [times * factor for factor in config.pooling[3 - config.dims :]]
    return torch.randn(2, config.in_channels, *sides, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("values", VARIANTS, ids=str)
def test_every_variant_is_what_its_configuration_says(dims: int, values: dict[str, Any]) -> None:
    config, net = network(dims, **values)
    assert config.parameter_count == sum(p.numel() for p in net.parameters())
    assert config.state_bytes == sum(t.numel() * t.element_size() for t in net.state_dict().values())
    x = sample(config)
    net.train()
    logits = net(x)
    assert logits.shape == (2, 3, *x.shape[2:])
    logits.square().mean().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in net.parameters())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("values", VARIANTS, ids=str)
def test_preparing_for_inference_keeps_the_answers(dims: int, values: dict[str, Any]) -> None:
    config, net = network(dims, **values)
    x = sample(config)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with torch.inference_mode():
        expected = net.eval()(x)
        torch.testing.assert_close(fold_batch_norm(net)(x), expected, rtol=1e-4, atol=1e-4)
        ready = for_inference(net)
        torch.testing.assert_close(
            ready(x.contiguous(memory_format=memory_format(ready))), expected, rtol=1e-4, atol=1e-4
        )
    assert not any(isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d) for m in ready.modules())
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items()), "the original was changed"


def test_flops_by_hand() -> None:
    config = UNetConfig(dims=2, in_channels=1, out_channels=2, widths=(4, 8), convs_per_level=1)
    down = 9 * 1 * 4 * 64 + 9 * 4 * 8 * 16
    up = 8 * 4 * 64 + 9 * 8 * 4 * 64
    assert config.flops((1, 8, 8)) == 2 * (down + up + 4 * 2 * 64)


def test_sides_that_the_pooling_does_not_divide_are_refused() -> None:
    config, net = network(3, pools=((1, 2, 2), (2, 2, 2)))
    assert config.pooling == (2, 4, 4)
    with pytest.raises(ValueError, match="multiples of"):
        net(torch.zeros(1, 2, 4, 8, 10))
    with pytest.raises(ValueError, match="must be"):
        net(torch.zeros(1, 2, 8, 8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widths": (0, 4)}, "every width"),
        ({"widths": (8, 16), "pools": ((2, 2, 2), (2, 2, 2))}, "2 widths need 1 pools"),
        ({"widths": (8, 16), "pools": ((2, 2, 9),)}, "from 1 to 8"),
        ({"dims": 2, "widths": (8, 16), "pools": ((2, 2, 2),)}, "cannot pool across slices"),
        ({"norm": "group", "widths": (8, 12)}, "multiples of 8"),
        ({"dims": 4}, "dims"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_configurations_outside_the_limits_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        UNetConfig.model_validate(values)


def test_unknown_architectures_and_arguments_come_with_the_nearest_name() -> None:
    with pytest.raises(BundleError, match=r"unknown architecture 'unett' \(did you mean 'unet'\?\)"):
        make_config("unett", {})
    with pytest.raises(BundleError, match=r"residul.*did you mean 'residual'"):
        make_config("unet", {"residul": True})


@pytest.mark.parametrize("axis", ["z", "y", "x"])
def test_network_coordinates_put_the_slice_axis_first(axis: Axis) -> None:
    assert to_network((3, 4, 5), axis) == {"z": (3, 4, 5), "y": (4, 3, 5), "x": (5, 3, 4)}[axis]
    assert to_volume(to_network((3, 4, 5), axis), axis) == (3, 4, 5)


def test_the_model_of_the_heap_fills_the_smallest_gap_and_merges_neighbours() -> None:
    heap = Heap()
    a, b, c, d = (heap.new(size) for size in (10, 4, 6, 4))
    assert heap.extent == 24
    heap.free(a)
    heap.free(c)
    assert heap.new(6) == c, "6 is a closer fit than 10"
    heap.free(b)
    assert heap.new(14) == a, "10 and 4 have become one gap"
    heap.free(d)
    assert heap.new(8) == d, "the last gap grows at the end"
    assert heap.extent == 28


_MEASURE = """
import json, sys
from volseg.models.allocator import keep_freed_memory, large_blocks_mapped
keep_freed_memory()
import torch
from volseg.models.fold import for_inference, memory_format
from volseg.models.registry import build, make_config
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
torch.set_num_threads(1)
config = make_config(sys.argv[1], json.loads(sys.argv[2]))
patch = json.loads(sys.argv[3])
net = for_inference(build(sys.argv[1], config))
with torch.inference_mode():
    x = torch.randn(1, 1, *patch[3 - config.dims:]).contiguous(memory_format=memory_format(net))
    with large_blocks_mapped():
        net(x)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    for _ in range(3):
        net(x)
print((status("VmHWM") - before) / config.activation_bytes(tuple(patch)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "values", "patch"),
    [
        ("unet", {"widths": (16, 32, 64, 128)}, (64, 64, 64)),
        long("unet", {"widths": (16, 32, 64), "residual": True, "out_channels": 8}, (48, 96, 64)),
        long("unet", {"dims": 2, "widths": (16, 32, 64, 128), "out_channels": 1}, (1, 512, 512)),
        long("unet", {"dims": 2, "widths": (16, 32, 64), "padded": False, "norm": "none"}, (1, 556, 556)),
        long("unet", {"widths": (8, 16, 32, 64), "stem": True, "out_channels": 8}, (64, 64, 64)),
        long("unet", {"dims": 2, "widths": (8, 16, 32, 64), "stem": True, "out_channels": 1}, (1, 512, 512)),
        long("inception_unet", {"dims": 2, "widths": (16, 32, 64)}, (1, 512, 512)),
        long("fcn8", {"dims": 2}, (1, 512, 512)),
    ],
)
def test_the_memory_of_a_forward_is_as_predicted(name: str, values: dict[str, Any], patch: Triple) -> None:
    """The median of three processes: small objects decide which gap a tensor gets, another in each of them.

    A worker's whole peak is held to 25 % in tests/test_memory_measured.py.
    """
    words = [sys.executable, "-c", _MEASURE, name, json.dumps(values), json.dumps(patch)]
    ratios = [float(subprocess.run(words, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    assert 0.75 < statistics.median(ratios) < 1.3, ratios
