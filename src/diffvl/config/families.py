"""What `config.json` does not say about an architecture: `config.model_type` -> `Family`, a name -> its checkpoint.

Place in the flow: `prepare` asks for the family of the model it was given; `models`, `recipes` and `convert` look names up.
Invariants: a model type without a file in `convert/` gets the generic family, which is `Family` with its defaults;
`check_supported` refuses, before any weight is read, every architecture whose layers no attention mask can steer.
transformers loads its names on first use; the quoted annotations keep it so, as `diffvl models` needs neither them nor torch.
"""

import difflib
import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import transformers
from pydantic import Field

from diffvl.config.recipe import Section
from diffvl.config.resolve import parse, read_yaml
from diffvl.errors import ConfigError, UnsupportedModelError

SIGLIP2 = "google/siglip2-so400m-patch14-384"  # the vision tower of the papers
MASKABLE_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
SPARSE_LAYERS = frozenset(
    {"indexed_attention", "compressed_sparse_attention", "heavily_compressed_attention", "minimax_m3_sparse"}
)
OWN_CODE = "code of its own"
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
    vision_tower: str = SIGLIP2
    recipe: str = Field(default="llava", description="the recipe used when --recipe is not given")


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
    vision_tower: str = Field(default=SIGLIP2, description="for checkpoints without a name of their own")
    checkpoints: dict[str, NamedCheckpoint] = {}


# --- the folders convert/ and recipes/ -----------------------------------------------------------------------------------


def presets(folder: Literal["convert", "recipes"]) -> Path:
    """The folder inside the installed package or, in a checkout, at the root of the repository."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "presets" / folder, package.parents[1] / folder):
        if candidate.is_dir():
            return candidate
    raise ConfigError(f"the folder {folder}/ is not in {package}: this installation is incomplete, reinstall diffvl")


# --- families and named checkpoints --------------------------------------------------------------------------------------


@cache
def _families() -> dict[str, Family]:
    """Every family of `convert/`, by model type, in alphabetical order."""
    files = sorted(presets("convert").glob("*.yaml"))
    families = [parse(Family, read_yaml(file), str(file)) for file in files]
    for file, family in zip(files, families, strict=True):
        if file.stem != family.model_type:
            raise ConfigError(f"{file}: model_type is {family.model_type!r}, the file of that family is {family.model_type}.yaml")
    return {family.model_type: family for family in families}


def all_families() -> list[Family]:
    """The families that have a file, in alphabetical order."""
    return list(_families().values())


def family_of(model_type: str) -> Family:
    """The family of `config.model_type`; the generic one, with LoRA on all linear layers, where no file describes it."""
    return _families().get(model_type) or Family(model_type=model_type)


def _checkpoints() -> dict[str, tuple[str, NamedCheckpoint]]:
    return {name: (family.model_type, checkpoint) for family in all_families() for name, checkpoint in family.checkpoints.items()}


def named_checkpoint(name: str) -> tuple[str, NamedCheckpoint] | None:
    """(model type, checkpoint) of a name of `diffvl models`, letter case ignored; None where there is no such name."""
    return _checkpoints().get(name.lower())


def suggest(name: str) -> list[str]:
    """Up to three names of `diffvl models` that look like this one, best first."""
    return difflib.get_close_matches(name.lower(), _checkpoints(), n=3)


# --- recipes -------------------------------------------------------------------------------------------------------------


def recipe_names() -> list[str]:
    """The recipes that come with diffvl, in alphabetical order."""
    return sorted(file.stem for file in presets("recipes").glob("*.yaml"))


def find_recipe(name_or_file: str) -> Path:
    """The file of a recipe given by name or by path; a name goes first. Raises ConfigError listing the known names."""
    if name_or_file in recipe_names():
        return presets("recipes") / f"{name_or_file}.yaml"
    file = Path(name_or_file)
    if file.is_file():
        return file
    raise ConfigError(
        f"--recipe {name_or_file!r}: neither a file nor a known recipe. Known: {', '.join(recipe_names())} (see `diffvl recipes`)"
    )


# --- what block diffusion can be put on ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refusal:
    """Why an architecture cannot be converted. kind: the reason in a few words, the same for all that it applies to."""

    kind: str
    message: str


def check_supported(config: "transformers.PreTrainedConfig") -> None:
    """Raises UnsupportedModelError naming the reason where block diffusion cannot be put on the model.

    A static check of the configuration and of the class it leads to; the numeric proofs are those of `prepare` and `doctor`.
    """
    if refused := refusal(config):
        raise UnsupportedModelError(refused.message)


def refusal(config: "transformers.PreTrainedConfig") -> Refusal | None:
    """What `check_supported` raises, or None."""
    name = config.model_type or type(config).__name__
    found = _refused_layers(name, config.get_text_config(decoder=True)) or _refused_parts(name, config)
    if found is not None:
        return found
    brings_class = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if is_remote(type(config)) or (brings_class and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING):
        return Refusal(OWN_CODE, own_code(name, config.to_dict()))
    return _refused_class(name, config)


def own_code(name: str, settings: dict[str, Any]) -> str:
    """The message about an architecture that only code in the checkpoint knows."""
    classes = settings.get("auto_map") or {}
    given = classes.get("AutoModelForCausalLM") or classes.get("AutoModel") or classes.get("AutoConfig")
    return (
        f"{name}: transformers has no class of its own for model_type {settings.get('model_type')!r}; the checkpoint brings one "
        f"along ({given}). A DiffVL checkpoint loads without such code, so it cannot be converted, with "
        "--trust-remote-code neither; take a checkpoint of an architecture that transformers knows (`diffvl doctor MODEL "
        "--trust-remote-code` runs the code to tell whether its attention would allow it)"
    )


def is_remote(config_class: type) -> bool:
    """Whether a class was read from a checkpoint's own code."""
    return config_class.__module__.startswith("transformers_modules")


