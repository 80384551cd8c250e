"""What makes each alert fire and what must leave it silent: series as promtool writes them, one sample a minute from time 0.

``1+2x3`` are 1, 3, 5, 7; ``1x3`` four times 1; ``_`` no sample; ``stale`` the end of a series. Beside each run stand others, so
that a wrong label shows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

A, B = 'run="a"', 'run="b"'
N, M = 'node="n"', 'node="m"'


@dataclass(frozen=True, kw_only=True)
class Case:
    """At the time ``at`` the alert fires for just these labels: none is silence."""

    alert: str
    what: str
    series: dict[str, str]
    at: str
    fires: tuple[str, ...] = field(default=())

    @property
    def labels(self) -> list[dict[str, str]]:
        return [dict(re.findall(r'(\w+)="([^"]*)"', text)) for text in self.fires]


def case(alert: str, what: str, series: dict[str, str], at: str, *fires: str) -> Case:
    return Case(alert=f"Outgrow{alert}", what=what, series=series, at=at, fires=fires)


def state(run: str, node: str, **values: str) -> dict[str, str]:
    return {f'outgrow_run_state{{{run},{node},state="{name}"}}': value for name, value in values.items()}


def last_step(run: str, node: str, values: str) -> dict[str, str]:
    return {f"outgrow_run_last_step_timestamp_seconds{{{run},{node}}}": values}


STALLED = (
    case(
        "Stalled",
        "a run whose steps stand still, beside one that goes on",
        state(A, N, running="1x4 0x9", stalled="0x4 1x9") | state(B, N, running="1x14", stalled="0x14"),
        "10m",
        f"{A},{N}",
    ),
    case(
        "Stalled",
        "start, checkpoint and validation take long: the agent does not call that stalled",
        state(A, N, starting="1x60", stalled="0x60") | last_step(A, N, "0x60"),
        "50m",
    ),
)

FAILED = (
    case(
        "Failed",
        "one run failed, another is being started again",
        state(A, N, running="1x9 0x9", failed="0x9 1x9") | state(B, N, running="1x9 0x9", restarting="0x9 1x9", failed="0x19"),
        "12m",
        f"{A},{N}",
    ),
    case("Failed", "it was resumed", state(A, N, failed="1x9 0x9", running="0x9 1x9"), "12m"),
)

_ON_ANOTHER = {
    series: values
    for word in ("starting", "running", "stalled", "restarting")
    for series, values in (state(f'run="{word}"', N, lost="1x20") | state(f'run="{word}"', M, **{word: "1x20"})).items()
}
LOST = (
    case(
        "Lost",
        "the driver is gone, another run goes on",
        state(A, N, running="1x9 0x20", lost="0x9 1x20")
        | state(B, N, running="1x30", lost="0x30")
        | last_step(B, N, "0+60x30"),
        "20m",
        f"{A},{N}",
    ),
    case("Lost", "three minutes are not over", state(A, N, lost="0x9 1x20"), "12m"),
    case("Lost", "its agent has ended too", state(A, N, lost="1x20 stale"), "30m", f"{A},{N}"),
    case("Lost", "started again", state(A, N, running="1x9 0 1x20", lost="0x9 1 0x20"), "20m"),
    case("Lost", "active on another node, before the first step there", _ON_ANOTHER, "15m"),
    case(
        "Lost",
        "moved, finished there, and gone from both; another run lost on the node that it left",
        state(A, N, lost="1x20 stale")
        | last_step(A, N, "100x20 stale")
        | last_step(A, M, "2000x20 stale")
        | state(B, N, lost="1x20 stale")
        | last_step(B, N, "50x20 stale"),
        "40m",
        f"{B},{N}",
    ),
    case(
        "Lost",
        "moved, and lost there as well",
        state(A, N, lost="1x60") | last_step(A, N, "100x60") | state(A, M, lost="0x9 1x50") | last_step(A, M, "500x60"),
        "30m",
        f"{A},{M}",
    ),
)

_NONFINITE = "outgrow_run_nonfinite_steps_total"
NONFINITE = (
    case(
        "NonFinite",
        "one more than before",
        {f"{_NONFINITE}{{{A},{N}}}": "0x119 1x60", f"{_NONFINITE}{{{B},{N}}}": "0x180"},
        "150m",
        A,
    ),
    case(
        "NonFinite",
        "the first step of a run, before the first scrape; its agent has ended since",
        {f"{_NONFINITE}{{{A},{N}}}": "_x119 1x15 stale", f"{_NONFINITE}{{{B},{N}}}": "0x180"},
        "160m",
        A,
    ),
    case(
        "NonFinite",
        "resumed on another node with the count of old",
        {f"{_NONFINITE}{{{A},{N}}}": "1x30 stale", f"{_NONFINITE}{{{A},{M}}}": "_x179 1x30"},
        "200m",
    ),
    case("NonFinite", "all is well", {f"{_NONFINITE}{{{A},{N}}}": "0x180"}, "150m"),
)

_NOISE = " ".join(["2 3"] * 60)
_NAN = " ".join(["NaN"] * 20)
_LOSS = f"outgrow_run_loss{{{A},{N}}}"
LOSS_SPIKE = (
    case(
        "LossSpike",
        "a jump above the noise",
        {_LOSS: f"{_NOISE} 4x20", f"outgrow_run_loss{{{B},{N}}}": "5x140"},
        "128m",
        f"{A},{N}",
    ),
    case("LossSpike", "two minutes are not over", {_LOSS: f"{_NOISE} 4x20"}, "121m"),
    case("LossSpike", "noise alone", {_LOSS: f"{_NOISE} {_NOISE}"}, "131m"),
    case("LossSpike", "as high as an hour ago, after lower ones", {_LOSS: "3x59 2x54 3x30"}, "122m"),
    case("LossSpike", "no number at all is another alert's", {_LOSS: f"{_NOISE} {_NAN}"}, "130m"),
)


def phases(run: str, node: str, rank: int, **a_minute: str) -> dict[str, str]:
    """Counters of a rank's phases, each growing by so many seconds a minute."""
    labels = f'{run},{node},rank="{rank}"'
    return {f'outgrow_rank_phase_seconds_total{{{labels},phase="{name}"}}': f"0+{grows}x60" for name, grows in a_minute.items()}


