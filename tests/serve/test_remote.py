"""Images of the net: which addresses are asked, and that the one that was checked is the one that is asked."""

import ipaddress
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from diffvl.serve import remote
from diffvl.serve.errand import Errand
from diffvl.serve.images import fetch_images, open_images
from diffvl.serve.limits import Limits
from diffvl.serve.messages import ImageSource
from diffvl.serve.refusals import Refusal
from diffvl.serve.remote import Address, RemoteImages, addresses_of, is_public
from tools.serve_mistakes import png

MOST_BYTES = 100_000
HOME = ipaddress.ip_address("127.0.0.1")


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.9.10", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254"),
        *("100.64.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "203.0.113.9"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12:3456::1", "fec0::1", "ff02::1", "2001:db8::1", "100::1"),
        *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
        *("2002:7f00:1::", "2002:a00:1::1", "2001:0:7f00:1::", "2001:0:4136:e378:8000:63bf:80ff:fffe", "::127.0.0.1"),
        *("192.0.0.8", "192.88.99.1", "168.63.129.16", "3fff::1", "5f00::1", "2600::5efe:7f00:1", "2600::200:5efe:a00:1"),
    ],
)
def test_addresses_that_are_not_of_the_net_at_large(address: str):
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_of_the_net_at_large(address: str):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1/a.png", "http://localhost/a.png", "http://[::1]/a.png", "http://0x7f000001/", "http://2130706433/"),
        *("http://127.1/", "http://017700000001/", "http://169.254.169.254/latest/meta-data/", "http://10.0.0.1:8080/"),
        *("http://[::ffff:127.0.0.1]/", "http://user@127.0.0.1/", "http://example.com@127.0.0.1/", "http://0/"),
    ],
)
def test_however_an_address_of_this_machine_is_written_it_is_not_asked(url: str):
    with pytest.raises(ValueError, match="not an address of the net at large|not known"):
        RemoteImages(2.0)(url, 1000)


@pytest.mark.parametrize(
    "url", ["http:///a.png", "http://exa mple/", "http://a:b/", "http://a:99999/", "http://a/\r\nX: y", "http://ü/"]
)
def test_what_is_no_address_is_told(url: str):
    with pytest.raises(ValueError, match="address"):
        RemoteImages(2.0, look_up=lambda *_: [HOME])(url, 1000)


# --- a server of images ------------------------------------------------------------------------------------------------------


class Images(BaseHTTPRequestHandler):
    asked: list[tuple[str, str]] = []

    def do_GET(self) -> None:
        type(self).asked.append((self.path, self.headers["Host"]))
        kind, _, rest = self.path[1:].partition("/")
        if kind == "to":
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
            return
        self.send_response(404 if kind == "missing" else 200)
        self.end_headers()
        body = png()
        if kind == "late":
            self.server.gate.wait(0.8)  # type: ignore[attr-defined]
        if kind == "endless":
            body = bytes(1 << 16)
        try:
            for _ in range(1000 if kind == "endless" else 1):
                self.wfile.write(body)
            if kind == "slow":
                self.server.gate.wait(5)  # type: ignore[attr-defined]
        except OSError:  # whoever asked has heard enough
            pass

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Images) as server:
        server.gate = threading.Event()  # type: ignore[attr-defined]
        Images.asked = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_port
        server.gate.set()  # type: ignore[attr-defined]
        server.shutdown()
        thread.join()


def fetching(port: int, **names: list[str]) -> RemoteImages:
    """What fetches, for which this machine is one of the net. names: what they mean, in turn."""
    left = {name: list(meanings) for name, meanings in names.items()}

    def look_up(host: str, _: int) -> list[Address]:
        if host in left:
            return [ipaddress.ip_address(left[host].pop(0))]
        return addresses_of(host, port)

    return RemoteImages(1.0, look_up, lambda address: address == HOME or is_public(address))


def test_an_image_is_fetched_from_the_address_that_was_checked(port: int):
    """The name is looked up once: a second look would give another address."""
    fetch = fetching(port, pictures=["127.0.0.1", "10.0.0.1"])
    assert fetch(f"http://pictures:{port}/a.png?size=1", MOST_BYTES) == png()
    assert Images.asked == [("/a.png?size=1", f"pictures:{port}")]


def test_a_redirect_is_checked_like_the_first_address(port: int):
    fetch = fetching(port, pictures=["127.0.0.1"] * 9)
    assert fetch(f"http://pictures:{port}/to//again", MOST_BYTES) == png()
    for target in (
        "http://10.0.0.1/",
        "http://[::1]/",
        "http://169.254.169.254/latest/",
        "file:///etc/passwd",
        "//10.0.0.9/a.png",
    ):
        with pytest.raises(ValueError, match="not an address of the net at large|no address with http"):
            fetching(port, pictures=["127.0.0.1"])(f"http://pictures:{port}/to/{target}", MOST_BYTES)
    with pytest.raises(ValueError, match="more than 3 times"):
        fetching(port, pictures=["127.0.0.1"] * 9)(f"http://pictures:{port}/to//to//to//to//a", MOST_BYTES)


@pytest.mark.parametrize(
    ("path", "told"), [("missing", "answers 404"), ("endless/x", "more than 100000 bytes"), ("slow/x", "within 1 seconds")]
)
def test_what_does_not_come_is_told(port: int, path: str, told: str):
    with pytest.raises(ValueError, match=told):
        fetching(port)(f"http://127.0.0.1:{port}/{path}", MOST_BYTES)


