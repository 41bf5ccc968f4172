// The chat page: shows the current conversation and asks for answers to it.

import { chatEvents, modelNames, residentBytes } from "./api.js";
import { Chats, titleOf } from "./chats.js";
import { markdown } from "./markdown.js";

const byId = (id) => document.getElementById(id);
const SETTINGS = ["system", "temperature", "top_p", "max_tokens", "repetition_penalty", "seed"];
const NUMBERS = SETTINGS.slice(1);
const FOLLOW = 48; // pixels above the end within which the view follows an answer
const chats = new Chats();
const isTouch = matchMedia("(pointer: coarse)").matches;
let running = null; // { chat, controller } of the answer that is being written
let editing = null; // { chat, index } of the question that is being changed; what follows goes when it is asked

function save() {
  chats.settings = { ...Object.fromEntries(SETTINGS.map((id) => [id, byId(id).value])), model: byId("model").value };
  if (!chats.save()) byId("figures").textContent = "the browser's storage is full: this conversation is not kept";
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
  return log.scrollHeight - log.scrollTop - log.clientHeight < FOLLOW;
}

// Make a change; the view goes on showing the end where it did, and stays where it is otherwise.
function following(change) {
  const follows = isAtEnd();
  change();
  if (follows) byId("log").scrollTop = byId("log").scrollHeight;
}

function block(role) {
  const node = document.createElement("div");
  node.className = `message ${role}`;
  const text = document.createElement("div");
  text.className = "text";
  node.append(text);
  byId("log").querySelector(".empty")?.remove();
  byId("log").append(node);
  return node;
}

function fill(node, message) {
  const text = node.querySelector(".text");
  if (message.role !== "assistant") { text.textContent = message.content; return; }
  text.replaceChildren(...markdown(message.content));
  for (const code of text.querySelectorAll("pre")) {
    const source = code.textContent;
    code.prepend(button("Copy", "Copy this code", (node) => copy(source, node)));
  }
}

function addTools(node, message, index) {
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
  following(() => { block("error").querySelector(".text").textContent = message; });
}

function redraw(toEnd = true) {
  const place = byId("log").scrollTop;
  byId("log").textContent = "";
  const { messages } = chats.current;
  if (!messages.length) {
    const node = block("empty");
    node.querySelector(".text").textContent = "Ask something. Everything stays on this machine.";
  }
  messages.forEach((message, index) => {
    const node = block(message.role);
    fill(node, message);
    if (running?.chat !== chats.current) addTools(node, message, index);
  });
  byId("log").scrollTop = toEnd ? byId("log").scrollHeight : place;
  listChats();
}

function listChats() {
  byId("chats").replaceChildren(...chats.all.map((chat) => {
    const row = document.createElement("div");
    const title = button(titleOf(chat), titleOf(chat), () => leaveTo(() => chats.open(chat.id)));
    title.className = "title";
    if (chat === chats.current) title.setAttribute("aria-current", "true");
    const away = button("×", `Delete "${titleOf(chat)}"`, () => leaveTo(() => chats.remove(chat.id)));
    away.setAttribute("aria-label", away.title);
    row.append(title, away);
    return row;
  }));
}

// Go to another conversation; an answer that is being written ends there, and what it has stays where it belongs.
function leaveTo(change) {
  stop();
  leaveEditing();
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
  byId("figures").textContent = "changing an earlier question: what follows it goes when it is sent, Esc leaves it as it was";
  byId("question").focus();
}

function leaveEditing() {
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

// What an answer has taken, in words.
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

// Ask for an answer to the current conversation; where none comes, `undo` makes it what it was. `chat` is its own: the page
// may show another one before it is whole.
async function answer(undo) {
  const chat = chats.current;
  const mine = running = { chat, controller: new AbortController() };
  byId("send").disabled = true;
  byId("stop").disabled = false;
  byId("status").textContent = "Answering";
  const message = { role: "assistant", content: "" };
  const node = block("assistant");
  const figures = new Figures();
  let drawing = 0;
  const draw = () => { drawing = 0; following(() => fill(node, message)); byId("figures").textContent = String(figures); };
  byId("log").scrollTop = byId("log").scrollHeight;
  let error = null;
  try {
    for await (const event of chatEvents(requestFor(chat), byId("key").value, mine.controller.signal)) {
      if (event.usage) figures.usage = event.usage;
      const piece = event.choices[0]?.delta.content;
      if (!piece) continue;
      figures.piece();
      message.content += piece;
      drawing ||= requestAnimationFrame(draw);
    }
  } catch (caught) {
    if (caught.name !== "AbortError") error = caught;
  }
  cancelAnimationFrame(drawing);
  message.figures = String(figures);
  if (message.content) chat.messages.push(message);
  else undo();
  if (running === mine) stop();
  await settle(chat, message, error);
}

// After an answer: keep it, and show how it went if its conversation is still on the page.
async function settle(chat, message, error) {
  chat.changed = Date.now();
  if (chat === chats.current) {
    redraw(!message.content || isAtEnd());
    if (error) refuse(error);
    byId("status").textContent = message.content ? "The answer is there" : "No answer";
  }
  save();
  const bytes = await residentBytes(byId("key").value).catch(() => 0);
  if (!running) byId("figures").textContent = [message.figures, bytes ? `${(bytes / 1e6).toFixed(0)} MB resident` : ""].filter(Boolean).join(", ");
}

function refuse(error) {
  if (error.status === 401) { byId("panel").open = true; byId("key").focus(); }
  showError(error.message + (error.status === 401 ? ": give it under Settings" : ""));
}

async function start(preferred) {
  try {
    const names = await modelNames(byId("key").value);
    byId("model").replaceChildren(...names.map((name) => new Option(name, name)));
    if (names.includes(preferred)) byId("model").value = preferred;
  } catch (error) { refuse(error); }
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
  if (event.key === "Escape") { leaveEditing(); running?.controller.abort(); }
  if (event.key.toLowerCase() === "k" && event.ctrlKey && event.shiftKey) { event.preventDefault(); byId("new").click(); }
});
byId("stop").addEventListener("click", () => running?.controller.abort());
byId("new").addEventListener("click", () => leaveTo(() => chats.begin()));
byId("list").addEventListener("click", () => openList(!byId("chats").classList.contains("open")));
byId("key").addEventListener("change", () => start(byId("model").value));
byId("settings").addEventListener("submit", (event) => event.preventDefault());
addEventListener("storage", (event) => { if (chats.isKeptAs(event.key)) { chats.readOthers(); listChats(); } });
for (const id of [...SETTINGS, "model"]) byId(id).addEventListener("change", save);

byId("question").placeholder = isTouch ? "Message" : "Message (Enter sends, Shift+Enter begins a line, Esc stops)";
for (const id of SETTINGS) if (chats.settings[id] !== undefined) byId(id).value = chats.settings[id];
redraw();
start(chats.settings.model);
byId("question").focus();
