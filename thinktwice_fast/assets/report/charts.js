const MARGIN = { right: 12, top: 10, bottom: 22 };
const LETTER = 6.3; // width of a digit of an axis
const FORMS = {
  share: (value) => `${round(100 * value)} %`,
  number: (value) => round(value),
  gibibytes: (value) => `${round(value)} GiB`,
  seconds: (value) => `${round(value)} s`,
};
const AXES = { steps: "step", generations: "generation", minutes: "minute" };

function round(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  return size < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

/** A figure of one chart. `axis` names what stands below; `axes` translates steps into it. */
function figureOf(chart, axes, axis) {
  const readout = element("output", { "aria-live": "polite" });
  const holder = element("div");
  const table = element("details", { on: { toggle: () => fillTable(table, chart) } }, element("summary", {}, "Numbers"));
  const legend = chart.series.map((one) => element("span", { class: one.colour }, element("i"), one.name));
  const figure = element(
    "figure",
    {},
    element("figcaption", {}, chart.title, element("span", { class: "note" }, chart.note)),
    holder,
    element("div", { class: "legend" }, ...legend),
    readout,
    table,
  );
  const draw = () => holder.replaceChildren(drawing(chart, axes, axis(), holder.clientWidth || 320, readout));
  new ResizeObserver(draw).observe(holder);
  figure.redraw = draw;
  return figure;
}

function fillTable(details, chart) {
  if (details.querySelector("table")) return;
  const rows = new Map();
  chart.series.forEach((one, column) =>
    one.steps.forEach((step, at) => {
      if (!rows.has(step)) rows.set(step, chart.series.map(() => "-"));
      rows.get(step)[column] = FORMS[chart.form](one.values[at]);
    }),
  );
  const head = ["step", ...chart.series.map((one) => one.name)].map((text) => element("th", { scope: "col" }, text));
  const body = [...rows].sort((a, b) => a[0] - b[0]).map(([step, cells]) =>
    element("tr", {}, element("th", { scope: "row" }, String(step)), ...cells.map((cell) => element("td", {}, cell))),
  );
  details.append(element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body)));
}

function drawing(chart, axes, axis, width, readout) {
  const height = 210;
  const lines = chart.stacked ? stacked(chart.series) : chart.series.map((one) => ({ ...one, top: one.values }));
  for (const line of lines) line.x = line.steps.map((step) => translated(axes[line.method], axis, step));
  const xs = lines.flatMap((line) => line.x);
  const ys = lines.flatMap((line) => [...line.top, ...(line.high ?? [])]);
  const [left, right] = [Math.min(...xs), Math.max(...xs)];
  const least = Math.min(0, ...ys, ...lines.flatMap((line) => line.low ?? []));
  const ticks = ticksOf(least, Math.max(...ys, least + 1e-9), 4);
  const bottom = ticks[0];
  const top = ticks[ticks.length - 1];
  const form = FORMS[chart.form];
  const start = 8 + LETTER * Math.max(...ticks.map((tick) => form(tick).length));
  const x = (value) => start + ((value - left) / (right - left || 1)) * (width - start - MARGIN.right);
  const y = (value) => height - MARGIN.bottom - ((value - bottom) / (top - bottom)) * (height - MARGIN.top - MARGIN.bottom);

  const svg = shape("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0", "aria-label": summary(chart, form),
  });
  for (const tick of ticks) {
    svg.append(shape("line", { class: "grid", x1: start, x2: width - MARGIN.right, y1: y(tick), y2: y(tick) }));
    svg.append(shape("text", { x: start - 5, y: y(tick) + 4, "text-anchor": "end" }, form(tick)));
  }
  for (const tick of ticksOf(left, right, 5)) {
    if (tick < left || tick > right) continue;
    svg.append(shape("text", { x: x(tick), y: height - 6, "text-anchor": tick > (left + right) / 2 && x(tick) > width - 30 ? "end" : "middle" }, round(tick)));
  }
  for (const line of lines) draw(svg, line, x, y, chart.stacked);
  follow(svg, lines, { x, width, height, readout, form, axis });
  return svg;
}

function draw(svg, line, x, y, area) {
  const points = (values) => line.x.map((at, n) => `${x(at).toFixed(1)},${y(values[n]).toFixed(1)}`);
  const between = (low, high) => [...points(high), ...points(low).reverse()].join(" ");
  if (area) {
    svg.append(shape("polygon", { class: `area ${line.colour}`, points: between(line.base, line.top) }));
    return;
  }
  if (line.low.length) svg.append(shape("polygon", { class: `band ${line.colour}`, points: between(line.low, line.high) }));
  svg.append(shape("polyline", { class: `line ${line.colour}${line.dashed ? " dashed" : ""}`, points: points(line.values).join(" ") }));
  if (line.dots || line.x.length === 1) {
    line.x.forEach((at, n) => svg.append(shape("circle", { class: `dot ${line.colour}`, cx: x(at), cy: y(line.values[n]), r: 3 })));
  }
}

/** Values under the pointer, or where the arrow keys have moved to. */
function follow(svg, lines, { x, width, height, readout, form, axis }) {
  const cursor = shape("line", { class: "cursor", y1: MARGIN.top, y2: height - MARGIN.bottom, visibility: "hidden" });
  svg.append(cursor);
  const longest = lines.reduce((most, line) => (line.x.length > most.x.length ? line : most), lines[0]);
  let at = longest.x.length - 1;
  const show = (place) => {
    at = Math.max(0, Math.min(longest.x.length - 1, place));
    const here = longest.x[at];
    for (const end of ["x1", "x2"]) cursor.setAttribute(end, x(here));
    cursor.setAttribute("visibility", "visible");
    const values = lines.map((line) => [line.name, line.values[nearest(line.x, here)]]);
    readout.textContent = `${AXES[axis]} ${round(here)}: ${values.map(([name, value]) => `${name} ${form(value)}`).join(", ")}`;
  };
  svg.addEventListener("pointermove", (event) => {
    const scale = width / svg.getBoundingClientRect().width;
    const wanted = (event.clientX - svg.getBoundingClientRect().left) * scale;
    show(nearest(longest.x.map(x), wanted));
  });
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by === undefined) return;
    show(at + by);
    event.preventDefault();
    event.stopPropagation();
  });
}

function nearest(values, wanted) {
  let best = 0;
  values.forEach((value, n) => {
    if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = n;
  });
  return best;
}

function stacked(series) {
  let base = series[0] ? series[0].values.map(() => 0) : [];
  return series.map((one) => {
    const own = base;
    base = own.map((low, n) => low + (one.values[n] ?? 0));
    return { ...one, base: own, top: base, low: [], high: [] };
  });
}

function translated(axes, axis, step) {
  if (axis === "steps" || !axes) return step;
  const { steps, [axis]: values } = axes;
  const after = steps.findIndex((known) => known >= step);
  if (after < 0) return values[values.length - 1];
  if (after === 0 || steps[after] === step) return values[after];
  const share = (step - steps[after - 1]) / (steps[after] - steps[after - 1]);
  return values[after - 1] + share * (values[after] - values[after - 1]);
}

/** Round numbers from `low` or below it to `high` or above it. */
function ticksOf(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const ticks = [];
  for (let tick = Math.floor(low / step) * step; tick < high + step * 0.99; tick += step) ticks.push(Number(tick.toPrecision(12)));
  return ticks;
}

function summary(chart, form) {
  const ends = chart.series.map((one) => `${one.name} from ${form(one.values[0])} to ${form(one.values[one.values.length - 1])}`);
  return `${chart.title}, ${chart.note}: ${ends.join("; ")}`;
}
