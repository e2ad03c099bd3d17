"""The configuration of the model that a conversion would make, before anything is made.

The parts of a source say it, where they can be read. Where a named checkpoint cannot be fetched, the sizes that its family's file
in `convert/` tells do: enough for a plan, and for nothing else.
"""

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from diffvl.config.families import TOWER_SIZES, NamedCheckpoint
from diffvl.config.recipe import Recipe
from diffvl.errors import CheckpointError
from diffvl.estimate.empty import without_numbers
from diffvl.hub.configuration_diffvl import DiffVLConfig
from diffvl.prepare.assemble import own_config, shuffle_factor
from diffvl.prepare.native import NativeParts, native_config
from diffvl.prepare.released import ReleasedParts
from diffvl.prepare.run import Parts


def described(parts: Parts, recipe: Recipe) -> DiffVLConfig:
    """Describes what `prepare` would make of the parts of a source."""
    if isinstance(parts, ReleasedParts):
        return copy.deepcopy(parts.whole)
    tokenizer = parts.processor.tokenizer
    stops = [tokenizer.convert_tokens_to_ids(parts.processor.stop_token)]
    config = copy.deepcopy(parts.config)
    text = config.get_text_config(decoder=True)
    text.vocab_size = max(text.vocab_size, len(tokenizer), parts.mask_id + 1, parts.image_id + 1)
    if not isinstance(parts, NativeParts):
        return own_config(config, copy.deepcopy(parts.tower_config), parts, recipe, stops)
    with torch.device("meta"):
        source: Any = AutoModelForImageTextToText.from_config(config)
    without_numbers(source, torch.float32, torch.float32)
    return native_config(source.eval(), parts, stops)


def config_by_sizes(model_type: str, named: NamedCheckpoint) -> PretrainedConfig:
    """Gives the configuration of a named checkpoint by the sizes in its family's file."""
    return AutoConfig.for_model(model_type, **named.sizes, dtype=torch.bfloat16)


def described_by_sizes(config: PretrainedConfig, tower: str, recipe: Recipe) -> DiffVLConfig:
    """Describes what `prepare` would make of a named checkpoint and a tower of which nothing is here. The two tokens that it adds
    stand in spare rows.

    Raises:
        CheckpointError: nobody knows the sizes of this tower.
    """
    if tower not in TOWER_SIZES:
        raise CheckpointError(
            f"{tower}: it cannot be fetched now, and a plan without it is possible for {', '.join(TOWER_SIZES)} alone: name the "
            "directory of a downloaded one with prepare.vision_tower"
        )
    vision = AutoConfig.for_model(**TOWER_SIZES[tower])
    rows = config.vocab_size
    return DiffVLConfig(
        text_config=copy.deepcopy(config),
        vision_config=vision,
        connector=recipe.prepare.connector.kind,
        shuffle_factor=shuffle_factor(recipe.prepare),
        vision_layer=recipe.prepare.vision_layer,
        image_size=recipe.prepare.image_size or vision.image_size,
        tiling=recipe.prepare.tiling.settings,
        image_token_id=rows - 1,
        mask_token_id=rows - 2,
        vocabulary_size=rows,
        stop_token_ids=[0],
    )
