"""The static Space in headless Chromium, as a visitor has it: the network runs in the page, and nothing is sent."""

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
import yaml

from tests import tiny_model
from tests.conftest import ROOT
from tests.services import OPENER

pytest.importorskip("selenium")
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.app.visitor import (
    assert_accessible,
    choose_other,
    copy,
    drawn,
    drop,
    find,
    press_paste,
    shape,
    start_browser,
    tab,
    table,
    wait,
)

sys.path.insert(0, str(ROOT / "app/browser"))
import build
import inference

PICTURE, PICTURES = "#rn50-picture input[type=file]", "#rn50-pictures input[type=file]"


class Served:
    """The static Space on a port of this machine. files may be changed; cut: of which only half is sent.

    headers: whether those that the Space's card asks for are sent. With close() it is offline.
    """

    def __init__(self, files, headers=True):
        self.files, self.cut, self.requests, self._connections = dict(files), set(), [], []
        self._server = build.server(self.files)
        served, whole = self, self._server.RequestHandlerClass

        class Handler(whole):
            def setup(self):
                served._connections.append(self.request)
                super().setup()

            def do_GET(self):
                served.requests.append(f"{self.command} {self.path}")
                super().do_GET()

            def send_header(self, name, value):
                if headers or not name.startswith("cross-origin"):
                    super().send_header(name, value)

            def end_headers(self):
                super().end_headers()
                if self.path.partition("?")[0][1:] in served.cut:
                    self.wfile.write(bytes(1000))
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)

        self._server.RequestHandlerClass = Handler
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
        for connection in self._connections:  # which the browser would go on with
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def model(exported):
    return exported[0]


@pytest.fixture(scope="module")
def files(model):
    return build.site(model, repo="me/net", space_url="https://huggingface.co/spaces/me/demo")


@pytest.fixture(scope="module")
def served(files):
    running = Served(files)
    yield running
    running.close()


@pytest.fixture(scope="module")
def classifier(model):
    """In Python, the network that the page runs."""
    return inference.Classifier(model, threads=1, file=inference.read_config(model)["browser"]["network"])


@pytest.fixture(scope="module")
def browser():
    driver = start_browser("--host-resolver-rules=MAP insecure.test 127.0.0.1")
    yield driver
    driver.quit()


def opened(browser, url):
    """The page at `url`, ready for pictures."""
    shape(browser, 1280, 900)
    browser.get(url)
    ready(browser)
    return browser


def ready(browser):
    wait(browser, lambda: not find(browser, "#rn50-loading").is_displayed())


@pytest.fixture
def page(served, browser):
    return opened(browser, served.url)


@pytest.fixture(scope="module")
def known(textures, classifier):
    """(file, label, the prediction in Python) of pictures that the network is sure of, of several classes."""
    paths = sorted(textures.glob("val/*/000[1-9].jpg"))
    seen = [(path, classifier.predict(path.read_bytes())) for path in paths]
    sure = [(path, classifier.names[one.top(1)[0]], one) for path, one in seen if not one.unsure]
    return list({label: (path, label, one) for path, label, one in sure}.values())[:6]


def rows(browser):
    """[(class, per cent)] as they are shown."""
    found = [row.text.split("\n") for row in browser.find_elements(By.CSS_SELECTOR, ".rn50-row")]
    return [(name, float(share.removesuffix(" %"))) for name, share in found]


