"""Every architecture: published sizes, what follows from its program against torch, and doors for other networks."""

from __future__ import annotations

import sys
import weakref
from importlib.metadata import EntryPoint, EntryPoints
from math import prod
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from volseg.errors import BundleError
from volseg.geometry import Triple
from volseg.models import registry
from volseg.models.config import (
    FCN8Config,
    InceptionUNetConfig,
    LevelConfig,
    Measured,
    MonaiConfig,
    NetworkConfig,
    TracedConfig,
    UNetConfig,
    VGGClassifierConfig,
)
from volseg.models.fold import for_inference, memory_format
from volseg.models.graph import Graph
from volseg.models.measure import complete, measure_network
from volseg.models.program import INPUT, Builder, Conv, Pool, Raise
from volseg.models.registry import Architecture, architecture, build, make_config
from volseg.models.sides import Allowed, Line

# Two cores are all there is, and the tensors are tiny.
torch.set_num_threads(1)

SMALL: list[tuple[str, dict[str, Any]]] = [
    ("unet", {"widths": (4, 8, 8)}),
    ("unet", {"widths": (4, 8), "padded": False, "norm": "none", "residual": True, "convs_per_level": 3}),
    ("unet", {"widths": (4, 8, 8), "padded": False, "up": "nearest", "pools": ((1, 2, 3), (1, 2, 1))}),
    ("unet", {"widths": (4, 8, 4), "up_kernel": 3, "dropout": 0.2, "dropout_at": "inputs", "residual": True}),
    ("unet", {"widths": (4, 8), "up_kernel": 4, "convs_per_level": 1, "activation": "silu"}),
    ("unet", {"widths": (4, 8, 8, 8), "deep_supervision": 2, "pools": ((1, 2, 2), (1, 2, 1), (1, 1, 2))}),
    ("unet", {"widths": (8, 8, 8), "stem": True, "deep_supervision": 1}),
    ("unet", {"widths": (4, 8), "stem": True, "padded": False, "up": "nearest", "pools": ((1, 3, 2),)}),
    ("inception_unet", {"widths": (4, 8)}),
    ("inception_unet", {"widths": (8, 4), "norm": "group", "activation": "silu", "pools": ((1, 1, 3),)}),
    ("fcn8", {"widths": (4, 4, 8, 8, 8)}),
    ("fcn8", {"widths": (2, 4, 2, 4, 8), "norm": "none", "pools": ((1, 2, 1), (1, 1, 2), *((1, 2, 2),) * 3)}),
    ("vgg_classifier", {"widths": (4, 8, 8), "hidden": 8}),
    ("vgg_classifier", {"widths": (4, 8), "hidden": 4, "convs_per_level": 1, "norm": "none", "dropout": 0.5}),
]


def network(name: str, values: dict[str, Any], **more: Any) -> tuple[LevelConfig, Graph]:
    """Return a network with statistics as after a training, in train mode."""
    config = make_config(name, {"in_channels": 2, "out_channels": 3, **values, **more})
    torch.manual_seed(0)
    net = build(name, config)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.uniform_(module.weight, 0.5, 2)
    assert isinstance(config, LevelConfig)
    assert isinstance(net, Graph)
    return config, net


def sample(config: NetworkConfig, wanted: Triple = (1, 1, 1), batch: int = 2) -> Tensor:
    sides = config.fit(wanted, up=True)[3 - config.dims :]
    return torch.randn(batch, config.in_channels, *sides, generator=torch.Generator().manual_seed(1))


def check_numbers(config: NetworkConfig, net: nn.Module) -> None:
    assert config.parameter_count == sum(p.numel() for p in net.parameters())
    assert config.state_bytes == sum(t.numel() * t.element_size() for t in net.state_dict().values())


# ---------------------------------------------------------------- published numbers


@pytest.mark.parametrize("dims", [2, 3])
def test_the_original_unet(dims: int) -> None:
    """Ronneberger et al. 2015: 23 convolutions; 572 x 572 in, 388 x 388 out; 28 x 28 at the coarsest level."""
    values = {"dims": dims, "widths": (64, 128, 256, 512, 1024), "norm": "none", "padded": False}
    config = UNetConfig.model_validate(values)
    assert config.program.convolutions == 23
    side: Triple = (572 if dims == 3 else 1, 572, 572)
    assert config.allows(side)
    assert config.margin[1:] == (92, 92)
    assert config.smallest[1:] == (188, 188)
    assert (config.pooling[1:], config.phase[1:]) == ((16, 16), (12, 12))
    assert config.program.voxels("encoder.4.1", side) == 28**dims
    assert not config.allows((side[0], 574, 572))
    # The kernels and biases of its figure, one by one.
    pairs = [(1, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512), (512, 1024)]
    pairs += [
        (1024, 1024),
        (1024, 512),
        (512, 512),
        (512, 256),
        (256, 256),
        (256, 128),
        (128, 128),
        (128, 64),
        (64, 64),
    ]
    ups = [(1024, 512), (512, 256), (256, 128), (128, 64)]
    by_hand = sum(3**dims * a * b + b for a, b in pairs) + sum(2**dims * a * b + b for a, b in ups) + 64 * 2 + 2
    assert config.parameter_count == by_hand


