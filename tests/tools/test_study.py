"""The fidelity study: verdicts follow from their rule, the page from the results, and a study goes on where it was left."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tiny_runs
from helpers import QUIET

from diffvl.config.resolve import read_yaml, resolve
from diffvl.demo import standins
from diffvl.errors import DataError
from diffvl.hub.settings_diffvl import DecodeSettings
from tools.study import __main__ as program
from tools.study import pilot, runs, verdicts
from tools.study.page import study_page, with_picture, write_study_page
from tools.study.picture import Picture, read_picture, write_picture
from tools.study.results import (
    CALL,
    Decoded,
    Pilot,
    Result,
    by_variant,
    gradient_noise,
    mean_after_start,
    read_results,
    steps_to,
    write_pilot,
    write_result,
)
from tools.study.runs import Study
from tools.study.variants import NIGHT, QUICK, TWIN, VARIANTS, Variant, write_recipe
from tools.study.verdicts import CLAIMS, NOT_RUN, REFUTED, REPRODUCED, UNDECIDED, Claim, Figured, judge, judge_all, mean_interval

ROOT = Path(__file__).parents[2]
MACHINE = {"cores": 2, "threads": 2, "cpu": "a CPU", "torch": "2", "date": "2026-01-01"}


def result(variant: str, seed: int, match: float, speed: float = 1.0, noise: float = 0.1, **changes: Any) -> Result:
    """A run of which `match` of ten questions are right at its own way, and all but one of these in one step a block."""
    right = round(10 * match)
    own = Decoded([1] * right + [0] * (10 - right), match, 1.0)
    fast = Decoded([1] * (right - 1) + [0] * (11 - right), match, 4.0)
    ways = {"token by token": own} if variant == TWIN else {"4 steps a block": own, "1 step a block": fast}
    speeds = {} if variant == TWIN else {TWIN: 10.0, "4 steps a block": 10.0 * speed, "1 step a block": 40.0 * speed}
    masked = [] if variant == TWIN else [(0, 4.0), (10, 2.0), (20, 1.0)]
    curve = [(0, 0.0), (10, match / 2), (20, match)]
    settings = {"test": 10, "answers": 4}
    made = Result(variant, seed, 20, curve, masked, noise, ways, speeds, settings, MACHINE, 60.0)
    return replace(made, **changes)


# --- the rule --------------------------------------------------------------------------------------------------------------


def figures(*values: float) -> list[Figured]:
    return [Figured(value) for value in values]


def told(claim: Claim, runs: list[Result]) -> list[tuple[float, bool]]:
    return [(one.value, one.crossed) for one in verdicts.figures_of(claim, by_variant(runs))]


def test_a_verdict_needs_the_whole_interval_on_one_side_of_the_bound():
    claim = replace(CLAIMS[0], bound=0.5)
    assert judge(claim, figures(0.9, 0.91, 0.92)).answer == REPRODUCED
    assert judge(claim, figures(0.1, 0.11, 0.12)).answer == REFUTED
    assert judge(claim, figures(0.4, 0.9, 0.6)).answer == UNDECIDED
    assert judge(claim, figures(0.9)).answer == UNDECIDED
    assert judge(claim, []).answer == NOT_RUN
    assert judge(replace(claim, bound=0.0), figures(0.0, 0.0, 0.0)).answer == UNDECIDED, "no difference at all shows nothing"
    assert judge(claim, figures(0.9, 0.9)).answer == UNDECIDED, "one question more in both is no certainty"
    assert judge(claim, figures(0.0, 0.0, 0.0)).answer == REFUTED, "what no start reaches is"


def test_the_interval_is_students():
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == (2.0, pytest.approx(2 - 4.303 / 3**0.5), pytest.approx(2 + 4.303 / 3**0.5))
    assert mean_interval([1.0]) == (1.0, None, None)
    many = [0.0, 2.0] * 6  # 11 degrees of freedom
    assert mean_interval(many)[2] == pytest.approx(1 + 2.201 * (12 / 11) ** 0.5 / 12**0.5)


def test_figures_are_larger_where_a_claim_fits_better():
    twin, good, bad = result(TWIN, 0, 0.8), result("c", 0, 0.8, speed=2, noise=0.1), result("b", 0, 0.4, noise=0.2)
    assert verdicts.better(good, bad) == pytest.approx(0.4) and verdicts.better(bad, good) == pytest.approx(-0.4)
    assert verdicts.sooner(good, bad) == pytest.approx(0.3)
    assert verdicts.steadier(good, bad) == pytest.approx(0.693, abs=1e-3)
    assert verdicts.share(bad, twin) == pytest.approx(0.5) and verdicts.share(bad, result(TWIN, 0, 0.0)) is None
    # One step a block loses one answer of eight, which is more than a twentieth.
    assert verdicts.speedup(good, twin) == 2.0
    assert verdicts.speedup(bad, twin) == 0.0
    assert verdicts.speedup(replace(good, speeds={}), twin) is None
    assert verdicts.speculative_speedup(good, twin) is None


def test_only_seeds_that_both_have_are_compared():
    runs = [result("b", seed, 0.4) for seed in (0, 1)] + [result("c", seed, 0.4 + seed / 5) for seed in (1, 2)]
    (claim,) = [one for one in CLAIMS if (one.first, one.figure) == ("c", verdicts.better)]
    assert told(claim, runs) == [(pytest.approx(0.2), False)]


def test_runs_from_the_same_start_are_compared_where_there_are_two():
    """What another machine aligned is another start, though the seed is the same."""
    runs = [result("b", 0, 0.2), result("b", 0, 0.4, start="here"), result("c", 0, 0.7, start="here")]
    (claim,) = [one for one in CLAIMS if (one.first, one.figure) == ("c", verdicts.better)]
    assert told(claim, runs) == [(pytest.approx(0.3), False)]
    runs += [result("b", 1, 0.4), result("c", 1, 0.5, machine={**MACHINE, "cpu": "another"})]
    assert told(claim, runs) == [(pytest.approx(0.3), False), (pytest.approx(0.1), True)]
    page = study_page(runs, None)
    assert "| +0.300, +0.100\\* |" in page and "\\* of runs from two starts. No verdict hangs on them." in page
    crossed = [result("b", seed, 0.1, start="here") for seed in range(3)] + [
        result("c", seed, 0.9 - seed / 10) for seed in range(3)
    ]
    line = next(line for line in study_page(crossed, None).splitlines() if line.startswith("\\* of runs"))
    assert "By the other figures alone: asynchronous noise: " in line and "asynchronous noise: ends better, -, *not run*" in line


def test_what_curves_say():
    assert steps_to([(0, 0.0), (10, 0.5), (20, 1.0)], 0.75, rising=True) == 15
    assert steps_to([(0, 4.0), (10, 2.0)], 3.0, rising=False) == 5
    assert steps_to([(0, 4.0), (10, 2.0)], 1.0, rising=False) is None
    assert steps_to([(0, 0.6)], 0.5, rising=True) == 0
    assert mean_after_start([(0, 0.0), (10, 0.5), (20, 1.0)]) == 0.75
    assert gradient_noise([9, 9, 2, 2, 2, 2]) == 0
    assert gradient_noise([0, 0, 0, 0, 1, 3, 1, 3]) == pytest.approx(4 / 2 / 4)
    assert gradient_noise([float(norm) for norm in range(100, 140)]) < 1e-4, "a slow change is no noise"


# --- the page --------------------------------------------------------------------------------------------------------------


def study_of_three_seeds() -> list[Result]:
    runs = [result(TWIN, seed, 0.8) for seed in range(3)]
    runs += [result("b", seed, 0.4, noise=0.2 + seed / 100) for seed in range(3)]
    runs += [result("c", seed, 0.5 + seed / 10, noise=0.1) for seed in range(3)]
    return runs + [result("f", seed, 0.8, speed=2 + seed / 100) for seed in range(3)]


def test_the_page_is_made_of_the_results_alone(tmp_path: Path):
    for one in study_of_three_seeds():
        write_result(one, tmp_path / "results")
    page = write_study_page(tmp_path / "results", tmp_path / "docs")
    text = page.read_text(encoding="utf-8")
    assert read_results(tmp_path / "results") == sorted(study_of_three_seeds(), key=lambda one: (one.variant, one.seed))
    # What was copied beside the page makes the same page again.
    assert write_study_page(tmp_path / "docs" / "fidelity", tmp_path / "docs").read_text(encoding="utf-8") == text
    row = next(line for line in text.splitlines() if "asynchronous noise: trains more steadily" in line)
    assert row.startswith("| SDAR-VL |") and row.endswith("| *reproduced* |") and "+0.69, +0.74, +0.79" in row
    row = next(line for line in text.splitlines() if "asynchronous noise: ends better" in line)
    assert "+0.100, +0.200, +0.300" in row and row.endswith("| *undecided at this scale* |")
    row = next(line for line in text.splitlines() if "(f) decodes 1.8 times as fast" in line)
    assert row.endswith("| *reproduced* |")
    assert any("close to AR finetuning" in line and line.endswith("| *not run* |") for line in text.splitlines())
    goal = next(line for line in text.splitlines() if line.startswith("**The goal**"))
    assert "is (f): 1.000 [1.000, 1.000] of the twin's, *undecided at this scale*, and 2.01 [1.99, 2.03] times its " in goal
    assert goal.endswith("speed, *reproduced*.")
    assert "| (a) | AR twin: next-token finetuning | 0, 1, 2 |" in text
    for name in ("exact-match", "masked-loss", "speed"):
        root = ElementTree.fromstring((tmp_path / "docs" / "fidelity" / f"{name}.svg").read_text(encoding="utf-8"))
        assert f"(fidelity/{name}.svg)" in text and root.tag.endswith("svg")


def test_the_page_says_what_hangs_on_seeds_that_were_added(tmp_path: Path):
    """Who adds seeds until a claim is decided decides it too easily; so the page keeps what the planned ones alone say."""

    def page(results: list[Result]) -> str:
        return study_page(results, None)

    claim = "(f) decodes 1.8 times as fast as AR, at 0.95 of its exact match"
    planned = [
        one for seed, speed in enumerate((2.33, 2.22, 2.7)) for one in (result(TWIN, seed, 0.8), result("f", seed, 0.8, speed))
    ]
    added = [result(TWIN, 3, 0.8), result("f", 3, 0.8, 2.4)]
    assert "Added later" not in page(planned)
    told = next(line for line in page([*planned, *added]).splitlines() if "Added later" in line)
    assert told.startswith("Seeds 0, 1, 2 were planned. Added later, to narrow an interval: 3 of (a); 3 of (f). By the planned ")
    assert told.endswith(f"alone: {claim}, 2.42 [1.79, 3.04], *undecided at this scale*.")
    sure = [one for seed in range(4) for one in (result(TWIN, seed, 0.8), result("f", seed, 0.8, 2 + seed / 100))]
    assert "No verdict hangs on them." in page(sure)


def test_the_page_says_which_run_was_made_on_which_machine(tmp_path: Path):
    results = study_of_three_seeds()

    def page() -> str:
        for one in results:
            write_result(one, tmp_path / "results")
        return write_study_page(tmp_path / "results", tmp_path / "docs").read_text(encoding="utf-8")

    assert "On 2 cores of a CPU, 2 of them to a run, dtype not noted, torch 2, 2026-01-01." in page()
    results[-1] = replace(results[-1], machine={**MACHINE, "cpu": "another"})
    assert "From different starts" not in page()
    assert "b-2, c-0, c-1, c-2, f-0, f-1 on 2 cores of a CPU" in (text := page()) and "; f-2 on 2 cores of another, 2 of" in text
    results.append(replace(result("f", 2, 0.6), start="abcd"))
    assert "From different starts of one seed, exact match: (f) of seed 2 came to 0.600 and 0.800." in (text := page())
    assert "f-1, f-2 (abcd) on 2 cores of a CPU" in text and "; f-2 on 2 cores of another, 2 of" in text
    assert "| (f) | (d) with causal context, an AR loss and complementary masks | 0, 1, 2, 2 |" in text


def test_a_seed_that_another_machine_did_not_finish_begins_anew(tmp_path: Path):
    study = Study(tmp_path, tmp_path, tmp_path, QUICK, ("a", "b"), (0, 1, 2))
    for one in (*(result(key, 0, 0.8) for key in VARIANTS), result(TWIN, 1, 0.8), result("b", 1, 0.4), result(TWIN, 2, 0.8)):
        write_result(one, study.results)
    write_result(result("b", 2, 0.4, machine={**MACHINE, "cpu": "another"}), study.results)
    assert study.missing() == [("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    for seed in (1, 2):
        (study.root(seed) / "align").mkdir(parents=True)
        (study.root(seed) / "align" / "model.safetensors").write_text(f"weights of {seed}")
    write_result(result(TWIN, 1, 0.8, start=study.start(1)), study.results)
    assert len({study.start(seed) for seed in range(3)}) == 3 and not study.start(0)
    assert study.missing() == [("b", 1), ("a", 2), ("b", 2)]
    assert len(read_results(study.results)) == len(VARIANTS) + 5, "the older ones stay beside them"


def test_what_a_picture_costs_is_added_to_times_that_began_behind_it(tmp_path: Path):
    """Ten tokens a second with answers of 20 tokens, and a picture of 5: 2.5 seconds an answer; twice the speed makes it 1.5,
    where the bare ratio says 1.25."""
    picture = Picture(tokens=5.0, answer=20.0, machine={**MACHINE, "dtype": "torch.float32"})
    assert picture.included({TWIN: 10.0, "x": 20.0}) == pytest.approx({TWIN: 20 / 2.5, "x": 20 / 1.5})
    assert picture.included({}) == {}
    results = study_of_three_seeds()
    early, late = with_picture(results, picture), with_picture([replace(one, clock=CALL) for one in results], picture)
    assert [one.speeds for one in late] == [one.speeds for one in results] == [one.speeds for one in with_picture(results, None)]
    assert all(one.speeds[name] < speed for one, was in zip(early, results, strict=True) for name, speed in was.speeds.items())
    for one in results:
        write_result(one, tmp_path / "results")
    text = write_study_page(tmp_path / "results", tmp_path / "docs").read_text(encoding="utf-8")
    assert "what that takes was not measured" in text and "2.01 [1.99, 2.03] times its speed" in text
    write_picture(picture, tmp_path / "results")
    text = write_study_page(tmp_path / "results", tmp_path / "docs").read_text(encoding="utf-8")
    assert "as long as 5.00 tokens of the AR twin, of 20.0 in an answer" in text and "and 1.67 [1.6" in text
    assert read_picture(tmp_path / "docs" / "fidelity") == picture


def test_verdicts_turn_with_the_figures():
    worse = [replace(one, gradient_noise=0.9 + one.seed / 50) if one.variant == "c" else one for one in study_of_three_seeds()]
    answers = {(one.claim.text): one.answer for one in judge_all(by_variant(worse))}
    assert answers["asynchronous noise: trains more steadily"] == REFUTED


def test_results_of_two_studies_are_not_mixed(tmp_path: Path):
    write_result(result("b", 0, 0.4), tmp_path)
    write_result(result("c", 0, 0.4, settings={"test": 10, "answers": 5}), tmp_path)
    with pytest.raises(DataError, match=r"c-0\.json was made with other settings than b-0\.json \(answers\)"):
        read_results(tmp_path)


def test_without_results_the_page_says_what_a_night_costs(tmp_path: Path):
    measured = Pilot("f", align_step=2.0, step=8.0, answer=1.0, ways=8, machine={**MACHINE, "steps": 3})
    write_pilot(measured, tmp_path)
    runs = [("a", 0), ("b", 0), ("a", 1)]
    one = pilot.run_seconds(measured, NIGHT)
    assert one == (NIGHT.steps * 8 + 6 * NIGHT.answers + 8 * NIGHT.test + 2.5 * 9 * NIGHT.timed * NIGHT.rounds) / 2
    assert pilot.night_seconds(measured, NIGHT, runs) == 3 * one + 2 * NIGHT.align_steps * 2.0 / 2
    text = write_study_page(tmp_path, tmp_path / "docs").read_text(encoding="utf-8")
    hours = pilot.night_seconds(measured, NIGHT, [(key, seed) for seed in range(3) for key in "abcdefg"]) / 3600
    assert f"about {hours:.1f} h" in text and "No run is made yet" in text


def test_the_page_in_docs_is_that_of_the_results_beside_it():
    """A file that was edited by hand, or results that were added without it, are seen here."""
    folder = ROOT / "docs" / "fidelity"
    written = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    picture = read_picture(folder)
    results = with_picture(read_results(folder), picture)
    assert written == study_page(results, program.read_pilot(folder), picture), "run make study, or its --no-runs"


# --- variants --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [key for key in VARIANTS if VARIANTS[key].recipe is None])
def test_every_variant_is_a_recipe_and_differs_by_its_objective_alone(key: str, tmp_path: Path):
    file = write_recipe(VARIANTS[key], NIGHT, tmp_path, tmp_path / "tower", ["seed=3"], tmp_path / "r.yaml")
    recipe = resolve(read_yaml(file), [], "test")
    twin = write_recipe(VARIANTS[TWIN], NIGHT, tmp_path, tmp_path / "tower", ["seed=3"], tmp_path / "a.yaml")
    other = resolve(read_yaml(twin), [], "test")
    assert recipe.seed == 3 and recipe.stages["align"] == other.stages["align"]
    ours, theirs = (one.stages["diffuse"].model_dump() for one in (recipe, other))
    differing = {name for name in ours if ours[name] != theirs[name]}
    assert differing <= {"objective", "trainable"} and (differing or key == TWIN)
    assert recipe.stages["diffuse"].steps == NIGHT.steps and recipe.stages["diffuse"].eval_answers == NIGHT.answers


def test_a_variant_of_a_recipe_waits_for_it_and_takes_its_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    missing = Variant("h", "another", recipe="no-such")
    assert missing.skipped() == "there is no recipe `no-such` in recipes/"
    assert Variant("h", "another", recipe="lora").skipped() is None
    file = write_recipe(Variant("h", "another", recipe="lora"), NIGHT, tmp_path, tmp_path, [], tmp_path / "r.yaml")
    stage = resolve(read_yaml(file), [], "test").stages["diffuse"]
    assert stage.objective.kind == "block_diffusion" and stage.steps == NIGHT.steps
    assert (stage.batch_size, stage.accumulation, stage.precision) == (8, 1, "auto")  # as the others
    monkeypatch.setitem(VARIANTS, "h", missing)
    study = Study(tmp_path, tmp_path, tmp_path, QUICK, ("h",), (0,))
    assert study.missing() == []


# --- the program -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "a,z"], "no variant z; there are a, b, c"),
        (["--seeds", "0,x"], "expected whole numbers"),
        (
            ["--picture", "--only", "a"],
            "--only has no effect with --picture: it is the twin that is measured. Leave one of them out",
        ),
        (["--picture", "--no-runs"], "--picture measures something: it goes with neither --pilot nor --no-runs"),
        (["--models", "none"], "none/smollm2-135m-instruct is not there"),
    ],
)
def test_mistakes_are_one_message(words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        program.main(["--out", str(tmp_path / "out"), *words])
    assert stop.value.code == 2 and says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_study_runs_to_its_page_and_goes_on_where_it_was_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """On tiny stand-ins: the twin, and beside it (f), which has every way to decode."""
    monkeypatch.setattr("diffvl.conversion.run.SAMPLE_SETTINGS", DecodeSettings(max_new_tokens=4))
    words = ["--quick", "--out", str(tmp_path), "--seeds", "1"]
    program.main([*words, "--only", "a"])
    (first,) = (tmp_path / "results").glob("a-1-*.json")
    made_at = first.stat().st_mtime_ns
    program.main([*words, "--only", "f,a"])
    told = capsys.readouterr().err
    assert "1 runs to make, 1 made; by those about" in told
    assert first.stat().st_mtime_ns == made_at
    twin, ours = read_results(tmp_path / "results")
    assert [step for step, _ in ours.exact_match] == [0, 2, 4] == [step for step, _ in ours.masked_loss]
    assert not twin.masked_loss and not twin.speeds and twin.gradient_noise > 0
    assert ours.ways.keys() | {TWIN} == ours.speeds.keys() and "speculative" in ours.ways and min(ours.speeds.values()) > 0
    assert len(ours.own.exact) == QUICK.test and ours.seconds > 0 and ours.settings == twin.settings
    assert asdict(ours) == json.loads((tmp_path / "results" / f"f-1-{ours.start}.json").read_text(encoding="utf-8")) | {
        name: [tuple(point) for point in getattr(ours, name)] for name in ("exact_match", "masked_loss")
    }
    # The weights of what was measured are gone, but for its adapters, and the twin's.
    kept = {key: list((tmp_path / "runs" / f"{key}-1" / "diffuse").glob("*.safetensors")) for key in ("a", "f")}
    assert kept["a"] and not kept["f"]
    text = (tmp_path / "fidelity.md").read_text(encoding="utf-8")
    assert "These figures mean nothing" in text and "| (f) | speculative |" in text
    made = tiny_runs.tree(tmp_path)
    program.main([*words, "--only", "a,f"])
    assert tiny_runs.tree(tmp_path).keys() == made.keys() and "0 runs to make" in capsys.readouterr().err
    (of_f,) = (tmp_path / "results").glob("f-1-*.json")
    of_f.unlink()  # asked for once more, its weights gone
    program.main([*words, "--only", "a,f"])
    assert "1 runs to make" in capsys.readouterr().err and [one.variant for one in read_results(tmp_path / "results")] == [
        "a",
        "f",
    ]
    program.main([*words, "--picture"])
    picture = read_picture(tmp_path / "fidelity")
    assert picture is not None and picture.tokens > 0 and 0 < picture.answer <= QUICK.new_tokens
    # Another study into the same folder, or onto the same page.
    steps = ["--set", "stages.diffuse.steps=3"]
    for more in (
        steps,
        ["--out", str(tmp_path / "other"), "--page", str(tmp_path), *steps],
    ):
        before = tiny_runs.tree(tmp_path / "results"), (tmp_path / "fidelity.md").read_bytes()
        with pytest.raises(SystemExit) as stop:
            program.main([*words, *more])
        assert stop.value.code == 2 and "was made with other settings (assignments)" in capsys.readouterr().err
        assert before == (tiny_runs.tree(tmp_path / "results"), (tmp_path / "fidelity.md").read_bytes())


def test_a_run_without_its_twin_says_that_it_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def measured(study: Study, variant: Variant, seed: int, _: object) -> Result:
        return result(variant.key, seed, 0.8, speeds={}, settings=study.settings)

    monkeypatch.setattr(runs, "measure", measured)
    program.main(["--quick", "--out", str(tmp_path), "--seeds", "1,1", "--only", "f"])
    told = capsys.readouterr().err
    assert "1 runs to make" in told and "warning: (f) of seed 1 will not be timed: its AR twin is not here; run (a) first" in told
    program.main(["--quick", "--out", str(tmp_path), "--seeds", "2", "--only", "a,f"])
    assert "warning" not in capsys.readouterr().err


def test_a_pilot_can_be_taken_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("diffvl.conversion.run.SAMPLE_SETTINGS", DecodeSettings(max_new_tokens=4))
    standins.make_trunk(tmp_path / "trunk", "llama")
    standins.make_tower(tmp_path / "tower", "siglip")
    size = replace(QUICK, steps=2, align_steps=2, eval_every=2)
    study = Study(tmp_path / "pilot", tmp_path / "trunk", tmp_path / "tower", size, tuple(VARIANTS), (0,))
    for _ in range(2):
        taken = pilot.run_pilot(study, QUIET)
        assert taken.align_step > 0 and taken.step > 0 and taken.answer > 0


@pytest.mark.slow
def test_the_lossless_variant_drafts_for_the_twin_and_answers_as_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("diffvl.conversion.run.SAMPLE_SETTINGS", DecodeSettings(max_new_tokens=4))
    words = ["--quick", "--out", str(tmp_path), "--seeds", "1"]
    with pytest.raises(SystemExit):
        program.main([*words, "--only", "h"])  # there is no twin yet
    assert not list((tmp_path / "results").glob("h-1*.json"))
    program.main([*words, "--only", "a"])
    # On another machine: the results beside the page, and no weights.
    (tmp_path / "page").mkdir()
    (tmp_path / "results").rename(tmp_path / "page" / "fidelity")
    shutil.rmtree(tmp_path / "runs")
    program.main([*words, "--only", "h,a", "--page", str(tmp_path / "page")])
    twin, ours = read_results(tmp_path / "results")
    assert TWIN in ours.speeds
    assert (twin.variant, ours.variant) == ("a", "h") and ours.ways.keys() == {"speculative", "token by token"}
    assert all(way.exact == twin.own.exact and way.similarity == twin.own.similarity for way in ours.ways.values())
    assert ours.ways["speculative"].tokens_per_forward >= ours.ways["token by token"].tokens_per_forward
