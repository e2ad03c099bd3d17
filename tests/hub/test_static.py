"""Decoding in fixed shapes, and without waiting for the device: what a GPU needs, shown on a CPU.

That compiled and static decoding is fast is for `diffvl bench decode`; here it has to give what the growing cache gives.
"""

import copy
import itertools
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decode_chats import CHATS, generated
from helpers import CONTEXTS, GRIDS, TARGETS, alternating, crossed, pairwise
from shared_fixtures import Loaded
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig

from diffvl.hub import cache_diffvl, generation_diffvl, masks_diffvl
from diffvl.hub.answers_diffvl import BlockGenerationOutput
from diffvl.hub.decoder_diffvl import BlockDecoder
from diffvl.hub.masks_diffvl import BLOCKS, block_attention, block_kernels

STATIC: dict[str, Any] = {"cache_implementation": "static"}
SETTINGS: dict[str, Any] = {"max_new_tokens": 14, "denoising_steps": 2, "eos_token_id": -1}


def same(found: BlockGenerationOutput, expected: BlockGenerationOutput) -> bool:
    assert found.sequences is not None and expected.sequences is not None
    return found.sequences.tolist() == expected.sequences.tolist() and found.settling == expected.settling


# --- the static cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model_type", "context", "grid", "target"), crossed(CONTEXTS, GRIDS, TARGETS))
def test_a_static_cache_gives_the_same_answers(
    model_type: str, context: str, grid: str, target: str, loaded: Callable[[str], Loaded]
):
    """Ragged batches with images and earlier turns; samples that end at different times; as many forwards."""
    model, _ = both = loaded(model_type)
    model.config.set_decoding("blocks", 4, context, grid, target)
    for chats in (CHATS, [CHATS[0]]):
        expected = generated(both, chats, **SETTINGS)
        vars(model).pop("_static_trunk", None)  # as in a first call
        assert same(found := generated(both, chats, **SETTINGS, **STATIC), expected)
        assert found.forwards == expected.forwards
    assert expected.sequences is not None
    stop = expected.sequences[0, 3].item()
    ending = {**SETTINGS, "eos_token_id": stop}
    assert same(generated(both, CHATS, **ending, **STATIC), generated(both, CHATS, **ending))


@pytest.mark.parametrize(("context", "target"), list(itertools.product(CONTEXTS, TARGETS)))
def test_a_conversation_on_a_static_cache(context: str, target: str, loaded: Callable[[str], Loaded]):
    """The prefix is a copy: what another call writes into the buffers in between does not touch it; and it fits either cache."""
    model, _ = both = loaded("llama")
    model.config.set_decoding("blocks", 4, context, "absolute", target)
    chat = [CHATS[0][0], {"role": "assistant", "content": "So."}, {"role": "user", "content": "And what else is in it?"}]
    fresh = generated(both, [chat], **SETTINGS)
    for first, second in itertools.product(({}, STATIC), repeat=2):
        prefix = generated(both, [chat[:1]], **SETTINGS, **first).prefix
        generated(both, [CHATS[1]], **SETTINGS, **STATIC)
        found = generated(both, [chat], prefix=prefix, **SETTINGS, **second)
        assert same(found, fresh) and found.reused is not None and found.reused > 0


def test_the_buffers_stay_with_the_model(loaded: Callable[[str], Loaded]):
    """One cache from call to call, another for another batch or a longer conversation; a copied model makes its own."""
    model, _ = both = loaded("llama")
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    held = []
    for chats, limit in (([CHATS[0]], 8), ([CHATS[3]], 20), ([CHATS[3]], 300), ([CHATS[1]], 8), (CHATS, 8)):
        generated(both, chats, max_new_tokens=limit, eos_token_id=-1, denoising_steps=1, **STATIC)
        held.append(vars(model)["_static_trunk"].cache)
    assert held[0] is held[1] and held[1] is not held[2] and held[2] is held[3] and held[3] is not held[4]
    assert [cache.capacity for cache in (held[0], held[2], held[4])] == [256, 512, 256]
    wide: Any = copy.deepcopy(model)
    assert wide._static_trunk is None
    for dtype in (torch.float64, torch.float32):
        wide = wide.to(dtype)
        found = wide.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, **STATIC)
        assert found.tolist() == wide.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8).tolist()


