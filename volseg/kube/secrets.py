"""What looks like a credential and must be in no manifest: whoever may read a RayJob would read it, too.

Nothing here repeats what it found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from volseg.errors import SpecError

_NAME = re.compile(r"secret|token|passw|credential|_key", re.IGNORECASE)
_SHAPES = {
    "a user and password in a URI": re.compile(r"://[^/?#\s@]*@"),
    "a signed URI": re.compile(
        r"[?&;](x-amz-[a-z-]+|awsaccesskeyid|sig|signature|[\w-]*(secret|token|passw|credential|_key)[\w-]*)=",
        re.IGNORECASE,
    ),
    "an AWS access key": re.compile(r"(?<![A-Z0-9])(AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    "a token": re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.|\bBearer\s+[\w.~+/-]{16,}"),
}
_REMEDY = (
    "nothing was rendered: give the pods a role (workload identity), or a Secret with --s3-secret; endpoint and region "
    "stand in the ConfigMap volseg-environment"
)


def refuse_secrets(values: Mapping[str, Any], where: str) -> None:
    """Raise SpecError where some text in `values` has the shape of a credential; `where` names what they are."""
    for name, text in _texts(values, ""):
        for kind, shape in _SHAPES.items():
            if shape.search(text):
                raise SpecError(f"{where} {name} holds {kind}, which whoever sees the RayJob could read; {_REMEDY}")


def refuse_secret_names(names: Mapping[str, str], where: str) -> None:
    """Raise SpecError where a variable is called like a credential."""
    for name in names:
        if _NAME.search(name):
            raise SpecError(
                f"{where} {name} is called like a credential, which whoever sees the RayJob could read; {_REMEDY}"
            )


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield every text inside `value` with the dotted name of where it stands; keys that users choose are text, too."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield path or "a key", str(key)
            yield from _texts(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner, path)
    elif isinstance(value, str):
        yield path, value
