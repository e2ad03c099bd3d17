"""`diffvl compare`: finished runs and AR checkpoints on the same questions: how good, how sure that is, and how fast.

In order: the runs and the records that all are asked; every run's answers under each of its ways to decode, with one model in
memory at a time; intervals, by paired bootstrap over the records; then speed, for which all models stand in memory together,
because only calls by turns in one process can be compared. Where they do not fit, what was answered is kept, untimed.
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from rich.console import Console

from diffvl.bench.machine import describe_run, load_average
from diffvl.bench.turns import Player, Speed, answer_in_turns, speed_of
from diffvl.compare.entrants import Entrant, open_entrants
from diffvl.compare.held_out import HeldOut, records_to_ask, require_all_fit
from diffvl.compare.settings import NEW_TOKENS, ways_to_decode
from diffvl.decode.answer import Decoder
from diffvl.errors import first_line
from diffvl.evaluation.bootstrap import DRAWS, Interval, bootstrap
from diffvl.evaluation.questions import questions
from diffvl.evaluation.scored import Answered, Question, answer_records
from diffvl.faults import is_of_memory
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.store import checkpoint
from diffvl.terminal.bars import spinner_or_line
from diffvl.terminal.console import say

BATCHES = (1, 8)
TIMED = 8  # questions, one after the other at batch 1 and together at batch 8
ROUNDS = 3
NOT_ASKED = "--no-speed was given"


@dataclass(frozen=True)
class CompareRequest:
    """What the command line asks for. runs: the first is the one that the others are held against. limit: records, None for all.
    speed: False leaves timing out, so that one model at a time is in memory. seed: of the bootstrap."""

    runs: tuple[str, ...]
    data: Path | None = None
    limit: int | None = None
    speed: bool = True
    max_new_tokens: int = NEW_TOKENS
    seed: int = 0
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Way:
    """A run under one way to decode. own: its own, the slowest. tokens_per_forward: over all records, in batches of 8."""

    run: str
    name: str
    family: str
    own: bool
    settings: DecodeSettings
    answered: Answered

    @property
    def tokens_per_forward(self) -> float:
        return sum(one.answer.tokens for one in self.answered.scored) / self.answered.forwards


@dataclass(frozen=True)
class Row:
    """The figures of a way. difference: of exact match, from the first run's own way; None for that itself. speeds: by batch
    size, none where nothing was timed."""

    way: Way
    exact: Interval
    difference: Interval | None
    similarity: float
    speeds: Mapping[int, Speed]

    @property
    def json(self) -> dict[str, Any]:
        return {
            "run": self.way.run,
            "decoding": self.way.name,
            "answers": len(self.way.answered.scored),
            "exact_match": asdict(self.exact),
            "difference": None if self.difference is None else asdict(self.difference),
            "edit_similarity": self.similarity,
            "tokens_per_forward_in_batches": self.way.tokens_per_forward,
            "speed": {str(batch): asdict(speed) for batch, speed in self.speeds.items()},
        }


@dataclass(frozen=True)
class Compared:
    """All that was measured. machine: what it ran on and how; `untimed`: why there are no times, None where there are."""

    entrants: list[Entrant]
    held_out: HeldOut
    rows: list[Row]
    machine: dict[str, Any]

    @property
    def questions(self) -> list[Question]:
        return list(questions(self.held_out.records))

    @property
    def own(self) -> list[Row]:
        """One row for each run."""
        return [row for row in self.rows if row.way.own]

    @property
    def json(self) -> dict[str, Any]:
        runs = {one.name: {"place": one.place, "parents": one.facts.get("parents")} for one in self.entrants}
        return {"machine": self.machine, "runs": runs, "rows": [row.json for row in self.rows]}


def compare(request: CompareRequest, console: Console) -> Compared:
    """Measures everything; progress goes to `console`.

    Raises:
        UsageError, CheckpointError, ConfigError, DataError, UnsupportedModelError: where that can be known before anything is
            measured.
    """
    load_before = load_average()
    entrants = open_entrants(request.runs, request.trust_remote_code)
    held_out = records_to_ask(entrants, request.data, request.limit, console)
    say(console, f"asking {held_out.told()}")
    for entrant in entrants:
        if entrant.directory is not None:  # of the others it is known once they are loaded
            require_all_fit(*checkpoint.load_description(entrant.directory), held_out)
    ways: list[Way] = []
    machines: list[dict[str, Any]] = []
    for entrant in entrants:
        decoder = _load(entrant, console)
        if entrant.directory is None:
            require_all_fit(decoder.model.config, decoder.processor, held_out)
        ways += _answers(entrant, decoder, held_out, request.max_new_tokens, console)
        machines.append(describe_run(decoder.model.device, decoder.model.trunk.dtype, load_before))
        del decoder
        gc.collect()
    means, differences, similar = _intervals(ways, request.seed)
    speeds, untimed = _speeds_that_fit(entrants, ways, held_out, console) if request.speed else ({}, NOT_ASKED)
    rows = [
        Row(way, mean, difference if number else None, similarity.value, speeds.get((way.run, way.name), {}))
        for number, (way, mean, difference, similarity) in enumerate(zip(ways, means, differences, similar, strict=True))
    ]
    told = {"seed": request.seed, "draws": DRAWS, "records": len(held_out.records), "data": str(held_out.path)}
    timed_questions = min(TIMED, len(ways[0].answered.scored))
    told |= {
        "max_new_tokens": request.max_new_tokens,
        "timed_questions": timed_questions,
        "rounds": ROUNDS,
        "timed": untimed is None,
    }
    return Compared(entrants, held_out, rows, merged(machines) | told | {"untimed": untimed})


def merged(machines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Describes the machine that all runs were measured on, with every number format that their weights have."""
    return machines[0] | {"dtype": ", ".join(dict.fromkeys(one["dtype"] for one in machines))}


