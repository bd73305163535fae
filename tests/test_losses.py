"""Losses: values by hand and against torch's own, unlabelled voxels, weights, low precision, coarser levels."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from volseg.errors import SpecError
from volseg.training.losses import balanced_weights, coarsen, deep_supervision_loss, make_loss
from volseg.training.region import IGNORED

FORMS = [
    (name, sigmoid)
    for name, sigmoid in product(("ce", "bce", "dice", "dice_ce", "focal", "tversky"), (False, True))
    if sigmoid or name != "bce"
]


def case(*, sigmoid: bool, shape: tuple[int, ...] = (2, 6, 7), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return logits and labels, a part of them IGNORED."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape[0], 1 if sigmoid else 4, *shape[1:], generator=generator) * 2
    labels = torch.randint(0, 2 if sigmoid else 4, shape, generator=generator)
    labels[:, 1] = IGNORED
    return logits, labels


def test_dice_and_entropy_by_hand() -> None:
    labels = torch.tensor([[[1, 0], [1, IGNORED]]])
    logits = torch.tensor([[[[2.0, -1.0], [0.5, 9.0]]]])
    p = torch.sigmoid(logits[0, 0].flatten()[:3])
    entropy = -(p[0].log() + (1 - p[1]).log() + p[2].log()) / 3
    dice = (2 * (p[0] + p[2]) + 1) / (p.sum() + 2 + 1)
    both = torch.cat([torch.zeros_like(logits), logits], dim=1)
    for name, expected in (("ce", entropy), ("bce", entropy), ("dice", 1 - dice), ("dice_ce", entropy + 1 - dice)):
        torch.testing.assert_close(make_loss(name, sigmoid=True)(logits, labels), expected)
        if name != "bce":
            torch.testing.assert_close(make_loss(name, sigmoid=False)(both, labels), expected)


@pytest.mark.parametrize("weights", [None, (1.0, 1.0, 1.0, 1.0), (0.2, 0.0, 3.0, 0.8)])
def test_cross_entropy_is_that_of_torch(weights: tuple[float, ...] | None) -> None:
    logits, labels = case(sigmoid=False)
    given = None if weights is None else torch.tensor(weights)
    expected = F.cross_entropy(logits, labels, weight=given, ignore_index=IGNORED)
    torch.testing.assert_close(make_loss("ce", sigmoid=False, class_weights=given)(logits, labels), expected)
    logits, labels = case(sigmoid=True)
    each = torch.tensor([*(weights or (1.0, 1.0))[:2], 0.0])
    voxels = F.binary_cross_entropy_with_logits(logits[:, 0], (labels == 1).float(), reduction="none") * each[labels]
    expected = voxels.sum() / each[labels].sum()
    given = None if given is None else given[:2]
    torch.testing.assert_close(make_loss("bce", sigmoid=True, class_weights=given)(logits, labels), expected)


def index_of(p: Tensor, truth: Tensor, beta: float) -> Tensor:
    """Return the Tversky index with half a voxel of smoothing."""
    overlap, false, missed = (p * truth).sum(), (p * (1 - truth)).sum(), ((1 - p) * truth).sum()
    return (overlap + 0.5) / (overlap + (1 - beta) * false + beta * missed + 0.5)


@pytest.mark.parametrize(("name", "beta"), [("dice", 0.5), ("tversky", 0.8)])
def test_region_losses_weigh_the_classes_that_are_there(name: str, beta: float) -> None:
    logits, labels = case(sigmoid=False)
    labels[labels == 2] = 0
    known = labels != IGNORED
    probabilities = logits.softmax(1).movedim(1, -1)[known]
    one, three = (1 - index_of(probabilities[:, c], (labels[known] == c).float(), beta) for c in (1, 3))
    torch.testing.assert_close(make_loss(name, sigmoid=False, beta=0.8)(logits, labels), (one + three) / 2)
    weights = torch.tensor([5.0, 1.0, 7.0, 3.0])
    weighted = make_loss(name, sigmoid=False, class_weights=weights, beta=0.8)
    torch.testing.assert_close(weighted(logits, labels), (one + 3 * three) / 4)
    logits, labels = case(sigmoid=True)
    known = labels != IGNORED
    expected = 1 - index_of(logits[:, 0][known].sigmoid(), labels[known].float(), beta)
    torch.testing.assert_close(make_loss(name, sigmoid=True, beta=0.8)(logits, labels), expected)


def test_missed_voxels_weigh_beta_and_false_ones_the_rest() -> None:
    labels = torch.tensor([[[1, 1, 0, 0]]])
    misses, false = torch.tensor([[[[9.0, -9.0, -9.0, -9.0]]]]), torch.tensor([[[[9.0, 9.0, 9.0, -9.0]]]])
    strict = make_loss("tversky", sigmoid=True, beta=0.9)
    assert float(strict(misses, labels)) == pytest.approx(1 - 1.5 / (1.5 + 0.9), abs=1e-3)
    assert float(strict(false, labels)) == pytest.approx(1 - 2.5 / (2.5 + 0.1), abs=1e-3)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_the_focal_loss_by_hand(sigmoid: bool) -> None:
    logits, labels = case(sigmoid=sigmoid)
    known = labels != IGNORED
    if sigmoid:
        one = logits[:, 0].sigmoid()
        p = torch.where(labels == 1, one, 1 - one)[known]
    else:
        p = logits.softmax(1).gather(1, labels.clamp_min(0)[:, None])[:, 0][known]
    for gamma in (0.5, 2.0):
        expected = (-((1 - p) ** gamma) * p.log()).mean()
        torch.testing.assert_close(make_loss("focal", sigmoid=sigmoid, gamma=gamma)(logits, labels), expected)
    plain = make_loss("focal", sigmoid=sigmoid, gamma=0.0)(logits, labels)
    torch.testing.assert_close(plain, make_loss("ce", sigmoid=sigmoid)(logits, labels))


@pytest.mark.parametrize(("name", "sigmoid"), FORMS)
@pytest.mark.parametrize("shape", [(2, 6, 7), (2, 3, 4, 5)])
def test_ignored_voxels_have_no_gradient(name: str, sigmoid: bool, shape: tuple[int, ...]) -> None:
    loss = make_loss(name, sigmoid=sigmoid)
    logits, labels = case(sigmoid=sigmoid, shape=shape)
    logits.requires_grad_()
    value = loss(logits, labels)
    (gradient,) = torch.autograd.grad(value, logits)
    assert float(gradient[:, :, 1].abs().max()) == 0.0
    assert float(gradient[:, :, 0].abs().min()) > 0.0
    other = logits.detach().clone()
    other[:, :, 1] = 50.0
    torch.testing.assert_close(loss(other, labels), value.detach())


@pytest.mark.parametrize(("name", "sigmoid"), FORMS)
def test_without_a_labelled_voxel_it_is_nothing(name: str, sigmoid: bool) -> None:
    logits, labels = case(sigmoid=sigmoid)
    logits.requires_grad_()
    value = make_loss(name, sigmoid=sigmoid)(logits, torch.full_like(labels, IGNORED))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.item() == 0.0
    assert not gradient.any()


@pytest.mark.parametrize(("name", "sigmoid"), FORMS)
def test_extreme_logits_give_finite_gradients(name: str, sigmoid: bool) -> None:
    logits, labels = case(sigmoid=sigmoid)
    for scale in (1e4, 0.0):
        for gamma in (0.5, 2.0):
            extreme = (logits * scale).requires_grad_()
            value = make_loss(name, sigmoid=sigmoid, gamma=gamma)(extreme, labels)
            (gradient,) = torch.autograd.grad(value, extreme)
            assert torch.isfinite(value)
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("name", "sigmoid"), FORMS)
def test_low_precision_logits_are_computed_in_32_bits(name: str, sigmoid: bool) -> None:
    logits, labels = case(sigmoid=sigmoid, shape=(1, 64, 64))
    loss = make_loss(name, sigmoid=sigmoid)
    for dtype in (torch.bfloat16, torch.float16):
        rough = logits.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(rough, labels)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(rough.detach().float(), labels), rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(value, rough)
        assert gradient.dtype == dtype


def test_what_cannot_be_a_loss_is_refused() -> None:
    with pytest.raises(SpecError, match=r"'bce' needs one sigmoid channel.*nothing was trained: use loss ce"):
        make_loss("bce", sigmoid=False)
    for weights in ([1.0, -1.0], [0.0, 0.0]):
        with pytest.raises(SpecError, match="must not be negative and not all 0"):
            make_loss("ce", sigmoid=False, class_weights=torch.tensor(weights))


def test_balanced_weights_go_by_the_root_of_rarity() -> None:
    assert balanced_weights((900, 0, 100)) == pytest.approx((0.5, 0.0, 1.5))
    assert balanced_weights((7, 7)) == pytest.approx((1.0, 1.0))


# ---------------------------------------------------------------- coarser levels


def test_each_level_counts_half_as_much_as_the_finer_one() -> None:
    seen: list[Any] = []

    def mean(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return logits.mean()

    loss = deep_supervision_loss(mean)
    labels = torch.arange(64).reshape(1, 8, 8)
    levels = tuple(torch.full((1, 3, 8 // f, 8 // f), v) for f, v in ((1, 1.0), (2, 10.0), (4, 100.0)))
    assert float(loss(levels, labels)) == pytest.approx((1 + 10 / 2 + 100 / 4) / 1.75)
    assert [tuple(x.shape) for x in seen] == [(1, 8, 8), (1, 4, 4), (1, 2, 2)]
    assert float(loss(levels[1], labels)) == 10.0


def test_coarse_labels_are_those_nearest_to_the_middle() -> None:
    labels = torch.tensor([[[0, 1, 2, 3, 4, 5]]])
    assert coarsen(labels, (1, 2), (1, 3)).tolist() == [[[1, 4]]]
    labels[0, 0, 1] = IGNORED
    assert coarsen(labels, (1, 2), (1, 3)).tolist() == [[[0, 4]]]
    labels[0, 0, :3] = IGNORED
    assert coarsen(labels, (1, 2), (1, 3)).tolist() == [[[IGNORED, 4]]]


def test_a_single_labelled_slice_reaches_every_level() -> None:
    for place in range(8):
        labels = torch.full((1, 8, 4, 4), IGNORED)
        labels[:, place] = 3
        for factor in (2, 4):
            coarse = coarsen(labels, (8 // factor, 4, 4), (factor, 1, 1))
            assert [i for i in range(8 // factor) if (coarse[0, i] == 3).all()] == [place // factor]
            assert int((coarse == 3).sum()) == 16


def test_levels_of_unpadded_networks_lie_around_the_same_centre() -> None:
    # A level of 10 coarse voxels becomes 20 fine ones, of which two convolutions take 4: the answer has 16.
    labels = torch.arange(1, 17).reshape(1, 1, 16)
    seen: list[Tensor] = []

    def keep(logits: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return logits.sum()

    deep_supervision_loss(keep)((torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 10)), labels)
    found = seen[1][0, 0].tolist()
    assert found[0] == found[-1] == IGNORED
    assert [(v - 1) // 2 for v in found[1:-1]] == list(range(8))
