"""What guards and deletes uploads: requests that the page has no use for are refused, and no picture stays."""

import os
import time
from contextlib import suppress
from glob import glob
from pathlib import Path

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
MIB = 1024 * 1024


class Gate:
    """ASGI middleware: requests that the page has no use for get 404, and none brings more than it may.

    Gradio limits the size of a file, not how many there are, nor other parts of a form, nor JSON. upload_bytes: of all
    files of one request together.
    """

    def __init__(self, app, upload_bytes):
        self.app, self._upload_bytes = app, upload_bytes

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"]
        if path != "/" and (not path.startswith(ASKED) or path.lower().startswith("/gradio_api/file=http")):
            return await refuse(send, 404, b"Not found")
        left = (self._upload_bytes if path.startswith("/gradio_api/upload") else 0) + MIB
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > left:
            return await refuse(send, 413, f"At most {left // 1_000_000} MB at a time.".encode())

        async def limited():
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            # a body without a length: from here on as if the sender had gone
            return message if left >= 0 else {"type": "http.disconnect"}

        return await self.app(scope, limited, send)


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
