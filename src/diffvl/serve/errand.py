"""Work for one request in a thread of its own, that ends with the request and that nobody has to wait for.

What waits for other machines cannot be trusted to end by itself. So it notes how it is cut off, and its thread is a daemon: where
even that does not reach it (a name that is being looked up), the end of the process does not wait for it.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

T = TypeVar("T")


class Errand:
    """What is fetched for one request, one thing after the other.

    Attributes:
        seconds: for all of it; end: when they are over, of time.monotonic.
        is_over: whether nobody waits for it any more.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.end = seconds, time.monotonic() + seconds
        self.is_over = False
        self._cut: Callable[[], None] | None = None
        self._lock = threading.Lock()

    def require(self) -> None:
        """Raises ValueError where nobody waits for it any more."""
        if self.is_over:
            raise ValueError("nobody waits for it any more")

    @contextmanager
    def cut_by(self, cut: Callable[[], None]) -> Iterator[None]:
        """In the block, `finish` calls `cut`, which ends what the block waits for. Raises ValueError as `require` does."""
        with self._lock:
            self.require()
            self._cut = cut
        try:
            yield
        finally:
            with self._lock:
                self._cut = None

    def finish(self) -> None:
        """Ends it, from another thread."""
        with self._lock:
            self.is_over = True
            if self._cut is not None:
                self._cut()


def in_a_daemon(work: Callable[..., T], *given: Any) -> "asyncio.Future[T]":
    """Starts some work; what it gives or raises. The future is nobody's to cancel: it is done when the work is."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def tell(method: Callable[[Any], None], outcome: Any) -> None:
        with suppress(RuntimeError):  # the loop has ended before
            loop.call_soon_threadsafe(method, outcome)

    def run() -> None:
        try:
            found = work(*given)
        except BaseException as error:  # whatever it is, whoever waits must hear of it
            tell(future.set_exception, error)
        else:
            tell(future.set_result, found)

    try:
        threading.Thread(target=run, name="fetch", daemon=True).start()
    except RuntimeError as error:  # there are no more threads to be had
        future.set_exception(error)
    return future