def test_the_salt_unet_has_1_18_million_parameters() -> None:
    """One convolution a level and 3x3 transposed convolutions: published are 1,177,649 trained values of 1,179,121.

    There every convolution before a batch normalisation has a bias, too, which the normalisation takes away again.
    Two convolutions a level, as in its text, would be 2.16 million.
    """
    values = {"dims": 2, "out_channels": 1, "widths": (16, 32, 64, 128, 256), "up_kernel": 3}
    values |= {"dropout": 0.05, "dropout_at": "inputs"}
    config = UNetConfig.model_validate(values | {"convs_per_level": 1})
    biases = 16 + 32 + 64 + 128 + 256 + 128 + 64 + 32 + 16
    assert config.parameter_count + biases == 1_177_649
    assert config.parameter_count + biases + 2 * biases == 1_179_121
    assert round(config.parameter_count / 1e6, 2) == 1.18
    assert round(UNetConfig.model_validate(values).parameter_count / 1e6, 2) == 2.16
    drops = [op.name for op in config.program.ops if type(op).__name__ == "Drop"]
    assert drops == [f"encoder.{i}.input" for i in (1, 2, 3, 4)] + [f"decoder.{i}.input" for i in (3, 2, 1, 0)]


def test_the_fcn8_layer_by_layer() -> None:
    config = FCN8Config(dims=2, in_channels=1, out_channels=11)
    assert config.program.convolutions == 2 * 5 + 3 + 2
    widths, cin, by_hand = (32, 64, 128, 256, 256), 1, 0
    for width in widths:
        by_hand += 9 * cin * width + width + 9 * width * width + width + 2 * width
        cin = width
    by_hand += 256 * 11 * 16 + 11 + 11 * 11 * 16 + 11 + 11 * 11 * 256 + 11
    by_hand += (256 + 1) * 11 + (128 + 1) * 11
    assert config.parameter_count == by_hand
    # 64 x 84 pictures are filled up to a side that the pools divide.
    assert config.fit((1, 64, 84), up=True) == (1, 64, 96)


def test_the_inception_unet_is_as_wide_as_the_plain_one() -> None:
    config = InceptionUNetConfig(dims=2, out_channels=1)
    plain = UNetConfig(
        dims=2, out_channels=1, widths=(8, 16, 32, 64), convs_per_level=1, activation="leaky_relu", up="nearest"
    )
    # Seven convolutions a block: 1+3+3, 1+3, 1 and 1 after the pooling.
    assert config.program.convolutions == 7 * 7 + 1
    assert plain.program.convolutions == 7 + 1
    spreads = [op for op in config.program.ops if isinstance(op, Pool) and op.name.endswith("spread")]
    assert [(op.kernel, op.stride, op.padding) for op in spreads] == [((1, 3, 3), (1, 1, 1), (0, 1, 1))] * 7
    for level, width in enumerate((8, 16, 32, 64)):
        assert (
            config.program.channels[f"encoder.{level}.branches"]
            == plain.program.channels[f"encoder.{level}.0"]
            == width
        )
    quarter = 8 // 4
    block = 4 * (1 * quarter) + 2 * (9 * quarter**2) + 9 * quarter**2 + 7 * 2 * quarter
    assert InceptionUNetConfig(dims=2, out_channels=1, widths=(8,)).parameter_count == block + 8 + 1


def test_interpolating_steps_of_the_fcn8_start_out_as_interpolation() -> None:
    config, net = network("fcn8", {"dims": 2})
    with torch.inference_mode():
        for name, factor in (("up.2", 2), ("head", 8)):
            flat = net.get_submodule(name)([torch.full((1, 3, 8, 8), 0.5)])
            inner = flat[..., 2 * factor : -2 * factor, 2 * factor : -2 * factor]
            torch.testing.assert_close(inner, torch.full_like(inner, 0.5))
    # The first one makes scores of features: there is nothing to interpolate.
    raises = [op for op in config.program.ops if isinstance(op, Raise)]
    assert [(op.name, op.interpolating) for op in raises] == [("up.3", False), ("up.2", True), ("head", True)]


