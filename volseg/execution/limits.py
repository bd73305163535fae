"""Where an operator lets jobs read and write: roots and bucket prefixes in the environment of the driver's machine.

``VOLSEG_ALLOWED_INPUTS`` and ``VOLSEG_ALLOWED_OUTPUTS`` hold places separated by commas, such as
``s3://scans,s3://seg/2026,/data/shared``. This guards against mistakes. It is no wall: whoever may submit a job may run
code, and code can do what the machine's accounts allow.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import PurePosixPath
from urllib.parse import unquote

from volseg.errors import InputError
from volseg.storage import files

INPUTS = "VOLSEG_ALLOWED_INPUTS"
OUTPUTS = "VOLSEG_ALLOWED_OUTPUTS"


def check_allowed(inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
    """Raise InputError where a place, by the name of its option, is outside of what the operator allows.

    And where it carries a credential, which nobody allows.
    """
    for place in (*inputs.values(), *outputs.values()):
        files.refuse_credentials(place)
    for variable, places in ((INPUTS, inputs), (OUTPUTS, outputs)):
        allowed = os.environ.get(variable)
        if allowed is None:
            continue
        roots = [root.strip() for root in allowed.split(",") if root.strip()]
        for name, place in places.items():
            if not any(_within(place, root) for root in roots):
                raise InputError(
                    f"{name} {place} is outside of what the operator of this machine allows ({variable}="
                    f"{','.join(roots)}); nothing was done: choose a place below one of these"
                )


def _within(place: str, root: str) -> bool:
    if files.is_local(place) != files.is_local(root):
        return False
    if files.is_local(place):
        # Links are followed: a link out of the root leads out of it.
        real, top = files.local_path(place).resolve(), files.local_path(root).resolve()
        return real == top or top in real.parents
    # Not by the rules of addresses: a key may hold ? and #.
    there, here = PurePosixPath(_plain(place)), PurePosixPath(_plain(root))
    if not here.parts:
        # Nothing behind the scheme, as where a variable was empty, is no root.
        return False
    if place.partition("://")[0] != root.partition("://")[0] or ".." in there.parts:
        return False
    return there == here or here in there.parents


def _plain(uri: str) -> str:
    """Return host or bucket with the path below; as servers of files read it, where it is not S3."""
    path = uri.partition("://")[2]
    return path if files.is_s3(uri) else unquote(path)
