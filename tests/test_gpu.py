"""What only a GPU can show: FlexAttention's kernels against dense SDPA, a run in bf16, decoding. `make test-gpu` runs them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Loaded
from helpers import CONTEXTS, batch, metrics, objective, sample, stage_recipe
from test_invariant_training import run

from diffvl.attention import FLEX, choose
from diffvl.objective import Draw, block_diffusion

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # compilers warn about themselves
CUDA = torch.device("cuda")


def on_gpu(model: Any) -> Any:
    """A copy of a shared model; transformers' own annotations hide its methods."""
    return copy.deepcopy(model).to(CUDA)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "qwen3_moe"])
def test_flex_attention_gives_the_loss_of_dense_attention(model_type: str, context: str, loaded: Callable[[str], Loaded]):
    """Loss and gradients in fp32, packed rows, complementary masks, a picture, a sliding window."""
    model = on_gpu(loaded(model_type)[0])
    lengths = [(200, 60, 3, 90), (60, 70)]
    samples = [sample(model.config, one, index, picture=index == 0) for index, one in enumerate(lengths)]
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


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_decoding_is_that_of_the_cpu(model_type: str, loaded: Callable[[str], Loaded]):
    model, processor = loaded(model_type)
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    chat = [[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "What else is there?"}]]
    inputs = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
    expected = model.generate(**inputs, max_new_tokens=16, denoising_steps=2)
    moved: dict[str, Any] = {name: value.to(CUDA) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    given = on_gpu(model).generate(**moved, max_new_tokens=16, denoising_steps=2)
    assert isinstance(given, torch.Tensor) and given.tolist() == expected.tolist()  # type: ignore[union-attr]
