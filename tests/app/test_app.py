"""The running page over HTTP: right answers, clear messages, bounded memory, many users, and nothing kept."""

import base64
import io
import itertools
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import requests
from PIL import Image

from tests import bombs, tiny_model
from tests.conftest import ROOT
from tests.publishing.test_export import network_of
from tests.services import Proxy

sys.path.insert(0, str(ROOT / "app"))
import inference

# What deletes uploads runs every 5 s and takes what is older than 20; what Gradio forgets goes after 27.
KEPT_AT_MOST = 30


@pytest.fixture(scope="module")
def known(textures, exported):
    """(path, label, probability) of pictures that the exported network is right on, and sure of."""
    model, found = inference.Classifier(exported[0]), []
    for path in sorted(textures.glob("val/*/*.jpg")):
        prediction = model.predict(path.read_bytes())
        best = prediction.top(1)[0]
        if model.labels[best]["wnid"] == path.parent.name and not prediction.unsure:
            found.append((path, model.names[best], float(prediction.probabilities[best])))
    assert len(found) > 20
    return found


@pytest.fixture(scope="module")
def uploaded(app, known, tmp_path_factory):
    """(when, the files) a picture had been answered and another upload broken off; the last test looks for both."""
    mine = tmp_path_factory.mktemp("mine") / "mine.png"
    Image.open(known[0][0]).crop((0, 0, 60, 60)).save(mine)
    answer(app, mine)
    assert call(app, [uri(mine.read_bytes() + bytes(2_000_000))])[0] == "complete"
    begun = b'--x\r\nContent-Disposition: form-data; name="files"; filename="half.jpg"\r\n\r\n' + bytes(200_000)
    assert send(app, begun, b"Content-Length: 900000\r\n", read=False) == b""
    deadline = time.monotonic() + 10
    while not [path for path in app.uploads() if path.name.startswith("tmp")]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    there = [path for path in app.uploads() if path.name == "mine.png" or path.name.startswith(("tmp", "sent-"))]
    assert len(there) == 3, there
    return time.monotonic(), there


@pytest.fixture(scope="module")
def coming_in(app, known):
    """(connection, the rest to be sent, when it began): two pictures in one upload, of which one has arrived."""
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n'
    parts = [head % (b"slow%d.jpg" % place, known[place][0].read_bytes()) for place in range(2)]
    host, port = app.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        length = sum(map(len, parts)) + len(b"--x--\r\n")
        connection.sendall(
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: page\r\nConnection: close\r\nContent-Length: %d\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n%s" % (length, parts[0] + parts[1][:200])
        )
        yield connection, parts[1][200:] + b"--x--\r\n", time.monotonic()


def send(app, body, *headers, read=True):
    """The answer to a POST of multipart data, the connection to which is closed unless it is to be read."""
    host, port = app.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        kind = b"Content-Type: multipart/form-data; boundary=x\r\n"
        connection.sendall(
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: page\r\n" + kind + b"".join(headers) + b"\r\n" + body
        )
        return connection.recv(10_000) if read else b""


def answer(app, path):
    event, data = app.predict(path)
    assert event == "complete", data
    return json.loads(data)[0]


def test_predict_gives_what_the_network_says(app, known, exported, tiny_checkpoint, uploaded, coming_in):
    path, label, probability = known[0]
    got = answer(app, path)
    assert got["label"] == label
    assert got["confidences"][0]["probability"] == pytest.approx(probability, abs=0.01)
    assert len(got["confidences"]) == 5
    assert got["confidences"][0]["wnid"] == path.parent.name
    assert got["unsure"] is False
    assert got["milliseconds"]["network"] > 0
    # and the network is the checkpoint's
    import torch

    logits = network_of(tiny_checkpoint)(torch.from_numpy(tiny_model.seen(path))[None])[0]
    names = [entry["wnid"] for entry in json.loads((exported[0] / "config.json").read_text())["labels"]]
    assert names[int(logits.argmax())] == path.parent.name


