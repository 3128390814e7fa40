"""Byte ranges over HTTP with the standard library alone: a laptop that only launches has no more.

Credentials go to the host that they are for and are dropped at a redirect to another one, as to a store with signed
addresses. No error here names an address, because some are personal.
"""

import http.client
import re
import urllib.error
import urllib.parse
import urllib.request

TIMEOUT = 60.0  # seconds without a single byte
AGENT = "rn50 (ImageNet to .beton files)"
REPEATABLE = {408, 425, 429}  # and all from 500 on


class Refused(Exception):
    """The server has answered with an HTTP status from 400 on.

    code: Hugging Face's word for it. elsewhere: whether a host answered to which the first one has sent us.
    retry_after: seconds that the server asks for, or None.
    """

    def __init__(self, status, code="", elsewhere=False, retry_after=None):
        super().__init__(f"HTTP status {status}")
        self.status, self.code, self.elsewhere, self.retry_after = status, code, elsewhere, retry_after

    @property
    def repeatable(self):
        # A signed address may have expired on the way; asking the first host again gives a new one.
        return self.status in REPEATABLE or self.status >= 500 or self.elsewhere


class Broken(Exception):
    """No answer, or one that ended early: worth another try."""

    repeatable, retry_after = True, None


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, *answer):
        following = super().redirect_request(request, *answer)
        if following and host(following.full_url) != host(request.full_url):
            following.remove_header("Authorization")
        return following


_opener = urllib.request.build_opener(_Redirects)


def ask(url, authorization=None, first=None, last=None):
    """The answer to a GET, open for reading; close it. first, last: a range of bytes, both included.

    Refused or Broken where there is none.
    """
    headers = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
    if authorization:
        headers["Authorization"] = authorization
    if first is not None:
        headers["Range"] = f"bytes={first}-{last}"
    try:
        return _opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            code, seconds = error.headers.get("X-Error-Code", ""), error.headers.get("Retry-After", "")
            elsewhere = host(error.url or url) != host(url)
        raise Refused(error.code, code, elsewhere, float(seconds) if seconds.isdigit() else None) from None
    except urllib.error.URLError as error:
        raise Broken(_words(error.reason)) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Broken(_words(error)) from None


def read(answer, count):
    """Up to `count` bytes of an answer's body; Broken where the connection does not give them."""
    try:
        return answer.read(count)
    except (OSError, http.client.HTTPException) as error:
        raise Broken(_words(error)) from None


def span(answer):
    """(first byte, bytes of the whole file) that a partial answer says; (None, bytes or None) of a whole one."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    if answer.status == 206 and found:
        return int(found[1]), int(found[2])
    length = answer.headers.get("Content-Length", "")
    return None, int(length) if answer.status == 200 and length.isdigit() else None


def mark(answer):
    """What changes when the file does: its ETag, else when it was modified, else nothing."""
    return answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""


def host(url):
    """Scheme, name and port: where credentials may go."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def _words(reason):
    if isinstance(reason, TimeoutError):
        return "it does not answer in time"
    if isinstance(reason, OSError) and reason.strerror:
        return reason.strerror
    return type(reason).__name__
