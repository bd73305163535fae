"""A signed message to a URL when a job has ended, sent by the job's driver: who submitted it may be long gone.

The operator of the driver's machine decides where messages may go and holds the secret: ``VOLSEG_ALLOWED_WEBHOOKS``
has URLs separated by commas, and a message goes to places below one of them; ``VOLSEG_WEBHOOK_SECRET``, or the file of
``VOLSEG_WEBHOOK_SECRET_PATH``, signs it. Neither is part of a spec. A driver that is killed tells nobody.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from volseg.errors import InputError, JobError, JobInterrupted, JobPartial, VolsegError
from volseg.execution.driver import SUBMISSION
from volseg.journal import Note
from volseg.redaction import holds_credential

ALLOWED = "VOLSEG_ALLOWED_WEBHOOKS"
SECRET = "VOLSEG_WEBHOOK_SECRET"
SECRET_PATH = "VOLSEG_WEBHOOK_SECRET_PATH"
SIGNATURE = "X-Volseg-Signature"
TIMESTAMP = "X-Volseg-Timestamp"
TRIES = 4
_SECONDS = 10.0
_PAUSE_SECONDS = 1.0
# Ray kills a driver three seconds after it asked it to stop.
_HASTY_SECONDS = 1.5
_PASSING = frozenset({408, 425, 429})


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow nothing: the message was signed for one place."""


def sign(secret: bytes, timestamp: str, body: bytes) -> str:
    """Return the signature of a message: HMAC-SHA256 over the timestamp, a dot and the body, in hexadecimal digits."""
    return "sha256=" + hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def check_signature(secret: bytes, headers: Mapping[str, str], body: bytes, *, oldest: float = 300.0) -> bool:
    """Tell whether a message was signed with `secret` not longer than `oldest` seconds ago; for the receiving side."""
    timestamp = headers.get(TIMESTAMP, "")
    if not timestamp.isdigit() or abs(time.time() - int(timestamp)) > oldest:
        return False
    return hmac.compare_digest(sign(secret, timestamp, body), headers.get(SIGNATURE, ""))


def check_url(url: str) -> None:
    """Raise InputError where `url` is no place for a webhook."""
    try:
        parts = urlsplit(url)
        wrong = parts.scheme not in {"http", "https"} or not parts.hostname or parts.port == 0
        wrong = wrong or bool(parts.username or parts.password or parts.fragment) or holds_credential(url)
    except ValueError:
        wrong = True
    if wrong:
        raise InputError(
            f"webhook {url.rpartition('@')[2]!r} is no URL for messages; nothing was done: write it as "
            "https://host/path, without user, password and token"
        )


class Webhook:
    """A URL that is told how a job ended.

    Raises InputError where the operator does not allow it, or there is no secret.
    """

    def __init__(self, url: str) -> None:
        check_url(url)
        self._url = url
        _check_allowed(url)
        self._secret = _secret()

    def send(self, message: Mapping[str, Any], *, hasty: bool = False) -> None:
        """Post a message as JSON; a receiver may get it twice. `hasty` tries once and not for long.

        Raises JobError where nobody takes it.
        """
        body = json.dumps(message, sort_keys=True).encode()
        for tried in range(1, 2 if hasty else TRIES + 1):
            fault = self._post(body, _HASTY_SECONDS if hasty else _SECONDS)
            if fault is None:
                return
            reason, passing = fault
            if not passing or hasty or tried == TRIES:
                break
            time.sleep(_PAUSE_SECONDS * 2 ** (tried - 1))
        raise JobError(
            f"the webhook at {urlsplit(self._url).hostname} did not take the message ({reason}); the job itself is not "
            "concerned"
        )

    def _post(self, body: bytes, seconds: float) -> tuple[str, bool] | None:
        """Send once; return what went wrong, and whether it may pass by itself."""
        timestamp = str(int(time.time()))
        headers = {
            "Content-Type": "application/json",
            TIMESTAMP: timestamp,
            SIGNATURE: sign(self._secret, timestamp, body),
        }
        try:
            build_opener(_NoRedirect()).open(Request(self._url, body, headers, method="POST"), timeout=seconds).close()
        except HTTPError as error:
            error.close()
            return f"it answered {error.code}", error.code >= 500 or error.code in _PASSING
        except (URLError, OSError) as error:
            return str(getattr(error, "reason", None) or error), True
        return None


def telling(url: str | None, about: Mapping[str, Any], note: Note, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `run` returns, and tell the webhook `url`, where there is one, how it ended.

    `about` is what every message says of the job. That nobody took the message is said by `note` and in the answer
    (`webhook`), and is no error of the job. Raises what `run` raises, and before it InputError where the webhook may
    not be used.
    """
    if url is None:
        return run()
    hook = Webhook(url)

    def tell(ending: Mapping[str, Any], *, hasty: bool = False) -> str:
        try:
            hook.send({**about, "job": os.environ.get(SUBMISSION, ""), **ending}, hasty=hasty)
        except JobError as error:
            note(str(error))
            return str(error)
        return "told"

    try:
        result = run()
    except (KeyboardInterrupt, JobInterrupted):
        tell({"state": "stopped"}, hasty=True)
        raise
    except VolsegError as error:
        state = "partial" if isinstance(error, JobPartial) else "failed"
        tell({"state": state, "error": str(error), "exit_code": error.exit_code})
        raise
    facts: dict[str, Any] = {
        name: result[name] for name in ("job_key", "blocks", "classes", "complete", "failed") if name in result
    }
    return {**result, "webhook": tell({"state": result["status"], **facts})}


def _check_allowed(url: str) -> None:
    allowed = [root.strip() for root in os.environ.get(ALLOWED, "").split(",") if root.strip()]
    if not any(_below(url, root) for root in allowed):
        raise InputError(
            f"webhook {url} is outside of what the operator of this machine allows ({ALLOWED}="
            f"{','.join(allowed)}); nothing was done: leave it out, or ask for the place"
        )


def _below(url: str, root: str) -> bool:
    there, here = urlsplit(url), urlsplit(root)
    if (there.scheme, there.hostname, there.port) != (here.scheme, here.hostname, here.port):
        return False
    path, prefix = PurePosixPath(unquote(there.path) or "/"), PurePosixPath(unquote(here.path) or "/")
    return ".." not in path.parts and (path == prefix or prefix in path.parents)


def _secret() -> bytes:
    if text := os.environ.get(SECRET, "").strip():
        return text.encode()
    path, found = os.environ.get(SECRET_PATH), b""
    if path:
        try:
            found = Path(path).read_bytes().strip()
        except OSError as error:
            raise InputError(
                f"the secret's file {path} ({SECRET_PATH}) cannot be read ({error.strerror}); nothing was done: "
                "correct the path or its mode"
            ) from None
    if not found:
        raise InputError(
            f"a webhook needs a secret to sign with, and this machine has none; nothing was done: put it into "
            f"{SECRET}, or the path of its file into {SECRET_PATH}"
        )
    return found
