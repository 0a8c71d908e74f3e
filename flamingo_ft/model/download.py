"""Files from the network: for samples whose recipe allows it, and for URLs that are given to the processor."""

from __future__ import annotations

import http.client
import io
import time
import urllib.error
import urllib.request
from urllib.parse import quote, urlsplit

from flamingo_ft.errors import UserError, shortened

TIMEOUT_SECONDS = 20.0  # without an answer
LONGEST_SECONDS = 120.0  # in all
MOST_BYTES = 64 << 20
CHUNK_BYTES = 1 << 16
FAILURES = (OSError, http.client.HTTPException, ValueError)
URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"


def is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def download(url: str, where: str) -> bytes:
    """The content at an http(s) URL, redirections followed to no other scheme. UserError naming it when there is none,
    it takes longer than `LONGEST_SECONDS`, or is larger than `MOST_BYTES`."""
    try:
        if not is_url(url) or not urlsplit(url).hostname:
            raise ValueError("not an http(s) URL with a host")
        request = urllib.request.Request(quote(url, safe=URL_CHARACTERS), headers={"User-Agent": "flamingo_ft"})
        with _opener().open(request, timeout=TIMEOUT_SECONDS) as response:
            return _read(response)
    except FAILURES as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where}: cannot fetch {shortened(url)} ({reason}); check the URL and the network") from None


def _opener() -> urllib.request.OpenerDirector:
    """http and https alone: urllib's usual one reads file: and ftp: too, also when it is sent there."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _read(response: io.BufferedIOBase) -> bytes:
    deadline, content = time.monotonic() + LONGEST_SECONDS, bytearray()
    while chunk := response.read(CHUNK_BYTES):
        content += chunk
        if len(content) > MOST_BYTES:
            raise ValueError(f"larger than {MOST_BYTES >> 20} MiB")
        if time.monotonic() > deadline:
            raise ValueError(f"slower than {LONGEST_SECONDS:.0f} s")
    return bytes(content)
