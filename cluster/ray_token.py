"""The token that opens a Ray cluster: a file of the user's, mode 0600, made where it is missing and may be.

Whoever holds the token runs any code on the cluster. outgrow starts no cluster without one and joins none that asks for none.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from outgrow.errors import ClusterError


def make_token(path: Path) -> bool:
    """True where ``path`` was missing and now holds a fresh token. An existing file that others can read is closed to them."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)
        return False
    with open(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return True


def read_token(token_file: str, environment: Mapping[str, str]) -> str:
    """The token that Ray itself will use. Raises ``ClusterError`` where there is none."""
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return token
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or token_file).expanduser()
    try:
        token = path.read_text().strip()
    except FileNotFoundError:
        token = ""
    if not token:
        raise ClusterError(
            f"no token in {path}",
            hint="copy the token of the cluster's head there (mode 0600), or set cluster.token_file in site.yaml",
        )
    return token
