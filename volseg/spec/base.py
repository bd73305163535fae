"""What all specs share: unknown keys refused with the nearest right name, and values as a command line writes them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from volseg.errors import SpecError, nearest
from volseg.geometry.box import Triple


class Spec(BaseModel):
    """Base of all specs: unknown keys are refused with the nearest right name."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sections: ClassVar[dict[str, str]] = {}
    """Headings of the help by the name of the first option below them."""

    def __init__(self, **values: Any) -> None:
        """Check `values`; raises SpecError as `read` does."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _refusal(type(self), error) from None

    # Else pydantic would call it for the groups inside of a spec, too, whose faults are to be told with the others.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @classmethod
    def read(cls, values: dict[str, Any]) -> Self:
        """Check `values` and return the spec; raises SpecError with one line for every fault."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _refusal(cls, error) from None


def _refusal(cls: type[BaseModel], error: ValidationError) -> SpecError:
    faults: dict[str, str] = {}
    for e in error.errors():
        # Places in a list and kinds of a choice, such as tuple[float, ...], are no names that a user knows.
        name = ".".join(part for part in e["loc"] if isinstance(part, str) and "[" not in part)
        faults.setdefault(name, _explain(cls, name, e["type"], e["msg"], e["input"]))
    return SpecError("; ".join(faults.values()) + "; nothing was done")


def _explain(cls: type[BaseModel], name: str, kind: str, message: str, value: object) -> str:
    text = message.removeprefix("Value error, ")
    if not name:
        return text
    if kind == "extra_forbidden":
        return f"unknown option {name!r}{nearest(name, _known(cls, name))}"
    if kind == "missing":
        return f"option {name!r} is missing"
    return f"option {name!r}: {value!r} is not allowed: {text}"


def _known(cls: type[BaseModel], name: str) -> list[str]:
    """Return the full names of the options beside the unknown one called `name`."""
    group = ""
    for part in name.split(".")[:-1]:
        inner = cls.model_fields[part].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        cls, group = inner, f"{group}{part}."
    return [group + name for name in cls.model_fields]


def parse_triple(value: object) -> object:
    """Turn ``"1,256,256"`` or ``"64"`` (three equal sides) into (z, y, x); other values pass through to pydantic."""
    rule = "write three whole numbers z,y,x such as 64,64,64, or one for all three"
    if isinstance(value, int) and not isinstance(value, bool):
        return (value, value, value)
    if isinstance(value, str):
        parts = value.replace(" ", "").strip("()[]").split(",")
        if not all(re.fullmatch(r"\d+", p) for p in parts) or len(parts) not in {1, 3}:
            raise ValueError(rule)
        numbers = [int(p) for p in parts]
        return tuple(numbers * 3 if len(numbers) == 1 else numbers)
    if isinstance(value, list | tuple) and len(value) != 3:
        raise ValueError(rule)
    return value


def parse_floats(text: str | None, option: str) -> tuple[float, float, float] | None:
    """Turn ``"0.1,0.022,0.022"`` or ``"3"`` (three equal) into (z, y, x); raises SpecError."""
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in {1, 3}:
        raise SpecError(f"{option} {text!r}: write three numbers z,y,x such as 0.1,0.022,0.022, or one for all three")
    z, y, x = numbers * 3 if len(numbers) == 1 else numbers
    return z, y, x


def positive(value: Triple | None) -> Triple | None:
    """Return `value`; raises ValueError where a side is below one voxel."""
    if value is not None and min(value) < 1:
        raise ValueError("every side must be at least 1 voxel")
    return value


def parse_list(separator: str = ",") -> Callable[[object], object]:
    """Return a reader of lists: text is cut at `separator`, a single value stands for a list of one."""

    def read(value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(separator))
        return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value

    return read


def parse_triples(value: object) -> object:
    """Turn ``"1,2,2;2,2,2"`` into a tuple of (z, y, x); other values pass through to pydantic."""
    if isinstance(value, str):
        value = value.split(";")
    return tuple(parse_triple(part) for part in value) if isinstance(value, list | tuple) else value