@contextmanager
def dripping(head: bytes, piece: bytes) -> Iterator[int]:
    """A host, at the port that is given, that sends a head and then a piece now and then, for as long as anybody listens, but
    for five seconds at most: a test that waits for more has failed."""
    stop, end = threading.Event(), time.monotonic() + 5

    def drip(listening: socket.socket) -> None:
        with listening.accept()[0] as taken, suppress(OSError):
            taken.recv(1 << 16)
            taken.sendall(head)
            while not stop.wait(0.1) and time.monotonic() < end:
                taken.sendall(piece)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip, args=[listening], daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        stop.set()
        thread.join(5)


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"HTTP/1.0 200 OK\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),  # a length without an end
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nX: ", b"x"),
    ],
)
def test_a_host_that_drips_is_cut_off_when_its_time_is_over(head: bytes, piece: bytes):
    """However its answer is framed: each byte that comes would begin the wait anew."""
    with dripping(head, piece) as port:
        begun = time.monotonic()
        with pytest.raises(ValueError, match="did not come within 1 seconds"):
            fetching(port)(f"http://127.0.0.1:{port}/", MOST_BYTES)
        assert 0.9 < time.monotonic() - begun < 2.5


@contextmanager
def deaf() -> Iterator[int]:
    """A port at which nothing is taken in any more: who connects waits."""
    with socket.socket() as listening, socket.socket() as first, socket.socket() as second:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for one in (first, second):
            one.setblocking(False)
            one.connect_ex(listening.getsockname())
        yield listening.getsockname()[1]


@pytest.mark.parametrize("host", [deaf, lambda: dripping(b"", b""), lambda: dripping(b"HTTP/1.0 200 OK\r\n\r\n", b"x")])
def test_a_fetch_ends_when_nobody_waits_for_it(host: Any):
    """While it connects, hears nothing, or is answered bit by bit. No other image is begun then."""
    errand = Errand(20.0)
    with host() as port, ThreadPoolExecutor(1) as threads:
        sources = [ImageSource(f"image {index}", f"http://127.0.0.1:{port}/") for index in range(2)]
        fetch = replace(fetching(port), seconds=20.0)
        asked = threads.submit(fetch_images, sources, Limits(), fetch, errand)
        time.sleep(0.3)
        assert not asked.done()
        begun = time.monotonic()
        errand.finish()
        with pytest.raises(Refusal, match="nobody waits for it"):
            asked.result(10)
        assert time.monotonic() - begun < 2
        with pytest.raises(ValueError, match="nobody waits for it"):
            fetch(f"http://127.0.0.1:{port}/", MOST_BYTES, errand)


def test_the_images_of_a_request_have_their_time_together(port: int):
    """Each of them comes soon enough, and all of them do not."""
    sources = [ImageSource(f"image {index}", f"http://127.0.0.1:{port}/late/{index}") for index in range(4)]
    begun = time.monotonic()
    with pytest.raises(Refusal, match="the images of its request did not come within 2.2 seconds") as refusal:
        fetch_images(sources, Limits(), replace(fetching(port), seconds=2.0), Errand(2.2))
    assert refusal.value.param in ("image 1", "image 2") and 2.1 < time.monotonic() - begun < 3.5


def test_nobody_is_asked_where_it_is_not_allowed(port: int):
    source = ImageSource("messages[0].content[0].image_url.url", f"http://127.0.0.1:{port}/a.png")
    with pytest.raises(Refusal, match="fetches none") as refusal:
        fetch_images([source], Limits(), None, Errand(20.0))
    assert refusal.value.status == 400 and refusal.value.param == source.param and not Images.asked
    fetched = fetch_images([source], Limits(), fetching(port), Errand(20.0))
    assert open_images([source], Limits(), fetched)[source.param].size == (8, 8)
    with pytest.raises(Refusal, match="not an address of the net at large"):
        fetch_images([source], Limits(), RemoteImages(1.0), Errand(20.0))


def test_this_machine_is_not_asked_by_a_public_address_of_its_own(port: int, monkeypatch: pytest.MonkeyPatch):
    """127.0.0.1 stands for one. Nor by a name or a redirect."""
    monkeypatch.setattr(remote, "is_public", lambda _: True)
    for fetch in (RemoteImages(2.0), RemoteImages(2.0, lambda *_: [HOME])):
        with pytest.raises(ValueError, match="not an address of the net at large"):
            fetch(f"http://127.0.0.1:{port}/a.png", MOST_BYTES)
    assert not Images.asked
    own_addresses, others = (
        ("127.0.0.1", "127.3.2.1", "::ffff:127.0.0.1", "64:ff9b::7f00:1"),
        ("192.0.2.7", "2001:db8::7", "::ffff:192.0.2.7"),
    )
    assert all(remote.is_own(ipaddress.ip_address(one)) for one in own_addresses)
    assert not any(remote.is_own(ipaddress.ip_address(one)) for one in others)
    assert remote.is_elsewhere(ipaddress.ip_address("192.0.2.7"))


def test_the_images_of_a_request_have_their_bytes_together(port: int):
    """As many as it may have that brings them along; which of them is too much is told."""
    sources = [ImageSource(f"image {index}", f"http://127.0.0.1:{port}/{index}.png") for index in range(3)]
    size = len(png())
    fetched = fetch_images(sources, Limits(body_bytes=3 * size), fetching(port), Errand(20.0))
    assert list(fetched) == ["image 0", "image 1", "image 2"]
    with pytest.raises(
        Refusal, match=f"more than {size - 1} bytes, which is all that its request's images may still have"
    ) as refusal:
        fetch_images(sources, Limits(body_bytes=3 * size - 1), fetching(port), Errand(20.0))
    assert refusal.value.param == "image 2"
