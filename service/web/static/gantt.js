// A step as bars in time, one row a worker: the forecast above what was measured, on the same scale.
//
//   compute  as high as the row     update  the same, framed     send and receive  half     wait  a line
//
// A gantt is {step_us, workers: [[begin_us, end_us, what, block, part, mb], …]}, as the API gives it.
import { keyed, pointed, redrawn, sized } from "./canvas.js";
import { colour, digits, el, framed, scrolled, tabled } from "./chart.js";

const LEFT = 104, TOP = 20, ROW = 24, BREAK = 16, TABLE_ROWS = 500;
const KINDS = {
  compute: { name: "compute", fill: "--full", height: 1 },
  talk: { name: "send, receive", fill: "--forward", height: 0.5 },
  wait: { name: "wait", fill: "--wait", height: 0.14 },
  update: { name: "update", fill: "--c2", height: 1, framed: true },
};
const OF = { send: "talk", recv: "talk", wait: "wait", update: "update", step: "update" };
const kind = (span) => OF[span[2]] ?? "compute";
const SIDES = ["forecast", "measured"];
const LACKS = {
  forecast: "The forecast of a step is not known yet.",
  measured: "No step has been measured so yet.",
};

// Draws {forecast, measured} into `place`, either null where it is not known; the answer's `set` shows others.
// `lacks` has other words for what is missing, "" for none.
export function gantt(place, pair, { title = "A step, worker by worker", lacks = {} } = {}) {
  const view = { from: 0, to: 0, row: 0, span: 0 };
  place.replaceChildren();
  const { head, plot, refill } = framed(place, title, () => table(rowsOf(pair), view));
  const canvas = el("canvas", { id: "gantt" }), note = el("p", { className: "dim" }), spoken = el("p", { className: "unseen", role: "status" });
  const sums = scrolled("Sums by worker");
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-label", `${title}: a row a worker, time to the right. Arrow keys move from bar to bar, plus and minus zoom.`);
  plot.append(canvas);
  const tools = el("div", { className: "tools" }, ...buttons(), ...legend());
  plot.before(tools, note);
  plot.after(spoken, sums);

  const whole = () => Math.max(1, ...rowsOf(pair).map((row) => row.step_us));
  function draw() {
    if (!plot.clientWidth) return;
    canvas.dataset.drawnMs = paint(canvas, plot.clientWidth, rowsOf(pair), view).toFixed(1);
  }
  function zoom(factor, about = (view.from + view.to) / 2) {
    const all = whole(), wide = Math.min(all, Math.max(20, (view.to - view.from) * factor));
    const from = Math.max(0, Math.min(all - wide, about - (about - view.from) * (wide / (view.to - view.from))));
    Object.assign(view, { from, to: from + wide });
    draw();
    refill();
  }
  function buttons() {
    return [["Closer", () => zoom(0.5)], ["Wider", () => zoom(2)], ["All of it", () => zoom(Infinity)]].map(([text, act]) => {
      const button = el("button", { type: "button", textContent: text });
      button.addEventListener("click", act);
      return button;
    });
  }
  function show(changed) {
    const missing = SIDES.filter((side) => !pair[side]);
    note.textContent = missing.map((side) => lacks[side] ?? LACKS[side]).filter(Boolean).join(" ");
    const drawable = missing.length < 2, { step, window } = pair.measured ?? {};
    head.firstChild.textContent = step === undefined ? title : `${title}: measured step ${step} of window ${window}`;
    plot.hidden = tools.hidden = !drawable;
    if (changed || view.to > whole()) Object.assign(view, { from: 0, to: whole() });
    draw();
    sums.replaceChildren(...(drawable ? [sumTable(pair)] : []));
    refill();
  }
  const scale = () => (plot.clientWidth - LEFT - 4) / (view.to - view.from);
  pointed(canvas, spoken, {
    at(x, y) {
      const rows = rowsOf(pair), row = rows.findIndex((each) => y >= each.y && y < each.y + ROW);
      if (row < 0 || x < LEFT) return null;
      const span = nearest(rows[row].spans, view.from + (x - LEFT) / scale(), 3 / scale());
      return span < 0 ? null : { row, span };
    },
    move(pressed) {
      const step = { "+": 0.5, "=": 0.5, "-": 2, 0: Infinity }[pressed];
      const rows = rowsOf(pair);
      if (step) zoom(step, rows[view.row]?.spans[view.span]?.[0]);
      return step ? { row: view.row, span: view.span } : moved(pressed, view, rows);
    },
    tell: ({ row, span }) => told(rowsOf(pair)[row], span),
    spot({ row, span }) {
      const { spans, y } = rowsOf(pair)[row], middle = (spans[span][0] + spans[span][1]) / 2;
      return [LEFT + (middle - view.from) * scale(), y];
    },
    pick(it) {
      Object.assign(view, it);
      const [begin, end] = rowsOf(pair)[it.row].spans[it.span], wide = view.to - view.from;
      if (begin >= view.from && end <= view.to) return;
      const from = Math.max(0, Math.min(whole() - wide, (begin + end - wide) / 2));
      Object.assign(view, { from, to: from + wide });
    },
    draw,
  });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.25 : 0.8, view.from + (event.offsetX - LEFT) / scale());
  }, { passive: false });
  for (const when of ["focus", "blur"]) canvas.addEventListener(when, draw);
  redrawn(plot, draw);
  show(true);
  return {
    set(next) {
      const closer = view.to - view.from < 0.999 * whole();
      pair = next;
      show(!closer);
    },
  };
}

