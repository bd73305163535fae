"""What an unfinished job keeps: the tile that was planned for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from volseg.geometry import Triple
from volseg.storage import files
from volseg.storage.ledger import Ledger, ledger_root

# What of a job's identity follows from its tile.
_OF_THE_TILE = ("patch", "stride", "halo")


def begun_tile(output: str, identity: Mapping[str, Any]) -> Triple | None:
    """Return the tile of a job that was begun on `output` and has this identity but for the tile; None without one."""
    wanted = _without_tile(identity)
    for key in files.list_names(ledger_root(output)):
        header = Ledger(output, key).header()
        if header is not None and _without_tile(header["identity"]) == wanted:
            strides = header["identity"]["stride"]
            views = strides if isinstance(strides[0], list) else [strides]
            z, y, x = (max(stride[axis] for stride in views) for axis in range(3))
            return z, y, x
    return None


def _without_tile(identity: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in identity.items() if name not in _OF_THE_TILE}
    # As the ledger stores it: tuples become lists.
    values: dict[str, Any] = json.loads(json.dumps(kept))
    return values
