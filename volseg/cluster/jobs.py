"""Ray's Jobs API over plain HTTP: who submits and asks needs no Ray of its own, and waits no longer than it wants.

A token is sent only to a cluster that asks for one, never over a redirect, and appears in no message.
"""

from __future__ import annotations

import ipaddress
import json
import os
import threading
import time
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, OpenerDirector, ProxyHandler, Request, build_opener

from volseg.errors import InputError, JobError
from volseg.redaction import learn, redact

Json = dict[str, Any]

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TOKEN = "RAY_AUTH_TOKEN"
TOKEN_PATH = "RAY_AUTH_TOKEN_PATH"
_OWN_TOKEN = "~/.ray/auth_token"
_TRIES = 4
_BACKOFF_SECONDS = 0.3
_MOST_BYTES = 256 << 20
ENDED = frozenset({"STOPPED", "SUCCEEDED", "FAILED"})


class ClusterError(JobError):
    """The cluster answered with an error, or not at all."""


class UnreachableError(ClusterError):
    """Nothing answers at the cluster's address."""


class AccessError(InputError):
    """The cluster wants a token and there is none, or it refused the one there is."""


class UnprotectedError(InputError):
    """The cluster lets everybody in, from other machines, too."""


@dataclass(frozen=True)
class RayJob:
    """What Ray says of a job; times in seconds since 1970."""

    id: str
    status: str
    message: str = ""
    started: float | None = None
    ended: float | None = None
    exit_code: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def over(self) -> bool:
        """Tell whether Ray calls the job ended."""
        return self.status in ENDED


@dataclass(frozen=True)
class Submission:
    """A job for Ray: its id, the driver's command line, and what the driver needs of the cluster."""

    id: str
    entrypoint: str
    metadata: dict[str, str]
    driver_cpus: float = 0.0
    runtime_env: Json = field(default_factory=dict)


