"""What a plan says of a stage: records, steps and tokens as training has them; memory that follows what is changed; remedies."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import stage_recipe, trained_on
from tiny_runs import record, write_data

from diffvl.config.families import all_families
from diffvl.config.recipe import Recipe, Stage
from diffvl.config.resolve import resolve
from diffvl.data.loader import load_data
from diffvl.data.samples import Sample, collate
from diffvl.errors import UsageError
from diffvl.estimate.batches import count_tokens, longest, made_up
from diffvl.estimate.describe import config_by_sizes, described_by_sizes
from diffvl.estimate.empty import empty_model
from diffvl.estimate.machine import Machine, machine_of
from diffvl.estimate.outlook import Start, look_ahead, parameters_of
from diffvl.store.checkpoint import load_description

ONE, TWO = Machine(1, 10**10, is_gpu=False), Machine(2, 10**10, is_gpu=False)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    answers = ["Red. " * (1 + number % 4) for number in range(9)]
    folder = tmp_path_factory.mktemp("records")
    return write_data(
        folder, *(record(answer=text) if number % 3 else record(None, "Hm?", text) for number, text in enumerate(answers))
    )


def start_of(directory: Path) -> Start:
    config, processor = load_description(directory)
    return Start(config, torch.float32, processor, 0)


def look(directory: Path, data: Path, machine: Machine = ONE, **settings: Any) -> Any:
    start, stage = start_of(directory), stage_recipe(data, **settings).stages["diffuse"]
    return look_ahead(start, stage, load_data(stage.data, start.processor, None), machine)  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "qwen2_5_vl"])
def test_steps_and_tokens_are_those_of_training(model_type: str, prepared: Callable[[str], Path], data: Path) -> None:
    """Nine rows in steps of four in each of two processes; every token of the data is counted once."""
    trains = {"trunk": 1e-3, "mask_row": 1e-3}
    outlook = look(prepared(model_type), data, TWO, accumulation=2, steps=None, epochs=2, trainable=trains)
    assert (outlook.records, outlook.rows_per_step, outlook.steps) == (9, 8, 4)
    start = start_of(prepared(model_type))
    stage = stage_recipe(data).stages["diffuse"]
    assert start.processor is not None
    rows = trained_on(load_data(stage.data, start.processor, None))
    lengths = [len(one.ids) for place in range(len(rows)) for one in rows[place] if isinstance(one, Sample)]
    told = (outlook.tokens.clean + outlook.tokens.image) / outlook.rows_per_step
    assert told == pytest.approx(sum(lengths) / len(lengths), rel=0.35)  # the rows looked at are not all of them, equally often
    assert outlook.tokens.noisy > 0 and outlook.tokens.image > 0 and outlook.flops > 0
    assert outlook.memory and all(memory.total > 0 for _, memory in outlook.memory), outlook.why_uncounted


@pytest.mark.parametrize(("model_type", "forwards"), [("llama", "auto"), ("qwen2_5_vl", "one")])
def test_a_stage_of_drafts_is_planned(model_type: str, forwards: str, prepared: Callable[[str], Path], data: Path) -> None:
    """Over a trunk that does not train: what is written, and what AdamW holds, are adapters and a row alone."""
    objective = {"kind": "draft", "block_size": 3, "drafts": 2, "forwards": forwards}
    settings = {"objective": objective, "trainable": {"trunk": 1e-3, "mask_row": 1e-3}, "lora": {"rank": 2}}
    outlook = look(prepared(model_type), data, **settings)
    assert not outlook.why_uncounted and outlook.flops > 0
    own, other = (memory for _, memory in outlook.memory)
    assert 0 < outlook.written * 2 == own.optimiser < own.weights and own.activations >= other.activations > 0
    assert outlook.tokens.noisy > outlook.tokens.predicted > 0 <= outlook.tokens.padding


def test_memory_follows_what_is_changed(prepared: Callable[[str], Path], data: Path) -> None:
    outlook = look(prepared("llama"), data, TWO, sharding="full")
    found = {variant.told: memory for variant, memory in outlook.memory}
    whole, own, lora = found["not in parts"], found["as it is"], found["with LoRA"]
    assert whole.weights == 2 * own.weights or whole.weights == 2 * own.weights + 1
    assert whole.optimiser in (2 * own.optimiser, 2 * own.optimiser + 1)
    assert lora.optimiser < own.optimiser and lora.gradients < own.gradients
    assert found["with checkpointing"].activations < own.activations
    # 4 bytes of weight and 8 of moments for each trained parameter.
    trained = outlook.checkpoint // 12
    assert whole.optimiser == 8 * trained and outlook.written == 4 * parameters_of(start_of(prepared("llama")))


def test_an_unshared_step_counts_every_gradient(prepared: Callable[[str], Path], data: Path) -> None:
    """With two micro-steps all gradients are there while the second one's activations are."""
    one, two = (look(prepared("llama"), data, accumulation=number).memory[0][1] for number in (1, 2))
    assert two.gradients >= one.gradients and two.total > one.total
    assert two.gradients == two.optimiser // 2


