// One sweep: its trials as a table, their front, and their settings beside their results; all of it live.
import { recall, remember } from "./address.js";
import { ask, say } from "./api.js";
import { digits, el } from "./chart.js";
import { live } from "./live.js";
import { BASELINES, pareto } from "./pareto.js";
import { parallel } from "./parallel.js";
import { percent, took } from "./units.js";

const AGAIN_MS = 1000; // at least between two looks
const at = (id) => document.getElementById(id);
const id = at("sweep").dataset.id, { looks, final: FINAL } = JSON.parse(at("states").textContent);
const view = { sort: recall("sort", ""), down: recall("order", "asc") === "desc", within: null, sweep: null };

function point(key) {
  front.light(key);
  lines.light(key);
  for (const row of document.querySelectorAll("#trials tr[data-key]")) row.classList.toggle("lit", row.dataset.key === key);
}
const front = pareto(at("pareto"), { against: recall("against", null), chose: (cost) => remember("against", cost, "compute"), pointed: point });
const lines = parallel(at("parallel"), {
  pointed: point,
  narrowed(keys, all) {
    view.within = keys.size < all ? keys : null;
    for (const row of document.querySelectorAll("#trials tr[data-key]")) row.hidden = view.within !== null && !keys.has(row.dataset.key);
    at("within").textContent = view.within ? `${keys.size} of ${all} trials are within the ranges.` : "";
  },
});

// --- the table ------------------------------------------------------------------------------------------------------
const spelled = (value) => (value && typeof value === "object" ? ("full" in value ? [value.full, value.forward ?? 0, value.skip ?? 0].join(",") : JSON.stringify(value)) : Array.isArray(value) ? value.join(",") : String(value));
function settingOf(trial) {
  if (trial.baseline) return BASELINES[trial.baseline];
  return Object.values(trial.setting).map((value) => (Array.isArray(value) ? value.join(",") : spelled(value))).join(" · ");
}
const COLUMNS = {
  setting: ["Setting", (trial) => settingOf(trial)],
  status: ["Status", (trial) => trial.status],
  accuracy: ["Accuracy", (trial) => trial.figures?.accuracy ?? trial.accuracy, percent],
  compute: ["Compute", (trial) => trial.point?.compute, percent],
  bytes: ["Bytes", (trial) => trial.point?.bytes, percent],
  seconds: ["Seconds", (trial) => trial.figures?.seconds, took],
  placed: ["Placed", (trial) => trial.figures?.placement, (value) => value ?? "–"],
  loss: ["Loss", (trial) => trial.loss, digits],
};

