// The page: takes pictures, gives them to worker.js, and its answers to page.js, which shows them.
import {Network} from "./network.js";

const {make, alertOf, replace, show, wait, addPicture, answerPicture, keepPictures} = window.rn50;

const $ = (selector, within = document) => within.querySelector(selector);

function megabytes(bytes) {
    return (bytes / 1e6).toFixed(1);
}

// --- The network --------------------------------------------------------------------------------------------------

const ALIKE = 0.01; // in probability

let network, weight, threads, untried;

function start() {
    $("#rn50-failed").replaceChildren();
    $("#rn50-loading").hidden = false;
    network = new Network("wasm", {progress: showProgress, ready, failed});
}

function ready(details) {
    ({weight, threads} = details);
    $("#rn50-loading").hidden = true;
    // with JavaScript Promise Integration, which its runtime is built for
    untried = details.webgpu && navigator.gpu && "Suspending" in WebAssembly;
}

function showProgress({loaded, total}) {
    const bar = $("#rn50-loading progress"), text = $("#rn50-loading span");
    bar.max = total;
    bar.value = loaded;
    text.textContent = loaded < total ? `${megabytes(loaded)} of ${megabytes(total)} MB` : "starting";
}

function failed(problem) {
    const again = make("button", {type: "button", className: "rn50-button", textContent: "Try again"});
    again.addEventListener("click", start);
    $("#rn50-loading").hidden = true;
    $("#rn50-failed").replaceChildren(alertOf(problem), again);
}

export async function classify(file, options) {
    const seen = await network.classify(file, options);
    if (untried) {
        untried = false;
        hasGraphicsProcessor().then((has) => has && tryGraphicsProcessor(file, seen));
    }
    return seen;
}

/** Whether there is one that is no program on the processor itself. */
async function hasGraphicsProcessor() {
    const adapter = await navigator.gpu.requestAdapter().catch(() => null);
    return adapter && !adapter.info.isFallbackAdapter;
}

/** Let the graphics processor go on where it makes the same of a file as the processor has, and sooner. */
export async function tryGraphicsProcessor(file, {probabilities, networkMs}) {
    const other = new Network("webgpu");
    try {
        const seen = await other.classify(file);
        const alike = seen.probabilities.every((share, k) => Math.abs(share - probabilities[k]) < ALIKE);
        if (!alike || seen.networkMs >= networkMs) return other.stop();
    } catch {
        return other.stop();
    }
    const before = network;
    network = Object.assign(other, {failed});
    while (before.busy) await new Promise((next) => setTimeout(next, 100));
    before.stop();
}

// --- Answers ------------------------------------------------------------------------------------------------------

/** Class activation map of one class (Zhou et al. 2016): bytes [h * w], its least value 0 and its largest 255. */
export function activationMap({data, shape: [channels, height, width]}, index) {
    const map = new Float32Array(height * width);
    for (let c = 0; c < channels; c++) {
        const factor = weight[index * channels + c];
        for (let k = 0; k < map.length; k++) map[k] += factor * data[c * map.length + k];
    }
    const low = Math.min(...map), range = Math.max(Math.max(...map) - low, 1e-9);
    return Uint8Array.from(map, (value) => Math.round(255 * (value - low) / range));
}

/** The answer to a file as page.js shows it: without maps where they are not wanted. */
async function answerTo(file, {maps = true} = {}) {
    let seen;
    try {
        seen = await classify(file, {features: maps});
    } catch (problem) {
        return {problem: problem.message};
    }
    const {probabilities, unsure, features, decodeMs, networkMs, where} = seen;
    const shown = URL.createObjectURL(seen.shown);
    if (!maps) return {probabilities, unsure, shown};
    const machine = threads > 1 ? `${threads} threads of your machine` : "your machine";
    const on = where === "webgpu" ? "your graphics processor" : machine;
    return {
        probabilities,
        unsure,
        shown,
        grid: [features.shape[2], features.shape[1]],
        map: (index) => activationMap(features, index),
        latency: `Decoding ${decodeMs.toFixed(1)} ms, network ${networkMs.toFixed(1)} ms, on ${on}`,
        whole: () => whole(file),
    };
}

/** Promise of the whole picture as an <img>, or of null where the browser does not decode it by itself. */
async function whole(file) {
    const picture = new Image(), address = URL.createObjectURL(file);
    picture.src = address;
    try {
        await picture.decode();
        return picture;
    } catch {
        return null;
    } finally {
        URL.revokeObjectURL(address);
    }
}

// --- One picture --------------------------------------------------------------------------------------------------

let newest = 0;

async function take(file) {
    const turn = ++newest;
    wait();
    const answer = await answerTo(file);
    if (turn === newest) show(answer);
}

async function takeExample(address) {
    try {
        await take(await (await fetch(address)).blob());
    } catch {
        show({problem: "The example could not be loaded: is there a connection?"});
    }
}

// --- Many pictures ------------------------------------------------------------------------------------------------

let batch = 0;

async function takeMany(files) {
    const mine = batch;
    const pictures = files.map((file) => addPicture({name: file.name, closer: () => answerTo(file)}));
    // not all at once: each would be held in memory while it waits
    for (const [k, file] of files.entries()) {
        const answer = await answerTo(file, {maps: false});
        if (mine !== batch) return;
        answerPicture(pictures[k], answer);
    }
}

function clear() {
    batch++;
    keepPictures(() => false);
}

// --- What people do -----------------------------------------------------------------------------------------------

function openTab(tab) {
    for (const other of document.querySelectorAll("[role=tab]")) {
        const chosen = other === tab;
        other.setAttribute("aria-selected", chosen);
        other.tabIndex = chosen ? 0 : -1;
        other.classList.toggle("selected", chosen);
        $(`#${other.getAttribute("aria-controls")}`).hidden = !chosen;
    }
}

function pictures(files) {
    return Array.from(files).filter(({name}) => !name.startsWith("."));
}

function listen() {
    const tabs = [...document.querySelectorAll("[role=tab]")];
    for (const [k, tab] of tabs.entries()) {
        tab.addEventListener("click", () => openTab(tab));
        tab.addEventListener("keydown", ({key}) => {
            const step = {ArrowRight: 1, ArrowLeft: -1}[key];
            if (!step) return;
            const next = tabs[(k + step + tabs.length) % tabs.length];
            openTab(next);
            next.focus();
        });
    }
    const taken = {"rn50-picture": ([file]) => take(file), "rn50-pictures": takeMany};
    for (const [id, take] of Object.entries(taken)) {
        const place = $(`#${id}`);
        for (const input of place.querySelectorAll("input[type=file]")) {
            input.addEventListener("change", () => {
                const files = pictures(input.files);
                input.value = ""; // the same file may be chosen again
                if (files.length) take(files);
            });
        }
        for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
            place.addEventListener(kind, (event) => {
                event.preventDefault();
                place.classList.toggle("rn50-over", kind === "dragenter" || kind === "dragover");
                const files = kind === "drop" ? pictures(event.dataTransfer.files) : [];
                if (files.length) take(files);
            });
        }
    }
    // a picture that misses its place would be opened in the place of the page
    for (const kind of ["dragover", "drop"]) addEventListener(kind, (event) => event.preventDefault());
    for (const button of document.querySelectorAll(".rn50-example")) {
        button.addEventListener("click", () => takeExample($("img", button).src));
    }
    $("#rn50-clear").addEventListener("click", clear);
}

listen();
start();
navigator.serviceWorker?.register("sw.js").catch(() => {}); // without it the page needs a network
