// A chat with the model of this folder. Nothing is sent anywhere: the page asks its own folder for files, and that is all.
import { download, forget, isKept } from "./parts.js";
import { Wllama, LoggerWithoutDebug } from "./wllama.js";

const byId = (id) => document.getElementById(id);
const STORE = `efficientllm.web${location.pathname}`;
const SETTINGS = ["system", "temperature", "top_p", "repetition_penalty", "max_tokens", "seed", "threads", "processor"];
const ALL_LAYERS = 99999;
let model = null; // model.json
let engine = null; // Wllama with the model in it
let messages = [];
let running = null;

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
const say = (text) => { byId("state").textContent = text; };

function remember() {
  const settings = Object.fromEntries(SETTINGS.map((id) => [id, byId(id).value]));
  try { localStorage.setItem(STORE, JSON.stringify({ messages, settings })); } catch { /* a private window keeps nothing */ }
}

function recall() {
  for (const [id, value] of Object.entries(model.defaults)) byId(id).value = value;
  let stored = null;
  try { stored = JSON.parse(localStorage.getItem(STORE)); } catch { stored = null; }
  if (Array.isArray(stored?.messages)) messages = stored.messages;
  for (const id of SETTINGS) if (stored?.settings?.[id] !== undefined) byId(id).value = stored.settings[id];
}

function show(role, text) {
  const block = document.createElement("div");
  block.className = role;
  block.textContent = text;
  byId("log").append(block);
  block.scrollIntoView({ block: "end" });
  return block;
}

function redraw() {
  byId("log").textContent = "";
  for (const message of messages) show(message.role, message.content);
}

function number(id) {
  const value = byId(id).valueAsNumber;
  return Number.isNaN(value) ? undefined : value;
}

async function hasGpu() {
  if (byId("processor").value === "cpu" || !navigator.gpu) return false;
  try { return Boolean(await navigator.gpu.requestAdapter()); } catch { return false; }
}

async function open(blob, layers) {
  const wllama = new Wllama({ default: "wllama.wasm" }, { logger: LoggerWithoutDebug, suppressNativeLog: true });
  const here = (name) => new URL(name, document.baseURI).href;
  wllama.setCompat({ worker: here("wllama-compat.js"), wasm: here("wllama-compat.wasm") });
  const threads = self.crossOriginIsolated ? number("threads") ?? 1 : 1; // they share memory, which only isolated pages may
  const options = { n_ctx: model.context, n_threads: threads, n_parallel: 1, n_gpu_layers: layers, warmup: false };
  try { await wllama.loadModel([blob], options); } catch (error) { await wllama.exit(); throw error; }
  return wllama;
}

async function load() {
  byId("load").hidden = true;
  byId("progress").hidden = false;
  try {
    const total = model.parts.reduce((sum, part) => sum + part.bytes, 0);
    const blob = await download(model.parts, (bytes, note) => {
      byId("progress").value = bytes / total;
      say(note || `${megabytes(bytes)} of ${megabytes(total)}`);
    });
    byId("progress").removeAttribute("value");
    say("starting");
    const onGpu = await hasGpu();
    const began = performance.now();
    try { engine = await open(blob, onGpu ? ALL_LAYERS : 0); } catch (error) {
      if (!onGpu) throw error;
      engine = await open(blob, 0);
    }
    byId("figures").textContent = `loaded in ${((performance.now() - began) / 1000).toFixed(1)} s`;
    byId("loading").hidden = true;
    for (const id of ["question", "send", "check"]) byId(id).disabled = false;
    byId("question").focus();
  } catch (error) {
    byId("progress").hidden = true;
    byId("load").hidden = false;
    byId("load").textContent = "Try again";
    say(`${error.message}; what was downloaded is kept`);
  }
}

function sampling() {
  return {
    temperature: number("temperature"), top_p: number("top_p"), repeat_penalty: number("repetition_penalty"),
    max_tokens: number("max_tokens"), seed: number("seed") ?? Math.floor(Math.random() * 2 ** 31),
    top_k: 0, min_p: 0,
  };
}

