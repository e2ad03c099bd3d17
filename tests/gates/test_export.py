"""Export without diffvl: an exported directory loads in a process where diffvl is not installed. There SDAR-VL's calling sequence
gives what our decoder gives, and `generate` answers.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from shared_fixtures import TILED

from diffvl.demo.standins import TRUNKS
from diffvl.hub import modeling_diffvl
from diffvl.hub.decoder_diffvl import BlockDecoder
from diffvl.hub.processing_diffvl import pixels_in
from diffvl.store.checkpoint import HUB_FILES, load_checkpoint, write_checkpoint

BLOCK = 4
EXPORTED = [
    *(pytest.param(one, marks=() if one in ("llama", "gemma2") else pytest.mark.slow) for one in TRUNKS),
    TILED,
]
CLIENT = Path(__file__).parents[1] / "support" / "foreign_client.py"
CHAT = [
    {
        "role": "user",
        "content": [{"type": "image", "image": Image.new("RGB", (40, 40), "red")}, {"type": "text", "text": "What is it?"}],
    }
]


@pytest.fixture(scope="module")
def exported(
    prepared: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Path]:
    """Model type, llama and those that the tests of this session ask for -> a block-diffusion checkpoint as a stage writes it."""
    parameters = [
        vars(item)["callspec"].params for item in request.session.items if item.path == request.path and "callspec" in vars(item)
    ]
    asked = {"llama", *(given["model_type"] for given in parameters if "model_type" in given)}
    directories = {}
    for model_type in sorted(asked & {*TRUNKS, TILED}):
        model, processor = load_checkpoint(prepared(model_type))
        model.config.set_decoding("blocks", BLOCK, "block", "absolute", "same")
        directories[model_type] = tmp_path_factory.mktemp(f"exported-{model_type}")
        write_checkpoint(model, processor, directories[model_type])
    return directories


@pytest.fixture(scope="module")
def visited(
    exported: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[dict[str, Any], torch.Tensor]]:
    """Model type -> facts and logits that the foreign process brought back."""
    out = tmp_path_factory.mktemp("foreign")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = [sys.executable, "-I", str(CLIENT), str(out), *map(str, exported.values())]
    done = subprocess.run(words, cwd=out, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    facts = [json.loads(line) for line in (out / "facts.jsonl").read_text().splitlines()]
    logits = [load_file(out / f"{number}.safetensors")["logits"] for number in range(len(facts))]
    return dict(zip(exported, zip(facts, logits, strict=True), strict=True))


@pytest.mark.parametrize("model_type", EXPORTED)
def test_loads_and_answers_without_diffvl(
    model_type: str, visited: dict[str, tuple[dict[str, Any], torch.Tensor]], exported: dict[str, Path]
):
    facts, _ = visited[model_type]
    assert facts["classes"] == ["DiffVLForConditionalGeneration", "DiffVLForConditionalGeneration", "DiffVLProcessor"]
    assert facts["module"].startswith("transformers_modules.")
    config = load_checkpoint(exported[model_type])[0].config
    assert facts["recorded"] == [[config.mask_token_id, BLOCK]] * 3
    assert 1 <= len(facts["answer"]) <= 12
    assert facts["same"], "AutoModelForCausalLM answers otherwise than AutoModelForImageTextToText"
    assert config.mask_token_id not in facts["answer"]
    assert facts["text"] and facts["mask_token"] and facts["mask_token"] not in facts["text"]


@pytest.mark.parametrize("model_type", EXPORTED)
def test_the_calling_sequence_answers_as_generate_does(model_type: str, visited: dict[str, tuple[dict[str, Any], torch.Tensor]]):
    """SDAR-VL's three strategies with an image and without, at the ends of prompts and blocks, token for token."""
    facts, _ = visited[model_type]
    assert facts["same_inputs"], "the processor called SDAR-VL's way gives other tensors"
    assert len(facts["answers"]) == 2 * 5 * 3
    for found in facts["answers"]:
        assert found["theirs"] == found["ours"], found["case"]
    assert len({tuple(found["ours"]) for found in facts["answers"]}) > 4, "answers that do not differ prove little"


