// worker.js as the page has it: files go in, what the network makes of them comes out.

export class Network {
    #worker;
    #ids = 0;
    #waiting = new Map();
    #problem = null;

    /** where: "wasm" or "webgpu". progress({loaded, total} bytes), ready(details) and failed(words) are told. */
    constructor(where, {progress = () => {}, ready = () => {}, failed = () => {}} = {}) {
        Object.assign(this, {where, progress, ready, failed});
        this.#start();
    }

    #start() {
        this.#worker?.terminate();
        const options = {type: "module", name: this.where};
        this.#worker = new Worker(new URL("worker.js", import.meta.url), options);
        this.#worker.addEventListener("message", ({data}) => this.#hear(data));
        this.#worker.addEventListener("error", () => this.#fail("The network has stopped: is there a connection?"));
        for (const [id, {file, features}] of this.#waiting) this.#worker.postMessage({id, file, features});
    }

    #hear({progress, ready, failed, id, seen, problem, broken}) {
        if (progress) this.progress(progress);
        else if (ready) this.ready(ready);
        else if (failed) this.#fail(failed);
        else {
            const {resolve, reject} = this.#waiting.get(id);
            this.#waiting.delete(id);
            if (seen) resolve(seen);
            else reject(new Error(problem));
            if (broken) this.#start();
        }
    }

    #fail(words) {
        this.#problem = words;
        this.stop();
        for (const {reject} of this.#waiting.values()) reject(new Error(words));
        this.#waiting.clear();
        this.failed(words);
    }

    /**
     * {probabilities, unsure, features, shown, decodeMs, networkMs} of a file; rejected with words for people.
     * features: whether they are wanted: they are large, and of many pictures nobody looks at them.
     */
    classify(file, {features = true} = {}) {
        return new Promise((resolve, reject) => {
            if (this.#problem) throw new Error(this.#problem);
            const id = this.#ids++;
            this.#waiting.set(id, {file, features, resolve, reject});
            this.#worker.postMessage({id, file, features});
        });
    }

    get busy() {
        return this.#waiting.size > 0;
    }

    stop() {
        this.#worker.terminate();
    }
}
