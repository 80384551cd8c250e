"""What an agent answers over HTTP: metrics, targets, runs and its health, with TLS and a password where the site says so."""

from __future__ import annotations

import base64
import errno
import gzip
import hmac
import json
import logging
import math
import socket
import ssl
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any, TypeAlias
from urllib.parse import urlsplit

from prometheus_client.exposition import choose_encoder

from outgrow.contracts import JsonDict
from outgrow.errors import MonitorError, SiteError
from outgrow.monitoring.agent.families import Collector
from outgrow.monitoring.agent.scan import RunView
from outgrow.monitoring.stack.access import read_password
from outgrow.recipes.schema.monitoring import Access

log = logging.getLogger(__name__)

Answer: TypeAlias = tuple[str, bytes]
"""Content type and body."""
Route: TypeAlias = Callable[[Mapping[str, str]], Answer]
"""What is answered to a request with these headers, their names in lower case."""

CLIENT_S = 10.0
"""How long a client may take to ask, and to take the answer."""
MOST_AT_ONCE = 32
PORTS = 21
"""How many ports are tried, from that of the site on."""


class Server(ThreadingHTTPServer):
    """Serves ``routes`` on ``address``; each request in a thread of its own, so that a slow client holds up nobody else.

    Raises ``SiteError`` for a certificate or password that cannot be used, and ``OSError`` where it cannot listen.
    """

    daemon_threads = True

    def __init__(self, address: str, port: int, access: Access, routes: Mapping[str, Route]) -> None:
        self.routes = routes
        self.credentials = _credentials(access)
        tls = _tls(access)
        self._places = threading.BoundedSemaphore(MOST_AT_ONCE)
        if ":" in address:
            self.address_family = socket.AF_INET6
        super().__init__((address, port), _Handler)
        if tls is not None:
            # The handshake is for the thread of the request: here a client that says nothing would hold up all others.
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def server_bind(self) -> None:
        # Not HTTPServer's: that asks a name server for the name of the address, which may take its time.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a request ended early", exc_info=True)  # a client that hung up, or does not speak TLS


def listen(address: str, port: int, access: Access, routes: Mapping[str, Route], others: Collection[int] = ()) -> Server:
    """A server on ``port``, or on the next one that is free and none of ``others``, which the rest of the site needs.

    Raises ``MonitorError`` where there is none, and ``SiteError``.
    """
    for one in (one for one in range(port, min(port + PORTS, 65536)) if one not in others):
        try:
            return Server(address, one, access, routes)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise MonitorError(
                    f"the node agent cannot listen on {address}, port {one}: {error.strerror or error}",
                    where="monitoring.address, monitoring.agent_port",
                    hint="give an address of this machine, such as 127.0.0.1, and a port above 1023",
                ) from None
    raise MonitorError(
        f"all ports from {port} to {port + PORTS - 1} are taken", where="monitoring.agent_port", hint="give another port"
    )


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = CLIENT_S
    server_version, sys_version = "outgrow", ""

    def do_GET(self) -> None:
        if not self._is_allowed():
            self._send(401, "text/plain", b"a user and password are needed\n", ("WWW-Authenticate", 'Basic realm="outgrow"'))
            return
        route = self.server.routes.get(urlsplit(self.path).path)
        if route is None:
            known = ", ".join(self.server.routes)
            self._send(404, "text/plain", f"there are: {known}\n".encode())
            return
        try:
            kind, body = route({name.lower(): value for name, value in self.headers.items()})
        except Exception as error:
            log.exception("no answer to %s", urlsplit(self.path).path)
            self._send(500, "text/plain", f"{type(error).__name__}; the log says more\n".encode())
            return
        self._send(200, kind, body)

    def _is_allowed(self) -> bool:
        wanted = self.server.credentials
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        if wanted is None:
            return True
        return scheme.lower() == "basic" and hmac.compare_digest(given.strip().encode("latin-1", "replace"), wanted)

    def _send(self, status: int, kind: str, body: bytes, *headers: tuple[str, str]) -> None:
        if len(body) > 1000 and "gzip" in self.headers.get("Accept-Encoding", ""):
            body, headers = gzip.compress(body, compresslevel=1), (*headers, ("Content-Encoding", "gzip"))
        self.send_response(status)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are no news."""


# --- routes -----------------------------------------------------------------------------------------------------------


def metrics_route(collector: Collector) -> Route:
    def answer(headers: Mapping[str, str]) -> Answer:
        encoder, kind = choose_encoder(headers.get("accept", ""))
        return kind, encoder(collector)  # of a registry it asks ``collect`` alone

    return answer


def json_route(ask: Callable[[], Any]) -> Route:
    return lambda _: ("application/json", json.dumps(ask()).encode())


def health_route() -> Route:
    return lambda _: ("text/plain", b"ok\n")


def told(runs: Iterable[RunView]) -> list[JsonDict]:
    """The runs as JSON; a slot that holds nothing is null."""
    return [
        {
            "facts": run.facts.to_dict(),
            "state": run.state,
            "ranks": {
                str(rank.rank): {
                    "alive": rank.alive,
                    "record": {slot: value if math.isfinite(value) else None for slot, value in rank.record.items()},
                }
                for rank in run.ranks.values()
            },
        }
        for run in runs
    ]


# --- access -----------------------------------------------------------------------------------------------------------


def _credentials(access: Access) -> bytes | None:
    """What a client must send after ``Basic``; None where everybody may ask."""
    if not access.user:
        return None
    password = read_password(access.password_file, "monitoring.access.password_file")
    return base64.b64encode(f"{access.user}:{password}".encode())


def _tls(access: Access) -> ssl.SSLContext | None:
    if not access.certificate:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(access.certificate, access.key, password=lambda: b"")
    except OSError as error:  # ssl.SSLError is one
        raise SiteError(
            f"monitoring.access: certificate and key cannot be used: {error}",
            where=access.certificate,
            hint="both are PEM files, the key is that of the certificate and has no passphrase",
        ) from None
    return context
