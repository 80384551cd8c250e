"""Rate of a verified copy against ``cp`` and one read of the copy, on the same disk.

    python benchmarks/copy_rate.py --mbytes 512 --files 4 --rounds 5

Each round copies the same files twice, each side first in turn: by ``cp``, an fsync of each copy and one plain read of it from
the disk, without a digest; and by ``copy_verified``, which copies, syncs, reads back from the disk and computes sha256. Before
each side the files are dropped from memory, and so is each copy before it is read: both sides read the disk. ``cp`` alone is no
copy on the disk yet; without the fsync nothing could be read back from there. With ``--expected`` the digests are known before,
as those of shards are; without, the source is digested as well.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from outgrow.storage import Storage
from outgrow.streaming.tiers.transfer import copy_verified

_READ_BYTES = 8 << 20


def drop_from_memory(folder: Path) -> None:
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def read_plainly(path: Path) -> None:
    buffer = bytearray(_READ_BYTES)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def cp_and_read(source: Path, target: Path) -> None:
    """File by file, as the other side does it."""
    for path in sorted(source.iterdir()):
        copy = target / path.name
        subprocess.run(["cp", str(path), str(copy)], check=True)
        fd = os.open(copy, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
        read_plainly(copy)


def verified(source: Path, target: Path, digests: dict[str, str]) -> None:
    origin, copies = Storage(str(source)), Storage(str(target))
    for path in sorted(source.iterdir()):
        expected = digests.get(path.name)
        copy_verified(origin, path.name, copies, path.name, expected=expected, limiter=None, on_bytes=lambda _: None)


def seconds(action: Callable[[Path, Path], None], source: Path, target: Path) -> tuple[float, float]:
    """Wall and CPU seconds of one side, from files that are not in memory to copies that are on the disk."""
    target.mkdir()
    drop_from_memory(source)
    start, cpu = time.monotonic(), sum(os.times()[:4])
    action(source, target)
    took_s, cpu_s = time.monotonic() - start, sum(os.times()[:4]) - cpu
    return took_s, cpu_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbytes", type=int, default=512, help="of one file")
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="on the disk to measure; default: the system's temporary folder")
    parser.add_argument("--expected", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder, "source")
        source.mkdir()
        digests = {}
        for number in range(options.files):
            data = os.urandom(options.mbytes * 1_000_000)
            (source / f"{number}.bin").write_bytes(data)
            if options.expected:
                digests[f"{number}.bin"] = hashlib.sha256(data).hexdigest()
        mbytes = options.files * options.mbytes
        print(f"{options.files} files of {options.mbytes} MB; Python {platform.python_version()}, {os.cpu_count()} cores")
        ratios = []
        for number in range(options.rounds):
            sides = [("cp", cp_and_read), ("verified", lambda source, target: verified(source, target, digests))]
            took = {
                name: seconds(action, source, Path(folder, name)) for name, action in (sides if number % 2 else sides[::-1])
            }
            # Not between the sides: the disk frees the blocks of removed files while the next ones are written.
            for name, _ in sides:
                shutil.rmtree(Path(folder, name))
            os.sync()
            time.sleep(2)
            ratios.append(took["cp"][0] / took["verified"][0])
            rates = {name: f"{mbytes / wall_s:.0f} MB/s ({cpu_s:.1f} CPU s)" for name, (wall_s, cpu_s) in took.items()}
            print(
                f"round {number}: cp, fsync and read {rates['cp']}, verified copy {rates['verified']}, "
                f"ratio {ratios[-1]:.2f}, load {os.getloadavg()[0]:.0f}",
                flush=True,
            )
    print(
        f"verified copy / cp, fsync and read: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
