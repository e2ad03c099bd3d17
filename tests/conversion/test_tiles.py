"""Stages that cut images in other ways, by the command line: what is trained, what decodes, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUIET, random_image
from tiny_runs import Workshop, refused, stage, succeed, write_data, write_recipe
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil

from diffvl.config.resolve import resolve
from diffvl.demo import standins
from diffvl.errors import CheckpointError
from diffvl.hub.processing_diffvl import pixels_in
from diffvl.prepare.run import prepare
from diffvl.prepare.source import Source
from diffvl.store.checkpoint import load_checkpoint, load_description
from diffvl.store.files import read_json

TILING = {"kind": "anyres", "grids": ["1x1-2x2"], "max_tiles": 2}


def records(folder: Path) -> Path:
    """One image, two in one question, and none."""
    turns = [{"from": "human", "value": "<image><image>Which?"}, {"from": "gpt", "value": "The first."}]
    one = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A wide one."}]
    for name, size in (("wide.png", (90, 40)), ("tall.png", (40, 70))):
        random_image(len(name)).resize(size).save(folder / name)
    given: list[dict[str, Any]] = [
        {"image": "wide.png", "conversations": one},
        {"image": ["wide.png", "tall.png"], "conversations": turns},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        {"image": "tall.png", "conversations": one},
    ]
    return write_data(folder, *given)


@pytest.fixture(scope="module")
def run(source: Callable[[str], Path], tower: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages, squares first and then tiles, in packed rows; the folder holds its data."""
    folder = tmp_path_factory.mktemp("tiles")
    data = records(folder)
    packed = {"data": {"row_length": 400, "holdout": 1}, "tiling": TILING}
    recipe = write_recipe(folder / "r.yaml", tower, align=stage("align", data), diffuse=stage("diffuse", data, **packed))
    ended = succeed("convert", source("llama"), "--recipe", recipe, "--out", folder / "run")
    assert "images in tiles (at most 2); trains " in " ".join(ended.out.split())
    return folder


def test_each_stage_has_its_own(run: Path):
    kinds = {name: read_json(run / "run" / name / "config.json").get("tiling") for name in ("prepared", "align", "diffuse")}
    assert kinds == {"prepared": None, "align": None, "diffuse": {"grids": [[1, 1], [1, 2], [2, 1], [2, 2]], "max_tiles": 2}}
    assert "tiling" not in read_json(run / "run" / "align" / "processor_config.json")
    assert [line for line in (run / "run" / "diffuse" / "samples.jsonl").read_text().splitlines() if "after" in line]


def test_generate_and_evaluate(run: Path):
    """Both look at images as the stage did."""
    words = ("--image", run / "wide.png", "--image", run / "tall.png", "--prompt", "Which?", "--max-new-tokens", "6", "--json")
    assert json.loads(succeed("generate", run / "run" / "diffuse", *words).out)["tokens"] >= 1
    figures = json.loads(succeed("evaluate", run / "run" / "diffuse", "--data", run / "data.json", "--json").out)
    assert 0 < figures["masked_loss"] < 50


@pytest.mark.slow  # bench/test_bench_decode.py has the parts
def test_bench(run: Path):
    words = ("--data", run / "data.json", "--batch", "1,2", "--max-new-tokens", "4", "--repeats", "1", "--steps", "2", "--json")
    rows = json.loads(succeed("bench", "decode", run / "run" / "diffuse", *words).out)["rows"]
    assert {row["decoder"] for row in rows} == {"ar_generate", "published", "ours"}