def variants(folder, source):
    """The same picture in forms that break naive programs."""
    image = Image.open(source).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(folder / "rotated.png", exif=exif)
    image.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    image.convert("RGBA").save(folder / "rgba.png")
    image.save(folder / "animated.webp", save_all=True, append_images=[Image.new("RGB", image.size)], lossless=True)
    image.save(folder / "named wrongly.gif", "PNG")
    image.save(folder / "größe <b>.png")
    return sorted(folder.iterdir())


def test_the_same_picture_in_other_forms_gets_the_same_answer(app, known, tmp_path):
    path, label, probability = max(known, key=lambda entry: entry[2])
    for other in variants(tmp_path, path):
        got = answer(app, other)
        assert got["label"] == label, other.name
        assert got["confidences"][0]["probability"] == pytest.approx(probability, abs=0.1), other.name


def bad_files(folder, jpeg):
    data = jpeg.read_bytes()
    (folder / "text.jpg").write_text("this is no picture\n")
    (folder / "half.jpg").write_bytes(data[: len(data) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "bomb.png").write_bytes(bombs.png(12000))
    (folder / "bomb.webp").write_bytes(bombs.webp())
    (folder / "scans.jpg").write_bytes(bombs.jpeg_of_many_scans(2000, 500))
    (folder / "script.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>")
    return sorted(folder.iterdir())


def test_bad_files_get_a_clear_message_and_memory_stays_bounded(app, known, tmp_path):
    answer(app, known[0][0])
    before = app.peak_mib()
    for path in bad_files(tmp_path, known[0][0]):
        event, data = app.predict(path)
        message = json.loads(data)["error"]
        assert event == "error"
        assert re.search("not a picture|cut off|empty|megapixels|too many parts|export it as", message), (
            path.name,
            message,
        )
        assert str(app.scratch) not in data
        assert "Traceback" not in data
    large = tmp_path / "large.jpg"
    Image.new("RGB", (11000, 10000), "green").save(large, quality=20)
    assert answer(app, large)["label"]
    assert app.peak_mib() - before < 450
    assert answer(app, known[0][0])["label"] == known[0][1]


def test_what_was_not_uploaded_is_neither_read_nor_fetched(app, exported):
    for path in ("/etc/passwd", str(exported[0] / "config.json"), str(ROOT / "README.md"), "http://127.0.0.1:9/a.jpg"):
        event, data = app.ask(path)
        assert event == "error"
        assert "root:" not in data
        assert str(exported[0]) not in data
        assert requests.get(f"{app.url}/gradio_api/file={path}", timeout=20).status_code in (403, 404)
    event, data = app.ask("http://127.0.0.1:9/a.jpg")
    assert json.loads(data)["error"] == "Send the picture itself; links are not followed."
    event, data = app.ask("/nowhere/none.jpg", endpoint="predict")
    assert event == "error"


def uri(data, kind="image/jpeg;base64"):
    return f"data:{kind},{base64.b64encode(data).decode()}"


def call(app, sent, **how):
    """(event, what came) of the API's answer to `sent`. how: in place of that, of requests.post."""
    address = f"{app.url}/gradio_api/call/predict"
    begun = requests.post(address, timeout=60, **(how or {"json": {"data": sent}}))
    assert begun.status_code == 200, begun.text
    answered = requests.get(f"{address}/{begun.json()['event_id']}", timeout=60).text
    event, data = re.fullmatch(r"event: (\w+)\ndata: (.*)", answered.strip().split("\n\n")[-1]).groups()
    return event, json.loads(data)


def joined(app, function, sent):
    """What a function answers to `sent` by way of the queue, as the page itself asks."""
    session = f"{function}-{next(NUMBERS)}"
    body = {"data": sent, "fn_index": function, "session_hash": session}
    requests.post(f"{app.url}/gradio_api/queue/join", json=body, timeout=60).raise_for_status()
    stream = requests.get(f"{app.url}/gradio_api/queue/data?session_hash={session}", stream=True, timeout=60)
    messages = (json.loads(line[5:]) for line in stream.iter_lines() if line)
    return next(message["output"] for message in messages if message["msg"] == "process_completed")


def shares(answer):
    """The probabilities of an answer to the page."""
    return np.frombuffer(base64.b64decode(answer["probabilities"]), "<f4")


NUMBERS = itertools.count()
FILE = {"_type": "gradio.FileData"}
NO_PICTURES = {
    "links are not followed": [
        *("http://127.0.0.1:9/a.jpg", "HTTPS://example.com/a.jpg", {"path": "HTTP://127.0.0.1:9/a.jpg", "meta": FILE}),
        *({"path": None, "url": "http://127.0.0.1:9/a.jpg", "meta": FILE}, {"url": "https://example.com/a.jpg"}),
    ],
    "A picture is sent as": [
        *("", "hello", "/9j/4AAQSkZJRg==", [], [1], [{"path": "/etc/passwd"}], 0, 1.5, True, {}, {"meta": FILE}),
        *({"path": 5, "meta": FILE}, {"path": ["a"], "meta": FILE}, {"path": {"path": "a"}}, {"data": "data:,"}),
        *("/etc/passwd", {"path": "/etc/passwd", "meta": FILE}, {"path": "/etc/passwd", "meta": "x"}),
        *({"path": "/etc/passwd", "meta": None}, {"path": "/etc/passwd", "is_stream": True, "meta": FILE}),
        *({"path": "file:///etc/passwd", "meta": FILE}, {"path": "/x" * 3000, "meta": FILE}, {"path": "/tmp/\0"}),
        *({"path": "/tmp/\ud800", "meta": FILE}, {"path": "README.md", "meta": FILE}, {"path": "/tmp", "meta": FILE}),
    ],
    "The data URI is": [
        *("data:", "data:image/png;base64", "data:text/plain,hello", "data:image/jpeg;base64,$$$$", "data:;base64,AAA"),
        *("data:;base64,\u00e4\u00f6", "data:;base64,\ud800", {"path": "data:image/png;base64,AAAAA", "meta": FILE}),
    ],
    "The file is": [uri(b"hello", "text/plain;base64"), uri(b""), {"url": uri(b"<html></html>")}],
}


def test_whatever_is_sent_to_the_api_gets_a_sentence_and_the_log_nothing(app):
    """Nothing is fetched, and nothing outside the uploads is read; the last test but two looks whom the page asked."""
    said = app.log.read_text()
    for sentence, all_sent in NO_PICTURES.items():
        for sent in all_sent:
            event, data = call(app, [sent])
            assert event == "error", sent
            assert sentence in (data["error"] or ""), (str(sent)[:80], data)
    assert "No picture" in call(app, [None])[1]["error"]
    assert "No picture" in call(app, [])[1]["error"]
    assert "larger than 20 MB" in call(app, [uri(bytes(inference.MAX_BYTES + 1))])[1]["error"]
    assert app.log.read_text() == said


def test_the_functions_of_the_page_answer_whatever_they_are_sent_and_a_batch_says_to_which(app, known):
    functions = {
        each["api_name"]: each for each in requests.get(f"{app.url}/config", timeout=20).json()["dependencies"]
    }
    in_page = {name for name, function in functions.items() if not function["backend_fn"]}
    assert set(functions) - in_page == {"load_example", "classify", "classify_all", "predict"}, "send to a new one, too"
    said, (path, _, probability) = app.log.read_text(), known[0]
    good = {"path": app.upload(path), "meta": FILE, "orig_name": "good.jpg"}
    for sentence, sent in ((words, sent) for words, all_sent in NO_PICTURES.items() for sent in all_sent):
        assert sentence in str(joined(app, functions["classify"]["id"], [sent])), sent
        assert "no such example" in str(joined(app, functions["load_example"]["id"], [{"path": sent, "meta": FILE}]))
        batch = [good, sent, uri(path.read_bytes())]
        first, second, third = joined(app, functions["classify_all"]["id"], [batch])["data"][0]
        assert shares(first).max() == pytest.approx(probability, abs=0.01)
        assert shares(third).max() == pytest.approx(probability, abs=0.01)
        assert sentence in second["problem"]
        assert [first["path"], third["path"]] == [good["path"], None]
    for name, sent in ((name, sent) for name in in_page for sent in (0, None, "x")):
        assert "error" in joined(app, functions[name]["id"], [sent])
    for sent in (True, 99, -1, None, "x", [0]):
        answer = joined(app, functions["load_example"]["id"], [sent])
        assert sent is True or "no such example" in answer["error"]
    assert "A picture is sent as" in joined(app, functions["classify_all"]["id"], [5])["data"][0][0]["problem"]
    assert joined(app, functions["classify_all"]["id"], [None])["data"] == [[]]
    assert len(joined(app, functions["classify_all"]["id"], [["x"] * 30])["data"][0]) == 24
    assert app.log.read_text() == said


def test_a_data_uri_is_a_picture_in_whatever_form_it_comes(app, known):
    path, label, probability = known[1]
    small = path.read_bytes()
    large = small + os.urandom(inference.MAX_BYTES - len(small))  # after the end of a JPEG all is allowed
    lines = base64.encodebytes(small).decode()
    before = app.peak_mib()
    forms = [uri(small), uri(small, "image/png;charset=x;base64").replace("data:", "DATA:"), f"data:;base64,{lines}"]
    for sent in (*forms, *({"url": form} for form in forms), {"path": forms[0], "meta": FILE}, uri(large)):
        event, data = call(app, [sent])
        assert event == "complete", (str(sent)[:60], data)
        assert data[0]["label"] == label
        assert data[0]["confidences"][0]["probability"] == pytest.approx(probability, abs=0.01)
    as_json = json.dumps({"data": [{"url": uri(large), "path": None}]}).encode()
    kind = {"Content-Type": "application/json"}
    for body in (as_json.replace(b"/", b"\\/"), (as_json[at : at + 999_999] for at in range(0, len(as_json), 999_999))):
        assert call(app, None, data=body, headers=kind)[1][0]["label"] == label
    # many at once wait as files
    with ThreadPoolExecutor(6) as users:
        assert all(got[1][0]["label"] == label for got in users.map(lambda _: call(app, [uri(large)]), range(6)))
    assert app.peak_mib() - before < 450
    assert call(app, None, json={"data": [uri(large)[:-3]]})[1]["error"].startswith("The data URI is damaged")


def test_a_request_that_gradio_does_not_know_is_one_line_of_the_log(app):
    said = len(app.log.read_text())
    api = f"{app.url}/gradio_api"
    for sent in (
        requests.post(f"{api}/call/nothing", json={"data": [1]}, timeout=20),
        requests.post(f"{api}/call/v2/predict", json={"nothing": 1}, timeout=20),
        requests.post(f"{api}/queue/join", json={"data": [1], "fn_index": 99, "session_hash": "x"}, timeout=20),
    ):
        assert (sent.status_code, sent.text) == (400, "The page does not know what to do with this request.")
    assert "event: error" in requests.get(f"{api}/call/predict/nothing", timeout=20).text
    added = app.log.read_text()[said:].splitlines()
    assert len(added) == 4, added


def test_a_disk_without_room_is_one_sentence(app, known):
    """Files of more than 2 MB fail as they do on a full disk."""
    resource.prlimit(app.process.pid, resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))
    try:
        more = os.urandom(3_000_000)
        for sent in (
            requests.post(f"{app.url}/gradio_api/upload", files={"files": ("a.jpg", more)}, timeout=60),
            requests.post(f"{app.url}/gradio_api/call/predict", json={"data": [uri(more)]}, timeout=60),
        ):
            assert (sent.status_code, sent.text) == (507, "There is no room for this at the moment.")
    finally:
        resource.prlimit(app.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "Traceback" not in app.log.read_text()
    assert answer(app, known[0][0])["label"] == known[0][1]


def test_what_gradio_offers_beyond_the_page_is_closed(app):
    recording = requests.post(f"{app.url}/gradio_api/process_recording", files={"video": b"x" * 100}, timeout=20)
    assert recording.status_code == 404
    shut = ("proxy=https://me.hf.space/", "file=http://example.com/a.jpg", "file=HTTPS://example.com/", "runs")
    for path in (*(f"/gradio_api/{name}" for name in (*shut, "vibe-code", "deep_link?session_hash=a")), "/monitoring"):
        assert requests.get(app.url + path, timeout=20).status_code == 404, path
    passing_by = requests.post(f"{app.url}/gradio_api/run/predict", json={"data": [None]}, timeout=20)
    assert (passing_by.status_code, "join the queue" in passing_by.text) == (404, True)


def test_an_upload_that_is_too_large_is_refused(app, tmp_path):
    big, before = io.BytesIO(bytes(inference.MAX_BYTES + 1_000_000)), app.uploads()
    sent = requests.post(f"{app.url}/gradio_api/upload", files={"files": ("big.jpg", big)}, timeout=60)
    assert sent.status_code == 413
    assert set(app.uploads()) <= set(before)


def test_no_request_brings_more_than_the_page_has_use_for(app):
    call = f"{app.url}/gradio_api/call/predict"
    for much in ("x" * 2_000_000, "x" * 40_000_000, ["data:"] * 300_000):
        refused = requests.post(call, json={"data": [much]}, timeout=60)
        assert (refused.status_code, refused.text) == (413, "At most 27 MB at a time.")
    assert b" 413 " in send(app, b"", b"Content-Length: %d\r\n" % (25 * inference.MAX_BYTES))

    def status(megabytes):
        """Of a body that does not say how much it is."""
        pieces = iter([b'{"data": ["', *[b"x" * 1_000_000] * megabytes, b'"]}'])
        try:
            return requests.post(
                call, data=pieces, headers={"Content-Type": "application/json"}, timeout=60
            ).status_code
        except requests.ConnectionError:
            return None

    assert status(0) == 200
    assert status(30) != 200


def test_only_predict_is_offered(app):
    offered = requests.get(f"{app.url}/gradio_api/info", timeout=20).json()
    assert list(offered["named_endpoints"]) == ["/predict"]
    assert offered["unnamed_endpoints"] == {}
    assert [entry["parameter_name"] for entry in offered["named_endpoints"]["/predict"]["parameters"]] == ["image"]


def test_ten_users_at_once(app, known):
    pictures = [entry[:2] for entry in known[:10]]

    def user(number):
        took = []
        for path, label in pictures[number:] + pictures[:number]:
            started = time.perf_counter()
            assert answer(app, path)["label"] == label
            took.append(time.perf_counter() - started)
        return took

    with ThreadPoolExecutor(10) as users:
        took = [seconds for times in users.map(user, range(10)) for seconds in times]
    assert len(took) == 100
    assert np.percentile(took, 95) < 10  # studies/space/benchmark_app.py measures it on an idle machine


def snippets(app):
    """{language: code} of the API tab."""
    components = requests.get(f"{app.url}/config", timeout=20).json()["components"]
    text = next(c["props"]["value"] for c in components if c["props"].get("elem_id") == "rn50-api")
    return dict(re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL))


