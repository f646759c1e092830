// What drawings on a canvas have in common: sharp pixels, a tip, a key, a cursor, and drawing again when the theme or
// the width has changed.
import { colour, el } from "./chart.js";

export const DASHES = [[], [6, 3], [2, 2], [8, 2, 2, 2], [4, 4], [10, 3], [1, 3], [6, 2, 1, 2]];

// By worker: a colour and a dash, both repeated after eight.
export const owned = (worker) => ({ stroke: colour(`--c${worker % 8}`), dash: DASHES[worker % 8] });

export function sized(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  Object.assign(canvas, { width: Math.round(width * ratio), height: Math.round(height * ratio) });
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const ctx = canvas.getContext("2d");
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  ctx.clearRect(0, 0, width, height);
  ctx.font = "11px system-ui, sans-serif";
  ctx.textBaseline = "middle";
  return ctx;
}

let box = null;
export function showTip(text, x, y) {
  box ??= document.body.appendChild(el("div", { className: "tip", id: "tip" }));
  box.textContent = text;
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect();
  box.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 8))}px`;
  box.style.top = `${y + 18 + height > innerHeight ? Math.max(4, y - height - 10) : y + 18}px`;
}
export function hideTip() {
  if (box) box.hidden = true;
}
addEventListener("scroll", hideTip, true);

for (const [source, type] of [[window, "d2ft:theme"], [matchMedia("(prefers-color-scheme: dark)"), "change"]]) {
  source.addEventListener(type, () => document.querySelectorAll("canvas.swatch").forEach((swatch) => swatch.repaint()));
}

// One entry of a key: `paint` draws its sign into a box of 22 × 14.
export function keyed(text, paint) {
  const canvas = el("canvas", { className: "swatch" });
  canvas.setAttribute("aria-hidden", "true");
  canvas.repaint = () => paint(sized(canvas, 22, 14));
  canvas.repaint();
  return el("span", { className: "key" }, canvas, text);
}

export function chosen(title, options, value, change) {
  const select = el("select", {}, ...options.map(([key, text]) => el("option", { value: key, textContent: text })));
  select.value = value;
  select.addEventListener("change", () => change(select.value));
  return el("label", { className: "chip" }, title, select);
}

// Draws again when the theme or the room for it has changed.
export function redrawn(place, draw) {
  let width = 0;
  addEventListener("d2ft:theme", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  new ResizeObserver(() => {
    if (place.clientWidth === width) return;
    width = place.clientWidth;
    draw();
  }).observe(place);
}

// A drawing with a cursor: `at(x, y)` names what lies there, `move(key)` where an arrow leads, `tell(it)` is its text,
// `spot(it)` its place. The mouse and the keys show the same tip; the text is said, too.
export function pointed(canvas, spoken, { at, move, tell, spot, draw, pick }) {
  canvas.tabIndex = 0;
  canvas.addEventListener("pointermove", (event) => {
    const edge = canvas.getBoundingClientRect(), it = at(event.clientX - edge.left, event.clientY - edge.top);
    if (it) showTip(tell(it), event.clientX, event.clientY);
    else hideTip();
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("pointerdown", (event) => {
    const edge = canvas.getBoundingClientRect(), it = at(event.clientX - edge.left, event.clientY - edge.top);
    if (it) pick(it);
    draw();
  });
  canvas.addEventListener("blur", hideTip);
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hideTip();
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const it = move(event.key);
    if (!it) return;
    event.preventDefault();
    pick(it);
    draw();
    const [x, y] = spot(it), edge = canvas.getBoundingClientRect();
    showTip(tell(it), edge.left + x, edge.top + y);
    spoken.textContent = tell(it);
  });
}
