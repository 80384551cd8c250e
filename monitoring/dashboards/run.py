"""Run: how one run is doing. The top row is what is asked at seven in the morning; below it is why."""

from __future__ import annotations

from outgrow.monitoring import metrics as m
from outgrow.monitoring.dashboards.frame import Page, Row
from outgrow.monitoring.dashboards.panels import Look, Panel, bars, curves, facts, heat, state_tile, tile
from outgrow.monitoring.dashboards.queries import PHASE, RUN, STATES, goodput, grown, is_, newest, of, rate, state, total

SHARE = Look(unit="percentunit", at_most=1)
SECONDS = Look(unit="s")


def page() -> Page:
    return Page(
        uid="outgrow-run",
        title="outgrow / Run",
        tells="How one run is doing: state, progress, loss, speed, and where its time goes.",
        run=RUN,
        has_nodes=False,
        rows=[
            Row(title="Now", panels=_now()),
            Row(title="Learning", panels=_learning()),
            Row(title="Speed", panels=_speed()),
            Row(title="Memory and faults", panels=_faults()),
            Row(title="Checkpoints", panels=_checkpoints()),
            Row(title="What it is", panels=_facts()),
        ],
    )


def _now() -> list[Panel]:
    progress = f"{newest(m.RUN_STEP, RUN)} / {newest(m.RUN_PLANNED_STEPS, RUN)}"
    dollars = newest(m.RUN_REMAINING_DOLLARS, RUN)
    return [
        state_tile(
            "State",
            "What the node agent sees. stalled: no step finished in time, see the stacks that the agent wrote. lost: the "
            "ranks are gone without a word; the same command goes on from the last checkpoint. 'no agent' means that nobody "
            "says anything now.",
            (state(RUN), ""),
            STATES,
            empty="no agent",
        ),
        tile("Progress", "Finished steps of those planned.", (progress, "done"), Look(unit="percentunit", decimals=1)),
        tile(
            "Time left",
            "Seconds to the last step at the median of the last steps; pauses for checkpoints and validation come on top.",
            (newest(m.RUN_REMAINING_SECONDS, RUN), "left"),
            SECONDS,
        ),
        tile(
            "Cost of the rest",
            "Time left at the site's price of a GPU hour (prices.gpu_hour in site.yaml).",
            (dollars, "left"),
            Look(unit="currencyUSD"),
            empty="no price",
        ),
        tile(
            "Loss",
            "Training loss of the last logged step, nats a token; it should fall. A jump that stays is a spike: see the alert "
            "OutgrowLossSpike.",
            (newest(m.RUN_LOSS, RUN), "loss"),
            Look(unit="none", decimals=3, base="blue"),
        ),
        tile(
            "Tokens a second",
            "Valid tokens of all ranks. A fall with a steady step time means more padding; else look at the phases below.",
            (newest(m.RUN_TOKENS_PER_SECOND, RUN), "tokens/s"),
            Look(unit="short", decimals=1, base="blue"),
        ),
        tile(
            "MFU",
            "Model FLOPs of the last steps over what the devices can do as their vendor says. Dense models on one node reach "
            "0.35 to 0.6; far below it look at data_wait, the batch of a rank, and throttling.",
            (newest(m.RUN_MFU, RUN, is_("ceiling", "vendor")), "MFU"),
            Look(unit="percentunit", decimals=1, base="blue"),
            empty="unknown device",
        ),
        tile(
            "Goodput",
            "Productive seconds of all seconds since the first start, restarts and pauses included. Under 90%: see Goodput and "
            "time.",
            (goodput(RUN), "goodput"),
            Look(unit="percentunit", decimals=1, base="red", limits=((0.7, "orange"), (0.9, "green"))),
        ),
    ]


