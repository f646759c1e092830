// Amounts as pages write them.
import { digits } from "./chart.js";

const BYTES = ["B", "kB", "MB", "GB", "TB"], COUNTS = ["", " k", " M", " G", " T", " P"];

function scaled(value, units, places) {
  if (typeof value !== "number") return "–";
  const power = value >= 1000 ? Math.min(units.length - 1, Math.floor(Math.log10(value) / 3)) : 0;
  return `${Number((value / 1000 ** power).toPrecision(places))}${units[power].startsWith(" ") || !units[power] ? "" : " "}${units[power]}`;
}
export const size = (bytes, places = 3) => scaled(bytes, BYTES, places);
export const count = (value) => scaled(value, COUNTS, 3);
// What binds a worker, with a sign of its own.
export const BINDS = { time: "◷ time", memory: "▤ memory", link: "⇄ link", path: "… path", idle: "○ idle" };
export const percent = (share) => (typeof share === "number" ? `${Number((100 * share).toFixed(1))} %` : "–");
export function took(seconds) {
  if (typeof seconds !== "number") return "–";
  if (seconds < 1) return `${digits(Number((1000 * seconds).toPrecision(3)))} ms`;
  if (seconds < 120) return `${Number(seconds.toPrecision(3))} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}
