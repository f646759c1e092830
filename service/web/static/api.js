// Calls of the API by the page's own cookie; an error is thrown with the sentence that the API gives.
export async function ask(path, { method = "GET", body = undefined, signal = undefined, text = false, key = undefined } = {}) {
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  if (key !== undefined) headers["Idempotency-Key"] = key;
  const answer = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  if (answer.ok) return text ? answer.text() : answer.json();
  if (answer.status === 401) location.assign(`/ui/sign-in?next=${encodeURIComponent(location.pathname + location.search)}`);
  const problem = await answer.json().catch(() => ({}));
  const error = new Error(problem.detail ?? `The service answered ${answer.status}.`);
  throw Object.assign(error, { status: answer.status, problem });
}

// Said to everybody: shown where there is room, and read out.
export function say(sentence) {
  document.getElementById("said").textContent = sentence;
}