def _learning() -> list[Panel]:
    return [
        curves(
            "Training and validation loss",
            "Training loss of the last logged step and loss on the held-out rows, nats a token. Validation that rises while "
            "training falls: overfitting, stop or add data. Both rise: lower the learning rate.",
            [(newest(m.RUN_LOSS, RUN), "training"), (newest(m.RUN_VALIDATION_LOSS, RUN), "validation")],
            Look(unit="none", decimals=3, at_least=None, colours={"training": "blue", "validation": "orange"}),
            width=12,
            height=9,
        ),
        curves(
            "Learning rate",
            "As the schedule gives it. Should go up in the warm-up, then down; anything else is a recipe that was changed.",
            [(newest(m.RUN_LEARNING_RATE, RUN), "learning rate")],
            Look(unit="sci"),
            width=6,
            height=9,
        ),
        curves(
            "Gradient norm",
            "2-norm of the global gradient before clipping. Growth over hours announces a spike; a constant norm far above the "
            "clipping limit means that every step is clipped: lower the learning rate.",
            [(newest(m.RUN_GRADIENT_NORM, RUN), "gradient norm")],
            Look(unit="none"),
            width=6,
            height=9,
            logarithmic=True,
        ),
    ]


def _speed() -> list[Panel]:
    steps, seconds = rate(m.RUN_STEP_SECONDS, RUN, suffix="_count"), rate(m.RUN_STEP_SECONDS, RUN, suffix="_sum")
    return [
        curves(
            "Step seconds",
            "Median of the last 64 steps, and the mean of late. A mean far above the median: a few slow steps, see the heat "
            "map and the phases.",
            [
                (newest(m.RUN_STEP_MEDIAN, RUN), "median"),
                (f"sum by (run) ({seconds}) / sum by (run) ({steps})", "mean"),
            ],
            SECONDS,
        ),
        heat(
            "Steps by duration",
            "How many steps took how long. Two bands: two kinds of steps (validation, a shard from a slow tier); a band that "
            "moves up: throttling or a slower disk.",
            (f"sum by (le) (increase({of(m.RUN_STEP_SECONDS, RUN, suffix='_bucket')}[$__rate_interval]))", "{{le}}"),
            "s",
        ),
        curves(
            "Share of time by phase",
            "What the training loop does, mean over ranks. data_wait above 10%: see Data tiers. collectives: the network. "
            "What is missing to 100% is outside steps.",
            [(f"avg by (phase) ({rate(m.RANK_PHASE_SECONDS, RUN)})", "{{phase}}")],
            Look(unit="percentunit", at_most=1, colours=PHASE),
            stacked=True,
        ),
        curves(
            "Positions a second",
            "Computed positions: valid tokens, and padding that is computed for nothing. Much padding: pack rows.",
            [(f"sum by (kind) ({rate(m.RUN_TOKENS, RUN)})", "{{kind}}")],
            Look(unit="short"),
            stacked=True,
        ),
        curves(
            "Model FLOPs utilisation",
            "Against the vendor's figure, and against a matrix product measured at the start: far apart, the device itself is "
            "slower than it should be (power limit, cooling).",
            [(newest(m.RUN_MFU, RUN), "{{ceiling}}")],
            SHARE,
        ),
        curves(
            "Steps and rows a second",
            "Optimizer steps and rows computed, those computed again after a restart included.",
            [
                (f"sum by (run) ({rate(m.RUN_STEPS, RUN)})", "steps"),
                (f"sum by (run) ({rate(m.RUN_SAMPLES, RUN)})", "rows"),
            ],
            Look(unit="short"),
        ),
    ]


