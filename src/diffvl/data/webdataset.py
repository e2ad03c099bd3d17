"""A WebDataset tar -> rows: members with one key, which follow each other, are one sample; what follows the key is its extension.

    0001.json 0001.jpg 0002.json 0002.jpg ...      or      0001.txt 0001.jpg ... with data.columns={answer: txt, image: jpg}

A tar is read from front to back, packed or not; members that are not needed are stepped over.
"""

import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from diffvl.data.cells import damaged
from diffvl.data.columns import ColumnNames
from diffvl.data.inline import Steps, is_inline, with_names
from diffvl.data.keys import is_absent
from diffvl.data.opening import is_remote, open_binary
from diffvl.data.references import Held, bytes_of
from diffvl.data.rows import Part, Row
from diffvl.errors import DataError, first_line

_IMAGES = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif"))
_SOUNDS = frozenset(("mp4", "webm", "avi", "mov", "mkv", "wav", "mp3", "flac", "ogg"))
_JSON = "json"
_ALTERNATIVES = ";"  # between extensions of which a sample has one, as WebDataset has it


def tar_rows(file: str, name: str, columns: ColumnNames, held: bool, part: Part) -> Iterator[tuple[int, Row]]:
    """Reads a tar; see `ReadRows`. Its images always come with their bytes. A tar that breaks off ends in a row that says so."""
    number = -1
    try:
        # A file of this machine can step over members without reading them.
        mode = "r|*" if is_remote(file) else "r:*"
        with open_binary(file) as raw, tarfile.open(fileobj=raw, mode=mode, tarinfo=_Member) as archive:
            for number, sample in enumerate(_samples(archive, part)):  # noqa: B007  # it says where the tar breaks off
                if sample is not None:
                    place = number + 1
                    yield number, Row(place, f"{name}:{place}", _value(*sample, file, number, columns))
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        number += 1
        if not number:
            raise damaged(file, "tar", error) from error
        told = f"the tar is damaged or cut short after its sample {number} ({first_line(error)}); fetch it again"
        yield number, Row(number + 1, f"{name}:{number + 1}", DataError(told, "file cannot be read", ends=True))


class _Member(tarfile.TarInfo):
    """A member whose header may not be missing. (`tarfile` takes a tar that is cut short at a header for one that ends.)"""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_Member":  # type: ignore[override]
        try:
            return super().fromtarfile(tarfile_)  # type: ignore[return-value]
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # two blocks of zeros: its end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


Sample = tuple[str, dict[str, bytes]]


def _samples(archive: tarfile.TarFile, part: Part) -> Iterator[Sample | None]:
    """Gives (key, extension -> bytes) of each sample in order; None for one that is not read."""
    key: str | None = None
    fields: dict[str, bytes] = {}
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
                yield (key, fields) if part.has(number) else None
            key, fields, number = own, {}, number + 1
        if part.has(number):
            opened = archive.extractfile(member)
            assert opened is not None
            fields[extension.lower()] = opened.read()
            if len(fields[extension.lower()]) < member.size:
                raise tarfile.ReadError(f"member {member.name} ends too early")
    if key is not None:
        yield (key, fields) if part.has(number) else None


# --- sample -> row -----------------------------------------------------------------------------------------------------------


def _value(key: str, fields: dict[str, bytes], file: str, number: int, columns: ColumnNames) -> Any:
    """Gives the object that a record is parsed from, or what is wrong with the sample."""
    try:
        images = {name: Held(f"{key}.{name} in {file}", data) for name, data in fields.items() if _kind(name) in _IMAGES}
        given = {name: _content(name, data) for name, data in fields.items() if name not in images}
        if columns.columns is not None:
            row = _mapped(given, images, columns.columns)
        else:
            row = _with_images(_flat(given), list(images.values()))
        record = columns.record(row)
        record.setdefault("id", key)

        def hold(image: Any, steps: Steps) -> str:
            return Held(f"{' '.join(map(str, steps))} of sample {number + 1} in {file}", bytes_of(image))

        return with_names(record, {}, hold)
    except DataError as error:
        return error


def _kind(extension: str) -> str:
    return extension.rpartition(".")[2]


def _content(extension: str, data: bytes) -> Any:
    """Gives what a member says that is no image: JSON, or text."""
    kind = _kind(extension)
    if kind in _SOUNDS:
        raise DataError(
            f"member .{extension}: videos and sounds in a tar are not supported: leave such samples out", "key not supported"
        )
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
        listed = ", ".join(f"`{name}`" for name in given) or "images only"
        raise DataError(
            f"no member .json with an object in it; this sample has {listed}. Name the members that records are read from: "
            "data.columns={answer: txt, image: jpg}, say",
            "no turns",
        )
    return {**{name: value for name, value in given.items() if name != _JSON}, **inner}


def _mapped(given: dict[str, Any], images: dict[str, Held], columns: Any) -> dict[str, Any]:
    """Gives the columns that `data.columns` names: members by extension, or keys of the sample's JSON."""
    inner = given.get(_JSON)
    there = {**(inner if isinstance(inner, dict) else {}), **given, **images}
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


def _with_images(row: dict[str, Any], images: list[Held]) -> dict[str, Any]:
    """Gives a row with the images of its sample, in the order in which it names them, if it does."""
    if not images:
        return row
    named = next((row[key] for key in ("images", "image") if not is_absent(row.get(key))), [])
    named = named if isinstance(named, list) else [named]
    if any(is_inline(name) for name in named):
        raise DataError("images both as members and in the JSON: keep one of them", "image")
    if named and len(named) != len(images):
        raise DataError(f"{len(images)} images as members, and {len(named)} named in the JSON", "image")
    by_name = {PurePosixPath(image.partition(" in ")[0]).name: image for image in images}
    names = [PurePosixPath(str(name)).name for name in named]
    ordered = [by_name[name] for name in names] if names and set(names) == set(by_name) else images
    return {**{key: value for key, value in row.items() if key not in ("image", "images")}, "images": ordered}
