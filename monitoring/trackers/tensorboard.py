"""TensorBoard's event files, written without TensorFlow and without torch.

A step that is trained again after a restart is shown once, as it was trained last: each start says from which step on what the
files said before is void, and TensorBoard's readers go by it.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import yaml

from outgrow.contracts import JsonDict, StepRecord
from outgrow.monitoring.trackers.points import points_of, samples_of


class TensorBoard:
    """One event file more in ``folder``; a run has one for each of its starts."""

    def __init__(self, folder: Path, recipe: JsonDict) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        self._events, self._summaries = event_pb2, summary_pb2
        self._recipe = recipe
        folder.mkdir(parents=True, exist_ok=True)
        # Readers take the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}.0"
        self._writer = RecordWriter(open(folder / name, "xb"))  # noqa: SIM115 (it is closed with the writer)
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

    def record(self, record: StepRecord) -> None:
        if record.kind == "start":
            begin = self._events.SessionLog(status=self._events.SessionLog.START)
            self._write(self._events.Event(wall_time=record.time, step=record.step + 1, session_log=begin))
            self._text(record, "recipe", f"```yaml\n{yaml.safe_dump(self._recipe, sort_keys=False, allow_unicode=True)}```")
        values = [
            self._summaries.Summary.Value(tag=tag, simple_value=value, metadata=self._of_plugin("scalars"))
            for tag, value in points_of(record).items()
        ]
        if values:
            self._summary(record, values)
        if samples := samples_of(record):
            self._text(record, "samples", samples)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _text(self, record: StepRecord, tag: str, text: str) -> None:
        from tensorboard.compat.proto import tensor_pb2, types_pb2

        tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[text.encode()])
        self._summary(record, [self._summaries.Summary.Value(tag=tag, tensor=tensor, metadata=self._of_plugin("text"))])

    def _summary(self, record: StepRecord, values: list[object]) -> None:
        summary = self._summaries.Summary(value=values)
        self._write(self._events.Event(wall_time=record.time, step=record.step, summary=summary))

    def _of_plugin(self, name: str) -> object:
        plugin = self._summaries.SummaryMetadata.PluginData(plugin_name=name)
        return self._summaries.SummaryMetadata(plugin_data=plugin)

    def _write(self, event: object) -> None:
        self._writer.write(event.SerializeToString())  # type: ignore[attr-defined]
