"""Checkpoints inside a stage: what comes back is what was there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffvl.errors import CheckpointError
from diffvl.train import checkpoints


class Model(nn.Module):
    """`late` has a gradient from the second step on; `frozen` never."""

    early: nn.Parameter
    late: nn.Parameter
    frozen: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name in ("early", "late", "frozen"):
            self.register_parameter(name, nn.Parameter(torch.randn(4, generator=generator)))
        self.frozen.requires_grad_(False)


def make() -> tuple[Model, torch.optim.AdamW]:
    model = Model()
    return model, torch.optim.AdamW([model.early, model.late], lr=0.1, fused=True)


def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
    loss = (model.early * number).square().sum() + (model.late.square().sum() if number > 1 else 0.0)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def save(folder: Path, model: Any, optimizer: torch.optim.Optimizer, done: int, keep: int = 2) -> Path:
    checkpoints.save(folder, model, optimizer, {"step": done, "note": "x"}, keep)
    return folder / f"checkpoint-{done}"


def test_a_parameter_without_a_gradient_so_far_goes_on_without_moments(tmp_path: Path):
    """To the bit; with moments of torch's making, its first step would be counted as its second."""
    whole, cut = make(), make()
    step(*whole, 1)
    step(*cut, 1)
    folder = save(tmp_path, *cut, done=1)
    resumed = make()
    assert checkpoints.load(folder, *resumed) == {"step": 1, "note": "x"}
    assert resumed[0].late not in resumed[1].state and resumed[0].early in resumed[1].state
    for number in (2, 3):
        step(*whole, number)
        step(*resumed, number)
    assert torch.equal(whole[0].early, resumed[0].early) and torch.equal(whole[0].late, resumed[0].late)


def test_the_newest_are_kept_and_whole(tmp_path: Path):
    model, optimizer = make()
    work = tmp_path / "checkpoints"
    for done in (1, 2, 10):
        step(model, optimizer, done)
        save(work, model, optimizer, done)
    assert [path.name for path in checkpoints.all_of(work)] == ["checkpoint-2", "checkpoint-10"]
    assert checkpoints.newest(tmp_path) == work / "checkpoint-10"
    (work / "checkpoint-10" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: damaged or cut short .*remove .*checkpoint-10, and --resume"):
        checkpoints.newest(tmp_path)
    assert checkpoints.newest(tmp_path / "nothing") is None


def test_other_parameters_are_refused(tmp_path: Path):
    model, optimizer = make()
    step(model, optimizer, 1)
    folder = save(tmp_path, model, optimizer, done=1)
    model.late.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"checkpoint-1: holds other parameters than this stage trains: \['late'\]"):
        checkpoints.load(folder, model, torch.optim.AdamW([model.early], lr=0.1, fused=True))