def test_a_picture_gets_pythons_classes_and_a_heat_map_for_the_chosen_one(page, known, classifier):
    path, label, expected = known[0]
    find(page, PICTURE).send_keys(str(path))
    assert find(page, ".rn50-best").text.startswith(label)
    threads = min(4, page.execute_script("return navigator.hardwareConcurrency"))
    assert f"on {threads} threads of your" in find(page, ".rn50-latency").text or threads == 1
    top = expected.top(5)
    assert [name for name, _ in rows(page)] == [classifier.names[k] for k in top]
    assert np.allclose([share for _, share in rows(page)], 100 * expected.probabilities[top], atol=0.1)
    page.find_elements(By.CSS_SELECTOR, ".rn50-row input")[0].send_keys(Keys.ARROW_DOWN)
    assert drawn(page)[0] == top[1]
    sixth = expected.top(6)[5]
    choose_other(page, classifier.names[sixth])
    assert drawn(page)[0] == sixth
    assert page.find_element(By.CSS_SELECTOR, ".rn50-chosen").text == classifier.names[sixth]
    assert "The network saw the square" in find(page, ".rn50-square:has(canvas)").text
    maps_of = """const [picture, indices, done] = arguments;
        const file = new Blob([Uint8Array.from(atob(picture), (c) => c.charCodeAt(0))]);
        import("./main.js").then(async ({classify, activationMap}) => {
            const {features} = await classify(file);
            done(indices.map((index) => Array.from(activationMap(features, index))));
        });"""
    maps = classifier.activation_maps(expected.features, [top[0], sixth]).reshape(2, -1)
    shown = page.execute_async_script(maps_of, base64.b64encode(path.read_bytes()).decode(), [top[0], sixth])
    assert np.abs(np.array(shown) - 255 * maps).max() < 3


def test_examples_drops_and_pastes_are_answered(page, served, known):
    assert "It knows 10 classes: bricks, cells, " in find(page, "#rn50-shown").text
    assert find(page, ".rn50-example").text == "0000"
    find(page, ".rn50-example").click()
    assert "%" in find(page, ".rn50-best").text
    path, label, _ = known[1]
    drop(page, "#rn50-picture", path)
    wait(page, lambda: find(page, ".rn50-best").text.startswith(label))
    path, label, _ = known[2]
    copy(page, served.url, path)
    press_paste(page)
    wait(page, lambda: find(page, ".rn50-best").text.startswith(label))
    tab(page, "Batch")
    press_paste(page)
    assert find(page, ".rn50-card li").text.startswith(label)


def test_what_is_no_picture_gets_a_sentence_and_the_next_picture_an_answer(page, known, tmp_path):
    (tmp_path / "text.jpg").write_text("this is no picture\n")
    find(page, PICTURE).send_keys(str(tmp_path / "text.jpg"))
    assert find(page, ".rn50-alert[role=alert]").text == "The file is text, not a picture."
    find(page, PICTURE).send_keys(str(known[0][0]))
    assert find(page, ".rn50-best").text.startswith(known[0][1])


def test_a_hundred_pictures_do_not_hold_up_the_page_and_go_into_a_csv(page, known, classifier, tmp_path):
    (tmp_path / "broken.jpg").write_text("no picture")
    (tmp_path / "=1+1, formula.jpg").write_bytes(known[0][0].read_bytes())
    pictures = [str(tmp_path / "broken.jpg"), str(tmp_path / "=1+1, formula.jpg")]
    pictures += [str(path) for path, *_ in known] * 17
    tab(page, "Batch")
    page.execute_script(
        """window.longest = 0;
        let before = performance.now();
        const tick = () => {
            window.longest = Math.max(window.longest, performance.now() - before);
            before = performance.now();
            setTimeout(tick, 10);
        };
        tick();"""
    )
    find(page, PICTURES).send_keys("\n".join(pictures))
    wait(page, lambda: page.find_element(By.ID, "rn50-count").text == f"{len(pictures)} pictures", within=90)
    assert page.execute_script("return window.longest") < 500
    cards = page.find_elements(By.CSS_SELECTOR, ".rn50-card")
    assert len(cards) == len(pictures)
    assert cards[0].find_element(By.CSS_SELECTOR, "[role=alert]").text == "The file is text, not a picture."
    assert cards[2].find_element(By.TAG_NAME, "li").text.startswith(known[0][1])
    head, *lines = table(page, tmp_path)
    assert [*head[:5], head[16]] == ["file", "wnid_1", "class_1", "probability_1", "wnid_2", "unsure"]
    assert lines[0] == ["broken.jpg", "The file is text, not a picture."]
    assert lines[1][0] == "'=1+1, formula.jpg"
    for (path, label, expected), line in zip(known, lines[2:], strict=False):
        assert line[0] == path.name
        assert line[2] == label
        assert float(line[3]) == pytest.approx(expected.probabilities.max(), abs=1e-3)
        assert line[16] == str(expected.unsure).lower()
    cards[2].find_element(By.TAG_NAME, "button").click()
    assert find(page, "dialog .rn50-best").text.startswith(known[0][1])
    assert_accessible(page, "A picture of a batch")
    find(page, "dialog .rn50-button").click()
    find(page, "#rn50-clear").click()
    assert not page.find_elements(By.CSS_SELECTOR, ".rn50-card")


