"""One run of the study after the other: align once a seed, train a variant, ask it, time it beside its AR twin, write its result.

Everything that is finished is kept: a result that is there is not made again, and a run that was interrupted goes on from its
last checkpoint. Weights of a measured variant are removed, but for the twin's, beside which the others are timed.
"""

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffvl.bench.machine import describe_machine
from diffvl.bench.turns import Player, answer_in_turns, speed_of
from diffvl.compare.compare import spread_out
from diffvl.compare.settings import ways_to_decode
from diffvl.conversion.plan import ConvertRequest
from diffvl.conversion.resume import is_finished
from diffvl.conversion.run import convert
from diffvl.data.records import Record, iterate_records
from diffvl.decode.answer import Decoder, load_for_decoding
from diffvl.demo.shapes import write_shapes
from diffvl.errors import UsageError
from diffvl.evaluation.questions import questions
from diffvl.evaluation.scored import answer_records
from diffvl.terminal.bars import duration
from diffvl.terminal.console import say
from tools.study.results import CALL, Decoded, Origin, Result, curves_of, read_results, write_result
from tools.study.variants import TWIN, VARIANTS, Size, Variant, write_recipe

DIFFUSE, WEIGHTS = "diffuse", "*.safetensors"


@dataclass(frozen=True)
class Study:
    """What is asked for. out: the folder of everything that is made. model, tower: the sources. assignments: settings of all
    runs, as `--set` takes them. keep: leave all weights where they are."""

    out: Path
    model: Path
    tower: Path
    size: Size
    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    assignments: tuple[str, ...] = ()
    keep: bool = False

    @property
    def results(self) -> Path:
        return self.out / "results"

    @property
    def data(self) -> Path:
        return self.out / "data"

    @property
    def settings(self) -> dict[str, Any]:
        """What all results of a study share."""
        size = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self.size).items()}
        return {**size, "model": self.model.name, "tower": self.tower.name, "assignments": list(self.assignments)}

    @property
    def runs(self) -> Path:
        return self.out / "runs"

    def root(self, seed: int) -> Path:
        return self.runs / f"seed-{seed}"

    def directory(self, variant: str, seed: int) -> Path:
        return self.runs / f"{variant}-{seed}" / DIFFUSE

    def start(self, seed: int) -> str:
        """Digests the weights of a seed's align checkpoint; empty where it is not here, or not yet."""
        files = sorted((self.root(seed) / "align").glob(WEIGHTS))
        return hashlib.sha256(b"".join(map(_digest, files))).hexdigest()[:8] if files else ""

    def missing(self) -> list[tuple[str, int]]:
        """Lists the runs without a result, seed by seed, the twin first: the others are timed beside it. Only runs from one start
        are compared, and another kind of machine trains another; so a seed that it did not finish begins anew here."""
        every = [key for key in VARIANTS if VARIANTS[key].skipped() is None]
        made: dict[Origin, set[str]] = {}
        for one in read_results(self.results):
            made.setdefault(one.origin, set()).add(one.variant)
        missing = []
        for seed in self.seeds:
            here = made.get((seed, self.start(seed)), set[str]())
            if not any(set(every) <= variants for (number, _), variants in made.items() if number == seed):
                missing += [(key, seed) for key in every if key in self.variants and key not in here]
        return missing


def run_study(study: Study, console: Console) -> None:
    """Makes every result that is missing; says after the first how long the rest will take."""
    for key in study.variants:
        if (reason := VARIANTS[key].skipped()) is not None:
            say(console, (f"({key}) {VARIANTS[key].about}", "bold"), f": skipped, {reason}")
    align, train, test = study.size.scenes
    write_shapes(study.data, align=align, train=train, test=test)
    missing = study.missing()
    for key, seed in missing:
        if key != TWIN and (TWIN, seed) not in missing and twin_of(study, seed) is None:
            told = f" ({key}) of seed {seed} will not be timed: its AR twin is not here; run ({TWIN}) first, or with it"
            say(console, ("warning:", "bold yellow"), told)
    for number, (key, seed) in enumerate(missing):
        say(console, (f"\nrun {number + 1} of {len(missing)}: ({key}) {VARIANTS[key].about}, seed {seed}", "bold"))
        began = time.monotonic()
        result = measure(study, VARIANTS[key], seed, console)
        write_result(result, study.results)
        if key != TWIN and not study.keep:
            _drop_weights(study.directory(key, seed))
        left = (time.monotonic() - began) * (len(missing) - number - 1)
        say(
            console, f"exact match {result.own.match:.3f}; took {duration(result.seconds)}; the rest needs about {duration(left)}"
        )