def test_the_examples_of_the_api_tab_run_as_they_stand(app, known, tmp_path):
    path, label, _ = known[1]
    (tmp_path / "picture.jpg").write_bytes(path.read_bytes())
    code = snippets(app)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = {
        language: subprocess.run(
            [*program, code[language]], cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment
        )
        for language, program in {"python": [sys.executable, "-c"], "bash": ["bash", "-euc"]}.items()
    }
    assert f"'label': '{label}'" in done["python"].stdout, done["python"].stderr
    assert f'"label": "{label}"' in done["bash"].stdout, done["bash"].stderr


def test_the_app_says_in_one_line_when_there_is_no_model():
    command = [tiny_model.APP_PYTHON, ROOT / "app/app.py"]
    done = subprocess.run(command, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "error: no model: set MODEL_DIR to an exported one, or publish this with tools/publish.py\n"


@contextmanager
def opened(tmp_path, model, *, redirected="", **environment):
    """(what it says, its address) of a page that tools/app.sh opens at no certain port, in the file tmp_path/log."""
    script, log = tiny_model.link_checkout(tmp_path / "checkout") / "tools/app.sh", tmp_path / "log"
    settings = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "HOME": str(tmp_path), **environment}
    command = ["bash", "-c", f'exec bash "$@" {redirected}', "bash", script, model]
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=settings, cwd=tmp_path, stdout=file, stderr=file)
    try:
        yield process, log
    finally:
        process.terminate()
        assert process.wait(20) == 0
        assert "Traceback" not in log.read_text()
        assert not list(tmp_path.glob("uploads-*"))


