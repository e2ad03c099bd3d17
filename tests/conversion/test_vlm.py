"""The route from an AR vision-language model, by the command line: convert, generate, evaluate, go on, load elsewhere."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_image
from tiny_runs import refused, succeed
from tiny_videos import frames, write_video

from diffvl.store.checkpoint import load_checkpoint, read_state

CLIENT = Path(__file__).parents[1] / "support" / "native_client.py"
SMALL = {"epochs": "null", "steps": 2, "batch_size": 1, "accumulation": 1, "precision": "fp32", "save_every": 1}


def records(folder: Path, count: int = 4) -> Path:
    """Records with an image each, of different sizes."""
    written = []
    for number in range(count):
        random_image(number).resize((48 + 20 * number, 60)).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"Number {number}."}]
        written.append({"image": f"{number}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(written), encoding="utf-8")
    return folder / "data.json"


def with_video(data: Path) -> Path:
    """Adds a record with a video, which comes first and is held out for the report."""
    write_video(data.parent / "clip.mp4", frames(24, 64, 48))
    asked = {"from": "human", "value": "<video>\nWhat happens?"}
    moving = {"video": "clip.mp4", "conversations": [asked, {"from": "gpt", "value": "It changes."}]}
    data.write_text(json.dumps([moving, *json.loads(data.read_text(encoding="utf-8"))]), encoding="utf-8")
    return data


def convert(source: Path, folder: Path, *words: object, video: bool = False) -> Path:
    """Runs the default recipe of such a source, cut short; returns the finished stage."""
    data = with_video(records(folder)) if video else records(folder)
    settings = [word for key, value in SMALL.items() for word in ("--set", f"stages.diffuse.{key}={value}")]
    settings += ["--set", f"stages.diffuse.data={{train: {data}, max_length: 512, holdout: 1}}"]
    succeed("convert", source, "--out", folder / "out", *settings, *words)
    return folder / "out" / "diffuse"


@pytest.fixture(scope="module")
def converted(source: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model type -> a finished run: full, and with adapters."""
    runs = {}
    for model_type, words in (("qwen2_5_vl", ()), ("gemma3", ("--recipe", "vlm-lora"))):
        folder, video = tmp_path_factory.mktemp(model_type), model_type == "qwen2_5_vl"
        runs[model_type] = convert(source(model_type), folder, *words, video=video)
    return runs


def test_it_goes_to_diffuse_directly(converted: dict[str, Path]):
    for model_type, directory in converted.items():
        require_finished(directory, "runs" if model_type == "gemma3" else "causal")


def require_finished(directory: Path, image_attention: str) -> None:
    assert sorted(path.name for path in directory.parent.iterdir()) == ["diffuse", "prepared"]
    prepared = read_state(directory.parent / "prepared")
    assert len(prepared["parents"]) == 1 and 0 <= prepared["proofs"]["ar_parity"] < 1e-4
    config = load_checkpoint(directory)[0].config
    assert config.image_attention == image_attention
    assert config.text_config is config.source_config.get_text_config(decoder=True)
    assert config.text_config.mask_token_id == config.mask_token_id


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "gemma3"])
def test_generate_and_evaluate(model_type: str, converted: dict[str, Path]):
    require_answers_and_figures(converted[model_type])


def require_answers_and_figures(directory: Path) -> None:
    image = directory.parent.parent / "2.png"
    shown = succeed("generate", directory, "--image", image, "--prompt", "What is it?", "--max-new-tokens", "6", "--json")
    assert json.loads(shown.out)["tokens"] >= 1
    figures = json.loads(succeed("evaluate", directory, "--data", directory.parent.parent / "data.json", "--json").out)
    assert 0 < figures["masked_loss"] < 50 and 0 <= figures["exact_match"] <= 1


