// Accuracy against a cost: the trials, the front that no other beats, and where it turns.
//
//   circle  a trial     square  full fine-tuning     triangle  full fine-tuning stopped early     filled: on the front
import { el, framed, scrolls } from "./chart.js";
import { percent } from "./units.js";

const COSTS = { compute: "compute", bytes: "bytes", seconds: "seconds" };
const NARROWEST = 460, HIGH = 340, LEFT = 56, RIGHT = 24, TOP = 16, BOTTOM = 44, TICKS = 7;
const SHAPES = {
  circle: () => svg("circle", { r: 5 }),
  full: () => svg("rect", { x: -5.5, y: -5.5, width: 11, height: 11 }),
  stopped: () => svg("path", { d: "M0,-7 L6.5,5 L-6.5,5 Z" }),
};
export const BASELINES = { full: "full fine-tuning", stopped: "stopped early" };

export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
export const text = (x, y, words, attributes = {}) => svg("text", { x, y, ...attributes }, words);

// Calls `draw` when the place has become wider or narrower.
export function resized(place, draw) {
  let wide = place.clientWidth;
  new ResizeObserver(() => {
    if (place.clientWidth === wide) return;
    wide = place.clientWidth;
    draw();
  }).observe(place);
}

// `pointed(key)` hears which trial is looked at, null for none. The answer: set(sweep, labels), light(key).
export function pareto(place, { against, chose, pointed }) {
  const view = { cost: against in COSTS ? against : "compute", sweep: null, labels: new Map() };
  const { head, plot, refill } = framed(place, "Accuracy against cost", () => table(view));
  const choice = el("select", {}, ...Object.keys(COSTS).map((name) => el("option", { value: name, textContent: COSTS[name], selected: name === view.cost })));
  choice.setAttribute("aria-label", "Cost");
  choice.addEventListener("change", () => {
    view.cost = choice.value;
    chose(view.cost);
    show();
  });
  head.insertBefore(choice, head.querySelector("button"));
  scrolls(plot, "Accuracy against cost");
  const told = (event) => pointed(event.target.closest?.("[data-key]")?.dataset.key ?? null);
  for (const kind of ["pointerover", "focusin"]) plot.addEventListener(kind, told);
  for (const kind of ["pointerleave", "focusout"]) plot.addEventListener(kind, () => pointed(null));

  function show() {
    const focused = document.activeElement?.closest?.(".plane [data-key]")?.dataset.key;
    const points = view.sweep.points.filter((point) => point[view.cost] !== null);
    plot.replaceChildren(points.length ? drawn(points, view, Math.max(NARROWEST, plot.clientWidth)) : el("p", { className: "dim", textContent: "No trial has succeeded so far." }));
    if (focused) plot.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
    refill();
  }
  resized(plot, () => view.sweep && show());
  return {
    set(sweep, labels) {
      Object.assign(view, { sweep, labels });
      show();
    },
    light: (key) => plot.querySelectorAll("[data-key]").forEach((point) => point.classList.toggle("lit", point.dataset.key === key)),
  };
}

const trialOf = (sweep, key) => sweep.trials.find((trial) => trial.key === key);

function table({ sweep, cost, labels }) {
  const front = new Set(sweep.fronts[cost]);
  const rows = [...sweep.points].sort((a, b) => (a[cost] ?? 9) - (b[cost] ?? 9)).map((point) => [point.key, labels.get(point.key), percent(point.accuracy), percent(point.compute), percent(point.bytes), percent(point.seconds), front.has(point.key) ? "yes" : "", point.key === sweep.knee ? "yes" : ""]);
  return [["Trial", "Setting", "Accuracy", "Compute", "Bytes", "Seconds", `On the front (${cost})`, "Knee"], rows];
}

// The ends of an axis, a little wider than its values, and marks between them.
function axis(values, least, most) {
  let low = Math.min(...values), high = Math.max(...values);
  const spare = Math.max(0.01, 0.08 * (high - low));
  [low, high] = [Math.max(least, low - spare), Math.min(most, high + spare)];
  const step = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5].find((each) => (high - low) / each <= TICKS) ?? (high - low) / TICKS;
  const ticks = [];
  for (let at = Math.ceil(low / step) * step; at <= high + 1e-9; at += step) ticks.push(at);
  return { low, high, ticks };
}

