"""Recipes: named trainings that ship with volseg, as YAML files of options beside this module.

A recipe gives the options that the user leaves out; whatever the user says wins over it.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from volseg.errors import SpecError, nearest
from volseg.spec import TrainSpec

# Each says by itself what validates: the user's choice replaces the recipe's.
_VALIDATION = ("val_roi", "split", "folds")


class Recipe(BaseModel):
    """A named training: what it is in a line, where it comes from, how it differs from its source, its options."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    summary: str
    source: str
    notes: str = ""
    options: dict[str, Any] = Field(default_factory=dict)


def recipe_names() -> list[str]:
    """Return the names of all recipes, `default` first."""
    names = sorted(entry.name.removesuffix(".yaml") for entry in files(__name__).iterdir() if _is_recipe(entry.name))
    return sorted(names, key=lambda name: (name != "default", name))


@cache
def load_recipe(name: str) -> Recipe:
    """Return the recipe called `name`; raises SpecError with the nearest right name."""
    names = recipe_names()
    if name not in names:
        raise SpecError(
            f"unknown recipe {name!r}{nearest(name, names)}; nothing was done: 'volseg recipes' lists them: "
            + ", ".join(names)
        )
    content = yaml.safe_load(files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    return Recipe(name=name, **content)


def resolve(values: dict[str, Any]) -> TrainSpec:
    """Return the spec of a training from what the user says and the recipe that it names (`default` if none).

    Groups such as `augmentation` are merged option by option. Raises SpecError where the recipe is unknown or an option
    is wrong.
    """
    name = values.get("recipe", "default")
    if not isinstance(name, str):
        raise SpecError(f"option 'recipe': {name!r} is no name; nothing was done: 'volseg recipes' lists them")
    options = dict(load_recipe(name).options)
    if any(values.get(key) is not None for key in _VALIDATION):
        options = {key: value for key, value in options.items() if key not in _VALIDATION}
    return TrainSpec.read(_merged(options, values))


def _merged(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _is_recipe(name: str) -> bool:
    return name.endswith(".yaml")
