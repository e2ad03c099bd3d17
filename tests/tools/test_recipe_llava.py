"""`make recipe-llava`: which commands it runs, in which order, when it asks, and how it ends."""

import argparse
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from helpers import metrics

from diffvl.config.resolve import find_recipe, read_yaml, resolve
from diffvl.store.checkpoint import recipe_of
from tools import llava_data, recipe_llava
from tools.recipe_llava import Choice, Failed, chosen, control_words, convert_words, dealt, follow, launcher, parser

ROOT = Path(__file__).parents[2]


def given(*words: str) -> argparse.Namespace:
    return parser().parse_args(words)


def choice(*words: str) -> Choice:
    return chosen(given(*words))


def set_by(words: list[str]) -> list[str]:
    return [word for flag, word in zip(words, words[1:], strict=False) if flag == "--set"]


# --- words -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "llava-parity", "lora", "dllm"])
@pytest.mark.parametrize("processes", [1, 2, 8, 32, 64])
def test_a_step_has_the_published_number_of_samples_on_any_number_of_processes(name: str, processes: int):
    """And the recipe resolves with these settings."""
    words = convert_words(choice("--recipe", name, "--gpus", str(processes), "--data", "d"))
    recipe = resolve(read_yaml(find_recipe(name)), set_by(words), name)
    rows = {stage: one.batch_size * one.accumulation * processes for stage, one in recipe.stages.items()}
    assert rows == {"align": 128, "diffuse": 256}
    before = resolve(read_yaml(find_recipe(name)), [], name)
    assert all(one.batch_size <= before.stages[stage].batch_size for stage, one in recipe.stages.items())


def test_on_eight_gpus_the_recipe_needs_no_change_but_its_data():
    assert [text.partition("=")[0] for text in set_by(convert_words(choice("--gpus", "8")))] == [
        "stages.align.data.train",
        "stages.diffuse.data.train",
    ]
    assert [dealt(name, stage, 1) for name, stage in resolve(read_yaml(find_recipe("lora")), [], "lora").stages.items()] == [
        {},
        {},
    ]


def test_the_control_is_the_same_stage_from_the_same_start_with_next_token_loss():
    """On the same samples in as many steps: all else that is set is what the run sets."""
    ours, theirs = convert_words(choice("--gpus", "2")), control_words(choice("--gpus", "2"))
    assert theirs[:6] == ["convert", "--from", "runs/qwen2.5-7b-llava/align", "--stage", "diffuse", "--recipe"]
    assert theirs[theirs.index("--out") + 1] == "runs/qwen2.5-7b-llava-ar"
    more = [text for text in set_by(theirs) if text not in set_by(ours)]
    assert [text.partition("=")[0] for text in more] == ["stages.diffuse.objective", "stages.diffuse.trainable"]
    tree = read_yaml(find_recipe("llava"))
    one, other = (resolve(tree, set_by(words), "llava").stages["diffuse"] for words in (ours, theirs))
    rates = {part: rate for part, rate in one.trainable.items() if part != "mask_row"}
    assert other.objective.kind == "ar"
    assert other == one.model_copy(update={"objective": other.objective, "trainable": rates})


def test_a_run_is_named_by_its_model_and_its_recipe():
    assert choice("--model", "/models/own/", "--recipe", str(find_recipe("lora"))).out == Path("runs/own-lora")
    assert choice("--scale", "smoke", "--recipe", str(find_recipe("lora"))).out == Path("runs/smoke/lora")
    assert choice("--out", "o").out == Path("o")


