"""What trackers show of a record, under the same names in all of them; and which records a restart has made void."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from outgrow.contracts import StepRecord

_STEP_FIELDS = ("loss", "grad_norm", "learning_rate", "tokens_per_s", "step_s", "data_wait_s")
_STAGES = ("copy_s", "write_s", "commit_s")


def points_of(record: StepRecord) -> dict[str, float]:
    """Numbers by name, at the step of the record; none for a start."""
    return {name: value for name, value in _named(record) if value is not None and math.isfinite(value)}


def _named(record: StepRecord) -> Iterator[tuple[str, float | None]]:
    detail = record.detail
    if record.kind == "step":
        yield from ((f"train/{name}", getattr(record, name)) for name in _STEP_FIELDS)
        yield "train/tokens", float(record.tokens)
        yield from ((f"memory/{name}", value) for name, value in _numbers(detail.get("memory")))
    elif record.kind == "validation":
        yield "validation/loss", record.loss
        yield from ((f"validation/loss.{name}", value) for name, value in _numbers(detail.get("streams")))
    elif record.kind == "checkpoint" and not detail.get("error"):
        yield "checkpoint/bytes", detail.get("bytes")
        yield from ((f"checkpoint/{name}", detail.get(name)) for name in _STAGES)


def _numbers(values: Mapping[str, Any] | None) -> Iterator[tuple[str, float]]:
    return ((name, value) for name, value in (values or {}).items() if isinstance(value, int | float))


def samples_of(record: StepRecord) -> str:
    """What the model has written at a validation, as Markdown; empty where it was asked for nothing."""
    samples: Sequence[Mapping[str, str]] = record.detail.get("samples", ()) if record.kind == "validation" else ()
    return "\n\n".join(f"**{_inline(sample['prompt'])}**{_inline(_answer(sample))}" for sample in samples)


def _answer(sample: Mapping[str, str]) -> str:
    return f" ({sample['problem']})" if "problem" in sample else sample["text"]


def _inline(text: str) -> str:
    return text.replace("\n", "  \n")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested keys joined with dots; lists and what is no text as JSON."""
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return found


def furthest_kept(records: Iterable[StepRecord]) -> list[float]:
    """For each record the highest step that no later start has gone back behind: beyond it, what the record says is void."""
    starts = [float(record.step) if record.kind == "start" else math.inf for record in records]
    lowest, kept = math.inf, []
    for step in reversed(starts):
        kept.append(lowest)
        lowest = min(lowest, step)
    return kept[::-1]


def last_trained(records: Iterable[StepRecord], kept: Sequence[float]) -> Iterator[StepRecord]:
    """The records of a run without those of steps that were trained again later; ``kept`` is of the same records."""
    return (record for record, furthest in zip(records, kept, strict=False) if record.step <= furthest)
