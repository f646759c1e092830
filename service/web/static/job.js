// The page of a job: what it may be asked, the parts that the server writes, and the drawing of the tab that is open.
import { ask, say } from "./api.js";
import { live } from "./live.js";

const REFRESH_MS = 1000;
const QUIET = ["queued", "failed", "cancelled"]; // states in which no event of its own says what changes for it
const job = () => document.getElementById("job");
const { job: id, tab, after } = job().dataset;
const on = {}; // by type of event, what the open tab does with it
const PLANS = ["plan.created", "plan.changed"];

// --- what the server writes is asked for again, at most once a second ------------------------------------------------
let due = 0, asked = 0, opened = [];
function refresh() {
  due ||= setTimeout(() => {
    [due, asked] = [0, Date.now()];
    opened = [...job().querySelectorAll("details[open][id]")].map((each) => each.id);
    job().dispatchEvent(new Event("refresh"));
  }, Math.max(0, asked + REFRESH_MS - Date.now()));
}
let final = job().dataset.final;
document.addEventListener("htmx:after:swap", () => {
  for (const each of opened) document.getElementById(each)?.setAttribute("open", "");
  if (final === "1" && job().dataset.final === "0") location.reload(); // it was retried: the stream begins anew
  final = job().dataset.final;
});

// --- what it may be asked --------------------------------------------------------------------------------------------
const SAID = { pause: "It is being paused.", resume: "It waits to go on.", retry: "It waits for another attempt.", cancel: "It is being cancelled." };
const dialog = document.getElementById("cancelling");
dialog.addEventListener("close", () => dialog.returnValue === "cancel" && act("cancel"));
document.addEventListener("click", (event) => {
  const action = event.target.closest("[data-act]")?.dataset.act;
  if (action === "cancel") {
    dialog.returnValue = "";
    dialog.showModal();
  } else if (action) act(action);
});
async function act(action) {
  const button = document.querySelector(`[data-act="${action}"]`);
  if (button) button.disabled = true;
  try {
    await ask(`/v1/jobs/${id}/${action}`, { method: "POST" });
    say(SAID[action]);
  } catch (error) {
    say(error.message);
    alert(error.message);
  }
  if (button) button.disabled = false;
  refresh();
}

// --- the open tab ----------------------------------------------------------------------------------------------------
const found = (path) => ask(`/v1/jobs/${id}/${path}`).catch((error) => (error.status === 404 ? null : Promise.reject(error)));
const note = (place, text) => {
  place.textContent = text;
  place.className = "card narrow";
};
const NO_PLAN = "There is no plan yet. It is made once the workers have measured themselves.";

// Draws the plan, and again whenever there is another.
async function planned(place, begin) {
  let drawing = null, known = job().dataset.planned === "1";
  async function show() {
    const plan = known && (await found("plan"))?.plan;
    if (!plan) return note(place, NO_PLAN);
    place.className = "";
    if (drawing) drawing.set(plan);
    else drawing = begin(plan);
  }
  for (const type of PLANS) on[type] = () => ((known = true), show().catch(failed));
  await show();
}

const open = {
  async charts() {
    const { charts } = await import("./job_charts.js");
    await charts(document.getElementById("charts"), id, on);
  },
  async heads() {
    const place = document.getElementById("heads"), { heads } = await import("./heads.js");
    await planned(place, (plan) => heads(place, plan, { address: true }));
  },
  async timeline() {
    const place = document.getElementById("timeline"), { gantt } = await import("./gantt.js");
    let drawing = null, pair = { forecast: null, measured: null }, known = job().dataset.planned === "1";
    const show = () => {
      place.dataset.measuredStep = pair.measured?.step ?? "";
      if (drawing) drawing.set(pair);
      else drawing = gantt(place, pair);
    };
    const read = async () => {
      const { forecast = null, measured = null } = (known && (await found("timeline"))) || {};
      pair = { forecast, measured };
      show();
    };
    for (const type of [...PLANS, "timeline"]) on[type] = () => ((known = true), read().catch(failed));
    await read();
  },
  async placement() {
    const place = document.getElementById("placement"), { placement } = await import("./placement.js");
    let measured = JSON.parse(document.getElementById("measured").textContent), last = null, drawing = null;
    const again = (seen) => ((measured = { ...measured, ...seen }), drawing?.set(last, measured));
    on.window = (event) => again({ busy: event.data.busy });
    on.ledger = (event) => again(event.data.memory ?? {});
    await planned(place, (plan) => {
      last = plan;
      drawing = placement(place, plan, { measured });
      return { set: (next) => drawing.set((last = next), measured) };
    });
  },
  async logs() {
    const { Logs } = await import("./logs.js"), logs = new Logs(id);
    const newest = document.querySelector("#log-attempt option")?.value ?? "0";
    on["job.status"] = (event) => event.attempt > Number(newest) && location.reload(); // another attempt, another log
    await logs.open();
  },
};
function failed(error) {
  say(error.message);
  const place = document.getElementById(tab);
  const text = error.status ? error.message : `This cannot be drawn: it is not as the planner writes it (${error.message}).`;
  if (place && !place.querySelector("canvas, table")) note(place, text);
}

live({
  job: id,
  after: Number(after),
  on: {
    "*"(event) {
      on[event.type]?.(event);
      refresh();
    },
    jobs: () => QUIET.includes(job().dataset.status) && refresh(),
  },
});
await open[tab]?.().catch(failed);
