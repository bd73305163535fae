"""Two S3 servers on loopback, both with authorisation on: moto's, and rclone's, which ignores conditional puts.

A module of fixtures for `pytest_plugins`, to be imported by nobody else. Each server runs once a session.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flaky_proxy import FlakyProxy, proxy
from tests.s3_servers import Server, run_moto, run_rclone
from volseg.storage import s3_requests


@pytest.fixture(scope="session")
def moto() -> Iterator[Server]:
    """moto's server; one user may do everything, everybody else nothing."""
    with run_moto() as found:
        yield found


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """rclone's server over a local folder."""
    with run_rclone(tmp_path_factory.mktemp("rclone")) as found:
        yield found


@pytest.fixture
def public(tmp_path: Path) -> Iterator[Server]:
    """A server that lets everybody in, signed or not, over the folder `buckets` of the test."""
    (tmp_path / "buckets").mkdir()
    with run_rclone(tmp_path / "buckets", public=True) as found:
        yield found


@pytest.fixture(params=["moto", "rclone"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Server:
    """Each of the two servers; this process uses it."""
    found: Server = request.getfixturevalue(request.param)
    found.use(monkeypatch)
    return found


@pytest.fixture
def bucket(server: Server) -> str:
    """A fresh bucket's URI."""
    return f"s3://{server.new_bucket()}"


@pytest.fixture(scope="session")
def proxy_of_moto(moto: Server) -> Iterator[FlakyProxy]:
    """One proxy, so that one client serves all tests that go through it."""
    with proxy(moto.endpoint) as found:
        yield found


@pytest.fixture
def flaky(moto: Server, proxy_of_moto: FlakyProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyProxy]:
    """A proxy in front of moto that lets everything through, so far; this process goes through it."""
    moto.behind(proxy_of_moto.endpoint).use(monkeypatch)
    yield proxy_of_moto
    proxy_of_moto.reset()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the requests of an operation, hardly any time passes."""
    monkeypatch.setattr(s3_requests, "PAUSE_SECONDS", 0.001)
