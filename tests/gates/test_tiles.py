"""The invariants on images in tiles: one that is alone in its question and several that share one, of several shapes.

Export is in test_export.py, layout equivalence in test_one_forward.py; the geometry is held against transformers in
hub/test_tiling.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks
from helpers import metrics, random_image, stage_recipe, weights_of
from leaks import require_no_leak
from shared_fixtures import TILED, TILING, Loaded
from train_and_decode import compare
from training_runs import BETA, crash, require_same_steps, run, run_two
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

from diffvl.config.recipe import Recipe
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration
from diffvl.hub.processing_diffvl import pixels_in
from diffvl.store.checkpoint import load_checkpoint

WIDE, TALL, SMALL = (random_image(seed).resize(size) for seed, size in enumerate([(90, 40), (33, 96), (20, 20)]))


def asked(text: str, *images: Any) -> dict[str, Any]:
    return {"role": "user", "content": [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


CHAT = [
    asked("Now?", WIDE),
    said("A red circle and, to the right, 2 blue stars."),
    asked("And these two?", SMALL, TALL),
    said("Nothing else is in these, of that I am sure, and I have looked twice."),
]
BESIDE = [[asked("One", TALL), said("Yes.")], [asked("No image here. " * 4), said("No.")]]


# --- one forward -------------------------------------------------------------------------------------------------------------


def as_transformers_own(model: DiffVLForConditionalGeneration) -> Any:
    """LLaVA-OneVision of transformers with the weights of a DiffVL model."""
    config, tiles = model.config, model.config.tiles
    assert tiles is not None
    own: Any = LlavaOnevisionForConditionalGeneration(
        LlavaOnevisionConfig(
            text_config=config.text_config,
            vision_config=config.vision_config,
            image_token_index=config.image_token_id,
            image_grid_pinpoints=[[rows * tiles.pixels, columns * tiles.pixels] for rows, columns in tiles.grids],
            vision_aspect_ratio=f"anyres_max_{tiles.max_tiles}",
            vision_feature_layer=config.vision_layer,
            vision_feature_select_strategy="full",
            tie_word_embeddings=True,
        )
    )
    parts: list[tuple[Any, Any]] = [
        (own.model.vision_tower, model.vision_tower),
        (own.model.multi_modal_projector.linear_1, model.connector.layers[0]),
        (own.model.multi_modal_projector.linear_2, model.connector.layers[2]),
        (own.model.language_model, model.language_model.model),
    ]
    for theirs, ours in parts:
        theirs.load_state_dict(ours.state_dict())
    assert model.image_newline is not None
    own.model.image_newline.data = model.image_newline.data
    own.tie_weights()
    return own.eval()


@torch.no_grad()
def test_parity_with_transformers_own_model(loaded: Callable[[str], Loaded]):
    """The AR logits of an image in tiles, and of several that are one view each."""
    model, processor = loaded(TILED)
    own = as_transformers_own(model)
    for question, together in ((asked("What?", WIDE), 1), (asked("What?", TALL), 1), (asked("Which?", SMALL, WIDE), 2)):
        inputs = processor.apply_chat_template([question], tokenize=True, add_generation_prompt=True)
        pixels = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
        logits = model(inputs["input_ids"], **pixels_in(inputs)).logits
        counted = {"batch_num_images": torch.tensor([together])}
        expected = own(input_ids=inputs["input_ids"], **pixels, **counted, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=2e-5)
        if together == 1:  # callers of SDAR-VL style name sizes and pixels alone
            assert torch.equal(model(inputs["input_ids"], **pixels).logits, logits)


@pytest.mark.parametrize("context", ["block", "causal"])
def test_no_leak_and_the_bug_is_caught(context: str, loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    require_no_leak(loaded(TILED), CHAT[:2], context, monkeypatch)


# --- train = decode ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "grid", "target", "packed"), [("block", "absolute", "same", True), ("causal", "response", "shift", False)]
)
def test_training_logits_are_decoding_logits(context: str, grid: str, target: str, packed: bool, loaded: Callable[[str], Loaded]):
    """The first image stays in tiles when others join the conversation in a later question."""
    compare(loaded(TILED), 4, context, grid, target, chat=CHAT, beside=BESIDE, packed=packed)


def test_an_image_that_reaches_into_the_first_block(loaded: Callable[[str], Loaded]):
    """The tiles of an image are cut by the start of the block in which the answer begins."""
    shown = [compare(loaded(TILED), size, "block", "absolute", "same", chat=CHAT, beside=BESIDE) for size in (32, 48)]
    assert any(map(any, shown))


def test_generated_tokens_do_not_depend_on_the_batch(loaded: Callable[[str], Loaded]):
    model, processor = loaded(TILED)
    model.config.set_decoding("blocks", 4, "causal", "response", "same")
    prompts = [CHAT[:3], BESIDE[0][:1], BESIDE[1][:1]]
    together = processor.apply_chat_template(prompts, tokenize=True, add_generation_prompt=True)
    assert together["num_tiles"].tolist() == [4, 1, 1, 4]
    for mode in ("blocks", "ar", "speculative"):
        settings: dict[str, Any] = {"mode": mode, "max_new_tokens": 9}
        answers: Any = model.generate(**together, **settings)
        answers = answers[:, together["input_ids"].shape[1] :]
        for row, prompt in enumerate(prompts):
            one = processor.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True)
            alone: Any = model.generate(**one, **settings)
            given = alone[0, one["input_ids"].shape[1] :].tolist()
            assert answers[row, : len(given)].tolist() == given, (mode, row)


def test_a_conversation_goes_on_from_its_prefix(loaded: Callable[[str], Loaded]):
    """Also where a later image has more tiles, beside which the pixels of the first are filled up."""
    model, processor = loaded(TILED)
    model.config.set_decoding("blocks", 4, "causal", "response", "same")
    settings: dict[str, Any] = {"max_new_tokens": 6, "return_dict_in_generate": True}
    chat = [asked("Now?", SMALL), said("A red circle."), asked("And this?", random_image(7).resize((64, 64)))]
    first, second = (
        processor.apply_chat_template(turns, tokenize=True, add_generation_prompt=True) for turns in (chat[:1], chat)
    )
    assert first["pixel_values"].shape[1] < second["pixel_values"].shape[1]
    generate: Any = model.generate
    prefix = generate(**first, **settings).prefix
    fresh, continued = generate(**second, **settings), generate(**second, prefix=prefix, **settings)
    assert torch.equal(fresh.sequences, continued.sequences) and continued.reused > 20


# --- whole runs of a stage that cuts tiles where the one before did not ------------------------------------------------------


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data file of records with one image, two in one question, and none."""
    folder = tmp_path_factory.mktemp("records")
    for name, image in (("wide", WIDE), ("tall", TALL), ("small", SMALL)):
        image.save(folder / f"{name}.png")
    written: list[dict[str, Any]] = []
    for number in range(8):
        names = [["wide.png"], ["tall.png", "small.png"], [], ["tall.png"]][number % 4]
        question = "<image>\n" * len(names) + f"What is number {number}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is {number}."}]
        written.append({**({"image": names} if names else {}), "conversations": turns})
    (folder / "data.json").write_text(json.dumps(written), encoding="utf-8")
    return folder / "data.json"


