"""Data tiers: whether the disks and buckets keep up with the run, and which of them does not."""

from __future__ import annotations

from outgrow.monitoring import metrics as m
from outgrow.monitoring.dashboards.frame import Page, Row
from outgrow.monitoring.dashboards.panels import Look, Panel, bars, curves, tile
from outgrow.monitoring.dashboards.queries import NODES, RUN, is_, of, rate

BYTES_A_SECOND = Look(unit="Bps")
HERE = (RUN, NODES)


def page() -> Page:
    return Page(
        uid="outgrow-tiers",
        title="outgrow / Data tiers",
        tells="Whether disks and buckets keep up with the run: what is read from where, what is waited for, what goes wrong.",
        run=RUN,
        has_nodes=True,
        rows=[
            Row(title="Now", panels=_now()),
            Row(title="Reading", panels=_reading()),
            Row(title="The first tier", panels=_cache()),
            Row(title="Disks and errors", panels=_disks()),
        ],
    )


def _now() -> list[Panel]:
    hits, misses = f"sum({rate(m.CACHE_HITS, *HERE)})", f"sum({rate(m.CACHE_MISSES, *HERE)})"
    again, fetches = f"sum({rate(m.CACHE_REFETCHES, *HERE)})", f"sum({rate(m.CACHE_FETCHES, *HERE)})"
    return [
        tile(
            "Waiting for data",
            "Share of the ranks' time; above 10% the alert OutgrowDataStarved fires. Then see which tier is slow below, and "
            "give the first tier more room or the run more loader workers.",
            (f"avg({rate(m.RANK_PHASE_SECONDS, *HERE, is_('phase', 'data_wait'))})", "wait"),
            Look(unit="percentunit", decimals=1, limits=((0.05, "orange"), (0.1, "red"))),
            width=4,
        ),
        tile(
            "Hits",
            "Share of the visits of shards that lay on the first tier already. Few hits do no harm while nobody waits: shards"
            " are copied ahead of time.",
            (f"{hits} / ({hits} + {misses})", "hits"),
            Look(unit="percentunit", decimals=1, base="blue"),
            width=4,
        ),
        tile(
            "Fetched again",
            "Share of the copies that had been there before. Above 30% the first tier is too small for the order of the run: "
            "outgrow data simulate says how much is enough.",
            (f"{again} / {fetches}", "again"),
            Look(unit="percentunit", decimals=1, limits=((0.1, "orange"), (0.3, "red"))),
            width=4,
        ),
        tile(
            "First tier in use",
            "Bytes of shards over the room that they may take. Full is normal: a plan of what is needed next fills it.",
            (f"max({of(m.CACHE_BYTES, *HERE)} / {of(m.CACHE_ROOM, *HERE)})", "used"),
            Look(unit="percentunit", decimals=0, base="blue", at_most=1),
            width=4,
        ),
        tile(
            "Fetches due or running",
            "A queue that only grows: the slower tier does not keep up.",
            (f"sum({of(m.CACHE_QUEUE, *HERE)})", "queue"),
            Look(unit="none", base="blue"),
            width=4,
        ),
        tile(
            "Failed reads in the time shown",
            "All tiers, all kinds. Not zero: see Errors below.",
            (f"sum(increase({of(m.TIER_ERRORS, *HERE)}[$__range]))", "errors"),
            Look(unit="none", decimals=0, limits=((0.5, "red"),)),
            width=4,
            empty="none",
        ),
    ]


def _reading() -> list[Panel]:
    return [
        curves(
            "Bytes a second by tier",
            "What is read from where. Most of it from the slowest tier, and waiting: place the dataset nearer (outgrow data "
            "place).",
            [(f"sum by (tier) ({rate(m.TIER_BYTES, *HERE)})", "{{tier}}")],
            BYTES_A_SECOND,
            stacked=True,
        ),
        curves(
            "Speed of a tier while it is read",
            "Bytes over the seconds that reading them took. Well below what the disk can do: a failing disk, or others that "
            "use it.",
            [
                (
                    f"sum by (tier) ({rate(m.TIER_BYTES, *HERE)}) / sum by (tier) ({rate(m.TIER_READ_SECONDS, *HERE)})",
                    "{{tier}}",
                )
            ],
            BYTES_A_SECOND,
        ),
        curves(
            "Shards a second by tier",
            "Shards read whole.",
            [(f"sum by (tier) ({rate(m.TIER_SHARDS, *HERE)})", "{{tier}}")],
            Look(unit="short"),
            stacked=True,
        ),
    ]


