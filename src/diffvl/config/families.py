"""What `config.json` does not say about an architecture: `config.model_type` -> `Family`, a name -> its checkpoint.

Place in the flow: `prepare` asks for the family of the model it was given; `models` and `convert` look names up. Invariant: a
model type without a file in `convert/` gets the generic family, which is `Family` with its defaults.

A diffusion language model is data too: its family says as which stock trunk it loads (`LoadsAs`), and `store.renamed` translates.
The translated configuration remembers where it comes from, in its setting `diffusion_source`, which every later checkpoint keeps.
"""

import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from diffvl.config.resolve import parse, presets, read_yaml
from diffvl.config.section import Section
from diffvl.errors import ConfigError, UsageError

SIGLIP2 = "google/siglip2-so400m-patch14-384"  # the vision tower of the papers
# What a plan must know of a tower that cannot be fetched now, by hub id: settings of its config.json.
TOWER_SIZES: dict[str, dict[str, Any]] = {
    SIGLIP2: {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
}
ALL_LINEAR = "all-linear"  # peft's own word for every linear layer but the head


class MaskToken(Section):
    """The token that stands for "not known yet"."""

    text: str = Field(default="<|MASK|>", min_length=1)
    id: int | None = Field(
        default=None, ge=0, description="agreed row of the embedding; used only where the tokenizer leaves it free"
    )


class NamedCheckpoint(Section):
    """A checkpoint that `diffvl convert NAME` knows."""

    repo: str = Field(min_length=1, description="hub id")
    revision: str = "main"
    parameters: float | None = Field(default=None, gt=0, description="in billions, vision part included where it has one")
    sizes: dict[str, Any] = Field(
        default={}, description="settings of its config.json, for a plan while it cannot be fetched; empty: no such plan"
    )
    vision_tower: str = SIGLIP2
    recipe: str | None = Field(default=None, description="the recipe used when --recipe is not given; default: the family's")


class LoadsAs(Section):
    """How a diffusion language model becomes a stock trunk: other names for the same computation, and when that is so.

    Settings are keys of the checkpoint's config.json; `stock` means the configuration of `model_type` in transformers.
    """

    model_type: str = Field(min_length=1, description="of the stock class")
    tokenizer: str = Field(min_length=1, description="the stock tokenizer class that reads the checkpoint's files")
    target: Literal["same", "shift"] = Field(description="which token a position predicts")
    block_size: int | None = Field(
        default=None, ge=1, description="tokens of a block where config.json names none; none: all tokens see each other"
    )
    conditions: dict[str, list[Any]] = Field(description="setting -> values of which it must have one")
    requires: list[str] = Field(default=[], description="settings that must be there")
    defaults: dict[str, Any] = Field(default={}, description="what the published code takes where config.json names nothing")
    keeps: list[str] = Field(default=[], description="settings that have the same name in the stock configuration")
    renames: dict[str, str] = Field(default={}, description="setting -> its stock name")
    settings: dict[str, Any] = Field(default={}, description="stock settings that are the same for all such checkpoints")
    ignores: list[str] = Field(default=[], description="settings that move no logit")
    tensors: dict[str, str] = Field(
        default={}, description="pattern -> its substitute in tensor names, one after the other, as transformers' key_mapping"
    )


class Family(Section):
    """All checkpoints of one `model_type`. The defaults make the generic family."""

    model_type: str = Field(min_length=1)
    note: str = Field(default="not listed: generic settings", description="traits, one line for `diffvl models`")
    mask_token: MaskToken = MaskToken()
    image_token: str = Field(default="<image>", min_length=1, description="taken as it is where the tokenizer has it, else added")
    lora_targets: str = Field(default=ALL_LINEAR, description="regular expression over the trunk's module names, or all-linear")
    chat_template: str | None = Field(
        default=None, description="takes the place of a template that writes reasoning tags into answers but not into prompts"
    )
    prompt_template: str | None = Field(
        default=None, description="the chat template where a family has none, since its processor writes prompts by itself"
    )
    vision_tower: str = Field(default=SIGLIP2, description="for checkpoints without a name of their own")
    recipe: str = Field(default="llava", description="the recipe used when --recipe is not given")
    route: Literal["language model", "vision-language model", "diffusion language model"] = "language model"
    loads_as: LoadsAs | None = Field(default=None, description="of a diffusion language model: the stock trunk that it is")
    checkpoints: dict[str, NamedCheckpoint] = {}


@cache
def _families() -> dict[str, Family]:
    """Reads every family of `convert/`, by model type, in alphabetical order."""
    files = sorted(presets("convert").glob("*.yaml"))
    families = [parse(Family, read_yaml(file), str(file)) for file in files]
    for file, family in zip(files, families, strict=True):
        if file.stem != family.model_type:
            raise ConfigError(f"{file}: model_type is {family.model_type!r}, the file of that family is {family.model_type}.yaml")
    return {family.model_type: family for family in families}


def all_families() -> list[Family]:
    """Lists the families that have a file, in alphabetical order."""
    return list(_families().values())


def family_of(model_type: str) -> Family:
    """Gives the family of `config.model_type`; the generic one, with LoRA on all linear layers, where no file describes it."""
    return _families().get(model_type) or Family(model_type=model_type)


@dataclass(frozen=True)
class DiffusionSource:
    """What a trunk brings along that was a diffusion language model already.

    model_type: as it was published, the name of its family. mask_token_id: its own. target: which token a position predicts.
    block_size: of the blocks that it was trained in; None where all tokens saw each other.
    """

    model_type: str
    mask_token_id: int
    target: Literal["same", "shift"]
    block_size: int | None

    @property
    def grid(self) -> Literal["absolute", "response"]:
        """Where blocks begin in decoding: SDAR's at multiples of the size, those of others with the answer."""
        return "response" if self.block_size is None else "absolute"


SOURCE = "diffusion_source"  # the setting of a translated configuration


def diffusion_source(settings: Any) -> DiffusionSource | None:
    """Tells what a trunk's configuration (an object or a dict) remembers of a diffusion language model; None for an AR trunk."""
    facts = settings.get(SOURCE) if isinstance(settings, dict) else getattr(settings, SOURCE, None)
    return None if facts is None else DiffusionSource(**facts)


def family_of_trunk(config: Any) -> Family:
    """Gives the family of a trunk's configuration: the published one where it was translated."""
    source = diffusion_source(config)
    return family_of(config.model_type if source is None else source.model_type)


def _checkpoints() -> dict[str, tuple[str, NamedCheckpoint]]:
    return {name: (family.model_type, checkpoint) for family in all_families() for name, checkpoint in family.checkpoints.items()}


def named_checkpoint(name: str) -> tuple[str, NamedCheckpoint] | None:
    """Gives (model type, checkpoint) of a name of `diffvl models`, letter case ignored; None where there is no such name."""
    return _checkpoints().get(name.lower())


def recipe_of_name(name: str) -> str | None:
    """Gives the recipe that a name of `diffvl models` is converted with by default; None where there is no such name."""
    found = named_checkpoint(name)
    return None if found is None else found[1].recipe or family_of(found[0]).recipe


def require_known(model: str) -> None:
    """Raises UsageError where MODEL is neither a name of `diffvl models`, nor a path, nor a hub id."""
    if named_checkpoint(model) is None and not Path(model).exists() and "/" not in model:
        close = suggest(model)
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise UsageError(f"{model!r}: no such model name or directory; {hint}`diffvl models` lists the names")


def suggest(name: str) -> list[str]:
    """Gives up to three names of `diffvl models` that look like this one, best first."""
    return difflib.get_close_matches(name.lower(), _checkpoints(), n=3)
