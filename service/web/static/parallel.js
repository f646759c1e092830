// Parallel coordinates: every trial a line over its settings and what came of them; ranges narrow what is shown.
import { digits, el, framed, scrolls } from "./chart.js";
import { resized, svg, text } from "./pareto.js";
import { percent } from "./units.js";

const EACH = 96, HIGH = 300, TOP = 34, BOTTOM = 22, EDGE = 46; // an axis needs so much
const NOTCHES = 100; // of a range
const RESULTS = { accuracy: percent, compute: percent, bytes: percent, seconds: percent };

// `narrowed(keys)` hears which trials are in all ranges, `pointed(key)` which one is looked at. The answer: set, light.
export function parallel(place, { narrowed, pointed }) {
  const view = { axes: [], rows: [], ranges: new Map() };
  const { plot, refill } = framed(place, "Settings and results", () => [["Trial", ...view.axes.map((axis) => axis.name)], view.rows.filter(inside).map((row) => [row.key, ...view.axes.map((axis) => axis.write(row.values[axis.name]))])]);
  const brushes = el("div", { className: "brushes" });
  plot.after(brushes);
  scrolls(plot, "Settings and results");
  plot.addEventListener("pointerover", (event) => pointed(event.target.dataset.key ?? null));
  plot.addEventListener("pointerleave", () => pointed(null));

  const inside = (row) => view.axes.every((axis) => {
    const [low, high] = view.ranges.get(axis.name) ?? [0, 1], at = axis.place(row.values[axis.name]);
    return (low <= 0 && high >= 1) || (at !== null && at >= low - 1e-9 && at <= high + 1e-9);
  });
  function show() {
    plot.replaceChildren(view.axes.length > 1 && view.rows.length ? drawn(view, inside, Math.max(EACH * view.axes.length, plot.clientWidth)) : el("p", { className: "dim", textContent: "There is no trial yet." }));
    refill();
    narrowed(new Set(view.rows.filter(inside).map((row) => row.key)), view.rows.length);
  }
  function brush(axis) {
    const names = ["from", "to"], inputs = names.map((name, i) => el("input", { type: "range", min: 0, max: NOTCHES, value: i * NOTCHES }));
    const told = names.map(() => el("output", {}));
    const write = () => inputs.forEach((input, i) => {
      told[i].textContent = axis.at(input.value / NOTCHES);
      input.setAttribute("aria-valuetext", told[i].textContent);
    });
    inputs.forEach((input, i) => input.addEventListener("input", () => {
      if (Number(inputs[0].value) > Number(inputs[1].value)) inputs[1 - i].value = input.value;
      view.ranges.set(axis.name, inputs.map((each) => each.value / NOTCHES));
      write();
      show();
    }));
    write();
    return el("fieldset", {}, el("legend", { textContent: axis.name }), ...names.map((name, i) => el("label", {}, name, inputs[i], told[i])));
  }
  resized(plot, show);
  return {
    set(sweep) {
      const before = JSON.stringify(view.axes.map((axis) => axis.of));
      Object.assign(view, read(sweep));
      if (JSON.stringify(view.axes.map((axis) => axis.of)) !== before && !brushes.contains(document.activeElement)) {
        view.ranges.clear(); // its ends are others now
        brushes.replaceChildren(...view.axes.map(brush));
      }
      show();
    },
    light(key) {
      const lines = [...plot.querySelectorAll("[data-key]")];
      for (const each of lines) each.classList.toggle("lit", each.dataset.key === key);
      lines.find((each) => each.dataset.key === key)?.parentElement.append(lines.find((each) => each.dataset.key === key));
    },
  };
}

// The axes, and each trial's values on them; what has one value throughout is no axis.
function read(sweep) {
  const points = new Map(sweep.points.map((point) => [point.key, point]));
  const paths = Object.keys(sweep.spec.space);
  const rows = sweep.trials.map((trial) => {
    const { key, ...results } = points.get(trial.key) ?? {};
    return { key: trial.key, baseline: trial.baseline, values: { ...trial.setting, ...results, accuracy: results.accuracy ?? trial.accuracy, loss: trial.loss } };
  });
  const own = paths.map((path) => axisOf(path, rows, sweep.spec.space[path].log));
  const results = [...Object.entries(RESULTS), ["loss", digits]].map(([name, write]) => axisOf(name, rows, false, write));
  return { rows, axes: [...own, ...results].filter(Boolean) };
}
const spelled = (value) => (value === null || value === undefined ? "–" : typeof value === "object" ? Object.values(value).join(",") : String(value));

function axisOf(name, rows, log, write = spelled) {
  const values = rows.map((row) => row.values[name]).filter((value) => value !== undefined && value !== null);
  const all = [...new Set(values.map(spelled))];
  if (!values.length) return null;
  if (!values.every((value) => typeof value === "number")) {
    const sorted = all.sort((a, b) => a.localeCompare(b, undefined, { numeric: true })), last = Math.max(1, sorted.length - 1);
    return { name, of: sorted, write: spelled, ticks: sorted.map((word, i) => [i / last, word]), place: (value) => (value === undefined || value === null ? null : sorted.indexOf(spelled(value)) / last), at: (share) => sorted[Math.round(share * last)] ?? "" };
  }
  const low = Math.min(...values), high = Math.max(...values), turned = log || (low > 0 && high / low >= 30) ? Math.log : (value) => value;
  const back = turned === Math.log ? Math.exp : (value) => value, span = turned(high) - turned(low) || 1;
  const at = (share) => write(Number(back(turned(low) + share * span).toPrecision(3)));
  const few = all.length <= 6 ? [...new Set(values)].map((value) => [(turned(value) - turned(low)) / span, write(value)]) : [0, 0.5, 1].map((share) => [share, at(share)]);
  return { name, of: [low, high], write: (value) => (typeof value === "number" ? write(value) : null), ticks: few, place: (value) => (typeof value === "number" ? (turned(value) - turned(low)) / span : null), at };
}

function drawn({ axes, rows }, inside, wide) {
  const x = (i) => EDGE + (i * (wide - 2 * EDGE)) / (axes.length - 1), y = (share) => HIGH - BOTTOM - share * (HIGH - TOP - BOTTOM);
  const picture = svg("svg", { class: "plane", width: wide, height: HIGH, role: "img", "aria-label": `${rows.length} trials over ${axes.map((axis) => axis.name).join(", ")}. The numbers are behind Table.` });
  const lines = svg("g", {});
  for (const row of rows) {
    const d = axes.map((axis, i) => [i, axis.place(row.values[axis.name])]).filter(([, at]) => at !== null).map(([i, at]) => `${x(i)},${y(at)}`);
    if (d.length > 1) lines.append(svg("polyline", { class: `run${row.baseline ? " baseline" : ""}${inside(row) ? "" : " off"}`, points: d.join(" "), "data-key": row.key }));
  }
  picture.append(lines);
  axes.forEach((axis, i) => {
    const last = axis.name.split(".").pop();
    picture.append(svg("line", { class: "axis", x1: x(i), x2: x(i), y1: TOP, y2: HIGH - BOTTOM }), text(x(i), i % 2 ? 13 : 25, last, { class: "named", "text-anchor": "middle" }));
    for (const [at, word] of axis.ticks) picture.append(text(x(i) + 5, y(at) + 4, word));
  });
  return picture;
}
