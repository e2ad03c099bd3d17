"""Loading weights strictly: safetensors only, every key accounted for, and one clear message when something is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import GgufConfig

from diffvl.errors import CheckpointError, UnsupportedModelError

T = TypeVar("T")


def load_config(name: str, trust_remote_code: bool, revision: str | None = None) -> PretrainedConfig:
    """Configuration of a directory, a .gguf file or a hub id.

    Raises:
        CheckpointError: if there is none, or it cannot be fetched.
        UnsupportedModelError: if this transformers does not know the architecture.
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no config.json there; expected a Hugging Face checkpoint directory")
    if path.suffix == ".gguf" and path.is_file():
        return _told(name, lambda: AutoConfig.from_pretrained(path.parent, gguf_file=path.name))
    return _told(name, lambda: AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision))


def load_trunk(name: str, config: PretrainedConfig, trust_remote_code: bool, revision: str | None = None) -> PreTrainedModel:
    """The AR checkpoint as a stock causal LM in its own dtype; a .gguf file is dequantised."""
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return _load_gguf(path)
    return _load(AutoModelForCausalLM, name, config=config, trust_remote_code=trust_remote_code, revision=revision, dtype="auto")


def tower_config(name: str, trust_remote_code: bool) -> PretrainedConfig:
    """Configuration of a vision model with patch tokens; of a two-tower model (CLIP, SigLIP) that of the vision half.

    Raises:
        CheckpointError, UnsupportedModelError.
    """
    config = load_config(name, trust_remote_code)
    vision_config = getattr(config, "vision_config", None) or config
    sizes = ("patch_size", "image_size", "hidden_size", "num_hidden_layers")
    if lacking := [size for size in sizes if not isinstance(getattr(vision_config, size, None), int)]:
        raise UnsupportedModelError(
            f"{name}: a {config.model_type!r} model gives no patch tokens (its config has no {', '.join(lacking)}); expected a "
            "vision transformer such as SigLIP, CLIP, DINOv2 or ViT"
        )
    return vision_config


def load_tower(name: str, trust_remote_code: bool) -> PreTrainedModel:
    """The vision model of `tower_config` with its weights."""
    config = tower_config(name, trust_remote_code)
    return _load(AutoModel, name, config=config, trust_remote_code=trust_remote_code, dtype="auto")


def _load(auto_class: Any, name: str, **arguments: Any) -> PreTrainedModel:
    def load() -> tuple[PreTrainedModel, dict[str, Any]]:
        return auto_class.from_pretrained(name, use_safetensors=True, output_loading_info=True, **arguments)

    model, info = _told(name, load)
    missing, mismatched = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
    # A vision half rightly leaves the text half of its file unread; anything else unread is a fault.
    half = auto_class is AutoModel
    unexpected = [] if half else sorted(info["unexpected_keys"])
    if half:
        missing = [key for key in missing if not key.startswith("pooler.")]
    if missing or mismatched or unexpected:
        raise CheckpointError(
            f"{name}: the weights do not fit the architecture; missing {missing[:5]}, unexpected {unexpected[:5]}, "
            f"of another shape {mismatched[:5]}"
        )
    return model


def _load_gguf(path: Path) -> PreTrainedModel:
    model = _told(
        str(path),
        lambda: AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        ),
    )
    # The dequantised model still calls itself quantised and then refuses to be saved: move its weights to a plain one.
    config = model.config
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain


def _told(name: str, load: Callable[[], T]) -> T:
    """Runs a transformers loader; its many ways to fail become one message."""
    try:
        return load()
    except SafetensorError as error:
        raise CheckpointError(f"{name}: a weight file is damaged or cut short ({error}); fetch the checkpoint again") from error
    except ImportError as error:
        raise CheckpointError(f"{name}: a package is missing to read it: {error}") from error
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        if Path(name).exists():
            raise CheckpointError(f"{name}: not a whole checkpoint ({reason}); copy or fetch it again") from error
        raise CheckpointError(
            f"{name}: no such directory here, and it could not be fetched from the model hub ({reason}). Check the name and the "
            "connection, or give the directory of a downloaded checkpoint"
        ) from error
    except (ValueError, KeyError, StrictDataclassError) as error:
        raise UnsupportedModelError(f"{name}: transformers cannot load it: {str(error).strip().splitlines()[0]}") from error
