// The network, away from the page: pictures come in as files, probabilities and feature maps go out.
import {decode, UnreadableImage} from "./decode.js";
import {normalise, see} from "./resize.js";

// A module that adds two vectors of 16 bytes.
const SIMD = "0,97,115,109,1,0,0,0,1,5,1,96,0,1,123,3,2,1,0,10,10,1,8,0,65,0,253,15,253,98,11".split(",");
const TOO_OLD = "This browser is too old, or WebAssembly is switched off: "
    + "Chrome 91, Firefox 114, Safari 16.4 or newer can run the network.";
const MOST_THREADS = 4;
const WHERE = self.name; // wasm or webgpu

let site, ort, session, kept;

class Failed extends Error {}

function megabytes(bytes) {
    return (bytes / 1e6).toFixed(1);
}

/** Whether bytes have this SHA-256; true where a page may not compute it, which takes https or localhost. */
async function isWhole(bytes, sha256) {
    if (!crypto.subtle) return true;
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") === sha256;
}

/** A cache of the browser's, or nothing where it has none to give, as in some private windows. */
async function openCache() {
    try {
        return await caches.open("rn50-network");
    } catch {
        return null;
    }
}

/** The bytes of a large file, from the cache or else downloaded. arrived(bytes) is told of all that comes. */
async function load({path, bytes, sha256}, arrived) {
    const address = new URL(`${path}?${sha256}`, self.location).href;
    const found = await kept?.match(address);
    if (found) {
        const content = new Uint8Array(await found.arrayBuffer());
        if (await isWhole(content, sha256)) {
            arrived(bytes);
            return content;
        }
        await kept.delete(address);
    }
    let response;
    try {
        response = await fetch(address);
    } catch {
        throw new Failed("The network could not be loaded: is there a connection?");
    }
    if (!response.ok) throw new Failed(`The network could not be loaded: the server says ${response.status}.`);
    const content = new Uint8Array(bytes);
    let length = 0;
    try {
        const reader = response.body.getReader();
        for (let part = await reader.read(); !part.done; part = await reader.read()) {
            if (length + part.value.length <= bytes) content.set(part.value, length);
            length += part.value.length;
            arrived(part.value.length);
        }
    } catch {
        // what has come is less than what is wanted
    }
    const come = `${megabytes(length)} of ${megabytes(bytes)} MB`;
    if (length < bytes) throw new Failed(`The network came incomplete: ${come} of ${path} have arrived.`);
    const damaged = length > bytes || !await isWhole(content, sha256);
    if (damaged) throw new Failed(`The network came damaged: ${path} is not what it was when the page was made.`);
    await kept?.put(address, new Response(content)).catch(() => {}); // no room: loaded again next time
    return content;
}

function unpack(content) {
    return new Response(new Blob([content]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

async function start() {
    if (typeof WebAssembly === "undefined" || !WebAssembly.validate(new Uint8Array(SIMD))) {
        throw new Failed(TOO_OLD);
    }
    try {
        site = await (await fetch("site.json")).json();
    } catch {
        throw new Failed("The page could not be loaded: is there a connection?");
    }
    kept = await openCache();
    const {module, wasm} = site.runtimes[WHERE];
    const total = wasm.bytes + site.network.bytes;
    let loaded = 0;
    const arrived = (bytes) => {
        loaded += bytes;
        postMessage({progress: {loaded, total}});
    };
    const [runtime, network] = await Promise.all([wasm, site.network].map((file) => load(file, arrived).then(unpack)));
    try {
        ort = await import(`./${module}`);
    } catch {
        throw new Failed("The page could not be loaded: is there a connection?");
    }
    ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency) : 1;
    ort.env.wasm.wasmBinary = runtime;
    const weight = await create(new Uint8Array(network));
    const {runtimes} = site;
    const threads = ort.env.wasm.numThreads;
    postMessage({ready: {threads, weight: weight.data, webgpu: "webgpu" in runtimes}});
    const current = [site.network, ...Object.values(runtimes).map((runtime) => runtime.wasm)];
    for (const {url} of await kept?.keys().catch(() => []) ?? []) {
        if (!current.some(({sha256: wanted}) => url.endsWith(`?${wanted}`))) await kept.delete(url);
    }
}

/** Make the session, ready for pictures; returns the classifier's weight. */
async function create(network) {
    try {
        session = await ort.InferenceSession.create(network, {executionProviders: [WHERE]});
        // the first run takes twice as long as the others
        const nothing = new Float32Array(3 * site.preprocessing.resolution ** 2);
        return (await run(nothing, ["logits", "features", "classifier_weight"])).classifier_weight;
    } catch (problem) {
        console.error(problem);
        throw new Failed("The network could not be started, perhaps for want of memory: close other pages.");
    }
}

function run(images, outputs) {
    const {resolution} = site.preprocessing;
    return session.run({images: new ort.Tensor("float32", images, [1, 3, resolution, resolution])}, outputs);
}

/** Softmax at the model's temperature. */
function probabilities(logits) {
    const {temperature} = site.probabilities;
    const most = logits.reduce((a, b) => Math.max(a, b));
    const shares = Float64Array.from(logits, (logit) => Math.exp((logit - most) / temperature));
    const sum = shares.reduce((a, b) => a + b);
    return Float32Array.from(shares, (share) => share / sum);
}

async function classify(file, wantsFeatures) {
    const {resolution, crop_ratio: cropRatio} = site.preprocessing;
    const started = performance.now();
    const picture = await decode(new Uint8Array(await file.arrayBuffer()), site.kinds);
    try {
        const images = normalise(see(picture, {resolution, cropRatio}), site.preprocessing);
        const prepared = performance.now();
        const {logits, features} = await run(images, wantsFeatures ? ["logits", "features"] : ["logits"]);
        const ended = performance.now();
        const found = probabilities(logits.data);
        return {
            probabilities: found,
            unsure: found.reduce((a, b) => Math.max(a, b)) < site.probabilities.unsure_below,
            features: features && {data: features.data, shape: features.dims.slice(1)},
            shown: await picture.shown(resolution, cropRatio),
            decodeMs: prepared - started,
            networkMs: ended - prepared,
            where: WHERE,
        };
    } finally {
        picture.close();
    }
}

function words(problem) {
    if (problem instanceof UnreadableImage || problem instanceof Failed) return problem.message;
    console.error(problem);
    return "The browser could not do this, perhaps for want of memory: close other pages, or take a smaller picture.";
}

const started = start();
started.catch((problem) => postMessage({failed: words(problem)}));

// One at a time: two pictures at once would only share the processor.
let turn = started.catch(() => {});
self.addEventListener("message", ({data: {id, file, features}}) => {
    turn = turn.then(async () => {
        try {
            await started;
            postMessage({id, seen: await classify(file, features)});
        } catch (problem) {
            // after a trap in WebAssembly its memory is not to be trusted
            postMessage({id, problem: words(problem), broken: !(problem instanceof UnreadableImage)});
        }
    });
});