// All rows from above to below, with where each is drawn.
function rowsOf(pair) {
  const rows = [];
  let y = TOP;
  for (const side of SIDES) {
    if (!pair[side]) continue;
    pair[side].workers.forEach((spans, worker) => {
      rows.push({ side, worker, spans, step_us: pair[side].step_us, y });
      y += ROW;
    });
    y += BREAK;
  }
  return rows;
}

function paint(canvas, width, rows, view) {
  const began = performance.now(), high = (rows.at(-1)?.y ?? TOP) + ROW + 4;
  const ctx = sized(canvas, width, high), scale = (width - LEFT - 4) / (view.to - view.from);
  const text = colour("--text"), dim = colour("--dim"), soft = colour("--soft");
  const fills = Object.fromEntries(Object.entries(KINDS).map(([name, { fill }]) => [name, colour(fill)]));
  ctx.fillStyle = dim;
  for (const at of ticks(view.from, view.to, (width - LEFT) / 90)) {
    const x = LEFT + (at - view.from) * scale;
    ctx.fillText(`${digits(at / 1000)} ms`, x + 3, TOP / 2);
    ctx.fillRect(x, TOP / 2 - 6, 1, 12);
    ctx.fillStyle = soft;
    ctx.fillRect(x, TOP, 1, high);
    ctx.fillStyle = dim;
  }
  for (const { side, worker, spans, step_us: end, y } of rows) {
    ctx.fillStyle = dim;
    ctx.fillText(`${side} w${worker}`, 2, y + ROW / 2);
    bars(ctx, spans, { y, view, scale, fills, text });
    const x = LEFT + (end - view.from) * scale;
    ctx.fillStyle = text;
    if (x >= LEFT && x <= width) ctx.fillRect(x, y, 1.5, ROW);
  }
  const here = rows[view.row], span = here?.spans[view.span];
  if (span && document.activeElement === canvas) {
    Object.assign(ctx, { strokeStyle: text, lineWidth: 2 });
    const [x, end] = [span[0], span[1]].map((at) => Math.min(width - 3, Math.max(LEFT, LEFT + (at - view.from) * scale)));
    ctx.strokeRect(x - 1, here.y + 1, Math.max(3, end - x + 2), ROW - 2);
  }
  return performance.now() - began;
}

// Bars too narrow to be seen are one with those of their kind beside them.
function bars(ctx, spans, { y, view, scale, fills, text }) {
  const tall = ROW - 6, right = LEFT + (view.to - view.from) * scale;
  const last = { compute: -1, talk: -1, wait: -1, update: -1 };
  for (const span of spans) {
    if (span[1] < view.from || span[0] > view.to) continue;
    const name = kind(span), { height, framed: edged } = KINDS[name];
    const x = Math.max(LEFT, LEFT + (span[0] - view.from) * scale), end = Math.min(right, LEFT + (span[1] - view.from) * scale);
    if (end - x < 0.5 && x - last[name] < 0.5) continue;
    last[name] = end;
    const wide = Math.max(0.75, end - x - (end - x > 4 ? 0.75 : 0)), top = y + 3 + (tall * (1 - height)) / 2;
    ctx.fillStyle = fills[name];
    ctx.fillRect(x, top, wide, tall * height);
    if (edged) {
      Object.assign(ctx, { strokeStyle: text, lineWidth: 1 });
      ctx.strokeRect(x + 0.5, top + 0.5, Math.max(1, wide - 1), tall * height - 1);
    }
    if (name === "compute" && wide > 46) {
      ctx.fillStyle = colour("--on-accent");
      ctx.fillText(label(span), x + 4, y + ROW / 2, wide - 6);
    }
  }
}

