"""The model class that lmms-eval calls, and the run of its tasks, on stand-ins of lmms-eval's own classes: what reaches them,
what comes back, and what is written. `make test-clients` runs lmms-eval itself."""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from block_checkpoints import block_checkpoint
from helpers import QUIET
from PIL import Image

import diffvl
from diffvl import evaluation
from diffvl.decode.answer import Decoder, load_for_decoding
from diffvl.errors import DataError, DiffvlError, ScoringError, UsageError
from diffvl.store.evaluation import read_results

IMAGES = [Image.new("RGB", (30, 40), "red"), Image.new("RGB", (50, 20), "blue")]
DOCUMENTS = [{"question": "What is it?", "images": IMAGES[:1]}, {"question": "And these, which is larger?", "images": IMAGES}]
ASKED = {"max_new_tokens": 6, "temperature": 0, "do_sample": False}
KINDS = {
    "choice": "multiple_choice",
    "drawn": "generate_visual_cot",
    "rounds": "generate_until_multi_round",
    "strange": "generate_music",
    "agent": "generate_until_agentic",
}
GROUPS: dict[str, list[Any]] = {
    "all": ["scenes", "choice"],
    "drawings": ["scenes", {"task": "drawn", "num_fewshot": 0}, {"group": "inner", "task": ["rounds"]}],
}


class RetryError(Exception):
    """Stands for tenacity's."""


@dataclass
class Instance:
    """Stands for lmms-eval's."""

    args: tuple[Any, ...]
    task_name: str = "scenes"


@dataclass
class TokenCounts:
    output_tokens: int


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts


@dataclass
class Manager:
    """Stands for lmms-eval's TaskManager."""

    verbosity: str
    include_path: str | None
    model_name: str
    all_tasks: tuple[str, ...] = ("scenes", "far", "broken", *KINDS, *GROUPS, "unimportable", "homeless")

    def _name_is_group(self, name: str) -> bool:
        return name in GROUPS

    def _name_is_tag(self, name: str) -> bool:
        return False

    def _get_tasklist(self, name: str) -> int:
        return -1

    def _get_config(self, name: str) -> dict[str, Any]:
        if name == "unimportable":
            raise ModuleNotFoundError("No module named 'judge'", name="judge")
        if name == "homeless":
            raise KeyError("HF_HOME")
        return {"group": name, "task": GROUPS[name]} if name in GROUPS else {"output_type": KINDS.get(name, "generate_until")}


@dataclass
class Calls:
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluated: list[dict[str, Any]] = field(default_factory=list)
    fault: tuple[Exception, Exception | None] | None = None

    def fail(self) -> None:
        fault, cause = self.fault or (RetryError(), ConnectionError("Couldn't reach it"))
        raise fault from cause


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(contents)
    return made