def _load(entrant: Entrant, console: Console) -> Decoder:
    with spinner_or_line(console, f"loading {entrant.name}"):
        return entrant.load()


def _answers(entrant: Entrant, decoder: Decoder, held_out: HeldOut, new_tokens: int, console: Console) -> list[Way]:
    """Answers all questions under each way to decode."""
    ways = ways_to_decode(decoder.model.config, new_tokens)
    return [
        Way(
            entrant.name,
            name,
            family,
            not number,
            settings,
            answer_records(decoder, held_out.records, settings, console, f"{entrant.name}, {name}"),
        )
        for number, (name, (family, settings)) in enumerate(ways.items())
    ]


def _intervals(ways: Sequence[Way], seed: int) -> tuple[list[Interval], list[Interval], list[Interval]]:
    """Computes exact match, its difference from the first way's, and edit similarity, each with its interval."""
    records = [one.record for one in ways[0].answered.scored]
    means, differences = bootstrap([[one.exact for one in way.answered.scored] for way in ways], records, seed)
    similar, _ = bootstrap([[one.similarity for one in way.answered.scored] for way in ways], records, seed)
    return means, differences, similar


# --- speed -----------------------------------------------------------------------------------------------------------------

Speeds = dict[tuple[str, str], dict[int, Speed]]  # of a run under a way to decode, by batch size


def _speeds_that_fit(
    entrants: Sequence[Entrant], ways: Sequence[Way], held_out: HeldOut, console: Console
) -> tuple[Speeds, str | None]:
    """Times every way; or warns and gives nothing and the reason, where memory ends: hours of answers must not be lost for it."""
    try:
        return _speeds(entrants, ways, held_out, console), None
    except (MemoryError, OSError, RuntimeError) as error:  # torch's own errors of memory are RuntimeErrors
        if not is_of_memory(error):
            raise
        untimed = f"memory ran out with all {len(entrants)} models in it ({first_line(error)})"
    gc.collect()
    say(
        console,
        ("warning:", "bold yellow"),
        f" nothing is timed: {untimed}. The answers are kept. Times need more memory, or fewer runs in a `diffvl compare`; "
        "--no-speed does not try",
    )
    return {}, untimed


def _speeds(entrants: Sequence[Entrant], ways: Sequence[Way], held_out: HeldOut, console: Console) -> Speeds:
    """Times every way by turns, at each batch size."""
    say(console, f"timing by turns: all {len(entrants)} models are in memory together (--no-speed leaves it out)")
    decoders = {one.name: _load(one, console) for one in entrants}
    players = {f"{way.run}, {way.name}": Player(decoders[way.run], way.settings) for way in ways}
    asked = spread_out(list(questions(held_out.records)), TIMED)
    speeds: Speeds = {(way.run, way.name): {} for way in ways}
    for batch in BATCHES:
        groups = [list(islice(cycle(asked), start, start + batch)) for start in range(0, TIMED, batch)]
        calls = answer_in_turns(players, groups, ROUNDS, console, f"batch {batch}")
        for way in ways:
            speeds[way.run, way.name][batch] = speed_of(calls[f"{way.run}, {way.name}"], ROUNDS)
    return speeds


def spread_out(asked: Sequence[Question], count: int) -> list[Question]:
    """Chooses up to `count` questions from all over the set."""
    count = min(count, len(asked))
    return [asked[int(number * len(asked) / count)] for number in range(count)]
