"""Which failures pass, how long to go on, and what is said at the end."""

from __future__ import annotations

import errno
import pickle
import subprocess
import sys
from collections.abc import Callable

import botocore.exceptions as boto
import pytest
from fsspec.exceptions import FSTimeoutError
from hypothesis import given
from hypothesis import strategies as st
from s3fs.errors import translate_boto_error

from outgrow import retry
from outgrow.errors import IntegrityError, SiteError
from outgrow.retry import PASSING, Kind, Patience, Unreachable

SECRET = "wJalrXUtnFEMI"


def s3_error(status: int, code: str) -> boto.ClientError:
    response = {"Error": {"Code": code, "Message": f"no, {SECRET}"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return boto.ClientError(response, "GetObject")  # type: ignore[arg-type]


class HttpError(Exception):
    """As of gcsfs, which the tests do not need."""

    def __init__(self, code: int) -> None:
        self.code = code


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (s3_error(500, "InternalError"), "5xx"),
        (s3_error(502, "502"), "5xx"),
        (s3_error(503, "SlowDown"), "throttled"),
        (s3_error(429, "TooManyRequests"), "throttled"),
        (s3_error(200, "InternalError"), "5xx"),
        (s3_error(400, "RequestTimeout"), "timeout"),
        (s3_error(400, "ExpiredToken"), "denied"),
        (s3_error(403, "AccessDenied"), "denied"),
        (s3_error(404, "NoSuchKey"), "missing"),
        (s3_error(400, "InvalidArgument"), "other"),
        (s3_error(501, "NotImplemented"), "other"),
        (HttpError(503), "5xx"),
        (HttpError(401), "denied"),
        (OSError("Forbidden: https://storage.googleapis.com/b/x"), "denied"),
        (boto.EndpointConnectionError(endpoint_url="http://x"), "unreachable"),
        (boto.ConnectTimeoutError(endpoint_url="http://x"), "timeout"),
        (boto.ReadTimeoutError(endpoint_url="http://x"), "timeout"),
        (boto.ConnectionClosedError(endpoint_url="http://x"), "reset"),
        (boto.SSLError(endpoint_url="http://x", error="certificate"), "other"),
        (boto.NoCredentialsError(), "denied"),
        (boto.FlexibleChecksumError(error_msg="no"), "corrupt"),
        (FSTimeoutError(), "timeout"),
        (TimeoutError(), "timeout"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "reset"),
        (BrokenPipeError(errno.EPIPE, "pipe"), "reset"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), "unreachable"),
        (OSError(errno.ENETUNREACH, "network"), "unreachable"),
        (FileNotFoundError(errno.ENOENT, "none"), "missing"),
        (PermissionError(errno.EACCES, "no"), "denied"),
        (OSError(errno.ENOSPC, "full"), "disk_full"),
        (OSError(errno.EIO, "disk"), "io"),
        (ValueError("?"), "other"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{type(value).__name__}-{value}"[:40],
)
def test_an_error_is_told_by_its_type_status_or_errno(error: Exception, kind: Kind) -> None:
    assert retry.kind_of(error) == kind
    if isinstance(error, boto.ClientError):
        translated = translate_boto_error(error)
        assert retry.kind_of(translated) == kind


def test_what_is_said_of_an_error_repeats_no_text_of_a_server() -> None:
    assert retry.describe(s3_error(403, "AccessDenied")) == "403 AccessDenied"
    assert retry.describe(translate_boto_error(s3_error(503, "SlowDown"))) == "503 SlowDown"
    assert retry.describe(s3_error(404, "404")) == "404"
    assert retry.describe(s3_error(400, f"<{SECRET}>")) == "400"
    assert retry.describe(boto.EndpointConnectionError(endpoint_url=f"http://{SECRET}@x")) == "EndpointConnectionError"
    assert retry.describe(OSError(errno.EIO, "Input/output error", f"/{SECRET}")) == "Input/output error"


@given(attempt=st.integers(0, 10_000), elapsed_s=st.floats(0, 1000), share=st.floats(0, 1), total_s=st.floats(0, 900))
def test_a_pause_never_goes_past_the_time_that_is_left(attempt: int, elapsed_s: float, share: float, total_s: float) -> None:
    delay_s = Patience(total_s=total_s).next_delay(attempt, elapsed_s, share)
    if elapsed_s >= total_s:
        assert delay_s is None
    else:
        assert delay_s is not None and 0 <= delay_s <= min(total_s - elapsed_s, 20.0)


def test_pauses_double_up_to_the_longest() -> None:
    patience = Patience(total_s=1e6, first_s=0.5, most_s=10)
    assert [patience.next_delay(attempt, 0, 1.0) for attempt in range(7)] == [0.5, 1, 2, 4, 8, 10, 10]
    assert patience.next_delay(3, 0, 0.25) == 1


class Time:
    """A clock that sleeping moves, and an action that takes ``action_s`` and fails as listed, then returns "done"."""

    def __init__(self, *errors: Exception, action_s: float = 0.0) -> None:
        self.now = 1000.0
        self.errors = list(errors)
        self.action_s = action_s
        self.calls = 0

    def action(self) -> str:
        self.calls += 1
        self.now += self.action_s
        if self.errors:
            raise self.errors.pop(0)
        return "done"

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def call(self, patience: Patience, draw: Callable[[], float] = lambda: 1.0) -> str:
        return retry.call(
            self.action,
            what="read a/b",
            where="s3://bucket",
            patience=patience,
            clock=lambda: self.now,
            sleep=self.sleep,
            draw=draw,
        )


def test_failures_that_pass_are_passed_over() -> None:
    time = Time(s3_error(503, "SlowDown"), ConnectionResetError(), TimeoutError())
    assert time.call(Patience(total_s=60)) == "done"
    assert time.calls == 4 and time.now == pytest.approx(1000 + 0.2 + 0.4 + 0.8)


def test_what_does_not_pass_ends_in_bounded_time_with_a_plain_message() -> None:
    time = Time(*[boto.ReadTimeoutError(endpoint_url=f"http://{SECRET}@x")] * 1000, action_s=30)
    with pytest.raises(Unreachable) as caught:
        time.call(Patience(total_s=300))
    assert time.now <= 1000 + 300 + 30
    assert str(caught.value) == (
        f"s3://bucket: cannot read a/b: ReadTimeoutError, after {time.calls} attempts in {time.now - 1000:.0f} s\n"
        "  check the network and the service; the same command goes on where this one stopped"
    )
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), Unreachable)


