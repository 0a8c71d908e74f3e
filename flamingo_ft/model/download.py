"""Download files over HTTP: media of samples if the recipe allows it, and URLs passed to the processor.

urllib is used rather than httpx, which a dependency installs: httpx has no public hook between connecting and
sending the request, where the address that a name led to has to be checked.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import time
import urllib.error
import urllib.request
from urllib.parse import quote, urlsplit

from flamingo_ft.errors import UserError
from flamingo_ft.formatting import error_message, shorten

TIMEOUT_SECONDS = 20.0  # without a response
LONGEST_SECONDS = 120.0  # in all
MOST_BYTES = 64 << 20
CHUNK_BYTES = 1 << 16
FAILURES = (OSError, http.client.HTTPException, ValueError)
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"


def is_url(text: str) -> bool:
    return text.lower().startswith(("http://", "https://"))


def download(url: str, where: str, *, public_only: bool = False) -> bytes:
    """Return the content at an http(s) URL; redirects to other schemes are not followed.

    public_only: for URLs chosen by strangers. Addresses of this machine and of private networks are refused,
    after redirects too, and no proxy is used, since it would connect to them itself. Raises UserError if
    there is no content, if it takes longer than `LONGEST_SECONDS`, or is larger than `MOST_BYTES`.
    """
    try:
        if not is_url(url) or not urlsplit(url).hostname:
            raise ValueError("not an http(s) URL with a host")
        request = urllib.request.Request(
            quote(url, safe=URL_CHARACTERS), headers={"User-Agent": "flamingo_ft"}
        )
        with _opener(public_only).open(request, timeout=TIMEOUT_SECONDS) as response:
            return _read(response)
    except FAILURES as error:
        reason = error_message(error, None)
        raise UserError(
            f"{where}: cannot fetch {shorten(url)} ({reason}); check the URL and the network"
        ) from None


class _PublicConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        _check_name(self.host, self.port)
        super().connect()
        _check_peer(self.sock)


class _PublicSecureConnection(http.client.HTTPSConnection):
    def connect(self) -> None:
        _check_name(self.host, self.port)
        super().connect()
        _check_peer(self.sock)


class _PublicHTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_PublicConnection, req)


class _PublicHTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_PublicSecureConnection, req)


def _check_name(host: str, port: int) -> None:
    """Check the addresses of a name before connecting.

    Otherwise errors would reveal open ports of the private network.
    """
    for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        _check_public(str(address[0]))


def _check_peer(connection: socket.socket) -> None:
    """Check the connected address before the request is sent: the name may have resolved to another one."""
    try:
        _check_public(connection.getpeername()[0])
    except ValueError:
        connection.close()
        raise


def _check_public(address: str) -> None:
    """Raise ValueError for a local, private or multicast address."""
    ip = _ipv4_in(ipaddress.ip_address(address.partition("%")[0]))
    if not ip.is_global or ip.is_multicast:
        raise ValueError("not a public address")


def _ipv4_in(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the IPv4 address that an IPv6 address leads to (mapped, 6to4, NAT64), if it does."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _opener(public_only: bool) -> urllib.request.OpenerDirector:
    """Return an opener for http and https only.

    urllib's default one also opens file: and ftp: URLs, the latter even on a redirect.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler({} if public_only else None),
        urllib.request.UnknownHandler(),
        _PublicHTTPHandler() if public_only else urllib.request.HTTPHandler(),
        _PublicHTTPSHandler() if public_only else urllib.request.HTTPSHandler(),
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
