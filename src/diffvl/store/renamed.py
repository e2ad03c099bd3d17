"""config.json of a diffusion language model -> the configuration of a stock trunk, and its tensors' names -> the stock ones.

Place in the flow: `published.load_config` asks here before it asks transformers, which knows none of these models; `weights` asks
for the names. Invariant: no code of the checkpoint runs, and a checkpoint whose computation could be another is refused with
every reason at once. What a family demands and renames stands in its file in `convert/` (`config.families.LoadsAs`).
"""

import logging
import re
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PretrainedConfig
from transformers.core_model_loading import WeightRenaming

from diffvl.config.families import SOURCE, DiffusionSource, Family, LoadsAs, family_of, family_of_trunk
from diffvl.errors import CheckpointError, UnsupportedModelError
from diffvl.store.tensorfiles import Header, some

log = logging.getLogger(__name__)

CONDITION = "a diffusion language model of another form"
RELEASED = "a released block-diffusion VLM: not in yet"
# Settings of every config.json that move no logit, and those that the stock configuration takes over as they are.
COMMON = {"_name_or_path", "architectures", "attn_implementation", "auto_map", "initializer_range", "model_type"}
COMMON |= {"transformers_version", "use_cache", "mask_token_id", "block_size"}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


# --- configuration -------------------------------------------------------------------------------------------------------


def diffusion_family(settings: dict[str, Any]) -> Family | None:
    """Finds the family of config.json's model_type if it is one of diffusion language models."""
    family = family_of(str(settings.get("model_type") or None))
    return None if family.loads_as is None else family


def translated(name: str, settings: dict[str, Any], family: Family) -> PretrainedConfig:
    """Translates config.json into the configuration of the stock trunk, which remembers its `diffusion_source`.

    Raises:
        UnsupportedModelError: naming every setting with which the model would not be the stock one.
        CheckpointError: if its mask token or block size is no number.
    """
    rules = family.loads_as
    assert rules is not None
    given = {**rules.defaults, **settings}
    _require_conditions(name, given, family, rules)
    _tell_unknown(name, settings, rules)
    mask = settings.get("mask_token_id")
    mask = family.mask_token.id if mask is None else mask
    block = settings.get("block_size")
    if block is None and rules.block_size is not None:
        block = rules.block_size
        _tell_name(name, block)
    for key, value, least in (("mask_token_id", mask, 0), ("block_size", block, 1)):
        if value is not None and (type(value) is not int or value < least):
            raise CheckpointError(f"{name}: {key} in its config.json is {value!r}; expected a whole number of at least {least}")
    assert mask is not None, f"{family.model_type}: a family of diffusion language models agrees on a mask token"
    source = DiffusionSource(family.model_type, mask, rules.target, block)
    config = AutoConfig.for_model(rules.model_type, **_stock_settings(given, rules))
    stock_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config.architectures = [stock_class.__name__]
    setattr(config, SOURCE, vars(source).copy())
    return config


def _require_conditions(name: str, given: dict[str, Any], family: Family, rules: LoadsAs) -> None:
    faults = [f"no {key}" for key in rules.requires if given.get(key) is None]
    for key, allowed in rules.conditions.items():
        if given.get(key) not in allowed:
            expected = " or ".join(map(repr, allowed))
            faults.append(f"{key} {given.get(key)!r} (expected {expected})")
    if faults:
        raise UnsupportedModelError(
            f"{name}: its config.json has {', '.join(faults)}. A {family.model_type} model is read as a stock "
            f"{rules.model_type}, which it would not be with this; only its own code could run it, and such code is not run",
            CONDITION,
        )


def _tell_unknown(name: str, settings: dict[str, Any], rules: LoadsAs) -> None:
    """Logs the settings that the family's file does not speak of: newer than it, perhaps."""
    known = COMMON | {*TOKENS, "dtype", "torch_dtype"}
    known |= {*rules.conditions, *rules.requires, *rules.defaults, *rules.keeps, *rules.renames, *rules.ignores}
    if unknown := sorted(key for key, value in settings.items() if key not in known and value not in (None, False)):
        log.warning(
            "%s: settings of its config.json that its family does not know, and that have no effect: %s", name, some(unknown)
        )


