"""What is wrong with S3 is found out before any work and said in one line: what, the rule, what follows, what to do."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.flaky_proxy import Canned, FlakyProxy, Request, proxy
from tests.s3_servers import REGION, Server, new_user
from volseg.errors import InputError, JobError, PlaceError, StorageDeniedError, StorageFullError
from volseg.geometry import Box
from volseg.storage import files, s3
from volseg.storage.importer import import_volume
from volseg.storage.places import check_apart, check_places
from volseg.storage.s3_requests import ATTEMPTS
from volseg.storage.volume import open_volume

pytest_plugins = ("tests.s3_fixtures",)
pytestmark = pytest.mark.usefixtures("short_pauses")

CANARY = "canary-b7e23ec29af22b0b"


def problem(reads: Sequence[str] = (), writes: Sequence[str] = ()) -> str:
    """Return the line that says what is wrong with places."""
    with pytest.raises(PlaceError) as caught:
        check_places(reads, writes)
    line = str(caught.value)
    assert "\n" not in line
    assert "nothing was done" in line
    assert CANARY not in line
    return line


def test_good_places_are_left_as_they_were(server: Server, bucket: str) -> None:
    files.write_bytes(files.join(bucket, "in/zarr.json"), b"{}")
    check_places([f"{bucket}/in", f"{bucket}/model"], [f"{bucket}/out.zarr/"])
    content = server.client().list_objects_v2(Bucket=bucket.removeprefix("s3://"))["Contents"]
    assert [entry["Key"] for entry in content] == ["in/zarr.json"]
    assert not files.exists(f"{bucket}/out.zarr")


def test_other_places_are_not_asked(tmp_path: Path) -> None:
    check_places([str(tmp_path / "none"), "memory://a"], [str(tmp_path), "memory://b"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"AWS_ACCESS_KEY_ID": CANARY},
            "does not know the access key (403 InvalidAccessKeyId); stopped: check AWS_ACC",
        ),
        ({"AWS_SECRET_ACCESS_KEY": CANARY}, "the secret key does not fit the access key (403 SignatureDoesNotMatch)"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no AWS credentials were found; stopped: set AWS"),
        (
            {"AWS_SECRET_ACCESS_KEY": None},
            "the AWS credentials are incomplete; stopped: set AWS_ACCESS_KEY_ID and AWS_",
        ),
        (
            {"AWS_PROFILE": CANARY},
            "the AWS configuration gives no credentials (ProfileNotFound); stopped: check AWS_PRO",
        ),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            "http://127.0.0.1:9 cannot be reached (EndpointConnectionError, 6",
        ),
        ({"AWS_ENDPOINT_URL": f"http://user:{CANARY}@127.0.0.1:9"}, "no whole answer from http://127.0.0.1:9 (HTTPCl"),
        ({"AWS_ENDPOINT_URL": "localhost"}, "AWS_ENDPOINT_URL is no address; stopped: say http://HOST:PORT"),
    ],
    ids=[
        "access key",
        "secret",
        "no credentials",
        "half of them",
        "profile",
        "unreachable",
        "with a password",
        "no address",
    ],
)
def test_wrong_settings(
    server: Server, bucket: str, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str | None], says: str
) -> None:
    server.use(monkeypatch, **changes)
    for line in (problem([f"{bucket}/in"]), problem(writes=[f"{bucket}/out"])):
        assert says in line
        assert line.startswith(f"{bucket}/")


NOBODY: dict[str, str | None] = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}


def test_public_buckets_need_no_credentials(public: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "buckets" / "open").mkdir()
    np.save(tmp_path / "a.npy", np.arange(512, dtype=np.uint8).reshape(8, 8, 8))
    import_volume(str(tmp_path / "a.npy"), str(tmp_path / "buckets" / "open" / "a.zarr"))
    with proxy(public.endpoint) as seen:
        here = public.behind(seen.endpoint)
        here.use(monkeypatch, **NOBODY)
        assert "or AWS_NO_SIGN_REQUEST=yes for public buckets" in problem(["s3://open/a.zarr"])
        assert seen.seen == []
        here.use(monkeypatch, **NOBODY, AWS_NO_SIGN_REQUEST="yes")
        check_places(["s3://open/a.zarr"])
        values = open_volume("s3://open/a.zarr").read(Box.of((8, 8, 8)))
        assert values.sum() == 2 * np.arange(256).sum()
        assert seen.seen
        assert not any(request.signed for request in seen.seen)


def test_a_bucket_that_is_not_public(flaky: FlakyProxy, moto: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    moto.behind(flaky.endpoint).use(monkeypatch, **NOBODY, AWS_NO_SIGN_REQUEST="YES")
    flaky.rule = lambda _: Canned(403, "AccessDenied")
    with pytest.raises(StorageDeniedError, match="to everybody, or unset AWS_NO_SIGN_REQUEST to sign with credentials"):
        files.read_bytes("s3://bucket/a")
    moto.use(monkeypatch, AWS_NO_SIGN_REQUEST="maybe")
    with pytest.raises(InputError, match="AWS_NO_SIGN_REQUEST is 'maybe': yes reads public buckets"):
        files.read_bytes("s3://bucket/a")


def test_a_missing_bucket(server: Server) -> None:
    line = problem(writes=["s3://volseg-no-such-bucket/out"])
    assert f"there is no bucket 'volseg-no-such-bucket' at {server.endpoint} (404 NoSuchBucket)" in line
    assert "stopped: create it, or check its name and AWS_ENDPOINT_URL" in line


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/"])
def test_a_bucket_alone_is_no_place(uri: str) -> None:
    assert "names a bucket" in problem(writes=[uri])


REGIONS = [
    Canned(301, "PermanentRedirect", {"x-amz-bucket-region": "ap-south-1"}),
    Canned(400, "AuthorizationHeaderMalformed", more="<Region>ap-south-1</Region>"),
]


@pytest.mark.parametrize("answer", REGIONS, ids=lambda answer: answer.code)
def test_another_region(flaky: FlakyProxy, answer: Canned) -> None:
    flaky.rule = lambda _: answer
    line = problem(["s3://bucket-elsewhere/in"])
    assert f"bucket 'bucket-elsewhere' lies in region ap-south-1, requests go to {REGION} ({answer.status} " in line
    assert "stopped: set AWS_DEFAULT_REGION=ap-south-1, then run it again" in line
    assert len(flaky.seen) <= ATTEMPTS


def test_another_region_of_amazon(flaky: FlakyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Amazon's own client follows a bucket to its region, at two requests each: that is said, too."""
    answer = {"ResponseMetadata": {"HTTPHeaders": {"x-amz-bucket-region": "ap-south-1"}}}
    real = s3.filesystem()
    meta = SimpleNamespace(endpoint_url="https://s3.eu-west-1.amazonaws.com", region_name="eu-west-1")
    monkeypatch.setattr(real, "call", lambda *_, **__: answer)
    monkeypatch.setattr(real, "_s3", SimpleNamespace(meta=meta))
    monkeypatch.setattr(files, "size", lambda _: None)
    assert "lies in region ap-south-1, requests go to eu-west-1" in problem(["s3://bucket/in"])
    meta.endpoint_url = "https://minio.lab"
    check_places(["s3://bucket/in"])