# Contexts and lengths of a prompt. The first four are the default ones.
SHORT = [("block", 1), ("causal", 3), ("block", 4), ("causal", 5), ("causal", 1), ("block", 3), ("causal", 4), ("block", 5)]


@pytest.mark.parametrize(
    ("model_type", "prompt"),
    alternating(("llama", "mistral", "gemma2", "llama"), SHORT, ["llama", "mistral", "gemma2"]),
)
def test_short_prompts_on_fresh_buffers(model_type: str, prompt: tuple[str, int], loaded: Callable[[str], Loaded]):
    context, length = prompt
    model: Any = loaded(model_type)[0]
    ids = torch.arange(20, 20 + length)[None]
    for grid, size, target in itertools.product(GRIDS, (1, 5), TARGETS):
        model.config.set_decoding("blocks", size, context, grid, target)
        settings = {"max_new_tokens": 9, "eos_token_id": -1}
        vars(model).pop("_static_trunk", None)
        assert model.generate(ids, **settings, **STATIC).tolist() == model.generate(ids, **settings).tolist()


def test_what_a_call_leaves_does_not_touch_the_next(loaded: Callable[[str], Loaded]):
    """Inference mode, autocast, and an answer that was no number."""
    model: Any = copy.deepcopy(loaded("llama")[0])
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    ids = torch.arange(20, 29)[None]
    expected = model.generate(ids, **SETTINGS).tolist()
    with torch.inference_mode():
        assert model.generate(ids, **SETTINGS, **STATIC).tolist() == expected
    buffers = model._static_trunk.cache
    assert model.generate(ids, **SETTINGS, **STATIC).tolist() == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model.generate(ids, **SETTINGS).tolist()
        assert model.generate(ids, **SETTINGS, **STATIC).tolist() == plain
    embedding = model.get_input_embeddings().weight
    row = embedding.data[25].clone()
    embedding.data[25] = float("nan")
    model.generate(torch.full((1, 60), 25), **SETTINGS, **STATIC)
    embedding.data[25] = row
    assert model.generate(ids, **SETTINGS, **STATIC).tolist() == expected and model._static_trunk.cache is buffers


def test_buffers_belong_to_their_trunk(loaded: Callable[[str], Loaded], fresh_compiler: None):
    """A copy with other weights, and another trunk in the old one's place, decode with their own; nothing of it is pickled."""
    model: Any = copy.deepcopy(loaded("llama")[0])
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    config = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode="default")
    ids = torch.arange(20, 29)[None]
    compiled = {**SETTINGS, **STATIC, "compile_config": config}
    before = model.generate(ids, **compiled).tolist()
    assert pickle.loads(pickle.dumps(model._static_trunk)) is None
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.language_model.model.layers.parameters():
            parameter.mul_(1.5)
    given = copied.generate(ids, **compiled).tolist()
    assert given == copied.generate(ids, **SETTINGS).tolist() != before
    assert model.generate(ids, **compiled).tolist() == before
    model.language_model = copied.language_model
    assert model.generate(ids, **compiled).tolist() == given


def test_a_trunk_compiled_by_somebody_else_keeps_its_limits(loaded: Callable[[str], Loaded]):
    """Only a call that compiles changes how often torch may."""
    model, _ = both = loaded("llama")
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    limits: list[int] = []
    hook = model.language_model.register_forward_pre_hook(lambda *_: limits.append(torch._dynamo.config.recompile_limit))
    try:
        generated(both, [CHATS[3]], max_new_tokens=4)
        generated(both, [CHATS[3]], max_new_tokens=4, **STATIC)
    finally:
        hook.remove()
    assert set(limits) == {torch._dynamo.config.recompile_limit} != {cache_diffvl.MOST_FORMS}


