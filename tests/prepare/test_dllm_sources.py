"""A diffusion language model as MODEL: what `prepare` proves, keeps and records, and that none of its code runs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import broken_checkpoints as made
import pytest
import torch
from broken_checkpoints import broken
from helpers import QUIET, weights_of
from safetensors.torch import load_file

from diffvl.config.families import diffusion_source
from diffvl.config.resolve import find_recipe, read_yaml, resolve
from diffvl.demo.standin_dllms import DLLMS, MASK
from diffvl.doctor.doctor import examine
from diffvl.errors import CheckpointError
from diffvl.hub.layout_diffvl import Layout
from diffvl.prepare import assemble
from diffvl.prepare.parity import Parity
from diffvl.prepare.run import prepare
from diffvl.prepare.source import Source
from diffvl.store.checkpoint import load_checkpoint, read_state
from diffvl.store.files import read_json

RECIPE = resolve(read_yaml(find_recipe("dllm")), [], "dllm")
RAISES = "raise AssertionError('code of the checkpoint was run')\n"
CODE = ("configuration_own.py", "modeling_own.py", "tokenization_own.py")

KINDS = [pytest.param(one, marks=pytest.mark.slow if one == "sdar_moe" else ()) for one in DLLMS]


@pytest.fixture(scope="module")
def ready(dllm: Callable[[str], Path], tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Model type -> what `prepare` writes, of a checkpoint whose code must not run."""

    @cache
    def make(model_type: str) -> Path:
        folder = tmp_path_factory.mktemp("ready")
        model = broken(dllm(model_type), folder / "model", lambda copy: [(copy / name).write_text(RAISES) for name in CODE])
        return prepare(Source(str(model), None, str(tower)), RECIPE, folder / "out", QUIET)

    return make


@pytest.mark.parametrize("model_type", KINDS)
def test_what_is_proven_has_the_name_of_what_was_compared(model_type: str, ready: Callable[[str], Path]):
    state = read_state(ready(model_type))
    name = "block_parity" if model_type.startswith("sdar") else "bidirectional_parity"
    assert set(state["proofs"]) == {name, "block"} and all(error <= 1e-5 for error in state["proofs"].values())
    assert state["parity_with"].startswith(f"the {model_type} checkpoint's tensors in a stock ")
    assert state["parity_with"].endswith("its own code was not run")


@pytest.mark.parametrize("model_type", KINDS)
def test_decoding_is_recorded_as_the_source_was_trained(model_type: str, ready: Callable[[str], Path]):
    config = load_checkpoint(ready(model_type))[0].config
    blocks = model_type.startswith("sdar")
    assert (config.decoding, config.context) == ("blocks", "block")
    assert config.target == ("shift" if model_type == "Dream" else "same")
    assert (config.block_size, config.grid) == ((4, "absolute") if blocks else (32, "response"))
    source = diffusion_source(config.text_config)
    assert source is not None and source.model_type == model_type and source.mask_token_id == config.mask_token_id


@pytest.mark.parametrize("model_type", KINDS)
def test_the_mask_token_is_its_own_and_its_row_is_untouched(
    model_type: str, dllm: Callable[[str], Path], ready: Callable[[str], Path]
):
    model, processor = load_checkpoint(ready(model_type))
    mask = model.config.mask_token_id
    assert processor.tokenizer.mask_token == MASK[model_type] and processor.tokenizer.mask_token_id == mask
    own = load_file(dllm(model_type) / made.WEIGHTS)
    names = ("model.transformer.wte.weight", "model.transformer.ff_out.weight") if model_type == "llada" else None
    names = names or ("model.embed_tokens.weight", "lm_head.weight")
    written = weights_of(ready(model_type))
    for there, here in zip(names, ("model.embed_tokens.weight", "lm_head.weight"), strict=True):
        before, after = own[there], written[f"language_model.{here}"]
        image = model.config.image_token_id
        kept = [row for row in range(len(before)) if row != image]
        assert mask in kept and torch.equal(after[kept], before[kept])