def _cache() -> list[Panel]:
    ready = f"min by (node) ({of(m.RANK_LOADER_READY, *HERE)})"
    return [
        curves(
            "Waiting",
            "Seconds a second: of all readers for a shard, and of the ranks for a batch. Readers that wait while ranks do not"
            " is work done ahead; both: the tier is too slow.",
            [
                (f"sum by (node) ({rate(m.CACHE_WAIT_SECONDS, *HERE)})", "readers on {{node}}"),
                (f"sum by (node) ({rate(m.RANK_PHASE_SECONDS, *HERE, is_('phase', 'data_wait'))})", "ranks on {{node}}"),
            ],
            Look(unit="s"),
        ),
        curves(
            "Steps ready ahead",
            "Steps that loader workers hold ready, least of the node's ranks. At 0 the next step waits.",
            [(ready, "{{node}}")],
            Look(unit="none"),
        ),
        curves(
            "Room",
            "Bytes of shards on the first tier, and the room that they may take.",
            [
                (f"sum by (node) ({of(m.CACHE_BYTES, *HERE)})", "used on {{node}}"),
                (f"sum by (node) ({of(m.CACHE_ROOM, *HERE)})", "room on {{node}}"),
            ],
            Look(unit="bytes"),
        ),
        curves(
            "Visits",
            "Visits of shards: hits lay on the first tier already, misses did not.",
            [(f"sum({rate(m.CACHE_HITS, *HERE)})", "hits"), (f"sum({rate(m.CACHE_MISSES, *HERE)})", "misses")],
            Look(unit="short", colours={"hits": "green", "misses": "orange"}),
            stacked=True,
        ),
        curves(
            "Coming and going",
            "Shards a second copied to the first tier, copied again, deleted to make room. Refetches near fetches: too little"
            " room.",
            [
                (f"sum({rate(m.CACHE_FETCHES, *HERE)})", "fetches"),
                (f"sum({rate(m.CACHE_REFETCHES, *HERE)})", "refetches"),
                (f"sum({rate(m.CACHE_EVICTIONS, *HERE)})", "evictions"),
            ],
            Look(unit="short", colours={"fetches": "blue", "refetches": "red", "evictions": "orange"}),
        ),
        curves(
            "Fetch queue",
            "Should come and go in waves; a line that only rises is a tier that does not keep up.",
            [(f"sum by (node) ({of(m.CACHE_QUEUE, *HERE)})", "{{node}}")],
            Look(unit="none"),
        ),
    ]


def _disks() -> list[Panel]:
    used = f"1 - {of(m.TIER_FREE, NODES)} / {of(m.TIER_SIZE, NODES)}"
    return [
        bars(
            "Disks of the tiers",
            "Share of the disk in use, by whatever. Above 95%: the alert OutgrowTierNearlyFull; set reserve or capacity of "
            "the tier.",
            (f"max by (node, tier) ({used})", "{{tier}} on {{node}}"),
            Look(unit="percentunit", at_most=1, limits=((0.9, "orange"), (0.95, "red"))),
        ),
        curves(
            "Free bytes",
            "On the disk that a tier lies on. A steady fall ends in failing checkpoints.",
            [(f"min by (node, tier) ({of(m.TIER_FREE, NODES)})", "{{tier}} on {{node}}")],
            Look(unit="bytes"),
        ),
        curves(
            "Errors, damage, no room",
            "In the time between two points: failed reads by tier and kind, copies that were found damaged and fetched again, "
            "shards read without a place on the first tier. Damage more than once: test the disk and the RAM.",
            [
                (f"sum by (tier, kind) (increase({of(m.TIER_ERRORS, *HERE)}[$__rate_interval]))", "{{tier}}: {{kind}}"),
                (f"sum(increase({of(m.CACHE_HEALED, *HERE)}[$__rate_interval]))", "damaged copies"),
                (f"sum(increase({of(m.CACHE_READ_THROUGH, *HERE)}[$__rate_interval]))", "read without a place"),
            ],
            Look(unit="none"),
            as_bars=True,
        ),
    ]