def test_ar_has_a_static_cache_too_and_speculation_none(loaded: Callable[[str], Loaded]):
    model, _ = both = loaded("qwen2")
    model.config.set_decoding("blocks", 4, "causal", "absolute", "same")
    expected = generated(both, CHATS, mode="ar", max_new_tokens=8, eos_token_id=-1)
    found = generated(both, CHATS, mode="ar", max_new_tokens=8, eos_token_id=-1, **STATIC)
    assert found.sequences is not None and expected.sequences is not None
    assert found.sequences.tolist() == expected.sequences.tolist()
    with pytest.raises(ValueError, match="cache_implementation='static' has no effect with mode='speculative'"):
        generated(both, CHATS, mode="speculative", **STATIC)


def test_a_trunk_without_logits_to_keep_is_refused(loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    model, _ = both = loaded("llama")
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    monkeypatch.setattr(model.language_model, "forward", lambda input_ids: None)
    with pytest.raises(ValueError, match="does not know LlamaForCausalLM: its forward has no logits_to_keep"):
        generated(both, [CHATS[0]], **STATIC)


# --- the compiled trunk ---------------------------------------------------------------------------------------------------------


class Counted:
    """A backend of torch.compile that runs what it is given, and counts how often it is asked to compile."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: Any, _: Any) -> Any:
        self.compiled += 1
        return graph.forward

    def __deepcopy__(self, memo: Any) -> "Counted":
        return self  # a CompileConfig is copied on its way to torch


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "size", "target"), [("ar", 4, "same"), ("blocks", 1, "shift")])
def test_token_by_token_is_compiled_too(mode: str, size: int, target: str, loaded: Callable[[str], Loaded], fresh_compiler: None):
    """transformers' own `generate`, and blocks of one token, which is how an aligned checkpoint decodes."""
    model, processor = loaded("qwen2")
    model = copy.deepcopy(model)
    model.config.set_decoding("blocks", size, "causal", "response", target)
    backend = Counted()
    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode="default")
    settings = {"mode": mode, "max_new_tokens": 9, "eos_token_id": -1}
    for _ in range(2):
        expected = generated((model, processor), CHATS, **settings)
        assert same(generated((model, processor), CHATS, **settings, **STATIC, compile_config=config), expected)
        assert backend.compiled == 1


@pytest.mark.parametrize(("model_type", "context", "target"), [
    ("llama", "causal", "same"),
    pytest.param("gemma2", "block", "shift", marks=pytest.mark.slow),
    pytest.param("llama", "block", "same", marks=pytest.mark.slow),
    pytest.param("qwen2", "causal", "shift", marks=pytest.mark.slow),
    pytest.param("qwen3", "causal", "same", marks=pytest.mark.slow),
])  # fmt: skip
def test_two_forms_are_compiled_and_no_more(
    model_type: str, context: str, target: str, loaded: Callable[[str], Loaded], fresh_compiler: None
):
    """[masks] and [finished block | masks], whole graphs, for prompts and answers of any length, batch by batch."""
    model, processor = loaded(model_type)
    model = copy.deepcopy(model)
    model.config.set_decoding("blocks", 4, context, "absolute", target)
    backend = Counted()
    compiled = {**STATIC, "compile_config": CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode="default")}
    calls: list[int] = []
    for chats, count in (([CHATS[0]], 2), ([CHATS[3]], 2), ([CHATS[1]], 2), (CHATS, 4), (CHATS, 4)):
        expected = generated((model, processor), chats, **SETTINGS)
        assert same(generated((model, processor), chats, **SETTINGS, **compiled), expected)
        calls.append(backend.compiled)
        assert backend.compiled == count, f"compiled {calls} times"