def test_an_unsure_answer_says_so_and_what_is_not_seen_has_no_map(page, tmp_path):
    page.execute_script(
        """const probabilities = Float32Array.from([0.3, 0.25, 0.2, 0.1, 0.1, 0.0498, 0.0001, 0.0001, 0, 0]);
        const map = () => Uint8Array.from([0, 85, 170, 255]);
        const answer = {probabilities, unsure: true, shown: "data:,", grid: [2, 2], latency: "", map};
        rn50.show(answer);
        rn50.answerPicture(rn50.addPicture({name: "odd.jpg"}), answer);"""
    )
    assert find(page, ".rn50-best").text == "Unsure\nclosest: bricks, 30.0 %"
    assert "It knows only these 10 classes: bricks, cells, " in find(page, ".rn50-result").text
    assert find(page, ".rn50-legend").text == "less\nmore\n(a map of only 2 × 2 cells)"
    choose_other(page, "zigzag")
    assert find(page, ".rn50-seen figcaption").text == "It sees next to nothing of zigzag here (0.0 %): no map."
    assert not find(page, ".rn50-legend").is_displayed()
    blank = "return document.querySelector('.rn50-seen canvas').getContext('2d').getImageData(0, 0, 448, 448).data"
    assert not any(page.execute_script(f"{blank}.slice(0, 4000)"))
    find(page, ".rn50-row").click()
    assert "Bright where it looked for bricks" in find(page, ".rn50-seen figcaption").text
    assert any(page.execute_script(f"{blank}.slice(0, 4000)"))
    tab(page, "Batch")
    assert find(page, ".rn50-card").text.startswith("odd.jpg\nUnsure; closest:\nbricks")
    assert table(page, tmp_path)[1][-1] == "true"


