"""A WebDataset tar -> rows: members with one key, which follow each other, are one sample; what follows the key is its extension.

    0001.json 0001.jpg 0002.json 0002.jpg ...      or      0001.txt 0001.jpg ... with data.columns={answer: txt, image: jpg}

A stream reads a tar from front to back, packed or not. Where records are found by their number, one pass over a tar that is not
packed reads their texts, and steps over images and videos: where each stands is kept.
"""

import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from diffvl.data.cells import damaged
from diffvl.data.columns import ColumnNames
from diffvl.data.inline import Steps, is_inline, with_names
from diffvl.data.keys import is_absent
from diffvl.data.opening import is_remote, open_binary
from diffvl.data.references import Held, Reference, bytes_of, refer
from diffvl.data.rows import Part, Row
from diffvl.data.tarfiles import unpacked_by
from diffvl.errors import DataError, first_line

_IMAGES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif"))
_VIDEOS = frozenset(("mp4", "m4v", "webm", "avi", "mov", "mkv"))
_SOUNDS = frozenset(("wav", "mp3", "flac", "ogg"))
_JSON = "json"
_ALTERNATIVES = ";"  # between extensions of which a sample has one, as WebDataset has it


def tar_rows(file: str, name: str, columns: ColumnNames, held: bool, part: Part) -> Iterator[tuple[int, Row]]:
    """Reads a tar; see `ReadRows`. A tar that breaks off ends in a row that says so."""
    number = -1
    try:
        # A file of this machine can step over members without reading them.
        mode = "r|*" if is_remote(file) else "r:*"
        if not held:
            _require_unpacked(file)
        with open_binary(file) as raw, tarfile.open(fileobj=raw, mode=mode, tarinfo=_Header) as archive:
            for number, sample in enumerate(_samples(archive, part, held)):  # noqa: B007  # it says where the tar breaks off
                if sample is not None:
                    place = number + 1
                    yield number, Row(place, f"{name}:{place}", _value(sample, file, columns))
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        number += 1
        if not number:
            raise damaged(file, "tar", error) from error
        told = f"the tar is damaged or cut short after its sample {number} ({first_line(error)}); fetch it again"
        yield number, Row(number + 1, f"{name}:{number + 1}", DataError(told, "file cannot be read", ends=True))


def _require_unpacked(file: str) -> None:
    """Raises DataError for a tar in which nothing can be found by its place. OSError: as `open`."""
    with open(file, "rb") as opened:
        program = unpacked_by(opened.read(8))
    if program is not None:
        raise DataError(
            f"{file}: a packed tar is read from front to back only: unpack it ({program}), or, for data to train on, set "
            "data.streaming=true",
            "kind of file",
            ends=True,
        )


class _Header(tarfile.TarInfo):
    """A member whose header may not be missing. (`tarfile` takes a tar that is cut short at a header for one that ends.)"""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_Header":  # type: ignore[override]
        try:
            return super().fromtarfile(tarfile_)  # type: ignore[return-value]
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # two blocks of zeros: its end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


@dataclass(frozen=True)
class _Member:
    """A member's name, where its content begins in the tar, and its content, if it was read."""

    name: str
    start: int
    size: int
    data: bytes | None

    def named(self, file: str, *steps: str | int) -> Reference:
        """Names the image or video that it is, or has at these steps."""
        reference = refer("tar", file, self.name, self.start, self.size, *steps)
        return reference if self.data is None or steps else Held(reference, self.data)


@dataclass(frozen=True)
class _Sample:
    """The members with one key, by their extensions. held: whether images and videos were read."""

    key: str
    members: dict[str, _Member]
    held: bool


def _samples(archive: tarfile.TarFile, part: Part, held: bool) -> Iterator[_Sample | None]:
    """Gives the samples in order; None for one that is not read."""
    key: str | None = None
    members: dict[str, _Member] = {}
    number = -1
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # it keeps them all otherwise
        path = PurePosixPath(member.name)
        stem, _, extension = path.name.partition(".")
        if not member.isfile() or not stem or not extension or path.name.startswith("__"):
            continue
        own = str(path.with_name(stem))
        if own != key:
            if key is not None:
                yield _Sample(key, members, held) if part.has(number) else None
            key, members, number = own, {}, number + 1
        if part.has(number):
            extension = extension.lower()
            data = _read(archive, member) if held or _kind(extension) not in _IMAGES | _VIDEOS else None
            members[extension] = _Member(member.name, member.offset_data, member.size, data)
    if key is not None:
        yield _Sample(key, members, held) if part.has(number) else None


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    opened = archive.extractfile(member)
    assert opened is not None
    data = opened.read()
    if len(data) < member.size:
        raise tarfile.ReadError(f"member {member.name} ends too early")
    return data


