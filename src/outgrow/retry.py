"""Which failures of a bucket or network pass by themselves, and how long to go on trying.

Errors of fsspec, botocore, aiohttp and google-auth are told apart by the names of their types, their HTTP status and their
errno, so that none of these packages is imported here. What is said of an error is its type, status and code alone: the text
that a server sends is not repeated, as nobody knows what is in it.
"""

from __future__ import annotations

import errno
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from outgrow.errors import IntegrityError, SiteError, TrainingError

T = TypeVar("T")
Kind: TypeAlias = Literal[
    "timeout", "reset", "unreachable", "throttled", "5xx", "missing", "denied", "corrupt", "io", "disk_full", "other"
]
"""What went wrong, in few words, as counters name it."""

PASSING: frozenset[Kind] = frozenset({"timeout", "reset", "unreachable", "throttled", "5xx"})
"""Kinds that another attempt may not meet again."""
CREDENTIALS_HINT = (
    "give the bucket's credentials in site.yaml, under storage_options or the options of the tier: "
    "{key: ${env:NAME}, secret: ${env:NAME}}; they must allow to list, read, write and delete below this prefix"
)
_DAMAGED_ATTEMPTS = 3
"""Times that bytes which differ from the server's own checksum are asked for: they may have changed on the way."""

_DENIED_TYPES = frozenset(
    {
        "PermissionError",
        "NoCredentialsError",
        "PartialCredentialsError",
        "CredentialRetrievalError",
        "NoAuthTokenError",
        "TokenRetrievalError",
        "DefaultCredentialsError",
        "RefreshError",
    }
)
# In the order in which they are asked: a ConnectTimeoutError is a ConnectionError of botocore as well.
_KIND_OF_TYPE: tuple[tuple[Kind, frozenset[str]], ...] = (
    ("denied", _DENIED_TYPES),
    ("missing", frozenset({"FileNotFoundError"})),
    # A certificate that does not hold is no accident of the network, though its types derive from connection errors.
    ("other", frozenset({"SSLError", "ClientSSLError", "ClientConnectorCertificateError", "SSLCertVerificationError"})),
    ("timeout", frozenset({"TimeoutError", "FSTimeoutError", "ReadTimeoutError", "ConnectTimeoutError", "ServerTimeoutError"})),
    ("unreachable", frozenset({"EndpointConnectionError", "ProxyConnectionError", "ClientConnectorError", "gaierror"})),
    ("unreachable", frozenset({"ConnectionRefusedError", "TransportError", "Unreachable"})),
    ("reset", frozenset({"ConnectionError", "HTTPClientError", "ClientPayloadError", "ServerDisconnectedError"})),
    ("reset", frozenset({"ClientOSError", "IncompleteRead", "ResponseParserError"})),
    ("corrupt", frozenset({"FlexibleChecksumError", "ChecksumError", "IntegrityError"})),
)
_KIND_OF_ERRNO: dict[int, Kind] = {
    errno.ENOSPC: "disk_full",
    errno.EDQUOT: "disk_full",
    errno.EIO: "io",
    errno.ENETUNREACH: "unreachable",
    errno.EHOSTUNREACH: "unreachable",
    errno.ENETDOWN: "unreachable",
    errno.EHOSTDOWN: "unreachable",
    errno.EPIPE: "reset",
}
_KIND_OF_STATUS: dict[int, Kind] = {
    401: "denied",
    403: "denied",
    404: "missing",
    408: "timeout",
    429: "throttled",
    501: "other",  # the service does not know such a request, and will not later
}
_KIND_OF_CODE: dict[str, Kind] = {
    "SlowDown": "throttled",
    "RequestLimitExceeded": "throttled",
    "Throttling": "throttled",
    "TooManyRequests": "throttled",
    "RequestTimeout": "timeout",
    "NotImplemented": "other",
    "InternalError": "5xx",
    "ServiceUnavailable": "5xx",
    "IncompleteBody": "reset",
    "XAmzContentSHA256Mismatch": "reset",  # a body that was damaged on its way up
    "BadDigest": "reset",
    "ConditionalRequestConflict": "throttled",  # somebody else writes the same object just now
    "OperationAborted": "throttled",
    "ExpiredToken": "denied",
    "InvalidAccessKeyId": "denied",
    "SignatureDoesNotMatch": "denied",
    "InvalidToken": "denied",
}
_PLAIN_CODE = re.compile(r"[A-Za-z0-9.]{1,64}")


class Unreachable(TrainingError):
    """What a place holds could not be told, or nothing be written there, within the time that was given."""


