"""Signals that would end the report at once -> an exit, which also ends the part that runs on the GPU."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDINGS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def exit_on_signals() -> Iterator[None]:
    """Makes an exit of SIGTERM and SIGHUP inside the block, with the code that a shell gives (128 + the signal's number).

    A part is in a session of its own, where a signal to this program does not reach it. One that is ignored (`nohup`) stays so.
    """
    changed = [number for number in ENDINGS if signal.getsignal(number) is signal.SIG_DFL]

    def end(number: int, frame: FrameType | None) -> None:
        for one in changed:  # a second one must not end this program before the part is ended
            signal.signal(one, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in changed:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)