def _tell_name(name: str, block_size: int) -> None:
    """Warns where a name speaks of another block size: that of released SDAR models stands nowhere else."""
    found = re.search(r"-b(\d+)$", name.rstrip("/"))
    if found and int(found[1]) != block_size:
        log.warning(
            "%s: its config.json names no block size, so %d is taken; if it was trained in blocks of %s, as its name seems to "
            'say, set "block_size": %s there',
            name,
            block_size,
            found[1],
            found[1],
        )


def _stock_settings(given: dict[str, Any], rules: LoadsAs) -> dict[str, Any]:
    """Settings under their stock names; what is null is left to the stock class."""
    stock = {key: given.get(key) for key in (*rules.keeps, *TOKENS)}
    stock |= {to: value for key, to in rules.renames.items() if (value := given.get(key)) is not None}
    stock["dtype"] = given.get("dtype") or given.get("torch_dtype")
    return {key: value for key, value in {**stock, **rules.settings}.items() if value is not None}


# --- tensors -------------------------------------------------------------------------------------------------------------


def key_mapping(config: PretrainedConfig) -> dict[str, str]:
    """Gives what `from_pretrained` takes as `key_mapping` to find the tensors of this configuration; empty for stock names."""
    rules = family_of_trunk(config).loads_as
    return {} if rules is None else rules.tensors


def published_name(config: PretrainedConfig, setting: str) -> str:
    """Gives the name that a stock setting has in the checkpoint's own config.json."""
    rules = family_of_trunk(config).loads_as
    renames = {} if rules is None else rules.renames
    return next((key for key, to in renames.items() if to == setting), setting)


def under_stock_names(name: str, config: PretrainedConfig, headers: dict[str, Header]) -> dict[str, Header]:
    """Renames the tensors of a checkpoint as transformers will when it loads it.

    Raises:
        CheckpointError: if two tensors get the same name, so that one of them would be lost.
    """
    renamings = [WeightRenaming(pattern, to) for pattern, to in key_mapping(config).items()]
    found: dict[str, str] = {}
    for key in headers:
        stock = key
        for renaming in renamings:
            stock, _ = renaming.rename_source_key(stock)
        if stock in found:
            raise CheckpointError(
                f"{name}: its tensors {found[stock]} and {key} both stand for {stock}; which one counts cannot be told. "
                "Fetch the checkpoint again"
            )
        found[stock] = key
    return {stock: headers[key] for stock, key in found.items()}


# --- what is recognised and refused --------------------------------------------------------------------------------------


def refuse_released(name: str, settings: dict[str, Any]) -> None:
    """Raises UnsupportedModelError for a released block-diffusion vision-language model, by its name."""
    if found := _released(settings):
        released, trunk = found
        raise UnsupportedModelError(
            f"{name}: a released {released} checkpoint (model_type {settings.get('model_type')!r}). Starting from it comes with "
            f"its layout, in a later version. Start from its language model instead, e.g. `diffvl convert {trunk}`",
            RELEASED,
        )


def _released(settings: dict[str, Any]) -> tuple[str, str] | None:
    """Gives the name of a released model, and of a checkpoint to start from instead."""
    kind, text = str(settings.get("model_type")).lower(), settings.get("text_config")
    inner = str(text.get("model_type")) if isinstance(text, dict) else ""
    if kind in ("sdarv", "sdar_vl") or ("vision_config" in settings and inner in ("sdar", "sdar_moe")):
        return "SDAR-VL", "sdar-4b"
    if kind == "llava_llada_bd3lm":
        return "DiffusionVL", "llada-8b"
    if kind.startswith("diffusionvl"):
        return "DiffusionVL", "qwen2.5-7b"
    return None
