"""What operators decide stays theirs, and what nobody may read is refused or taken out; a cluster: test_watch.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import Case, segment, store
from tests.train_support import scene
from volseg import api, redaction
from volseg.cli import commands
from volseg.cli.main import main
from volseg.cluster import batch
from volseg.cluster.submission import check_runtime_env
from volseg.cluster.worker import clean_errors
from volseg.errors import InputError, PlaceError, SpecError, VolsegError
from volseg.execution.limits import check_allowed
from volseg.inference.block_processor import BlockProcessor
from volseg.planning.task import Task
from volseg.redaction import HIDDEN, redact
from volseg.spec import SegmentSpec, TrainSpec
from volseg.spec.batch import BatchSpec
from volseg.storage import files

SECRET = "canary/secret+of-a-user-0123456789"
WITH_LOGIN = f"s3://AKIDCANARY:{SECRET}@scans/a.zarr"
WITH_SIGNATURE = "https://host/a.zarr?X-Amz-Credential=canary&X-Amz-Signature=canary"


# ---------------------------------------------------------------- credentials in places


@pytest.mark.parametrize("place", [WITH_LOGIN, WITH_SIGNATURE])
@pytest.mark.parametrize(
    "words",
    [
        "info {bad}",
        "plan {bad} {out} --model {model}",
        "segment {bad} {out} --model {model}",
        "segment {image} {bad} --model {model}",
        "segment {image} {out} --model {bad}",
        "train --image {bad} --labels {image} --out {out}",
        "train --image {image} --labels {image} --out {bad}",
        "submit --input {bad} --output {out} --model {model}",
        "batch --input {bad}/* --output {out} --model {model}",
        "verify {bad}",
        "evaluate {bad} {image}",
        "import {image} {bad}",
        "model {bad}",
        "status {bad}",
    ],
)
def test_a_place_with_a_credential_is_refused(
    words: str, place: str, case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything else, and without being repeated; it would stand in ledgers, reports and command lines."""
    stack = store(tmp_path / "stack.zarr", scene()[0]) if words.startswith("import") else case.image
    values = {"bad": place, "out": tmp_path / "out", "image": stack, "model": case.bundle}
    before = set(tmp_path.rglob("*"))
    assert main([word.format(**values) for word in words.split()] + ["--json"]) == 2
    out, err = capsys.readouterr()
    assert "carries a credential; nothing was done" in json.loads(out)["error"]
    assert "canary" not in (out + err).lower()
    assert set(tmp_path.rglob("*")) == before


def test_from_python(case: Case, tmp_path: Path) -> None:
    with pytest.raises(
        PlaceError, match=rf"^s3://{HIDDEN[0]}.*@scans/a\.zarr carries a credential".replace("*", r"\*", 1)
    ):
        segment(Case(WITH_LOGIN, case.bundle, tmp_path), tmp_path / "out.zarr")
    spec = TrainSpec.read({"image": case.image, "labels": case.image, "out": str(tmp_path / "b"), "init": WITH_LOGIN})
    with pytest.raises(PlaceError, match="carries a credential"):
        api.run_train(spec)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["/data/a@b/c?token=x", "s3://bucket/a@b/c", "s3://bucket/2026-?/a"])
def test_other_places_are_left_alone(place: str) -> None:
    files.refuse_credentials(place)


# ---------------------------------------------------------------- endpoints and what else operators decide


@pytest.mark.parametrize("option", ["endpoint_url", "storage_options", "endpoint", "aws_access_key_id", "token"])
def test_no_spec_names_an_endpoint_or_a_credential(option: str, tmp_path: Path) -> None:
    values = {"input": "s3://a/b", "output": "s3://a/c", "model": "s3://a/d", option: SECRET}
    with pytest.raises(SpecError, match=f"unknown option '{option}'") as raised:
        SegmentSpec.read(values)
    assert SECRET not in str(raised.value)


