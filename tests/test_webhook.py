"""A signed message when a job has ended: from its driver, to places that the operator allows, never a job's error."""

from __future__ import annotations

import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest

from tests.http_server import Server
from tests.support import Case, segment, wait_until
from volseg.client import Client, check_signature
from volseg.cluster import batch
from volseg.cluster.submission import entrypoint, identify
from volseg.errors import InputError, JobError, JobInterrupted, JobPartial, StorageFullError
from volseg.execution import webhook
from volseg.execution.webhook import SIGNATURE, TIMESTAMP, TRIES, Webhook, telling
from volseg.spec import SegmentSpec
from volseg.spec.batch import BatchSpec

SECRET = "canary-secret-0f3a"


@pytest.fixture(autouse=True)
def _operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "_PAUSE_SECONDS", 0.001)
    monkeypatch.setenv("VOLSEG_ALLOWED_WEBHOOKS", "http://127.0.0.1/none, https://lab.example/hooks")
    monkeypatch.setenv("VOLSEG_WEBHOOK_SECRET", SECRET)
    monkeypatch.delenv("VOLSEG_WEBHOOK_SECRET_PATH", raising=False)


def receiver(monkeypatch: pytest.MonkeyPatch, *statuses: int) -> Server:
    """Return a server that is allowed and gives these answers, the last one for ever."""
    answers = list(statuses)
    server = Server(lambda *_: (answers.pop(0) if len(answers) > 1 else answers[0], ""))
    monkeypatch.setenv("VOLSEG_ALLOWED_WEBHOOKS", server.address)
    return server


