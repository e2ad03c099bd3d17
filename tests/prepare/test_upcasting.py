"""Proofs in fp32 on weights in bf16: the same figures as with a copy in fp32, without the copy."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUIET, trunks
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from diffvl.config.resolve import resolve
from diffvl.demo.standin_processors import PROCESSORS
from diffvl.demo.standin_vlms import VLMS
from diffvl.prepare.attention_proof import conversations, native_logits
from diffvl.prepare.run import prepare
from diffvl.prepare.source import Source
from diffvl.prepare.upcasting import in_fp32
from diffvl.store.files import read_json


def dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


@pytest.mark.parametrize("model_type", trunks())
def test_logits_are_those_of_a_copy_in_fp32(model_type: str, source: Callable[[str], Path]):
    """To the bit; in between no more than a layer or a table is in fp32."""
    model: Any = AutoModelForCausalLM.from_pretrained(source(model_type), dtype=torch.bfloat16).eval()
    ids, most = conversations(range(200))[0], []
    numbers = sum(parameter.numel() for parameter in model.parameters())

    def look(*_: Any) -> None:
        most.append(sum(parameter.numel() for parameter in model.parameters() if parameter.dtype == torch.float32))

    hooks = [module.register_forward_pre_hook(look) for module in model.modules()]
    logits = in_fp32(model, lambda: native_logits(model, ids))
    for hook in hooks:
        hook.remove()
    assert torch.equal(logits, native_logits(copy.deepcopy(model).float(), ids))
    assert not torch.equal(logits, native_logits(model, ids)) and dtypes(model) == {torch.bfloat16}
    assert 0 < max(most) < 0.6 * numbers  # of two layers


class Odd(nn.Module):
    """Casts what it is given as a layer's weights lie there, and not as they compute."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        if not given.any():
            raise RuntimeError("no data")
        return self.layers[0](given.to(next(self.parameters()).dtype))


def test_a_model_that_looks_at_dtypes_gets_all_its_weights_in_fp32():
    model, given = Odd().bfloat16(), torch.ones(1, 4)
    assert torch.equal(in_fp32(model, lambda: model(given)), copy.deepcopy(model).float()(given))
    assert dtypes(model) == {torch.bfloat16}


def test_a_failure_leaves_the_model_as_it_was():
    model = Odd().bfloat16()
    with pytest.raises(RuntimeError, match="no data"):
        in_fp32(model, lambda: model(torch.zeros(1, 4)))
    assert dtypes(model) == {torch.bfloat16} and not model.layers[0]._forward_pre_hooks


NATIVE = [name for name in VLMS if name in PROCESSORS]
FEW = ("llama", "qwen2_5_vl")


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in ("llama", "gemma2", "qwen3_moe", *NATIVE)],
)
def test_a_bf16_checkpoint_is_proven_as_one_in_fp32(model_type: str, source: Callable[[str], Path], tower: Path, tmp_path: Path):
    """Parity without any difference: on the written bf16 weights in fp32 arithmetic, images included."""
    start = tmp_path / "source"
    shutil.copytree(source(model_type), start)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(start / "model.safetensors").items()}
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    config = (start / "config.json").read_text(encoding="utf-8").replace('"float32"', '"bfloat16"')
    (start / "config.json").write_text(config, encoding="utf-8")
    stages = {"align": {"objective": {"kind": "ar"}, "trainable": {"trunk": 1e-3}, "steps": 1}}
    origin = Source(str(start), None, None if model_type in VLMS else str(tower))
    out = prepare(origin, resolve({"stages": stages}, [], "test"), tmp_path / "out", QUIET)
    proofs = read_json(out / "diffvl.json")["proofs"]
    assert proofs["ar_parity"] == 0.0 and proofs["block"] < 1e-5, json.dumps(proofs)
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
