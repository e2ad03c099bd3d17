"""The tiny copy of a vision-language model keeps how images become tokens, and sees real pixels."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

from diffvl.config.supported import image_token_id
from diffvl.doctor.timm_tower import TIMM_TYPES
from diffvl.doctor.tiny_copy import FIRST_ORDINARY, HIDDEN, WINDOW
from diffvl.doctor.tiny_vlm import IMAGE, build_vlm, shrink_vlm
from diffvl.doctor.vlm_defaults import default_vlm_config
from diffvl.doctor.vlm_pixels import images_of
from diffvl.doctor.vlm_probe import TOKENS, image_sizes, shipped


def test_both_halves_shrink_and_the_given_configuration_stays():
    config = default_vlm_config("qwen3_vl")
    before = config.to_dict()
    tiny = shrink_vlm(config)
    assert config.to_dict() == before and type(tiny) is type(config)
    assert (tiny.text_config.hidden_size, tiny.text_config.num_hidden_layers) == (HIDDEN, 2)
    assert (tiny.vision_config.depth, tiny.vision_config.out_hidden_size) == (2, HIDDEN)
    assert tiny.vision_config.deepstack_visual_indexes == [0, 1], "features for several layers are kept"
    assert shrink_vlm(default_vlm_config("gemma3")).text_config.sliding_window == WINDOW


def test_rotary_axes_keep_their_shares():
    sections = {kind: shrink_vlm(default_vlm_config(kind)).text_config.rope_parameters["mrope_section"] for kind in ROTARY}
    assert sections == ROTARY


# Half of a head, or half of the part of a head that is rotated.
ROTARY = {"qwen2_vl": [2, 3, 3], "ernie4_5_vl_moe": [3, 3, 2], "hunyuan_vl": [2, 2, 2, 2], "glm4v": [1, 2, 1]}


@pytest.mark.parametrize("model_type", ["glm4v", "gemma3", "ovis2", "granite_docling", "chameleon"])
def test_image_tokens_have_ids_of_their_own_that_no_text_has(model_type: str):
    tiny = shrink_vlm(default_vlm_config(model_type))
    settings = tiny.to_dict()
    names = [name for name, value in settings.items() if isinstance(value, int) and name.endswith(("_token_id", "_token_index"))]
    ids = [settings[name] for name in names if not name.startswith(("pad", "bos", "eos"))]
    assert len(set(ids)) == len(ids) > 0
    image_id = image_token_id(tiny)
    assert image_id is not None and image_id < FIRST_ORDINARY <= TOKENS.start and image_id in ids


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("llava", (16, 16)),  # 4 x 4 patches
        ("internvl", (4, 4)),  # 2 x 2 of them in one
        ("qwen2_vl", (12, 3)),  # of any size
        ("llava_next", (52, 56)),  # tiles, their newlines, and a small copy
        ("idefics3", (4, 4)),  # tiles of all images in one tensor
        ("hunyuan_vl", (16, 6)),  # with newlines and brackets of its own
    ],
)
def test_images_become_tokens_as_the_family_has_it(model_type: str, sizes: tuple[int, int]):
    source = build_vlm(default_vlm_config(model_type))
    pixels = images_of(source)
    assert image_sizes(shipped(source, pixels), pixels) == sizes


def test_the_same_seed_gives_the_same_weights_and_the_callers_random_state_stays():
    state = torch.get_rng_state()
    first, second, other = (build_vlm(default_vlm_config("internvl"), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for (name, one), two, three in zip(first.named_parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two) and not torch.equal(one, three), name
    pixels = images_of(first)
    assert torch.equal(pixels["pixel_values"], images_of(second)["pixel_values"])
    assert pixels["pixel_values"].shape == (2, 3, IMAGE, IMAGE)


def test_stand_ins_for_timm_are_gone_after_the_build():
    build_vlm(default_vlm_config("perception_lm"))
    known = AutoModel._model_mapping._extra_content  # pyright: ignore[reportAttributeAccessIssue]
    assert not {CONFIG_MAPPING[name] for name in TIMM_TYPES} & set(known)


def test_a_tower_that_can_be_a_backbone_shrinks():
    """DINOv2 lists its layers by name, too; what it lists follows from their number."""
    vision = {"model_type": "dinov2", "num_hidden_layers": 12, "out_features": ["stage12"], "out_indices": [12]}
    config = AutoConfig.for_model("llava", vision_config=vision)
    tiny = shrink_vlm(config)
    assert tiny.vision_config.out_features == [f"stage{tiny.vision_config.num_hidden_layers}"]
