"""The invariants on whole vision-language models, with images of different sizes: M-RoPE, DeepStack, tiles with newlines, pixel
shuffle, spans that see themselves both ways, sliding windows, experts, tied heads.
"""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import CONTEXTS, GRIDS, QUIET, alternating, crossed, metrics, random_image, stage_recipe, weights_of
from leaks import require_no_leak
from PIL import Image
from shared_fixtures import Loaded
from train_and_decode import compare, images_in
from training_runs import BETA, crash, run
from transformers import AutoModelForImageTextToText, DynamicCache

from diffvl.demo.standin_processors import PROCESSORS
from diffvl.demo.standin_vlms import VLMS
from diffvl.errors import UnsupportedModelError
from diffvl.hub.decoder_diffvl import BlockDecoder
from diffvl.hub.images_diffvl import token_types, vision_parameters
from diffvl.hub.processing_diffvl import pixels_in
from diffvl.prepare import native
from diffvl.prepare.run import prepare
from diffvl.prepare.source import Source
from diffvl.store.checkpoint import load_checkpoint, saved_dtype
from diffvl.train import stage as training
from diffvl.train.parts import parts_of

NATIVE = [model_type for model_type in VLMS if model_type in PROCESSORS]
# M-RoPE, tiles with newlines, spans and windows, nested pixels; the others repeat these, all run with `make test-slow`.
DIFFERENT = ("qwen3_vl", "llava_next", "gemma3", "idefics3")


def sized(width: int, height: int, seed: int) -> Image.Image:
    return random_image(seed).resize((width, height))


WIDE, TALL, SMALL = sized(112, 60, 1), sized(56, 100, 2), sized(40, 40, 3)
CHAT: list[dict[str, Any]] = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "Now?"}, {"type": "image", "image": WIDE}, {"type": "image", "image": SMALL}],
    },
    {"role": "assistant", "content": "A red circle and, to the right, 2 blue stars."},
    {"role": "user", "content": [{"type": "image", "image": TALL}, {"type": "text", "text": "And what else?"}]},
    {"role": "assistant", "content": "Nothing else is in this one, of that I am sure, and I have looked twice."},
]
BESIDE = [
    [
        {"role": "user", "content": [{"type": "image", "image": SMALL}, {"type": "text", "text": "One"}]},
        {"role": "assistant", "content": "Yes."},
    ],
    [{"role": "user", "content": "No image here. " * 4}, {"role": "assistant", "content": "No."}],
]


def natives(*different: str) -> list[Any]:
    chosen = different or DIFFERENT
    return [pytest.param(one, marks=() if one in chosen else pytest.mark.slow) for one in NATIVE]


@pytest.mark.parametrize("model_type", natives())
@torch.no_grad()
def test_parity(model_type: str, source: Callable[[str], Path], loaded: Callable[[str], Loaded]):
    """With no image, one and several, under explicit masks and without: the logits of the source, to the bit."""
    model, processor = loaded(model_type)
    stock: Any = AutoModelForImageTextToText.from_pretrained(source(model_type)).eval()
    asked = (model.config.image_token_id, None, model.config.token_types)
    for turns in (BESIDE[1][:1], BESIDE[0][:1], CHAT[:1], CHAT[:3]):
        inputs = processor.apply_chat_template(turns, tokenize=True, add_generation_prompt=True)
        ids, pixels = inputs["input_ids"], pixels_in(inputs)
        expected = stock(input_ids=ids, **pixels, **token_types(stock, ids, *asked), use_cache=False).logits
        rows = [row for row in range(expected.shape[-1]) if row != model.config.mask_token_id]
        for mask in (None, inputs["attention_mask"]):
            logits = model(ids, **pixels, attention_mask=mask).logits[..., rows]
            assert torch.equal(logits, expected[..., rows]), (len(images_in(turns)), mask is None)


