// The page: takes pictures, gives them to worker.js and shows its answers in the markup that page.js and page.css know.
import {Network} from "./network.js";

const TOP = 5, CARD_TOP = 3;

const $ = (selector, within = document) => within.querySelector(selector);

/** An element with properties and attributes: make("p", {className: "rn50-small", role: "status"}, children...). */
function make(kind, properties = {}, ...children) {
    const element = document.createElement(kind);
    for (const [name, value] of Object.entries(properties)) {
        if (name === "role" || name.startsWith("aria-")) element.setAttribute(name, value);
        else element[name] = value;
    }
    element.append(...children);
    return element;
}

function percent(share) {
    return `${(100 * share).toFixed(1)} %`;
}

function megabytes(bytes) {
    return (bytes / 1e6).toFixed(1);
}

// --- The network --------------------------------------------------------------------------------------------------

const ALIKE = 0.01; // in probability

let network, names, wnids, weight, threads, untried;

function start() {
    $("#rn50-failed").replaceChildren();
    $("#rn50-loading").hidden = false;
    network = new Network("wasm", {progress: showProgress, ready, failed});
}

function ready(details) {
    ({names, wnids, weight, threads} = details);
    window.rn50Names = names; // page.js's menu
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

async function classify(file) {
    const seen = await network.classify(file);
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

/** Indices of the k most probable classes, the most probable first. */
function best(probabilities, k) {
    const order = Array.from(probabilities.keys()).sort((a, b) => probabilities[b] - probabilities[a] || a - b);
    return order.slice(0, k);
}

/** Class activation map of one class (Zhou et al. 2016): bytes [h * w], its least value 0 and its largest 255. */
function activationMap({data, shape: [channels, height, width]}, index) {
    const map = new Float32Array(height * width);
    for (let c = 0; c < channels; c++) {
        const factor = weight[index * channels + c];
        for (let k = 0; k < map.length; k++) map[k] += factor * data[c * map.length + k];
    }
    const low = Math.min(...map), range = Math.max(Math.max(...map) - low, 1e-9);
    return Uint8Array.from(map, (value) => Math.round(255 * (value - low) / range));
}

function alertOf(problem) {
    return make("div", {className: "rn50-alert", role: "alert", textContent: problem});
}

function row(index, probability, chosen) {
    const radio = make("input", {type: "radio", name: "rn50-class", value: index});
    radio.toggleAttribute("checked", chosen);
    const bar = make("span", {className: "rn50-bar", "aria-hidden": "true"}, make("span"));
    bar.firstChild.style.width = `${(100 * probability).toFixed(2)}%`;
    return make("label", {className: "rn50-row"}, radio,
        make("span", {className: "rn50-name", textContent: names[index]}),
        make("span", {className: "rn50-share", textContent: percent(probability)}), bar);
}

/** What the network saw, with a map for every class that page.js draws over it, and the five best classes. */
function result({probabilities, features, shown, decodeMs, networkMs, where}) {
    const top = best(probabilities, TOP);
    const status = make("p", {className: "rn50-best", role: "status"}, `${names[top[0]]} `,
        make("span", {textContent: percent(probabilities[top[0]])}));
    const canvas = make("canvas", {width: 448, height: 448, "aria-hidden": "true"});
    const figure = make("figure", {className: "rn50-seen"},
        make("img", {src: URL.createObjectURL(shown), alt: "The part of your picture that the network saw"}), canvas,
        make("figcaption", {}, "Bright where it looked for ", make("strong", {className: "rn50-chosen"})),
        make("label", {className: "rn50-control"}, "Strength of the heat map",
            make("input", {type: "range", className: "rn50-opacity", min: 0, max: 100})),
        make("label", {className: "rn50-control"}, "Any other class", make("select", {className: "rn50-any"})));
    const rows = make("fieldset", {className: "rn50-rows"},
        make("legend", {textContent: "Choose a class to see where the network looked for it"}),
        ...top.map((index, place) => row(index, probabilities[index], place === 0)));
    const machine = threads > 1 ? `${threads} threads of your machine` : "your machine";
    const on = where === "webgpu" ? "your graphics processor" : machine;
    const latency = make("p", {className: "rn50-latency",
        textContent: `Decoding ${decodeMs.toFixed(1)} ms, network ${networkMs.toFixed(1)} ms, on ${on}`});
    const whole = make("div", {className: "rn50-result"}, figure, make("div", {}, status, rows, latency));
    whole.dataset.grid = `${features.shape[2]}x${features.shape[1]}`;
    whole.activationMap = (index) => activationMap(features, index);
    return whole;
}

function card(name, content) {
    return make("div", {className: "rn50-card", role: "listitem"}, ...content,
        make("p", {className: "rn50-file", textContent: name}));
}

function seenCard(name, {probabilities, shown}) {
    const rows = best(probabilities, CARD_TOP).map((index) => make("li", {},
        make("span", {textContent: names[index]}), " ", make("span", {textContent: percent(probabilities[index])})));
    return card(name, [make("img", {src: URL.createObjectURL(shown), alt: name}), make("ol", {}, ...rows)]);
}

// --- One picture --------------------------------------------------------------------------------------------------

/** Put children in the place of what is there, whose pictures are let go. */
function replace(place, ...children) {
    for (const image of place.querySelectorAll("img[src^='blob:']")) URL.revokeObjectURL(image.src);
    place.replaceChildren(...children);
}

let newest = 0;

async function show(file) {
    const turn = ++newest, place = $("#rn50-shown");
    replace(place, make("p", {className: "rn50-empty", textContent: "Looking at it …"}));
    let answer;
    try {
        answer = result(await classify(file));
    } catch (problem) {
        answer = alertOf(problem.message);
    }
    if (turn !== newest) return;
    replace(place, answer);
    place.scrollIntoView({block: "nearest"}); // below the examples, on a phone
}

async function showExample(address) {
    try {
        await show(await (await fetch(address)).blob());
    } catch {
        replace($("#rn50-shown"), alertOf("The example could not be loaded: is there a connection?"));
    }
}

// --- Many pictures ------------------------------------------------------------------------------------------------

const lines = [];
let left = 0, batch = 0;

async function showAll(files) {
    const mine = batch, gallery = $("#rn50-gallery");
    if (!lines.length && !left) replace(gallery);
    const places = files.map((file) => card(file.name, [make("p", {textContent: "Waiting"})]));
    gallery.append(...places);
    left += files.length;
    count();
    // not all at once: each would be held in memory while it waits
    for (const [k, file] of files.entries()) {
        let answer, line;
        try {
            const seen = await classify(file);
            if (mine !== batch) return;
            answer = seenCard(file.name, seen);
            line = best(seen.probabilities, TOP).flatMap((index) =>
                [wnids[index], names[index], seen.probabilities[index].toFixed(6)]);
        } catch (problem) {
            if (mine !== batch) return;
            answer = card(file.name, [alertOf(problem.message)]);
            line = [problem.message];
        }
        places[k].replaceWith(answer);
        lines.push([file.name, ...line]);
        left--;
        count();
    }
}

function count() {
    const all = lines.length + left;
    $("#rn50-count").textContent = left ? `${lines.length} of ${all}` : `${all} ${all === 1 ? "picture" : "pictures"}`;
    for (const place of ["#rn50-after", "#rn50-gallery"]) $(place).hidden = !all;
    $("#rn50-csv").disabled = !lines.length;
}

function clear() {
    batch++;
    left = lines.length = 0;
    replace($("#rn50-gallery"));
    count();
}

/** RFC 4180; what a spreadsheet would take for a formula begins with an apostrophe. */
function csv() {
    const places = Array.from({length: TOP}, (_, k) => k + 1);
    const head = ["file", ...places.flatMap((k) => [`wnid_${k}`, `class_${k}`, `probability_${k}`])];
    const quoted = (text) => `"${String(text).replace(/^[=+\-@\t\r]/, "'$&").replaceAll('"', '""')}"`;
    return [head, ...lines].map((line) => line.map(quoted).join(",") + "\r\n").join("");
}

function saveCsv() {
    const address = URL.createObjectURL(new Blob([csv()], {type: "text/csv"}));
    make("a", {href: address, download: "classes.csv"}).click();
    setTimeout(() => URL.revokeObjectURL(address), 10_000);
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
    const taken = {"rn50-picture": ([file]) => show(file), "rn50-pictures": showAll};
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
        button.addEventListener("click", () => showExample($("img", button).src));
    }
    $("#rn50-csv").addEventListener("click", saveCsv);
    $("#rn50-clear").addEventListener("click", clear);
}

listen();
start();
navigator.serviceWorker?.register("sw.js").catch(() => {}); // without it the page needs a network