def test_a_compiled_trunk_is_what_decodes(loaded: Callable[[str], Loaded], fresh_compiler: None):
    """But for the first forward, which takes the prompt in, every forward has a compiled shape."""
    model, processor = loaded("llama")
    model = copy.deepcopy(model)
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    seen: Counter[str] = Counter()
    trunk_logits, passed = cache_diffvl.StaticTrunk.logits, BlockDecoder._pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_diffvl.StaticTrunk, "logits", lambda *a: (seen.update(["compiled"]), trunk_logits(*a))[1])
        patch.setattr(BlockDecoder, "_pass", lambda *a: (seen.update(["plain"]), passed(*a))[1])
        config = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode="default")
        output = generated((model, processor), CHATS, **SETTINGS, **STATIC, compile_config=config)
    assert seen == {"plain": 1, "compiled": (output.forwards or 0) - 1}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # compilers warn about themselves
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_compiled_for_this_machine(model_type: str, loaded: Callable[[str], Loaded], fresh_compiler: None):
    """Inductor's own kernels, which round otherwise: the same tokens, in fp32."""
    model, processor = loaded(model_type)
    model = copy.deepcopy(model)
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    config = CompileConfig(fullgraph=True, dynamic=False)
    found = generated((model, processor), CHATS, **SETTINGS, **STATIC, compile_config=config)
    assert same(found, generated((model, processor), CHATS, **SETTINGS))


# --- waiting for the device --------------------------------------------------------------------------------------------------

WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.item", "aten.is_nonzero", "aten.unique")


