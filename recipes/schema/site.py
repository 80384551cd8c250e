"""``Site``: where runs go on this machine or cluster. Nothing in it changes what is learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from outgrow.errors import SiteError
from outgrow.recipes.schema.monitoring import Monitoring, Prices
from outgrow.recipes.schema.options import Options, Value, clear_text, in_clear
from outgrow.recipes.schema.section import Mark, Section
from outgrow.recipes.schema.tiers import Placement, Tier, tier_rules
from outgrow.storage import Storage

Auto = Literal["auto"]
Positive = Annotated[int, Field(ge=1)]
Location = Annotated[str, Mark.LOCATION]


class Cluster(Section):
    """The Ray cluster."""

    address: str = "auto"
    """``auto``: the cluster that this machine belongs to, else an embedded one; ``local``: always an embedded one; or
    ``host:port`` of a head."""
    dashboard: str = "http://127.0.0.1:8265"
    """Address of the job server that ``outgrow submit`` talks to."""
    token_file: Location = "~/.ray/auth_token"
    """File with the cluster's token, mode 0600."""


class Site(Section):
    """Folders, buckets and machines that a recipe runs on."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    """Version of this format; 1."""
    storage: Location = "~/.local/share/outgrow"
    """Folder or URL (``s3://bucket/prefix``) that datasets and runs are kept in; several nodes need one that all reach."""
    storage_options: Options = {}
    """Options of the URL's fsspec file system; secrets as ``${env:NAME}``."""
    cache: Location = "~/.cache/outgrow"
    """Local folder, fast, for work that is not kept; the first tier where ``storage`` is a URL and there are no ``tiers``."""
    tiers: tuple[Tier, ...] = ()
    """Disks and buckets, fastest first, the folder of ``storage`` among them or not. A dataset that lies on a slower one is
    read through the first, where its shards are copied shortly before they are needed."""
    place: Placement = Placement()
    """What is to lie whole on which tiers."""
    sources: dict[str, Location] = {}
    """Names that recipes use for data and models, and the folder of each; ``python-stdlib``, the running Python's own
    library, is always there."""
    cluster: Cluster = Cluster()
    """The Ray cluster."""
    monitoring: Monitoring = Monitoring()
    """What runs show, and to whom."""
    prices: Prices = Prices()
    """What machines cost."""
    workers: Auto | Positive = "auto"
    """Ranks of a run; ``auto``: one a GPU, or one on a machine without."""
    threads_per_worker: Auto | Positive = "auto"
    """CPU threads a rank; ``auto`` divides the cores of a node among its ranks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What ranks compute on; ``auto``: GPUs where there are any."""
    device_flops: Annotated[float, Field(gt=0)] | None = None
    """Floating-point operations a second that the vendor states for one device at the recipe's precision, dense; for a device
    that outgrow does not know. Model FLOPs utilisation is shown against it."""
    build_processes: Auto | Positive = "auto"
    """Processes that ``outgrow data build`` tokenises with; ``auto``: one a core, with ``--ray`` one a CPU of the cluster."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if "://" in self.cache:
            yield "cache", f"given '{self.cache}'; allowed: a local folder"
        yield from tier_rules(self.tiers, self.place)

    def open_storage(self) -> Storage:
        """The root of datasets and runs. Raises ``SiteError`` where fsspec cannot open such a URL."""
        return open_place(self.storage, self.storage_options, "storage")

    def locate(self, name: str) -> str:
        """The folder of a name that a recipe uses. Raises ``SiteError`` where the site does not know it.

        ``recipes.bind`` has already added every name of the recipe, paths relative to it included.
        """
        try:
            return self.sources[name]
        except KeyError:
            known = ", ".join(sorted(self.sources)) or "none"
            raise SiteError(
                f"no source named '{name}'; known: {known}", hint=f"add it under sources: in site.yaml: {name}: /folder"
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """Plain data with secrets IN CLEAR, for handing to a worker in memory; never print or write it."""
        data = self.model_dump(mode="json", by_alias=True)
        data["storage_options"] = in_clear(self.storage_options)
        data["monitoring"]["alert_webhook"] = clear_text(self.monitoring.alert_webhook)
        if self.monitoring.remote_write is not None:
            data["monitoring"]["remote_write"]["url"] = clear_text(self.monitoring.remote_write.url)
        for tier, own in zip(data["tiers"], self.tiers, strict=True):
            tier["options"] = in_clear(own.options)
        return data


def open_place(path: str, options: Mapping[str, Value], key: str) -> Storage:
    """The folder or bucket that ``key`` of the site names. Raises ``SiteError`` where fsspec cannot open such a URL."""
    try:
        return Storage(path, in_clear(options))
    except (ValueError, ImportError) as error:
        protocol = path.partition("://")[0]
        raise SiteError(
            f"{key}: a URL that begins with {protocol}:// cannot be opened here: {error}",
            hint="give a folder, or install the fsspec package of that store (pip install 'outgrow[s3]' for s3://)",
        ) from None