def test_the_vgg_classifier_keeps_features_and_classifier_apart_and_equals_its_hypercolumn() -> None:
    config, net = network("vgg_classifier", {"dims": 2, "widths": (4, 8, 8), "hidden": 6})
    assert {name.split(".")[0] for name, _ in net.named_parameters()} == {"features", "classifier"}
    net.eval()
    kept: dict[int, Tensor] = {}
    for level in range(3):
        last = net.get_submodule(f"features.{level}.1")
        last.register_forward_hook(lambda _m, _i, out, level=level: kept.__setitem__(level, out.clone()))
    x = sample(config, (1, 16, 16))
    with torch.inference_mode():
        answer = net(x)
        full = [nn.functional.interpolate(kept[level], scale_factor=2.0**level, mode="nearest") for level in range(3)]
        convs = [net.get_submodule(f"classifier.stages.{level}.conv") for level in range(3)]
        weight = torch.cat([conv.get_parameter("weight") for conv in convs], dim=1)
        bias = torch.stack([conv.get_parameter("bias") for conv in convs]).sum(dim=0)
        column = nn.functional.conv2d(torch.cat(full, dim=1), weight, bias).relu()
        hidden, head = net.get_submodule("classifier.hidden"), net.get_submodule("classifier.head")
        expected = head([hidden([column])])
    torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- arithmetic against torch


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("name", "values"), SMALL, ids=str)
def test_an_architecture_is_what_its_program_says(dims: int, name: str, values: dict[str, Any]) -> None:
    config, net = network(name, values, dims=dims)
    check_numbers(config, net)
    x = sample(config)
    out = net(x)
    answers = out if isinstance(out, tuple) else (out,)
    for answer, tensor in zip(answers, config.program.answers, strict=True):
        lines = config.program.lines[tensor][3 - dims :]
        assert answer.shape == (2, 3, *(line.side(n) for line, n in zip(lines, x.shape[2:], strict=True)))
    margin = config.margin[3 - dims :]
    assert answers[0].shape[2:] == tuple(n - 2 * m for n, m in zip(x.shape[2:], margin, strict=True))
    torch.stack([answer.square().mean() for answer in answers]).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in net.parameters())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("name", "values"), SMALL, ids=str)
def test_folding_keeps_the_answers(dims: int, name: str, values: dict[str, Any]) -> None:
    config, net = network(name, values, dims=dims)
    x = sample(config, batch=1)
    with torch.inference_mode():
        expected = net.eval()(x)
        ready = for_inference(net)
        found = ready(x.contiguous(memory_format=memory_format(ready)))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.std()))
    left = [m for m in ready.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d)]
    # What follows a pooling belongs to no convolution.
    assert len(left) == (5 if name == "fcn8" and config.norm == "batch" else 0)


NORMS, ACTIVATIONS = ("batch", "instance", "group", "none"), ("relu", "leaky_relu", "silu")


@st.composite
def configs(draw: st.DrawFn) -> tuple[str, LevelConfig]:
    name = draw(st.sampled_from(["unet", "inception_unet", "fcn8", "vgg_classifier"]))
    dims = draw(st.sampled_from([2, 3]))
    levels = 5 if name == "fcn8" else draw(st.integers(2 if name == "vgg_classifier" else 1, 3))
    widths = draw(st.lists(st.sampled_from([4, 8, 16]), min_size=levels, max_size=levels))
    largest = 2 if name == "fcn8" else 3
    factor = st.integers(1, largest)
    pools = [(1 if dims == 2 else draw(factor), draw(factor), draw(factor)) for _ in range(levels - (name != "fcn8"))]
    values: dict[str, Any] = {
        "dims": dims, "in_channels": draw(st.integers(1, 3)), "out_channels": draw(st.integers(1, 4)),
        "widths": widths, "pools": pools, "norm": draw(st.sampled_from(NORMS)),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
    }  # fmt: skip
    if name in {"unet", "vgg_classifier"}:
        values |= {"convs_per_level": draw(st.integers(1, 2)), "dropout": draw(st.sampled_from([0.0, 0.3]))}
    if name == "unet":
        up = draw(st.sampled_from(["transpose", "nearest"]))
        kernel = draw(st.sampled_from([None, 3, 4])) if up == "transpose" else None
        values |= {"up": up, "up_kernel": kernel, "residual": draw(st.booleans()), "padded": draw(st.booleans())}
        values |= {"dropout_at": draw(st.sampled_from(["blocks", "inputs"])), "stem": draw(st.booleans())}
        if values["padded"]:
            values["deep_supervision"] = draw(st.integers(0, max(0, levels - 2)))
    config = make_config(name, values)
    assert isinstance(config, LevelConfig)
    return name, config


