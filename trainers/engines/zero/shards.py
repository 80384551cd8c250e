"""Where the float32 parameters and moments of this rank lie in DeepSpeed's flat buffers, as named ``FlatPart``s.

Stages 1 and 2 put the parameters of a group end to end and give each rank one run of that; stage 3 cuts each parameter by
itself and puts the ranks' runs end to end. In both, AdamW steps one flat vector a group. Where the optimizer is offloaded to
NVMe, a group is in memory only while it is looked at: groups are gone through one after the other, and the one that is read is
put back before the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from outgrow.trainers.regions import FlatPart, Held

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Run:
    """``length`` elements of a parameter, from ``start`` on, that lie at ``offset`` of flat buffer ``group`` of this rank."""

    group: int
    start: int
    length: int
    offset: int


class Shards:
    """All that is trained, by name: ``tensors()`` in the order of the flat buffers.

    ``zero`` is DeepSpeed's optimizer, ``names`` and ``shapes`` are those of the model's own parameters.
    """

    def __init__(self, zero: Any, stage: int, names: Mapping[nn.Parameter, str], shapes: Mapping[str, torch.Size]) -> None:
        self._zero = zero
        flat = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
        self._flat: list[torch.Tensor] = flat
        self._swapped = _swapped_groups(zero) if stage == 3 else frozenset()
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        runs = runs_of_stage_3(zero) if stage == 3 else runs_of_stages_1_and_2(zero)
        self._runs = {names[parameter]: run for parameter, run in runs}
        self._in_memory: int | None = None
        self._written = False
        for group in range(len(self._flat)):
            self._make_states(group)

    @property
    def num_groups(self) -> int:
        return len(self._flat)

    def tensors(self) -> dict[str, Held]:
        """``model/<parameter>`` and ``optim/<parameter>/<state>``."""
        held: dict[str, Held] = {}
        for name, run in self._runs.items():
            held[f"model/{name}"] = self._part(name, run, partial(self._values, run, None))
            for state in MOMENTS:
                held[f"optim/{name}/{state}"] = self._part(name, run, partial(self._values, run, state))
            held[f"optim/{name}/step"] = self._zero.optimizer.state[self._flat[run.group]]["step"]
        return held

    def written(self) -> None:
        """What is in memory now was written to."""
        self._written = True

    def open(self, group: int) -> torch.Tensor:
        """The flat parameters of ``group``, in memory until another group is opened or all are put back."""
        if group != self._in_memory:
            self.put_back()
            if group in self._swapped:
                self._zero._optimizer_states_and_gradient_swap_in(group)
            self._in_memory = group
        return self._flat[group].detach()

    def put_back(self) -> None:
        """Free the memory of the group that was opened last, after writing it where it was written to."""
        group, written, self._in_memory, self._written = self._in_memory, self._written, None, False
        if group is None or group not in self._swapped:
            return
        if written:
            self._zero._optimizer_states_and_gradient_swap_out(group)
        else:
            self._zero._release_swap_buffers(group)

    def _part(self, name: str, run: Run, values: Callable[[], torch.Tensor]) -> FlatPart:
        flat = self._flat[run.group]
        return FlatPart(self._shapes[name], flat.dtype, flat.device, run.start, run.length, values)

    def _values(self, run: Run, state: str | None) -> torch.Tensor:
        flat = self.open(run.group)
        values = flat if state is None else self._zero.optimizer.state[self._flat[run.group]][state]
        return values[run.offset : run.offset + run.length]

    def _make_states(self, group: int) -> None:
        """AdamW's state as zeros, so that a checkpoint has the same names at every step and memory is taken at once."""
        flat = self.open(group)
        self._zero.optimizer.state[self._flat[group]] = {
            "step": torch.zeros((), dtype=torch.float32, device=flat.device),
            **{moment: torch.zeros_like(flat) for moment in MOMENTS},
        }
        self.written()
        self.put_back()


def runs_of_stages_1_and_2(zero: Any) -> Iterator[tuple[nn.Parameter, Run]]:
    """Each trained parameter and what this rank's optimizer has of it, which may be nothing."""
    for group, parameters in enumerate(zero.round_robin_bit16_groups):
        size = int(zero.partition_size[group])
        rank = torch.distributed.get_rank(zero.real_dp_process_group[group])
        for parameter, begin in zip(parameters, zero.round_robin_bit16_offsets[group], strict=True):
            start = max(rank * size - begin, 0)
            stop = min((rank + 1) * size - begin, parameter.numel())
            yield parameter, Run(group, start, max(stop - start, 0), max(begin - rank * size, 0))


def runs_of_stage_3(zero: Any) -> Iterator[tuple[nn.Parameter, Run]]:
    """Each trained parameter and what this rank has of it; behind the last element there may be padding."""
    for group, parameters in enumerate(zero.fp16_groups):
        offset = 0
        for parameter in parameters:
            run = run_of_shard(parameter)
            yield parameter, Run(group, run[0], run[1], offset)
            offset += parameter.partition_numel()


def run_of_shard(parameter: Any) -> tuple[int, int]:
    """Start and length of this rank's part of a parameter that stage 3 has cut, without padding."""
    size = parameter.partition_numel()
    start = min(parameter.ds_zero_partition_rank * size, parameter.ds_numel)
    return start, min(size, parameter.ds_numel - start)


def _swapped_groups(zero: Any) -> frozenset[int]:
    return frozenset(group for group in range(len(zero.fp16_groups)) if zero._swappable_optimizer_subgroup(group))
