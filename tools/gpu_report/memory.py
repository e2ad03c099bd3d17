"""The plan of a training step's memory against its peak: what `diffvl convert --dry-run --measure` says of a random model."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from diffvl.demo import standins
from diffvl.demo.shapes import write_shapes
from tools.gpu_report.parts import ROOT

# About 0.4 B parameters: enough for weights, gradients and the optimiser to outweigh what any process holds.
WIDTHS = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
MAX_LENGTH = 512  # tokens: the context of the stand-in
STAGES = {"align": "align", "diffuse": "train"}  # stage -> split of the built-in images


def main(arguments: list[str] | None = None) -> None:
    """Prints one JSON object: the command's settings, and its lines."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_report.memory", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model on the CPU")
    quick = parser.parse_args(arguments).quick
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_shapes(folder / "data", align=4, train=16, test=2)
        trunk = make_trunk(folder / "trunk", quick)
        settings = [f"prepare.vision_tower={standins.make_tower(folder / 'tower')}"]
        for stage, split in STAGES.items():
            values = {"data.train": data[split], "epochs": "null", "steps": 2, "batch_size": 2 if quick else 8}
            values |= {"accumulation": 1, "data.workers": 0, "data.max_length": MAX_LENGTH}
            settings += [f"stages.{stage}.{key}={value}" for key, value in values.items()]
        words = ["convert", trunk, "--recipe", "llava", "--out", folder / "out", "--dry-run", "--measure"]
        program = [sys.executable, "-m", "diffvl.cli", *words, *(word for one in settings for word in ("--set", one))]
        environment = {**os.environ, "COLUMNS": "200"}
        done = subprocess.run(
            [*map(str, program)], cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace", check=False, env=environment
        )
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        lines = [line.replace(name, "") for line in (done.stdout + done.stderr).splitlines()]
    print(json.dumps({"widths": "tiny" if quick else WIDTHS, "lines": lines}))


def make_trunk(directory: Path, quick: bool) -> Path:
    """Writes a random trunk, as wide as WIDTHS unless it is to be tiny."""
    standins.make_trunk(directory, "qwen2")
    if not quick:
        config = AutoConfig.from_pretrained(directory)
        for name, value in {**WIDTHS, "num_key_value_heads": 8, "layer_types": ["full_attention"] * 24}.items():
            setattr(config, name, value)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


if __name__ == "__main__":
    main()
