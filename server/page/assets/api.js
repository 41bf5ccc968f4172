// The server's API as this page uses it.

export class Refusal extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function answered(path, key, options = {}) {
  const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  let text = `${response.status} ${response.statusText}`;
  try { text = (await response.json()).error.message; } catch { /* not JSON: the status must do */ }
  throw new Refusal(response.status, text);
}

export async function modelNames(key) {
  return (await (await answered("v1/models", key)).json()).data.map((model) => model.id);
}

export async function residentBytes(key) {
  return (await (await answered("health", key)).json()).rss_bytes ?? 0;
}

// The events of a streamed answer.
export async function* chatEvents(body, key, signal) {
  const response = await answered("v1/chat/completions", key, { method: "POST", body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const lines = rest.split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refusal(0, event.error.message);
      yield event;
    }
  }
}
