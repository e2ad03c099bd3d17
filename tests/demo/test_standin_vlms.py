"""The stand-in VLMs load through the Auto class, take what real image processors give of images of any shape, and show it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText

from diffvl.demo import standins
from diffvl.demo.standin_vlms import IMAGE, PATCH, PLAIN_TOKENS, SHAPES, TILE_TOKENS, VLMS, make_vlm, vlm_tokenizer
from diffvl.errors import UsageError

SHAPES_SEEN = ((70, 50), (56, 120), (112, 112))  # height, width
SQUARE = {"height": IMAGE, "width": IMAGE}
PACKED = ("Qwen2VLImageProcessorPil", {"min_pixels": 4 * PATCH**2, "max_pixels": 4 * IMAGE**2})
TILED = {"size": {"longest_edge": 2 * IMAGE}, "max_image_size": {"longest_edge": IMAGE}}
PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), PACKED),
    "glm4v": ("Glm4vImageProcessorPil", {"size": {"shortest_edge": 16 * PATCH**2, "longest_edge": 8 * IMAGE**2}}),
    "llava": ("LlavaImageProcessorPil", {"size": {"shortest_edge": IMAGE}, "crop_size": SQUARE}),
    "llava_next": (
        "LlavaNextImageProcessorPil",
        {"size": {"shortest_edge": IMAGE}, "crop_size": SQUARE, "image_grid_pinpoints": SHAPES},
    ),
    "llava_onevision": ("LlavaOnevisionImageProcessorPil", {"size": SQUARE, "image_grid_pinpoints": SHAPES}),
    "internvl": ("GotOcr2ImageProcessorPil", {"size": SQUARE, "crop_to_patches": True, "max_patches": 4}),
    "gemma3": ("Gemma3ImageProcessorPil", {"size": SQUARE}),
    "paligemma": ("SiglipImageProcessorPil", {"size": SQUARE}),
    "idefics2": (
        "Idefics2ImageProcessorPil",
        {"do_image_splitting": False, "size": {"shortest_edge": 28, "longest_edge": IMAGE}},
    ),
    "idefics3": ("Idefics3ImageProcessorPil", TILED),
    "smolvlm": ("SmolVLMImageProcessorPil", TILED),
}
# Image tokens of each image of SHAPES_SEEN: base and grid of 4 x 4 and a newline for each row of the grid in LLaVA-NeXT.
COUNTS: dict[str, list[int]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v"), [4, 8, 16]),
    **dict.fromkeys(("llava", "gemma3", "paligemma"), [PLAIN_TOKENS] * 3),
    **dict.fromkeys(("llava_next", "llava_onevision"), [46, 52, 88]),
    "internvl": [TILE_TOKENS] * 11,  # tiles and a small copy of each
    "idefics2": [TILE_TOKENS * 3],
    **dict.fromkeys(("idefics3", "smolvlm"), [TILE_TOKENS * 13]),
}


def images(shapes: Sequence[tuple[int, int]] = SHAPES_SEEN) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator) for shape in shapes]
    return [Image.fromarray(pixels.numpy()) for pixels in drawn]


def rows_of(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]


def pixels_of(model_type: str) -> dict[str, torch.Tensor]:
    name, settings = PROCESSORS[model_type]
    nested = model_type in ("idefics2", "idefics3", "smolvlm")
    given = getattr(transformers, name)(**settings)(images=[images()] if nested else images(), return_tensors="pt")
    return {key: value for key, value in given.items() if key not in ("num_patches", "num_crops")}


@pytest.mark.parametrize("model_type", VLMS)
@torch.no_grad()
def test_a_vlm_takes_real_images_and_shows_them(model_type: str, tmp_path: Path):
    model = AutoModelForImageTextToText.from_pretrained(make_vlm(tmp_path, model_type)).eval()
    assert (model.config.model_type, model.dtype) == (model_type, torch.float32)
    pixels = pixels_of(model_type)
    rows = model.model.get_image_features(**pixels, return_dict=True).pooler_output
    assert [len(image) for image in rows] == COUNTS[model_type]
    setting = "image_token_id" if hasattr(model.config, "image_token_id") else "image_token_index"
    image_id = getattr(model.config, setting)
    pieces = [[70, 71, *[image_id] * count] for count in COUNTS[model_type]]
    ids = torch.tensor([[*sum(pieces, []), *range(80, 90)]])
    types = {"mm_token_type_ids": (ids == image_id).long()} if "image_grid_thw" in pixels else {}
    types |= {"token_type_ids": (ids == image_id).long()} if model_type == "gemma3" else {}
    logits = model(input_ids=ids, **pixels, **types).logits
    assert bool(logits.isfinite().all()) and 2.0 < float(logits.std()) < 3.0
    other = {name: value.flip(-1) if value.is_floating_point() else value for name, value in pixels.items()}
    moved = model(input_ids=ids, **other, **types).logits - logits
    assert float(moved[0, -1].abs().max() / logits.std()) > 0.1


def test_some_are_tied_and_some_are_not(tmp_path: Path):
    tied = {}
    for model_type in ("qwen2_5_vl", "llava"):
        model = AutoModelForImageTextToText.from_pretrained(make_vlm(tmp_path / model_type, model_type))
        head = model.get_output_embeddings()
        assert head is not None
        tied[model_type] = head.weight is model.get_input_embeddings().weight
    assert tied == {"qwen2_5_vl": True, "llava": False}


def test_the_tokenizer_decides_sizes_and_ids(tmp_path: Path):
    tokenizer = vlm_tokenizer("qwen2_vl")
    tokenizer.add_tokens(["<one>", "<more>"])
    model = AutoModelForImageTextToText.from_pretrained(make_vlm(tmp_path, "qwen2_vl", tokenizer=tokenizer))
    assert rows_of(model) == len(tokenizer)
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert model.config.vision_start_token_id == tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert model.generation_config is not None
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_token_that_the_tokenizer_lacks_gets_a_row_of_its_own(tmp_path: Path):
    tokenizer = standins.make_tokenizer()
    with pytest.raises(UsageError, match=r"the tokenizer has no token '<\|image_pad\|>', which shows an image in a qwen2_vl"):
        make_vlm(tmp_path, "qwen2_vl", tokenizer=tokenizer)
    tokenizer.add_tokens(["<|image_pad|>"], special_tokens=True)
    model = AutoModelForImageTextToText.from_pretrained(make_vlm(tmp_path, "qwen2_vl", tokenizer=tokenizer))
    assert (model.config.image_token_id, model.config.video_token_id) == (len(tokenizer) - 1, len(tokenizer))
    assert rows_of(model) == len(tokenizer) + 3


def test_the_same_seed_gives_the_same_bytes_and_the_callers_random_state_stays(tmp_path: Path):
    before = torch.random.get_rng_state()
    one, two, other = (
        make_vlm(tmp_path / name, "gemma3", seed) / "model.safetensors" for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_another_type_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="no stand-in VLM of type 'mllama': expected one of qwen2_vl, qwen2_5_vl"):
        make_vlm(tmp_path, "mllama")
    assert not list(tmp_path.iterdir())
