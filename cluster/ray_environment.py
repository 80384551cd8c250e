"""Every environment variable that outgrow sets for Ray, in one place; ``outgrow plan`` lists them.

Ray reads most of its settings when it is first imported, so ``ray_cluster.connect`` puts them in place before that. The token
itself never goes through a variable of ours: Ray is told the file that holds it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def driver_environment(token_file: str, *, embedded: bool, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of the process that runs ``outgrow train``, and of an embedded cluster that it starts.

    A token that ``environment`` already names is left alone: inside a Ray job it is the cluster's own.
    """
    variables = {
        # Nobody joins, and no driver talks to, a cluster without its token.
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Workers keep the working folder of the job, so that a recipe's own modules are found.
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        # A lost rank is noticed after this many seconds; Ray's own default is 2.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    }
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(environment):
        variables["RAY_AUTH_TOKEN_PATH"] = str(Path(token_file).expanduser())
    if embedded:
        # Ray's switch for machines that are one node: all of its servers, metrics too, listen on loopback alone.
        variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    return variables


def worker_environment(threads: int) -> dict[str, str]:
    """The variables of every rank."""
    return {"OMP_NUM_THREADS": str(threads)}


def apply_environment(variables: Mapping[str, str]) -> None:
    """Set ``variables`` in this process and for what it starts; must come before Ray is imported."""
    os.environ.update(variables)
