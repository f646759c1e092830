// The plan as a heat map: blocks × heads, each head a strip of its micro-batches' ops.
//
//   FULL     as high as the strip        FORWARD  half as high        SKIP  a line at its foot
//
// So ops can be told apart without colours, which then say the op, the head's worth, or its time. The border is the
// owner's, by colour and dash.
import { recall, remember } from "./address.js";
import { chosen, keyed, owned, pointed, redrawn, sized } from "./canvas.js";
import { colour, digits, el, framed } from "./chart.js";

const LEFT = 34, TOP = 18, GAP = 2;
const HEIGHTS = { F: 1, O: 0.5, S: 0.12 };
const FILLS = { F: "--full", O: "--forward", S: "--line" };
const NAMES = { F: "FULL", O: "FORWARD", S: "SKIP" };
const COLOURS = [["op", "op"], ["worth", "worth"], ["time", "time"]];
const UNKNOWN = "not known yet";

// Draws `plan` into `place`; the answer's `set(plan)` shows another in the same way. With `address` what is chosen
// stands in the page's address.
export function heads(place, plan, { title = "Heads", address = false } = {}) {
  const saved = (name, usual) => (address ? recall(name, usual) : usual);
  const view = { colour: saved("colour", "op"), step: Number(saved("step", 0)), block: 0, head: 0 };
  place.replaceChildren();
  const tools = el("div", { className: "tools" }), legend = el("p", { className: "keys-row" });
  const spoken = el("p", { className: "unseen", role: "status" });
  const { plot, refill } = framed(place, title, () => table(plan, view));
  const canvas = el("canvas", { id: "heat" });
  plot.classList.add("scroll");
  plot.append(canvas);
  plot.before(tools, legend);
  plot.after(el("p", { className: "dim sums" }), spoken);
  canvas.setAttribute("role", "application");
  canvas.setAttribute("aria-label", `${title}: blocks down, heads across. Arrow keys move; the numbers are behind Table.`);

  function draw() {
    if (plot.clientWidth) canvas.dataset.drawnMs = paint(canvas, plot, plan, view).toFixed(1);
  }
  function choose(name, value, usual) {
    view[name] = value;
    if (address) remember(name, value, usual);
    show();
  }
  function show() {
    view.step = Math.min(Math.max(0, view.step || 0), plan.cycle.length - 1);
    if (!COLOURS.some(([key]) => key === view.colour && known(plan, key))) view.colour = "op";
    const offered = COLOURS.filter(([key]) => known(plan, key));
    tools.replaceChildren(chosen("Colour by", offered, view.colour, (value) => choose("colour", value, "op")));
    if (plan.cycle.length > 1) {
      const steps = plan.cycle.map((_, i) => [i, `${i + 1} of ${plan.cycle.length}`]);
      tools.append(chosen("Step of the cycle", steps, view.step, (value) => choose("step", Number(value), 0)));
    }
    if (offered.length < COLOURS.length) tools.append(el("span", { className: "dim", textContent: `${known(plan, "worth") ? "Time" : "Worth, reasons and time"} per head: ${UNKNOWN}.` }));
    legend.replaceChildren(...key(plan, view));
    plot.parentElement.querySelector(".sums").textContent = sums(plan.cycle[view.step]);
    draw();
    refill();
  }
  const find = (x, y) => {
    const { across, down, wide, high } = layout(plot, plan);
    const head = Math.floor((x - LEFT) / wide), block = Math.floor((y - TOP) / high);
    return x >= LEFT && y >= TOP && head < across && block < down ? { block, head } : null;
  };
  pointed(canvas, spoken, {
    at: find,
    move: (pressed) => moved(pressed, view, plan),
    tell: (it) => told(plan, view, it),
    spot({ block, head }) {
      const { wide, high } = layout(plot, plan);
      return [LEFT + (head + 0.5) * wide, TOP + (block + 0.5) * high];
    },
    pick: (it) => Object.assign(view, it),
    draw,
  });
  for (const when of ["focus", "blur"]) canvas.addEventListener(when, draw);
  redrawn(plot, draw);
  show();
  return { set: (next) => ((plan = next), show()) };
}

const about = (plan, block, head) => plan.heads?.[block]?.[head] ?? {};
const owner = (plan, block, head) => plan.placement.owners[block][head];
const known = (plan, by) => by === "op" || typeof about(plan, 0, 0)[FIELDS[by]] === "number";
const FIELDS = { worth: "worth", time: "time_us" };

function layout(plot, plan) {
  const ops = plan.cycle[0], down = ops.length, across = ops[0].length, many = ops[0][0].length;
  const wide = Math.max(1.5 * many + 8, Math.min(200, (plot.clientWidth - LEFT - 2) / across));
  return { down, across, many, wide, high: down > 16 ? 20 : 28 };
}

function span(plan, by) {
  const values = plan.heads.flat().map((head) => head[FIELDS[by]] ?? 0);
  return [Math.min(...values), Math.max(...values)];
}

function shade(plan, view) {
  if (view.colour === "op") return () => 1;
  const [low, high] = span(plan, view.colour), field = FIELDS[view.colour];
  return (block, head) => 0.2 + 0.8 * (high > low ? Math.sqrt((about(plan, block, head)[field] - low) / (high - low)) : 1);
}

