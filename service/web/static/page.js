// What every page does: theme, keys, selection, times, copying; and it loads the module of the page it is on.
import { ask, say } from "./api.js";
import { live } from "./live.js";

const root = document.documentElement;
const GO = { j: "/", n: "/ui/new", s: "/ui/sweeps", d: "/ui/devices", w: "/ui/what-if" };
const MODULES = { compare: "./compare.js", job: "./job.js", new: "./new.js", sweep: "./sweep.js", "what-if": "./what_if.js" };

const doing = {
  theme() {
    const dark = root.dataset.theme === "auto" ? matchMedia("(prefers-color-scheme: dark)").matches : root.dataset.theme === "dark";
    root.dataset.theme = dark ? "light" : "dark";
    document.cookie = `d2ft_theme=${root.dataset.theme}; path=/; max-age=31536000; samesite=strict`;
    dispatchEvent(new Event("d2ft:theme"));
  },
  keys: () => document.getElementById("keys").showModal(),
  clear() {
    for (const box of boxes()) box.checked = false;
    selected();
  },
  compare() {
    const chosen = boxes().filter((box) => box.checked).map((box) => ["job", box.value]);
    if (chosen.length) location.assign(`/ui/compare?${new URLSearchParams(chosen.slice(0, 8))}`);
  },
  async "cancel-selected"() {
    const chosen = boxes().filter((box) => box.checked);
    if (!chosen.length || !confirm(`Cancel ${chosen.length} job${chosen.length > 1 ? "s" : ""}?`)) return;
    const failed = [];
    for (const { value } of chosen) await ask(`/v1/jobs/${value}/cancel`, { method: "POST" }).catch((error) => failed.push(error.message));
    say(failed.length ? failed.join(" ") : "They are being cancelled.");
    doing.clear();
    refresh();
  },
};

function boxes() {
  return [...document.querySelectorAll('tbody input[type="checkbox"][name="job"]')];
}
function selected() {
  const bar = document.querySelector(".selection");
  if (!bar) return;
  const count = boxes().filter((box) => box.checked).length;
  bar.hidden = count === 0;
  bar.querySelector("[data-count]").textContent = count;
}
function refresh() {
  for (const part of document.querySelectorAll('[data-live="jobs"]')) part.dispatchEvent(new Event("refresh"));
}

document.addEventListener("click", (event) => {
  const name = event.target.closest("[data-do]")?.dataset.do;
  if (!doing[name]) return;
  event.preventDefault();
  doing[name](event);
});
document.addEventListener("change", (event) => event.target.name === "job" && selected());

// --- keys -----------------------------------------------------------------------------------------------------------
const rows = () => [...document.querySelectorAll("tr[data-href]")];
let going = 0;
function step(by) {
  const all = rows(), at = all.indexOf(document.activeElement.closest?.("tr[data-href]"));
  all[Math.max(0, Math.min(all.length - 1, at < 0 ? 0 : at + by))]?.focus();
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  const target = event.target;
  const typing = target.matches("input:not([type=checkbox], [type=radio], [type=range]), select, textarea");
  if (event.key === "Escape" && typing) return target.blur();
  if (typing || document.querySelector("dialog[open]")) return;
  const row = target.closest?.("tr[data-href]");
  if (Date.now() - going < 1500 && GO[event.key]) return location.assign(GO[event.key]);
  const act = {
    "/": () => document.querySelector('[data-key="/"]')?.focus(),
    "?": doing.keys,
    j: () => step(1),
    k: () => step(-1),
    g: () => (going = Date.now()),
    c: doing.compare,
    x: () => row?.querySelector('input[type="checkbox"]')?.click(),
    Enter: () => row === target && location.assign(row.dataset.href),
  }[event.key] ?? (/^[1-9]$/.test(event.key) && (() => document.querySelectorAll(".tabs a")[event.key - 1]?.click()));
  if (!act) return;
  if (event.key !== "Enter" || row === target) event.preventDefault();
  act();
});

// --- texts ----------------------------------------------------------------------------------------------------------
function ago(seconds) {
  const s = Math.max(0, seconds);
  if (s < 120) return `${Math.round(s)} s`;
  if (s < 7200) return `${Math.floor(s / 60)} min`;
  return s < 172800 ? `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min` : `${Math.floor(s / 86400)} d`;
}
function times() {
  for (const each of document.querySelectorAll("time[datetime]")) {
    const at = new Date(each.dateTime);
    each.textContent = `${ago((Date.now() - at) / 1000)} ago`;
    each.title = at.toLocaleString();
  }
}
function copying() {
  for (const block of document.querySelectorAll("pre.copy:not(:has(button))")) {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", textContent: "Copy" });
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(block.querySelector("code").textContent);
      say("Copied.");
    });
    block.append(button);
  }
}
function settle() {
  times();
  copying();
  selected();
}
settle();
setInterval(times, 10000);
document.addEventListener("htmx:after:swap", settle);

// --- the page -------------------------------------------------------------------------------------------------------
const name = document.body.dataset.page;
if (document.querySelector('[data-live="jobs"]') && !["job", "sweep"].includes(name)) live({ on: { jobs: refresh } });
if (MODULES[name]) import(MODULES[name]);