def evaluated(calls: Calls, model: Any, tasks: list[str], **given: Any) -> dict[str, Any]:
    """Stands for lmms-eval's simple_evaluate: a task's data, its questions, the end of the model's work, scores."""
    (name,) = tasks
    calls.evaluated.append({"simple": model.is_simple, **{key: given[key] for key in ("limit", "log_samples", "cli_args")}})
    if name == "far":
        calls.fail()
    model.task_dict[name] = {"test": DOCUMENTS}
    values: dict[str, Any] = {"alias": name}
    if name == "choice":
        found = model.loglikelihood([choice(model, 0, "red"), choice(model, 0, "blue")])
        values |= {"acc,none": float(found[0][0] > found[1][0]), "acc_stderr,none": "N/A"}
    else:
        request = simple_request if model.is_simple else chat_request
        texts = [one.text for one in model.generate_until([request(model, number, name) for number in (0, 1)])]
        values |= {"exact,none": float(len(texts)), "exact_stderr,none": 0.5, "exact_stderr_clt,none": 0.5}
    model.clean()
    if name == "broken":
        calls.fail()
    return {"results": {name: values}, "versions": {name: 1.0}, "n-shot": {name: 0}, "n-samples": {name: {"effective": 2}}}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """lmms-eval's names, as far as they are used; what was imported with them is forgotten afterwards."""
    seen = Calls()

    class Model:
        def __init__(self) -> None:
            self.task_dict: dict[str, Any] = {}

        def clean(self) -> None:
            pass

    def parse_eval_args() -> tuple[None, argparse.Namespace]:
        assert sys.argv == ["lmms_eval"], "the words of diffvl's command line are not for this parser"
        return None, argparse.Namespace(reasoning_tags="[]", process_with_media=False, output_path=None)

    modules = {
        "lmms_eval.api.instance": {"Instance": Instance, "GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
        "lmms_eval.api.model": {"lmms": Model},
        "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": lambda **given: seen.metrics.append(given)},
        "lmms_eval.__main__": {"parse_eval_args": parse_eval_args},
        "lmms_eval.evaluator": {"simple_evaluate": lambda **given: evaluated(seen, **given)},
        "lmms_eval.tasks": {"TaskManager": Manager},
        "tenacity": {"RetryError": RetryError},
    }
    parents = {name.rsplit(".", depth)[0] for name in modules for depth in (1, 2, 3)} - modules.keys()
    for name in (*parents, *modules):
        monkeypatch.setitem(sys.modules, name, module(name, **modules.get(name, {})))
    forget_ours()
    yield seen
    forget_ours()


def forget_ours() -> None:
    """Lets what is bound to lmms-eval's names be imported anew; a package keeps its modules too."""
    for name in ("lmms", "benchmarks"):
        sys.modules.pop(f"diffvl.evaluation.{name}", None)
        if hasattr(evaluation, name):
            delattr(evaluation, name)


