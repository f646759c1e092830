// Line charts over uPlot: smoothing, log axis, marks, a crosshair shared by all charts of a page, downloads, and the
// numbers as a table, since a canvas says nothing to who cannot see it.
const DASHES = [[], [9, 4], [2, 3], [10, 3, 2, 3], [5, 5], [14, 4], [1, 4], [8, 2, 2, 2, 2, 2]];
const TABLE_ROWS = 400;
const HEIGHT = 220;
const sync = globalThis.uPlot?.sync("page");

export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// Debiased exponential moving average; gaps stay gaps.
function smoothed(values, weight) {
  if (!weight) return values;
  let sum = 0, norm = 0;
  return values.map((value) => {
    if (value === null || !Number.isFinite(value)) return null;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export function download(name, blob) {
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

export const digits = (value) => (value === null || value === undefined ? "–" : Number(value.toPrecision(4)).toString());

// Makes of a place one that is scrolled by itself, by keys too, and is read out under its title.
export function scrolls(place, title) {
  place.classList.add("scroll");
  place.tabIndex = 0;
  place.setAttribute("role", "region");
  place.setAttribute("aria-label", title);
  return place;
}
export const scrolled = (title, ...inner) => scrolls(el("div", {}, ...inner), title);

// A figure with a head of buttons, the drawing, and a table that is filled when it is asked for: {table, head} → rows.
export function framed(parent, title, table) {
  const head = el("figcaption", {}, title, el("span", { className: "grow" }));
  const plot = el("div", { className: "plot" });
  const data = scrolls(el("div", { className: "data", hidden: true }), `${title}: numbers`);
  const toggle = el("button", { type: "button", textContent: "Table" });
  toggle.setAttribute("aria-pressed", "false");
  const fill = () => data.replaceChildren(tabled(...table()));
  toggle.addEventListener("click", () => {
    data.hidden = !data.hidden;
    toggle.setAttribute("aria-pressed", String(!data.hidden));
    if (!data.hidden) fill();
  });
  head.append(toggle);
  const figure = el("figure", { className: "chart" }, head, plot, data);
  parent.append(figure);
  return { figure, head, plot, refill: () => data.hidden || fill() };
}

// Figures, with their units or without, stand to the right.
const NUMBER = /^-?[\d.,]+(e[-+]?\d+)?( (%|µs|ms|s|B|kB|MB|GB|TB))?$/;
const sideOf = (cell) => (typeof cell === "number" || NUMBER.test(cell) ? "num" : "");

export function tabled(names, rows) {
  const sides = names.map((_, i) => sideOf(rows.find((row) => row[i] !== null && row[i] !== "–")?.[i]));
  const head = el("tr", {}, ...names.map((name, i) => el("th", { textContent: name, className: sides[i] })));
  const body = rows.map((row) => el("tr", {}, ...row.map((cell, i) => el("td", { className: cell === null || cell === "–" ? sides[i] : sideOf(cell) }, cell ?? "–"))));
  return el("table", { className: "rows" }, el("thead", {}, head), el("tbody", {}, ...body));
}

export class Chart {
  // `x` names the axis; `log` and `smooth` are how it begins; `format` writes a value.
  constructor(parent, { title, x = "step", log = false, smooth = 0, format = digits }) {
    Object.assign(this, { title, x, log, smooth, format, lines: [], marks: [], plot: null });
    const { head, plot, refill } = framed(parent, title, () => this.#table());
    this.place = plot;
    this.refill = refill;
    const smoothing = el("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: smooth, title: "Smoothing" });
    smoothing.setAttribute("aria-label", `${title}: smoothing`);
    smoothing.addEventListener("input", () => this.#redraw({ smooth: Number(smoothing.value) }));
    const logged = el("button", { type: "button", textContent: "Log" });
    logged.setAttribute("aria-pressed", String(log));
    logged.addEventListener("click", () => {
      this.#redraw({ log: !this.log });
      logged.setAttribute("aria-pressed", String(this.log));
    });
    const png = el("button", { type: "button", textContent: "PNG" });
    png.addEventListener("click", () => this.#png());
    const csv = el("button", { type: "button", textContent: "CSV" });
    csv.addEventListener("click", () => download(`${this.title}.csv`, new Blob([this.#csv()], { type: "text/csv" })));
    head.append(smoothing, logged, png, csv);
    addEventListener("d2ft:theme", () => this.#redraw({}));
    new ResizeObserver(() => this.plot && this.plot.setSize(this.#size())).observe(plot);
  }

  // lines: [{label, x: [], y: []}], x rising; a y of null or NaN is a gap, NaN marked; with `points` each is shown as it is. marks: [{x, text}].
  set(lines, marks = []) {
    const alike = this.plot && lines.length === this.lines.length && lines.every((line, i) => line.label === this.lines[i].label);
    Object.assign(this, { lines, marks });
    if (alike) this.plot.setData(this.#data(), this.#whole());
    else this.#redraw({});
    this.refill();
  }

  // The axis is another from now on; its numbers come with the next `set`.
  along(x) {
    this.plot?.destroy();
    Object.assign(this, { x, plot: null });
  }

  #whole() {
    const { min, max } = this.plot.scales.x, xs = this.plot.data[0];
    return !xs.length || min <= xs[0] + 1e-9 && max >= xs[xs.length - 1] - 1e-9 || min === null;
  }
  #finite(value) {
    return value !== null && Number.isFinite(value) && (!this.log || value > 0) ? value : null;
  }
  #data() {
    const tables = this.lines.map(({ x, y, points }) => {
      const known = y.map((value) => this.#finite(value));
      return [x, points ? known : smoothed(known, this.smooth), known];
    });
    return tables.length ? uPlot.join(tables, tables.map(() => [0, 2, 2])) : [[]];
  }
  #size() {
    return { width: Math.max(200, this.place.clientWidth), height: HEIGHT };
  }
  #redraw(changes) {
    Object.assign(this, changes);
    this.plot?.destroy();
    const text = colour("--dim"), grid = { stroke: colour("--soft"), width: 1 };
    const axis = { stroke: text, grid, ticks: grid, font: "12px system-ui" };
    const series = this.lines.flatMap((line, i) => {
      const stroke = colour(`--c${i % 8}`);
      const shown = { stroke, width: 2, dash: DASHES[i % DASHES.length], spanGaps: false, points: { show: line.points ?? line.x.length < 3 } };
      return [
        { ...shown, label: line.label, value: (_, value) => this.format(value) },
        { stroke: `${stroke}55`, width: 1, show: this.smooth > 0, points: { show: false }, label: "" },
      ];
    });
    this.plot = new uPlot({
      ...this.#size(),
      cursor: { sync: { key: sync.key, setSeries: false }, drag: { x: true, y: false } },
      scales: { x: { time: false }, y: { distr: this.log ? 3 : 1 } },
      axes: [{ ...axis, label: this.x, labelSize: 18, size: 34, labelFont: "12px system-ui" }, { ...axis, size: 70, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : this.format(tick))) }],
      series: [{ label: this.x }, ...series],
      legend: { markers: { width: 2 } },
      hooks: { draw: [(plot) => this.#mark(plot)], ready: [(plot) => hideRaw(plot)] },
    }, this.#data(), this.place);
  }
  #mark(plot) {
    const { ctx, bbox } = plot, ratio = devicePixelRatio;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour("--bad");
    ctx.font = `${11 * ratio}px system-ui`;
    ctx.textAlign = "left";
    ctx.setLineDash([4 * ratio, 4 * ratio]);
    for (const [i, { x, text }] of this.marks.entries()) {
      const at = plot.valToPos(x, "x", true);
      if (at < bbox.left || at > bbox.left + bbox.width) continue;
      ctx.beginPath();
      ctx.moveTo(at, bbox.top);
      ctx.lineTo(at, bbox.top + bbox.height);
      ctx.stroke();
      ctx.fillText(text, at + 3 * ratio, bbox.top + (11 + 12 * (i % 3)) * ratio);
    }
    for (const { x, y } of this.lines) {
      let written = -Infinity;
      y.forEach((value, i) => {
        if (value === null || Number.isFinite(value)) return;
        const at = plot.valToPos(x[i], "x", true), apart = at - written > 40 * ratio;
        ctx.fillText(apart ? "▼ NaN" : "▼", at - 4 * ratio, bbox.top + 48 * ratio);
        if (apart) written = at;
      });
    }
    ctx.restore();
  }
  #rows() {
    const data = this.plot ? this.#data() : [[]];
    return data[0].map((x, i) => [x, ...this.lines.map((_, line) => data[2 + 2 * line][i] ?? null)]);
  }
  #table() {
    const rows = this.#rows(), every = Math.ceil(rows.length / TABLE_ROWS) || 1;
    const thinned = rows.filter((_, i) => i % every === 0 || i === rows.length - 1);
    return [[this.x, ...this.lines.map((line) => line.label)], thinned.map(([x, ...values]) => [x, ...values.map((value) => (value === null ? null : this.format(value)))])];
  }
  #csv() {
    const quoted = (cell) => (cell === null ? "" : /[",\n]/.test(cell) ? `"${String(cell).replaceAll('"', '""')}"` : cell);
    const head = [this.x, ...this.lines.map((line) => line.label)];
    return [head, ...this.#rows()].map((row) => row.map(quoted).join(",")).join("\n");
  }
  #png() {
    const from = this.plot.ctx.canvas, to = el("canvas", { width: from.width, height: from.height }), ctx = to.getContext("2d");
    ctx.fillStyle = colour("--card");
    ctx.fillRect(0, 0, to.width, to.height);
    ctx.drawImage(from, 0, 0);
    to.toBlob((blob) => download(`${this.title}.png`, blob));
  }
}

// The raw lines behind smoothed ones have no place in the legend.
function hideRaw(plot) {
  plot.root.querySelectorAll(".u-legend .u-series").forEach((row, i) => {
    if (i > 0 && i % 2 === 0) row.hidden = true;
  });
}
