"""What a prefetcher and its clients say to one another: JSON, a line each, over a stream socket; errors keep their kind."""

from __future__ import annotations

import contextlib
import json
import socket
import traceback

from outgrow.contracts import JsonDict
from outgrow.errors import DataError, IntegrityError, OutgrowError, ShardError, SiteError, TrainingError

_KINDS: tuple[type[OutgrowError], ...] = (ShardError, IntegrityError, SiteError, DataError, TrainingError)
"""What an error can be on the other side, the narrower before the wider."""


class Channel:
    """One end of a connection. Every method raises ``EOFError`` once the other end is gone."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("rb")

    def send(self, message: JsonDict) -> None:
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:  # a reset, a broken pipe, or closed by another thread
            raise EOFError from error

    def receive(self) -> JsonDict:
        try:
            line = self._lines.readline()
        except (OSError, ValueError) as error:
            raise EOFError from error
        if not line.endswith(b"\n"):
            raise EOFError
        message: JsonDict = json.loads(line)
        return message

    def ask(self, message: JsonDict) -> JsonDict:
        """The answer. Raises the error that it is, if it is one."""
        self.send(message)
        answer = self.receive()
        if "error" in answer:
            raise to_error(answer["error"])
        return answer

    def close(self) -> None:
        """Also ends a ``receive`` that another thread waits in."""
        with contextlib.suppress(OSError):  # the other end was closed before
            self._connection.shutdown(socket.SHUT_RDWR)
        self._lines.close()
        self._connection.close()


def as_outgrow_error(error: Exception) -> OutgrowError:
    """The error as a reader is told it: one that nobody expected with its traceback."""
    if isinstance(error, OutgrowError):
        return error
    return TrainingError("shards cannot be fetched:\n" + "".join(traceback.format_exception(error)))


def from_error(error: Exception) -> JsonDict:
    """An error as JSON; one of a narrower kind than are known here becomes the known one."""
    error = as_outgrow_error(error)
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), TrainingError)
    told: JsonDict = {"kind": kind.__name__, "message": error.message, "where": error.where, "hint": error.hint}
    if isinstance(error, ShardError):
        told |= {"stream": error.stream, "shard": error.shard}
    return told


def to_error(told: JsonDict) -> OutgrowError:
    """The error that ``from_error`` described."""
    kind = next(kind for kind in _KINDS if kind.__name__ == told["kind"])
    return kind(told["message"], **{key: value for key, value in told.items() if key not in ("kind", "message")})
