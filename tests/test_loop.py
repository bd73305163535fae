"""The loop of a rank: gradients however the work is shared, validation, what is kept, how it stops and goes on."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.ranks import Ranks, site_of, train_here, two_ranks
from tests.support import long, store
from tests.train_support import rows_of, scene, spec_for, volumes
from volseg.errors import JobError, JobInterrupted, PlanError, SpecError, StorageFullError, VolumeError
from volseg.geometry import Box, Triple
from volseg.intensity import Scaling
from volseg.models.bundle import load_networks
from volseg.spec import TrainSpec
from volseg.storage.volume import open_volume
from volseg.training import compose, ranks
from volseg.training.average import WeightAverage
from volseg.training.checkpoint import CheckpointWriter, Workplace
from volseg.training.distributed import Group
from volseg.training.dropout import SeededDropout
from volseg.training.losses import deep_supervision_loss
from volseg.training.milestones import milestones
from volseg.training.progress import TrainProgress
from volseg.training.region import IGNORED, Region
from volseg.training.replicas import Gradients, Sharing, share_cores
from volseg.training.state import LossScale
from volseg.training.syncnorm import synchronise
from volseg.training.train import train
from volseg.training.validate import Setting, Validator, spread, windows
from volseg.training.view import NetworkView, TileCache

# ---------------------------------------------------------------- gradients


def weight_of(network: nn.Module) -> float:
    return next(p.item() for p in network.parameters() if p.ndim == 2)


def test_the_average_follows_the_weights() -> None:
    net = nn.Linear(1, 1)
    average, copy = WeightAverage(net), WeightAverage(net, averaging=False)
    before = weight_of(average.network)
    with torch.no_grad():
        net.weight.add_(1.0)
    average.update(net, step=20)
    copy.update(net, step=20)
    assert weight_of(average.network) == pytest.approx(before + 0.5)
    assert weight_of(copy.network) == pytest.approx(before + 1.0)
    for step in range(21, 400):
        average.update(net, step)
    assert weight_of(average.network) == pytest.approx(before + 1.0, abs=0.01)


@settings(deadline=None)
@given(st.integers(1, 24), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_every_patch_is_taken_once(batch: int, world: int, replicas: int, accumulate: int) -> None:
    world = min(world, batch)
    shares = [Sharing(batch, replicas, 1, accumulate, rank, world).rounds() for rank in range(world)]
    numbers = [n for rounds in shares for parts in rounds for groups in parts for group in groups for n in group]
    assert sorted(numbers) == list(range(batch))
    assert all(n % world == rank for rank, rounds in enumerate(shares) for r in rounds for p in r for g in p for n in g)
    assert all(1 <= len(parts) <= replicas for rounds in shares for parts in rounds)
    if replicas == 1:
        assert len({len(rounds) for rounds in shares}) == 1, "ranks meet in each round"
        assert len(shares[0]) == min(accumulate, batch // world)
    whole = Sharing(batch)
    assert all(n in whole.group(n) and (min(2, batch) <= len(whole.group(n)) <= 4) for n in range(batch))


def test_cores_are_shared_by_copies_with_two_patches_each() -> None:
    assert share_cores(2, 4, low_precision=False) == (2, 1)
    assert share_cores(8, 4, low_precision=False) == (2, 4)
    assert share_cores(8, 4, low_precision=True) == (4, 2)
    assert share_cores(2, 1, low_precision=False) == (1, 2)


class Heads(nn.Module):
    """Two answers, the second one coarser."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.second(torch.relu(self.first(x)))
        coarse: Tensor = nn.functional.avg_pool3d(y, 2)
        return y, coarse


def pair_loss(outputs: Tensor | Any, labels: Tensor) -> Tensor:
    """No mean over patches: it tells groups apart."""
    fine, coarse = outputs
    loss: Tensor = ((fine[:, 0] - labels) ** 2).mean() ** 2 + coarse.mean() ** 2
    return loss


