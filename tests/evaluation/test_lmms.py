"""The model class that lmms-eval calls, and the run of its tasks, on stand-ins of lmms-eval's own classes: what reaches them,
what comes back, and what is written. `make test-clients` runs lmms-eval itself."""

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
from diffvl.decode.answer import Decoder, load_for_decoding
from diffvl.errors import DataError, UsageError
from diffvl.store.evaluation import read_results

IMAGES = [Image.new("RGB", (30, 40), "red"), Image.new("RGB", (50, 20), "blue")]
DOCUMENTS = [{"question": "What is it?", "images": IMAGES[:1]}, {"question": "And these, which is larger?", "images": IMAGES}]
ASKED = {"max_new_tokens": 6, "temperature": 0, "do_sample": False}


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
    all_tasks: tuple[str, ...] = ("scenes", "choice", "all")

    def _name_is_group(self, name: str) -> bool:
        return name == "all"

    def _name_is_tag(self, name: str) -> bool:
        return False

    def _get_tasklist(self, name: str) -> list[str]:
        return ["scenes", "choice"]

    def _get_config(self, name: str) -> dict[str, Any]:
        return {"output_type": "multiple_choice" if name == "choice" else "generate_until"}


@dataclass
class Calls:
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluated: list[dict[str, Any]] = field(default_factory=list)


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(contents)
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """lmms-eval's names, as far as they are used; what was imported with them is forgotten afterwards."""
    seen = Calls()

    class Model:
        def __init__(self) -> None:
            self.task_dict: dict[str, Any] = {}

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        model, (name,) = given["model"], given["tasks"]
        seen.evaluated.append({"simple": model.is_simple, **{key: given[key] for key in ("limit", "log_samples")}})
        if name == "all":
            raise RetryError from ConnectionError("Couldn't reach it")
        model.task_dict[name] = {"test": DOCUMENTS}
        values: dict[str, Any] = {"alias": name}
        if name == "choice":
            found = model.loglikelihood([choice(model, 0, "red"), choice(model, 0, "blue")])
            values |= {"acc,none": float(found[0][0] > found[1][0]), "acc_stderr,none": "N/A"}
        else:
            texts = [one.text for one in model.generate_until([chat_request(model, number) for number in (0, 1)])]
            values |= {"exact,none": float(len(texts)), "exact_stderr,none": 0.5, "exact_stderr_clt,none": 0.5}
        return {"results": {name: values}, "versions": {name: 1.0}, "n-shot": {name: 0}, "n-samples": {name: {"effective": 2}}}

    modules = {
        "lmms_eval.api.instance": {"Instance": Instance, "GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
        "lmms_eval.api.model": {"lmms": Model},
        "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": lambda **given: seen.metrics.append(given)},
        "lmms_eval.evaluator": {"simple_evaluate": simple_evaluate},
        "lmms_eval.tasks": {"TaskManager": Manager},
        "tenacity": {"RetryError": RetryError},
    }
    parents = {name.rsplit(".", depth)[0] for name in modules for depth in (1, 2, 3)} - modules.keys()
    for name in (*parents, *modules):
        monkeypatch.setitem(sys.modules, name, module(name, **modules.get(name, {})))
    ours = ("diffvl.evaluation.lmms", "diffvl.evaluation.benchmarks")
    for name in ours:
        sys.modules.pop(name, None)
    yield seen
    for name in ours:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def directory(prepared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return block_checkpoint(prepared("llama"), tmp_path_factory.mktemp("lmms") / "llama")


@pytest.fixture(scope="module")
def decoder(directory: Path) -> Decoder:
    return load_for_decoding(directory)


def chat_request(model: Any, number: int, **asked: Any) -> Instance:
    """As lmms-eval builds it of a task without messages of its own."""

    def messages(document: dict[str, Any]) -> list[dict[str, Any]]:
        shown = [{"type": "image", "url": image} for image in document["images"]]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": document["question"]}]}]

    return Instance(("unused", messages, {**ASKED, **asked}, number, "scenes", "test"))


def simple_request(model: Any, number: int) -> Instance:
    return Instance((DOCUMENTS[number]["question"], ASKED, lambda document: document["images"], number, "scenes", "test"))


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
    request = benchmarks.Benchmarks(["scenes", "all"], {"denoising_steps": 2}, batch_size=2, limit=2)
    with pytest.raises(DataError, match="task all: lmms-eval could not load its data \\(Couldn't reach it\\)"):
        benchmarks.run_benchmarks(copied, request, QUIET)
    benchmarks.run_benchmarks(copied, benchmarks.Benchmarks(["choice"], {"mode": "ar"}), QUIET)
    scenes, choices = read_results(copied)
    assert scenes["metrics"] == [{"metric": "exact", "filter": "none", "value": 2.0, "stderr": 0.5}]
    assert (scenes["task"], scenes["n"], scenes["tokens"], scenes["task_version"]) == ("scenes", 2, 12, 1.0)
    assert scenes["decoding"]["denoising_steps"] == 2 and scenes["decoding"]["max_new_tokens"] == 6
    assert scenes["seconds"] > 0 and scenes["versions"]["lmms_eval"] == "0.7.3" and scenes["forwards"] >= 4
    assert [one["metric"] for one in choices["metrics"]] == ["acc"] and choices["decoding"]["mode"] == "ar"
    simple = [one["simple"] for one in calls.evaluated]
    assert simple == [False, True, True], "a group that has given answers too goes through the simple interface as a whole"
    assert calls.evaluated[0]["limit"] == 2
    assert str(tmp_path) not in (copied / "evaluation.json").read_text(encoding="utf-8")


def test_a_task_that_is_not_there_ends_before_any_work(calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from diffvl.evaluation import benchmarks  # noqa: PLC0415

    for request, says in (
        (benchmarks.Benchmarks(["scenes", "mmnu"]), "lmms-eval has no task mmnu; `python -m lmms_eval --tasks list`"),
        (benchmarks.Benchmarks(["scenes"], include_path=tmp_path / "absent"), "absent is no folder"),
    ):
        with pytest.raises(UsageError) as error:
            benchmarks.run_benchmarks(tmp_path, request, QUIET)
        assert says in str(error.value)


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
