"""Results -> `fidelity.md` and its charts. Everything on the page is computed from the JSON files; nothing is written by hand."""

import shutil
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from diffvl.store.files import replace_text
from diffvl.terminal.bars import duration, number
from tools.study.charts import charts
from tools.study.picture import PICTURE_FILE, Picture, read_picture
from tools.study.pilot import night_seconds
from tools.study.results import (
    ENCODED,
    PILOT_FILE,
    Curve,
    Pilot,
    Result,
    Sorted,
    by_variant,
    exact,
    masked,
    read_pilot,
    read_results,
    steps_to,
)
from tools.study.variants import NIGHT, TWIN, VARIANTS
from tools.study.verdicts import (
    CLAIMS,
    CLOSE,
    FASTER,
    KEPT,
    UNDECIDED,
    Claim,
    Figure,
    Verdict,
    judge_all,
    judge_one,
    share,
    speedup,
)

FOLDER = "fidelity"  # of the charts and the results, beside the page
LEVELS = (0.25, 0.5, 0.75)  # of exact match
LOSSES = (1.0, 0.5, 0.2)  # of masked loss
STEPS = ("4 steps a block", "2 steps a block", "1 step a block")
NONE = "-"
STAR = "\\*"
SEEDS = (0, 1, 2)

_HEAD = """# The fidelity study: do the published methods do what they claim?

This page is made by `make study` out of the files in `docs/fidelity/`; nothing on it is written by hand.

On the built-in scenes, with SmolLM2-135M-Instruct and DINOv2-small, one finetuning in several forms. Of each seed all see the
same samples in the same order and take as many steps from an align checkpoint, their start. Another kind of machine trains
another start, and that may make more of a difference than the form; so runs from one start are compared wherever there are two.
(a) to (g) have the learning rates of `recipes/demo.yaml` (LoRA of rank 32, blocks of 4). Every diffusion form predicts the token
after a position (`target: shift`), as the AR model does. The papers' own forms predict in place, which this few steps may be too
few for; that can be studied too, in a folder of its own, by the third command (without the AR twin, for which there is no other
target: what is claimed against it stays open there). (h) starts from the finished AR twin and takes as many steps again, with the
adapters and rates of `recipes/lossless.yaml`. In fp32 its answers are the twin's, in bf16 up to rounding; the question is how
fast they come.

```
make study                                   # what is missing, then this page
make study STUDY="--only a,b --seeds 1"      # a part of it
python -m tools.study --out runs/study-same --only b,c,d,e,f,g --set stages.diffuse.objective.target=same
python -m tools.study --pilot                # a few steps, to know what a night costs on this machine
```
"""
_RULE = f"""## How a verdict is found

Each start gives a claim one figure, larger where the claim fits better: a difference or a ratio of two runs of one seed from
that start. A seed without such a pair gives the figure of two runs from two starts, whose difference is in it then, and in the
interval. From these figures comes their mean with a t interval of 95 %. A claim is *reproduced* if the whole interval lies above
its bound, *refuted* if it lies below it, and *{UNDECIDED}* otherwise; so it is with fewer than two figures, and with
figures that are all alike, unless they are 0. That a start answers {NIGHT.test} questions and no others is in no interval. Three
figures give wide intervals: only what all of them show clearly is decided. Every verdict is about this scale: a form that has not
learnt the job after these few steps is refuted here where its quality counts, and may be as good after more.

* converges faster: exact match on held-out questions, the mean over the evaluations after step 0, less that of the other; bound 0
* trains more steadily: the logarithm of how many times less the gradient's norm varies; bound 0. (Gradient noise: its variance
  over its squared mean, from the differences between neighbouring steps in the second half of a run. What the masks alone add to
  it is measured by `tools/variance`, see `docs/objective.md`.)
* ends better: exact match on the test questions, less that of the other; bound 0
* close to AR: exact match over that of the AR twin; bound {CLOSE:g}
* faster than AR: tokens per second over those of the twin, timed by turns, at the fastest way to decode that keeps {KEPT:g} of
  the twin's exact match (0 where none does); bound 1, and for the goal of this project {FASTER:g}
"""


