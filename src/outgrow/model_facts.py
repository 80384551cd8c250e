"""What planning knows of a model without allocating it, and what it forecasts from that; part of ``contracts``."""

from __future__ import annotations

from dataclasses import dataclass, field

from outgrow.record import Record


@dataclass(frozen=True, kw_only=True)
class ModelFacts(Record):
    """What planning needs to know of a model, found without allocating it.

    ``parameters`` counts tied weights once; ``largest_tensor`` is the element count of the biggest parameter;
    ``blocks`` the number of transformer blocks. ``shapes`` has every parameter by name (tied ones once), ``block_names`` the
    module of each block, ``linear`` the weights of the linear layers within blocks; of these ``adapted`` get an adapter of the
    recipe's, and ``whole`` are the parameters that are trained beside them. ``mask_kinds`` of attention are made for a batch.
    """

    family: str
    parameters: int
    largest_tensor: int
    blocks: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    tied_embeddings: bool
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    block_names: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    heads: int = 0
    eager_attention: bool = False
    mask_kinds: int = 1
    has_mixtures: bool = False
    """Whether there are mixtures of experts, be all experts chosen for every token."""
    expert_share: float = 1.0
    """Of the experts' activations, those of the experts that a token goes to; 1 without experts."""


@dataclass(frozen=True, kw_only=True)
class Forecast(Record):
    """Bytes that a run takes at most, by what they are for: ``device``, of the rank that has most on its device; ``host``, in a
    node's memory; ``disk``, on a node's first tier. ``read`` and ``written`` there in a step."""

    device: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]
    step_read_bytes: int
    step_written_bytes: int