def wait_until(process, condition):
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def test_the_page_opens_behind_a_proxy_of_any_kind_beside_another_page(exported, tmp_path, app):
    """Its model is named with ~, and what is not ASCII. The port that it takes is said, and stands in its API tab."""
    shutil.copytree(exported[0], tmp_path / "m\u00f6 d\u00ebl", copy_function=os.symlink)
    proxies = {"HTTP_PROXY": "http://127.0.0.1:9", "https_proxy": "http://[no", "ALL_PROXY": "socks5://127.0.0.1:9"}
    proxies |= {"NO_PROXY": "fd00::/8,[::1]", "no_proxy": "*.example.com,,http://["}
    with socket.socket() as other, opened(tmp_path, "~/m\u00f6 d\u00ebl", **proxies, LANG="C") as (process, log):
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the page does: connections linger
        with suppress(OSError):  # somebody is there already
            other.bind(("127.0.0.1", 7860))
            other.listen()
        said = r"^Port 7860 is in use. Open (http://127\.0\.0\.1:78\d\d) in a browser; Ctrl-C ends it.$"
        url = wait_until(process, lambda: re.search(said, log.read_text(), re.MULTILINE))[1]
        assert f'"{url}");' in requests.get(f"{url}/config", timeout=20).text.replace("\\", "")