def write_study_page(results: Path, folder: Path, quick: bool = False) -> Path:
    """Writes `fidelity.md` and `fidelity/` into a folder, which keeps a copy of the results.

    Raises:
        DataError: results of two studies are mixed.
    """
    picture = read_picture(results)
    found, pilot = with_picture(read_results(results), picture), read_pilot(results)
    beside = folder / FOLDER
    beside.mkdir(parents=True, exist_ok=True)
    for file in [*results.glob("?-*.json"), *results.glob(PILOT_FILE), *results.glob(PICTURE_FILE)]:
        if file.resolve().parent != beside.resolve():
            shutil.copyfile(file, beside / file.name)
    sorted_results = by_variant(found)
    for name, chart in charts(sorted_results).items():
        replace_text(beside / f"{name}.svg", chart.file())
    page = folder / "fidelity.md"
    replace_text(page, study_page(found, pilot, picture, quick))
    return page


def with_picture(results: Sequence[Result], picture: Picture | None) -> list[Result]:
    """Adds to times that begin once the picture is encoded what that takes, where it was measured."""
    return [
        replace(one, speeds=picture.included(one.speeds)) if picture is not None and one.clock == ENCODED else one
        for one in results
    ]


def study_page(results: Sequence[Result], pilot: Pilot | None, picture: Picture | None = None, quick: bool = False) -> str:
    """Writes the page of results whose times have the picture in them, as far as it was measured."""
    found = by_variant(results)
    parts = [_HEAD]
    if quick:
        parts.append("**Made with `--quick`: tiny random models, a few steps. These figures mean nothing.**\n")
    parts += ["## What was run\n", *_variants(found), *_cost(results, pilot), *_starts(found), *_clock(results, picture)]
    if results:
        parts += ["## Verdicts\n", *_verdicts(judge_all(found)), *_crossed(found), *_added(found), *_goal(found)]
    else:
        parts.append(f"## Verdicts\n\nNo run is made yet: the {len(CLAIMS)} claims are open.\n")
    parts.append(_RULE)
    if results:
        parts += ["## Figures\n", *_figures(found)]
    return "\n".join(parts)


# --- what was run ------------------------------------------------------------------------------------------------------------


def _variants(found: Sorted) -> Iterator[str]:
    rows = []
    for key, variant in VARIANTS.items():
        seeds = ", ".join(map(str, sorted(seed for seed, _ in found.get(key, {}))))
        state = seeds or "not run yet" + (f"; it needs the recipe `{variant.recipe}`" if variant.recipe else "")
        rows.append([f"({key})", variant.about, state])
    yield table(["", "form", "seeds"], rows)


def _cost(results: Sequence[Result], pilot: Pilot | None) -> Iterator[str]:
    if results:
        first, total = results[0], sum(one.seconds for one in results)
        yield (
            f"{len(results)} runs of {first.steps} steps took {duration(total)} together, measuring included. "
            f"{first.settings['test']} test questions, {first.settings['answers']} answered in each evaluation during training. "
            f"{_machines(results)}\n"
        )
    elif pilot is not None:
        runs = [(key, seed) for seed in SEEDS for key in VARIANTS if VARIANTS[key].recipe is None]
        machine, hours = pilot.machine, night_seconds(pilot, NIGHT, runs) / 3600
        yield (
            f"**Estimate.** {len(runs)} runs of {NIGHT.steps} steps of 8, {len(SEEDS)} seeds, measuring included: about "
            f"{hours:.1f} h on {machine['cores']} cores that do nothing else. Basis: a pilot of {machine['steps']} steps of "
            f"({pilot.variant}), the dearest form, as which all are priced, on {machine['cores']} cores of {machine['cpu']}, "
            f"torch {machine['torch']}, {machine['date']}. The processor's seconds, over all cores: {pilot.step:.1f} a step, "
            f"{pilot.align_step:.1f} a step of align, {pilot.answer:.2f} an answer in batches of 8.\n"
        )


def _starts(found: Sorted) -> Iterator[str]:
    """Says what another start of the same seed does, where a form was run from several."""
    told = []
    for key, runs in found.items():
        for seed in sorted({one.seed for one in runs.values()}):
            matches = [f"{run.own.match:.3f}" for run in runs.values() if run.seed == seed]
            told += [f"({key}) of seed {seed} came to {' and '.join(matches)}"] if len(matches) > 1 else []
    if told:
        yield f"From different starts of one seed, exact match: {'; '.join(told)}.\n"


