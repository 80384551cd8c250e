"""Sites whose monitoring lies in a folder and on ports of a test's own, certificates, and the command on them."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from outgrow.recipes.schema.site import Site
from outgrow.recipes.site_loading import load_site

PORTS = ("agent_port", "prometheus_port", "alertmanager_port", "grafana_port")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel hands out by itself."""
    found: list[int] = []
    for port in range(20000 + os.getpid() % 10000, 32000):
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            break
    return found


def write_site(folder: Path, **monitoring: Any) -> Path:
    """A site file in ``folder``, everything of it below that and on free ports."""
    folder.mkdir(parents=True, exist_ok=True)
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    own = {"folder": str(folder / "state"), "scrape_s": 1, "ray_discovery": str(folder / "no-ray.json")} | ports | monitoring
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump({"schema": 1, "storage": str(folder / "storage"), "monitoring": own}))
    return path


def site_in(folder: Path, **monitoring: Any) -> Site:
    return load_site(write_site(folder, **monitoring))


def write_password(path: Path, password: str) -> Path:
    path.write_text(password + "\n")
    path.chmod(0o600)
    return path


def write_certificate(
    folder: Path, names: tuple[str, ...] = ("home.example",), *, days: int = 1, authority: bool = True
) -> tuple[Path, Path]:
    """A self-signed certificate for host names and addresses, and its key, as PEM files. ``days`` below 0: expired."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "outgrow test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=3))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    if names:
        made = made.add_extension(x509.SubjectAlternativeName([_name(name) for name in names]), critical=False)
    folder.mkdir(parents=True, exist_ok=True)
    certificate, private = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    private.chmod(0o600)
    return certificate, private


def _name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def outgrow(*words: str, code: int | None = 0, **environment: str) -> str:
    """What a command says; ``code`` is the exit code that it must have, None for any."""
    done = subprocess.run(
        [sys.executable, "-m", "outgrow", *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert code is None or done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def eventually(check: Callable[[], Any], seconds: float = 15.0) -> Any:
    """The first true value of ``check``; fails with its last one."""
    until = time.monotonic() + seconds
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < until, f"not within {seconds} s: {found!r}"
        time.sleep(0.1)
