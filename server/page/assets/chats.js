// Conversations and settings, stored in the browser.

const STORAGE_KEY = "efficientllm.chats";
const OLD_STORAGE_KEY = "efficientllm.chat"; // from versions that stored one conversation
const MAX_CHATS = 100;

function newChat() {
  return { id: crypto.randomUUID?.() ?? String(Math.random()), messages: [], changed: Date.now() };
}

function isChat(chat) {
  return typeof chat?.id === "string" && Array.isArray(chat.messages);
}

export class Chats {
  constructor() {
    let stored = null;
    try { stored = JSON.parse(localStorage.getItem(STORAGE_KEY)) ?? this.#readOld(); } catch { stored = null; }
    this.all = Array.isArray(stored?.all) ? stored.all.filter(isChat) : [];
    this.settings = stored?.settings ?? {};
    this.current = this.all.find((chat) => chat.id === stored?.current) ?? this.begin();
  }

  #readOld() {
    const old = JSON.parse(localStorage.getItem(OLD_STORAGE_KEY));
    if (!Array.isArray(old?.messages)) return null;
    const chat = { ...newChat(), messages: old.messages };
    return { all: [chat], current: chat.id, settings: { ...old.settings, model: old.model } };
  }

  // Start a conversation, unless the current one is empty.
  begin() {
    if (!this.current || this.current.messages.length) {
      this.current = newChat();
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

  isStoredUnder(key) {
    return key === STORAGE_KEY;
  }

  // Read the conversations that another tab has written, except the current one of this tab.
  readOthers() {
    let stored = null;
    try { stored = JSON.parse(localStorage.getItem(STORAGE_KEY)); } catch { return; }
    if (!Array.isArray(stored?.all)) return;
    const others = stored.all.filter((chat) => isChat(chat) && chat.id !== this.current.id);
    this.all = [this.current, ...others].sort((one, other) => (other.changed ?? 0) - (one.changed ?? 0));
  }

  // Return false if the browser's storage is full.
  save() {
    this.all = this.all.filter((chat) => chat === this.current || chat.messages.length).slice(0, MAX_CHATS);
    try {
      localStorage.setItem(STORAGE_KEY, JSON.stringify({ all: this.all, current: this.current.id, settings: this.settings }));
      return true;
    } catch { return false; }
  }
}

export function titleOf(chat) {
  return chat.messages[0]?.content.trim().split("\n")[0].slice(0, 60) || "New chat";
}
