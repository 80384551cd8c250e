"""One start of a run on one node, as its ranks describe it to whoever reads their records: ``attempt.json`` beside them.

Records lie in ``<monitoring folder>/<host>/records/<run>/<attempt>/rank-00000.rec``, attempts in the order of their names.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from outgrow.contracts import Record
from outgrow.recipes.schema.site import Site

FILE = "attempt.json"


@dataclass(frozen=True, kw_only=True)
class AttemptFacts(Record):
    """What does not change while the ranks of a node run. No secret is in it, and no option of a bucket.

    ``run`` is the run folder's own name, the value of the label ``run``. ``flops_per_token`` is of forward and backward;
    ``vendor_flops`` of one rank's device, a second, None where it is not known. ``storage`` is the root that ``folder`` is in,
    credentials masked. ``tiers`` are those on disk, by name. ``gpus`` are the UUIDs of the ranks' devices, by rank.
    """

    run: str
    name: str
    folder: str
    fingerprint: str
    storage: str
    attempt: str
    started: float
    host: str
    world: int
    local_ranks: tuple[int, ...]
    steps: int
    rows: int
    sequence_length: int
    checkpoint_every_steps: int
    engine: str
    device: str
    device_name: str
    precision: str
    parameters: int
    flops_per_token: float
    vendor_flops: float | None
    gpu_hour_usd: float | None
    stall_after_s: float
    shard_counts: str
    tiers: dict[str, str]
    gpus: dict[str, str]
    versions: dict[str, str]


def node_folder(site: Site) -> Path:
    """Where this node's agent and records live; apart for each host, as a home may be shared among nodes."""
    return Path(site.monitoring.folder).expanduser() / socket.gethostname()


def records_folder(node: Path) -> Path:
    return node / "records"


def attempt_folder(node: Path, run: str, started: float, attempt: str) -> Path:
    """The folder of one start; sorts by time."""
    return records_folder(node) / run / f"{int(started * 1000):015d}-{attempt}"


def write_facts(folder: Path, facts: AttemptFacts) -> None:
    """Whole or not at all. Raises ``OSError``."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{FILE}.{os.getpid()}"
    aside.write_text(json.dumps(facts.to_dict(), ensure_ascii=False))
    aside.replace(folder / FILE)


def read_facts(folder: Path) -> AttemptFacts | None:
    """None where there are none yet, or they are of another version of outgrow."""
    try:
        return AttemptFacts.from_dict(json.loads((folder / FILE).read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        return None