def _clock(results: Sequence[Result], picture: Picture | None) -> Iterator[str]:
    """Says what times are of, where not all are of whole calls."""
    early = [name for one, name in _named(results) if one.clock == ENCODED and one.speeds]
    if not early:
        return
    told = f"Times are of whole calls. Those of {', '.join(early)} began once the picture was encoded"
    if picture is None:
        yield f"{told}; what that takes was not measured, so their speeds against the twin are a little too high.\n"
        return
    machine = picture.machine
    yield (
        f"{told}; what that takes is added here: as long as {picture.tokens:.2f} tokens of the AR twin, of "
        f"{picture.answer:.1f} in an answer (`python -m tools.study --picture`; {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['threads']} of them used, {machine['dtype'].removeprefix('torch.')}, {machine['date']}).\n"
    )


def _machines(results: Sequence[Result]) -> str:
    """On what the runs were made. A later machine than a seed's first has its align checkpoint and its twin anew."""
    runs: dict[tuple[str, str], list[str]] = {}
    for one, name in _named(results):
        machine = one.machine
        kept = machine["dtype"].removeprefix("torch.") if "dtype" in machine else "dtype not noted"
        where = f"{machine['cores']} cores of {machine['cpu']}, {machine['threads']} of them to a run, {kept}"
        runs.setdefault((f"{where}, torch {machine['torch']}", machine["date"]), []).append(name)
    if len(runs) == 1:
        ((where, date),) = runs
        return f"On {where}, {date}."
    told = "; ".join(f"{', '.join(sorted(names))} on {where}, {date}" for (where, date), names in runs.items())
    return f"Form and seed: {told}. A machine of another kind trained the align checkpoint of a seed anew, and an AR twin."


def _named(results: Sequence[Result]) -> Iterator[tuple[Result, str]]:
    """Gives each run with its form and seed; with its start, where that form and seed were run from several."""
    times = Counter((one.variant, one.seed) for one in results)
    for one in results:
        start = f" ({one.start})" if one.start and times[one.variant, one.seed] > 1 else ""
        yield one, f"{one.variant}-{one.seed}{start}"


# --- verdicts ----------------------------------------------------------------------------------------------------------------


def _verdicts(verdicts: Sequence[Verdict]) -> Iterator[str]:
    rows = []
    for one in verdicts:
        claim = one.claim
        figures = ", ".join(f"{each.value:{claim.form}}{STAR if each.crossed else ''}" for each in one.figures) or NONE
        pair = f"({claim.first}) against ({claim.second})"
        rows.append([claim.source, claim.text, pair, figures, _interval(one), f"{claim.bound:g}", f"*{one.answer}*"])
    yield table(["claimed by", "claim", "runs", "figures", "mean, interval", "bound", "verdict"], rows)


def _interval(one: Verdict) -> str:
    form = one.claim.form
    return NONE if one.low is None else f"{one.mean:{form}} [{one.low:{form}}, {one.high:{form}}]"


def _added(found: Sorted) -> Iterator[str]:
    """Says which seeds were not planned, and what they changed: who goes on until a claim is decided decides it too easily."""
    added = {key: more for key, runs in found.items() if (more := sorted({seed for seed, _ in runs} - set(SEEDS)))}
    if not added:
        return
    planned = {key: {one: run for one, run in runs.items() if run.seed in SEEDS} for key, runs in found.items()}
    which = "; ".join(f"{', '.join(map(str, seeds))} of ({key})" for key, seeds in added.items())
    told = f"Seeds {', '.join(map(str, SEEDS))} were planned. Added later, to narrow an interval: {which}. "
    changed = _otherwise(judge_all(found), judge_all(planned))
    yield told + (f"By the planned seeds alone: {changed}.\n" if changed else "No verdict hangs on them.\n")


def _crossed(found: Sorted) -> Iterator[str]:
    """Says what a star is, and what the figures without one say alone."""
    verdicts = judge_all(found)
    if not any(each.crossed for one in verdicts for each in one.figures):
        return
    changed = _otherwise(verdicts, judge_all(found, crossed=False))
    told = f"{STAR} of runs from two starts. "
    yield told + (f"By the other figures alone: {changed}.\n" if changed else "No verdict hangs on them.\n")


def _otherwise(verdicts: Sequence[Verdict], others: Sequence[Verdict]) -> str:
    """Lists the verdicts that would be others."""
    changed = [then for now, then in zip(verdicts, others, strict=True) if now.answer != then.answer]
    return "; ".join(f"{then.claim.text}, {_interval(then)}, *{then.answer}*" for then in changed)


