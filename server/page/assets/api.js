// Client of the server's API.

export class RequestError extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function request(path, key, options = {}) {
  const headers = { ...(options.body ? { "Content-Type": "application/json" } : {}), ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    throw error.name === "AbortError" ? error : new RequestError(0, "The server does not answer. Check that it is running.");
  });
  if (response.ok) return response;
  let text = `The server refused the request: ${response.status} ${response.statusText}`;
  try { text = (await response.json()).error.message; } catch { /* not JSON: the status is the message */ }
  throw new RequestError(response.status, text);
}

export async function modelNames(key) {
  return (await (await request("v1/models", key)).json()).data.map((model) => model.id);
}

export async function residentBytes(key) {
  return (await (await request("health", key)).json()).rss_bytes ?? 0;
}

// Yield the data of each server-sent event. A line ends with CR, LF or both; comments and other fields are skipped.
async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "", data = [], endsWithCR = false;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (unread + (endsWithCR ? value.replace(/^\n/, "") : value)).split(/\r\n|\n|\r/);
    endsWithCR = value.endsWith("\r"); // which may be half of a CRLF
    unread = lines.pop();
    for (const line of lines) {
      const [, field, text] = /^([^:]*)(?:: ?(.*))?$/s.exec(line);
      if (field === "data") data.push(text ?? "");
      if (line || !data.length) continue;
      yield data.join("\n");
      data = [];
    }
  }
}

// Yield the parsed events of a streamed answer. An answer that ends early or cannot be read is an error.
export async function* chatEvents(body, key, signal) {
  const response = await request("v1/chat/completions", key, { method: "POST", body: JSON.stringify(body), signal });
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new RequestError(0, event.error.message);
      yield event;
    }
  } catch (error) {
    if (error instanceof SyntaxError) throw new RequestError(0, "The server sent an answer that this page cannot read. Reload the page.");
    if (!(error instanceof TypeError)) throw error;
  }
  throw new RequestError(0, "The connection to the server broke before the answer was complete. Ask again.");
}
