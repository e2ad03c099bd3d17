"""Ways in which a published checkpoint can be wrong, each made in a few lines from a stand-in: what several tests take apart."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

Tensors = dict[str, torch.Tensor]
WEIGHTS = "model.safetensors"


def edit_json(file: Path, **settings: Any) -> None:
    """Sets keys of a JSON file, which is made if it is not there; None stays None."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**content, **settings}), encoding="utf-8")


def config(**settings: Any) -> Callable[[Path], Any]:
    return lambda model: edit_json(model / "config.json", **settings)


def tensors(change: Callable[[Tensors], Tensors]) -> Callable[[Path], Any]:
    """Writes the weights anew, changed."""

    def edit(model: Path) -> None:
        content = {name: tensor.clone() for name, tensor in load_file(model / WEIGHTS).items()}
        save_file(change(content), model / WEIGHTS, metadata={"format": "pt"})

    return edit


def beside(name: str, **settings: Any) -> Callable[[Path], Any]:
    """A JSON file beside the weights."""
    return lambda model: edit_json(model / name, **settings)


def instead(content: bytes, name: str = WEIGHTS) -> Callable[[Path], Any]:
    """Other bytes under the name of a file."""
    return lambda model: (model / name).write_bytes(content)


def without(*names: str) -> Callable[[Path], Any]:
    return lambda model: [(model / name).unlink() for name in names]


def both(*changes: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda model: [change(model) for change in changes]


def short(by: int, name: str = WEIGHTS) -> Callable[[Path], Any]:
    """Leaves out the last bytes of a file."""
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:-by])


def sharded(model: Path) -> list[Path]:
    """The same weights in several files with an index."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    (model / WEIGHTS).unlink()
    loaded.save_pretrained(model, max_shard_size="100KB")
    return sorted(model.glob("model-*.safetensors"))


def in_shards(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """A change of the second of several shards, given as a file."""
    return lambda model: change(sharded(model)[1])


def pickled(model: Path) -> None:
    """As checkpoints were published once: pytorch_model.bin alone."""
    content = load_file(model / WEIGHTS)
    (model / WEIGHTS).unlink()
    torch.save(content, model / "pytorch_model.bin")


def adapter_alone(model: Path) -> None:
    """What peft writes: no config.json, no whole weights."""
    for name in ("config.json", WEIGHTS):
        (model / name).unlink()
    beside("adapter_config.json", peft_type="LORA", base_model_name_or_path="someone/base")(model)
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, model / "adapter_model.safetensors")


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own-llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
REMOTE_NAMES = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}


def own_code(model_type: str) -> Callable[[Path], Any]:
    """A checkpoint that brings its model class along."""

    def edit(model: Path) -> None:
        (model / "own.py").write_text(REMOTE, encoding="utf-8")
        edit_json(model / "config.json", model_type=model_type, auto_map=REMOTE_NAMES)

    return edit


def broken(model: Path, to: Path, change: Callable[[Path], Any]) -> Path:
    """A copy of a checkpoint, changed."""
    shutil.copytree(model, to)
    change(to)
    return to
