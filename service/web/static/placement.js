// Where the heads of a plan lie, what that costs each worker, what goes between them, and how good the solvers' answers are.
import { owned, redrawn, sized } from "./canvas.js";
import { digits, el, scrolled, tabled } from "./chart.js";
import { BINDS, size } from "./units.js";

const UNKNOWN = "not known yet";
const bytes = (count) => size(count, 4);
const ms = (us) => (typeof us === "number" ? `${digits(us / 1000)} ms` : "–");

// Draws `plan` into `place`. `measured` is {busy: seconds by worker, measured_bytes: by worker}, each where it is known.
export function placement(place, plan, { measured = {} } = {}) {
  const devices = el("section"), links = el("section"), solvers = el("section");
  place.replaceChildren(devices, el("div", { className: "two" }, links, solvers));
  function show() {
    devices.replaceChildren(el("h2", { textContent: "Devices" }), scrolled("Devices", deviceTable(plan, measured)), split(plan));
    links.replaceChildren(el("h2", { textContent: "Between workers, a step" }), linkTable(plan));
    solvers.replaceChildren(el("h2", { textContent: "How good the plan is" }), scrolled("Solvers", solverTable(plan)), facts(plan));
  }
  show();
  return {
    set(next, seen = measured) {
      [plan, measured] = [next, seen];
      show();
    },
  };
}

function bar(share, title) {
  const progress = el("progress", { max: 1, value: Math.min(1, share) });
  progress.setAttribute("aria-label", title);
  return progress;
}

const counted = (plan) => {
  const counts = Array(plan.placement.num_workers).fill(0);
  for (const owner of plan.placement.owners.flat()) counts[owner]++;
  return counts;
};

function deviceTable(plan, measured) {
  const heads = counted(plan), all = heads.reduce((a, b) => a + b, 0), step = plan.forecast.step_us;
  const names = ["Worker", "Device", "Heads", "Memory predicted", "measured", "limit", "Busy forecast", "measured", "Sends", "Bound by"];
  const rows = heads.map((count, worker) => {
    const told = plan.devices?.[worker] ?? {}, busy = plan.forecast.busy_us[worker], seen = measured.busy?.[worker];
    const sent = plan.forecast.link_bytes[worker].reduce((a, b) => a + b, 0);
    return [
      worker,
      told.name ? named(told) : UNKNOWN,
      el("span", { className: "nowrap" }, bar(count / all, `Worker ${worker}: share of the heads`), ` ${count} (${Math.round(100 * count / all)} %)`),
      bytes(plan.memory_bytes?.[worker]),
      bytes(measured.measured_bytes?.[worker]),
      bytes(told.memory_limit_bytes),
      el("span", { className: "nowrap" }, bar(busy / step, `Worker ${worker}: busy`), ` ${ms(busy)} (${Math.round(100 * busy / step)} %)`),
      typeof seen === "number" ? ms(seen * 1e6) : "–",
      bytes(sent),
      told.binding ? el("span", { className: "wide" }, el("strong", { textContent: BINDS[told.binding] ?? told.binding }), el("small", { className: "dim block", textContent: told.note ?? "" })) : UNKNOWN,
    ];
  });
  const table = tabled(names, rows);
  table.id = "devices";
  return table;
}

function named({ name, node }) {
  const shown = el("span", { className: "wide", textContent: name, dir: "auto" });
  if (node) shown.append(el("small", { className: "dim block", textContent: node.length > 16 ? `${node.slice(0, 12)}…` : node, title: node, dir: "auto" }));
  return shown;
}

// Each block as a row of its heads' owners, by colour, dash and number.
function split(plan) {
  const owners = plan.placement.owners, canvas = el("canvas"), details = el("details", {}, el("summary", { textContent: "Which worker has which head" }), canvas);
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", owners.map((row, block) => `Block ${block}: workers ${row.join(" ")}`).join(". "));
  const draw = () => {
    const wide = Math.max(14, Math.min(30, (details.clientWidth - 40) / owners[0].length)), high = 18;
    const ctx = sized(canvas, 36 + wide * owners[0].length, high * owners.length);
    owners.forEach((row, block) => {
      ctx.fillStyle = getComputedStyle(canvas).color;
      ctx.fillText(`b${block}`, 2, (block + 0.5) * high);
      row.forEach((owner, head) => {
        const { stroke, dash } = owned(owner), x = 34 + head * wide, y = block * high;
        ctx.setLineDash(dash);
        Object.assign(ctx, { strokeStyle: stroke, lineWidth: 1.5, globalAlpha: 1 });
        ctx.strokeRect(x + 1.5, y + 1.5, wide - 3, high - 3);
        ctx.fillText(owner, x + wide / 2 - 3, y + high / 2);
      });
    });
  };
  details.addEventListener("toggle", draw);
  redrawn(details, draw);
  return details;
}

function linkTable(plan) {
  const links = plan.forecast.link_bytes, most = Math.max(1, ...links.flat());
  if (links.length < 2) return el("p", { className: "dim", textContent: "One worker sends nothing." });
  const table = tabled(["From \\ to", ...links.map((_, to) => `worker ${to}`)], links.map((row, from) => [`worker ${from}`, ...row.map((count, to) => (from === to ? "" : bytes(count)))]));
  table.id = "links";
  for (const [from, row] of [...table.tBodies[0].rows].entries()) {
    for (const [to, cell] of [...row.cells].slice(1).entries()) {
      cell.className = "num";
      if (from !== to) cell.style.boxShadow = `inset ${(4 + 26 * links[from][to] / most).toFixed(0)}px 0 0 -1px var(--soft)`;
    }
  }
  return scrolled("Bytes between workers", table);
}

function solverTable(plan) {
  const share = (value) => (typeof value === "number" ? `${digits(100 * value)} %` : "–");
  const told = {
    "By": (report) => report.method,
    "Status": (report) => report.status,
    "Found": (report) => digits(report.objective),
    "Bound": (report) => digits(report.bound),
    "Gap": (report) => share(report.gap),
    "Lost by rounding": (report) => share(report.rounding_loss),
    "Took": (report) => `${digits(report.seconds)} s`,
    "Note": (report) => report.note || "–",
  };
  const rows = Object.entries(told).map(([name, tell]) => [name, tell(plan.placement_report), tell(plan.selection_report)]);
  const table = tabled(["Solver of", "Placement", "Selection"], rows);
  table.id = "solvers";
  table.classList.add("keyed");
  for (const cell of table.querySelectorAll(".num")) cell.className = "";
  return table;
}

function facts(plan) {
  const list = el("dl", { className: "facts" }), share = (value) => `${digits(100 * value)} %`;
  const told = {
    "Version": `${plan.version}, of window ${plan.window}`,
    "Step forecast": `${ms(plan.forecast.step_us)}; all-FULL ${ms(plan.all_full.step_us)}`,
    "Idle share": share(plan.forecast.idle_share),
    "Compute": `${share(plan.compute_fraction)} of all-FULL`,
    "Bytes": `${share(plan.bytes_fraction)} of all-FULL`,
  };
  for (const [name, text] of Object.entries(told)) list.append(el("dt", { textContent: name }), el("dd", { textContent: text }));
  return list;
}
