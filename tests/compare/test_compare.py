"""`diffvl compare`: what is taken, which records are asked, figures that are those of `evaluate`, and the page."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from pages import Page
from tiny_runs import refused, stage, succeed, write_recipe

from diffvl.bench.turns import Call, Speed, speed_of
from diffvl.compare import compare as comparing
from diffvl.compare import settings
from diffvl.compare.compare import merged, spread_out
from diffvl.compare.entrants import distinct_names
from diffvl.compare.page import certainty, interval
from diffvl.compare.settings import ways_to_decode
from diffvl.decode.answer import Answer
from diffvl.evaluation.bootstrap import Interval
from diffvl.evaluation.scored import ScoredAnswer
from diffvl.hub.configuration_diffvl import DiffVLConfig

TOKENS = ("--max-new-tokens", 4)


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, source: Callable[[str], Path], tower: Path, shapes: dict[str, Path]
) -> tiny_runs.Run:
    return tiny_runs.finished_run(tmp_path_factory, source, tower, shapes)


# --- what is compared ------------------------------------------------------------------------------------------------------


def test_names_are_as_short_as_tells_them_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert distinct_names(["runs/a/diffuse", "runs/b/diffuse"]) == ["a/diffuse", "b/diffuse"]
    assert distinct_names(["runs/a/diffuse", "runs/a/align", "qwen2.5-7b"]) == ["diffuse", "align", "qwen2.5-7b"]
    (tmp_path / "diffuse").mkdir()
    monkeypatch.chdir(tmp_path / "diffuse")
    assert distinct_names(["../control", "."]) == ["control", "diffuse"]


def test_an_ar_run_has_one_way_to_decode_and_a_block_run_many():
    config = DiffVLConfig()
    assert [way.mode for _, way in ways_to_decode(config, 8).values()] == ["ar"]
    for context, more in (("block", set()), ("causal", {"speculative"})):
        config.decoding, config.block_size, config.context = "blocks", 4, context
        names = list(ways_to_decode(config, 8))
        assert names[:3] == ["4 steps a block", "2 steps a block", "1 step a block"]
        assert {name for name in names if "threshold" not in name and "step" not in name} == more


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{diffuse}"], ["a comparison needs two runs at least"]),
        (["{diffuse}", "{diffuse}/../diffuse"], ["is named twice"]),
        (["{diffuse}", "{align}"], ["have not held out the same records", "1 records of", "with --data FILE"]),
        (["{prepared}", "{source}"], ["none of these runs has held records out", "--data FILE"]),
        (["{diffuse}", "no-such-model"], ["no-such-model"]),
        (["{diffuse}", "{align}", "--data", "missing.json"], ["missing.json"]),
    ],
)
def test_mistakes_are_one_message(
    words: list[str], says: list[str], run: tiny_runs.Run, source: Callable[[str], Path], tmp_path: Path
):
    places = {"diffuse": run.diffuse, "align": run.align, "prepared": run.root / "prepared", "source": source("llama")}
    page = tmp_path / "page.html"
    refused("compare", *(word.format(**places) for word in words), "--out", page, says=says)
    assert not page.exists()


# --- figures ---------------------------------------------------------------------------------------------------------------


def test_runs_and_a_published_checkpoint_on_the_same_records(
    run: tiny_runs.Run, source: Callable[[str], Path], shapes: dict[str, Path], tmp_path: Path
):
    page = tmp_path / "page.html"
    words = (run.align, run.diffuse, source("llama"), "--data", shapes["test"], "--out", page, "--no-speed", *TOKENS)
    told = json.loads(succeed("compare", *words, "--json").out)
    assert list(told["runs"]) == ["align", "diffuse", source("llama").name]
    rows = {(row["run"], row["decoding"]): row for row in told["rows"]}
    assert len(rows) == 1 + 7 + 1 and all(row["answers"] == 2 and not row["speed"] for row in rows.values())
    first = told["rows"][0]
    assert first["difference"] is None and first["run"] == "align"
    # The figures are those of `evaluate`, under the same settings.
    for directory, name, flags in (
        (run.align, "token by token", ("--mode", "ar")),
        (run.diffuse, "1 step a block", ("--steps", 1)),
        (run.diffuse, "threshold 0.6", ("--strategy", "low_confidence_dynamic", "--threshold", 0.6)),
    ):
        alone = json.loads(succeed("evaluate", directory, "--data", shapes["test"], *flags, *TOKENS, "--json").out)
        row = rows[directory.name, name]
        assert (row["exact_match"]["value"], row["edit_similarity"]) == (alone["exact_match"], alone["edit_similarity"])
        assert row["tokens_per_forward_in_batches"] == alone["answer_tokens"] / alone["forwards"]
        assert "max_new_tokens=4" in alone["settings"]
    # A language model as published is what `prepare` made of it, connector included.
    alone = json.loads(succeed("evaluate", run.root / "prepared", "--data", shapes["test"], *TOKENS, "--json").out)
    assert rows[source("llama").name, "token by token"]["edit_similarity"] == alone["edit_similarity"]
    seen = Page(page.read_text(encoding="utf-8"))
    assert "align, diffuse" in seen.text and "Exact match and speed" in seen.text and "Held-out loss" in seen.text
    fetched = [value for _, attributes in seen.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(value is not None and value.startswith("data:") for value in fetched)
    assert seen.text.count("run.yaml") == 2 and "Where the answers differ" in seen.text


def test_what_runs_have_held_out_is_asked_where_it_is_the_same(
    run: tiny_runs.Run, tower: Path, shapes: dict[str, Path], tmp_path: Path
):
    """Set apart from the training file, too; and `--limit` takes the first of them."""
    recipe = write_recipe(tmp_path / "r.yaml", tower, diffuse=stage("diffuse", shapes["train"], data={"holdout": 1}, steps=1))
    succeed("convert", "--from", run.align, "--stage", "diffuse", "--recipe", recipe, "--out", tmp_path / "other")
    page, other = tmp_path / "page.html", tmp_path / "other" / "diffuse"
    ended = succeed("compare", run.diffuse, other, "--out", page, "--no-speed", "--limit", 1, *TOKENS)
    assert f"asking 1 records of {shapes['train']}" in ended.err
    assert f"page: {page}" in ended.out and "run/diffuse" in ended.out
    # Of one record there is no interval, in the table and on the page.
    for told in (ended.out, Page(page.read_text(encoding="utf-8")).text):
        assert "There are no intervals: they take 5 records at least. Any difference may be chance." in " ".join(told.split())
        assert "[" not in told.partition("run.yaml")[0]


def test_a_figure_stands_with_its_interval_where_it_has_one():
    assert (interval(Interval(0.25)), interval(Interval(0.0), "+.3f")) == ("0.250", "+0.000")
    assert interval(Interval(0.0, -0.1135, 0.1135), "+.3f") == "+0.000 [-0.114, +0.114]"
    machine = {"draws": 10_000, "seed": 0, "records": 5}
    assert "paired bootstrap over the records (10,000 draws, seed 0)" in certainty(machine)


def test_speed_is_measured_by_turns(run: tiny_runs.Run, shapes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comparing, "ROUNDS", 1)
    monkeypatch.setattr(comparing, "TIMED", 2)
    monkeypatch.setattr(settings, "THRESHOLDS", (0.9,))
    page = tmp_path / "page.html"
    words = (run.align, run.diffuse, "--data", shapes["test"], "--out", page, *TOKENS)
    ended = succeed("compare", *words, "--json")
    assert "all 2 models are in memory together" in ended.err
    for row in json.loads(ended.out)["rows"]:
        assert set(row["speed"]) == {"1", "8"}
        assert all(min(value for name, value in one.items() if name != "spread") > 0 for one in row["speed"].values())
    seen = Page(page.read_text(encoding="utf-8"))
    assert "tokens per second, batch 1" in seen.text and "first token s, batch 8" in seen.text.replace("\xa0", " ")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] data. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_answers_are_kept_where_the_models_do_not_fit_together(
    error: Exception, run: tiny_runs.Run, shapes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(settings, "THRESHOLDS", ())
    monkeypatch.setattr(comparing, "answer_in_turns", fail)
    page = tmp_path / "page.html"
    ended = succeed("compare", run.align, run.diffuse, "--data", shapes["test"], "--limit", 1, "--out", page, *TOKENS, "--json")
    assert ended.err.count("warning:") == 1 and "nothing is timed: memory ran out with all 2 models in it" in ended.err
    told = json.loads(ended.out)
    reason = str(error) or "MemoryError"
    assert told["machine"]["timed"] is False and reason in told["machine"]["untimed"]
    assert len(told["rows"]) == 4 and all(0 <= row["exact_match"]["value"] <= 1 and not row["speed"] for row in told["rows"])
    seen = Page(page.read_text(encoding="utf-8")).text
    assert f"Nothing was timed: memory ran out with all 2 models in it ({reason})." in seen and "tokens/s" not in seen


def test_speed_is_summed_over_a_round_and_its_median_taken():
    def call(seconds: float, tokens: Sequence[int], forwards: int) -> Call:
        one: dict[str, Any] = {"forwards": forwards, "prefill_seconds": 0.5, "decode_seconds": seconds - 0.5, "seconds": 9.0}
        answers = [Answer("x", count, tokens_per_forward=1.0, **one) for count in tokens]
        return Call([ScoredAnswer(answer, True, 1.0) for answer in answers], answers[:1])

    calls = [
        call(1.0, [3, 5], 4),
        call(3.0, [4], 2),
        call(1.5, [3, 5], 4),
        call(3.5, [4], 2),
        call(9.0, [3, 5], 4),
        call(9.0, [4], 2),
    ]
    assert speed_of(calls, 3) == Speed(12 / 5.0, 12 / 6, 0.5, (18 - 4) / 5)


def test_questions_come_from_all_over_the_set():
    asked: list[Any] = list(range(10))
    assert spread_out(asked, 4) == [0, 2, 5, 7] and spread_out(asked, 20) == asked


def test_all_number_formats_are_told():
    """An AR checkpoint as published has often another one than what became of it."""
    machines: list[dict[str, Any]] = [{"cores": 2, "dtype": dtype} for dtype in ("bfloat16", "float32", "float32")]
    assert merged(machines) == {"cores": 2, "dtype": "bfloat16, float32"}
