"""Files beside the weights, and what every written file has in common: whole or not at all, readable as the umask says, and one
message where the disk does not take it.

Place in the flow: below everything that reads or writes a directory. Invariant: a writer that fails leaves no file under its
final name; `Writing` turns a full disk, which each library tells in its own words, into a `DiskError` that names the path.
"""

import errno
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from diffvl.errors import CheckpointError, DiffvlError, DiskError, UsageError
from diffvl.terminal.console import OutputError

PARTIAL = ".partial"
NO_ROOM = {
    errno.ENOSPC: "no space is left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the file system or the limit on file sizes (ulimit -f) allows",
    errno.EROFS: "the file system can only be read",
}


# --- where the disk refuses ----------------------------------------------------------------------------------------------


def no_room(error: BaseException | None) -> str | None:
    """Tells why the disk takes no more, or None where the error is another one.

    Rust and C++ libraries (safetensors, tokenizers, torch) hand the system's words on without its number, and some wrap them.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return NO_ROOM[error.errno]
        message = str(error)
        for number, reason in NO_ROOM.items():
            by_name = number != errno.EFBIG and os.strerror(number) in message  # "File too large" may be said of anything
            if by_name or f"os error {number})" in message or f"code: {number}," in message:
                return reason
        if "PytorchStreamWriter failed writing" in message or ("inline_container.cc" in message and "unexpected pos" in message):
            return "it could not be written to its end; most often no space is left"
        error = error.__cause__  # what an error was made from; not what was handled when it came (__context__)
    return None


class Writing:
    """A block in which files under `path` are written; a disk that takes no more ends it in a `DiskError`.

    path: what is named; None where the error itself may know the file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path

    def __enter__(self) -> "Writing":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, Exception) or isinstance(error, DiffvlError | OutputError):
            return
        if reason := no_room(error):
            path = self.path or getattr(error, "filename", None) or "a file"
            raise DiskError(
                f"{path} cannot be written: {reason}. Nothing unfinished has its final name and the last checkpoint is kept: "
                "make room (or choose another place) and type the same again, with --resume where a stage of `convert` had begun"
            ) from error


# --- writing -------------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yields a name beside `path` to write a file under, which takes the place of `path` at the end of the block. A block that
    fails leaves nothing, and what was there as it was.

    Args:
        shared: other processes, on this machine or others, may write the same file at the same time.
    """
    unique = f".{uuid.uuid4().hex}" if shared else ""
    beside = path.with_name(f"{path.name}{unique}{PARTIAL}")
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Writes a whole file or none. Raises DiskError, with the file that was there left as it was."""
    with Writing(path), replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def require_writable(path: Path, flag: str) -> None:
    """Raises UsageError unless a file can be written at `path`, which `flag` named: before the hours that its content takes."""
    folder = path.absolute().parent
    reason = (
        f"{folder} is no directory"
        if not folder.is_dir()
        else "it is a directory"
        if path.is_dir()
        else f"{folder} is not writable"
        if not os.access(folder, os.W_OK)
        else None
    )
    if reason is not None:
        raise UsageError(f"{flag} {path} cannot be written: {reason}. Name another file")


def sync(directory: Path) -> None:
    """Puts a directory's files and names on the disk, before a rename says that they are whole."""
    with Writing(directory):
        for path in (*directory.rglob("*"), directory, directory.parent):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def share(directory: Path) -> None:
    """Gives the weight files in a directory the mode of every other new file there: the umask decides, or the directory's own
    rule. (safetensors writes into a temporary file, which only its owner may read, and renames it.)"""
    probe = directory / f"mode{PARTIAL}"
    with Writing(directory):
        probe.touch()
        mode = probe.stat().st_mode & 0o777
        probe.unlink()
    for path in directory.glob("*.safetensors"):
        path.chmod(mode)


# --- reading -------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a checkpoint. Raises CheckpointError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged, not readable as JSON ({error}); copy the checkpoint again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}; copy the checkpoint again")
    return content