const label = ([, , what, block, part, mb]) => [what, block >= 0 ? `b${block}${part ? `.${part}` : ""}` : part, mb >= 0 ? `m${mb}` : ""].filter(Boolean).join(" ");

function ticks(from, to, most) {
  const rough = (to - from) / Math.max(2, most), unit = 10 ** Math.floor(Math.log10(rough)), by = [1, 2, 5, 10].find((each) => each * unit >= rough) * unit;
  const found = [];
  for (let at = Math.ceil(from / by) * by; at < to - by / 3; at += by) found.push(at);
  return found;
}

// The bar at a time, or the nearest within `slack` µs; -1 where there is none.
function nearest(spans, time, slack) {
  let low = 0, high = spans.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (spans[middle][1] < time) low = middle + 1;
    else high = middle;
  }
  const near = (i) => spans[i] && spans[i][0] - slack <= time && spans[i][1] + slack >= time;
  return near(low) ? low : near(low - 1) ? low - 1 : -1;
}

function moved(pressed, view, rows) {
  const row = rows[Math.min(view.row, rows.length - 1)];
  if (!row?.spans.length) return null;
  const along = { ArrowLeft: view.span - 1, ArrowRight: view.span + 1, Home: 0, End: row.spans.length - 1, Enter: view.span, " ": view.span }[pressed];
  if (along !== undefined) return { row: rows.indexOf(row), span: Math.min(row.spans.length - 1, Math.max(0, along)) };
  const to = { ArrowUp: -1, ArrowDown: 1 }[pressed], other = to && rows[rows.indexOf(row) + to];
  if (!other?.spans.length) return null;
  return { row: rows.indexOf(other), span: Math.max(0, nearest(other.spans, row.spans[Math.min(view.span, row.spans.length - 1)][0], Infinity)) };
}

function told({ side, worker, spans }, at) {
  const [begin, end, what, block, part, mb] = spans[at];
  const where = [block >= 0 ? `block ${block}` : "", part, mb >= 0 ? `micro-batch ${mb}` : ""].filter(Boolean).join(", ");
  return [`${side}, worker ${worker}: ${what === "wait" ? "waits" : what}`, where, `${micro(end - begin)}, from ${micro(begin)} on`].filter(Boolean).join("\n");
}

const micro = (us) => `${Math.round(us).toLocaleString("en")} µs`;

function totals(spans, step) {
  const sums = { compute: 0, talk: 0, wait: 0, update: 0 };
  for (const span of spans) sums[kind(span)] += span[1] - span[0];
  return { ...sums, idle: Math.max(0, step - Object.values(sums).reduce((a, b) => a + b, 0)) };
}

function sumTable(pair) {
  const rows = rowsOf(pair).map(({ side, worker, spans, step_us: step }) => {
    const { compute, talk, wait, update, idle } = totals(spans, step);
    return [side, worker, ...[compute, talk, wait, update, idle, step].map((us) => `${digits(us / 1000)} ms`)];
  });
  const table = tabled(["Step", "Worker", "Compute", "Send, receive", "Wait", "Update", "Idle at the end", "In all"], rows);
  table.classList.add("keyed");
  return table;
}

function table(rows, view) {
  const seen = rows.flatMap(({ side, worker, spans }) => spans.filter((span) => span[1] >= view.from && span[0] <= view.to).map(([begin, end, what, block, part, mb]) => [side, worker, begin, end - begin, what, block < 0 ? null : block, part, mb < 0 ? null : mb]));
  const rest = seen.length - TABLE_ROWS, head = ["Step", "Worker", "From, µs", "Takes, µs", "What", "Block", "Part", "Micro-batch"];
  return [head, [...seen.slice(0, TABLE_ROWS), ...(rest > 0 ? [[`and ${rest} more: look closer to see them`]] : [])]];
}

function legend() {
  return Object.values(KINDS).map(({ name, fill, height, framed: edged }) => keyed(name, (ctx) => {
    ctx.fillStyle = colour(fill);
    ctx.fillRect(1, 7 - 6 * height, 20, 12 * height);
    ctx.strokeStyle = colour("--text");
    if (edged) ctx.strokeRect(1.5, 1.5, 19, 11);
  }));
}