def kind_of(error: BaseException) -> Kind:
    """What went wrong, found in an error or in what it was raised from."""
    for link in _chain(error):
        code, status = _code(link), _status(link)
        if code in _KIND_OF_CODE:
            return _KIND_OF_CODE[code]
        if status in _KIND_OF_STATUS:
            return _KIND_OF_STATUS[status]
        if status is not None:
            return "5xx" if status >= 500 else "other"
    for link in _chain(error):
        if isinstance(link, OSError) and link.errno in _KIND_OF_ERRNO:
            return _KIND_OF_ERRNO[link.errno]
        if type(link) is OSError and str(link).startswith("Forbidden"):  # all that gcsfs says of a 403
            return "denied"
        names = {kind.__name__ for kind in type(link).__mro__}
        for kind, types in _KIND_OF_TYPE:
            if names & types:
                return kind
    return "other"


def describe(error: BaseException) -> str:
    """An error in few words that hold nothing a server said but its status and code."""
    for link in _chain(error):
        status, code = _status(link), _code(link)
        if status is not None:
            return f"{status} {code}" if code and code != str(status) else str(status)
    if isinstance(error, OSError) and error.strerror and not error.__cause__:
        return error.strerror
    return type(error).__name__


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of botocore, aiohttp or gcsfs, or what it was raised from, carries; else None."""
    return next((status for link in _chain(error) if (status := _status(link)) is not None), None)


def is_taken(error: BaseException) -> bool:
    """Whether a conditional write failed because the name is taken."""
    return isinstance(error, FileExistsError) or status_of(error) == 412


def _status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    found: object = None
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    elif type(error).__name__ in ("HttpError", "ClientResponseError"):
        found = getattr(error, "code", None) or getattr(error, "status", None)
    return int(found) if isinstance(found, int | str) and str(found).isdigit() else None


def _code(error: BaseException) -> str:
    """The code that S3 gave with an error, such as ``NoSuchKey``; empty for any other."""
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return code if isinstance(code, str) and _PLAIN_CODE.fullmatch(code) else ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it was raised from; a library's translation has the status in its cause."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to go on: ``total_s`` from the first attempt, with pauses that grow from ``first_s`` to ``most_s``."""

    total_s: float
    first_s: float = 0.2
    most_s: float = 20.0

    def next_delay(self, attempt: int, elapsed_s: float, share: float) -> float | None:
        """Seconds to wait after attempt number ``attempt`` (from 0) has failed; None where the time is up.

        Full jitter: ``share``, drawn evenly from 0 to 1, of a pause that doubles (M. Brooker, "Exponential Backoff And Jitter",
        AWS Architecture Blog, 2015). The last pause is cut so that there is one more attempt just before the time is up.
        """
        left_s = self.total_s - elapsed_s
        if left_s <= 0:
            return None
        return min(share * min(self.most_s, self.first_s * 2.0 ** min(attempt, 60)), left_s)


PATIENCE = Patience(total_s=300.0)
"""Of an operation on a bucket."""


def call(
    action: Callable[[], T],
    *,
    what: str,
    where: str,
    patience: Patience = PATIENCE,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    draw: Callable[[], float] = random.random,
) -> T:
    """What ``action`` returns, called again after failures that pass.

    Raises ``Unreachable`` where they did not pass in time, ``SiteError`` where access is denied, ``IntegrityError`` where bytes
    differ from the checksum that came with them, time and again, and any other error as it is.
    ``what`` and ``where`` say for a person what was tried; neither holds a secret.
    """
    start, attempt = clock(), 0
    while True:
        try:
            return action()
        except Exception as error:
            kind = kind_of(error)
            if kind == "denied":
                raise SiteError(
                    f"cannot {what}: access is denied ({describe(error)})", where=where, hint=CREDENTIALS_HINT
                ) from None
            if kind == "corrupt" and attempt + 1 == _DAMAGED_ATTEMPTS:
                raise IntegrityError(
                    f"cannot {what}: the bytes differ from their checksum ({attempt + 1} reads)", where=where
                ) from None
            if kind != "corrupt" and kind not in PASSING:
                raise
            delay_s = patience.next_delay(attempt, clock() - start, draw())
            if delay_s is None:
                raise Unreachable(
                    f"cannot {what}: {describe(error)}, after {attempt + 1} attempts in {clock() - start:.0f} s",
                    where=where,
                    hint="check the network and the service; the same command goes on where this one stopped",
                ) from None
        attempt += 1
        sleep(delay_s)
