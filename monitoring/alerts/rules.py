"""Every alert: when it fires, how bad that is, and what to do. Declared once; the rule file and docs/alerts.md are made of it.

Traps that shape the expressions: a quotient of rates of a run that stands still is NaN and fires nothing, so standing still is
told by the agent's state; series vanish with their source, so what was lost is remembered with ``last_over_time``; a counter
that appears with its first error has not grown, so one that is new and not zero counts too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Severity: TypeAlias = Literal["critical", "warning"]


@dataclass(frozen=True, kw_only=True)
class Alert:
    """One alert. ``expr`` is PromQL that yields a series with the ``labels`` for each thing that is wrong; Prometheus waits
    ``for_`` before it fires. ``summary`` names the thing in a line, ``description`` says what it means, ``runbook``, in
    Markdown, how to see it and what to do; ``dashboard`` is the uid of the one to look at."""

    name: str
    expr: str
    for_: str
    severity: Severity
    labels: tuple[str, ...]
    dashboard: str
    summary: str
    description: str
    runbook: str

    @property
    def anchor(self) -> str:
        """Where its text is in docs/alerts.md."""
        return self.name.lower()


def _line(expression: str) -> str:
    """The expression without its layout."""
    return " ".join(expression.split()).replace("( ", "(").replace(" )", ")")


_ACTIVE = "starting|running|stalled|restarting"
_OWN_WORK = '(rate(outgrow_rank_phase_seconds_total{phase=~"data_wait|optimizer"}[5m]))'

ALERTS = (
    Alert(
        name="OutgrowStalled",
        # Of the agent's state alone, which knows starting, checkpoints and validation from steps.
        expr='max by (run, node) (outgrow_run_state{state="stalled"}) == 1',
        for_="0s",
        severity="critical",
        labels=("run", "node"),
        dashboard="outgrow-ranks",
        summary="{{ $labels.run }} has stopped making steps",
        description="A step of {{ $labels.run }} has been open for longer than monitoring.stall_after_s of the site and five "
        "times the median step, or something between steps for ten minutes. Its processes are there.",
        runbook="""\
**See it.** `outgrow top RUN` and the dashboard *Ranks* say who is behind. The agent of that node has written the stacks of
all its ranks to `stalls/` in its folder, and so have the ranks.