async function figuresOf(timings, first) {
  const parts = [];
  if (first) parts.push(`first token ${Math.round(first)} ms`);
  if (timings?.predicted_n) parts.push(`${timings.predicted_per_second.toFixed(1)} tokens/s, ${timings.predicted_n} tokens`);
  if (timings?.prompt_n) parts.push(`read at ${timings.prompt_per_second.toFixed(0)} tokens/s`);
  if (self.crossOriginIsolated && performance.measureUserAgentSpecificMemory) {
    byId("figures").textContent = parts.join(", ");
    const waited = new Promise((resolve) => setTimeout(resolve, 5000, null)); // it may take until the next collection
    const memory = await Promise.race([performance.measureUserAgentSpecificMemory().catch(() => null), waited]);
    if (memory) parts.push(`${megabytes(memory.bytes)} in use`);
  }
  return parts.join(", ");
}

async function ask(text) {
  messages.push({ role: "user", content: text });
  show("user", text);
  const block = show("assistant", "");
  const system = byId("system").value.trim();
  const conversation = [...(system ? [{ role: "system", content: system }] : []), ...messages];
  running = new AbortController();
  byId("send").disabled = true;
  byId("stop").disabled = false;
  const began = performance.now();
  let answer = "", first = 0, timings = null;
  const take = (chunk) => {
    timings = chunk.timings ?? timings;
    const piece = chunk.choices?.[0]?.delta?.content;
    if (!piece) return;
    first ||= performance.now() - began;
    answer += piece;
    block.textContent = answer;
    block.scrollIntoView({ block: "end" });
  };
  try {
    await engine.createChatCompletion({
      messages: conversation, ...sampling(), stream: true, timings_per_token: true, cache_prompt: true,
      onData: take, abortSignal: running.signal,
    });
  } catch (error) {
    if (error.name !== "AbortError") show("error", error.message);
  }
  running = null;
  byId("send").disabled = false;
  byId("stop").disabled = true;
  if (answer) messages.push({ role: "assistant", content: answer });
  else { messages.pop(); block.remove(); byId("question").value ||= text; }
  remember();
  byId("figures").textContent = await figuresOf(timings, first);
}

async function greedy(count, prompt = model.check.prompt) {
  const answer = await engine.createCompletion({
    prompt, max_tokens: count, temperature: 0, top_k: 1, repeat_penalty: 1,
    cache_prompt: false,
  });
  return { text: answer.choices[0].text, timings: answer.timings };
}

async function check() {
  byId("check").disabled = true;
  byId("verdict").textContent = "asking";
  const expected = model.check.text;
  try {
    const { text } = await greedy(model.check.tokens.length);
    let same = 0;
    while (same < expected.length && text[same] === expected[same]) same += 1;
    byId("verdict").textContent = same === expected.length
      ? `${model.check.tokens.length} greedy tokens as on the machine that exported it`
      : `differs after ${same} of ${expected.length} characters: ${JSON.stringify(text.slice(same, same + 20))}`;
  } catch (error) { byId("verdict").textContent = error.message; }
  byId("check").disabled = false;
}

function notes() {
  const texts = [];
  if (!self.isSecureContext) texts.push("not kept for offline use: that needs HTTPS or this machine's own address");
  if (!self.crossOriginIsolated) texts.push("one thread: the server sends no COOP and COEP headers");
  byId("notes").textContent = texts.join("; ");
}

async function start() {
  notes();
  navigator.serviceWorker?.register("sw.js").catch(() => {});
  try { model = await (await fetch("model.json")).json(); } catch {
    say("model.json cannot be read: is the folder whole?");
    return;
  }
  const total = model.parts.reduce((sum, part) => sum + part.bytes, 0);
  document.title = model.name;
  byId("name").textContent = model.name;
  byId("about").textContent = `${(model.parameters / 1e6).toFixed(1)}M parameters, ${model.quantization}, ${megabytes(total)}`;
  recall();
  redraw();
  byId("load").addEventListener("click", load);
  byId("load").disabled = false; // only now: a click before the model is known would be lost
  if (await isKept(model.parts)) await load();
  else byId("offer").textContent = `${megabytes(total)} are downloaded once and kept. Everything you write stays on this device.`;
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("question").value.trim();
  if (!text || running || !engine) return;
  byId("question").value = "";
  ask(text);
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); byId("ask").requestSubmit(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
byId("stop").addEventListener("click", () => running?.abort());
byId("new").addEventListener("click", () => { running?.abort(); messages = []; remember(); redraw(); });
byId("check").addEventListener("click", check);
byId("forget").addEventListener("click", async () => { byId("verdict").textContent = await forget() ? "deleted" : "there was none"; });
for (const id of SETTINGS) byId(id).addEventListener("change", remember);

self.efficientllm = { greedy }; // for tests and for the curious
start();
