"""A file that is streamed to S3 in parts, each sent again until it arrives; it appears whole when closed, or not at all."""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, Self

from outgrow.errors import TrainingError

PART_BYTES = 32 << 20
NUM_PARALLEL = 4
"""Parts under way at once; as many more than one as hide the time between a part's end and its answer."""
_SMALL_PARTS = 5_000
"""Parts of ``PART_BYTES``; those after are larger, for S3 allows 10,000 a file."""


class Request(Protocol):
    """One S3 request for the object that is written: sent again after failures that pass, bounded in time."""

    def __call__(self, method: str, *, num_bytes: int = 0, **arguments: Any) -> Any: ...


class MultipartWriter:
    """A file open for writing. Left by an exception or discarded, nothing of it stays.

    Holds ``NUM_PARALLEL`` + 1 parts in memory at most. Not for several threads.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._buffer = bytearray()
        self._num_bytes = 0
        self._upload_id = ""
        self._pool: ThreadPoolExecutor | None = None
        self._parts: list[Future[str]] = []
        self._open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.discard()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Takes all of ``data``; waits where ``NUM_PARALLEL`` parts are under way. Raises what a part before it failed with."""
        if not self._open:
            raise ValueError("the file is closed")
        view = memoryview(data).cast("B")
        start = 0
        while start < len(view):
            taken = view[start : start + self._room() - len(self._buffer)]
            self._buffer += taken
            start += len(taken)
            if len(self._buffer) == self._room():
                self._send()
        self._num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Does nothing: parts go when they are full."""

    def close(self) -> None:
        """Make the file appear."""
        if not self._open:
            return
        try:
            if self._upload_id:
                self._complete()
            else:
                self._request("put_object", num_bytes=len(self._buffer), Body=bytes(self._buffer))
        except BaseException:
            self.discard()
            raise
        self._end()

    def discard(self) -> None:
        """Give up what was written."""
        if not self._open:
            return
        self._end()
        if self._upload_id:
            # Parts that stay behind are removed by the bucket's own rules; the error that led here is what counts.
            with contextlib.suppress(Exception):
                self._request("abort_multipart_upload", UploadId=self._upload_id)

    def _room(self) -> int:
        return PART_BYTES if len(self._parts) < _SMALL_PARTS else 8 * PART_BYTES

    def _send(self) -> None:
        if not self._upload_id:
            self._upload_id = self._request("create_multipart_upload")["UploadId"]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(NUM_PARALLEL, thread_name_prefix="upload")
        if len(self._parts) >= NUM_PARALLEL:
            self._parts[-NUM_PARALLEL].result()
        body, self._buffer = bytes(self._buffer), bytearray()
        self._parts.append(self._pool.submit(self._upload, len(self._parts) + 1, body))

    def _upload(self, number: int, body: bytes) -> str:
        sent = self._request("upload_part", num_bytes=len(body), UploadId=self._upload_id, PartNumber=number, Body=body)
        return str(sent["ETag"])

    def _complete(self) -> None:
        if self._buffer:
            self._send()
        parts = [{"PartNumber": number, "ETag": part.result()} for number, part in enumerate(self._parts, 1)]
        try:
            self._request("complete_multipart_upload", UploadId=self._upload_id, MultipartUpload={"Parts": parts})
        except FileNotFoundError:
            # Asked again after a lost answer, S3 no longer knows the upload: it is complete where the object is this one.
            head = self._request("head_object")
            if head["ContentLength"] != self._num_bytes or not head["ETag"].strip('"').endswith(f"-{len(parts)}"):
                raise TrainingError("the upload was ended by someone else before it was complete") from None

    def _end(self) -> None:
        self._open = False
        self._buffer = bytearray()
        if self._pool is not None:
            # Without waiting: where this ends a failure, parts under way may still be trying.
            self._pool.shutdown(wait=False, cancel_futures=True)
