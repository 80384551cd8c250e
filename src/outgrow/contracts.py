"""Every type that crosses a boundary between the folders of outgrow; imports nothing heavy, and of ours ``record`` and
``model_facts`` alone.

A run reads top-down: ``Recipe`` and ``Site`` (recipes) -> ``DatasetCard`` (streaming) -> ``Plan`` (cluster) -> ``JobSpec`` ->
one ``train_worker(job, context)`` a rank (trainers) -> ``Layout`` -> ``StepRows``/``Batch`` -> ``StepRecord`` (monitoring) ->
``CheckpointRef`` -> ``ExportManifest``. What goes to another process is plain data: ``to_dict`` and ``from_dict`` give and take
JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from outgrow.model_facts import Forecast as Forecast
from outgrow.model_facts import ModelFacts as ModelFacts
from outgrow.record import JsonDict as JsonDict
from outgrow.record import Record as Record

if TYPE_CHECKING:
    import torch

EngineName: TypeAlias = Literal["plain", "ddp", "fsdp2", "zero"]
EventKind: TypeAlias = Literal["start", "step", "validation", "checkpoint", "roll_back", "end"]
RestartCause: TypeAlias = Literal["", "rank_lost", "error", "asked"]
DiskKind: TypeAlias = Literal["", "ssd", "hdd", "usb"]

IGNORE_INDEX = -100
"""The target of a position that predicts nothing (the last token of a document, padding)."""

# --- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StreamCard(Record):
    """Counts of one stream in one row index: of what is used, that is without ``dropped``.

    ``rows`` is of the training split, ``validation_rows`` of the other. ``dropped`` counts the documents that were left out of
    either, by reason: by the source, by the filter, as duplicates, as too long for a row. ``pairs`` where its documents are
    preference pairs.
    """

    name: str
    documents: int
    tokens: int
    rows: int
    validation_documents: int
    validation_tokens: int
    validation_rows: int
    dropped: dict[str, int]
    source_bytes: int
    pairs: bool = False


@dataclass(frozen=True, kw_only=True)
class IndexCard(Record):
    """One row index: the rows of ``sequence_length`` tokens at most that a store was cut into; streams by name."""

    folder: str
    fingerprint: str
    sequence_length: int
    streams: tuple[StreamCard, ...]

    @property
    def rows(self) -> int:
        """Rows of the training split."""
        return sum(stream.rows for stream in self.streams)

    @property
    def tokens(self) -> int:
        """Tokens of the training split."""
        return sum(stream.tokens for stream in self.streams)

    @property
    def validation_rows(self) -> int:
        return sum(stream.validation_rows for stream in self.streams)

    @property
    def fill(self) -> float:
        """Share of the training rows' positions that hold a token; 0 where there is no row."""
        return self.tokens / (self.rows * self.sequence_length) if self.rows else 0.0