def test_gradients_do_not_depend_on_copies_and_parts() -> None:
    torch.manual_seed(0)
    net = Heads()
    images, labels = torch.randn(8, 1, 4, 6, 8), torch.randint(0, 2, (8, 4, 6, 8))
    results = []
    for replicas, accumulate in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)):
        worker = Gradients(net, pair_loss, Sharing(8, replicas, 1, accumulate), Group())
        loss = worker.compute(images, labels, 0)
        worker.close()
        results.append((loss.mean, [p.grad.clone() for p in net.parameters() if p.grad is not None]))
    pairs = [pair_loss(net(images[[i, i + 4]]), labels[[i, i + 4]]) for i in range(4)]
    assert results[0][0] == pytest.approx(float(torch.stack(pairs).mean().detach()), rel=1e-5)
    for value, gradients in results[1:]:
        assert value == pytest.approx(results[0][0], rel=1e-5)
        assert len(gradients) == 4
        for a, b in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_normalisation_over_one_rank_is_the_plain_one() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 1))
    other = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 1))
    other.load_state_dict(plain.state_dict())
    synchronise(other, Group())
    x = torch.randn(4, 1, 9, 7) * 5 + 100
    for net in (plain, other):
        (net(x) ** 2).mean().backward()
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-3)
    assert list(plain.state_dict()) == list(other.state_dict())
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(other.state_dict()[name], plain.state_dict()[name])
    torch.testing.assert_close(other.eval()(x), plain.eval()(x))


def test_dropout_draws_the_same_again() -> None:
    x = torch.ones(2, 3, 40, 40)
    drop = nn.Dropout(0.25)

    def draw(*key: int) -> Tensor:
        with SeededDropout(x.device, key):
            dropped: Tensor = drop(x)
            return dropped

    first = draw(0, 1, 2)
    assert torch.equal(first, draw(0, 1, 2))
    assert not torch.equal(first, draw(0, 1, 3))
    assert bool(((first == 0) | ((first - 4 / 3).abs() < 1e-6)).all())
    assert float((first == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    drop.eval()
    assert torch.equal(draw(0, 1, 2), x)


def test_the_factor_of_fp16_follows_overflows() -> None:
    scale = LossScale(8.0)
    scale.after_step(overflow=True)
    assert (scale.value, scale.since) == (4.0, 0)
    for _ in range(1000):
        scale.after_step(overflow=False)
    assert (scale.value, scale.since) == (8.0, 0)


# ---------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    with two_ranks(tmp_path_factory.mktemp("ranks")) as pair:
        yield pair


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"norm": "group"},
        {"sync_norm": True},
        # A rank has a patch or two of a group of three, so that they meet for the loss; and their shares are unequal.
        {"norm": "group", "batch": 3, "dropout": 0.0},
        {"norm": "group", "batch": 8, "accumulate": 2, "dropout": 0.2},
    ],
    ids=["group", "sync", "unequal", "accumulate"],
)
def test_two_ranks_have_the_loss_curve_of_one(tmp_path: Path, two: Ranks, options: dict[str, Any]) -> None:
    """Tolerance: 1e-4 of the loss over 20 steps, for a weight one step of the peak learning rate.

    What is left is the order of summation, which AdamW enlarges where a gradient is next to nothing.
    """
    data = volumes(tmp_path)
    values: dict[str, Any] = {"max_steps": 20, "validations": 3, **options}
    one, both = (spec_for(tmp_path, data, out=str(tmp_path / name), **values) for name in ("one", "both"))
    alone = train_here(Group(), one)
    results = two.run(train_here, both)
    assert results[0] == results[1]
    a, b = rows_of(one), rows_of(both)
    assert [row["step"] for row in a] == [row["step"] for row in b]
    np.testing.assert_allclose([row["loss"] for row in b], [row["loss"] for row in a], rtol=1e-4)
    assert results[0]["mean_foreground_dice"] == pytest.approx(alone["mean_foreground_dice"], abs=1e-3)
    first, second = (load_networks(spec.out)[1][0].state_dict() for spec in (one, both))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=2e-3)


def _fails(group: Group, spec: TrainSpec, where: str) -> str:
    if group.rank == 1 and where == "open":
        spec = spec.model_copy(update={"image": (spec.image[0] + "-gone",)})
    full = StorageFullError("no space left") if group.rank == 0 and where == "save" else None
    with mock.patch.object(CheckpointWriter, "save", side_effect=full):
        try:
            train_here(group, spec)
        except (VolumeError, StorageFullError, PlanError) as error:
            return f"{type(error).__name__}: {error}"
    return "nothing happened"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        long("open", "VolumeError: .*image.zarr-gone"),
        ("read", "VolumeError: .*NaN or Inf"),
        ("save", "StorageFullError: "),
    ],
)
def test_an_error_on_one_rank_is_raised_on_both(tmp_path: Path, two: Ranks, where: str, message: str) -> None:
    image, labels = scene()
    values = image.astype(np.float32)
    values[:8, 20:22] = np.nan if where == "read" else 0
    spec = spec_for(tmp_path, volumes(tmp_path, image=values, labels=labels), max_steps=30)
    found = two.run(_fails, spec, where)
    assert found[0] == found[1]
    assert re.match(message, found[0])


