"""What a night will cost, by a few steps of the dearest variant.

Times are those of the processor, not of the clock, so that other work on the machine does not count: divided by the cores they
are what the clock shows on a machine that does nothing else, if both cores are kept busy.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from rich.console import Console

from diffvl.bench.machine import describe_machine
from diffvl.data.records import iterate_records
from diffvl.decode.answer import load_for_decoding
from diffvl.demo.shapes import write_shapes
from diffvl.train.loop import Loop
from tools.study.results import Pilot
from tools.study.runs import Study, align, ask, train
from tools.study.variants import VARIANTS, Size

DEAREST = "f"  # two noisy copies and an AR loss
ALONE = 2.5  # times what an answer costs in a batch of 8, one by one


def run_pilot(study: Study, console: Console) -> Pilot:
    """Trains a few steps and asks a few questions. Steps that an earlier pilot has taken cannot be timed: it begins anew."""
    shutil.rmtree(study.runs, ignore_errors=True)
    variant, size = VARIANTS[DEAREST], study.size
    align_scenes, train_scenes, test_scenes = size.scenes
    write_shapes(study.data, align=align_scenes, train=train_scenes, test=test_scenes)
    with _timed_steps() as of_align:
        align(study, 0, console)
    with _timed_steps() as of_variant:
        directory = train(study, variant, 0, console)
    decoder = load_for_decoding(directory)
    records = list(iterate_records(study.data / "test.json"))[: size.test]
    began = time.process_time()
    ways = ask(decoder, records, size, console)
    answers = sum(len(way.exact) for way in ways.values())
    answer = (time.process_time() - began) / answers
    machine = describe_machine() | {"steps": size.steps}
    return Pilot(variant.key, _mean(of_align), _mean(of_variant), answer, len(ways), machine)


@contextmanager
def _timed_steps() -> Iterator[list[float]]:
    """Collects the processor's seconds of each optimiser step in the block."""
    whole, seconds = Loop.train_step, []

    def train_step(self: Any, *arguments: Any) -> float:
        began = time.process_time()
        norm = whole(self, *arguments)
        seconds.append(time.process_time() - began)
        return norm

    with patch.object(Loop, "train_step", train_step):
        yield seconds


def _mean(seconds: Sequence[float]) -> float:
    """Leaves out the first step, which does more than the others."""
    return sum(seconds[1:]) / len(seconds[1:])


# --- the estimate ----------------------------------------------------------------------------------------------------------


def run_seconds(pilot: Pilot, size: Size) -> float:
    """Estimates the clock's seconds of one run: its steps, the answers in its evaluations, the test questions under every way,
    and the timing. Priced as the pilot's variant."""
    in_training = (size.steps // size.eval_every + 1) * size.answers
    asked = size.test * pilot.ways
    timed = size.timed * size.rounds * (pilot.ways + 1)
    return (size.steps * pilot.step + (in_training + asked + ALONE * timed) * pilot.answer) / pilot.machine["cores"]


def night_seconds(pilot: Pilot, size: Size, runs: Sequence[tuple[str, int]]) -> float:
    """Estimates several runs, (variant, seed), and the align stage of each of their seeds."""
    seeds = {seed for _, seed in runs}
    aligning = len(seeds) * size.align_steps * pilot.align_step / pilot.machine["cores"]
    return aligning + len(runs) * run_seconds(pilot, size)