@dataclass(frozen=True, kw_only=True)
class DatasetCard(Record):
    """What ``streaming.build`` made: one token store and its row indexes, all committed under ``Site.storage``.

    ``store`` and the folders of ``indexes`` are paths relative to the site's storage, so a card means the same on every node.
    There is one index for each length of rows that the recipe uses; the first is that of ``data.sequence_length``, which
    validation reads too, and the properties speak of it. ``bytes`` is the size of store and indexes.
    """

    store: str
    store_fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    eos_token_id: int
    bytes: int
    indexes: tuple[IndexCard, ...]

    @property
    def sequence_length(self) -> int:
        return self.indexes[0].sequence_length

    @property
    def streams(self) -> tuple[StreamCard, ...]:
        return self.indexes[0].streams

    @property
    def rows(self) -> int:
        return self.indexes[0].rows

    @property
    def tokens(self) -> int:
        return self.indexes[0].tokens

    @property
    def fill(self) -> float:
        return self.indexes[0].fill

    @property
    def validation_rows(self) -> int:
        return self.indexes[0].validation_rows

    @property
    def data_fingerprint(self) -> str:
        """Of all rows that can be learned from: the fingerprints of the indexes, which know their store, filters and cuts."""
        return "+".join(index.fingerprint for index in self.indexes)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one rank: ``n`` packed rows of ``L`` tokens, tensors on the CPU until the engine moves them.

    token_ids   int64 [n, L]    inputs
    targets     int64 [n, L]    next token of the same document; ``IGNORE_INDEX`` where there is none
    weights     float32 [n, L]  loss weight of each target; 0 where the target is ``IGNORE_INDEX``
    segments    int32 [n, L]    number of the document within its row, from 0; -1 for padding
    positions   int64 [n, L]    position within the document's segment, from 0
    pairs       int32 [n, L]    2 p for the chosen and 2 p + 1 for the rejected answer (each with its prompt, a segment of its
                                own) of preference pair p of the row, counted from 0; -1 where there is none
    row_ids     int64 [n]       row of the index, -1 for a zero-weight row that only keeps collectives matched
    """

    token_ids: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor
    pairs: torch.Tensor
    row_ids: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class StepRows:
    """All that one rank computes in one optimizer step.

    ``row_ids`` is the ordered list of the whole step over all ranks (row j belongs to rank j mod world); ``global_weight`` the
    sum of all loss weights of the step over all ranks, known from the index without a collective; ``tokens`` the number of
    valid (not padding) tokens of the step over all ranks. ``micro_batches`` has the same length on every rank.
    """

    step: int
    epoch: int
    row_ids: tuple[int, ...]
    global_weight: float
    tokens: int
    micro_batches: tuple[Batch, ...]


class Loader(Protocol):
    """Steps in order from the position it was built at; ``state(step)`` is what a checkpoint keeps of the data position."""

    def __iter__(self) -> Iterator[StepRows]: ...
    def state(self, next_step: int) -> JsonDict: ...
    def close(self) -> None: ...
    def shard_counts(self) -> ShardCounts | None:
        """What fetching shards has cost on this node, all its ranks together; None where they are read in place."""

    def shard_counts_file(self) -> str:
        """Where these counts lie as JSON while the run goes; empty where shards are read in place."""

    def ready_steps(self) -> int | None:
        """Steps that are read ahead and wait to be taken; None where none are read ahead."""


# --- where a run goes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Gpu(Record):
    index: int
    name: str
    memory_bytes: int
    compute_capability: str


@dataclass(frozen=True, kw_only=True)
class Disk(Record):
    """A disk by a folder on it. ``kind`` is empty where the system does not tell."""

    path: str
    total_bytes: int
    free_bytes: int
    kind: DiskKind = ""


@dataclass(frozen=True, kw_only=True)
class Inventory(Record):
    """What one machine has, as seen by this process (cgroup limits included in ``cores`` and ``memory_bytes``), or what
    ``nodes`` machines have together."""

    hostname: str
    cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]
    disks: tuple[Disk, ...]
    nodes: int = 1


@dataclass(frozen=True, kw_only=True)
class Layout(Record):
    """How one world size runs a recipe; a pure function of recipe and world, asked again at every (re)start.

    ``shard`` x ``replicate`` = ``world``: the axes of the device mesh. Each rank runs ``accumulation`` micro-batches of at
    most ``micro_rows`` rows a step; a rank that has no row for one of them runs a zero-weight row.
    """

    engine: EngineName
    world: int
    replicate: int
    shard: int
    global_rows: int
    micro_rows: int
    accumulation: int

    def rank_rows(self, row_ids: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], ...]:
        """The rows of ``rank``, one tuple a micro-batch (empty where the rank is short of rows)."""
        mine = row_ids[rank :: self.world]
        return tuple(mine[i * self.micro_rows : (i + 1) * self.micro_rows] for i in range(self.accumulation))


@dataclass(frozen=True, kw_only=True)
class Refusal(Record):
    """One reason why a run cannot start: what was asked, what there is, and the nearest thing that works."""

    asked: str
    available: str
    nearest: str


@dataclass(frozen=True, kw_only=True)
class DataReading(Record):
    """How a node will read a run's dataset, for people; or why it cannot."""

    note: str
    refusal: Refusal | None


@dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """Verdict and forecast for people: it can start when ``refusals`` is empty. Byte counts are of the run's storage."""

    run: str
    workers: int
    device: str
    threads_per_worker: int
    layout: Layout | None
    steps: int
    steps_per_epoch: int
    tokens: int
    checkpoint_bytes: int
    run_bytes: int
    storage: str
    storage_free_bytes: int | None
    environment: dict[str, str]
    refusals: tuple[Refusal, ...]
    notes: tuple[str, ...]
    forecast: Forecast | None = None
    engine_settings: JsonDict = field(default_factory=dict)
    """What a library below the engine is configured with, where it has a configuration of its own: DeepSpeed's."""


@dataclass(frozen=True, kw_only=True)
class RunRef(Record):
    """A run folder: ``folder`` relative to the site's storage; ``fingerprint`` of what is learned, no site key in it."""

    name: str
    folder: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class JobSpec(Record):
    """All that a worker is given, as plain data: recipe and site as dicts of their schemas, and the dataset's card.

    ``site`` holds secrets in clear: it is passed in memory, never printed or written. ``launched`` is the Unix time at which
    the command began that runs the job.
    """

    recipe: JsonDict
    site: JsonDict = field(repr=False)
    card: DatasetCard
    run: RunRef
    workers: int
    threads_per_worker: int
    device: str
    launched: float


