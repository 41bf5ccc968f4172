// The model's parts: downloaded one by one, compared with their hashes, kept by the browser, put together.
const CACHE = "efficientllm-model";
const PAUSES_MS = [0, 500, 2000, 8000];

const cacheOf = () => self.caches ? caches.open(CACHE) : null; // none outside secure contexts
const keyOf = (part) => `${part.file}?${part.sha256}`; // a new model under an old name is another file

async function sha256(blob) {
  if (!self.crypto?.subtle) return null;
  const digest = await crypto.subtle.digest("SHA-256", await blob.arrayBuffer());
  return Array.from(new Uint8Array(digest), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function fetchPart(part, onBytes) {
  const response = await fetch(part.file);
  if (!response.ok) throw new Error(`${part.file}: ${response.status} ${response.statusText}`);
  const chunks = [];
  let bytes = 0;
  for (const reader = response.body.getReader(); ;) {
    const { value, done } = await reader.read();
    if (done) break;
    chunks.push(value);
    bytes += value.length;
    onBytes(bytes);
  }
  const blob = new Blob(chunks);
  if (blob.size !== part.bytes) throw new Error(`${part.file} has ${blob.size} bytes, not ${part.bytes}`);
  const digest = await sha256(blob);
  if (digest && digest !== part.sha256) throw new Error(`${part.file} is not the file that was exported`);
  return blob;
}

async function fetchWithPatience(part, onBytes) {
  let failure = null;
  for (const pause of PAUSES_MS) {
    if (failure) onBytes(0, `${failure.message}; trying again`);
    await new Promise((resolve) => setTimeout(resolve, pause));
    try { return await fetchPart(part, onBytes); } catch (error) { failure = error; }
  }
  throw failure;
}

/** Whether every part is here already. */
export async function isKept(parts) {
  const cache = await cacheOf();
  if (!cache) return false;
  const found = await Promise.all(parts.map((part) => cache.match(keyOf(part))));
  return found.every(Boolean);
}

/** The whole file; onProgress(bytes, note) as it comes. What was downloaded before is not downloaded again. */
export async function download(parts, onProgress) {
  const cache = await cacheOf();
  const blobs = [];
  let before = 0;
  for (const part of parts) {
    const kept = await cache?.match(keyOf(part));
    let blob = kept ? await kept.blob() : null;
    if (blob?.size !== part.bytes) {
      blob = await fetchWithPatience(part, (bytes, note) => onProgress(before + bytes, note));
      try { await cache?.put(keyOf(part), new Response(blob)); } catch { /* no room: it works this once */ }
    }
    blobs.push(blob);
    before += part.bytes;
    onProgress(before);
  }
  if (cache) await dropOthers(cache, parts);
  await navigator.storage?.persist?.().catch(() => false);
  return new Blob(blobs);
}

async function dropOthers(cache, parts) {
  const wanted = new Set(parts.map((part) => new URL(keyOf(part), document.baseURI).href));
  const folder = new URL(".", document.baseURI).href;
  for (const request of await cache.keys()) {
    if (request.url.startsWith(folder) && !wanted.has(request.url)) await cache.delete(request);
  }
}

/** Delete what was downloaded; whether there was anything. */
export async function forget() {
  return self.caches ? caches.delete(CACHE) : false;
}
