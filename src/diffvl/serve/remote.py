"""Fetching an image of the net, for a server that may stand beside machines that nobody else may reach.

Every address is looked up here, and must be a public one that is not this machine's own; the connection then goes to the address
that was checked, not to the name, which could mean another one a moment later. A redirect is a new address, checked like the
first. No proxy is asked, no cookie kept, nothing but the image's bytes comes back to the caller.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from diffvl.serve.errand import Errand
from diffvl.serve.refusals import short

MOST_REDIRECTS = 3
PORTS = {"http": 80, "https": 443}
PIECE = 1 << 16
HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "diffvl"}
_EMBEDDED = ipaddress.ip_network("64:ff9b::/96")  # IPv6 addresses of IPv4 ones
_ISATAP = (0x00005EFE, 0x02005EFE)  # the third quarter of an IPv6 address whose last is an IPv4 one inside a site
# What older lists of special addresses lack, and the address at which a cloud answers its own machines.
_SPECIAL = [
    ipaddress.ip_network(text) for text in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "3fff::/20", "5f00::/16")
]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: Address) -> bool:
    """Whether an address belongs to the net at large, and not to this machine, its neighbours or a group of machines. An IPv6
    address that stands for an IPv4 one is as public as that is."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = _inner(address)
        if inner is not None and not is_public(inner):
            return False
        if int(address) >> 32 & 0xFFFFFFFF in _ISATAP or address.is_site_local or address.scope_id is not None:
            return False
        if address.ipv4_mapped is not None:
            return True
    if any(address in network for network in _SPECIAL):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved and not address.is_unspecified


