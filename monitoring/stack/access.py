"""Who may talk to what listens: passwords and their hashes, the pinned certificate, and our own requests through both."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import stat
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import bcrypt

from outgrow.errors import SiteError
from outgrow.recipes.schema.monitoring import Access

_ROUNDS = 10
_MOST_BYTES = 72
"""bcrypt takes no more of a password."""
_MOST_ANSWER_BYTES = 64 << 20


def read_password(path: str, key: str) -> str:
    """The password in a file, without the white space around it. ``key`` is the key of the site that names the file.

    Raises ``SiteError`` where there is none, or others may read it.
    """
    try:
        mode = Path(path).stat().st_mode
        text = Path(path).read_text().strip()
    except (OSError, UnicodeError) as error:
        raise SiteError(
            f"{key}: no password can be read: {error}", where=path, hint="write the password alone into it"
        ) from None
    if stat.S_IMODE(mode) & 0o077:
        raise SiteError(
            f"{key}: others may read this file (mode {stat.S_IMODE(mode):04o})", where=path, hint=f"chmod 600 {path}"
        )
    if not text or len(text.encode()) > _MOST_BYTES or not text.isprintable():
        raise SiteError(f"{key}: given no password or an unusable one", where=path, hint=f"one line, 1 to {_MOST_BYTES} bytes")
    return text


def password_hash(password: str, before: str = "") -> str:
    """The bcrypt hash of a password: ``before`` where that is one of it, so that nothing changes without need."""
    try:
        if before and bcrypt.checkpw(password.encode(), before.encode()):
            return before
    except ValueError:
        pass
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(_ROUNDS)).decode()


def certificate_name(access: Access) -> str:
    """A name that the certificate is for; empty without TLS.

    Whoever asks pins the certificate itself, so that this name, not the address, is what it is held against. Raises
    ``SiteError`` for a certificate that no connection can be made with.
    """
    if not access.certificate:
        return ""
    try:
        names = _subject_names(access.certificate, access.key)
    except (OSError, ssl.SSLError) as error:
        raise SiteError(
            f"access: certificate and key make no connection: {error}",
            where=access.certificate,
            hint="both PEM, the key that of the certificate, neither expired nor for another use than servers",
        ) from None
    if not names:
        raise SiteError(
            "access: the certificate names no host",
            where=access.certificate,
            hint='make it with names, such as openssl req -x509 ... -addext "subjectAltName=DNS:myhost,IP:10.0.0.5"',
        )
    # Of a wildcard one host is as good as another.
    return names[0].replace("*", "any", 1)


def _subject_names(certificate: str, key: str) -> list[str]:
    """The alternative names of a certificate: a connection within memory shows them, and that the key belongs to it."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key, password=lambda: b"")
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    there = server.wrap_bio(to_server, to_client, server_side=True)
    here = pinned(certificate).wrap_bio(to_client, to_server)
    ends = [here, there]
    while ends:
        for end in [*ends]:
            try:
                end.do_handshake()
                ends.remove(end)
            except ssl.SSLWantReadError:
                continue
    names: Any = (here.getpeercert() or {}).get("subjectAltName", ())
    return [name for wanted in ("DNS", "IP Address") for kind, name in names if kind == wanted]


def pinned(certificate: str) -> ssl.SSLContext:
    """A context that trusts this very certificate, whatever address it is met at. Raises ``OSError``."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(certificate)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


@dataclass(frozen=True, kw_only=True)
class Client:
    """Requests to what this node's site has started, past any proxy."""

    certificate: str = ""
    user: str = ""
    password: str = ""
    timeout_s: float = 3.0

    def get(self, url: str) -> bytes:
        """The body of an answer 200. Raises ``OSError`` for any other, and where there is none."""
        request = urllib.request.Request(url)
        if self.user:
            token = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
        if self.certificate:
            handlers.append(urllib.request.HTTPSHandler(context=pinned(self.certificate)))
        try:
            with urllib.request.build_opener(*handlers).open(request, timeout=self.timeout_s) as answer:
                return bytes(answer.read(_MOST_ANSWER_BYTES))
        except urllib.error.HTTPError as error:
            error.close()
            raise
        except (HTTPException, ValueError) as error:
            raise OSError(f"{url}: {error}") from None

    def get_json(self, url: str) -> Any:
        """The ``data`` of an answer of Prometheus's API, or the answer. Raises ``OSError``."""
        try:
            found = json.loads(self.get(url))
        except ValueError as error:
            raise OSError(f"{url}: no JSON: {error}") from None
        return found["data"] if isinstance(found, dict) and "data" in found else found


def client(access: Access) -> Client:
    """Raises ``SiteError`` where the password cannot be read."""
    password = read_password(access.password_file, "monitoring.access.password_file") if access.user else ""
    return Client(certificate=access.certificate, user=access.user, password=password)


# --- addresses --------------------------------------------------------------------------------------------------------


def reachable(address: str) -> str:
    """The address to meet, on this machine, what listens on ``address``."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(address, address)


def host_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def url_of(address: str, port: int, *, tls: bool) -> str:
    """Where this machine meets what listens there."""
    return f"{'https' if tls else 'http'}://{host_port(reachable(address), port)}"


def shown_url(url: str, address: str) -> str:
    """The URL for a person: this host's name where it listens on all addresses."""
    if address not in ("0.0.0.0", "::"):
        return url
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{socket.gethostname()}:{rest.rpartition(':')[2]}"