def recipe_of(records: Path, batch_size: int, accumulation: int = 1, **settings: Any) -> Recipe:
    cut = {"batch_size": batch_size, "accumulation": accumulation}
    return stage_recipe(records, objective=BETA, tiling=TILING, **cut, **{"steps": 3, **settings})


@pytest.fixture(scope="module")
def whole(prepared: Callable[[str], Path], records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of 8 samples in one go, from squares to tiles."""
    return run(prepared("llama"), recipe_of(records, 8), tmp_path_factory.mktemp("whole") / "run")


def test_from_squares_to_tiles(whole: Path, prepared: Callable[[str], Path]):
    """The newline is fresh and trains with the connector, the tower stays to the bit, and the checkpoint decodes what was
    trained."""
    before, after = weights_of(prepared("llama")), weights_of(whole)
    assert after.keys() - before.keys() == {"image_newline"} and not before.keys() - after.keys()
    moved = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"connector", "language_model"}
    fresh = load_checkpoint(prepared("llama"))[0]
    torch.manual_seed(0)
    fresh.set_tiling({"grids": [[1, 1]], "max_tiles": 1})
    assert fresh.image_newline is not None and not torch.equal(fresh.image_newline, after["image_newline"])
    torch.testing.assert_close(fresh.image_newline.detach(), after["image_newline"], rtol=0, atol=0.01)
    model, processor = load_checkpoint(whole)
    assert model.config.tiles == processor.tiles and processor.tiles is not None and processor.tiles.max_tiles == 2
    inputs = processor.apply_chat_template(CHAT[:1], tokenize=True, add_generation_prompt=True)
    assert inputs["num_tiles"].tolist() == [4]
    answer: Any = model.eval().generate(**inputs, max_new_tokens=5)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_accumulation_changes_nothing(whole: Path, prepared: Callable[[str], Path], records: Path, tmp_path: Path):
    require_same_steps(metrics(run(prepared("llama"), recipe_of(records, 1, 8), tmp_path / "ones")), metrics(whole))


@pytest.mark.slow  # what two processes add to this is tested on squares by default
def test_two_processes_are_one(whole: Path, forks: Forks, prepared: Callable[[str], Path], records: Path, tmp_path: Path):
    require_same_steps(run_two(forks, prepared("llama"), recipe_of(records, 2, 2), tmp_path), metrics(whole))


def test_a_resumed_run_is_the_uninterrupted_one(
    prepared: Callable[[str], Path], records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    recipe = recipe_of(records, 1, row_length=512, save_every=2)
    start = prepared("llama")
    uninterrupted = run(start, recipe, tmp_path / "whole")
    crash(start, recipe, tmp_path / "cut", step=3, resume=False, patch=monkeypatch)
    cut = run(start, recipe, tmp_path / "cut", resume=True)
    assert metrics(cut) == metrics(uninterrupted)
    ours, theirs = weights_of(uninterrupted), weights_of(cut)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_from_tiles_to_squares_and_to_other_tiles(prepared: Callable[[str], Path], records: Path, tmp_path: Path):
    """What is not asked for stays: a stage without a tiling of its own goes on with the one before."""
    start, plain = prepared(TILED), {"steps": 1, "objective": {"kind": "ar"}, "trainable": {"connector": 1e-3}}
    kept = load_checkpoint(run(start, stage_recipe(records, **plain), tmp_path / "kept"))
    assert kept[1].tiling == load_checkpoint(start)[1].tiling
    other = {"kind": "anyres", "grids": ["1x2"], "max_tiles": 1}
    less = load_checkpoint(run(start, stage_recipe(records, tiling=other, **plain), tmp_path / "other"))
    assert less[1].tiling == less[0].config.tiling == {"grids": [[1, 2]], "max_tiles": 1}
    squares = run(start, stage_recipe(records, tiling={"kind": "none"}, **plain), tmp_path / "squares")
    model, processor = load_checkpoint(squares)
    assert "image_newline" not in weights_of(squares) and model.config.image_inputs == ["pixel_values"]
    expected = load_checkpoint(prepared("llama"))[1].pixels([WIDE, TALL])
    assert torch.equal(processor.pixels([WIDE, TALL])["pixel_values"], expected["pixel_values"])