**Do.** All ranks in a collective but one: that one holds the others up; look at its stack and at its node. All ranks waiting
for data: the source hangs, see *Data tiers*. A rank in state `T` (`ps`) was stopped by somebody: `kill -CONT` it. A call of
the driver that does not return: see [OutgrowXidError](#outgrowxiderror) and `dmesg`. Where nothing helps, end the command
with Ctrl-C and give it again: it goes on from the last checkpoint.""",
    ),
    Alert(
        name="OutgrowLost",
        # A killed rank is there again within two minutes, a dead node's too: three are awaited. A node that a run has left
        # calls it lost for good, so not while another says that it is active, nor where another has finished later steps.
        expr=_line(
            f"""
            max by (run, node) (last_over_time(outgrow_run_state{{state="lost"}}[6h])) == 1
            unless on (run) (outgrow_run_state{{state=~"{_ACTIVE}"}} == 1)
            unless on (run, node) (
              max by (run, node) (last_over_time(outgrow_run_last_step_timestamp_seconds[6h]))
              < on (run) group_left () max by (run) (last_over_time(outgrow_run_last_step_timestamp_seconds[6h]))
            )
            """
        ),
        for_="3m",
        severity="critical",
        labels=("run", "node"),
        dashboard="outgrow-run",
        summary="{{ $labels.run }} is gone without a word",
        description="Processes of {{ $labels.run }} on {{ $labels.node }} have ended without saying so: killed, out of "
        "memory, or their driver gone. Nothing has started them again for three minutes.",
        runbook="""\
**See it.** `dmesg -T | grep -i 'killed process'` on that node: it is mostly the kernel, for want of memory. `outgrow runs
show RUN` knows the last step and the last checkpoint.

**Do.** Give the same command again: it goes on from the last checkpoint. Killed for memory: fewer `data.loader_workers` or a
smaller batch of a rank; `outgrow plan` shows what is needed. The alert is kept for six hours where the agent has ended too,
and ends as soon as the run is active again; silence it in Alertmanager where the run is not to go on.""",
    ),
    Alert(
        name="OutgrowFailed",
        expr='max by (run, node) (outgrow_run_state{state="failed"}) == 1',
        for_="0s",
        severity="critical",
        labels=("run", "node"),
        dashboard="outgrow-run",
        summary="{{ $labels.run }} has ended with an error",
        description="{{ $labels.run }} stopped with an error of outgrow's own, which another start would only meet again. "
        "Other errors, and lost ranks, start it again by themselves and do not come here.",
        runbook="""\
**See it.** The last lines of the terminal, or of `ray job logs`, say what was wrong and what would help.

**Do.** As it says there; then give the same command again: it goes on from the last checkpoint. The alert ends when the run
lives, or an hour later.""",
    ),
    Alert(
        name="OutgrowNonFinite",
        # Such a step ends the run, maybe before it was ever scraped.
        expr=_line(
            """
            sum by (run) (increase(outgrow_run_nonfinite_steps_total[1h])) > 0
            or (
              max by (run) (last_over_time(outgrow_run_nonfinite_steps_total[1h])) > 0
              unless on (run) max by (run) (last_over_time(outgrow_run_nonfinite_steps_total[1w] offset 1h))
            )
            """
        ),
        for_="0s",
        severity="critical",
        labels=("run",),
        dashboard="outgrow-run",
        summary="{{ $labels.run }}: loss or gradient is not finite",
        description="In the last hour a step of {{ $labels.run }} had a loss or a gradient that was infinite or no number. "
        "Nothing is saved from such a step on, and the run stops.",
        runbook="""\
**See it.** Dashboard *Run*: loss and gradient norm before it. A norm that grew over many steps is a divergence; a jump out of
nothing is a bad row, a bad card or a bug.

**Do.** Diverged: a new run from an earlier checkpoint with a lower learning rate or a longer warm-up. Out of nothing: give
the command again; it computes the same step on the same rows. It fails at the same step: look at the rows (`outgrow data
inspect`). It does not: suspect the card, see [OutgrowXidError](#outgrowxiderror).""",
    ),
    Alert(
        name="OutgrowLossSpike",
        # Above what noise reaches, and of the time before: a spike would soon raise its own limit.
        expr=_line(
            """
            max by (run, node) (outgrow_run_loss)
            > 1.1 * max by (run, node) (quantile_over_time(0.95, outgrow_run_loss[1h] offset 10m))
            """
        ),
        for_="2m",
        severity="warning",
        labels=("run", "node"),
        dashboard="outgrow-run",
        summary="The loss of {{ $labels.run }} has jumped",
        description="For two minutes the training loss of {{ $labels.run }} has been more than 10% above nearly all (95%) of "
        "the hour that ended ten minutes ago.",
        runbook="""\
**See it.** Dashboard *Run*: loss and gradient norm. A spike that comes down within some hundred steps is common with large
models and does no harm.

**Do.** It stays up, or the norm keeps growing: stop, and go on from a checkpoint before it with a lower learning rate. It
came with a change of data (another stream, a new epoch): look at the rows. The alert ends by itself some ten minutes after
the jump, when the loss before it is no longer the measure.""",
    ),
    Alert(
        name="OutgrowDataStarved",
        # Of the worst rank: the others wait for it in their forward and backward passes.
        expr=_line(
            """
            max by (run) (
              sum by (run, node, rank) (rate(outgrow_rank_phase_seconds_total{phase="data_wait"}[5m]))
              / sum by (run, node, rank) (rate(outgrow_rank_phase_seconds_total[5m]))
            ) > 0.1
            """
        ),
        for_="5m",
        severity="warning",
        labels=("run",),
        dashboard="outgrow-tiers",
        summary="{{ $labels.run }} waits for data {{ $value | humanizePercentage }} of its time",
        description="A rank of {{ $labels.run }} has spent more than a tenth of the last minutes waiting for its next rows.",
        runbook="""\
**See it.** Dashboard *Data tiers*: which tier is read, and how fast. *Ranks*: whether it is one rank (its node) or all (the
source).

**Do.** Steps ready ahead at 0 and idle cores: more `data.loader_workers`. A slow tier: `outgrow data place` puts the dataset
on a faster one, `outgrow data simulate` says how large the first tier should be. Others use the disk or line: `limit` of a
tier keeps copies of outgrow from them, not them from you.""",
    ),
    Alert(
        name="OutgrowCacheThrash",
        expr=_line(
            """
            sum by (run, node) (rate(outgrow_cache_refetches_total[10m]))
            / sum by (run, node) (rate(outgrow_cache_fetches_total[10m])) > 0.3
            and sum by (run, node) (increase(outgrow_cache_fetches_total[10m])) > 10
            """
        ),
        for_="10m",
        severity="warning",
        labels=("run", "node"),
        dashboard="outgrow-tiers",
        summary="{{ $labels.run }} fetches the same shards again and again",
        description="{{ $value | humanizePercentage }} of the shards that {{ $labels.run }} copied to the first tier of "
        "{{ $labels.node }} had been there before and were deleted to make room. More than 30% is thrashing.",
        runbook="""\
**See it.** Dashboard *Data tiers*: refetches beside fetches, and whether anybody waits. From the second epoch on some are
normal.

**Do.** `outgrow data simulate RECIPE` shows fetches by size of the cache and about the least that is enough; give the first
tier that much (`capacity`, `reserve` in site.yaml), or lower `data.window_shards`. Nobody waits, and reading costs nothing:
silence it.""",
    ),
    Alert(
        name="OutgrowTierNearlyFull",
        # A tier is meant to be filled but for its reserve, 10 GB unless the site says otherwise: a share alone would cry wolf.
        expr=_line(
            """
            min by (node, tier) (outgrow_tier_free_bytes / outgrow_tier_size_bytes) < 0.05
            and min by (node, tier) (outgrow_tier_free_bytes) < 20000000000
            """
        ),
        for_="5m",
        severity="warning",
        labels=("node", "tier"),
        dashboard="outgrow-tiers",
        summary="The disk of tier {{ $labels.tier }} on {{ $labels.node }} is nearly full",
        description="{{ $value | humanizePercentage }} of the disk that tier {{ $labels.tier }} lies on are free: "
        "less than 5%, and less than 20 GB.",
        runbook="""\
**See it.** `outgrow tiers` on that node: what outgrow has there, and what others have.

**Do.** `outgrow tiers clean` removes copied shards that no run is using. Set `capacity` or a larger `reserve` for the tier;
old checkpoints go by `checkpoint.keep_newest` and `keep_best` of the recipe. Outgrow never deletes a file that it did not
copy itself: the rest is yours to clear.""",
    ),
    Alert(
        name="OutgrowDiskFull",
        expr="min by (node, tier) (outgrow_tier_free_bytes) < 2000000000",
        for_="2m",
        severity="critical",
        labels=("node", "tier"),
        dashboard="outgrow-tiers",
        summary="The disk of tier {{ $labels.tier }} on {{ $labels.node }} is full",
        description="{{ $value | humanize1024 }}B are free on the disk of tier {{ $labels.tier }}, less than 2 GB: the next "
        "checkpoint or shard will not fit.",
        runbook="""\
**See it.** `df -h`, `outgrow tiers`.

**Do.** As for [OutgrowTierNearlyFull](#outgrowtiernearlyfull), now. A run goes on without room: a checkpoint that does not
fit is given up and said, and so are records; but a crash then goes back to the last one that did.""",
    ),
    Alert(
        name="OutgrowCheckpointTooOld",
        # Counted from the start where none was committed since; and not at once after a long start.
        expr=_line(
            """
            time() - max by (run, node) (
              outgrow_run_checkpoint_last_success_timestamp_seconds > outgrow_run_attempt_start_time_seconds
              or outgrow_run_attempt_start_time_seconds
            ) > 600 > on (run, node) 3 * max by (run, node) (outgrow_run_checkpoint_interval_seconds)
            and on (run, node) (min_over_time(outgrow_run_state{state="running"}[10m]) == 1)
            """
        ),
        for_="2m",
        severity="warning",
        labels=("run", "node"),
        dashboard="outgrow-run",
        summary="{{ $labels.run }} has not saved for {{ $value | humanizeDuration }}",
        description="The last checkpoint of {{ $labels.run }} (or its start, where there is none since) is more than three "
        "intervals of the recipe and ten minutes ago, though the run makes steps. A crash now would lose all "
        "that.",
        runbook="""\
**See it.** Dashboard *Run*, *Checkpoints*: failed ones, and seconds by stage. `events.jsonl` has the reason of each failure.

**Do.** Failures: [OutgrowCheckpointFailing](#outgrowcheckpointfailing). A write that takes longer than the interval: a faster
place for the run, or a larger `checkpoint.every_steps`. Neither: steps have become much slower than they were; see *Speed*.""",
    ),
    Alert(
        name="OutgrowCheckpointFailing",
        expr='sum by (run) (increase(outgrow_run_checkpoints_total{result="failed"}[1h])) > 0',
        for_="0s",
        severity="critical",
        labels=("run",),
        dashboard="outgrow-run",
        summary="A checkpoint of {{ $labels.run }} could not be saved",
        description="In the last hour at least one checkpoint of {{ $labels.run }} was not committed. Training goes on, but a"
        " crash would go back to the one before.",
        runbook="""\
**See it.** `events.jsonl` of the run, records of kind `checkpoint`: the error in its own words.

**Do.** No room: [OutgrowDiskFull](#outgrowdiskfull). A bucket that refuses: credentials that have run out, quotas; `outgrow
tiers` tries to write to every place. The next checkpoint is tried at its time, whatever became of this one.""",
    ),
    Alert(
        name="OutgrowThrottled",
        # Not for power: at its power limit a card is under full load as a rule.
        expr='max by (node, gpu, reason) (avg_over_time(outgrow_gpu_throttled{reason=~"thermal|hardware|brake"}[10m])) > 0.25',
        for_="5m",
        severity="warning",
        labels=("node", "gpu", "reason"),
        dashboard="outgrow-gpus",
        summary="GPU {{ $labels.gpu }} on {{ $labels.node }} is held down ({{ $labels.reason }})",
        description="The clock of GPU {{ $labels.gpu }} has been held down for {{ $value | humanizePercentage }} of the last "
        "ten minutes, by {{ $labels.reason }}. All ranks wait for the slowest card.",
        runbook="""\
**See it.** Dashboard *GPUs and nodes*: temperature, power and clock beside those of the other cards; `nvidia-smi -q -d
PERFORMANCE`.

**Do.** thermal: air, filters, fans, distance between cards, or a lower power limit (`nvidia-smi -pl`), which costs little
speed. hardware, brake: power supply or its cables, or the machine's own management asks for less power: somebody must look at
it.""",
    ),
    Alert(
        name="OutgrowStraggler",
        # Of a rank's own work: forward and backward hold waiting for the others, so there all ranks are equally slow.
        expr=_line(
            f"""
            sum by (run, node, rank) {_OWN_WORK} > 0.05
            > on (run) group_left () 1.5 * quantile by (run) (0.5, sum by (run, rank) {_OWN_WORK})
            """
        ),
        for_="5m",
        severity="warning",
        labels=("run", "node", "rank"),
        dashboard="outgrow-ranks",
        summary="Rank {{ $labels.rank }} of {{ $labels.run }} on {{ $labels.node }} holds the others up",
        description="Rank {{ $labels.rank }} has needed {{ $value | humanizePercentage }} of its time for waiting for data "
        "and the optimizer, more than 1.5 times the median of all ranks; the others wait for it in every step.",
        runbook="""\
**See it.** Dashboard *Ranks*: own work of each rank, and whether it is data or the optimizer.

**Do.** Data: the first tier of that node, see *Data tiers* with the node chosen. Optimizer: the card or the cores compute
slower than the others': heat ([OutgrowThrottled](#outgrowthrottled)), other programs on it, another PCIe width. A node that
stays slow is better left out: start without it.""",
    ),
    Alert(
        name="OutgrowAgentDown",
        # Whether its target answers no more or is no longer there: the last that was seen of the node was a rank that lived. An
        # agent that has ended by itself was idle before, and one whose run has ended said so.
        expr=_line(
            """
            max by (run, node) (max_over_time((0 * (outgrow_rank_up == 1) + time())[6h:1m])) + 90
            > on (node) group_left () (
              max by (node) (max_over_time((0 * outgrow_agent_start_time_seconds + time())[6h:1m])) < time() - 120
            )
            and on (run) (max by (run) (last_over_time(outgrow_run_active[6h])) == 1)
            """
        ),
        for_="2m",
        severity="critical",
        labels=("run", "node"),
        dashboard="outgrow-gpus",
        summary="Nothing is heard of {{ $labels.node }} while {{ $labels.run }} runs there",
        description="The node agent of {{ $labels.node }} has not answered for more than two minutes, and ranks of {{ "
        "$labels.run }} lived there when it last did. The node may be gone, or its network, or the agent alone.",
        runbook="""\
**See it.** Is the node there (`ping`, ssh)? `outgrow monitor status`: which targets answer. `agent.log` in the node's folder.

**Do.** The node is gone: the run starts again without it, as soon as there is another. The agent alone is gone: the run does
not mind, and starts another within a minute; where it does not, `outgrow monitor agent` on that node says why. All counters
come back with it. Remembered for six hours.""",
    ),
    Alert(
        name="OutgrowXidError",
        # A number's counter appears with its first error. 43 and 45 only follow a program that ended badly.
        expr=_line(
            """
            sum by (node, gpu, xid) (increase(outgrow_gpu_xid_errors_total{xid!~"43|45"}[1h])) > 0
            or (
              max by (node, gpu, xid) (outgrow_gpu_xid_errors_total{xid!~"43|45"}) > 0
              unless on (node, gpu, xid) outgrow_gpu_xid_errors_total offset 1h
            )
            """
        ),
        for_="0s",
        severity="critical",
        labels=("node", "gpu", "xid"),
        dashboard="outgrow-gpus",
        summary="GPU {{ $labels.gpu }} on {{ $labels.node }} reports XID {{ $labels.xid }}",
        description="In the last hour the driver has reported error {{ $labels.xid }} of GPU {{ $labels.gpu }}.",
        runbook="""\
**See it.** `dmesg -T | grep -i xid` on that node; NVIDIA's list of XID errors says what a number means.

**Do.** 13, 31: mostly a fault of the program, but try the card with another. 48, 63, 64, 94, 95: memory; drain the node and
reset the card, exchange it when it comes again. 74: NVLink. 79: the card has fallen off the bus: power, riser, seat; it needs
a reboot. 119, 120: the card's own processor hangs; a reboot, a newer driver.""",
    ),
)
