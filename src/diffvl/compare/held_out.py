"""Which records all are asked: those of a file that is named, or those that every run has held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy
from rich.console import Console

from diffvl.compare.entrants import Entrant
from diffvl.compare.settings import ways_to_decode
from diffvl.config.recipe import Data
from diffvl.data.fingerprint import require_as_trained
from diffvl.data.loader import load_data, open_samples
from diffvl.data.mixture import Mixture
from diffvl.data.records import Record
from diffvl.data.sample_dataset import SampleDataset
from diffvl.data.source_records import iterate_source, source_at
from diffvl.data.sources import eval_settings, find_source
from diffvl.data.table import RecordTable, RecordTables
from diffvl.decode.answer import context_of, require_single_questions
from diffvl.errors import UsageError
from diffvl.evaluation.evaluate import reading_of, require_fitting, usable_records
from diffvl.evaluation.questions import questions
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.store import checkpoint
from diffvl.terminal import console as terminal
from diffvl.terminal.bars import track

_QUIET = terminal.console(quiet=True)


@dataclass(frozen=True)
class HeldOut:
    """path: what messages name. left_out: records that cannot be asked, and that the runs' own settings leave out."""

    path: Path
    records: list[Record]
    left_out: int = 0

    def told(self) -> str:
        without = f" ({self.left_out} that cannot be used are left out, as in training)" if self.left_out else ""
        return f"{len(self.records)} records of {self.path}{without}"


@dataclass(frozen=True)
class _Own:
    """What a run has held out. identity: what training would see of the records, in their order."""

    samples: SampleDataset | Mixture
    data: Data
    identity: tuple[int, ...]

    def told(self) -> str:
        return f"{len(self.samples)} records of {self.samples.path}"

    def to_ask(self, limit: int | None, console: Console) -> HeldOut:
        """The first `limit` that can be used: a damaged one must not end hours of answers. Raises UsageError where there is none,
        DataError as training does."""
        records: list[Record] = []
        seen, count = 0, len(self.samples)
        for place in track(console, range(count), count, "looking at the held-out records"):
            records += usable_records(self.samples, self.data, [place])
            seen = place + 1
            if len(records) == limit:
                break
        if not records:
            raise UsageError(f"{self.told()}: none of them can be used; name records with --data FILE")
        return HeldOut(self.samples.path, records, seen - len(records))


def records_to_ask(entrants: Sequence[Entrant], data: Path | None, limit: int | None, console: Console) -> HeldOut:
    """Finds the records; progress goes to `console`.

    Raises:
        UsageError: the runs have held out different records, or none.
        DataError: if they cannot be read, or a run was trained with them otherwise than they are now.
    """
    if data is not None:
        return _of_file(entrants, data, limit)
    own = {one.name: found for one in entrants if (found := _held_out_of(one)) is not None}
    if not own:
        raise UsageError("none of these runs has held records out (data.eval or data.holdout): name records with --data FILE")
    first = next(iter(own.values()))
    without = [one.name for one in entrants if one.directory is not None and one.data is not None and one.name not in own]
    if without or any(found.identity != first.identity for found in own.values()):
        lines = [f"  {name}: {found.told()}" for name, found in own.items()] + [f"  {name}: none" for name in without]
        raise UsageError(
            "these runs have not held out the same records, so their figures cannot be compared on them:\n"
            + "\n".join(lines)
            + "\nname records that none of them was trained on with --data FILE"
        )
    return first.to_ask(limit, console)


def _of_file(entrants: Sequence[Entrant], data: Path, limit: int | None) -> HeldOut:
    """Reads a file as the first run does that has a recipe."""
    directories = [one.directory for one in entrants if one.directory is not None]
    reading = next((found for one in directories if (found := reading_of(one, data)).model_fields_set), Data())
    records = list(islice(iterate_source(source_at(data, reading), reading.unpaired_turns), limit))
    return HeldOut(data, records)


def _held_out_of(entrant: Entrant) -> _Own | None:
    """Opens what a run has held out, as its stage did; None where it has nothing held out or is no stage."""
    data, directory = entrant.data, entrant.directory
    if data is None or directory is None or (data.eval is None and not data.holdout):
        return None
    data = data.model_copy(update={"check_lengths": False})
    _, processor = checkpoint.load_description(directory)
    settings = eval_settings(data)
    if settings is not None:
        unpacked = data.model_copy(update={"row_length": None})
        held: SampleDataset | Mixture | None = open_samples(
            find_source(settings), unpacked, processor, _QUIET, RecordTables(_QUIET)
        )
        opened = held.parts
    else:  # from what is left once a packed stage has put aside the records that fit no row
        stage = load_data(data, processor, None)
        held, opened = stage.held_out, stage.parts()
    assert held is not None
    if (facts := entrant.facts.get("data")) is not None:
        require_as_trained(directory, facts, opened)
    identity = tuple(digest for part in held.parts for digest in _digests(part))
    return _Own(held, data, identity)


def _digests(part: SampleDataset) -> list[int]:
    table = part.records
    assert isinstance(table, RecordTable)
    return table.digests[part.indices].tolist()


def require_all_fit(config: DiffVLConfig, processor: DiffVLProcessor, held_out: HeldOut) -> None:
    """Raises DataError with all records that do not fit a checkpoint, UsageError where they ask it what it cannot be asked."""
    records = held_out.records
    require_fitting(SampleDataset(records, held_out.path, numpy.arange(len(records)), processor, context_of(config)))
    if any(spoken.role == "assistant" for record, turn in questions(records) for spoken in record.turns[:turn]):
        for _, settings in ways_to_decode(config, new_tokens=1).values():
            require_single_questions(settings, config)
