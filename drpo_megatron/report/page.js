// Charts of the page, in plain SVG. Text of runs is only ever set as text.
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const byId = id => document.getElementById(id);
const colour = i => `var(--c${i % 8})`;
const dash = i => (i < 8 ? "" : "6 3");
const hidden = new Set();

function make(tag, attributes = {}, ...children) {
  const isSvg = ["svg", "g", "path", "line", "text", "rect", "title"].includes(tag);
  const element = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function swatch(stroke, dashes = "") {
  const line = make("line", { x1: 0, y1: 5, x2: 24, y2: 5, "stroke-width": 4, "stroke-dasharray": dashes });
  line.style.stroke = stroke;
  const picture = make("svg", { viewBox: "0 0 24 10", class: "swatch", "aria-hidden": "true" }, line);
  return picture;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(+value.toPrecision(4));
}

// ---- scales

const WIDTH = 340, HEIGHT = 176, LEFT = 50, RIGHT = 8, TOP = 10, BOTTOM = 22;

function linear(low, high, from, to) {
  const span = high - low || 1;
  const scale = value => from + ((value - low) / span) * (to - from);
  scale.invert = position => low + ((position - from) / (to - from)) * span;
  return scale;
}

function ticks(low, high, count) {
  const raw = (high - low || 1) / count, power = 10 ** Math.floor(Math.log10(raw));
  const unit = [1, 2, 5, 10].find(m => m * power >= raw) * power;
  const found = [];
  for (let k = Math.ceil(low / unit); k * unit <= high + 1e-9 * unit; k++) found.push(+(k * unit).toPrecision(12));
  return found;
}

// Steps are whole numbers.
const stepTicks = (low, high) => ticks(low, high, 5).filter(Number.isInteger);

// Of a logarithmic axis: powers of ten, or 1, 2 and 5 times those where they are few.
function decades(low, high) {
  const [from, to] = [Math.ceil(low - 1e-9), Math.floor(high + 1e-9)];
  const every = Math.max(1, Math.ceil((to - from + 1) / 5)), found = [];
  for (let k = from; k <= to; k += every) found.push(k);
  if (found.length > 2) return found;
  for (let k = from - 1; k <= to; k++) found.push(k + Math.log10(2), k + Math.log10(5));
  return found.filter(v => v >= low && v <= high);
}

function axes(x, y, xTicks, yTicks, yText) {
  const group = make("g");
  for (const tick of yTicks) {
    const at = y(tick);
    group.append(make("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at }),
      make("text", { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, yText(tick)));
  }
  for (const tick of xTicks) {
    group.append(make("text", { x: x(tick), y: HEIGHT - 6, "text-anchor": "middle" }, String(tick)));
  }
  return group;
}

// ---- a chart that is read by pointing at it or with the arrow keys

const readers = [];

function frame(parent, title, unit, label) {
  const picture = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: "0", "aria-label": label });
  const readout = make("div", { class: "readout", "aria-live": "off" });
  picture.onfocus = () => readout.setAttribute("aria-live", "polite"); // the others change too, and would all be read out
  picture.onblur = () => readout.setAttribute("aria-live", "off");
  const caption = make("figcaption", {}, title, make("small", { class: "note" }, unit));
  parent.append(make("figure", {}, caption, picture, readout));
  return { picture, readout };
}

function readable(chart, steps, read) {
  chart.picture.onpointermove = event => {
    const box = chart.picture.getBoundingClientRect();
    read(nearest(steps(), chart.x.invert(((event.clientX - box.left) / box.width) * WIDTH)));
  };
  chart.picture.onkeydown = event => {
    const known = steps();
    let at = known.indexOf(chart.step);
    if (event.key === "ArrowRight") at = Math.min(at + 1, known.length - 1);
    else if (event.key === "ArrowLeft") at = at < 0 ? known.length - 1 : Math.max(at - 1, 0);
    else if (event.key === "Home") at = 0;
    else if (event.key === "End") at = known.length - 1;
    else return;
    event.preventDefault();
    read(known[at]);
  };
}

function nearest(sorted, wanted) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < wanted) low = middle + 1; else high = middle;
  }
  return low > 0 && wanted - sorted[low - 1] < sorted[low] - wanted ? sorted[low - 1] : sorted[low];
}

