"""Fixtures of the whole suite. Also loaded where torch, ray and zarr are not installed: nothing heavy at the top."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support import Case

# Ray's own default writes a token into the home folder; volseg's embedded Ray listens on this machine only.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.pop("RAY_ADDRESS", None)


# A job that a script starts in the background ignores Ctrl-C, and so does every process that it starts, on purpose. The
# tests of Ctrl-C mean a job in the foreground, wherever the tests themselves run.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """The command line, run inside the test process, takes SIGTERM for itself."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def one_ray() -> Iterator[None]:
    """One Ray inside this process for all tests that need one; it ends with the session."""
    import ray

    from volseg.cluster.session import RaySession

    handler = signal.getsignal(signal.SIGTERM)
    with RaySession(None, workers=4):
        # Ray takes SIGTERM for itself: a driver would end with no word on how to go on.
        assert signal.getsignal(signal.SIGTERM) is handler
        yield
    assert not ray.is_initialized()


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A 3D network with three classes, and a volume whose sides are multiples of nothing."""
    from tests.support import Case, make_bundle, smooth, store

    folder = tmp_path_factory.mktemp("case")
    image = store(folder / "image.zarr", smooth((40, 45, 50)))
    return Case(image, make_bundle(folder / "bundle"), folder)


@pytest.fixture(scope="session")
def slow_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The usual volume, and a network slow enough that even a fast machine is far from the end after a first block."""
    from tests.support import Case, make_bundle, smooth, store

    folder = tmp_path_factory.mktemp("slow")
    image = store(folder / "image.zarr", smooth((40, 45, 50)))
    return Case(image, make_bundle(folder / "bundle", widths=(16, 16)), folder)


@pytest.fixture(scope="session")
def flat_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A 2D network with one sigmoid channel, trained along z, and a volume."""
    from tests.support import Case, make_bundle, smooth, store

    folder = tmp_path_factory.mktemp("flat")
    image = store(folder / "image.zarr", smooth((13, 26, 22), seed=5))
    return Case(image, make_bundle(folder / "bundle", dims=2, classes=2, patch=(1, 16, 16)), folder)
