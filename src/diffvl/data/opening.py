"""A file on this machine, or one that fsspec reaches by a URL, opened for reading."""

import io
import os
from pathlib import Path
from typing import BinaryIO, TextIO

import fsspec
from fsspec.core import url_to_fs

from diffvl.errors import DataError

_UNREACHABLE = "file cannot be read"


def is_remote(name: str) -> bool:
    """Tells whether a name is a URL."""
    return "://" in name


def open_binary(name: str) -> BinaryIO:
    """Opens a file for reading bytes. Raises OSError, or DataError for a URL that cannot be read here."""
    if not is_remote(name):
        return open(name, "rb")  # noqa: SIM115  # the caller closes it
    try:
        return fsspec.open(name, "rb").open()  # type: ignore[return-value]
    except (ImportError, ValueError) as error:  # no package for this kind of URL, or no such kind
        raise DataError(f"{name}: cannot be read ({error})", _UNREACHABLE, ends=True) from error


def open_text(name: str, newline: str | None = None) -> TextIO:
    """Opens a UTF-8 file, with or without a mark at its beginning. Raises as `open_binary`."""
    return io.TextIOWrapper(open_binary(name), encoding="utf-8-sig", newline=newline)


def size_of(name: str) -> int | None:
    """Gives a file's size in bytes, None where a server does not tell it. Raises as `open_binary`."""
    if not is_remote(name):
        return os.stat(name).st_size
    try:
        files, path = url_to_fs(name)
        size = files.size(path)
    except (ImportError, ValueError) as error:
        raise DataError(f"{name}: cannot be read ({error})", _UNREACHABLE, ends=True) from error
    return None if size is None else int(size)


def suffix_of(name: str) -> str:
    """Gives the ending of a file's name, by which its kind is known, without that of gzip."""
    path = Path(name.partition("?")[0].lower())
    return path.suffix if path.suffix != ".gz" else f"{Path(path.stem).suffix}.gz"