def test_videos(converted: dict[str, Path], source: Callable[[str], Path], tmp_path: Path):
    """A video by the command line, from a file of questions and in the report; what takes none says so, before it is trained."""
    directory = converted["qwen2_5_vl"]
    folder = directory.parent.parent
    words: tuple[object, ...] = ("generate", directory, "--max-new-tokens", "6")
    shown = succeed(*words, "--video", folder / "clip.mp4", "--prompt", "What happens?", "--json")
    (tmp_path / "ask.jsonl").write_text(json.dumps({"prompt": "<video>What happens?", "video": str(folder / "clip.mp4")}) + "\n")
    asked = succeed("generate", directory, "--max-new-tokens", "6", "--batch", tmp_path / "ask.jsonl")
    assert json.loads(shown.out)["tokens"] >= 1 and json.loads(asked.out)["tokens"] >= 1
    with_images = succeed(*words, "--video", folder / "clip.mp4", "--image", folder / "1.png", "--prompt", "<image>and <video>?")
    assert with_images.code == 0
    samples = [json.loads(line) for line in (directory / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert samples[0]["video"] == str(folder / "clip.mp4") and samples[0]["question"] == "What happens?"
    assert "clip.mp4" in (directory / "report.html").read_text(encoding="utf-8")
    refused(*words, "--video", tmp_path / "none.mp4", "--prompt", "Hi", says=["--video: ", "none.mp4 does not exist"])
    refused(*words, "--video", folder / "1.png", "--prompt", "<video><video>", says=["2 <video> markers, 1 videos were given"])
    plain = converted["gemma3"]
    refused("generate", plain, "--video", folder / "clip.mp4", "--prompt", "Hi", says=["a video, which this model does not take"])
    data = f"stages.diffuse.data={{train: {folder / 'data.json'}, max_length: 512, holdout: 1}}"
    says = ["1 of 5 records show a video, which this checkpoint does not take, the first data.json:1"]
    refused("convert", source("gemma3"), "--out", tmp_path / "out", "--set", data, says=says)
    rate = ("--set", "prepare.video.fps=1")
    refused(
        "convert", source("gemma3"), "--out", tmp_path / "o", "--set", data, *rate, says=["prepare.video.fps", "takes no videos"]
    )
    both = ("--set", "prepare.video.num_frames=4")
    refused("convert", source("qwen2_5_vl"), "--out", tmp_path / "o", "--set", data, *rate, *both, says=["keep one of them"])


def test_what_a_stage_names_is_checked_before_anything_is_prepared(source: Callable[[str], Path], tmp_path: Path):
    settings = f"stages.diffuse.data={{train: {records(tmp_path)}, max_length: 512, holdout: 1}}"
    words = ("convert", source("qwen2_5_vl"), "--out", tmp_path / "out", "--set", settings)
    part = "stages.diffuse.trainable.connector=1e-4"
    refused(*words, "--set", part, says=["diffuse: trainable.connector: this model has no parameters of that part; leave it out"])
    for targets, says in (
        (".*\\.no_such_proj", "names no linear layer of its text part"),
        ("(q_proj", "is no regular expression"),
    ):
        adapters = f"stages.diffuse.lora.targets={json.dumps(targets)}"
        refused(*words, "--recipe", "vlm-lora", "--set", adapters, says=["diffuse: lora.targets", says])
    assert not (tmp_path / "out").exists()
    succeed(*words, "--set", "stages.diffuse.attention=eager", "--set", "stages.diffuse.trainable.tower=1e-5", "--dry-run")


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_its_decoding_is_compared(model_type: str, converted: dict[str, Path]):
    """With AR `generate` of the source and with the published loop, which gives the same tokens, images and all."""
    directory = converted[model_type]
    data = directory.parent.parent / "images.json"
    records = json.loads((directory.parent.parent / "data.json").read_text(encoding="utf-8"))
    data.write_text(json.dumps([record for record in records if "image" in record]), encoding="utf-8")
    words = ("--data", data, "--batch", "1,2", "--steps", "2", "--max-new-tokens", "8", "--repeats", "1", "--json")
    found = json.loads(succeed("bench", "decode", directory, *words).out)
    assert {row["decoder"] for row in found["rows"]} == {"ar_generate", "published", "ours"}
    assert all(row["tokens"] > 0 and row["tokens_per_second"] > 0 for row in found["rows"])


def test_it_goes_on_from_where_it_is(source: Callable[[str], Path], converted: dict[str, Path]):
    """A finished run is not trained again, and another stage can start from it."""
    directory = converted["qwen2_5_vl"]
    before = (directory / "model.safetensors").stat().st_mtime_ns
    data = f"{{train: {directory.parent.parent / 'data.json'}, max_length: 512, holdout: 1}}"
    settings = [word for key, value in SMALL.items() for word in ("--set", f"stages.diffuse.{key}={value}")]
    words = ("--out", directory.parent, "--resume", *settings, "--set", f"stages.diffuse.data={data}")
    succeed("convert", source("qwen2_5_vl"), *words)
    assert (directory / "model.safetensors").stat().st_mtime_ns == before


def test_a_checkpoint_loads_and_answers_without_diffvl(converted: dict[str, Path], tmp_path: Path):
    image = next(iter(converted.values())).parent.parent / "1.png"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    video = converted["qwen2_5_vl"].parent.parent / "clip.mp4"
    program = [sys.executable, "-I", CLIENT, image, video, *converted.values()]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    facts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(facts) == len(converted)
    for directory, found in zip(converted.values(), facts, strict=True):
        assert found["module"].startswith("transformers_modules.") and not found["diffvl"]
        model, processor = load_checkpoint(directory)
        content = [{"type": "image", "path": str(image)}, {"type": "text", "text": "What is it?"}]
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True)
        ours: Any = model.eval().generate(**inputs, max_new_tokens=8)
        assert ours[0, inputs["input_ids"].shape[1] :].tolist() == found["answer"]
        with torch.no_grad():
            logits = model(**{name: value for name, value in inputs.items() if name != "answer_index"}).logits[0, -1]
        torch.testing.assert_close(logits[:20], torch.tensor(found["logits"]), rtol=1e-5, atol=1e-5)
        if processor.sampler is not None:
            content[0] = {"type": "video", "path": str(video)}
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=True, add_generation_prompt=True
            )
            answer: Any = model.generate(**inputs, max_new_tokens=8)
            assert answer[0, inputs["input_ids"].shape[1] :].tolist() == found["of_video"]
    assert [found["of_video"] is not None for found in facts] == [True, False]


@pytest.mark.slow
def test_tiles_with_newlines_take_the_same_way(source: Callable[[str], Path], tmp_path: Path):
    directory = convert(source("llava_next"), tmp_path)
    require_finished(directory, "causal")
    require_answers_and_figures(directory)