@dataclass(frozen=True)
class _Access:
    """How a cluster is entered: with a token, or by anybody."""

    token: str | None = field(repr=False)

    @property
    def protected(self) -> bool:
        """Tell whether a token is asked for."""
        return self.token is not None


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow nothing: the token would travel along."""


def is_loopback(address: str) -> bool:
    """Tell whether an address names this machine itself, by number or as localhost."""
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def find_token() -> str | None:
    """Return the token from the environment or from a file, None where there is none; raises AccessError."""
    token = os.environ.get(TOKEN, "").strip() or _token_of_file()
    learn(token)
    return token


def _token_of_file() -> str | None:
    given = os.environ.get(TOKEN_PATH)
    path = Path(given or _OWN_TOKEN).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError as error:
        if given is None:
            return None
        raise AccessError(
            f"the token file {path} ({TOKEN_PATH}) cannot be read ({error.strerror}): correct the path or its mode"
        ) from None


class JobsApi:
    """Jobs of the cluster at ``http://host:port``; a request ends after `timeout` seconds."""

    def __init__(self, address: str, *, timeout: float = 30.0) -> None:
        self.address = _address(address)
        self._timeout = timeout
        # A proxy could not reach what only this machine sees.
        handlers = [_NoRedirect(), *[ProxyHandler({})] * is_loopback(self.address)]
        self._opener: OpenerDirector = build_opener(*handlers)
        self._asking = threading.Lock()
        self._access: _Access | None = None

    @property
    def protected(self) -> bool:
        """Tell whether the cluster lets in nobody without a token; raises UnreachableError."""
        return self._enter().protected

    def _enter(self) -> _Access:
        """Return how the cluster is entered; of several threads the first one asks, and the others wait."""
        with self._asking:
            if self._access is None:
                status, _ = self._exchange("GET", "/api/jobs/volseg-asks-who-may-enter", None, token=None)
                token = find_token() if status in {401, 403} else None
                if status in {401, 403} and token is None:
                    raise AccessError(
                        f"the cluster at {self.address} wants a token; nothing was done: put it into {TOKEN}, or the "
                        f"path of its file into {TOKEN_PATH}"
                    )
                self._access = _Access(token)
            return self._access

    def refuse_unprotected(self, *, insecure: bool) -> None:
        """Raise UnprotectedError where everybody in the network could run code on the cluster, unless `insecure`."""
        if not self.protected and not insecure and not is_loopback(self.address):
            raise UnprotectedError(
                f"the cluster at {self.address} asks for no token, so whoever reaches it can run code there and change "
                "this job; nothing was submitted: start it with RAY_AUTH_MODE=token, or allow it with --insecure"
            )

    def submit(self, submission: Submission) -> bool:
        """Hand in a job; False where one of this id is there already. Sent once, never again."""
        body = {
            "submission_id": submission.id, "entrypoint": submission.entrypoint, "metadata": submission.metadata,
            "entrypoint_num_cpus": submission.driver_cpus, "runtime_env": submission.runtime_env,
        }  # fmt: skip
        try:
            status, text = self._request("POST", "/api/jobs/", body)
        except UnreachableError:
            # The answer may be what was lost, and not the request.
            if self.info(submission.id) is not None:
                return True
            raise
        if status != 200 and "already exists" in text:
            return False
        self._expect(status, text)
        return True

    def info(self, job: str) -> RayJob | None:
        """Return what Ray says of a job, None where it knows none of this name."""
        status, text = self._read(f"/api/jobs/{quote(job, safe='')}")
        return None if status == 404 else _ray_job(self._expect(status, text))

    def jobs(self) -> list[RayJob]:
        """Return all jobs that were submitted under a name."""
        found = self._expect(*self._read("/api/jobs/"))
        return [_ray_job(entry) for entry in found if entry.get("submission_id")]

    def logs(self, job: str) -> str:
        """Return what the driver of a job has printed so far; raises ClusterError."""
        return str(self._expect(*self._read(f"/api/jobs/{quote(job, safe='')}/logs"))["logs"] or "")

    def stop(self, job: str) -> None:
        """Ask a job to stop; one that has ended does not mind."""
        # Asked twice, a job stops as it does asked once.
        self._expect(*self._read(f"/api/jobs/{quote(job, safe='')}/stop", "POST"))

    def close(self) -> None:
        """Leave; jobs go on."""

    def _read(self, path: str, method: str = "GET") -> tuple[int, str]:
        """Send what does no harm twice, again where the cluster is out of reach or overwhelmed for a moment."""
        for pause in [_BACKOFF_SECONDS * 2**n for n in range(_TRIES - 1)]:
            try:
                status, text = self._request(method, path, None)
                if status not in {429, 502, 503, 504}:
                    return status, text
            except UnreachableError:
                pass
            time.sleep(pause)
        return self._request(method, path, None)

    def _request(self, method: str, path: str, body: Json | None) -> tuple[int, str]:
        status, text = self._exchange(method, path, body, token=self._enter().token)
        if status in {401, 403}:
            raise AccessError(
                f"the cluster at {self.address} refused the token ({status}); nothing was done: {TOKEN} or the file of "
                f"{TOKEN_PATH} must hold the cluster's own"
            )
        return status, text

    def _exchange(self, method: str, path: str, body: Json | None, *, token: str | None) -> tuple[int, str]:
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        if token is not None:
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        try:
            with self._opener.open(request, timeout=self._timeout) as answer:
                return answer.status, answer.read(_MOST_BYTES).decode(errors="replace")
        except HTTPError as error:
            with error:
                return error.code, error.read(_MOST_BYTES).decode(errors="replace")
        except (URLError, OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise UnreachableError(
                f"no Ray cluster answers at {self.address} ({reason}): check the address, and whether its head runs"
            ) from None

    def _expect(self, status: int, text: str) -> Any:
        """Return an answer's content; raises ClusterError where it is an error."""
        try:
            content = json.loads(text)
        except ValueError:
            content = None
        if status != 200 or content is None:
            lines = [line for line in text.splitlines() if line.strip()]
            reason = lines[-1].strip()[:300] if lines else "no reason was given"
            raise ClusterError(f"the cluster at {self.address} answered {status}: {reason}")
        return content


def default_address() -> str:
    """Return the address of the cluster that the environment names, else of one on this machine."""
    return os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS


def _address(given: str) -> str:
    address = given.rstrip("/")
    parts = urlsplit(address)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username or parts.path:
        raise InputError(
            f"address {_without_login(address)!r} is no address of a cluster's Jobs API; nothing was done: write it as "
            "http://head:8265"
        )
    return address


def _without_login(address: str) -> str:
    return address.rpartition("@")[2]


def _ray_job(entry: Json) -> RayJob:
    return RayJob(
        id=entry["submission_id"] or "", status=entry["status"], message=redact(entry.get("message") or ""),
        started=_seconds(entry.get("start_time")), ended=_seconds(entry.get("end_time")),
        exit_code=entry.get("driver_exit_code"), metadata=entry.get("metadata") or {},
    )  # fmt: skip


def _seconds(milliseconds: float | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None
