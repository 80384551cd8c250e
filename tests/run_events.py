"""Runs as their ``events.jsonl`` tells them: made up, but as a real one would write it, restarts, failures and all."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outgrow.contracts import JsonDict, RunRef, ShardCounts, StepRecord, TierTraffic
from outgrow.monitoring.recording.slots import PHASES, WALL
from outgrow.monitoring.report import StoredFacts

START = 1_790_000_000.0
RECIPE: JsonDict = {
    "run": {"name": "story", "seed": 1},
    "batch": {"rows": 32},
    "optimizer": {"kind": "adamw", "learning_rate": 0.003},
    "duration": {"steps": 600},
}
FACTS: JsonDict = {
    "world": 2,
    "device_name": "NVIDIA H200",
    "engine": "fsdp2",
    "precision": "bf16",
    "parameters": 124_000_000,
    "flops_per_token": 7.6e8,
    "vendor_flops": 989e12,
    "gpu_hour_usd": 2.5,
    "versions": {"torch": "2.13.0", "outgrow": "0.1.0"},
}


def stored(run: str, *, recipe: JsonDict | None = None, owner: str = "") -> StoredFacts:
    return StoredFacts(
        ref=RunRef(name="story", folder=f"runs/{run}", fingerprint="f" * 64),
        created="2026-09-21T14:13:20+00:00",
        recipe=recipe or RECIPE,
        owner=owner,
    )


def write_events(root: Path, run: str, records: list[StepRecord]) -> None:
    folder = root / "runs" / run
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(record.to_dict()) + "\n" for record in records))


@dataclass
class Story:
    """A run on two ranks, told record by record; ``step_s`` a step, an eighth of a checkpoint's time in the loop's way."""

    steps: int = 600
    every: int = 1
    step_s: float = 0.5
    seed: int = 0
    level: float = 3.2
    full: bool = True
    records: list[StepRecord] = field(default_factory=list)
    counters: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.time, self.step, self.furthest, self.attempt = START, 0, 0, 0
        self.rng = random.Random(self.seed)
        self.counters = {
            "steps": 0.0,
            "tokens": 0.0,
            **{f"phase_s.{p}": 0.0 for p in PHASES},
            **{f"wall_s.{w}": 0.0 for w in WALL},
        }
        self.shards = {"visits": 0, "hits": 0, "fetches": 0, "bytes": 0, "wait_s": 0.0}

    def start(self, *, step: int = 0, cause: str = "", away_s: float = 0.0) -> Story:
        self.step = step
        self.attempt += 1
        self._spend("idle", away_s)
        self._spend("init", 12.0)
        detail: JsonDict = {
            "world": 2,
            "device": "cuda:0",
            "torch": "2.13.0",
            "transformers": "4.57.6",
            "layout": {"engine": "fsdp2"},
        }
        if self.full:
            detail |= {"cause": cause, "facts": FACTS, "measured_flops": 650e12}
        return self._say("start", detail=detail)

    def train(self, upto: int, *, validate_every: int = 100, save_every: int = 50, failing: int = 0) -> Story:
        while self.step < upto:
            self._one_step()
            if self.step % self.every == 0:
                self._log()
            if self.step % validate_every == 0:
                self._validate()
            if self.step % save_every == 0:
                self._save(failed=self.step == failing)
        return self

    def end(self) -> Story:
        return self._say("end", loss=self._loss(self.step))

    # --- parts --------------------------------------------------------------------------------------------------------

    def _one_step(self) -> None:
        self.step += 1
        wait = 0.02 * self.step_s + (0.4 if self.rng.random() < 0.01 else 0.0)
        shares = {"forward": 0.3, "backward": 0.55, "collectives": 0.08, "optimizer": 0.05}
        for phase, share in shares.items():
            self.counters[f"phase_s.{phase}"] += share * self.step_s
        self.counters["phase_s.data_wait"] += wait
        self.counters["steps"] += 1
        self.counters["tokens"] += 32_000
        again = self.step <= self.furthest
        self.furthest = max(self.furthest, self.step)
        self._spend("recompute" if again else "productive", 0.98 * self.step_s)
        self._spend("stalled", wait)
        self.shards["visits"] += 1
        hit = self.rng.random() < 0.8
        self.shards["hits"] += hit
        self.shards["fetches"] += not hit
        self.shards["bytes"] += 67_000_000

    def _log(self) -> None:
        at = self.step
        norm = 0.4 + 4 * math.exp(-at / 30) + 0.1 * random.Random(at).random()
        detail: JsonDict = {}
        if self.full:
            misses = self.shards["visits"] - self.shards["hits"]
            counts = ShardCounts(
                visits=self.shards["visits"],
                hits=self.shards["hits"],
                misses=misses,
                fetches=self.shards["fetches"],
                wait_s=self.counters["phase_s.data_wait"],
                tiers={
                    "nvme": TierTraffic(
                        shards=self.shards["hits"], bytes=self.shards["bytes"], read_s=self.shards["bytes"] / 2e9
                    ),
                    "bucket": TierTraffic(shards=misses, bytes=misses * 67_000_000, read_s=misses * 0.6, errors={"timeout": 1}),
                },
            )
            memory = {"allocated": 9e9 + 1e6 * at, "reserved": 14e9, "peak": 13e9, "anon": 3e9 + 2e8 * math.sin(at / 40)}
            detail = {"counters": dict(self.counters), "memory": memory, "shards": counts.to_dict()}
        self._say(
            "step",
            loss=self._loss(at),
            grad_norm=norm,
            learning_rate=3e-3 * min(1, at / 50) * (0.55 + 0.45 * math.cos(math.pi * at / self.steps)),
            step_s=self.step_s,
            data_wait_s=0.02 * self.step_s,
            tokens_per_s=32_000 / self.step_s * (1 + 0.03 * self.rng.gauss(0, 1)),
            detail=detail,
        )

    def _loss(self, step: int) -> float:
        return self.level + 4 * math.exp(-step / 60) + 0.08 * random.Random(step + 7919 * self.seed).gauss(0, 1)

    def _validate(self) -> None:
        loss = self.level + 0.1 + 4 * math.exp(-self.step / 60)
        detail: JsonDict = {"streams": {"prose": loss - 0.2, "code": loss + 0.3}}
        if self.full:
            words = ["Once", "upon", "a", "time", "there", "was", "a", "fox", "who", "knew", "the", "way"]
            some = " ".join(self.rng.choice(words) for _ in range(24))
            detail["samples"] = [
                {"prompt": "Once upon a time", "text": f"{some}."},
                {"prompt": "def main(", "text": "):\n    pass"},
            ]
        self._spend("productive", 4.0)
        self.counters["phase_s.validation"] += 4.0
        self._say("validation", loss=loss, detail=detail)

    def _save(self, *, failed: bool) -> None:
        self._spend("checkpoint", 0.4)
        self.counters["phase_s.checkpoint"] += 0.4
        detail: JsonDict = {"step": self.step, "bytes": 1_488_000_000, "copy_s": 0.4, "write_s": 2.5, "commit_s": 0.2}
        if failed:
            detail |= {"bytes": 0, "write_s": 0.0, "commit_s": 0.0, "error": "no space left on device"}
        self._say("checkpoint", detail=detail)

    def _spend(self, kind: str, seconds: float) -> None:
        self.time += seconds
        self.counters[f"wall_s.{kind}"] += seconds

    def _say(self, kind: Any, **values: Any) -> Story:
        record = StepRecord(
            kind=kind,
            attempt=f"attempt-{self.attempt}",
            time=self.time,
            step=self.step,
            steps=self.steps,
            tokens=32_000 * self.step,
            **values,
        )
        self.records.append(record)
        return self


def story_with_restart(**options: Any) -> Story:
    """600 steps; a rank is lost at step 370, so that 20 steps are done again from 350; one checkpoint fails."""
    story = Story(**options).start().train(370, failing=250)
    return story.start(step=350, cause="rank_lost", away_s=15.0).train(600).end()
