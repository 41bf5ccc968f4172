// Client of the server's API.

export class RequestError extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function request(path, key, options = {}) {
  const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  let text = `${response.status} ${response.statusText}`;
  try { text = (await response.json()).error.message; } catch { /* not JSON: the status is the message */ }
  throw new RequestError(response.status, text);
}

export async function modelNames(key) {
  return (await (await request("v1/models", key)).json()).data.map((model) => model.id);
}

export async function residentBytes(key) {
  return (await (await request("health", key)).json()).rss_bytes ?? 0;
}

// Yield the events of a streamed answer.
export async function* chatEvents(body, key, signal) {
  const response = await request("v1/chat/completions", key, { method: "POST", body: JSON.stringify(body), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    unread += value;
    const events = unread.split("\n\n");
    unread = events.pop();
    for (const text of events) {
      const data = text.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new RequestError(0, event.error.message);
      yield event;
    }
  }
}
