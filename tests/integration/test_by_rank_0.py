"""What rank 0 does for all: on two ranks both get its answer, or both its failure; none waits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

RANK = """
import sys
import torch.distributed as dist
from outgrow.errors import IntegrityError
from outgrow.trainers.by_rank_0 import by_rank_0

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)

def refuse():
    raise IntegrityError("torn", where="runs/x", hint="put it back")

def full():
    raise OSError(28, "No space left on device")

print(by_rank_0(rank, lambda: ("of rank", rank)))
for act in (refuse, full):
    try:
        by_rank_0(rank, act)
    except (IntegrityError, OSError) as error:
        print(type(error).__name__, error, getattr(error, "hint", ""))
dist.destroy_process_group()
"""


def test_every_rank_gets_the_answer_or_the_failure(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, text=True) for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert said[0] == said[1]
    assert said[0].splitlines() == [
        "('of rank', 0)",
        "IntegrityError runs/x: torn",
        "  put it back put it back",
        "OSError [Errno 28] No space left on device ",
    ]
