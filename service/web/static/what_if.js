// Plans for invented devices. All that is asked stands in the address: ?d=2x+fast:24GB@node1&d=slow&model=…&ratios=3,0,2
import { say } from "./api.js";
import { el } from "./chart.js";
import { clear, fill, read, refuse } from "./form.js";
import { modelField } from "./models.js";
import { planView } from "./plan_view.js";
import { shares } from "./shares.js";

const known = JSON.parse(document.getElementById("known").textContent);
const at = (id) => document.getElementById(id);
const form = at("asked"), problems = at("problems"), rows = at("rows");
const FIELDS = ["model", "link", "micro_batches", "micro_batch_size", "num_classes", "placement", "method.strategy"];
const USUAL_FLEET = ["2x fast:24GB@node1", "slow"];
const SPEC = /^\s*(?:(\d+)\s*[x×]\s*)?([^:@\s]+)(?:\s*:\s*([^@\s]+))?(?:\s*@\s*(\S+))?\s*$/;

const work = shares(at("share"), () => {});
const models = modelField(at("model"), at("model-facts"), update);
const view = planView(at("forecast"), { details: true, heard });

// It comes while somebody types, whose focus stays.
function heard(error) {
  if (error?.problem?.errors?.length) refuse(form, problems, "There is no such plan", error, { focus: false });
  else clear(form, problems);
}

// --- the fleet ------------------------------------------------------------------------------------------------------
let numRows = 0;
function addRow(text) {
  const [, count = "1", kind = text, memory = "", node = ""] = SPEC.exec(text) ?? [];
  const id = `row${numRows++}`;
  const cell = (name, label, value, more) => {
    const input = el("input", { id: `${id}-${name}`, value, ...more });
    input.dataset.part = name;
    return el("div", {}, el("label", { htmlFor: input.id, textContent: label }), input);
  };
  const kinds = cell("kind", "Kind or rate", kind, { spellcheck: false });
  kinds.querySelector("input").setAttribute("list", "kinds");
  const remove = el("button", { type: "button", textContent: "Remove" });
  remove.setAttribute("aria-label", `Remove ${kind}`);
  const row = el("div", { className: "fleet-row" }, cell("count", "How many", count, { type: "number", min: 1, max: 64 }), kinds, cell("memory", "Memory", memory, { placeholder: "its own", spellcheck: false }), cell("node", "Machine", node, { placeholder: "one each", spellcheck: false }), remove);
  remove.addEventListener("click", () => {
    const next = row.nextElementSibling ?? row.previousElementSibling;
    row.remove();
    (next?.querySelector("button") ?? at("add")).focus();
    update();
  });
  rows.append(row);
  return row;
}
function fleet() {
  return [...rows.children].map((row, i) => {
    row.querySelector('[data-part="kind"]').dataset.at = `devices.${i}`;
    const { count, kind, memory, node } = Object.fromEntries([...row.querySelectorAll("input")].map((input) => [input.dataset.part, input.value.trim()]));
    return `${Number(count) > 1 ? `${count}x ` : ""}${kind}${memory && `:${memory}`}${node && `@${node}`}`;
  });
}

// --- the address ----------------------------------------------------------------------------------------------------
function body() {
  const made = read(form, {}), part = work.get();
  if (Object.keys(part).length) made.method = { ...made.method, ...part };
  if (made.model === known.usual.model) delete made.model;
  return { ...made, devices: fleet() };
}
function addressOf(made) {
  const asked = new URLSearchParams(made.devices.map((each) => ["d", each]));
  for (const path of FIELDS) {
    const value = path === "method.strategy" ? made.method?.strategy : made[path];
    if (value !== undefined) asked.set(path, value);
  }
  const { ratios, budgets } = made.method ?? {};
  if (ratios) asked.set("ratios", [ratios.full, ratios.forward, ratios.skip].join(","));
  if (budgets) asked.set("budgets", [budgets.compute, budgets.bytes].join(","));
  return asked;
}
function fromAddress() {
  const asked = new URLSearchParams(location.search), left = {};
  for (const path of FIELDS) if (asked.has(path)) path === "method.strategy" ? (left.method = { strategy: asked.get(path) }) : (left[path] = asked.get(path));
  fill(form, left);
  const numbers = (name) => asked.get(name)?.split(",").map(Number).filter((each) => Number.isFinite(each) && each >= 0);
  const ratios = numbers("ratios"), budgets = numbers("budgets");
  if (ratios?.length === 3) {
    work.set({ ratios: { full: ratios[0], forward: ratios[1], skip: ratios[2] } });
  } else if (budgets?.length === 2) work.set({ budgets: { compute: budgets[0], bytes: budgets[1] } });
  else if (![...asked].length) work.set({ ratios: { full: 3, forward: 0, skip: 2 } });
  rows.replaceChildren();
  for (const each of asked.has("d") ? asked.getAll("d") : USUAL_FLEET) addRow(each);
}
function update() {
  work.of(Number(at("f-micro_batches").value) || known.usual.micro_batches);
  const made = body(), asked = addressOf(made);
  history.replaceState(null, "", `${location.pathname}?${asked}`);
  at("add").disabled = rows.children.length >= 64;
  if (!made.devices.length) return;
  const workers = made.devices.reduce((sum, each) => sum + Number(SPEC.exec(each)?.[1] ?? 1), 0);
  const draft = JSON.stringify({ ...made, workers, devices: undefined, link: undefined, num_classes: undefined });
  at("as-job").href = `/ui/new?${new URLSearchParams({ spec: draft, fleet: made.devices.join(", ") })}`;
  if (!models.searching) view.ask(made);
}

form.addEventListener("input", update);
form.addEventListener("submit", (event) => event.preventDefault());
at("add").addEventListener("click", () => {
  addRow("fast").querySelector("input").focus();
  update();
});
at("share-link").addEventListener("click", async () => {
  await navigator.clipboard.writeText(location.href);
  say("The link is copied.");
});

fromAddress();
models.tell();
update();
