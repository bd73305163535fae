"""Fine-tuning: a training starts from the weights of a bundle, also with other classes or channels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import make_bundle, store
from tests.train_support import rows_of, scene, spec_for, volumes
from volseg.errors import BundleError, SpecError
from volseg.models.bundle import load_networks
from volseg.models.registry import build, make_config
from volseg.training.initial import start_from
from volseg.training.train import train

NETWORK = {"dims": 2, "widths": (4, 8), "out_channels": 1, "in_channels": 1}


def state_of(bundle: str) -> dict[str, torch.Tensor]:
    return dict(load_networks(bundle)[1][0].state_dict())


def test_a_training_goes_on_from_what_a_bundle_knows(tmp_path: Path) -> None:
    data = volumes(tmp_path)
    first = spec_for(tmp_path, data, out=str(tmp_path / "first"), max_steps=60)
    train(first)
    notes: list[str] = []
    options: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-6, "widths": None, "average": False, "dims": None}
    tuned = spec_for(tmp_path, data, init=first.out, **options)
    result = train(tuned, note=notes.append)
    assert any(note.startswith(f"starting from {first.out}: ") for note in notes)
    assert result.mean_foreground_dice is not None
    assert result.mean_foreground_dice > 0.8, "two steps from scratch know nothing"
    fresh = spec_for(tmp_path, data, out=str(tmp_path / "fresh"), **(options | {"dims": 2, "widths": (8, 16)}))
    train(fresh)
    assert rows_of(tuned)[-1]["loss"] < 0.5 * rows_of(fresh)[-1]["loss"]
    # The network is the bundle's, whatever the planner would have chosen.
    assert load_networks(tuned.out)[0].arguments["widths"] == [8, 16]


@pytest.mark.parametrize("channels", [1, 3])
def test_other_channels_share_the_mean_of_the_old_ones(tmp_path: Path, channels: int) -> None:
    bundle = make_bundle(tmp_path / "b", dims=2, classes=2, patch=(1, 16, 16), channels=2)
    network = build("unet", make_config("unet", NETWORK | {"in_channels": channels}))
    line = start_from(network, bundle, ["class 0", "class 1"], channels)
    assert "1 of them fitted to other channels or classes" in line
    old, new = state_of(bundle), network.state_dict()
    (first,) = [name for name, tensor in old.items() if tensor.shape != new[name].shape]
    assert torch.allclose(new[first].sum(1), old[first].sum(1), atol=1e-6), "a grey image gives what it gave"
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items() if name != first)


def test_of_the_last_layer_the_classes_of_the_same_name_are_kept(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", dims=2, classes=3, patch=(1, 16, 16))
    torch.manual_seed(1)
    network = build("unet", make_config("unet", NETWORK | {"out_channels": 4}))
    random = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    start_from(network, bundle, ["class 2", "bone", "class 0", "muscle"], 1)
    old, new = state_of(bundle), network.state_dict()
    heads = [name for name, tensor in old.items() if tensor.shape != new[name].shape]
    assert len(heads) == 2
    for name in heads:
        assert torch.equal(new[name][0], old[name][2])
        assert torch.equal(new[name][2], old[name][0])
        assert torch.equal(new[name][1], random[name][1])


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", dims=3, classes=2)
    data = volumes(tmp_path)
    with pytest.raises(SpecError, match=r"is a 3D network, --dims 2 was asked for.*nothing was trained"):
        train(spec_for(tmp_path, data, init=bundle))
    with pytest.raises(BundleError, match="no model bundle at"):
        train(spec_for(tmp_path, data, init=str(tmp_path / "nothing")))
    other = build("vgg_classifier", make_config("vgg_classifier", {"dims": 3, "in_channels": 1, "out_channels": 1}))
    with pytest.raises(SpecError, match="no weight of --init"):
        start_from(other, bundle, ["a", "b"], 1)
    assert not Path(spec_for(tmp_path, data).out).exists()


def test_binary_cross_entropy_of_many_classes_is_cross_entropy(tmp_path: Path) -> None:
    image, labels = scene(classes=3)
    data = {"image": store(tmp_path / "i.zarr", image, None), "labels": store(tmp_path / "l.zarr", labels, None)}
    losses = {}
    for loss in ("bce", "ce"):
        spec = spec_for(tmp_path, data, loss=loss, max_steps=3, out=str(tmp_path / loss))
        train(spec)
        losses[loss] = [row["loss"] for row in rows_of(spec)]
    assert losses["bce"] == losses["ce"]
    assert np.isfinite(losses["ce"]).all()
