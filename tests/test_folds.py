"""Cross-validation: every slab is scored by a network that never saw it, and all networks become one ensemble."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import Case, labels_of, segment, store
from tests.train_support import rows_of, scene, spec_for, volumes
from volseg.errors import JobInterrupted, SpecError
from volseg.models.bundle import load_networks
from volseg.spec import TrainSpec
from volseg.training.folds import mean_scores
from volseg.training.metrics import Scores
from volseg.training.progress import TrainProgress
from volseg.training.train import train


def fold_spec(folder: Path, data: dict[str, str], **options: Any) -> TrainSpec:
    return spec_for(folder, data, val_roi=None, train_roi=":,:,:", folds=3, **options)


def test_folds_make_an_ensemble_that_segments(tmp_path: Path) -> None:
    notes: list[str] = []
    data = volumes(tmp_path)
    spec = fold_spec(tmp_path, data, max_steps=90)
    result = train(spec, note=notes.append)
    assert result.members == 3
    assert result.steps == 90
    assert [note for note in notes if note.startswith("fold")] == [f"fold {n} of 3" for n in (1, 2, 3)]
    assert result.weights.startswith("3 folds, mean foreground Dice of each on its own slab: 0.")
    assert result.mean_foreground_dice is not None
    assert result.mean_foreground_dice > 0.6
    assert {row["fold"] for row in rows_of(spec)} == {1, 2, 3}
    manifest, networks = load_networks(spec.out)
    assert len(networks) == manifest.members == 3
    first, second = (next(iter(n.state_dict().values())) for n in networks[:2])
    assert not np.allclose(first.numpy(), second.numpy()), "each was trained on other slabs"
    report = segment(Case(data["image"], spec.out, tmp_path), tmp_path / "out.zarr")
    assert report["forwards"] == 3 * report["patches"]
    agreement = np.mean(labels_of(tmp_path / "out.zarr") == scene()[1])
    assert agreement > 0.85


def test_an_interrupted_cross_validation_goes_on_in_its_fold(tmp_path: Path) -> None:
    data = volumes(tmp_path)
    spec = fold_spec(tmp_path, data, max_steps=18)
    notes: list[str] = []

    def stop(now: TrainProgress) -> None:
        if len([n for n in notes if n.startswith("fold")]) == 2 and now.step >= 3:
            raise KeyboardInterrupt

    with pytest.raises(JobInterrupted):
        train(spec, stop, notes.append)
    assert not Path(spec.out).exists()
    again: list[str] = []
    result = train(spec, note=again.append)
    assert result.members == 3
    assert result.steps == 18
    assert len([note for note in again if note.startswith("going on from step")]) == 2, "the first is done, one goes on"
    assert not Path(spec.out + ".training").exists()


def test_more_folds_than_labelled_slices_are_refused(tmp_path: Path) -> None:
    image, labels = scene()
    sparse = np.full_like(labels, 255)
    sparse[2], sparse[6] = labels[2], labels[6]
    with pytest.raises(SpecError, match="only 2 slice"):
        train(fold_spec(tmp_path, volumes(tmp_path, image=image, labels=sparse)))
    assert not Path(spec_for(tmp_path, {"image": "i", "labels": "l"}).out).exists()


def test_scores_of_slabs_count_by_their_voxels() -> None:
    found = mean_scores([Scores((0.5, 0.9, None), (10, 30, 0)), Scores((1.0, 0.5, None), (10, 10, 0))])
    assert found is not None
    assert found.dice[0] == 0.75
    assert found.dice[1] == pytest.approx(0.8)
    assert found.dice[2] is None
    assert found.sizes == (20, 40, 0)
    assert mean_scores([]) is None


def test_three_classes_can_be_cross_validated(tmp_path: Path) -> None:
    image, labels = scene(classes=3)
    data = {"image": store(tmp_path / "i.zarr", image, None), "labels": store(tmp_path / "l.zarr", labels, None)}
    result = train(fold_spec(tmp_path, data, max_steps=6))
    assert result.threshold is None
    assert result.members == 3
