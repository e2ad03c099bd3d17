"""What a stage asks of the trunk, and the trunk lacks: told before anything is prepared, also where the stage comes last."""

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from tiny_runs import Workshop, refused, succeed
from transformers import AutoConfig, AutoModelForCausalLM

from diffvl.demo import standins
from diffvl.errors import ConfigError

pytestmark = pytest.mark.usefixtures("offline")


@pytest.mark.parametrize("changes", ["block_size=513", "block_curriculum={0.0: 513, 0.5: 4}"])
def test_a_block_longer_than_the_context(changes: str, convert: Workshop):
    name = changes.partition("=")[0]
    says = [f"diffuse: objective.{name} has blocks of 513 tokens, but this trunk's context has 512 positions: set it lower"]
    convert.refuses("--set", f"stages.diffuse.objective.{changes}", says=says)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes flex_attention")
@pytest.mark.parametrize("name", ["align", "diffuse"])
def test_attention_that_needs_a_gpu(name: str, convert: Workshop):
    says = f"{name}: attention: flex_attention needs a GPU to train (its CPU form has no backward); here: cpu"
    convert.refuses("--set", f"stages.{name}.attention=flex_attention", says=[says])


def test_attention_that_the_architecture_cannot_take(convert: Workshop, tmp_path: Path):
    tokenizer = standins.make_tokenizer()
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global"], 2]]}
    config = AutoConfig.for_model("gpt_neo", **sizes, vocab_size=len(tokenizer), max_position_embeddings=512)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "neo")
    tokenizer.save_pretrained(tmp_path / "neo")
    says = ["diffuse: attention: gpt_neo cannot take tiled: its attention is not pluggable"]
    convert.refuses("--set", "stages.diffuse.attention=tiled", model=tmp_path / "neo", says=says)
    words = ("convert", tmp_path / "neo", "--recipe", convert.recipe, "--out", convert.out, "--dry-run")
    succeed(*words)
    succeed(*words, "--set", "stages.diffuse.attention=eager")


@pytest.mark.parametrize(
    ("targets", "says"), [("nothing", "does not fit this trunk: "), ("(", "does not fit this trunk: missing ), unterminated")]
)
def test_adapters_on_no_layer_of_the_trunk(targets: str, says: str, convert: Workshop):
    says = f"diffuse: lora.targets {targets!r} {says}"
    convert.refuses("--set", f'stages.diffuse.lora={{"rank": 2, "targets": "{targets}"}}', says=[says])


def test_settings_that_a_loaded_model_refuses_may_be_corrected(convert: Workshop, monkeypatch: pytest.MonkeyPatch):
    """What the stage began is gone: it would be taken for an interrupted run, with settings that must not change."""
    words = ("convert", convert.trunk, "--recipe", convert.recipe, "--out", convert.out, "--stage", "align")
    with monkeypatch.context() as patch:
        patch.setattr("diffvl.train.stage.place", Mock(side_effect=ConfigError("no")))
        refused(*words, says=["no"])
    assert [path.name for path in convert.out.iterdir()] == ["prepared"]
    succeed(*words, "--resume", "--set", "stages.align.steps=1")
