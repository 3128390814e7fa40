// Draws the class activation maps over the picture, in the visitor's browser: the server keeps nothing.
(() => {
    // Inferno, five stops: light is where the network looked.
    const STOPS = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];

    function colour(share) {
        const place = Math.min(share, 0.9999) * (STOPS.length - 1), stop = Math.floor(place), rest = place - stop;
        return STOPS[stop].map((low, k) => low + (STOPS[stop + 1][k] - low) * rest);
    }

    const COLOURS = Array.from({length: 256}, (_, value) => colour(value / 255));

    /** A class's map as bytes: where the page has the network, it computes it. */
    function mapOf(result, index, size) {
        if (result.activationMap) return result.activationMap(index);
        const all = atob(result.dataset.maps), start = index * size;
        return Uint8Array.from({length: size}, (_, k) => all.charCodeAt(start + k));
    }

    function draw(result, index) {
        const [width, height] = result.dataset.grid.split("x").map(Number);
        const map = mapOf(result, index, width * height);
        const small = document.createElement("canvas");
        small.width = width;
        small.height = height;
        const cells = new ImageData(width, height);
        for (let k = 0; k < width * height; k++) {
            cells.data.fill(map[k], 4 * k, 4 * k + 3);
            cells.data[4 * k + 3] = 255;
        }
        small.getContext("2d").putImageData(cells, 0, 0);
        const canvas = result.querySelector("canvas"), context = canvas.getContext("2d", {willReadFrequently: true});
        context.imageSmoothingQuality = "high";
        context.drawImage(small, 0, 0, canvas.width, canvas.height);
        const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
        for (let k = 0; k < pixels.data.length; k += 4) {
            pixels.data.set(COLOURS[pixels.data[k]], k);
        }
        context.putImageData(pixels, 0, 0);
        canvas.dataset.drawn = index;
        result.querySelector(".rn50-chosen").textContent = window.rn50Names[index];
    }

    function choose(result, index) {
        for (const radio of result.querySelectorAll("[name=rn50-class]")) radio.checked = Number(radio.value) === index;
        result.querySelector(".rn50-any").value = index;
        draw(result, index);
    }

    let strength = 55;

    function show(result) {
        const menu = result.querySelector(".rn50-any");
        menu.replaceChildren(...window.rn50Names.map((name, index) => new Option(name, index)));
        result.querySelector(".rn50-opacity").value = strength;
        choose(result, Number(result.querySelector("input:checked").value));
    }

    document.addEventListener("change", ({target}) => {
        const result = target.closest(".rn50-result");
        if (result && target.matches("[name=rn50-class], .rn50-any")) choose(result, Number(target.value));
    });
    document.addEventListener("input", ({target}) => {
        if (!target.matches(".rn50-opacity")) return;
        strength = Number(target.value);
        document.documentElement.style.setProperty("--rn50-opacity", strength / 100);
    });
    // Gradio takes what is pasted by a button alone: here Ctrl+V does, too, into the tab that is open.
    document.addEventListener("paste", async (event) => {
        const pictures = [...event.clipboardData.files].filter(({type}) => type.startsWith("image/"));
        const place = [...document.querySelectorAll("#rn50-picture, #rn50-pictures")].find((at) => at.checkVisibility());
        if (!pictures.length || !place) return;
        event.preventDefault();
        const field = () => place.querySelector("input[type=file]");
        if (!field()) place.querySelector("[aria-label='Remove Image'], [aria-label='Clear']")?.click();
        for (let waited = 0; !field() && waited < 50; waited++) await new Promise((next) => setTimeout(next, 20));
        const data = new DataTransfer();
        for (const picture of field()?.multiple ? pictures : pictures.slice(0, 1)) data.items.add(picture);
        if (!field()) return;
        field().files = data.files;
        field().dispatchEvent(new Event("change", {bubbles: true}));
    });
    new MutationObserver(() => {
        for (const result of document.querySelectorAll(".rn50-result")) {
            if (result.querySelector("canvas").dataset.drawn === undefined) show(result);
        }
        // Gradio's examples are pictures without a name
        document.querySelectorAll(".gallery-item:not([aria-label])").forEach((example) => {
            const place = [...example.parentElement.children].indexOf(example) + 1;
            example.setAttribute("aria-label", `Example ${place}`);
        });
    }).observe(document.documentElement, {childList: true, subtree: true});
})();