def test_what_is_missing_must_not_be_forbidden(flaky: FlakyProxy, moto: Server) -> None:
    """What Amazon answers a user without s3:ListBucket."""
    uri = f"s3://{moto.new_bucket()}/in"
    flaky.rule = lambda request: Canned(403, "AccessDenied") if ".volseg-absent-" in request.target else None
    line = problem([uri])
    assert "is absent, but S3 answers that access is denied: what is missing" in line
    assert f"grant s3:ListBucket on {uri.removesuffix('/in')} and s3:GetObject on {uri}/*" in line


@pytest.mark.parametrize(
    ("allowed", "says"),
    [
        (
            ["s3:GetObject", "s3:ListBucket"],
            "cannot be written: access is denied (403 AccessDenied); stopped: grant s3:PutO",
        ),
        (["s3:GetObject", "s3:ListBucket", "s3:PutObject"], "stopped: grant s3:DeleteObject"),
        (["s3:GetObject", "s3:PutObject"], "stopped: grant s3:ListBucket"),
    ],
    ids=["only reads", "cannot remove", "cannot list"],
)
def test_missing_permissions(
    moto: Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, allowed: list[str], says: str
) -> None:
    bucket = moto.new_bucket()
    key, secret = new_user(
        moto, request.node.name, {"Effect": "Allow", "Action": allowed, "Resource": "arn:aws:s3:::*"}
    )
    moto.use(monkeypatch, AWS_ACCESS_KEY_ID=key, AWS_SECRET_ACCESS_KEY=secret)
    assert says in problem([f"s3://{bucket}/in"], [f"s3://{bucket}/out"])


FULL = [
    Canned(507, "InsufficientStorage"), Canned(403, "QuotaExceeded"), Canned(507, "XMinioStorageFull"),
    Canned(400, "XMinioAdminBucketQuotaExceeded"),
]  # fmt: skip


