"""lmms-eval itself, by its own command line and by `diffvl evaluate --tasks`, on local tasks: its scores are those counted by
hand from the answers that the checkpoint gives in memory. `CLIENTS` names the folder with the environment `lmms-eval`, as
docs/benchmarks.md makes it.
"""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from block_checkpoints import block_checkpoint
from clients.test_clients import environment
from lmms_tasks import NEW, QUESTION, UNTIL, pictures, write_tasks

from diffvl.decode.answer import answer_chats, load_for_decoding
from diffvl.evaluation.benchmark_answers import Answering, Choice, Question
from diffvl.evaluation.benchmark_chats import chat_of_text
from diffvl.evaluation.task_settings import cut
from diffvl.hub.settings_diffvl import DecodeSettings
from diffvl.store.evaluation import read_results
from diffvl.terminal.console import console

pytestmark = [pytest.mark.client]

SOURCE = Path(__file__).parents[2] / "src"
SETTINGS = DecodeSettings(max_new_tokens=NEW, stop_strings=(UNTIL,))


@dataclass(frozen=True)
class Bench:
    """A checkpoint, a folder of tasks, and what comes out by hand: the answers of each task, and the scores."""

    directory: Path
    tasks: Path
    texts: dict[str, list[str]]
    scores: dict[str, float]


@pytest.fixture(scope="module")
def bench(prepared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("lmms-eval")
    decoder = load_for_decoding(block_checkpoint(prepared("llama"), folder / "llama"))
    images = pictures()
    one = [chat_of_text(QUESTION, [image], "one") for image in images]
    two = [_interleaved(*pair) for pair in zip(images, images[1:] + images[:1], strict=True)]
    texts = {
        name: [cut(answer_chats(decoder, [chat], SETTINGS)[0].text, [UNTIL]) for chat in chats]
        for name, chats in {"scenes_one": one, "scenes_two": two}.items()
    }
    right = [text if number % 3 else "nothing" for number, text in enumerate(texts["scenes_one"])]
    choices = [0, 1, 1, 0, 1, 1]
    compared = Answering(decoder, DecodeSettings(mode="ar"), (), 1, console(quiet=True))
    likelier = [max((0, 1), key=lambda place, chat=chat: _likelihood(compared, chat, ("red", "blue")[place])) for chat in one]
    scores = {
        "scenes_one": sum(text == wanted for text, wanted in zip(texts["scenes_one"], right, strict=True)) / len(right),
        "scenes_two": sum(text == wanted for text, wanted in zip(texts["scenes_two"], right, strict=True)) / len(right),
        "scenes_choice": sum(found == wanted for found, wanted in zip(likelier, choices, strict=True)) / len(choices),
    }
    return Bench(folder / "llama", write_tasks(folder / "tasks", right, choices), texts, scores)


def _interleaved(first: Any, second: Any) -> list[dict[str, Any]]:
    said = [{"type": "text", "text": "This is one: "}, {"type": "image", "image": first}]
    said += [{"type": "text", "text": " and this the other: "}, {"type": "image", "image": second}]
    return [{"role": "user", "content": [*said, {"type": "text", "text": QUESTION}]}]


def _likelihood(answering: Answering, chat: list[dict[str, Any]], answer: str) -> float:
    return answering.likelihoods([Choice(Question("t", "t", lambda: chat, {}), answer)])[0][0]


def run(home: Path, *words: object) -> str:
    """What a module prints, run by the environment's interpreter over this source, with nothing to fetch from."""
    done = ended(home, *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ended(home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    variables = {
        **os.environ,
        "PYTHONPATH": str(SOURCE),
        "HF_HOME": str(home),
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    program = [str(environment("lmms-eval")), "-m", *map(str, words)]
    return subprocess.run(program, capture_output=True, text=True, check=False, env=variables, cwd=home)


def test_lmms_eval_s_own_command(bench: Bench, tmp_path: Path):
    """Batches, one image and two between words; every answer is that of the checkpoint in memory."""
    arguments = f"pretrained={bench.directory},denoising_steps=4"
    words = ("--tasks", "scenes_one,scenes_two", "--include_path", bench.tasks, "--batch_size", 4, "--log_samples")
    run(tmp_path, "lmms_eval", "--model", "diffvl", "--model_args", arguments, *words, "--output_path", tmp_path / "out")
    (results,) = (tmp_path / "out").rglob("*results.json")
    scores = json.loads(results.read_text(encoding="utf-8"))["results"]
    for task in ("scenes_one", "scenes_two"):
        assert scores[task]["exact,none"] == pytest.approx(bench.scores[task])
        (file,) = (tmp_path / "out").rglob(f"*_samples_{task}.jsonl")
        samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert [sample["filtered_resps"] for sample in sorted(samples, key=lambda one: one["doc_id"])] == bench.texts[task]
    assert 0 < bench.scores["scenes_one"] < 1, "or the score would tell nothing"


def test_diffvl_evaluate(bench: Bench, tmp_path: Path):
    words = ("evaluate", bench.directory, "--include-path", bench.tasks, "--batch-size", 4, "--json")
    shown = json.loads(run(tmp_path, "diffvl.cli", *words, "--tasks", "scenes_one,scenes_two"))["results"]
    shown += json.loads(run(tmp_path, "diffvl.cli", *words, "--tasks", "scenes_choice", "--mode", "ar"))["results"]
    assert {one["task"]: one["metrics"][0]["value"] for one in shown} == pytest.approx(bench.scores)
    assert read_results(bench.directory) == shown and all(one["n"] == 6 for one in shown)
    assert shown[0]["decoding"]["max_new_tokens"] == NEW and shown[2]["decoding"]["mode"] == "ar"


def test_what_a_task_prints_and_writes_is_neither_on_stdout_nor_in_the_current_folder(bench: Bench, tmp_path: Path):
    words = ("evaluate", bench.directory, "--include-path", bench.tasks, "--batch-size", 6, "--json", "--tasks", "scenes_loud")
    (shown,) = json.loads(run(tmp_path, "diffvl.cli", *words))["results"]
    assert [one["value"] for one in shown["metrics"]] == [1.0]
    written = bench.directory / "benchmarks" / "submissions" / "scenes_loud.json"
    assert json.loads(written.read_text(encoding="utf-8")) == bench.texts["scenes_one"]
    assert not (tmp_path / "submissions").exists()


def test_what_cannot_be_answered_and_what_cannot_be_scored_is_one_message(bench: Bench, tmp_path: Path):
    words = ("evaluate", bench.directory, "--include-path", bench.tasks, "--limit", 1, "--tasks")
    refused = ended(tmp_path, "diffvl.cli", *words, "scenes_one,scenes_drawn,scenes_choice")
    assert refused.returncode == 2 and "task scenes_drawn has to draw" in refused.stderr
    assert "task scenes_choice compares likelihoods" in refused.stderr and "answering" not in refused.stderr
    broken = ended(tmp_path, "diffvl.cli", *words, "scenes_broken")
    told = "error: task scenes_broken: all of it was answered, but the answers could not be scored (KeyError: 'gold')"
    assert broken.returncode == 1 and told in broken.stderr and "Traceback" not in broken.stderr
