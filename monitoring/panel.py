"""Panels of the dashboard: a number now, lines over time, bars of states; each of one or more PromQL queries."""

from typing import TypeVar

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import DataSourceRef, FieldColorModeId, Threshold, ThresholdsMode

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
GOOD, BAD, SO_SO = "green", "red", "orange"

Query = tuple[str, str]
"""PromQL and the legend of its series."""


def _steps(*steps: tuple[float | None, str]) -> dashboard.ThresholdsConfig:
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps([Threshold(value, color) for value, color in steps])


Panel = timeseries.Panel | stat.Panel | statetimeline.Panel
P = TypeVar("P", timeseries.Panel, stat.Panel, statetimeline.Panel)


def _targets(panel: P, queries: tuple[Query, ...], instant: bool = False) -> P:
    for letter, (expr, legend) in zip("ABCDEFGH", queries, strict=False):
        query = prometheus.Dataquery().expr(expr).legend_format(legend).ref_id(letter).datasource(SOURCE)
        panel.with_target(query.instant() if instant else query.range())
    return panel.datasource(SOURCE)


def number(
    title: str,
    says: str,
    *queries: Query,
    unit: str = "none",
    steps: tuple[tuple[float | None, str], ...] = (),
    names: bool = False,
) -> stat.Panel:
    """One number a series, now; ``names``: its legend alone."""
    panel = stat.Panel().title(title).description(says).span(4).height(5).unit(unit)
    panel.graph_mode(BigValueGraphMode.NONE).color_mode(BigValueColorMode.VALUE)
    panel.text_mode(BigValueTextMode.NAME if names else BigValueTextMode.VALUE_AND_NAME)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    panel.thresholds(_steps(*(steps or ((None, "text"),))))
    return _targets(panel, queries, instant=True)


def lines(
    title: str, says: str, *queries: Query, unit: str = "short", span: int = 8, top: float | None = None, stacked: bool = False
) -> timeseries.Panel:
    """Lines over time."""
    panel = timeseries.Panel().title(title).description(says).span(span).height(8).unit(unit).min(0)
    panel.legend(
        common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True)
    )
    panel.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    panel.fill_opacity(10).line_width(1).show_points(VisibilityMode.NEVER)
    if top is not None:
        panel.max(top)
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    return _targets(panel, queries)


def states(title: str, says: str, *queries: Query, span: int = 12) -> statetimeline.Panel:
    """A bar while a series is there; colours by its value."""
    panel = statetimeline.Panel().title(title).description(says).span(span).height(6)
    panel.show_value(VisibilityMode.NEVER).merge_values(True).row_height(0.8).color_scheme(
        dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS)
    )
    panel.thresholds(_steps((None, BAD), (1, SO_SO), (2, GOOD)))
    return _targets(panel, queries)


def quantiles(histogram: str, by: str = "") -> tuple[Query, ...]:
    """p50, p95, p99 of a histogram, named with its labels."""
    return tuple(
        (f"histogram_quantile({q}, sum by (le{by}) (rate({histogram}[$__rate_interval])))", f"p{q * 100:.0f}")
        for q in (0.5, 0.95, 0.99)
    )
