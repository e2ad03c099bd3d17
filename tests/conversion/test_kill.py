"""Kill -9 at any moment, or a loss that is not finite, then `--resume`: the result is that of the uninterrupted run, to the bit,
and nothing is left over."""

import itertools
import json
import math
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import killed_process
import pytest
import torch
from forks import Forks
from helpers import metrics
from killed_process import Killer, Moment, Story
from tiny_runs import refused, short_records, stage, succeed, tree, write_recipe

from diffvl.train import loop

# Six steps, a checkpoint every two. A log line in between, so that an average would reach over a checkpoint; a curriculum, and
# adapters with dropout, whose random state must come back too.
SETTINGS: dict[str, Any] = {
    "steps": 6,
    "save_every": 2,
    "log_every": 1,
    "eval_every": 2,
    "eval_limit": 2,
    "optim": {"warmup_ratio": 0.5},
    "data": {"holdout": 2},
}
NOISE = {"schedule": "beta", "mean_start": 0.2, "mean_end": 0.8, "concentration_start": 4, "concentration_end": 25}
LORA = {"rank": 4, "alpha": 8, "dropout": 0.2}
# The checkpoints there when it is killed, where not the last two: older ones go when a newer one has its name.
KEPT = {"step": (2,), "checkpoint written": (2,), "checkpoint renamed": (2,), "last checkpoint renamed": (2, 4, 6)}
CASES = [*(("plain", moment) for moment in killed_process.MOMENTS), ("lora", "step")]


@pytest.fixture(scope="module")
def killer(forks: Forks) -> Killer:
    return Killer(forks)


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def require_same_run(ours: Path, theirs: Path) -> None:
    """Two finished diffuse runs without a difference, and nothing beside them."""
    assert listing(ours.parent) == listing(theirs.parent)
    assert metrics(ours) == metrics(theirs)
    for file in ("model.safetensors", "config.json", "tokenizer.json", "samples.jsonl", "run.yaml"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file
    assert json.loads((ours / "diffvl.json").read_text())["state"] == json.loads((theirs / "diffvl.json").read_text())["state"]


# --- chosen moments --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """folder/RECIPE is the uninterrupted run; folder/RECIPE-MOMENT were killed. signals: what ended each of these."""

    folder: Path
    signals: dict[str, int]
    words: Callable[[str, str], list[str]]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    killer: Killer,
    prepared: Callable[[str], Path],
    tower: Path,
) -> Runs:
    folder = tmp_path_factory.mktemp("killed")
    objective = {"kind": "block_diffusion", "block_size": 4, "noise": NOISE}
    plain = stage("diffuse", short_records(folder, 10, "train.json"), objective=objective, **SETTINGS)
    write_recipe(folder / "plain.yaml", tower, diffuse=plain)
    write_recipe(folder / "lora.yaml", tower, diffuse={**plain, "log_every": 5, "lora": LORA})

    def words(recipe: str, name: str) -> list[str]:
        start = ["convert", "--from", str(prepared("llama")), "--stage", "diffuse"]
        return [*start, "--recipe", str(folder / f"{recipe}.yaml"), "--out", str(folder / name)]

    for recipe in ("plain", "lora"):
        succeed(*words(recipe, recipe))
    names = {(recipe, moment): f"{recipe}-{moment}" for recipe, moment in CASES}
    signals = {
        name: killer.run(words(recipe, name), folder / name, {"place": moment}).signal for (recipe, moment), name in names.items()
    }
    return Runs(folder, signals, words)