@pytest.mark.parametrize(
    ("url", "fine"),
    [
        ("https://lab.example/hooks", True), ("https://lab.example/hooks/a?b=c", True),
        ("https://lab.example/hooks-of-others", False), ("https://lab.example/", False),
        ("https://lab.example/hooks/../admin", False), ("https://lab.example/hooks/%2e%2e/admin", False),
        ("http://lab.example/hooks", False), ("https://lab.example:8443/hooks", False),
        ("https://lab.example.org/hooks", False), ("https://169.254.169.254/latest", False),
    ],
)  # fmt: skip
def test_places_that_the_operator_allows(url: str, fine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if fine:
        Webhook(url)
    else:
        with pytest.raises(
            InputError, match=r"outside of what the operator .*VOLSEG_ALLOWED_WEBHOOKS=.*nothing was don"
        ):
            Webhook(url)
    monkeypatch.delenv("VOLSEG_ALLOWED_WEBHOOKS")
    with pytest.raises(InputError, match="outside of what the operator"):
        Webhook(url)


@pytest.mark.parametrize(
    "url", ["done", "ftp://lab/x", "https://", "https://me:pass@lab/x", "https://lab:99999/x", "https://lab/x#y"]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(InputError, match="is no URL for messages; nothing was done: write it as") as raised:
        Webhook(url)
    assert "pass@" not in str(raised.value)


def test_the_secret_is_the_machines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VOLSEG_WEBHOOK_SECRET")
    with pytest.raises(InputError, match="a webhook needs a secret to sign with, and this machine has none"):
        Webhook("https://lab.example/hooks")
    monkeypatch.setenv("VOLSEG_WEBHOOK_SECRET_PATH", str(tmp_path / "secret"))
    with pytest.raises(InputError, match=r"secret \(VOLSEG_WEBHOOK_SECRET_PATH\) cannot be read"):
        Webhook("https://lab.example/hooks")
    (tmp_path / "secret").write_text("\n")
    with pytest.raises(InputError, match="this machine has none"):
        Webhook("https://lab.example/hooks")
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    with receiver(monkeypatch, 200) as server:
        Webhook(server.address).send({})
        assert check_signature(SECRET.encode(), server.headers, server.body)


def test_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver(monkeypatch, 200) as server:
        Webhook(f"{server.address}/done").send({"state": "complete", "done": 3})
        assert json.loads(server.body) == {"state": "complete", "done": 3}
        signed = f"{server.headers[TIMESTAMP]}.".encode() + server.body
        assert server.headers[SIGNATURE] == "sha256=" + hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()
        assert check_signature(SECRET.encode(), server.headers, server.body)
        assert not check_signature(SECRET.encode(), server.headers, server.body + b" ")
        assert not check_signature(b"other", server.headers, server.body)
        assert not check_signature(SECRET.encode(), {**server.headers, TIMESTAMP: "1000"}, server.body)


@pytest.mark.parametrize(
    ("answers", "hasty", "seen", "says"),
    [
        ((500, 0, 429, 204), False, 4, ""), ((503,), False, TRIES, "it answered 503"), ((404,), False, 1, "red 404"),
        ((0,), False, TRIES, "closed connection"), ((503, 200), True, 1, "it answered 503"), ((200,), True, 1, ""),
    ],
)  # fmt: skip
def test_how_often_it_is_tried(
    monkeypatch: pytest.MonkeyPatch, answers: tuple[int, ...], hasty: bool, seen: int, says: str
) -> None:
    with receiver(monkeypatch, *answers) as server:
        if says:
            with pytest.raises(
                JobError, match=rf"127.0.0.1 did not take the message .*{says}.*; the job itself is not"
            ):
                Webhook(server.address).send({}, hasty=hasty)
        else:
            Webhook(server.address).send({}, hasty=hasty)
        assert len(server.seen) == seen


def test_no_redirect_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(lambda *_: (200, "")) as thief, Server(lambda *_: (302, f"{thief.address}/x")) as server:
        monkeypatch.setenv("VOLSEG_ALLOWED_WEBHOOKS", server.address)
        with pytest.raises(JobError, match="it answered 302"):
            Webhook(server.address).send({})
        assert (len(server.seen), thief.seen) == (1, [])


# ---------------------------------------------------------------- how a job ended


@pytest.mark.parametrize(
    ("ending", "told"),
    [
        (
            {"status": "complete", "blocks": {"total": 1}, "secrets": "no"},
            {"state": "complete", "blocks": {"total": 1}},
        ),
        ({"status": "partial", "blocks": {}, "job_key": "k"}, {"state": "partial", "blocks": {}, "job_key": "k"}),
        (StorageFullError("no space"), {"state": "failed", "error": "no space", "exit_code": 4}),
        (JobPartial("two blocks"), {"state": "partial", "error": "two blocks", "exit_code": 3}),
        (JobInterrupted("stopped"), {"state": "stopped"}),
        (KeyboardInterrupt(), {"state": "stopped"}),
    ],
    ids=["complete", "partial", "failed", "raised partial", "cancelled", "interrupted"],
)
def test_every_ending_is_told(monkeypatch: pytest.MonkeyPatch, ending: Any, told: dict[str, Any]) -> None:
    monkeypatch.setenv("VOLSEG_SUBMISSION", "volseg-1")

    def run() -> dict[str, Any]:
        if isinstance(ending, BaseException):
            raise ending
        return dict(ending)

    with receiver(monkeypatch, 200) as server:
        if isinstance(ending, BaseException):
            with pytest.raises(type(ending)):
                telling(server.address, {"output": "/o"}, pytest.fail, run)
        else:
            assert telling(server.address, {"output": "/o"}, pytest.fail, run) == {**ending, "webhook": "told"}
        assert json.loads(server.body) == {"output": "/o", "job": "volseg-1", **told}


def test_that_nobody_took_it_is_said_and_no_error(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    with receiver(monkeypatch, 500) as server:
        answer = telling(server.address, {}, notes.append, lambda: {"status": "complete"})
        assert answer == {"status": "complete", "webhook": notes[0]}
        assert "did not take the message (it answered 500)" in notes[0]
        report = segment(case, tmp_path / "out.zarr", roi="0:16,0:16,0:16", webhook=server.address)
    assert report["status"] == "complete"
    assert "did not take" in report["webhook"]


def test_a_place_that_is_not_allowed_stops_the_job_before_it_begins(case: Case, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="outside of what the operator"):
        segment(case, tmp_path / "out.zarr", webhook="https://elsewhere.example/x")
    assert not list(tmp_path.iterdir())


def test_a_batch_tells_once(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver(monkeypatch, 200) as server:
        spec = BatchSpec.read({
            "volumes": {case.image: str(tmp_path / "a.zarr"), str(tmp_path / "no.zarr"): str(tmp_path / "b.zarr")},
            "model": case.bundle, "roi": "0:16,0:16,0:16", "executor": "serial", "webhook": server.address,
        })  # fmt: skip
        batch.run_batch(spec, lambda *_: None, lambda _: None)
        assert len(server.seen) == 1
        message = json.loads(server.body)
    assert message == {"kind": "batch", "output": "", "job": "", "state": "partial", "complete": 1, "failed": 1}


@pytest.mark.slow
def test_the_driver_tells(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client submits and asks nothing more; the secret is nowhere but in the environment."""
    output = tmp_path / "out.zarr"
    spec = SegmentSpec(input=case.image, output=str(output), model=case.bundle, roi="0:16,:,:", workers=1)
    with receiver(monkeypatch, 200) as server, Client(None) as client:
        job = client.submit(spec, webhook=f"{server.address}/done")
        wait_until(lambda: server.seen)
        assert check_signature(SECRET.encode(), server.headers, server.body)
        message = json.loads(server.body)
        assert (message["kind"], message["state"], message["job"]) == ("segmentation", "complete", job.id)
        assert (message["output"], message["job_key"]) == (str(output), job.job_key)
        result = job.result(60)
        written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        task = identify(spec.model_copy(update={"webhook": server.address}))
        everything = f"{job.logs()} {result} {entrypoint(task, job.id)} {task.metadata}".encode() + written
        assert server.address.encode() in everything
        assert SECRET.encode() not in everything
        with pytest.raises(InputError, match="'done' is no URL"):
            client.submit(spec, webhook="done")
