// The page's one live stream: what it hears is handed on by type; silence is shown.
const SILENT_MS = 5000;
const BACK_MS = [500, 8000]; // first and longest wait before a stream that has ended is opened again

// `on` maps a type of event ("metrics", "jobs", …) to a function of its data; "*" takes every event of the job.
export function live({ job = null, after = 0, on = {} }) {
  let heard = Date.now(), last = after, wait = BACK_MS[0], source = null;
  const banner = document.getElementById("stale");
  const types = new Set(["beat", "jobs", ...TYPES, ...Object.keys(on)]);
  types.delete("*");

  function open() {
    const asked = new URLSearchParams(job ? { job, after: last } : {});
    source = new EventSource(`/ui/live?${asked}`);
    for (const type of types) source.addEventListener(type, take);
    source.onerror = () => {
      if (source.readyState !== EventSource.CLOSED) return; // it tries again by itself
      setTimeout(open, wait * (0.5 + Math.random()));
      wait = Math.min(2 * wait, BACK_MS[1]);
    };
  }
  function take(message) {
    heard = Date.now();
    wait = BACK_MS[0];
    if (message.type === "beat") return;
    const data = JSON.parse(message.data);
    if (data.seq) {
      if (data.seq <= last) return; // sent again after a reconnection
      last = data.seq;
      on["*"]?.(data);
    }
    on[message.type]?.(data);
  }
  setInterval(() => {
    const silent = Date.now() - heard;
    banner.hidden = silent < SILENT_MS;
    banner.querySelector("span").textContent = `${Math.round(silent / 1000)} s`;
  }, 1000);
  addEventListener("pagehide", () => source.close());
  addEventListener("pageshow", (event) => event.persisted && open());
  open();
}

// Of a browser's stream only named types are heard; these are a job's and a sweep's.
const TYPES = [
  "job.created", "job.status", "phase", "attempt.lost", "plan.created", "plan.changed", "window", "metrics",
  "evaluation", "timeline", "data.skipped", "artifact.ready", "export.failed", "checkpoint.saved", "checkpoint.failed",
  "checkpoint.dropped", "checkpoint.resumed", "checkpoint.damaged", "ledger", "sweep.trial", "sweep.result", "outcome",
];
