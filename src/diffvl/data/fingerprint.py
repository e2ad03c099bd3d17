"""What a stage reads, record by record, kept in its directory: so that a run goes on only with the data that it began with."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from diffvl.data.loader import StageData
from diffvl.data.sample_dataset import SampleDataset
from diffvl.data.stream import StreamPart
from diffvl.data.table import RecordTable
from diffvl.errors import DataError
from diffvl.store.files import read_json, replace_text, replacing

DATA_FILE, DIGESTS_FILE = "data.json", "data.npz"  # of an unfinished stage: what it reads, in short and record by record


@dataclass(frozen=True)
class FileRecord:
    """What is kept of a data set. file: its path. bytes_digest, records_digest: of its bytes, and of what training sees of its
    records; digests: the same for each record, in order, 0 where it is left out. A stream is known by its files: digests has one
    for each file's name and size, and unit says so. share: how much of the mix it has."""

    file: str
    bytes_digest: str
    records_digest: str
    digests: numpy.ndarray
    used: int
    unit: str = "record"
    share: str | None = None

    def facts(self) -> dict[str, Any]:
        """Sums the set up for JSON."""
        share = {} if self.share is None else {"share": self.share}
        return {
            "file": self.file,
            "blake2b": self.bytes_digest,
            "content": self.records_digest,
            f"{self.unit}s": self.used,
            **share,
        }


def data_record(data: StageData) -> dict[str, FileRecord]:
    """Tells what a stage reads: `train`, of a mixture train.0, train.1, ...; and `eval` where it is a set of its own."""
    parts, shares = data.train.parts, None if isinstance(data.train, SampleDataset) else data.train.shares
    told = [None if shares is None or len(parts) == 1 else shares.told(number) for number in range(len(parts))]
    records = [_file_record(part, share) for part, share in zip(parts, told, strict=True)]
    named = {"train": records[0]} if len(parts) == 1 else {f"train.{number}": one for number, one in enumerate(records)}
    opened = [part.records for part in parts if isinstance(part, SampleDataset)]
    held_out = () if data.held_out is None else data.held_out.parts
    if len(held_out) == 1 and all(held_out[0].records is not one for one in opened):
        named["eval"] = _file_record(held_out[0], None)
    return named


def _file_record(samples: SampleDataset | StreamPart, share: str | None) -> FileRecord:
    if isinstance(samples, StreamPart):
        digests = samples.digests
        content = hashlib.blake2b(digests.tobytes(), digest_size=16).hexdigest()
        return FileRecord(str(samples.path), content, content, digests, len(digests), "file", share)
    table = samples.records
    assert isinstance(table, RecordTable)
    return FileRecord(str(samples.path), table.bytes_digest, table.content, table.digests, len(table.usable), share=share)


def facts_of(record: dict[str, FileRecord]) -> dict[str, Any]:
    return {name: one.facts() for name, one in record.items()}


def write_data_record(work: Path, record: dict[str, FileRecord]) -> None:
    """Leaves the record in an unfinished stage's directory."""
    with replacing(work / DIGESTS_FILE) as beside, beside.open("wb") as file:
        numpy.savez(file, allow_pickle=False, **{name: one.digests for name, one in record.items()})
    replace_text(work / DATA_FILE, json.dumps(facts_of(record), ensure_ascii=False))


def is_same_data(work: Path, record: dict[str, FileRecord]) -> bool:
    """Tells whether a stage's data is that with which the unfinished run in `work` began, if one did."""
    return not (work / DATA_FILE).is_file() or not _changes(read_json(work / DATA_FILE), record)


def require_same_data(work: Path, data: StageData) -> None:
    """Raises DataError unless a stage's data is that with which the unfinished run in `work` began. Images are known by their
    names only."""
    record = data_record(data)
    if is_same_data(work, record):
        return
    at_start = read_json(work / DATA_FILE)
    changed = _changes(at_start, record)
    digests: dict[str, numpy.ndarray] = {}
    if (work / DIGESTS_FILE).is_file():
        with numpy.load(work / DIGESTS_FILE) as stored:
            digests = dict(stored)
    lines = [_told_change(name, at_start.get(name), record.get(name), digests) for name in changed]
    raise DataError(
        f"{work}: the data is not what the run began with, so --resume would not continue it:\n"
        + "\n".join(f"  {line}" for line in lines)
        + "\nput the old data back or begin again with another --out; to go on with the data as it is now: "
        "--resume --accept-changed-data"
    )


def require_as_trained(stage: Path, facts: dict[str, Any], parts: Iterable[SampleDataset | StreamPart]) -> None:
    """Raises DataError unless data sets are, record by record, what a finished stage was trained with: which records are held out
    follows from all of them.

    Args:
        facts: what `facts_of` gave for the stage.
    """
    known = {one["content"] for one in facts.values()}
    changed = sorted({str(part.path) for part in parts if _file_record(part, None).records_digest not in known})
    if changed:
        raise DataError(
            f"{stage} was not trained with {', '.join(changed)} as it is now: records of it that count as held out may have been "
            "trained on. Put the old data back, or compare runs on other records with `diffvl compare ... --data FILE`"
        )


def _changes(at_start: dict[str, Any], record: dict[str, FileRecord]) -> list[str]:
    """Gives the files whose records are others than those that the run began with."""
    now = {name: (one.records_digest, one.share) for name, one in record.items()}
    then = {name: (facts["content"], facts.get("share")) for name, facts in at_start.items()}
    return sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))


def _told_change(name: str, then: dict[str, Any] | None, now: FileRecord | None, digests: dict[str, numpy.ndarray]) -> str:
    if then is None or now is None:
        return f"data.{name}: began with {then and then['file']}, now {now and now.file}"
    unit = now.unit
    told = f"data.{name}: began with {then['file']} ({then.get(f'{unit}s')} {unit}s), now {now.file} ({now.used} {unit}s)"
    if then["content"] == now.records_digest:
        return f"{told}; its share of the mix was {then.get('share')} and is {now.share}"
    if name not in digests:
        return told
    before, after = digests[name], now.digests
    common = min(len(before), len(after))
    different = numpy.flatnonzero(before[:common] != after[:common])
    first = int(different[0]) if len(different) else common
    if first < common and 0 in (before[first], after[first]):
        state = "could be used then and cannot now" if before[first] else "could not be used then and can now"
        return f"{told}; {unit} {first + 1} is the first that {state}"
    return f"{told}; {unit} {first + 1} is the first that differs"
