"""``tiers`` and ``place`` of a site: the disks and buckets that data moves between, and what is to lie where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from outgrow.recipes.schema.options import Options
from outgrow.recipes.schema.section import Mark, Section
from outgrow.recipes.schema.sizes import Rate, Size, parse_rate, parse_size

Auto = Literal["auto"]


class Tier(Section):
    """A disk or bucket. The site lists them fastest first."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")
    """Small letters, digits, ``-`` and ``_``, at most 32, such as ``nvme``."""
    path: Annotated[str, Mark.LOCATION]
    """Folder or URL (``s3://bucket/prefix``, ``gs://bucket/prefix``) that outgrow may write below; the first is a folder."""
    options: Options = {}
    """Options of the URL's fsspec file system; secrets as ``${env:NAME}``."""
    capacity: Auto | Size = "auto"
    """Most that copies made by outgrow may take here, such as ``500 GB``; ``auto``: what the disk has, less ``reserve``."""
    reserve: Size = "10 GB"
    """Free space of the disk that is never touched; not asked of a bucket."""
    run_cache: Auto | Size = "auto"
    """Most that the copied shards of one run may take of the first tier; ``auto``: all of its dataset, or else half of what is
    left."""
    speed: Auto | Rate = "auto"
    """What the tier reads, such as ``180 MB/s``, for forecasts; ``auto``: what was measured last."""
    limit: Auto | Rate = "auto"
    """Most that one process of outgrow reads from or writes to it, such as ``60 MB/s``; ``auto``: no limit."""
    parallel: Auto | Annotated[int, Field(ge=1, le=64)] = "auto"
    """Files that are read at once; ``auto``: 1 on a disk, so that its head need not move, and 8 on a bucket."""

    @property
    def is_bucket(self) -> bool:
        return "://" in self.path

    @property
    def capacity_bytes(self) -> int | None:
        return None if self.capacity == "auto" else parse_size(self.capacity)

    @property
    def reserve_bytes(self) -> int:
        return 0 if self.is_bucket else parse_size(self.reserve)

    @property
    def run_cache_bytes(self) -> int | None:
        return None if self.run_cache == "auto" else parse_size(self.run_cache)

    @property
    def bytes_per_s(self) -> float | None:
        return None if self.speed == "auto" else parse_rate(self.speed)

    @property
    def limit_bytes_per_s(self) -> float | None:
        return None if self.limit == "auto" else parse_rate(self.limit)

    @property
    def num_parallel(self) -> int:
        if self.parallel == "auto":
            return 8 if self.is_bucket else 1
        return self.parallel


class Placement(Section):
    """Tiers that whole copies belong on, by what is copied; ``outgrow data place --apply`` makes them. Originals stay."""

    datasets: tuple[str, ...] = ()
    """Built datasets."""
    weights: tuple[str, ...] = ()
    """Folders of weights that ``sources`` names."""
    quantised: tuple[str, ...] = ()
    """Quantised weights."""
    checkpoints: tuple[str, ...] = ()
    """Checkpoints of runs."""

    def wanted(self) -> Iterator[tuple[str, int, str]]:
        """Every (key, number in its list, tier)."""
        for key in type(self).model_fields:
            yield from ((key, number, tier) for number, tier in enumerate(getattr(self, key)))


def tier_rules(tiers: tuple[Tier, ...], place: Placement) -> Iterator[tuple[str, str]]:
    """Broken rules across tiers: key below the site, and message."""
    names = [tier.name for tier in tiers]
    for number, tier in enumerate(tiers):
        if tier.name in names[:number]:
            yield f"tiers[{number}].name", f"'{tier.name}' is given twice; each tier needs a name of its own"
        if tier.name == "storage":
            yield f"tiers[{number}].name", "'storage' is the name of the place that storage: gives; choose another"
        if number == 0 and tier.is_bucket:
            yield (
                "tiers[0].path",
                f"given '{tier.path}'; the first tier holds what is read next: a folder on a fast disk",
            )
        if number > 0 and tier.run_cache != "auto":
            yield f"tiers[{number}].run_cache", f"given '{tier.run_cache}'; only the first tier keeps copied shards for runs"
        for other, before in enumerate(tiers[:number]):
            if _within(tier.path, before.path) or _within(before.path, tier.path):
                yield f"tiers[{number}].path", f"'{tier.path}' and tiers[{other}].path lie within one another"
    for key, number, tier_name in place.wanted():
        if tier_name not in names:
            known = ", ".join(names) or "none"
            yield f"place.{key}[{number}]", f"there is no tier '{tier_name}'; tiers: {known}"


def _within(path: str, other: str) -> bool:
    return f"{path.rstrip('/')}/".startswith(f"{other.rstrip('/')}/")