_STILL = {name: "300x60" for name in phases(A, N, 0, data_wait="", forward="")}
DATA_STARVED = (
    case(
        "DataStarved",
        "one of two ranks waits a fifth of its time",
        phases(A, N, 0, data_wait="12", forward="48")
        | phases(A, M, 1, data_wait="1", forward="59")
        | phases(B, N, 0, data_wait="1", forward="59"),
        "15m",
        A,
    ),
    case("DataStarved", "five minutes are not over", phases(A, N, 0, data_wait="12", forward="48"), "5m"),
    case("DataStarved", "a twentieth is well", phases(A, N, 0, data_wait="3", forward="57"), "15m"),
    case("DataStarved", "nothing moves: the quotient is NaN, and the state says stalled", _STILL, "15m"),
)


def cache(run: str, fetches: str, refetches: str) -> dict[str, str]:
    return {
        f"outgrow_cache_fetches_total{{{run},{N}}}": f"0+{fetches}x60",
        f"outgrow_cache_refetches_total{{{run},{N}}}": f"0+{refetches}x60",
    }


CACHE_THRASH = (
    case("CacheThrash", "half of the copies again", cache(A, "10", "5") | cache(B, "10", "1"), "30m", f"{A},{N}"),
    case("CacheThrash", "ten minutes are not over", cache(A, "10", "5"), "10m"),
    case("CacheThrash", "a tenth is well", cache(A, "10", "1"), "30m"),
    case("CacheThrash", "so few that their share says nothing", cache(A, "0.5", "0.4"), "30m"),
    case("CacheThrash", "no copies at all", cache(A, "0", "0"), "30m"),
)


def tier(name: str, size: str, free: str) -> dict[str, str]:
    labels = f'{N},tier="{name}"'
    return {f"outgrow_tier_size_bytes{{{labels}}}": f"{size}x60", f"outgrow_tier_free_bytes{{{labels}}}": f"{free}x60"}


TIERS = (
    case(
        "TierNearlyFull",
        "4 of 100 GB, beside a tier with room",
        tier("nvme", "100e9", "4e9") | tier("hdd", "100e9", "50e9"),
        "10m",
        f'{N},tier="nvme"',
    ),
    case("TierNearlyFull", "five minutes are not over", tier("nvme", "100e9", "4e9"), "4m"),
    case("TierNearlyFull", "8 of 100 GB", tier("nvme", "100e9", "8e9"), "10m"),
    case("TierNearlyFull", "a small share of a large disk, with room for the reserve", tier("hdd", "1000e9", "40e9"), "10m"),
    case(
        "DiskFull",
        "1 GB, beside a tier with room",
        tier("nvme", "100e9", "1e9") | tier("hdd", "100e9", "50e9"),
        "5m",
        f'{N},tier="nvme"',
    ),
    case("DiskFull", "two minutes are not over", tier("nvme", "100e9", "1e9"), "1m"),
    case("DiskFull", "5 GB", tier("nvme", "100e9", "5e9"), "5m"),
)


