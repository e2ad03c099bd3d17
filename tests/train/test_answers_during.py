"""`eval_answers`: questions answered in evaluations, which change nothing of the run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from helpers import metrics, weights_of
from tiny_runs import stage, succeed, write_recipe

from diffvl.config.recipe import Stage
from diffvl.errors import ConfigError
from diffvl.evaluation.evaluate import held_out_scores
from diffvl.train import stage as training

BLOCKS = {"kind": "block_diffusion", "block_size": 4, "context": "causal", "ar_weight": 1.0}


def test_answering_changes_nothing_of_a_run(
    tmp_path_factory: pytest.TempPathFactory,
    source: Callable[[str], Path],
    tower: Path,
    shapes: dict[str, Path],
    tmp_path: Path,
):
    """With adapters and a mask row of their own, and an attention that decoding does not know."""
    start = tiny_runs.finished_run(tmp_path_factory, source, tower, shapes).align
    directories = []
    for answers in (0, 2):
        more: dict[str, Any] = {
            "data": {"holdout": 2},
            "eval_every": 1,
            "eval_limit": 2,
            "objective": BLOCKS,
        }
        section = stage("diffuse", shapes["train"], **more, eval_answers=answers, lora={"rank": 2, "dropout": 0.1})
        recipe = write_recipe(tmp_path / f"{answers}.yaml", tower, diffuse=section)
        out = tmp_path / str(answers)
        succeed("convert", "--from", start, "--stage", "diffuse", "--recipe", recipe, "--out", out)
        directories.append(out / "diffuse")
    plain, answered = map(metrics, directories)
    found = [dict(line) for line in answered if "eval_exact_match" in line]
    assert [line["step"] for line in found] == [0, 1, 2] and all(0 <= line["eval_edit_similarity"] <= 1 for line in found)
    for line in answered:
        for name in ("eval_exact_match", "eval_edit_similarity"):
            line.pop(name, None)
    assert answered == plain
    weights, expected = map(weights_of, directories)
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    # What it says at the end is what the samples say.
    lines = [json.loads(line) for line in (directories[1] / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = held_out_scores([{"answer": line["after"], "truth": line["truth"]} for line in lines])
    assert scores["edit_similarity"] == pytest.approx(found[-1]["eval_edit_similarity"], abs=0.05)


def test_a_model_in_parts_is_not_asked(monkeypatch: pytest.MonkeyPatch):
    section = stage("diffuse", Path("x.json"), data={"holdout": 1}, eval_every=1, eval_answers=1)
    with pytest.raises(ValueError, match="which no process has with sharding: full"):
        Stage.model_validate(section | {"sharding": "full"})
    monkeypatch.setattr(training, "is_to_shard", lambda _: True)
    with pytest.raises(ConfigError, match="eval_answers asks a whole model"):
        training.require_machine(Stage.model_validate(section))