function rowOf(trial) {
  const [icon, kind] = looks[trial.status];
  const link = el("a", { href: `/ui/jobs/${trial.job_id}`, textContent: settingOf(trial), dir: "auto" });
  const reach = trial.total_steps ? `${trial.step}/${trial.total_steps}` : "";
  const marks = [trial.key === view.sweep.knee ? "knee" : "", view.sweep.fronts.compute.includes(trial.key) ? "on the front" : ""].filter(Boolean).join(", ");
  const state = el("td", {}, el("span", { className: `state ${kind}`, textContent: `${icon} ${trial.status}` }), el("small", { className: "dim block", textContent: trial.error?.message ?? reach, dir: "auto" }));
  const cells = Object.values(COLUMNS).slice(2).map(([, value, write]) => el("td", { className: "num", textContent: write(value(trial) ?? null) }));
  const end = el("td", {});
  if (!FINAL.includes(trial.status) && trial.status !== "cancelling") {
    const cancel = el("button", { type: "button", textContent: "Cancel" });
    cancel.setAttribute("aria-label", `Cancel ${settingOf(trial)}`);
    cancel.addEventListener("click", () => act(`/v1/jobs/${trial.job_id}/cancel`, "It is being cancelled."));
    end.append(cancel);
  }
  const row = el("tr", { tabIndex: -1, hidden: view.within !== null && !view.within.has(trial.key) }, el("td", {}, link, el("small", { className: "dim block", textContent: [trial.key, marks].filter(Boolean).join(" · ") })), state, ...cells, end);
  Object.assign(row.dataset, { key: trial.key, href: `/ui/jobs/${trial.job_id}` });
  return row;
}
function sorted(trials) {
  const value = COLUMNS[view.sort]?.[1];
  if (!value) return trials;
  const order = (a, b) => (typeof a === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
  const known = (trial) => value(trial) !== undefined && value(trial) !== null;
  return [...trials.filter(known).sort((a, b) => (view.down ? -1 : 1) * order(value(a), value(b))), ...trials.filter((trial) => !known(trial))];
}
function table() {
  const here = document.activeElement, was = here?.closest("#trials tr[data-key]")?.dataset.key, kind = here?.tagName, heading = here?.closest("th")?.dataset.column;
  const heads = Object.entries(COLUMNS).map(([name, [title]], i) => {
    const button = el("button", { type: "button", textContent: title });
    button.addEventListener("click", () => {
      Object.assign(view, { down: view.sort === name && !view.down, sort: name });
      remember("sort", name, "");
      remember("order", view.down ? "desc" : "asc", "asc");
      table();
    });
    const head = el("th", { className: i > 1 ? "num" : "" }, button);
    head.dataset.column = name;
    if (view.sort === name) head.setAttribute("aria-sort", view.down ? "descending" : "ascending");
    return head;
  });
  const made = el("table", { className: "rows" }, el("thead", {}, el("tr", {}, ...heads, el("th", {}, el("span", { className: "unseen", textContent: "Cancel" })))), el("tbody", {}, ...sorted(view.sweep.trials).map(rowOf)));
  at("trials").querySelector(".scroll").replaceChildren(made);
  const row = was && made.querySelector(`tr[data-key="${CSS.escape(was)}"]`);
  if (row) (kind === "TR" ? row : row.querySelector(kind.toLowerCase()) ?? row).focus({ preventScroll: true });
  if (heading) made.querySelector(`th[data-column="${heading}"] button`).focus({ preventScroll: true });
}

// --- what is asked and heard ----------------------------------------------------------------------------------------
let looking = false, again = false;
async function look() {
  if (looking) return void (again = true);
  looking = true;
  try {
    const sweep = await ask(`/v1/sweeps/${id}`);
    const points = new Map(sweep.points.map((each) => [each.key, each]));
    sweep.trials = sweep.trials.map((trial) => ({ ...trial, point: points.get(trial.key) }));
    view.sweep = sweep;
    front.set(sweep, new Map(sweep.trials.map((trial) => [trial.key, settingOf(trial)])));
    lines.set(sweep);
    table();
    at("cancel").hidden = FINAL.includes(sweep.status) || sweep.status === "cancelling";
    at("retry").hidden = !["failed", "cancelled"].includes(sweep.status);
  } catch (error) {
    say(error.message);
  }
  setTimeout(() => {
    looking = false;
    if (again) look(void (again = false));
  }, AGAIN_MS);
}
async function act(path, done) {
  await ask(path, { method: "POST" }).then(() => say(done), (error) => say(error.message));
  changed();
}
function changed() {
  at("sweep").dispatchEvent(new Event("refresh"));
  look();
}

at("trials").append(el("p", { id: "within", className: "dim", role: "status" }), el("div", { className: "scroll" }));
at("trials").addEventListener("focusin", (event) => point(event.target.closest("tr[data-key]")?.dataset.key ?? null));
at("trials").addEventListener("pointerover", (event) => point(event.target.closest("tr[data-key]")?.dataset.key ?? null));
at("cancel").addEventListener("click", () => confirm("Cancel the sweep and its trials?") && act(`/v1/sweeps/${id}/cancel`, "The sweep is being cancelled."));
at("retry").addEventListener("click", () => act(`/v1/sweeps/${id}/retry`, "The sweep goes on."));
await look();
live({ job: id, after: Number(at("sweep").dataset.after), on: { jobs: changed, "*": changed } });
