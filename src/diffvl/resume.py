"""Whether what lies on disk is the beginning of what is asked for: an interrupted run goes on only as the run it was.

The result of a resumed run is that of one uninterrupted run; so model, tower, settings, seed and start must be the same.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from diffvl import checkpoint
from diffvl.config import Data, Recipe, StageName
from diffvl.data.loader import SampleDataset, StageData
from diffvl.data.table import RecordTable, content_digest
from diffvl.errors import ConfigError, DataError
from diffvl.settings import read_yaml, resolve

BEFORE_FILE = "before.json"  # of an unfinished stage: where it started from, and that checkpoint's answers
DATA_FILE, DIGESTS_FILE = "data.json", "data.npz"  # of an unfinished stage: what it reads, in short and record by record
# Settings that change no step which was taken: with them a run looks for mistakes, or goes on where it would have stopped.
_WITHOUT_INFLUENCE = tuple(
    f"data.{name}" for name in ("workers", "check_images", "check_lengths", "on_error", "max_skipped", "too_long")
)
_DATA_PATHS = ("data.train", "data.eval", "data.image_folder")  # settings that may change as long as the records are the same


def is_finished(directory: Path) -> bool:
    """Whether `directory` is a complete one: only those have the file."""
    return (directory / checkpoint.STATE_FILE).is_file()


def require_same_source(model: str, vision_tower: str, recipe: Recipe, prepared: Path) -> None:
    """Raises ConfigError unless `prepared` was made from this checkpoint and tower with these settings."""
    begun = _recipe_of(prepared)
    begun_model, begun_tower = checkpoint.read_state(prepared)["parents"]
    ours = _source_facts(model, vision_tower, recipe)
    _refuse_changes(ours, _source_facts(begun_model, begun_tower, begun), prepared)


def require_same_stage(recipe: Recipe, stage: StageName, start: Path, directory: Path) -> None:
    """Raises ConfigError unless the run in `directory`, finished or not, began with these settings and from `start`. A
    directory in which nothing was begun is always right."""
    if not (directory / checkpoint.RECIPE_FILE).is_file():
        return
    begun = _recipe_of(directory)
    ours, theirs = _flat(recipe.stages[stage].model_dump()), _flat(begun.stages[stage].model_dump())
    for key in (*_WITHOUT_INFLUENCE, *_paths_of_same_content(recipe, stage, directory)):
        ours.pop(key, None)
        theirs.pop(key, None)
    ours |= {"seed": recipe.seed, "start": one_spelling(str(start))}
    theirs |= {"seed": begun.seed, "start": one_spelling(_begun_from(directory))}
    if not Path(theirs["start"]).exists():  # the run was moved since
        del ours["start"], theirs["start"]
    _refuse_changes(ours, theirs, directory)


def reading_of(directory: Path, data: Path) -> Data:
    """How a checkpoint's own recipe reads a data file: `image_folder` and `unpaired_turns` of the stage whose train or eval file
    lies in the same folder; the defaults where there is none."""
    if not (directory / checkpoint.RECIPE_FILE).is_file():
        return Data()
    for stage in _recipe_of(directory).stages.values():
        files = [Path(file) for file in (stage.data.train, stage.data.eval) if file is not None]
        if any(file.absolute().parent == data.absolute().parent for file in files):
            return Data(image_folder=stage.data.image_folder, unpaired_turns=stage.data.unpaired_turns)
    return Data()


def one_spelling(name: str) -> str:
    """The name of a checkpoint; where it is a path, its absolute one."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def _recipe_of(directory: Path) -> Recipe:
    path = directory / checkpoint.RECIPE_FILE
    return resolve(read_yaml(path), [], str(path))


def _source_facts(model: str, vision_tower: str, recipe: Recipe) -> dict[str, Any]:
    facts = {"model": one_spelling(model), "prepare.vision_tower": one_spelling(vision_tower), "seed": recipe.seed}
    return _flat(recipe.prepare.model_dump(), "prepare.") | facts


def _begun_from(directory: Path) -> str:
    if is_finished(directory):
        return checkpoint.read_state(directory)["parents"][0]
    return checkpoint.read_json(directory / BEFORE_FILE)["start"]


