"""Recipes: every file is whole, the user wins over it, and wrong names are refused with the nearest right one."""

from typing import Any

import pytest

from volseg.errors import SpecError
from volseg.recipes import load_recipe, recipe_names, resolve
from volseg.spec import TrainSpec

BASE = {"image": "image.zarr", "labels": "labels.zarr", "out": "unet"}
WANTED = {
    "default", "fcn8", "inception-snapshot", "inception-snapshot-plain", "inception-snapshot-single", "patchify-unet",
    "salt-unet", "tomo-fewslice", "tomo-fewslice-vgg",
}  # fmt: skip


def test_all_recipes_are_there_the_default_first() -> None:
    assert set(recipe_names()) == WANTED
    assert recipe_names()[0] == "default"


@pytest.mark.parametrize("name", sorted(WANTED))
def test_a_recipe_says_what_it_is_and_makes_a_spec(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.summary.endswith(".")
    assert recipe.source.endswith(".")
    spec = resolve({**BASE, "recipe": name})
    assert spec.recipe == name
    for key, value in recipe.options.items():
        assert key in spec.model_fields_set
        if isinstance(value, str | int | float):
            assert getattr(spec, key) == value


def test_without_a_name_it_is_the_default() -> None:
    assert resolve(BASE) == resolve({**BASE, "recipe": "default"})


def test_the_users_options_win() -> None:
    options: dict[str, Any] = {"batch": 8, "augmentation": {"angle": 5}, "network": {"padded": True}}
    spec = resolve({**BASE, "recipe": "patchify-unet", **options})
    assert (spec.batch, spec.augmentation.angle, spec.network) == (8, 5.0, {"padded": True})
    assert (spec.augmentation.warp, spec.widths) == (0.7, (64, 128, 256, 512, 1024))


@pytest.mark.parametrize("chosen", [{"val_roi": "0:1,:,:"}, {"folds": 3}, {"split": 0.5}])
def test_the_users_validation_replaces_the_recipes(chosen: dict[str, Any]) -> None:
    spec = resolve({**BASE, "recipe": "fcn8", **chosen})
    found = {key: getattr(spec, key) for key in ("val_roi", "folds", "split") if getattr(spec, key) is not None}
    assert found == {key: (value,) if key == "val_roi" else value for key, value in chosen.items()}
    assert resolve({**BASE, "recipe": "fcn8"}).split == 0.8


def test_an_unknown_recipe_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(SpecError, match=r"unknown recipe 'salt-unit' \(did you mean 'salt-unet'\?\); nothing was done"):
        resolve({**BASE, "recipe": "salt-unit"})
    with pytest.raises(SpecError, match="is no name"):
        resolve({**BASE, "recipe": 3})


def test_an_unknown_field_is_refused_beside_a_recipe() -> None:
    with pytest.raises(SpecError, match=r"did you mean 'learning_rate'"):
        resolve({**BASE, "recipe": "fcn8", "lerning_rate": 1})


def test_the_five_systems_are_what_was_published() -> None:
    def of(name: str) -> TrainSpec:
        return resolve({**BASE, "recipe": name})

    inception, fcn, salt, patchify, tomo = (
        of(n) for n in ("inception-snapshot", "fcn8", "salt-unet", "patchify-unet", "tomo-fewslice")
    )
    assert (inception.widths, inception.cycles, inception.learning_rate) == ((8, 16, 32, 64), 3, 1e-3)
    assert (inception.loss, inception.batch, inception.snapshots) == ("bce", 4, True)
    assert (fcn.loss, fcn.batch, fcn.split, fcn.precision) == ("ce", 32, 0.8, "fp32")
    assert (salt.dropout, salt.schedule, salt.patience, salt.split) == (0.05, "plateau", 10, 0.9)
    assert patchify.network == {"padded": False}
    assert (tomo.class_weights, tomo.loss) == ("balanced", "dice_ce")
