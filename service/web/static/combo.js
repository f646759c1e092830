// A text field with suggestions below it, after the ARIA pattern for comboboxes. What is typed counts, too.
import { el } from "./chart.js";

const WAIT_MS = 200;

// `find(text, signal)` gives [{value, note}], or a sentence where there is nothing; `chosen(value)` hears of every value.
export function combo(input, { find, chosen = () => {} }) {
  const list = el("ul", { id: `${input.id}-list`, className: "options", hidden: true });
  list.setAttribute("role", "listbox");
  list.setAttribute("aria-label", input.labels[0]?.textContent ?? input.id);
  for (const [name, value] of Object.entries({ role: "combobox", "aria-autocomplete": "list", "aria-expanded": "false", "aria-controls": list.id })) input.setAttribute(name, value);
  input.after(list);
  let options = [], at = -1, timer = null, asking = null, told = input.value;

  function show(open) {
    list.hidden = !open;
    input.setAttribute("aria-expanded", String(open));
    if (!open) point(-1);
  }
  function point(to) {
    at = to;
    list.querySelectorAll('[role="option"]').forEach((option, i) => {
      option.setAttribute("aria-selected", String(i === at));
      if (i === at) option.scrollIntoView({ block: "nearest" });
    });
    if (at < 0) input.removeAttribute("aria-activedescendant");
    else input.setAttribute("aria-activedescendant", `${list.id}-${at}`);
  }
  async function look(text) {
    asking?.abort();
    const asked = (asking = new AbortController());
    try {
      const found = await find(text.trim(), asked.signal);
      if (asked.signal.aborted) return;
      options = typeof found === "string" ? [] : found;
      list.replaceChildren(...options.map(option), ...(options.length ? [] : [el("li", { className: "dim", textContent: typeof found === "string" ? found : "Nothing is called so." })]));
      list.querySelectorAll(":scope > .dim").forEach((line) => line.setAttribute("role", "presentation"));
      show(document.activeElement === input);
    } catch (error) {
      if (error.name !== "AbortError") list.replaceChildren(el("li", { className: "error", textContent: error.message }));
    }
  }
  function option({ value, note }, i) {
    const made = el("li", { id: `${list.id}-${i}` }, el("span", { textContent: value, dir: "auto" }), el("small", { className: "dim", textContent: note ?? "" }));
    made.setAttribute("role", "option");
    made.setAttribute("aria-selected", "false");
    made.addEventListener("pointerdown", (event) => {
      event.preventDefault(); // the field keeps the focus
      take(value);
    });
    return made;
  }
  function take(value) {
    input.value = value;
    show(false);
    input.dispatchEvent(new Event("input", { bubbles: true }));
    settle();
  }
  function settle() {
    clearTimeout(timer);
    if (input.value !== told) chosen((told = input.value));
  }
  const soon = () => {
    clearTimeout(timer);
    timer = setTimeout(() => look(input.value), WAIT_MS);
  };
  const keys = {
    ArrowDown: () => (list.hidden ? look(input.value) : point(Math.min(at + 1, options.length - 1))),
    ArrowUp: () => !list.hidden && point(Math.max(at - 1, -1)),
    Enter: () => (list.hidden || at < 0 ? false : take(options[at].value)),
    Escape: () => (list.hidden ? false : show(false)),
  };
  input.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
    if (keys[event.key]() === false) return;
    event.preventDefault();
  });
  input.addEventListener("input", (event) => event.isTrusted && soon());
  input.addEventListener("click", () => list.hidden && look(""));
  input.addEventListener("change", settle);
  input.addEventListener("blur", () => {
    asking?.abort();
    show(false);
    settle();
  });
}
