"""Programs that tests run on an embedded Ray cluster of their own; what they saw is said as JSON in the last line."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from outgrow.errors import OutgrowError


def main() -> None:
    from outgrow.cluster.ray_cluster import Target, connect
    from outgrow.recipes.schema.site import Cluster

    programs = {"map_numbers": map_numbers, "build": build, "agent": agent}
    cpus, words = int(sys.argv[1]), json.loads(sys.argv[2])
    cluster = Cluster(address="local", token_file=str(Path("token").resolve()))
    with connect(Target(address=None, reason="a test"), cluster, cpus=cpus, gpus=0):
        said = {name: programs[name](*arguments) for name, arguments in words.items()}
    print(json.dumps(said))


# --- a map ------------------------------------------------------------------------------------------------------------


class Work:
    """Made once a worker process; says so in a file."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        (self._folder / f"made-{os.getpid()}-{time.monotonic_ns()}").touch()

    def __call__(self, item: int) -> int:
        (self._folder / f"ran-{os.getpid()}").touch()
        time.sleep(0.02 if item % 3 else 0.1)
        match item:
            case 1001:
                raise FileNotFoundError(2, "No such file or directory", str(self._folder / "gone.txt"))
            case 1002:
                raise OutgrowError("wrong", where="here", hint="mend it")
            case 1003:
                os.kill(os.getpid(), signal.SIGKILL)
        return item * item


class MakeWork:
    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __call__(self) -> Callable[[int], int]:
        return Work(self._folder)


def map_numbers(folder: str) -> dict[str, Any]:
    """Squares of numbers over two processes, then what becomes of work that fails."""
    from outgrow.cluster import ray_map as module
    from outgrow.cluster.ray_map import ray_map

    module._RETRIES = 1  # each costs the start of a worker
    taken = most = 0

    def numbers() -> Iterator[int]:
        nonlocal taken
        for number in range(40):
            taken += 1
            yield number

    squares = []
    for square in ray_map(MakeWork(folder), numbers(), 2):
        squares.append(square)
        most = max(most, taken - len(squares))
    made = sorted(path.name.split("-")[1] for path in Path(folder).glob("made-*"))
    ran = sorted(path.name.split("-")[1] for path in Path(folder).glob("ran-*"))
    errors = {}
    for item in (1001, 1002, 1003):
        try:
            list(ray_map(MakeWork(folder), [1, item], 2))
        except OutgrowError as error:
            errors[item] = [type(error).__name__, str(error)]
    return {"squares": squares, "most": most, "made": made, "ran": ran, "errors": errors}


# --- a build ----------------------------------------------------------------------------------------------------------


def _command(process: psutil.Process) -> str:
    """The program that a process runs; empty where it has ended meanwhile."""
    try:
        return " ".join(process.cmdline()[:1])
    except psutil.Error:
        return ""


def build(inputs: str) -> dict[str, Any]:
    """The dataset of the recipe and site in the file ``inputs``; kills two workers that are at work."""
    from outgrow.cluster.ray_map import ray_map
    from outgrow.recipes.schema import Recipe
    from outgrow.recipes.schema.site import Site
    from outgrow.streaming import build as builder
    from outgrow.streaming.sources import reading
    from outgrow.streaming.store import Progress

    builder.UNIT_BYTES = reading.UNIT_BYTES = 20_000  # type: ignore[misc]  # many units from little text
    killed: list[int] = []

    def watch(progress: Progress) -> None:
        if progress.stage == "tokens" and len(killed) < 2:
            workers = [p for p in psutil.Process().children(recursive=True) if _command(p).startswith("ray::_run")]
            for worker in workers[:1]:
                worker.kill()
                killed.append(worker.pid)

    recipe, site = json.loads(Path(inputs).read_text())
    result = builder.build(Recipe.model_validate(recipe), Site.model_validate(site), progress=watch, mapper=ray_map)
    return {"store": result.card.store, "killed": len(killed), "card": result.card.to_dict()}


# --- a node agent -----------------------------------------------------------------------------------------------------


def agent(site_file: str) -> str:
    """What a worker is told that starts an agent and is killed at once, as Ray kills one: with all that it has started."""
    import ray

    class Starter:
        def start(self) -> str:
            from outgrow.monitoring.agent.start import ensure_agent
            from outgrow.recipes.schema.site import Site

            return ensure_agent(Site.model_validate(json.loads(Path(site_file).read_text())))

    starter: Any = ray.remote(Starter).remote()
    said: str = ray.get(starter.start.remote())
    ray.kill(starter)
    return said


if __name__ == "__main__":
    main()