@pytest.mark.parametrize("answer", FULL, ids=lambda answer: answer.code)
def test_no_space(flaky: FlakyProxy, moto: Server, answer: Canned) -> None:
    uri = f"s3://{moto.new_bucket()}/out"
    flaky.rule = lambda request: answer if request.method == "PUT" else None
    with pytest.raises(
        StorageFullError, match=rf"no space left while writing {uri}/a \({answer.status} {answer.code} "
    ):
        files.write_bytes(f"{uri}/a", b"x")
    assert len(flaky.seen) == 1, "a full disk is not asked again"
    assert "the job stopped: free space or raise the quota" in problem(writes=[uri])


# ---------------------------------------------------------------- credentials that expire

EXPIRED = Canned(400, "ExpiredToken")


def test_expired_credentials_stop_the_job(flaky: FlakyProxy, moto: Server) -> None:
    uri = f"s3://{moto.new_bucket()}/out"
    flaky.rule = lambda _: EXPIRED
    for ask in (files.read_bytes, files.size, files.list_names, lambda place: files.write_bytes(place, b"x")):
        flaky.seen.clear()
        with pytest.raises(StorageDeniedError, match=r"the credentials have expired .*; stopped: renew them") as caught:
            ask(f"{uri}/a")
        assert isinstance(caught.value, JobError)
        assert len(flaky.seen) == 2, "once more with what the environment and the config give now"
    assert "the credentials have expired" in problem([uri])


def test_renewed_credentials_are_used(
    flaky: FlakyProxy, moto: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As where a mounted secret is replaced while a job runs."""
    mounted = tmp_path / "credentials"
    text = "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n"
    mounted.write_text(text.format("old", "old"))
    moto.behind(flaky.endpoint).use(
        monkeypatch, AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None, AWS_SHARED_CREDENTIALS_FILE=str(mounted)
    )

    def rule(request: Request) -> Canned | None:
        if request.number > 1:
            return None
        mounted.write_text(text.format(moto.key, moto.secret))
        return EXPIRED

    flaky.rule = rule
    uri = f"s3://{moto.new_bucket()}/a"
    files.write_bytes(uri, b"x")
    assert len(flaky.seen) == 2
    assert files.read_bytes(uri) == b"x"


# ---------------------------------------------------------------- places that are one


@pytest.mark.parametrize(
    ("output", "place"),
    [
        ("s3://b/a", "s3://b/a"), ("s3://b/a/", "s3://b/a/0"), ("s3://b/a/seg", "s3://b/a"),
        ("s3://b/a", "s3://b/a.volseg/model"), ("/data/a", "file:///data/a/x"), ("/data/a/../b", "/data/b"),
    ],
)  # fmt: skip
def test_output_and_input_are_apart(output: str, place: str) -> None:
    with pytest.raises(InputError, match=r"output .* and model .* overlap: writing would destroy what is read"):
        check_apart(output, {"input": "s3://other/x", "model": place})


def test_neighbours_are_apart() -> None:
    check_apart("s3://b/a", {"input": "s3://b/ab", "model": "s3://c/a"})
    check_apart("/data/a", {"input": "/data/a.zarr", "model": "s3://data/a"})


# ---------------------------------------------------------------- the rest


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "volseg.storage.s3", None)
    monkeypatch.delattr("volseg.storage.s3")
    with pytest.raises(InputError, match=r"s3://b/a needs a package .* pip install 'volseg\[s3\]'"):
        files.read_bytes("s3://b/a")


def test_an_import_is_refused_before_it_reads(moto: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    moto.use(monkeypatch, AWS_SECRET_ACCESS_KEY=CANARY)
    with pytest.raises(PlaceError, match="the secret key does not fit"):
        import_volume(str(tmp_path / "none.npy"), "s3://bucket/a.zarr")


def test_an_import_that_fails_leaves_nothing(bucket: str, tmp_path: Path) -> None:
    labels = np.zeros((4, 8, 8), np.uint8)
    labels[3] = 7
    np.save(tmp_path / "a.npy", labels)
    with pytest.raises(InputError, match="holds label 7"):
        import_volume(
            str(tmp_path / "a.npy"), f"{bucket}/a.zarr", labels=True, class_names=["a", "b"],
            chunks=(2, 8, 8), shards=(2, 8, 8),
        )  # fmt: skip
    assert not files.exists(f"{bucket}/a.zarr")


def test_no_setting_is_ever_written(bucket: str, server: Server, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((4, 8, 8), np.uint8))
    told: Any = import_volume(str(tmp_path / "a.npy"), f"{bucket}/a.zarr")
    held = [files.read_bytes(f"{bucket}/a.zarr/{name}") for name in files.sizes_below(f"{bucket}/a.zarr")]
    for text in (json.dumps(told).encode(), *held):
        assert server.secret.encode() not in text
        assert server.endpoint.encode() not in text
