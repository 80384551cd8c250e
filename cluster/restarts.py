"""The restart policy, pure: which failures of a worker group end the run, and how a failure is told in one line."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from outgrow.errors import OutgrowError, RestartError, TrainingError

MAX_RESTARTS = 3
"""Restarts of a worker group after a failure in one ``outgrow train``; the same command resumes after the last. Those that a
rank asks for (``RestartError``) are not counted."""


class RankError(Exception):
    """An error on a rank that is none of outgrow's own: as text, so that it crosses processes whatever its type was."""

    def __init__(self, summary: str, traceback: str) -> None:
        super().__init__(summary, traceback)
        self.summary = summary
        self.traceback = traceback

    def __str__(self) -> str:
        return self.summary


def final_error(errors: Mapping[int, BaseException], lost_ranks: Collection[int], before: str) -> OutgrowError | None:
    """The error that another start would only repeat, or None where the group should start again.

    ``errors`` are those of the ranks that failed, ``lost_ranks`` those whose process is gone, ``before`` is the
    ``describe_failure`` of the start before, or empty. What outgrow itself says is wrong (a missing dataset, a non-finite loss)
    stays wrong, but for a ``RestartError``, and what fails twice in the same way is a bug. Where a process was lost, the other
    ranks' errors are its echo.
    """
    if lost_ranks:
        return None
    for _, error in sorted(errors.items()):
        if isinstance(error, OutgrowError) and not isinstance(error, RestartError):
            return error
    if describe_failure(errors, lost_ranks) != before:
        return None
    rank, error = min(errors.items(), key=lambda item: item[0])
    text = error.traceback if isinstance(error, RankError) else ""
    return TrainingError(f"rank {rank} failed twice with {error}\n{text}".rstrip())


def is_asked_for(errors: Mapping[int, BaseException], lost_ranks: Collection[int]) -> bool:
    """Whether a rank has dealt with what stopped it and asks for the start that follows."""
    return not lost_ranks and any(isinstance(error, RestartError) for error in errors.values())


def describe_failure(errors: Mapping[int, BaseException], lost_ranks: Collection[int]) -> str:
    """One line for a person: the ranks that were lost, else those that ask for a restart, else all, with the first line of the
    error of each; ranks that say the same are told together."""
    if lost_ranks:
        return f"rank {_listed(lost_ranks)} was lost"
    asking = {rank: error for rank, error in errors.items() if isinstance(error, RestartError)}
    ranks: dict[str, list[int]] = {}
    for rank, error in sorted((asking or errors).items()):
        ranks.setdefault(first_line(error), []).append(rank)
    return "; ".join(f"rank {_listed(own)}: {line}" for line, own in ranks.items())


def _listed(ranks: Collection[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