@pytest.mark.parametrize(("recipe", "moment"), CASES)
def test_a_killed_run_goes_on_as_if_nothing_had_been(recipe: str, moment: str, runs: Runs):
    name = f"{recipe}-{moment}"
    whole, killed = runs.folder / recipe / "diffuse", runs.folder / name / "diffuse"
    assert runs.signals[name] == signal.SIGKILL
    # It was killed where it should be: only the last moment is past the one at which the output exists.
    assert killed.exists() == (moment == "finished")
    work = killed if killed.exists() else killed.with_name("diffuse.partial")
    kept = {path.name for path in (work / "checkpoints").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{step}" for step in KEPT.get(moment, (4, 6))}
    succeed(*runs.words(recipe, name), "--resume")
    require_same_run(killed, whole)


@pytest.mark.parametrize(("recipe", "steps"), [("plain", [1, 2, 3, 4, 5, 6]), ("lora", [2, 4, 5, 6])])
def test_what_the_uninterrupted_run_logs(recipe: str, steps: list[int], runs: Runs):
    """Every step once; where not every step is logged, every checkpoint and the last step."""
    lines = metrics(runs.folder / recipe / "diffuse")
    assert [line["step"] for line in lines if "loss" in line] == steps
    assert [line["step"] for line in lines if "eval_masked_loss" in line] == [0, 2, 4, 6]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(set(losses)) == len(losses)
    assert not [name for name in listing(runs.folder / recipe) if "partial" in name or "checkpoint" in name or "saving" in name]


# --- what is not finite ----------------------------------------------------------------------------------------------------


def spoil(step: int, how: Callable[[torch.Tensor], torch.Tensor], patch: pytest.MonkeyPatch) -> list[list[int]]:
    """Changes the loss after so many steps; returns the samples of all steps, as they come."""
    seen, loss_of = [], loop.loss_of

    def spoiled(*arguments: Any) -> Any:
        batch, draw = arguments[2], arguments[-1]
        seen.append(batch["sample"].tolist())
        output = loss_of(*arguments)
        return replace(output, loss=how(output.loss)) if draw.step == step else output

    patch.setattr(loop, "loss_of", spoiled)
    return seen


NOT_FINITE: dict[str, tuple[int, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "nan loss": (4, lambda loss: loss * math.nan, "step 5: the loss is nan on samples "),
    "infinite loss": (4, lambda loss: loss / 0, "step 5: the loss is inf on samples "),
    # A good loss with a bad gradient, in the step behind which a checkpoint is due: it must not get the weights that come of it.
    "nan gradient": (3, lambda loss: loss + (0 * loss).sqrt(), "step 4: the norm of the gradient is nan on samples "),
}


@pytest.mark.parametrize("fault", ["nan loss", pytest.param("infinite loss", marks=pytest.mark.slow), "nan gradient"])
def test_what_is_not_finite_stops_the_run_and_the_last_good_checkpoint_stays(
    fault: str, runs: Runs, monkeypatch: pytest.MonkeyPatch
):
    step, how, says = NOT_FINITE[fault]
    words, out = runs.words("plain", fault), runs.folder / fault
    with monkeypatch.context() as patch:
        seen = spoil(step, how, patch)
        message = refused(*words, says=[])
    # The records of that step, by index and by line: record i stands in line i + 2.
    samples = seen[step]
    lines = ", ".join(f"train.json:{index + 2}" for index in samples)
    assert len(seen) == step + 1 and len(samples) == 2
    assert message.startswith(f"{says}{samples} ({lines}); the last good checkpoint is kept, and --resume goes on from it. If it")
    work = out / "diffuse.partial"
    assert sorted(path.name for path in out.iterdir()) == ["diffuse.partial"]
    assert {path.name for path in (work / "checkpoints").iterdir()} == {f"checkpoint-{done}" for done in (2, 4) if done <= step}
    before = tree(out)
    lower = ("--set", "stages.diffuse.trainable.trunk=0.0001")
    refused(*words, "--resume", *lower, says=["other settings", "trainable.trunk: began with 0.001, asked for 0.0001"])
    assert tree(out) == before
    assert f"going on after step {step // 2 * 2}" in succeed(*words, "--resume").out
    require_same_run(out / "diffuse", runs.folder / "plain" / "diffuse")


# --- random moments --------------------------------------------------------------------------------------------------------

SAVE_EVERY = 2
# All that moves, or is drawn, at once: both curricula, complementary masks, packed rows, micro-steps, epochs of two steps.
EVERYTHING: dict[str, Any] = {
    "objective": {
        "kind": "block_diffusion",
        "block_size": 8,
        "block_curriculum": {0.0: 2, 0.3: 4, 0.7: 8},
        "complementary": True,
        "weight": "effective",
        "noise": {**NOISE, "draws": "stratified"},
    },
    "batch_size": 1,
    "accumulation": 2,
    "save_every": SAVE_EVERY,
    "eval_every": 3,
    "eval_limit": 2,
    "data": {"holdout": 2, "row_length": 128, "max_length": 128},
}


@dataclass
class Course:
    """One run from its beginning to its end through kills. told: what happened, for the reader of a failure."""

    killer: Killer
    words: list[str]
    whole: Path
    out: Path
    told: list[str] = field(default_factory=list)

    @property
    def work(self) -> Path:
        done = self.out / "diffuse"
        return done if done.exists() else done.with_name("diffuse.partial")

    def newest(self) -> int:
        """The step of the newest checkpoint with a name, 0 without one."""
        return max((int(path.name.split("-")[1]) for path in (self.work / "checkpoints").glob("checkpoint-*")), default=0)

    def go_on(self, moment: Moment | None) -> Story:
        """Begins or resumes the run, and checks what it did until it was killed or finished."""
        before = self.newest()
        resume = ["--resume"] if self.out.exists() else []
        story = self.killer.run([*self.words, "--out", str(self.out), *resume], self.out, moment)
        ended = "killed" if story.signal else "finished"
        last = story.last.replace(f"{self.out}/", "")
        what = f"steps {story.steps}, saved {story.saved}, {ended} {'saving, ' * story.saving}at {last}"
        self.told.append(f"{moment}: {what}, {story.seconds:.1f} s after training began")
        assert (story.signal, story.code) in ((signal.SIGKILL, 0), (0, 0)), self.killer.said()
        # It began where the newest checkpoint stands, and left no step out.
        assert story.steps == list(range(before, before + len(story.steps)))
        # What is lost now are the steps since the last save and no more. (A finished run has no checkpoints any more.)
        last_save = max(story.saved, default=before)
        if self.work.name.endswith(".partial"):
            assert self.newest() == last_save or (story.saving and 0 < self.newest() - last_save <= SAVE_EVERY)
            assert max(story.steps, default=0) - last_save <= SAVE_EVERY
        # What it logged is what the uninterrupted run logged until there.
        expected = metrics(self.whole)
        lines = metrics(self.work) if (self.work / "metrics.jsonl").exists() else []
        assert lines == expected[: len(lines)]
        assert len(lines) >= sum(line["step"] <= last_save for line in expected) or last_save == 0
        assert [path.name for path in self.out.iterdir()] == [self.work.name]
        return story


@dataclass
class RandomKills:
    """Moments drawn from a seed: after a random time, at a random file operation, or at one of a save; each kind once at least.
    Up to a third of the run away, so that a run is killed several times; of saves, in the next one."""

    seed: int
    whole: Story

    def moments(self) -> Iterator[Moment]:
        draw = random.Random(self.seed)
        kinds = ["time", "operation", "save"]
        for kind in itertools.chain(draw.sample(kinds, k=3), iter(lambda: draw.choice(kinds), None)):
            if kind == "time":
                yield {"seconds": draw.random() * self.whole.seconds / 3}
            elif kind == "operation":
                yield {"operation": draw.randint(1, self.whole.operations // 3), "part": draw.random()}
            else:
                yield {"operation": draw.randint(1, operations_of_a_save(self.whole)), "saving": True, "part": draw.random()}


def operations_of_a_save(whole: Story) -> int:
    """The first saves have nothing to remove and are shorter by some."""
    return math.ceil(whole.of_saves / len(whole.saved))


@dataclass(frozen=True)
class Courses:
    """Runs with the same words, and the uninterrupted one."""

    killer: Killer
    words: list[str]
    folder: Path
    whole: Story

    def through(self, moments: Iterable[Moment], name: str = "killed") -> list[Story]:
        """Kills one run at each of the moments, as far as it does not finish before. Returns what is known of each kill."""
        course = Course(self.killer, self.words, self.folder / "whole" / "diffuse", self.folder / name)
        killed: list[Story] = []
        try:
            for moment in itertools.chain(moments, [None]):
                story = course.go_on(moment)
                if not story.signal:
                    break
                killed.append(story)
        finally:
            print(f"{name}:", *course.told, sep="\n  ")
        require_same_run(course.out / "diffuse", course.whole)
        return killed

    def through_random(self, seed: int, kills: int) -> list[Story]:
        """Run after run, until there were so many kills."""
        print(f"seed {seed}")
        moments, done = RandomKills(seed, self.whole).moments(), []
        while len(done) < kills:
            done += self.through(itertools.islice(moments, kills - len(done)), f"from {len(done)}")
        return done


@pytest.fixture
def courses(killer: Killer, prepared: Callable[[str], Path], tower: Path, tmp_path: Path) -> Callable[..., Courses]:
    """Settings of the stage -> runs in which everything moves."""

    def make(**settings: Any) -> Courses:
        recipe = write_recipe(
            tmp_path / "recipe.yaml", tower, diffuse=stage("diffuse", short_records(tmp_path, 10), **EVERYTHING, **settings)
        )
        words = ["convert", "--from", str(prepared("llama")), "--stage", "diffuse", "--recipe", str(recipe)]
        whole = killer.run([*words, "--out", str(tmp_path / "whole")], tmp_path / "whole")
        assert (whole.signal, whole.code) == (0, 0), killer.said()
        return Courses(killer, words, tmp_path, whole)

    return make


@pytest.mark.slow
def test_kills_at_three_random_moments(courses: Callable[..., Courses]):
    killed = courses(steps=7).through_random(seed=12, kills=3)
    assert any(story.saving for story in killed)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"lora": LORA}], ids=["plain", "lora"])
def test_kills_at_ten_random_moments(settings: dict[str, Any], courses: Callable[..., Courses]):
    """KILL_SEED=N draws the moments of a failure again; its seed is in what the failure prints."""
    seed = int(os.environ.get("KILL_SEED") or random.SystemRandom().randrange(2**31))
    killed = courses(steps=25, **settings).through_random(seed, kills=10)
    assert len(killed) == 10 and any(story.saving for story in killed)


@pytest.mark.slow
def test_a_kill_at_every_file_operation_of_a_save(courses: Callable[..., Courses]):
    """Each in a run of its own, which goes on from a copy of one that has a checkpoint already: there is an old one to remove."""
    runs = courses(steps=5, keep_checkpoints=1)
    Course(runs.killer, runs.words, runs.folder / "whole" / "diffuse", runs.folder / "begun").go_on({"place": "step"})
    touched = []
    for number in itertools.count(1):
        shutil.copytree(runs.folder / "begun", runs.folder / str(number))
        (story,) = runs.through([{"operation": number, "saving": True, "part": 0.5}], str(number))
        if story.saved:  # the operations of that save are through, this was one of the next
            break
        touched.append(Path(story.last.split()[-1]).name)
    assert {"checkpoint-4", "state.json.partial", ".metadata", "checkpoint-2", "saving"} < set(touched)
    # Opened and written half in the new checkpoint, and removed from the old one.
    assert touched.count("__0_0.distcp") == 3
