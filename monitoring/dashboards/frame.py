"""What every dashboard has around its panels: variables, links to the others, and marks of what happened.

A dashboard that shows one run opens with the one that was started last; the links keep run, node and time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as models

from outgrow.monitoring import metrics as m
from outgrow.monitoring.dashboards.panels import SOURCE, Panel
from outgrow.monitoring.dashboards.queries import of

TAG = "outgrow"
RAY_VARIABLE = "ray_dashboard"
RAY_DASHBOARD = "http://127.0.0.1:8265"
"""Where Ray's dashboard is, unless the site says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A heading, and the panels below it."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True, kw_only=True)
class Page:
    """A dashboard. ``run`` is the matcher of its runs, of one or of several, empty where it shows nodes alone."""

    uid: str
    title: str
    tells: str
    run: str
    has_nodes: bool
    rows: Sequence[Row]
    time: str = "now-6h"


def build(page: Page) -> models.Dashboard:
    """The dashboard as Grafana reads it; its panels are numbered, so that links to one of them last."""
    made = builders.Dashboard(page.title).uid(page.uid).description(page.tells).tags([TAG]).readonly()
    made = made.timezone("browser").time(page.time, "now").refresh("30s").tooltip(models.DashboardCursorSync.CROSSHAIR)
    made = made.variables(list(_variables(page))).links(_links()).annotations(list(_annotations(page.run)))
    for row in page.rows:
        made = made.with_row(builders.Row(row.title))
        for panel in row.panels:
            made = made.with_panel(panel)
    result = made.build()
    for number, placed in enumerate(result.panels or [], start=1):
        placed.id_val = number
    return result


def _variables(page: Page) -> list[Builder[models.VariableModel]]:
    found: list[Builder[models.VariableModel]] = [
        builders.DatasourceVariable("datasource").label("Data source").type("prometheus")
    ]
    if page.run:
        # Newest start first, and so the default.
        starts = f"sort_desc(max by (run) (last_over_time({of(m.RUN_ATTEMPT_START_TIME)}[$__range])))"
        run = _query("run", "Run", f"query_result({starts})", sort=models.VariableSort.DISABLED)
        found.append(run.regex('/run="([^"]+)"/').multi("=~" in page.run))
    if page.has_nodes:
        where = of(m.RANK_STEP, page.run) if page.run else of(m.AGENT_START_TIME)
        nodes = _query("node", "Node", f"label_values({where}, node)", sort=models.VariableSort.NATURAL_ASC)
        everywhere = models.VariableOption(text="All", value="$__all", selected=True)
        found.append(nodes.multi(True).include_all(True).all_value(".+").current(everywhere))
    ray = builders.TextBoxVariable(RAY_VARIABLE).label("Ray dashboard").hide(models.VariableHide.HIDE_VARIABLE)
    found.append(ray.default_value(RAY_DASHBOARD))
    return found


def _query(name: str, label: str, query: str, *, sort: models.VariableSort) -> builders.QueryVariable:
    made = builders.QueryVariable(name).label(label).datasource(SOURCE).query({"query": query, "refId": f"variable-{name}"})
    # With the time: runs of last week are found in last week.
    return made.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(sort)


def _links() -> list[Builder[models.DashboardLink]]:
    others = builders.DashboardLink("outgrow").type(models.DashboardLinkType.DASHBOARDS).tags([TAG])
    ray = builders.DashboardLink("Ray dashboard").type(models.DashboardLinkType.LINK).url(f"${{{RAY_VARIABLE}}}")
    return [
        others.as_dropdown(False).include_vars(True).keep_time(True),
        ray.icon("external link").tooltip("Actors, logs and nodes of the Ray cluster").target_blank(True),
    ]


def _annotations(run: str) -> list[Builder[models.AnnotationQuery]]:
    strayed = "OutgrowLossSpike|OutgrowNonFinite"
    alerts = f'ALERTS{{alertname=~"Outgrow.+",alertname!~"{strayed}",alertstate="firing"}}'
    if not run:
        return [_annotation("Alerts", alerts, "red", title="{{alertname}}", text="{{severity}} {{run}} {{node}} {{gpu}}")]
    # Alerts of a node are of every run on it.
    of_run = f'{alerts[:-1]},{run}}} or {alerts[:-1]},run=""}}'
    spikes = f'ALERTS{{alertname=~"{strayed}",alertstate="firing",{run}}}'
    restarts = f"sum by (run, cause) (changes({of(m.RUN_RESTARTS, run)}[$__rate_interval])) > 0"
    commits = f"max by (run) ({of(m.RUN_CHECKPOINT_TIME, run)}) * 1000"
    return [
        _annotation("Restarts", restarts, "orange", title="Restart: {{cause}}", text="{{run}}"),
        # The value is the time of the commit, in milliseconds.
        _annotation("Checkpoints", commits, "blue", title="Checkpoint", text="{{run}}").use_value_for_time(True),
        _annotation("Spikes of the loss", spikes, "purple", title="{{alertname}}", text="{{run}}"),
        _annotation("Alerts", of_run, "red", title="{{alertname}}", text="{{severity}} {{run}} {{node}} {{gpu}}"),
    ]


def _annotation(name: str, expression: str, colour: str, *, title: str, text: str) -> builders.AnnotationQuery:
    made = builders.AnnotationQuery().name(name).datasource(SOURCE).enable(True).hide(False).icon_color(colour)
    made = made.expr(expression).step("15s").title_format(title).text_format(text)
    return made.target(Dataquery().expr(expression).ref_id(name).datasource(SOURCE))