def test_more_workers_than_patches_are_refused(tmp_path: Path, two: Ranks) -> None:
    spec = spec_for(tmp_path, volumes(tmp_path), batch=1)
    found = two.run(_fails, spec, "")
    assert found[0] == found[1]
    assert "a step of 1 patches cannot be shared by 2 workers" in found[0]


def _stops(group: Group, spec: TrainSpec) -> str:
    told = itertools.count()
    site = site_of(group, stop=lambda: group.rank == 0 and next(told) == 5)
    try:
        ranks.run_rank(spec, site)
    except JobInterrupted as error:
        return str(error)
    return "nothing happened"


def test_the_first_rank_says_when_to_stop(tmp_path: Path, two: Ranks) -> None:
    spec = spec_for(tmp_path, volumes(tmp_path), validations=1)
    found = two.run(_stops, spec)
    assert found == ["training stopped at step 5 by the user; the same command goes on from there"] * 2
    stored = Workplace.beside(spec.out).newest_valid(print)
    assert stored is not None
    assert stored[1]["step"] == 5


# ---------------------------------------------------------------- stop and go on


@pytest.mark.parametrize(
    "options",
    [
        long({"dropout": 0.2, "norm": "batch"}),
        {"schedule": "plateau", "patience": 20, "validations": 8, "average": False, "class_weights": "balanced"},
        long({"schedule": "restarts", "cycles": 3, "snapshots": True, "classes": "a,b,c"}),
    ],
    ids=["dropout", "plateau", "snapshots"],
)
def test_an_interrupted_training_ends_with_the_weights_of_an_undisturbed_one(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    data = volumes(tmp_path, classes=3 if "classes" in options else 2)
    values: dict[str, Any] = {"max_steps": 14, **options}
    whole, broken = (spec_for(tmp_path, data, out=str(tmp_path / name), **values) for name in ("whole", "broken"))
    train(whole)

    def stop(now: TrainProgress) -> None:
        if now.step >= 6:
            raise KeyboardInterrupt

    with pytest.raises(JobInterrupted, match=r"stopped at step \d+ .*the same command goes on"):
        train(broken, stop)
    assert not Path(broken.out).exists()
    notes: list[str] = []
    result = train(broken, note=notes.append)
    assert 6 <= result.resumed_from < 14
    assert any("going on from step" in note for note in notes)
    expected, found = (load_networks(spec.out)[1] for spec in (whole, broken))
    assert len(expected) == len(found) == (3 if "snapshots" in options else 1)
    for a, b in zip(expected, found, strict=True):
        for name, tensor in a.state_dict().items():
            torch.testing.assert_close(b.state_dict()[name], tensor, rtol=0, atol=0)
    assert [row["step"] for row in rows_of(broken)] == [row["step"] for row in rows_of(whole)]


def test_snapshots_are_the_members_of_an_ensemble(tmp_path: Path) -> None:
    spec = spec_for(tmp_path, volumes(tmp_path), schedule="restarts", cycles=3, snapshots=True, max_steps=30, warm_up=0)
    result = train(spec)
    assert result.members == 3
    assert "3 snapshots" in result.weights
    assert result.mean_foreground_dice is not None
    _, members = load_networks(spec.out)
    heads = [next(iter(network.parameters())) for network in members]
    assert not torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[1], heads[2])


def test_early_stopping_stops(tmp_path: Path) -> None:
    spec = spec_for(
        tmp_path, volumes(tmp_path), patience=2, validations=20, learning_rate=1e-12, weight_decay=0.0, max_steps=40,
        norm="group",
    )  # fmt: skip
    result = train(spec)
    assert result.steps < 20, "nothing changes, so the third validation is the second in vain"
    assert sum("val_dice" in row for row in rows_of(spec)) == 4, "and one at the end"


