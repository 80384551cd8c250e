"""The one exception tree of outgrow.

    OutgrowError                  anything that outgrow itself says is wrong
    ├── UserError                 a mistake or a limit on the user's side; the command line exits with 2
    │   ├── RecipeError           recipe.yaml: every problem at once, each with file:line and key path
    │   ├── SiteError             site.yaml, likewise
    │   ├── DataError             sources, tokenizers, token stores, row indexes
    │   ├── ModelError            architectures, weight folders, tokenizers that do not belong to a model
    │   ├── PlanError             what cannot fit or start, refused before a device is touched
    │   ├── RunError              run folders: in use, changed recipe, nothing to resume
    │   ├── ClusterError          no cluster at the address, no token, no capacity
    │   └── MonitorError          Prometheus, Alertmanager, Grafana or the node agent cannot start or be asked
    ├── IntegrityError            bytes that differ from their digest; never trusted, never skipped in silence
    │   └── ShardError            a shard of the training rows that no place has whole
    ├── RestartError              a fault that a rank has dealt with: started again, the ranks go on without it
    └── TrainingError             the run itself failed: non-finite loss, a lost rank, a save that cannot finish

A message says what was given and what is allowed; ``where`` is a file, file:line or key path; ``hint`` is the nearest thing
that works. All three survive pickling, so an error may cross a process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with one key of a file: where (``file:line``), which key (``data.streams[0].name``), and what."""

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.message}" if self.key else f"{self.where}: {self.message}"


class OutgrowError(Exception):
    """Anything that outgrow itself says is wrong; ``str()`` is the whole message for a person."""

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        head = f"{self.where}: {self.message}" if self.where else self.message
        return f"{head}\n  {self.hint}" if self.hint else head

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.__dict__.copy()))


def _rebuild(kind: type[OutgrowError], message: str, state: dict[str, object]) -> OutgrowError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class UserError(OutgrowError):
    """A mistake or a limit on the user's side."""


class _FileError(UserError):
    """A configuration file with one or more problems, all shown at once."""

    def __init__(self, problems: Sequence[Problem] | str, *, where: str = "", hint: str = "") -> None:
        self.problems: tuple[Problem, ...] = () if isinstance(problems, str) else tuple(problems)
        text = problems if isinstance(problems, str) else "\n".join(str(p) for p in problems)
        super().__init__(text, where=where, hint=hint)


class RecipeError(_FileError):
    """recipe.yaml (or an override of it) is wrong."""


class SiteError(_FileError):
    """site.yaml is wrong, or names something that is not there."""


class DataError(UserError):
    """A source, tokenizer, token store or row index is wrong."""


class ModelError(UserError):
    """An architecture or a weight folder is wrong."""


class PlanError(UserError):
    """What was asked for cannot fit or start; the hint is the nearest thing that would."""


class RunError(UserError):
    """A run folder is in use, belongs to another recipe, or holds nothing to resume."""


class ClusterError(UserError):
    """The Ray cluster is missing, closed to us, or too small."""


class MonitorError(UserError):
    """Prometheus, Alertmanager, Grafana or the node agent cannot start or be asked."""


class IntegrityError(OutgrowError):
    """Bytes that were read back differ from their digest."""


class ShardError(IntegrityError):
    """Shard ``shard`` of the training split of stream ``stream``, which no place has whole."""

    def __init__(self, message: str, *, stream: str, shard: int, where: str = "", hint: str = "") -> None:
        super().__init__(message, where=where, hint=hint)
        self.stream = stream
        self.shard = shard


class RestartError(OutgrowError):
    """A fault that a rank has dealt with; the ranks go on once they are all started again, which is no failure of the run."""


class TrainingError(OutgrowError):
    """The run itself failed."""