def test_the_smallest_change_that_fits(prepared: Callable[[str], Path], data: Path) -> None:
    outlook = look(prepared("llama"), data, batch_size=4)
    own, checkpointed = outlook.memory[0][1], outlook.memory[1][1]
    assert outlook.fits(ONE) and outlook.remedy is None
    between = replace(ONE, memory=(own.most + checkpointed.most) // 2)
    remedied = look(prepared("llama"), data, between, batch_size=4)
    assert not remedied.fits(between) and remedied.remedy is not None
    assert remedied.remedy[0].settings == ("gradient_checkpointing=true",)
    assert remedied.remedy[1].most <= between.memory


def test_what_nothing_makes_fit(prepared: Callable[[str], Path], data: Path) -> None:
    tiny = replace(ONE, memory=1000)
    hopeless = look(prepared("llama"), data, tiny, batch_size=4)
    assert hopeless.remedy is None and not hopeless.fits(tiny)


def test_the_longest_batch_is_as_long_as_may_come(prepared: Callable[[str], Path], data: Path) -> None:
    for row_length in (None, 600):
        stage = stage_recipe(data, row_length=row_length).stages["diffuse"]
        start = start_of(prepared("llama"))
        assert start.processor is not None
        opened = load_data(stage.data, start.processor, None)
        train = opened.train if row_length is None else opened.train.packed(row_length, 0)
        batch = collate([train[0], train[1]] if row_length is None else [train[0]], pad_token_id=0)
        stretched = longest([batch], stage)
        per_row = torch.zeros(int(stretched["row"].max()) + 1, dtype=torch.long).index_add_(
            0, stretched["row"], stretched["valid"].sum(1)
        )
        assert per_row.tolist() == [row_length or stage.data.max_length] * len(per_row)
        assert stretched["pixels"] is batch["pixels"]
        model = empty_model(start.config, stage, 0, torch.float32, CPU)
        assert count_tokens(model, stage, stretched).total > count_tokens(model, stage, batch).total


# --- without a connection ----------------------------------------------------------------------------------------------------


def named() -> list[tuple[str, str]]:
    return [(family.model_type, name) for family in all_families() for name, one in family.checkpoints.items() if one.sizes]


@pytest.mark.parametrize(("family", "name"), named())
def test_known_sizes_give_the_parameters_that_are_known(family: str, name: str) -> None:
    checkpoint = {one.model_type: one for one in all_families()}[family].checkpoints[name]
    recipe = Recipe.model_validate(
        {"stages": {"align": {"objective": {"kind": "ar"}, "trainable": {"connector": 1e-3}, "steps": 1}}}
    )
    config = config_by_sizes(family, checkpoint)
    whole = described_by_sizes(config, checkpoint.vision_tower, recipe)
    tower = parameters_of(Start(whole, torch.bfloat16, None, 0)) / 1e9 - (checkpoint.parameters or 0)
    # SigLIP so400m without its head, and a connector that grows with the trunk.
    assert 0.4 < tower < 0.47


def test_a_made_up_batch_has_as_many_image_tokens_as_tiles_may_give() -> None:
    family = {one.model_type: one for one in all_families()}["qwen2"].checkpoints["qwen2.5-0.5b"]
    tiled = {"kind": "anyres", "grids": ["1x1-6x6"], "max_tiles": 4}
    recipe = resolve(
        {
            "prepare": {"tiling": tiled},
            "stages": {"diffuse": {"objective": {"kind": "block_diffusion"}, "trainable": {"connector": 1e-3}, "steps": 1}},
        },
        ["stages.diffuse.data.max_length=8192"],
        "test",
    )
    config = described_by_sizes(config_by_sizes("qwen2", family), family.vision_tower, recipe)
    stage: Stage = recipe.stages["diffuse"]
    (batch,) = made_up(config, stage)
    tokens = int((batch["input_ids"] == config.image_token_id).sum())
    assert config.tiles is not None
    sizes = [(rows * config.tiles.pixels, columns * config.tiles.pixels) for rows, columns in config.tiles.grids]
    assert tokens == max(map(config.tiles.tokens, sizes)) and int(batch["valid"].sum()) == 8192

    def of_length(length: int) -> dict[str, Any]:
        return made_up(config, stage.model_copy(update={"data": stage.data.model_copy(update={"max_length": length})}))[0]

    smaller = of_length(tokens)  # no room for the largest image: for a smaller one
    assert 0.5 * tokens < int((smaller["input_ids"] == config.image_token_id).sum()) < tokens - 40
    short = of_length(300)
    assert "pixels" not in short and int(short["valid"].sum()) == 300


def test_the_machine_to_plan_for() -> None:
    assert machine_of("8x80GB") == Machine(8, 80 * 10**9, is_gpu=True)
    assert machine_of(" 24 gb ") == Machine(1, 24 * 10**9, is_gpu=True)
    assert machine_of(None).processes == 1
    for wrong in ("8x80", "0x80GB", "x80GB", "80MB", "8x0GB", ""):
        with pytest.raises(UsageError, match="expected GPUs"):
            machine_of(wrong)
