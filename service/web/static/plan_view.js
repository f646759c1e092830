// A dry run, drawn: what a step takes against all-FULL, and what binds each device; with `details` the heads and the step.
import { ask } from "./api.js";
import { el, scrolled, tabled } from "./chart.js";
import { BINDS, percent, size, took } from "./units.js";

const WAIT_MS = 350;

// `ask(body)` asks for the plan a moment later, and forgets what it asked before; `steps()` is how long the job is, if
// that is known; `heard(error)` hears of every answer, of what is refused, too.
export function planView(place, { details = false, steps = () => null, heard = () => {} } = {}) {
  const status = el("p", { className: "dim", role: "status" }), shown = el("div", {});
  const parts = { heads: el("section", { hidden: true }), gantt: el("section", { hidden: true }) };
  place.replaceChildren(status, shown, ...(details ? Object.values(parts) : []));
  let timer = null, asking = null, last = null;
  const drawn = {};

  async function plan(body) {
    asking?.abort();
    const { signal } = (asking = new AbortController());
    status.textContent = "Planning …";
    place.setAttribute("aria-busy", "true");
    try {
      const found = await ask("/v1/plans", { method: "POST", body: { ...body, gantt: details }, signal });
      last = found;
      show();
      status.textContent = "";
      heard(null);
      if (details) await detail(found);
    } catch (error) {
      if (error.name === "AbortError") return;
      status.textContent = "";
      status.append(el("span", { className: "error", textContent: error.message }));
      shown.classList.toggle("old", last !== null);
      heard(error);
    }
    if (!signal.aborted) place.setAttribute("aria-busy", "false");
  }
  function show() {
    if (last === null) return;
    shown.classList.remove("old");
    shown.replaceChildren(figures(last.plan, steps()), ...last.warnings.map((each) => el("p", { className: "warned", textContent: each })), details ? devices(last) : fewer(last), el("p", { className: "dim hint", textContent: solved(last) }));
  }
  // Modules that draw a plan as `heads(place, plan)` and a step as `gantt(place, {forecast, measured})`; what they
  // give back has `set`, for the next one.
  async function detail(found) {
    const given = {
      heads: [{ ...found.plan, heads: found.heads }, {}],
      gantt: [{ forecast: found.gantt, measured: null }, { title: "The first step", lacks: { forecast: "", measured: "" } }],
    };
    for (const [name, [value, options]] of Object.entries(given)) {
      const module = await import(`./${name}.js`);
      parts[name].hidden = false;
      if (drawn[name]) drawn[name].set(value);
      else drawn[name] = module[name](parts[name], value, options);
    }
  }
  return {
    show,
    ask(body) {
      clearTimeout(timer);
      timer = setTimeout(plan, WAIT_MS, body);
    },
  };
}

function figures({ forecast, all_full: full, compute_fraction: compute, bytes_fraction: bytes }, steps) {
  const sent = (of) => of.link_bytes.flat().reduce((sum, each) => sum + each, 0);
  const rows = [
    ["A step", took(forecast.step_us / 1e6), `${percent(forecast.step_us / full.step_us)} of all-FULL's ${took(full.step_us / 1e6)}`],
    ["Compute", percent(compute), `${flop(forecast.flops)} of ${flop(full.flops)} a step`],
    ["Bytes", percent(bytes), `${size(sent(forecast))} of ${size(sent(full))} a step`],
    ["Devices wait", percent(forecast.idle_share), `of the step; all-FULL ${percent(full.idle_share)}`],
  ];
  if (steps) rows.push([`${steps} steps`, took((steps * forecast.step_us) / 1e6), `all-FULL ${took((steps * full.step_us) / 1e6)}; starting and testing apart`]);
  return el("div", { className: "figures" }, ...rows.map(([name, value, note]) => el("div", {}, el("span", { className: "dim", textContent: name }), el("span", { className: "big block", textContent: value }), el("small", { className: "dim block", textContent: note }))));
}
const flop = (value) => `${Number((value / 1e9).toPrecision(3))} GFLOP`;

const name = (each) => el("span", {}, `${each.rank} · `, el("span", { textContent: each.name, dir: "auto" }));
const memory = (each) => el("span", {}, size(each.memory_bytes), el("small", { className: "dim block", textContent: `of ${size(each.memory_limit_bytes)}` }));
function computes(each, plan) {
  const share = each.busy_us / Math.max(1, plan.forecast.step_us), bar = el("progress", { max: 1, value: share });
  bar.setAttribute("aria-label", `Worker ${each.rank} computes`);
  return el("span", { className: "measure" }, bar, ` ${percent(share)}`);
}
function bound(each) {
  return el("span", {}, BINDS[each.binding] ?? each.binding, el("small", { className: "dim block", textContent: each.note }));
}
function devices({ devices: rows, plan }) {
  const names = ["Worker", "Heads", "Computes", "Sends a step", "Memory", "Bound by"];
  return scrolled("Workers", tabled(names, rows.map((each) => [name(each), each.heads, computes(each, plan), size(each.sent_bytes), memory(each), bound(each)])));
}
// Where there is little room.
function fewer({ devices: rows, plan }) {
  const cells = (each) => [el("span", {}, name(each), el("small", { className: "dim block", textContent: `${each.heads} heads; ${each.note}` })), computes(each, plan), memory(each)];
  return scrolled("Workers", tabled(["Worker", "Computes", "Memory"], rows.map(cells)));
}
function solved({ plan: { placement_report: placed, selection_report: chosen }, rounding_loss: lost, seconds }) {
  const gap = (report) => (typeof report.gap === "number" && report.gap > 0 ? `, at most ${percent(report.gap)} from the best` : "");
  const rounding = typeof lost === "number" && lost > 0 ? `; whole heads cost ${percent(lost)}` : "";
  return `Placed by ${placed.method} (${placed.status.toLowerCase()}${gap(placed)}${rounding}); chosen by ${chosen.method}. Planned in ${took(seconds)}.`;
}