@pytest.fixture(scope="module")
def directory(prepared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return block_checkpoint(prepared("llama"), tmp_path_factory.mktemp("lmms") / "llama")


@pytest.fixture(scope="module")
def decoder(directory: Path) -> Decoder:
    return load_for_decoding(directory)


def chat_request(model: Any, number: int, task: str = "scenes", **asked: Any) -> Instance:
    """As lmms-eval builds it of a task without messages of its own."""

    def messages(document: dict[str, Any]) -> list[dict[str, Any]]:
        shown = [{"type": "image", "url": image} for image in document["images"]]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": document["question"]}]}]

    return Instance(("unused", messages, {**ASKED, **asked}, number, task, "test"))


def simple_request(model: Any, number: int, task: str = "scenes") -> Instance:
    return Instance((DOCUMENTS[number]["question"], ASKED, lambda document: document["images"], number, task, "test"))


def choice(model: Any, number: int, answer: Any) -> Instance:
    arguments = (DOCUMENTS[number]["question"], answer, lambda document: document["images"], number, "choice", "test")
    return Instance(arguments, "choice")


def expected_texts(decoder: Decoder, **settings: Any) -> list[str]:
    given = {"max_new_tokens": 6, **settings}
    return [diffvl.generate(decoder, one["question"], images=one["images"], **given).text for one in DOCUMENTS]


def test_both_interfaces_give_the_answers_of_generate(calls: Calls, directory: Path, decoder: Decoder):
    """Loaded as lmms-eval's command line does, from words, and handed over loaded."""
    from diffvl.evaluation.lmms import DiffVLChat, DiffVLSimple  # noqa: PLC0415  (after the stand-ins are there)

    chat: Any = DiffVLChat(str(directory), batch_size="2", device="cpu")
    simple: Any = DiffVLSimple(decoder, batch_size=1)
    assert not DiffVLChat.is_simple and DiffVLSimple.is_simple
    for model, request in ((chat, chat_request), (simple, simple_request)):
        model.task_dict["scenes"] = {"test": DOCUMENTS}
        found = model.generate_until([request(model, number) for number in (1, 0)])
        assert [one.text for one in found] == expected_texts(decoder)[::-1]
        assert all(one.token_counts.output_tokens == 6 for one in found)
    assert [one["total_gen_tokens"] for one in calls.metrics] == [12, 12] and calls.metrics[0]["avg_speed"] > 0


def test_settings_of_the_model_hold_against_those_of_a_task(calls: Calls, decoder: Decoder):
    from diffvl.evaluation.lmms import DiffVLChat  # noqa: PLC0415

    settings: dict[str, Any] = {"denoising_steps": 1, "max_new_tokens": 9}
    model: Any = DiffVLChat(decoder, 2, **settings)
    model.task_dict["scenes"] = {"test": DOCUMENTS}
    found = model.generate_until([chat_request(model, number) for number in (0, 1)])
    assert [one.text for one in found] == expected_texts(decoder, **settings) != expected_texts(decoder)


def test_given_answers_are_compared_in_mode_ar_alone(calls: Calls, decoder: Decoder):
    from diffvl.evaluation.lmms import DiffVLSimple  # noqa: PLC0415

    model: Any = DiffVLSimple(decoder, 3, mode="ar")
    model.task_dict["choice"] = {"test": DOCUMENTS}
    requests = [choice(model, 0, "red"), choice(model, 1, lambda document: "blue"), Instance(("", "red"), "choice")]
    found = model.loglikelihood(requests)
    assert all(total < 0 and not best for total, best in found) and len({total for total, _ in found}) == 3
    blocks: Any = DiffVLSimple(decoder)
    blocks.task_dict = model.task_dict
    with pytest.raises(UsageError, match="add mode=ar"):
        blocks.loglikelihood(requests)
    with pytest.raises(UsageError, match="asks in several rounds"):
        model.generate_until_multi_round(requests)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "pretrained=DIR"),
        ({"batch_size": "auto"}, "batch_size='auto': expected a whole number from 1 on"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_batch_size": 8}, "max_batch_size has no effect"),
        ({"thresold": 0.9}, "knows no thresold"),
        ({"denoising_steps": 9}, "denoising_steps is 9, expected 1 to the block size, 4"),
        ({"mode": "speculative"}, "needs a checkpoint trained with context: causal"),
        ({"device": "cuda:7"}, "device=cuda:7: not a device of this machine"),
        ({"device": "gpu"}, "device=gpu"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], says: str, calls: Calls, decoder: Decoder):
    from diffvl.evaluation.lmms import DiffVLChat  # noqa: PLC0415

    given: Any = {**arguments, "pretrained": decoder if arguments else None}
    with pytest.raises(UsageError) as error:
        DiffVLChat(**given)
    assert says in str(error.value)


# --- diffvl evaluate --tasks -------------------------------------------------------------------------------------------------