@given(configs(), st.data())
@settings(deadline=None, max_examples=40)
def test_any_configuration(drawn: tuple[str, LevelConfig], data: st.DataObject) -> None:
    name, config = drawn
    net = build(name, config).eval()
    assert isinstance(net, Graph)
    check_numbers(config, net)
    axis = data.draw(st.integers(3 - config.dims, 2))
    sides = list(config.smallest)
    sides[axis] = data.draw(st.integers(max(1, config.smallest[axis] - 3), config.smallest[axis] + 6))
    a, b, c = sides
    x = torch.zeros(1, config.in_channels, *sides[3 - config.dims :])
    if not config.allows((a, b, c)):
        with pytest.raises(ValueError, match="sides that are multiples of"):
            net(x)
        return
    with torch.inference_mode():
        answer = net(x)
    expected = tuple(n - 2 * m for n, m in zip(sides, config.margin, strict=True))
    assert answer.shape == (1, config.out_channels, *expected[3 - config.dims :])
    assert min(answer.shape) >= 1
    if not config.margin[axis]:
        assert (config.phase[axis], config.smallest[axis]) == (0, config.pooling[axis])
    # What only training uses goes, and with it no answer.
    smaller = net.for_inference()
    check_numbers(config.for_inference(), smaller)
    with torch.inference_mode():
        assert torch.equal(smaller(x), answer)


REACHING = [
    ("unet", {"widths": (4, 4, 4), "up": "nearest"}),
    ("unet", {"widths": (4, 4, 4), "convs_per_level": 1, "up_kernel": 3, "residual": True}),
    ("unet", {"widths": (4, 4), "padded": False, "pools": ((1, 3, 3),)}),
    ("unet", {"widths": (4, 4), "padded": False, "up_kernel": 4}),
    ("unet", {"widths": (4, 4, 4), "stem": True}),
    ("unet", {"widths": (4, 4), "stem": True, "padded": False}),
    ("inception_unet", {"widths": (4, 4, 4)}),
    ("fcn8", {"widths": (2, 2, 2, 2, 2)}),
    ("vgg_classifier", {"widths": (4, 4, 4), "hidden": 4}),
]


@pytest.mark.parametrize(("name", "values"), REACHING, ids=str)
def test_the_receptive_field_is_what_a_nan_reaches(name: str, values: dict[str, Any]) -> None:
    """Every place within a pooled cell is poisoned in turn: none reaches further than foretold, some just as far."""
    config, net = network(name, values, dims=2, in_channels=1)
    reach, margin, step = config.receptive_field[2], config.margin[2], config.pooling[2]
    side = config.fit((1, 1, 2 * reach + 2 * margin + 3 * step + 2), up=True)[2]
    first = side // 2 - step // 2
    height = config.fit((1, 1, 1), up=True)[1]
    x = torch.zeros(step, 1, height, side)
    for i in range(step):
        x[i, 0, :, first + i] = torch.nan
    with torch.inference_mode():
        touched = net.eval()(x).isnan().any(dim=1).any(dim=1)
    distances = [abs(int(q) + margin - first - i) for i in range(step) for q in torch.nonzero(touched[i])]
    assert max(distances) == reach
    assert config.receptive_field[0] == 0


@pytest.mark.parametrize("dims", [2, 3])
def test_deep_supervision_answers_in_train_mode_only(dims: int) -> None:
    config, net = network("unet", {"widths": (4, 8, 8, 8), "deep_supervision": 2}, dims=dims)
    assert isinstance(config, UNetConfig)
    x = sample(config, (16, 16, 16))
    shapes = [tuple(answer.shape[2:]) for answer in net(x)]
    assert shapes == [(16,) * dims, (8,) * dims, (4,) * dims]
    assert net.eval()(x).shape == (2, 3, *(16,) * dims)
    smaller = net.for_inference()
    assert (
        smaller.config
        == config.for_inference()
        == UNetConfig.model_validate(config.model_dump() | {"deep_supervision": 0})
    )
    assert not any(name.startswith("supervision") for name in smaller.state_dict())
    assert config.parameter_count - smaller.config.parameter_count == 2 * (8 + 1) * 3
    # The cost of a forward is that of an answer.
    patch = config.fit((16, 16, 16), up=True)
    assert config.flops(patch) == smaller.config.flops(patch)
    assert config.activation_bytes(patch) == smaller.config.activation_bytes(patch)
    assert config.convolved_values(patch) > smaller.config.convolved_values(patch)


# ---------------------------------------------------------------- memory and sides by hand