def _refused_parts(name: str, config: "transformers.PreTrainedConfig") -> Refusal | None:
    """Models that are more than a language model."""
    if getattr(config, "vision_config", None) is not None:
        return Refusal(
            "vision-language model: not in yet",
            f"{name} is a vision-language model (its config has vision_config). This version converts language models; the way "
            "from an AR vision-language model is not in yet. Give its language model instead, e.g. `diffvl convert qwen2.5-0.5b`",
        )
    for part in ("audio_config", "audio_encoder_config", "audio_encoder"):
        if getattr(config, part, None) is not None:
            return Refusal("audio model", f"{name} is a model of sound (its config has {part}); a text language model is needed")
    return None


def _refused_layers(name: str, text_config: "transformers.PreTrainedConfig") -> Refusal | None:
    """Layers that do not follow masks and positions alone."""
    layers = set(getattr(text_config, "layer_types", None) or ())
    if unknown := sorted(layers - MASKABLE_LAYERS - SPARSE_LAYERS):
        return Refusal(
            "recurrent or convolutional layers",
            f"{name} has layers of type {', '.join(unknown)}: only attention layers that take a mask "
            f"({', '.join(sorted(MASKABLE_LAYERS))}) can be made block-causal; recurrent and convolutional ones cannot",
        )
    if sparse := sorted(layers & SPARSE_LAYERS):
        limit = getattr(text_config, "index_topk", None)
        exact = (
            f"; masks would hold only while clean and noisy tokens together are at most {limit:,} (index_topk)" if limit else ""
        )
        return Refusal(
            "sparse attention: not in yet",
            f"{name} has sparse attention layers ({', '.join(sparse)}), which choose by themselves what a token sees and keep "
            f"more in their cache than keys and values{exact}. Not in yet",
        )
    if size := getattr(text_config, "hidden_size_per_layer_input", None):
        return Refusal(
            "per-layer embeddings: not in yet",
            f"{name} looks every token up by its id a second time, in per-layer embeddings (hidden_size_per_layer_input is "
            f"{size}); an image has no token ids, so it cannot be shown to this model. Not in yet",
        )
    return None


def _refused_class(name: str, config: "transformers.PreTrainedConfig") -> Refusal | None:
    """The part of `refusal` that needs the model class; only this function loads modelling code."""
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        return Refusal("unknown", f"{name} is no causal language model that transformers {transformers.__version__} knows")
    model_class: Any = mapping[type(config)]
    trained_as = config.architectures or [model_class.__name__]
    if not any(head.endswith(("ForCausalLM", "LMHeadModel")) or head == model_class.__name__ for head in trained_as):
        return Refusal(
            "no language-model head",
            f"{name}: this checkpoint holds a {', '.join(trained_as)}, which has no causal language-model head; "
            f"a {model_class.__name__} is needed",
        )
    parameters = inspect.signature(model_class.forward).parameters
    if model_class._is_stateful:
        return Refusal(
            "recurrent or convolutional layers",
            f"{name} is recurrent: its state goes from token to token, which no mask can steer",
        )
    if "shared_kv_states" in parameters:
        return Refusal(
            "draft model", f"{name} is the draft model of another one, whose keys and values it reads; it cannot stand alone"
        )
    if "position_ids" not in parameters:
        return Refusal(
            "no position_ids",
            f"{name} takes no position_ids (it counts positions by itself, as ALiBi models do), but a noised block must stand at "
            "the positions of its clean copy",
        )
    return None