function drawn(points, { sweep, cost, labels }, wide) {
  const across = axis(points.map((point) => point[cost]), 0, Infinity), up = axis(points.map((point) => point.accuracy), 0, 1);
  const x = (value) => LEFT + ((value - across.low) / (across.high - across.low || 1)) * (wide - LEFT - RIGHT);
  const y = (value) => HIGH - BOTTOM - ((value - up.low) / (up.high - up.low || 1)) * (HIGH - TOP - BOTTOM);
  const picture = svg("svg", { class: "plane", width: wide, height: HIGH, role: "group", "aria-label": `Accuracy against ${cost}: ${points.length} trials. The numbers are behind Table.` });
  for (const at of up.ticks) picture.append(svg("line", { class: "gridline", x1: LEFT, x2: wide - RIGHT, y1: y(at), y2: y(at) }), text(LEFT - 6, y(at) + 4, percent(at), { "text-anchor": "end" }));
  for (const at of across.ticks) picture.append(svg("line", { class: "gridline", x1: x(at), x2: x(at), y1: TOP, y2: HIGH - BOTTOM }), text(x(at), HIGH - BOTTOM + 16, percent(at), { "text-anchor": "middle" }));
  const whole = sweep.against === "full" ? "of what full fine-tuning took" : "of the most that a trial took";
  picture.append(svg("path", { class: "axis", fill: "none", d: `M${LEFT},${TOP} V${HIGH - BOTTOM} H${wide - RIGHT}` }), text((LEFT + wide) / 2, HIGH - 8, `${cost}, share ${whole}`, { "text-anchor": "middle" }), text(LEFT + 4, TOP - 4, "accuracy"));
  const known = new Map(points.map((point) => [point.key, point]));
  const front = (sweep.fronts[cost] ?? []).map((key) => known.get(key)).filter(Boolean).sort((a, b) => a[cost] - b[cost]);
  if (front.length > 1) picture.append(svg("path", { class: "front", d: front.map((point, i) => (i ? `H${x(point[cost])} V${y(point.accuracy)}` : `M${x(point[cost])},${y(point.accuracy)}`)).join(" ") }));
  const taken = points.map((point) => [x(point[cost]) - 8, y(point.accuracy) - 8, x(point[cost]) + 8, y(point.accuracy) + 8]);
  const names = [];
  const first = (point) => (point.key === sweep.knee ? 0 : trialOf(sweep, point.key)?.baseline ? 1 : front.includes(point) ? 2 : 3);
  for (const point of [...points].sort((a, b) => first(b) - first(a))) picture.append(mark(point, sweep, cost, labels, front.includes(point), [x, y]));
  for (const point of [...points].filter((each) => first(each) < 3).sort((a, b) => first(a) - first(b))) {
    const spot = [x(point[cost]), y(point.accuracy), wide, taken];
    const name = label(labelOf(point, sweep, labels), ...spot) ?? (point.key === sweep.knee ? label("knee", ...spot) : null);
    if (name) names.push(name);
  }
  picture.append(...names);
  return picture;
}

function labelOf(point, sweep, labels) {
  const name = labels.get(point.key) ?? point.key;
  return point.key === sweep.knee ? `knee: ${name}` : name;
}
function mark(point, sweep, cost, labels, onFront, [x, y]) {
  const trial = trialOf(sweep, point.key), baseline = trial?.baseline;
  const shape = (SHAPES[baseline] ?? SHAPES.circle)();
  shape.classList.add("point");
  const at = `translate(${x(point[cost])},${y(point.accuracy)})`;
  const made = svg("a", { href: trial ? `/ui/jobs/${trial.job_id}` : "#", "data-key": point.key, class: `${onFront ? "on-front " : ""}${baseline ? "baseline" : ""}`, transform: at });
  made.setAttribute("aria-label", `${labelOf(point, sweep, labels)}: accuracy ${percent(point.accuracy)}, ${cost} ${percent(point[cost])}${onFront ? ", on the front" : ""}`);
  if (point.key === sweep.knee) made.append(svg("circle", { class: "knee", r: 10 }));
  made.append(shape);
  return made;
}
// Beside its point where nothing else is, or nowhere.
function label(words, x, y, most, taken) {
  const wide = 6.6 * words.length + 8, high = 13;
  const spots = [[x - 9, y - 10, "end"], [x + 10, y + 19, "start"], [x, y - 13, "middle"], [x + 12, y + 4, "start"], [x - 12, y + 4, "end"], [x + 9, y - 10, "start"], [x, y + 23, "middle"]];
  for (const [left, foot, anchor] of spots) {
    const from = anchor === "start" ? left : anchor === "end" ? left - wide : left - wide / 2;
    const box = [from, foot - high, from + wide, foot + 2];
    if (box[0] < LEFT || box[2] > most || box[1] < 2 || box[3] > HIGH - BOTTOM) continue;
    if (taken.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3] && !(other[0] === x - 8 && other[1] === y - 8))) continue;
    taken.push(box);
    return text(left, foot, words, { class: "named", "text-anchor": anchor, "aria-hidden": "true" });
  }
  return null;
}
