"""GPUs and nodes: whether the machines are healthy and busy, whatever runs on them."""

from __future__ import annotations

from outgrow.monitoring import metrics as m
from outgrow.monitoring.dashboards.frame import Page, Row
from outgrow.monitoring.dashboards.panels import Look, Panel, curves, facts, rows, state_line
from outgrow.monitoring.dashboards.queries import NODES, is_, of, rate

THROTTLED = {"free": "green", "held down": "red"}
EACH = "GPU {{gpu}} on {{node}}"


def page() -> Page:
    return Page(
        uid="outgrow-gpus",
        title="outgrow / GPUs and nodes",
        tells="Whether machines are healthy and busy: GPUs, processors, memory, network, and the node agents themselves.",
        run="",
        has_nodes=True,
        rows=[
            Row(title="GPUs", panels=_work()),
            Row(title="Power, heat, errors", panels=_health()),
            Row(title="Nodes", panels=_nodes()),
            Row(title="Node agents", panels=_agents()),
        ],
    )


def _work() -> list[Panel]:
    used = of(m.GPU_MEMORY, NODES, is_("kind", "used"))
    return [
        curves(
            "Utilisation",
            "Share of time in which a kernel ran; it says nothing of how well it ran (that is MFU). A card far below the "
            "others waits: for data, for the host, or it is not used.",
            [(of(m.GPU_UTILISATION, NODES), EACH)],
            Look(unit="percentunit", at_most=1),
            is_table=True,
        ),
        curves(
            "Memory in use",
            "Share of the card's memory, by all processes on it.",
            [
                (f"{used} / ignoring (kind) {of(m.GPU_MEMORY, NODES, is_('kind', 'total'))}", EACH),
            ],
            Look(unit="percentunit", at_most=1, limits=((0.97, "red"),)),
            is_table=True,
        ),
        curves(
            "Clock",
            "Of the streaming multiprocessors. A card that is slower than its sisters at the same load is held down: see "
            "below.",
            [(of(m.GPU_CLOCK, NODES), EACH)],
            Look(unit="hertz"),
            is_table=True,
        ),
        curves(
            "PCIe",
            "Traffic over the last 20 ms. Steady traffic near the bus's limit: offload or pinned copies hold the card up.",
            [(of(m.GPU_PCIE, NODES), f"{EACH} {{{{direction}}}}")],
            Look(unit="Bps"),
            width=12,
        ),
        facts("Devices", "Which card is which.", of(m.GPU_INFO, NODES), height=8),
    ]


def _health() -> list[Panel]:
    throttled = f"1 + max by (node, gpu, reason) ({of(m.GPU_THROTTLED, NODES)})"
    return [
        curves(
            "Power",
            "Share of the power limit. At the limit is normal under load; far below it while busy: waiting, or held down by "
            "heat.",
            [(f"{of(m.GPU_POWER, NODES)} / {of(m.GPU_POWER_LIMIT, NODES)}", EACH)],
            Look(unit="percentunit", at_most=1),
        ),
        curves(
            "Watts",
            "Power drawn, and what it may draw at most.",
            [(of(m.GPU_POWER, NODES), EACH), (f"max by (node) ({of(m.GPU_POWER_LIMIT, NODES)})", "limit on {{node}}")],
            Look(unit="watt"),
        ),
        curves(
            "Temperature",
            "Of the chip. From about 85 degrees cards slow down: clean filters, check fans, lower the power limit.",
            [(of(m.GPU_TEMPERATURE, NODES), EACH)],
            Look(unit="celsius", at_least=20, limits=((83, "orange"), (90, "red"))),
        ),
        state_line(
            "Clock held down",
            "Red while the clock is held down for that reason. power under load is normal; thermal, hardware and brake are "
            "not: the alert OutgrowThrottled says so.",
            (throttled, f"{EACH}: {{{{reason}}}}"),
            THROTTLED,
            width=16,
            height=8,
        ),
        curves(
            "XID errors",
            "Errors that the driver reported, by number. 79: the card fell off the bus. 48, 63, 64, 94, 95: memory. 13, 31: "
            "mostly a fault of the program.",
            [(f"sum by (node, gpu, xid) ({of(m.GPU_XID, NODES)})", f"{EACH}: XID {{{{xid}}}}")],
            Look(unit="none"),
            as_bars=True,
        ),
    ]


def _nodes() -> list[Panel]:
    seconds = rate(m.NODE_CPU_SECONDS, NODES)
    available, size = of(m.NODE_MEMORY, NODES, is_("kind", "available")), of(m.NODE_MEMORY, NODES, is_("kind", "total"))
    return [
        curves(
            "Processors",
            "Share of all cores' time: busy, waiting for disks (iowait), idle. busy near 100% with GPUs that wait: loader "
            "workers or tokenising take the cores. iowait: a disk does not keep up.",
            [(f"sum by (node, mode) ({seconds}) / on (node) group_left () sum by (node) ({seconds})", "{{mode}} on {{node}}")],
            Look(unit="percentunit", at_most=1),
        ),
        curves(
            "RAM available",
            "Share of the node's RAM (or its cgroup's) that programs could still get. Under 5% the kernel starts to kill.",
            [(f"{available} / ignoring (kind) {size}", "{{node}}")],
            Look(unit="percentunit", at_most=1, base="red", limits=((0.05, "orange"), (0.1, "green"))),
        ),
        curves(
            "Network",
            "Bytes a second on all interfaces but loopback. At the line's limit while collectives are slow: the network "
            "bounds the run.",
            [(f"sum by (node, direction) ({rate(m.NODE_NETWORK_BYTES, NODES)})", "{{direction}} on {{node}}")],
            Look(unit="Bps"),
        ),
    ]


def _agents() -> list[Panel]:
    return [
        rows(
            "Agents",
            "The processes that serve these very figures. Errors: see agent.log in the node's folder. Scrapes slower than 0.1"
            " s: too many old runs.",
            {
                "Up for": (f"time() - max by (node) ({of(m.AGENT_START_TIME, NODES)})", "s"),
                "Runs": (f"max by (node) ({of(m.AGENT_RUNS, NODES)})", "none"),
                "Scrape": (f"max by (node) ({of(m.AGENT_SCRAPE_SECONDS, NODES)})", "s"),
            },
            key="node",
            width=12,
            height=6,
        ),
        curves(
            "Sources that could not be read",
            "By part of the agent, in the time between two points; their series are missing then, all others are there.",
            [(f"sum by (node, part) (increase({of(m.AGENT_ERRORS, NODES)}[$__rate_interval]))", "{{part}} on {{node}}")],
            Look(unit="none"),
            as_bars=True,
            width=12,
            height=6,
        ),
    ]
