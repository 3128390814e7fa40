"""Where ImageNet comes from, each as far as downloading needs it: the Hub with its store, Kaggle, plain links.

One server speaks for all; a second one, on another port, is the store to which the Hub and Kaggle send for the bytes,
and refuses whoever brings credentials along.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_" + "s" * 34
USER, KEY = "student", "k" * 32
KAGGLE_TOKEN = "KGAT_" + "t" * 32
DATASET = "ILSVRC/imagenet-1k"
COMPETITION = "imagenet-object-localization-challenge"
PAGE = 3  # entries in a page of a tree


class Origins:
    """`with Origins() as origins:` origins.url.

    files: {path: bytes}: `data/...` are the data set's, others Kaggle's and what the links lead to. asked: every GET of
    a file as (name, first byte, last byte), None where no range was asked for. strangers: how often credentials came to
    the store. Set `faults` to a list of words, each of which spoils one answer of more than a byte (`reset`, `cut` in
    the middle of the body, `500`, `429`, `slow`); `gated`, `unaccepted` where the terms are not accepted; `ranged` to
    False where ranges are not understood; `page` to what is answered in the place of links; `pause` to seconds before
    every part; `broken_tree` to how often the list is not there.
    """

    def __init__(self):
        self.files, self.asked, self.faults, self.strangers = {}, [], [], 0
        self.gated = self.unaccepted = False
        self.ranged, self.page, self.pause, self.broken_tree = True, None, 0.0, 0
        self._lock = threading.Lock()
        origins = self

        class Front(Answering):
            def do_GET(self):
                path, _, query = self.path.partition("?")
                path, asked = urllib.parse.unquote(path), self.headers.get("Authorization")
                if path == f"/api/datasets/{DATASET}/tree/main/data":
                    if asked not in (None, f"Bearer {TOKEN}"):
                        return self.text(401, "Invalid credentials in Authorization header")
                    if origins.broken_tree:
                        origins.broken_tree -= 1
                        return self.text(503, "try later")
                    return self.tree(int(dict(urllib.parse.parse_qsl(query)).get("cursor", 0)))
                if found := re.fullmatch(rf"/datasets/{DATASET}/resolve/main/(.+)", path):
                    if asked != f"Bearer {TOKEN}":
                        return self.text(401, "no", **{"X-Error-Code": "GatedRepo"})
                    if origins.gated:
                        return self.text(403, "Access is restricted", **{"X-Error-Code": "GatedRepo"})
                    return self.elsewhere(found[1])
                if found := re.fullmatch(rf"/api/v1/competitions/data/download/{COMPETITION}/(.+)", path):
                    basic = "Basic " + base64.b64encode(f"{USER}:{KEY}".encode()).decode()
                    if asked not in (basic, f"Bearer {KAGGLE_TOKEN}"):
                        return self.text(401, "Unauthenticated")
                    if origins.unaccepted:
                        return self.text(403, "You must accept this competition's rules")
                    return self.elsewhere(found[1])
                if path.startswith("/links/"):
                    if origins.page:
                        return self.text(200, origins.page, **{"Content-Type": "text/html; charset=utf-8"})
                    return self.file(path.removeprefix("/links/"))
                self.text(404, f"nothing at {path}")

            def tree(self, start):
                names = sorted(name for name in origins.files if name.startswith("data/"))
                entries = [
                    {
                        "type": "file",
                        "path": name,
                        "size": len(origins.files[name]),
                        "oid": "0" * 40,
                        "lfs": {"oid": hashlib.sha256(origins.files[name]).hexdigest()},
                    }
                    for name in names[start : start + PAGE]
                ]
                more = {}
                if start + PAGE < len(names):
                    again = f"{origins.url}/api/datasets/{DATASET}/tree/main/data?recursive=true&cursor={start + PAGE}"
                    more = {"Link": f'<{again}>; rel="next"'}
                self.text(200, json.dumps(entries), **more)

            def elsewhere(self, name):
                if name not in origins.files:
                    return self.text(404, "no", **{"X-Error-Code": "EntryNotFound"})
                signed = f"{origins.store_url}/{urllib.parse.quote(name)}?signature=1234"
                self.text(302, "", **{"Location": signed, "X-Linked-Size": str(len(origins.files[name]))})

        class Store(Answering):
            def do_GET(self):
                if self.headers.get("Authorization"):
                    origins.strangers += 1
                    return self.text(400, "only one way to sign in")
                self.file(urllib.parse.unquote(self.path.partition("?")[0])[1:])

        Front.origins = Store.origins = self
        self._servers = [_Server(("127.0.0.1", 0), handler) for handler in (Front, Store)]
        self.url, self.store_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def links(self, *names):
        return [f"{self.url}/links/{name}" for name in names]

    def fault(self):
        with self._lock:
            return self.faults.pop(0) if self.faults else None

    def parts(self):
        """Names and first bytes of what was asked for, without the single bytes of a first look."""
        return [(name, first) for name, first, last in self.asked if (first, last) != (0, 0)]

    def __enter__(self):
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        pass  # a client was killed


class Answering(BaseHTTPRequestHandler):
    origins = None

    def file(self, name):
        """A file, or the range of it that was asked for, with the next fault."""
        origins = self.origins
        content = origins.files.get(name)
        if content is None:
            return self.text(404, "not found")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        first, last = (int(wanted[1]), min(int(wanted[2]), len(content) - 1)) if wanted else (None, None)
        origins.asked.append((name, first, last))
        tag = hashlib.md5(content).hexdigest()
        headers = {"ETag": f'"{tag}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        status, body = 200, content
        if wanted and origins.ranged:
            status, body = 206, content[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        fault = origins.fault() if len(body) > 1 else None
        if len(body) > 1:
            time.sleep(origins.pause)
        if fault in ("500", "429"):
            return self.text(int(fault), "later", **({"Retry-After": "0"} if fault == "429" else {}))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "slow":
            for k in range(0, len(body), max(1, len(body) // 5)):
                self.wfile.write(body[k : k + max(1, len(body) // 5)])
                time.sleep(0.02)
        elif fault in ("reset", "cut"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            if fault == "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.close()
        else:
            self.wfile.write(body)

    def text(self, status, content, **headers):
        body = content.encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass
