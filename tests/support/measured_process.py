"""A process that takes real steps of a stage and tells the most memory that they needed; processes.py starts it."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffvl.config.recipe import Stage
from diffvl.config.resolve import read_yaml, resolve
from diffvl.data.loader import load_data
from diffvl.estimate.meter import memory_meter
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.hub.processing_diffvl import DiffVLProcessor
from diffvl.store.checkpoint import load_description
from diffvl.train.launch import process_state
from diffvl.train.trial import take_steps


def resized(start: Path, sizes: dict[str, Any]) -> tuple[DiffVLConfig, DiffVLProcessor]:
    """The description of a tiny checkpoint, with a trunk of other sizes."""
    config, processor = load_description(start)
    for name, value in sizes.items():
        setattr(config.text_config, name, value)
    return config, processor


def main() -> None:
    """START RECIPE SIZES (JSON) FILE. FILE.RANK.json gets the peak, in bytes over what the process had before the model and after
    a tiny one: what libraries take when they are first used is no part of it."""
    start, recipe, sizes, file = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
    stage: Stage = resolve(read_yaml(recipe), [], "test").stages["diffuse"]
    config, processor = resized(start, sizes)
    data = load_data(stage.data, processor, None)
    rank = process_state().process_index

    def train(described: DiffVLConfig) -> None:
        model = DiffVLForConditionalGeneration(described)
        take_steps(model, model.dtype, "diffuse", stage, 0, data, processor, Console(quiet=True))

    train(load_description(start)[0])
    meter = memory_meter(torch.device("cpu"))
    before = meter.start()
    train(config)
    peak = meter.peak()
    assert before is not None and peak is not None
    Path(f"{file}.{rank}.json").write_text(json.dumps(peak - before), encoding="utf-8")
