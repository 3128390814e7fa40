"""The page on ZeroGPU, the hardware of a free account's Space: it starts there, and uses no visitor's quota."""

import os
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests

from tests import tiny_model
from tests.app.test_app import answer, joined, known, shares, uri  # noqa: F401
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def device():
    """(address, what it was asked for) of what stands for ZeroGPU's own service, which says yes to everything."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_the_page_reports_that_it_has_started_and_asks_for_no_gpu(exported, known, device, tmp_path):  # noqa: F811
    if not tiny_model.APP_PYTHON.exists():
        pytest.skip("the Space's packages are not installed; run: bash tools/app.sh --install")
    address, asked = device
    settings = {"SYSTEM": "spaces", "SPACE_ID": "me/demo", "HTTP_PROXY": "http://127.0.0.1:9"}
    settings |= {"SPACES_ZERO_GPU": "true", "SPACES_ZERO_DEVICE_API_URL": address, "SPACES_GRADIO_AUTO_WRAP": "true"}
    page = tiny_model.App(exported[0], tmp_path, **settings)
    try:
        # without it ZeroGPU ends the page: "No @spaces.GPU function detected during startup"
        assert asked == ["/startup-report"]
        path, label, probability = known[0]
        assert answer(page, path)["label"] == label
        functions = requests.get(f"{page.url}/config", timeout=20).json()["dependencies"]
        places = {function["api_name"]: function["id"] for function in functions}
        one = joined(page, places["classify"], [uri(path.read_bytes())])["data"][0]
        [other] = joined(page, places["classify_all"], [[uri(path.read_bytes())]])["data"][0]
        assert [shares(one).max(), shares(other).max()] == pytest.approx([probability] * 2, abs=0.01)
        assert asked == ["/startup-report"]
        assert list(page.home.rglob("*")) == []
    finally:
        page.close()


def test_elsewhere_nothing_of_zero_gpu_is_imported(exported, tmp_path):
    if not tiny_model.APP_PYTHON.exists():
        pytest.skip("the Space's packages are not installed; run: bash tools/app.sh --install")
    code = "import app, sys; print([name for name in sys.modules if name.split('.')[0] == 'spaces'])"
    environment = {"PATH": os.environ["PATH"], "MODEL_DIR": str(exported[0]), "TMPDIR": str(tmp_path)}
    environment["SPACES_ZERO_GPU"] = "false"
    command = [tiny_model.APP_PYTHON, "-c", code]
    done = subprocess.run(command, cwd=ROOT / "app", env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
