"""DeepSeek-OCR 2 gives further tensors for large images only: samples with large images, small ones and none go together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import QUIET, metrics, random_image
from train_and_decode import compare, training_sample
from training_runs import BETA, run
from transformers import AutoModelForImageTextToText
from transformers.models.deepseek_ocr2 import DeepseekOcr2Config
from transformers.models.deepseek_ocr2.image_processing_pil_deepseek_ocr2 import DeepseekOcr2ImageProcessorPil

from diffvl.config.resolve import resolve
from diffvl.data.samples import collate
from diffvl.demo.standins import CHATML, make_tokenizer
from diffvl.hub.processing_diffvl import pixels_in
from diffvl.prepare.run import prepare
from diffvl.prepare.source import Source
from diffvl.store.checkpoint import load_checkpoint

PATCH = 2  # so that a tile of 96 pixels and an image of 128 have the patches that its encoder has queries for, 144 and 256
TILE, WHOLE, HIDDEN = 96, 128, 32
LARGE, SMALL, OTHER = (random_image(seed).resize(size) for seed, size in ((1, (180, 90)), (2, (60, 90)), (3, (90, 40))))


def source(directory: Path) -> Path:
    """A tiny random one, in the shape of a hub snapshot."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.chat_template = CHATML.replace(
        "{{ message['content'] }}",
        "{% for part in message['content'] %}{{ part['text'] if 'text' in part else '<image>' }}{% endfor %}",
    )
    tokenizer.save_pretrained(directory)
    size = {"height": WHOLE, "width": WHOLE}
    DeepseekOcr2ImageProcessorPil(size=size, tile_size=TILE).save_pretrained(directory)
    described = {"processor_class": "DeepseekOcr2Processor", "patch_size": PATCH, "downsample_ratio": 4}
    (directory / "processor_config.json").write_text(json.dumps(described), encoding="utf-8")
    few = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2}
    sam = few | {"image_size": WHOLE, "patch_size": PATCH, "window_size": 8, "global_attn_indexes": [], "output_channels": 16}
    text = few | {
        "intermediate_size": 64,
        "vocab_size": len(tokenizer),
        "mlp_layer_types": ["dense"],
        "max_position_embeddings": 4096,
    }
    text |= {"num_experts_per_tok": 2, "n_routed_experts": 4, "moe_intermediate_size": 32}
    text |= {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    encoder = few | {"intermediate_size": 64, "num_key_value_heads": 2, "vocab_size": 8}
    image_id: Any = tokenizer.convert_tokens_to_ids("<image>")
    config = DeepseekOcr2Config(
        vision_config={"sam_config": sam | {"downsample_channels": [24, HIDDEN]}, "encoder_config": encoder},
        text_config=text,
        image_token_id=image_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    model.save_pretrained(directory)
    return directory


def asked(*images: Any) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "?"}]}
    ]


def answered(*images: Any) -> list[dict[str, Any]]:
    return [
        *asked(*images),
        {"role": "assistant", "content": "A red one, and a blue one, and behind them many a yellow one, as far as one sees."},
    ]


@pytest.mark.slow
def test_large_and_small_images_in_one_batch(tmp_path: Path):
    data = {"train": str(records(tmp_path)), "holdout": 0, "max_length": 1024, "row_length": 1024}
    parts = {"trunk": 1e-3, "mask_row": 1e-3}
    stage = {"data": data, "trainable": parts, "steps": 2, "batch_size": 2, "precision": "fp32", "objective": BETA}
    whole = resolve({"stages": {"diffuse": stage}}, [], "test")
    start = prepare(Source(str(source(tmp_path / "source")), None, None), whole, tmp_path / "prepared", QUIET)
    model, processor = load_checkpoint(start)
    model.eval()
    model.config.set_decoding("blocks", 4, "causal", "response", "same")
    # 1. What a sample is in training is what it is alone, whatever stands beside it.
    samples = [training_sample(processor, answered(*images), 0) for images in ((SMALL,), (LARGE,), (), (OTHER, LARGE))]
    pixels = collate([[sample] for sample in samples], 0)["pixels"]
    assert pixels["num_local_patches"].tolist() == [0, 2, 0, 2] and len(pixels["pixel_values_local"]) == 4
    assert "pixel_values_local" not in collate([samples[:1]], 0)["pixels"]
    compare((model, processor), 4, "causal", "response", "same", trained=(1,), chat=answered(SMALL), beside=[answered(LARGE)])
    # 2. Answers do not depend on the batch.
    prompts = [asked(SMALL), asked(LARGE), [{"role": "user", "content": "No image."}]]
    together = processor.apply_chat_template(prompts, tokenize=True, add_generation_prompt=True)
    for mode in ("blocks", "ar"):
        answers: Any = model.generate(**together, mode=mode, max_new_tokens=6)
        for row, prompt in enumerate(prompts):
            alone = processor.apply_chat_template(prompt, tokenize=True, add_generation_prompt=True)
            given: Any = model.generate(**alone, mode=mode, max_new_tokens=6)
            expected = given[0, alone["input_ids"].shape[1] :].tolist()
            assert answers[row, together["input_ids"].shape[1] :][: len(expected)].tolist() == expected, (mode, row)
    # 3. A conversation goes on from its prefix although its first image had no tiles.
    first = processor.apply_chat_template(answered(SMALL)[:1], tokenize=True, add_generation_prompt=True)
    second = processor.apply_chat_template([*answered(SMALL), *asked(LARGE)], tokenize=True, add_generation_prompt=True)
    assert "pixel_values_local" in pixels_in(second) and "pixel_values_local" not in pixels_in(first)
    settings: dict[str, Any] = {"max_new_tokens": 4, "return_dict_in_generate": True}
    generate: Any = model.generate
    continued = generate(**second, prefix=generate(**first, **settings).prefix, **settings)
    assert torch.equal(continued.sequences, generate(**second, **settings).sequences) and continued.reused > 200
    # 4. A tensor that no image has is still refused.
    with pytest.raises(ValueError, match="pixel_tiles is not known here; expected images as num_local_patches, pixel_values"):
        model(**first, pixel_tiles=torch.ones(1))
    # 5. So they are trained, packed in one row.
    trained = run(start, whole, tmp_path / "diffuse")
    assert all(0 < line["loss"] < 50 for line in metrics(trained) if "loss" in line)


def records(folder: Path) -> Path:
    written = []
    for number, images in enumerate(((SMALL,), (LARGE,), (), (OTHER,))):
        turns = [{"from": "human", "value": "<image>\n" * len(images) + "?"}, {"from": "gpt", "value": f"It is {number}."}]
        for image in images:
            image.save(folder / f"{number}.png")
        written.append({"conversations": turns, **({"image": f"{number}.png"} if images else {})})
    (folder / "data.json").write_text(json.dumps(written), encoding="utf-8")
    return folder / "data.json"