# --- sample -> row -----------------------------------------------------------------------------------------------------------


def _value(sample: _Sample, file: str, columns: ColumnNames) -> Any:
    """Gives the object that a record is parsed from, or what is wrong with the sample."""
    try:
        media = {name: one for name, one in sample.members.items() if _kind(name) in _IMAGES | _VIDEOS}
        names = {name: one.named(file) for name, one in media.items()}
        given = {
            name: _content(name, one.data) for name, one in sample.members.items() if one.data is not None and name not in media
        }
        if columns.columns is not None:
            row = _mapped(given, names, columns.columns)
        else:
            row = _flat(given)
            for kinds, kind in ((_IMAGES, "image"), (_VIDEOS, "video")):
                row = _with_media(row, {one.name: names[name] for name, one in media.items() if _kind(name) in kinds}, kind)
        record = columns.record(row)
        record.setdefault("id", sample.key)

        def name(image: Any, steps: Steps) -> str:
            member, inside = _place_of(str(steps[0]), given)
            reference = sample.members[member].named(file, *inside, *steps[1:])
            return Held(reference, bytes_of(image)) if sample.held else reference

        return with_names(record, columns.columns or {}, name)
    except DataError as error:
        return error


def _place_of(column: str, given: dict[str, Any]) -> tuple[str, list[str]]:
    """Gives the member that a column of JSON stands in, and the steps to it: none, or its key in the sample's JSON."""
    inner = given.get(_JSON)
    for name in column.split(_ALTERNATIVES):
        if isinstance(given.get(name), dict | list):
            return name, []
        if isinstance(inner, dict) and name in inner:
            return _JSON, [name]
    raise DataError(f"an image as text under `{column}`: make it a member of its own", "image is no file")


def _kind(extension: str) -> str:
    return extension.rpartition(".")[2]


def _content(extension: str, data: bytes) -> Any:
    """Gives what a member says that is no image: JSON, or text."""
    kind = _kind(extension)
    if kind in _SOUNDS:
        raise DataError(f"member .{extension}: sounds are not supported: leave such samples out", "key not supported")
    if kind == _JSON:
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DataError(f"member .{extension}: malformed JSON: {error}", "malformed JSON") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None  # numbers of some kind, of which nothing is said unless they are asked for


def _flat(given: dict[str, Any]) -> dict[str, Any]:
    """Gives the keys of a sample's JSON, and its other members by their extensions."""
    inner = given.get(_JSON)
    if not isinstance(inner, dict):
        listed = ", ".join(f"`{name}`" for name in given) or "images or videos only"
        raise DataError(
            f"no member .json with an object in it; this sample has {listed}. Name the members that records are read from: "
            "data.columns={answer: txt, image: jpg}, say",
            "no turns",
        )
    return {**{name: value for name, value in given.items() if name != _JSON}, **inner}


def _mapped(given: dict[str, Any], media: dict[str, Reference], columns: Any) -> dict[str, Any]:
    """Gives the columns that `data.columns` names: members by extension, or keys of the sample's JSON."""
    inner = given.get(_JSON)
    there = {**(inner if isinstance(inner, dict) else {}), **given, **media}
    row = {}
    for key, column in columns.items():
        found = [name for name in column.split(_ALTERNATIVES) if name in there]
        if not found:
            raise DataError(
                f"no member or key `{column}`, which data.columns names as {key}; this sample has "
                f"{', '.join(f'`{name}`' for name in there)}",
                "column missing",
            )
        row[column] = there[found[0]]
    return row


def _with_media(row: dict[str, Any], media: dict[str, Reference], kind: str) -> dict[str, Any]:
    """Gives a row with the images (or videos) of its sample, which come by their members' names, in the order in which the row
    names them, if it does."""
    if not media:
        return row
    keys = (f"{kind}s", kind)
    named = next((row[key] for key in keys if not is_absent(row.get(key))), [])
    named = named if isinstance(named, list) else [named]
    if any(is_inline(name) for name in named):
        raise DataError(f"{kind}s both as members and in the JSON: keep one of them", kind)
    if named and len(named) != len(media):
        raise DataError(f"{len(media)} {kind}s as members, and {len(named)} named in the JSON", kind)
    by_name = {PurePosixPath(member).name: name for member, name in media.items()}
    names = [PurePosixPath(str(name)).name for name in named]
    ordered = [by_name[name] for name in names] if names and set(names) == set(by_name) else list(media.values())
    return {**{key: value for key, value in row.items() if key not in keys}, keys[0]: ordered}
