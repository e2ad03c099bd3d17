"""Weights as they are loaded: every number is finite, and a table that is shorter than the tokenizer grows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import broken_checkpoints as made
import pytest
import torch
from broken_checkpoints import broken
from helpers import QUIET
from tiny_runs import Workshop, workshop
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffvl.config.resolve import resolve
from diffvl.errors import CheckpointError, UnsupportedModelError
from diffvl.prepare.attention_proof import check_block_attention
from diffvl.prepare.run import prepare
from diffvl.prepare.source import Source
from diffvl.store.checkpoint import load_checkpoint, read_state
from diffvl.store.published import load_config
from diffvl.store.weights import check_trunk, load_tower, tower_config

Change = Callable[[Path], Any]


@pytest.fixture
def convert(source: Callable[[str], Path], tower: Path, shapes: dict[str, Path], tmp_path: Path) -> Workshop:
    return workshop(source, tower, shapes, tmp_path)


# --- numbers that are none -------------------------------------------------------------------------------------------------


def spoilt(name: str, value: float) -> Change:
    """One number of one tensor, in a row that no probe asks for."""

    def change(content: made.Tensors) -> made.Tensors:
        content[name].view(-1)[-1] = value
        return content

    return made.tensors(change)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.embed_tokens.weight", float("nan")),
        ("model.layers.1.mlp.down_proj.weight", float("inf")),
        ("model.norm.weight", float("-inf")),
    ],
)
def test_one_number_that_is_none_is_named(name: str, value: float, convert: Workshop, tmp_path: Path):
    model = broken(convert.trunk, tmp_path / "model", spoilt(name, value))
    says = [f"{model}: {name} has 1 values that are nan or infinite, the first at [", "every weight must be a finite number"]
    convert.refuses(model=model, says=says)


def test_a_tower_with_a_number_that_is_none(tower: Path, tmp_path: Path):
    bad = broken(tower, tmp_path / "bad", spoilt("embeddings.position_embedding.weight", float("nan")))
    with pytest.raises(CheckpointError, match=r"bad: embeddings.position_embedding.weight has 1 values .* at \[15, 31\]"):
        load_tower(str(bad), tower_config(str(bad), False))


def test_the_proof_itself_passes_no_nan(source: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    """Were the weights not looked at: a comparison with nan must not pass."""
    trunk: Any = AutoModelForCausalLM.from_pretrained(source("llama"))
    with torch.no_grad():
        trunk.model.norm.weight[0] = float("nan")
    with pytest.raises(UnsupportedModelError, match="with explicit masks the logits differ from its own by nan std"):
        check_block_attention(trunk, 260, 261)


# --- more tokens than rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [1, 64])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_tokens_beyond_the_table_get_rows_at_the_mean(
    model_type: str, more: int, source: Callable[[str], Path], tower: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """llama's head is tied, qwen2's is not; qwen2 has 16 spare rows, which are filled up first."""
    before: Any = AutoModelForCausalLM.from_pretrained(source(model_type))
    rows = before.config.vocab_size
    model = broken(source(model_type), tmp_path / "model", lambda folder: None)
    tokenizer = AutoTokenizer.from_pretrained(model)
    spare = rows - len(tokenizer)
    tokenizer.add_tokens([f"word{number}" for number in range(spare + more)])
    tokenizer.save_pretrained(model)
    check_trunk(str(model), load_config(str(model), False))
    recipe = resolve({"stages": {"align": {"objective": {"kind": "ar"}, "trainable": {"connector": 1e-3}, "steps": 1}}}, [], "")
    prepared = prepare(Source(str(model), None, str(tower)), recipe, tmp_path / "out", QUIET)
    assert (
        f"its tokenizer has {rows + more:,} tokens, its table {rows:,} rows; the {more:,} missing rows are added" in caplog.text
    )
    model_after, processor = load_checkpoint(prepared)
    after: Any = model_after
    assert len(processor.tokenizer) == after.config.text_config.vocab_size == rows + more + 2
    for table, old in (
        (after.get_input_embeddings(), before.get_input_embeddings()),
        (after.get_output_embeddings(), before.get_output_embeddings()),
    ):
        assert torch.equal(table.weight[:rows], old.weight)
        torch.testing.assert_close(table.weight[rows:], old.weight.mean(0).expand(more + 2, -1))
    assert read_state(prepared)["proofs"]["ar_parity"] < 1e-4


# --- small files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", ["</s>", [1, "2"], -1, True, 1.5])
def test_a_stop_token_that_is_no_id_is_told(ids: Any, source: Callable[[str], Path], tmp_path: Path):
    model = broken(source("llama"), tmp_path / "model", made.beside("generation_config.json", eos_token_id=ids))
    with pytest.raises(
        CheckpointError, match="generation_config.json: eos_token_id is .*; expected a token id or a list of them"
    ):
        load_config(str(model), False)


def test_a_diffvl_directory_whose_configuration_asks_for_another_shape(prepared: Callable[[str], Path], tmp_path: Path):
    bad = broken(prepared("llama"), tmp_path / "bad", lambda folder: None)
    config = json.loads((bad / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["intermediate_size"] += 32
    (bad / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="bad: the weights do not fit the configuration: .*mlp.up_proj.weight"):
        load_checkpoint(bad)


def test_a_file_is_not_a_model(source: Callable[[str], Path]):
    file = source("llama") / "model.safetensors"
    with pytest.raises(CheckpointError, match="expected a directory with config.json and weights, or a .gguf file"):
        load_config(str(file), False)