def test_the_page_asks_no_proxy_and_needs_no_streams(exported, tmp_path, app):
    with Proxy() as proxy, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        named = dict.fromkeys(("http_proxy", "HTTPS_PROXY", "all_proxy"), proxy.url)
        streams = {"redirected": "<&- >&-", "GRADIO_SERVER_PORT": port}
        with opened(tmp_path, exported[0], **named, **streams) as (process, _):

            def up():
                with suppress(OSError):
                    return requests.get(f"http://127.0.0.1:{port}/config", timeout=20)

            assert wait_until(process, up).status_code == 200
        assert proxy.requests == []


def test_a_port_or_a_folder_that_cannot_be_had_is_one_line(exported, tmp_path, app):
    port = app.url.rsplit(":", 1)[1]
    as_anyone = ["setpriv", "--bounding-set=-net_bind_service"] if os.geteuid() == 0 else []
    for limit, before, settings, message in (
        ("", [], {"GRADIO_SERVER_PORT": port}, f"the page cannot be at 127.0.0.1:{port}: Address already in use;"),
        ("", as_anyone, {"GRADIO_SERVER_PORT": "80"}, "the page cannot be at 127.0.0.1:80: Permission denied;"),
        ("", [], {"GRADIO_SERVER_PORT": "80a"}, "GRADIO_SERVER_PORT is '80a', not a port"),
        ("", [], {"GRADIO_SERVER_PORT": "70000"}, "GRADIO_SERVER_PORT is '70000', not a port"),
        (
            "",
            [],
            {"GRADIO_SERVER_NAME": "8.8.8.8"},
            "the page cannot be at 8.8.8.8:7860: Cannot assign requested address",
        ),
        # no file can be written, as on a full disk
        ("ulimit -f 0; ", [], {}, "no folder for uploads: No usable temporary directory"),
    ):
        command = [*before, "bash", "-c", f'{limit}exec "$@"', "bash", tiny_model.APP_PYTHON, ROOT / "app/app.py"]
        environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "MODEL_DIR": str(exported[0]), **settings}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1, done.stderr
        assert done.stderr.startswith(f"error: {message}"), done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_app_sh_refuses_what_is_no_model(tmp_path):
    for arguments, status, message in (
        ([], 2, "error: usage: bash tools/app.sh MODEL_FOLDER"),
        ([str(tmp_path)], 1, f"error: no exported model in {tmp_path}"),
    ):
        done = subprocess.run(["bash", ROOT / "tools/app.sh", *arguments], capture_output=True, text=True, timeout=20)
        assert done.returncode == status
        assert done.stderr.startswith(message)