class Waits(TorchDispatchMode):
    """Counts operators that would make Python wait for a GPU: a value that is read, a shape that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removesuffix(".default")
        by_mask = name.startswith("aten.index") and any(
            isinstance(one, torch.Tensor) and one.dtype == torch.bool
            for given in args[1:2]
            for one in (given if isinstance(given, list | tuple) else [given])
        )
        if name.startswith(WAITING) or by_mask:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def waits_of_a_block(loaded: Loaded, chats: list[Any], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[Counter[str]]:
    """What every block of an answer waits for, but for the first, which also takes the prompt in."""
    found: list[Counter[str]] = []
    denoise = generation_diffvl.denoise

    def watched(*given: Any) -> Any:
        with Waits() as waits:
            result = denoise(*given)
        found.append(waits.found)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(generation_diffvl, "denoise", watched)
        generated(loaded, chats, max_new_tokens=14, eos_token_id=-1, **settings)
    assert len(found) > 3
    return found[1:]


@pytest.mark.parametrize(
    ("model_type", "context", "target", "static"), pairwise(["llama", "gemma2"], CONTEXTS, TARGETS, [False, True])
)
def test_a_step_does_not_wait_for_the_device(
    model_type: str,
    context: str,
    target: str,
    static: bool,
    loaded: Callable[[str], Loaded],
    monkeypatch: pytest.MonkeyPatch,
):
    """Not at all where the number of tokens a step is fixed; once a step, for how many settled, where it is not."""
    model, _ = both = loaded(model_type)
    model.config.set_decoding("blocks", 4, context, "absolute", target)
    extra = STATIC if static else {}
    for chats in ([CHATS[0]], CHATS):
        for fixed in ({"denoising_steps": 2}, {"remasking": "sequential"}, {"temperature": 0.7}):
            assert not any(waits_of_a_block(both, chats, monkeypatch, **fixed, **extra))
    seen = waits_of_a_block(both, CHATS, monkeypatch, remasking="low_confidence_dynamic", threshold=1.0, **extra)
    # Reading a list of B numbers is B scalars on a CPU; four steps a block.
    assert all(set(waits) <= {"aten._local_scalar_dense"} and waits.total() <= 4 * len(CHATS) for waits in seen)


def test_a_wait_is_noticed():
    with Waits() as waits:
        numbers = torch.arange(4)
        bool(numbers.any())
        numbers[numbers > 1]
        numbers[numbers > 2] = 0
        numbers.nonzero()
    assert waits.found.total() == 4


# --- masks -------------------------------------------------------------------------------------------------------------------


def masks_seen(loaded: Loaded, chats: list[Any], **settings: Any) -> list[Any]:
    """The mask of every forward of the trunk."""
    seen: list[Any] = []
    hook = loaded[0].language_model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["attention_mask"]), with_kwargs=True
    )
    try:
        generated(loaded, chats, **{**SETTINGS, "denoising_steps": 4}, **settings)
    finally:
        hook.remove()
    return seen


def hides(mask: Any) -> bool:
    """Whether a mask, or that of any layer type, is more than one element."""
    masks = mask.values() if isinstance(mask, dict) else [mask]
    return any(one is not None and one.numel() > 1 for one in masks)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gpt2"])
def test_a_block_that_sees_everything_has_no_mask(
    model_type: str, context: str, loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch
):
    """Three of the four forwards of a block alone; the fused one and padded neighbours have a mask."""
    model, _ = both = loaded(model_type)
    model.config.set_decoding("blocks", 4, context, "response", "same")
    kernels: list[bool] = []
    stock = masks_diffvl.sdpa_attention_forward
    monkeypatch.setattr(
        masks_diffvl,
        "sdpa_attention_forward",
        lambda *given, **more: (kernels.append(given[4] is None and more["is_causal"] is False), stock(*given, **more))[1],
    )
    hidden = [hides(mask) for mask in masks_seen(both, [CHATS[0]])]
    # The prompt's own forward has no mask either: it is causal. The first block then has nothing to take along.
    expected = [True, False, False, False] * 4 if context == "block" else [False] * 5 + [True, False, False, False] * 3
    assert hidden == expected
    plain = hidden.count(False) - (context == "causal")
    assert sum(kernels) == plain * model.config.text_config.num_hidden_layers
    assert model.language_model.config._attn_implementation == "sdpa", "and afterwards it is what it was"
    ragged = [hides(mask) for mask in masks_seen(both, CHATS)]
    assert all(ragged[int(context == "causal") :])


def test_windows_are_still_masked(loaded: Callable[[str], Loaded]):
    """gemma2: full attention in every second layer, a window of 10 in the others."""
    model, _ = both = loaded("gemma2")
    model.config.set_decoding("blocks", 4, "block", "response", "same")
    alone = masks_seen(both, [CHATS[0]])[1]
    full = alone["full_attention"]
    assert full.untyped_storage().nbytes() == 4 and not full.any(), "eager attention adds its mask"
    assert alone["full_attention"].shape == alone["sliding_attention"].shape and alone["sliding_attention"].any()


def test_a_mask_of_one_element_is_none(loaded: Callable[[str], Loaded]):
    """Called by hand: the attention function against SDPA with a mask of ones."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, length, 8, generator=generator) for heads, length in ((4, 3), (2, 9), (2, 9)))
    module: Any = loaded("llama")[0].language_model.model.layers[0].self_attn
    everything = masks_diffvl.everything(BLOCKS, (1, 3, 9), torch.float32, query.device)
    found, _ = block_attention(module, query, key, value, everything, scaling=0.3)
    expected, _ = block_attention(module, query, key, value, torch.ones(1, 1, 3, 9, dtype=torch.bool), scaling=0.3)
    torch.testing.assert_close(found, expected)
    causal, _ = block_attention(module, query, query[:, :2], query[:, 2:], None, scaling=0.3)
    assert not torch.allclose(causal, block_attention(module, query, query[:, :2], query[:, 2:], everything, scaling=0.3)[0])


def test_kernels_are_put_back(loaded: Callable[[str], Loaded]):
    trunk = loaded("llama")[0].language_model
    with pytest.raises(RuntimeError), block_kernels(trunk):
        assert trunk.config._attn_implementation == BLOCKS
        raise RuntimeError
    assert trunk.config._attn_implementation == "sdpa"


def test_the_head_runs_on_masked_tokens_only(loaded: Callable[[str], Loaded]):
    model, _ = both = loaded("qwen2")
    model.config.set_decoding("blocks", 4, "block", "response", "same")
    rows: list[int] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, logits: rows.append(logits.shape[-2]))
    try:
        generated(both, [CHATS[0]], max_new_tokens=8, eos_token_id=-1)
        assert rows == [4, 3, 2, 1, 4, 3, 2, 1]
        rows.clear()
        generated(both, CHATS, max_new_tokens=8, eos_token_id=-1, denoising_steps=2)
        assert rows == [16, 8, 16, 8]
    finally:
        hook.remove()
