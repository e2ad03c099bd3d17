"""What only a GPU can show: FlexAttention's kernels against dense SDPA, a run in bf16, decoding. `make test-gpu` runs them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_chats import CHATS
from helpers import CONTEXTS, batch, metrics, objective, sample, stage_recipe
from shared_fixtures import Loaded
from training_runs import run

from diffvl.attention.block_mask import FLEX
from diffvl.attention.choose import choose
from diffvl.hub import generation_diffvl
from diffvl.hub.answers_diffvl import BlockGenerationOutput
from diffvl.objective.losses import Draw, block_diffusion

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # compilers warn about themselves
CUDA = torch.device("cuda")


def on_gpu(model: Any) -> Any:
    """A copy of a shared model; transformers' own annotations hide its methods."""
    return copy.deepcopy(model).to(CUDA)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "qwen3_moe"])
def test_flex_attention_gives_the_loss_of_dense_attention(model_type: str, context: str, loaded: Callable[[str], Loaded]):
    """Loss and gradients in fp32, packed rows, complementary masks, an image, a sliding window."""
    model = on_gpu(loaded(model_type)[0])
    lengths = [(200, 60, 3, 90), (60, 70)]
    samples = [sample(model.config, one, index, image=index == 0) for index, one in enumerate(lengths)]
    both: Any = {name: value.to(CUDA) for name, value in dict(batch(samples)).items() if isinstance(value, torch.Tensor)}
    both["row"] = torch.zeros(2, dtype=torch.long, device=CUDA)
    found = []
    for wanted in ("sdpa", FLEX):
        assert choose(model.language_model, wanted, CUDA) == wanted
        settings = objective(context=context, complementary=True, weight="effective")
        loss = block_diffusion(model, model.config, both, settings, Draw(3, 2, 0.5)).loss
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found.append((loss, [gradient for gradient in gradients if gradient is not None]))
    (dense, expected), (flex, given) = found
    torch.testing.assert_close(flex, dense, rtol=1e-4, atol=0.0)
    loudest = max(float(gradient.abs().max()) for gradient in expected)
    for gradient, other in zip(given, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-2, atol=1e-4 * loudest)


def test_a_run_learns_and_repeats(prepared: Callable[[str], Path], shapes: dict[str, Path], tmp_path: Path):
    """bf16, FlexAttention, packed rows; a second run has the same samples and nearly the same losses."""
    recipe = stage_recipe(shapes["train"], row_length=1024, steps=8, save_every=4, precision="bf16", batch_size=1)
    whole = metrics(run(prepared("llama"), recipe, tmp_path / "whole"))
    assert whole[-1]["loss"] < whole[0]["loss"]
    again = metrics(run(prepared("llama"), recipe, tmp_path / "again"))
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in whole], rel=2e-2)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_decoding_is_that_of_the_cpu(model_type: str, context: str, loaded: Callable[[str], Loaded]):
    """With a growing cache, with a static one, and with the trunk compiled for it: CUDA graphs, replayed for later prompts."""
    model, processor = loaded(model_type)
    model.config.set_decoding("blocks", 4, context, "absolute", "same")
    there = on_gpu(model)
    static = {"cache_implementation": "static"}
    for chats in (CHATS, CHATS[:1], CHATS[1:2], CHATS):
        inputs = processor.apply_chat_template(chats, tokenize=True, add_generation_prompt=True)
        moved: Any = {name: value.to(CUDA) for name, value in inputs.items()}
        expected = model.generate(**inputs, max_new_tokens=16, denoising_steps=2)
        for settings in ({}, {**static, "disable_compile": True}, static):
            given = there.generate(**moved, max_new_tokens=16, denoising_steps=2, **settings)
            assert isinstance(given, torch.Tensor) and given.tolist() == expected.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}], ids=["growing", "compiled"])
def test_a_block_does_not_wait_for_the_gpu(
    settings: dict[str, Any], loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch
):
    """torch raises where Python would wait inside a block whose steps settle a fixed number of tokens."""
    model, processor = loaded("llama")
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    there = on_gpu(model)
    inputs = processor.apply_chat_template(CHATS, tokenize=True, add_generation_prompt=True)
    moved: Any = {name: value.to(CUDA) for name, value in inputs.items()}
    there.generate(**moved, max_new_tokens=16, denoising_steps=2, **settings)  # graphs are captured on the way
    denoise, blocks = generation_diffvl.denoise, []

    def watched(*given: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error" if blocks else "default")  # the first block encodes the images
        try:
            return denoise(*given)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            blocks.append(None)

    monkeypatch.setattr(generation_diffvl, "denoise", watched)
    there.generate(**moved, max_new_tokens=16, denoising_steps=2, temperature=0.7, **settings)
    blocks.clear()
    output = there.generate(**moved, max_new_tokens=16, denoising_steps=2, return_dict_in_generate=True, **settings)
    assert isinstance(output, BlockGenerationOutput) and len(blocks) >= 4
    assert output.prefill_seconds is not None and output.decode_seconds is not None
    assert output.prefill_seconds > 0 and output.decode_seconds > 0
