"""One operation on S3: how many requests, at which pace, with which credentials, and what its errors mean.

An operation sends at most `ATTEMPTS` requests, with growing pauses between them. s3fs, botocore and aiohttp would each
try again by themselves, together up to 50 times: here all of them send one only, and this module counts. Endpoint,
region and credentials come from the environment and the AWS config alone; credentials that expire are asked for anew
once an operation.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, TypeVar

from aiobotocore.httpsession import AIOHTTPSession
from botocore import UNSIGNED
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem

from volseg.errors import InputError
from volseg.redaction import learn
from volseg.storage import rate
from volseg.storage.s3_errors import Action, judge

T = TypeVar("T")

ATTEMPTS = 6
"""Requests that one operation may send."""

PAUSE_SECONDS = 0.25
"""Longest pause after the first failed request; it doubles after each further one."""

AT_ONCE = 16
"""Requests of one process and event loop that may be under way together."""

NO_SIGN = "AWS_NO_SIGN_REQUEST"
"""Environment variable, known from GDAL: yes for public buckets and a user without credentials."""

CONNECT_SECONDS = 5
ANSWER_SECONDS = 30


class _OneRequest(AIOHTTPSession):  # type: ignore[misc]  # aiobotocore has no types
    """HTTP that leaves it to its caller whether to try again."""

    async def _get_session(self, proxy_url: str | None) -> Any:
        session = await super()._get_session(proxy_url)
        # aiohttp sends what it takes for harmless once more when a connection ends, and nobody counts that.
        session._retry_connection = False
        return session


class Requests(S3FileSystem):  # type: ignore[misc]  # s3fs has no types
    """s3fs whose operations are bounded; their errors are those of `s3_errors.judge`."""

    cachable = False
    _s3: Any

    def __init__(self, *, asynchronous: bool) -> None:
        super().__init__(
            asynchronous=asynchronous,
            anon=unsigned(),
            use_listings_cache=False,
            client_kwargs=_region(),
            config_kwargs={
                "retries": {"total_max_attempts": 1, "mode": "standard"},
                "connect_timeout": CONNECT_SECONDS,
                "read_timeout": ANSWER_SECONDS,
                "max_pool_connections": AT_ONCE,
                "http_session_cls": _OneRequest,
                # Checksums of whole objects say nothing about ranges; uploads carry one.
                "response_checksum_validation": "when_required",
            },
        )
        self._process = os.getpid()
        self._former: list[Any] = []

    async def _client(self) -> Any:
        if self._process != os.getpid():
            # Connections and locks are those of the process that this one was forked from. They stay: at their end they
            # would leave the selector, which both share, and answers would no longer reach the other one.
            self._former.append(self._s3)
            self._process, self._s3, self._set_session_lock = os.getpid(), None, asyncio.Lock()
        return await self.set_session()

    async def _renew(self, client: Any) -> None:
        """Ask for credentials anew, where nobody else did since `client` was made."""
        if self._s3 is client:
            # Others may be in the middle of an answer with it.
            self._former.append(client)
            await self.set_session(refresh=True)

    def _learn_credentials(self) -> None:
        """Make known what must not be read in what is said about an error."""
        # Asked for in the usual way, they might be fetched anew, which can fail, too.
        found = getattr(self.session, "_credentials", None)
        held = getattr(found, "_frozen_credentials", found)
        if held is not None:
            learn(held.access_key, held.secret_key, held.token)

    async def _tried(self, action: Action, request: Callable[[Any], Awaitable[T]]) -> T:
        """Return what `request` returns for a client; called again while its errors may pass."""
        renewed, again, client = False, False, None
        for attempt in range(1, ATTEMPTS + 1):
            await rate.turn()
            try:
                if again:
                    await self._renew(client)
                client = await self._client()
                return await request(client)
            except Exception as error:
                self._learn_credentials()
                verdict = judge(error, _at(client, action), attempt)
                again = verdict.expired and not renewed
                if attempt == ATTEMPTS or not (verdict.passing or again):
                    raise verdict.error from error
            renewed = renewed or again
            if not again:
                await asyncio.sleep(PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1))
        raise AssertionError

    async def _call_s3(self, method: str, *more: Any, **arguments: Any) -> Any:
        """Send one operation of the S3 API; what of s3fs is used comes through here, too."""
        action = Action(method, str(arguments.get("Bucket", "")), str(arguments.get("Key", "")))

        async def request(client: Any) -> Any:
            function = getattr(client, method)
            return await function(**self._get_s3_method_kwargs(function, *more, **arguments))

        return await self._tried(action, request)

    call = sync_wrapper(_call_s3)


def unsigned() -> bool:
    """Tell whether requests go out without a signature, as public buckets take them; raises InputError."""
    given = os.environ.get(NO_SIGN, "")
    if given.lower() in {"yes", "true", "1", "on"}:
        return True
    if given.lower() in {"", "no", "false", "0", "off"}:
        return False
    raise InputError(
        f"{NO_SIGN} is {given!r}: yes reads public buckets without credentials, no signs every request; nothing was "
        "sent: say one of them, or unset it"
    )


def _region() -> dict[str, str]:
    """Return what botocore does not look at itself: the variable that other AWS tools read the region from."""
    region = os.environ.get("AWS_REGION")
    return {"region_name": region} if region and not os.environ.get("AWS_DEFAULT_REGION") else {}


def _at(client: Any, action: Action) -> Action:
    """Add to an action whom it was sent to."""
    if client is None:
        return action
    meta = client.meta
    return replace(
        action, endpoint=meta.endpoint_url, region=meta.region_name or "",
        unsigned=meta.config.signature_version is UNSIGNED,
    )  # fmt: skip
