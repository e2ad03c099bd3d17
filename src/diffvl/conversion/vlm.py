"""What a recipe must not say of a vision-language model, which brings its own vision part."""

from typing import Any

from diffvl.config.recipe import Recipe
from diffvl.errors import ConfigError

VLM_RECIPE = "vlm"  # for models that nobody has listed
TOWER_SETTINGS = ("vision_tower", "vision_layer", "image_size", "tiling", "connector")  # of `prepare`


def check_settings(recipe: Recipe, tree: dict[str, Any]) -> None:
    """Raises ConfigError for a setting of `prepare` that has no effect on a vision-language model.

    Args:
        tree: the recipe file, as it was read.
    """
    given = {*recipe.prepare.model_fields_set, *(tree.get("prepare") or {})}
    if useless := [name for name in TOWER_SETTINGS if name in given]:
        raise ConfigError(
            f"prepare.{useless[0]} has no effect: MODEL is a vision-language model and keeps its own vision part. Take --recipe "
            "vlm or vlm-lora, or leave it out"
        )
