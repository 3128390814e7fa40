"""What huggingface_hub talks to, as far as publishing and downloading need it: repositories, LFS, commits, files."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_" + "x" * 34
# The Hub's own words, as others have published them; but those about a third ZeroGPU Space, which nobody has.
UNPAID = (
    "Static Spaces are free for everyone, but hosting Gradio and Docker Spaces on free cpu-basic requires a PRO "
    "subscription."
)
YOUNG = (
    "You must be subscribed to PRO to host Spaces with ZeroGPU. If you recently created your account, please wait 30 "
    "days or request a community grant."
)
THIRD = "You already host 2 Spaces with ZeroGPU."
DOWNGRADE = (
    "Without a PRO subscription, you can't downgrade this Space to cpu-basic. Pause it instead to stop hardware "
    "charges, or subscribe."
)
LARGE = (".onnx", ".safetensors", ".jpg", ".gz")


class Hub:
    """`with Hub() as hub:` hub.url; hub.repos: {(kind, id): list of commits, each {path: bytes}}.

    Set `refuse` to an HTTP status to have every commit refused with it, `invalid` to what is wrong with every
    README.md. `account` is what it says of "me": a free account; give it isPro, or orgs with their plans. `young`: too
    young for ZeroGPU. hub.settings: what each repository was created with, and hardware that was asked for later.
    """

    def __init__(self):
        self.repos, self.objects, self.settings, self.refuse, self.requests = {}, {}, {}, None, []
        self.account, self.young, self.invalid = {"isPro": False, "orgs": []}, False, None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                hub.requests.append(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.answer(401, {"error": "Invalid credentials"})
                if self.path == "/api/repos/create":
                    asked = json.loads(body)
                    name = f"{asked['organization']}/{asked['name']}"
                    key = (asked.get("type", "model"), name)
                    if refused := asked.get("sdk") in ("gradio", "docker") and hub.refused(key, asked.get("hardware")):
                        return self.answer(*refused)
                    if key in hub.repos:
                        return self.answer(409, {"error": "You already created this repo", "url": f"{hub.url}/{name}"})
                    hub.repos[key], hub.settings[key] = [{}], asked
                    return self.answer(200, {"url": f"{hub.url}/{name}"})
                if match := re.fullmatch(r"/api/spaces/([^/]+/[^/]+)/hardware", self.path):
                    flavor = json.loads(body)["flavor"]
                    if flavor == "cpu-basic" and not hub.paid(match[1]):
                        return self.answer(402, {"error": DOWNGRADE})
                    hub.settings["space", match[1]]["hardware"] = flavor
                    hardware = {"current": None, "requested": flavor}
                    return self.answer(200, {"stage": "BUILDING", "hardware": hardware, "gcTimeout": None})
                if self.path == "/api/validate-yaml":
                    if hub.invalid:
                        return self.answer(400, {"errors": [{"message": hub.invalid}], "warnings": []})
                    return self.answer(200, {"errors": [], "warnings": []})
                if re.fullmatch(r"/(?:spaces/)?(.+)\.git/info/lfs/objects/batch", self.path):
                    wanted = json.loads(body)["objects"]
                    objects = [
                        item | {"actions": {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}} for item in wanted
                    ]
                    return self.answer(200, {"transfer": "basic", "objects": objects})
                kind, name, action = re.fullmatch(r"/api/(model|space)s/([^/]+/[^/]+)/(\w+)/main", self.path).groups()
                if action == "preupload":
                    there = hub.repos[kind, name][-1]
                    files = [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                            "shouldIgnore": False,
                            "oid": hub.content_id(file["path"], there[file["path"]]) if file["path"] in there else None,
                        }
                        for file in json.loads(body)["files"]
                    ]
                    return self.answer(200, {"files": files})
                if hub.refuse:
                    return self.answer(hub.refuse, {"error": "No"})
                self.answer(200, hub.commit(kind, name, [json.loads(line) for line in body.splitlines()]))

            def do_PUT(self):
                hub.requests.append(self.path)
                content = self.rfile.read(int(self.headers["Content-Length"]))
                oid = self.path.rsplit("/", 1)[1]
                assert hashlib.sha256(content).hexdigest() == oid
                hub.objects[oid] = content
                self.answer(200, {})

            def do_GET(self, head=False):
                hub.requests.append(self.path)
                path = unquote(self.path.split("?")[0])
                if path == "/api/whoami-v2":
                    if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                        return self.answer(401, {"error": "Invalid credentials"})
                    token = {"displayName": "test", "role": "write"}
                    account = {"type": "user", "name": "me", "auth": {"accessToken": token}}
                    return self.answer(200, account | hub.account)
                asked = re.match(r"/api/(model|space)s/([^/]+/[^/]+)", path)
                if asked and asked.groups() not in hub.repos:
                    return self.answer(404, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
                if match := re.fullmatch(r"/api/(model|space)s/([^/]+/[^/]+)(/revision/\w+)?", path):
                    return self.answer(200, hub.info(*match.groups()[:2]))
                if match := re.fullmatch(r"/api/(model|space)s/([^/]+/[^/]+)/tree/main/?", path):
                    files = hub.repos[match[1], match[2]][-1]
                    listing = [
                        {"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40} for name in files
                    ]
                    return self.answer(200, listing)
                if match := re.fullmatch(r"/(spaces/)?([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
                    key = ("space" if match[1] else "model", match[2])
                    if hub.private(key) and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                        return self.answer(401, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
                    number = len(hub.repos[key]) - 1 if match[3] == "main" else hub.number(match[3], key)
                    content = hub.repos[key][number][match[4]]
                    headers = {
                        "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
                        "X-Repo-Commit": hub.oid(number, key),
                    }
                    return self.answer(200, content, head=head, **headers)
                self.answer(404, {"error": "Not found"})

            def do_HEAD(self):
                self.do_GET(head=True)

            def answer(self, status, content, head=False, **headers):
                body = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if not head:
                    self.wfile.write(body)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def paid(self, name):
        """Whether the owner of repository `name` has PRO or a plan."""
        orgs = {org["name"]: org.get("plan") for org in self.account.get("orgs", ())}
        return bool({"me": self.account.get("isPro")}.get(name.split("/")[0]) or orgs.get(name.split("/")[0]))

    def refused(self, key, hardware):
        """(status, body) with which a Gradio or Docker Space is not created; None where it is."""
        if self.paid(key[1]):
            return None
        if hardware != "zero-a10g":
            return 402, {"error": UNPAID}
        if self.young or not key[1].startswith("me/"):
            return 402, {"error": YOUNG}
        hosted = [other for other in self.repos if other != key and self.settings[other].get("hardware") == hardware]
        return (403, {"error": THIRD}) if len(hosted) >= 2 else None

    def commit(self, kind, name, lines):
        files = dict(self.repos[kind, name][-1])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.repos[kind, name].append(files)
        oid = self.oid(len(self.repos[kind, name]) - 1, (kind, name))
        prefix = "spaces/" if kind == "space" else ""
        return {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{prefix}{name}/commit/{oid}"}

    def info(self, kind, name):
        files = self.repos[kind, name][-1]
        siblings = [{"rfilename": path} for path in files]
        sha = self.oid(len(self.repos[kind, name]) - 1, (kind, name))
        return {"id": name, "sha": sha, "siblings": siblings, "private": self.private((kind, name)), "gated": False}

    def content_id(self, path, content):
        """By which the client sees that a file has not changed: of LFS its checksum, of others git's."""
        if path.endswith(LARGE):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def private(self, key):
        return self.settings[key].get("visibility") == "private"

    def oid(self, number, key):
        return hashlib.sha1(f"{key} {number}".encode()).hexdigest()

    def number(self, oid, key):
        return next(k for k in range(len(self.repos[key])) if self.oid(k, key) == oid)

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()