function cursor(chart, step) {
  chart.step = step;
  if (chart.line) chart.line.remove();
  const at = chart.x(step);
  chart.line = make("line", { class: "cursor", x1: at, x2: at, y1: TOP, y2: HEIGHT - BOTTOM });
  chart.picture.append(chart.line);
}

// ---- curves and bands

function smoothed(values) {
  if (!byId("smooth").checked) return values;
  return values.map((value, i) => {
    const near = values.slice(Math.max(0, i - 9), i + 1).filter(v => v !== null);
    return value === null || !near.length ? null : near.reduce((a, b) => a + b) / near.length;
  });
}

// What a chart draws: `line` and `band` name metrics; a run without them is left out.
function seriesOf(spec) {
  const found = [];
  RUNS.forEach((run, index) => {
    const curve = name => run.curves[name] && { steps: run.curves[name][0], values: smoothed(run.curves[name][1]) };
    const line = curve(spec.line), band = (spec.band || []).map(curve);
    if (line && !band.includes(undefined)) found.push({ index, run, line, band });
  });
  return found;
}

function pathOf(steps, values, x, y, log) {
  const drawn = i => values[i] !== undefined && values[i] !== null && !(log && values[i] <= 0);
  return values.map((value, i) => {
    if (!drawn(i)) return "";
    const at = `${x(steps[i]).toFixed(1)} ${y(log ? Math.log10(value) : value).toFixed(1)}`;
    return drawn(i - 1) ? `L${at}` : drawn(i + 1) ? `M${at}` : `M${at}h.1`; // a value alone is a dot
  }).join("");
}

function bandPath(series, x, y, log) {
  const [low, high] = series.band.map(b => b.values);
  const steps = series.band[0].steps;
  const clip = value => (log ? Math.log10(Math.max(value, 1e-300)) : value);
  const at = steps.map((_, i) => i).filter(i => low[i] !== null && high[i] !== null && high[i] !== undefined && !(log && high[i] <= 0));
  if (!at.length) return "";
  const point = values => i => `${x(steps[i]).toFixed(1)} ${Math.min(y(clip(values[i])), HEIGHT - BOTTOM).toFixed(1)}`;
  return `M${at.map(point(high)).join("L")}L${at.reverse().map(point(low)).join("L")}Z`;
}

function lineChart(parent, spec) {
  const chart = { ...frame(parent, spec.title, spec.unit || "", spec.title), x: null, step: null };
  let shown = [];
  const draw = () => {
    shown = seriesOf(spec).filter(s => !hidden.has(s.index));
    chart.picture.replaceChildren();
    chart.line = null;
    const drawn = shown.flatMap(s => [s.line, ...s.band]);
    const values = drawn.flatMap(d => d.values).filter(v => v !== null && !(spec.log && v <= 0));
    const steps = drawn.flatMap(d => [d.steps[0], d.steps[d.steps.length - 1]]);
    const finish = text => chart.picture.setAttribute("aria-label", `${spec.title}. ${text}`);
    if (!values.length) {
      chart.picture.append(make("text", { x: WIDTH / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "nothing to draw"));
      chart.x = linear(0, 1, LEFT, WIDTH - RIGHT);
      return finish("Nothing to draw.");
    }
    let low = values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
    if (spec.log) [low, high] = [Math.log10(low), Math.log10(high)];
    if (spec.log && high - low < 1) [low, high] = [Math.floor(low), Math.ceil(high)];
    const room = (high - low) * 0.04 || Math.abs(high) * 0.1 || 0.5;
    [low, high] = [low - room, high + room];
    const [first, last] = [Math.min(...steps), Math.max(...steps)];
    const x = (chart.x = linear(first, last, LEFT, WIDTH - RIGHT)), y = linear(low, high, HEIGHT - BOTTOM, TOP);
    const yTicks = spec.log ? decades(low, high) : ticks(low, high, 4);
    chart.picture.append(axes(x, y, stepTicks(first, last), yTicks, v => number(spec.log ? 10 ** v : v)));
    for (const series of shown) {
      if (series.band.length) {
        const band = make("path", { class: "band", d: bandPath(series, x, y, spec.log) });
        band.style.fill = band.style.stroke = colour(series.index);
        chart.picture.append(band);
      }
    }
    for (const series of shown) {
      const d = pathOf(series.line.steps, series.line.values, x, y, spec.log);
      const path = make("path", { class: "curve", d, "stroke-dasharray": dash(series.index), "data-run": series.run.name });
      path.style.stroke = colour(series.index);
      chart.picture.append(path);
    }
    finish(shown.map(s => `${s.run.name}: last ${number(s.line.values[s.line.values.length - 1])}`).join(", "));
    if (chart.step !== null) chart.read(chart.step);
    else tell("last", s => [s.line, ...s.band].map(curve => curve.values[curve.values.length - 1]));
  };
  // Of a curve with points left out, the nearest that there is.
  const at = (series, step) => [series.line, ...series.band].map(({ steps, values }) =>
    step < steps[0] || step > steps[steps.length - 1] ? null : values[steps.indexOf(nearest(steps, step))]);
  chart.read = step => {
    if (!shown.length) return;
    cursor(chart, step);
    tell(`step ${step}`, s => at(s, step));
  };
  // The values of all runs; one that has none is left out.
  const tell = (text, valuesOf) => {
    const parts = shown.filter(s => valuesOf(s)[0] !== null).map(s => {
      const [value, ...ends] = valuesOf(s).map(number);
      const band = ends.length ? ` (${ends.join(" … ")})` : "";
      const name = make("span", { class: "unseen" }, `${s.run.name} `); // colours say nothing to a screen reader
      return make("span", {}, swatch(colour(s.index), dash(s.index)), name, value + band, " ");
    });
    chart.readout.replaceChildren(make("span", {}, `${text} `), ...parts);
  };
  const steps = () => [...new Set(shown.flatMap(s => s.line.steps))].sort((a, b) => a - b);
  readable(chart, steps, step => readers.forEach(reader => reader.read(step)));
  readers.push(chart);
  draw();
  redraws.push(draw);
  return { chart, draw };
}

const redraws = [];

const CURVES = [
  { title: "reward", line: "reward/mean" },
  { title: "pass@1", line: "reward/pass@1" },
  { title: "entropy of the policy", unit: "nat", line: "policy/entropy" },
  { title: "loss", line: "loss/mean" },
  { title: "norm of the gradient", unit: "before clipping", line: "grad_norm", log: true },
  { title: "mismatch KL(μ ‖ π)", unit: "k3, nat a token", line: "mismatch/k3", log: true },
  { title: "largest |log π − log μ|", unit: "nat", line: "mismatch/abs_dlogp_max", log: true },
  { title: "effective sample size", line: "mismatch/ess" },
  { title: "tokens of a response", line: "response/len_mean" },
  { title: "seconds of a step", unit: "s", line: "perf/step_s" },
];

const BANDS = [
  {
    title: "weight of the loss", unit: "median, 1 % to 99 % of tokens",
    line: "drpo/weight_q50", band: ["drpo/weight_q01", "drpo/weight_q99"],
  },
  {
    title: "mismatch |log π − log μ|", unit: "mean to largest, nat",
    line: "mismatch/abs_dlogp_mean", band: ["mismatch/abs_dlogp_mean", "mismatch/abs_dlogp_max"], log: true,
  },
  { title: "reward", unit: "mean, lowest to highest", line: "reward/mean", band: ["reward/min", "reward/max"] },
  {
    title: "staleness", unit: "mean to largest, weight versions",
    line: "staleness/mean", band: ["staleness/mean", "staleness/max"],
  },
];

function drawCurves() {
  const charts = byId("curve-charts");
  CURVES.filter(spec => seriesOf(spec).length).forEach(spec => lineChart(charts, spec));
  const names = [...new Set(RUNS.flatMap(run => Object.keys(run.curves)))].sort();
  const spec = { title: "", line: names.includes("lr") ? "lr" : names[0] };
  const { chart, draw } = lineChart(charts, spec);
  const choice = make("select", { "aria-label": "metric of this chart", id: "metric" }, ...names.map(n => make("option", {}, n)));
  choice.value = spec.line;
  choice.onchange = () => { spec.line = choice.value; draw(); };
  chart.picture.parentNode.querySelector("figcaption").replaceChildren(choice, make("small", { class: "note" }, "any metric"));
  BANDS.filter(spec => seriesOf(spec).length).forEach(spec => lineChart(byId("band-charts"), spec));
  const longest = Math.max(...RUNS.map(run => run.steps));
  const thinned = longest > DATA.max_points
    ? `At most ${DATA.max_points} points of a curve: of every stretch of steps the lowest and the highest. ` : "";
  byId("curve-note").textContent = `${thinned}Logarithmic where values go over decades; 0 and less are then not drawn.`;
}

// ---- times

function drawTimes() {
  const verbs = [...new Set(RUNS.flatMap(run => run.times.verbs))];
  byId("time-keys").replaceChildren(...verbs.map((verb, i) => {
    const square = make("span", { class: "square", "aria-hidden": "true" });
    square.style.background = colour(i);
    return make("span", {}, square, verb);
  }));
  byId("time-note").textContent = "Seconds of each step, verb on verb, on one scale for all runs; a bar is the mean of several steps where a run has many.";
  const total = bar => bar[2].reduce((a, b) => a + (b || 0), 0);
  const highest = RUNS.flatMap(run => run.times.bars.map(total)).reduce((a, b) => Math.max(a, b), 0);
  RUNS.forEach((run, index) => {
    const mean = run.times.verbs.map((verb, k) => `${verb} ${number(run.times.bars.reduce((a, b) => a + (b[2][k] || 0), 0) / run.times.bars.length)} s`);
    const chart = { ...frame(byId("time-charts"), run.name, "s", `Seconds of a step of ${run.name}, mean of the bars: ${mean.join(", ")}`) };
    const bars = run.times.bars, figure = chart.picture.parentNode;
    const x = (chart.x = linear(bars[0][0] - 0.5, bars[bars.length - 1][1] + 0.5, LEFT, WIDTH - RIGHT));
    const y = linear(0, highest * 1.05, HEIGHT - BOTTOM, TOP);
    chart.picture.append(axes(x, y, stepTicks(bars[0][0], bars[bars.length - 1][1]), ticks(0, highest * 1.05, 4), number));
    const height = bars.map(() => 0);
    run.times.verbs.forEach((verb, k) => {
      let d = "";
      bars.forEach(([first, last, seconds], i) => {
        const [from, to] = [x(first - 0.5), x(last + 0.5)], gap = Math.min(1, (to - from) * 0.12);
        const [bottom, top] = [y(height[i]), y((height[i] += seconds[k] || 0))];
        if (bottom - top > 0.02) d += `M${(from + gap).toFixed(1)} ${bottom.toFixed(2)}H${(to - gap).toFixed(1)}V${top.toFixed(2)}H${(from + gap).toFixed(1)}Z`;
      });
      const path = make("path", { d, "data-verb": verb });
      path.style.fill = colour(verbs.indexOf(verb));
      chart.picture.append(path);
    });
    chart.readout.replaceChildren(...["mean of the bars", ...mean].map(t => make("span", {}, `${t} `)));
    readable(chart, () => bars.map(bar => bar[0]), step => {
      const bar = bars[bars.findIndex(b => b[0] === step)];
      cursor(chart, (bar[0] + bar[1]) / 2);
      chart.step = step;
      const text = bar[0] === bar[1] ? `step ${bar[0]}` : `steps ${bar[0]}–${bar[1]}`;
      chart.readout.replaceChildren(...[text, ...run.times.verbs.map((v, k) => `${v} ${number(bar[2][k])}`)].map(t => make("span", {}, `${t} `)));
    });
    redraws.push(() => { figure.hidden = hidden.has(index); });
  });
}

// ---- staleness

function drawStaleness() {
  const known = RUNS.map((run, index) => ({ run, index })).filter(({ run }) => run.samples.staleness.length);
  byId("staleness-note").textContent = known.length
    ? "Weight versions (updates) between the sampling and the training of a token, as a share of trained tokens, in the steps whose samples were read."
    : "No run has rollouts and a configuration to take it from.";
  if (!known.length) return;
  const chart = frame(byId("staleness-charts"), "share of tokens", "by weight versions", "");
  const draw = () => {
    chart.picture.replaceChildren();
    const shown = known.filter(({ index }) => !hidden.has(index));
    if (!shown.length) return;
    const shares = shown.map(({ run, index }) => {
      const sum = run.samples.staleness.reduce((a, [, n]) => a + n, 0);
      return { run, index, share: run.samples.staleness.map(([s, n]) => [s, n / sum]) };
    });
    const all = shares.flatMap(s => s.share), versions = all.map(([s]) => s);
    const [low, high] = [Math.min(...versions), Math.max(...versions)], top = Math.max(...all.map(([, v]) => v));
    const x = linear(low - 0.5, high + 0.5, LEFT, WIDTH - RIGHT), y = linear(0, top * 1.05, HEIGHT - BOTTOM, TOP);
    chart.picture.append(axes(x, y, stepTicks(low, high), ticks(0, top * 1.05, 4), number));
    const width = Math.min(40, (x(1) - x(0)) * 0.8 / shares.length);
    shares.forEach(({ run, index, share }, k) => share.forEach(([s, v]) => {
      const from = x(s) + (k - shares.length / 2) * width;
      const bar = make("rect", { x: from, y: y(v), width: Math.max(width - 1, 0.5), height: y(0) - y(v) }, make("title", {}, `${run.name}: ${s} versions, ${number(100 * v)} %`));
      bar.style.fill = colour(index);
      chart.picture.append(bar);
    }));
    const text = shares.map(({ run, share }) => `${run.name}: ${share.map(([s, v]) => `${s} versions ${number(100 * v)} %`).join(", ")}`);
    chart.picture.setAttribute("aria-label", `Staleness. ${text.join("; ")}`);
    chart.readout.textContent = shares.map(({ run, share }) => `${run.name}: mean ${number(share.reduce((a, [s, v]) => a + s * v, 0))}`).join("; ");
  };
  draw();
  redraws.push(draw);
}

// ---- legend

function drawLegend() {
  RUNS.forEach((run, index) => {
    const button = make("button", { type: "button", "aria-pressed": "true" }, swatch(colour(index), dash(index)), `${run.name} `, make("small", {}, `${run.steps} steps`));
    button.onclick = () => {
      const show = hidden.delete(index);
      if (!show) hidden.add(index);
      button.setAttribute("aria-pressed", String(show));
      redraws.forEach(draw => draw());
    };
    byId("legend").append(button);
  });
}

drawLegend();
drawCurves();
drawTimes();
drawStaleness();
byId("smooth").onchange = () => redraws.forEach(draw => draw());
