"""What this program shows: streams that take any text, consoles that take nothing for markup, lines that can be typed again.

Names, messages and answers come from files and models, and any character may stand in them. Invariants: none of them is taken
for markup; none reaches a terminal as a control sequence; what a stream's encoding lacks is replaced; a stream that takes no more
ends the command in one message. Data that a program asked for (a pipe, a file, JSON) keeps its exact text.
"""

import codecs
import io
import json
import logging
import os
import re
import shlex
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import PurePath
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

UNSHOWN = "\N{REPLACEMENT CHARACTER}"  # stands for a character that cannot be shown
# Control characters (ESC, BEL, CR, DEL, the C1 set, ...) without tab and newline, the signs that turn the reading direction of
# what follows, and halves of characters. What scripts and emoji need (joiners, direction marks) stays.
_HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u206f\ud800-\udfff]")

Piece = str | tuple[str, str]  # a text, or a text and its style


def visible(text: str) -> str:
    """Draws every character that would act on a terminal as the sign for one that cannot be shown."""
    return _HARMFUL.sub(UNSHOWN, text)


# --- lines -----------------------------------------------------------------------------------------------------------------


class HarmlessConsole(Console):
    """A rich console whose texts are all shown as they are, whatever they are part of: no markup, no emoji names, no guesses at
    what to colour, and no control characters but its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else visible(segment.text)
            yield segment if text == segment.text else Segment(text, segment.style)


def console(stderr: bool = False, **options: Any) -> Console:
    """Makes a console; nothing else does. `options` are rich's."""
    return HarmlessConsole(stderr=stderr, **options)


def say(out: Console, *pieces: Piece) -> None:
    """Prints one line, not broken at the terminal's width; a piece with a style is e.g. ("align", "bold")."""
    line = Text()
    for piece in pieces:
        text, style = (piece, "") if isinstance(piece, str) else piece
        line.append(visible(text), style)
    out.print(line, soft_wrap=True)


def put(text: str, end: str = "\n") -> None:
    """Prints text on stdout at once: exactly for a program that reads it (a pipe, a file), harmless for a person (a terminal)."""
    print(visible(text) if sys.stdout.isatty() else text, end=end, flush=True)


def complain(text: str) -> None:
    """Prints a line on stderr, which people read wherever it goes."""
    print(visible(text), file=sys.stderr, flush=True)


def json_text(value: Any) -> str:
    """Writes one line of JSON for stdout: the same values whatever its encoding, and harmless on a terminal."""
    narrow = not codecs.lookup(_encoding(sys.stdout)).name.startswith("utf")
    return _HARMFUL.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=narrow))


def _encoding(stream: Any) -> str:
    """Gives the encoding of a stream; one in memory has none, and takes any text."""
    return getattr(stream, "encoding", None) or "utf-8"


# --- words to type ---------------------------------------------------------------------------------------------------------


def shell_line(*arguments: object) -> str:
    """Words as they can be typed: in a shell (bash, zsh) they arrive as they are, whatever stands in them. What the terminal
    could not show, or would act on, is spelled out in bytes."""
    return " ".join(_shell_word(word) for word in arguments)


def _shell_word(given: object) -> str:
    word = str(given)
    if isinstance(given, PurePath) and word.startswith("-"):  # else it would be an option
        word = f"./{word}"
    word = word.replace("\0", " ")  # no argument of a program can hold it
    if all(sign not in "\n\t" and not _HARMFUL.match(sign) and _is_typed(sign) for sign in word):
        return shlex.quote(word)
    return "$'" + "".join(_spelled(sign) for sign in word) + "'"


def _is_typed(sign: str) -> bool:
    """Tells whether both streams can show a character."""
    try:
        for stream in (sys.stdout, sys.stderr):
            sign.encode(_encoding(stream))
    except UnicodeEncodeError:
        return False
    return True


def _spelled(sign: str) -> str:
    """Spells a character between $' and '. A quote or a ! would mean something to an interactive shell."""
    if sign in "'\\!" or sign in "\n\t" or _HARMFUL.match(sign) or not _is_typed(sign):
        escapes = "surrogateescape" if "\udc80" <= sign <= "\udcff" else "replace"
        return {"\n": "\\n", "\t": "\\t"}.get(sign) or "".join(f"\\x{byte:02x}" for byte in sign.encode("utf-8", escapes))
    return sign


# --- streams ---------------------------------------------------------------------------------------------------------------


class OutputError(Exception):
    """stdout or stderr takes no more. is_closed: its reader has gone away, which is no fault."""

    def __init__(self, name: str, fault: OSError) -> None:
        super().__init__(f"{name} takes no more ({fault.strerror}): what follows is lost; make room, or send it elsewhere")
        self.is_closed = isinstance(fault, BrokenPipeError)


class _Guarded(io.RawIOBase):
    """A file that tells its first fault by an OutputError, so that it is not mixed up with those of other files, and from then on
    takes everything and keeps nothing: the end of the program has nothing to fail with."""

    def __init__(self, raw: Any, name: str) -> None:
        self._raw, self._name = raw, name
        self._fault: OutputError | None = None
        self._is_told = False

    def write(self, data: Any) -> int:
        if self._fault is None:
            try:
                return self._raw.write(data)
            except OSError as error:
                self._fault = OutputError(self._name, error)
        # Elsewhere (a bar is drawn by a thread of its own) it would end in a traceback and nothing else.
        if not self._is_told and threading.current_thread() is threading.main_thread():
            self._is_told = True
            raise self._fault
        return memoryview(data).nbytes

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()


def _guarded(stream: Any, name: str, errors: str) -> Any:
    """Makes a stream that takes any text and tells its faults; one that is no file (in a test) stays what it is."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.reconfigure(errors=errors)
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if type(stream) is not io.TextIOWrapper or not isinstance(raw, io.FileIO):
        return stream
    stream.flush()
    guarded: Any = _Guarded(raw, name)
    return io.TextIOWrapper(
        guarded if stream.buffer is raw else io.BufferedWriter(guarded),  # the former under python -u
        encoding=stream.encoding,
        errors=errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


@contextmanager
def streams() -> Iterator[None]:
    """Lets stdout and stderr take any text in the block, and makes log lines and warnings harmless. It ends with both written
    out.

    Raises:
        OutputError: in the block or at its end, if one of them takes no more.
    """
    before: tuple[IO[str], IO[str], IO[str]] = sys.stdin, sys.stdout, sys.stderr
    make_record, format_warning = logging.getLogRecordFactory(), warnings.formatwarning

    def harmless_record(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make_record(*arguments, **named)
        record.msg, record.args = visible(record.getMessage()), None
        return record

    with ExitStack() as opened:
        # What the caller closed is None, and its number would go to the next file that is opened.
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:
                setattr(sys, name, opened.enter_context(open(os.devnull, mode, encoding="utf-8")))
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # a line may be any bytes
        sys.stdout = _guarded(sys.stdout, "standard output", "replace")
        sys.stderr = _guarded(sys.stderr, "standard error", "backslashreplace")
        logging.setLogRecordFactory(harmless_record)
        warnings.formatwarning = lambda *given, **named: visible(format_warning(*given, **named))
        try:
            yield
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                sys.stdin, sys.stdout, sys.stderr = before
                logging.setLogRecordFactory(make_record)
                warnings.formatwarning = format_warning