def test_a_class_bias_is_kept_where_it_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from volseg.training import milestones as module

    seen: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []

    def tuned(truth: NDArray[np.int64], probabilities: NDArray[np.float32]) -> tuple[float, ...]:
        seen.append((truth, probabilities))
        return (0.0, 50.0, 0.0)

    monkeypatch.setattr(module, "tune_class_bias", tuned)
    spec = spec_for(tmp_path, volumes(tmp_path, classes=3), max_steps=2)
    result = train(spec)
    assert result.class_bias == (0.0, 50.0, 0.0)
    assert load_networks(spec.out)[0].class_bias == (0.0, 50.0, 0.0)
    assert result.dice is not None
    assert result.dice["background"] == 0.0, "class 1 wins everywhere"
    ((truth, probabilities),) = seen
    assert truth.shape == (3 * 48 * 40,), "all voxels of the validation region"
    assert probabilities.shape == (truth.size, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-4)


def test_validations_are_denser_at_the_end() -> None:
    assert milestones(12) == pytest.approx((0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.775, 0.85, 0.9, 0.95))
    assert milestones(1) == ()
    assert len(milestones(100)) == 99
    assert list(milestones(30)) == sorted(milestones(30))
    assert max(milestones(30)) < 1


# ---------------------------------------------------------------- going wrong


def poison(monkeypatch: pytest.MonkeyPatch, when: int) -> None:
    """Make the loss of a step NaN."""
    make = deep_supervision_loss
    calls = itertools.count(1)

    def made(loss: Any) -> Any:
        inner = make(loss)

        def layered(outputs: Any, labels: Tensor) -> Tensor:
            return inner(outputs, labels) * (float("nan") if next(calls) == when else 1.0)

        return layered

    monkeypatch.setattr(compose, "deep_supervision_loss", made)


def test_a_loss_that_is_no_number_stops_the_training_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = volumes(tmp_path)
    spec = spec_for(tmp_path, data, threads=1, batch=2)
    poison(monkeypatch, 20)
    with pytest.raises(JobError) as caught:
        train(spec)
    message = str(caught.value)
    assert message.startswith(f"the loss is nan at step 20, in patches of {data['image']}: training diverged")
    stored = Workplace.beside(spec.out).newest_valid(print)
    assert stored is not None
    step = stored[1]["step"]
    assert 0 < step < 20
    assert f"the checkpoint of step {step}, from before, is kept: run it again with a --learning-rate below" in message
    assert all(bool(torch.isfinite(t).all()) for t in stored[1]["network"].values())
    monkeypatch.undo()
    result = train(spec_for(tmp_path, data, threads=1, batch=2, learning_rate=1e-4))
    assert (result.resumed_from, result.steps) == (step, 40)


def test_a_training_gone_astray_does_not_replace_its_checkpoint(tmp_path: Path) -> None:
    """Long before numbers overflow, a loss far above its best says that nothing good can come."""
    spec = spec_for(tmp_path, volumes(tmp_path), threads=1)

    def stop(now: TrainProgress) -> None:
        if now.step >= 8:
            raise KeyboardInterrupt

    with pytest.raises(JobInterrupted):
        train(spec, stop)
    place = Workplace.beside(spec.out)
    found = place.newest_valid(print)
    assert found is not None
    # As if the loss had been tiny before.
    place.save(found[1] | {"step": found[1]["step"] + 1, "lowest": 0.0, "loss": 3.0})
    before = place.checkpoints()
    with pytest.raises(JobInterrupted):
        train(spec, stop)
    assert place.checkpoints() == before, "nothing came after it"


def test_bf16_needs_a_processor_that_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("volseg.training.site.has_bf16", lambda _: False)
    with pytest.raises(SpecError, match="--precision bf16 needs a processor that has it"):
        train(spec_for(tmp_path, volumes(tmp_path), precision="bf16", device="cpu"))


def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--precision fp16 needs a GPU"):
        train(spec_for(tmp_path, volumes(tmp_path), precision="fp16", device="cpu"))


