"""A real S3 server in a process of its own, and a proxy before it that breaks what passes in ways that can be switched.

with s3_server() as server, FaultProxy(server) as proxy:
    storage = s3_storage(proxy.url)
    proxy.fault("status", status=503, times=3)
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from outgrow.storage import Storage

FaultKind = Literal["status", "reset", "lost_answer", "drip", "truncate", "flip", "longer", "silent"]
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length"}
_PIECE = 16 << 10


@dataclass(kw_only=True)
class Fault:
    """What happens to the next ``times`` requests whose method and path fit.

    status       answered with ``status`` and never sent on
    reset        the connection breaks half-way through the body of the answer
    lost_answer  sent on and done, then the connection breaks before a byte of the answer
    drip         the body comes at ``bytes_per_s``
    truncate     the answer is whole, of a body that lacks its last half
    flip         the answer is whole, of a body with one bit changed in the middle
    longer       the answer is whole, of a body with 1,000 bytes more
    silent       no answer for ``seconds``, then the connection breaks
    """

    kind: FaultKind
    times: int
    method: str
    path: str
    status: int
    code: str
    bytes_per_s: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A request that came in; ``fault`` is empty where it was served as it should be."""

    method: str
    path: str
    range: str
    fault: str


class FaultProxy:
    """Listens on loopback at ``url`` and passes on to ``server``. ``seen`` holds every request, ``bytes_served`` counts what
    answers' bodies held."""

    def __init__(self, server: str) -> None:
        host, port = urlsplit(server).hostname, urlsplit(server).port
        assert host and port
        self._server = (host, port)
        self._listener = _listen(0)
        self._port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._connections: set[socket.socket] = set()
        self._line = _Line()
        self._closed = False
        self.seen: list[Seen] = []
        self.bytes_served = 0
        self._accepting = self._accept_on(self._listener)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._closed = True
        self._break_off()

    def fault(
        self,
        kind: FaultKind,
        *,
        times: int = 1,
        method: str = "",
        path: str = "",
        status: int = 503,
        code: str = "ServiceUnavailable",
        bytes_per_s: float = 1000.0,
        seconds: float = 3600.0,
    ) -> None:
        """The next ``times`` requests of ``method`` (empty: any) with ``path`` in their path fail; older faults come first."""
        fault = Fault(
            kind=kind, times=times, method=method, path=path, status=status, code=code, bytes_per_s=bytes_per_s, seconds=seconds
        )
        with self._lock:
            self._faults.append(fault)

    def throttle(self, bytes_per_s: float | None) -> None:
        """All answers' bodies together at this rate, as over a line that is shared; None: as fast as it goes."""
        self._line.bytes_per_s = bytes_per_s

    @contextlib.contextmanager
    def absent(self) -> Iterator[None]:
        """Connections are refused, and those that there were are broken."""
        self._break_off()
        try:
            yield
        finally:
            self._listener = _listen(self._port)
            self._accepting = self._accept_on(self._listener)

    def clear(self) -> None:
        """No more faults; counts begin anew."""
        with self._lock:
            self._faults.clear()
            self.seen.clear()
            self.bytes_served = 0

    def count(self, method: str = "", path: str = "", fault: str | None = None) -> int:
        """Requests seen of ``method`` with ``path`` in their path; of one kind of fault, or ``""`` for those without."""
        with self._lock:
            return sum(
                seen.method.startswith(method) and path in seen.path and (fault is None or seen.fault == fault)
                for seen in self.seen
            )

    def _accept_on(self, listener: socket.socket) -> threading.Thread:
        def accept() -> None:
            while True:
                try:
                    connection, address = listener.accept()
                except OSError:
                    return
                threading.Thread(target=self._serve, args=(connection, address), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        return thread

    def _break_off(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            _reset(connection)

    def _serve(self, connection: socket.socket, address: Any) -> None:
        with self._lock:
            self._connections.add(connection)
        try:
            _Handler(connection, address, self)  # type: ignore[arg-type]
        except (OSError, ValueError, http.client.HTTPException):
            pass
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()

    def _take(self, method: str, path: str, range_: str) -> Fault | None:
        """The fault of this request, if one is due."""
        with self._lock:
            fault = next(
                (f for f in self._faults if f.times > 0 and f.method in ("", method) and f.path in path),
                None,
            )
            if fault is not None:
                fault.times -= 1
            self.seen.append(Seen(method=method, path=path, range=range_, fault=fault.kind if fault else ""))
            return fault

    def _served(self, num_bytes: int) -> None:
        with self._lock:
            self.bytes_served += num_bytes


class _Line:
    """A line of limited rate that all connections share."""

    def __init__(self) -> None:
        self.bytes_per_s: float | None = None
        self._lock = threading.Lock()
        self._free_at = 0.0

    def pass_on(self, num_bytes: int) -> None:
        rate = self.bytes_per_s
        if rate is None:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + num_bytes / rate
            wait_s = self._free_at - time.monotonic()
        if wait_s > 0:
            time.sleep(wait_s)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: FaultProxy  # type: ignore[assignment]

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server._take(self.command, self.path, self.headers.get("Range", ""))
        if fault is None:
            self._answer(*self._ask(body))
        else:
            self._fail(fault, body)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """What the server answers: status, headers, body."""
        upstream = http.client.HTTPConnection(*self.server._server, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in ("connection", "expect")}
            upstream.request(self.command, self.path, body=body, headers=headers)
            answer = upstream.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            upstream.close()

    def _fail(self, fault: Fault, body: bytes) -> None:
        if fault.kind == "status":
            text = f"<Error><Code>{fault.code}</Code><Message>as asked</Message></Error>".encode()
            self._answer(fault.status, [("Content-Type", "application/xml")], text)
            return
        if fault.kind == "silent":
            time.sleep(fault.seconds)
            self._break_off()
            return
        status, headers, content = self._ask(body)
        if fault.kind == "lost_answer":
            self._break_off()
        elif fault.kind == "reset":
            self._head(status, headers, len(content))
            self._body(content[: len(content) // 2])
            self._break_off()
        elif fault.kind == "drip":
            self._head(status, headers, len(content))
            piece = max(1, int(fault.bytes_per_s / 10))
            for start in range(0, len(content), piece):
                self._body(content[start : start + piece])
                time.sleep(0.1)
        else:
            self._answer(status, headers, _changed(content, fault.kind))

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self._head(status, headers, len(content))
        self._body(content)

    def _head(self, status: int, headers: list[tuple[str, str]], num_bytes: int) -> None:
        self.send_response_only(status)
        length = next((value for name, value in headers if name.lower() == "content-length"), str(num_bytes))
        for name, value in headers:
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        # The answer to HEAD has no body, and the length of the one that GET would have.
        self.send_header("Content-Length", length if self.command == "HEAD" else str(num_bytes))
        self.end_headers()

    def _body(self, content: bytes) -> None:
        if self.command == "HEAD":
            return
        for start in range(0, len(content), _PIECE):
            piece = content[start : start + _PIECE]
            self.server._line.pass_on(len(piece))
            self.wfile.write(piece)
            self.server._served(len(piece))

    def _break_off(self) -> None:
        self.wfile.flush()
        _reset(self.connection)
        self.close_connection = True


def _changed(content: bytes, kind: str) -> bytes:
    if kind == "truncate":
        return content[: len(content) // 2]
    if kind == "longer":
        return content + bytes(1000)
    if not content:
        return content
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(64)
    return listener


def _reset(connection: socket.socket) -> None:
    """Close with RST instead of FIN, also where another thread is reading."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RD)
    connection.close()


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """URL of an S3 server (moto) that runs in a process of its own; it takes any credentials."""
    with serving(lambda port: ["moto.server", "-H", "127.0.0.1", "-p", str(port)]) as url:
        yield url


@contextlib.contextmanager
def serving(words_of: Callable[[int], list[str]]) -> Iterator[str]:
    """URL of a Python module that serves a port of loopback in a process of its own; ``words_of`` gives name and arguments."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", *words_of(port)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, f"{words[2]} does not start"
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def s3_options(url: str) -> dict[str, Any]:
    return {"key": "AKIDPLANTED", "secret": "planted-secret", "endpoint_url": url}


def s3_storage(url: str, bucket: str = "bucket") -> Storage:
    """A prefix in a bucket of its own at ``url``; the bucket is made if need be."""
    storage = Storage(f"s3://{bucket}/some/prefix", s3_options(url))
    if not storage.fs.exists(bucket):
        storage.fs.mkdir(bucket)
    return storage
