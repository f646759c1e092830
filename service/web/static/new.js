// The page that makes a job: form → body → forecast, commands, and the job itself. What is typed outlives errors, a
// reload, and signing in again: it is kept for the tab.
import { ask, say } from "./api.js";
import { curlCommand, submitCommand } from "./commands.js";
import { datasetField, registering } from "./datasets.js";
import { clear, drop, fill, kept, pick, read, refuse, restore } from "./form.js";
import { modelField } from "./models.js";
import { planView } from "./plan_view.js";
import { shares } from "./shares.js";

const known = JSON.parse(document.getElementById("known").textContent);
const at = (id) => document.getElementById(id);
const form = at("job"), problems = at("problems"), field = (path) => at(`f-${path}`);
const asked = new URLSearchParams(location.search);
const DRAFT = `d2ft:new:${asked.get("from") ?? asked.get("spec") ?? ""}`;
// What a dry run has of a job.
const PLANNED = ["model", "model_args", "img_size", "method", "precision", "micro_batches", "micro_batch_size", "placement", "train_embed", "seed"];
const HEADS = { "": true, hull: true, cpsat: true, two_stage: true };

const usual = (path) => pick(known.usual, path);
const number = (path) => Number(field(path).value) || usual(path);
const work = shares(at("share"), () => {});
const models = modelField(at("model"), at("model-facts"), update);
const data = datasetField(at("dataset"), at("dataset-facts"), { digits: known.digits, changed: update });
const forecast = planView(at("forecast"), { steps });
let key = null, sent = null;

// --- the body -------------------------------------------------------------------------------------------------------
function labels(text) {
  const pairs = text.split("\n").filter((line) => line.trim()).map((line) => line.split(/=(.*)/s));
  return pairs.length ? Object.fromEntries(pairs.map(([name, value]) => [name.trim(), (value ?? "").trim()])) : null;
}
// Throws where the JSON of the other fields is none.
function body() {
  const text = at("rest").value.trim(), made = text ? JSON.parse(text) : {};
  if (typeof made !== "object" || made === null || Array.isArray(made)) throw new Error("it is no object, such as {\"window\": 50}");
  read(form, made);
  const part = work.get();
  if (Object.keys(part).length) made.method = { ...made.method, ...part };
  const told = labels(at("labels").value);
  if (told) made.metadata = { ...made.metadata, ...told };
  for (const path of ["model", "dataset"]) if (made[path] === usual(path)) delete made[path];
  return made;
}
function fromSpec(spec) {
  const left = structuredClone(spec);
  fill(form, left);
  work.set(left.method ?? {});
  for (const path of ["method.ratios", "method.budgets"]) if (pick(left, path)) drop(left, path);
  const lines = Object.entries(left.metadata ?? {});
  if (lines.length && lines.every(([name, value]) => !/[=\n]/.test(name) && !value.includes("\n") && name.trim() === name && value.trim() === value)) {
    at("labels").value = lines.map((pair) => pair.join("=")).join("\n");
    delete left.metadata;
  }
  at("rest").value = Object.keys(left).length ? JSON.stringify(left, null, 2) : "";
  at("others").open = Boolean(at("rest").value);
}
// What another page hands over; it is not trusted to be what it should.
function given(text) {
  try {
    const spec = JSON.parse(text);
    return spec && typeof spec === "object" && !Array.isArray(spec) ? spec : {};
  } catch {
    return {};
  }
}
function steps() {
  if (field("steps").value) return Number(field("steps").value);
  const images = data.known?.train;
  return images ? Math.ceil((number("epochs") * images) / (number("micro_batches") * number("micro_batch_size"))) : null;
}

// --- what follows from it -------------------------------------------------------------------------------------------
function settle() {
  work.of(number("micro_batches"));
  field("method.score").disabled = !HEADS[field("method.strategy").value];
  const rates = known.usual.learning_rates, added = field("method.lora.rank").value || field("method.head_only").checked;
  field("optimiser.learning_rate").placeholder = added ? rates.added : at("model").value === known.usual.model ? rates.digits : rates.other;
  const invented = at("devices").value === "invented";
  at("fleet-field").hidden = !invented;
  at("fleet-note").textContent = invented || known.measured === number("workers") ? "" : `The job asks for ${number("workers")} workers; the forecast is for the ${known.measured} measured devices.`;
  at("fleet").placeholder = `${number("workers")}x fast`;
}
function fleet() {
  if (at("devices").value === "live") return "live";
  return (at("fleet").value.trim() || `${number("workers")}x fast`).split(",").map((each) => each.trim()).filter(Boolean);
}
function update() {
  settle();
  let made;
  try {
    made = body();
  } catch (error) {
    at("body").textContent = `The other fields cannot be read as JSON: ${error.message}`;
    return;
  }
  at("body").textContent = JSON.stringify(made, null, 2);
  at("command").textContent = submitCommand(made);
  at("curl").textContent = curlCommand(made);
  const planned = Object.fromEntries(PLANNED.filter((name) => name in made).map((name) => [name, made[name]]));
  forecast.show();
  if (!models.searching) forecast.ask({ ...planned, num_classes: data.known?.classes ?? 10, devices: fleet() });
  sessionStorage.setItem(DRAFT, JSON.stringify({ job: kept(form), devices: at("devices").value, fleet: at("fleet").value }));
}

// --- starting it ----------------------------------------------------------------------------------------------------
function once(text) {
  if (text !== sent) [key, sent] = [[...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join(""), text];
  return key;
}
async function start() {
  let made;
  try {
    made = body();
  } catch (error) {
    const errors = [{ pointer: "/rest", message: `The other fields cannot be read as JSON: ${error.message}` }];
    return refuse(form, problems, "The job cannot be sent", Object.assign(error, { problem: { errors } }));
  }
  at("submit").disabled = true;
  clear(form, problems);
  try {
    const job = await ask("/v1/jobs", { method: "POST", body: made, key: once(JSON.stringify(made)) });
    sessionStorage.removeItem(DRAFT);
    location.assign(`/ui/jobs/${job.id}`);
  } catch (error) {
    refuse(form, problems, "The job was not taken", error);
  }
  at("submit").disabled = false;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
form.addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && form.requestSubmit());
for (const place of [form, at("devices"), at("fleet")]) place.addEventListener("input", update);
at("afresh").addEventListener("click", () => {
  sessionStorage.removeItem(DRAFT);
  location.assign("/ui/new");
});
registering(at("register"), (value) => {
  at("dataset").value = value;
  data.tell();
  update();
});

const draft = JSON.parse(sessionStorage.getItem(DRAFT) ?? "null");
if (draft) {
  restore(form, draft.job);
  at("fleet").value = draft.fleet;
  if ([...at("devices").options].some((option) => option.value === draft.devices)) at("devices").value = draft.devices;
  at("others").open = Boolean(at("rest").value.trim());
  work.show();
  say("What you had typed is back.");
} else {
  fromSpec(asked.has("spec") ? given(asked.get("spec")) : known.spec);
  if (!asked.has("spec") && !asked.has("from")) work.set({ ratios: { full: 3, forward: 0, skip: 2 } });
  if (asked.has("fleet")) Object.assign(at("devices"), { value: "invented" }) && (at("fleet").value = asked.get("fleet"));
}
at("whole").disabled = false;
models.tell();
data.tell();
update();