def align(study: Study, seed: int, console: Console) -> Path:
    """Prepares and aligns once for all variants of a seed."""
    file = study.out / "recipes" / f"align-{seed}.yaml"
    recipe = write_recipe(VARIANTS[TWIN], study.size, study.data, study.tower, [*study.assignments, f"seed={seed}"], file)
    say(console, f"align, seed {seed}")
    return convert(ConvertRequest(model=str(study.model), stage="align", recipe=str(recipe), out=study.root(seed), resume=True))


def train(study: Study, variant: Variant, seed: int, console: Console) -> Path:
    """Trains a variant from its seed's align checkpoint, or from its AR twin."""
    start = twin_of(study, seed) if variant.after_twin else align(study, seed, console)
    if start is None:
        raise UsageError(f"({variant.key}) of seed {seed} starts from the AR twin, which is not there: run ({TWIN}) too")
    file = study.out / "recipes" / f"{variant.key}-{seed}.yaml"
    recipe = write_recipe(variant, study.size, study.data, study.tower, [*study.assignments, f"seed={seed}"], file)
    directory = study.directory(variant.key, seed)
    if is_finished(directory) and not any(directory.glob(WEIGHTS)):  # dropped once it was measured, and its result is gone
        shutil.rmtree(directory)
    root = directory.parent
    return convert(ConvertRequest(start=start, stage="diffuse", recipe=str(recipe), out=root, resume=True))


def twin_of(study: Study, seed: int) -> Path | None:
    """Finds the AR twin of a seed. None: it was not run here."""
    directory = study.directory(TWIN, seed)
    return directory if any(directory.glob(WEIGHTS)) else None


def measure(study: Study, variant: Variant, seed: int, console: Console) -> Result:
    """Trains and measures one run."""
    directory = train(study, variant, seed, console)
    exact_match, masked_loss, noise, seconds = curves_of(directory)
    began = time.monotonic()
    decoder = load_for_decoding(directory)
    records = list(iterate_records(study.data / "test.json"))[: study.size.test]
    ways = ask(decoder, records, study.size, console)
    speeds = time_beside_twin(study, decoder, variant, seed, records, console)
    return Result(
        variant=variant.key,
        seed=seed,
        steps=study.size.steps,
        exact_match=exact_match,
        masked_loss=masked_loss,
        gradient_noise=noise,
        ways=ways,
        speeds=speeds,
        settings=study.settings,
        machine=describe_machine() | {"threads": torch.get_num_threads(), "dtype": str(decoder.model.trunk.dtype)},
        seconds=round(seconds + time.monotonic() - began, 1),
        clock=CALL,
        start=study.start(seed),
    )


def ask(decoder: Decoder, records: Sequence[Record], size: Size, console: Console) -> dict[str, Decoded]:
    """Asks all test questions under every way to decode."""
    found = {}
    for name, (_, settings) in ways_to_decode(decoder.model.config, size.new_tokens).items():
        answered = answer_records(decoder, records, settings, console, name)
        scored = answered.scored
        similarity = sum(one.similarity for one in scored) / len(scored)
        tokens = sum(one.answer.tokens for one in scored)
        found[name] = Decoded([int(one.exact) for one in scored], similarity, tokens / answered.forwards)
    return found


def time_beside_twin(
    study: Study, decoder: Decoder, variant: Variant, seed: int, records: Sequence[Record], console: Console
) -> dict[str, float]:
    """Times every way by turns with the AR twin of the same seed; nothing where there is none yet."""
    twin = None if variant.key == TWIN else twin_of(study, seed)
    if twin is None:
        return {}
    beside = load_for_decoding(twin)
    (twins_way,) = ways_to_decode(beside.model.config, study.size.new_tokens).values()
    players = {TWIN: Player(beside, twins_way[1])}
    ways = ways_to_decode(decoder.model.config, study.size.new_tokens)
    players |= {name: Player(decoder, settings) for name, (_, settings) in ways.items()}
    groups = [[question] for question in spread_out(list(questions(records)), study.size.timed)]
    calls = answer_in_turns(players, groups, study.size.rounds, console, "timing beside the AR twin")
    return {name: speed_of(of_player, study.size.rounds).tokens_per_second for name, of_player in calls.items()}


def _digest(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def _drop_weights(directory: Path) -> None:
    """Leaves of a measured run what is small."""
    for file in directory.glob(WEIGHTS):
        file.unlink()
