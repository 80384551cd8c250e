"""A stand-in for Grafana's server: it writes how it was called beside its settings, and answers its health."""

from __future__ import annotations

import configparser
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


def install(folder: Path) -> Path:
    """The program as ``grafana-server`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "grafana-server"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P "{Path(__file__).resolve()}" "$@"\n')
    path.chmod(0o755)
    return path


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/api/health" else 404)
        self.end_headers()
        self.wfile.write(b'{"database": "ok"}')

    def log_message(self, format: str, *args: object) -> None:
        pass


def main() -> None:
    words = dict(word.removeprefix("--").partition("=")[::2] for word in sys.argv[1:])
    if "version" in words:
        print("Version 11.6.0 (commit: 0, branch: HEAD)")
        return
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(words["config"])
    secret = settings["security"]["admin_password"].removeprefix("$__file{").removesuffix("}")
    called = {"pid": os.getpid(), "words": sys.argv[1:], "environment": dict(os.environ), "password": Path(secret).read_text()}
    Path(words["config"]).with_name("called.json").write_text(json.dumps(called))
    server = settings["server"]
    HTTPServer((server["http_addr"], int(server["http_port"])), _Handler).serve_forever()


if __name__ == "__main__":
    main()
