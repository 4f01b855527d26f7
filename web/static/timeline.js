// The timeline: fetches the points of what is in view from the trace's pyramids and draws them as plotly SVG lines.
// Strings of the trace go through escapeLabel: plotly renders some HTML in its labels.
"use strict";

(() => {
  const plot = document.getElementById("timeline-plot");
  if (!plot) return;

  // A point of the pyramid is drawn as up to three (highest, lowest, last): at most 3,000 a line.
  const POINTS = 1000;
  const SERIES = [
    { name: "rss", label: "RSS, sampled", width: 2 },
    { name: "heap_bytes", label: "Heap size", width: 1.5 },
    { name: "live_bytes", label: "Live bytes", width: 1.5 },
    { name: "hole_bytes", label: "Holes", width: 1.5 },
  ];
  const message = document.getElementById("timeline-message");
  let full = null; // [start, end] in ns of the whole process
  let view = null; // [start, end] in ns that is in view
  let data = null; // the API's last answer
  let lifeEnd = 0; // ns: the last thing that is known of the process
  let request = 0;
  let timer = null;

  const escapeLabel = (text) =>
    String(text).slice(0, 40).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function formatBytes(count) {
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let value = Math.abs(count);
    let unit = 0;
    while (value >= 1023.5 && unit + 1 < units.length) {
      value /= 1024;
      unit += 1;
    }
    const digits = unit === 0 ? 0 : value < 9.995 ? 2 : value < 99.95 ? 1 : 0;
    return `${count < 0 ? "-" : ""}${value.toFixed(digits)} ${units[unit]}`;
  }

  // The unit in which a stretch of time is told: [ns a unit, name].
  function timeUnit(span) {
    if (span < 2e3) return [1, "ns"];
    if (span < 2e6) return [1e3, "µs"];
    if (span < 2e9) return [1e6, "ms"];
    if (span < 3e11) return [1e9, "s"];
    return [6e10, "min"];
  }

  // About `count` round positions within [low, high], in steps of 1, 2 or 5 times a power of ten of `unit`.
  function ticks(low, high, unit, count) {
    const raw = (high - low) / unit / count;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((factor) => factor * power >= raw) * power;
    const values = [];
    for (let i = Math.ceil(low / unit / step); i * step * unit <= high; i += 1) values.push(i * step);
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    return { values: values.map((value) => value * unit), texts: values.map((value) => value.toFixed(digits)) };
  }

  function byteAxis(highest) {
    let unit = 1;
    while (highest >= unit * 1024 * 2) unit *= 1024;
    const name = { 0: "B", 1: "KiB", 2: "MiB", 3: "GiB", 4: "TiB" }[Math.round(Math.log2(unit) / 10)] ?? "";
    const top = Math.max(highest * 1.06, 1);
    const { values, texts } = ticks(0, top, unit, 5);
    return { tickmode: "array", tickvals: values, ticktext: texts.map((text) => `${text} ${name}`), range: [0, top] };
  }

  // x is in the unit that suits the view: plotly then writes its ticks and the heading of the hover box by itself.
  function trace(series, points, color, unit) {
    const x = [];
    const y = [];
    const text = [];
    const add = (time, value) => {
      x.push(time / unit);
      y.push(value);
      text.push(formatBytes(value));
    };
    for (const [time, low, high, last] of points) {
      if (high !== last) add(time, high);
      if (low !== last && low !== high) add(time, low);
      add(time, last);
    }
    // What the model says holds until the process ends; a sample says nothing about what came after it.
    const end = Math.min(lifeEnd, view[1]);
    if (points.length && series.name !== "rss" && x[x.length - 1] * unit < end) add(end, y[y.length - 1]);
    return {
      type: "scatter",
      mode: x.length > 1 ? "lines" : "markers",
      name: series.label,
      x,
      y,
      text,
      line: { color, width: series.width, shape: "hv" },
      hovertemplate: `%{text}<extra>${series.label}</extra>`,
    };
  }

  // Labels of snapshots; those too close to be read beside each other become one.
  function joinLabels(marks) {
    const joined = [];
    for (const mark of marks) {
      const last = joined[joined.length - 1];
      if (last && mark.time_ns - last.time_ns < (view[1] - view[0]) / 20) last.text += `, ${escapeLabel(mark.reason)}`;
      else joined.push({ time_ns: mark.time_ns, text: escapeLabel(mark.reason) });
    }
    return joined;
  }

  // RSS as a snapshot counted it: exact, and for a short-lived process often all there is.
  function snapshotTrace(marks, color, unit) {
    return {
      type: "scatter",
      mode: "markers",
      name: "RSS, snapshot",
      x: marks.map((mark) => mark.time_ns / unit),
      y: marks.map((mark) => mark.rss_bytes),
      text: marks.map((mark) => formatBytes(mark.rss_bytes)),
      marker: { color, size: 8, symbol: "diamond" },
      hovertemplate: "%{text}<extra>RSS, snapshot</extra>",
    };
  }

  function draw() {
    const [unit, unitName] = timeUnit(view[1] - view[0]);
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    const present = SERIES.filter((series) => data.series[series.name]?.points.length);
    const peaks = present.map((series) => Math.max(...data.series[series.name].points.map((point) => point[2])));
    const axis = {
      gridcolor: color("--rule"),
      linecolor: color("--rule-strong"),
      zeroline: false,
      tickfont: { color: color("--ink-soft"), size: 12 },
      ticks: "outside",
      tickcolor: color("--rule-strong"),
    };
    const marks = data.snapshots.filter((mark) => mark.time_ns >= view[0] && mark.time_ns <= view[1]);
    const labels = joinLabels(marks);
    const highest = Math.max(1, ...peaks, ...marks.map((mark) => mark.rss_bytes));
    const layout = {
      height: 320,
      margin: { l: 72, r: 16, t: 12, b: 34 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: style.fontFamily, color: color("--ink") },
      hovermode: "x unified",
      hoverlabel: { bgcolor: color("--raised"), bordercolor: color("--rule-strong"), font: { color: color("--ink") } },
      dragmode: "zoom",
      showlegend: false, // the table above is the legend
      xaxis: {
        ...axis,
        range: view.map((ns) => ns / unit),
        ticksuffix: ` ${unitName}`,
        nticks: Math.max(3, Math.floor(plot.clientWidth / 120)),
        hoverformat: ".2f",
        exponentformat: "none",
        showgrid: false,
      },
      yaxis: { ...axis, ...byteAxis(highest), fixedrange: true },
      shapes: marks.map((mark) => ({
        type: "line", x0: mark.time_ns / unit, x1: mark.time_ns / unit, yref: "paper", y0: 0, y1: 1,
        line: { color: color("--ink-soft"), width: 1, dash: "dot" },
      })),
      annotations: labels.map((label) => ({
        x: label.time_ns / unit, yref: "paper", y: 1, yanchor: "top",
        xanchor: label.time_ns > (view[0] + view[1]) / 2 ? "right" : "left",
        text: label.text, showarrow: false, font: { size: 11, color: color("--ink-soft") },
      })),
    };
    const traces = present.map((series) =>
      trace(series, data.series[series.name].points, color(`--series-${series.name.replace("_bytes", "")}`), unit),
    );
    if (marks.length) traces.push(snapshotTrace(marks, color("--series-rss"), unit));
    plot.dataset.points = String(traces.reduce((sum, line) => sum + line.x.length, 0));
    plot.dataset.unit = String(unit);
    return Plotly.react(plot, traces, layout, { displayModeBar: false, responsive: true, doubleClick: false });
  }

  function say(text) {
    message.textContent = text;
    message.hidden = text === "";
  }

  async function load() {
    const mine = (request += 1);
    const url = new URL(plot.dataset.url, window.location.href);
    url.searchParams.set("points", POINTS);
    if (view) {
      url.searchParams.set("t0", Math.max(0, Math.floor(view[0])));
      url.searchParams.set("t1", Math.ceil(view[1]));
    }
    let answer;
    try {
      const response = await fetch(url);
      answer = await response.json();
      if (response.status === 202) {
        timer = setTimeout(load, 1000);
        return;
      }
      if (!response.ok) throw new Error(answer.error.message);
    } catch (error) {
      say(`The timeline cannot be shown: ${error.message}`);
      return;
    }
    if (mine !== request) return; // a later zoom has overtaken this answer
    say("");
    data = answer;
    if (!full) {
      const moments = data.snapshots.map((mark) => mark.time_ns);
      lifeEnd = Math.max(data.end_ns, ...moments);
      const margin = (data.end_ns - data.start_ns) / 200;
      full = [Math.max(0, Math.min(data.start_ns, ...moments) - margin), lifeEnd + margin + 1];
      view = full;
    }
    await draw();
    plot.dataset.state = "drawn";
  }

  function show(start, end) {
    const span = Math.max(end - start, 1);
    const from = Math.min(Math.max(start, full[0]), full[1]);
    view = [from, Math.min(Math.max(from + span, from + 1), full[1])];
    if (view[1] <= view[0]) view = full;
    plot.dataset.state = "zooming";
    clearTimeout(timer);
    timer = setTimeout(load, 60);
  }

  const reset = () => full && show(...full);

  function onKey(event) {
    if (!full || event.ctrlKey || event.metaKey || event.altKey) return;
    const span = view[1] - view[0];
    const middle = (view[0] + view[1]) / 2;
    const steps = {
      "+": () => show(middle - span / 4, middle + span / 4),
      "-": () => show(middle - span, middle + span),
      ArrowLeft: () => show(Math.max(full[0], view[0] - span / 4), Math.max(full[0], view[0] - span / 4) + span),
      ArrowRight: () => show(Math.min(view[0] + span / 4, full[1] - span), Math.min(view[0] + span / 4, full[1] - span) + span),
      0: reset,
    };
    const step = steps[event.key === "=" ? "+" : event.key];
    if (!step) return;
    event.preventDefault();
    step();
  }

  load().then(() => {
    if (typeof plot.on !== "function") return;
    plot.on("plotly_relayout", (change) => {
      const unit = Number(plot.dataset.unit);
      if ("xaxis.range[0]" in change) show(change["xaxis.range[0]"] * unit, change["xaxis.range[1]"] * unit);
    });
    plot.on("plotly_doubleclick", reset);
  });
  plot.addEventListener("keydown", onKey);
  document.getElementById("timeline-reset").addEventListener("click", reset);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => data && draw());
})();
