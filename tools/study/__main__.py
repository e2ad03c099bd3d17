"""The fidelity study: the published methods against their AR twin, on the built-in scenes, with verdicts that are computed.

    python -m tools.study [--out runs/study] [--only a,b] [--seeds 0,1,2] [--set A.B=C] [--page FOLDER] [--keep]
    python -m tools.study --pilot       # a few steps, for what a night will cost
    python -m tools.study --quick       # tiny stand-ins, to see that it runs; the figures mean nothing

From the repository's folder, or `make study`. It takes a night on two cores (docs/fidelity.md), in one piece or in many: type it
again, and it goes on. Each run leaves a small JSON file in OUT/results; the page and its charts are made of these alone, in
FOLDER (default: OUT).
"""

import argparse
import shutil
import sys
from pathlib import Path

from rich.console import Console

from diffvl.demo import standins
from diffvl.errors import EXIT_CODE, DiffvlError, UsageError
from diffvl.terminal.bars import duration, quiet_libraries
from diffvl.terminal.console import complain, console, say, streams
from tools.study.page import FOLDER, write_study_page
from tools.study.picture import PICTURE_FILE, measure_picture, write_picture
from tools.study.pilot import night_seconds, run_pilot
from tools.study.results import read_pilot, read_results, require_settings, write_pilot
from tools.study.runs import Study, run_study
from tools.study.variants import NIGHT, PILOT, QUICK, VARIANTS

SEEDS = "0,1,2"


def main(arguments: list[str] | None = None) -> None:
    """Runs what is missing, and writes the page."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of everything that is made")
    parser.add_argument("--page", type=Path, help="folder of fidelity.md and fidelity/; goes on from its results; default: OUT")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder that tools/fetch_demo_models.py filled")
    parser.add_argument("--only", help="variants, with commas; default: all")
    parser.add_argument("--seeds", default=SEEDS, help="seeds, with commas")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="assignments", help="a setting of all runs")
    parser.add_argument("--keep", action="store_true", help="keep the weights of measured runs")
    parser.add_argument("--no-runs", action="store_true", help="only the page, of the results beside it in FOLDER")
    parser.add_argument("--picture", action="store_true", help="only measure what a picture costs beside the first seed's twin")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--pilot", action="store_true", help="a few steps of one variant, to know what a step costs")
    kind.add_argument("--quick", action="store_true", help="tiny stand-ins; the figures mean nothing")
    given = parser.parse_args(arguments)
    quiet_libraries()
    with streams():
        try:
            _main(given, console(stderr=True))
        except DiffvlError as error:
            complain(f"error: {error}")
            sys.exit(EXIT_CODE)


def _main(given: argparse.Namespace, out: Console) -> None:
    if given.picture and (given.pilot or given.no_runs):
        raise UsageError("--picture measures something: it goes with neither --pilot nor --no-runs")
    if given.picture and given.only is not None:
        raise UsageError("--only has no effect with --picture: it is the twin that is measured. Leave one of them out")
    study = study_of(given)
    if given.pilot:
        pilot = run_pilot(study, out)
        write_pilot(pilot, given.out / "results")
        say(out, f"the processor's seconds: {pilot.step:.1f} a step, {pilot.answer:.2f} an answer")
    elif not given.no_runs:
        require_settings(study.results, study.settings)
        _take_results(given.page, study)
        if given.picture:
            write_picture(measure_picture(study, out), study.results)
        else:
            _say_time(study, out)
            run_study(study, out)
    folder = given.out if given.pilot or given.page is None else given.page  # a pilot's page would hide what was measured
    results = folder / FOLDER if given.no_runs else given.out / "results"
    page = write_study_page(results, folder, quick=given.quick)
    say(out, "page: ", (str(page), "bold"))


def _take_results(page: Path | None, study: Study) -> None:
    """Takes over the results beside a page: a study goes on from them on another machine. Raises UsageError if they are another
    study's."""
    if page is None:
        return
    require_settings(page / FOLDER, study.settings)
    for file in [*sorted((page / FOLDER).glob("?-*.json")), *(page / FOLDER).glob(PICTURE_FILE)]:
        if not (study.results / file.name).exists():
            study.results.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, study.results)


def study_of(given: argparse.Namespace) -> Study:
    """Reads the arguments. Raises UsageError for variants, seeds or models that there are not."""
    variants = tuple(VARIANTS) if given.only is None else tuple(part.strip() for part in given.only.split(","))
    if unknown := [key for key in variants if key not in VARIANTS]:
        raise UsageError(f"--only {given.only}: no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    named = [part.strip() for part in given.seeds.split(",")]
    if not all(seed.isdecimal() for seed in named):
        raise UsageError(f"--seeds {given.seeds}: expected whole numbers with commas between them, as in {SEEDS}")
    seeds = tuple(dict.fromkeys(map(int, named)))
    size = QUICK if given.quick else PILOT if given.pilot else NIGHT
    if given.quick:
        model, tower = given.out / "models" / "trunk", given.out / "models" / "tower"
        if not given.no_runs and not tower.is_dir():
            standins.make_trunk(model, "llama")
            standins.make_tower(tower, "siglip")
    else:
        model, tower = given.models / "smollm2-135m-instruct", given.models / "dinov2-small"
        absent = [str(path) for path in (model, tower) if not path.is_dir()]
        if absent and not given.no_runs:
            raise UsageError(f"{absent[0]} is not there: type python tools/fetch_demo_models.py {given.models}")
    folder = given.out / "pilot" if given.pilot else given.out
    return Study(folder, model, tower, size, variants, seeds, tuple(given.assignments), given.keep)


def _say_time(study: Study, out: Console) -> None:
    """Says what the runs that are missing will take, as far as that is known before the first of them."""
    missing = study.missing()
    results, pilot = read_results(study.results), read_pilot(study.results)
    told = f"{len(missing)} runs to make, {len(results)} made"
    if results and missing:
        mean = sum(one.seconds for one in results) / len(results)
        told += f"; by those about {duration(mean * len(missing))}"
    elif pilot is not None and missing:
        told += f"; by the pilot about {duration(night_seconds(pilot, study.size, missing))}"
    elif missing:
        told += "; how long they take is told after the first"
    say(out, told)


if __name__ == "__main__":
    main()
