"""The restart policy and how a failure is told."""

from __future__ import annotations

import pickle
from unittest.mock import MagicMock

import pytest

from outgrow.cluster.restarts import MAX_RESTARTS, RankError, describe_failure, final_error, is_asked_for
from outgrow.errors import DataError, RestartError, TrainingError

BOOM = RankError("ValueError: boom", "Traceback ...\nValueError: boom")
GIVEN_UP = RestartError("shard 3 is given up", where="runs/r")


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


def test_a_rank_that_has_dealt_with_what_stopped_it_is_started_again() -> None:
    errors = {0: BOOM, 1: GIVEN_UP}
    assert final_error(errors, (), before="") is None
    assert is_asked_for(errors, ())
    assert describe_failure(errors, ()) == "rank 1: runs/r: shard 3 is given up", "the other ranks' errors are its echo"
    assert not is_asked_for({0: BOOM}, ())
    assert not is_asked_for(errors, {0}), "where a process was lost too, it counts"


def test_a_rank_that_asks_again_for_the_same_has_not_dealt_with_it() -> None:
    error = final_error({1: GIVEN_UP}, (), before=describe_failure({1: GIVEN_UP}, ()))
    assert isinstance(error, TrainingError)
    assert final_error({1: RestartError("shard 4 is given up")}, (), before=describe_failure({1: GIVEN_UP}, ())) is None


def test_an_error_that_stays_ends_the_run_whoever_asks_for_a_restart() -> None:
    full = DataError("too many shards are lost")
    assert final_error({0: GIVEN_UP, 1: full}, (), before="") is full


def test_a_failure_is_told_in_one_line() -> None:
    assert describe_failure({2: BOOM, 0: OSError("\n no route\nmore")}, ()) == "rank 0: no route; rank 2: ValueError: boom"
    assert describe_failure({2: BOOM, 0: BOOM}, {2, 0}) == "rank 0, 2 was lost"
    assert describe_failure({0: OSError()}, ()) == "rank 0: OSError"
    assert describe_failure({1: BOOM, 2: OSError("no route"), 0: BOOM}, ()) == "rank 0, 1: ValueError: boom; rank 2: no route"


def test_under_ray_failures_are_counted_and_what_a_rank_asks_for_is_not() -> None:
    from outgrow.cluster.ray_hooks import FinalErrors

    progress = MagicMock()
    policy = FinalErrors(progress)
    for shard in range(5):
        policy.after_exception(None, {1: RestartError(f"shard {shard} is given up")})
    for failure in range(MAX_RESTARTS):
        policy.after_exception(None, {0: RankError(f"OSError: {failure}", "")})
    with pytest.raises(TrainingError, match=r"the run failed 4 times; the last time: rank 0: OSError: again"):
        policy.after_exception(None, {0: RankError("OSError: again", "")})
    said = [call.args for call in progress.say.remote.call_args_list]
    assert [kind for kind, _ in said] == ["restart"] * 5 + ["failure"] * 4
    assert said[0] == ("restart", "rank 1: shard 0 is given up")


def test_a_rank_error_crosses_a_process() -> None:
    again = pickle.loads(pickle.dumps(BOOM))
    assert (again.summary, again.traceback, str(again)) == (BOOM.summary, BOOM.traceback, "ValueError: boom")
