// Keeps the page for use offline. What is kept changes with VERSION, which is a hash over the exported folder.
"use strict";
const VERSION = "@VERSION@";
const SHELL = "@SHELL@".split(" ");
const CACHE = `efficientllm-shell-${VERSION}`;

self.addEventListener("install", (event) => {
  const fresh = SHELL.map((name) => new Request(name, { cache: "reload" }));
  event.waitUntil(caches.open(CACHE).then((cache) => cache.addAll(fresh)).then(() => self.skipWaiting()));
});

self.addEventListener("activate", (event) => {
  const isOld = (name) => name.startsWith("efficientllm-shell-") && name !== CACHE;
  event.waitUntil(caches.keys()
    .then((names) => Promise.all(names.filter(isOld).map((name) => caches.delete(name))))
    .then(() => self.clients.claim()));
});

async function answer(request) {
  const cache = await caches.open(CACHE);
  const kept = await cache.match(request.mode === "navigate" ? "./" : request, { ignoreSearch: true });
  if (kept) return kept;
  const response = await fetch(request);
  // what only some browsers need is kept by those that asked for it
  if (response.ok && response.status === 200) await cache.put(request, response.clone());
  return response;
}

self.addEventListener("fetch", (event) => {
  const { request } = event;
  const isOurs = request.method === "GET" && new URL(request.url).origin === self.location.origin;
  // the page keeps the model's parts itself: they outlive a new version of the page
  if (isOurs && !request.url.endsWith(".part")) event.respondWith(answer(request));
});