def test_requirements_pin_all_that_is_installed():
    if not tiny_model.APP_PYTHON.exists():
        pytest.skip("the Space's packages are not installed; run: bash tools/app.sh --install")
    pinned = [line for line in (ROOT / "app/requirements.txt").read_text().splitlines() if not line.startswith("#")]
    frozen = subprocess.run([tiny_model.APP_PYTHON, "-m", "pip", "freeze"], capture_output=True, text=True, timeout=60)
    # the one that ZeroGPU's build pins itself
    assert sorted(re.sub("^spaces==.*", "spaces", line) for line in frozen.stdout.split()) == sorted(pinned)
    pinned.remove("spaces")
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in pinned)
    readme = (ROOT / "app/README.md").read_text()
    assert f"sdk_version: {next(line for line in pinned if line.startswith('gradio=='))[8:]}\n" in readme
    assert not any(line.startswith(("torch", "ffcv", "rn50")) for line in pinned)


def test_the_pins_allow_what_a_space_installs_with_them():
    """Spaces ask for gradio[oauth,mcp] beside the requirements, uvicorn>=0.14.0 and websockets>=10.4."""
    from packaging.requirements import Requirement

    if not tiny_model.APP_PYTHON.exists():
        pytest.skip("the Space's packages are not installed; run: bash tools/app.sh --install")
    code = "from importlib.metadata import requires; print(*requires('gradio'), sep='\\n')"
    listed = subprocess.run([tiny_model.APP_PYTHON, "-c", code], capture_output=True, text=True, timeout=60).stdout
    lines = (ROOT / "app/requirements.txt").read_text().splitlines()
    pinned = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line and line[0] != "#")
    asked = [Requirement(line) for line in [*listed.splitlines(), "uvicorn>=0.14.0", "websockets>=10.4"]]
    asked = [
        wanted
        for wanted in asked
        if not wanted.marker
        or any(wanted.marker.evaluate({"extra": extra, "python_version": "3.12"}) for extra in ("", "oauth", "mcp"))
    ]
    assert {wanted.name for wanted in asked} >= {"mcp", "authlib", "pydantic"}
    for wanted in asked:
        name = wanted.name.lower().replace("_", "-")
        if name in pinned:
            assert wanted.specifier.contains(pinned[name]), f"{wanted} of the Space, {pinned[name]} of ours"


