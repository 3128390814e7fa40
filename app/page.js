// What both pages show of an answer: the classes, maps of where the network looked for each, the cards of a batch and
// their CSV. All of it is made and kept in the visitor's browser: the server keeps nothing.
//
// An answer is {problem} in words for people, or {probabilities: [classes], unsure, shown: address of what the network
// saw, grid: [width, height], map(index) -> bytes of that grid, latency in words, whole() -> promise of the whole
// picture as an <img>, or of null}.
window.rn50 = (() => {
    // crop: what the network sees of the short side. examples: their names. Of Gradio's page alone, batch: how many
    // pictures are taken at a time, limit: in words, of each.
    const {names, wnids, crop, examples, batch, limit} = JSON.parse(document.getElementById("rn50-page").textContent);
    const TOP = Math.min(5, names.length), CARD_TOP = 3;
    const FEW = 40; // classes, which a sentence can name
    const NOTHING = 0.001; // of a class that is less probable a map would show what is not there
    // Inferno, five stops: bright is where the network looked. page.css has the same for the legend.
    const STOPS = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];

    function colour(share) {
        const place = Math.min(share, 0.9999) * (STOPS.length - 1), stop = Math.floor(place), rest = place - stop;
        return STOPS[stop].map((low, k) => low + (STOPS[stop + 1][k] - low) * rest);
    }

    const COLOURS = Array.from({length: 256}, (_, value) => colour(value / 255));

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

    function alertOf(problem) {
        return make("div", {className: "rn50-alert", role: "alert", textContent: problem});
    }

    /** Indices of the k most probable classes, the most probable first. */
    function best(probabilities, k) {
        const order = Array.from(probabilities.keys()).sort((a, b) => probabilities[b] - probabilities[a] || a - b);
        return order.slice(0, k);
    }

    // --- The classes ------------------------------------------------------------------------------------------------

    /** Something that opens `list`, with an item for each of some classes and a field that searches them. */
    function searchable(summary, list, indices, item) {
        const search = make("input", {type: "search", placeholder: "Search", "aria-label": `Search ${summary}`});
        const none = make("p", {role: "status"});
        const whole = make("details", {className: "rn50-all"},
            make("summary", {textContent: summary}), search, none, list);
        list.classList.add("rn50-list");
        // made when it is first opened: there may be thousands
        whole.addEventListener("toggle", () => list.firstChild || list.append(...indices.map(item)));
        search.addEventListener("input", () => {
            const wanted = search.value.trim().toLowerCase(), items = [...list.children];
            items.forEach((one, k) => { one.hidden = !names[indices[k]].toLowerCase().includes(wanted); });
            none.textContent = items.every(({hidden}) => hidden) ? "None of them is called that." : "";
        });
        return whole;
    }

    /** The classes that the network knows: a sentence where they are few. */
    function known(words) {
        const summary = `${words} ${names.length} classes`;
        const sentence = `${summary}: ${names.join(", ")}.`;
        if (names.length <= FEW) return make("p", {className: "rn50-known", textContent: sentence});
        const byName = Array.from(names.keys()).sort((a, b) => names[a].localeCompare(names[b]));
        // it scrolls
        const list = make("ul", {tabIndex: 0, "aria-label": summary});
        return searchable(summary, list, byName, (index) => make("li", {textContent: names[index]}));
    }

    // --- One picture ------------------------------------------------------------------------------------------------

    /** Draw a class's map over the picture, or nothing where it has none. */
    function draw(canvas, [width, height], map) {
        const context = canvas.getContext("2d", {willReadFrequently: true});
        context.clearRect(0, 0, canvas.width, canvas.height);
        if (!map) return;
        const cells = new ImageData(width, height), small = make("canvas", {width, height});
        for (let k = 0; k < width * height; k++) {
            cells.data.fill(map[k], 4 * k, 4 * k + 3);
            cells.data[4 * k + 3] = 255;
        }
        small.getContext("2d").putImageData(cells, 0, 0);
        context.imageSmoothingQuality = "high";
        context.drawImage(small, 0, 0, canvas.width, canvas.height);
        const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
        for (let k = 0; k < pixels.data.length; k += 4) {
            pixels.data.set(COLOURS[pixels.data[k]], k);
        }
        context.putImageData(pixels, 0, 0);
    }

    /** A small copy of the whole picture, in which all but the square that the network saw is dark. */
    function whereTheSquareLies(picture) {
        const {naturalWidth, naturalHeight} = picture, scale = 120 / Math.max(naturalWidth, naturalHeight);
        const [width, height] = [naturalWidth, naturalHeight].map((side) => Math.max(1, Math.round(side * scale)));
        const label = "Your whole picture: the network saw the square in its middle";
        const canvas = make("canvas", {width, height, role: "img", "aria-label": label});
        const context = canvas.getContext("2d"), side = Math.min(width, height) * crop;
        const square = [(width - side) / 2, (height - side) / 2, side, side];
        context.drawImage(picture, 0, 0, width, height);
        context.fillStyle = "rgb(0 0 0 / 60%)";
        context.rect(0, 0, width, height);
        context.rect(...square);
        context.fill("evenodd");
        context.strokeStyle = "white";
        context.lineWidth = 2;
        context.strokeRect(...square);
        return canvas;
    }

    let strength = 55, results = 0;

    function row(group, probabilities, index) {
        const bar = make("span", {className: "rn50-bar", "aria-hidden": "true"}, make("span"));
        bar.firstChild.style.width = `${(100 * probabilities[index]).toFixed(2)}%`;
        return make("label", {className: "rn50-row"}, make("input", {type: "radio", name: group, value: index}),
            make("span", {className: "rn50-name", textContent: names[index]}),
            make("span", {className: "rn50-share", textContent: percent(probabilities[index])}), bar);
    }

    function headline({probabilities, unsure}, index) {
        const name = names[index], share = percent(probabilities[index]).replace(" ", "\u00a0");
        const [large, small] = unsure ? ["Unsure", `closest: ${name}, ${share}`] : [name, share];
        return make("p", {className: unsure ? "rn50-best rn50-unsure" : "rn50-best", role: "status"}, `${large} `,
            make("span", {textContent: small}));
    }

    /** An answer with its picture: the five best classes, all others, and where the network looked for each. */
    function result(answer) {
        const {probabilities, unsure, shown, grid, latency} = answer;
        const order = best(probabilities, names.length), group = `rn50-class-${++results}`;
        const canvas = make("canvas", {width: 448, height: 448, "aria-hidden": "true"});
        const caption = make("figcaption", {"aria-live": "polite"});
        const cells = `${grid[0]} × ${grid[1]} cells`;
        const legend = make("p", {className: "rn50-legend"}, make("span", {textContent: "less"}),
            make("span", {className: "rn50-scale", "aria-hidden": "true"}), make("span", {textContent: "more"}),
            ...grid[0] * grid[1] < 16 ? [make("span", {textContent: `(a map of only ${cells})`})] : []);
        const slider = make("input", {type: "range", className: "rn50-opacity", min: 0, max: 100, value: strength});
        const control = make("label", {className: "rn50-control"}, "Strength of the heat map", slider);
        const square = make("p", {className: "rn50-square"});
        const figure = make("figure", {className: "rn50-seen"},
            make("div", {}, make("img", {src: shown, alt: "The part of your picture that the network saw"}), canvas),
            caption, legend, control, square);
        const rows = make("fieldset", {className: "rn50-rows"},
            make("legend", {textContent: "Choose a class to see where the network looked for it"}),
            ...order.slice(0, TOP).map((index) => row(group, probabilities, index)));
        const answers = make("div", {}, headline(answer, order[0]));
        if (unsure) answers.append(known("It knows only these"));
        answers.append(rows);
        const others = order.slice(TOP);
        if (others.length) {
            const summary = others.length === 1 ? "The other class" : `The other ${others.length} classes`;
            const list = make("div", {role: "group", "aria-label": summary});
            answers.append(searchable(summary, list, others, (index) => row(`${group}-other`, probabilities, index)));
        }
        answers.append(make("p", {className: "rn50-latency", textContent: latency}));

        function choose(index) {
            const isThere = probabilities[index] >= NOTHING;
            const chosen = make("strong", {className: "rn50-chosen", textContent: names[index]});
            for (const radio of answers.querySelectorAll("[type=radio]")) radio.checked = Number(radio.value) === index;
            draw(canvas, grid, isThere && answer.map(index));
            canvas.dataset.drawn = index;
            legend.hidden = control.hidden = !isThere;
            caption.replaceChildren(...isThere
                ? ["Bright where it looked for ", chosen]
                : ["It sees next to nothing of ", chosen, ` here (${percent(probabilities[index])}): no map.`]);
        }

        choose(order[0]);
        answers.addEventListener("change", ({target}) => target.type === "radio" && choose(Number(target.value)));
        slider.addEventListener("input", () => {
            strength = Number(slider.value);
            document.documentElement.style.setProperty("--rn50-opacity", strength / 100);
        });
        Promise.resolve(answer.whole?.()).then((picture) => {
            square.append(...picture ? [whereTheSquareLies(picture)] : [], "The network saw the square in the middle.");
        });
        return make("div", {className: "rn50-result"}, answers, figure);
    }

    /** Put children in the place of what is there, whose pictures are let go. */
    function replace(place, ...children) {
        for (const image of place.querySelectorAll("img[src^='blob:']")) URL.revokeObjectURL(image.src);
        place.replaceChildren(...children);
    }

    /** Put an answer, or without one what is to be done, into the page. */
    function show(answer) {
        const place = document.getElementById("rn50-shown");
        if (!answer) {
            const words = "Choose, drop or paste a picture. You will see which class the network takes it for, and "
                + "where it looked.";
            const whole = make("div", {className: "rn50-empty"}, make("p", {textContent: words}), known("It knows"));
            return replace(place, whole);
        }
        replace(place, answer.problem ? alertOf(answer.problem) : result(answer));
        // it may be below the screen of a phone
        place.querySelector(".rn50-best, .rn50-alert").scrollIntoView({block: "nearest"});
    }

    function wait() {
        const words = make("p", {className: "rn50-empty", textContent: "Looking at it …"});
        replace(document.getElementById("rn50-shown"), words);
    }

    // --- Many pictures ----------------------------------------------------------------------------------------------

    let pictures = []; // {name, answer, element, closer() -> promise of an answer with maps}

    function card({name, answer, closer}) {
        const file = make("p", {className: "rn50-file", textContent: name});
        const whole = make("div", {className: "rn50-card", role: "listitem"}, file);
        if (!answer || answer.problem) {
            whole.append(answer ? alertOf(answer.problem) : make("p", {textContent: "Waiting"}));
            return whole;
        }
        const open = make("button", {type: "button", "aria-label": `Look closer at ${name}`},
            make("img", {src: answer.shown, alt: ""}));
        open.addEventListener("click", () => lookCloser(name, closer()));
        const rows = best(answer.probabilities, CARD_TOP).map((index) => make("li", {},
            make("span", {textContent: names[index]}), " ",
            make("span", {textContent: percent(answer.probabilities[index])})));
        whole.append(open);
        if (answer.unsure) whole.append(make("p", {className: "rn50-unsure", textContent: "Unsure; closest:"}));
        whole.append(make("ol", {}, ...rows));
        return whole;
    }

    /** Show a picture of a batch over the page. */
    async function lookCloser(name, answered) {
        const close = make("button", {type: "button", className: "rn50-button", textContent: "Close"});
        const inside = make("div", {}, make("p", {textContent: "Looking at it …"}));
        const dialog = make("dialog", {className: "rn50-dialog", "aria-label": name},
            make("div", {className: "rn50-dialog-head"}, make("p", {className: "rn50-file", textContent: name}), close),
            inside);
        close.addEventListener("click", () => dialog.close());
        dialog.addEventListener("close", () => {
            replace(inside);
            dialog.remove();
        });
        // Gradio's page listens for some keys
        dialog.addEventListener("keydown", (event) => event.stopPropagation());
        document.querySelector("main").append(dialog);
        dialog.showModal();
        const answer = await answered;
        inside.replaceChildren(answer.problem ? alertOf(answer.problem) : result(answer));
    }

    function count() {
        const {length} = pictures, done = pictures.filter(({answer}) => answer).length;
        const at = (id) => document.getElementById(id), all = length === 1 ? "1 picture" : `${length} pictures`;
        at("rn50-count").textContent = done < length ? `${done} of ${length}` : all;
        for (const id of ["rn50-after", "rn50-gallery"]) at(id).hidden = !length;
        at("rn50-csv").disabled = !done;
    }

    /** A card that waits for its answer. */
    function addPicture(picture) {
        pictures.push(picture);
        picture.element = card(picture);
        document.getElementById("rn50-gallery").append(picture.element);
        count();
        return picture;
    }

    function answerPicture(picture, answer) {
        const before = picture.element;
        picture.answer = answer;
        picture.element = card(picture);
        before.replaceWith(picture.element);
        count();
    }

    function keepPictures(isKept) {
        for (const {element, answer} of pictures.filter((picture) => !isKept(picture))) {
            if (answer?.shown?.startsWith("blob:")) URL.revokeObjectURL(answer.shown);
            element.remove();
        }
        pictures = pictures.filter(isKept);
        count();
    }

    /** RFC 4180; what a spreadsheet would take for a formula begins with an apostrophe. */
    function csv() {
        const places = Array.from({length: TOP}, (_, k) => k + 1);
        const head = ["file", ...places.flatMap((k) => [`wnid_${k}`, `class_${k}`, `probability_${k}`]), "unsure"];
        const quoted = (text) => `"${String(text).replace(/^[=+\-@\t\r]/, "'$&").replaceAll('"', '""')}"`;
        const lines = pictures.filter(({answer}) => answer).map(({name, answer: {problem, probabilities, unsure}}) => {
            if (problem) return [name, problem];
            const top = best(probabilities, TOP);
            return [name, ...top.flatMap((k) => [wnids[k], names[k], probabilities[k].toFixed(6)]), unsure];
        });
        return [head, ...lines].map((line) => line.map(quoted).join(",") + "\r\n").join("");
    }

    function saveCsv() {
        const address = URL.createObjectURL(new Blob([csv()], {type: "text/csv"}));
        make("a", {href: address, download: "classes.csv"}).click();
        setTimeout(() => URL.revokeObjectURL(address), 10_000);
    }

    document.addEventListener("click", ({target}) => target.id === "rn50-csv" && saveCsv());

    // --- The server's answers, in Gradio's page ---------------------------------------------------------------------

    const NO_ANSWER = {problem: "No answer came: the page may have too many visitors. Add the picture again."};

    function bytes(base64) {
        return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
    }

    function unpack(sent) {
        if (sent.problem) return sent;
        const maps = bytes(sent.maps), size = sent.grid[0] * sent.grid[1];
        return {
            ...sent,
            probabilities: new Float32Array(bytes(sent.probabilities).buffer),
            map: (index) => maps.subarray(index * size, (index + 1) * size),
            latency: `Decoding ${sent.milliseconds[0]} ms, network ${sent.milliseconds[1]} ms`,
        };
    }

    async function chosenPicture() {
        const picture = document.querySelector("#rn50-picture img");
        return picture?.decode().then(() => picture, () => null);
    }

    /** Before the server is asked for a picture. */
    function ask(picture) {
        if (picture) wait();
        return [picture];
    }

    function answered(sent) {
        show(sent && {...unpack(sent), whole: chosenPicture});
    }

    function unanswered() {
        show(NO_ANSWER);
    }

    /** The files of Gradio's list that have no card yet, to be sent; cards of those that are gone go. */
    function askMany(files) {
        const listed = [...files ?? []], kept = new Set();
        const added = listed.filter(({path}) => {
            const there = pictures.find((picture) => picture.path === path && !kept.has(picture));
            if (there) kept.add(there);
            return !there;
        });
        keepPictures((picture) => kept.has(picture));
        const waiting = added.map(({path, orig_name: name}) => addPicture({path, name: name ?? "Picture"}));
        for (const picture of waiting.slice(batch)) {
            answerPicture(picture, {problem: `At most ${batch} pictures at a time: remove this one and add it again.`});
        }
        return [added.slice(0, batch)];
    }

    function answeredMany(all) {
        for (const picture of pictures.filter(({answer}) => !answer || answer === NO_ANSWER)) {
            const sent = all.find(({path}) => path === picture.path), answer = sent ? unpack(sent) : NO_ANSWER;
            picture.closer = async () => answer;
            answerPicture(picture, answer);
        }
    }

    // Gradio takes what is pasted by a button alone: here Ctrl+V does, too, into the tab that is open.
    document.addEventListener("paste", async (event) => {
        const pasted = [...event.clipboardData.files].filter(({type}) => type.startsWith("image/"));
        const places = document.querySelectorAll("#rn50-picture, #rn50-pictures");
        const place = [...places].find((at) => at.checkVisibility());
        if (!pasted.length || !place) return;
        event.preventDefault();
        const field = () => place.querySelector("input[type=file]");
        if (!field()) place.querySelector("[aria-label='Remove Image'], [aria-label='Clear']")?.click();
        for (let waited = 0; !field() && waited < 50; waited++) await new Promise((next) => setTimeout(next, 20));
        const data = new DataTransfer();
        for (const picture of field()?.multiple ? pasted : pasted.slice(0, 1)) data.items.add(picture);
        if (!field()) return;
        field().files = data.files;
        field().dispatchEvent(new Event("change", {bubbles: true}));
    });
    new MutationObserver(() => {
        const place = document.getElementById("rn50-shown");
        if (place && !place.firstChild) show(null);
        // Gradio's examples are pictures without a name, and its megabytes are others
        document.querySelectorAll(".gallery-item:not([aria-label])").forEach((example) => {
            const index = [...example.parentElement.children].indexOf(example);
            example.setAttribute("aria-label", examples[index]);
        });
        document.querySelectorAll("[data-testid=toast-text]").forEach((toast) => {
            const [said, files] = toast.textContent.match(/^File.* maximum allowed size of [^:]+: (.*)$/) ?? [];
            if (said) toast.textContent = `Larger than ${limit}: ${files}`;
        });
    }).observe(document.documentElement, {childList: true, subtree: true});

    return {make, percent, alertOf, replace, show, wait, addPicture, answerPicture, keepPictures,
        ask, answered, unanswered, askMany, answeredMany};
})();
