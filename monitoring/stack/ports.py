"""Whether a port is free to listen on, and who has it if not."""

from __future__ import annotations

import errno
import socket

import psutil

from outgrow.errors import SiteError
from outgrow.monitoring.stack.access import host_port


def check_port(name: str, address: str, port: int, key: str) -> None:
    """Raises ``SiteError`` where ``name`` cannot listen there, with who does and the key to change."""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(found[0], found[1]) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(found[4])
            one.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise SiteError(
                f"{key}: {host_port(address, port)} is taken by {_holder(port)}; {name} cannot listen there",
                hint=f"end that, or set another {key} in site.yaml",
            ) from None
        raise SiteError(
            f"monitoring.address: {name} cannot listen on {host_port(address, port)}: {error.strerror or error}",
            hint="allowed: 127.0.0.1, an address of this machine, or 0.0.0.0 for all of them",
        ) from None


def _holder(port: int) -> str:
    """The process that listens on a port, as far as this user may see."""
    try:
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port and one.pid:
                return f"{psutil.Process(one.pid).name()} (pid {one.pid})"
    except (psutil.Error, OSError):
        pass
    return "another program"
