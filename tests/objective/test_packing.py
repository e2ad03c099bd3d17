"""Packed samples have the numbers that they have alone: loss, counts and gradients, for every family and objective."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import CONTEXTS, GRIDS, TARGETS, metrics, objective, sample, stage_recipe, trunks
from shared_fixtures import Loaded
from training_runs import run

from diffvl.config.objectives import ArObjective, FullDiffusionObjective
from diffvl.data.loader import load_data
from diffvl.data.sample_dataset import SampleDataset
from diffvl.data.samples import collate
from diffvl.hub.layout_diffvl import Layout
from diffvl.objective.losses import Draw, LossOutput, loss_of
from diffvl.objective.packing import pack

DRAW = Draw(seed=3, step=2, progress=0.5)


def loss_in_rows(loaded: Loaded, rows: list[list[int]], settings: Any) -> tuple[LossOutput, list[torch.Tensor | None]]:
    """Five samples of two turns, two of them with an image, in these rows."""
    model, _ = loaded
    lengths = [(21, 6, 3, 9), (6, 7), (20, 1, 2, 3), (3, 12), (5, 4, 1, 1)]
    samples = [sample(model.config, length, index, image=length[0] > 18) for index, length in enumerate(lengths)]
    batch: Any = collate([[samples[place] for place in row] for row in rows], pad_token_id=0)
    output = loss_of(model, model.config, batch, settings, DRAW)
    return output, list(torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True))


def require_same(ours: tuple[LossOutput, list[Any]], theirs: tuple[LossOutput, list[Any]]) -> None:
    (one, gradients), (other, expected) = ours, theirs
    torch.testing.assert_close(one.loss, other.loss, rtol=2e-6, atol=0.0)
    assert one.tokens == other.tokens
    for name, value in other.sums.items():
        torch.testing.assert_close(one.sums[name], value, rtol=2e-6, atol=0.0)
    loudest = max(float(gradient.abs().max()) for gradient in expected if gradient is not None)
    for gradient, truth in zip(gradients, expected, strict=True):
        assert (gradient is None) == (truth is None)
        if truth is not None:
            torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-6 * loudest)


ALONE, TOGETHER = [[0], [1], [2], [3], [4]], [[0, 1, 2], [3, 4]]


@pytest.mark.parametrize("model_type", trunks())
def test_packing_changes_nothing_in_any_family(model_type: str, loaded: Callable[[str], Loaded]):
    settings = objective(complementary=True, weight="effective")
    require_same(*(loss_in_rows(loaded(model_type), rows, settings) for rows in (TOGETHER, ALONE)))
    require_same(*(loss_in_rows(loaded(model_type), rows, ArObjective()) for rows in (TOGETHER, ALONE)))
    require_same(*(loss_in_rows(loaded(model_type), rows, FullDiffusionObjective()) for rows in (TOGETHER, ALONE)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_packing_changes_nothing_in_any_layout(context: str, grid: str, target: str, loaded: Callable[[str], Loaded]):
    weight = {"ar_weight": 0.3} if context == "causal" else {}
    settings = objective(context=context, grid=grid, target=target, **weight)
    require_same(*(loss_in_rows(loaded("llama"), rows, settings) for rows in (TOGETHER, ALONE)))


def test_the_order_in_a_row_changes_nothing(loaded: Callable[[str], Loaded]):
    """But for images, which are counted in the order of the batch and travel with their samples."""
    require_same(*(loss_in_rows(loaded("llama"), rows, objective()) for rows in ([[4, 2], [0, 3, 1]], ALONE)))


def test_a_sample_that_sees_its_neighbour_would_show(loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    """The bug that the tests above are for: all samples of a row in one document."""
    expected = loss_in_rows(loaded("llama"), ALONE, objective())
    honest = pack

    def merged(*arguments: Any) -> Any:
        packed = honest(*arguments)
        packed.layout.document = torch.zeros_like(packed.layout.document)
        return packed

    monkeypatch.setattr("diffvl.objective.streams.pack", merged)
    with pytest.raises(AssertionError):
        require_same(loss_in_rows(loaded("llama"), TOGETHER, objective()), expected)


def test_pack_moves_every_token_once():
    valid = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
    position = torch.arange(12).view(3, 4)
    zeros = torch.zeros_like(position)
    packed = pack(Layout(position, zeros, zeros, valid, zeros, "block"), torch.tensor([0, 0, 1]))
    assert packed.layout.position.tolist() == [[0, 1, 3, 4], [9, 10, 0, 0]]
    assert packed.layout.document.tolist() == [[0, 0, 0, 1], [2, 2, 0, 0]]
    assert packed.layout.valid.tolist() == [[True] * 4, [True, True, False, False]]
    assert packed.place[valid].tolist() == [0, 1, 2, 3, 4, 5]
    assert packed.moved(position + 100, -7).tolist() == [[100, 101, 103, 104], [109, 110, -7, -7]]


def test_a_packed_run(prepared: Callable[[str], Path], shapes: dict[str, Path], tmp_path: Path, loaded: Callable[[str], Loaded]):
    """Every sample is in one row, rows differ with the seed only, and a run on rows learns from as many answer tokens."""
    recipe = stage_recipe(shapes["train"], steps=None, epochs=1, batch_size=1)
    packed = stage_recipe(shapes["train"], row_length=512, steps=None, epochs=1, batch_size=1)
    settings = packed.stages["diffuse"].data
    train = load_data(settings, loaded("llama")[1], None).train
    assert isinstance(train, SampleDataset)
    rows = [train.packed(512, seed) for seed in (0, 0, 1)]
    assert [list(row) for row in rows[0].rows or ()] == [list(row) for row in rows[1].rows or ()]
    assert [list(row) for row in rows[0].rows or ()] != [list(row) for row in rows[2].rows or ()]
    assert len(rows[0]) < len(train) == 10
    assert sorted(one.index for row in range(len(rows[0])) for one in rows[0][row]) == list(range(10))  # type: ignore[union-attr]
    alone, together = (metrics(run(prepared("llama"), one, tmp_path / name)) for name, one in (("a", recipe), ("b", packed)))
    assert len(alone) == 10 and len(together) == len(rows[0])
