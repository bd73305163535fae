"""Credentials are taken out of text, whoever wrote it; places and names of variables stay."""

import base64
import os
import string
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from volseg import redaction
from volseg.errors import InputError, JobPartial
from volseg.redaction import HIDDEN, holds_credential, learn, names_credential, redact

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYcanary"


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: AWS4-HMAC-SHA256 Credential={}/20260101/eu/s3/aws4_request, SignedHeaders=host, Signature={}",
        "Authorization: Bearer {}",
        "{{'Authorization': 'Bearer {}', 'Host': 'head:8265'}}",
        "<CIMultiDict('authorization': b'Basic {}')>",
        "[('X-Amz-Security-Token', '{}'), ('Host', 'h')]",
        "x-amz-security-token: {}",
        "Bearer {}",
        '"secretAccessKey": "{}"',
        '"SessionToken":"{}"',
        "aws_secret_access_key = {}",
        "RAY_AUTH_TOKEN={} python",
        "<AWSAccessKeyId>{}</AWSAccessKeyId>",
        "https://bucket.s3.amazonaws.com/a?X-Amz-Credential={}&X-Amz-Signature={}&a=b",
        "password: {}",
        "client_secret={}",
        "-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END RSA PRIVATE KEY-----",
        "sent eyJhbGciOiJIUzI1NiJ9.canaryPayload0.canary-signature",
    ],
)
def test_credentials_by_their_look(text: str) -> None:
    assert "canary" not in redact(text.format(SECRET, SECRET))
    assert HIDDEN in redact(text.format(SECRET, SECRET))


@pytest.mark.parametrize(
    "uri",
    [
        f"s3://AKIDEXAMPLE:{SECRET}@bucket/a.zarr",
        f"s3://AKIDEXAMPLE:{quote(SECRET, safe='')}@bucket/a.zarr",
        f"https://{quote(SECRET, safe='')}@host/a.zarr",
        f"simplecache::s3://k:{quote(SECRET, safe='')}@bucket/a",
    ],
)
def test_logins_in_addresses(uri: str) -> None:
    assert holds_credential(uri)
    shown = redact(f"{uri} cannot be read")
    assert "canary" not in shown
    assert "AKIDEXAMPLE" not in shown
    assert shown.endswith(" cannot be read")


@pytest.mark.parametrize(
    "text",
    [
        "put it into RAY_AUTH_TOKEN, or the path of its file into RAY_AUTH_TOKEN_PATH",
        "start it with RAY_AUTH_MODE=token, or allow it with --insecure",
        "the cluster at http://head:8265 refused the token (401); nothing was done",
        "check AWS_SECRET_ACCESS_KEY, then run it again",
        "access is denied (403 SignatureDoesNotMatch)",
        "job_key=5b7b8e0a key=value",
        "s3://bucket/a@b/c and http://head:8265/path@x and /data/tokens/1",
        "git@github.com and --set key=value",
        "block 3 at 0:16,0:16,0:16: chunk c/0/0/0 is damaged",
    ],
)
def test_other_words_stay(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "uri", ["s3://b/a@b", "https://h:80/x?a=1", "s3://b/2026-?/x", "/data/a?token=1", "memory://a"]
)
def test_places_without_credentials(uri: str) -> None:
    assert not holds_credential(uri)


@pytest.mark.parametrize("uri", ["https://h/x?sig=1", "s3://b/x?X-Amz-Signature=1", "https://h/x?a=1&token=2"])
def test_signatures_in_addresses(uri: str) -> None:
    assert holds_credential(uri)


@given(
    name=st.sampled_from(["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "VOLSEG_WEBHOOK_SECRET"]),
    value=st.text(string.ascii_letters + string.digits + "/+=_-", min_size=redaction.SHORTEST, max_size=60),
    before=st.text(max_size=20),
    after=st.text(max_size=20),
)
def test_what_this_process_was_given(name: str, value: str, before: str, after: str) -> None:
    """Whatever stands around it, and also as an address would hold it."""
    assume(value not in HIDDEN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, value)
        assert value not in redact(before + value + after)
        assert quote(value, safe="") not in redact(before + quote(value, safe="") + after)


def test_files_of_tokens_and_what_was_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("token-of-a-file-0123\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert redact("token-of-a-file-0123!") == f"{HIDDEN}!"
    assert redact(f"{tmp_path}/token (RAY_AUTH_TOKEN_PATH) is not there") == (
        f"{tmp_path}/token (RAY_AUTH_TOKEN_PATH) is not there"
    )
    monkeypatch.setattr(redaction, "_learnt", set())
    learn("learnt-from-a-profile", None, "short")
    assert redact("learnt-from-a-profile, short") == f"{HIDDEN}, short"


def test_ends_of_variables_that_name_places() -> None:
    assert names_credential("AWS_SECRET_ACCESS_KEY")
    assert names_credential("MY_PASSWORD")
    for name in ("AWS_WEB_IDENTITY_TOKEN_FILE", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "PWD", "HOME", "VOLSEG_JOB"):
        assert not names_credential(name)


def test_errors_hold_none() -> None:
    error = InputError(f"s3://key:{quote(SECRET, safe='')}@bucket/x is no place")
    assert str(error) == f"s3://{HIDDEN}@bucket/x is no place"
    assert str(JobPartial(f"token={SECRET}", {"a": 1})) == f"token={HIDDEN}"


def test_a_whole_dump_of_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a client could say of a request, in whatever form: nothing of it is left."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDCANARY0123456789")
    token = base64.b64encode(b"canary-session-token-0123456789").decode()
    text = "\n".join(
        [
            f"GET https://AKIDCANARY0123456789:{quote(SECRET, safe='')}@host/?X-Amz-Security-Token={quote(token)}",
            "headers=<CIMultiDict('Host': 'h', 'Authorization': 'AWS4-HMAC-SHA256 Credential=AKIDCANARY0123456789/x')>",
            f"{os.environ['AWS_SECRET_ACCESS_KEY']!r} {{'token': {token!r}}}",
        ]
    )
    shown = redact(text)
    assert SECRET not in shown
    assert "AKIDCANARY" not in shown
    assert token not in shown
    assert "host" in shown