def test_about_has_figures_curve_and_card(page):
    tab(page, "About")
    assert "top-1 (95 %:" in find(page, ".rn50-tiles").text
    assert page.find_elements(By.CSS_SELECTOR, "#about table")
    assert find(page, ".rn50-promise a").get_attribute("href") == "https://huggingface.co/spaces/me/demo"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessibility_and_phone(served, browser, known, theme):
    shape(browser, 390, 844, mobile=True)
    browser.get(f"{served.url}/?__theme={theme}")
    find(browser, PICTURE).send_keys(str(known[0][0]))
    drawn(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    find(browser, ".rn50-all summary").click()
    assert_accessible(browser, "Classify on a phone")
    for name in ("Batch", "About"):
        tab(browser, name)
        assert_accessible(browser, name)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390


def test_tabs_by_keyboard(page):
    find(page, "#tab-classify").send_keys(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element.get_attribute("id") == "tab-batch"
    assert page.find_element(By.ID, "batch").is_displayed()


def test_after_the_first_visit_it_works_without_a_network(files, browser, known):
    served = Served(files)
    opened(browser, served.url)
    # what the page is made of is kept by then
    browser.execute_async_script("navigator.serviceWorker.ready.then(arguments[0])")
    served.close()
    opened(browser, served.url)
    find(browser, PICTURE).send_keys(str(known[3][0]))
    assert find(browser, ".rn50-best").text.startswith(known[3][1])
    find(browser, ".rn50-example").click()
    wait(browser, lambda: not find(browser, ".rn50-best").text.startswith(known[3][1]))


def test_a_network_that_comes_damaged_or_cut_off_is_named_and_can_be_loaded_again(files, browser, known):
    served = Served(files, headers=False)
    network = next(name for name in files if name.endswith(".onnx.gz"))
    whole = served.files[network]

    def problem():
        return find(browser, "#rn50-failed [role=alert]").text

    try:
        served.files[network] = whole[:1000] + bytes(100) + whole[1100:]
        browser.get(served.url)
        assert f"came damaged: {network}" in problem()
        find(browser, PICTURE).send_keys(str(known[0][0]))
        assert "came damaged" in find(browser, "#rn50-shown [role=alert]").text
        served.files[network] = whole
        served.cut.add(network)
        find(browser, "#rn50-failed button").click()
        wait(browser, lambda: "have arrived" in problem())
        served.cut.clear()
        del served.files[network]
        find(browser, "#rn50-failed button").click()
        wait(browser, lambda: "the server says 404" in problem())
        served.files[network] = whole
        # a picture that came before it
        find(browser, "#rn50-failed button").click()
        find(browser, PICTURE).send_keys(str(known[0][0]))
        assert find(browser, ".rn50-best").text.startswith(known[0][1])
        assert "on your machine" in find(browser, ".rn50-latency").text  # without the headers one thread

        # in the browser's own cache, too
        asked = len(served.requests)
        spoil = """const done = arguments[0];
            caches.open("rn50-network").then(async (cache) => {
                for (const request of await cache.keys()) await cache.put(request, new Response("damaged"));
                done();
            });"""
        browser.execute_async_script(spoil)
        opened(browser, served.url)
        assert any(network in request for request in served.requests[asked:])
        asked = len(served.requests)
        opened(browser, served.url)
        assert not any(".gz" in request for request in served.requests[asked:])
    finally:
        served.close()


def test_without_https_it_works_but_keeps_and_checks_nothing(served, browser, known):
    opened(browser, served.url.replace("127.0.0.1", "insecure.test"))
    assert not browser.execute_script("return isSecureContext")
    find(browser, PICTURE).send_keys(str(known[0][0]))
    assert find(browser, ".rn50-best").text.startswith(known[0][1])


def test_a_browser_without_simd_is_told_so(files, browser):
    worker = build.content_of(files["worker.js"])
    served = Served(files | {"worker.js": b"WebAssembly.validate = () => false;\n" + worker})
    try:
        browser.get(served.url)
        assert "Chrome 91, Firefox 114, Safari 16.4 or newer" in find(browser, "#rn50-failed [role=alert]").text
    finally:
        served.close()


def test_a_browser_without_webassembly_is_told_so(served):
    old = start_browser("--js-flags=--jitless")
    try:
        old.get(served.url)
        assert "WebAssembly" in find(old, "#rn50-failed [role=alert]").text
    finally:
        old.quit()


@pytest.fixture(scope="module")
def small(model, tmp_path_factory):
    """The exported model with a convolution and a classifier in the place of its network, and a temperature."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder, rng = tmp_path_factory.mktemp("small") / "model", np.random.default_rng(0)
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.onnx", "*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config["network"] = build.FOR_WEBGPU
    config["probabilities"]["temperature"] = 0.7
    config["browser"]["network"] = build.FOR_WEBGPU
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"kernel": (16, 3, 8, 8), "weight": (10, 16)}
    weights = {name: rng.standard_normal(shape).astype(np.float32) / 8 for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["images", "kernel"], ["convolved"], strides=[8, 8]),
        helper.make_node("Relu", ["convolved"], ["features"]),
        helper.make_node("GlobalAveragePool", ["features"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight"], ["logits"], transB=1, alpha=4.0),
        helper.make_node("Identity", ["weight"], ["classifier_weight"]),
    ]
    side = config["preprocessing"]["resolution"]
    value = lambda name, *shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)  # noqa: E731
    outputs = [value("logits", "n", 10), value("features", "n", 16, side // 8, side // 8)]
    outputs.append(value("classifier_weight", 10, 16))
    inputs, stored = [value("images", "n", 3, side, side)], [numpy_helper.from_array(w, k) for k, w in weights.items()]
    graph = helper.make_graph(nodes, "small", inputs, outputs, stored)
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(network, folder / build.FOR_WEBGPU)
    return folder


def test_a_graphics_processor_goes_on_where_it_answers_alike_and_sooner(small, known):
    """Chromium's is a program on the processor, which is slower than WebAssembly and not taken by itself."""
    served, classifier, path = Served(build.site(small)), inference.Classifier(small, threads=1), known[0][0]
    expected = classifier.predict(path.read_bytes())
    flags = "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan,WebGPU"
    browser = start_browser(*flags, "--ignore-gpu-blocklist", gpu=True)

    def machine():
        """Where a picture is classified now."""
        browser.execute_script("document.querySelector('.rn50-latency')?.remove()")
        find(browser, PICTURE).send_keys(str(path))
        return find(browser, ".rn50-latency").text.rpartition("your ")[2]

    def tried(probabilities, milliseconds):
        """The same after a graphics processor was tried beside a processor of which this is the answer."""
        browser.execute_async_script(
            """const [picture, probabilities, networkMs, done] = arguments;
            const file = new Blob([Uint8Array.from(atob(picture), (c) => c.charCodeAt(0))]);
            import("./main.js")
                .then((page) => page.tryGraphicsProcessor(file, {probabilities, networkMs}))
                .then(done);""",
            base64.b64encode(path.read_bytes()).decode(),
            probabilities.tolist(),
            milliseconds,
        )
        return machine()

    try:
        opened(browser, served.url)
        assert machine() == "machine"
        assert tried(expected.probabilities + 0.02, 1e9) == "machine"
        assert tried(expected.probabilities, 0) == "machine"
        assert tried(expected.probabilities, 1e9) == "graphics processor"
        top = expected.top(5)
        assert [name for name, _ in rows(browser)] == [classifier.names[k] for k in top]
        assert np.allclose([share for _, share in rows(browser)], 100 * expected.probabilities[top], atol=0.1)
    finally:
        browser.quit()
        served.close()


def test_nothing_is_sent_and_nobody_else_asked(page, served, known):
    find(page, PICTURE).send_keys(str(known[0][0]))
    find(page, ".rn50-best")
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [m["params"]["request"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert len(asked) > 20
    assert {request["method"] for request in asked} == {"GET"}
    own = ("http://127.0.0.1:", "http://insecure.test:", "blob:", "data:")
    assert all(request["url"].startswith(own) for request in asked)
    assert {request.split()[0] for request in served.requests} == {"GET"}
    # and could not be: the page's own policy
    outcome = page.execute_async_script(
        "const done = arguments[0], sent = fetch('http://localhost:9', {mode: 'no-cors'});"
        "sent.then(() => done('sent'), () => done('refused'));"
    )
    assert outcome == "refused"
    assert any("Content Security Policy" in entry["message"] for entry in page.get_log("browser"))


def test_the_site_names_its_files_and_the_headers_of_its_space(files, model):
    listed = json.loads(files["site.json"])
    assert set(listed["files"]) == set(files)
    for large in (listed["network"], listed["runtimes"]["wasm"]["wasm"]):
        assert large["bytes"] == len(build.content_of(files[large["path"]]))
    front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert front["sdk"] == "static"
    assert front["models"] == ["me/net"]
    assert front["app_file"] in files
    # what the Hub's validation asks for, and its documentation of these headers
    assert len(front["short_description"]) <= 60
    assert set(front["custom_headers"]) <= {
        f"cross-origin-{which}-policy" for which in ("embedder", "opener", "resource")
    }
    assert build.site(model, repo="me/net", space_url="https://huggingface.co/spaces/me/demo") == files


def test_a_model_that_was_exported_before_is_refused(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    del config["browser"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(inference.BadModel, match="no network for browsers; export the model again"):
        build.site(tmp_path)


def test_app_sh_serves_it_and_ends_by_a_signal(model, tmp_path):
    if not tiny_model.APP_PYTHON.exists():
        pytest.skip("the Space's packages are not installed; run: bash tools/app.sh --install")
    command = ["bash", tiny_model.link_checkout(tmp_path / "checkout") / "tools/app.sh", str(model), "--browser"]
    environment = {"PATH": os.environ["PATH"]}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        busy = environment | {"GRADIO_SERVER_PORT": port}
        done = subprocess.run(command, env=busy, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: the page cannot be at 127.0.0.1:{port}: Address already in use;")
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        url = re.fullmatch("Open (.*) in a browser; Ctrl-C ends it.\n", running.stdout.readline())[1]
        with OPENER.open(url, timeout=20) as answer:
            assert b"<title>tiny</title>" in answer.read()
            assert answer.headers["cross-origin-embedder-policy"] == "require-corp"
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 0
        assert running.stderr.read() == ""
    finally:
        running.kill()