def test_memory_of_a_network_by_hand() -> None:
    """Two levels on 8 x 8: the peak is the joined tensor, the skip and the raised one, and gaps between them."""
    config = UNetConfig(dims=2, widths=(4, 8), convs_per_level=1, norm="none", up="nearest", out_channels=1)
    skip, raised = 4 * 4 * 64, 4 * 8 * 64
    alive = 2 * (skip + raised)
    assert alive < config.activation_bytes((1, 8, 8)) < 1.2 * alive
    assert config.activation_bytes((1, 8, 8), batch=3) == pytest.approx(3 * config.activation_bytes((1, 8, 8)), rel=0.1)
    plain = UNetConfig(dims=2, widths=(4,), convs_per_level=1, norm="none", out_channels=4)
    # One byte stands for the input. Two tensors at a time; the kernel's copy (36 values) is smaller than the second.
    assert plain.activation_bytes((1, 8, 8)) == 1 + 2 * skip
    assert plain.activation_bytes((1, 8, 8), itemsize=2) == 1 + skip
    instance = plain.model_copy(update={"norm": "instance"})
    assert instance.activation_bytes((1, 8, 8)) == 1 + 3 * skip


@pytest.mark.parametrize(("name", "values"), SMALL, ids=str)
def test_memory_is_more_than_the_largest_tensor_and_less_than_all_together(name: str, values: dict[str, Any]) -> None:
    config, _ = network(name, values, dims=2)
    patch = config.fit((1, 64, 64), up=True)
    program = config.program.main
    sizes = [4 * width * program.voxels(tensor, patch) for tensor, width in program.channels.items()]
    assert 1.6 * max(sizes) < config.activation_bytes(patch) < 0.95 * sum(sizes)
    # Where a gap is just large enough, its exact size decides.
    assert config.activation_bytes(patch, batch=2) == pytest.approx(2 * config.activation_bytes(patch), rel=0.25)


def test_tensors_are_let_go_when_their_last_reader_has_run() -> None:
    build_ = Builder(2, 1)
    first = build_.conv("first", INPUT, 2, 3)
    second = build_.conv("second", first, 2, 3)
    total = build_.add("sum", second, first)
    program = build_.program(build_.conv("head", total, 1, 1), build_.conv("extra", first, 1, 1))
    assert program.releases == (("input",), (), ("second",), ("sum",), ("first",))
    assert [op.name for op in program.main.ops] == ["first", "second", "sum", "head"]
    assert program.main.releases == (("input",), (), ("second", "first"), ("sum",))


def test_only_what_nothing_else_needs_is_overwritten() -> None:
    build_ = Builder(2, 1)
    active = build_.conv("active", INPUT, 1, 3, activation="relu")
    plain = build_.conv("plain", active, 1, 3)
    with pytest.raises(ValueError, match="active cannot be overwritten"):
        build_.add("sum", active, plain)
    with pytest.raises(ValueError, match="input cannot be overwritten"):
        build_.add("sum", INPUT, plain)
    again = build_.conv("again", plain, 1, 3)
    with pytest.raises(ValueError, match="plain cannot be overwritten"):
        build_.add("sum", plain, active)
    build_.add("sum", again, active)
    with pytest.raises(ValueError, match="late reads again, which a sum has overwritten"):
        build_.conv("late", again, 1, 3)
    with pytest.raises(ValueError, match="two tensors plain"):
        build_.conv("plain", INPUT, 1, 3)


@pytest.mark.parametrize("values", [{}, {"residual": True, "up": "nearest"}, {"up_kernel": 3}], ids=str)
def test_without_padding_the_answers_are_those_far_from_the_border(values: dict[str, Any]) -> None:
    """Skips and shortcuts are cut around their centre: every voxel is where it is in the padded network."""
    small = {"dims": 2, "widths": (4, 8), "norm": "none", **values}
    config, net = network("unet", {**small, "padded": False})
    padded, other = network("unet", small)
    other.load_state_dict(net.state_dict())
    x = sample(config, (1, 60, 64), batch=1)
    with torch.inference_mode():
        found, expected = net.eval()(x), other.eval()(x)
    inner, margin = padded.receptive_field[1], config.margin[1]
    far = expected[..., inner:-inner, inner:-inner]
    cut = inner - margin
    torch.testing.assert_close(found[..., cut:-cut, cut:-cut], far, rtol=1e-4, atol=1e-4)


