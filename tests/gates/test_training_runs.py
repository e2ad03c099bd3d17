"""The invariants of whole runs of `train`: a resume changes nothing, how a step is cut into micro-steps and processes changes
nothing, and what is frozen stays frozen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from helpers import metrics, stage_recipe, text_only, trunks, weights_of
from tiny_runs import short_records
from training_runs import BETA, crash, require_same_steps, run, run_two

from diffvl.config.recipe import Recipe, Stage
from diffvl.store.checkpoint import partial
from diffvl.train import loop
from diffvl.train import stage as training

# --- 5. resume = uninterrupted ----------------------------------------------------------------------------------------------

RESUMED = {
    "beta curriculum, all parts": {
        "objective": BETA,
        "trainable": {"trunk": 1e-3, "connector": 1e-3, "mask_row": 1e-3, "tower": 1e-4},
    },
    "lora": {"objective": BETA, "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(
    name: str, prepared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """To the bit: every line of metrics.jsonl and every weight. Two crashes, each in the middle of an epoch of 4 steps and with
    a lost step behind its checkpoint; the held-out measure runs in between."""
    settings = {"steps": 8, "save_every": 2, "eval_every": 3, **RESUMED[name]}
    recipe = stage_recipe(short_records(tmp_path, 10), holdout=2, **settings)
    start = prepared("llama")
    torch.manual_seed(11)  # the state that a run finds must not matter
    whole = run(start, recipe, tmp_path / "whole")
    torch.manual_seed(12)
    crash(start, recipe, tmp_path / "cut", step=3, resume=False, patch=monkeypatch)
    torch.manual_seed(13)
    crash(start, recipe, tmp_path / "cut", step=7, resume=True, patch=monkeypatch)
    assert sorted(path.name for path in (partial(tmp_path / "cut") / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    torch.manual_seed(14)
    cut = run(start, recipe, tmp_path / "cut", resume=True)
    lines = metrics(whole)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["step"] for line in lines if "eval_masked_loss" in line] == [0, 3, 6, 8]
    assert metrics(cut) == lines
    ours, theirs = weights_of(whole), weights_of(cut)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert any(not torch.equal(value, weights_of(start)[key]) for key, value in ours.items())


@pytest.mark.parametrize("model_type", trunks("llama"))
def test_a_resumed_run_is_the_uninterrupted_one_in_every_family(
    model_type: str, prepared: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A shorter run of the same, with packed rows and two curricula, cut between a save and the next."""
    moving = {**BETA, "block_size": 8, "block_curriculum": {0.0: 4, 0.5: 8}, "complementary": True}
    recipe = stage_recipe(short_records(tmp_path, 10), row_length=256, objective=moving, steps=4, save_every=2, batch_size=1)
    start = prepared(model_type)
    whole = run(start, recipe, tmp_path / "whole")
    crash(start, recipe, tmp_path / "cut", step=3, resume=False, patch=monkeypatch)
    cut = run(start, recipe, tmp_path / "cut", resume=True)
    assert metrics(cut) == metrics(whole) and len(metrics(whole)) == 4
    assert [line["block_size"] for line in metrics(whole)] == [4, 4, 8, 8]
    ours, theirs = weights_of(whole), weights_of(cut)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


# --- how a step is cut ------------------------------------------------------------------------------------------------------


def step_recipe(data: Path, batch_size: int, accumulation: int) -> Recipe:
    """Three steps of 8 samples out of 10, so that an epoch ends inside."""
    cut = {"batch_size": batch_size, "accumulation": accumulation}
    return stage_recipe(data, objective=BETA, steps=3, **cut)


