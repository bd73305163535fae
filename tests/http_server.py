"""A web server of the tests, for whatever is asked or told over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]


class Server:
    """Keeps what it saw; `answer(method, path, body)` says what comes back, status 0 hangs up."""

    def __init__(self, answer: Callable[[str, str, Any], Answer], token: str | None = None) -> None:
        self.seen: list[tuple[str, str, str | None]] = []
        self.headers: dict[str, str] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _serve(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                given = self.headers.get("Authorization")
                content: Any = "no"
                outer.seen.append((self.command, self.path, given))
                outer.headers, outer.body = dict(self.headers), body
                if token is not None and given != f"Bearer {token}":
                    status = 401 if given is None else 403
                else:
                    status, content = answer(self.command, self.path, json.loads(body) if body else None)
                if not status:
                    self.close_connection = True
                    return
                data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", content)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = _serve  # noqa: N815

            def log_message(self, *_: Any) -> None:
                """Stay quiet."""

        self.body = b""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