def saved(
    run: str, node: str, *, interval: str, start: str = "0x120", commit: str = "", running: str = "1x120"
) -> dict[str, str]:
    found = {
        f"outgrow_run_checkpoint_interval_seconds{{{run},{node}}}": interval,
        f"outgrow_run_attempt_start_time_seconds{{{run},{node}}}": start,
    } | state(run, node, running=running, starting="0x120")
    commits = {f"outgrow_run_checkpoint_last_success_timestamp_seconds{{{run},{node}}}": commit}
    return found | (commits if commit else {})


_FRESH = saved(B, N, interval="300x120", commit="0+60x120") | saved(A, M, interval="300x120", commit="0+60x120")
"""Another run on the node, and the run on another node, both with a checkpoint each minute."""
TOO_OLD = (
    case(
        "CheckpointTooOld",
        "19 minutes at an interval of 5",
        saved(A, N, interval="300x120", commit="_ 60x120") | _FRESH,
        "20m",
        f"{A},{N}",
    ),
    case("CheckpointTooOld", "none at all since the start", saved(A, N, interval="300x120"), "20m", f"{A},{N}"),
    case("CheckpointTooOld", "12 minutes at an interval of 5", saved(A, N, interval="300x120", commit="_ 60x120"), "13m"),
    case("CheckpointTooOld", "6 minutes at an interval of 1", saved(A, N, interval="60x120", commit="400x120"), "13m"),
    case(
        "CheckpointTooOld",
        "resumed 9 minutes ago from a checkpoint of old",
        saved(A, N, interval="60x120", start="3600x120", commit="100x120"),
        "69m",
    ),
    case(
        "CheckpointTooOld",
        "half an hour of starting, then steps for a few minutes; others make steps",
        saved(A, N, interval="60x120", running="0x30 1x60") | _FRESH,
        "36m",
    ),
    case("CheckpointTooOld", "two minutes are not over", saved(A, N, interval="300x120"), "17m"),
    case("CheckpointTooOld", "stalled is another alert's", saved(A, N, interval="300x120", running="0x120"), "20m"),
)

_CHECKPOINTS = "outgrow_run_checkpoints_total"
FAILING = (
    case(
        "CheckpointFailing",
        "one failed, those of another run did not",
        {
            f'{_CHECKPOINTS}{{{A},{N},result="failed"}}': "0x9 1x60",
            f'{_CHECKPOINTS}{{{A},{N},result="committed"}}': "0+1x60",
            f'{_CHECKPOINTS}{{{B},{N},result="failed"}}': "0x60",
            f'{_CHECKPOINTS}{{{B},{N},result="committed"}}': "0+1x60",
        },
        "30m",
        A,
    ),
    case(
        "CheckpointFailing",
        "one failed long ago",
        {f'{_CHECKPOINTS}{{{A},{N},result="failed"}}': "0 1x120", f'{_CHECKPOINTS}{{{A},{N},result="committed"}}': "0+1x120"},
        "90m",
    ),
)


def throttled(reason: str, values: str) -> dict[str, str]:
    return {f'outgrow_gpu_throttled{{{N},gpu="0",reason="{reason}"}}': values}


THROTTLED = (
    case(
        "Throttled",
        "held down for each reason that is none of load",
        throttled("thermal", "1x60") | throttled("hardware", "1x60") | throttled("brake", "1x60"),
        "15m",
        *(f'{N},gpu="0",reason="{reason}"' for reason in ("thermal", "hardware", "brake")),
    ),
    case(
        "Throttled",
        "two minutes of three",
        throttled("thermal", " ".join(["1 1 0"] * 20)),
        "20m",
        f'{N},gpu="0",reason="thermal"',
    ),
    case("Throttled", "five minutes are not over", throttled("thermal", "1x60"), "4m"),
    case(
        "Throttled",
        "at the power limit, and in step with others",
        throttled("power", "1x60") | throttled("sync", "1x60"),
        "15m",
    ),
    case("Throttled", "now and then", throttled("thermal", " ".join(["0 0 0 0 1"] * 12)), "30m"),
)


def ranks(run: str, *each: dict[str, str]) -> dict[str, str]:
    """Four ranks; ``each`` gives the seconds a minute of a rank's phases, the last for all that are left."""
    found = {}
    for rank in range(4):
        found |= phases(run, N if rank < 2 else M, rank, **each[min(rank, len(each) - 1)])
    return found


