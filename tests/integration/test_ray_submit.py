"""One Ray head with a token, as a user starts it: runs join it, jobs are submitted to it, strangers are turned away."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from tiny_runs import ROOT, Place, head, tiny_place, wait_for

pytestmark = pytest.mark.cluster

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with tiny_place(tmp_path_factory.mktemp("head")) as made:
        yield made


@pytest.fixture(scope="module")
def server(place: Place) -> Iterator[str]:
    with head(place) as address:
        yield address


def with_token(place: Place) -> dict[str, str]:
    return place.environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(place.folder / "token")}


def api(place: Place, server: str, path: str) -> requests.Response:
    token = (place.folder / "token").read_text()
    return requests.get(f"{server}{path}", headers={"Authorization": f"Bearer {token}"}, timeout=10)


def test_a_caller_without_the_token_is_turned_away(place: Place, server: str) -> None:
    assert requests.get(f"{server}/api/jobs/", timeout=10).status_code == 401
    assert requests.get(f"{server}/api/jobs/", headers={"Authorization": "Bearer wrong"}, timeout=10).status_code == 403
    assert api(place, server, "/api/jobs/").status_code == 200


def test_a_command_without_the_token_says_what_it_lacks(place: Place, server: str, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(f"schema: 1\nstorage: {tmp_path}/storage\ncluster: {{token_file: {tmp_path}/none}}\n")
    for words in (["submit", "recipe.yaml", "--address", server], ["train", "recipe.yaml"]):
        command = place.start(*words, "--site", str(site))
        assert command.wait(60) == 2, place.log()
        assert f"error: no token in {tmp_path}/none" in place.log()


def test_a_job_survives_ctrl_c_is_stopped_as_told_and_resumed_by_the_same_command(place: Place, server: str) -> None:
    words = ["submit", "recipe.yaml", "run.name=job", "--address", server]
    following = place.start(*words)
    place.wait_for_step(12, following)
    following.send_signal(signal.SIGINT)
    assert following.wait(60) == 130, place.log()
    said = place.log()
    assert "the job goes on" in said
    job_id = re.search(r"job (raysubmit_\w+) at", said)
    assert job_id
    assert api(place, server, f"/api/jobs/{job_id[1]}").json()["status"] == "RUNNING"

    stop = re.search(r"stop it: +(.*)", said)
    assert stop
    subprocess.run(shlex.split(stop[1]), env=with_token(place), check=True, capture_output=True)
    assert api(place, server, f"/api/jobs/{job_id[1]}").json()["status"] == "STOPPED"
    assert "stopped; the same command resumes" in api(place, server, f"/api/jobs/{job_id[1]}/logs").json()["logs"]

    resumed = place.run(*words)
    assert "resuming run runs/job-" in resumed
    assert "step 50/50  finished" in resumed
    assert "the head on this machine" not in resumed
    assert "named by RAY_ADDRESS" in resumed


def test_no_token_is_seen_in_jobs_logs_or_runtime_environments(place: Place, server: str) -> None:
    token = (place.folder / "token").read_text()
    jobs = api(place, server, "/api/jobs/").json()
    assert jobs
    assert token not in json.dumps(jobs)
    ray_folder = Path(place.environment["RAY_TMPDIR"])
    with_the_token = [p for p in ray_folder.rglob("*") if p.is_file() and token.encode() in p.read_bytes()]
    assert with_the_token == []


def test_train_joins_the_head_and_a_ranks_error_is_the_users_error(place: Place, server: str) -> None:
    """The run's dataset is damaged: the rank that reads it says so, and the command says the same, without a traceback."""
    damaged = ["run.name=damaged", "data.tokenizer.vocab_size=310"]
    place.run("data", "build", "recipe.yaml", *damaged)
    shard = max((place.folder / "storage").rglob("words/train/*.mds"), key=lambda path: path.stat().st_mtime)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)

    command = place.start("train", "recipe.yaml", *damaged)
    assert command.wait(120) == 1
    said = place.log()
    assert "(the head on this machine)" in said
    assert re.search("shard.*the bytes differ from their .*digest", said)
    assert "Traceback" not in said
    assert "starting again" not in said


def test_ray_job_submit_runs_the_quickstart_from_a_working_directory(place: Place, server: str) -> None:
    """The very command of the documentation, made small by overrides."""
    site = place.folder / "quick.yaml"
    site.write_text(
        f"schema: 1\nstorage: {place.folder}/quick\ncache: {place.folder}/cache\nworkers: 2\n"
        f"monitoring: {{agent: false, folder: {place.folder}/monitoring}}\n"
    )
    small = [
        *("duration.steps=3", "data.sequence_length=32", "data.tokenizer.vocab_size=300", "validation.max_rows=4"),
        *("data.streams[0].source.include=[json/*.py]", "model.config.hidden_size=32", "model.config.num_hidden_layers=1"),
    ]
    words = ["--working-dir", ".", "--address", server, "--", "outgrow", "train", "recipes/presets/quickstart.yaml"]
    done = subprocess.run(
        [RAY, "job", "submit", *words, *small, "--site", str(site)],
        cwd=ROOT,
        env=with_token(place),
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 3/3  finished" in done.stdout


def test_ctrl_c_ends_the_ranks_on_the_cluster_and_frees_the_run(place: Place, server: str) -> None:
    command = place.start("train", "recipe.yaml", "run.name=stopped")
    place.wait_for_step(3, command)
    os.kill(command.pid, signal.SIGINT)
    assert command.wait(60) == 130, place.log()
    assert "stopped; the same command resumes from the newest checkpoint" in place.log()

    def no_ranks() -> bool:
        return not any("RayTrainWorker" in " ".join(process.cmdline()) for process in place.processes())

    wait_for(no_ranks, "end of the ranks", place.log, timeout_s=20)
    assert "stopped" in place.run("runs", "list")
