"""An agent from its start to its end: it takes the node's seat, serves, looks at the runs each second, and ends when idle."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from outgrow.errors import OutgrowError
from outgrow.monitoring.agent.discovery import Directory, Node, Registration, TargetGroup, ray_targets
from outgrow.monitoring.agent.families import Collector
from outgrow.monitoring.agent.host import HostSource, local_tiers
from outgrow.monitoring.agent.nvml import NvmlSource
from outgrow.monitoring.agent.nvml_live import LiveReader
from outgrow.monitoring.agent.prune import prune, prune_stalls
from outgrow.monitoring.agent.rank_source import RankSource
from outgrow.monitoring.agent.run_source import RunSource
from outgrow.monitoring.agent.samples import Source
from outgrow.monitoring.agent.scan import RunView, Scanner, shown
from outgrow.monitoring.agent.seat import Seat
from outgrow.monitoring.agent.server import Route, health_route, json_route, listen, metrics_route, told
from outgrow.monitoring.agent.shards import ShardsSource
from outgrow.monitoring.agent.stacks import FOLDER as STALLS
from outgrow.monitoring.agent.stacks import StallStacks
from outgrow.monitoring.agent.start import LOG, Running, end_agent, find_agent
from outgrow.monitoring.recording.attempt import node_folder, records_folder
from outgrow.monitoring.recording.recorder import start_ticks
from outgrow.monitoring.recording.slots import FORMAT
from outgrow.monitoring.stack.access import host_port, url_of
from outgrow.recipes.schema.site import Site

log = logging.getLogger(__name__)

TICK_S = 1.0
PRUNE_S = 3600.0
LOG_BYTES = 1 << 20


def serve(site: Site, *, keep: bool, detached: bool = False, on_serving: Callable[[], None] = lambda: None) -> None:
    """Be the node's agent until SIGTERM or Ctrl-C, or until no run was live for ``monitoring.idle_s`` unless ``keep``.

    Returns at once where the node has an agent, unless ``keep`` and that one would end when idle: then it takes its place.
    ``detached``: nobody watches, and all that is said goes to its log. ``on_serving`` is called once it answers. Raises
    ``MonitorError`` or ``SiteError`` where it cannot listen, and ``OSError`` where the node's folder cannot be made.
    """
    os.umask(0o077)
    logging.raiseExceptions = False  # a full disk takes no log, and that is all
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, force=True)
    if detached:
        _shed_inherited()
    node = node_folder(site)
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        seat = Seat.take(node)
        running = find_agent(node) if seat is None else None
        if running is not None and keep and not running.keep:
            end_agent(node)  # it would end when idle, and this one is asked to stay
            seat = Seat.take(node)
        if seat is None:
            running = find_agent(node)
            log.info("this node has an agent already%s", f" at {running.url}" if running else "")
            return
        try:
            _Agent(site, node, seat, keep=keep, log_file=node / LOG if detached else None).run(ended, on_serving)
        except OutgrowError as error:
            if not detached:
                raise
            log.error("%s", error)
        finally:
            seat.leave()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Agent:
    """One agent that has the seat. Sources, server and the look at the runs share one scanner."""

    def __init__(self, site: Site, node: Path, seat: Seat, *, keep: bool, log_file: Path | None) -> None:
        host = node.name
        self._site, self._node, self._seat, self._keep, self._log_file = site, node, seat, keep, log_file
        self._records = records_folder(node)
        self._scanner = Scanner(self._records)
        self._stacks = StallStacks(node / STALLS)
        sources: list[Source] = [RunSource(), RankSource(), ShardsSource()]
        sources += [HostSource(host, local_tiers(site)), NvmlSource(LiveReader(), host)]
        self._neighbours = _Neighbours(site, host)
        own = site.monitoring
        routes: dict[str, Route] = {
            "/metrics": metrics_route(Collector(host, self._shown, sources)),
            "/targets": json_route(self._neighbours.targets),
            "/targets/ray": json_route(lambda: ray_targets(own.ray_discovery)),
            "/runs": json_route(lambda: told(self._shown())),
            "/health": health_route(),
        }
        others = (own.prometheus_port, own.alertmanager_port, own.grafana_port)
        self._server = listen(own.address, own.agent_port, own.access, routes, others)
        port = int(self._server.server_address[1])
        self._running = Running(
            pid=os.getpid(),
            pid_start=start_ticks(os.getpid()),
            url=url_of(own.address, port, tls=bool(own.access.certificate)),
            address=own.address,
            port=port,
            started=time.time(),
            keep=keep,
            format=FORMAT,
        )
        self._live_at = time.monotonic()
        self._pruned_at = -PRUNE_S

    def run(self, ended: threading.Event, on_serving: Callable[[], None]) -> None:
        serving = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="server", daemon=True)
        serving.start()
        self._neighbours.start(self._running)
        self._seat.show(self._running)
        on_serving()
        log.info("serving on %s", self._running.url)
        try:
            while not ended.wait(TICK_S) and not self._seat.is_lost:
                try:
                    self._tick()
                except Exception:  # whatever a disk does: metrics are served meanwhile
                    log.exception("the runs could not be looked at")
                if self._is_done():  # after the look, however long ago the one before was
                    break
        finally:
            self._seat.hide()
            self._server.shutdown()
            self._server.server_close()
            self._neighbours.end()
            log.info("ended")

    def _shown(self) -> Sequence[RunView]:
        return shown(self._scanner.scan(), time.time())

    def _tick(self) -> None:
        self._seat.show(self._running)  # somebody may have cleaned up
        runs = self._scanner.scan()
        self._stacks.watch(runs)
        now = time.monotonic()
        if self._seat.was_asked() or self._scanner.has_unnamed_life or any(run.is_live for run in runs):
            self._live_at = now
        if now - self._pruned_at > PRUNE_S:
            self._pruned_at = now
            prune(self._records, time.time())
            prune_stalls(self._node / STALLS, time.time())
        if self._log_file is not None:
            _bound_log(self._log_file)

    def _is_done(self) -> bool:
        """Whether it has been idle for long enough, and nobody has wanted it up to the very moment when it cannot be found."""
        idle_s = time.monotonic() - self._live_at
        if self._keep or idle_s < self._site.monitoring.idle_s:
            return False
        self._seat.hide()
        if self._seat.was_asked():
            self._live_at = time.monotonic()
            self._seat.show(self._running)
            return False
        log.info("no run for %.0f s", idle_s)
        return True


class _Neighbours:
    """The agents of other nodes, by records in the site's storage. It is opened in a thread: a bucket may not answer."""

    def __init__(self, site: Site, host: str) -> None:
        self._site, self._host = site, host
        self._url = ""
        self._directory: Directory | None = None
        self._registration: Registration | None = None

    def start(self, running: Running) -> None:
        scheme = running.url.partition("://")[0]
        self._url = f"{scheme}://{host_port(_far_address(running.address), running.port)}"
        threading.Thread(target=self._open, name="neighbours", daemon=True).start()

    def targets(self) -> list[TargetGroup]:
        if self._directory is not None:
            return self._directory.targets()
        own = Node.read({"host": self._host, "url": self._url, "time": 0.0})
        return [own.group()] if own is not None else []

    def end(self) -> None:
        if self._registration is not None:
            self._registration.withdraw()

    def _open(self) -> None:
        try:
            storage = self._site.open_storage()
            registration = Registration(storage, self._host, self._url)
            self._directory = Directory(storage, self._host, self._url)
            registration.start()
            self._registration = registration
        except Exception as error:  # a package that is missing, a host name that no URL can hold
            log.warning("the agents of other nodes cannot be found: %s", error)


def _far_address(address: str) -> str:
    """An address of this machine that others reach, where the agent listens on all of them."""
    if address not in ("0.0.0.0", "::"):
        return address
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # Of documentation: nothing is sent, the route alone is looked up.
    outside = "2001:db8::1" if ":" in address else "192.0.2.1"
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((outside, 9))
        return str(probe.getsockname()[0])
    return socket.gethostname()


def _shed_inherited() -> None:
    """Give up what a rank may have been given that is no good for an agent: its cores, its blocked signals, and, under Ray, the
    first place among those that the kernel ends when memory runs out."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("0")


def _bound_log(path: Path) -> None:
    """Begin a new log where the one that standard output and error go to has grown too long; the one before is kept."""
    with contextlib.suppress(OSError):
        if os.fstat(2).st_size > LOG_BYTES:
            path.replace(path.with_name(f"{path.name}.1"))
            with open(path, "ab") as fresh:
                os.dup2(fresh.fileno(), 1)
                os.dup2(fresh.fileno(), 2)
