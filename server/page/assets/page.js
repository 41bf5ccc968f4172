// The chat page: show the current conversation and request answers.

import { chatEvents, modelNames, residentBytes } from "./api.js";
import { Chats, titleOf } from "./chats.js";
import { markdown } from "./markdown.js";

const byId = (id) => document.getElementById(id);
const SETTINGS = ["system", "temperature", "top_p", "max_tokens", "repetition_penalty", "seed"];
const NUMBERS = SETTINGS.slice(1);
const FOLLOW_PIXELS = 48; // the view follows an answer if it is this close to the end
const chats = new Chats();
const isTouch = matchMedia("(pointer: coarse)").matches;
let running = null; // { chat, controller } of the answer in progress
let editing = null; // { chat, index } of the question being edited; sending it removes the messages after it

function save() {
  chats.settings = { ...Object.fromEntries(SETTINGS.map((id) => [id, byId(id).value])), model: byId("model").value };
  if (!chats.save()) byId("figures").textContent = "The browser's storage is full: this conversation is not saved.";
}

function button(label, title, act) {
  const node = document.createElement("button");
  node.type = "button";
  node.textContent = label;
  node.title = title;
  node.addEventListener("click", () => act(node));
  return node;
}

async function copy(text, node) {
  const label = node.textContent;
  try { await navigator.clipboard.writeText(text); node.textContent = "Copied"; } catch { node.textContent = "Not allowed"; }
  setTimeout(() => { node.textContent = label; }, 1500);
}

