"""The few kinds of panels that dashboards are made of, each with a unit, a legend and words that say what to do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from grafana_foundation_sdk.builders import bargauge, common, heatmap, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common as options
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_options
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

Panel: TypeAlias = Builder[models.Panel]
Query: TypeAlias = tuple[str, str]
"""An expression, and the legend of its series."""

SOURCE = options.DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH = 24
"""Columns of the grid."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """``limits`` are values from which another colour holds; ``colours`` of series by their names; ``at_least`` and ``at_most``
    are the ends of the axis."""

    unit: str
    decimals: int | None = None
    at_least: float | None = 0
    at_most: float | None = None
    limits: tuple[tuple[float, str], ...] = ()
    base: str = "green"
    colours: Mapping[str, str] | None = None


def tile(title: str, tells: str, query: Query, look: Look, *, width: int = 3, height: int = 4, empty: str = "–") -> Panel:
    """The last value in large type, with its course behind it."""
    panel = stat.Panel().title(title).description(tells).datasource(SOURCE).height(height).span(width)
    panel = panel.unit(look.unit).thresholds(_limits(look)).no_value(empty)
    panel = panel.color_mode(options.BigValueColorMode.VALUE).graph_mode(options.BigValueGraphMode.AREA)
    panel = panel.reduce_options(_last()).with_target(_target(query, 0))
    return panel.decimals(look.decimals) if look.decimals is not None else panel


def state_tile(title: str, tells: str, query: Query, words: Mapping[str, str], *, width: int = 3, empty: str) -> Panel:
    """The word that stands for the number, in its colour; ``words`` and their colours count from 1."""
    panel = stat.Panel().title(title).description(tells).datasource(SOURCE).height(4).span(width)
    panel = panel.unit("none").mappings([_words(words)]).no_value(empty)
    panel = panel.color_mode(options.BigValueColorMode.BACKGROUND).graph_mode(options.BigValueGraphMode.NONE)
    # What holds now: a run of which nobody says anything any more is not in the state that it was in.
    return panel.reduce_options(_last()).with_target(_target(query, 0, at_once=True))


def state_line(title: str, tells: str, query: Query, words: Mapping[str, str], *, width: int, height: int = 5) -> Panel:
    """States over time as coloured bars, one line for each series; ``words`` and their colours count from 1."""
    panel = statetimeline.Panel().title(title).description(tells).datasource(SOURCE).height(height).span(width)
    panel = panel.mappings([_words(words)]).merge_values(True).show_value(options.VisibilityMode.NEVER)
    return panel.legend(_legend(is_table=False)).with_target(_target(query, 0))


def curves(
    title: str,
    tells: str,
    queries: Sequence[Query],
    look: Look,
    *,
    width: int = 8,
    height: int = 8,
    stacked: bool = False,
    as_bars: bool = False,
    logarithmic: bool = False,
    is_table: bool = False,
) -> Panel:
    """Values over time. ``stacked`` areas add up; ``is_table`` lists the series with their last and greatest values."""
    panel = timeseries.Panel().title(title).description(tells).datasource(SOURCE).height(height).span(width)
    panel = panel.unit(look.unit).thresholds(_limits(look)).legend(_legend(is_table=is_table))
    panel = panel.tooltip(common.VizTooltipOptions().mode(options.TooltipDisplayMode.MULTI))
    panel = panel.show_points(options.VisibilityMode.AUTO).fill_opacity(70 if stacked else 60 if as_bars else 8).line_width(1)
    if look.limits:
        panel = panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(options.GraphThresholdsStyleMode.DASHED))
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(options.StackingMode.NORMAL))
    if as_bars:
        panel = panel.draw_style(options.GraphDrawStyle.BARS)
    if logarithmic:
        scale = common.ScaleDistributionConfig().type(options.ScaleDistribution.LOG).log(10)
        panel = panel.scale_distribution(scale)
    elif look.at_least is not None:
        panel = panel.axis_soft_min(look.at_least)
    if look.at_most is not None:
        panel = panel.axis_soft_max(look.at_most)
    if look.decimals is not None:
        panel = panel.decimals(look.decimals)
    for name, colour in (look.colours or {}).items():
        panel = panel.override_by_name(name, [_fixed(colour)])
    for number, query in enumerate(queries):
        panel = panel.with_target(_target(query, number))
    return panel


def bars(title: str, tells: str, query: Query, look: Look, *, width: int = 8, height: int = 8) -> Panel:
    """One bar for each series, at its last value."""
    panel = bargauge.Panel().title(title).description(tells).datasource(SOURCE).height(height).span(width)
    panel = panel.unit(look.unit).thresholds(_limits(look)).reduce_options(_last())
    panel = panel.orientation(options.VizOrientation.HORIZONTAL).display_mode(options.BarGaugeDisplayMode.BASIC)
    panel = panel.value_mode(options.BarGaugeValueMode.TEXT).show_unfilled(True)
    if look.at_least is not None:
        panel = panel.min(look.at_least)
    if look.at_most is not None:
        panel = panel.max(look.at_most)
    for name, colour in (look.colours or {}).items():
        panel = panel.override_by_name(name, [_fixed(colour)])
    return panel.with_target(_target(query, 0, at_once=True))


def heat(title: str, tells: str, query: Query, unit: str, *, width: int = 8, height: int = 8) -> Panel:
    """How many in which bucket, over time; ``query`` has the label ``le``."""
    panel = heatmap.Panel().title(title).description(tells).datasource(SOURCE).height(height).span(width)
    panel = panel.calculate(False).y_axis(heatmap.YAxisConfig().unit(unit)).show_legend()
    panel = panel.color(heatmap.HeatmapColorOptions().mode(heatmap_options.HeatmapColorMode.SCHEME).scheme("Oranges").steps(32))
    return panel.with_target(_target(query, 0).format(PromQueryFormat.HEATMAP))


def rows(
    title: str, tells: str, columns: Mapping[str, tuple[str, str]], *, key: str, width: int = WIDTH, height: int = 8
) -> Panel:
    """A table with a line for each value of the label ``key``; ``columns`` have an expression and a unit, by their titles."""
    panel = table.Panel().title(title).description(tells).datasource(SOURCE).height(height).span(width)
    names = {}
    for number, (name, (expression, unit)) in enumerate(columns.items()):
        panel = panel.with_target(_target((expression, ""), number, at_once=True).format(PromQueryFormat.TABLE))
        panel = panel.override_by_name(name, [models.DynamicConfigValue(id_val="unit", value=unit)])
        names[f"Value #{_letter(number)}"] = name
    order = {key: 0} | {name: number for number, name in enumerate(names, start=1)}
    arrange = {"excludeByName": {"Time": True}, "indexByName": order, "renameByName": names}
    panel = panel.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    return panel.with_transformation(models.DataTransformerConfig(id_val="organize", options=arrange))


def facts(title: str, tells: str, expression: str, *, width: int = 12, height: int = 6) -> Panel:
    """The labels of series as a table."""
    panel = table.Panel().title(title).description(tells).datasource(SOURCE).height(height).span(width)
    arrange = {"excludeByName": dict.fromkeys(("Time", "Value", "__name__", "instance", "job"), True)}
    panel = panel.with_target(_target((expression, ""), 0, at_once=True).format(PromQueryFormat.TABLE))
    return panel.with_transformation(models.DataTransformerConfig(id_val="organize", options=arrange))


def _target(query: Query, number: int, *, at_once: bool = False) -> Dataquery:
    expression, legend = query
    target = Dataquery().expr(expression).legend_format(legend or "__auto").ref_id(_letter(number)).datasource(SOURCE)
    return target.instant() if at_once else target.range()


def _letter(number: int) -> str:
    return chr(ord("A") + number)


def _limits(look: Look) -> builders.ThresholdsConfig:
    steps = [models.Threshold(value=None, color=look.base)]
    steps += [models.Threshold(value=value, color=colour) for value, colour in look.limits]
    return builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _words(words: Mapping[str, str]) -> models.ValueMap:
    return models.ValueMap(
        options={
            str(number): models.ValueMappingResult(text=word, color=colour, index=number)
            for number, (word, colour) in enumerate(words.items(), start=1)
        }
    )


def _fixed(colour: str) -> models.DynamicConfigValue:
    return models.DynamicConfigValue(id_val="color", value={"mode": "fixed", "fixedColor": colour})


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)


def _legend(*, is_table: bool) -> common.VizLegendOptions:
    legend = common.VizLegendOptions().show_legend(True).placement(options.LegendPlacement.BOTTOM)
    if not is_table:
        return legend.display_mode(options.LegendDisplayMode.LIST).calcs([])
    return legend.display_mode(options.LegendDisplayMode.TABLE).calcs(["lastNotNull", "max"])