class Context(Protocol):
    """What a worker knows of its surroundings: under Ray Train ``RayContext``, under plain processes ``LocalContext``.

    torch.distributed is initialised before ``train_worker`` runs when ``world`` > 1 (gloo on CPU, nccl on GPU).
    ``attempt`` names this start of the whole group, equal on all ranks and new at every restart; ``cause`` is why this command
    has started it again, empty at its first start.
    """

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def local_world(self) -> int: ...
    @property
    def node_rank(self) -> int: ...
    @property
    def attempt(self) -> str: ...
    @property
    def cause(self) -> RestartCause: ...
    def barrier(self) -> None: ...
    def report(self, record: StepRecord) -> None:
        """Hand a record to whoever watches the run; never waits, and does nothing on ranks other than 0."""


class TrainWorker(Protocol):
    """The function that ``cluster`` runs on every rank; the command line hands it in."""

    def __call__(self, job: JobSpec, context: Context) -> WorkerResult: ...


@dataclass(frozen=True, kw_only=True)
class BestCheckpoint(Record):
    """The committed checkpoint with the lowest validation loss ``metric``: ``total``, or a stream by name."""

    folder: str
    step: int
    metric: str
    loss: float


@dataclass(frozen=True, kw_only=True)
class WorkerResult(Record):
    """What rank 0 says at the end. ``step`` counts finished optimizer steps; losses are nats a weighted token. ``ended`` says
    why the run ended before its last step, empty where it did not; ``best`` is None where no checkpoint was measured."""

    step: int
    tokens: int
    train_loss: float
    validation_loss: float | None
    checkpoint: str
    seconds: float
    ended: str = ""
    best: BestCheckpoint | None = None


@dataclass(frozen=True, kw_only=True)
class RunResult(Record):
    """How a run ended, for the driver. ``restarts`` counts starts of the worker group after the first."""

    run: RunRef
    worker: WorkerResult
    restarts: int


# --- what a run shows and keeps ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class StepRecord(Record):
    """One line of ``events.jsonl`` and of the live display.

    ``kind``: ``start`` (a worker group begins or resumes), ``step`` (a logged optimizer step), ``validation``, ``checkpoint``,
    ``roll_back`` (the run goes on from an earlier ``step``), ``end``. ``step`` counts finished steps. ``time`` is Unix seconds;
    durations are seconds; ``loss`` is nats a weighted token over the global batch; what does not apply to a kind is left at its
    default. ``detail`` holds what belongs to one kind only: per-stream validation losses, bytes and stages of a checkpoint,
    versions at the start, why a run has ended early.
    """

    kind: EventKind
    attempt: str
    time: float
    step: int
    steps: int
    epoch: int = 0
    tokens: int = 0
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    step_s: float | None = None
    data_wait_s: float | None = None
    tokens_per_s: float | None = None
    detail: JsonDict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TierTraffic(Record):
    """What one node has read of one tier: whole shards, bytes, the seconds that reading took, and errors by kind."""

    shards: int = 0
    bytes: int = 0
    read_s: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ShardCounts(Record):
    """What reading the shards of ``run`` (its folder's own name) through tiers has cost on one node; counts go on where the run
    is resumed on that node.

    A visit is one pass of the training order over a shard: a hit where it lay in the first tier by itself, else a miss.
    ``fetches`` counts shards copied there, ``refetches`` those of them that had been there before, ``evictions`` those deleted
    to make room; ``healed`` copies that were found damaged and fetched again, ``read_through`` shards that were read without
    a place in the cache. ``queue`` is the number of fetches that are due or running, ``cache_bytes`` of ``room_bytes`` are
    taken, ``wait_s`` is how long readers have waited for a shard. ``tiers`` by name.
    """

    run: str = ""
    visits: int = 0
    hits: int = 0
    misses: int = 0
    fetches: int = 0
    refetches: int = 0
    evictions: int = 0
    healed: int = 0
    read_through: int = 0
    queue: int = 0
    cache_bytes: int = 0
    room_bytes: int = 0
    wait_s: float = 0.0
    tiers: dict[str, TierTraffic] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CheckpointRef(Record):
    """A committed checkpoint: ``folder`` relative to the site's storage, ``digest`` that of its manifest."""

    folder: str
    step: int
    digest: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class ExportManifest(Record):
    """What lies in an exported folder: sha256 of every file, and where the weights came from.

    ``kind`` is ``model``; ``adapter``, one without its base; ``merged``, a model with its adapter worked into the base; or
    ``merged 4-bit``, into the base as the run computed with it in 4 bits.
    """

    run: str
    step: int
    checkpoint_digest: str
    dtype: str
    parameters: int
    files: dict[str, str]
    kind: str = "model"
