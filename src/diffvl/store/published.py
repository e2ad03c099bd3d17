"""MODEL or a vision tower as it was published -> its configuration, or the reason why no plain checkpoint lies there.

Place in the flow: the first thing that is read, by `convert` and `doctor` alike. Invariant: nothing is downloaded but small
files, no code of the checkpoint runs unless `trust_remote_code` says so, and what cannot be trained is refused here: quantized
weights, adapters, architectures that transformers knows from the checkpoint's own code alone.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import transformers
import yaml
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.utils.hub import cached_file

from diffvl.config.supported import OWN_CODE, is_remote, own_code
from diffvl.errors import CheckpointError, UnreachableError, UnsupportedModelError, first_line
from diffvl.store.files import read_json
from diffvl.store.renamed import diffusion_family, refuse_released, translated
from diffvl.store.sdar_vl import is_sdar_vl, text_settings

log = logging.getLogger(__name__)
T = TypeVar("T")

QUANTIZED, ADAPTER = "quantized weights", "an adapter"
# Beside the weights of older quantized checkpoints, whose config.json says nothing.
QUANTIZED_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "ModelOpt"}
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
ADAPTER_FILE = "adapter_config.json"


def load_config(name: str, trust_remote_code: bool, revision: str | None = None) -> PretrainedConfig:
    """Reads the configuration of a directory, a .gguf file or a hub id; that of a diffusion language model as the stock trunk
    that it is (`renamed`), and of SDAR-VL that of its language model.

    Raises:
        CheckpointError: if there is none, or it cannot be read or fetched.
        UnsupportedModelError: if this transformers does not know the architecture, or the weights are quantized or an adapter's.
    """
    path = Path(name)
    if is_gguf(path):
        return explain_failures(name, lambda: AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    settings = _settings(name, revision)
    refuse_quantized(name, settings)
    if is_sdar_vl(settings):
        settings = text_settings(name, settings)
    refuse_released(name, settings)
    if (family := diffusion_family(settings)) is not None:
        return explain_failures(name, lambda: translated(name, settings, family))
    own = settings.get("auto_map")
    kind = settings.get("model_type")
    known = isinstance(kind, str) and kind in CONFIG_MAPPING and not is_remote(CONFIG_MAPPING[kind])
    if isinstance(own, dict) and "AutoConfig" in own and not known and not trust_remote_code:
        raise UnsupportedModelError(own_code(name, settings), OWN_CODE)
    if own and known and trust_remote_code:
        _say_once(f"{name}: transformers' own class for {kind} is used, not the one that the checkpoint brings along")
    trusted = trust_remote_code and not known
    return explain_failures(name, lambda: AutoConfig.from_pretrained(name, trust_remote_code=trusted, revision=revision))


@cache
def _say_once(message: str) -> None:
    log.info(message)


def is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def _settings(name: str, revision: str | None) -> dict[str, Any]:
    """Reads config.json as it stands there."""
    path = Path(name)
    if path.is_file():
        raise CheckpointError(f"{path}: expected a directory with config.json and weights, or a .gguf file")
    _refuse_adapter(name, revision)
    if not path.is_dir():
        return explain_failures(name, lambda: PretrainedConfig.get_config_dict(name, revision=revision))[0]
    if not (path / "config.json").is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; to convert {ggufs[0]}, name the file itself: {path / ggufs[0]}" if ggufs else ""
        raise CheckpointError(f"{path}: no config.json there; expected a Hugging Face checkpoint directory{hint}")
    settings = read_json(path / "config.json")
    generation = path / "generation_config.json"
    if generation.is_file():
        # transformers would go on without a damaged one, and lose the stop tokens in it.
        _require_token_ids(generation, read_json(generation))
    return settings


def _require_token_ids(file: Path, settings: dict[str, Any]) -> None:
    """Raises CheckpointError unless every token id in a JSON object is a whole number, or a list of them."""
    for name, value in settings.items():
        if not name.endswith("_token_id") or value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(one) is int and one >= 0 for one in ids):
            raise CheckpointError(
                f"{file}: {name} is {value!r}; expected a token id or a list of them. Correct it, or fetch it again"
            )


def settings_in(name: str, file: str, revision: str | None) -> dict[str, Any] | None:
    """Reads a small JSON file of a checkpoint; None where it has none."""
    path = Path(name)
    if path.is_dir():
        found: str | None = str(path / file) if (path / file).is_file() else None
    else:
        quietly = dict.fromkeys(("gated_repo", "missing_entries", "connection_errors"), False)
        arguments = {f"_raise_exceptions_for_{what}": value for what, value in quietly.items()}
        found = explain_failures(name, lambda: cached_file(name, file, revision=revision or "main", **arguments))
    return None if found is None else read_json(Path(found))


# --- what cannot be trained ----------------------------------------------------------------------------------------------


def _refuse_adapter(name: str, revision: str | None) -> None:
    """Refuses an adapter: transformers loads one beside the weights, or its base model in its place, without a word."""
    path = Path(name)
    settings = settings_in(name, ADAPTER_FILE, revision)
    if settings is None:
        return
    kind = str(settings.get("peft_type") or "LoRA").replace("LORA", "LoRA")
    base = settings.get("base_model_name_or_path") or "its base model"
    code = (
        f"from peft import AutoPeftModelForCausalLM as M; "
        f"M.from_pretrained({name!r}, dtype='auto').merge_and_unload().save_pretrained('merged')"
    )
    merge = f'merge it into {base} first: python -c "{code}", and copy the tokenizer\'s files there'
    if path.is_dir() and (path / "config.json").is_file():
        raise UnsupportedModelError(
            f"{name}: a {kind} adapter ({ADAPTER_FILE}) lies beside the weights, and transformers would put it on them. If it "
            f"belongs to the model, {merge}; if not, move {ADAPTER_FILE} away",
            ADAPTER,
        )
    raise UnsupportedModelError(
        f"{name}: a {kind} adapter for {base} ({ADAPTER_FILE}), not a whole model; {merge}; then `diffvl convert merged`", ADAPTER
    )


def refuse_quantized(name: str, settings: dict[str, Any]) -> None:
    """Raises UnsupportedModelError if config.json, or a file beside it, says that the weights are quantized."""
    parts = [settings, *(value for key, value in settings.items() if key.endswith("_config") and isinstance(value, dict))]
    found = [part[key] for part in parts for key in QUANTIZATION_KEYS if part.get(key)]
    if found:
        raise UnsupportedModelError(quantized(name, _method(found[0])), QUANTIZED)
    for file, method in QUANTIZED_FILES.items():
        if (Path(name) / file).is_file():
            raise UnsupportedModelError(quantized(name, f"{method}, says {file}"), QUANTIZED)


def quantized(name: str, method: str) -> str:
    """Gives the message about quantized weights; it names the original where the README does."""
    original = _base_model(Path(name) / "README.md")
    where = f" ({original}, says its README.md)" if original else ""
    return (
        f"{name}: its weights are quantized ({method}), and quantized weights cannot be trained. Give the checkpoint that they "
        f"were made from{where}, with weights in bf16, fp16 or fp32"
    )


def _method(found: Any) -> str:
    if not isinstance(found, dict):
        return "quantization_config in its config.json"
    method = found.get("quant_method") or found.get("quant_algo") or found.get("format")
    if method is None and any("load_in_" in key for key in found):
        method = "bitsandbytes"
    bits = found.get("bits") or next((size for size in (4, 8) if found.get(f"load_in_{size}bit")), None)
    parts = [str(method)] if method else []
    return ", ".join([*parts, *([f"{bits} bits"] if bits else [])]) or "quantization_config in its config.json"


def _base_model(readme: Path) -> str | None:
    """Reads `base_model` in the front matter of a model card."""
    if not readme.is_file():
        return None
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        card = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None
    base = card.get("base_model") if isinstance(card, dict) else None
    base = base[0] if isinstance(base, list) and base else base
    return base if isinstance(base, str) else None


# --- failures ------------------------------------------------------------------------------------------------------------


def explain_failures(name: str, load: Callable[[], T]) -> T:
    """Runs a transformers loader; its many ways to fail become one message."""
    try:
        return load()
    except SafetensorError as error:
        raise CheckpointError(f"{name}: a weight file is damaged or cut short ({error}); fetch the checkpoint again") from error
    except ImportError as error:
        raise CheckpointError(f"{name}: a package is missing to read it: {error}") from error
    except (OSError, HFValidationError) as error:
        reason = first_line(error)
        if "cannot be loaded with `safetensors`" in str(error):
            raise CheckpointError(
                f"{name}: this hub checkpoint has no safetensors files, and others are not read, since they can run code. "
                "Download it, convert it with transformers (save_pretrained writes safetensors), and name that directory"
            ) from error
        if Path(name).exists():
            raise CheckpointError(f"{name}: not a whole checkpoint ({reason}); copy or fetch it again") from error
        raise UnreachableError(
            f"{name}: no such directory here, and it could not be fetched from the model hub ({reason}). Check the name and the "
            "connection, or give the directory of a downloaded checkpoint"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, StrictDataclassError) as error:
        raise UnsupportedModelError(f"{name}: transformers cannot load it: {first_line(error)}") from error


@contextmanager
def quiet_report() -> Iterator[None]:
    """Silences transformers, which prints what does not fit as a table; it is told in one message instead."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)
