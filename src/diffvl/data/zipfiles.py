"""Images in a zip, read in place: which members it has, and the bytes of one.

A zip's own directory, as Python objects, takes hundreds of bytes a member in every process. So it is read once into a table of
four numbers a member, which lies in the cache folder and is mapped into memory; a member is found by the hash of its name.
"""

import hashlib
import json
import os
import struct
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

import numpy

from diffvl.data.cachefolder import cache_error, cache_folder
from diffvl.data.cells import Stamp, damaged, stamp_of
from diffvl.data.problems import IMAGE_MISSING, UNREADABLE
from diffvl.errors import DataError
from diffvl.store.files import replacing

_FORMAT = 1  # of the index in the cache: raise it when other numbers stand in it
_LOCAL = struct.Struct("<4s5H3L2H")  # a member's own header, before its name
_READABLE = {zipfile.ZIP_STORED: "stored", zipfile.ZIP_DEFLATED: "deflated"}
UNSAFE = "path that leaves its folder"


class ZipIndex:
    """The members of a zip: `name in index`, and where each one stands.

    numbers [4, members], uint64, sorted by the first: hash of the name; offset of the member; its packed size; its checksum, and
    above bit 32 whether it is deflated.
    """

    def __init__(self, file: str, numbers: numpy.ndarray) -> None:
        self.file, self._numbers = file, numbers

    def __len__(self) -> int:
        return self._numbers.shape[1]

    def __contains__(self, name: str) -> bool:
        return self._place(name) is not None

    def read(self, name: str) -> bytes:
        """Gives the bytes of a member. Raises DataError if there is none, or it is damaged."""
        place = self._place(name)
        if place is None:
            raise DataError(f"{self.file} has no member {name}", IMAGE_MISSING)
        _, offset, size, check = (int(number) for number in self._numbers[:, place])
        with open(self.file, "rb") as archive:
            archive.seek(offset)
            header = archive.read(_LOCAL.size)
            data = b""
            if len(header) == _LOCAL.size and header.startswith(b"PK\x03\x04"):
                *_, name_length, extra_length = _LOCAL.unpack(header)
                archive.seek(name_length + extra_length, os.SEEK_CUR)
                data = archive.read(size)
        try:
            data = zlib.decompress(data, -zlib.MAX_WBITS) if check >> 32 else data
        except zlib.error as error:
            raise DataError(f"member {name} of {self.file} is damaged ({error}); fetch the zip again", UNREADABLE) from error
        if zlib.crc32(data) != check & 0xFFFFFFFF:
            raise DataError(f"member {name} of {self.file} is damaged (its checksum is another); fetch the zip again", UNREADABLE)
        return data

    def _place(self, name: str) -> int | None:
        wanted = _hash(name)
        place = int(numpy.searchsorted(self._numbers[0], numpy.uint64(wanted)))
        return place if place < len(self) and int(self._numbers[0, place]) == wanted else None


def read_member(file: str, name: str) -> bytes:
    """Gives the bytes of a member of a zip. Raises DataError as `open_zip` and `ZipIndex.read`."""
    return open_zip(file).read(name)


def open_zip(file: str) -> ZipIndex:
    """Opens a zip's members, from the cache if they were read before.

    Raises:
        DataError: it is no zip, is damaged, or a member has a path that leaves its folder or a form that is not read. OSError: it
            is not there.
    """
    return _open_zip(file, stamp_of(file))


@lru_cache(maxsize=32)
def _open_zip(file: str, stamp: Stamp) -> ZipIndex:
    try:
        name = hashlib.sha256(json.dumps([_FORMAT, file, *stamp]).encode()).hexdigest()[:32]
        cached = cache_folder() / f"zip-{name}.npy"
        if not cached.exists():
            _write_index(cached, _read_directory(file))
        return ZipIndex(file, numpy.load(cached, mmap_mode="r"))
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise damaged(file, "zip", error) from error


def _write_index(cached: Path, numbers: numpy.ndarray) -> None:
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cached, shared=True) as beside, beside.open("wb") as opened:
            numpy.save(opened, numbers)
    except OSError as error:
        raise cache_error(cached, error) from error


def _read_directory(file: str) -> numpy.ndarray:
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist() if not member.is_dir()}  # of two, the last counts
    for name, member in members.items():
        if name.startswith("/") or ".." in name.replace("\\", "/").split("/") or name[1:2] == ":":
            raise DataError(
                f"{file}: the path of its member {name!r} leaves the folder that it would be unpacked in; such a zip was not "
                "made for images: do not unpack it, and pack them anew",
                UNSAFE,
            )
        if member.compress_type not in _READABLE or member.flag_bits & 1:
            form = "encrypted" if member.flag_bits & 1 else f"packed by method {member.compress_type}"
            raise DataError(f"{file}: its member {name} is {form}; expected members that are stored or deflated: pack it anew")
    rows = sorted(
        (_hash(name), one.header_offset, one.compress_size, one.CRC | (one.compress_type == zipfile.ZIP_DEFLATED) << 32)
        for name, one in members.items()
    )
    return numpy.array(rows, dtype=numpy.uint64).reshape(-1, 4).T.copy()


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")
