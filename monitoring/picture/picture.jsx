// The dashboard's panels with their data, drawn by Grafana's own components (@grafana/ui): title bars, time series, big values.
import React from 'react';
import 'uplot/dist/uPlot.min.css';
import { createRoot } from 'react-dom/client';
import { createTheme, dateTime, FieldType, getDisplayProcessor, ThemeContext, toDataFrame } from '@grafana/data';
import { BigValue, GlobalStyles, PanelChrome, TimeSeries } from '@grafana/ui';

const { dashboard, answers, from, to } = window.PICTURE;
const theme = createTheme({ colors: { mode: 'dark' } });
const WIDTH = 1560, CELL = 30, GAP = 8;
const range = { from: dateTime(from * 1000), to: dateTime(to * 1000), raw: { from: 'now-1h', to: 'now' } };
const DEFAULTS = { drawStyle: 'line', lineInterpolation: 'linear', lineWidth: 1, fillOpacity: 0, gradientMode: 'none', showPoints: 'auto', pointSize: 5,
  stacking: { mode: 'none', group: 'A' }, axisPlacement: 'auto', scaleDistribution: { type: 'linear' }, hideFrom: { viz: false, legend: false, tooltip: false } };

function frame(series, index, panel) {
  const given = panel.fieldConfig.defaults;
  const value = { name: series.legend || 'value', type: FieldType.number, values: series.values.map(([, v]) => v), labels: {}, config: {
    ...given, displayName: series.legend, color: given.color ?? { mode: 'palette-classic' }, custom: { ...DEFAULTS, ...given.custom, stacking: { ...DEFAULTS.stacking, ...given.custom?.stacking } } } };
  const made = toDataFrame({ refId: String(index), fields: [{ name: 'Time', type: FieldType.time, values: series.values.map(([t]) => t * 1000), config: {} }, value] });
  made.fields.forEach((field, i) => { field.state = { seriesIndex: i ? index : 0, displayName: i ? series.legend : 'Time' }; field.display = getDisplayProcessor({ field, theme }); });
  return made;
}

const NoData = () => <div style={{ color: theme.colors.text.secondary, textAlign: 'center', paddingTop: 30 }}>No data</div>;

function Lines({ panel, series, width, height }) {
  const frames = series.map((each, i) => frame(each, i, panel));
  return <TimeSeries frames={frames} timeRange={range} timeZone="utc" width={width} height={height} theme={theme} structureRev={1}
    legend={{ calcs: [], ...panel.options?.legend, placement: 'bottom', displayMode: 'list', showLegend: true }} options={{}} />;
}

function Numbers({ panel, series, width, height }) {
  const each = Math.floor(width / Math.max(series.length, 1));
  return <div style={{ display: 'flex' }}>{series.map((s, i) => {
    const f = frame(s, i, panel).fields[1];
    f.config.color = { mode: 'thresholds' };
    const value = { ...getDisplayProcessor({ field: f, theme })(s.values.at(-1)?.[1]), title: s.legend };
    return <BigValue key={i} value={value} width={each} height={height} theme={theme} colorMode="value" graphMode="none" textMode={panel.options.textMode} justifyMode="auto" />;
  })}</div>;
}

// Not of @grafana/ui: Grafana's server has the state timeline itself.
function Bars({ panel, series, width, height }) {
  const f = (v) => panel.fieldConfig.defaults.thresholds.steps.filter((step) => step.value == null || v >= step.value).at(-1).color;
  const row = Math.min(26, Math.floor(height / Math.max(series.length, 1))), left = 250;
  return <div style={{ position: 'relative', height }}>{series.map((s, i) => <React.Fragment key={i}>
    <div style={{ position: 'absolute', top: i * row, width: left - 8, textAlign: 'right', fontSize: 11, lineHeight: `${row}px` }}>{s.legend}</div>
    {s.values.map(([t, v], j) => <div key={j} style={{ position: 'absolute', top: i * row + 2, height: row - 4, left: left + (t - from) / (to - from) * (width - left),
      width: Math.ceil(window.PICTURE.step / (to - from) * (width - left)) + 0.5, background: theme.visualization.getColorByName(f(v)) }} />)}
  </React.Fragment>)}</div>;
}

function Panel({ panel }) {
  const { x = 0, y, w, h } = panel.gridPos;
  const unit = WIDTH / 24, box = { left: x * unit, top: y * (CELL + GAP), width: w * unit - GAP, height: h * (CELL + GAP) - GAP };
  const place = { position: 'absolute', ...box };
  if (panel.type === 'row') { return <div style={{ ...place, fontSize: 18, fontWeight: 500, paddingTop: 6 }}>⌄ {panel.title}</div>; }
  const series = answers[panel.id] ?? [];
  const Inner = { timeseries: Lines, stat: Numbers, 'state-timeline': Bars }[panel.type];
  return <div style={place}><PanelChrome title={panel.title} width={box.width} height={box.height}>
    {(width, height) => series.length ? <Inner panel={panel} series={series} width={width} height={height} /> : <NoData />}
  </PanelChrome></div>;
}

const bottom = Math.max(...dashboard.panels.map((p) => (p.gridPos.y + p.gridPos.h) * (CELL + GAP)));
createRoot(document.getElementById('root')).render(<ThemeContext.Provider value={theme}><GlobalStyles />
  <div style={{ position: 'relative', width: WIDTH, height: bottom }}>{dashboard.panels.map((panel) => <Panel key={panel.id} panel={panel} />)}</div>
</ThemeContext.Provider>);