@pytest.fixture(scope="module")
def whole_steps(
    prepared: Callable[[str], Path], shapes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """metrics.jsonl of one process that takes all 8 samples at once."""
    return metrics(run(prepared("llama"), step_recipe(shapes["train"], 8, 1), tmp_path_factory.mktemp("eight") / "run"))


@pytest.mark.parametrize("model_type", trunks("llama"))
def test_accumulation_changes_nothing_in_any_family(model_type: str, prepared: Callable[[str], Path], tmp_path: Path):
    start, data = prepared(model_type), short_records(tmp_path, 10)
    ones, eights = (metrics(run(start, step_recipe(data, 8 // cut, cut), tmp_path / str(cut))) for cut in (8, 1))
    require_same_steps(ones, eights)


def test_accumulation_changes_nothing(
    whole_steps: list[dict[str, Any]], prepared: Callable[[str], Path], shapes: dict[str, Path], tmp_path: Path
):
    ones = metrics(run(prepared("llama"), step_recipe(shapes["train"], 1, 8), tmp_path / "run"))
    require_same_steps(ones, whole_steps)


def test_two_processes_are_one(
    forks: Forks,
    whole_steps: list[dict[str, Any]],
    prepared: Callable[[str], Path],
    shapes: dict[str, Path],
    tmp_path: Path,
):
    require_same_steps(run_two(forks, prepared("llama"), step_recipe(shapes["train"], 2, 2), tmp_path), whole_steps)


def test_two_processes_without_images(forks: Forks, prepared: Callable[[str], Path], tmp_path: Path):
    """The connector is all that trains, and nothing has passed through it: data parallelism must still find its gradients."""
    data = text_only(tmp_path / "text.json", 8)
    recipe = stage_recipe(data, objective={"kind": "ar"}, trainable={"connector": 1e-3}, steps=2, batch_size=2)
    assert [line["step"] for line in run_two(forks, prepared("llama"), recipe, tmp_path) if "loss" in line] == [1, 2]


def test_noise_is_drawn_by_optimiser_steps(
    prepared: Callable[[str], Path], shapes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Step and progress of a draw count optimiser steps of the whole stage, not micro-steps and not those of an epoch."""
    draws, loss_of = [], loop.loss_of

    def spy(*arguments: Any) -> Any:
        draws.append(arguments[-1])
        return loss_of(*arguments)

    monkeypatch.setattr(loop, "loss_of", spy)
    recipe = stage_recipe(shapes["train"], objective=BETA, steps=4, batch_size=1, accumulation=2)
    run(prepared("llama"), recipe, tmp_path / "run")
    assert [(draw.seed, draw.step, draw.progress) for draw in draws[::2]] == [(0, step, step / 4) for step in range(4)]
    assert draws[::2] == draws[1::2] and len(draws) == 8


# --- 6. frozen means frozen -------------------------------------------------------------------------------------------------


@dataclass
class Trained:
    """Parameters of the model in training (adapters and mask row apart) before the first and after the last step, names of
    those that train, and the written files before and after."""

    first: dict[str, torch.Tensor]
    last: dict[str, torch.Tensor]
    trainable: set[str]
    read: dict[str, torch.Tensor]
    written: dict[str, torch.Tensor]
    mask_row: int

    @property
    def moved(self) -> set[str]:
        return {name for name in self.first if not torch.equal(self.first[name], self.last[name])}

    @property
    def changed(self) -> set[str]:
        """Tensors of the written checkpoint that differ from those of the one it started from."""
        assert self.read.keys() == self.written.keys()
        return {name for name in self.read if not torch.equal(self.read[name], self.written[name])}


def watch(start: Path, recipe: Recipe, directory: Path, patch: pytest.MonkeyPatch) -> Trained:
    fit, unfit = training.fit_to_stage, training.unfit
    seen: dict[str, Any] = {}

    def snapshot(model: Any) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def fit_and_look(model: Any, *arguments: Any) -> Stage:
        fitted = fit(model, *arguments)
        seen["first"], seen["mask_row"] = snapshot(model), model.config.mask_token_id
        return fitted

    def look_and_unfit(model: Any, *arguments: Any) -> None:
        seen["last"] = snapshot(model)
        seen["trainable"] = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        unfit(model, *arguments)

    with patch.context() as inner:
        inner.setattr(training, "fit_to_stage", fit_and_look)
        inner.setattr(training, "unfit", look_and_unfit)
        written = run(start, recipe, directory)
    return Trained(read=weights_of(start), written=weights_of(written), **seen)


def names_of(weights: dict[str, torch.Tensor], *parts: str) -> set[str]:
    return {name for name in weights if name.startswith(parts)}


def reached_connector(trained: Trained, model_type: str) -> set[str]:
    """The connector's tensors, or none of them where two layers of window 10 see too few tokens back to reach the image."""
    return set() if model_type == "mistral" else names_of(trained.read, "connector.")


def table_of(trained: Trained) -> str:
    """The name of the embedding table."""
    return next(name for name in trained.read if name.endswith((".embed_tokens.weight", ".wte.weight")))


def changed_rows(trained: Trained) -> list[int]:
    table = table_of(trained)
    return (trained.read[table] != trained.written[table]).any(1).nonzero()[:, 0].tolist()


def test_align_moves_the_connector_alone(
    prepared: Callable[[str], Path], shapes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = stage_recipe(shapes["align"], objective={"kind": "ar"}, trainable={"connector": 1e-3}, steps=2)
    trained = watch(prepared("llama"), recipe, tmp_path / "run", monkeypatch)
    assert trained.changed == trained.moved == trained.trainable == names_of(trained.read, "connector.")


@pytest.mark.parametrize("model_type", trunks())
def test_diffuse_moves_all_but_the_tower(
    model_type: str, prepared: Callable[[str], Path], shapes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trained = watch(prepared(model_type), stage_recipe(shapes["train"], steps=2), tmp_path / "run", monkeypatch)
    connector = reached_connector(trained, model_type)
    assert trained.trainable == names_of(trained.first, "connector.", "language_model.") | {"mask_row"}
    assert trained.moved == connector | names_of(trained.first, "language_model.") | {"mask_row"}
    assert trained.changed == connector | names_of(trained.read, "language_model.")
    assert trained.mask_row in changed_rows(trained)


def test_a_trained_tower_moves_as_far_as_it_is_used(
    prepared: Callable[[str], Path], shapes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Features are taken from the last layer but one, so the last layer and what follows it get no gradient."""
    recipe = stage_recipe(shapes["train"], trainable={"tower": 1e-3}, steps=2)
    trained = watch(prepared("llama"), recipe, tmp_path / "run", monkeypatch)
    unused = ("encoder.layers.2.", "post_layernorm.", "head.")
    unused = names_of(trained.read, *(f"vision_tower.{name}" for name in unused))
    assert len(unused) > 20
    assert trained.changed == trained.moved == trained.trainable - unused == names_of(trained.read, "vision_tower.") - unused


def test_the_mask_row_moves_alone(
    prepared: Callable[[str], Path], shapes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = stage_recipe(shapes["train"], trainable={"mask_row": 1e-3, "connector": 1e-3}, steps=2)
    trained = watch(prepared("llama"), recipe, tmp_path / "run", monkeypatch)
    assert trained.moved == trained.trainable == names_of(trained.read, "connector.") | {"mask_row"}
    assert trained.changed == names_of(trained.read, "connector.") | {table_of(trained)}
    assert changed_rows(trained) == [trained.mask_row]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # peft on gpt2's Conv1D: it sets it right
@pytest.mark.parametrize("model_type", trunks())
def test_lora_moves_adapters_connector_and_mask_row(
    model_type: str, prepared: Callable[[str], Path], shapes: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = stage_recipe(shapes["train"], lora={"rank": 2, "alpha": 4}, steps=3)
    trained = watch(prepared(model_type), recipe, tmp_path / "run", monkeypatch)
    adapters = {name for name in trained.first if "lora_" in name}
    connector = reached_connector(trained, model_type)
    assert trained.trainable == adapters | names_of(trained.first, "connector.") | {"mask_row"}
    # Before merging: every adapter has moved, and no weight of the trunk below them.
    assert trained.moved == adapters | connector | {"mask_row"}
    # After: the adapted weights have, and of the embedding table the mask row.
    plain = {name.replace(".base_model.model.", ".") for name in adapters}
    adapted = {f"{name.split('.lora_')[0]}.weight" for name in plain}
    assert trained.changed == adapted | connector | {table_of(trained)}
    assert changed_rows(trained) == [trained.mask_row]
