"""Data file -> a memory-mapped table of its records, which every process opens and none holds in memory.

The table lies in the cache folder of `datasets` and is built once for each state of the data file.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
from datasets import config as datasets_config

from diffvl.data.jsonfile import check_path
from diffvl.data.problems import Problem
from diffvl.data.records import Record, Role, Turn, Unpaired, parse_file
from diffvl.errors import DataError

_NUM_SHOWN = 5  # problems of one file told in one error
_NUM_ROWS = 1024  # records per Arrow batch

_FORMAT = 2  # of the Arrow cache: raise it when what is read out of a file changes
_FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "images": datasets.List(datasets.Value("string")),
        "roles": datasets.List(datasets.Value("string")),
        "texts": datasets.List(datasets.Value("string")),
        "trained": datasets.List(datasets.Value("bool")),
        "source": datasets.Value("string"),
    }
)


def open_records(path: Path, image_folder: str | Path | None = None, unpaired_turns: Unpaired = "error") -> datasets.Dataset:
    """The file's records as a memory-mapped table; `record_at` gives them back as `Record`.

    Columns: id, images (list), roles (list), texts (list), trained (list), source. The table lies in the cache folder of
    `datasets` and is built again when the file's path, size or modification time changes, or when it is read otherwise. Image
    files are looked for on every call.

    Raises:
        DataError: with the first problems of the file and the number of the others; nothing is left in the cache then.
    """
    check_path(path)
    reading = (image_folder, unpaired_turns)
    table = _cache_path(path, *reading)
    if not table.exists() or not _images_exist(table):
        _build_table(path, table, *reading)
    return datasets.Dataset.from_file(str(table))


def record_at(dataset: datasets.Dataset, index: int) -> Record:
    """Row `index` of what `open_records` gave (or of a selection of it)."""
    row = dataset[index]
    columns = zip(row["roles"], row["texts"], row["trained"], strict=True)
    turns = tuple(Turn(cast(Role, role), text, trained) for role, text, trained in columns)
    return Record(row["id"], tuple(row["images"]), turns, row["source"])


# --- the memory-mapped table ---------------------------------------------------------------------------------------------


def _cache_path(path: Path, image_folder: str | Path | None, unpaired_turns: Unpaired) -> Path:
    status = path.stat()
    folder = None if image_folder is None else os.path.abspath(image_folder)
    key = json.dumps([_FORMAT, os.path.abspath(path), status.st_size, status.st_mtime_ns, folder, unpaired_turns])
    name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return Path(datasets_config.HF_DATASETS_CACHE) / "diffvl" / f"{name}.arrow"


def _images_exist(table: Path) -> bool:
    """Whether all images named in a table are still there; if not, reading the file again says which records need them."""
    chunks = datasets.Dataset.from_file(str(table)).data.column("images").chunks
    return all(os.path.isfile(image) for image in {image for chunk in chunks for image in chunk.flatten().to_pylist()})


def _build_table(path: Path, table: Path, image_folder: str | Path | None, unpaired_turns: Unpaired) -> None:
    """Writes beside `table` and renames at the end: other processes see a whole table or none."""
    partial = table.with_name(f"{table.name}.{os.getpid()}.partial")
    try:
        table.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_table(path, partial, image_folder, unpaired_turns)
            os.replace(partial, table)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:  # of the cache only: reading the data file tells its own as DataError
        advice = "set HF_DATASETS_CACHE to a folder that can be written"
        raise DataError(f"{path}: its record cache {table.parent} cannot be written ({error}); {advice}") from error


def _write_table(path: Path, table: Path, image_folder: str | Path | None, unpaired_turns: Unpaired) -> None:
    schema = _FEATURES.arrow_schema
    problems: list[Problem] = []
    num_problems = 0
    rows: list[dict[str, Any]] = []
    with pa.OSFile(str(table), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for item in parse_file(path, image_folder, unpaired_turns):
            if isinstance(item, Problem):
                num_problems += 1
                problems += [item] if num_problems <= _NUM_SHOWN else []
            elif not problems:
                rows.append(_row(item))
            if len(rows) == _NUM_ROWS:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
                rows.clear()
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    if problems:
        raise _summary(path, problems, num_problems)


def _row(record: Record) -> dict[str, Any]:
    return {
        "id": record.id,
        "images": record.images,
        "roles": [turn.role for turn in record.turns],
        "texts": [turn.text for turn in record.turns],
        "trained": [turn.trained for turn in record.turns],
        "source": record.source,
    }


def _summary(path: Path, problems: list[Problem], num_problems: int) -> DataError:
    if num_problems == 1:
        return problems[0].error()
    lines = [str(problem) for problem in problems]
    if num_problems > len(problems):
        lines.append(f"and {num_problems - len(problems)} more")
    return DataError(f"{path}: {num_problems} problems\n  " + "\n  ".join(lines))
