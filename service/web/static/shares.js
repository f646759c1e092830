// How much of a step is done: all of it, by ratios whose sum stays, or by budgets.
const OPS = ["full", "forward", "skip"];
const LETTERS = { full: "F", forward: "O", skip: "S" };
const GIVES = { full: ["skip", "forward"], forward: ["skip", "full"], skip: ["full", "forward"] }; // who makes up for a change

export function shares(place, changed) {
  const at = (id) => place.querySelector(`#${id}`);
  const mode = () => place.querySelector('input[name="share"]:checked').value;
  const value = (id) => Number(at(id).value);
  const total = () => Number(at("full").max);

  function show() {
    for (const way of ["ratios", "budgets"]) at(way).hidden = mode() !== way;
    for (const op of OPS) {
      at(op).nextElementSibling.textContent = `${value(op)} of ${total()}`;
    }
    for (const budget of ["compute", "bytes"]) at(budget).nextElementSibling.textContent = `${Math.round(100 * value(budget))} %`;
    const made = OPS.flatMap((op) => Array.from({ length: value(op) }, () => op)).map((op) => {
      const box = document.createElement("span");
      box.className = `op-${op}`;
      box.textContent = LETTERS[op];
      return box;
    });
    at("strip").replaceChildren(...(made.length > 40 ? [] : made));
  }
  function move(op) {
    let over = OPS.reduce((sum, each) => sum + value(each), 0) - total();
    for (const other of GIVES[op]) {
      const to = Math.min(total(), Math.max(0, value(other) - over));
      over -= value(other) - to;
      at(other).value = to;
    }
    if (over) at(op).value = value(op) - over;
  }
  place.addEventListener("input", ({ target }) => {
    if (OPS.includes(target.id)) move(target.id);
    show();
    changed();
  });
  show();

  return {
    // {}, {ratios} or {budgets} of a method.
    get() {
      if (mode() === "ratios") return { ratios: Object.fromEntries(OPS.map((op) => [op, value(op)])) };
      return mode() === "budgets" ? { budgets: { compute: value("compute"), bytes: value("bytes") } } : {};
    },
    set({ ratios, budgets }) {
      const way = ratios ? "ratios" : budgets ? "budgets" : "all";
      place.querySelector(`input[name="share"][value="${way}"]`).checked = true;
      if (ratios) {
        const sum = OPS.reduce((all, op) => all + (ratios[op] ?? 0), 0);
        for (const op of OPS) Object.assign(at(op), { max: sum, value: ratios[op] ?? 0 });
      }
      if (budgets) Object.assign(at("compute"), { step: "any", value: budgets.compute });
      if (budgets) Object.assign(at("bytes"), { step: "any", value: budgets.bytes ?? 1 });
      show();
    },
    // A step has so many micro-batches now.
    of(count) {
      if (!Number.isInteger(count) || count < 1 || count === total()) return;
      const before = total(), was = OPS.map(value);
      const now = was.map((each) => Math.floor((each * count) / before));
      for (let i = 0; now.reduce((sum, each) => sum + each, 0) < count; i = (i + 1) % OPS.length) if (was[i] || !was.some(Boolean)) now[i]++;
      OPS.forEach((op, i) => Object.assign(at(op), { max: count, value: now[i] }));
      show();
    },
    show,
  };
}