def test_a_forward_holds_no_tensor_longer_than_that() -> None:
    config, net = network("unet", {"dims": 2, "widths": (4, 8, 8), "residual": True})
    made: dict[str, weakref.ref[Tensor]] = {}
    found: dict[str, set[str]] = {}

    def before(name: str) -> None:
        found[name] = {tensor for tensor, place in made.items() if place() is not None}

    for op in config.program.ops:
        if isinstance(op, Conv | Raise):
            stage = net.get_submodule(op.name)
            stage.register_forward_pre_hook(lambda _m, _x, name=op.name: before(name))
            stage.register_forward_hook(lambda _m, _x, out, name=op.name: made.__setitem__(name, weakref.ref(out)))
    with torch.inference_mode():
        net.eval()(sample(config, (16, 16, 16)))
    # Sums overwrite the last convolution of their block: the skips of both levels, and what is worked on.
    assert found["encoder.2.1"] == {"encoder.0.1", "encoder.1.1", "encoder.2.0"}
    assert found["decoder.1.1"] == {"encoder.0.1", "decoder.1.shortcut", "decoder.1.0"}
    assert found["head"] == {"decoder.0.1"}


def test_lines_and_sides_by_hand() -> None:
    line = Line().convolved(3, padded=False).pooled(2).convolved(3, padded=False)
    assert line == Line(scale=2, lost=6, before=3, after=3)
    assert line.side(14) == 4
    assert line.raised(2, 2) == Line(scale=1, lost=6, before=4, after=4)
    # A kernel of 3 and stride 2 reaches one coarse voxel further for every second fine one.
    assert Line(scale=2).raised(3, 2) == Line(scale=1, before=1, after=2)
    wide = Line().convolved(3, padded=True)
    assert wide.joined(Line()) == Line().joined(wide) == Line(before=1, after=1)
    with pytest.raises(ValueError, match="cannot be enlarged 2 times"):
        Line().raised(2, 2)
    with pytest.raises(ValueError, match="do not lie on one another"):
        Line(lost=2).joined(Line(lost=1))
    rule = Allowed().divided(Line(lost=4), 2).divided(Line(scale=2, lost=8), 3)
    assert rule == Allowed(step=6, phase=2)
    assert rule.filling(Line(lost=9)) == Allowed(step=6, phase=2, smallest=14)
    assert [n for n in range(30) if n in Allowed(6, 2, 14)] == [14, 20, 26]
    assert [Allowed(6, 2, 14).fit(n, up=True) for n in (1, 14, 15, 20)] == [14, 14, 20, 20]
    assert [Allowed(6, 2, 14).fit(n, up=False) for n in (1, 14, 19, 20)] == [14, 14, 14, 20]
    with pytest.raises(ValueError, match="no side leaves no remainder"):
        Allowed().divided(Line(), 2).divided(Line(lost=1), 2)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("unet", {"up_kernel": 1}, "at least the largest pooling factor 2"),
        ("unet", {"up": "nearest", "up_kernel": 2}, "belongs to up transpose"),
        ("unet", {"widths": (4, 8), "deep_supervision": 1}, "leave 0 coarser decoder levels"),
        ("unet", {"padded": False, "deep_supervision": 1}, "needs padded"),
        ("inception_unet", {"widths": (4, 6)}, "multiple of 4"),
        ("inception_unet", {"widths": (4, 48), "norm": "group"}, "multiples of 8"),
        ("fcn8", {"widths": (4, 8)}, "at least 5"),
        ("fcn8", {"pools": ((1, 4, 4), *((1, 2, 2),) * 4)}, "from 1 to 2"),
        ("fcn8", {"pools": ((1, 2, 2),) * 4}, "5 widths need 5 pools, got 4"),
        ("vgg_classifier", {"widths": (4,)}, "at least 2"),
        ("vgg_classifier", {"padded": False}, "padded"),
    ],
)
def test_arguments_outside_the_limits_are_refused(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        make_config(name, values)


# ---------------------------------------------------------------- doors for other networks


class Strange(nn.Module):
    """A strided network: halves the sides, loses one coarse voxel at each end, repeats voxels."""

    def __init__(self, dims: int, cin: int, cout: int) -> None:
        super().__init__()
        kind = nn.Conv2d if dims == 2 else nn.Conv3d
        self.down = kind(cin, 4, 2, stride=2)
        self.conv = kind(4, cout, 3)
        self.norm = nn.BatchNorm2d(cout) if dims == 2 else nn.BatchNorm3d(cout)

    def forward(self, x: Tensor) -> Tensor:
        if any(side % 2 for side in x.shape[2:]):
            raise RuntimeError("sides must be even")
        return nn.functional.interpolate(self.norm(self.conv(self.down(x)).relu()), scale_factor=2.0)


class StrangeConfig(TracedConfig):
    """Arguments of `Strange`."""


def strange(config: StrangeConfig) -> nn.Module:
    return Strange(config.dims, config.in_channels, config.out_channels)


STRANGE = Architecture(StrangeConfig, strange)
NOT_ONE = "an Architecture"


def register(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    """Have these entry points installed, and no others."""
    found = EntryPoints(EntryPoint(name, value, registry.ENTRY_POINTS) for name, value in points.items())
    monkeypatch.setattr("importlib.metadata.entry_points", found.select)


@pytest.mark.parametrize("dims", [2, 3])
def test_measuring_a_network_finds_what_it_takes_and_costs(dims: int) -> None:
    torch.manual_seed(0)
    net = Strange(dims, 2, 3)
    found = measure_network(net, dims, 2)

    def sides(value: int, flat: int) -> Triple:
        return (value if dims == 3 else flat), value, value

    assert (found.pooling, found.phase, found.smallest) == (sides(2, 1), sides(0, 0), sides(6, 1))
    assert found.margin == sides(2, 0)
    # A voxel lies in the cell before, its own or the one behind: at most 3 voxels away, and 1 for the place in a cell.
    assert found.receptive_field == sides(4, 0)
    assert found.parameter_count == sum(p.numel() for p in net.parameters())
    assert found.state_bytes == sum(t.numel() * t.element_size() for t in net.state_dict().values())
    side, cells = (512, 256) if dims == 2 else (128, 64)
    macs = 2 * 4 * 2**dims * cells**dims + 4 * 3 * 3**dims * (cells - 2) ** dims
    assert found.macs_per_voxel == pytest.approx(macs / side**dims)
    made = 4 * cells**dims + 3 * (cells - 2) ** dims
    assert found.convolved_values_per_voxel == pytest.approx(made / side**dims)
    # The answer and the coarse tensors before it.
    least = 4 * 3 * (side - 4) ** dims / side**dims
    assert least < found.activation_bytes_per_voxel < 3 * least
    assert net.training


def test_a_network_with_statistics_of_the_whole_patch_depends_on_all_of_it() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2), nn.Conv2d(2, 1, 1))
    found = measure_network(net, 2, 1)
    assert found.receptive_field == (0, 64, 64)
    assert found.pooling == (1, 1, 1)