def _inner(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one stands for."""
    if address in _EMBEDDED:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)


def is_own(address: Address) -> bool:
    """Whether an address is one of this machine's, which may be public: what listens there may trust whoever asks from here.
    Those are the ones that a socket of this machine can be bound to. Where the system lets any be bound, all are own."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = _inner(address)
        if inner is not None and is_own(inner):
            return True
    try:
        with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as tried:
            tried.bind((str(address), 0))
    except OSError:
        return False
    return True


def is_elsewhere(address: Address) -> bool:
    """Whether an address may be asked: of the net at large, and not of this machine."""
    return is_public(address) and not is_own(address)


def addresses_of(host: str, port: int) -> list[Address]:
    """What a name means now. Raises OSError where it means nothing."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(entry[4][0]) for entry in found]


@dataclass(frozen=True)
class RemoteImages:
    """Gets the bytes of images.

    seconds: for all of an image, redirects included; an errand may leave it less.
    look_up, is_allowed: what a name means, and which addresses may be asked.
    """

    seconds: float
    look_up: Callable[[str, int], list[Address]] = addresses_of
    is_allowed: Callable[[Address], bool] = is_elsewhere

    def __call__(self, url: str, most_bytes: int, errand: Errand | None = None) -> bytes:
        """Raises ValueError, in words for whoever asked.

        Args:
            errand: of the request that shows the image; None for one of its own.
        """
        errand = errand or Errand(self.seconds)
        end = min(time.monotonic() + self.seconds, errand.end)
        try:
            for _ in range(MOST_REDIRECTS + 1):
                found = self._asked(url, most_bytes, end, errand)
                if isinstance(found, bytes):
                    return found
                url = found
        except (OSError, http.client.HTTPException) as error:
            errand.require()  # what was cut off fails in many ways
            if isinstance(error, TimeoutError) or time.monotonic() >= end:
                raise ValueError(self._too_slow(end, errand)) from error
            raise ValueError(f"there is no answer from it ({type(error).__name__})") from error
        raise ValueError(f"it leads on more than {MOST_REDIRECTS} times")

    def _too_slow(self, end: float, errand: Errand) -> str:
        if end < errand.end or errand.seconds <= self.seconds:
            return f"it did not come within {min(self.seconds, errand.seconds):g} seconds"
        return f"the images of its request did not come within {errand.seconds:g} seconds"

    def _asked(self, url: str, most_bytes: int, end: float, errand: Errand) -> bytes | str:
        """The image, or the address that this one leads on to."""
        parts = self._parts(url)
        assert parts.hostname is not None
        port = parts.port or PORTS[parts.scheme]
        connection = _Connection(parts.hostname, port, self._checked(parts.hostname, port), parts.scheme == "https", end)
        # A server that sends a byte now and then would never let a wait run out.
        stop = threading.Timer(_left(end), connection.cut)
        stop.daemon = True
        stop.start()
        try:
            with errand.cut_by(connection.cut):
                connection.request("GET", (parts.path or "/") + (f"?{parts.query}" if parts.query else ""), headers=HEADERS)
                with connection.getresponse() as response:  # it holds the socket, which closing the connection leaves to it
                    if response.status in (301, 302, 303, 307, 308):
                        return urljoin(url, response.headers.get("Location") or "")
                    if response.status != 200:
                        raise ValueError(f"it answers {response.status}")
                    return self._read(response, most_bytes, end, errand)
        finally:
            stop.cancel()
            connection.close()

    def _read(self, response: http.client.HTTPResponse, most_bytes: int, end: float, errand: Errand) -> bytes:
        pieces, size = [], 0
        while piece := response.read1(PIECE):
            errand.require()
            _left(end)
            size += len(piece)
            if size > most_bytes:
                raise ValueError(f"it has more than {most_bytes} bytes, which is all that its request's images may still have")
            pieces.append(piece)
        errand.require()  # what was cut off looks like an end
        _left(end)
        return b"".join(pieces)

    def _parts(self, url: str) -> SplitResult:
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError as error:
            raise ValueError(f"{short(url)!r} is no address") from error
        if parts.scheme not in PORTS or not parts.hostname:
            raise ValueError(f"{short(url)!r} is no address with http or https")
        if not url.isascii() or any(sign <= " " or sign == "\x7f" for sign in url):
            raise ValueError("the address holds white space or letters that no address has: spell them with %")
        return parts

    def _checked(self, host: str, port: int) -> Address:
        """An address of a host, all of which must be allowed: which of them would be taken is not for its owner to choose."""
        try:
            found = self.look_up(host, port)
        except (OSError, UnicodeError) as error:
            raise ValueError(f"the name {short(host)!r} is not known") from error
        if not found or not all(self.is_allowed(address) for address in found):
            raise ValueError(f"{short(host)!r} is not an address of the net at large, and is not asked")
        return found[0]


class _Connection(http.client.HTTPConnection):
    """A connection to an address that was checked, under the host's name."""

    def __init__(self, host: str, port: int, address: Address, is_secure: bool, end: float) -> None:
        super().__init__(host, port)
        self._address, self._is_secure, self._end = str(address), is_secure, end
        # Held apart from `sock`, which is forgotten as soon as the headers of an answer without a length have come.
        self._wire: socket.socket | None = None
        self._is_cut = False
        self.default_port = PORTS["https" if is_secure else "http"]

    def connect(self) -> None:
        plain = socket.socket(socket.AF_INET6 if ":" in self._address else socket.AF_INET)
        self.sock: Any = plain
        self._wire = plain
        plain.settimeout(_left(self._end))
        plain.connect((self._address, self.port))
        plain.settimeout(_left(self._end))
        if self._is_secure:
            context = ssl.create_default_context()
            self._wire = self.sock = context.wrap_socket(plain, server_hostname=self.host, do_handshake_on_connect=False)
        if self._is_cut:  # before there was anything to cut
            raise ConnectionAbortedError
        if self._is_secure:
            self.sock.do_handshake()

    def cut(self) -> None:
        """Ends whatever waits on the connection, now or later."""
        self._is_cut = True
        if self._wire is not None:
            with contextlib.suppress(OSError):
                # Not that of an SSL socket, which would take what still comes for plain bytes.
                socket.socket.shutdown(self._wire, socket.SHUT_RDWR)


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
