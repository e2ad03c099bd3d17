"""The invariants on vision-language models with videos: M-RoPE with and without timestamps, pooled frames, frames as images."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import alternating, metrics, random_image, stage_recipe
from leaks import noisy_logits, require_no_leak
from shared_fixtures import Loaded
from tiny_videos import frames, write_frames, write_video
from train_and_decode import compare, training_sample
from training_runs import BETA, run
from transformers import AutoModelForImageTextToText

from diffvl.hub.clips_diffvl import Sampler, open_clip
from diffvl.hub.images_diffvl import VIDEO_FRAMES, token_types
from diffvl.hub.processing_diffvl import pixels_in
from diffvl.store.checkpoint import load_checkpoint

ALL = Sampler(lambda facts: range(facts.total_num_frames), 2.0)
LONG, SHORT = (open_clip(frames(*size), ALL) for size in ((8, 84, 60, 1), (4, 56, 64, 2)))
SMALL = random_image(3).resize((40, 40))
QUESTION = {"type": "text", "text": "And what else?"}
CHAT: list[dict[str, Any]] = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "Now?"}, {"type": "video", "video": LONG}, {"type": "image", "image": SMALL}],
    },
    {"role": "assistant", "content": "A red circle moves and, to the right, 2 blue stars."},
    {"role": "user", "content": [{"type": "video", "video": SHORT}, QUESTION]},
    {"role": "assistant", "content": "Nothing else moves in this one, of that I am sure."},
]
BESIDE = [
    [
        {"role": "user", "content": [{"type": "image", "image": SMALL}, {"type": "text", "text": "One"}]},
        {"role": "assistant", "content": "Yes."},
    ],
    [{"role": "user", "content": [{"type": "video", "video": SHORT}, QUESTION]}, {"role": "assistant", "content": "No."}],
]
# Packed patches with timestamps in the text, pooled frames in a tensor of their own, frames as images; the others repeat these.
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl", "smolvlm")
DIFFERENT = ("qwen3_vl", "llava_onevision")


def families(*different: str) -> list[Any]:
    return [pytest.param(one, marks=() if one in (different or DIFFERENT) else pytest.mark.slow) for one in FAMILIES]


@pytest.mark.parametrize("model_type", families())
@torch.no_grad()
def test_parity(model_type: str, source: Callable[[str], Path], loaded: Callable[[str], Loaded]):
    """With a video, and with one beside an image: the logits of the source, to the bit, under explicit masks and without."""
    model, processor = loaded(model_type)
    stock: Any = AutoModelForImageTextToText.from_pretrained(source(model_type)).eval()
    ids_of = model.config.image_token_id, model.config.video_token_id
    for turns in (BESIDE[1][:1], CHAT[:1]):
        inputs = processor.apply_chat_template(turns, tokenize=True, add_generation_prompt=True)
        ids, pixels = inputs["input_ids"], pixels_in(inputs)
        given = {name: value for name, value in pixels.items() if name != VIDEO_FRAMES}
        expected = stock(input_ids=ids, **given, **token_types(stock, ids, *ids_of), use_cache=False).logits
        rows = [row for row in range(expected.shape[-1]) if row != model.config.mask_token_id]
        for mask in (None, inputs["attention_mask"]):
            assert torch.equal(model(ids, **pixels, attention_mask=mask).logits[..., rows], expected[..., rows])
        moved = {name: value.flip(1) if name.startswith("pixel_values") else value for name, value in pixels.items()}
        assert not torch.equal(model(ids, **moved).logits[..., rows], expected[..., rows])


@pytest.mark.parametrize(
    ("model_type", "way"), alternating(DIFFERENT, [("block", "response", True), ("causal", "absolute", False)], FAMILIES)
)
def test_training_logits_are_decoding_logits(model_type: str, way: tuple[str, str, bool], loaded: Callable[[str], Loaded]):
    """Two turns with two videos of other lengths and an image, beside samples with a video and with an image."""
    context, grid, packed = way
    compare(loaded(model_type), 4, context, grid, "same", chat=CHAT, beside=BESIDE, packed=packed)


@pytest.mark.parametrize("model_type", families("qwen3_vl"))
def test_no_leak_and_the_bug_is_caught(model_type: str, loaded: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch):
    """All of an answer is masked: no clean token of its last block moves a prediction; the video does."""
    model, processor = loaded(model_type)
    sample = training_sample(processor, CHAT[:2], 3)
    assert sample.pixels is not None
    turned = {name: value.flip(1) if "pixel_values" in name else value for name, value in sample.pixels.items()}
    seen = [noisy_logits(model, one, "block") for one in (sample, replace(sample, pixels=turned))]
    assert not torch.equal(*seen)
    require_no_leak(loaded(model_type), CHAT[:2], "block", monkeypatch)


@pytest.mark.parametrize("model_type", families())
def test_generated_tokens_do_not_depend_on_the_batch(model_type: str, loaded: Callable[[str], Loaded]):
    """Prompts with a video and an image, another video, and an image, alone and together; and a conversation that goes on."""
    model, processor = loaded(model_type)
    model.config.set_decoding("blocks", 4, "causal", "response", "same")
    prompts = [CHAT[:1], BESIDE[1][:1], BESIDE[0][:1]]
    together = processor.apply_chat_template(prompts, tokenize=True, add_generation_prompt=True)
    ways: tuple[dict[str, Any], ...] = ({"max_new_tokens": 9}, {"max_new_tokens": 5, "mode": "speculative"})
    for settings in ways:
        answers: Any = model.generate(**together, **settings)
        answers = answers[:, together["input_ids"].shape[1] :]
        for row, prompt in enumerate(prompts):
            one = processor.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True)
            alone: Any = model.generate(**one, **settings)
            given = alone[0, one["input_ids"].shape[1] :].tolist()
            assert answers[row, : len(given)].tolist() == given, (settings, row)
    generate: Any = model.generate
    again: dict[str, Any] = {"max_new_tokens": 6, "return_dict_in_generate": True}
    first, second = (
        processor.apply_chat_template(turns, tokenize=True, add_generation_prompt=True) for turns in (CHAT[:1], CHAT[:3])
    )
    prefix = generate(**first, **again).prefix
    fresh, continued = generate(**second, **again), generate(**second, prefix=prefix, **again)
    assert torch.equal(fresh.sequences, continued.sequences) and continued.reused > 20


def test_what_is_not_a_whole_video(loaded: Callable[[str], Loaded]):
    model, processor = loaded("qwen2_5_vl")
    inputs = processor.apply_chat_template(BESIDE[1][:1], tokenize=True, add_generation_prompt=True)
    rest = {name: value for name, value in inputs.items() if name != "video_grid_thw"}
    with pytest.raises(ValueError, match="videos without video_grid_thw; expected them as pixel_values_videos"):
        model.generate(**rest, max_new_tokens=1)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="0 images give 0 image tokens, the text has"):
        model.generate(**text, max_new_tokens=1)
    plain, _ = loaded("llava")
    with pytest.raises(ValueError, match="video is not supported: pixel_values_videos must be None"):
        plain(torch.tensor([[5]]), pixel_values_videos=inputs["pixel_values_videos"])


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file, a folder and a list of frames, an image, two videos, and text."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "a.mp4", frames(40, 64, 48))
    write_frames(folder / "b", frames(6, 56, 70))
    SMALL.save(folder / "c.png")
    shown: list[dict[str, Any]] = [
        {"video": "a.mp4"},
        {"video": "b"},
        {"video": ["b/frame_0.png", "b/frame_3.png", "b/frame_4.png", "b/frame_5.png"]},
        {"image": "c.png"},
        {"videos": ["a.mp4", "b"], "image": "c.png"},
        {},
    ]
    written = [
        {
            "id": str(number),
            **one,
            "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": f"It is {number}."}],
        }
        for number, one in enumerate(shown)
    ]
    (folder / "data.json").write_text(json.dumps(written), encoding="utf-8")
    return folder / "data.json"


@pytest.mark.parametrize("row_length", [pytest.param(None, marks=pytest.mark.slow), 1024], ids=["alone", "packed"])
@pytest.mark.parametrize("model_type", families("qwen3_vl"))
def test_diffuse_and_generate(
    model_type: str, row_length: int | None, prepared: Callable[[str], Path], records: Path, tmp_path: Path
):
    settings: dict[str, Any] = {"trainable": {"trunk": 1e-3, "mask_row": 1e-3}, "steps": 2, "objective": BETA}
    trained = run(prepared(model_type), stage_recipe(records, row_length=row_length, **settings), tmp_path / "diffuse")
    lines = [line for line in metrics(trained) if "loss" in line]
    assert len(lines) == 2 and all(0 < line["loss"] < 50 for line in lines)
    model, processor = load_checkpoint(trained)
    inputs = processor.apply_chat_template(CHAT[:3], tokenize=True, add_generation_prompt=True)
    answer: Any = model.eval().generate(**inputs, max_new_tokens=5)
    assert 1 <= answer.shape[1] - inputs["input_ids"].shape[1] <= 5
