"""Source -> its rows: which reader reads a file, and JSON as one of them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffvl.data.columns import ColumnNames
from diffvl.data.inline import Steps, with_names
from diffvl.data.jsonfile import read_places, read_stream
from diffvl.data.opening import is_remote, open_text, suffix_of
from diffvl.data.problems import place_of
from diffvl.data.references import Held, bytes_of, refer, require_url, shown
from diffvl.data.rows import Part, ReadRows, Row
from diffvl.data.tables import arrow_rows, parquet_rows
from diffvl.data.webdataset import tar_rows
from diffvl.errors import DataError

TAR, JSON, PARQUET, ARROW = "tar", "json", "parquet", "arrow"
KIND_OF_SUFFIX = {
    **dict.fromkeys((".tar", ".tar.gz", ".tgz"), TAR),
    **dict.fromkeys((".json", ".jsonl"), JSON),
    ".parquet": PARQUET,
    ".arrow": ARROW,
}


def json_rows(file: str, name: str, columns: ColumnNames, held: bool, part: Part) -> Iterator[tuple[int, Row]]:
    """Reads a `.json` list or `.jsonl` lines; see `ReadRows`."""
    is_list = suffix_of(file) == ".json"
    for number, (line, place, value) in enumerate(_objects(file, is_list)):
        if part.has(number):
            source = place_of(name, line, number + 1)
            yield number, Row(line, source, _named(value, columns, _naming(file, is_list, held, place)))


def _objects(file: str, is_list: bool) -> Iterator[tuple[int, int, Any]]:
    if not is_remote(file):
        yield from read_places(Path(file))
        return
    line = 0
    try:
        with open_text(file, None if is_list else "") as opened:
            for line, place, value in read_stream(opened, file, is_list):  # noqa: B007  # it says where the file breaks off
                yield line, place, value
    except (OSError, EOFError, UnicodeDecodeError) as error:
        yield (
            line + 1,
            0,
            DataError(f"{file}:{line + 1}: cannot be read from here on ({error})", "file cannot be read", ends=True),
        )


def _named(value: Any, columns: ColumnNames, naming: Callable[[Any, Steps], str]) -> Any:
    if not isinstance(value, dict):
        return value
    try:
        return with_names(columns.record(value), columns.columns or {}, naming)
    except DataError as error:
        return error


def _naming(file: str, is_list: bool, held: bool, place: int) -> Callable[[Any, Steps], str]:
    def name(image: Any, steps: Steps) -> str:
        if held:
            return Held(refer("jsonl", file, place, *steps), bytes_of(image))
        if is_list:
            raise DataError(
                f"an image is a file, not its bytes as text: {shown(str(image))}; write it into a file and give its path, or "
                "write the records as .jsonl, which may have such images",
                "image is no file",
            )
        if isinstance(image, str):
            require_url(image)
        return refer("jsonl", os.path.abspath(file), place, *steps)

    return name


READERS: dict[str, ReadRows] = {JSON: json_rows, PARQUET: parquet_rows, ARROW: arrow_rows, TAR: tar_rows}
