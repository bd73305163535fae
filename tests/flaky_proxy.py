"""A proxy in front of an S3 server that makes requests fail, and counts them."""

from __future__ import annotations

import http.client
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote, urlsplit

Trouble = Literal["500", "503", "cut", "short", "lost", "unsent"]
TROUBLES: tuple[Trouble, ...] = ("500", "503", "cut", "short", "lost", "unsent")
_ERROR = '<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>canned</Message>{more}</Error>'
_CODES = {"500": "InternalError", "503": "SlowDown"}


@dataclass(frozen=True)
class Request:
    """One request as the proxy saw it; `number` counts those of the same `method`, `target` and `span`."""

    method: str
    target: str
    """Key and query, without the bucket."""
    span: str
    number: int
    bucket: str = ""
    signed: bool = True

    @property
    def name(self) -> tuple[str, str, str]:
        """What the requests of one operation have in common."""
        return self.method, self.target, self.span


@dataclass(frozen=True)
class Canned:
    """An answer that the proxy gives instead of the server."""

    status: int
    code: str
    headers: dict[str, str] = field(default_factory=dict)
    more: str = ""


Rule = Callable[[Request], Trouble | Canned | None]
"""Says what goes wrong with a request. 500, 503: instead of an answer. cut: the connection ends within the body. short:
fewer bytes come, and the header says so, too. lost: the request arrives, its answer does not. unsent: neither."""


@dataclass
class FlakyProxy:
    """What went through, and what goes wrong."""

    endpoint: str
    upstream: str
    rule: Rule = lambda _: None
    slow: Callable[[Request], None] = lambda _: None
    """Called with every request before it goes on; may wait."""
    form: str = _ERROR
    """What a canned answer says."""
    seen: list[Request] = field(default_factory=list)
    troubled: list[tuple[Request, Trouble | Canned]] = field(default_factory=list)
    _numbers: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        """Forget everything."""
        with self._lock:
            self.rule, self.slow, self.form = (lambda _: None), (lambda _: None), _ERROR
            self.seen.clear()
            self.troubled.clear()
            self._numbers.clear()

    def take(
        self, method: str, path: str, span: str, *, signed: bool = True
    ) -> tuple[Request, Trouble | Canned | None]:
        """Count a request and say what goes wrong with it."""
        # /bucket/key, /bucket?query
        plain, mark, query = unquote(path).partition("?")
        bucket, _, key = plain.lstrip("/").partition("/")
        target = key + mark + query
        with self._lock:
            name = (method, target, span)
            self._numbers[name] += 1
            request = Request(method, target, span, self._numbers[name], bucket, signed)
            trouble = self.rule(request)
            self.seen.append(request)
            if trouble is not None:
                self.troubled.append((request, trouble))
        return request, trouble

    def longest(self) -> int:
        """Return the most requests that any operation sent until one was answered."""
        bad = {id(request) for request, _ in self.troubled}
        running: Counter[tuple[str, str, str]] = Counter()
        longest = 0
        for request in self.seen:
            running[request.name] += 1
            longest = max(longest, running[request.name])
            if id(request) not in bad:
                running[request.name] = 0
        return longest


def failing(share: float, seed: int, in_a_row: int | None = None) -> Rule:
    """Make so large a share of requests fail, in every way; the same ones each time, in whatever order they come.

    With `in_a_row`, no more of one name fail together: among thousands of requests, by chance, some six would.
    """
    row: Counter[tuple[str, str, str]] = Counter()

    def rule(request: Request) -> Trouble | None:
        dice = random.Random(f"{seed} {request.method} {request.target} {request.span} {request.number}")
        trouble = dice.choice(TROUBLES) if dice.random() < share and row[request.name] != in_a_row else None
        row[request.name] = row[request.name] + 1 if trouble else 0
        return trouble

    return rule


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Else each small answer waits for the acknowledgement of its header.
    wbufsize = -1
    disable_nagle_algorithm = True
    proxy: FlakyProxy

    def log_message(self, *_: object) -> None:
        pass

    def handle_expect_100(self) -> bool:
        proceed = super().handle_expect_100()
        self.wfile.flush()
        return proceed

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request, trouble = self.proxy.take(
            self.command, self.path, self.headers.get("Range", ""), signed="Authorization" in self.headers
        )
        self.proxy.slow(request)
        if isinstance(trouble, Canned):
            content = self.proxy.form.format(code=trouble.code, more=trouble.more).encode()
            self._answer(trouble.status, [*trouble.headers.items()], content)
        elif trouble in {"500", "503"}:
            self._answer(int(trouble), [], _ERROR.format(code=_CODES[trouble], more="").encode())
        elif trouble == "unsent":
            self._hang_up()
        else:
            status, headers, content = self._forward(body)
            if trouble == "lost" or (trouble is not None and (len(content) < 2 or self.command == "HEAD")):
                self._hang_up()
            elif trouble == "cut":
                self._answer(status, headers, content[: len(content) // 2], len(content))
                self._hang_up()
            else:
                self._answer(status, headers, content[: len(content) // 2] if trouble == "short" else content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve  # noqa: N815

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        server = http.client.HTTPConnection(urlsplit(self.proxy.upstream).netloc, timeout=60)
        try:
            server.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            # Host included, which is signed.
            for name, value in self.headers.items():
                if name.lower() not in {"connection", "expect"}:
                    server.putheader(name, value)
            server.endheaders(body)
            answer = server.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            server.close()

    def _answer(
        self, status: int, headers: list[tuple[str, str]], content: bytes, announced: int | None = None
    ) -> None:
        self.send_response_only(status)
        held = None
        for name, value in headers:
            if name.lower() == "content-length":
                held = value
            elif name.lower() not in {"connection", "transfer-encoding"}:
                self.send_header(name, value)
        length = len(content) if announced is None else announced
        self.send_header("Content-Length", held or "0" if self.command == "HEAD" else str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def proxy(upstream: str) -> Iterator[FlakyProxy]:
    """Run a proxy in front of a server."""

    class Handler(_Handler):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.proxy = FlakyProxy(f"http://127.0.0.1:{server.server_port}", upstream)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield Handler.proxy
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
