// Keeps the page for visits without a network. While there is one, what it has is newer than what was kept.
const KEPT = "rn50-page";

self.addEventListener("install", (event) => {
    const keep = async () => {
        const {files} = await (await fetch("site.json")).json();
        const page = files.filter((file) => !file.endsWith(".gz"));
        await (await caches.open(KEPT)).addAll(["./", ...page].map((file) => new Request(file, {cache: "no-cache"})));
        await self.skipWaiting();
    };
    event.waitUntil(keep());
});

self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));

async function answer(request) {
    const cache = await caches.open(KEPT);
    let response;
    try {
        response = await fetch(request);
    } catch (problem) {
        const kept = await cache.match(request, {ignoreSearch: true});
        if (kept) return kept;
        throw problem;
    }
    if (response.ok) await cache.put(request, response.clone()).catch(() => {}); // no room
    return response;
}

self.addEventListener("fetch", (event) => {
    const {method, url} = event.request;
    // worker.js keeps the large files itself, to count their bytes and to check them
    if (method !== "GET" || !url.startsWith(self.registration.scope) || new URL(url).pathname.endsWith(".gz")) return;
    event.respondWith(answer(event.request));
});