def test_the_page_reaches_nobody_and_writes_nothing_elsewhere(app):
    """No fonts, version checks or usage reports, of Gradio, huggingface_hub or ONNX Runtime: it works offline."""
    assert app.contacted() <= {"127.0.0.1", "localhost", "::1", "0.0.0.0"}
    assert app.contacted(), "it asks itself whether it is up, so that something is to be seen"
    assert list(app.home.rglob("*")) == []
    written = {path.name for path in app.scratch.iterdir() if not path.name.startswith("uploads-")}
    assert written == {"app.log", "checkout", "contacted", "home", "watch"}


def test_what_comes_in_over_a_slow_line_is_there_when_the_last_of_it_is(app, known, coming_in):
    """Of a batch the first pictures wait for longer than uploads are kept. Late in this file, as it waits for that."""
    connection, rest, began = coming_in
    time.sleep(max(0.0, began + KEPT_AT_MOST - time.monotonic()))
    connection.sendall(rest)
    answered = b"".join(iter(lambda: connection.recv(10_000), b""))
    assert b" 200 OK" in answered, answered
    paths = json.loads(answered.split(b"\r\n\r\n")[1])
    assert len(paths) == 2
    for path, (_, label, _) in zip(paths, known, strict=False):
        event, data = app.ask(path)
        assert event == "complete", data
        assert json.loads(data)[0]["label"] == label


def test_nothing_that_was_uploaded_is_left(app, uploaded):
    """Last in this file, so that little is left to wait for."""
    when, paths = uploaded
    while kept := [path for path in paths if path.exists()]:
        assert time.monotonic() - when < KEPT_AT_MOST, kept
        time.sleep(0.2)