def _refuse_changes(ours: dict[str, Any], theirs: dict[str, Any], directory: Path) -> None:
    changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if changed:
        lines = "\n".join(f"  {key}: began with {theirs.get(key)!r}, asked for {ours.get(key)!r}" for key in changed)
        raise ConfigError(
            f"{directory} has other settings, so --resume cannot continue it:\n{lines}\nuse the same, or another --out"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


# --- the data that a run began with ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileRecord:
    """What is kept of a data file. file: its path. bytes_digest, records_digest: of its bytes, and of what training sees of its
    records; digests: the same for each record, in order, 0 where it is left out."""

    file: str
    bytes_digest: str
    records_digest: str
    digests: numpy.ndarray
    used: int

    def facts(self) -> dict[str, Any]:
        """In short, for JSON."""
        return {"file": self.file, "blake2b": self.bytes_digest, "content": self.records_digest, "records": self.used}


def data_record(data: StageData) -> dict[str, FileRecord]:
    """What a stage reads: `train`, and `eval` where it is a file of its own."""
    samples = {"train": data.train}
    if data.held_out is not None and data.held_out.path != data.train.path:
        samples["eval"] = data.held_out
    return {name: _file_record(one) for name, one in samples.items()}


def _file_record(samples: SampleDataset) -> FileRecord:
    table = samples.records
    assert isinstance(table, RecordTable)
    return FileRecord(str(samples.path), table.bytes_digest, table.content, table.digests, len(table.usable))


def facts_of(record: dict[str, FileRecord]) -> dict[str, Any]:
    return {name: one.facts() for name, one in record.items()}


def write_data_record(work: Path, record: dict[str, FileRecord]) -> None:
    """Leaves the record in an unfinished stage's directory."""
    digests = work / DIGESTS_FILE
    with checkpoint.partial(digests).open("wb") as file:
        numpy.savez(file, allow_pickle=False, **{name: one.digests for name, one in record.items()})
    checkpoint.partial(digests).replace(digests)
    checkpoint.replace_text(work / DATA_FILE, json.dumps(facts_of(record), ensure_ascii=False))


def is_same_data(work: Path, record: dict[str, FileRecord]) -> bool:
    """Whether a stage's data is that with which the unfinished run in `work` began, if one did."""
    return not (work / DATA_FILE).is_file() or not _changes(checkpoint.read_json(work / DATA_FILE), record)


def require_same_data(work: Path, data: StageData) -> None:
    """Raises DataError unless a stage's data is that with which the unfinished run in `work` began. Pictures are known by their
    names only."""
    record = data_record(data)
    if is_same_data(work, record):
        return
    begun = checkpoint.read_json(work / DATA_FILE)
    changed = _changes(begun, record)
    digests: dict[str, numpy.ndarray] = {}
    if (work / DIGESTS_FILE).is_file():
        with numpy.load(work / DIGESTS_FILE) as stored:
            digests = dict(stored)
    lines = [_told_change(name, begun.get(name), record.get(name), digests) for name in changed]
    raise DataError(
        f"{work}: the data is not what the run began with, so --resume would not continue it:\n"
        + "\n".join(f"  {line}" for line in lines)
        + "\nput the old data back or begin again with another --out; to go on with the data as it is now: "
        "--resume --accept-changed-data"
    )


def _changes(begun: dict[str, Any], record: dict[str, FileRecord]) -> list[str]:
    """The files whose records are others than those that the run began with."""
    now = {name: one.records_digest for name, one in record.items()}
    then = {name: facts["content"] for name, facts in begun.items()}
    return sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))


def _told_change(name: str, then: dict[str, Any] | None, now: FileRecord | None, digests: dict[str, numpy.ndarray]) -> str:
    if then is None or now is None:
        return f"data.{name}: began with {then and then['file']}, now {now and now.file}"
    told = f"data.{name}: began with {then['file']} ({then['records']} records), now {now.file} ({now.used} records)"
    if name not in digests:
        return told
    before, after = digests[name], now.digests
    common = min(len(before), len(after))
    different = numpy.flatnonzero(before[:common] != after[:common])
    first = int(different[0]) if len(different) else common
    if first < common and 0 in (before[first], after[first]):
        state = "could be used then and cannot now" if before[first] else "could not be used then and can now"
        return f"{told}; record {first + 1} is the first that {state}"
    return f"{told}; record {first + 1} is the first that differs"


def _paths_of_same_content(recipe: Recipe, stage: StageName, directory: Path) -> list[str]:
    """The path settings that need not be the same, because what they lead to is compared: by `require_same_data` where the stage
    is unfinished, here by the files' bytes where it is finished and its data is not read again."""
    if not is_finished(directory):
        return list(_DATA_PATHS) if (directory / DATA_FILE).is_file() else []
    begun = checkpoint.read_state(directory).get("data", {})
    same = []
    for name in ("train", "eval"):
        path = getattr(recipe.stages[stage].data, name)
        if name in begun and path is not None and Path(path).is_file() and content_digest(Path(path)) == begun[name]["blake2b"]:
            same.append(f"data.{name}")
    return [*same, "data.image_folder"] if same else []