def test_several_processes_are_launched_by_accelerate():
    files = [str(ROOT / "recipes" / "accelerate" / f"gpus-{count}.yaml") for count in (2, 8)]
    tail = ["-m", "diffvl.cli"]
    assert launcher(choice("--gpus", "1"))[1:] == tail
    assert [launcher(choice("--gpus", count))[3:] for count in ("2", "8")] == [["--config_file", file, *tail] for file in files]
    assert launcher(choice("--gpus", "4"))[3:] == ["--multi_gpu", "--num_processes", "4", *tail]
    more = ["--machine_rank", "3"]
    assert launcher(choice("--gpus", "2", "--launch", " ".join(more)))[3:] == ["--config_file", files[0], *more, *tail]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--for", "8 GPUs", "--dry-run"], "FOR=8 GPUs: expected GPUS x MEMORY, as in FOR=8x80GB"),
        (["--for", "0x80GB", "--dry-run"], "FOR=0x80GB: expected GPUS x MEMORY"),
        (["--for", "8x80GB"], "FOR has an effect on a plan alone: add DRY_RUN=1"),
        (["--for", "8x80GB", "--gpus", "8", "--dry-run"], "FOR says how many GPUS there are: leave one of them out"),
        (["--gpus", "3", "--dry-run"], "GPUS=3: a step of align has 128 samples, which 3 processes cannot share evenly"),
        (["--gpus", "0", "--dry-run"], "GPUS=0: expected 1 or more"),
        (
            ["--recipe", "sdar-vl", "--dry-run"],
            "RECIPE=sdar-vl: has the stages align, image, vision, web, mix, think, and this run",
        ),
        (["--recipe", "vlm", "--dry-run"], "RECIPE=vlm: has the stages diffuse, and this run trains align and diffuse"),
        (["--recipe", "lava", "--dry-run"], "--recipe 'lava': neither a file nor a known recipe"),
        (["--scale", "smoke", "--yes", "--data", "d"], "DATA has no effect with SCALE=smoke, which makes stand-ins"),
        (["--scale", "smoke", "--yes", "--model", "m"], "MODEL has no effect with SCALE=smoke, which makes stand-ins"),
        ([], "no terminal is there to ask on: say YES=1 to train without a question, or DRY_RUN=1 for the plan alone"),
    ],
)
def test_words_that_do_not_fit_end_in_one_message(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Before anything is fetched or written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["recipe_llava", *words])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(SystemExit) as stop:
        recipe_llava.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "") and err.startswith("error: ") and says in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ((), "--scale full"),
        (("SCALE=smoke", "YES=1", "CONTROL=0"), "--scale smoke --yes"),
        (
            ("DRY_RUN=1", "FOR=8x80GB", "RECIPE=lora", "MODEL=my model"),
            "--scale full --recipe lora --model 'my model' --for 8x80GB --dry-run",
        ),
        (
            ("CONTROL=1", "GPUS=2", "DATA=d", "OUT=o", "LAUNCH=--machine_rank 1"),
            "--scale full --data d --out o --gpus 2 --launch '--machine_rank 1' --control",
        ),
    ],
)
def test_make_hands_on_what_is_set(variables: tuple[str, ...], words: str):
    environment = {"PATH": os.environ["PATH"]}
    words_of_make = ["make", "-n", "recipe-llava", *variables]
    done = subprocess.run(words_of_make, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    line = done.stdout.strip().splitlines()[-1]
    assert shlex.split(line)[1:] == ["-m", "tools.recipe_llava", *shlex.split(words)]


# --- order -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What is run and fetched, in its order; nothing is."""
    steps: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(llava_data, "fetch", lambda hub_set, folder: steps.append(hub_set.name))
    monkeypatch.setattr(llava_data, "instructions", lambda folder: ({"path": "d"}, Path("held-out")))

    def run(program: list[str], words: list[str], quiet: bool = False, offline: bool = False) -> str:
        flags = [flag for flag, given in (("--dry-run", "--dry-run" in words), ("offline", offline)) if given]
        steps.append(" ".join([*words[:3], *flags]))
        return '{"exact_match": 0.5, "edit_similarity": 0.75, "answers": 4}'

    monkeypatch.setattr(recipe_llava, "run", run)
    return steps


FETCHED = ["LLaVA-Pretrain", "LLaVA-NeXT-Data"]
PLAN, TRAIN = "convert qwen2.5-7b --recipe --dry-run", "convert qwen2.5-7b --recipe"


def test_data_plan_training_figures_and_the_control(ran: list[Any], capsys: pytest.CaptureFixture[str]):
    words = given("--yes", "--control", "--gpus", "1")
    follow(chosen(words), words)
    out = "runs/qwen2.5-7b-llava"
    control = [f"convert --from {out}/align", f"evaluate {out}-ar/diffuse --data"]
    assert ran == [*FETCHED, PLAN, TRAIN, f"evaluate {out}/diffuse --data", *control]
    shown = capsys.readouterr().out
    assert re.search(r"block diffusion.*0\.5000.*0\.7500.*4", shown) and re.search(r"AR control.*0\.5000", shown)


def test_a_dry_run_fetches_nothing(ran: list[Any]):
    words = given("--dry-run", "--for", "8x80GB")
    follow(chosen(words), words)
    assert ran == [f"{PLAN} offline"]


@pytest.mark.parametrize(("answer", "trains"), [("y", True), ("Yes ", True), ("", False), ("no", False), (None, False)])
def test_it_asks(answer: str | None, trains: bool, ran: list[Any], monkeypatch: pytest.MonkeyPatch):
    """And takes the end of input (None) for a no."""

    def say(question: str) -> str:
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", say)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    words = given("--gpus", "1")
    follow(chosen(words), words)
    assert ran[:3] == [*FETCHED, PLAN] and (TRAIN in ran) == trains


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The commands are run, in this process; gives what they print on stderr."""
    told: list[str] = []

    def run(program: list[str], words: list[str], quiet: bool = False, offline: bool = False) -> str:
        assert program == [sys.executable, "-m", "diffvl.cli"]
        ended = tiny_runs.command(*words)
        told.append(ended.err)
        if ended.code:
            raise Failed(ended.code)
        return ended.out

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe_llava, "run", run)
    return told


def test_a_model_that_does_not_exist(in_process: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The plan says so, in one message, and its code is handed on."""
    monkeypatch.setattr(sys, "argv", ["recipe_llava", "--dry-run", "--gpus", "1", "--model", "no-such-model"])
    with pytest.raises(SystemExit) as stop:
        recipe_llava.main()
    (told,) = in_process
    assert stop.value.code == 2 and told.startswith("error: 'no-such-model': no such model name or directory")
    assert told.count("\n") == 1 and not list(tmp_path.iterdir())


def test_the_whole_on_stand_ins(
    in_process: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    """Plan, both stages and the figures: the commands with the words that they are given. What the plan takes is left out."""
    monkeypatch.setattr("diffvl.conversion.run.tell_outlook", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["recipe_llava", "--scale", "smoke", "--yes"])
    recipe_llava.main()
    out = tmp_path / "runs" / "smoke" / "llava"
    assert sorted(path.name for path in out.iterdir()) == ["align", "diffuse", "prepared"]
    assert [line["step"] for line in metrics(out / "diffuse")] == [1, 2]
    assert re.search(r"block diffusion.*0\.\d{4}.*0\.\d{4}.*2", capsys.readouterr().out) and len(in_process) == 3


def test_a_folder_that_somebody_named_is_not_emptied(in_process: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A smoke run begins its own folder anew, and no other."""
    monkeypatch.setattr(recipe_llava, "provide", lambda choice: None)
    monkeypatch.setattr(recipe_llava, "run", lambda *_, **__: "")
    monkeypatch.setattr(recipe_llava, "evaluated", lambda *_: dict.fromkeys(recipe_llava.FIGURES, 0))
    for out in ("mine", "runs/smoke/llava"):
        (tmp_path / out).mkdir(parents=True)
        words = given("--scale", "smoke", "--yes", "--out", out)
        follow(chosen(words), words)
        assert (tmp_path / out).exists() == (out == "mine")


@pytest.mark.slow
def test_make_on_stand_ins_in_two_processes_with_its_control(tmp_path: Path):
    """As typed; a model in parts over two processes that meet over gloo."""
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    words = ["--scale", "smoke", "--yes", "--control", "--gpus", "2"]
    program = [sys.executable, "-m", "tools.recipe_llava", *words]
    done = subprocess.run(
        program, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("$ accelerate launch --config_file ") == 2
    for name in ("llava", "llava-ar"):
        assert recipe_of(tmp_path / "runs" / "smoke" / name / "diffuse").stages["diffuse"].sharding == "full"
    assert re.search(r"block diffusion.*0\.\d{4}.*\n.*AR control.*0\.\d{4}", done.stdout)
