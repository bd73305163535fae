"""Names as Kubernetes takes them, checked before it would refuse them."""

from __future__ import annotations

import re

from volseg.errors import SpecError

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_DOTTED = rf"{_LABEL}(\.{_LABEL})*"
_IMAGE = re.compile(
    r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]{1,5})?(/[a-z0-9]+([._-]+[a-z0-9]+)*)*(:[\w][\w.-]{0,127})?"
    r"(@sha256:[0-9a-f]{64})?",
    re.ASCII,
)
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?([kMGTP]i?)?", re.ASCII)


def check_name(option: str, name: str | None, longest: int, *, dots: bool = False, letter_first: bool = False) -> None:
    """Raise SpecError where Kubernetes would not take a name; None is fine."""
    if name is None:
        return
    fits = re.fullmatch(_DOTTED if dots else _LABEL, name) and len(name) <= longest
    if not fits or (letter_first and not name[0].isalpha()):
        start = ", begins with a letter" if letter_first else ""
        raise SpecError(
            f"{option} {name!r} is no name for Kubernetes: it has lower-case letters, digits and "
            f"{'dashes or dots' if dots else 'dashes'} between them{start} and is at most {longest} long; nothing was "
            "rendered"
        )


def check_image(image: str) -> None:
    """Raise SpecError where something is no name of an image; what it is is not repeated, it may hold a password."""
    if not _IMAGE.fullmatch(image):
        raise SpecError(
            "--image is no name of an image such as registry.example.org/volseg:0.1.0; nothing was rendered: leave "
            "out scheme, user and password, which belong into a pull secret of the service account"
        )


def check_quantity(option: str, quantity: str | None) -> None:
    """Raise SpecError where something is no amount of memory; None is fine."""
    if quantity is not None and not _QUANTITY.fullmatch(quantity):
        raise SpecError(f"{option} {quantity!r} is no amount such as 16Gi; nothing was rendered")


def is_below(path: str, folder: str) -> bool:
    """Tell whether a path is a folder, or lies inside it by its name."""
    return ".." not in path.split("/") and f"{path.rstrip('/')}/".startswith(f"{folder.rstrip('/')}/")