@pytest.mark.parametrize("model_type", KINDS)
def test_what_is_written_names_no_code_but_ours(model_type: str, ready: Callable[[str], Path]):
    """The published tokenizers name classes of their own, which do not lie beside our checkpoint."""
    for file in ready(model_type).glob("*.json"):
        content = read_json(file)
        maps = [part["auto_map"] for part in (content, content.get("text_config") or {}) if "auto_map" in part]
        assert all(name.partition(".")[0].endswith("_diffvl") for found in maps for name in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("model_type", DLLMS)
def test_it_loads_and_answers_without_diffvl(model_type: str, ready: Callable[[str], Path], tmp_path: Path):
    program = (
        "import sys; from transformers import AutoModelForImageTextToText as M, AutoProcessor as P; d = sys.argv[1]; "
        "p = P.from_pretrained(d, trust_remote_code=True); m = M.from_pretrained(d, trust_remote_code=True); "
        "i = p.apply_chat_template([{'role': 'user', 'content': 'hi'}], tokenize=True, add_generation_prompt=True); "
        "print(m.generate(**i, max_new_tokens=8).shape, 'diffvl' in sys.modules)"
    )
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [sys.executable, "-c", program, str(ready(model_type))]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=variables, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip().endswith("False"), done.stderr


def test_the_trunk_is_stock_under_its_own_names(ready: Callable[[str], Path]):
    names = weights_of(ready("llada"))
    assert "language_model.model.layers.0.mlp.gate_proj.weight" in names and not any("transformer" in name for name in names)
    assert json.loads((ready("llada") / "config.json").read_text(encoding="utf-8"))["text_config"]["model_type"] == "llama"


@pytest.mark.parametrize("model_type", ["llada", "sdar"])
def test_a_prepared_model_that_differs_is_caught(
    model_type: str, dllm: Callable[[str], Path], tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A mask row that was initialised anew, as that of an AR model is, shows in the proof; so does another attention."""
    whole: Any = assemble.grow_table

    def forgetful(trunk: Any, known: int, tokens: int, new_ids: list[int]) -> None:
        whole(trunk, known, tokens, new_ids)
        with torch.no_grad():
            trunk.get_input_embeddings().weight[diffusion_source(trunk.config).mask_token_id] = 0.0  # type: ignore[union-attr]

    monkeypatch.setattr(assemble, "grow_table", forgetful)
    source = Source(str(dllm(model_type)), None, str(tower))
    with pytest.raises(CheckpointError, match="parity fails, logits differ from the source's by"):
        prepare(source, RECIPE, tmp_path / "out", QUIET)
    monkeypatch.undo()
    monkeypatch.setattr(Parity, "prepared_logits", torch.no_grad()(lambda self, model, ids: model(ids).logits))
    with pytest.raises(CheckpointError, match="parity fails, logits differ from the source's by"):
        prepare(source, RECIPE, tmp_path / "out", QUIET)
    assert not any(tmp_path.iterdir())


def test_the_source_sees_what_it_was_trained_on():
    """All tokens, or all up to the end of the own block."""
    ids = torch.zeros(1, 10, dtype=torch.long)
    seen = {}
    for size in (None, 4):
        parity = Parity(diffusion_source({"diffusion_source": {**FACTS, "block_size": size}}))
        block = parity.block(ids)
        one = torch.ones_like(ids)
        layout = Layout(
            position=torch.arange(10)[None], block=block, noisy=0 * one, valid=one > 0, document=0 * one, context="block"
        )
        seen[size] = layout.allowed()[0].sum(1).tolist()
    assert seen == {None: [10] * 10, 4: [4] * 4 + [8] * 4 + [10] * 2}


FACTS = {"model_type": "sdar", "mask_token_id": 3, "target": "same"}


# --- the mask token ----------------------------------------------------------------------------------------------------------


def mask_row(row: int) -> Callable[[Path], Any]:
    return made.config(mask_token_id=row)


WRONG_MASK: list[tuple[str, Callable[[Path], Any], str]] = [
    ("llada", mask_row(100_000), "its mask token is row 100000 of the embedding, which has 289 rows"),
    ("llada", mask_row(66), "row 66, the mask token, is 'c' in its tokenizer, a piece of ordinary text"),
    ("llada", mask_row(280), "its tokenizer has no token for row 280, the mask token by its config.json"),
    ("Dream", mask_row(267), "its tokenizer calls '<|mask|>' (268) the mask token, but the model was trained with row 267"),
]


@pytest.mark.parametrize(("model_type", "change", "says"), WRONG_MASK)
def test_a_mask_token_that_cannot_be(
    model_type: str, change: Callable[[Path], Any], says: str, dllm: Callable[[str], Path], tower: Path, tmp_path: Path
):
    model = broken(dllm(model_type), tmp_path / "model", change)
    with pytest.raises(CheckpointError) as refused:
        prepare(Source(str(model), None, str(tower)), RECIPE, tmp_path / "out", QUIET)
    assert says in str(refused.value) and not (tmp_path / "out").exists()


def test_a_mask_row_beyond_the_tokenizer_gets_its_name(dllm: Callable[[str], Path], tower: Path, tmp_path: Path):
    """The released SDAR tokenizers know it, others may not. The rows up to it are named as reserved; none is initialised."""

    def nameless(model: Path) -> None:
        settings = read_json(model / "tokenizer_config.json")
        del settings["mask_token"], settings["added_tokens_decoder"]["268"]
        (model / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")

    model = broken(dllm("sdar"), tmp_path / "model", made.both(nameless, mask_row(275)))
    out = prepare(Source(str(model), None, str(tower)), RECIPE, tmp_path / "out", QUIET)
    tokenizer = load_checkpoint(out)[1].tokenizer
    assert tokenizer.convert_ids_to_tokens([274, 275]) == ["<|reserved_274|>", "<|MASK|>"] and tokenizer.mask_token_id == 275
    before, after = load_file(model / made.WEIGHTS)["model.embed_tokens.weight"], weights_of(out)
    assert torch.equal(after["language_model.model.embed_tokens.weight"][:276], before[:276])


# --- doctor ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", KINDS)
def test_the_doctor_judges_it(model_type: str, dllm: Callable[[str], Path]):
    verdict = examine(str(dllm(model_type)))
    assert (verdict.answer, verdict.model_type) == ("supported", model_type) and verdict.worst_error is not None
    assert verdict.reason.startswith("a diffusion language model, read as a stock ") and verdict.attention_holds


def test_the_doctor_says_why_not(dllm: Callable[[str], Path], tmp_path: Path):
    verdict = examine(str(broken(dllm("llada"), tmp_path / "a", made.config(alibi=True))))
    assert verdict.answer == "not supported" and "alibi True (expected False)" in verdict.reason
    verdict = examine(str(broken(dllm("llada"), tmp_path / "b", made.without(made.WEIGHTS))))
    assert verdict.answer == "supported" and "only the architecture was judged" in verdict.reason
    verdict = examine(str(broken(dllm("sdar"), tmp_path / "c", made.config(model_type="sdarv"))))
    assert verdict.answer == "not supported" and "SDAR-VL" in verdict.reason
