"""What runs of the study will cost, by the pilot's times of a step and of an answer."""

from collections.abc import Sequence

from tools.study.results import Pilot
from tools.study.variants import Size


def run_seconds(pilot: Pilot, size: Size) -> float:
    """Estimates one run: its steps, the answers in its evaluations, the test questions under every way, and the timing. Priced as
    the pilot's variant, which is the dearest."""
    evaluations = size.steps // size.eval_every + 1
    in_training = evaluations * size.answers
    asked = size.test * pilot.ways
    timed = size.timed * size.rounds * (pilot.ways + 1)
    alone = 2.5  # times what an answer costs in a batch of 8, one by one
    return size.steps * pilot.step + (in_training + asked + alone * timed) * pilot.answer


def night_seconds(pilot: Pilot, size: Size, runs: Sequence[tuple[str, int]]) -> float:
    """Estimates several runs, (variant, seed), and the align stage of each of their seeds."""
    seeds = {seed for _, seed in runs}
    return len(seeds) * size.align_steps * pilot.align_step + len(runs) * run_seconds(pilot, size)