def test_measuring_the_unpadded_unet_finds_what_its_program_says() -> None:
    config = UNetConfig(dims=2, widths=(2,) * 5, padded=False, norm="none")
    found = measure_network(build("unet", config), 2, 1)
    for name in ("pooling", "phase", "smallest", "margin", "parameter_count", "state_bytes"):
        assert getattr(found, name) == getattr(config, name)
    assert 107 == config.receptive_field[1] <= found.receptive_field[1] < 107 + 16
    patch = (1, 524, 524)
    assert found.macs_per_voxel * 2 * 524**2 == pytest.approx(config.flops(patch))
    assert found.convolved_values_per_voxel * 524**2 == pytest.approx(config.convolved_values(patch))
    assert found.activation_bytes_per_voxel * 524**2 == pytest.approx(config.activation_bytes(patch), rel=0.5)


class Awkward(nn.Module):
    """Takes one size only, or answers with something else than one tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        if self.kind == "fixed" and x.shape[2:] != (96, 96):
            raise RuntimeError("only 96 voxels")
        return [x] if self.kind == "list" else x


@pytest.mark.parametrize(
    ("kind", "message"), [("fixed", "takes 96 voxels a side and no other"), ("list", "with list; it cannot be used")]
)
def test_networks_that_cannot_be_used_are_refused(kind: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        measure_network(Awkward(kind), 2, 1)


def test_an_answer_of_other_channels_is_refused() -> None:
    with pytest.raises(BundleError, match=r"tensor of shape \(1, 3, 60, 60\); .* \(1, 2, y, x\)"):
        measure_network(Strange(2, 1, 3), 2, 1, 2)


def test_a_network_of_another_package_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, strange=f"{__name__}:STRANGE", broken="no_such_package.anywhere:THING")
    assert architecture("strange") is STRANGE
    config = make_config("strange", {"dims": 2, "in_channels": 2})
    with pytest.raises(BundleError, match="measure it first"):
        _ = config.pooling
    whole = complete("strange", config)
    again = make_config("strange", whole.model_dump(mode="json"))
    assert again == whole
    assert complete("strange", whole) is whole
    check_numbers(again, build("strange", again))
    assert again.fit((1, 9, 9), up=True) == (1, 10, 10)
    assert again.for_inference() is again
    assert again.flops((1, 20, 10)) == round(2 * 200 * again.measured.macs_per_voxel)  # type: ignore[attr-defined]
    assert again.activation_bytes((1, 20, 10), batch=2, itemsize=2) == again.activation_bytes((1, 20, 10))
    # Nothing of it is folded: what happens between its convolution and its norm is its own business.
    net = build("strange", again).eval()
    assert any(isinstance(m, nn.BatchNorm2d) for m in for_inference(net).modules())


def test_only_the_entry_point_of_the_name_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, broken="no_such_package.anywhere:THING", other=f"{__name__}:NOT_ONE")
    with pytest.raises(BundleError, match=r"'brokn' \(did you mean 'broken'"):
        architecture("brokn")
    with pytest.raises(BundleError, match=r"which cannot be loaded .*no_such_package"):
        architecture("broken")
    with pytest.raises(BundleError, match="a str; nothing was built: it must be"):
        architecture("other")
    # What comes with volseg cannot be replaced.
    register(monkeypatch, unet="no_such_package.anywhere:THING")
    assert architecture("unet").config is UNetConfig


def test_two_entry_points_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("twice", f"{__name__}:{name}", registry.ENTRY_POINTS) for name in ("STRANGE", "NOT_ONE")]
    monkeypatch.setattr("importlib.metadata.entry_points", EntryPoints(points).select)
    with pytest.raises(BundleError, match="more than once"):
        architecture("twice")


def test_measured_numbers_that_contradict_themselves_are_refused() -> None:
    values = measure_network(Strange(2, 1, 1), 2, 1).model_dump()
    for change in ({"phase": (0, 1, 0)}, {"margin": (0, 3, 0)}, {"pooling": (0, 2, 2)}, {"smallest": (1, 7, 6)}):
        with pytest.raises(ValidationError, match="contradicts itself"):
            Measured.model_validate(values | change)


class FakeNet(nn.Sequential):
    """Stands for a network of MONAI."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, features: int = 4) -> None:
        kind = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        if features < 1:
            raise ValueError("features must be positive")
        super().__init__(kind(in_channels, features, 3, padding=1), nn.ReLU(), kind(features, out_channels, 1))


