"""The restart policy and how a failure is told."""

from __future__ import annotations

import pickle

from outgrow.cluster.restarts import RankError, describe_failure, final_error
from outgrow.errors import DataError, TrainingError

BOOM = RankError("ValueError: boom", "Traceback ...\nValueError: boom")


def test_an_error_of_ours_ends_the_run_at_once() -> None:
    torn = DataError("row 7 is torn")
    assert final_error({1: torn, 0: BOOM}, (), before="") is torn


def test_of_several_errors_of_ours_that_of_the_lowest_rank_is_told() -> None:
    first, second = DataError("a"), DataError("b")
    assert final_error({3: second, 1: first}, (), before="") is first


def test_a_lost_process_is_no_fault_of_the_run_whatever_the_other_ranks_say() -> None:
    echo = TrainingError("connection closed by peer")
    assert final_error({0: echo, 1: RuntimeError("actor died")}, {1}, before="") is None


def test_a_lost_process_is_started_again_however_often_it_is_lost() -> None:
    errors = {1: RuntimeError("actor died")}
    assert final_error(errors, {1}, before=describe_failure(errors, {1})) is None


def test_another_error_is_tried_again_once() -> None:
    assert final_error({1: BOOM}, (), before="") is None
    error = final_error({1: BOOM}, (), before=describe_failure({1: BOOM}, ()))
    assert isinstance(error, TrainingError)
    assert error.message == "rank 1 failed twice with ValueError: boom\nTraceback ...\nValueError: boom"


def test_two_different_errors_are_no_bug_yet() -> None:
    before = describe_failure({0: RankError("RuntimeError: connection reset", "")}, ())
    assert final_error({1: BOOM}, (), before=before) is None


def test_a_failure_is_told_in_one_line() -> None:
    assert describe_failure({2: BOOM, 0: OSError("\n no route\nmore")}, ()) == "rank 0: no route; rank 2: ValueError: boom"
    assert describe_failure({2: BOOM, 0: BOOM}, {2, 0}) == "rank 0, 2 was lost"
    assert describe_failure({0: OSError()}, ()) == "rank 0: OSError"


def test_a_rank_error_crosses_a_process() -> None:
    again = pickle.loads(pickle.dumps(BOOM))
    assert (again.summary, again.traceback, str(again)) == (BOOM.summary, BOOM.traceback, "ValueError: boom")