def test_what_is_final_is_not_tried_again() -> None:
    for error in (FileNotFoundError("x"), OSError(errno.ENOSPC, "full"), s3_error(400, "InvalidArgument"), ValueError()):
        assert retry.kind_of(error) not in PASSING
        time = Time(error)
        with pytest.raises(type(error)):
            time.call(Patience(total_s=60))
        assert time.calls == 1 and time.now == 1000


def test_denied_access_says_where_credentials_are_set() -> None:
    time = Time(translate_boto_error(s3_error(403, "SignatureDoesNotMatch")))
    with pytest.raises(SiteError) as caught:
        time.call(Patience(total_s=60))
    assert time.calls == 1
    assert str(caught.value).startswith("s3://bucket: cannot read a/b: access is denied (403 SignatureDoesNotMatch)\n")
    assert "storage_options" in str(caught.value) and "${env:NAME}" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_bytes_that_stay_different_are_asked_for_three_times() -> None:
    time = Time(*[boto.FlexibleChecksumError(error_msg="no")] * 2)
    assert time.call(Patience(total_s=60)) == "done"
    time = Time(*[boto.FlexibleChecksumError(error_msg="no")] * 3)
    with pytest.raises(IntegrityError, match="cannot read a/b: the bytes differ from their checksum"):
        time.call(Patience(total_s=60))


def test_no_package_of_a_bucket_is_imported() -> None:
    code = "import outgrow.retry, sys; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not [name for name in ("fsspec", "botocore", "aiohttp", "s3fs", "google") if f"'{name}'" in loaded]
