// Between a form and the body of a request: each field names its place in it by `data-path`.
import { el } from "./chart.js";

export function put(body, path, value) {
  const parts = path.split("."), last = parts.pop();
  for (const part of parts) body = body[part] = typeof body[part] === "object" && body[part] ? body[part] : {};
  body[last] = value;
}
export const pick = (body, path) => path.split(".").reduce((at, part) => at?.[part], body);
// Takes a field away, and with it the objects that are empty then.
export function drop(body, path) {
  const [first, ...rest] = path.split(".");
  if (!rest.length) delete body[first];
  else if (body[first]) {
    drop(body[first], rest.join("."));
    if (!Object.keys(body[first]).length) delete body[first];
  }
}

const controls = (form) => [...form.querySelectorAll("input[data-path], select[data-path]")];
const plain = (form) => controls(form).filter((field) => !field.disabled);

// Into `body` what the form's own fields say; empty ones say nothing.
export function read(form, body) {
  for (const field of plain(form)) {
    if (field.type === "checkbox") {
      if (field.checked) put(body, field.dataset.path, true);
    } else if (field.value.trim()) put(body, field.dataset.path, field.type === "number" ? Number(field.value) : field.value.trim());
  }
  return body;
}
// Into the form's fields what they hold of `body`, and out of it.
export function fill(form, body) {
  for (const field of plain(form)) {
    const value = pick(body, field.dataset.path);
    if (value === undefined || value === null || typeof value === "object") continue;
    if (field.type === "checkbox") field.checked = value;
    else field.value = value;
    drop(body, field.dataset.path);
  }
}

// Everything that is typed or chosen, by the fields' ids, to be put back as it was.
export function kept(form) {
  const fields = [...form.querySelectorAll("input, select, textarea")];
  return Object.fromEntries(fields.map((field) => [named(field), /checkbox|radio/.test(field.type) ? field.checked : [field.value, field.max]]));
}
export function restore(form, saved) {
  for (const field of form.querySelectorAll("input, select, textarea")) {
    const value = saved[named(field)];
    if (typeof value === "boolean") field.checked = value;
    else if (value) {
      if (field.type === "range" && value[1]) field.max = value[1];
      if (field.tagName !== "SELECT" || [...field.options].some((option) => option.value === value[0])) field.value = value[0];
    }
  }
}
const named = (field) => field.id || `${field.name}=${field.value}`;

export function clear(form, summary) {
  summary.hidden = true;
  for (const field of form.querySelectorAll("[aria-invalid]")) {
    field.removeAttribute("aria-invalid");
    const before = field.dataset.described;
    if (before) field.setAttribute("aria-describedby", before);
    else field.removeAttribute("aria-describedby");
  }
  for (const note of form.querySelectorAll("p.wrong")) note.remove();
}

// What the API says of a body: at each field, and summed up in `summary`, which gets the focus unless it is told not to.
export function refuse(form, summary, title, error, { focus = true } = {}) {
  clear(form, summary);
  const said = error.problem?.errors ?? [];
  const lines = (said.length ? said : [{ pointer: "", message: error.message }]).map(({ pointer, message }) => {
    const path = pointer.split("/").slice(1).map((part) => part.replaceAll("~1", "/").replaceAll("~0", "~")).join(".");
    const place = path ? holder(form, path) : null;
    const line = el("li", {});
    if (place) line.append(mark(place, message, path));
    line.append(el("span", { textContent: message, dir: "auto" }));
    return line;
  });
  summary.querySelector("h2").textContent = title;
  summary.querySelector("ul").replaceChildren(...lines);
  summary.hidden = false;
  if (focus) summary.focus();
}
// The field whose place begins the path, the longest; what no field holds may stand in the JSON of the others. A field
// of which the body is made otherwise has its place as `data-at`.
const placeOf = ({ dataset }) => dataset.at ?? dataset.path;
function holder(form, path) {
  const fits = [...form.querySelectorAll("[data-path], [data-at]")].filter((field) => placeOf(field) && `${path}.`.startsWith(`${placeOf(field)}.`));
  return fits.sort((a, b) => placeOf(b).length - placeOf(a).length)[0] ?? form.querySelector('[data-path=""]');
}
function mark(place, message, path) {
  const id = `${place.id}-wrong`;
  for (let box = place.closest("details"); box; box = box.parentElement.closest("details")) box.open = true;
  place.hidden = false;
  const told = path === placeOf(place) || place.dataset.at ? message : `${path}: ${message}`, before = document.getElementById(id);
  if (before) before.append(el("br"), told);
  else (place.closest(".combo, .fleet-row") ?? place)[place.matches("fieldset, div") ? "append" : "after"](el("p", { id, className: "wrong error", textContent: told, dir: "auto" }));
  if (place.matches("input, select, textarea")) {
    place.dataset.described ??= place.getAttribute("aria-describedby") ?? "";
    place.setAttribute("aria-describedby", `${place.dataset.described} ${id}`.trim());
    place.setAttribute("aria-invalid", "true");
  }
  const link = el("a", { href: `#${place.id}`, textContent: path });
  link.addEventListener("click", (event) => {
    event.preventDefault();
    (place.matches("fieldset, div") ? place.querySelector("input:not([hidden])") : place).focus();
  });
  return el("strong", {}, link, ": ");
}
