// The curves of a job: what the API has of its steps, and from then on each step as it is reported.
import { recall, remember } from "./address.js";
import { ask } from "./api.js";
import { Chart } from "./chart.js";

const DRAW_MS = 400;
const SERIES = [
  { title: "Loss", smooth: 0.6, lines: { loss: "loss" } },
  { title: "Accuracy", smooth: 0.6, lines: { train_accuracy: "training images" }, tested: "accuracy" },
  { title: "Learning rate", lines: { learning_rate: "learning rate" } },
  { title: "Gradient norm", lines: { grad_norm: "gradient norm" } },
  { title: "Seconds per step", smooth: 0.4, lines: { step_seconds: "seconds" } },
  { title: "Compute and bytes", lines: { compute_fraction: "compute, of all-FULL", bytes_fraction: "bytes, of all-FULL" } },
  { title: "Idle share", smooth: 0.4, lines: { idle_share: "idle" } },
];

export async function charts(place, job, on) {
  const steps = new Steps(), marks = new Marks(JSON.parse(document.getElementById("marks").textContent));
  const axis = document.getElementById("axis"), none = document.getElementById("none");
  axis.value = recall("along", "step");
  if (axis.selectedIndex < 0) axis.value = "step";
  let due = 0, drawn = null;
  const name = () => axis.selectedOptions[0].textContent;

  function draw() {
    due = 0;
    none.hidden = steps.rows.length > 0;
    place.hidden = !none.hidden;
    if (!steps.rows.length) return;
    drawn ??= SERIES.map(({ title, smooth }) => new Chart(place, { title, smooth, x: name() }));
    const xs = steps.along(axis.value), at = (step) => xs[steps.near(step)];
    const restarts = marks.restarts().map(({ step, text }) => ({ x: at(step), text }));
    SERIES.forEach(({ lines, tested }, i) => {
      const drawnLines = Object.entries(lines).map(([key, label]) => ({ label, x: xs, y: steps.rows.map((row) => value(row, key)) }));
      if (tested) drawnLines.push(testLine(marks.evaluations(steps), at, xs));
      drawn[i].set(drawnLines, restarts);
    });
    place.dataset.lastStep = steps.rows.at(-1).step;
  }
  const soon = () => (due ||= setTimeout(draw, DRAW_MS));

  axis.addEventListener("change", () => {
    remember("along", axis.value, "step");
    drawn?.forEach((chart) => chart.along(name()));
    draw();
  });
  on.metrics = (event) => (steps.add(event.data), soon());
  for (const type of ["evaluation", "attempt.lost", "checkpoint.resumed"]) {
    on[type] = (event) => (marks.add({ type, attempt: event.attempt, data: event.data, step: steps.rows.at(-1)?.step ?? 0 }), soon());
  }
  const { data } = await ask(`/v1/jobs/${job}/metrics?max_points=2000`);
  steps.begin(data);
  draw();
}

// A figure that is null was not finite: JSON has no word for it.
const value = (row, key) => (row[key] === null ? NaN : row[key] ?? null);

function testLine(seen, at, xs) {
  const found = new Map(seen.map(({ step, accuracy }) => [step === 0 ? Math.min(0, xs[0]) : at(step), accuracy]));
  const points = [...found].filter(([x]) => x !== undefined).sort((a, b) => a[0] - b[0]);
  return { label: "test images", x: points.map(([x]) => x), y: points.map(([, y]) => y), points: true };
}

// The steps in order; one that is run again replaces what it was.
class Steps {
  rows = [];
  begin(rows) {
    const newer = this.rows;
    this.rows = rows;
    for (const row of newer) this.add(row);
  }
  near(step) {
    let low = 0, high = this.rows.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.rows[middle].step < step) low = middle + 1;
      else high = middle;
    }
    return low;
  }
  add(row) {
    if (typeof row?.step !== "number") return;
    if (!this.rows.length || row.step > this.rows.at(-1).step) return this.rows.push(row);
    const at = this.near(row.step);
    this.rows.splice(at, this.rows[at].step === row.step ? 1 : 0, row);
  }
  // Seconds of training are summed up, since a step does not say when it was.
  along(axis) {
    if (axis !== "time") return this.rows.map((row) => row[axis] ?? row.step);
    let sum = 0, last = 0;
    return this.rows.map((row) => {
      sum += (row.step_seconds ?? 0) * Math.max(1, row.step - last);
      last = row.step;
      return sum;
    });
  }
}

class Marks {
  constructor(seen) {
    this.seen = seen;
  }
  add(mark) {
    this.seen.push(mark);
  }
  evaluations(steps) {
    return this.seen.filter(({ type, data }) => type === "evaluation" && typeof data.accuracy === "number").map(({ data }) => {
      const said = /(\d+)$/.exec(data.when ?? "");
      return { accuracy: data.accuracy, step: data.when === "before" ? 0 : said ? Number(said[1]) : steps.rows.at(-1).step };
    });
  }
  restarts() {
    return this.seen.filter(({ type }) => type !== "evaluation").map(({ type, attempt, data, step }) =>
      type === "attempt.lost" ? { step: step ?? 0, text: `attempt ${data.attempt ?? attempt} lost` } : { step: data.step ?? 0, text: `attempt ${attempt} goes on` });
  }
}