function isAtEnd() {
  const log = byId("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < FOLLOW_PIXELS;
}

// Change the log. The view stays at the end if it was there, and does not move otherwise.
function keepView(change) {
  const follows = isAtEnd();
  change();
  if (follows) byId("log").scrollTop = byId("log").scrollHeight;
}

function addMessage(role) {
  const node = document.createElement("div");
  node.className = `message ${role}`;
  const text = document.createElement("div");
  text.className = "text";
  node.append(text);
  byId("log").querySelector(".empty")?.remove();
  byId("log").append(node);
  return node;
}

function showContent(node, message) {
  const text = node.querySelector(".text");
  if (message.role !== "assistant") { text.textContent = message.content; return; }
  text.replaceChildren(...(message.reasoning ? [reasoningOf(message)] : []), ...markdown(message.content));
  for (const code of text.querySelectorAll("pre")) {
    const source = code.textContent;
    code.prepend(button("Copy", "Copy this code", (node) => copy(source, node)));
  }
}

function addButtons(node, message, index) {
  const tools = document.createElement("div");
  tools.className = "tools";
  tools.append(button("Copy", "Copy this message", (clicked) => copy(message.content, clicked)));
  const isLast = index === chats.current.messages.length - 1;
  if (message.role === "user") tools.append(button("Edit", "Change this question and ask again", () => edit(index)));
  else if (isLast) tools.append(button("Regenerate", "Answer again", () => regenerate(index)));
  if (message.figures) tools.append(message.figures);
  node.append(tools);
}

function showError(message) {
  keepView(() => { addMessage("error").querySelector(".text").textContent = message; });
}

function redraw(toEnd = true) {
  const scrollTop = byId("log").scrollTop;
  byId("log").textContent = "";
  const { messages } = chats.current;
  if (!messages.length) {
    const node = addMessage("empty");
    node.querySelector(".text").textContent = "Ask something. Everything stays on this machine.";
  }
  messages.forEach((message, index) => {
    const node = addMessage(message.role);
    showContent(node, message);
    if (running?.chat !== chats.current) addButtons(node, message, index);
  });
  byId("log").scrollTop = toEnd ? byId("log").scrollHeight : scrollTop;
  listChats();
}

// Reasoning is plain text, open until the answer begins.
function reasoningOf(message) {
  const node = document.createElement("details");
  const title = document.createElement("summary");
  title.textContent = "Reasoning";
  node.open = !message.content;
  node.append(title, message.reasoning);
  return node;
}

function listChats() {
  byId("chats").replaceChildren(...chats.all.map((chat) => {
    const row = document.createElement("div");
    const title = button(titleOf(chat), titleOf(chat), () => switchChat(() => chats.open(chat.id)));
    title.className = "title";
    if (chat === chats.current) title.setAttribute("aria-current", "true");
    const away = button("×", `Delete "${titleOf(chat)}"`, () => switchChat(() => chats.remove(chat.id)));
    away.setAttribute("aria-label", away.title);
    row.append(title, away);
    return row;
  }));
}

// Change to another conversation. An answer in progress ends, and its text stays in its conversation.
function switchChat(change) {
  stop();
  cancelEditing();
  change();
  save();
  redraw();
  openList(false);
  byId("question").focus();
}

function openList(isOpen) {
  byId("chats").classList.toggle("open", isOpen);
  byId("list").setAttribute("aria-expanded", String(isOpen));
}

function edit(index) {
  if (running) return;
  editing = { chat: chats.current, index };
  byId("question").value = chats.current.messages[index].content;
  byId("figures").textContent = "Editing an earlier question: sending it removes the messages after it, Esc cancels";
  byId("question").focus();
}

function cancelEditing() {
  if (!editing) return;
  editing = null;
  byId("question").value = byId("figures").textContent = "";
}

function regenerate(index) {
  if (running) return;
  const chat = chats.current;
  const before = chat.messages.splice(index);
  redraw();
  answer(() => chat.messages.push(...before));
}

function number(id) {
  const value = byId(id).valueAsNumber;
  return Number.isNaN(value) ? undefined : value;
}

function requestFor(chat) {
  const system = byId("system").value.trim();
  const messages = chat.messages.map(({ role, content }) => ({ role, content }));
  return {
    model: byId("model").value,
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true, stream_options: { include_usage: true },
    ...Object.fromEntries(NUMBERS.map((id) => [id, number(id)])),
  };
}

function stop() {
  running?.controller.abort();
  running = null;
  byId("send").disabled = false;
  byId("stop").disabled = true;
}

// Times and token count of an answer.
class Figures {
  began = performance.now();
  first = 0;
  pieces = 0;
  usage = null;

  piece() {
    this.first ||= performance.now();
    this.pieces += 1;
  }

  toString() {
    if (!this.first) return "";
    const seconds = (performance.now() - this.first) / 1000;
    const tokens = this.usage?.completion_tokens ?? this.pieces;
    const speed = tokens > 1 && seconds > 0 ? ((tokens - 1) / seconds).toFixed(1) : "-";
    return `first token ${Math.round(this.first - this.began)} ms, ${speed} tokens/s, ${tokens} tokens`;
  }
}

// Request an answer to the current conversation. Without an answer, `undo` restores the conversation. The page may show
// another conversation before the answer is whole, so `chat` is kept.
async function answer(undo) {
  const chat = chats.current;
  const current = running = { chat, controller: new AbortController() };
  byId("send").disabled = true;
  byId("stop").disabled = false;
  byId("status").textContent = "Answering";
  const message = { role: "assistant", content: "", reasoning: "" };
  const node = addMessage("assistant");
  const figures = new Figures();
  let drawing = 0;
  const draw = () => { drawing = 0; keepView(() => showContent(node, message)); byId("figures").textContent = String(figures); };
  byId("log").scrollTop = byId("log").scrollHeight;
  let error = null;
  try {
    for await (const event of chatEvents(requestFor(chat), byId("key").value, current.controller.signal)) {
      if (event.usage) figures.usage = event.usage;
      const { content = "", reasoning_content: reasoning = "" } = event.choices[0]?.delta ?? {};
      if (!content && !reasoning) continue;
      figures.piece();
      message.content += content;
      message.reasoning += reasoning;
      drawing ||= requestAnimationFrame(draw);
    }
  } catch (caught) {
    if (caught.name !== "AbortError") error = caught;
  }
  cancelAnimationFrame(drawing);
  message.figures = String(figures);
  if (message.content) chat.messages.push(message);
  else undo();
  if (running === current) stop();
  await finish(chat, message, error);
}

// Save the conversation after an answer, and show the result if the conversation is still on the page.
async function finish(chat, message, error) {
  chat.changed = Date.now();
  if (chat === chats.current) {
    redraw(!message.content || isAtEnd());
    if (error) showRefusal(error);
    byId("status").textContent = message.content ? "Answer complete" : "No answer";
  }
  save();
  const bytes = await residentBytes(byId("key").value).catch(() => 0);
  if (!running) byId("figures").textContent = [message.figures, bytes ? `${(bytes / 1e6).toFixed(0)} MB resident` : ""].filter(Boolean).join(", ");
}

function showRefusal(error) {
  if (error.status === 401) { byId("panel").open = true; byId("key").focus(); }
  showError(error.message + (error.status === 401 ? ": enter it under Settings" : ""));
}

async function start(preferred) {
  try {
    const names = await modelNames(byId("key").value);
    byId("model").replaceChildren(...names.map((name) => new Option(name, name)));
    if (names.includes(preferred)) byId("model").value = preferred;
  } catch (error) { showRefusal(error); }
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = byId("question").value.trim();
  if (!content || running) return;
  byId("question").value = "";
  const chat = chats.current;
  const changed = editing?.chat === chat ? editing : null;
  const before = changed ? chat.messages.splice(changed.index) : [];
  editing = null;
  chat.messages.push({ role: "user", content });
  save();
  redraw();
  answer(() => {
    chat.messages.splice(-1, 1, ...before);
    if (chat !== chats.current) return;
    byId("question").value ||= content;
    editing = changed;
  });
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || isTouch) return;
  event.preventDefault();
  byId("ask").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") { cancelEditing(); running?.controller.abort(); }
  if (event.key.toLowerCase() === "k" && event.ctrlKey && event.shiftKey) { event.preventDefault(); byId("new").click(); }
});
byId("stop").addEventListener("click", () => running?.controller.abort());
byId("new").addEventListener("click", () => switchChat(() => chats.begin()));
byId("list").addEventListener("click", () => openList(!byId("chats").classList.contains("open")));
byId("key").addEventListener("change", () => start(byId("model").value));
byId("settings").addEventListener("submit", (event) => event.preventDefault());
addEventListener("storage", (event) => { if (chats.isStoredUnder(event.key)) { chats.readOthers(); listChats(); } });
for (const id of [...SETTINGS, "model"]) byId(id).addEventListener("change", save);

byId("question").placeholder = isTouch ? "Message" : "Message (Enter sends, Shift+Enter starts a line, Esc stops)";
for (const id of SETTINGS) if (chats.settings[id] !== undefined) byId(id).value = chats.settings[id];
redraw();
start(chats.settings.model);
byId("question").focus();
