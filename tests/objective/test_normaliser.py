"""What the loss of a step is divided by: answer tokens, or samples, each by its own answer tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import batch, metrics, objective, stage_recipe
from tiny_runs import short_records
from training_runs import run

from diffvl.config.objectives import ArObjective
from diffvl.data.samples import IGNORED, Sample
from diffvl.objective.normaliser import divisor, shares

ANSWERS = torch.tensor([[0, 0, 1, 1, 0, 2, 2, 2], [0, 1, 0, 0, -1, -1, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0]])  # 5, 1 and no tokens


def test_by_hand():
    """An answer that is not trained on (below 0) counts nowhere, and a sample without answers adds nothing."""
    labels = torch.where(ANSWERS > 0, 7, IGNORED)
    by_tokens, by_samples = objective(), objective(normaliser="samples")
    assert [divisor(one, labels) for one in (by_tokens, by_samples, ArObjective())] == [6, 2, 6]
    assert shares(by_tokens, ANSWERS).flatten().tolist() == [1.0, 1.0, 1.0]
    assert shares(by_samples, ANSWERS).flatten().tolist() == [1 / 5, 1.0, 1.0]


def test_the_labels_of_a_batch_are_the_trained_tokens():
    made = batch([Sample([1, 2, 3, 4, 5, 6], [0, 1, 1, 0, 2, 2], None, 0), Sample([1, 2, 3], [0, 1, 1], None, 1)])
    assert ((made["labels"] != IGNORED) == (made["answer_index"] > 0)).all()
    assert [divisor(objective(normaliser=name), made["labels"]) for name in ("tokens", "samples")] == [6, 2]


def test_however_a_step_is_cut(prepared: Callable[[str], Path], tmp_path: Path):
    """The divisor is that of the whole step, over all of its micro-batches."""
    data = short_records(tmp_path, 4)
    settings = {"kind": "block_diffusion", "block_size": 4, "noise": {"schedule": "full"}, "normaliser": "samples"}
    lines = []
    for size in (4, 1):
        recipe = stage_recipe(data, objective=settings, steps=1, batch_size=size, accumulation=4 // size)
        lines += metrics(run(prepared("llama"), recipe, tmp_path / str(size)))
    assert lines[1]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-6)
    assert lines[1]["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=1e-5)