def _faults() -> list[Panel]:
    return [
        curves(
            "Memory by kind, greatest of all ranks",
            "Device: allocated, reserved, peak. RAM of the process: anon, file, shmem. reserved near the card's size with "
            "retries: a smaller batch of a rank. anon that only grows: a leak.",
            [(f"max by (kind) ({of(m.RANK_MEMORY, RUN)})", "{{kind}}")],
            Look(unit="bytes"),
        ),
        bars(
            "Restarts by cause, since the first start",
            "rank_lost: a process was killed (memory, node). error: the program raised. asked: a resize. resumed: the command"
            " was given again. Many of rank_lost: see the kernel's log for the OOM killer.",
            (total(m.RUN_RESTARTS, RUN), "{{cause}}"),
            Look(unit="none", base="orange"),
        ),
        curves(
            "What went wrong",
            "In the time between two points: steps that were not finite, allocations that had to be tried again, records that "
            "events.jsonl could not take (full disk?).",
            [
                (f"sum by (run) (increase({of(m.RUN_NONFINITE, RUN)}[$__rate_interval]))", "not finite"),
                (f"sum by (run) (increase({of(m.RANK_ALLOCATION_RETRIES, RUN)}[$__rate_interval]))", "allocation retries"),
                (f"sum by (run) (increase({of(m.RUN_EVENTS_DROPPED, RUN)}[$__rate_interval]))", "records dropped"),
            ],
            Look(unit="none", colours={"not finite": "red", "allocation retries": "orange", "records dropped": "purple"}),
            as_bars=True,
        ),
    ]


def _checkpoints() -> list[Panel]:
    committed = f"scalar(sum({grown(m.RUN_CHECKPOINTS, RUN, is_('result', 'committed'))}))"
    return [
        curves(
            "Age of the last checkpoint",
            "What a crash would cost now, against the interval of the recipe. Above three intervals: the alert "
            "OutgrowCheckpointTooOld.",
            [
                (f"time() - {newest(m.RUN_CHECKPOINT_TIME, RUN)}", "age"),
                (newest(m.RUN_CHECKPOINT_INTERVAL, RUN), "interval"),
            ],
            SECONDS,
        ),
        bars(
            "Seconds a checkpoint, by stage",
            "Mean of those in the time shown. copy pauses the loop; write and commit run behind it. A slow write: the disk or"
            " the bucket.",
            (f"sum by (stage) ({grown(m.RUN_CHECKPOINT_SECONDS, RUN)}) / {committed}", "{{stage}}"),
            Look(unit="s", colours={"copy": "orange", "write": "blue", "commit": "green"}),
            width=6,
        ),
        tile(
            "Bytes a checkpoint",
            "Mean of those in the time shown.",
            (f"sum({grown(m.RUN_CHECKPOINT_BYTES, RUN)}) / {committed}", "bytes"),
            Look(unit="bytes", base="blue"),
            width=5,
            height=8,
        ),
        bars(
            "Checkpoints by result, since the first start",
            "A failed one costs nothing yet, but the next crash goes back further: see the alert OutgrowCheckpointFailing.",
            (total(m.RUN_CHECKPOINTS, RUN), "{{result}}"),
            Look(unit="none", colours={"committed": "green", "failed": "red"}),
            width=5,
        ),
    ]


def _facts() -> list[Panel]:
    return [
        facts(
            "Run",
            "Name, engine, device, precision and ranks of the newest start.",
            of(m.RUN_INFO, RUN),
            width=14,
            height=5,
        ),
        tile(
            "Epoch", "Pass over the dataset, from 0.", (newest(m.RUN_EPOCH, RUN), "epoch"), Look(unit="none"), width=3, height=5
        ),
        tile(
            "First start",
            "When the run was started first.",
            (f"min by (run) ({of(m.RUN_START_TIME, RUN)}) * 1000", "start"),
            Look(unit="dateTimeFromNow", base="blue"),
            width=3,
            height=5,
        ),
        tile(
            "Last step",
            "When the last step was finished; compare it with the seconds after which the run counts as stalled.",
            (f"{newest(m.RUN_LAST_STEP_TIME, RUN)} * 1000", "last step"),
            Look(unit="dateTimeFromNow", base="blue"),
            width=4,
            height=5,
        ),
    ]