_EVEN = ranks(B, {"data_wait": "18", "optimizer": "4", "forward": "38"})
STRAGGLER = (
    case(
        "Straggler",
        "one waits for data three times as long, beside a run where all do",
        ranks(A, {"data_wait": "12", "forward": "44"}, {"data_wait": "1", "optimizer": "3", "forward": "56"}) | _EVEN,
        "15m",
        f'{A},{N},rank="0"',
    ),
    case(
        "Straggler",
        "one has a slow optimizer",
        ranks(A, {"data_wait": "1", "optimizer": "12", "forward": "44"}, {"data_wait": "1", "optimizer": "3", "forward": "56"}),
        "15m",
        f'{A},{N},rank="0"',
    ),
    case(
        "Straggler",
        "five minutes are not over",
        ranks(A, {"data_wait": "12", "forward": "44"}, {"data_wait": "1", "optimizer": "3", "forward": "56"}),
        "5m",
    ),
    case("Straggler", "one is faster than the others", ranks(A, {"optimizer": "6"}, {"optimizer": "9.6"}), "15m"),
    case("Straggler", "all wait for data alike", ranks(A, {"data_wait": "12", "optimizer": "1"}), "15m"),
    case("Straggler", "all have a slow optimizer", ranks(A, {"data_wait": "1", "optimizer": "12"}), "15m"),
    case("Straggler", "four times the median of next to nothing", ranks(A, {"optimizer": "2.4"}, {"optimizer": "0.6"}), "15m"),
    case("Straggler", "nothing moves", dict.fromkeys(ranks(A, {"optimizer": "0"}), "300x60"), "15m"),
)


def node(name: str, agent: str, **up: str) -> dict[str, str]:
    """A node's agent, and one rank of the runs ``up``, as long as samples come."""
    found = {f'outgrow_agent_start_time_seconds{{node="{name}"}}': agent}
    return found | {f'outgrow_rank_up{{run="{run}",node="{name}",rank="0"}}': values for run, values in up.items()}


def active(run: str, values: str) -> dict[str, str]:
    return {f'outgrow_run_active{{{run},node="m"}}': values}


AGENT_DOWN = (
    case(
        "AgentDown",
        "the node of one rank is gone, that of the other is there",
        node("n", "5x10 stale", a="1x10 stale") | node("m", "5x60", a="1x60") | active(A, "1x60"),
        "15m",
        f"{A},{N}",
    ),
    case("AgentDown", "two minutes are not over", node("n", "5x10 stale", a="1x10 stale") | active(A, "1x60"), "14m"),
    case(
        "AgentDown",
        "the only node is gone, and with it all series",
        node("m", "5x10 stale", a="1x10 stale") | active(A, "1x10 stale"),
        "25m",
        f"{A},{M}",
    ),
    case(
        "AgentDown",
        "a node dies, the rank a scrape before its agent",
        node("n", "5x10 stale", a="1x9 0 stale") | active(A, "1x60"),
        "15m",
        f"{A},{N}",
    ),
    case("AgentDown", "some answers missed", node("n", "5x4 stale _ _ 5x60", a="1x4 stale _ _ 1x60") | active(A, "1x60"), "7m"),
    case(
        "AgentDown",
        "lost, and its agent has ended by itself 20 minutes later",
        node("m", "5x25 stale", a="1x5 0x20 stale") | active(A, "1x25 stale"),
        "30m",
    ),
    case("AgentDown", "an idle agent has ended by itself", node("n", "5x25 stale"), "30m"),
    case(
        "AgentDown",
        "finished, and the rented node given back at once; another run goes on",
        node("n", "5x10 stale", a="1x10 stale") | active(A, "1x10 0x5 stale") | node("k", "5x60", b="1x60") | active(B, "1x60"),
        "20m",
    ),
)


def xid(number: int, values: str, *, node: str = "n", gpu: int = 0) -> dict[str, str]:
    return {f'outgrow_gpu_xid_errors_total{{node="{node}",gpu="{gpu}",xid="{number}"}}': values}


_OLD = xid(79, "1x120", node="m") | xid(79, "1x120", gpu=1) | xid(48, "1x120")
"""Errors of long ago: of another node, card and number."""
XID = (
    case(
        "XidError",
        "the first of its number, beside some of long ago",
        xid(79, "_x89 1x30") | _OLD,
        "100m",
        'node="n",gpu="0",xid="79"',
    ),
    case("XidError", "one more", xid(79, "1x89 2x30") | _OLD, "100m", 'node="n",gpu="0",xid="79"'),
    case("XidError", "what follows a kill", xid(43, "_x89 1x30") | xid(45, "_x89 1x30"), "100m"),
    case("XidError", "what follows another kill", xid(43, "1x89 2x30") | xid(45, "1x89 2x30"), "100m"),
    case("XidError", "long ago", xid(79, "1x120"), "100m"),
)

CASES = (
    *STALLED,
    *FAILED,
    *LOST,
    *NONFINITE,
    *LOSS_SPIKE,
    *DATA_STARVED,
    *CACHE_THRASH,
    *TIERS,
    *TOO_OLD,
    *FAILING,
    *THROTTLED,
    *STRAGGLER,
    *AGENT_DOWN,
    *XID,
)
