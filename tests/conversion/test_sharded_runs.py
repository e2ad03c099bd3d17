"""The command on two processes with parts of a model: one of them is killed, and the run goes on, on two or on one."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from forks import Forks
from helpers import metrics, weights_of
from processes import Ended, on_processes
from tiny_runs import short_records, stage, tree, write_recipe

LOST = "error: another process of this run has ended, so it cannot go on; that process, or the launcher, says why."
ALONE = ("--set", "stages.diffuse.sharding=auto")
# As many rows a step in one process as in two.
AS_MANY = (*ALONE, "--set", "stages.diffuse.accumulation=4")


@dataclass(frozen=True)
class Place:
    """Runs with the same words in one folder, each under a name."""

    forks: Forks
    folder: Path
    words: list[str]

    def run(self, name: str, *more: str, processes: int = 2) -> list[Ended]:
        words = [*self.words, "--out", self.folder / name, *more]
        return on_processes(self.forks, self.folder, "diffvl", words, processes)

    def finish(self, name: str, *more: str, processes: int = 2) -> Path:
        ended = self.run(name, *more, processes=processes)
        assert [one.code for one in ended] == [0] * processes, "\n".join(one.err for one in ended)
        return self.folder / name / "diffuse"

    def kill(self, name: str, moment: str, rank: int) -> list[Ended]:
        words = [moment, rank, *self.words, "--out", self.folder / name]
        return on_processes(self.forks, self.folder, "killed", words)

    def checkpoints(self, name: str) -> list[str]:
        """Those with a name; a killed save may leave another."""
        return sorted(path.name for path in (self.folder / name / "diffuse.partial" / "checkpoints").glob("checkpoint-*"))


@pytest.fixture(scope="module")
def place(forks: Forks, prepared: Callable[[str], Path], tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("sharded")
    settings = {"steps": 6, "save_every": 2, "log_every": 1, "eval_every": 3, "eval_limit": 3, "batch_size": 1, "accumulation": 2}
    section = stage("diffuse", short_records(folder, 10, "train.json"), **settings, sharding="full", data={"holdout": 3})
    recipe = write_recipe(folder / "recipe.yaml", tower, diffuse=section)
    return Place(forks, folder, ["convert", "--from", str(prepared("llama")), "--stage", "diffuse", "--recipe", str(recipe)])


@pytest.fixture(scope="module")
def whole(place: Place) -> Path:
    """The run that nothing happens to."""
    return place.finish("whole")


def require_same(ours: Path, theirs: Path) -> None:
    assert metrics(ours) == metrics(theirs)
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    assert sorted(path.name for path in ours.parent.iterdir()) == ["diffuse"]
    assert not [path for path in ours.rglob("*") if "partial" in path.name or path.name in ("checkpoints", "saving")]


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_the_run_goes_on(place: Place, whole: Path):
    """To the bit. What cannot go on says so and touches nothing."""
    survivor, dead = place.kill("killed", "step", rank=1)
    assert (survivor.code, dead.code) == (2, -signal.SIGKILL)
    assert survivor.err.startswith(LOST) and "Traceback" not in survivor.err and not dead.err
    assert place.checkpoints("killed") == ["checkpoint-2"]
    require_refused_without_a_part(place)
    require_same(place.finish("killed", "--resume"), whole)


@pytest.mark.slow
def test_what_two_processes_began_one_finishes(place: Place, whole: Path):
    """With as many rows a step, to 1e-6; with fewer it is refused."""
    place.kill("alone", "step", rank=1)
    (fewer,) = place.run("alone", "--resume", *ALONE, processes=1)
    assert fewer.code == 2 and "batch_size x accumulation x processes: began with 4, asked for 2" in fewer.err
    require_close(place.finish("alone", "--resume", *AS_MANY, processes=1), whole)


def require_refused_without_a_part(place: Place) -> None:
    """One message, from one process, where a file of the checkpoint is missing."""
    part = place.folder / "killed" / "diffuse.partial" / "checkpoints" / "checkpoint-2" / "__1_0.distcp"
    spare = part.read_bytes()
    part.unlink()
    before = tree(place.folder / "killed")
    first, second = place.run("killed", "--resume")
    assert (first.code, second.code, second.err) == (2, 2, "")
    assert f"{part}: damaged or cut short" in first.err and "and --resume goes on from the checkpoint before it" in first.err
    assert tree(place.folder / "killed") == before
    part.write_bytes(spare)


def require_close(ours: Path, theirs: Path) -> None:
    for kind in ("loss", "eval_masked_loss"):
        lines = [[line[kind] for line in metrics(run) if kind in line] for run in (ours, theirs)]
        assert lines[0] and lines[0] == pytest.approx(lines[1], rel=1e-6)
    mine, other = weights_of(ours), weights_of(theirs)
    assert mine.keys() == other.keys() and max(float((mine[key] - other[key]).abs().max()) for key in mine) < 1e-5


@pytest.mark.slow
def test_what_one_process_began_two_finish(place: Place, whole: Path):
    """With as many rows a step."""
    (dead,) = on_processes(
        place.forks, place.folder, "killed", ["step", 0, *place.words, "--out", place.folder / "one", *AS_MANY], number=1
    )
    assert dead.code == -signal.SIGKILL and place.checkpoints("one") == ["checkpoint-2"]
    require_close(place.finish("one", "--resume"), whole)


MOMENTS = ["checkpoint written", "checkpoint renamed", "last checkpoint renamed", "result written", "report", "finish"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_of_either_process_at_any_moment(moment: str, rank: int, place: Place, whole: Path):
    """What only the main process does ends the other while it waits; what the second one never does ends nobody."""
    name = f"{moment}-{rank}"
    ended = place.kill(name, moment, rank)
    if any(one.code == -signal.SIGKILL for one in ended):
        (survivor,) = (one for one in ended if one.code != -signal.SIGKILL)
        assert survivor.code == 2 and survivor.err.startswith(LOST) and "Traceback" not in survivor.err
        assert place.checkpoints(name) or (place.folder / name / "diffuse").exists()
        place.finish(name, "--resume")
    require_same(place.folder / name / "diffuse", whole)