FakeNet.__module__ = "monai.networks.nets.fake"


@pytest.fixture
def monai(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("monai", "monai.networks", "monai.networks.nets")
    modules = {name: ModuleType(name) for name in names}
    modules["monai.networks.nets"].FakeNet = FakeNet  # type: ignore[attr-defined]
    modules["monai.networks.nets"].Strange = Strange  # type: ignore[attr-defined]
    modules["monai.networks.nets"].Path = str  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("monai")
def test_a_network_of_monai() -> None:
    values = {"dims": 2, "in_channels": 2, "out_channels": 3, "network": "FakeNet", "arguments": {"features": 6}}
    config = complete("monai", make_config("monai", values))
    assert isinstance(config, MonaiConfig)
    assert config.pooling == (1, 1, 1)
    # One voxel each side; the middle of the input is a place like any other.
    assert config.receptive_field == (0, 1, 1)
    net = build("monai", config)
    check_numbers(config, net)
    assert config.parameter_count == 9 * 2 * 6 + 6 + 6 * 3 + 3
    assert net(torch.zeros(1, 2, 5, 7)).shape == (1, 3, 5, 7)


@pytest.mark.usefixtures("monai")
@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("FakeNett", {}, "did you mean 'FakeNet'"),
        ("Strange", {}, "has no network 'Strange'"),
        ("Path", {}, "has no network 'Path'"),
        ("FakeNet", {"features": 0}, "features must be positive"),
        ("FakeNet", {"colour": "red"}, "refuses its arguments .*colour"),
    ],
)
def test_what_monai_does_not_have_or_take(name: str, arguments: dict[str, Any], message: str) -> None:
    config = make_config("monai", {"network": name, "arguments": arguments})
    with pytest.raises(BundleError, match=message):
        build("monai", config)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"network": "os.system"}, "network: String should match"),
        ({"network": "_hidden"}, "network: String should match"),
        ({}, "network: Field required"),
        ({"network": "UNet", "arguments": {"spatial_dims": 2}}, "leave them out"),
    ],
)
def test_arguments_that_no_monai_network_may_have(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        make_config("monai", values)


def test_without_monai_there_is_a_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    with pytest.raises(BundleError, match=r"needs MONAI.*pip install monai"):
        build("monai", make_config("monai", {"network": "UNet"}))


def test_every_architecture_is_what_the_registry_promises() -> None:
    defaults: dict[str, type[LevelConfig]] = {
        "unet": UNetConfig,
        "inception_unet": InceptionUNetConfig,
        "fcn8": FCN8Config,
        "vgg_classifier": VGGClassifierConfig,
    }
    assert {*defaults, "monai"} == set(registry.ARCHITECTURES)
    for name, kind in defaults.items():
        for dims in (2, 3):
            config = make_config(name, {"dims": dims})
            assert isinstance(config, kind)
            patch = config.fit((64, 64, 64) if dims == 3 else (1, 64, 64), up=True)
            assert config.allows(patch)
            assert config.flops(patch) / prod(patch) > 2 * 27
