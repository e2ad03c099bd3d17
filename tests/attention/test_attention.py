"""Block masks against the dense rule, and what executes them: tiles of SDPA in whole, FlexAttention as far as a CPU can."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from executed_masks import executed
from helpers import CONTEXTS, GRIDS, alternating, batch, objective, pairwise, sample
from shared_fixtures import Loaded
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoConfig, AutoModelForCausalLM

from diffvl.attention import cpu
from diffvl.attention.block_mask import block_mask, bucket, training_masks
from diffvl.attention.choose import choose
from diffvl.attention.cpu import TILED, tiled_attention
from diffvl.demo.standins import TRUNKS
from diffvl.errors import ConfigError
from diffvl.hub.layout_diffvl import Layout, block_index, clean_layout, noisy_layout, noisy_stream
from diffvl.objective.losses import Draw, block_diffusion
from diffvl.objective.packing import pack

CPU = torch.device("cpu")
LIMITS = [(None, None), (10, None), (None, 16)]


def rows(context: str, grid: str, copies: int = 1) -> Layout:
    """Two rows of packed samples, answers of all lengths, the second row padded."""
    generator = torch.Generator().manual_seed(3)
    answer = torch.zeros(5, 60, dtype=torch.long)
    valid = torch.zeros_like(answer, dtype=torch.bool)
    for line in range(len(answer)):
        start, first, gap, second = torch.randint(2, 14, (4,), generator=generator).tolist()
        answer[line, start : start + first] = 1
        answer[line, start + first + gap : start + first + gap + second] = 2
        valid[line, : start + first + gap + second + line] = True
    block = block_index(answer, 4, grid)
    stream = noisy_stream(answer, block, 4, grid)
    layout = clean_layout(block, valid, context)
    for copy in range(copies):
        layout = layout.joined(noisy_layout(stream, context, copy + 1))
    return pack(layout, torch.tensor([0, 0, 0, 1, 1])).layout


@pytest.mark.parametrize("tile", [8, 32])
@pytest.mark.parametrize(("window", "chunk"), LIMITS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_block_mask_is_the_dense_rule(context: str, grid: str, window: int | None, chunk: int | None, tile: int):
    for copies in (1, 2):
        layout = rows(context, grid, copies)
        mask = block_mask(layout, tile, window, chunk)
        assert torch.equal(executed(mask, tile), layout.allowed(window=window, chunk=chunk))


def test_tiles_are_left_out_and_some_need_no_rule():
    """A long sample: about half of the tiles below the diagonal, most of them full, and nothing between noisy blocks."""
    answer = torch.zeros(1, 512, dtype=torch.long)
    answer[0, -64:] = 1
    block = block_index(answer, 8, "absolute")
    stream = noisy_stream(answer, block, 8, "absolute")
    layout = clean_layout(block, torch.ones_like(answer, dtype=torch.bool), "block").joined(noisy_layout(stream, "block"))
    mask = block_mask(layout, 32)
    assert mask.full_kv_num_blocks is not None
    tiles = 18  # 16 clean and 2 noisy
    assert mask.full_kv_num_blocks[0, 0].tolist() == [*range(16), 14, 15]
    # The diagonal, and for the noisy tiles their own and the clean ones that their first blocks must not see.
    assert mask.kv_num_blocks[0, 0].tolist() == [1] * 16 + [2, 2]
    assert int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) < tiles**2 * 0.53
    assert torch.equal(executed(mask, 32), layout.allowed())


@pytest.mark.parametrize("context", CONTEXTS)
def test_tiles_of_sdpa_are_dense_sdpa(context: str, monkeypatch: pytest.MonkeyPatch):
    """Values and gradients, with grouped keys, in one group of queries and in many."""
    layout = rows(context, "absolute")
    generator = torch.Generator().manual_seed(0)
    batch_size, length = layout.position.shape
    states = [torch.randn(batch_size, heads, length, 8, generator=generator) for heads in (4, 2, 2)]
    q, k, v = [state.requires_grad_() for state in states]
    dense = scaled_dot_product_attention(q, k, v, attn_mask=layout.allowed()[:, None], scale=0.3, enable_gqa=True)
    expected = torch.autograd.grad((dense * dense.detach().sin()).sum(), (q, k, v))
    module, groups = torch.nn.Identity(), set()
    for cost in (0, 200, 10**9):
        monkeypatch.setattr(cpu, "CALL_COST", cost)
        monkeypatch.setattr(cpu, "CPU_TILE", 8)
        mask = block_mask(layout, 8)
        ours, _ = tiled_attention(module, q, k, v, mask, scaling=0.3)
        ours = ours.transpose(1, 2)
        torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)
        given = torch.autograd.grad((ours * dense.detach().sin()).sum(), (q, k, v))
        for one, other in zip(given, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        groups.add(len(mask.plan_for_cpu))  # type: ignore[attr-defined]
    assert len(groups) == 3 and min(groups) == 1


def long_rows(context: str, block_size: int) -> Layout:
    """A row of two long samples, each with an answer in the middle and one at the end, beside a row of one and padding."""
    answer = torch.zeros(3, 700, dtype=torch.long)
    valid = torch.ones_like(answer, dtype=torch.bool)
    answer[0, 400:470], answer[0, 650:] = 1, 2
    answer[1, 600:], valid[1, 690:] = 1, False
    answer[2, 301:333] = 1
    answer = answer * valid
    block = block_index(answer, block_size, "absolute")
    stream = noisy_stream(answer, block, block_size, "absolute")
    layout = clean_layout(block, valid, context).joined(noisy_layout(stream, context))
    return pack(layout, torch.tensor([0, 0, 1])).layout


@pytest.mark.parametrize(
    ("blocks", "rows_taken", "window"),
    pairwise([("block", 4), ("block", 8), ("block", 40), ("block", 100), ("causal", 8)], [(0,), (0, 1)], [None, 150]),
)
def test_clean_streams_go_through_the_causal_kernel(blocks: tuple[str, int], rows_taken: tuple[int, ...], window: int | None):
    """Packed, cut by turns, beside other rows, in blocks that the band holds and in too wide ones, and under a window: values and
    gradients of dense SDPA; and the causal kernel is used where it can be."""
    context, block_size = blocks
    whole = long_rows(context, block_size)
    layout = whole.with_rows({name: row[list(rows_taken)] for name, row in whole.rows.items()})
    mask = block_mask(layout, 64, window)
    plan = cpu.plan_of(mask)
    causal = [part for group in plan for part in group.parts if isinstance(part, cpu.Slab) and part.causal]
    bands = [part for group in plan for part in group.parts if isinstance(part, cpu.Band)]
    assert bool(causal) == (window is None and block_size <= 64 and rows_taken == (0,))
    assert bool(bands) == (bool(causal) and context == "block")
    covered = sorted(index for group in plan for index in range(group.queries.start, group.queries.stop))
    assert covered == list(range(layout.position.shape[1]))
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(len(rows_taken), 2, layout.position.shape[1], 8, generator=generator) for _ in range(3)]
    q, k, v = [state.requires_grad_() for state in states]
    dense = scaled_dot_product_attention(q, k, v, attn_mask=layout.allowed(window=window)[:, None])
    expected = torch.autograd.grad((dense * dense.detach().sin()).sum(), (q, k, v))
    ours = tiled_attention(torch.nn.Identity(), q, k, v, mask)[0].transpose(1, 2)
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)
    for one, other in zip(torch.autograd.grad((ours * dense.detach().sin()).sum(), (q, k, v)), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


# The reference is what is wanted.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own compiler
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@torch.no_grad()
def test_flex_attention_understands_the_mask(compiled: bool):
    """torch's own reference of the kernel, and the compiled one, which a CPU has for the forward pass alone."""
    layout = rows("block", "response")
    generator = torch.Generator().manual_seed(0)
    batch_size, length = layout.position.shape
    q, k, v = (torch.randn(batch_size, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    dense = scaled_dot_product_attention(q, k, v, attn_mask=layout.allowed()[:, None], enable_gqa=True)
    attend: Any = torch.compile(flex_attention) if compiled else flex_attention
    ours = attend(q, k, v, block_mask=block_mask(layout, 128), enable_gqa=True)
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model_type", "context"),
    alternating(("llama", "mistral", "gpt2", "llama"), CONTEXTS, [model_type for model_type in TRUNKS if model_type != "gemma2"]),
)
def test_the_loss_does_not_depend_on_the_implementation(model_type: str, context: str, loaded: Callable[[str], Loaded]):
    """Loss and gradients of a packed batch with images, complementary masks and an AR term, dense and in cpu."""
    model, _ = loaded(model_type)
    term = {"ar_weight": 0.3} if context == "causal" else {}
    settings = objective(context=context, complementary=True, weight="effective", **term)
    one = batch([sample(model.config, (21, 6, 3, 9), index=4, image=True), sample(model.config, (6, 7), index=9)])
    found = []
    try:
        for wanted in ("sdpa", TILED):
            assert choose(model.language_model, wanted, CPU) == wanted
            loss = block_diffusion(model, model.config, one, settings, Draw(seed=3, step=2, progress=0.5)).loss
            gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            found.append((loss, [gradient for gradient in gradients if gradient is not None]))
    finally:
        choose(model.language_model, "sdpa", CPU)
    (dense, expected), (tiled, given) = found
    torch.testing.assert_close(tiled, dense, rtol=2e-6, atol=0.0)
    loudest = max(float(gradient.abs().max()) for gradient in expected)
    for gradient, other in zip(given, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6 * loudest)


def test_what_is_chosen(loaded: Callable[[str], Loaded]):
    llama, gemma2 = loaded("llama")[0].language_model, loaded("gemma2")[0].language_model
    try:
        assert choose(llama, "auto", CPU) == TILED
        assert isinstance(training_masks(llama.config, rows("block", "absolute"), torch.float32), BlockMask)
    finally:
        assert choose(llama, "sdpa", CPU) == "sdpa"
    # Its soft-capped scores are not SDPA's.
    assert choose(gemma2, "auto", CPU) == "eager"
    with pytest.raises(ConfigError, match="attention: gemma2 cannot take tiled: its attention is not pluggable"):
        choose(gemma2, TILED, CPU)
    with pytest.raises(ConfigError, match="attention: flex_attention needs a GPU to train"):
        choose(llama, "flex_attention", CPU)
    with pytest.raises(ConfigError, match="attention: tiled is for CPUs, this is cuda"):
        choose(llama, TILED, torch.device("cuda"))
    assert llama.config._attn_implementation == "sdpa"


def test_an_empty_copy_takes_tiles():
    """`convert` asks one before anything is prepared; it has no values to try them with."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes))
    assert choose(empty, TILED, CPU) == TILED


def test_what_flex_attention_cannot_take_is_known_without_a_gpu(caplog: pytest.LogCaptureFixture):
    """Before a kernel is compiled: dropout, which it does not have, and heads too narrow for it."""
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    for more, words in (
        ({"attention_dropout": 0.1}, "it has dropout in its attention"),
        ({"head_dim": 8}, "its heads are 8 wide"),
    ):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **more))
        assert choose(model, "auto", torch.device("cuda")) == "sdpa"
        assert f"attention: llama cannot take flex_attention ({words}" in caplog.text
        with pytest.raises(ConfigError, match=f"attention: llama cannot take flex_attention: {words}"):
            choose(model, "flex_attention", torch.device("cuda"))


def test_a_model_that_rewrites_its_mask_keeps_its_own_attention(caplog: pytest.LogCaptureFixture):
    """Doge adds its own mask to the one it is given."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
    doge = AutoModelForCausalLM.from_config(AutoConfig.for_model("doge", **sizes, num_key_value_heads=2))
    assert choose(doge, "auto", CPU) == doge.config._attn_implementation == "sdpa"
    assert "attention: doge cannot take tiled (tiled attention takes a BlockMask, got Tensor): it stays with sdpa" in caplog.text
    with pytest.raises(ConfigError, match="attention: doge cannot take tiled: tiled attention takes a BlockMask, got Tensor"):
        choose(doge, TILED, CPU)


def test_scores_that_sdpa_does_not_know_are_refused():
    layout = rows("block", "absolute")
    states = torch.zeros(2, 2, layout.position.shape[1], 8)
    with pytest.raises(ValueError, match="Identity wants softcap, which tiled attention does not know"):
        tiled_attention(torch.nn.Identity(), states, states, states, block_mask(layout, 64), softcap=50.0)
    with pytest.raises(ValueError, match="tiled attention takes a BlockMask, got Tensor"):
        tiled_attention(torch.nn.Identity(), states, states, states, layout.allowed()[:, None])  # type: ignore[arg-type]


def test_row_lengths_come_in_few_sizes():
    """At most an eighth longer, always a multiple of the kernel's tile, eight sizes for each doubling."""
    sizes = [bucket(tokens) for tokens in range(1, 20_000)]
    assert all(size >= tokens and size % 128 == 0 for tokens, size in enumerate(sizes, 1))
    assert all(size <= max(tokens * 1.125, tokens + 127) for tokens, size in enumerate(sizes, 1))
    assert len({size for size in sizes if 2048 < size <= 16384}) == 24


def test_flex_rows_are_padded_to_a_bucket(loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    """The rows that FlexAttention gets; the model is a stand-in, because a CPU has no backward for it."""
    config = loaded("llama")[0].config
    seen: dict[str, Any] = {}

    def model(**given: Any) -> Any:
        seen.update(given)
        count = len(given["logits_rows"])
        return SimpleNamespace(logits=given["row_map"](torch.zeros(count, config.vocabulary_size), slice(0, count)))

    monkeypatch.setattr(config.text_config, "_attn_implementation_internal", "flex_attention")
    one = batch([sample(config, (21, 6, 3, 9)), sample(config, (6, 7), index=9)])
    output = block_diffusion(model, config, one, objective(), Draw(0, 0, 0.0))
    assert seen["input_ids"].shape == (2, 128) and isinstance(seen["attention_mask"], BlockMask)
    assert output.tokens < 128 and bool(torch.isfinite(output.loss))