def test_a_rule_that_fails_beyond_the_window_is_no_rule(loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    """Gemma's rule is found; where none holds on a span longer than the window, the short ones do not decide."""
    model, processor = loaded("gemma3")
    model, known = copy.deepcopy(model), model.config.mask_token_id
    parts: Any = SimpleNamespace(processor=processor, image_id=model.config.image_token_id, video_id=None, token_types="images")
    prompts = [native.answered(model.source, parts, shown) for shown in native.probe_images()]
    assert native.find_image_attention(model, prompts, known) < 1e-4 and model.config.image_attention == "runs"
    whole = native._long_span

    def other(*given: Any) -> Any:
        prompt = whole(*given)
        assert prompt is not None
        return replace(prompt, logits=prompt.logits.flip(1))

    monkeypatch.setattr(native, "_long_span", other)
    with pytest.raises(UnsupportedModelError, match="no rule of attention among image tokens"):
        native.find_image_attention(model, prompts, known)


@pytest.mark.parametrize(
    ("model_type", "context", "grid", "packed"), crossed(CONTEXTS, GRIDS, [False, True], types=NATIVE, default=DIFFERENT)
)
def test_training_logits_are_decoding_logits(
    model_type: str, context: str, grid: str, packed: bool, loaded: Callable[[str], Loaded]
):
    """Two turns with three images of three sizes, beside other samples with and without images."""
    target = "same" if grid == "response" else "shift"
    compare(loaded(model_type), 4, context, grid, target, chat=CHAT, beside=BESIDE, packed=packed)


@pytest.mark.parametrize("model_type", natives())
def test_an_image_that_reaches_into_the_first_block(model_type: str, loaded: Callable[[str], Loaded]):
    """Wide blocks on the absolute grid: an image is cut by the start of the block in which the answer begins."""
    shown = [compare(loaded(model_type), size, "causal", "absolute", "same", chat=CHAT, beside=BESIDE) for size in (24, 32, 40)]
    assert any(map(any, shown))


@pytest.mark.parametrize("model_type", natives())
def test_generated_tokens_do_not_depend_on_the_batch(model_type: str, loaded: Callable[[str], Loaded]):
    """Prompts with other images and lengths, alone and together, block by block and token by token."""
    model, processor = loaded(model_type)
    model.config.set_decoding("blocks", 4, "causal", "response", "same")
    prompts = [CHAT[:1], BESIDE[0][:1], BESIDE[1][:1]]
    together = processor.apply_chat_template(prompts, tokenize=True, add_generation_prompt=True)
    static = {"cache_implementation": "static", "disable_compile": True}
    for way in ({"mode": "blocks"}, {"mode": "ar"}, {"mode": "speculative"}, static):
        settings: dict[str, Any] = {**way, "max_new_tokens": 9}
        answers: Any = model.generate(**together, **settings)
        answers = answers[:, together["input_ids"].shape[1] :]
        for row, prompt in enumerate(prompts):
            one = processor.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True)
            alone: Any = model.generate(**one, **settings)
            given = alone[0, one["input_ids"].shape[1] :].tolist()
            assert answers[row, : len(given)].tolist() == given, (settings, row)


@pytest.mark.parametrize("model_type", natives())
def test_a_conversation_goes_on_from_its_prefix(model_type: str, loaded: Callable[[str], Loaded]):
    model, processor = loaded(model_type)
    model.config.set_decoding("blocks", 4, "causal", "response", "same")
    settings: dict[str, Any] = {"max_new_tokens": 6, "return_dict_in_generate": True}
    first = processor.apply_chat_template(CHAT[:1], tokenize=True, add_generation_prompt=True)
    second = processor.apply_chat_template(CHAT[:3], tokenize=True, add_generation_prompt=True)
    generate: Any = model.generate
    prefix = generate(**first, **settings).prefix
    fresh, continued = generate(**second, **settings), generate(**second, prefix=prefix, **settings)
    assert torch.equal(fresh.sequences, continued.sequences) and continued.reused > 20


