"""Low-rank adapters on the trunk, through peft; connector and mask row are trained in full beside them."""

import re

from peft import LoraConfig, PeftModel, get_peft_model

from diffvl.config.recipe import Lora
from diffvl.errors import ConfigError
from diffvl.hub.modeling_diffvl import DiffVLForConditionalGeneration


def add_adapters(model: DiffVLForConditionalGeneration, lora: Lora, family_targets: str) -> None:
    """Wraps the trunk in place.

    Raises:
        ConfigError: if the target expression matches no module.
    """
    targets = lora.targets or family_targets
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    try:
        model.language_model = get_peft_model(model.language_model, config)
    except (ValueError, re.error) as error:
        raise ConfigError(f"lora.targets {targets!r} does not fit this trunk: {error}") from error


def merge_adapters(model: DiffVLForConditionalGeneration) -> None:
    """Adds the adapters into the trunk's weights and unwraps it. Nothing to do without adapters."""
    if isinstance(model.language_model, PeftModel):
        model.language_model = model.language_model.merge_and_unload()
