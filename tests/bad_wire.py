"""An HTTP proxy that spoils answers: what networks, load balancers and tired servers do to a client of a bucket."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal["busy", "broken", "silent", "cut", "short", "flipped"]
FAULTS: tuple[Fault, ...] = ("busy", "broken", "silent", "cut", "short", "flipped")
"""busy, broken: status 503, 500. silent: the connection ends without an answer. cut: it ends in the middle of the body.
short: only half of the body comes, said to be all. flipped: one bit of the body is another."""


class BadWire(ThreadingHTTPServer):
    """A way to the server at a port.

    spoil: which fault an answer gets, None for none, by its request: method, path with query, and range of bytes.
    """

    daemon_threads = True

    def __init__(self, target_port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target_port = target_port
        self.spoil: Callable[[str], Fault | None] = lambda request: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients may go away."""


@contextlib.contextmanager
def bad_wire(target_port: int) -> Iterator[BadWire]:
    with BadWire(target_port) as wire:
        threading.Thread(target=wire.serve_forever, args=(0.05,), daemon=True).start()
        yield wire
        wire.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which costs 40 ms an answer
    server: BadWire

    def _pass_on(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.spoil(f"{self.command} {self.path} {self.headers.get('Range', '')}")
        if fault == "silent":
            self.close_connection = True
        elif fault in ("busy", "broken"):
            self._answer(503 if fault == "busy" else 500, [], b"<Error><Message>try again</Message></Error>")
        else:
            status, headers, body = self._ask(content)
            if fault == "flipped" and body:
                body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 16]) + body[len(body) // 2 + 1 :]
            self._answer(status, headers, body[: len(body) // 2] if fault == "short" else body, cut=fault == "cut")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def _ask(self, content: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.target_port)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(content)
            answer = connection.getresponse()
            body = answer.read()
            # Of HEAD, the length that GET would have.
            kept = [
                (name, value)
                for name, value in answer.getheaders()
                if name.lower() not in ("transfer-encoding", "connection")
                and (name.lower() != "content-length" or self.command == "HEAD")
            ]
            return answer.status, kept, body
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def log_message(self, *arguments: object) -> None:
        pass