@pytest.mark.parametrize("model_type", natives("gemma3", "qwen3_vl"))
@torch.no_grad()
def test_a_callers_own_block_mask_is_enough(model_type: str, loaded: Callable[[str], Loaded]):
    """SDAR-VL's calling sequence, which knows neither spans nor several rotary axes: whole blocks of the prompt, then the first
    open block over the cache."""
    model, processor = loaded(model_type)
    model.config.set_decoding("blocks", 4, "block", "absolute", "same")
    inputs = processor.apply_chat_template(CHAT[:1], tokenize=True, add_generation_prompt=True)
    ids, pixels = inputs["input_ids"], pixels_in(inputs)
    length, begin = ids.shape[1], ids.shape[1] // 4 * 4
    block = torch.arange(begin + 4) // 4
    mask, position = (block[:, None] >= block[None])[None], torch.arange(begin + 4)[None]
    cache = DynamicCache()
    before = {"attention_mask": mask[:, :begin, :begin], "position_ids": position[:, :begin]}
    model(ids[:, :begin], **pixels, **before, past_key_values=cache, use_cache=True)
    opened = torch.full((1, 4), model.config.mask_token_id)
    opened[:, : length - begin] = ids[:, begin:]
    after = {"attention_mask": mask[:, begin:], "position_ids": position[:, begin:]}
    theirs = model(opened, **after, past_key_values=cache, use_cache=True, store_kv=False).logits[0, length - begin :]
    decoder = BlockDecoder(model, ids, inputs["attention_mask"].bool(), inputs["answer_index"], pixels)
    decoder.prefill()
    torch.testing.assert_close(theirs, decoder.block_logits()[0, length - begin :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model_type", "context"), alternating(DIFFERENT, CONTEXTS, NATIVE))
def test_no_leak_and_the_bug_is_caught(
    model_type: str, context: str, loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch
):
    """All of an answer is masked, so no clean token of its last block may move any prediction; a rule that lets a noisy block see
    its clean copy is noticed."""
    require_no_leak(loaded(model_type), CHAT[:2], context, monkeypatch)


@torch.no_grad()
def test_pixels_that_are_not_all_there(loaded: Callable[[str], Loaded]):
    """One message for a tensor that a caller left out; image_sizes, which callers of SDAR-VL always name, count images and not
    the patches of packed ones."""
    model, processor = loaded("qwen3_vl")
    inputs = processor.apply_chat_template(CHAT[:1], tokenize=True, add_generation_prompt=True)
    for name in pixels_in(inputs):
        rest = {key: value for key, value in inputs.items() if key != name}
        for call in (model, partial(model.generate, max_new_tokens=1)):
            with pytest.raises(ValueError, match=f"images without {name}; expected them as image_grid_thw, pixel_values"):
                call(**rest)
    text = {name: value for name, value in inputs.items() if name not in pixels_in(inputs)}
    with pytest.raises(ValueError, match="image tokens in the text, but no image_grid_thw, pixel_values"):
        model(**text)
    sizes = torch.tensor([[60, 112], [40, 40]])
    assert torch.equal(model(**inputs, image_sizes=sizes).logits, model(**inputs).logits)
    answer: Any = model.generate(**inputs, image_sizes=sizes, max_new_tokens=1)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 1
    tiled, inputs = loaded("llava_next")[0], loaded("llava_next")[1].apply_chat_template(CHAT[:1], tokenize=True)
    with pytest.raises(ValueError, match="1 image_sizes, but another number of images"):
        tiled(**{**inputs, "image_sizes": sizes[:1]})


# --- whole runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file of records with no image, one and two, of different sizes."""
    folder = tmp_path_factory.mktemp("records")
    written = []
    for number in range(6):
        images = [WIDE, TALL, SMALL][: number % 3]
        for place, image in enumerate(images):
            image.save(folder / f"{number}-{place}.png")
        turns = [
            {"from": "human", "value": "<image>\n" * len(images) + f"What is number {number}?"},
            {"from": "gpt", "value": f"It is {number}."},
        ]
        names = {"image": [f"{number}-{place}.png" for place in range(len(images))]} if images else {}
        written.append({"id": str(number), **names, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(written), encoding="utf-8")
    return folder / "data.json"


@pytest.mark.parametrize(("model_type", "way"), alternating(DIFFERENT, [("block", False, None), ("causal", True, 1024)], NATIVE))
def test_diffuse_and_generate(
    model_type: str, way: tuple[str, bool, int | None], prepared: Callable[[str], Path], records: Path, tmp_path: Path
):
    """Full and with adapters, one sample a row and packed: the vision part stays as it was to the bit, the text part and the mask
    row move, and the checkpoint answers."""
    context, lora, row_length = way
    settings: dict[str, Any] = {"trainable": {"trunk": 1e-3, "mask_row": 1e-3}, "steps": 2}
    settings["objective"] = {**BETA, "context": context, "grid": "response"}
    if lora:
        settings["lora"] = {"rank": 2, "alpha": 4}
    start = prepared(model_type)
    trained = run(start, stage_recipe(records, row_length=row_length, **settings), tmp_path / "diffuse")
    (model, processor), (before, _) = load_checkpoint(trained), load_checkpoint(start)
    vision = vision_parameters(model.source)
    after, first = dict(model.source.named_parameters()), dict(before.source.named_parameters())
    moved = {name for name, value in after.items() if not torch.equal(value, first[name])}
    assert vision and not moved & vision.keys()
    parts = parts_of(model)
    assert {parts[f"source.{name}"] for name in moved} == {"trunk"} and len(moved) > 4
    mask = model.config.mask_token_id
    embeddings: Any = model.get_input_embeddings(), before.get_input_embeddings()
    table, was = (embedding.weight for embedding in embeddings)
    assert not torch.equal(table[mask], was[mask])
    if lora:
        others = [row for row in range(len(table)) if row != mask]
        assert torch.equal(table[others], was[others])
    lines = [line for line in metrics(trained) if "loss" in line]
    assert len(lines) == 2 and all(0 < line["loss"] < 50 for line in lines)
    inputs = processor.apply_chat_template(CHAT[:3], tokenize=True, add_generation_prompt=True)
    answer: Any = model.eval().generate(**inputs, max_new_tokens=5)
    assert 1 <= answer.shape[1] - inputs["input_ids"].shape[1] <= 5


@pytest.mark.parametrize("model_type", natives("qwen3_vl", "gemma3"))
def test_a_bf16_source(model_type: str, source: Callable[[str], Path], records: Path, tmp_path: Path):
    """Sources are published in bf16: one is prepared with the logits that it has, trained as such, and what answers in memory
    after a stage is what was written."""
    half = shutil.copytree(source(model_type), tmp_path / "half")
    AutoModelForImageTextToText.from_pretrained(half, dtype=torch.bfloat16).save_pretrained(half)
    settings: dict[str, Any] = {"trainable": {"trunk": 1e-3, "mask_row": 1e-3}, "steps": 1, "objective": BETA}
    recipe = stage_recipe(records, precision="bf16", **settings)
    start = prepare(Source(str(half), None, None), recipe, tmp_path / "prepared", QUIET)
    assert {value.dtype for value in weights_of(start).values()} == {torch.bfloat16}
    ended: list[Any] = []
    onlooker = training.Onlooker(lambda *_: None, lambda model, *_: ended.append(model))
    trained = training.train(start, recipe, "diffuse", tmp_path / "diffuse", False, QUIET, onlooker)
    assert saved_dtype(trained) == torch.bfloat16
    model, processor = load_checkpoint(trained)
    inputs = processor.apply_chat_template(CHAT[:3], tokenize=True, add_generation_prompt=True)
    given = {name: value for name, value in inputs.items() if name != "answer_index"}
    with torch.no_grad():
        assert torch.equal(model.eval()(**given).logits, ended[0].eval()(**given).logits)


@pytest.mark.parametrize("model_type", natives("qwen3_vl"))
def test_a_resumed_run_is_the_uninterrupted_one(
    model_type: str, prepared: Callable[[str], Path], records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings: dict[str, Any] = {"trainable": {"trunk": 1e-3, "mask_row": 1e-3}, "steps": 4, "save_every": 2, "objective": BETA}
    recipe = stage_recipe(records, row_length=1024, batch_size=1, **settings)
    start = prepared(model_type)
    whole = run(start, recipe, tmp_path / "whole")
    crash(start, recipe, tmp_path / "cut", step=3, resume=False, patch=monkeypatch)
    cut = run(start, recipe, tmp_path / "cut", resume=True)
    assert metrics(cut) == metrics(whole)
    ours, theirs = weights_of(whole), weights_of(cut)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_frozen_vision_stays_in_eval_and_its_trained_parts_do_not(loaded: Callable[[str], Loaded]):
    model = copy.deepcopy(loaded("llava")[0])
    parts = parts_of(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parts[name] == "trunk")
    model.train()
    tower, connector = model.source.model.vision_tower, model.source.model.multi_modal_projector
    assert not tower.training and not any(module.training for module in tower.modules())
    assert not connector.training and model.source.get_decoder().training
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parts[name] in ("trunk", "connector"))
    model.train()
    assert connector.training and not tower.training