@pytest.mark.parametrize("model_type", EXPORTED)
def test_what_that_caller_may_leave_out_and_load(model_type: str, visited: dict[str, tuple[dict[str, Any], torch.Tensor]]):
    facts, _ = visited[model_type]
    assert facts["refusals"] == [
        f"video is not supported: {name} must be None; give single frames as images"
        for _ in ("forward", "generate")
        for name in ("pixel_values_videos", "image_sizes_videos")
    ]
    (batch, length, _), cached = facts["no_mask"]
    assert batch == 1 and length == cached
    for name, most in (("float32", 1e-6), ("float16", 0.1), ("bfloat16", 1.0)):  # logits have a std of 2.5
        dtype, distance, tokens = facts["half"][name]
        assert dtype == f"torch.{name}" and distance <= most and len(tokens) % BLOCK == 0, (name, facts["half"][name])


@pytest.mark.parametrize("model_type", EXPORTED)
@torch.no_grad()
def test_the_calling_sequence_gives_our_decoders_logits(
    model_type: str, visited: dict[str, tuple[dict[str, Any], torch.Tensor]], exported: dict[str, Path]
):
    facts, logits = visited[model_type]
    model, processor = load_checkpoint(exported[model_type])
    inputs = processor.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=True)
    valid = inputs["attention_mask"].bool()
    decoder = BlockDecoder(model.eval(), inputs["input_ids"], valid, inputs["answer_index"], pixels_in(inputs))
    decoder.prefill()
    length = inputs["input_ids"].shape[1]
    tail = length % BLOCK
    assert facts["tokens"][:tail] == inputs["input_ids"][0, length - tail :].tolist()
    for number in range(3):
        block = slice(number * BLOCK, (number + 1) * BLOCK)
        masked = decoder.block.open_BD[0]
        torch.testing.assert_close(decoder.block_logits()[0, masked], logits[block][masked], rtol=1e-4, atol=5e-5)
        decoder.block = replace(decoder.block, ids_BD=torch.tensor([facts["tokens"][block]]))
        decoder.commit()
    # And `generate` with as many steps as the sequence had settles the same tokens.
    answer = model.generate(**inputs, max_new_tokens=3 * BLOCK - tail, denoising_steps=1)
    assert isinstance(answer, torch.Tensor)
    given = answer[0, length:].tolist()
    assert given == facts["tokens"][tail:][: len(given)]


def test_remote_code_is_the_code_that_trains(exported: dict[str, Path]):
    """All of it, byte for byte; and it names no module that only diffvl has."""
    source = Path(modeling_diffvl.__file__).parent
    modules = {path.name for path in source.glob("*.py")} - {"__init__.py"}
    assert set(HUB_FILES) == modules == {path.name for path in exported["llama"].glob("*.py")}
    for name in HUB_FILES:
        copied = (exported["llama"] / name).read_bytes()
        assert copied == (source / name).read_bytes()
        assert b"from diffvl" not in copied and b"import diffvl" not in copied


@pytest.mark.parametrize("name", HUB_FILES)
def test_remote_code_cites_nothing_that_is_not_beside_it(name: str):
    """No document, no test and no module of the repository: who reads the file has the exported directory alone."""
    text = (Path(modeling_diffvl.__file__).parent / name).read_text(encoding="utf-8")
    cited = re.findall(
        r"[\w./*-]+\.(?:py|md|yaml|toml)\b|\b(?:DESIGN|README|STYLE_GUIDE|CONTRIBUTING)\b|\b(?:tests|docs|hub)[/.]\w+", text
    )
    modules = set(re.findall(r"\b(\w+_diffvl)\b", text))
    assert not cited and {f"{module}.py" for module in modules} <= set(HUB_FILES)