def test_results_land_beside_the_checkpoint_task_by_task(
    calls: Calls, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A task that fails leaves what the ones before it said."""
    from diffvl.evaluation import benchmarks  # noqa: PLC0415

    copied = block_checkpoint(directory, tmp_path / "copy")
    monkeypatch.setattr(benchmarks, "version", lambda name: "0.7.3")
    request = benchmarks.Benchmarks(["scenes", "far"], {"denoising_steps": 2}, batch_size=2, limit=2)
    with pytest.raises(DataError, match="task far: lmms-eval could not load its data \\(Couldn't reach it\\)"):
        benchmarks.run_benchmarks(copied, request, QUIET)
    benchmarks.run_benchmarks(copied, benchmarks.Benchmarks(["choice"], {"mode": "ar"}), QUIET)
    scenes, choices = read_results(copied)
    assert scenes["metrics"] == [{"metric": "exact", "filter": "none", "value": 2.0, "stderr": 0.5}]
    assert (scenes["task"], scenes["n"], scenes["tokens"], scenes["task_version"]) == ("scenes", 2, 12, 1.0)
    assert scenes["decoding"]["denoising_steps"] == 2 and scenes["decoding"]["max_new_tokens"] == 6
    assert scenes["seconds"] > 0 and scenes["versions"]["lmms_eval"] == "0.7.3" and scenes["forwards"] >= 4
    assert [one["metric"] for one in choices["metrics"]] == ["acc"] and choices["decoding"]["mode"] == "ar"
    assert [one["simple"] for one in calls.evaluated] == [False, False, True]
    assert calls.evaluated[0]["limit"] == 2
    assert str(tmp_path) not in (copied / "evaluation.json").read_text(encoding="utf-8")


def test_a_task_that_is_not_there_ends_before_any_work(calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from diffvl.evaluation import benchmarks  # noqa: PLC0415

    for request, says in (
        (benchmarks.Benchmarks(["scenes", "mmnu"]), "lmms-eval has no task mmnu; `python -m lmms_eval --tasks list`"),
        (benchmarks.Benchmarks(["scenes"], include_path=tmp_path / "absent"), "absent is no folder"),
        (benchmarks.Benchmarks(["scenes", "unimportable"]), "task unimportable needs the package judge"),
        (benchmarks.Benchmarks(["homeless"]), "task homeless: its own code cannot be loaded here (KeyError: 'HF_HOME')"),
    ):
        with pytest.raises(UsageError) as error:
            benchmarks.run_benchmarks(tmp_path, request, QUIET)
        assert says in str(error.value)


def test_tasks_that_cannot_be_answered_are_all_told_before_any_work(
    calls: Calls, directory: Path, monkeypatch: pytest.MonkeyPatch
):
    from diffvl.evaluation import benchmarks  # noqa: PLC0415

    monkeypatch.setattr(benchmarks, "load_for_decoding", lambda _: pytest.fail("nothing may be loaded"))
    asked = ["scenes", "agent", "drawings", "strange", "all"]
    with pytest.raises(UsageError) as error:
        benchmarks.run_benchmarks(directory, benchmarks.Benchmarks(asked), QUIET)
    head, *lines = str(error.value).split("\n  ")
    assert head == "--tasks: not all of them can be answered; none was" and not calls.evaluated
    assert [line.partition(",")[0] for line in lines] == [
        "task drawings (drawn) has to draw an image before it answers",
        "task drawings (rounds) asks in several rounds",
        "task strange asks for something that diffvl does not know (output_type generate_music)",
        "task all (choice) compares likelihoods",
    ]
    assert "add mode=ar" in lines[3]
    with pytest.raises(UsageError) as error:
        benchmarks.run_benchmarks(directory, benchmarks.Benchmarks(["choice", "rounds"], {"mode": "ar"}), QUIET)
    assert "task rounds asks" in str(error.value) and "choice" not in str(error.value)


def retried(cause: Exception) -> tuple[Exception, Exception]:
    """What tenacity raises, whose own words hold the address of an object."""
    return RetryError("RetryError[<Future at 0x7f>]"), cause


@pytest.mark.parametrize(
    ("task", "fault", "kind", "says"),
    [
        (
            "broken",
            retried(KeyError("gold")),
            ScoringError,
            "all of it was answered, but the answers could not be scored (KeyError: 'gold')",
        ),
        ("broken", retried(ConnectionError("no judge")), ScoringError, "could not be scored (ConnectionError: no judge)"),
        (
            "broken",
            (AttributeError("no output_path"), None),
            ScoringError,
            "could not be scored (AttributeError: no output_path)",
        ),
        ("broken", retried(ModuleNotFoundError("x", name="bleurt")), UsageError, "needs the package bleurt"),
        ("far", retried(PermissionError("locked")), DataError, "lmms-eval could not load its data (locked)"),
        ("far", retried(ValueError("no config b")), DataError, "lmms-eval could not set it up (ValueError: no config b)"),
        ("far", (FileNotFoundError("gone"), None), DataError, "lmms-eval could not load its data (gone)"),
    ],
)
def test_what_fails_is_told_by_where_it_failed(
    task: str,
    fault: tuple[Exception, Exception | None],
    kind: type[DiffvlError],
    says: str,
    calls: Calls,
    directory: Path,
):
    from diffvl.evaluation import benchmarks  # noqa: PLC0415

    calls.fault = fault
    with pytest.raises(DiffvlError) as error:
        benchmarks.run_benchmarks(directory, benchmarks.Benchmarks([task], batch_size=2), QUIET)
    assert type(error.value) is kind and f"task {task}" in str(error.value) and says in str(error.value)
    assert error.value.exit_code == (1 if kind is ScoringError else 2)


def test_a_fault_that_is_none_of_a_task_keeps_its_traceback(calls: Calls, directory: Path):
    from diffvl.evaluation import benchmarks  # noqa: PLC0415

    calls.fault = RuntimeError("shapes differ"), None
    with pytest.raises(RuntimeError, match="shapes differ"):
        benchmarks.run_benchmarks(directory, benchmarks.Benchmarks(["far"]), QUIET)


def test_scoring_gets_what_lmms_eval_s_own_command_line_would_give_it(calls: Calls, directory: Path, tmp_path: Path):
    """Without it tasks write into the current folder, or fail; and reasoning would be scored."""
    from diffvl.evaluation import benchmarks  # noqa: PLC0415

    before = list(sys.argv)
    copied = block_checkpoint(directory, tmp_path / "copy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks, "version", lambda name: "0.7.3")
        benchmarks.run_benchmarks(copied, benchmarks.Benchmarks(["scenes"], batch_size=2), QUIET)
    given = calls.evaluated[0]["cli_args"]
    assert given.reasoning_tags == "[]" and given.process_with_media and sys.argv == before
    assert (given.tasks, given.model, given.model_args) == ("scenes", "diffvl", "pretrained=copy")
    assert given.output_path == str(copied / "benchmarks") and not (copied / "benchmarks").exists()


def test_a_group_that_has_given_answers_too_goes_through_the_simple_interface(
    calls: Calls, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from diffvl.evaluation import benchmarks  # noqa: PLC0415

    monkeypatch.setattr(benchmarks, "version", lambda name: "0.7.3")
    copied = block_checkpoint(directory, tmp_path / "copy")
    benchmarks.run_benchmarks(copied, benchmarks.Benchmarks(["all"], {"mode": "ar"}), QUIET)
    assert calls.evaluated[0]["simple"]


def test_a_group_has_the_documents_of_its_tasks(calls: Calls):
    from diffvl.evaluation import benchmarks  # noqa: PLC0415
    from diffvl.evaluation.benchmark_answers import TaskFigures  # noqa: PLC0415
    from diffvl.evaluation.task_settings import TaskSettings  # noqa: PLC0415
    from diffvl.hub.settings_diffvl import DecodeSettings  # noqa: PLC0415

    def took(answers: int) -> TaskFigures:
        return TaskFigures(TaskSettings(DecodeSettings()), answers=answers, tokens=10, forwards=5, seconds=1.5)

    figures = {"one": took(12), "two": took(3)}
    values = {"acc,none": 0.5}
    results = {
        "results": {"all": values, "both": values, "one": values, "two": values, "three": values},
        "versions": {},
        "n-shot": {},
        "group_subtasks": {"all": ["both", "three"], "both": ["one", "two"]},
        "n-samples": {"one": {"effective": 3}, "two": {"effective": 3}, "three": {"effective": 5}},
    }
    config = SimpleNamespace(block_size=4, decoding="blocks", context="block", stop_token_ids=[2], vocabulary_size=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmarks, "version", lambda name: "0.7.3")
        found = benchmarks.results_of(results, figures, config, 4.0)
    assert [(one["task"], one["n"]) for one in found] == [("all", 11), ("both", 6), ("one", 3), ("two", 3), ("three", 5)]
    assert [one["seconds"] for one in found] == [4.0, 4.0, 1.5, 1.5, 4.0]
    assert found[2]["answers"] == 12, "each given choice is an answer"
