"""A run as a Ray job on another machine: what is sent there, and its log followed from here.

Sent is a folder with the recipe and a site file, and the outgrow package that runs here, so that nodes without it need nothing
installed but its dependencies, and all nodes run the same code. Never sent: data, weights, secrets, the token. ``${env:NAME}``
stays as it is in the site file and is filled in on the cluster. The token opens the job server from here and is no part of the
job: the cluster's nodes have their own copy.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import outgrow
from outgrow.cluster.ray_environment import apply_environment, driver_environment
from outgrow.cluster.ray_token import read_token
from outgrow.errors import ClusterError
from outgrow.recipes.schema.site import Site
from outgrow.recipes.site_loading import STANDARD_LIBRARY

RECIPE_NAME = "recipe.yaml"
SITE_NAME = "site.yaml"


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """What a job is given: a working folder with recipe and site, the package, and the command to run there."""

    working_folder: Path
    package: Path
    entrypoint: str


def pack(folder: Path, *, recipe: Path, site: Mapping[str, Any], overrides: Sequence[str], flags: Sequence[str]) -> Parcel:
    """The parcel of ``outgrow train RECIPE overrides flags``, laid out below the empty ``folder``.

    ``site`` is a site file's data as its YAML has it, secrets as ``${env:NAME}``.
    """
    work = folder / "work"
    work.mkdir()
    shutil.copyfile(recipe, work / RECIPE_NAME)
    (work / SITE_NAME).write_text(yaml.safe_dump(dict(site), sort_keys=False, allow_unicode=True))
    # The folders of the package may be links into a checkout; copied, they are plain folders.
    package = shutil.copytree(Path(outgrow.__file__).parent, folder / "outgrow", ignore=shutil.ignore_patterns("__pycache__"))
    words = ["python", "-m", "outgrow", "train", RECIPE_NAME, *overrides, "--site", SITE_NAME, *flags]
    return Parcel(working_folder=work, package=package, entrypoint=shlex.join(words))


def site_to_send(raw: Mapping[str, Any], site: Site) -> dict[str, Any]:
    """The data of a site file that means the same in another folder.

    ``raw`` is what the file holds, ``site`` the same one loaded and bound to the recipe: its folders are absolute, and it
    knows the recipe's relative paths. Text with ``${env:NAME}`` stays as it is. ``cluster`` is left out: a job has its own.
    """
    data = {key: value for key, value in raw.items() if key != "cluster"}
    given: Mapping[str, str] = raw.get("sources") or {}
    sources = {name: folder for name, folder in site.sources.items() if name in given or name != STANDARD_LIBRARY}
    data |= {key: _portable(raw[key], getattr(site, key)) for key in ("storage", "cache") if key in raw}
    if sources:
        data["sources"] = {name: _portable(given.get(name, ""), folder) for name, folder in sources.items()}
    return {"schema": 1} | data


def _portable(raw: str, resolved: str) -> str:
    return raw if "${" in raw else resolved


class JobServer:
    """The job server of a Ray cluster at an ``http://host:port``, opened with the token."""

    def __init__(self, address: str, token_file: str) -> None:
        token = read_token(token_file, os.environ)
        # Ray's client would go to these instead of the address that it is given.
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            os.environ.pop(name, None)
        apply_environment(driver_environment(token_file, embedded=False, environment=os.environ))
        from ray.job_submission import JobSubmissionClient

        self.address = address
        refuse_open_server(address)
        try:
            self._client = JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"})
        except (RuntimeError, ConnectionError) as error:
            raise _unreachable(address, error) from error

    def submit(self, parcel: Parcel, name: str) -> str:
        """The id of the job that now runs ``parcel``. Raises ``ClusterError`` where the server does not take it."""
        try:
            job_id: str = self._client.submit_job(
                entrypoint=parcel.entrypoint,
                runtime_env={"working_dir": str(parcel.working_folder), "py_modules": [str(parcel.package)]},
                metadata={"outgrow_run": name},
            )
        except RuntimeError as error:
            raise _unreachable(self.address, error) from error
        return job_id

    def follow(self, job_id: str, write: Callable[[str], None]) -> int:
        """The exit code of the job once it has ended; ``write`` gets its log as it comes."""

        async def tail() -> None:
            async for text in self._client.tail_job_logs(job_id):
                write(text)

        asyncio.run(tail())
        details = self._client.get_job_info(job_id)
        if details.driver_exit_code is not None:
            return int(details.driver_exit_code)
        if details.status == "SUCCEEDED":
            return 0
        raise ClusterError(f"job {job_id} ended as {details.status}: {details.message}")

    def how_to_stop(self, job_id: str) -> str:
        return f"ray job stop {job_id} --address {self.address}"

    def how_to_follow(self, job_id: str) -> str:
        return f"ray job logs {job_id} --follow --address {self.address}"


def refuse_open_server(address: str) -> None:
    """Nothing where the job server asks for a token. Raises ``ClusterError`` where it does not, or does not answer."""
    import requests

    try:
        status = requests.get(f"{address.rstrip('/')}/api/version", timeout=10).status_code
    except requests.RequestException as error:
        raise _unreachable(address, error) from error
    if status != requests.codes.unauthorized:
        raise ClusterError(
            f"the job server at {address} answers {status} to a caller without a token",
            hint="start its head with a token: RAY_AUTH_MODE=token ray start --head",
        )


def _unreachable(address: str, error: Exception) -> ClusterError:
    text = str(error).strip().splitlines()
    return ClusterError(
        f"the job server at {address} cannot be used: {text[0] if text else type(error).__name__}",
        hint="give the address of the head's dashboard: --address http://host:8265, or cluster.dashboard in site.yaml",
    )
