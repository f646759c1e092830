// The end of a log, as it grows. Who scrolls up is left where they are, and told how much has come since.
import { recall, remember } from "./address.js";
import { say } from "./api.js";
import { download, el } from "./chart.js";

const CHUNK = 1 << 18; // bytes that are read at once, and from how far before the end
const KEPT = 20000; // lines
const SHOWN = 4000; // of them on the page
const AGAIN_MS = 3000;
const LEVELS = [/^$/, /\bINFO\b/, /\bWARN(ING)?\b|Warning:/, /\b(ERROR|CRITICAL|FATAL)\b|Traceback|Error:/];
const ESCAPES = /\x1b\[[0-9;?]*[A-Za-z]|\r(?!\n)/g;
const CONTROLS = /[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]/g;

const part = (name) => document.getElementById(`log-${name}`);

export class Logs {
  constructor(job) {
    this.job = job;
    this.box = document.getElementById("log");
    this.lines = []; // {text, level}
    this.unread = 0;
    for (const [name, usual] of [["source", ""], ["attempt", part("attempt").options[0]?.value ?? ""], ["level", "0"]]) {
      const select = part(name);
      select.value = recall(name, usual);
      if (select.selectedIndex < 0) select.value = usual;
      select.addEventListener("change", () => {
        remember(name, select.value, usual);
        if (name === "level") this.#render();
        else this.open();
      });
    }
    part("search").value = recall("find", "");
    part("search").addEventListener("input", () => (remember("find", part("search").value, ""), this.#render()));
    part("tools").addEventListener("submit", (event) => event.preventDefault());
    part("wrap").addEventListener("change", () => this.box.classList.toggle("unwrapped", !part("wrap").checked));
    part("new").addEventListener("click", () => this.#toEnd());
    part("earlier").addEventListener("click", () => this.#earlier());
    part("download").addEventListener("click", () => this.#download());
    this.box.addEventListener("scroll", () => this.#atEnd() && this.unread && this.#toEnd());
  }

  // Reads what is chosen from its end on, and follows it.
  async open() {
    this.reading?.abort();
    const reading = (this.reading = new AbortController());
    Object.assign(this, { lines: [], unread: 0, rest: "", start: 0 });
    this.box.replaceChildren();
    if (!part("attempt").value) return this.#note("It has not been started yet: there is no log.");
    this.#note("Loading …");
    try {
      const { text, from, end } = await this.#read({ offset: -CHUNK, limit: CHUNK }, reading.signal);
      this.start = from;
      this.#add(from ? text.slice(text.indexOf("\n") + 1) : text);
      this.#note(this.lines.length ? "" : "Nothing has been printed yet.");
      part("earlier").hidden = !from;
      this.#toEnd();
      await this.#follow(end, reading.signal);
    } catch (error) {
      if (error.name === "AbortError") return;
      this.#note(error.message);
      const mayCome = document.getElementById("job").dataset.final === "0";
      if (mayCome) setTimeout(() => reading.signal.aborted || this.open(), AGAIN_MS);
    }
  }

  #address(asked) {
    const query = new URLSearchParams({ attempt: part("attempt").value, ...asked });
    if (part("source").value) query.set("rank", part("source").value);
    return `/v1/jobs/${this.job}/logs?${query}`;
  }
  async #fetch(asked, signal) {
    const answer = await fetch(this.#address(asked), { signal });
    if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).detail ?? `The service answered ${answer.status}.`);
    return answer;
  }
  async #read(asked, signal) {
    const answer = await this.#fetch(asked, signal), content = await answer.arrayBuffer();
    const end = Number(answer.headers.get("X-Log-Offset"));
    return { text: new TextDecoder().decode(content), from: end - content.byteLength, end, size: Number(answer.headers.get("X-Log-Size")), content };
  }
  async #follow(offset, signal) {
    const decoder = new TextDecoder();
    while (!signal.aborted) {
      try {
        const answer = await this.#fetch({ follow: "true", offset }, signal), reader = answer.body.getReader();
        for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
          offset += piece.value.byteLength;
          this.#add(decoder.decode(piece.value, { stream: true }));
          this.#note("");
        }
        return this.#note("The attempt has ended.");
      } catch (error) {
        if (signal.aborted || error.name === "AbortError") return;
        this.#note(`${error.message} Trying again …`);
        await new Promise((go) => setTimeout(go, AGAIN_MS));
      }
    }
  }

  #add(text) {
    const [first, ...more] = text.split("\n"), whole = [(this.rest ?? "") + first, ...more];
    this.rest = whole.pop();
    if (!whole.length) return;
    const fresh = this.#graded(whole, this.lines.at(-1)?.level ?? 1);
    this.lines = [...this.lines, ...fresh].slice(-KEPT);
    if (!this.#atEnd()) {
      this.unread += fresh.filter((line) => this.#wanted(line)).length;
      part("new").textContent = `${this.unread} new line${this.unread > 1 ? "s" : ""} ↓`;
      part("new").hidden = !this.unread;
      return;
    }
    this.box.append(...fresh.filter((line) => this.#wanted(line)).map((line) => this.#drawn(line)));
    while (this.box.childElementCount > SHOWN) this.box.firstChild.remove();
    this.#count();
    this.box.scrollTop = this.box.scrollHeight;
  }
  // A line without a level goes with the one before it: tracebacks have many.
  #graded(texts, level) {
    return texts.map((raw) => {
      const text = raw.replace(ESCAPES, "").replace(/\r$/, "").replace(CONTROLS, (char) => (char === "\t" ? char : "␦"));
      const said = LEVELS.findLastIndex((each, i) => i > 0 && each.test(text));
      if (said > 0) level = said;
      else if (!/^\s/.test(text)) level = 1;
      return { text, level };
    });
  }
  #wanted({ text, level }) {
    const find = part("search").value.toLowerCase();
    return level >= Number(part("level").value) && (!find || text.toLowerCase().includes(find));
  }
  #drawn({ text, level }) {
    const row = el("div", { className: ["", "", "warn", "bad"][level] }), find = part("search").value.toLowerCase();
    if (level > 1) row.append(el("span", { className: "sign", textContent: level > 2 ? "✖ " : "! " }));
    const at = find ? text.toLowerCase().indexOf(find) : -1;
    if (at < 0) row.append(text || " ");
    else row.append(text.slice(0, at), el("mark", { textContent: text.slice(at, at + find.length) }), text.slice(at + find.length));
    return row;
  }
  #render() {
    const shown = this.lines.filter((line) => this.#wanted(line)).slice(-SHOWN);
    this.box.replaceChildren(...shown.map((line) => this.#drawn(line)));
    this.#count();
    this.unread = 0;
    part("new").hidden = true;
    this.box.scrollTop = this.box.scrollHeight;
  }
  #count() {
    const narrowed = part("search").value || part("level").value !== "0";
    part("found").textContent = narrowed ? `${this.box.childElementCount} of ${this.lines.length} lines` : "";
  }
  #atEnd() {
    return this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < 30;
  }
  #toEnd() {
    if (this.unread || !this.box.childElementCount) this.#render();
    this.box.scrollTop = this.box.scrollHeight;
  }
  #note(text) {
    part("note").textContent = text;
  }

  async #earlier() {
    const from = Math.max(0, this.start - CHUNK), limit = this.start - from;
    if (!limit) return;
    const { text } = await this.#read({ offset: from, limit }, this.reading.signal).catch((error) => (say(error.message), { text: null }));
    if (text === null) return;
    const cut = from ? text.indexOf("\n") + 1 : 0, high = this.box.scrollHeight;
    this.start = from;
    this.lines = [...this.#graded(text.slice(cut).replace(/\n$/, "").split("\n"), 1), ...this.lines].slice(0, KEPT);
    part("earlier").hidden = !from;
    this.#render();
    this.box.scrollTop = this.box.scrollHeight - high;
  }
  async #download() {
    const pieces = [];
    try {
      for (let offset = 0, size = 1; offset < size; ) {
        const read = await this.#read({ offset, limit: 1 << 20 });
        if (!read.content.byteLength) break;
        pieces.push(read.content);
        [offset, size] = [read.end, read.size];
      }
      const source = part("source").value;
      download(`${this.job}-a${part("attempt").value}-${source ? `rank${source}` : "driver"}.log`, new Blob(pieces, { type: "text/plain" }));
    } catch (error) {
      say(error.message);
      this.#note(error.message);
    }
  }
}
