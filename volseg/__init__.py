"""volseg: segments tomography volumes that exceed memory, on a laptop or a Ray cluster.

```python
import volseg

report = volseg.segment("scan.zarr", "result.zarr", model="unet", workers=2)
```

Importing volseg loads neither torch nor ray; what a call needs is loaded when it is made.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from volseg.api import bench, evaluate, import_volume, overlay, plan, segment, train, verify
    from volseg.client import AsyncClient, Client
    from volseg.errors import VolsegError
    from volseg.spec import SegmentSpec, TrainSpec

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "Client",
    "SegmentSpec",
    "TrainSpec",
    "VolsegError",
    "bench",
    "evaluate",
    "import_volume",
    "overlay",
    "plan",
    "segment",
    "train",
    "verify",
]

_HOMES = {
    "AsyncClient": "client",
    "Client": "client",
    "SegmentSpec": "spec",
    "TrainSpec": "spec",
    "VolsegError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'volseg' has no attribute {name!r}")
    return getattr(import_module(f"volseg.{_HOMES.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
