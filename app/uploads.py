"""What guards, reads and deletes what is sent: requests that the page has no use for are refused, no picture stays."""

import asyncio
import base64
import json
import os
import re
import sys
import tempfile
import time
from contextlib import suppress
from glob import glob
from pathlib import Path

from inference import UnreadableImage

# Seconds: how often uploads are looked through, and the age at which they go. The visitor's own browser fetches the
# picture once more, right after uploading it.
DELETE_EVERY, DELETE_AFTER = 5, 20
# What the page and its API clients ask for; Gradio answers more, such as the uploading of recordings, which it keeps.
ASKED = (
    *("/assets/", "/config", "/favicon.ico", "/manifest.json", "/pwa_icon", "/robots.txt", "/static/", "/svelte/"),
    "/theme.css",
    *(
        f"/gradio_api/{name}"
        for name in (
            *("app_id", "call/", "cancel", "file=", "heartbeat/", "info", "login_check", "openapi.json", "queue/"),
            *("reset", "run/", "startup-events", "theme.css", "upload", "user"),
        )
    ),
)
CALLS = ("/gradio_api/call/", "/gradio_api/queue/join")
MIB = 1024 * 1024
# A string of JSON that is a data URI. Shorter ones are few enough in a call, as the pictures of a batch.
DATA_URI = re.compile(rb'"data:[^"]{16384,}+"', re.IGNORECASE)
HOW = (
    'A picture is sent as {"path": ...}, with the path that /gradio_api/upload has given, or as a data URI '
    '("data:image/jpeg;base64,...").'
)


def sent_bytes(sent, folder):
    """The bytes of a picture that somebody sent. UnreadableImage says, in words for that person, why there are none.

    sent: whatever JSON came; a picture is an upload's path or a data URI, as it stands or in an object as Gradio makes
    them. folder: where uploads are; nothing else is read, and nothing is fetched.
    """
    if sent is None:
        raise UnreadableImage("No picture was sent.")
    text = (sent.get("path") or sent.get("url")) if isinstance(sent, dict) else sent
    if not isinstance(text, str):
        raise UnreadableImage(HOW)
    if text[:5].lower() == "data:":
        return from_data_uri(text)
    if text.lower().startswith(("http:", "https:")):
        raise UnreadableImage("Send the picture itself; links are not followed.")
    try:
        path = Path(text).resolve()
        inside = path.is_relative_to(Path(folder).resolve()) and not path.is_dir()
    except (OSError, ValueError):  # no name that a file can have
        inside = False
    if not inside:
        raise UnreadableImage(HOW)
    try:
        return path.read_bytes()
    except OSError:
        raise UnreadableImage("The picture is no longer here: uploads are deleted at once. Send it again.") from None


def from_data_uri(text):
    head, comma, encoded = text.partition(",")
    try:
        if not comma or not head.lower().endswith(";base64"):
            raise ValueError
        # some programs break it into lines
        return base64.b64decode(encoded.encode("ascii").translate(None, b" \t\r\n"), validate=True)
    except ValueError:
        raise UnreadableImage(
            "The data URI is damaged or cut off, or not in base64: data:image/jpeg;base64,... is read."
        ) from None


class Gate:
    """ASGI middleware: requests that the page has no use for get 404, and none brings more than it may.

    Gradio limits the size of a file, not how many there are, nor other parts of a form, nor JSON. folder: of uploads.
    max_bytes: of a picture. batch: how many of those one request may bring as files; as data URIs, what one takes.
    """

    def __init__(self, app, folder, max_bytes, batch):
        self.app, self._folder, self._one_at_a_time = app, folder, asyncio.Semaphore(1)
        self._upload_bytes, self._call_bytes = batch * max_bytes + MIB, 4 * max_bytes // 3 + MIB

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if path != "/" and (not path.startswith(ASKED) or path.lower().startswith("/gradio_api/file=http")):
            return await refuse(send, 404, b"Not found")
        is_call = scope["method"] == "POST" and path.startswith(CALLS)
        left = self._call_bytes if is_call else self._upload_bytes if path.startswith("/gradio_api/upload") else MIB
        too_much = f"At most {left // 1_000_000} MB at a time.".encode()
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > left:
            return await refuse(send, 413, too_much)

        async def limited():
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            # a body without a length: from here on as if the sender had gone
            return message if left >= 0 else {"type": "http.disconnect"}

        started = False

        async def noticed(message):
            nonlocal started
            started = True
            await send(message)

        try:
            if is_call:
                body = await self._call(limited)
                if left < 0 or len(body) > MIB:
                    return await refuse(send, 413, too_much)
                limited = after({"type": "http.request", "body": body}, receive)
            await self.app(scope, limited, noticed)
        except Exception as problem:  # of a disk, or of Gradio's routes; what the page does itself does not end here
            with suppress(OSError):  # of a log that is closed or full
                print(f"{scope['method']} {path}: {type(problem).__name__}: {problem}"[:300], file=sys.stderr)
            if started:
                await send({"type": "http.response.body"})
            elif isinstance(problem, OSError):
                await refuse(send, 507, b"There is no room for this at the moment.")
            else:
                await refuse(send, 400, b"The page does not know what to do with this request.")

    async def _call(self, receive):
        """The body of a call. The pictures of a long one become files, as uploads are: many calls may be queued.

        In place of its data URI stands the path of the file. The JSON is not parsed, which could take any memory.
        """
        with tempfile.SpooledTemporaryFile(MIB, dir=self._folder) as body:
            while True:
                message = await receive()
                body.write(message.get("body", b""))
                if not message.get("more_body"):
                    break
            length = body.tell()
            body.seek(0)
            if length <= MIB:
                return body.read()
            async with self._one_at_a_time:
                return await asyncio.to_thread(lambda: DATA_URI.sub(self._put_aside, body.read()))

    def _put_aside(self, found):
        try:
            picture = from_data_uri(json.loads(found[0]))
        except ValueError:
            return b'"data:"'  # which gets the same answer
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix="sent-", delete=False) as file:
            file.write(picture)
        return json.dumps(file.name).encode()


def after(message, receive):
    """A `receive` that gives `message` before what the other one gives."""
    first = [message]

    async def next_message():
        return first.pop() if first else await receive()

    return next_message


async def refuse(send, status, words):
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(words))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": words})


def sweep(folder, kept):
    """Delete in `folder` for ever what Gradio leaves: uploads that were broken off, and the empty folders of others."""
    while True:
        time.sleep(1)
        coming_in = open_here()
        # deepest first, so that a folder is empty when its turn comes
        for path in sorted(Path(folder).rglob("*"), reverse=True):
            try:
                if path in kept or time.time() - path.lstat().st_ctime < DELETE_AFTER + DELETE_EVERY + 2:
                    continue
                # the first pictures of a batch wait for its last, over a slow line for minutes
                if os.path.realpath(path) in coming_in:
                    continue
                path.rmdir() if path.is_dir() else path.unlink()
            except OSError:  # not empty, or gone by itself
                continue


def open_here():
    """The paths of the files that this process has open, on Linux."""
    paths = set()
    for link in glob("/proc/self/fd/*"):
        with suppress(OSError):
            paths.add(os.readlink(link))
    return paths