def test_a_bundle_that_was_written_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the bundle and the word that it is there."""
    spec = spec_for(tmp_path, volumes(tmp_path), max_steps=2)
    remove = Workplace.remove
    monkeypatch.setattr(Workplace, "remove", lambda self: None)
    first = train(spec)
    monkeypatch.setattr(Workplace, "remove", remove)
    assert train(spec) == first
    assert not Path(spec.out + ".training").exists()


# ---------------------------------------------------------------- validation


@settings(deadline=None)
@given(st.tuples(*[st.integers(1, 24)] * 3), st.tuples(*[st.integers(2, 16)] * 3))
def test_cores_tile_the_region_and_lie_in_their_windows(size: Triple, patch: Triple) -> None:
    box = Box.of(size).shifted((3, 0, 7))
    seen = np.zeros(size, np.uint8)
    for window, core in windows(box, patch):
        assert window.shape == patch
        assert window.contains(core)
        seen[core.relative_to(box.start).slices] += 1
    assert (seen == 1).all()


def region_of(folder: Path, image: NDArray[Any], labels: NDArray[Any], box: Box) -> Region:
    cache = TileCache(1 << 24, 1 << 24)
    views = [
        NetworkView(open_volume(store(folder / f"{name}.zarr", values, None)), "z", cache)
        for name, values in (("image", image), ("labels", labels))
    ]
    return Region(views[0], views[1], box, Scaling(low=(0,), high=(1e6,), mean=(0,), std=(1,)), 255)


def test_windows_are_spread_evenly(tmp_path: Path) -> None:
    region = region_of(tmp_path, np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), Box.of((4, 4, 4)))
    items = [(region, Box.of((i + 1, 1, 1)), Box.of((1, 1, 1))) for i in range(10)]
    assert spread(items, 10) == items
    assert [w.shape[0] for _, w, _ in spread(items, 4)] == [1, 4, 7, 10]
    assert len(spread(items, 1)) == 1


def threshold_network(kernel: int = 1) -> nn.Conv3d:
    """Class 1 where the middle voxel is bright; with a larger kernel the answer is smaller."""
    net = nn.Conv3d(1, 2, kernel)
    with torch.no_grad():
        net.weight.zero_()
        net.weight[:, 0, kernel // 2, kernel // 2, kernel // 2] = torch.tensor([-1.0, 1.0])
        assert net.bias is not None
        net.bias.copy_(torch.tensor([0.5, -0.5]))
    return net


@pytest.mark.parametrize("margin", [0, 1])
def test_validation_scores_the_labelled_voxels_of_the_regions_only(tmp_path: Path, margin: int) -> None:
    labels = np.zeros((6, 20, 20), np.uint8)
    labels[1:5, 5:15, 5:15] = 1
    image = labels.astype(np.float32)
    labels[2, :7] = 255
    regions = [
        region_of(tmp_path / str(i), image, labels, box)
        for i, box in enumerate((Box((1, 0, 0), (3, 20, 20)), Box((3, 2, 0), (6, 20, 11))))
    ]
    net = threshold_network(2 * margin + 1)
    setting = Setting((2 + 2 * margin,) * 3, (margin,) * 3, 2, sigmoid=False, threads=2)
    validator = Validator(regions, setting)
    scores = validator.score([net])
    assert scores.dice == (1.0, 1.0)
    inside = [labels[region.box.slices] for region in regions]
    assert scores.sizes == tuple(sum(int((part == c).sum()) for part in inside) for c in (0, 1))
    assert validator.score([net], dtype=torch.bfloat16, most=3).dice[0] == 1.0
    truth, probabilities = validator.sample([net])
    assert (probabilities.argmax(1) == truth).all()
    assert IGNORED not in truth


def test_an_ensemble_answers_with_the_mean_probability(tmp_path: Path) -> None:
    labels = np.zeros((2, 8, 8), np.uint8)
    labels[:, 2:6] = 1
    region = region_of(tmp_path, labels.astype(np.float32), labels, Box.of((2, 8, 8)))
    right, wrong = threshold_network(), threshold_network()
    with torch.no_grad():
        wrong.weight.mul_(-0.5)
        assert wrong.bias is not None
        wrong.bias.mul_(-0.5)
    validator = Validator([region], Setting((2, 8, 8), (0, 0, 0), 2, sigmoid=False))
    assert validator.score([wrong]).dice == (0.0, 0.0)
    assert validator.score([right, wrong]).dice == (1.0, 1.0), "the surer one wins"
    zero, one = validator.score([right], bias=(9.0, 0.0)).dice
    assert zero == pytest.approx(2 / 3)
    assert one == 0.0
