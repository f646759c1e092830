// The field for a dataset: suggestions, what is in the chosen one, a few of its images, and registering another.
import { ask, say } from "./api.js";
import { el, scrolled, tabled } from "./chart.js";
import { combo } from "./combo.js";
import { count } from "./units.js";

const PREFIX = "dataset:";
const SHOWN = { per_class: 3, limit: 30 };

// `facts` is where it is described; `changed()` when more is known. What is known: {classes, train} or null.
export function datasetField(input, facts, { digits, changed }) {
  let known = null, asking = null;

  async function tell() {
    asking?.abort();
    const { signal } = (asking = new AbortController());
    const value = input.value.trim();
    known = null;
    facts.replaceChildren();
    try {
      if (value === "digits") {
        known = { classes: 10, train: digits.train };
        facts.append(el("p", { className: "dim hint", textContent: `Hand-written digits of 8 × 8 pixels in 10 classes: ${digits.train} for training, ${digits.test} for testing.` }));
      } else if (value) await look(value, signal);
    } catch (error) {
      if (error.name === "AbortError") return;
      facts.append(el("p", { className: "error hint", textContent: error.message }));
    }
    changed();
  }
  async function look(value, signal) {
    const found = value.startsWith(PREFIX) ? await ask(`/v1/datasets/${encodeURIComponent(value.slice(PREFIX.length))}`, { signal }) : await registered(value, signal);
    if (!found) {
      facts.append(el("p", { className: "dim hint", textContent: "Not registered here. Registered under a name, it can be looked into." }));
      return;
    }
    known = { classes: found.num_classes, train: found.num_train };
    facts.append(...described(found));
    if (found.num_classes !== null) await samples(found, "train", signal);
  }
  async function registered(uri, signal) {
    const { data } = await ask(`/v1/datasets?${new URLSearchParams({ search: uri.slice(0, 200), limit: 20 })}`, { signal });
    const same = data.find((each) => each.uri === uri);
    return same && ask(`/v1/datasets/${same.id}`, { signal });
  }
  function described(set) {
    const address = el("small", { className: "dim block", textContent: set.uri, dir: "auto" });
    if (set.num_classes === null) return [el("p", { className: "hint" }, "It lies elsewhere; a job looks into it when it begins.", address)];
    const head = el("p", { className: "hint" }, `${count(set.num_train)} images for training, ${set.num_test === null ? "none" : count(set.num_test)} for testing, in ${set.num_classes} classes.`, address);
    const classes = scrolled("Classes", tabled(["Class", "Training", "Testing"], set.classes.map((each) => [el("span", { textContent: each.name, dir: "auto" }), each.num_train, each.num_test])));
    classes.classList.add("low");
    const again = el("button", { type: "button", textContent: "List it anew" });
    again.addEventListener("click", async () => {
      again.disabled = true;
      await ask(`/v1/datasets/${set.id}/inspect`, { method: "POST" }).then(tell, (error) => say(error.message));
      again.disabled = false;
    });
    return [head, classes, el("div", { className: "tools" }, again)];
  }
  async function samples(set, split, signal) {
    const images = el("div", { className: "thumbs" });
    facts.append(images);
    const { data } = await ask(`/v1/datasets/${set.id}/samples?${new URLSearchParams({ split, ...SHOWN })}`, { signal });
    images.replaceChildren(...data.map((each) => {
      const shown = each.thumbnail ? el("img", { src: each.thumbnail, alt: `${each.label}: ${each.file}`, title: each.file }) : el("span", { className: "error", textContent: each.error ?? "cannot be shown" });
      return el("figure", {}, shown, el("figcaption", { textContent: each.label, dir: "auto" }));
    }));
  }

  combo(input, {
    async find(text, signal) {
      const part = text.replace(PREFIX, "");
      const { data } = await ask(`/v1/datasets?${new URLSearchParams({ ...(part && { search: part }), limit: 30 })}`, { signal });
      const own = "digits".includes(part) ? [{ value: "digits", note: "built in, 10 classes" }] : [];
      return [...own, ...data.map((set) => ({ value: PREFIX + set.name, note: set.num_classes === null ? set.uri : `${set.num_classes} classes, ${count(set.num_train)} images` }))];
    },
    chosen: tell,
  });
  return { tell, get known() { return known; } };
}

// Gives a folder a name, and hands the new dataset's on.
export function registering(place, made) {
  const [name, uri, wrong, button] = ["set-name", "set-uri", "set-wrong", "register-it"].map((id) => place.querySelector(`#${id}`));
  button.addEventListener("click", async () => {
    button.disabled = true;
    wrong.hidden = true;
    const address = uri.value.trim().startsWith("/") ? `folder://${uri.value.trim()}` : uri.value.trim();
    try {
      const set = await ask("/v1/datasets", { method: "POST", body: { name: name.value.trim(), uri: address } });
      Object.assign(place, { open: false });
      say(`Registered ${set.name}.`);
      made(PREFIX + set.name);
    } catch (error) {
      const fields = (error.problem?.errors ?? []).map(({ pointer, message }) => `${pointer.slice(1)}: ${message}`);
      wrong.textContent = fields.join(" ") || error.message;
      wrong.hidden = false;
    }
    button.disabled = false;
  });
}
