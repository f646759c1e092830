// The field for a model: suggestions of the catalogue, and what the chosen one weighs.
import { ask } from "./api.js";
import { combo } from "./combo.js";
import { count, size } from "./units.js";

const weighs = (model) => `${count(model.params)} parameters, ${model.blocks} × ${model.heads} heads, ${size(model.memory_bytes)}`;

// `changed()` hears of a model that is chosen; while one is looked for, `searching` is true.
export function modelField(input, facts, changed) {
  let asking = null;
  async function tell() {
    asking?.abort();
    const { signal } = (asking = new AbortController());
    const name = input.value.trim();
    try {
      const model = name ? await ask(`/v1/models/${encodeURIComponent(name)}`, { signal }) : null;
      facts.className = "dim hint";
      facts.textContent = model ? `${count(model.params)} parameters in ${model.blocks} blocks × ${model.heads} heads of width ${model.dim}; images of ${model.img_size} px. To train it takes ${size(model.memory_bytes)} in all, activations apart.` : "";
    } catch (error) {
      if (error.name === "AbortError") return;
      facts.className = "error hint";
      facts.textContent = error.message;
    }
  }
  combo(input, {
    async find(text, signal) {
      const found = await ask(`/v1/models?${new URLSearchParams({ search: text, limit: 30 })}`, { signal });
      return found.data.map((model) => ({ value: model.id, note: weighs(model) }));
    },
    chosen() {
      tell();
      changed();
    },
  });
  return { tell, get searching() { return input.getAttribute("aria-expanded") === "true"; } };
}
