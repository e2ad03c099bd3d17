"""A member of a tar that is not packed, read in place: where it begins is known from when the tar was read as a whole."""

import tarfile

from diffvl.data.problems import UNREADABLE
from diffvl.errors import DataError

_MAGIC = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz"}  # first bytes of a packed file -> what unpacks it


def unpacked_by(head: bytes) -> str | None:
    """Gives the program that unpacks a file with these first bytes, None for one that is not packed."""
    return next((program for magic, program in _MAGIC.items() if head.startswith(magic)), None)


def read_content(file: str, name: str, start: int, size: int) -> bytes:
    """Gives the content of a member, of which the header stands in the block before it.

    Raises:
        DataError: another member stands there now. OSError: as `open`.
    """
    with open(file, "rb") as opened:
        opened.seek(start - tarfile.BLOCKSIZE)
        header, content = opened.read(tarfile.BLOCKSIZE), opened.read(size)
    if len(content) < size or not _is_of(header, size):
        raise DataError(
            f"{file} has no member {name} of {size} bytes there any more: it was another one when the run began", UNREADABLE
        )
    return content


def _is_of(header: bytes, size: int) -> bool:
    """Tells whether a member's header says that its content has this size."""
    try:
        return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").size == size
    except tarfile.HeaderError:  # type: ignore[attr-defined]
        return False