def test_it_goes_on_with_the_tiles_that_it_has(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """And a recipe that was written for other images is told so."""
    data, start = run / "data.json", run / "run" / "diffuse"
    recipe = write_recipe(tmp_path / "r.yaml", Path("no-tower"), diffuse=stage("diffuse", data, steps=1))
    recipe.write_text(recipe.read_text().replace("prepare:", "prepare:\n  tiling: {kind: none}"))
    words = ("convert", "--from", start, "--stage", "diffuse", "--recipe", recipe)
    succeed(*words, "--out", tmp_path / "out")
    assert f"{start} sees images with tiling anyres, and goes on so; prepare.tiling of the recipe says none" in caplog.text
    assert load_description(tmp_path / "out" / "diffuse")[1].tiling == load_description(start)[1].tiling
    caplog.clear()
    succeed(*words, "--out", tmp_path / "squares", "--set", "stages.diffuse.tiling={kind: none}")
    assert "sees images with tiling" not in caplog.text
    assert load_description(tmp_path / "squares" / "diffuse")[1].tiling is None


# --- towers ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("clip", {}), ("dinov2", {"connector": {"kind": "pixel_shuffle", "factor": 2}, "image_size": 48})],
)
def test_towers_and_connectors(kind: str, settings: dict[str, Any], source: Callable[[str], Path], tmp_path: Path):
    """Towers with class tokens and processors that crop; a connector that joins patches joins them within a tile."""
    stages = {"align": {"objective": {"kind": "ar"}, "trainable": {"connector": 1e-3}, "steps": 1}}
    recipe = resolve({"prepare": {"tiling": TILING, **settings}, "stages": stages}, [], "test")
    tower = standins.make_tower(tmp_path / "tower", kind)
    prepared = prepare(Source(str(source("llama")), None, str(tower)), recipe, tmp_path / "prepared", QUIET)
    model, processor = load_checkpoint(prepared)
    shown = [{"type": "image", "image": random_image(1).resize((100, 50))}, {"type": "text", "text": "?"}]
    inputs = processor.apply_chat_template([{"role": "user", "content": shown}], tokenize=True)
    rows = model.images.encode(pixels_in(inputs))
    assert processor.tiles == model.config.tiles and processor.tiles is not None
    assert processor.tiles.side == (3 if kind == "dinov2" else 4) and inputs["num_tiles"].tolist() == [3]
    found = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert rows.counts == (processor.tiles.tokens((50, 100)),) == (found,)


def test_a_tower_whose_processor_does_more_than_tiles_get(convert: Workshop, tower: Path, tmp_path: Path):
    other = tmp_path / "other"
    standins.make_tower(other, "siglip")
    EfficientNetImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(other)
    words = ("--set", f"prepare.vision_tower={other}", "--set", "prepare.tiling={kind: anyres}")
    convert.refuses(
        *words, says=["EfficientNetImageProcessorPil: this image processor does more than to resize", "leave tiling out"]
    )


# --- what is refused ---------------------------------------------------------------------------------------------------------


def test_a_newline_that_nothing_would_train(convert: Workshop):
    words = ("--set", "stages.diffuse.tiling={kind: anyres}", "--set", "stages.diffuse.trainable={trunk: 1.0e-3}")
    convert.refuses(*words, says=["diffuse: tiling adds a newline to the connector, and trainable has no connector"])


def test_a_vision_language_model_cuts_its_own(source: Callable[[str], Path], tmp_path: Path):
    words = ("convert", source("llava"), "--out", tmp_path / "out", "--data", records(tmp_path), "--set")
    refused(*words, "prepare.tiling={kind: anyres}", says=["prepare.tiling has no effect: MODEL is a vision-language model"])
    setting = "stages.diffuse.tiling={kind: anyres}"
    refused(*words, setting, says=["diffuse: tiling has no effect: this vision-language model cuts images by its own processor"])
    assert not (tmp_path / "out").exists()


def test_a_record_that_does_not_fit_is_told_by_its_line(convert: Workshop, tmp_path: Path):
    """By the size in the head of the image's file alone: nothing else of it is there."""
    data = records(tmp_path)
    (tmp_path / "wide.png").write_bytes((tmp_path / "wide.png").read_bytes()[:60])
    settings = (
        "stages.diffuse.tiling={kind: anyres}",
        f"stages.diffuse.data={{train: {data}, max_length: 80, check_lengths: true}}",
    )
    words = [word for setting in settings for word in ("--set", setting)]
    convert.refuses(*words, says=["data.json:2: ", "tokens, images included, where at most 80 are allowed"])


def test_a_checkpoint_whose_parts_disagree(run: Path, tmp_path: Path):
    for name in ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((run / "run" / "diffuse" / name).read_bytes())
    config = read_json(tmp_path / "config.json")
    config["tiling"]["max_tiles"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config.json and processor_config.json cut images in different ways"):
        load_description(tmp_path)


@torch.no_grad()
def test_pixels_of_another_kind(run: Path):
    model, processor = load_checkpoint(run / "run" / "diffuse")
    ids = torch.full((1, 20), processor.image_token_id)
    with pytest.raises(ValueError, match="images without image_sizes; expected them as pixel_values, image_sizes, num_tiles"):
        model(ids, pixel_values=torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="expected .images, views, 3, height, width."):
        model(ids, pixel_values=torch.zeros(1, 3, 32, 32), image_sizes=torch.tensor([[32, 32]]))
