"""The memory that a plan tells, held against real steps of the same stage: within 20 %, the margin that it tells too."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from helpers import stage_recipe
from measured_process import resized
from processes import on_processes
from tiny_runs import record, write_data

from diffvl.config.resolve import dump
from diffvl.data.loader import load_data
from diffvl.estimate.machine import Machine
from diffvl.estimate.memory import MARGIN
from diffvl.estimate.meter import memory_meter
from diffvl.estimate.outlook import Start, look_ahead

WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 8192}
# Name -> sizes of the trunk, settings of the stage, processes.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "logits and activations": ({**WIDE, "intermediate_size": 1024, "num_hidden_layers": 3}, {"batch_size": 4}, 1),
    "checkpointed, LoRA": (
        {**WIDE, "intermediate_size": 1536, "num_hidden_layers": 6, "vocab_size": 4096},
        {"batch_size": 5, "gradient_checkpointing": True, "lora": {"rank": 8}},
        1,
    ),
    "in parts over two": (
        {**WIDE, "intermediate_size": 2048, "num_hidden_layers": 6},
        {"sharding": "full", "batch_size": 2, "accumulation": 2},
        2,
    ),
}
SENTENCE = "A red dot on white. "


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("long"), *(record(answer=SENTENCE * 12) for _ in range(20)))


@pytest.mark.skipif(not memory_meter(torch.device("cpu")).works, reason="no peak of memory here")
@pytest.mark.parametrize("name", SHAPES)
def test_the_plan_is_within_its_margin(
    name: str, prepared: Callable[[str], Path], data: Path, forks: Forks, tmp_path: Path
) -> None:
    sizes, settings, processes = SHAPES[name]
    recipe = stage_recipe(data, **settings)
    stage = recipe.stages["diffuse"]
    config, processor = resized(prepared("llama"), sizes)
    opened = load_data(stage.data, processor, None)
    stage = stage.model_copy(update={"data": stage.data.model_copy(update={"max_length": longest(opened)})})
    machine = Machine(processes, 10**12, is_gpu=False)
    planned = look_ahead(Start(config, torch.float32, processor, 0), stage, opened, machine).memory[0][1].total

    (tmp_path / "recipe.yaml").write_text(dump(recipe))
    words = (prepared("llama"), tmp_path / "recipe.yaml", json.dumps(sizes), tmp_path / "peak")
    ended = on_processes(forks, tmp_path, "measured", words, processes)
    assert [one.code for one in ended] == [0] * processes, ended[0].err
    measured = max(json.loads((tmp_path / f"peak.{rank}.json").read_text()) for rank in range(processes))
    print(f"{name}: planned {planned / 2**20:.0f} MiB, measured {measured / 2**20:.0f}: {planned / measured - 1:+.1%}")
    assert abs(planned / measured - 1) <= MARGIN


def longest(data: Any) -> int:
    return max(len(sample.ids) for place in range(len(data.train)) for sample in data.train[place])