def _goal(found: Sorted) -> Iterator[str]:
    """Says how far the best form is from the goal of this project."""

    def against_twin(key: str, figure: Figure, bound: float, form: str) -> Verdict:
        return judge_one(Claim("", "", key, TWIN, figure, bound, form), found)

    shares = {key: one for key in found if key != TWIN and (one := against_twin(key, share, CLOSE, ".3f")).mean is not None}
    if not shares:
        return
    best = max(shares, key=lambda key: shares[key].mean or 0.0)
    speed = against_twin(best, speedup, FASTER, ".2f")
    yield (
        f"**The goal**: {CLOSE:g} of the AR twin's exact match, and {FASTER:g} times its tokens per second at {KEPT:g}. The form "
        f"with the highest mean is ({best}): {_found(shares[best])} of the twin's, *{shares[best].answer}*, and "
        f"{_found(speed)} times its speed, *{speed.answer}*.\n"
    )


def _found(one: Verdict) -> str:
    """Gives the mean with its interval, as far as there are both."""
    return _interval(one) if one.low is not None else "?" if one.mean is None else f"{one.mean:{one.claim.form}}"


# --- figures -----------------------------------------------------------------------------------------------------------------


def _figures(found: Sorted) -> Iterator[str]:
    yield f"![Exact match over steps]({FOLDER}/exact-match.svg)\n"
    if any(run.masked_loss for runs in found.values() for run in runs.values()):
        yield f"![Masked loss over steps]({FOLDER}/masked-loss.svg)\n"
    if any(run.speeds for runs in found.values() for run in runs.values()):
        yield f"![Exact match against speed]({FOLDER}/speed.svg)\n"
    yield "Means over runs, which are not all from the same starts; after ± the standard deviation between them.\n"
    yield table(
        ["", "exact match", "edit similarity", "gradient noise", *(f"steps to {level:g}" for level in LEVELS)],
        [[f"({key})", *_row(list(runs.values()))] for key, runs in found.items()],
    )
    yield "Steps to a level of exact match, straight between evaluations; in brackets how many runs reach it, where not all do.\n"
    losses = {key: list(runs.values()) for key, runs in found.items() if any(run.masked_loss for run in runs.values())}
    if losses:
        yield table(
            ["", "masked loss at the end", *(f"steps to {level:g}" for level in LOSSES)],
            [
                [f"({key})", spread([run.masked_loss[-1][1] for run in runs]), *_steps(runs, LOSSES, masked, rising=False)]
                for key, runs in losses.items()
            ],
        )
    yield from _decoding(found)


def _row(runs: Sequence[Result]) -> Iterator[str]:
    yield spread([run.own.match for run in runs])
    yield spread([run.own.similarity for run in runs])
    yield spread([run.gradient_noise for run in runs])
    yield from _steps(runs, LEVELS, exact, rising=True)


def _steps(runs: Sequence[Result], levels: Sequence[float], curve: Callable[[Result], Curve], rising: bool) -> Iterator[str]:
    """Gives the mean steps to each level; where a run does not get there, how many do. Nothing of runs without a curve."""
    for level in levels:
        if not any(map(curve, runs)):
            yield NONE
            continue
        reached = [value for run in runs if (value := steps_to(curve(run), level, rising)) is not None]
        if len(reached) == len(runs):
            yield f"{statistics.fmean(reached):.0f}"
        else:
            yield f"> {runs[0].steps} ({len(reached)} of {len(runs)})"


def _decoding(found: Sorted) -> Iterator[str]:
    """Gives exact match, tokens per forward and speed under every way to decode."""
    yield "Exact match on the test questions at 4, 2 and 1 forwards a block, and its part of the AR twin's speed:\n"
    names = list(dict.fromkeys(name for runs in found.values() for run in runs.values() for name in run.ways))
    ordered = [*STEPS, *(name for name in names if name not in STEPS)]
    rows = []
    for key, runs in found.items():
        for name in ordered:
            of_way = [run for run in runs.values() if name in run.ways]
            if not of_way:
                continue
            ratios = [run.speeds[name] / run.speeds[TWIN] for run in of_way if name in run.speeds]
            exact = spread([run.ways[name].match for run in of_way])
            forwards = spread([run.ways[name].tokens_per_forward for run in of_way])
            rows.append([f"({key})", name, exact, forwards, spread(ratios) if ratios else NONE])
    yield table(["", "way", "exact match", "tokens/forward, batches of 8", "speed / AR twin"], rows)


def spread(values: Sequence[float]) -> str:
    """Writes a mean, and the standard deviation where there are several values."""
    mean = number(statistics.fmean(values), 3)
    return mean if len(values) < 2 else f"{mean} ± {number(statistics.stdev(values), 2)}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Writes a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