def test_no_place_names_an_endpoint(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another program would read a host, it is taken for a bucket, and no bucket can be called so."""
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "x"),
        ("AWS_SECRET_ACCESS_KEY", "y"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(VolsegError, match=r"127\.0\.0\.1:9"):
        segment(Case("s3://127.0.0.1:9/scans/a.zarr", case.bundle, tmp_path), tmp_path / "out.zarr")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"env_vars": {"AWS_ENDPOINT_URL": "http://x"}}, "sets AWS_ENDPOINT_URL, which is for the operator"),
        ({"env_vars": {"AWS_ENDPOINT_URL_S3": "http://x"}}, "sets AWS_ENDPOINT_URL_S3, which is for the operator"),
        ({"env_vars": {"VOLSEG_ALLOWED_OUTPUTS": "/"}}, "sets VOLSEG_ALLOWED_OUTPUTS, which is for the operator"),
        ({"env_vars": {"RAY_AUTH_MODE": "disabled"}}, "sets RAY_AUTH_MODE, which is for the operator"),
        ({"env_vars": {"https_proxy": f"http://u:{SECRET}@proxy"}}, "an address with a credential in it"),
        ({"pip": ["--extra-index-url", "https://user:canary-pw@pypi.example.org/simple"]}, "an address with a cred"),
        ({"pip": {"packages": ["x @ https://canary-token@host/x.whl"]}}, "an address with a credential in it"),
        ({"working_dir": "https://host/x.zip?token=canary"}, "an address with a credential in it"),
    ],
)
def test_runtime_env(environment: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        check_runtime_env(environment)
    assert "nothing was submitted" in str(raised.value)
    assert "canary" not in str(raised.value)


# ---------------------------------------------------------------- roots


@pytest.mark.parametrize(
    ("place", "allowed", "fine"),
    [
        ("s3://scans/2026?x/a.zarr", "s3://scans/2026", False),
        ("s3://scans/2026#x", "s3://scans/2026", False),
        ("s3://scans/2026", "s3://scans/2026", True),
        ("s3://scans/a.zarr", "s3://", False),
        ("s3a://scans/a.zarr", "s3://scans", False),
        ("simplecache::s3://scans/a.zarr", "s3://scans", False),
        ("https://host/data/%2e%2e/secret", "https://host/data", False),
        ("https://host/data/a.zarr", "https://host/data", True),
        ("https://host:8080/data/a.zarr", "https://host/data", False),
        ("local:///data/a.zarr", "/data", False),
    ],
)
def test_roots(place: str, allowed: str, fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOLSEG_ALLOWED_OUTPUTS", allowed)
    if fine:
        check_allowed({}, {"output": place})
    else:
        with pytest.raises(InputError, match="is outside of what the operator"):
            check_allowed({}, {"output": place})


def test_what_lies_beside_an_output_counts(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger and the checkpoints have names of their own, which lie outside where the output is the root itself."""
    monkeypatch.setenv("VOLSEG_ALLOWED_OUTPUTS", str(tmp_path / "seg"))
    with pytest.raises(InputError, match=r"ledger .*seg\.volseg is outside"):
        segment(case, tmp_path / "seg")
    spec = TrainSpec.read({"image": case.image, "labels": case.image, "out": str(tmp_path / "seg")})
    with pytest.raises(InputError, match=r"checkpoints .*seg\.training is outside"):
        api.run_train(spec)
    assert not list(tmp_path.iterdir())


def test_a_pattern_is_not_even_listed(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "private" / "a.zarr").mkdir(parents=True)
    monkeypatch.setenv("VOLSEG_ALLOWED_INPUTS", f"{tmp_path / 'scans'},{case.bundle}")
    spec = BatchSpec.read({"input": f"{tmp_path}/private/*.zarr", "output": str(tmp_path / "o"), "model": case.bundle})
    with pytest.raises(InputError, match=r"input .*private is outside"):
        batch.list_volumes(spec)


# ---------------------------------------------------------------- errors of others


def test_an_error_of_a_library(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It repeats a request: nothing of it is in report, ledger and lines."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)

    def fail(self: BlockProcessor, task: Task) -> None:
        raise RuntimeError(f"sent {{'Authorization': 'Bearer canary-bearer-token'}} with {SECRET}")

    monkeypatch.setattr(BlockProcessor, "_read", fail)
    output, lines = tmp_path / "out.zarr", list[str]()
    report = api.run_segment(
        SegmentSpec.read({
            "input": case.image, "output": str(output), "model": case.bundle, "executor": "serial", "attempts": 2,
            "roi": "0:16,0:16,0:16",
        }),
        trace=lambda line: lines.append(line.as_json(0)),
    )  # fmt: skip
    assert (
        report["failed_blocks"][0]["error"]
        == f"RuntimeError: sent {{'Authorization': 'Bearer {HIDDEN}'}} with {HIDDEN}"
    )
    ledger = {path: path.read_text() for path in Path(f"{output}.volseg").rglob("*") if path.is_file()}
    assert len([path for path in ledger if path.parent.name == "failures"]) == 2
    assert "canary" not in "".join([json.dumps(report), *lines, *ledger.values()])


def test_an_error_of_a_worker() -> None:
    with (
        pytest.raises(
            RuntimeError, match=r"ValueError in a worker:\nTraceback (.|\n)*ValueError: password=\*\*\*$"
        ) as raised,
        clean_errors(),
    ):
        raise ValueError("password=canary")
    assert raised.value.__cause__ is None
    assert raised.value.__suppress_context__
    with pytest.raises(InputError, match="as it is"), clean_errors():
        raise InputError("as it is")


@pytest.mark.parametrize("debug", [False, True])
def test_an_error_that_nobody_foresaw(
    debug: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VOLSEG_DEBUG", "1") if debug else monkeypatch.delenv("VOLSEG_DEBUG", raising=False)

    def fail(_: object) -> commands.Result:
        raise ZeroDivisionError("token=canary-of-a-bug")

    monkeypatch.setattr(commands, "run_info", fail)
    assert main(["info", "x", "--json"]) == 4
    out, err = capsys.readouterr()
    assert f"unexpected ZeroDivisionError: token={HIDDEN}" in json.loads(out)["error"]
    assert ("Traceback" in err) is debug
    assert "canary" not in out + err


def test_credentials_of_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in no variable: the client that found them tells what must not be read."""
    from volseg.storage import s3
    from volseg.storage.s3_errors import Action

    (tmp_path / "credentials").write_text(
        "[lab]\naws_access_key_id = canary-profile-key\naws_secret_access_key = canary/of+a/profile\n"
    )
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (("SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials")), ("PROFILE", "lab")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setattr(redaction, "_learnt", set())
    fs = s3.filesystem()

    async def fail(_: object) -> bytes:
        raise RuntimeError("canary/of+a/profile")

    async def part(path: str, wanted: str) -> Any:
        return await fs._tried(Action("get_object", "b", "k"), fail)

    monkeypatch.setattr(fs, "_part", part)
    with pytest.raises(RuntimeError) as raised:
        files.read_bytes("s3://b/k")
    assert redact(str(raised.value)) == HIDDEN
    assert redact("canary-profile-key") == HIDDEN
