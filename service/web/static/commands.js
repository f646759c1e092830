// The body of a job as commands of a terminal.
import { drop, pick } from "./form.js";

const FLAGS = {
  name: "name", model: "model", weights: "weights", dataset: "dataset", micro_batches: "micro-batches", micro_batch_size: "micro-batch-size",
  epochs: "epochs", steps: "steps", workers: "workers", seed: "seed", window: "window", placement: "placement", img_size: "img-size",
  images_per_class: "images-per-class", priority: "priority", "optimiser.learning_rate": "lr", "method.strategy": "strategy", "method.hold": "hold",
  "method.grain": "grain", "method.score": "score", "method.skip_fill": "skip-fill", "method.lora.rank": "lora", "method.freeze.blocks": "freeze-blocks",
  "method.budgets.compute": "compute", "method.budgets.bytes": "bytes", "precision.compute": "precision", "precision.wire": "wire",
};
const SWITCHES = { "method.freeze.trunk": "freeze-trunk", "method.head_only": "head-only", "export.onnx": "onnx", "precision.recompute": "recompute" };

export const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${String(word).replaceAll("'", "'\\''")}'`);
const fed = (command, text) => `${command} <<'JSON'\n${text}\nJSON`;

// By flags where there is one for every field, else by the body itself.
export function submitCommand(body) {
  const left = structuredClone(body), words = [];
  const say = (flag, value) => words.push(`--${flag}${value === undefined ? "" : ` ${quoted(String(value))}`}`);
  for (const [path, flag] of Object.entries(FLAGS)) {
    const value = pick(left, path);
    if (value === undefined || typeof value === "object") continue;
    say(flag, value);
    drop(left, path);
  }
  for (const [path, flag] of Object.entries(SWITCHES)) {
    if (pick(left, path) !== true) continue;
    say(flag);
    drop(left, path);
  }
  const ratios = pick(left, "method.ratios");
  if (ratios) {
    say("ratios", [ratios.full, ratios.forward ?? 0, ratios.skip ?? 0].join(","));
    drop(left, "method.ratios");
  }
  for (const [key, value] of Object.entries(left.metadata ?? {})) say("label", `${key}=${value}`);
  delete left.metadata;
  if (Object.keys(left).length) return fed("d2ft submit --spec - --watch", JSON.stringify(body, null, 2));
  return ["d2ft submit", ...words, "--watch"].join(words.length > 3 ? " \\\n  " : " ");
}

export function curlCommand(body) {
  const head = `curl --fail-with-body ${quoted(`${location.origin}/v1/jobs`)} \\\n  -H "Authorization: Bearer $D2FT_API_KEY" -H 'Content-Type: application/json' \\\n  -d @-`;
  return fed(head, JSON.stringify(body, null, 2));
}
