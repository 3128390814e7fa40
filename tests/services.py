"""What is talked to over HTTP, each on a port of its own: EC2's instance metadata, S3 by moto, and a proxy."""

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Metadata:
    """IMDSv2 with what spot instances ask for. Set `notice`, `rebalance` or `trouble` at any time.

    trouble: `expired` (tokens are refused), `dropped` (connections are closed), `garbage` (not JSON), `error` (500).
    """

    def __init__(self):
        self.notice = self.rebalance = self.trouble = self.instance_id = None
        self.instance_type, self.market = "g5.2xlarge", "on-demand"
        self.requests = self.tokens_issued = 0
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self):
                service.requests += 1
                if service.trouble == "dropped":
                    return
                if self.path != "/latest/api/token" or not self.headers.get("X-aws-ec2-metadata-token-ttl-seconds"):
                    return self.answer(400, "")
                service.tokens_issued += 1
                self.answer(200, f"token {service.tokens_issued}")

            def do_GET(self):
                service.requests += 1
                if service.trouble == "dropped":
                    return
                if service.trouble == "expired" or not self.headers.get("X-aws-ec2-metadata-token"):
                    return self.answer(401, "")
                if service.trouble == "error":
                    return self.answer(500, "")
                if service.trouble == "garbage":
                    return self.answer(200, "<html>sign in</html>")
                known = {
                    "/latest/meta-data/spot/instance-action": service.notice,
                    "/latest/meta-data/events/recommendations/rebalance": service.rebalance,
                }
                about = {
                    "/latest/meta-data/instance-id": service.instance_id,
                    "/latest/meta-data/instance-type": service.instance_type,
                    "/latest/meta-data/instance-life-cycle": service.market,
                }
                if self.path in about:
                    return self.answer(200, about[self.path])
                found = known.get(self.path)
                self.answer(200 if found else 404, json.dumps(found) if found else "")

            def answer(self, status, text):
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def wait_for_requests(self, count, within=30):
        deadline = time.monotonic() + within
        while self.requests < count:
            assert time.monotonic() < deadline
            time.sleep(0.01)


class Proxy:
    """A proxy that sends whatever it is asked for to `target`, an address; without one it answers 502."""

    def __init__(self, target=None):
        self.requests = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                proxy.requests.append(f"{self.command} {self.path}")
                if not target:
                    return self.send_error(502)
                asked = urllib.request.Request(
                    target + urllib.parse.urlsplit(self.path).path, method=self.command, headers=dict(self.headers)
                )
                with OPENER.open(asked, timeout=60) as answer:
                    self.send_response(answer.status)
                    for name, value in answer.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(answer.read())

            do_HEAD = do_POST = do_CONNECT = do_GET

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    __enter__, __exit__ = Metadata.__enter__, Metadata.__exit__


# Past whatever proxy this machine has.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class MotoS3:
    """moto's server in a process of its own, with the buckets `chaos` and `bucket`."""

    def __init__(self, port=0):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self._command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]

    def __enter__(self):
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for bucket in ("chaos", "bucket"):
            self._make(bucket)
        return self

    def _make(self, bucket, within=60):
        deadline = time.monotonic() + within
        while True:
            try:
                request = urllib.request.Request(f"{self.url}/{bucket}", method="PUT")
                return urllib.request.urlopen(request, timeout=5).close()
            except OSError:
                assert time.monotonic() < deadline
                assert self._process.poll() is None
                time.sleep(0.05)

    def __exit__(self, *error):
        self._process.kill()
        self._process.wait()