// Milliseconds that it took.
function paint(canvas, plot, plan, view) {
  const began = performance.now(), { down, across, many, wide, high } = layout(plot, plan);
  const ctx = sized(canvas, Math.ceil(LEFT + across * wide + 2), TOP + down * high + 2);
  const fills = Object.fromEntries(Object.entries(FILLS).map(([op, name]) => [op, colour(name)]));
  const one = colour("--c0"), dim = colour("--dim"), strength = shade(plan, view), ops = plan.cycle[view.step];
  const owners = Array.from({ length: plan.placement.num_workers }, (_, worker) => owned(worker));
  const lettered = wide >= 3 * many + 22, inset = lettered ? 14 : 2, tall = high - 2 * GAP - 4;
  ctx.fillStyle = dim;
  for (let head = 0; head < across; head++) ctx.fillText(`h${head}`, LEFT + head * wide + 3, TOP / 2);
  for (let block = 0; block < down; block++) {
    const y = TOP + block * high + GAP;
    ctx.fillStyle = dim;
    ctx.fillText(`b${block}`, 2, y + high / 2 - GAP);
    for (let head = 0; head < across; head++) {
      const x = LEFT + head * wide + GAP, word = ops[block][head], step = (wide - 2 * GAP - 3 - inset) / many, whose = owner(plan, block, head);
      ctx.globalAlpha = strength(block, head);
      for (let mb = 0; mb < many; mb++) {
        const height = Math.max(1.5, tall * HEIGHTS[word[mb]]);
        ctx.fillStyle = view.colour === "op" ? fills[word[mb]] : one;
        ctx.fillRect(x + inset + mb * step, y + 2 + tall - height, Math.max(0.75, step - (step > 3 ? 1 : 0.25)), height);
      }
      ctx.globalAlpha = 1;
      const { stroke, dash } = owners[whose];
      ctx.strokeStyle = stroke;
      ctx.setLineDash(dash);
      ctx.lineWidth = 1.25;
      ctx.strokeRect(x, y, wide - 2 * GAP, high - 2 * GAP);
      if (lettered) {
        ctx.fillStyle = dim;
        ctx.fillText(whose, x + 4, y + high / 2 - GAP);
      }
    }
  }
  if (document.activeElement === canvas) {
    ctx.setLineDash([]);
    ctx.lineWidth = 3;
    ctx.strokeStyle = colour("--text");
    ctx.strokeRect(LEFT + view.head * wide + 1, TOP + view.block * high + 1, wide - 2, high - 2);
  }
  return performance.now() - began;
}

function moved(pressed, { block, head }, plan) {
  const { length: down } = plan.cycle[0], { length: across } = plan.cycle[0][0];
  const to = {
    ArrowLeft: [block, head - 1], ArrowRight: [block, head + 1], ArrowUp: [block - 1, head], ArrowDown: [block + 1, head],
    Home: [block, 0], End: [block, across - 1], PageUp: [0, head], PageDown: [down - 1, head], Enter: [block, head], " ": [block, head],
  }[pressed];
  return to && { block: Math.min(down - 1, Math.max(0, to[0])), head: Math.min(across - 1, Math.max(0, to[1])) };
}

function told(plan, view, { block, head }) {
  const { worth, time_us: time, reason } = about(plan, block, head), word = plan.cycle[view.step][block][head];
  return [
    `block ${block}, head ${head}: worker ${owner(plan, block, head)}`,
    `${word} (${counts(word)})`,
    `worth ${worth === undefined ? UNKNOWN : digits(worth)}${typeof time === "number" ? `, ${digits(time)} µs a step` : ""}`,
    reason ?? `reason ${UNKNOWN}`,
  ].join("\n");
}

function counts(word) {
  return Object.keys(NAMES).map((op) => [[...word].filter((each) => each === op).length, NAMES[op]]).filter(([count]) => count).map((pair) => pair.join(" ")).join(", ");
}

function sums(ops) {
  const word = ops.flat().join("");
  const shares = Object.keys(NAMES).map((op) => `${NAMES[op]} ${digits(Math.round(1000 * [...word].filter((each) => each === op).length / word.length) / 10)} %`);
  return `Of the ${word.length} ops of this step: ${shares.join(", ")}.`;
}

function key(plan, view) {
  const parts = Object.keys(NAMES).map((op) =>
    keyed(NAMES[op], (ctx) => {
      ctx.fillStyle = colour(view.colour === "op" ? FILLS[op] : "--c0");
      const height = Math.max(1.5, 12 * HEIGHTS[op]);
      ctx.fillRect(2, 13 - height, 18, height);
    }));
  for (let worker = 0; worker < plan.placement.num_workers; worker++) {
    parts.push(keyed(`worker ${worker}`, (ctx) => {
      const { stroke, dash } = owned(worker);
      Object.assign(ctx, { strokeStyle: stroke, lineWidth: 1.5 });
      ctx.setLineDash(dash);
      ctx.strokeRect(2, 2, 18, 10);
    }));
  }
  if (view.colour === "op") return parts;
  const [low, high] = span(plan, view.colour), unit = view.colour === "time" ? " µs" : "";
  parts.push(keyed(`${view.colour}: pale ${digits(low)}${unit}, dark ${digits(high)}${unit}`, (ctx) => {
    ctx.fillStyle = colour("--c0");
    for (let i = 0; i < 20; i++) {
      ctx.globalAlpha = 0.2 + 0.8 * (i / 19);
      ctx.fillRect(1 + i, 1, 1, 12);
    }
  }));
  return parts;
}

function table(plan, view) {
  const ops = plan.cycle[view.step];
  const rows = ops.flatMap((row, block) => row.map((word, head) => {
    const { worth, time_us: time, reason } = about(plan, block, head);
    return [block, head, owner(plan, block, head), word, worth ?? null, time ?? null, reason ?? null];
  }));
  return [["Block", "Head", "Owner", "Ops by micro-batch", "Worth", "Time, µs", "Reason"], rows];
}
