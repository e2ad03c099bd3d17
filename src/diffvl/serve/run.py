"""`diffvl serve`: a directory, an address and limits -> a server that runs until it is told to stop."""

import ipaddress
import logging
import socket
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from PIL import Image

from diffvl.decode.answer import load_for_decoding
from diffvl.errors import UsageError
from diffvl.serve.app import make_app
from diffvl.serve.limits import Limits
from diffvl.serve.service import Service

log = logging.getLogger(__name__)

KEEP_ALIVE = 30  # seconds that an idle connection stays
GRACE = 10  # seconds in which answers under way may end when the server is told to stop


def serve(directory: Path, host: str, port: int, keys: Sequence[str], name: str | None, limits: Limits) -> None:
    """Serves a checkpoint.

    Raises:
        UsageError: if the address cannot be had, or a key cannot be sent.
        CheckpointError: see `load_for_decoding`.
    """
    if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise UsageError("--api-key: a key has letters, digits and signs of ASCII without spaces, and at least one of them")
    Image.MAX_IMAGE_PIXELS = None  # --max-pixels is the limit, and is held against an image's header
    taken = _bound(host, port)  # before the weights are read: what cannot be served need not be loaded
    with taken:
        decoder = load_for_decoding(directory)
        if decoder.model.gate is not None:
            log.info("%s drafts: timing forwards, to know which drafts pay on this machine", directory)
        service = Service(decoder, name or directory.resolve().name, limits)
        config = uvicorn.Config(
            make_app(service, keys, () if keys else _own_names(host, taken)),
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            lifespan="on",
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=GRACE,
        )
        _announce(service, taken, bool(keys))
        server = uvicorn.Server(config)
        try:
            server.run(sockets=[taken])
        except KeyboardInterrupt:  # raised again by uvicorn once everything has ended
            log.info("stopped")


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens at the address, so that no other server gets it; who connects now waits for the weights."""
    taken: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen()
    except (OSError, UnicodeError) as error:
        if taken is not None:
            taken.close()
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{host}:{port} cannot be had ({reason}): choose another --port or --host") from error
    return taken


def _own_names(host: str, taken: socket.socket) -> frozenset[str]:
    """How a server that only this machine reaches is called; none for one that others reach, by whatever name."""
    address = taken.getsockname()[0]
    if not _is_loopback(address):
        return frozenset()
    return frozenset(("localhost", "127.0.0.1", "[::1]", host.lower(), f"[{address}]" if ":" in address else address))


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _announce(service: Service, taken: socket.socket, is_locked: bool) -> None:
    host, port = taken.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    log.info(
        "%r at http://%s:%d: POST /v1/chat/completions, a page at /; up to %d requests together, %d wait. Ctrl-C ends",
        *(service.name, shown, port, service.limits.samples, service.limits.waiting),
    )
    if not is_locked and not _is_loopback(host):
        log.warning("anybody who reaches this machine may ask: set --api-key, or serve on 127.0.0.1 only")
