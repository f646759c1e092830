// Curves of several jobs, one picture for each metric.
import { ask, say } from "./api.js";
import { Chart } from "./chart.js";

const METRICS = { loss: "Loss", train_accuracy: "Training accuracy", learning_rate: "Learning rate", step_seconds: "Seconds per step" };
const place = document.getElementById("curves");
const jobs = JSON.parse(place.dataset.jobs);

try {
  const found = await Promise.all(jobs.map((id) => ask(`/v1/jobs/${id}/metrics`)));
  for (const [metric, title] of Object.entries(METRICS)) {
    const lines = found.map(({ data }, i) => ({ label: jobs[i], x: data.map((row) => row.step), y: data.map((row) => row[metric] ?? null) }));
    new Chart(place, { title, smooth: metric === "loss" ? 0.8 : 0 }).set(lines);
  }
} catch (error) {
  say(error.message);
  place.textContent = error.message;
}
