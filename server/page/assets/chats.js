// Conversations and settings, kept in this browser.

const STORE = "efficientllm.chats";
const BEFORE = "efficientllm.chat"; // one conversation, until there were several
const MOST = 100;

function fresh() {
  return { id: crypto.randomUUID?.() ?? String(Math.random()), messages: [], changed: Date.now() };
}

function isChat(chat) {
  return typeof chat?.id === "string" && Array.isArray(chat.messages);
}

export class Chats {
  constructor() {
    let stored = null;
    try { stored = JSON.parse(localStorage.getItem(STORE)) ?? this.#before(); } catch { stored = null; }
    this.all = Array.isArray(stored?.all) ? stored.all.filter(isChat) : [];
    this.settings = stored?.settings ?? {};
    this.current = this.all.find((chat) => chat.id === stored?.current) ?? this.begin();
  }

  #before() {
    const old = JSON.parse(localStorage.getItem(BEFORE));
    if (!Array.isArray(old?.messages)) return null;
    const chat = { ...fresh(), messages: old.messages };
    return { all: [chat], current: chat.id, settings: { ...old.settings, model: old.model } };
  }

  // Another conversation, or the current one where nothing is in it yet.
  begin() {
    if (!this.current || this.current.messages.length) {
      this.current = fresh();
      this.all.unshift(this.current);
    }
    return this.current;
  }

  open(id) {
    this.current = this.all.find((chat) => chat.id === id) ?? this.current;
  }

  remove(id) {
    this.all = this.all.filter((chat) => chat.id !== id);
    if (this.current.id === id) { this.current = this.all[0]; this.current ?? this.begin(); }
  }

  isKeptAs(key) {
    return key === STORE;
  }

  // What another tab has written: all conversations but the current one, which is this tab's.
  readOthers() {
    let stored = null;
    try { stored = JSON.parse(localStorage.getItem(STORE)); } catch { return; }
    if (!Array.isArray(stored?.all)) return;
    const others = stored.all.filter((chat) => isChat(chat) && chat.id !== this.current.id);
    this.all = [this.current, ...others].sort((one, other) => (other.changed ?? 0) - (one.changed ?? 0));
  }

  // False where the browser has no room for it.
  save() {
    this.all = this.all.filter((chat) => chat === this.current || chat.messages.length).slice(0, MOST);
    try {
      localStorage.setItem(STORE, JSON.stringify({ all: this.all, current: this.current.id, settings: this.settings }));
      return true;
    } catch { return false; }
  }
}

export function titleOf(chat) {
  return chat.messages[0]?.content.trim().split("\n")[0].slice(0, 60) || "New chat";
}
