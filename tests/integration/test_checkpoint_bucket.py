"""Checkpoints and the storage view on an S3 bucket, served by moto on loopback."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from outgrow.storage import Storage
from outgrow.trainers.checkpoint.catalog import list_checkpoints
from outgrow.trainers.checkpoint.commit import Group, StepState
from outgrow.trainers.checkpoint.reader import CheckpointReader
from outgrow.trainers.checkpoint.resume import resume
from outgrow.trainers.checkpoint.retention import Retention
from outgrow.trainers.checkpoint.saving import Checkpointer
from outgrow.trainers.regions import fill

RUN = "runs/tiny"
CHECKPOINTS = f"{RUN}/checkpoints"


@pytest.fixture(scope="module")
def storage() -> Iterator[Storage]:
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    options = {"key": "test", "secret": "test", "endpoint_url": f"http://{host}:{port}"}
    storage = Storage("s3://bucket/some/prefix", options)
    storage.fs.mkdir("bucket")
    yield storage
    server.stop()


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    return {f"model/{i}": torch.arange(5000.0) * i + step for i in range(4)} | {"optim/step": torch.tensor(float(step))}


def save(storage: Storage, step: int, world: int, attempt: str) -> None:
    tensors = tensors_of(step)
    savers = [
        Checkpointer(storage, Group(RUN, attempt, rank, world), tensors, Retention(2, 0), chunk_bytes=7000, patience_s=60)
        for rank in range(world)
    ]
    for saver in savers:
        saver.save(tensors, StepState(step, {"next_step": step}, {}, {}))
    for saver in savers:
        saver.wait()
        assert saver.failures == 0, saver.results()


def loaded_step(storage: Storage) -> tuple[int, list[str]]:
    """The step that loads, bit for bit, and the folders that were refused."""
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(0).items()}

    def fill_all(reader: CheckpointReader) -> None:
        for name, tensor in loaded.items():
            fill(tensor, name, reader)

    resumed = resume(storage, RUN, fill_all)
    assert resumed.reader is not None
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors_of(resumed.reader.step).items())
    return resumed.reader.step, [refused.folder for refused in resumed.refused]


def test_checkpoints_on_a_bucket_are_saved_kept_resumed_and_refused(storage: Storage) -> None:
    for step, world in [(10, 1), (20, 2), (30, 2)]:
        save(storage, step, world, "one")
        assert loaded_step(storage) == (step, [])
    assert [ref.step for ref in list_checkpoints(storage, RUN)] == [30, 20]
    assert storage.names(CHECKPOINTS) == ["step-00000020", "step-00000030"]

    key = f"{CHECKPOINTS}/step-00000030/rank-00001.safetensors"
    data = bytearray(storage.read(key))
    data[-1] ^= 1
    storage.write(key, bytes(data))
    assert loaded_step(storage) == (20, [f"{CHECKPOINTS}/step-00000030"])

    save(storage, 30, 1, "two")
    assert loaded_step(storage) == (30, [])
    storage.write(f"{CHECKPOINTS}/.saving-00000040-dead/rank-00000.safetensors", b"half")
    storage.remove(f"{CHECKPOINTS}/step-00000030/COMMITTED")
    assert loaded_step(storage) == (20, [])
    save(storage, 40, 2, "three")
    assert storage.names(CHECKPOINTS) == ["step-00000020", "step-00000040"]


def test_the_storage_view_means_the_same_on_a_bucket(storage: Storage) -> None:
    storage.write("d/a", b"0123456789")
    storage.write("d/sub/b", b"12")
    assert storage.names("d") == ["a", "sub"]
    assert storage.sizes("d") == {"a": 10}
    assert storage.read_range("d/a", 2, 5) == b"234"
    assert storage.read_range("d/a", 8, 50) == b"89"
    assert storage.names("absent") == [] and storage.sizes("absent") == {}
    with storage.open_write("d/streamed") as file:
        file.write(b"x" * 100)
    assert storage.sizes("d")["streamed"] == 100
    assert storage.create("d/lock", b"first")
    assert not storage.create("d/lock", b"second")
    storage.rename("d", "e/f")
    assert storage.names("d") == [] and storage.names("e/f") == ["a", "lock", "streamed", "sub"]
    assert storage.read("e/f/sub/b") == b"12"
    storage.remove("e")
    storage.remove("e")
    assert not storage.exists("e/f/a")
    assert storage.free_bytes() is None
